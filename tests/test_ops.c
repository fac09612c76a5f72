/*
 * device/: every op of every form this machine runs, against double precision.
 *
 * BOUNDS  A dot product may be off by DOT_BOUND of the sum of its products' sizes: f32 sums of n
 * terms in at least 8 lanes err by at most (n / 8 + 4) * 2^-24 of that, and far less as roundings
 * go both ways. What is made of dot products has the bound beside it. Moves and the gate's
 * selection are exact. Outputs are NaN before each call. Rows are compared bit by bit between calls
 * that differ in the other rows, and between one thread and two.
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

#include "base/mem.h"
#include "base/rng.h"
#include "device/cpu.h"
#include "support/op_case.h"

#define DOT_BOUND 2e-6
#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

/* Calls `check` with every form that this machine runs. */
static void each_form(void (*check)(const km_ops *))
{
	for (int i = 0; km_cpu_isas[i]; i++) {
		const km_ops *ops = km_cpu_ops(km_cpu_isas[i]);

		if (ops)
			check(ops);
		else
			printf("skip: this machine cannot run the %s form\n", km_cpu_isas[i]);
	}
}

/* As malloc, but 64-byte aligned; exactly `bytes`, so that a sanitizer sees the first byte
 * beyond. */
static void *scratch_of(size_t bytes)
{
	void *p = NULL;

	assert_int_equal(posix_memalign(&p, 64, bytes ? bytes : 1), 0);
	memset(p, 0xff, bytes); /* NaN */
	return p;
}

static void close_to(const char *what, double got, double want, double bound)
{
	if (!(fabs(got - want) <= bound))
		fail_msg("%s: got %.9g, want %.9g, off by %.3g, bound %.3g", what, got, want,
		         fabs(got - want), bound);
}

static void same_bits(const char *what, const float *a, const float *b, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (memcmp(a + i, b + i, sizeof(float)))
			fail_msg("%s: element %zu is %.9g in one call, %.9g in another", what, i,
			         (double)a[i], (double)b[i]);
}

static double silu(double x)
{
	return x / (1 + exp(-x));
}

static const weight_case weight_cases[] = {
	{ KM_W_F32, 24, 64, 0, 0, 0, KM_F32 },
	{ KM_W_F32, 5, 7, 0, 0, 0, KM_F32 },
	{ KM_W_F16, 33, 96, 0, 0, 0, KM_F32 },
	{ KM_W_F16, 3, 50, 0, 0, 0, KM_F32 },
	{ KM_W_BF16, 576, 256, 0, 0, 0, KM_F32 },
	{ KM_W_BF16, 17, 2080, 0, 0, 0, KM_F32 },
	{ KM_W_BF16, 40, 1043, 0, 0, 0, KM_F32 },
	{ KM_W_FP8, 576, 512, 0, 128, 128, KM_F32 },
	{ KM_W_FP8, 130, 1344, 0, 128, 128, KM_BF16 },
	{ KM_W_FP8, 30, 200, 0, 16, 24, KM_F32 },
	{ KM_W_INT4, 64, 1024, 32, 0, 0, KM_BF16 },
	{ KM_W_INT4, 19, 256, 64, 0, 0, KM_F16 },
	{ KM_W_INT4, 18, 1152, 128, 0, 0, KM_F32 },
	{ KM_W_INT4, 16, 2304, 0, 0, 0, KM_BF16 },
	{ KM_W_INT4, 9, 72, 24, 0, 0, KM_BF16 },
	{ KM_W_INT4, 7, 48, 16, 0, 0, KM_F16 },
};
static const int row_counts[] = { 1, 2, 3, 4, 5, 8, 17, 64, 70 };
enum { MOST_ROWS = 70 };

static void weights_read_exactly(void **state)
{
	(void)state;
	for (int i = 0; i < COUNT(weight_cases); i++) {
		const weight_case *c = &weight_cases[i];
		km_weight w = op_case_weight(c, 11);
		float *row = op_case_poison((size_t)c->cols);

		for (int r = 0; r < c->rows; r++) {
			int from = r % 8 * (r % 2), count = c->cols - from;

			if (count <= 0)
				continue;
			km_cpu_weight_row(&w, r, from, count, row);
			for (int k = 0; k < count; k++)
				assert_true(row[k] == (float)op_case_weight_at(&w, r, from + k));
		}
		free(row);
		op_case_weight_release(&w);
	}
}

/* All of a weight in double: the references read it often. */
static double *all_weights(const km_weight *w)
{
	double *all = km_xreallocarray(NULL, (size_t)w->rows * (size_t)w->cols, sizeof(*all));

	for (int r = 0; r < w->rows; r++)
		for (int c = 0; c < w->cols; c++)
			all[r * w->cols + c] = op_case_weight_at(w, r, c);
	return all;
}

