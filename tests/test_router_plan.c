/* model/router: which kernels a shape gets, and why; needs no GPU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/router.h"
#include "model/router_bench.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

static const km_router_device h100 = {
	.capability = 90, .multiprocessors = 132, .blas = true, .pdl = true
};

static km_router_shape shape_of(int tokens, int experts, int top_k)
{
	return (km_router_shape){ .tokens = tokens,
		                  .experts = experts,
		                  .hidden = 7168,
		                  .top_k = top_k,
		                  .groups = 1,
		                  .topk_group = 1,
		                  .block = 8,
		                  .renormalize = true,
		                  .scale = 2.827f };
}

static km_router_plan plan_of(const km_router_shape *s, const km_router_device *d)
{
	km_router_plan plan;
	km_err err;

	if (km_router_plan_make(&plan, s, d, &err) < 0)
		fail_msg("%s", err.msg);
	return plan;
}

static void test_table(void **state)
{
	static const struct {
		const char *name;
		int tokens, experts, top_k, groups, topk_group, hidden;
		bool f32;
		enum km_router_gemm gemm;
		enum km_router_gate gate;
	} rows[] = {
		{ "K2", 1, 384, 8, 1, 1, 7168, false, KM_GEMM_RESIDENT, KM_GATE_ONEPASS },
		{ "K2", 16, 384, 8, 1, 1, 7168, false, KM_GEMM_RESIDENT, KM_GATE_ONEPASS },
		{ "K2", 64, 384, 8, 1, 1, 7168, false, KM_GEMM_SPLIT, KM_GATE_ONEPASS },
		{ "K2", 256, 384, 8, 1, 1, 7168, false, KM_GEMM_PARTS, KM_GATE_ONEPASS },
		{ "K2", 40000, 384, 8, 1, 1, 7168, false, KM_GEMM_BLAS, KM_GATE_ONEPASS },
		{ "K2, f32 router", 16, 384, 8, 1, 1, 7168, true, KM_GEMM_GENERAL,
		  KM_GATE_ONEPASS },
		{ "DeepSeek-V3", 2, 256, 8, 8, 4, 7168, false, KM_GEMM_RESIDENT, KM_GATE_ONEPASS },
		{ "DeepSeek-V2", 2, 160, 6, 8, 3, 5120, false, KM_GEMM_GENERAL, KM_GATE_ROUNDS },
		{ "256 in 4 groups", 2, 256, 8, 4, 2, 7168, false, KM_GEMM_RESIDENT,
		  KM_GATE_ROUNDS },
		{ "128 experts", 16, 128, 8, 1, 1, 4096, false, KM_GEMM_BLAS, KM_GATE_ONEPASS },
		{ "GLM-like", 16, 256, 8, 1, 1, 5120, false, KM_GEMM_BLAS, KM_GATE_ONEPASS },
		{ "GLM-like, one token", 1, 256, 8, 1, 1, 5120, false, KM_GEMM_GENERAL,
		  KM_GATE_ONEPASS },
		{ "512 experts, top 10", 8, 512, 10, 1, 1, 7168, false, KM_GEMM_RESIDENT,
		  KM_GATE_ONEPASS },
		{ "512 experts, hidden 2048", 8, 512, 10, 1, 1, 2048, false, KM_GEMM_BLAS,
		  KM_GATE_ONEPASS },
		{ "odd", 3, 7, 3, 1, 1, 24, false, KM_GEMM_GENERAL, KM_GATE_ROUNDS },
		{ "largest", 5000, 1024, 32, 32, 4, 8192, false, KM_GEMM_BLAS, KM_GATE_ROUNDS },
	};

	(void)state;
	for (int i = 0; i < COUNT(rows); i++) {
		km_router_shape s = shape_of(rows[i].tokens, rows[i].experts, rows[i].top_k);
		km_router_plan plan, again;

		s.hidden = rows[i].hidden;
		s.groups = rows[i].groups;
		s.topk_group = rows[i].topk_group;
		s.weights_f32 = rows[i].f32;
		plan = plan_of(&s, &h100);
		again = plan_of(&s, &h100);
		if (plan.gemm != rows[i].gemm || plan.gate != rows[i].gate)
			fail_msg("%s, %d tokens: GEMM %d, gate %d", rows[i].name, rows[i].tokens,
			         plan.gemm, plan.gate);
		assert_memory_equal(&plan, &again, sizeof(plan));
	}
}

static void test_refusals(void **state)
{
	static const struct {
		km_router_shape shape;
		int capability;
		const char *says;
	} rows[] = {
		{ { .tokens = 0, .experts = 384, .hidden = 64, .top_k = 8, .block = 8 },
		  90,
		  "at least one token" },
		{ { .tokens = 1, .experts = 1025, .hidden = 64, .top_k = 8, .block = 8 },
		  90,
		  "got 1025" },
		{ { .tokens = 1, .experts = 384, .hidden = 64, .top_k = 33, .block = 8 },
		  90,
		  "got 33" },
		{ { .tokens = 1, .experts = 6, .hidden = 64, .top_k = 7, .block = 8 },
		  90,
		  "1 to 6 of 6" },
		{ { .tokens = 1, .experts = 384, .hidden = 100, .top_k = 8, .block = 8 },
		  90,
		  "multiples of 8" },
		{ { .tokens = 1,
		    .experts = 384,
		    .hidden = 64,
		    .top_k = 8,
		    .groups = 7,
		    .topk_group = 1,
		    .block = 8 },
		  90,
		  "divide the 384" },
		{ { .tokens = 1,
		    .experts = 384,
		    .hidden = 64,
		    .top_k = 8,
		    .groups = 64,
		    .topk_group = 1,
		    .block = 8 },
		  90,
		  "got 64" },
		{ { .tokens = 1,
		    .experts = 384,
		    .hidden = 64,
		    .top_k = 8,
		    .groups = 8,
		    .topk_group = 9,
		    .block = 8 },
		  90,
		  "topk_group" },
		{ { .tokens = 1, .experts = 384, .hidden = 64, .top_k = 8, .block = 0 },
		  90,
		  "block" },
		{ { .tokens = 1, .experts = 384, .hidden = 64, .top_k = 8, .block = 8 },
		  75,
		  "7.5" },
		{ { .tokens = 1, .experts = 384, .hidden = 64, .top_k = 8, .block = 8 },
		  89,
		  "overlapping" },
	};

	(void)state;
	for (int i = 0; i < COUNT(rows); i++) {
		km_router_device d = h100;
		km_router_plan plan;
		km_err err;

		d.capability = rows[i].capability;
		assert_true(km_router_plan_make(&plan, &rows[i].shape, &d, &err) < 0);
		if (!strstr(err.msg, rows[i].says))
			fail_msg("row %d: \"%s\" does not say \"%s\"", i, err.msg, rows[i].says);
	}
}

/* No token count leaves the one-launch forms' range, and each tuned limit is the plan's. */
static void test_limits_of_tuning(void **state)
{
	(void)state;
	for (int pdl = 0; pdl < 2; pdl++)
		for (int experts = 256; experts <= 384; experts += 128)
			for (int tokens = 1; tokens < 300; tokens++) {
				km_router_device d = h100;
				km_router_shape s = shape_of(tokens, experts, 8);
				const km_router_tuning *t;
				km_router_plan plan;

				d.pdl = pdl;
				t = km_router_tuning_find(&d, experts);
				plan = plan_of(&s, &d);
				assert_int_equal(plan.pdl, pdl);
				assert_int_equal(plan.gemm == KM_GEMM_RESIDENT,
				                 tokens <= t->resident_tokens);
				assert_int_equal(plan.gemm == KM_GEMM_PARTS,
				                 tokens > t->split_tokens &&
				                         tokens <= t->parts_tokens);
				assert_int_equal(plan.gemm == KM_GEMM_BLAS,
				                 tokens > t->split_tokens &&
				                         tokens > t->parts_tokens);
				assert_int_equal(plan.chain == KM_CHAIN_ONE_LAUNCH,
				                 tokens <= t->one_launch_tokens);
				assert_true(plan.chain == KM_CHAIN_SEPARATE || tokens <= 64);
			}
}

