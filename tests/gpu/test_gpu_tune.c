/* kimi-tune's GPU half: every candidate's result is right, samples are times, on small shapes of
 * each kind. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "device/cuda.h"
#include "device/cuda_moe_tune.h"

static void try_shape(const km_moe_problem *shape)
{
	static const int tokens[] = { 100, 1, 9 };
	static km_tune_entry list[KM_TUNER_MAX_CANDIDATES];
	km_cuda_moe_tuner *tuner;
	km_tuner_backend b;
	km_moe_device device;
	km_cuda_info info;
	km_err err;

	if (km_cuda_describe(0, &info, &err) < 0)
		fail_msg("%s", err.msg);
	device = (km_moe_device){ info.capability, info.multiprocessors };
	if (km_cuda_moe_tuner_open(&tuner, &b, shape, &device, &err) < 0)
		fail_msg("%s", err.msg);
	for (int i = 0; i < 3; i++) {
		int n = b.candidates(b.context, tokens[i], list, KM_TUNER_MAX_CANDIDATES, &err);
		double us = 0;

		assert_true(n > 1);
		if (b.prepare(b.context, tokens[i], &err) < 0)
			fail_msg("%s", err.msg);
		for (int k = 0; k < n; k++)
			if (b.check(b.context, tokens[i], list[k].values, &us, &err) != 1)
				fail_msg("%d tokens, candidate %d: %s", tokens[i], k, err.msg);
		for (int k = 0; k < 3; k++) {
			if (b.sample(b.context, tokens[i], list[k % n].values, &us, &err) < 0)
				fail_msg("%s", err.msg);
			assert_true(us > 1 && us < 1e5);
		}
		list[0].values[5] = 1000; /* stages */
		assert_int_equal(b.check(b.context, tokens[i], list[0].values, &us, &err), 0);
		assert_true(b.now(b.context) > 0);
	}
	km_cuda_moe_tuner_close(tuner);
}

static void candidates_are_right(void **state)
{
	km_moe_problem p = { .tokens = 100,
		             .experts = 16,
		             .global_experts = 16,
		             .top_k = 4,
		             .hidden = 1024,
		             .intermediate = 256,
		             .group = 32,
		             .packed = true,
		             .pdl = true };

	(void)state;
	try_shape(&p);
	p.group = 128;
	p.intermediate = 128;
	try_shape(&p);
	p.group = 32;
	p.experts = 8; /* the other half of the experts is elsewhere */
	p.expert_map = true;
	try_shape(&p);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(candidates_are_right) };

	if (!km_cuda_count(NULL)) {
		print_message("skip: there is no GPU\n");
		return 0;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
