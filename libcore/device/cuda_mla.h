/*
 * Attention on the GPU: doing what a plan (device/mla_plan.h) says.
 *
 * Each call enqueues on the GPU's stream: it allocates nothing, waits for nothing, and launches the
 * same kernels whatever the data, so it may be captured; kv_len, positions, slots and pages are
 * read on the device. All pointers are device memory; a shape that a kernel was not built for is
 * refused with a sentence.
 */
#ifndef KM_DEVICE_CUDA_MLA_H
#define KM_DEVICE_CUDA_MLA_H

#include "device/cuda.h"
#include "device/mla_plan.h"

typedef struct km_mla_cache {
	const void *data; /* [slots, kv_lora_rank + rope_dim], bf16 or e4m3 as the shape says */
	const int32_t *pages; /* [seqs, pages_per_seq] */
	int pages_per_seq, page_size;
} km_mla_cache;

typedef struct km_mla_decode_buffers {
	km_mla_cache cache;
	const void *q;            /* bf16 [seqs, heads, nope_dim + rope_dim], not rotated */
	const void *kv_b;         /* bf16 [heads * (nope_dim + v_dim), kv_lora_rank] */
	const float *cos_sin;     /* [max positions, rope_dim] */
	const int32_t *positions; /* [seqs] */
	const int32_t *kv_len;    /* [seqs]; 0: the row is padding, its result is zeros */
	void *scratch;            /* km_mla_decode_layout */
	void *out;                /* bf16 [seqs, heads, v_dim] */
	float scale;
	/* For a plan with `cluster`: the rows' KV, which it then normalises, rotates and writes to
	 * the cache as km_cuda_ops_rope_kv would; NULL: that has been done. */
	const float *kv_a;    /* [seqs, kv_lora_rank + rope_dim] */
	const float *norm;    /* [kv_lora_rank] */
	const int32_t *slots; /* [seqs] */
	float eps;
} km_mla_decode_buffers;

/* The first `seqs` sequences of a step, a row each: absorbed query, attention, W_vc of the
 * result. */
int km_cuda_mla_decode(km_cuda *cuda, const km_mla_decode_plan *plan, const km_mla_shape *shape,
                       int seqs, const km_mla_decode_buffers *buffers, km_err *err);

typedef struct km_mla_prefill_buffers {
	km_mla_cache cache;
	const km_mla_run *runs;   /* the plan's, all of them, on the device */
	const km_mla_tile *tiles;
	const int32_t *positions; /* [tokens of the batch] */
	const void *q;            /* bf16 [tokens, heads, nope_dim + rope_dim], rotated */
	void *latents;            /* bf16 [room, kv_lora_rank + rope_dim] */
	const void *kv;           /* bf16 [room, heads * (nope_dim + v_dim)] */
	float *state; /* [tokens, heads, v_dim + 2] when the plan keeps any, else NULL */
	void *out;                /* bf16 [tokens, heads, v_dim] */
	float scale;
} km_mla_prefill_buffers;

/*
 * A wave: gather, then the caller's product kv = latents[:, :kv_lora_rank] kv_bᵀ over the wave's
 * tokens (rows of latents are kv_lora_rank + rope_dim apart), then attend.
 */
int km_cuda_mla_gather(km_cuda *cuda, const km_mla_wave *wave, const km_mla_shape *shape,
                       const km_mla_prefill_buffers *buffers, km_err *err);
int km_cuda_mla_prefill(km_cuda *cuda, const km_mla_wave *wave, const km_mla_shape *shape,
                        const km_mla_prefill_buffers *buffers, km_err *err);

#endif
