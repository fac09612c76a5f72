/*
 * base/fixed_math: near libm's results, and the very bits that are written here. The sums of bits were
 * made by this program; another machine, compiler or library that gives others breaks the promise of
 * the same tokens everywhere.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>

#include "base/fixed_math.h"
#include "base/rng.h"

enum { SAMPLES = 200000 };

static double random_in(double low, double high, uint64_t i)
{
	return low + (high - low) * (double)(km_rng_u64(1, i) >> 11) * 0x1p-53;
}

/* FNV's way of taking in one more value. */
static uint64_t mix(uint64_t sum, double value)
{
	uint64_t bits;

	memcpy(&bits, &value, 8);
	return (sum ^ bits) * 0x100000001b3;
}

static void exp_is_right(void **state)
{
	double worst = 0;
	uint64_t sum = 0;

	(void)state;
	for (uint64_t i = 0; i < SAMPLES; i++) {
		float x = (float)random_in(-87, 88.7, i), got = km_fixed_exp(x);
		double want = exp((double)x);

		worst = fmax(worst, fabs(got - want) / want);
		sum = mix(sum, got);
	}
	for (float x = -110; x < -87; x += 0.01f)
		sum = mix(sum, km_fixed_exp(x));
	printf("figure: exp's largest relative error 2^%.2f\n", log2(worst));
	assert_true(worst < 0x1.01p-24);
	assert_true(km_fixed_exp(0) == 1 && km_fixed_exp(-INFINITY) == 0);
	assert_true(isinf(km_fixed_exp(89)) && isinf(km_fixed_exp(INFINITY)));
	assert_true(km_fixed_exp(-104.5f) == 0 && km_fixed_exp(-103) > 0 && isnan(km_fixed_exp(NAN)));
	assert_true(sum == 0x82fb239440000000);
}

static void log_is_right(void **state)
{
	double worst = 0;
	uint64_t sum = 0;

	(void)state;
	for (uint64_t i = 0; i < SAMPLES; i++) {
		double x = i % 2 ? random_in(0.5, 2, i) : exp(random_in(-700, 700, i)), want = log(x);
		double got = km_fixed_log(x);

		worst = fmax(worst, fabs(got - want) / fabs(want));
		sum = mix(sum, km_fixed_log(i % 2 ? x : random_in(2, 1e9, i)));
	}
	assert_true(km_fixed_log(1) == 0);
	assert_true(worst < 0x1p-51);
	assert_true(sum == 0x6e81962b920bba35);
}

static void sine_and_cosine_are_right(void **state)
{
	double worst = 0;
	uint64_t sum = 0;

	(void)state;
	for (uint64_t i = 0; i < SAMPLES; i++) {
		double x = i % 2 ? random_in(-20, 20, i) : (float)random_in(0, 1 << 20, i), s, c;

		km_fixed_sincos(x, &s, &c);
		worst = fmax(worst, fmax(fabs(s - sin(x)), fabs(c - cos(x))));
		sum = mix(mix(sum, s), c);
	}
	printf("figure: sine's and cosine's largest error 2^%.2f\n", log2(worst));
	assert_true(worst < 0x1.2p-52);
	assert_true(sum == 0x93f51c408859009c);
}

static void powers_are_right(void **state)
{
	uint64_t sum = 0;

	(void)state;
	for (uint64_t i = 0; i < SAMPLES / 10; i++) {
		double base = random_in(1, 1e7, i), exponent = (float)random_in(0, 0.99, i + SAMPLES);
		double got = km_fixed_power(base, exponent);

		assert_true(fabs(got / pow(base, exponent) - 1) < 0x1p-46);
		sum = mix(sum, got);
	}
	assert_true(km_fixed_power(50000, 0) == 1 && km_fixed_power(65536, 0.25) == 16);
	assert_true(sum == 0xdb3e70b2441052c9);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(exp_is_right),
		cmocka_unit_test(log_is_right),
		cmocka_unit_test(sine_and_cosine_are_right),
		cmocka_unit_test(powers_are_right),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
