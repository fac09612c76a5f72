/*
 * The forms avx512, avx2 and portable give the same bits (device/simd.h): every op over weights of
 * every type and layout and sizes that fill no vector, and whole models over one, two and three threads.
 * Portable, which any machine runs, is what the others are held to.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/rng.h"
#include "device/cpu.h"
#include "device/simd.h"
#include "support/forward_case.h"
#include "support/op_case.h"

#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif

/* The sanitizer is ten times slower. */
#ifdef SANITIZED
enum { FMA_CASES = 20000, MODELS = 1, MOST_THREADS = 2 };
#else
enum { FMA_CASES = 400000, MODELS = 5, MOST_THREADS = 3 };
#endif

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

static const char *const vector_forms[] = { "avx512", "avx2" };

/* Calls `write` with portable's ops and with those of each vector form; what they append must be the
 * same. */
static void hold_to_portable(const char *what, void (*write)(const km_ops *, km_buf *))
{
	km_buf want = KM_BUF_INIT;

	write(&km_cpu_portable_ops, &want);
	assert_true(want.len > 0);
	for (int f = 0; f < COUNT(vector_forms); f++) {
		const km_ops *ops = km_cpu_ops(vector_forms[f]);
		km_buf got = KM_BUF_INIT;

		if (!ops) {
			printf("skip: this machine cannot run the %s form\n", vector_forms[f]);
			continue;
		}
		write(ops, &got);
		assert_int_equal(got.len, want.len);
		for (size_t i = 0; i < got.len; i += 4)
			if (memcmp(got.data + i, want.data + i, 4))
				fail_msg("%s: float %zu of %zu is another with %s", what, i / 4,
				         got.len / 4, vector_forms[f]);
		km_buf_release(&got);
	}
	km_buf_release(&want);
}

static float random_float(uint64_t i)
{
	uint64_t r = km_rng_u64(5, i);
	uint32_t bits = (uint32_t)(r >> 32);
	float f;

	/* Exponents near one another three times in four, so that sums cancel. */
	if (r & 3)
		bits = (bits & 0x807fffff) | (uint32_t)(120 + (r >> 2) % 16) << 23;
	memcpy(&f, &bits, 4);
	return f;
}

/* This file is compiled without AVX2: v_fma is the emulation, fmaf libm's, which is exact. */
static void emulated_fma_is_exact(void **state)
{
	static const float ends[] = { 0, -0.0f, 1, -1, INFINITY, -INFINITY, NAN, 0x1p-149f, 0x1p-126f,
		                      0x1.fffffep127f, 0x1.000002p0f, 0x1.fffffep-1f, 0x1p-24f };
	enum { RANDOM = FMA_CASES, N = COUNT(ends), TOTAL = RANDOM + N * N * N };

	(void)state;
	for (int i = 0; i < TOTAL; i++) {
		int e = i - RANDOM;
		float a = e < 0 ? random_float(3 * (uint64_t)i) : ends[e % N];
		float b = e < 0 ? random_float(3 * (uint64_t)i + 1) : ends[e / N % N];
		float c = e < 0 ? random_float(3 * (uint64_t)i + 2) : ends[e / N / N];
		float got[VL], want;

		if (e < 0 && i % 4 == 0)
			c = -a * b; /* what is left is the product's own rounding */
		want = fmaf(a, b, c);
		v_store(got, v_fma(v_set1(a), v_set1(b), v_set1(c)));
		if (isnan(want) ? !isnan(got[0]) : memcmp(got, &want, 4) != 0)
			fail_msg("fma(%a, %a, %a) is %a, expected %a", (double)a, (double)b, (double)c,
			         (double)got[0], (double)want);
	}
}

static const weight_case weight_cases[] = {
	{ KM_W_F32, 24, 64, 0, 0, 0, KM_F32 },     { KM_W_F32, 5, 7, 0, 0, 0, KM_F32 },
	{ KM_W_F16, 33, 96, 0, 0, 0, KM_F32 },     { KM_W_BF16, 40, 1043, 0, 0, 0, KM_F32 },
	{ KM_W_BF16, 17, 2080, 0, 0, 0, KM_F32 },  { KM_W_FP8, 130, 1344, 0, 128, 128, KM_BF16 },
	{ KM_W_FP8, 30, 200, 0, 16, 24, KM_F32 },  { KM_W_INT4, 64, 1024, 32, 0, 0, KM_BF16 },
	{ KM_W_INT4, 18, 1152, 128, 0, 0, KM_F32 }, { KM_W_INT4, 9, 72, 24, 0, 0, KM_F16 },
};

