/*
 * exp, log, sine, cosine and powers whose results are the same bits on every machine.
 *
 * libm promises its errors, not its bits: they change with its version and with the processor (glibc
 * takes other code where there are fused multiply-adds). A token that is chosen by a comparison must
 * not hang on that. These are made of additions, multiplications, divisions and square roots, each
 * rounded as IEEE 754 says, in a fixed order. Compiled without contraction and without -ffast-math.
 */
#ifndef KM_BASE_FIXED_MATH_H
#define KM_BASE_FIXED_MATH_H

#include <stdint.h>
#include <string.h>

double km_fixed_log(double x); /* x > 0, finite and normal; within 2 units in the last place */

/* |x| <= 2^20; the errors are about 2^-52. */
void km_fixed_sincos(double x, double *sine, double *cosine);

/* base^exponent for base > 0 and 0 <= exponent < 1; the relative error is below 2^-46. */
double km_fixed_power(double base, double exponent);

/*
 * Any x; within 0.501 units in the last place. Here, so that loops over it become vectors: it is the
 * gate's innermost. Beyond +-104, where a float is infinity or 0, x is held there; by integers, since
 * compilers make no vectors of comparisons of floats that might be NaN. x = n ln 2 + r; e^r by its
 * Taylor polynomial of degree 9, whose error is below 7e-12 of it.
 */
static inline float km_fixed_exp(float x)
{
	const double round = 6755399441055744.0; /* 1.5 * 2^52: leaves an integer in the low bits */
	double n, r, rrr, low, middle, high, power;
	int32_t sign, size, beyond;
	uint64_t bits;

	memcpy(&size, &x, 4);
	sign = size & INT32_MIN;
	size &= INT32_MAX;
	beyond = -(size > 0x42d00000) & -(size <= 0x7f800000);
	size = (size & ~beyond) | (0x42d00000 & beyond) | sign;
	memcpy(&x, &size, 4);
	n = (double)x * 0x1.71547652b82fep+0 + round;
	r = (double)x - (n - round) * 0x1.62e42feep-1 - (n - round) * 0x1.a39ef35793c76p-33;
	rrr = r * r * r;
	low = 1 + r * (1 + r * (1.0 / 2));
	middle = 1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120));
	high = 1.0 / 720 + r * (1.0 / 5040 + r * (1.0 / 40320 + r * (1.0 / 362880)));
	memcpy(&bits, &n, 8);
	bits = (bits + 1023) << 52;
	memcpy(&power, &bits, 8);
	return (float)((low + rrr * (middle + rrr * high)) * power);
}

#endif
