/*
 * The op table: the steps of the model, one form for each backend.
 *
 * An op is a function of a POD argument struct; it enqueues work (the CPU runs it at once),
 * allocates nothing and checks nothing that the model has checked. Activations are f32, row-major.
 * The plain C form (device/cpu_plain.c) is the specification; each other form is compared with it
 * under the bound stated in tests/test_ops.c. On one backend a row's result never depends on the
 * other rows of the batch: sums over columns have one fixed order whatever `tokens` is, and no sum
 * is split by threads.
 *
 * The CPU forms run on OpenMP's threads (omp_set_num_threads of the calling thread), one thread
 * where a call is too small to pay for more, never more than scratch was sized for. Scratch is
 * 64-byte aligned, belongs to the call and needs no clearing.
 *
 * km_op_cost gives the bytes and flops of a call by one formula; trace, the CPU ops' choice of threads,
 * benchmark and tests use it.
 */
#ifndef KM_DEVICE_OP_H
#define KM_DEVICE_OP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "device/batch.h"
#include "device/weight.h"

enum km_kv_dtype { KM_KV_F32, KM_KV_BF16, KM_KV_FP8 }; /* fp8: e4m3, scale 1 */

/* y[t] = table[ids[t]] */
typedef struct km_embed_args {
	int tokens;
	const int32_t *ids;     /* [tokens] */
	const km_weight *table; /* [vocab, hidden], a float type */
	float *y;               /* [tokens, hidden] */
} km_embed_args;

/* residual += x (when x is given); y = residual / sqrt(mean(residual^2) + eps) * weight.
 * In and out rows may be strided (q_a and kv_a are slices of one projection). */
typedef struct km_rmsnorm_args {
	int tokens, size;
	float *residual;     /* [tokens, residual_stride], updated only when x is given */
	int residual_stride;
	const float *x;      /* [tokens, size] or NULL */
	const float *weight; /* [size] */
	float eps;
	float *y;            /* [tokens, y_stride] */
	int y_stride;
} km_rmsnorm_args;

/* y = x Wᵀ (+ y when accumulate). */
typedef struct km_linear_args {
	int tokens;
	const float *x; /* [tokens, x_stride], w->cols used */
	int x_stride;
	const km_weight *w;
	float *y;       /* [tokens, y_stride], w->rows written */
	int y_stride;
	bool accumulate;
} km_linear_args;

/* Rotates interleaved pairs (2i, 2i+1) of each row's `dim` values, in place.
 * cos_sin [max_positions, dim]: cos of the dim/2 pairs, then sin. */
typedef struct km_rope_args {
	int tokens, heads, dim;
	float *x;            /* element (t, h, i) at x[t * token_stride + h * head_stride + i] */
	int token_stride, head_stride;
	const int32_t *positions; /* [tokens] */
	const float *cos_sin;
} km_rope_args;

/* Writes [latent (kv_lora_rank) | k_pe (rope_dim)] of each row to its slot. */
typedef struct km_kv_write_args {
	int tokens, kv_lora_rank, rope_dim;
	const float *latent; /* [tokens, latent_stride], after its norm */
	int latent_stride;
	const float *k_pe;   /* [tokens, k_pe_stride], after rope */
	int k_pe_stride;
	const int32_t *slots; /* [tokens] */
	void *cache;          /* [slots, kv_lora_rank + rope_dim] of kv_dtype */
	enum km_kv_dtype kv_dtype;
} km_kv_write_args;

/* MLA over the paged cache; causal. Decode takes the rows of batch->seqs[0..decode_seqs) and the
 * absorbed form; prefill takes the other rows and the plain form (keys and values rebuilt from the
 * latent through kv_b). Rows of q and out are the batch's rows. */
typedef struct km_mla_args {
	const km_batch *batch;
	int heads, nope_dim, rope_dim, v_dim, kv_lora_rank;
	/* [tokens, heads, nope_dim + rope_dim], rope applied to the last rope_dim */
	const float *q;
	const km_weight *kv_b; /* rows h*(nope_dim+v_dim)+{k_nope..., v...}, cols kv_lora_rank */
	const void *cache;     /* [slots, kv_lora_rank + rope_dim] */
	enum km_kv_dtype kv_dtype;
	float scale;           /* softmax scale, mscale² included */
	float *out;            /* [tokens, heads, v_dim] */
	void *scratch;         /* km_mla_scratch_bytes */
} km_mla_args;

