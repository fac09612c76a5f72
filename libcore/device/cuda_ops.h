/*
 * The ops on a GPU that are neither router, attention nor int4 experts: each enqueues work on the
 * GPU's stream, allocates nothing and waits for nothing.
 *
 * Why no km_ops table: an op of the CPU is one function of f32 rows; on a GPU a launch costs as
 * much as reading 6 MB of weights, so its ops take in what surrounds them (two projections of one
 * row, a norm with the sum before it, rope with the KV write), and what a linear layer reads is
 * bf16 where the CPU has f32. The steps of the model that both backends have in common are
 * model/forward.h's.
 *
 * Pointers are device memory, activations packed unless a stride is given: the stream of hidden
 * states, and what is added to it, f32; what a linear layer reads, bf16. A km_weight's data and
 * scale are on the device.
 */
#ifndef KM_DEVICE_CUDA_OPS_H
#define KM_DEVICE_CUDA_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "device/cuda.h"
#include "device/mla_plan.h"
#include "device/turn.h"
#include "device/weight.h"

/*
 * How a linear layer is computed: by the weight, the number of rows and the device alone.
 *
 *   SLAB     ours, up to 8 rows, bf16; the norm or the SiLU before it may be part of it
 *   STREAM   ours, bound by the weight's bytes: bf16 and fp8
 *   BLAS     cuBLASLt; a weight that is not bf16 is first made so, in scratch
 *   GENERAL  ours, any weight, slow
 */
enum km_linear_form { KM_LINEAR_SLAB, KM_LINEAR_STREAM, KM_LINEAR_BLAS, KM_LINEAR_GENERAL };

typedef struct km_linear_device {
	bool blas; /* cuBLASLt is there */
	bool slab; /* compute capability 9.0 or later: bulk copies */
} km_linear_device;

enum km_linear_form km_linear_plan(const km_weight *w, int tokens, const km_linear_device *device);
void km_linear_explain(const km_weight *w, const km_linear_device *device, km_buf *out);

/* cuBLASLt computes this many rows for `tokens`: its algorithms are looked up for few counts.
 * Buffers that linear layers read and write have room for km_linear_rounded(most tokens) rows. */
int km_linear_rounded(int tokens);

/* Where x comes from: given; or made of f32 rows by a norm of `a` with weight b, or as
 * silu(a) * b. */
enum km_x_from { KM_X_GIVEN, KM_X_NORM, KM_X_SILU };

/* y_i (+)= x W_iᵀ, for one to three weights over the same x. */
enum { KM_LINEAR_WEIGHTS = 3 };

typedef struct km_cuda_linear {
	const void *x; /* bf16 [tokens, x_stride], when it is given */
	int x_stride;
	const km_weight *w[KM_LINEAR_WEIGHTS];
	void *y[KM_LINEAR_WEIGHTS]; /* f32 or bf16 [tokens, w_i.rows] */
	int weights, tokens;
	bool y_bf16, accumulate; /* accumulate: f32 */
	void *scratch;           /* 2 rows cols bytes, for BLAS over weights that are not bf16 */
	enum km_turn turn;       /* AFTER, unless one launch makes x and the result */
	/* x that is to be made: */
	enum km_x_from from;
	float *a;       /* [tokens, cols], only read */
	const float *b; /* the norm's weight [cols]; up [tokens, cols] */
	float eps;
	void *made; /* bf16 [tokens, cols]: room for x, which is there afterwards with `keep` */
	bool keep;
} km_cuda_linear;

/* Whether the layer's launch makes x itself; where it does not, km_cuda_ops_linear has another launch
 * do it first, which is km_cuda_ops_make_x (x is then a->made). */
bool km_cuda_linear_makes_x(const km_cuda_linear *args, const km_linear_device *device);
int km_cuda_ops_make_x(km_cuda *cuda, const km_cuda_linear *args, km_err *err);

int km_cuda_ops_linear(km_cuda *cuda, const km_linear_device *device, const km_cuda_linear *args,
                       km_err *err);

int km_cuda_ops_embed(km_cuda *cuda, const int32_t *ids, int tokens, const km_weight *table,
                      float *y, km_err *err);

/* residual += delta (when given); y = norm(residual). */
typedef struct km_cuda_norm {
	float *residual;     /* [tokens, stride] */
	const float *delta;  /* [tokens, size] or NULL */
	const float *weight; /* [size] */
	void *y;             /* bf16 [tokens, size] */
	int tokens, size, stride;
	float eps;
} km_cuda_norm;

int km_cuda_ops_norm(km_cuda *cuda, const km_cuda_norm *args, km_err *err);

/* y = silu(gate) * up, [tokens, size]; y bf16 */
int km_cuda_ops_silu_mul(km_cuda *cuda, const float *gate, const float *up, void *y, int tokens,
                         int size, km_err *err);
/* to[i] = from[rows[i]], rows of `bytes`, a multiple of 4 */
int km_cuda_ops_gather(km_cuda *cuda, const int32_t *rows, int count, const void *from, void *to,
                       int bytes, km_err *err);
/* counts[id]++ for each id of the first *valid of `rows` rows of `each` (all, without valid). */
int km_cuda_ops_count(km_cuda *cuda, const int32_t *ids, int rows, int each, const int32_t *valid,
                      int64_t *counts, km_err *err);
int km_cuda_ops_dequantize(km_cuda *cuda, const km_weight *w, void *to, km_err *err); /* to bf16 */

/*
 * For each row: the norm of kv_a's latent and the rotation of its k_pe, both to the row's slot in
 * the cache (a slot below 0: nowhere); and the rotation of q's last rope_dim values of each head,
 * in place, in the rows from q_from on. The decoding rows come first; km_cuda_mla_decode rotates
 * theirs.
 */
typedef struct km_cuda_rope_kv {
	int tokens, q_from;
	km_mla_shape shape;
	void *q;           /* bf16 [tokens, heads, nope_dim + rope_dim] */
	const float *kv_a; /* [tokens, kv_lora_rank + rope_dim] */
	const float *norm; /* [kv_lora_rank] */
	float eps;
	const float *cos_sin;     /* [positions, rope_dim] */
	const int32_t *positions; /* [tokens] */
	const int32_t *slots;     /* [tokens] */
	void *cache;
} km_cuda_rope_kv;

int km_cuda_ops_rope_kv(km_cuda *cuda, const km_cuda_rope_kv *args, km_err *err);

#endif
