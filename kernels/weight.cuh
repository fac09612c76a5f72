/* Reading one element of a weight of any type, as device/weight.h has it. */
#ifndef KK_WEIGHT_CUH
#define KK_WEIGHT_CUH

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/weight.h"

__device__ __forceinline__ float read_bf16(const void *from, size_t i)
{
	return __bfloat162float(((const __nv_bfloat16 *)from)[i]);
}

/* e4m3 without infinities: sign, 4 bits of exponent (bias 7), 3 of fraction; 0x7f and 0xff are NaN.
 * */
__device__ __forceinline__ float read_e4m3(uint8_t v)
{
	uint32_t exponent = v >> 3 & 15, fraction = v & 7, sign = (uint32_t)(v & 0x80) << 24;

	if (exponent == 0)
		return __uint_as_float(sign | __float_as_uint((float)fraction * 0x1p-9f));
	if ((v & 0x7f) == 0x7f)
		return __uint_as_float(0x7fffffffu);
	return __uint_as_float(sign | exponent + 120 << 23 | fraction << 20);
}

__device__ __forceinline__ float read_scale(enum km_dtype type, const void *from, size_t i)
{
	return type == KM_F32   ? ((const float *)from)[i]
	       : type == KM_F16 ? __half2float(((const __half *)from)[i])
	                        : read_bf16(from, i);
}

__device__ __forceinline__ float read_fp8_scale(const km_weight &w, int row, int col)
{
	size_t across = (size_t)((w.cols + w.block_cols - 1) / w.block_cols);

	return read_scale(w.scale_dtype, w.scale,
	                  (size_t)(row / w.block_rows) * across + col / w.block_cols);
}

__device__ __forceinline__ float read_weight(const km_weight &w, int row, int col)
{
	size_t at = (size_t)row * w.cols + col;

	switch (w.type) {
	case KM_W_F32: return ((const float *)w.data)[at];
	case KM_W_F16: return __half2float(((const __half *)w.data)[at]);
	case KM_W_BF16: return read_bf16(w.data, at);
	case KM_W_FP8:
		return read_e4m3(((const uint8_t *)w.data)[at]) * read_fp8_scale(w, row, col);
	case KM_W_INT4: break;
	}
	return (float)((int)(((const uint32_t *)w.data)[at / 8] >> at % 8 * 4 & 15) - 8) *
	       read_scale(w.scale_dtype, w.scale, (size_t)row * (w.cols / w.group) + col / w.group);
}

/* The sum over a warp's lanes, in every lane; the same order whatever the values. */
__device__ __forceinline__ float sum_lanes(float v)
{
	for (int width = 16; width; width /= 2)
		v += __shfl_xor_sync(0xffffffff, v, width);
	return v;
}

#endif
