/*
 * Every form of the router GEMM over 10,240 random rows, against double precision.
 *
 * Kimi K2's router: 384 experts, hidden 7168, bf16. The rows go through each form in calls of as many
 * tokens as it is for; each logit is held to the error bound of f32 sums (model/router_check.h), and
 * what the forms that gate as well selected to the logits that they left. The references take all
 * of the host's processors; test_gpu_router has the other shapes, and the runs under a sanitizer.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_blas.h"
#include "format/dtype.h"
#include "model/router.h"
#include "model/router_check.h"

enum { ROWS = 10240, EXPERTS = 384, HIDDEN = 7168, TOP_K = 8, LANES = 8, POISON = 0xff };

static km_cuda *gpu;
static km_err err;
static uint16_t *x, *w;      /* [ROWS, HIDDEN], [EXPERTS, HIDDEN] */
static double *sums, *sizes; /* [ROWS, EXPERTS]: x wT, and the same of the products' sizes */
static float bias[EXPERTS];

static void must(int rc)
{
	if (rc < 0)
		fail_msg("%s", err.msg);
}

static uint16_t *make_bf16(size_t count, uint64_t seed, float scale)
{
	uint16_t *v = km_xmalloc(count * sizeof(*v));

#pragma omp parallel for
	for (size_t i = 0; i < count; i++)
		v[i] = km_f32_to_bf16(km_rng_normal(seed, i) * scale);
	return v;
}

/* Eight experts of all rows. */
static void reference(int expert)
{
	float(*t)[LANES] = km_xmalloc((size_t)HIDDEN * sizeof(*t));

	for (int h = 0; h < HIDDEN; h++)
		for (int i = 0; i < LANES; i++)
			t[h][i] = km_bf16_to_f32(w[(size_t)(expert + i) * HIDDEN + (size_t)h]);
	for (int r = 0; r < ROWS; r++) {
		double sum[LANES] = { 0 }, size[LANES] = { 0 };

		for (int h = 0; h < HIDDEN; h++) {
			double v = (double)km_bf16_to_f32(x[(size_t)r * HIDDEN + (size_t)h]);

			for (int i = 0; i < LANES; i++) {
				sum[i] += v * (double)t[h][i];
				size[i] += fabs(v * (double)t[h][i]);
			}
		}
		memcpy(sums + (size_t)r * EXPERTS + expert, sum, sizeof(sum));
		memcpy(sizes + (size_t)r * EXPERTS + expert, size, sizeof(size));
	}
	free(t);
}

static int make_data(void **state)
{
	(void)state;
	x = make_bf16((size_t)ROWS * HIDDEN, 51, 1.0f);
	w = make_bf16((size_t)EXPERTS * HIDDEN, 52, 0.03f);
	sums = km_xmalloc((size_t)ROWS * EXPERTS * sizeof(double));
	sizes = km_xmalloc((size_t)ROWS * EXPERTS * sizeof(double));
	for (int e = 0; e < EXPERTS; e++)
		bias[e] = km_rng_normal(53, (uint64_t)e) * 0.5f;
#pragma omp parallel for
	for (int e = 0; e < EXPERTS; e += LANES)
		reference(e);
	return 0;
}

static int free_data(void **state)
{
	(void)state;
	free(x);
	free(w);
	free(sums);
	free(sizes);
	return 0;
}

static void *take(size_t bytes, const void *from)
{
	void *p = NULL;

	must(km_cuda_take(gpu, &p, bytes, "test", &err));
	if (from)
		must(km_cuda_upload(gpu, p, from, bytes, &err));
	else
		must(km_cuda_fill(gpu, p, POISON, bytes, &err));
	return p;
}

typedef struct form {
	const char *name;
	enum km_router_part part;
	enum km_router_gemm gemm;
	int tokens, split_tokens, split_experts;
} form;

static const form forms[] = {
	{ "resident, 1 token", KM_PART_GEMM, KM_GEMM_RESIDENT, 1, 0, 0 },
	{ "resident, 16 tokens", KM_PART_GEMM, KM_GEMM_RESIDENT, 16, 0, 0 },
	{ "resident, 60 tokens", KM_PART_GEMM, KM_GEMM_RESIDENT, 60, 0, 0 },
	{ "split, 64 x 32", KM_PART_GEMM, KM_GEMM_SPLIT, 64, 64, 32 },
	{ "split, 64 x 48", KM_PART_GEMM, KM_GEMM_SPLIT, 60, 64, 48 },
	{ "split, 64 x 64", KM_PART_GEMM, KM_GEMM_SPLIT, 64, 64, 64 },
	{ "split, 128 x 64", KM_PART_GEMM, KM_GEMM_SPLIT, 128, 128, 64 },
	{ "parts", KM_PART_GEMM, KM_GEMM_PARTS, 256, 0, 0 },
	{ "general", KM_PART_GEMM, KM_GEMM_GENERAL, 16, 0, 0 },
	{ "cuBLASLt", KM_PART_GEMM, KM_GEMM_BLAS, 1024, 0, 0 },
	{ "one launch, 8 tokens", KM_PART_ROUTER_GATE, KM_GEMM_RESIDENT, 8, 0, 0 },
	{ "one launch, 64 tokens", KM_PART_ROUTER_GATE, KM_GEMM_RESIDENT, 64, 0, 0 },
};