static void test_without_blas(void **state)
{
	km_router_device d = h100;
	km_router_shape s = shape_of(1000, 384, 8);

	(void)state;
	d.blas = false;
	assert_int_equal(plan_of(&s, &d).gemm, KM_GEMM_SPLIT);
	d.capability = 100;
	assert_int_equal(plan_of(&s, &d).gemm, KM_GEMM_RESIDENT);
	s.hidden = 4096;
	assert_int_equal(plan_of(&s, &d).gemm, KM_GEMM_GENERAL);
}

static void test_older_gpus(void **state)
{
	km_router_device a100 = {
		.capability = 80, .multiprocessors = 108, .blas = true, .pdl = false
	};
	km_router_shape s = shape_of(1, 384, 8);

	(void)state;
	assert_null(km_router_tuning_find(&a100, 384));
	assert_int_equal(plan_of(&s, &a100).gemm, KM_GEMM_GENERAL);
	assert_int_equal(plan_of(&s, &a100).chain, KM_CHAIN_SEPARATE);
	s.tokens = 64;
	assert_int_equal(plan_of(&s, &a100).gemm, KM_GEMM_BLAS);
}

static void check_words(const km_router_shape *s, const km_router_device *d,
                        const char *const *words)
{
	km_router_plan plan = plan_of(s, d);
	km_buf out = KM_BUF_INIT;

	km_router_plan_explain(&plan, s, d, &out);
	for (; *words; words++)
		if (!strstr(out.data, *words))
			fail_msg("\"%s\" is not in:\n%s", *words, out.data);
	km_buf_release(&out);
}