static void write_linear(const km_ops *ops, km_buf *out)
{
	static const int rows[] = { 1, 2, 4, 5, 21 };
	enum { MOST = 21 };

	for (int i = 0; i < COUNT(weight_cases); i++) {
		const weight_case *c = &weight_cases[i];
		km_weight w = op_case_weight(c, 11);
		float *x = op_case_floats((size_t)MOST * (size_t)c->cols, 12);
		float *y = op_case_poison((size_t)MOST * (size_t)c->rows);

		for (int m = 0; m < COUNT(rows); m++) {
			km_linear_args a = { rows[m], x, c->cols, &w, y, c->rows, false };

			ops->linear(&a);
			km_buf_append(out, y, (size_t)rows[m] * (size_t)c->rows * sizeof(*y));
		}
		free(x);
		free(y);
		op_case_weight_release(&w);
	}
}

static void write_rows(const km_ops *ops, km_buf *out)
{
	enum { TOKENS = 3, MOST = 531 };
	static const int sizes[] = { 1, 7, 16, 30, 64, 523 };
	float *x = op_case_floats(TOKENS * MOST, 21), *weight = op_case_floats(MOST, 22);
	float *y = op_case_poison(TOKENS * MOST), *residual = op_case_floats(TOKENS * MOST, 23);

	for (int i = 0; i < TOKENS * MOST; i++)
		x[i] *= i % 5 ? 3 : 40; /* silu's ends */
	for (int i = 0; i < COUNT(sizes); i++) {
		int size = sizes[i];
		size_t bytes = (size_t)(TOKENS * size) * sizeof(float);
		km_silu_mul_args act = { TOKENS, size, x, residual, MOST, y };
		km_rmsnorm_args norm = { TOKENS, size, residual, MOST, x, weight, 1e-6f, y, size };

		ops->silu_mul(&act);
		km_buf_append(out, y, bytes);
		ops->rmsnorm(&norm);
		km_buf_append(out, y, bytes);
		km_buf_append(out, residual, bytes);
	}
	free(x);
	free(y);
	free(weight);
	free(residual);
}

static void *scratch_of(size_t bytes)
{
	void *p = NULL;

	assert_int_equal(posix_memalign(&p, 64, bytes), 0);
	memset(p, 0xff, bytes);
	return p;
}

static void write_experts(const km_ops *ops, km_buf *out)
{
	enum { TOKENS = 19, EXPERTS = 6, TOP_K = 2, HIDDEN = 96, MIDDLE = 40 };
	weight_case up = { KM_W_INT4, MIDDLE, HIDDEN, 32, 0, 0, KM_BF16 };
	weight_case down = { KM_W_BF16, HIDDEN, MIDDLE, 0, 0, 0, KM_F32 };
	km_weight gates[EXPERTS], ups[EXPERTS], downs[EXPERTS];
	int32_t ids[TOKENS * TOP_K];
	float *x = op_case_floats(TOKENS * HIDDEN, 31), *y = op_case_floats(TOKENS * HIDDEN, 32);
	float *weights = op_case_floats(TOKENS * TOP_K, 33);
	km_moe_args a = { .tokens = TOKENS, .experts = EXPERTS, .top_k = TOP_K, .hidden = HIDDEN,
		          .intermediate = MIDDLE, .x = x, .ids = ids, .weights = weights, .gate = gates,
		          .up = ups, .down = downs, .routed_scale = 2.827f, .y = y };

	for (int i = 0; i < TOKENS * TOP_K; i++)
		ids[i] = (i * i + i % TOP_K * 3) % EXPERTS;
	for (uint64_t e = 0; e < EXPERTS; e++) {
		gates[e] = op_case_weight(&up, 100 + e);
		ups[e] = op_case_weight(&up, 200 + e);
		downs[e] = op_case_weight(&down, 300 + e);
	}
	a.scratch = scratch_of(km_moe_scratch_bytes(&a, TOKENS, omp_get_max_threads()));
	ops->moe(&a);
	km_buf_append(out, y, TOKENS * HIDDEN * sizeof(*y));
	for (int e = 0; e < EXPERTS; e++) {
		op_case_weight_release(&gates[e]);
		op_case_weight_release(&ups[e]);
		op_case_weight_release(&downs[e]);
	}
	free(a.scratch);
	free(weights);
	free(x);
	free(y);
}

typedef struct attention_shape {
	int heads, nope, rope, v, lora;
	enum km_kv_dtype kv;
} attention_shape;