static void linear_case(const km_ops *ops, const weight_case *c, bool accumulate)
{
	int x_stride = c->cols + 5, y_stride = c->rows + 3;
	km_weight w = op_case_weight(c, 21);
	float *x = op_case_floats((size_t)MOST_ROWS * (size_t)x_stride, 22);
	float *before = op_case_floats((size_t)MOST_ROWS * (size_t)y_stride, 23);
	double *weights = all_weights(&w);
	float *first = NULL;

	for (int m = COUNT(row_counts) - 1; m >= 0; m--) {
		size_t count = (size_t)row_counts[m] * (size_t)y_stride;
		float *y = op_case_poison(count);
		km_linear_args a = { row_counts[m], x, x_stride, &w, y, y_stride, accumulate };

		if (accumulate)
			memcpy(y, before, count * sizeof(float));
		omp_set_num_threads(1 + m % 2);
		ops->linear(&a);
		for (int t = 0; t < a.tokens && !first; t++)
			for (int r = 0; r < c->rows; r++) {
				double sum = 0, size = 0;

				for (int k = 0; k < c->cols; k++) {
					double p = weights[r * c->cols + k] * x[t * x_stride + k];

					sum += p;
					size += fabs(p);
				}
				if (accumulate) {
					sum += before[t * y_stride + r];
					size += fabs((double)before[t * y_stride + r]);
				}
				close_to(ops->name, y[t * y_stride + r], sum,
				         DOT_BOUND * size + 1e-30);
			}
		for (int t = 0; t < a.tokens && !accumulate; t++)
			for (int r = c->rows; r < y_stride; r++)
				assert_true(isnan(y[t * y_stride + r]));
		for (int t = 0; t < a.tokens && first; t++)
			same_bits("linear", y + t * y_stride, first + t * y_stride,
			          (size_t)c->rows);
		if (first)
			free(y);
		else
			first = y;
	}
	free(first);
	free(before);
	free(x);
	free(weights);
	op_case_weight_release(&w);
}

static void check_linear(const km_ops *ops)
{
	for (int i = 0; i < COUNT(weight_cases); i++)
		linear_case(ops, &weight_cases[i], i % 3 == 1);
}

/* Row r of the weight is byte r, then zeros: y is each of fp8's numbers, NaN and subnormals too. */
static void check_fp8_codes(const km_ops *ops)
{
	enum { CODES = 256, COLS = 128 };
	uint8_t *data = km_xcalloc(CODES * COLS, 1);
	float scales[CODES / 128] = { 0.75f, 0.75f }, x[5 * COLS] = { 0 }, y[5 * CODES];
	km_weight w = { .type = KM_W_FP8,
		        .rows = CODES,
		        .cols = COLS,
		        .data = data,
		        .scale = scales,
		        .scale_dtype = KM_F32,
		        .block_rows = 128,
		        .block_cols = 128 };

	for (int r = 0; r < CODES; r++)
		data[r * COLS] = (uint8_t)r;
	for (int t = 0; t < 5; t++)
		x[t * COLS] = 1;
	for (int tokens = 1; tokens <= 5; tokens += 4) {
		km_linear_args a = { tokens, x, COLS, &w, y, CODES, false };

		ops->linear(&a);
		for (int i = 0; i < tokens * CODES; i++) {
			float want = km_f8_e4m3_to_f32((uint8_t)(i % CODES)) * 0.75f;

			if (isnan(want) ? !isnan(y[i]) : y[i] != want)
				fail_msg("%s: code %d is %.9g, want %.9g", ops->name, i % CODES,
				         (double)y[i], (double)want);
		}
	}
	free(data);
}

static void each_fp8_number_is_read_exactly(void **state)
{
	(void)state;
	each_form(check_fp8_codes);
}

static void linear_is_right_and_rows_are_independent(void **state)
{
	(void)state;
	each_form(check_linear);
}

/* Bound: the mean of squares errs little; 4 roundings on the way. */
static void rmsnorm_case(const km_ops *ops, int tokens, int size, bool with_x)
{
	int stride = size + 9;
	float *residual = op_case_floats((size_t)tokens * (size_t)stride, 31);
	float *old = op_case_floats((size_t)tokens * (size_t)stride, 31);
	float *x = op_case_floats((size_t)tokens * (size_t)size, 32);
	float *weight = op_case_floats((size_t)size, 33);
	float *y = op_case_poison((size_t)tokens * (size_t)stride),
	      *alone = op_case_poison((size_t)size);
	km_rmsnorm_args a = { tokens, size,  residual, stride, with_x ? x : NULL,
		              weight, 1e-5f, y,        stride };

	ops->rmsnorm(&a);
	for (int t = 0; t < tokens; t++) {
		double squares = 0;

		for (int i = 0; i < size; i++) {
			float r = old[t * stride + i];

			if (with_x)
				r += x[t * size + i];
			assert_true(residual[t * stride + i] == r);
			squares += (double)r * r;
		}
		for (int i = 0; i < size; i++) {
			double want =
				residual[t * stride + i] / sqrt(squares / size + 1e-5) * weight[i];

			close_to(ops->name, y[t * stride + i], want, 1e-6 * fabs(want));
		}
		assert_true(isnan(y[t * stride + size]));
	}
	memcpy(residual, old, (size_t)tokens * (size_t)stride * sizeof(float));
	a = (km_rmsnorm_args){ 1,
		               size,
		               residual + (tokens - 1) * stride,
		               stride,
		               with_x ? x + (tokens - 1) * size : NULL,
		               weight,
		               1e-5f,
		               alone,
		               size };
	ops->rmsnorm(&a);
	same_bits("rmsnorm", alone, y + (tokens - 1) * stride, (size_t)size);
	free(residual);
	free(old);
	free(x);
	free(weight);
	free(y);
	free(alone);
}

static void check_rmsnorm(const km_ops *ops)
{
	rmsnorm_case(ops, 1, 1024, true);
	rmsnorm_case(ops, 1, 7, false);
	rmsnorm_case(ops, 5, 512, false);
	rmsnorm_case(ops, 64, 7168, true);
}

