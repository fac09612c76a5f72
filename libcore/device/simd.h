/*
 * A vector of VL floats, 16 with AVX-512, 8 with AVX2, 4 with neither (simd_portable.h), and what the
 * ops need of it. The three forms of an op are one text (cpu_dot.h, cpu_mla.h, cpu_moe.h) over this
 * layer, compiled in cpu_avx512.c, cpu_avx2.c and cpu_portable.c.
 *
 * THE SAME BITS  All three forms compute the same results to the last bit, so that a prompt's answer
 * does not depend on the machine. A sum over columns has LANES lanes whatever VL is: it is kept in
 * PARTS vectors, part p holding lanes p * VL and up. Every product that is added is a fused
 * multiply-add. v_sums has one tree. Nothing else depends on VL, and nothing calls libm, whose last
 * bits depend on its version and on the processor (base/fixed_math.h is used).
 *
 * Loads and stores take any alignment: a checkpoint's tensors start where its header ends.
 */
#ifndef KM_DEVICE_SIMD_H
#define KM_DEVICE_SIMD_H

#include <stdint.h>
#include <string.h>

#define KM_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

#include <immintrin.h>

typedef __m512 vf;
enum { VL = 16 };

KM_INLINE vf v_zero(void) { return _mm512_setzero_ps(); }
KM_INLINE vf v_set1(float f) { return _mm512_set1_ps(f); }
KM_INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
KM_INLINE void v_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
KM_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
KM_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
KM_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
KM_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
KM_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); } /* b where either is NaN */
KM_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); } /* so too */
KM_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); } /* a * b + c */

KM_INLINE __mmask16 v_mask(int n) { return (__mmask16)((1u << n) - 1); }

/* The first n < VL elements, the rest 0. */
KM_INLINE vf v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(v_mask(n), p); }
KM_INLINE void v_store_n(float *p, vf v, int n) { _mm512_mask_storeu_ps(p, v_mask(n), v); }

KM_INLINE vf v_load_f16(const void *p)
{
	return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

KM_INLINE vf v_load_bf16(const void *p)
{
	__m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));

	return _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}

/* The first n < VL elements, the rest 0. */
KM_INLINE vf v_load_f16_n(const void *p, int n)
{
	return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_mask(n), p));
}

KM_INLINE vf v_load_bf16_n(const void *p, int n)
{
	__m512i u = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(v_mask(n), p));

	return _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}

/* e4m3 / 256: a byte's exponent and mantissa put into an f16, subnormals included; the sign comes
 * along by sign extension. */
KM_INLINE vf v_load_fp8_256th(const void *p)
{
	__m128i bytes = _mm_loadu_si128((const __m128i *)p);
	__m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
	                                _mm256_set1_epi16((short)0xbf80));
	__mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(bytes, _mm_set1_epi8((char)0x80)),
	                                    _mm_set1_epi8(-1));

	return _mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00)));
}

/* (nibble - 8) * scale for the 16 nibbles there are. */
KM_INLINE vf v_int4_scale(float scale)
{
	return v_mul(_mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8),
	             v_set1(scale));
}

/* 16 weights, the low nibble of a byte first, in the order 0 8 1 9 ... 7 15: both words go to every
 * pair of lanes, shifts bring down one nibble each, and the low 4 bits of a lane choose from the
 * scaled values. */
KM_INLINE vf v_load_int4_shuffled(const void *p, vf scaled)
{
	const __m512i shift =
		_mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
	int64_t words;

	memcpy(&words, p, sizeof(words));
	return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(words), shift), scaled);
}

/* To that order and back. */
KM_INLINE vf v_shuffle(vf v)
{
	return _mm512_permutexvar_ps(
		_mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0), v);
}

KM_INLINE vf v_unshuffle(vf v)
{
	return _mm512_permutexvar_ps(
		_mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0), v);
}

