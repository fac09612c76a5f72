/*
 * Launchers of what is between attention and experts: embedding, norm, dense linear layers, SiLU,
 * moving rows.
 *
 * Pointers are device memory, borrowed until the stream has run the call; a km_weight comes by
 * value, with `data` and `scale` on the device. Nothing is allocated, nothing is waited for, no
 * launch geometry depends on device data: each call may be captured. A launcher given what it was
 * not built for returns cudaErrorInvalidValue. `pdl` marks a launch that may begin before its
 * predecessor in the stream has ended: the kernel waits for it before it touches anything but
 * weights.
 *
 * Activations: the residual stream and what is added to it are f32; what a linear layer reads is
 * bf16. Rows of bf16 that a linear layer reads begin at multiples of 16 bytes (x_stride % 8 == 0).
 */
#ifndef KK_DENSE_H
#define KK_DENSE_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "device/turn.h"
#include "device/weight.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[t] = table[ids[t]], any float type of table. */
typedef struct kk_embed_args {
	const int32_t *ids; /* [tokens] */
	km_weight table;    /* [vocab, hidden] */
	float *y;           /* [tokens, hidden] */
	int tokens;
	bool pdl;
} kk_embed_args;

cudaError_t kk_embed(const kk_embed_args *args, cudaStream_t stream);

/* residual += delta (when given); y = residual / sqrt(mean(residual²) + eps) * weight. */
typedef struct kk_norm_args {
	float *residual;     /* [tokens, residual_stride], written only with delta */
	const float *delta;  /* [tokens, size] or NULL */
	const float *weight; /* [size] */
	void *y;             /* bf16 [tokens, y_stride] */
	int tokens, size, residual_stride, y_stride;
	float eps;
	bool pdl;
} kk_norm_args;

cudaError_t kk_norm(const kk_norm_args *args, cudaStream_t stream);

/* y = silu(gate) * up */
typedef struct kk_silu_mul_args {
	const float *gate, *up; /* [tokens, size] */
	void *y;                /* bf16 [tokens, size] */
	int tokens, size;
	bool pdl;
} kk_silu_mul_args;

cudaError_t kk_silu_mul(const kk_silu_mul_args *args, cudaStream_t stream);

/* to[i] = from[rows[i]]; `bytes` a row, a multiple of 4. */
typedef struct kk_gather_args {
	const int32_t *rows; /* [count] */
	const void *from;
	void *to;
	int count, bytes;
	bool pdl;
} kk_gather_args;

cudaError_t kk_gather(const kk_gather_args *args, cudaStream_t stream);

/*
 * y_i = x W_iᵀ for one to three weights over the same x, in one launch; three in the slab form alone.
 * With `accumulate` the product is added to y (f32 only).
 */
enum { KK_LINEAR_WEIGHTS = 3 };

typedef struct kk_linear_args {
	const void *x;                  /* bf16 [tokens, x_stride] */
	km_weight w[KK_LINEAR_WEIGHTS]; /* cols the same */
	void *y[KK_LINEAR_WEIGHTS];     /* f32 or bf16 [tokens, y_stride[i]], w[i].rows written */
	int y_stride[KK_LINEAR_WEIGHTS];
	int weights;
	int tokens, x_stride;
	bool y_bf16, accumulate, pdl;
} kk_linear_args;

/* bf16 and fp8 weights on tensor cores; kk_linear_stream_fits says whether a weight fits it. A
 * row's result does not depend on the other rows, nor on how many there are. */
bool kk_linear_stream_fits(const km_weight *w);
cudaError_t kk_linear_stream(const kk_linear_args *args, cudaStream_t stream);
/* Any weight. The same promise. */
cudaError_t kk_linear_general(const kk_linear_args *args, cudaStream_t stream);

/*
 * The same for few rows over bf16 weights, all of a block's weights on their way before the
 * predecessor has ended. x is given as `linear.x`, or made on the way, each block for itself:
 *   KK_X_NORM  a row of `a`, as kk_norm's
 *   KK_X_SILU  silu(a) * b, as kk_silu_mul's
 * A row's result depends on its values alone, and is the same for each way of giving x.
 */
enum kk_x_from { KK_X_GIVEN, KK_X_NORM, KK_X_SILU };

typedef struct kk_linear_slab_args {
	kk_linear_args linear; /* x only when it is given */
	enum kk_x_from from;
	const float *a; /* [tokens, a_stride]: what the norm is of; gate */
	const float *b; /* up [tokens, cols]; for the norm, its weight [cols] */
	int a_stride;
	float eps;
	void *x_out; /* bf16 [tokens, cols], the x that was made; NULL: not wanted */
	enum km_turn turn; /* AFTER or HOLDS */
	int multiprocessors;
	/* Other than the launcher's choice, for measuring; 0: its choice. Most rows of a slab. */
	int blocks_per_sm, stage_bytes, smem_bytes, rows;
} kk_linear_slab_args;

bool kk_linear_slab_fits(const km_weight *w, int tokens, enum kk_x_from from);
cudaError_t kk_linear_slab(const kk_linear_slab_args *args, cudaStream_t stream);

/* counts[id]++ for each of the `each` ids of the first *valid rows (all, without valid). Whole
 * numbers, so the order of additions changes nothing. */
typedef struct kk_count_args {
	const int32_t *ids;        /* [rows, each], in [0, size of counts) */
	const int32_t *valid;      /* or NULL */
	unsigned long long *counts;
	int rows, each;
	bool pdl;
} kk_count_args;

cudaError_t kk_count(const kk_count_args *args, cudaStream_t stream);

/* to[row, col] = bf16(w[row, col]) */
cudaError_t kk_dequantize(const km_weight *w, void *to, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
