/*
 * RMSNorm of strided rows, with the sum into the residual stream that comes before it.
 *
 * ROOFLINE
 *   Bytes a row: 4 of residual (8 more when it is written, 4 of delta) and 2 of output an element. One row
 *   of 7,168 is 129 kB: a launch, not bandwidth (2.2 us; 1.2 where launches overlap); 8,192 rows are
 *   0.95 GB, 0.31 ms on H100, 0.2 on H200.
 *
 * RULES
 *   Order of a row's sum: a thread's elements by rising index, four neighbours at a time, the lanes by a
 *   butterfly, the warps in order. It depends on the row's size alone (linear_slab.cu has the same). A
 *   block a row; a thread keeps its elements in registers, up to KEPT fours, and reads them again beyond.
 */
#include "dense.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "weight.cuh"

enum { KEPT = 4, MOST_THREADS = 512 };

__device__ __forceinline__ float sum_block(float v)
{
	__shared__ float warps[MOST_THREADS / 32];
	int count = (int)blockDim.x / 32;
	float sum = 0.0f;

	v = sum_lanes(v);
	if (threadIdx.x % 32 == 0)
		warps[threadIdx.x / 32] = v;
	__syncthreads(); /* the warps' sums are written */
#pragma unroll
	for (int i = 0; i < MOST_THREADS / 32; i++)
		if (i < count)
			sum += warps[i];
	return sum;
}

/* Elements i to i + 3, zeros from `size` on; WHOLE: all rows begin at multiples of four, and end there. */
template <bool WHOLE>
__device__ __forceinline__ float4 load4(const float *row, int i, int size)
{
	float4 v = make_float4(0, 0, 0, 0);

	if (WHOLE && i < size)
		v = *(const float4 *)(row + i);
#pragma unroll
	for (int j = 0; !WHOLE && j < 4; j++)
		if (i + j < size)
			(&v.x)[j] = row[i + j];
	return v;
}

template <bool WHOLE>
__device__ __forceinline__ void store4(float *row, int i, int size, float4 v)
{
	if (WHOLE && i < size)
		*(float4 *)(row + i) = v;
#pragma unroll
	for (int j = 0; !WHOLE && j < 4; j++)
		if (i + j < size)
			row[i + j] = (&v.x)[j];
}

__device__ __forceinline__ float4 add(float4 a, float4 b)
{
	return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/* FOURS fours, `hop` apart, of residual, and of its sum with delta: all loads before the first store,
 * which they might alias. */
template <bool WHOLE, int FOURS>
__device__ __forceinline__ void load_sums(float4 (&v)[FOURS], float *residual, const float *delta, int i, int hop,
                                          int size)
{
	float4 d[FOURS];

#pragma unroll
	for (int k = 0; k < FOURS; k++)
		v[k] = load4<WHOLE>(residual, i + k * hop, size);
	if (!delta)
		return;
#pragma unroll
	for (int k = 0; k < FOURS; k++)
		d[k] = load4<WHOLE>(delta, i + k * hop, size);
#pragma unroll
	for (int k = 0; k < FOURS; k++) {
		v[k] = add(v[k], d[k]);
		store4<WHOLE>(residual, i + k * hop, size, v[k]);
	}
}

__device__ __forceinline__ float add_squares(float sum, float4 v)
{
	sum = __fmaf_rn(v.x, v.x, sum);
	sum = __fmaf_rn(v.y, v.y, sum);
	sum = __fmaf_rn(v.z, v.z, sum);
	return __fmaf_rn(v.w, v.w, sum);
}

template <bool WHOLE>
__device__ __forceinline__ void put4(__nv_bfloat16 *y, int i, int size, float4 v, float4 w, float factor)
{
	alignas(8) __nv_bfloat16 four[4];

#pragma unroll
	for (int j = 0; j < 4; j++)
		four[j] = __float2bfloat16((&v.x)[j] * factor * (&w.x)[j]);
	if (WHOLE && i < size)
		*(uint2 *)(y + i) = *(const uint2 *)four;
#pragma unroll
	for (int j = 0; !WHOLE && j < 4; j++)
		if (i + j < size)
			y[i + j] = four[j];
}

template <bool WHOLE>
__global__ void __launch_bounds__(MOST_THREADS) norm_rows(kk_norm_args a)
{
	float *residual = a.residual + (size_t)blockIdx.x * a.residual_stride;
	const float *delta = a.delta ? a.delta + (size_t)blockIdx.x * a.size : NULL;
	__nv_bfloat16 *y = (__nv_bfloat16 *)a.y + (size_t)blockIdx.x * a.y_stride;
	int first = threadIdx.x * 4, hop = blockDim.x * 4;
	float4 kept[KEPT], weight[KEPT], more[1];
	float sum = 0.0f, factor;

	ptx_release_successor();
#pragma unroll
	for (int k = 0; k < KEPT; k++)
		weight[k] = load4<WHOLE>(a.weight, first + k * hop, a.size);
	ptx_wait_predecessor();
	load_sums<WHOLE>(kept, residual, delta, first, hop, a.size);
#pragma unroll
	for (int k = 0; k < KEPT; k++)
		sum = add_squares(sum, kept[k]);
#pragma unroll 1
	for (int i = first + KEPT * hop; i < a.size; i += hop) {
		load_sums<WHOLE>(more, residual, delta, i, hop, a.size);
		sum = add_squares(sum, more[0]);
	}
	factor = 1.0f / sqrtf(sum_block(sum) / (float)a.size + a.eps);
#pragma unroll
	for (int k = 0; k < KEPT; k++)
		put4<WHOLE>(y, first + k * hop, a.size, kept[k], weight[k], factor);
#pragma unroll 1
	for (int i = first + KEPT * hop; i < a.size; i += hop)
		put4<WHOLE>(y, i, a.size, load4<WHOLE>(residual, i, a.size), load4<WHOLE>(a.weight, i, a.size),
		            factor);
}

cudaError_t kk_norm(const kk_norm_args *a, cudaStream_t stream)
{
	bool whole = a->size % 4 == 0 && a->residual_stride % 4 == 0 && a->y_stride % 4 == 0;
	int threads = (a->size + 3) / 4;

	threads = threads > MOST_THREADS ? (int)MOST_THREADS : (threads + 31) / 32 * 32;
	return launch(whole ? norm_rows<true> : norm_rows<false>, dim3(a->tokens), threads, a->pdl, stream, *a);
}