static void write_attention_of(const km_ops *ops, const attention_shape *c, km_buf *out)
{
	static const int past[] = { 200, 63, 5, 60 }, lens[] = { 1, 1, 3, 9 };
	weight_case shape = { KM_W_BF16, c->heads * (c->nope + c->v), c->lora, 0, 0, 0, KM_F32 };
	km_weight kv_b = op_case_weight(&shape, 41);
	km_mla_args a = { .heads = c->heads, .nope_dim = c->nope, .rope_dim = c->rope, .v_dim = c->v,
		          .kv_lora_rank = c->lora, .kv_b = &kv_b, .kv_dtype = c->kv, .scale = 0.3f };
	step_case step;
	size_t rows;

	op_case_step(&step, COUNT(past), 2, past, lens, 42);
	rows = (size_t)step.batch.tokens * (size_t)c->heads;
	a.batch = &step.batch;
	a.q = op_case_floats(rows * (size_t)(c->nope + c->rope), 43);
	a.cache = op_case_cache(c->kv, (size_t)step.slot_count * (size_t)(c->lora + c->rope), 44);
	a.out = op_case_poison(rows * (size_t)c->v);
	a.scratch = scratch_of(km_mla_scratch_bytes(&a, step.batch.tokens, 512, omp_get_max_threads()));
	ops->mla_decode(&a);
	ops->mla_prefill(&a);
	km_buf_append(out, a.out, rows * (size_t)c->v * sizeof(float));
	op_case_step_release(&step);
	op_case_weight_release(&kv_b);
	free((void *)a.q);
	free((void *)a.cache);
	free(a.out);
	free(a.scratch);
}

static void write_attention(const km_ops *ops, km_buf *out)
{
	static const attention_shape shapes[] = {
		{ 6, 24, 8, 20, 48, KM_KV_F32 },
		{ 5, 16, 4, 16, 40, KM_KV_FP8 },
		{ 4, 128, 64, 128, 512, KM_KV_BF16 },
	};

	for (int i = 0; i < COUNT(shapes); i++)
		write_attention_of(ops, &shapes[i], out);
}

static void ops_agree(void **state)
{
	(void)state;
	hold_to_portable("linear", write_linear);
	hold_to_portable("rmsnorm and silu", write_rows);
	hold_to_portable("experts", write_experts);
	hold_to_portable("attention", write_attention);
}

/* Both prompts of a golden model: the first whole, the second in a chunk and then decoded. */
static void write_logits(const char *name, const char *isa, int threads, km_buf *out)
{
	km_model_options options = fwd_options(isa, KM_KV_BF16);
	fwd_opened o;

	options.threads = threads;
	o = fwd_open(name, options);
	for (int p = 0; p < 2; p++) {
		fwd_sequence *q = p ? fwd_score(&o, p, 5, 1, true) : fwd_score_whole(&o, p);

		km_buf_append(out, q->logits, (size_t)q->len * (size_t)o.vocab * sizeof(float));
		fwd_drop(q);
	}
	fwd_close(&o);
}

static void models_agree(void **state)
{
	static const char *const names[] = { "k2.5", "k2-instruct", "int4-channel", "deepseek-v3", "hf-eps" };

	(void)state;
	for (int i = 0; i < MODELS; i++) {
		km_buf want = KM_BUF_INIT;

		write_logits(names[i], "portable", 1, &want);
		for (int f = 0; f < COUNT(vector_forms) && km_cpu_ops(vector_forms[f]); f++)
			for (int threads = 1; threads <= MOST_THREADS; threads++) {
				km_buf got = KM_BUF_INIT;

				write_logits(names[i], vector_forms[f], threads, &got);
				assert_int_equal(got.len, want.len);
				if (memcmp(got.data, want.data, want.len))
					fail_msg("%s: %s with %d threads gives other bits than portable",
					         names[i], vector_forms[f], threads);
				km_buf_release(&got);
			}
		km_buf_release(&want);
	}
}

static void the_fixed_form_is_one_of_them(void **state)
{
	(void)state;
	assert_string_not_equal(km_cpu_fixed_isa(), "plain");
	assert_non_null(km_cpu_ops(km_cpu_fixed_isa()));
	assert_string_not_equal(km_cpu_ops(NULL)->name, "portable");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(emulated_fma_is_exact),
		cmocka_unit_test(ops_agree),
		cmocka_unit_test(models_agree),
		cmocka_unit_test(the_fixed_form_is_one_of_them),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
