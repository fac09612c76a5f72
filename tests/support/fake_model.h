/*
 * A model whose logits tell exactly which KV it was shown: a slot remembers a hash of everything
 * that was visible when it was written, and logits are random numbers seeded by the hash of all
 * that a row can see. A page that is shared wrongly, written twice, freed too early or listed in
 * the wrong place changes tokens. With `forms` a row computed in decode form leaves other KV than
 * in prompt form, as rounding does in a real model.
 */
#ifndef TESTS_FAKE_MODEL_H
#define TESTS_FAKE_MODEL_H

#include "engine/engine_state.h"

enum { FAKE_VOCAB = 96, FAKE_EOS = 0, FAKE_MARKER = 90 /* and up: "<m90>" ... */ };

typedef struct fake_model {
	bool forms;
	int slots;
	uint64_t *kv;        /* [slots] */
	float *logits;       /* [rows, FAKE_VOCAB] */
	int max_rows, max_tokens, max_seqs;
	float spread;        /* of the logits */
	atomic_int steps;
	atomic_int fail_at;  /* a step number that fails with fail_code; 0: none */
	atomic_int fail_code;
	atomic_int nan_id;   /* a prompt that begins with it gets NaN; -1: none */
	atomic_int hold_from; /* steps from this number on wait while it is set; 0: none */
	char bytes[FAKE_VOCAB][8];
	/* When it draws itself: */
	km_sampler *sampler;
	int32_t *drawn[2], *ids; /* [max_rows] of the steps under way, [max_tokens] */
	int launched, finished;
	atomic_int ahead, refused; /* steps launched while another was under way; rows */
} fake_model;

/* Models that are started from here on draw tokens, and take steps ahead of the last one's. */
extern bool fake_draws;

/* Shape's context, pages, limits are the caller's; a shape that is all 0 gets defaults first. */
km_engine_shape fake_shape(void);
km_engine *fake_engine(fake_model *model, const km_engine_shape *shape);
/* engine may be NULL: it was stopped already. */
void fake_close(km_engine *engine, fake_model *model);

#endif
