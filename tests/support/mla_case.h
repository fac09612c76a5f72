/*
 * Inputs for attention on a GPU: a step over a paged cache, values as the device has them (bf16
 * queries and weights), and the result that the CPU op gives for them. All owned by the case.
 */
#ifndef MLA_CASE_H
#define MLA_CASE_H

#include "device/mla_plan.h"
#include "device/op.h"

typedef struct mla_case {
	km_mla_shape shape;
	float scale;
	km_batch batch;
	int slots, positions_max;
	int32_t *positions, *slot, *seq_start, *kv_len, *pages;
	uint16_t *q;       /* bf16 [tokens, heads, nope + rope], not rotated */
	uint16_t *kv_b;    /* bf16 [heads * (nope + v), kv_lora_rank] */
	float *cos_sin;    /* [positions_max, rope] */
	void *cache;       /* [slots, kv_lora_rank + rope] */
	float *out;        /* [tokens, heads, v], the CPU's */
	uint16_t *rotated; /* bf16 q as kk_rope_kv leaves the prompt's rows */
} mla_case;

typedef struct mla_case_step {
	int seqs, decode_seqs, page_size;
	const int *past, *rows; /* [seqs]: cached tokens before the step's rows */
	int every;              /* a prompt's rows: every so many'th token, and the last; 1: all */
} mla_case_step;

void mla_case_init(mla_case *c, const km_mla_shape *shape, const mla_case_step *step,
                   uint64_t seed);
/* Fills `out` by the CPU's mla_decode and mla_prefill. */
void mla_case_solve(mla_case *c);
void mla_case_release(mla_case *c);

float mla_case_bf16(uint16_t v);
uint16_t mla_case_to_bf16(float v);

/* What a row of `count` values is off by: ‖got - want‖ / ‖want‖; infinite where a value is not
 * finite. */
double mla_case_error(const uint16_t *got, const float *want, int count);

#endif
