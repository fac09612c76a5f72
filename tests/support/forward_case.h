/*
 * Tiny models of tests/data/forward run through steps of any shape, and compared with their golden
 * log-probabilities: what the tests of the forward pass on the CPU and on a GPU have in common.
 */
#ifndef TESTS_FORWARD_CASE_H
#define TESTS_FORWARD_CASE_H

#include "model/model.h"
#include "support/tiny_checkpoint.h"

enum {
	FWD_MAX_ROWS = 256,
	FWD_MAX_SEQS = 4,
	FWD_PAGE = 8,
	FWD_PAGES_PER_SEQ = 16,
	FWD_KV_SLOTS = FWD_MAX_SEQS * FWD_PAGE * FWD_PAGES_PER_SEQ,
	FWD_LONG_CONTEXT = 4160,
	FWD_LONG_PAGES = FWD_LONG_CONTEXT / FWD_PAGE,
};

#define FWD_BOUND 1e-3 /* of a log-probability, against the reference, in f32 */

/* A sequence: its tokens, how many are in the cache, its pages, and the logits of its rows so far.
 * */
typedef struct fwd_sequence {
	int32_t ids[FWD_LONG_CONTEXT], pages[FWD_LONG_PAGES];
	int len, done, page_count;
	float *logits; /* [len, vocab] */
} fwd_sequence;

/* A step under construction. Decoding sequences are added first. */
typedef struct fwd_step {
	km_batch batch;
	int32_t ids[FWD_MAX_ROWS], positions[FWD_MAX_ROWS], slots[FWD_MAX_ROWS],
		logit_row[FWD_MAX_ROWS];
	int32_t seq_start[FWD_MAX_SEQS + 1], kv_len[FWD_MAX_SEQS],
		pages[FWD_MAX_SEQS * FWD_LONG_PAGES];
	fwd_sequence *owner[FWD_MAX_SEQS];
} fwd_step;

typedef struct fwd_opened {
	json_t *golden;
	char *dir;
	km_model *model;
	int vocab;
} fwd_opened;

/* Differences of log-probabilities, and top tokens that are others where the margin says more. */
typedef struct fwd_difference {
	double max, sum;
	int count, wrong_top;
} fwd_difference;

km_model_options fwd_options(const char *isa, enum km_kv_dtype kv_dtype); /* one thread, small */
fwd_opened fwd_open(const char *name, km_model_options options);          /* fails the test */
void fwd_close(fwd_opened *o);

/* Prompt `index` of the golden file, in the pages of place `place`, handed out in no special order.
 * */
fwd_sequence *fwd_prompt(const fwd_opened *o, int index, int place);
void fwd_drop(fwd_sequence *q);

void fwd_add(fwd_step *s, fwd_sequence *q, int rows, bool decode);
void fwd_point(fwd_step *s);
/* Runs the step, gives each sequence its rows' logits, and empties the step. */
void fwd_run(fwd_opened *o, fwd_step *s);

/* The whole prompt: `first` rows, then chunks of `chunk`, or one token at a time by the decode
 * form. */
fwd_sequence *fwd_score(fwd_opened *o, int index, int first, int chunk, bool decode);
fwd_sequence *fwd_score_whole(fwd_opened *o, int index);

/* log softmax of one row at one token; and the row's first maximum */
double fwd_log_prob(const float *row, int vocab, int id, int *top);

/* Each prompt token's log-probability, the top token and its log-probability, against the
 * reference. */
void fwd_compare(const fwd_opened *o, int index, const fwd_sequence *q, fwd_difference *d);

/* The largest difference of any token's log-probability between two scored sequences. */
double fwd_largest_difference(const fwd_opened *o, const fwd_sequence *a, const fwd_sequence *b);

#endif
