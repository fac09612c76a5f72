/* What the attention's plans and its kernels share: a shape, and the pieces that a step is cut
 * into. */
#ifndef KM_DEVICE_MLA_SHAPE_H
#define KM_DEVICE_MLA_SHAPE_H

#include <stdbool.h>
#include <stdint.h>

enum {
	KM_MLA_TILE = 64,          /* cached tokens of a decode step's tile */
	KM_MLA_PREFILL_TILE = 128, /* cached tokens, and rows, of a prefill tile */
	KM_MLA_RUN = 64,           /* cached tokens that one block gathers */
};

typedef struct km_mla_shape {
	int heads, nope_dim, rope_dim, v_dim, kv_lora_rank;
	bool fp8; /* the cache: e4m3, scale 1; else bf16 */
} km_mla_shape;

/* Cached tokens [first, first + count) of a sequence, at `offset` in the scratch; count <=
 * KM_MLA_RUN. */
typedef struct km_mla_run {
	int32_t seq, first, count, offset;
} km_mla_run;

/* Rows [row, row + rows) of the batch, against cached tokens [first, first + count) of their
 * sequence, which are at `offset` in the scratch. */
typedef struct km_mla_tile {
	int32_t row, rows, first, count, offset;
	int32_t resumes, goes_on; /* the rows' softmax is in, or is left in, the state */
	int32_t unused;
} km_mla_tile;

#endif
