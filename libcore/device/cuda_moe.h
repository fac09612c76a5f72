/*
 * The experts on the GPU: doing what a plan (device/moe_plan.h) says.
 *
 * y = routed_scale * sum over k of weights[t, k] * down_e(silu(gate_e x) * up_e x), e = ids[t, k], in
 * f32 and in the order of k, then one rounding; places whose weight is 0 or whose id is outside the
 * device's experts add nothing. With `accumulate`, y is added to. Every element of y is written, so
 * that nothing needs to be zeroed; a token none of whose experts is here has a sum of 0.
 *
 * km_cuda_moe_run enqueues on the GPU's stream; it allocates nothing, waits for nothing and launches
 * the same kernels whatever the data, so it may be captured. A plan that does not fit the problem is
 * refused with a sentence. The same arguments give the same bits.
 */
#ifndef KM_DEVICE_CUDA_MOE_H
#define KM_DEVICE_CUDA_MOE_H

#include <stdbool.h>
#include <stdint.h>

#include "device/cuda.h"
#include "device/moe_plan.h"
#include "device/weight.h"

/* One matrix of every expert here; expert e's at data + e * data_stride bytes. */
typedef struct km_moe_matrix {
	const void *data, *scale;
	size_t data_stride, scale_stride;
} km_moe_matrix;

/* Device memory, 16-byte aligned. */
typedef struct km_moe_weights {
	bool packed;              /* int4, format/moe_layout.h: gate_up and down, without `scale` */
	km_moe_matrix gate_up;    /* packed */
	km_moe_matrix gate, up;   /* not packed: device/weight.h's layouts */
	km_moe_matrix down;
	enum km_weight_type type; /* not packed */
	enum km_dtype scale_dtype;
	int group;
	int block_rows, block_cols;
} km_moe_weights;

/* What goes before the experts, as part of their launch, where the plan takes it (km_moe_plan_takes). */
typedef struct km_moe_front {
	const float *logits;  /* [tokens, experts], the router's */
	const float *bias;    /* [experts] */
	const int32_t *valid; /* one word, rows that count, or NULL */
	bool renormalize;
	float scale;          /* multiplies the weights */
	const void *down;     /* bf16 [hidden, KM_MOE_FRONT_COLS]: y is added its product with silu(gate) * up */
	const float *gate, *up; /* [tokens, KM_MOE_FRONT_COLS] */
} km_moe_front;

typedef struct km_moe_buffers {
	const void *x;             /* bf16 [tokens, hidden], below 2^62 in size: beyond, int4 experts may give infinities */
	const km_moe_front *front; /* or NULL; with it y is f32 and accumulates */
	int32_t *ids;              /* [tokens, top_k]; read, or with `front` written */
	float *weights;            /* [tokens, top_k]; likewise */
	const int32_t *expert_map; /* [global_experts]: id to place among this device's experts, -1: not here; or NULL */
	km_moe_weights experts;
	float routed_scale;
	void *y;                   /* bf16 or f32 [tokens, hidden] */
	bool y_bf16, accumulate;
	void *scratch;             /* km_moe_scratch_size of at least as many tokens */
} km_moe_buffers;

int km_cuda_moe_run(km_cuda *cuda, const km_moe_plan *plan, const km_moe_problem *problem,
                    const km_moe_buffers *buffers, km_err *err);

#endif