static void rmsnorm_is_right(void **state)
{
	(void)state;
	each_form(check_rmsnorm);
}

static void check_moves(const km_ops *ops)
{
	static const int32_t ids[] = { 2, 0, 2 }, positions[] = { 0, 3, 9 }, slots[] = { 6, 1, 2 };
	enum { DIM = 8, HEADS = 3, TOKEN = 40, HEAD = 12 };
	float *table = op_case_floats(10 * DIM, 41), *x = op_case_floats(3 * TOKEN, 42);
	float *old = op_case_floats(3 * TOKEN, 42);
	km_rope_args rope = { 3, HEADS, DIM, x, TOKEN, HEAD, positions, table };

	for (int i = 0; i < COUNT(weight_cases); i++) {
		km_weight w = op_case_weight(&weight_cases[i], 43);
		float *y = op_case_poison(3 * (size_t)w.cols);
		km_embed_args embed = { 3, ids, &w, y };

		ops->embed(&embed);
		for (int t = 0; t < 3; t++)
			for (int c = 0; c < w.cols; c++)
				assert_true(y[t * w.cols + c] ==
				            (float)op_case_weight_at(&w, ids[t], c));
		free(y);
		op_case_weight_release(&w);
	}
	ops->rope(&rope);
	for (int t = 0; t < 3; t++)
		for (int h = 0; h < HEADS; h++)
			for (int i = 0; i < DIM / 2; i++) {
				const float *was = old + t * TOKEN + h * HEAD + 2 * i;
				const float *is = x + t * TOKEN + h * HEAD + 2 * i;
				double cos = table[positions[t] * DIM + i];
				double sin = table[positions[t] * DIM + DIM / 2 + i];

				close_to("rope", is[0], was[0] * cos - was[1] * sin, 1e-6);
				close_to("rope", is[1], was[1] * cos + was[0] * sin, 1e-6);
			}
	assert_true(x[HEAD - 1] == old[HEAD - 1]);
	for (enum km_kv_dtype d = KM_KV_F32; d <= KM_KV_FP8; d++) {
		void *cache = op_case_cache(d, 8 * 20, 44), *before = op_case_cache(d, 8 * 20, 44);
		km_kv_write_args a = { 3, 16, 4, old, TOKEN, table, 5, slots, cache, d };

		ops->kv_write(&a);
		for (int s = 0; s < 8; s++)
			for (int c = 0; c < 20; c++) {
				int t = s == 6 ? 0 : s == 1 ? 1 : s == 2 ? 2 : -1;
				double is = op_case_cache_at(d, cache, (size_t)(s * 20 + c)), want;

				if (t < 0)
					want = op_case_cache_at(d, before, (size_t)(s * 20 + c));
				else
					want = c < 16 ? old[t * TOKEN + c] : table[t * 5 + c - 16];
				close_to("kv_write", is, want,
				         t < 0             ? 0
				         : d == KM_KV_F32  ? 0
				         : d == KM_KV_BF16 ? 0x1p-8 * fabs(want)
				                           : 0x1p-4 * fabs(want) + 0x1p-10);
			}
		free(cache);
		free(before);
	}
	free(table);
	free(x);
	free(old);
}

static void moves_are_exact(void **state)
{
	(void)state;
	each_form(check_moves);
}

/* Bound: the exponential is within 2 units in the last place; a division and two products
 * follow. */
static void check_silu_mul(const km_ops *ops)
{
	static const float ends[] = { 0, -0.0f, 100, -100, 1e30f, -1e30f, -87.5f, 88.5f };
	enum { TOKENS = 3, SIZE = 267, STRIDE = 600 };
	float *in = op_case_floats(TOKENS * STRIDE, 51), *y = op_case_poison(TOKENS * SIZE);
	km_silu_mul_args a = { TOKENS, SIZE, in, in + SIZE, STRIDE, y };

	for (int i = 0; i < TOKENS * STRIDE; i++)
		in[i] *= 4;
	memcpy(in, ends, sizeof(ends));
	in[STRIDE] = NAN;
	ops->silu_mul(&a);
	for (int t = 0; t < TOKENS; t++)
		for (int i = 0; i < SIZE; i++) {
			double want = silu(in[t * STRIDE + i]) * in[t * STRIDE + SIZE + i];

			if (t == 1 && i == 0)
				assert_true(isnan(y[t * SIZE + i]));
			else
				close_to(ops->name, y[t * SIZE + i], want,
				         1e-6 * fabs(want) + 1e-7);
		}
	free(in);
	free(y);
}

static void silu_mul_is_right(void **state)
{
	(void)state;
	each_form(check_silu_mul);
}

