/*
 * Launchers of the experts' kernels.
 *
 * Device memory, 16-byte aligned, borrowed until the stream has run the call. Nothing is allocated,
 * nothing is waited for, and no launch geometry depends on device data, so each call can be captured.
 * The caller (device/cuda_moe.c, by a plan) has checked the shape; a launcher given one that it was not
 * built for returns cudaErrorInvalidValue. Ids are checked here, on the device: a place whose id is
 * outside [0, experts), or whose weight is 0, adds nothing and touches no memory.
 */
#ifndef KK_MOE_H
#define KK_MOE_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "router.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The streaming kernel: int4 in the layout of libcore/format/moe_layout.h. */
typedef struct kk_moe_args {
	const void *x;             /* bf16 [tokens, hidden], below 2^62 in size (moe_int4.cu) */
	const int32_t *ids;        /* [tokens, top_k], of this device's experts */
	const float *weights;      /* [tokens, top_k] */
	const uint8_t *gate_up;    /* [experts] at gate_up_stride bytes */
	const uint8_t *down;       /* [experts] at down_stride bytes */
	size_t gate_up_stride, down_stride;
	const int32_t *sorted, *block_expert, *total; /* kk_align's, when not `inside` */
	void *act;                 /* bf16 [tokens * top_k, intermediate]; `direct`: 64 kB, zero before the first call */
	void *part;                /* f32 or bf16 [tokens * top_k, hidden], when not `direct` */
	void *y;                   /* f32 or bf16 [tokens, hidden] */
	int32_t *sync;             /* 16,384 words, zero before the first call; calls that may run at once: one each */
	int32_t *ready;            /* a word for each tile of places, likewise; NULL: all wait for all */
	/* What goes before, in the same launch (moe_front.cuh). Without gate.logits ids and weights are there. */
	kk_gate_args gate;         /* its ids and weights are those above, and are written */
	const void *shared_down;   /* bf16 [hidden, 256]: y is added the shared experts' too */
	const float *shared_gate, *shared_up; /* [tokens, 256] */
	float scale;
	int tokens, top_k, experts, hidden, intermediate, group;
	int block_m, block_n, group_m, warps, stages, x_stages, blocks; /* blocks: up to 255 */
	size_t smem_bytes, sums_bytes;
	bool y_bf16, accumulate, part_bf16, inside, direct;
	bool pdl;                  /* as dense.h says; then only one stream of the device may have such launches */
} kk_moe_args;

cudaError_t kk_moe_stream(const kk_moe_args *args, cudaStream_t stream);

/* to[i] = map[ids[i]], -1 for ids outside [0, global_experts) */
cudaError_t kk_moe_map(const int32_t *ids, const int32_t *map, int global_experts, int32_t *to, int places,
                       bool pdl, cudaStream_t stream);

enum kk_moe_type { KK_MOE_F32, KK_MOE_F16, KK_MOE_BF16, KK_MOE_FP8, KK_MOE_INT4, KK_MOE_PACKED };

/* One matrix of every expert, in libcore/device/weight.h's layouts, or (KK_MOE_PACKED, gate_up only) ours. */
typedef struct kk_moe_matrix {
	const uint8_t *data, *scale;
	size_t data_stride, scale_stride;
} kk_moe_matrix;

typedef struct kk_moe_general_args {
	const void *x;
	const int32_t *ids;
	const float *weights;
	kk_moe_matrix gate, up, down;     /* KK_MOE_PACKED: gate is gate_up, up is not read */
	enum kk_moe_type type, scale_type; /* scales: f32, f16 or bf16 */
	float *act;                       /* [tokens * top_k, intermediate] */
	float *part;                      /* [tokens * top_k, hidden] */
	void *y;
	float scale;
	int tokens, top_k, experts, hidden, intermediate, group, block_rows, block_cols;
	bool y_bf16, accumulate, pdl;
} kk_moe_general_args;

cudaError_t kk_moe_general(const kk_moe_general_args *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
