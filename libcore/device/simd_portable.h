/*
 * The layer of simd.h in plain C: 4 floats, on the compiler's vector types, for processors without
 * AVX2 and for those who doubt the other two. Every function gives the bits that AVX2's does.
 *
 * Its price is v_fma. Without the instruction, a fused multiply-add of floats is computed in double:
 * the product of two floats is exact there, the sum is rounded to odd, and what is rounded to odd with
 * 29 bits to spare rounds to float as the exact sum would (S. Boldo, G. Melquiond, "Emulation of a FMA
 * and correctly rounded sums", 2008). That is about 20 instructions for 2 lanes.
 */
#ifndef KM_DEVICE_SIMD_PORTABLE_H
#define KM_DEVICE_SIMD_PORTABLE_H

#include "format/dtype.h"

enum { VL = 4 };

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vf_bits __attribute__((vector_size(16)));
typedef double vf_wide __attribute__((vector_size(32)));
typedef int64_t vf_wide_bits __attribute__((vector_size(32)));

KM_INLINE vf v_zero(void) { return (vf){ 0 }; }
KM_INLINE vf v_set1(float f) { return (vf){ f, f, f, f }; }
KM_INLINE vf v_add(vf a, vf b) { return a + b; }
KM_INLINE vf v_sub(vf a, vf b) { return a - b; }
KM_INLINE vf v_mul(vf a, vf b) { return a * b; }
KM_INLINE vf v_div(vf a, vf b) { return a / b; }

KM_INLINE vf v_load(const float *p)
{
	vf v;

	memcpy(&v, p, sizeof(v));
	return v;
}

KM_INLINE void v_store(float *p, vf v)
{
	memcpy(p, &v, sizeof(v));
}

KM_INLINE vf v_choose(vf_bits which, vf a, vf b)
{
	return (vf)(((vf_bits)a & which) | ((vf_bits)b & ~which));
}

KM_INLINE vf v_max(vf a, vf b) { return v_choose(a > b, a, b); } /* b where either is NaN */
KM_INLINE vf v_min(vf a, vf b) { return v_choose(a < b, a, b); } /* so too */

/*
 * a * b + c, rounded once. `error` is what the sum in double leaves out (Knuth's two-sum). Where there
 * is some and the sum is even, the odd neighbour on the error's side takes its place: one step away from
 * zero when their signs agree, else one towards it. Infinities and NaN have no error that compares.
 */
KM_INLINE vf v_fma(vf a, vf b, vf c)
{
	vf_wide product = __builtin_convertvector(a, vf_wide) * __builtin_convertvector(b, vf_wide);
	vf_wide add = __builtin_convertvector(c, vf_wide), sum = product + add;
	vf_wide back = sum - product, error = (product - (sum - back)) + (add - back);
	vf_wide_bits bits = (vf_wide_bits)sum, even = ~(bits << 63 >> 63);
	vf_wide_bits inexact = (error < 0) | (error > 0);
	vf_wide_bits step = ((bits ^ (vf_wide_bits)error) >> 63) | 1;

	return __builtin_convertvector((vf_wide)(bits + (step & inexact & even)), vf);
}

/* The first n < VL elements, the rest 0. */
KM_INLINE vf v_load_n(const float *p, int n)
{
	vf v = v_zero();

	if (n > 0)
		memcpy(&v, p, (size_t)n * sizeof(float));
	return v;
}

KM_INLINE void v_store_n(float *p, vf v, int n)
{
	if (n > 0)
		memcpy(p, &v, (size_t)n * sizeof(float));
}

KM_INLINE vf v_load_f16_n(const void *p, int n)
{
	float f[VL] = { 0 };

	if (n > 0)
		km_dtype_to_f32(KM_F16, p, f, (size_t)n);
	return v_load(f);
}

KM_INLINE vf v_load_bf16_n(const void *p, int n)
{
	float f[VL] = { 0 };

	if (n > 0)
		km_dtype_to_f32(KM_BF16, p, f, (size_t)n);
	return v_load(f);
}

KM_INLINE vf v_load_f16(const void *p)
{
	return v_load_f16_n(p, VL);
}

KM_INLINE vf v_load_bf16(const void *p)
{
	uint16_t half[VL];

	memcpy(half, p, sizeof(half));
	return (vf)(vf_bits){ (int32_t)((uint32_t)half[0] << 16), (int32_t)((uint32_t)half[1] << 16),
		              (int32_t)((uint32_t)half[2] << 16), (int32_t)((uint32_t)half[3] << 16) };
}

/* e4m3 / 256 */
KM_INLINE vf v_load_fp8_256th(const void *p)
{
	uint8_t byte[VL];
	float f[VL];

	memcpy(byte, p, sizeof(byte));
	for (int i = 0; i < VL; i++)
		f[i] = km_f8_e4m3_to_f32(byte[i]);
	return v_load(f) * v_set1(1.0f / 256);
}

KM_INLINE vf v_int4_scale(float scale)
{
	return v_set1(scale);
}

/* (nibble - 8) * scale of 4 nibbles, the low one of a byte first, in order. */
KM_INLINE vf v_load_int4_shuffled(const void *p, vf scale)
{
	uint8_t byte[2];

	memcpy(byte, p, sizeof(byte));
	return (vf){ (float)((byte[0] & 15) - 8), (float)((byte[0] >> 4) - 8),
		     (float)((byte[1] & 15) - 8), (float)((byte[1] >> 4) - 8) } * scale;
}

KM_INLINE vf v_shuffle(vf v)
{
	return v;
}

KM_INLINE vf v_unshuffle(vf v)
{
	return v;
}

/* For |x| < 2^22; adding it leaves an integer in the low bits. */
KM_INLINE vf v_rounding(void) { return v_set1(12582912.0f); /* 1.5 * 2^23 */ }

/* 2^n * f for -126 <= n <= 127 and a result that is normal; f where n is NaN */
KM_INLINE vf v_scale_by_power(vf f, vf n)
{
	vf_bits power = (vf_bits)(n + v_rounding()) << 23;

	return (vf)((vf_bits)f + (power & (n == n)));
}

KM_INLINE vf v_round(vf x)
{
	return x + v_rounding() - v_rounding();
}

/* The sums of 4 vectors, one in each lane, as (0+2)+(1+3). */
KM_INLINE vf v_sums_of_vl(const vf a[VL])
{
	vf sums;

	for (int i = 0; i < VL; i++)
		sums[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
	return sums;
}

#endif
