/* device/roofline: what is known of a GPU, and that what is not measured is not passed off as measured. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "device/roofline.h"

static km_roofline roofline_of(const char *name, double nominal_gbps)
{
	km_cuda_info info = { .capability = 90, .memory_gbps = nominal_gbps };
	km_roofline r;

	snprintf(info.name, sizeof(info.name), "%s", name);
	km_roofline_of_gpu(&info, &r);
	return r;
}

static void check_words(const km_roofline *r, const char *words)
{
	km_buf out = KM_BUF_INIT;

	km_roofline_describe(r, &out);
	assert_string_equal(out.data, words);
	km_buf_release(&out);
}

/* A measured rate is below the memory's nominal one, and near it. */
static void measured_gpus(void **state)
{
	static const struct {
		const char *name;
		double nominal_gbps; /* by the data sheet */
	} gpus[] = { { "NVIDIA H100 80GB HBM3", 3352 }, { "NVIDIA H200", 4800 } };

	(void)state;
	for (size_t i = 0; i < sizeof(gpus) / sizeof(*gpus); i++) {
		km_roofline r = roofline_of(gpus[i].name, gpus[i].nominal_gbps);

		assert_true(r.gbps < gpus[i].nominal_gbps && r.gbps > 0.9 * gpus[i].nominal_gbps);
		assert_true(r.tflops > 600 && r.tflops < 989);
		assert_non_null(strstr(r.source, "measured: reading "));
	}
}

static void other_gpus(void **state)
{
	km_roofline r = roofline_of("NVIDIA H200 NVL", 4800);

	(void)state;
	assert_true(r.gbps == 4800 && r.tflops == 0);
	check_words(&r, "4800 GB/s (nominal memory bandwidth, not measured)");
	r = roofline_of("abacus", 0);
	check_words(&r, "not known: neither measured nor told by the driver");
	assert_true(km_roofline_us(&r, 1e9, 1e12) == 0);
}

/* Whichever takes longer. */
static void least_time(void **state)
{
	km_roofline r = { 2000, 500, "made up" };

	(void)state;
	assert_true(km_roofline_us(&r, 4e9, 1e9) == 2000);
	assert_true(km_roofline_us(&r, 4e9, 2e12) == 4000);
	check_words(&r, "2000 GB/s, 500 TFLOP/s (made up)");
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(measured_gpus), cmocka_unit_test(other_gpus),
		                            cmocka_unit_test(least_time) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