static void test_words(void **state)
{
	const km_router_tuning *t = km_router_tuning_find(&h100, 384);
	km_router_shape s = shape_of(1, 384, 8);
	km_router_device d = h100;
	char split[64], parts[64];

	(void)state;
	snprintf(split, sizeof(split), "%d to %d tokens", t->resident_tokens + 1, t->split_tokens);
	snprintf(parts, sizeof(parts), "second launch; %d to %d tokens", t->split_tokens + 1, t->parts_tokens);
	check_words(&s, &d,
	            (const char *[]){ "resident, 128 blocks", "tuning row 90, 384 experts",
	                              "overlap", "chain: ", NULL });
	s.tokens = 100000;
	check_words(&s, &d,
	            (const char *[]){ "cuBLASLt, 100000 tokens are above",
	                              "one pass, 8 rows a block", "router; gate; alignment",
	                              NULL });
	s.hidden = 4096;
	s.experts = 300;
	s.tokens = 3;
	check_words(&s, &d, (const char *[]){ "general form", "hidden is not 7168",
	                                      "by rounds", "experts are not 128", NULL });
	s = shape_of(50, 384, 8);
	check_words(&s, &d,
	            (const char *[]){ "clusters of 16, tiles of 64 tokens x 64 experts",
	                              "tuning row 90", NULL });
	s = shape_of(200, 512, 8);
	check_words(&s, &d,
	            (const char *[]){ "cuBLASLt, 200 tokens are above the split form's",
	                              "experts are above 384", NULL });
	s = shape_of(200, 384, 8);
	check_words(&s, &d,
	            (const char *[]){ "in 14 parts, tiles of 128 tokens x 96 experts", parts, NULL });
	d.blas = false;
	s = shape_of(100, 384, 8);
	check_words(&s, &d, (const char *[]){ "split over clusters of 16", split, NULL });
	s = shape_of(300, 384, 8);
	check_words(&s, &d, (const char *[]){ "cuBLASLt was not found", NULL });
	d = (km_router_device){ .capability = 100, .multiprocessors = 148, .blas = true, .pdl = true };
	check_words(&s, &d, (const char *[]){ "300 tokens are above the resident form's",
	                                      "for capability 9.0 alone", NULL });
}

