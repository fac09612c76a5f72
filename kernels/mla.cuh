/* What the attention's kernels share: a launch, a cached token's place, the cache's values as
 * f32. */
#ifndef KK_MLA_CUH
#define KK_MLA_CUH

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "mla.h"
#include "ptx.cuh"

#define MLA_LOG2E 1.44269504088896341f

struct mla_grid {
	dim3 blocks;
	int threads;
	size_t smem;      /* dynamic; above 48 KB it has been allowed for the kernel before */
	unsigned cluster; /* blocks of a row that share one; 0: none */
};

template <typename Args>
static cudaError_t mla_launch(void (*kernel)(Args), const mla_grid &grid, const Args &args,
                              cudaStream_t stream)
{
	cudaLaunchAttribute attribute[2] = {};
	cudaLaunchConfig_t config = {};

	if (!grid.blocks.x || !grid.blocks.y || !grid.blocks.z)
		return cudaSuccess;
	config.gridDim = grid.blocks;
	config.blockDim = dim3(grid.threads);
	config.dynamicSmemBytes = grid.smem;
	config.stream = stream;
	if (grid.cluster) {
		attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
		attribute[config.numAttrs++].val.clusterDim = {grid.cluster, 1, 1};
	}
	if (args.pdl) {
		attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
		attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
	}
	config.attrs = attribute;
	return cudaLaunchKernelEx(&config, kernel, args);
}

__device__ __forceinline__ size_t mla_slot(const int32_t *pages, int page_size, int token)
{
	int page = token / page_size;

	return (size_t)pages[page] * page_size + (token - page * page_size);
}

__device__ __forceinline__ float mla_read(const void *cache, bool fp8, size_t i)
{
	if (!fp8)
		return __bfloat162float(((const __nv_bfloat16 *)cache)[i]);
	return (float)((const __nv_fp8_e4m3 *)cache)[i];
}

__device__ __forceinline__ float mla_bf16(const void *p, size_t i)
{
	return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}

__device__ __forceinline__ uint32_t mla_pack(float lo, float hi)
{
	__nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);

	return *(uint32_t *)&v;
}

__device__ __forceinline__ float mla_low(uint32_t pair)
{
	return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float mla_high(uint32_t pair)
{
	return __uint_as_float(pair & 0xffff0000u);
}

/* Two e4m3 in the high bytes of each half: shifted into bf16's fields they are 2^-120 of what they
 * were. */
__device__ __forceinline__ uint32_t mla_widen_pair(uint32_t high_bytes)
{
	uint32_t v = (high_bytes & 0x80008000u) | (high_bytes >> 4 & 0x07f007f0u);
	__nv_bfloat162 up =
		__halves2bfloat162(__ushort_as_bfloat16(0x7b80), __ushort_as_bfloat16(0x7b80));
	__nv_bfloat162 wide = __hmul2(*(__nv_bfloat162 *)&v, up);

	return *(uint32_t *)&wide;
}

__device__ __forceinline__ uint4 mla_widen8(uint32_t lo, uint32_t hi)
{
	return make_uint4(
		mla_widen_pair(__byte_perm(lo, 0, 0x1404)), mla_widen_pair(__byte_perm(lo, 0, 0x3424)),
		mla_widen_pair(__byte_perm(hi, 0, 0x1404)), mla_widen_pair(__byte_perm(hi, 0, 0x3424)));
}

/* A rotated pair, as bf16. */
__device__ __forceinline__ uint32_t mla_rotate(uint32_t pair, float cosine, float sine)
{
	float a = mla_low(pair), b = mla_high(pair);

	return mla_pack(a * cosine - b * sine, b * cosine + a * sine);
}

/* The sum over a warp's lanes, in every lane, in one order. */
__device__ __forceinline__ float mla_sum_lanes(float v)
{
#pragma unroll
	for (int width = 16; width; width /= 2)
		v += __shfl_xor_sync(0xffffffffu, v, width);
	return v;
}

__device__ __forceinline__ float mla_max_lanes(float v)
{
#pragma unroll
	for (int width = 16; width; width /= 2)
		v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, width));
	return v;
}

#endif