/* y = silu(gate) * up */
typedef struct km_silu_mul_args {
	int tokens, size;
	const float *gate, *up; /* [tokens, stride] */
	int stride;
	float *y; /* [tokens, size] */
} km_silu_mul_args;

enum { KM_GATE_MAX_TOP_K = 64, KM_GATE_MAX_GROUPS = 64 };

/* Selects top_k experts of each row: score = sigmoid or softmax of the logits; selection by
 * score + bias, within the topk_group best groups when there are groups (a group's score is the sum
 * of its two best); ties to the lower id; weights are the selected scores, divided by their sum
 * + 1e-20 when asked. An expert whose logit or score + bias is NaN or -inf is never selected; a row
 * with too few experts left (softmax: with any NaN) has id 0 and weight 0 in the places left
 * over. */
typedef struct km_gate_args {
	int tokens, experts, top_k; /* top_k <= KM_GATE_MAX_TOP_K */
	int groups, topk_group;     /* groups <= KM_GATE_MAX_GROUPS, divides experts; 0, 1: none */
	bool softmax, renormalize;
	const float *logits; /* [tokens, experts] */
	const float *bias;   /* [experts] or NULL */
	int32_t *ids;        /* [tokens, top_k], by falling score + bias */
	float *weights;      /* [tokens, top_k], without the routed scaling factor */
} km_gate_args;

/* y[t] += routed_scale * sum_k weights[t,k] * down_e(silu(gate_e x) * up_e x), e = ids[t,k]; the
 * sum runs in the order of k, in f32, and leaves out the places whose weight is 0. */
typedef struct km_moe_args {
	int tokens, experts, top_k, hidden, intermediate;
	const float *x;         /* [tokens, hidden] */
	const int32_t *ids;     /* [tokens, top_k] */
	const float *weights;   /* [tokens, top_k] */
	const km_weight *gate, *up, *down; /* [experts] each */
	float routed_scale;
	float *y;               /* [tokens, hidden], added to */
	void *scratch;          /* km_moe_scratch_bytes */
} km_moe_args;

enum km_op {
	KM_OP_EMBED, KM_OP_RMSNORM, KM_OP_LINEAR, KM_OP_ROPE, KM_OP_KV_WRITE, KM_OP_MLA_DECODE,
	KM_OP_MLA_PREFILL, KM_OP_SILU_MUL, KM_OP_GATE, KM_OP_MOE,
	KM_OP_COUNT,
};

typedef struct km_ops {
	const char *name; /* "plain", "avx2", "avx512", "portable" */
	void (*embed)(const km_embed_args *);
	void (*rmsnorm)(const km_rmsnorm_args *);
	void (*linear)(const km_linear_args *);
	void (*rope)(const km_rope_args *);
	void (*kv_write)(const km_kv_write_args *);
	void (*mla_decode)(const km_mla_args *);
	void (*mla_prefill)(const km_mla_args *);
	void (*silu_mul)(const km_silu_mul_args *);
	void (*gate)(const km_gate_args *);
	void (*moe)(const km_moe_args *);
} km_ops;

/* Enough for every CPU form, for calls of up to `max_tokens` rows (decode and prefill together) and
 * `max_context` cached tokens, on up to `threads` threads. Only the shape's sizes are read. */
size_t km_mla_scratch_bytes(const km_mla_args *shape, int max_tokens, int max_context, int threads);
size_t km_moe_scratch_bytes(const km_moe_args *shape, int max_tokens, int threads);

typedef struct km_cost {
	double bytes, flops;
} km_cost;

/* What a call must read and write at least once (weights that several rows share count once), and
 * its multiply-adds times two. `args` is the op's struct, with its pointers set. */
km_cost km_op_cost(enum km_op op, const void *args);
const char *km_op_name(enum km_op op); /* "moe" */

/* The CPU backends. `isa` is NULL for the best this machine has, or one of km_cpu_isas; NULL comes
 * back when this machine cannot run it. */
const km_ops *km_cpu_ops(const char *isa);
extern const char *const km_cpu_isas[]; /* best first, then NULL */

/* avx512, avx2 and portable give the same bits (device/simd.h), plain gives others: the best of the three
 * that this machine can run. Portable takes 2.5 times as long as plain (kimi-nano's evaluation, one
 * thread), so that NULL above never means it. */
const char *km_cpu_fixed_isa(void);

#endif