/* The gate by its definition: sort all experts by choice. */
static void gate_reference(const km_gate_args *a, int t, int32_t *ids, double *weights)
{
	double score[512], choice[512], sum = 0, total = 0, best[64] = { 0 };
	int size = a->groups > 1 ? a->experts / a->groups : a->experts;
	const float *logits = a->logits + t * a->experts;
	float largest = -INFINITY;

	for (int e = 0; e < a->experts; e++)
		largest = logits[e] > largest ? logits[e] : largest;
	for (int e = 0; e < a->experts; e++)
		sum += exp((double)logits[e] - largest);
	for (int e = 0; e < a->experts; e++) {
		score[e] = a->softmax ? exp((double)logits[e] - largest) / sum
		                      : 1 / (1 + exp(-(double)logits[e]));
		choice[e] = score[e] + (a->bias ? a->bias[e] : 0);
	}
	for (int g = 0; g * size < a->experts; g++) {
		double first = -INFINITY, second = -INFINITY;

		for (int e = g * size; e < (g + 1) * size; e++) {
			second = choice[e] > first    ? first
			         : choice[e] > second ? choice[e]
			                              : second;
			first = choice[e] > first ? choice[e] : first;
		}
		best[g] = first + second;
	}
	for (int g = 0; a->groups > 1 && g < a->groups; g++) {
		int better = 0;

		for (int h = 0; h < a->groups; h++)
			better += best[h] > best[g] || (best[h] == best[g] && h < g);
		for (int e = g * size; better >= a->topk_group && e < (g + 1) * size; e++)
			choice[e] = -INFINITY;
	}
	for (int k = 0; k < a->top_k; k++) {
		int chosen = 0;

		for (int e = 1; e < a->experts; e++)
			chosen = choice[e] > choice[chosen] ? e : chosen;
		ids[k] = chosen;
		weights[k] = score[chosen];
		total += score[chosen];
		choice[chosen] = -INFINITY;
	}
	for (int k = 0; a->renormalize && k < a->top_k; k++)
		weights[k] /= total + 1e-20;
}

/* Random logits have no near ties at these counts: ids are the same in double. Bound of weights: a
 * few roundings. */
static void gate_case(const km_ops *ops, km_gate_args a, bool bias)
{
	float *logits = op_case_floats((size_t)a.tokens * (size_t)a.experts, 61);
	float *biases = op_case_floats((size_t)a.experts, 62);
	size_t places = (size_t)a.tokens * (size_t)a.top_k;
	int32_t *ids = km_xcalloc(places, sizeof(*ids)), want_ids[64];
	float *weights = op_case_poison(places);
	double want[64];

	for (int e = 0; e < a.experts; e++)
		biases[e] *= 0.1f;
	memset(ids, 0xff, places * sizeof(*ids));
	a.logits = logits;
	a.bias = bias ? biases : NULL;
	a.ids = ids;
	a.weights = weights;
	ops->gate(&a);
	for (int t = 0; t < a.tokens; t++) {
		gate_reference(&a, t, want_ids, want);
		for (int k = 0; k < a.top_k; k++) {
			assert_int_equal(ids[t * a.top_k + k], want_ids[k]);
			close_to("gate", weights[t * a.top_k + k], want[k], 2e-6 * want[k]);
		}
	}
	free(logits);
	free(biases);
	free(ids);
	free(weights);
}

static void check_gate(const km_ops *ops)
{
	gate_case(ops,
	          (km_gate_args){ .tokens = 40, .experts = 384, .top_k = 8, .renormalize = true },
	          true);
	gate_case(ops,
	          (km_gate_args){ .tokens = 3,
	                          .experts = 384,
	                          .top_k = 8,
	                          .groups = 1,
	                          .topk_group = 1,
	                          .renormalize = true },
	          false);
	gate_case(ops, (km_gate_args){ .tokens = 20, .experts = 256, .top_k = 8, .groups = 8,
	                               .topk_group = 4, .renormalize = true }, true);
	gate_case(ops, (km_gate_args){ .tokens = 20, .experts = 64, .top_k = 6, .softmax = true },
	          false);
	gate_case(ops,
	          (km_gate_args){
			  .tokens = 9, .experts = 10, .top_k = 10, .groups = 5, .topk_group = 5 },
	          true);
}

static void gate_selects_as_defined(void **state)
{
	(void)state;
	each_form(check_gate);
}

static void check_gate_edges(const km_ops *ops)
{
	float logits[8] = { 1, 2, 2, 2, 0, 2, -1, 2 }, bias[8] = { 0 }, weights[4];
	int32_t ids[4];
	km_gate_args a = { .tokens = 1,
		           .experts = 8,
		           .top_k = 4,
		           .renormalize = true,
		           .logits = logits,
		           .bias = bias,
		           .ids = ids,
		           .weights = weights };

	ops->gate(&a); /* ties go to the lower id */
	assert_memory_equal(ids, ((int32_t[]){ 1, 2, 3, 5 }), sizeof(ids));
	for (int k = 0; k < 4; k++)
		assert_true(weights[k] == 0.25f);

	bias[4] = 10; /* the bias selects and does not weigh */
	logits[1] = NAN;
	logits[3] = -INFINITY;
	ops->gate(&a);
	assert_memory_equal(ids, ((int32_t[]){ 4, 2, 5, 7 }), sizeof(ids));
	close_to("gate", weights[0], 0.5 / (0.5 + 3 / (1 + exp(-2))), 1e-6);

	for (int e = 0; e < 8; e++) /* too few are left */
		logits[e] = e == 6 ? 3 : e % 2 ? NAN : -INFINITY;
	ops->gate(&a);
	assert_memory_equal(ids, ((int32_t[]){ 6, 0, 0, 0 }), sizeof(ids));
	assert_true(weights[0] == 1 && weights[1] == 0 && weights[2] == 0 && weights[3] == 0);

	bias[6] = -INFINITY; /* none is left */
	ops->gate(&a);
	assert_memory_equal(ids, ((int32_t[]){ 0, 0, 0, 0 }), sizeof(ids));
	assert_true(weights[0] == 0 && weights[3] == 0);

	for (int e = 0; e < 8; e++)
		logits[e] = (float)e;
	memset(bias, 0, sizeof(bias));
	logits[2] = NAN;
	a.softmax = true; /* one NaN takes the whole softmax */
	ops->gate(&a);
	assert_memory_equal(ids, ((int32_t[]){ 0, 0, 0, 0 }), sizeof(ids));

	a.softmax = false; /* groups {0,1} {2,3} {4,5} {6,7}; equal groups go to the lower one */
	a.groups = 4;
	a.topk_group = 2;
	memcpy(logits, (float[]){ 0, 0, 1, 1, -1, -1, 0, 0 }, sizeof(logits));
	ops->gate(&a);
	assert_memory_equal(ids, ((int32_t[]){ 2, 3, 0, 1 }), sizeof(ids));
}

