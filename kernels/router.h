/*
 * Launchers of the router's kernels: router GEMM, gate, alignment, and their fused forms.
 *
 * All pointers are device memory unless said otherwise, 16-byte aligned, borrowed until the stream has
 * run the call. Nothing is allocated, nothing is waited for, and no launch geometry depends on device
 * data, so each call can be captured in a graph. The callers (device/cuda_router.c, by a plan) have
 * checked the shapes; a launcher given a shape that it was not built for returns
 * cudaErrorInvalidValue. `pdl` marks a launch that may begin before its predecessor in the stream has
 * ended: the kernel waits for it before it reads anything but weights and bias, which no predecessor
 * may be writing.
 */
#ifndef KK_ROUTER_H
#define KK_ROUTER_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "device/turn.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
	KK_MAX_EXPERTS = 1024,
	KK_MAX_TOP_K = 32,
	KK_FAST_TOP_K = 8,       /* of the one-pass gate, but for 512 experts */
	KK_FUSED_TOKENS = 64,    /* of the forms that end in an alignment in the same launch */
	KK_ROUTER_HIDDEN = 7168, /* of the register-resident router GEMM */
	KK_PARTS_TOKENS = 256,   /* of the router GEMM in parts */
	KK_PARTS_EXPERTS = 384,
	KK_SCRATCH_SYNC_BYTES = 64,       /* the part of the fused forms' scratch that must start as zero */
	KK_SCRATCH_BYTES = 64 + 8 * 8 * 512 * 4,
};

/* logits[t, e] = sum_h x[t, h] * w[e, h] */
typedef struct kk_router_args {
	const void *x;    /* bf16 [tokens, hidden] */
	const void *w;    /* bf16 or f32 [experts, hidden] */
	float *logits;    /* [tokens, experts] */
	int tokens, experts, hidden;
	bool w_f32, pdl;
} kk_router_args;

/*
 * Selects as km_gate_args (libcore/device/op.h) says, then: weights are multiplied by `scale`, ids
 * pass through `expert_map`, rows at or beyond *valid_tokens get id -1 and weight 0. The places that
 * a row could not fill have id 0 and weight 0, whatever the map says.
 */
typedef struct kk_gate_args {
	const float *logits;         /* [tokens, experts] */
	const float *bias;           /* [experts] or NULL */
	const int32_t *expert_map;   /* [experts], logical to physical, or NULL */
	const int32_t *valid_tokens; /* one word or NULL: all rows count */
	int32_t *ids;                /* [tokens, top_k] */
	float *weights;              /* [tokens, top_k] */
	int tokens, experts, top_k, groups, topk_group;
	float scale;
	bool softmax, renormalize, pdl;
	enum km_turn turn; /* of a gate that is a launch of its own; the fused forms are AFTER */
} kk_gate_args;

/*
 * Sorts the M * k places of `ids` by expert, each expert's run padded to a multiple of `block`:
 * sorted[0, *total) holds place numbers (token * k + slot), in rising order within an expert, and
 * M * k in the padding; block_expert[0, *total / block) names each block's expert. Ids outside
 * [0, experts) take no place. What lies beyond *total is not written.
 */
typedef struct kk_align_args {
	const int32_t *ids;    /* [tokens, top_k] */
	int32_t *sorted;       /* [kk_align_capacity] */
	int32_t *block_expert; /* [kk_align_capacity / block] */
	int32_t *total;        /* one word */
	int32_t *scratch;      /* [kk_align_scratch_words] */
	int tokens, top_k, experts, block;
	bool pdl;
} kk_align_args;

int kk_align_capacity(int tokens, int top_k, int experts, int block);
int kk_align_scratch_words(int tokens, int top_k, int experts);

/* The gate: one pass of a warp over each row (experts 128, 256 or 384, top_k up to 8, one group; 256
 * experts in 8 groups, top_k up to 8; 512 experts, top_k up to 16, one group), or the general form. `warps` rows at a time in a block, `blocks` blocks at most. */
cudaError_t kk_gate_onepass(const kk_gate_args *args, int warps, int blocks, cudaStream_t stream);
cudaError_t kk_gate_general(const kk_gate_args *args, cudaStream_t stream);

cudaError_t kk_align(const kk_align_args *args, cudaStream_t stream);

/* Gate and alignment of up to KK_FUSED_TOKENS rows in one launch; gate's conditions are kk_gate_onepass's,
 * top_k up to KK_FAST_TOP_K. `warps` rows to a block, 8 or 16; where that makes more than one
 * block, compute capability 9.0. */
cudaError_t kk_gate_align(const kk_gate_args *gate, const kk_align_args *align, int warps,
                          cudaStream_t stream);

/* Router GEMM with the weights in the registers of the whole GPU: bf16, hidden 7168, 8 to 512
 * experts (compute capability 9.0 and later). */
cudaError_t kk_router_resident(const kk_router_args *args, cudaStream_t stream);
/* Router GEMM with the columns split over clusters: bf16, hidden 7168, an even number of experts from 8
 * on (compute capability 9.0 alone). Tiles of tokens x experts: 64 x 32, 64 x 48, 64 x 64, 128 x 64. */
cudaError_t kk_router_split(const kk_router_args *args, int split, int tokens_tile, int experts_tile,
                            cudaStream_t stream);
/* The same conditions, up to KK_PARTS_TOKENS and KK_PARTS_EXPERTS, in two launches: parts of sums, then
 * their sums. `parts`: kk_router_parts_bytes, of as many tokens or more. */
cudaError_t kk_router_parts(const kk_router_args *args, void *parts, cudaStream_t stream);
size_t kk_router_parts_bytes(int tokens, int experts);
/* Any hidden divisible by 8, any experts; bf16 or f32 weights. */
cudaError_t kk_router_general(const kk_router_args *args, cudaStream_t stream);

/* All three in one launch: the conditions of kk_router_resident and of kk_gate_align together.
 * gate->logits is not read; router->logits is scratch that holds the logits afterwards. `align` may
 * be NULL: router and gate only. `scratch`: KK_SCRATCH_BYTES, the first KK_SCRATCH_SYNC_BYTES zero before
 * the first call; every call leaves them zero. Calls that may run at the same time need one each. */
cudaError_t kk_router_gate_align(const kk_router_args *router, const kk_gate_args *gate,
                                 const kk_align_args *align, void *scratch, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
