/*
 * RMSNorm of strided rows, with the sum into the residual stream that comes before it.
 *
 * ROOFLINE
 *   Bytes a row: 4 of residual (8 more when it is written, 4 of delta) and 2 of output an element. One row
 *   of 7,168 is 129 kB: a launch, not bandwidth (2.2 us; 1.2 where launches overlap); 8,192 rows are
 *   0.95 GB, 0.31 ms on H100, 0.2 on H200.
 *
 * RULES
 *   Order of a row's sum: a thread's elements by rising index, the lanes by a butterfly, the warps in order.
 *   It depends on the row's size alone. A block a row; a thread keeps its elements in registers, up to
 *   KEPT of them, and reads them again beyond.
 */
#include "dense.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "weight.cuh"

enum { KEPT = 16, MOST_THREADS = 512 };

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

__device__ __forceinline__ float load_sum(const kk_norm_args &a, float *residual,
                                          const float *delta, int i)
{
	float v = residual[i];

	if (!delta)
		return v;
	v += delta[i];
	residual[i] = v;
	return v;
}

__global__ void __launch_bounds__(MOST_THREADS) norm_rows(kk_norm_args a)
{
	float *residual = a.residual + (size_t)blockIdx.x * a.residual_stride;
	const float *delta = a.delta ? a.delta + (size_t)blockIdx.x * a.size : NULL;
	__nv_bfloat16 *y = (__nv_bfloat16 *)a.y + (size_t)blockIdx.x * a.y_stride;
	float kept[KEPT], sum = 0.0f, factor;
	int threads = blockDim.x;

	ptx_release_successor();
	ptx_wait_predecessor();
#pragma unroll
	for (int k = 0; k < KEPT; k++) {
		int i = k * threads + threadIdx.x;

		kept[k] = i < a.size ? load_sum(a, residual, delta, i) : 0.0f;
	}
#pragma unroll
	for (int k = 0; k < KEPT; k++)
		sum += kept[k] * kept[k];
	for (int i = KEPT * threads + threadIdx.x; i < a.size; i += threads) {
		float v = load_sum(a, residual, delta, i);

		sum += v * v;
	}
	factor = 1.0f / sqrtf(sum_block(sum) / (float)a.size + a.eps);
#pragma unroll
	for (int k = 0; k < KEPT; k++) {
		int i = k * threads + threadIdx.x;

		if (i < a.size)
			y[i] = __float2bfloat16(kept[k] * factor * a.weight[i]);
	}
	for (int i = KEPT * threads + threadIdx.x; i < a.size; i += threads)
		y[i] = __float2bfloat16(residual[i] * factor * a.weight[i]);
}

cudaError_t kk_norm(const kk_norm_args *a, cudaStream_t stream)
{
	int threads = (a->size + 3) / 4;

	threads = threads > MOST_THREADS ? (int)MOST_THREADS : (threads + 31) / 32 * 32;
	return launch(norm_rows, dim3(a->tokens), threads, a->pdl, stream, *a);
}