static void gate_handles_ties_and_nan(void **state)
{
	(void)state;
	each_form(check_gate_edges);
}

/* A step of sequences over a cache whose unused slots are NaN. */
typedef struct mla_case {
	int heads, nope, rope, v, lora;
	enum km_kv_dtype kv_dtype;
	weight_case kv_b; /* its rows and cols are set from the above */
	int seqs, decode_seqs, past[6], lens[6];
} mla_case;

static const mla_case mla_cases[] = {
	{ 16,
	  128,
	  64,
	  128,
	  512,
	  KM_KV_BF16,
	  { .type = KM_W_BF16 },
	  3,
	  2,
	  { 200, 0, 64 },
	  { 1, 1, 6 } },
	{ 6,
	  24,
	  8,
	  20,
	  48,
	  KM_KV_F32,
	  { .type = KM_W_F32 },
	  5,
	  3,
	  { 63, 64, 130, 5, 61 },
	  { 1, 1, 1, 3, 9 } },
	{ 5,
	  16,
	  4,
	  16,
	  40,
	  KM_KV_FP8,
	  { .type = KM_W_F16 },
	  4,
	  2,
	  { 7, 127, 0, 64 },
	  { 1, 1, 1, 66 } },
	{ 4,
	  128,
	  64,
	  128,
	  512,
	  KM_KV_FP8,
	  { .type = KM_W_FP8, .block_rows = 128, .block_cols = 128 },
	  2,
	  1,
	  { 300, 60 },
	  { 1, 10 } },
	{ 1,
	  32,
	  16,
	  32,
	  64,
	  KM_KV_BF16,
	  { .type = KM_W_INT4, .group = 32, .scale_dtype = KM_BF16 },
	  2,
	  1,
	  { 20, 30 },
	  { 1, 40 } },
};

typedef struct mla_setup {
	step_case step;
	km_weight kv_b;
	void *cache;
	float *q, *out;
	double *weights; /* kv_b */
	km_mla_args args;
} mla_setup;

static void poison_unused(const step_case *s, enum km_kv_dtype dtype, void *cache, int size)
{
	size_t bytes = (size_t)size * (dtype == KM_KV_F32 ? 4 : dtype == KM_KV_BF16 ? 2 : 1);
	char *used = km_xcalloc((size_t)s->slot_count, 1);

	for (int i = 0; i < s->batch.seqs; i++)
		for (int p = 0; p < s->kv_len[i]; p++)
			used[km_cpu_slot(&s->batch, i, p)] = 1;
	for (int slot = 0; slot < s->slot_count; slot++)
		if (!used[slot])
			memset((char *)cache + (size_t)slot * bytes, 0xff, bytes);
	free(used);
}

static void mla_set_up(mla_setup *m, const mla_case *c, int threads)
{
	weight_case kv_b = c->kv_b;
	size_t rows;

	kv_b.rows = c->heads * (c->nope + c->v);
	kv_b.cols = c->lora;
	op_case_step(&m->step, c->seqs, c->decode_seqs, c->past, c->lens, 70);
	rows = (size_t)m->step.batch.tokens * (size_t)c->heads;
	m->kv_b = op_case_weight(&kv_b, 71);
	m->weights = all_weights(&m->kv_b);
	m->cache = op_case_cache(c->kv_dtype,
	                         (size_t)m->step.slot_count * (size_t)(c->lora + c->rope), 72);
	poison_unused(&m->step, c->kv_dtype, m->cache, c->lora + c->rope);
	m->q = op_case_floats(rows * (size_t)(c->nope + c->rope), 73);
	m->out = op_case_poison(rows * (size_t)c->v);
	m->args = (km_mla_args){
		.batch = &m->step.batch,
		.heads = c->heads,
		.nope_dim = c->nope,
		.rope_dim = c->rope,
		.v_dim = c->v,
		.kv_lora_rank = c->lora,
		.q = m->q,
		.kv_b = &m->kv_b,
		.cache = m->cache,
		.kv_dtype = c->kv_dtype,
		.scale = 1.5f / sqrtf((float)(c->nope + c->rope)),
		.out = m->out,
	};
	omp_set_num_threads(threads);
	m->args.scratch =
		scratch_of(km_mla_scratch_bytes(&m->args, m->step.batch.tokens, 512, threads));
}

static void mla_tear_down(mla_setup *m)
{
	op_case_step_release(&m->step);
	op_case_weight_release(&m->kv_b);
	free(m->cache);
	free(m->q);
	free(m->out);
	free(m->weights);
	free(m->args.scratch);
}

