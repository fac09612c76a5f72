/*
 * The experts by CUDA cores: any weight type, any shape; and the ids' way through an expert map.
 *
 * ROOFLINE
 *   Each place reads its expert's weights: M * top_k * 3 * hidden * intermediate weights from L2 or
 *   memory, whatever the experts have in common. One token of Kimi K2 in FP8 blocks at TP8 (8 experts
 *   of 5.5 MB): 14 us at H100's 3.10 TB/s.
 *
 * LADDER
 *   general  three launches: gate and up, down, sum. A warp has one row of one place's expert; lanes
 *            stride the columns by eight; f32 throughout, but silu(gate) * up is rounded to bf16, as
 *            in the other forms.
 *   The plain device oracle of moe_int4.cu, and what runs for the weights and shapes that it refuses.
 *
 * RULES
 *   A place whose id is outside [0, experts) or whose weight is 0 is left out. Order of sums: a lane's
 *   columns in order, then lanes by halves, then places in the order of k.
 */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "moe.h"
#include "ptx.cuh"

enum { GENERAL_WARPS = 8, MAP_THREADS = 256, RECORD_ROWS = 16, RECORD_COLS = 128, RECORD_CODES = 1024 };

/* Blocks of a multiprocessor that ptxas must leave registers for, 0: as it likes. Before sm_89 an e4m3 is widened by
 * many instructions, and ptxas, left to itself, spills some of them for the sake of more blocks. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
enum { FP8_BLOCKS = 1 };
#else
enum { FP8_BLOCKS = 0 };
#endif

__global__ void __launch_bounds__(MAP_THREADS)
moe_map(const int32_t *ids, const int32_t *map, int global_experts, int32_t *to, int places)
{
	int i = blockIdx.x * MAP_THREADS + threadIdx.x;

	ptx_release_successor();
	ptx_wait_predecessor();
	if (i < places) {
		int e = ids[i];

		to[i] = e >= 0 && e < global_experts ? map[e] : -1;
	}
}

static cudaLaunchConfig_t config_of(dim3 grid, int threads, cudaLaunchAttribute *attr, bool pdl,
                                    cudaStream_t stream)
{
	cudaLaunchConfig_t config = {};

	config.gridDim = grid;
	config.blockDim = dim3(threads);
	config.stream = stream;
	config.attrs = attr;
	config.numAttrs = pdl;
	attr->id = cudaLaunchAttributeProgrammaticStreamSerialization;
	attr->val.programmaticStreamSerializationAllowed = 1;
	return config;
}

cudaError_t kk_moe_map(const int32_t *ids, const int32_t *map, int global_experts, int32_t *to, int places,
                       bool pdl, cudaStream_t stream)
{
	cudaLaunchAttribute attr = {};
	cudaLaunchConfig_t config = config_of(dim3((places + MAP_THREADS - 1) / MAP_THREADS), MAP_THREADS,
	                                      &attr, pdl, stream);

	return cudaLaunchKernelEx(&config, moe_map, ids, map, global_experts, to, places);
}

__device__ __forceinline__ float scale_at(const uint8_t *scale, kk_moe_type type, size_t i)
{
	switch (type) {
	case KK_MOE_F32:
		return ((const float *)scale)[i];
	case KK_MOE_F16:
		return __half2float(((const __half *)scale)[i]);
	default:
		return __bfloat162float(((const __nv_bfloat16 *)scale)[i]);
	}
}

/* One row of one matrix of one expert. */
struct row_source {
	const uint8_t *data, *scale;
	int row, cols;
};

__device__ __forceinline__ row_source row_of(const kk_moe_matrix &m, int expert, int row, int cols)
{
	return {m.data + (size_t)expert * m.data_stride, m.scale + (size_t)expert * m.scale_stride, row, cols};
}

