/*
 * How the next token is drawn from a row of logits on a device: engine/sampler.h's way in numbers,
 * with what a row is told about single tokens (biases, counts of earlier tokens) in one array of
 * entries for the whole step.
 *
 * A device draws the token that the CPU's sampler draws from the same logits: sums of weights run
 * in the same order with the same rounding. Where a selection has more than KM_DRAW_CANDIDATES
 * candidates, or the logits hold a NaN, it refuses the row, and the host draws from the row's
 * logits, which then have biases and penalties in them already. Log-probabilities are the host's.
 */
#ifndef KM_DEVICE_DRAW_H
#define KM_DEVICE_DRAW_H

#include <stdint.h>

enum {
	KM_DRAW_ENTRIES = 32768,   /* of a step, at most */
	KM_DRAW_BIASES = 1024,     /* of a row, at most */
	KM_DRAW_CANDIDATES = 4096,
	KM_DRAW_VOCAB = 1 << 18,   /* logits of a row, at most */
};

enum { KM_DRAWN_BY_HOST = -1 }; /* in place of a token: the row's logits are on the host */

/* Bias of a token; or how often it occurred in the output, 0 when only in the prompt. */
typedef struct km_draw_entry {
	int32_t id;
	union {
		float bias;
		int32_t output;
	};
} km_draw_entry;

typedef struct km_draw {
	uint64_t seed, index;        /* the stream, and the number of the draw in it */
	double top_p, min_p;         /* 1, 0: off */
	double frequency, presence;  /* penalties */
	float scale;                 /* 1 / temperature; 0: greedy */
	float repetition;
	int32_t top_k;               /* 0: off */
	int32_t by_device;           /* 0: the row's logits are wanted */
	int32_t bias_from, biases;   /* entries, in the order in which they are added */
	int32_t counts_from, counts; /* entries, each token once; 0: no penalties */
} km_draw;

#endif
