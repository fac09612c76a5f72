/*
 * The router on the GPU: what a plan is, and doing what it says. Choosing is model/router.h's.
 *
 * km_cuda_router_run enqueues one part, or the whole chain, on the GPU's stream: it allocates nothing,
 * waits for nothing, and launches the same kernels whatever the data, so it may be captured. A plan
 * that does not fit the shape is refused with a sentence.
 */
#ifndef KM_DEVICE_CUDA_ROUTER_H
#define KM_DEVICE_CUDA_ROUTER_H

#include <stdbool.h>
#include <stdint.h>

#include "device/cuda.h"
#include "device/turn.h"

typedef struct km_router_shape {
	int tokens, experts, hidden, top_k;
	int groups, topk_group; /* groups 0 or 1: none */
	int block;              /* the alignment's block; each expert's run is padded to it */
	bool softmax, renormalize, weights_f32;
	float scale;            /* multiplies the weights */
} km_router_shape;

enum km_router_gemm { KM_GEMM_RESIDENT, KM_GEMM_SPLIT, KM_GEMM_PARTS, KM_GEMM_GENERAL, KM_GEMM_BLAS };
enum km_router_gate { KM_GATE_ONEPASS, KM_GATE_ROUNDS };
enum km_router_chain { KM_CHAIN_SEPARATE, KM_CHAIN_GATE_ALIGN, KM_CHAIN_ONE_LAUNCH };

typedef struct km_router_plan {
	enum km_router_gemm gemm;
	enum km_router_gate gate;
	enum km_router_chain chain;
	int gate_warps, gate_blocks; /* KM_GATE_ONEPASS */
	int fused_warps;             /* KM_CHAIN_GATE_ALIGN: rows to a block */
	int split, split_tokens, split_experts; /* KM_GEMM_SPLIT, _PARTS: blocks that share a tile, its sides */
	bool pdl, gate_pdl;          /* launches begin before their predecessors end; the gate's own */
	enum km_turn gate_turn;      /* KM_PART_GATE's; a plan is made with AFTER */
} km_router_plan;

enum km_router_part {
	KM_PART_GEMM,             /* x, w -> logits */
	KM_PART_GATE,             /* logits -> ids, weights */
	KM_PART_ALIGN,            /* ids -> sorted, block_expert, total */
	KM_PART_GATE_ALIGN,       /* the two in one launch */
	KM_PART_ROUTER_GATE,      /* GEMM and gate in one launch */
	KM_PART_ONE_LAUNCH,       /* all three in one launch */
	KM_PART_CHAIN,            /* all three as the plan has them */
};

/* Device memory. What the part does not use may be NULL. */
typedef struct km_router_buffers {
	const void *x;             /* bf16 [tokens, hidden] */
	const void *w;             /* bf16 or f32 [experts, hidden] */
	const float *bias;         /* [experts] or NULL */
	const int32_t *expert_map; /* [experts] or NULL */
	const int32_t *valid;      /* one word, rows that count, or NULL */
	float *logits;             /* [tokens, experts] */
	int32_t *ids;              /* [tokens, top_k] */
	float *weights;            /* [tokens, top_k] */
	int32_t *sorted, *block_expert, *total; /* km_cuda_router_capacity; / block; 1 */
	void *scratch;             /* km_cuda_router_scratch_bytes, zeroed once */
} km_router_buffers;

int km_cuda_router_capacity(const km_router_shape *shape);         /* words of `sorted` */
size_t km_cuda_router_scratch_bytes(const km_router_shape *shape);

int km_cuda_router_run(km_cuda *cuda, enum km_router_part part, const km_router_plan *plan,
                       const km_router_shape *shape, const km_router_buffers *buffers, km_err *err);

#endif