/* Columns [c, c + 8) of a row. */
template <kk_moe_type W>
__device__ __forceinline__ void load8(const kk_moe_general_args &a, const row_source &r, int c, float (&w)[8])
{
	size_t at = (size_t)r.row * r.cols + c;

	if constexpr (W == KK_MOE_PACKED) {
		const uint8_t *record = r.data + ((size_t)(r.row / RECORD_ROWS) * (r.cols / RECORD_COLS) +
		                                  c / RECORD_COLS) * (RECORD_CODES + 4096 / a.group);
		int g = r.row % 8, high = r.row % 16 / 8, k = c % RECORD_COLS;
		const __nv_bfloat16 *scale = (const __nv_bfloat16 *)(record + RECORD_CODES);
		float s = __bfloat162float(scale[(g * (RECORD_COLS / a.group) + k / a.group) * 2 + high]);

#pragma unroll
		for (int i = 0; i < 8; i++) {
			int word = (k / 64 * 32 + g * 4 + i / 2) * 4 + k % 64 / 16;
			int bit = 4 * high + 8 * (k % 16 / 8) + 16 * (i % 2);

			w[i] = ((int)(((const uint32_t *)record)[word] >> bit & 15) - 8) * s;
		}
	} else {
#pragma unroll
		for (int i = 0; i < 8; i++)
			switch (W) {
			case KK_MOE_F32:
				w[i] = ((const float *)r.data)[at + i];
				break;
			case KK_MOE_F16:
				w[i] = __half2float(((const __half *)r.data)[at + i]);
				break;
			case KK_MOE_BF16:
				w[i] = __bfloat162float(((const __nv_bfloat16 *)r.data)[at + i]);
				break;
			case KK_MOE_FP8: {
				__nv_fp8_e4m3 v;
	
				v.__x = r.data[at + i];
				w[i] = (float)v * scale_at(r.scale, a.scale_type,
				                           (size_t)(r.row / a.block_rows) *
				                                           ((r.cols + a.block_cols - 1) / a.block_cols) +
				                                   (c + i) / a.block_cols);
				break;
			}
			default:
				w[i] = ((int)(((const uint32_t *)r.data)[at / 8] >> 4 * i & 15) - 8) *
				       scale_at(r.scale, a.scale_type,
				                (size_t)r.row * (r.cols / a.group) + (c + i) / a.group);
			}
	}
}

__device__ __forceinline__ void load_x(const __nv_bfloat16 *x, float (&v)[8])
{
	uint4 u = *(const uint4 *)x;
	uint32_t h[4] = {u.x, u.y, u.z, u.w};

#pragma unroll
	for (int i = 0; i < 4; i++) {
		v[2 * i] = __uint_as_float(h[i] << 16);
		v[2 * i + 1] = __uint_as_float(h[i] & 0xffff0000u);
	}
}

__device__ __forceinline__ void load_x(const float *x, float (&v)[8])
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		v[i] = __ldcg(x + i);
}

template <kk_moe_type W, typename X>
__device__ __forceinline__ float dot(const kk_moe_general_args &a, const row_source &r, const X *x)
{
	int lane = threadIdx.x % 32;
	float sum = 0.0f;

	for (int c = lane * 8; c < r.cols; c += 32 * 8) {
		float w[8], v[8];

		load8<W>(a, r, c, w);
		load_x(x + c, v);
#pragma unroll
		for (int i = 0; i < 8; i++)
			sum = fmaf(w[i], v[i], sum);
	}
#pragma unroll
	for (int d = 16; d; d >>= 1)
		sum += __shfl_xor_sync(0xffffffffu, sum, d);
	return sum;
}

/* The expert of a place, or -1. */
__device__ __forceinline__ int expert_of(const kk_moe_general_args &a, size_t place)
{
	int e = __ldcg(a.ids + place);

	return e >= 0 && e < a.experts && __ldcg(a.weights + place) != 0.0f ? e : -1;
}

template <kk_moe_type W>
__global__ void __launch_bounds__(32 * GENERAL_WARPS, W == KK_MOE_FP8 ? FP8_BLOCKS : 0)
general_up(const __grid_constant__ kk_moe_general_args a)
{
	int i = blockIdx.x * GENERAL_WARPS + threadIdx.x / 32;
	size_t places = (size_t)a.tokens * a.top_k;

	ptx_release_successor();
	ptx_wait_predecessor();
	if (i >= a.intermediate)
		return;
	for (size_t place = blockIdx.y; place < places; place += gridDim.y) {
		const __nv_bfloat16 *x = (const __nv_bfloat16 *)a.x + place / a.top_k * a.hidden;
		int e = expert_of(a, place);
		constexpr bool packed = W == KK_MOE_PACKED;
		float gate, up;

		if (e < 0)
			continue;
		gate = dot<W>(a, row_of(a.gate, e, packed ? i / 8 * 16 + i % 8 : i, a.hidden), x);
		up = packed ? dot<W>(a, row_of(a.gate, e, i / 8 * 16 + 8 + i % 8, a.hidden), x)
		            : dot<W>(a, row_of(a.up, e, i, a.hidden), x);
		if (threadIdx.x % 32 == 0)
			a.act[place * a.intermediate + i] = __bfloat162float(__float2bfloat16(
				gate * ptx_rcp(1.0f + ptx_ex2(-1.4426950408889634f * gate)) * up));
	}
}