/* Attention of one row and head by its definition. */
static void mla_reference(const km_mla_args *a, const double *kv_b, int seq, int token, int head,
                          double *out)
{
	int positions = a->batch->positions[token] + 1, size = a->kv_lora_rank + a->rope_dim;
	const float *q = a->q + (token * a->heads + head) * (a->nope_dim + a->rope_dim);
	double *p = km_xcalloc((size_t)positions, sizeof(*p)), sum = 0;
	double *query = km_xcalloc((size_t)size, sizeof(*query));
	double *mean = km_xcalloc((size_t)size, sizeof(*mean));

	for (int c = 0; c < a->kv_lora_rank; c++)
		for (int n = 0; n < a->nope_dim; n++)
			query[c] +=
				q[n] *
				kv_b[(head * (a->nope_dim + a->v_dim) + n) * a->kv_lora_rank + c];
	for (int r = 0; r < a->rope_dim; r++)
		query[a->kv_lora_rank + r] = q[a->nope_dim + r];
	for (int t = 0; t < positions; t++) {
		size_t at = km_cpu_slot(a->batch, seq, t) * (size_t)size;

		for (int c = 0; c < size; c++)
			p[t] += query[c] * op_case_cache_at(a->kv_dtype, a->cache, at + (size_t)c);
		p[t] = exp(p[t] * a->scale);
		sum += p[t];
		for (int c = 0; c < a->kv_lora_rank; c++)
			mean[c] += p[t] * op_case_cache_at(a->kv_dtype, a->cache, at + (size_t)c);
	}
	for (int v = 0; v < a->v_dim; v++) {
		int row = head * (a->nope_dim + a->v_dim) + a->nope_dim + v;

		out[v] = 0;
		for (int c = 0; c < a->kv_lora_rank; c++)
			out[v] += mean[c] / sum * kv_b[row * a->kv_lora_rank + c];
	}
	free(p);
	free(query);
	free(mean);
}

/* Bound: values are about 1; a score of size s errs by s * DOT_BOUND * few, its weight as much. */
static void mla_right_case(const km_ops *ops, const mla_case *c)
{
	double want[128], worst = 0;
	mla_setup m;

	mla_set_up(&m, c, 2);
	ops->mla_decode(&m.args);
	for (int t = 0; t < m.step.batch.tokens; t++) /* prefill's rows are not decode's to write */
		assert_int_equal(!!isnan(m.out[t * c->heads * c->v]), t >= c->decode_seqs);
	ops->mla_prefill(&m.args);
	for (int s = 0; s < c->seqs; s++)
		for (int t = m.step.seq_start[s]; t < m.step.seq_start[s + 1]; t++)
			for (int h = 0; h < c->heads; h++) {
				mla_reference(&m.args, m.weights, s, t, h, want);
				for (int v = 0; v < c->v; v++) {
					float got = m.out[(t * c->heads + h) * c->v + v];

					close_to(ops->name, got, want[v], 1e-5);
					worst = fmax(worst, fabs(got - want[v]));
				}
			}
	printf("figure: %s attention, %d heads, latent %d: largest error %.1e, values about 1\n",
	       ops->name, c->heads, c->lora, worst);
	mla_tear_down(&m);
}

static void check_mla(const km_ops *ops)
{
	for (int i = 0; i < COUNT(mla_cases); i++)
		mla_right_case(ops, &mla_cases[i]);
}

static void attention_is_right(void **state)
{
	(void)state;
	each_form(check_mla);
}

/* Each sequence alone, its prompt cut in two, on one thread: the same bits as all together on
 * two. */
static void mla_alone_case(const km_ops *ops, const mla_case *c)
{
	size_t row = (size_t)c->heads * (size_t)c->v,
	       key = (size_t)c->heads * (size_t)(c->nope + c->rope);
	mla_setup m;

	mla_set_up(&m, c, 2);
	ops->mla_decode(&m.args);
	ops->mla_prefill(&m.args);
	omp_set_num_threads(1);
	for (int s = 0; s < c->seqs; s++) {
		int start = m.step.seq_start[s], rows = m.step.seq_start[s + 1] - start,
		    cut = (rows + 1) / 2;

		for (int part = 0; part < 2; part++) {
			int from = part ? cut : 0, count = part ? rows - cut : cut;
			int32_t seq_start[2] = { 0, count }, kv_len = c->past[s] + from + count;
			km_batch one = m.step.batch;
			km_mla_args a = m.args;
			float *out;

			if (!count)
				continue;
			out = op_case_poison((size_t)count * row);
			one.tokens = count;
			one.seqs = 1;
			one.decode_seqs = s < c->decode_seqs;
			one.positions += start + from;
			one.seq_start = seq_start;
			one.kv_len = &kv_len;
			one.pages += s * one.pages_per_seq;
			a.batch = &one;
			a.q += (size_t)(start + from) * key;
			a.out = out;
			ops->mla_decode(&a);
			ops->mla_prefill(&a);
			same_bits("attention", out, m.out + (size_t)(start + from) * row,
			          (size_t)count * row);
			free(out);
		}
	}
	mla_tear_down(&m);
}

static void check_mla_alone(const km_ops *ops)
{
	static const mla_case many = { 3, 16, 8, 16, 32, KM_KV_BF16, { .type = KM_W_BF16 }, 6, 6,
		                       { 1, 90, 64, 3, 0, 17 }, { 1, 1, 1, 1, 1, 1 } };

	for (int i = 0; i < COUNT(mla_cases); i++)
		mla_alone_case(ops, &mla_cases[i]);
	mla_alone_case(ops, &many);
}