/* A limit is the last token count of a form that comes earlier; one noisy point moves none. */
static void test_limits_of_times(void **state)
{
	static const int tokens[] = { 1, 2, 4, 8, 16, 32 };
	static const double overtaking[] = { 2, 5, 9, 3, 5, 9, 4, 5, 9, 6, 5, 9, 9, 5, 9, 99, 20, 9 };
	static const double noisy[] = { 2, 5, 9, 6, 5, 9, 3, 5, 9, 6, 5, 9, 9, 5, 9, 99, 20, 9 };
	static const double absent[] = { 2, INFINITY, 1, 3, INFINITY, 1, 4,  INFINITY, 1,
		                         6, INFINITY, 1, 9, INFINITY, 1, 99, INFINITY, 1 };
	static const double skipped[] = { 2, 9, 5, 3, 9, 5, 4, 9, 5, 6, 9, 5, 9, 9, 5, 99, 9, 5 };
	int limit[3];

	(void)state;
	km_router_bench_limits(overtaking, tokens, 6, 3, limit);
	assert_int_equal(limit[0], 4);
	assert_int_equal(limit[1], 16);
	assert_int_equal(limit[2], 32);
	km_router_bench_limits(noisy, tokens, 6, 3, limit);
	assert_int_equal(limit[0], 4);
	assert_int_equal(limit[1], 16);
	km_router_bench_limits(absent, tokens, 6, 3, limit);
	assert_int_equal(limit[0], 0);
	assert_int_equal(limit[1], 0);
	km_router_bench_limits(skipped, tokens, 6, 3, limit);
	assert_int_equal(limit[0], 4);
	assert_int_equal(limit[1], 4);
}

/* Another GEMM in a plan brings its own tile. */
static void test_force(void **state)
{
	km_router_shape s = shape_of(200, 384, 8);
	km_router_plan plan = plan_of(&s, &h100);

	(void)state;
	km_router_plan_force(&plan, &s, KM_GEMM_SPLIT);
	assert_int_equal(plan.split_experts, 64);
	km_router_plan_force(&plan, &s, KM_GEMM_PARTS);
	assert_int_equal(plan.gemm, KM_GEMM_PARTS);
	assert_int_equal(plan.split_tokens, 128);
	assert_int_equal(plan.split_experts, 96);
}

/* The floor of the router is its weights' at few tokens, its products' at many; the gate's is its logits'. */
static void test_floor(void **state)
{
	static const km_roofline r = { 3100, 780, "H100" };
	km_router_shape s = shape_of(1, 384, 8);
	double weights = 384.0 * 7168 * 2;

	(void)state;
	assert_float_equal(km_router_bench_bytes(&s, "router"), weights + 7168 * 2 + 384 * 4, 0.5);
	assert_float_equal(km_router_bench_flops(&s, "chain"), weights, 0.5);
	assert_true(km_router_bench_flops(&s, "gate") == 0);
	assert_float_equal(km_roofline_us(&r, weights, km_router_bench_flops(&s, "router")), 1.78, 0.01);
	s.tokens = 40000;
	assert_float_equal(km_roofline_us(&r, km_router_bench_bytes(&s, "router"),
	                                  km_router_bench_flops(&s, "router")), 282.3, 0.1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_table), cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_limits_of_tuning), cmocka_unit_test(test_without_blas),
		cmocka_unit_test(test_older_gpus), cmocka_unit_test(test_words),
		cmocka_unit_test(test_limits_of_times), cmocka_unit_test(test_force),
		cmocka_unit_test(test_floor),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
