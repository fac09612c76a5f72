/*
 * What a backend does of a step: model/forward.c says in which order. forward_cpu.c makes these of
 * the ops of device/op.h, one after the other; forward_cuda.c of launches that take several ops in,
 * because there a launch costs what reading 6 MB of weights costs. So this is where the two part:
 * the blocks of the model are one description, what a block is made of is the backend's.
 *
 * Private to model/. Each returns a negative code when the device failed; nothing else can fail.
 */
#ifndef KM_MODEL_FORWARD_H
#define KM_MODEL_FORWARD_H

#include "model/model_state.h"

typedef int km_run_steps(km_model *m, const km_batch *batch, km_err *err);

typedef struct km_steps {
	/* At open, for options.capture_at_open; or NULL. */
	int (*prepare)(km_model *m, km_run_steps *run, km_err *err);
	/* The batch, and the rows that the last layer keeps of it (m->kept), are there to be used.
	 * */
	int (*begin)(km_model *m, const km_batch *batch, km_err *err);
	/* Calls `run` with the batch, or does again what it enqueued for an earlier step of this
	 * form, whole or in pieces. */
	int (*replay)(km_model *m, const km_batch *batch, km_run_steps *run, km_err *err);
	int (*embed)(km_model *m, const km_batch *batch, km_err *err); /* the stream */
	/* stream += delta (on a GPU it has been added), but for the first layer; norm; latent and rotated key
	 * into the cache. */
	int (*project)(km_model *m, int layer, const km_batch *batch, km_err *err);
	/* Only the rows m->kept.from of the stream go on, as rows of `kept`. */
	int (*keep)(km_model *m, const km_batch *kept, km_err *err);
	/* delta = attention's output */
	int (*attend)(km_model *m, int layer, const km_batch *batch, km_err *err);
	/* stream += delta; norm; delta = the MLP's, or the shared and routed experts' */
	int (*feed_forward)(km_model *m, int layer, const km_batch *batch, km_err *err);
	/* stream += delta; norm; logits of the rows m->kept.row[batch->logit_row[i]] */
	int (*head)(km_model *m, const km_batch *batch, km_err *err);
	/* Once for each begin, whatever came of it: rc, and the logits when that is 0. */
	int (*end)(km_model *m, const km_batch *batch, int rc, const float **logits, km_err *err);
} km_steps;

extern const km_steps km_cpu_steps;

/* A whole step; the layers [from, to) of one; the head, behind the last layer. */
int km_steps_run(km_model *m, const km_batch *batch, km_err *err);
int km_steps_run_layers(km_model *m, const km_batch *batch, int from, int to, km_err *err);
int km_steps_run_head(km_model *m, km_err *err);

/* Which rows the last layer keeps, and the batch that they make: before `begin`. */
void km_kept_choose(km_kept *kept, const km_batch *batch);
int km_forward_prepare(km_model *m, km_err *err);

void km_kept_init(km_kept *kept, const km_model_options *options);
void km_kept_release(km_kept *kept);

#endif