static void attention_rows_are_independent(void **state)
{
	(void)state;
	each_form(check_mla_alone);
}

/* More decoding sequences than go in one round. */
static void check_many_decodes(const km_ops *ops)
{
	enum { SEQS = KM_CPU_MLA_SEQS + 3, HEADS = 2, V = 16, LORA = 32 };
	int past[SEQS], lens[SEQS];
	weight_case kv_b = { .type = KM_W_BF16, .rows = HEADS * (16 + V), .cols = LORA };
	km_weight w = op_case_weight(&kv_b, 75);
	double *weights = all_weights(&w), want[V];
	step_case step;
	km_mla_args a;

	for (int i = 0; i < SEQS; i++) {
		past[i] = i;
		lens[i] = 1;
	}
	op_case_step(&step, SEQS, SEQS, past, lens, 76);
	a = (km_mla_args){
		.batch = &step.batch,
		.heads = HEADS,
		.nope_dim = 16,
		.rope_dim = 8,
		.v_dim = V,
		.kv_lora_rank = LORA,
		.q = op_case_floats(SEQS * HEADS * 24, 77),
		.kv_b = &w,
		.cache = op_case_cache(KM_KV_F32, (size_t)step.slot_count * (LORA + 8), 78),
		.scale = 0.2f,
		.out = op_case_poison(SEQS * HEADS * V),
	};
	omp_set_num_threads(2);
	a.scratch = scratch_of(km_mla_scratch_bytes(&a, SEQS, SEQS, 2));
	ops->mla_decode(&a);
	for (int t = 0; t < SEQS; t++)
		for (int h = 0; h < HEADS; h++) {
			mla_reference(&a, weights, t, t, h, want);
			for (int v = 0; v < V; v++)
				close_to(ops->name, a.out[(t * HEADS + h) * V + v], want[v], 1e-5);
		}
	op_case_step_release(&step);
	op_case_weight_release(&w);
	free((void *)(uintptr_t)a.q);
	free((void *)(uintptr_t)a.cache);
	free(weights);
	free(a.out);
	free(a.scratch);
}

static void decode_takes_any_number_of_sequences(void **state)
{
	(void)state;
	each_form(check_many_decodes);
}

typedef struct moe_case {
	int tokens, experts, top_k, hidden, intermediate;
	weight_case weight; /* rows and cols are set from the above */
} moe_case;

static const moe_case moe_cases[] = {
	{ 70, 12, 4, 96, 64, { .type = KM_W_INT4, .group = 32, .scale_dtype = KM_BF16 } },
	{ 9,
	  3,
	  2,
	  256,
	  128,
	  { .type = KM_W_FP8, .block_rows = 128, .block_cols = 128, .scale_dtype = KM_F32 } },
	{ 17, 6, 6, 72, 40, { .type = KM_W_BF16 } },
	{ 530,
	  4,
	  2,
	  32,
	  32,
	  { .type = KM_W_F32 } }, /* more than one round, more pairs than a block */
};

typedef struct moe_setup {
	km_weight *gate, *up, *down;
	float *x, *weights, *old, *y;
	int32_t *ids;
	km_moe_args args;
} moe_setup;

static void moe_set_up(moe_setup *m, const moe_case *c, int threads)
{
	weight_case up = c->weight, down = c->weight;
	size_t pairs = (size_t)c->tokens * (size_t)c->top_k,
	       size = (size_t)c->tokens * (size_t)c->hidden;
	int32_t order[64];

	up.rows = down.cols = c->intermediate;
	up.cols = down.rows = c->hidden;
	m->gate = km_xcalloc((size_t)c->experts * 3, sizeof(km_weight));
	m->up = m->gate + c->experts;
	m->down = m->up + c->experts;
	for (int e = 0; e < c->experts; e++) {
		m->gate[e] = op_case_weight(&up, 100 + (uint64_t)e);
		m->up[e] = op_case_weight(&up, 200 + (uint64_t)e);
		m->down[e] = op_case_weight(&down, 300 + (uint64_t)e);
	}
	m->x = op_case_floats(size, 81);
	m->old = op_case_floats(size, 82);
	m->y = op_case_floats(size, 82);
	m->weights = op_case_floats(pairs, 83);
	m->ids = km_xcalloc(pairs, sizeof(int32_t));
	for (int t = 0; t < c->tokens; t++) {
		for (int e = 0; e < c->experts; e++)
			order[e] = e;
		for (int k = 0; k < c->top_k; k++) {
			int j = k + (int)(km_rng_u64(84, (uint64_t)(t * 64 + k)) %
			                  (uint64_t)(c->experts - k));
			int32_t e = order[j];

			order[j] = order[k];
			m->ids[t * c->top_k + k] = order[k] = e;
		}
	}
	m->weights[1] = 0; /* a place left over */
	m->ids[1] = 0;
	m->args = (km_moe_args){
		.tokens = c->tokens, .experts = c->experts, .top_k = c->top_k, .hidden = c->hidden,
		.intermediate = c->intermediate, .x = m->x, .ids = m->ids, .weights = m->weights,
		.gate = m->gate, .up = m->up, .down = m->down, .routed_scale = 2.827f, .y = m->y,
	};
	omp_set_num_threads(threads);
	m->args.scratch = scratch_of(km_moe_scratch_bytes(&m->args, c->tokens, threads));
}