/* 2^n * f */
KM_INLINE vf v_scale_by_power(vf f, vf n) { return _mm512_scalef_ps(f, n); }
KM_INLINE vf v_round(vf x)
{
	return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* The sums of 16 vectors, one in each lane: each as ((0+2)+(1+3)) in fours, then ((0+1)+(2+3)) of the
 * fours. */
KM_INLINE vf v_sums_of_vl(const vf a[VL])
{
	__m512 four[4];

	for (int i = 0; i < 4; i++) {
		__m512 lo = v_add(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]),
		                  _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
		__m512 hi = v_add(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]),
		                  _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));

		four[i] = v_add(_mm512_shuffle_ps(lo, hi, 0x44), _mm512_shuffle_ps(lo, hi, 0xee));
	}
	four[0] = v_add(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
	                _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
	four[2] = v_add(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
	                _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
	return v_add(_mm512_shuffle_f32x4(four[0], four[2], 0x88),
	             _mm512_shuffle_f32x4(four[0], four[2], 0xdd));
}

#elif defined(__AVX2__)

#include <immintrin.h>

typedef __m256 vf;
enum { VL = 8 };

KM_INLINE vf v_zero(void) { return _mm256_setzero_ps(); }
KM_INLINE vf v_set1(float f) { return _mm256_set1_ps(f); }
KM_INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
KM_INLINE void v_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
KM_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
KM_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
KM_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
KM_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
KM_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); } /* b where either is NaN */
KM_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); } /* so too */
KM_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); } /* a * b + c */

KM_INLINE __m256i v_mask(int n)
{
	return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* The first n < VL elements, the rest 0. */
KM_INLINE vf v_load_n(const float *p, int n) { return _mm256_maskload_ps(p, v_mask(n)); }
KM_INLINE void v_store_n(float *p, vf v, int n) { _mm256_maskstore_ps(p, v_mask(n), v); }

KM_INLINE vf v_load_f16(const void *p)
{
	return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

KM_INLINE vf v_load_bf16(const void *p)
{
	__m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));

	return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}

/* The first n < VL elements, the rest 0. */
KM_INLINE __m128i v_halves_n(const void *p, int n)
{
	uint16_t halves[VL] = { 0 };

	for (int i = 0; i < n; i++)
		memcpy(halves + i, (const char *)p + 2 * i, 2);
	return _mm_loadu_si128((const __m128i *)halves);
}

KM_INLINE vf v_load_f16_n(const void *p, int n)
{
	return _mm256_cvtph_ps(v_halves_n(p, n));
}

KM_INLINE vf v_load_bf16_n(const void *p, int n)
{
	return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v_halves_n(p, n)), 16));
}

/* e4m3 / 256: a byte's exponent and mantissa put into an f16, subnormals included. */
KM_INLINE vf v_load_fp8_256th(const void *p)
{
	__m128i u = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p));
	__m128i half = _mm_and_si128(_mm_slli_epi16(u, 7), _mm_set1_epi16((short)0xbf80));
	__m128i nan = _mm_cmpeq_epi16(_mm_or_si128(u, _mm_set1_epi16((short)0xff80)),
	                              _mm_set1_epi16(-1));

	return _mm256_cvtph_ps(_mm_blendv_epi8(half, _mm_set1_epi16(0x7e00), nan));
}

KM_INLINE vf v_int4_scale(float scale)
{
	return v_set1(scale);
}

/* (nibble - 8) * scale of 8 nibbles, the low one of a byte first, in order. */
KM_INLINE vf v_load_int4_shuffled(const void *p, vf scale)
{
	const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
	int32_t bits;
	__m256i nibble;

	memcpy(&bits, p, sizeof(bits));
	nibble = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bits), shift),
	                          _mm256_set1_epi32(15));
	return v_mul(_mm256_cvtepi32_ps(_mm256_sub_epi32(nibble, _mm256_set1_epi32(8))), scale);
}

KM_INLINE vf v_shuffle(vf v)
{
	return v;
}

KM_INLINE vf v_unshuffle(vf v)
{
	return v;
}

