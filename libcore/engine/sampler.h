/*
 * The sampler: one row of logits to one token, and log-probabilities.
 *
 * The order is vLLM's: logit_bias; repetition penalty (a logit above 0 is divided by it, one below
 * multiplied; prompt and output tokens), frequency penalty (times the count in the output),
 * presence penalty (output); greedy when temperature < 1e-5; temperature; top_k; top_p, over what
 * top_k left, renormalised; min_p, against the best token's probability; a draw. Of tokens with
 * equal logits the lower id comes first in every selection.
 *
 * A draw takes what the selections left in the order of ids.
 *
 * top_p keeps the smallest set of best tokens whose sum reaches it. vLLM applies min_p before
 * top_k and top_p; SGLang last, as here: the two differ only where both cut.
 *
 * A draw is a function of (logits, sampling, counts, seed, index): the same everywhere,
 * replayable. Log-probabilities are the model's: of the raw logits, before all of the above.
 *
 * A km_sampler is scratch for one thread; sampling allocates nothing. A row of 163840 logits takes
 * 34 us greedy, 105 us with a temperature, 46 to 207 us with selections, 125 us for 20
 * log-probabilities (tests/bench_sampler, medians; EPYC Zen 4 with AVX-512, one thread, machine
 * shared).
 */
#ifndef KM_ENGINE_SAMPLER_H
#define KM_ENGINE_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "device/draw.h"

enum { KM_MAX_LOGPROBS = 20 };

typedef struct km_logit_bias {
	int32_t id;
	float bias;
} km_logit_bias;

typedef struct km_sampling {
	double temperature; /* 0: greedy */
	double top_p;       /* (0, 1]; 1: off */
	int top_k;          /* <= 0: off */
	double min_p;       /* [0, 1]; 0: off */
	double repetition_penalty; /* > 0; 1: off; prompt and output tokens */
	double frequency_penalty, presence_penalty; /* 0: off; output tokens */
	bool has_seed;
	uint64_t seed;      /* sample i of n draws from stream seed + i */
	const km_logit_bias *bias; /* borrowed by submit */
	int bias_count;
} km_sampling;

typedef struct km_logprob {
	int32_t id;
	float logprob; /* -infinity for a logit of -infinity */
} km_logprob;

void km_sampling_init(km_sampling *sampling); /* temperature 1, everything else off */

/* KM_EINVAL names the field that makes no sense. */
int km_sampling_check(const km_sampling *sampling, int vocab_size, km_err *err);
bool km_sampling_has_penalties(const km_sampling *sampling);

/* How often each token occurred: for penalties. Sized once. */
typedef struct km_counts {
	int cap, count;   /* distinct tokens */
	uint32_t mask;
	int32_t *slot;    /* [mask + 1], index of an entry or -1 */
	int32_t *id;      /* [cap] */
	int32_t *output;  /* [cap], times in the output; 0: in the prompt only */
} km_counts;

void km_counts_init(km_counts *counts, int max_distinct);
void km_counts_release(km_counts *counts);
void km_counts_add(km_counts *counts, int32_t id, bool output);

typedef struct km_sampler km_sampler;

km_sampler *km_sampler_new(int vocab_size);
void km_sampler_free(km_sampler *sampler);

typedef struct km_sample_args {
	const float *logits;         /* [vocab_size] */
	const km_sampling *sampling;
	const km_counts *counts;     /* NULL: no penalties */
	uint64_t seed, index;        /* the stream, and the number of the draw in it */
	int logprobs;                /* < 0: none; else how many alternatives */
} km_sample_args;

typedef struct km_sampled {
	int32_t id;
	float logprob;
	int top_count;
	km_logprob top[KM_MAX_LOGPROBS]; /* best first */
} km_sampled;

/* KM_EFORMAT when the logits hold a NaN or +infinity, or nothing but -infinity. */
int km_sampler_sample(km_sampler *sampler, const km_sample_args *args, km_sampled *out,
                      km_err *err);

/* The same draw for a device (device/draw.h), without entries: their places are the caller's. */
km_draw km_sampler_draw(const km_sample_args *args, int vocab_size);

/* The log-probability of `id` under logits, and of the `top` best. */
int km_sampler_score(km_sampler *sampler, const float *logits, int32_t id, int top, km_sampled *out,
                     km_err *err);

#endif
