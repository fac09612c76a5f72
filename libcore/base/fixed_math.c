#include "base/fixed_math.h"

#include <math.h>

/* Adding it rounds to an integer, to even at halves, which then stands in the low bits. */
static const double ROUND = 6755399441055744.0; /* 1.5 * 2^52 */

/* ln 2, the first with 21 zero bits at its end; pi / 2, the first two with 20. */
static const double LN2[] = { 0x1.62e42feep-1, 0x1.a39ef35793c76p-33 };
static const double HALF_PI[] = { 0x1.921fb544p+0, 0x1.0b4611a6p-34, 0x1.3198a2e037073p-69 };

static uint64_t bits_of(double x)
{
	uint64_t bits;

	memcpy(&bits, &x, 8);
	return bits;
}

static double of_bits(uint64_t bits)
{
	double x;

	memcpy(&x, &bits, 8);
	return x;
}

/* x = 2^n m with m in [sqrt(1/2), sqrt(2)); ln m = 2 (s + s^3 / 3 + s^5 / 5 ...), s = (m - 1) / (m + 1),
 * whose square is below 0.0295. */
double km_fixed_log(double x)
{
	uint64_t bits = bits_of(x) - 0x3fe6a09e667f3bcd; /* of sqrt(1/2) */
	double n = (double)((int64_t)bits >> 52), m = of_bits(bits_of(x) - (bits >> 52 << 52));
	double s = (m - 1) / (m + 1), square = s * s, sum = 0;

	for (int k = 23; k > 1; k -= 2)
		sum = square * (sum + 1.0 / k);
	return n * LN2[0] + (2 * s + (2 * s * sum + n * LN2[1]));
}

/* Taylor's coefficients, the highest first: of sine / r - 1 and cosine - 1 in r squared. */
static const double SINE[] = {
	1 / 355687428096000.0, -1 / 1307674368000.0, 1 / 6227020800.0, -1 / 39916800.0,
	1 / 362880.0, -1 / 5040.0, 1 / 120.0, -1 / 6.0,
};
static const double COSINE[] = {
	1 / 20922789888000.0, -1 / 87178291200.0, 1 / 479001600.0, -1 / 3628800.0,
	1 / 40320.0, -1 / 720.0, 1 / 24.0, -1 / 2.0,
};

/* x = n pi / 2 + r, |r| <= pi / 4; n times the first two parts of pi / 2 is exact. */
void km_fixed_sincos(double x, double *sine, double *cosine)
{
	double n = x * 0x1.45f306dc9c883p-1 + ROUND, r, square, s = 0, c = 0;
	uint64_t quarter = bits_of(n) & 3;

	n -= ROUND;
	r = x - n * HALF_PI[0] - n * HALF_PI[1] - n * HALF_PI[2];
	square = r * r;
	for (int i = 0; i < 8; i++) {
		s = square * (s + SINE[i]);
		c = square * (c + COSINE[i]);
	}
	s = r + r * s;
	c = 1 + c;
	*sine = quarter & 1 ? c : s;
	*cosine = quarter & 1 ? s : c;
	if (quarter & 2)
		*sine = -*sine;
	if (quarter == 1 || quarter == 2)
		*cosine = -*cosine;
}

/* The exponent's binary digits choose from the base's square root, its fourth root and so on. */
double km_fixed_power(double base, double exponent)
{
	double product = 1;

	while (exponent > 0) {
		base = sqrt(base);
		exponent *= 2;
		if (exponent >= 1) {
			product *= base;
			exponent -= 1;
		}
	}
	return product;
}