template <kk_moe_type W>
__global__ void __launch_bounds__(32 * GENERAL_WARPS, W == KK_MOE_FP8 ? FP8_BLOCKS : 0)
general_down(const __grid_constant__ kk_moe_general_args a)
{
	int i = blockIdx.x * GENERAL_WARPS + threadIdx.x / 32;
	size_t places = (size_t)a.tokens * a.top_k;

	ptx_release_successor();
	ptx_wait_predecessor();
	if (i >= a.hidden)
		return;
	for (size_t place = blockIdx.y; place < places; place += gridDim.y) {
		int e = expert_of(a, place);
		float v;

		if (e < 0)
			continue;
		v = dot<W>(a, row_of(a.down, e, i, a.intermediate), a.act + place * a.intermediate);
		if (threadIdx.x % 32 == 0)
			a.part[place * a.hidden + i] = v;
	}
}

__global__ void __launch_bounds__(32 * GENERAL_WARPS) general_sum(const __grid_constant__ kk_moe_general_args a)
{
	size_t stride = (size_t)gridDim.x * 32 * GENERAL_WARPS, all = (size_t)a.tokens * a.hidden;

	ptx_release_successor();
	ptx_wait_predecessor();
	for (size_t o = (size_t)blockIdx.x * 32 * GENERAL_WARPS + threadIdx.x; o < all; o += stride) {
		size_t token = o / a.hidden, column = o % a.hidden;
		float sum = 0.0f;

		for (int k = 0; k < a.top_k; k++) {
			size_t place = token * a.top_k + k;

			if (expert_of(a, place) >= 0)
				sum = fmaf(__ldcg(a.weights + place), __ldcg(a.part + place * a.hidden + column), sum);
		}
		sum *= a.scale;
		if (a.y_bf16) {
			__nv_bfloat16 *y = (__nv_bfloat16 *)a.y + o;

			*y = __float2bfloat16(a.accumulate ? __bfloat162float(*y) + sum : sum);
		} else {
			float *y = (float *)a.y + o;

			*y = a.accumulate ? *y + sum : sum;
		}
	}
}

template <kk_moe_type W>
static cudaError_t launch_general(const kk_moe_general_args *a, cudaStream_t stream)
{
	size_t places = (size_t)a->tokens * a->top_k, blocks = ((size_t)a->tokens * a->hidden + 255) / 256;
	int rows = (int)(places < 32768 ? places : 32768);
	cudaLaunchAttribute attr = {};
	cudaLaunchConfig_t config = config_of(
		dim3((a->intermediate + GENERAL_WARPS - 1) / GENERAL_WARPS, rows), 32 * GENERAL_WARPS, &attr,
		a->pdl, stream);
	cudaError_t rc = cudaLaunchKernelEx(&config, general_up<W>, *a);

	config.gridDim.x = (a->hidden + GENERAL_WARPS - 1) / GENERAL_WARPS;
	if (rc == cudaSuccess)
		rc = cudaLaunchKernelEx(&config, general_down<W>, *a);
	config.gridDim = dim3((unsigned)(blocks < 4096 ? blocks : 4096));
	return rc == cudaSuccess ? cudaLaunchKernelEx(&config, general_sum, *a) : rc;
}

cudaError_t kk_moe_general(const kk_moe_general_args *a, cudaStream_t stream)
{
	if (a->hidden % 8 || a->intermediate % 8 ||
	    ((a->type == KK_MOE_INT4 || a->type == KK_MOE_PACKED) && a->group < 1) ||
	    (a->type == KK_MOE_FP8 && (a->block_rows < 1 || a->block_cols < 1)))
		return cudaErrorInvalidValue;
	switch (a->type) {
	case KK_MOE_F32:
		return launch_general<KK_MOE_F32>(a, stream);
	case KK_MOE_F16:
		return launch_general<KK_MOE_F16>(a, stream);
	case KK_MOE_BF16:
		return launch_general<KK_MOE_BF16>(a, stream);
	case KK_MOE_FP8:
		return launch_general<KK_MOE_FP8>(a, stream);
	case KK_MOE_INT4:
		return launch_general<KK_MOE_INT4>(a, stream);
	case KK_MOE_PACKED:
		return launch_general<KK_MOE_PACKED>(a, stream);
	}
	return cudaErrorInvalidValue;
}
