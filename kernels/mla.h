/*
 * Launchers of the attention's kernels: rope and KV write, absorbed decode, prefill.
 *
 * All pointers are device memory, 16-byte aligned, borrowed until the stream has run the call.
 * Nothing is allocated, nothing is waited for, and no launch geometry depends on device data, so
 * each call can be captured in a graph. The callers (device/cuda_mla.c, by a plan) have checked the
 * shapes; a launcher given a shape that it was not built for returns cudaErrorInvalidValue. `pdl`
 * marks a launch that may begin before its predecessor in the stream has ended: until it has waited
 * for that it reads nothing but kv_b. Activations are bf16 but for kv_a (f32); the cache is [slots,
 * kv_lora_rank + rope_dim], bf16 or e4m3, a slot is page * page_size + offset. Rows of a padded
 * step: a slot below 0 is not written, a sequence of no cached tokens has zeros for a result.
 *
 * kv_lora_rank and rope_dim divisible by 8, nope_dim and v_dim by 8 as well.
 */
#ifndef KK_MLA_H
#define KK_MLA_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "device/mla_shape.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * For each row: norm of kv_a's latent, rotation of its k_pe, both to the row's slot; and rotation
 * of q's last rope_dim values of each head, in place, in rows [q_from, tokens) (the decoding rows
 * come first, and kk_mla_absorb rotates theirs).
 */
typedef struct kk_rope_kv_args {
	int tokens, q_from, heads, nope_dim, rope_dim, kv_lora_rank;
	void *q; /* bf16 [tokens, heads, nope_dim + rope_dim]; NULL when q_from == tokens */
	const float *kv_a; /* [tokens, kv_a_stride]: latent, then k_pe */
	int kv_a_stride;
	const float *norm; /* [kv_lora_rank] */
	float eps;
	const float *cos_sin;     /* [positions, rope_dim]: cos of the pairs, then sin */
	const int32_t *positions; /* [tokens] */
	const int32_t *slots;     /* [tokens] */
	void *cache;
	bool fp8, pdl;
} kk_rope_kv_args;

cudaError_t kk_rope_kv(const kk_rope_kv_args *args, cudaStream_t stream);

/* Decode: kk_mla_absorb, kk_mla_attend, kk_mla_combine, in this order, with one set of arguments
 * and nothing between: attend reads the cache before it has waited for absorb, which has waited for
 * what wrote it. */
typedef struct kk_mla_decode_args {
	km_mla_shape shape;
	int seqs, splits, v_blocks;
	int page_size, pages_per_seq;
	float scale;
	const void *q;            /* bf16 [seqs, heads, nope_dim + rope_dim], not rotated */
	const void *kv_b;         /* bf16 [heads * (nope_dim + v_dim), kv_lora_rank] */
	const float *cos_sin;     /* [positions, rope_dim] */
	const int32_t *positions; /* [seqs] */
	const int32_t *kv_len;    /* [seqs] */
	const int32_t *pages;     /* [seqs, pages_per_seq] */
	const void *cache;
	void *query;    /* bf16 [seqs, heads, kv_lora_rank + rope_dim]: W_kc^T q_nope, q_pe */
	float *partial; /* [seqs, heads, splits, kv_lora_rank]: runs' weighted sums of latents */
	float *stats;   /* [seqs, heads, splits, 2]: largest score (base 2), sum of weights */
	void *out;      /* bf16 [seqs, heads, v_dim] */
	/* kk_mla_decode_cluster only: what kk_rope_kv would do for these rows; NULL: it has */
	const float *kv_a; /* [seqs, kv_a_stride] */
	const float *norm; /* [kv_lora_rank] */
	const int32_t *slots;
	int kv_a_stride;
	float eps;
	bool pdl;
} kk_mla_decode_args;

/* The tensor-core forms: kv_lora_rank 512, rope_dim 64, nope_dim and v_dim 128; compute capability
 * 9.0. */
cudaError_t kk_mla_absorb(const kk_mla_decode_args *args, cudaStream_t stream);
cudaError_t kk_mla_attend(const kk_mla_decode_args *args, cudaStream_t stream);
cudaError_t kk_mla_combine(const kk_mla_decode_args *args, cudaStream_t stream);
/* All three in one launch, a cluster of 16 blocks a row: 8 heads, and no scratch. It reads lengths,
 * pages and all cached tokens but the last before it has waited: what wrote those must be complete
 * before its predecessor begins. */
cudaError_t kk_mla_decode_cluster(const kk_mla_decode_args *args, cudaStream_t stream);
/* Any shape. `splits` is 1. */
cudaError_t kk_mla_absorb_general(const kk_mla_decode_args *args, cudaStream_t stream);
cudaError_t kk_mla_attend_general(const kk_mla_decode_args *args, cudaStream_t stream);
cudaError_t kk_mla_combine_general(const kk_mla_decode_args *args, cudaStream_t stream);

/*
 * Prefill, one wave of a plan: kk_mla_gather, then kv = latents[:, :kv_lora_rank] kv_b^T by any
 * matrix product (rows of `latents` are kv_lora_rank + rope_dim apart), then kk_mla_prefill.
 */
typedef struct kk_mla_prefill_args {
	km_mla_shape shape;
	int page_size, pages_per_seq;
	float scale;
	const km_mla_run *runs;   /* the wave's */
	const km_mla_tile *tiles; /* the wave's */
	int run_count, tile_count;
	const int32_t *pages;     /* [seqs, pages_per_seq] */
	const int32_t *positions; /* [rows of the batch] */
	const void *cache;
	void *latents;  /* bf16 [room, kv_lora_rank + rope_dim] */
	const void *kv; /* bf16 [room, heads * (nope_dim + v_dim)] */
	const void *q;  /* bf16 [rows, heads, nope_dim + rope_dim], rotated */
	float *state;   /* [rows, heads, v_dim + 2], for plans that keep any; else NULL */
	void *out;      /* bf16 [rows, heads, v_dim] */
	bool pdl;
} kk_mla_prefill_args;

cudaError_t kk_mla_gather(const kk_mla_prefill_args *args, cudaStream_t stream);
/* nope_dim and v_dim 128, rope_dim 64; compute capability 9.0. */
cudaError_t kk_mla_prefill(const kk_mla_prefill_args *args, cudaStream_t stream);
cudaError_t kk_mla_prefill_general(const kk_mla_prefill_args *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