static km_router_shape shape_of(int tokens)
{
	return (km_router_shape){ .tokens = tokens, .experts = EXPERTS, .hidden = HIDDEN, .top_k = TOP_K,
		                  .groups = 1, .topk_group = 1, .block = 8, .renormalize = true,
		                  .scale = 2.827f };
}

static void run_form(const form *f, const km_router_buffers *all)
{
	const km_cuda_info *info = km_cuda_info_of(gpu);
	km_router_device device = { info->capability, info->multiprocessors, false, info->capability >= 90 };

	for (int first = 0; first < ROWS; first += f->tokens) {
		km_router_shape s = shape_of(ROWS - first < f->tokens ? ROWS - first : f->tokens);
		km_router_buffers b = *all;
		km_router_plan plan;

		must(km_router_plan_make(&plan, &s, &device, &err));
		plan.gemm = f->gemm;
		plan.split = 16;
		plan.split_tokens = f->split_tokens;
		plan.split_experts = f->split_experts;
		b.x = (const uint16_t *)all->x + (size_t)first * HIDDEN;
		b.logits = all->logits + (size_t)first * EXPERTS;
		b.ids = all->ids + (size_t)first * TOP_K;
		b.weights = all->weights + (size_t)first * TOP_K;
		must(km_cuda_router_run(gpu, f->part, &plan, &s, &b, &err));
	}
}

/* The worst error, of the products' sizes; by more than the bound is a failure. */
static double check_logits(const form *f, const float *got)
{
	km_router_shape s = shape_of(ROWS);
	double bound = km_router_logit_bound(&s), worst = 0;

	for (size_t i = 0; i < (size_t)ROWS * EXPERTS; i++) {
		double off = fabs((double)got[i] - sums[i]) / sizes[i];

		if (!(off <= bound))
			fail_msg("%s: logit of row %zu, expert %zu: got %.9g, want %.9g", f->name, i / EXPERTS,
			         i % EXPERTS, (double)got[i], sums[i]);
		worst = off > worst ? off : worst;
	}
	return worst;
}

static void check_selection(const form *f, const km_router_buffers *b, const float *logits)
{
	km_router_shape s = shape_of(ROWS);
	km_router_check check = { 0 };
	int32_t *ids = km_xmalloc((size_t)ROWS * TOP_K * sizeof(*ids));
	float *weights = km_xmalloc((size_t)ROWS * TOP_K * sizeof(*weights));

	must(km_cuda_download(gpu, ids, b->ids, (size_t)ROWS * TOP_K * sizeof(*ids), &err));
	must(km_cuda_download(gpu, weights, b->weights, (size_t)ROWS * TOP_K * sizeof(*weights), &err));
	must(km_router_check_gate(&check, &s, logits, bias, NULL, ROWS, ids, weights, &err));
	printf("figure: %s: %lld rows selected, worst weight error %.1e\n", f->name, (long long)check.rows,
	       check.worst_weight);
	free(ids);
	free(weights);
}

static void test_rows(void **state)
{
	bool blas = km_cuda_blas_open(gpu, &err) == 0, sm90 = km_cuda_info_of(gpu)->capability == 90;
	size_t logits_bytes = (size_t)ROWS * EXPERTS * sizeof(float);
	km_router_shape largest = shape_of(256);
	float *logits = km_xmalloc(logits_bytes);
	km_router_buffers b = { .x = take((size_t)ROWS * HIDDEN * 2, x),
		                .w = take((size_t)EXPERTS * HIDDEN * 2, w),
		                .bias = take(sizeof(bias), bias),
		                .logits = take(logits_bytes, NULL),
		                .ids = take((size_t)ROWS * TOP_K * 4, NULL),
		                .weights = take((size_t)ROWS * TOP_K * 4, NULL),
		                .scratch = take(km_cuda_router_scratch_bytes(&largest), NULL) };

	(void)state;
	must(km_cuda_fill(gpu, b.scratch, 0, km_cuda_router_scratch_bytes(&largest), &err));
	for (size_t i = 0; i < sizeof(forms) / sizeof(forms[0]); i++) {
		const form *f = &forms[i];

		if ((f->gemm == KM_GEMM_BLAS && !blas) || (f->gemm != KM_GEMM_GENERAL && f->gemm != KM_GEMM_BLAS && !sm90)) {
			printf("skip: %s cannot run here\n", f->name);
			continue;
		}
		must(km_cuda_fill(gpu, b.logits, POISON, logits_bytes, &err));
		must(km_cuda_fill(gpu, b.ids, POISON, (size_t)ROWS * TOP_K * 4, &err));
		run_form(f, &b);
		must(km_cuda_download(gpu, logits, b.logits, logits_bytes, &err));
		printf("figure: %s: %d rows, worst logit error %.1e of the products' sizes\n", f->name, ROWS,
		       check_logits(f, logits));
		if (f->part == KM_PART_ROUTER_GATE)
			check_selection(f, &b, logits);
	}
	free(logits);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_rows) };
	int failed;

	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	if (km_cuda_open(&gpu, 0, (size_t)1 << 30, &err) < 0) {
		fprintf(stderr, "%s\n", err.msg);
		return 1;
	}
	failed = cmocka_run_group_tests(tests, make_data, free_data);
	km_cuda_close(gpu);
	return failed;
}
