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
	float sum = 0.0f;

	v = sum_lanes(v);
	if (threadIdx.x % 32 == 0)
		warps[threadIdx.x / 32] = v;
	__syncthreads(); /* the warps' sums are written */
	for (int i = 0; i < (int)blockDim.x / 32; i++)
		sum += warps[i];
	return sum;
}

/* Elements i to i + 3, zeros from `size` on; `whole`: all rows begin at multiples of 16 bytes, and
 * end there. */
__device__ __forceinline__ float4 load4(const float *row, int i, int size, bool whole)
{
	float v[4] = {};

	if (whole)
		return i < size ? *(const float4 *)(row + i) : make_float4(0, 0, 0, 0);
#pragma unroll
	for (int j = 0; j < 4; j++)
		v[j] = i + j < size ? row[i + j] : 0.0f;
	return make_float4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ void store4(float *row, int i, int size, bool whole, float4 v)
{
	if (whole && i < size)
		*(float4 *)(row + i) = v;
	for (int j = 0; !whole && j < 4 && i + j < size; j++)
		row[i + j] = (&v.x)[j];
}

__device__ __forceinline__ float4 load_sum(float *residual, const float *delta, int i, int size,
                                           bool whole)
{
	float4 v = load4(residual, i, size, whole), d;

	if (!delta)
		return v;
	d = load4(delta, i, size, whole);
	v = make_float4(v.x + d.x, v.y + d.y, v.z + d.z, v.w + d.w);
	store4(residual, i, size, whole, v);
	return v;
}

__device__ __forceinline__ float add_squares(float sum, float4 v)
{
	sum = __fmaf_rn(v.x, v.x, sum);
	sum = __fmaf_rn(v.y, v.y, sum);
	sum = __fmaf_rn(v.z, v.z, sum);
	return __fmaf_rn(v.w, v.w, sum);
}

__device__ __forceinline__ void put_row(const kk_norm_args &a, __nv_bfloat16 *y, int i, float4 v,
                                        float factor, bool whole)
{
	float4 w = load4(a.weight, i, a.size, whole);

#pragma unroll
	for (int j = 0; j < 4; j++)
		if (i + j < a.size)
			y[i + j] = __float2bfloat16((&v.x)[j] * factor * (&w.x)[j]);
}

__global__ void __launch_bounds__(MOST_THREADS) norm_rows(kk_norm_args a)
{
	float *residual = a.residual + (size_t)blockIdx.x * a.residual_stride;
	const float *delta = a.delta ? a.delta + (size_t)blockIdx.x * a.size : NULL;
	__nv_bfloat16 *y = (__nv_bfloat16 *)a.y + (size_t)blockIdx.x * a.y_stride;
	int first = threadIdx.x * 4, hop = blockDim.x * 4;
	bool whole = a.size % 4 == 0 && a.residual_stride % 4 == 0;
	float4 kept[KEPT];
	float sum = 0.0f, factor;

	ptx_release_successor();
	ptx_wait_predecessor();
#pragma unroll
	for (int k = 0; k < KEPT; k++)
		kept[k] = load_sum(residual, delta, first + k * hop, a.size, whole);
#pragma unroll
	for (int k = 0; k < KEPT; k++)
		sum = add_squares(sum, kept[k]);
	for (int i = first + KEPT * hop; i < a.size; i += hop)
		sum = add_squares(sum, load_sum(residual, delta, i, a.size, whole));
	factor = 1.0f / sqrtf(sum_block(sum) / (float)a.size + a.eps);
#pragma unroll
	for (int k = 0; k < KEPT; k++)
		put_row(a, y, first + k * hop, kept[k], factor, whole);
	for (int i = first + KEPT * hop; i < a.size; i += hop)
		put_row(a, y, i, load4(residual, i, a.size, whole), factor, whole);
}

cudaError_t kk_norm(const kk_norm_args *a, cudaStream_t stream)
{
	int threads = (a->size + 3) / 4;

	threads = threads > MOST_THREADS ? (int)MOST_THREADS : (threads + 31) / 32 * 32;
	return launch(norm_rows, dim3(a->tokens), threads, a->pdl, stream, *a);
}