static void moe_tear_down(moe_setup *m)
{
	for (int e = 0; e < m->args.experts * 3; e++)
		op_case_weight_release(&m->gate[e]);
	free(m->gate);
	free(m->x);
	free(m->old);
	free(m->y);
	free(m->weights);
	free(m->ids);
	free(m->args.scratch);
}

static double weight_dot(const km_weight *w, int row, const double *x)
{
	double sum = 0;

	for (int c = 0; c < w->cols; c++)
		sum += x[c] * op_case_weight_at(w, row, c);
	return sum;
}

static void moe_reference(const moe_setup *m, int t, double *y)
{
	const km_moe_args *a = &m->args;
	double x[256], act[256];

	for (int i = 0; i < a->hidden; i++) {
		x[i] = a->x[t * a->hidden + i];
		y[i] = m->old[t * a->hidden + i];
	}
	for (int k = 0; k < a->top_k; k++) {
		int e = a->ids[t * a->top_k + k];

		for (int i = 0; i < a->intermediate; i++)
			act[i] = silu(weight_dot(&a->gate[e], i, x)) * weight_dot(&a->up[e], i, x);
		for (int i = 0; i < a->hidden; i++)
			y[i] += (double)a->routed_scale * a->weights[t * a->top_k + k] *
			        weight_dot(&a->down[e], i, act);
	}
}

/* Bound: an expert's output is of size 1 and errs by a few DOT_BOUND; up to 6 of them, times
 * 2.827. */
static void moe_case_is_right(const km_ops *ops, const moe_case *c)
{
	double want[256], worst = 0;
	moe_setup m;

	moe_set_up(&m, c, 2);
	ops->moe(&m.args);
	for (int t = 0; t < c->tokens; t += t < 10 ? 1 : 37) {
		moe_reference(&m, t, want);
		for (int i = 0; i < c->hidden; i++) {
			close_to(ops->name, m.y[t * c->hidden + i], want[i], 3e-5);
			worst = fmax(worst, fabs(m.y[t * c->hidden + i] - want[i]));
		}
	}
	printf("figure: %s experts, hidden %d: largest error %.1e, outputs about 3\n", ops->name,
	       c->hidden, worst);
	omp_set_num_threads(1);
	for (int at = 0, n = 0; at < c->tokens;
	     at += row_counts[n], n = (n + 1) % COUNT(row_counts)) {
		km_moe_args a = m.args;

		a.tokens = c->tokens - at < row_counts[n] ? c->tokens - at : row_counts[n];
		a.x += at * c->hidden;
		a.ids += at * c->top_k;
		a.weights += at * c->top_k;
		a.y = m.old + at * c->hidden;
		ops->moe(&a);
	}
	same_bits("moe", m.old, m.y, (size_t)c->tokens * (size_t)c->hidden);
	moe_tear_down(&m);
}

static void check_moe(const km_ops *ops)
{
	for (int i = 0; i < COUNT(moe_cases); i++)
		moe_case_is_right(ops, &moe_cases[i]);
}

static void experts_are_right_and_rows_are_independent(void **state)
{
	(void)state;
	each_form(check_moe);
}

static void costs_count_what_is_touched(void **state)
{
	km_weight w = { .type = KM_W_BF16, .rows = 10, .cols = 20, .data = &w };
	km_linear_args linear = { .tokens = 3, .w = &w };
	moe_setup m;
	km_cost cost;
	double all = 0;

	(void)state;
	cost = km_op_cost(KM_OP_LINEAR, &linear);
	assert_true(cost.bytes == 400 + 3 * 30 * 4 && cost.flops == 3 * 400);
	moe_set_up(&m, &moe_cases[1], 1);
	for (int e = 0; e < 9; e++)
		all += (double)km_weight_bytes(&m.gate[e]);
	cost = km_op_cost(KM_OP_MOE, &m.args);
	assert_true(cost.bytes > all && cost.bytes < all + 9 * 4 * (3 * 256 + 4) + 1);
	assert_true(cost.flops == 2.0 * (9 * 2 - 1) * 3 * 256 * 128);
	moe_tear_down(&m);
	for (enum km_op op = 0; op < KM_OP_COUNT; op++)
		assert_non_null(km_op_name(op));
}

static void forms_are_found_by_name(void **state)
{
	(void)state;
	assert_ptr_equal(km_cpu_ops("plain"), &km_cpu_plain_ops);
	assert_null(km_cpu_ops("avx1024"));
	assert_non_null(km_cpu_ops(NULL));
	printf("figure: this machine runs the %s form\n", km_cpu_ops(NULL)->name);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(forms_are_found_by_name),
		cmocka_unit_test(weights_read_exactly),
		cmocka_unit_test(each_fp8_number_is_read_exactly),
		cmocka_unit_test(linear_is_right_and_rows_are_independent),
		cmocka_unit_test(rmsnorm_is_right),
		cmocka_unit_test(moves_are_exact),
		cmocka_unit_test(silu_mul_is_right),
		cmocka_unit_test(gate_selects_as_defined),
		cmocka_unit_test(gate_handles_ties_and_nan),
		cmocka_unit_test(attention_is_right),
		cmocka_unit_test(attention_rows_are_independent),
		cmocka_unit_test(decode_takes_any_number_of_sequences),
		cmocka_unit_test(experts_are_right_and_rows_are_independent),
		cmocka_unit_test(costs_count_what_is_touched),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
