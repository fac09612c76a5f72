/* The plan of the experts: what it chooses, what it refuses, and that every candidate is taken. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "device/moe_plan.h"

static const km_moe_device h100 = { 90, 132 };
static km_err err;

static km_moe_problem k25(int tokens, int intermediate)
{
	return (km_moe_problem){ .tokens = tokens, .experts = 384, .global_experts = 384, .top_k = 8,
		                 .hidden = 7168, .intermediate = intermediate, .group = 32, .packed = true };
}

static void test_every_candidate_is_taken(void **state)
{
	static const int mids[] = { 128, 256, 512, 1024, 2048 }, tokens[] = { 1, 3, 8, 64, 300, 1024, 8192 };

	(void)state;
	for (int i = 0; i < 5; i++)
		for (int t = 0; t < 7; t++)
			for (int group = 32; group <= 128; group *= 2) {
				km_moe_problem p = k25(tokens[t], mids[i]);
				km_moe_tile tiles[128];
				km_moe_plan plan;
				int n;

				p.group = group;
				n = km_moe_candidates(&p, &h100, tiles, 128);
				assert_in_range(n, 8, 128);
				for (int c = 0; c < n; c++) {
					assert_int_equal(km_moe_plan_make(&plan, &p, &h100, &tiles[c], &err), 0);
					assert_true(plan.tuned);
					assert_memory_equal(&plan.tile, &tiles[c], sizeof(tiles[c]));
					assert_in_range(plan.smem_bytes, 1, 227 * 1024);
					assert_in_range(plan.x_stages, 2, 4);
					for (int o = 0; o < c; o++)
						assert_memory_not_equal(&tiles[o], &tiles[c], sizeof(tiles[c]));
				}
				assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
				assert_false(plan.tuned);
				for (int c = 0; c <= n; c++) {
					assert_int_not_equal(c, n); /* the own choice is one of them */
					if (!memcmp(&plan.tile, &tiles[c], sizeof(tiles[c])))
						break;
				}
			}
}

/* Every hidden size has a plan: the small tiles take multiples of 512 alone. */
static void test_hidden_sizes(void **state)
{
	static const int tokens[] = { 1, 9, 16, 64, 128, 1024, 8192 };

	(void)state;
	for (int hidden = 128; hidden <= 8192; hidden += 128)
		for (int intermediate = 128; intermediate <= 512; intermediate *= 2)
			for (int t = 0; t < 7; t++) {
				km_moe_problem p = k25(tokens[t], intermediate);
				km_moe_plan own, tuned;

				p.hidden = hidden;
				assert_int_equal(km_moe_plan_make(&own, &p, &h100, NULL, &err), 0);
				if (own.form == KM_MOE_GENERAL)
					assert_int_not_equal(hidden % 256, 0);
				else
					assert_int_equal(km_moe_plan_make(&tuned, &p, &h100, &own.tile, &err), 0);
			}
}

static void test_forms(void **state)
{
	km_moe_problem p = k25(1, 256);
	km_moe_plan plan;
	km_buf out = { 0 };

	(void)state;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
	assert_int_equal(plan.form, KM_MOE_DECODE);
	assert_true(plan.align_inside);
	p.tokens = 64;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
	assert_int_equal(plan.form, KM_MOE_GROUPED);
	assert_int_equal(plan.tile.block_m, 8);
	p.tokens = 4096;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
	assert_int_equal(plan.form, KM_MOE_PREFILL);
	assert_int_equal(plan.tile.block_m, 112);
	assert_true(plan.part_bf16);
	p.packed = false;
	p.hidden = 1000;
	p.intermediate = 24;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
	assert_int_equal(plan.form, KM_MOE_GENERAL);
	assert_int_equal(km_moe_candidates(&p, &h100, NULL, 0), 0);
	km_moe_plan_explain(&plan, &p, &h100, &out);
	assert_non_null(strstr(out.data, "not int4 in the packed layout"));
	km_buf_release(&out);
}

/* What the decode form's launch takes along, and each condition by itself. */
static void test_taken_along(void **state)
{
	const km_moe_before k2 = { .groups = 1, .bias = true, .shared_cols = KM_MOE_FRONT_COLS, .shared_bf16 = true };
	km_moe_before before[] = { k2, k2, k2, k2, k2 };
	km_moe_problem p = k25(1, 256);
	km_moe_plan plan;

	(void)state;
	for (p.tokens = 1; p.tokens <= 9; p.tokens++) {
		assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
		assert_int_equal(km_moe_plan_takes(&plan, &p, &k2), p.tokens <= KM_MOE_FRONT_TOKENS);
	}
	p.tokens = 1;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
	before[0].groups = 8;
	before[1].softmax = true;
	before[2].bias = false;
	before[3].shared_cols = 512;
	before[4].shared_bf16 = false;
	for (int i = 0; i < 5; i++)
		assert_false(km_moe_plan_takes(&plan, &p, &before[i]));
	plan.form = KM_MOE_GROUPED;
	assert_false(km_moe_plan_takes(&plan, &p, &k2));
	plan.form = KM_MOE_DECODE;
	plan.blocks = 100; /* too few multiprocessors: more rows each than there is room for */
	assert_false(km_moe_plan_takes(&plan, &p, &k2));
	p.experts = p.global_experts = 256;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
	assert_false(km_moe_plan_takes(&plan, &p, &k2));
}

static void test_refusals(void **state)
{
	km_moe_problem p = k25(16, 256);
	km_moe_tile tile = { 8, 48, 1024, 1, 16, 3 };
	km_moe_plan plan;

	(void)state;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, &tile, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "BLOCK_SIZE_N 48"));
	tile.block_n = 64;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, &tile, &err), 0);
	tile.block_k = 256;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, &tile, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "BLOCK_SIZE_K 1024, got 256"));
	tile.block_k = 1024;
	tile.stages = 17;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, &tile, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "num_stages"));
	tile.stages = 3;
	tile.warps = 4;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, &tile, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "num_warps is 16, got 4"));
	p.group = 48;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "got 48"));
	p = k25(16, 256);
	p.experts = 48;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), KM_EINVAL);
	assert_non_null(strstr(err.msg, "there is no expert map"));
	p.expert_map = true;
	assert_int_equal(km_moe_plan_make(&plan, &p, &h100, NULL, &err), 0);
	assert_int_equal(km_moe_plan_make(&plan, &p, &(km_moe_device){ 75, 40 }, NULL, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "7.5"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_every_candidate_is_taken), cmocka_unit_test(test_hidden_sizes),
		cmocka_unit_test(test_forms), cmocka_unit_test(test_taken_along),
		cmocka_unit_test(test_refusals),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
