/*
 * Reading memory: every 16 bytes once, added up, so that nothing can be left out.
 *
 * ROOFLINE
 *   Bytes; it is what the others' rooflines are (device/roofline.h). Blocks of 512 threads, each with four loads
 *   under way (ptxas keeps the eight written here to 32 registers so), 32 kB a block;
 *   tests/gpu/bench_gpu_roofline.c tries 1 to 8 blocks a multiprocessor.
 *
 * RULES
 *   Order of sums: of no account, they are whole numbers.
 */
#include "launch.cuh"
#include "ptx.cuh"
#include "read.h"

enum { THREADS = 512, LOADS = 8 };

__device__ __forceinline__ uint32_t sum_of(uint4 v)
{
	return v.x + v.y + v.z + v.w;
}

__global__ void __launch_bounds__(THREADS) read_all(const uint4 *data, size_t count, uint32_t *sum)
{
	size_t step = (size_t)gridDim.x * THREADS, i = (size_t)blockIdx.x * THREADS + threadIdx.x;
	uint32_t s = 0;

	for (; i + (LOADS - 1) * step < count; i += LOADS * step) {
		uint4 v[LOADS];

#pragma unroll
		for (int k = 0; k < LOADS; k++)
			v[k] = ptx_load_stream(data + i + k * step);
#pragma unroll
		for (int k = 0; k < LOADS; k++)
			s += sum_of(v[k]);
	}
	for (; i < count; i += step)
		s += sum_of(ptx_load_stream(data + i));
	s = __reduce_add_sync(~0u, s);
	if (threadIdx.x % 32 == 0)
		atomicAdd(sum, s);
}

cudaError_t kk_read(const kk_read_args *a, cudaStream_t stream)
{
	if (a->bytes % sizeof(uint4) || a->blocks < 1)
		return cudaErrorInvalidValue;
	return launch(read_all, dim3(a->blocks), THREADS, false, stream, (const uint4 *)a->data,
	              a->bytes / sizeof(uint4), a->sum);
}