/* 2^n * f for -126 <= n <= 127 and a result that is normal */
KM_INLINE vf v_scale_by_power(vf f, vf n)
{
	__m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);

	return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(f), power));
}

KM_INLINE vf v_round(vf x)
{
	return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* The sums of 8 vectors, one in each lane: each as ((0+2)+(1+3)) in fours, then 0+1 of the fours. */
KM_INLINE vf v_sums_of_vl(const vf a[VL])
{
	__m256 four[2];

	for (int i = 0; i < 2; i++) {
		__m256 lo = v_add(_mm256_unpacklo_ps(a[4 * i], a[4 * i + 1]),
		                  _mm256_unpackhi_ps(a[4 * i], a[4 * i + 1]));
		__m256 hi = v_add(_mm256_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]),
		                  _mm256_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));

		four[i] = v_add(_mm256_shuffle_ps(lo, hi, 0x44), _mm256_shuffle_ps(lo, hi, 0xee));
	}
	return v_add(_mm256_permute2f128_ps(four[0], four[1], 0x20),
	             _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

#else
#include "device/simd_portable.h"
#endif

enum { LANES = 16, PARTS = LANES / VL };

/* Asks for the line at `p`, which may be past the end of what is there, into L2. */
KM_INLINE void v_prefetch(const void *p)
{
	__builtin_prefetch(p, 0, 2);
}

/* The first n elements, at most VL; none where n is not positive. */
KM_INLINE vf v_load_up_to(const float *p, int n)
{
	return n >= VL ? v_load(p) : v_load_n(p, n);
}

KM_INLINE void v_store_up_to(float *p, vf v, int n)
{
	if (n >= VL)
		v_store(p, v);
	else
		v_store_n(p, v, n);
}

/* sums[i] = the sum of the lanes of a[0][i] .. a[PARTS - 1][i] */
KM_INLINE void v_sums(const vf a[PARTS][VL], float sums[VL])
{
	vf part[PARTS];

#pragma GCC unroll 4
	for (int p = 0; p < PARTS; p++)
		part[p] = v_sums_of_vl(a[p]);
#pragma GCC unroll 2
	for (int width = 1; width < PARTS; width *= 2)
#pragma GCC unroll 2
		for (int p = 0; p < PARTS; p += 2 * width)
			part[p] = v_add(part[p], part[p + width]);
	v_store(sums, part[0]);
}

KM_INLINE float v_sum(const vf v[PARTS])
{
	vf all[PARTS][VL];
	float sums[VL];

	for (int p = 0; p < PARTS; p++)
		for (int i = 0; i < VL; i++)
			all[p][i] = i ? v_zero() : v[p];
	v_sums(all, sums);
	return sums[0];
}

/*
 * e^x, within 2 units in the last place for -87.3 <= x <= 88.3, the ends' values beyond; NaN stays.
 * x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial of degree 7, whose error
 * there is below 2^-27 of it. ln 2 is in two parts, the first with 9 zero bits at its end.
 */
KM_INLINE vf v_exp(vf x)
{
	vf n, r, p;

	x = v_min(v_set1(88.3f), v_max(v_set1(-87.3f), x));
	n = v_round(v_mul(x, v_set1(1.44269504f)));
	r = v_fma(n, v_set1(-0.693359375f), x);
	r = v_fma(n, v_set1(2.12194440e-4f), r);
	p = v_set1(1.0f / 5040);
	p = v_fma(p, r, v_set1(1.0f / 720));
	p = v_fma(p, r, v_set1(1.0f / 120));
	p = v_fma(p, r, v_set1(1.0f / 24));
	p = v_fma(p, r, v_set1(1.0f / 6));
	p = v_fma(p, r, v_set1(0.5f));
	p = v_fma(p, r, v_set1(1.0f));
	p = v_fma(p, r, v_set1(1.0f));
	return v_scale_by_power(p, n);
}

KM_INLINE vf v_silu(vf x)
{
	return v_div(x, v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), x))));
}

#endif
