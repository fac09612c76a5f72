/*
 * The dense ops on a GPU (device/cuda_ops.h), each against double precision from the same inputs.
 *
 * BOUNDS  Inputs are bf16 or f32 exactly. A linear layer's f32 sum may be off by SUM_BOUND of the
 * sum of its products' sizes (the tensor cores cut off bits when they align terms); over a weight
 * that was first made bf16, by 2^-8 of it; a bf16 result by 2^-8 of itself more. Moves are exact.
 * Outputs are NaN before each call. A row's bits are the same in calls of any number of rows, in
 * each form of ours. `test_ops_cuda short` takes few shapes, for runs under a sanitizer; without
 * it, times are printed as well. A second argument names one test.
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
#include "dense.h"
#include "device/cuda_blas.h"
#include "device/cuda_ops.h"
#include "device/cuda_state.h"
#include "model/router.h"
#include "support/on_gpu.h"
#include "support/op_case.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))
#define SUM_BOUND 1e-5
#define BF16_BOUND 0x1p-8

static bool short_run;
static km_linear_device with_blas, without_blas, with_slab;

static void *fetch(const void *from, size_t bytes)
{
	void *to = km_xmalloc(bytes);

	must(km_cuda_download(gpu, to, from, bytes, &err));
	return to;
}

static uint16_t *random_bf16(size_t count, uint64_t seed)
{
	uint16_t *x = km_xreallocarray(NULL, count, sizeof(*x));

	for (size_t i = 0; i < count; i++)
		x[i] = km_f32_to_bf16(km_rng_normal(seed, i));
	return x;
}

static km_weight on_device(const km_weight *w)
{
	km_weight d = *w;
	size_t whole = km_weight_bytes(w), scale;

	scale = w->type == KM_W_FP8    ? whole - (size_t)w->rows * (size_t)w->cols
	        : w->type == KM_W_INT4 ? whole - (size_t)w->rows * (size_t)w->cols / 2
	                               : 0;
	d.data = take_copy(w->data, whole - scale);
	if (scale)
		d.scale = take_copy(w->scale, scale);
	return d;
}

static void close_to(const char *what, double got, double want, double bound)
{
	if (!(fabs(got - want) <= bound))
		fail_msg("%s: got %.9g, want %.9g, off by %.3g, bound %.3g", what, got, want,
		         fabs(got - want), bound);
}

/* ---- linear layers ---- */

static const weight_case weight_cases[] = {
	{ KM_W_BF16, 160, 64, 0, 0, 0, KM_F32 },  { KM_W_FP8, 300, 512, 0, 128, 128, KM_F32 },
	{ KM_W_BF16, 17, 2080, 0, 0, 0, KM_F32 }, { KM_W_BF16, 576, 7168, 0, 0, 0, KM_F32 },
	{ KM_W_BF16, 40, 1043, 0, 0, 0, KM_F32 }, { KM_W_FP8, 130, 1344, 0, 128, 128, KM_BF16 },
	{ KM_W_FP8, 30, 200, 0, 16, 24, KM_F32 }, { KM_W_FP8, 48, 7168, 0, 128, 128, KM_F32 },
	{ KM_W_F32, 24, 64, 0, 0, 0, KM_F32 },    { KM_W_F32, 5, 7, 0, 0, 0, KM_F32 },
	{ KM_W_F16, 33, 96, 0, 0, 0, KM_F32 },    { KM_W_INT4, 64, 1024, 32, 0, 0, KM_BF16 },
	{ KM_W_INT4, 19, 256, 64, 0, 0, KM_F16 }, { KM_W_INT4, 9, 72, 24, 0, 0, KM_BF16 },
};
enum { SLAB_ROWS = 8 };
static const int row_counts[] = { 70, 33, 32, 17, 16, 9, 8, 3, 1 };
enum { MOST_ROWS = 70 };

typedef struct linear_case {
	km_weight host, device;
	uint16_t *x;
	void *x_device, *scratch;
	double *sum, *size; /* [tokens, rows]: the products' sum, and that of their sizes */
	int x_stride;
} linear_case;

static void open_linear(linear_case *l, const weight_case *c, int tokens)
{
	l->host = op_case_weight(c, 21);
	l->device = on_device(&l->host);
	l->x_stride = (c->cols + 15) / 8 * 8;
	l->x = random_bf16((size_t)(tokens * l->x_stride), 22);
	l->x_device = take((size_t)(km_linear_rounded(tokens) * l->x_stride) * 2);
	must(km_cuda_upload(gpu, l->x_device, l->x, (size_t)(tokens * l->x_stride) * 2, &err));
	l->scratch = take((size_t)c->rows * (size_t)c->cols * 2);
	l->sum = km_xcalloc((size_t)(tokens * c->rows), sizeof(double));
	l->size = km_xcalloc((size_t)(tokens * c->rows), sizeof(double));
	for (int r = 0; r < c->rows; r++)
		for (int i = 0; i < c->cols; i++) {
			double w = op_case_weight_at(&l->host, r, i);

			for (int t = 0; t < tokens; t++) {
				double p = w * (double)km_bf16_to_f32(l->x[t * l->x_stride + i]);

				l->sum[t * c->rows + r] += p;
				l->size[t * c->rows + r] += fabs(p);
			}
		}
}

static void close_linear(linear_case *l)
{
	op_case_weight_release(&l->host);
	free(l->x);
	free(l->sum);
	free(l->size);
}

static double check_linear(const linear_case *l, const km_linear_device *device, int tokens,
                           bool y_bf16, float **kept)
{
	size_t mark = km_cuda_mark(gpu), rows = (size_t)l->host.rows, each = y_bf16 ? 2 : 4;
	void *y = take((size_t)km_linear_rounded(tokens) * rows * each);
	km_cuda_linear args = { .x = l->x_device,
		                .x_stride = l->x_stride,
		                .w = { &l->device },
		                .y = { y },
		                .weights = 1,
		                .tokens = tokens,
		                .y_bf16 = y_bf16,
		                .scratch = l->scratch };
	bool rounded = km_linear_plan(&l->device, tokens, device) == KM_LINEAR_BLAS &&
	               l->device.type != KM_W_BF16;
	char *got;
	double worst = 0;

	must(km_cuda_ops_linear(gpu, device, &args, &err));
	got = fetch(y, (size_t)tokens * rows * each);
	for (size_t i = 0; i < (size_t)tokens * rows; i++) {
		double v = y_bf16 ? (double)km_bf16_to_f32(((uint16_t *)(void *)got)[i])
		                  : (double)((float *)(void *)got)[i];
		double bound = l->size[i] * (rounded ? BF16_BOUND : SUM_BOUND) +
		               (y_bf16 ? fabs(l->sum[i]) * BF16_BOUND : 0);

		close_to("linear", v, l->sum[i], bound);
		if (fabs(v - l->sum[i]) > worst * l->size[i])
			worst = fabs(v - l->sum[i]) / l->size[i];
	}
	if (kept)
		*kept = (float *)(void *)got;
	else
		free(got);
	km_cuda_rewind(gpu, mark);
	return worst;
}

static void linear_layers_are_right(void **state)
{
	(void)state;
	for (int i = 0; i < (short_run ? 2 : COUNT(weight_cases)); i++) {
		size_t mark = km_cuda_mark(gpu);
		linear_case l;
		float *all, *some;
		double worst = 0, blas = 0;

		open_linear(&l, &weight_cases[i], MOST_ROWS);
		check_linear(&l, &without_blas, MOST_ROWS, false, &all);
		for (int m = 0; m < COUNT(row_counts); m += short_run ? 3 : 1) {
			worst = fmax(worst,
			             check_linear(&l, &without_blas, row_counts[m], false, &some));
			assert_memory_equal(all, some,
			                    (size_t)row_counts[m] * (size_t)l.host.rows * 4);
			free(some);
			if (with_blas.blas)
				blas = fmax(blas, check_linear(&l, &with_blas, row_counts[m], false,
				                               NULL));
			check_linear(&l, &without_blas, row_counts[m], true, NULL);
		}
		print_message("figure: linear type %d [%d, %d]: largest error %.2g of the "
		              "products' sizes, with "
		              "cuBLASLt %.2g\n",
		              (int)l.host.type, l.host.rows, l.host.cols, worst, blas);
		free(all);
		close_linear(&l);
		km_cuda_rewind(gpu, mark);
	}
}

/* Few rows of bf16: as near, and again a row's bits whatever the others, up to 8 rows. */
static void slabs_are_right(void **state)
{
	static const weight_case cases[] = { { KM_W_BF16, 160, 64, 0, 0, 0, KM_F32 },
		                             { KM_W_BF16, 17, 2112, 0, 0, 0, KM_F32 },
		                             { KM_W_BF16, 576, 7168, 0, 0, 0, KM_F32 },
		                             { KM_W_BF16, 7168, 256, 0, 0, 0, KM_F32 },
		                             { KM_W_BF16, 1536, 1536, 0, 0, 0, KM_F32 },
		                             { KM_W_BF16, 9000, 1024, 0, 0, 0, KM_F32 } };

	(void)state;
	for (int i = 0; i < (short_run ? 2 : COUNT(cases)); i++) {
		size_t mark = km_cuda_mark(gpu);
		linear_case l;
		float *all, *some;
		double worst = 0;

		open_linear(&l, &cases[i], SLAB_ROWS);
		assert_int_equal(km_linear_plan(&l.device, SLAB_ROWS, &with_slab), KM_LINEAR_SLAB);
		assert_int_not_equal(km_linear_plan(&l.device, SLAB_ROWS + 1, &with_slab),
		                     KM_LINEAR_SLAB);
		worst = check_linear(&l, &with_slab, SLAB_ROWS, false, &all);
		for (int tokens = 1; tokens < SLAB_ROWS; tokens += tokens == 3 ? 3 : 1) {
			worst = fmax(worst, check_linear(&l, &with_slab, tokens, false, &some));
			assert_memory_equal(all, some,
			                    (size_t)tokens * (size_t)l.host.rows * 4);
			free(some);
			check_linear(&l, &with_slab, tokens, true, NULL);
		}
		print_message("figure: slabs [%d, %d]: largest error %.2g of the products' sizes\n",
		              l.host.rows, l.host.cols, worst);
		free(all);
		close_linear(&l);
		km_cuda_rewind(gpu, mark);
	}
}

/* However slabs are cut: the same bits. */
static void cuts_change_nothing(void **state)
{
	static const struct {
		int blocks, rows, stage, room;
	} cuts[] = { { 0, 0, 0, 0 },    { 1, 16, 16, 160 }, { 1, 8, 32, 216 },
		     { 2, 3, 16, 110 }, { 1, 2, 32, 0 },    { 2, 20, 64, 110 } };
	static const weight_case cases[] = { { KM_W_BF16, 1000, 2112, 0, 0, 0, KM_F32 },
		                             { KM_W_BF16, 1500, 1024, 0, 0, 0, KM_F32 },
		                             { KM_W_BF16, 5000, 7168, 0, 0, 0, KM_F32 } };

	(void)state;
	for (int i = 0; i < (short_run ? 1 : COUNT(cases)); i++)
		for (int tokens = 1; tokens <= 3; tokens += 2) {
			size_t mark = km_cuda_mark(gpu), bytes = (size_t)(tokens * cases[i].rows) * 4;
			float *y, *want = NULL;
			linear_case l;

			open_linear(&l, &cases[i], tokens);
			y = take(bytes);
			for (int k = 0; k < COUNT(cuts); k++) {
				kk_linear_slab_args a = {
					.linear = { .x = l.x_device, .w = { l.device }, .y = { y },
						    .y_stride = { cases[i].rows }, .weights = 1,
						    .tokens = tokens, .x_stride = l.x_stride, .pdl = true },
					.multiprocessors = gpu->info.multiprocessors,
					.blocks_per_sm = cuts[k].blocks, .rows = cuts[k].rows,
					.stage_bytes = cuts[k].stage << 10,
					.smem_bytes = cuts[k].room << 10,
				};
				float *got;

				must(km_cuda_fill(gpu, y, 0xff, bytes, &err));
				assert_int_equal(kk_linear_slab(&a, gpu->stream), cudaSuccess);
				got = fetch(y, bytes);
				want = want ? want : got;
				assert_memory_equal(got, want, bytes);
				if (got != want)
					free(got);
			}
			free(want);
			close_linear(&l);
			km_cuda_rewind(gpu, mark);
		}
}

/* A linear layer that makes its x, by form: its result, and x when it is to be kept. */
static float *made_linear(km_cuda_linear *a, const km_linear_device *device, size_t results,
                          uint16_t **x)
{
	size_t mark = km_cuda_mark(gpu), made = (size_t)(a->tokens * a->w[0]->cols) * 2;
	float *y, *start = op_case_floats(results, 93);

	a->y[0] = take_copy(start, results * 4);
	a->made = take(made);
	a->keep = true;
	must(km_cuda_ops_linear(gpu, device, a, &err));
	y = fetch(a->y[0], results * 4);
	*x = fetch(a->made, made);
	free(start);
	km_cuda_rewind(gpu, mark);
	return y;
}

/* The norm or the SiLU before a linear layer: by one launch what two give, bit by bit. */
static void made_case(int rows, int cols, int tokens, enum km_x_from from)
{
	size_t mark = km_cuda_mark(gpu), in = (size_t)(tokens * cols),
	       results = (size_t)km_linear_rounded(tokens) * (size_t)rows;
	weight_case c = { KM_W_BF16, rows, cols, 0, 0, 0, KM_F32 };
	km_weight w = op_case_weight(&c, 21), device_w = on_device(&w);
	float *a = op_case_floats(in, 91), *b = op_case_floats(in, 92), *fused, *plain;
	km_cuda_linear args = { .w = { &device_w }, .weights = 1, .tokens = tokens,
		                .accumulate = true, .from = from, .a = take_copy(a, in * 4),
		                .b = take_copy(b, in * 4), .eps = 1e-5f };
	km_cuda_linear given = { .w = { &device_w }, .weights = 1, .tokens = tokens,
		                 .accumulate = true, .x_stride = cols };
	uint16_t *x, *normed = NULL;
	float *start = op_case_floats(results, 93);

	fused = made_linear(&args, &with_slab, results, &x);
	if (from == KM_X_NORM) {
		km_cuda_norm n = { args.a, NULL, args.b, take(in * 2), tokens, cols, cols, 1e-5f };

		must(km_cuda_ops_norm(gpu, &n, &err));
		given.x = n.y;
	} else {
		given.x = take(in * 2);
		must(km_cuda_ops_silu_mul(gpu, args.a, args.b, (void *)(uintptr_t)given.x, tokens,
		                          cols, &err));
	}
	normed = fetch(given.x, in * 2);
	given.y[0] = take_copy(start, results * 4);
	must(km_cuda_ops_linear(gpu, &with_slab, &given, &err));
	plain = fetch(given.y[0], results * 4);
	assert_memory_equal(x, normed, in * 2);
	assert_memory_equal(fused, plain, (size_t)(tokens * rows) * 4);
	free(a);
	free(b);
	free(start);
	free(fused);
	free(plain);
	free(x);
	free(normed);
	op_case_weight_release(&w);
	km_cuda_rewind(gpu, mark);
}

static void linear_layers_make_their_x(void **state)
{
	(void)state;
	made_case(100, 512, 1, KM_X_NORM);
	made_case(100, 192, 2, KM_X_NORM);
	made_case(300, 256, 3, KM_X_SILU);
	if (short_run)
		return;
	for (int tokens = 1; tokens <= 9; tokens += tokens == 5 ? 3 : 1) {
		made_case(2112, 7168, tokens, KM_X_NORM);
		made_case(1536, 1536, tokens, KM_X_NORM);
		made_case(7168, 256, tokens, KM_X_SILU);
	}
}

/* Weights of `rows` rows over one x: what each gives alone, bit by bit. */
static void together_case(const weight_case *like, const int *rows, int weights, int tokens,
                          const km_linear_device *device)
{
	size_t mark = km_cuda_mark(gpu), bytes[KM_LINEAR_WEIGHTS];
	linear_case l[KM_LINEAR_WEIGHTS];
	km_cuda_linear args = { .weights = weights, .tokens = tokens };

	for (int k = 0; k < weights; k++) {
		weight_case c = *like;

		c.rows = rows[k];
		open_linear(&l[k], &c, tokens);
		bytes[k] = (size_t)(tokens * c.rows) * 4;
		args.w[k] = &l[k].device;
		args.y[k] = take(bytes[k]);
	}
	args.x = l[0].x_device;
	args.x_stride = l[0].x_stride;
	must(km_cuda_ops_linear(gpu, device, &args, &err));
	for (int k = 0; k < weights; k++) {
		float *all = fetch(args.y[k], bytes[k]), *alone;

		check_linear(&l[k], device, tokens, false, &alone);
		assert_memory_equal(all, alone, bytes[k]);
		free(all);
		free(alone);
		close_linear(&l[k]);
	}
	km_cuda_rewind(gpu, mark);
}

/* Two in one launch of any form of ours, three in one of slabs; else a launch each. */
static void weights_over_one_x_are_each_ones(void **state)
{
	static const int like[] = { 3, 1, 10, 0 }, router_too[] = { 256, 256, 384 };

	(void)state;
	for (int i = 0; i < (short_run ? 2 : COUNT(like)); i++)
		for (int weights = 2; weights <= KM_LINEAR_WEIGHTS; weights++)
			for (int tokens = 1; tokens <= 9; tokens += 4) {
				const weight_case *c = &weight_cases[like[i]];
				const int rows[] = { c->rows, c->rows + 24, c->rows / 2 + 1 };

				together_case(c, rows, weights, tokens,
				              tokens == 5 ? &with_slab : &without_blas);
			}
	for (int tokens = 1; tokens <= (short_run ? 1 : 8); tokens += tokens == 1 ? 1 : 3)
		together_case(&weight_cases[3], router_too, 3, tokens, &with_slab);
}

/* ---- side by side ---- */

/*
 * Gate, up and router of a norm, then down and beside it the gate. STEPS times with other values each
 * time and one set of buffers in between: whoever reads too early, or is not waited for, leaves what
 * another step would.
 */
enum { STEPS = 40, SIDE_EXPERTS = 384, SIDE_TOP_K = 8 };

typedef struct side {
	int tokens, hidden;
	km_weight host[4], w[4]; /* gate, up, router, down */
	float *in;               /* [STEPS, tokens, hidden] */
	float *stream, *norm, *wide[3], *bias, *weights;
	int32_t *ids, *row;      /* row: [STEPS] 0, 1, ... */
	void *normed, *act;
	km_router_plan plan;
	km_router_shape shape;
} side;

static void side_open(side *s, int tokens)
{
	int hidden = short_run ? 512 : 7168, width = short_run ? 64 : 256;
	const int rows[] = { width, width, SIDE_EXPERTS, hidden }, cols[] = { hidden, hidden, hidden, width };
	km_router_device device = { km_cuda_info_of(gpu)->capability,
		                    km_cuda_info_of(gpu)->multiprocessors, false,
		                    km_cuda_info_of(gpu)->capability >= 90 };
	size_t n = (size_t)tokens, h = (size_t)hidden;
	float *in = op_case_floats(STEPS * n * h, 81), *norm = op_case_floats(h, 82),
	      *bias = op_case_floats(SIDE_EXPERTS, 83);
	int32_t row[STEPS];

	*s = (side){ .tokens = tokens, .hidden = hidden };
	for (int i = 0; i < 4; i++) {
		weight_case c = { KM_W_BF16, rows[i], cols[i], 0, 0, 0, KM_F32 };

		s->host[i] = op_case_weight(&c, (uint64_t)(84 + i));
		s->w[i] = on_device(&s->host[i]);
	}
	for (int i = 0; i < STEPS; i++)
		row[i] = i;
	s->in = take_copy(in, STEPS * n * h * 4);
	s->norm = take_copy(norm, h * 4);
	s->bias = take_copy(bias, SIDE_EXPERTS * 4);
	s->row = take_copy(row, sizeof(row));
	s->stream = take(n * h * 4);
	for (int i = 0; i < 3; i++)
		s->wide[i] = take(n * (size_t)rows[i] * 4);
	s->normed = take(n * h * 2);
	s->act = take(n * (size_t)width * 2);
	s->ids = take(n * SIDE_TOP_K * 4);
	s->weights = take(n * SIDE_TOP_K * 4);
	s->shape = (km_router_shape){ .tokens = tokens, .experts = SIDE_EXPERTS, .hidden = hidden,
		                      .top_k = SIDE_TOP_K, .block = 1, .renormalize = true, .scale = 1 };
	must(km_router_plan_make(&s->plan, &s->shape, &device, &err));
	free(in);
	free(norm);
	free(bias);
}

static void side_gate(side *s, enum km_turn turn)
{
	km_router_buffers b = { .logits = s->wide[2], .bias = s->bias, .ids = s->ids,
		                .weights = s->weights };

	s->plan.gate_turn = turn;
	must(km_cuda_router_run(gpu, KM_PART_GATE, &s->plan, &s->shape, &b, &err));
}

static void side_down(const side *s, enum km_turn turn)
{
	km_cuda_linear down = { .w = { &s->w[3] }, .y = { s->stream }, .weights = 1,
		                .tokens = s->tokens, .accumulate = true, .turn = turn,
		                .from = KM_X_SILU, .a = s->wide[0], .b = s->wide[1], .made = s->act };

	must(km_cuda_ops_linear(gpu, &with_slab, &down, &err));
}

/* One step; the results to out: the stream, ids, weights of each. */
static void side_step(side *s, int i, bool beside, char *const out[3])
{
	int stream_bytes = s->tokens * s->hidden * 4, ids_bytes = s->tokens * SIDE_TOP_K * 4;
	km_cuda_linear wide = { .w = { &s->w[0], &s->w[1], &s->w[2] },
		                .y = { s->wide[0], s->wide[1], s->wide[2] }, .weights = 3,
		                .tokens = s->tokens, .from = KM_X_NORM, .a = s->stream,
		                .b = s->norm, .eps = 1e-5f, .made = s->normed, .keep = true };

	must(km_cuda_ops_gather(gpu, s->row + i, 1, s->in, s->stream, stream_bytes, &err));
	must(km_cuda_ops_linear(gpu, &with_slab, &wide, &err));
	side_down(s, beside ? KM_TURN_HOLDS : KM_TURN_AFTER);
	side_gate(s, beside ? KM_TURN_BESIDE : KM_TURN_AFTER);
	must(km_cuda_ops_gather(gpu, s->row, 1, s->stream, out[0] + (size_t)i * (size_t)stream_bytes,
	                        stream_bytes, &err));
	must(km_cuda_ops_gather(gpu, s->row, 1, s->ids, out[1] + (size_t)i * (size_t)ids_bytes,
	                        ids_bytes, &err));
	must(km_cuda_ops_gather(gpu, s->row, 1, s->weights, out[2] + (size_t)i * (size_t)ids_bytes,
	                        ids_bytes, &err));
}

/* All steps, replayed from a graph: what they leave, owned. */
static void side_run(side *s, bool beside, const size_t bytes[3], char *got[3])
{
	size_t mark = km_cuda_mark(gpu);
	char *out[3];
	km_cuda_graph *graph;

	for (int k = 0; k < 3; k++)
		out[k] = take(bytes[k]);
	side_step(s, 0, beside, out);
	must(km_cuda_capture_begin(gpu, &err));
	for (int i = 0; i < STEPS; i++)
		side_step(s, i, beside, out);
	must(km_cuda_capture_end(gpu, &graph, &err));
	for (int i = 0; i < 3; i++) {
		for (int k = 0; k < 3; k++)
			must(km_cuda_fill(gpu, out[k], 0xff, bytes[k], &err));
		must(km_cuda_graph_launch(gpu, graph, &err));
	}
	for (int k = 0; k < 3; k++)
		got[k] = fetch(out[k], bytes[k]);
	km_cuda_graph_free(graph);
	km_cuda_rewind(gpu, mark);
}

static void launches_side_by_side_see_the_same(void **state)
{
	(void)state;
	for (int tokens = 1; tokens <= 2; tokens++) {
		size_t mark = km_cuda_mark(gpu), ids, bytes[3];
		char *want[3], *got[3];
		side s;

		side_open(&s, tokens);
		ids = (size_t)(STEPS * tokens * SIDE_TOP_K) * 4;
		bytes[0] = (size_t)(STEPS * tokens * s.hidden) * 4;
		bytes[1] = bytes[2] = ids;
		side_run(&s, false, bytes, want);
		assert_memory_not_equal(want[1], want[1] + ids / STEPS, ids / STEPS);
		side_run(&s, true, bytes, got);
		for (int k = 0; k < 3; k++) {
			assert_memory_equal(got[k], want[k], bytes[k]);
			free(got[k]);
			free(want[k]);
		}
		for (int i = 0; i < 4; i++)
			op_case_weight_release(&s.host[i]);
		km_cuda_rewind(gpu, mark);
	}
}

static void weights_become_bf16(void **state)
{
	(void)state;
	for (int i = 0; i < COUNT(weight_cases); i++) {
		size_t mark = km_cuda_mark(gpu), count;
		km_weight w = op_case_weight(&weight_cases[i], 31), d = on_device(&w);
		void *to = take((size_t)w.rows * (size_t)w.cols * 2);
		uint16_t *got;

		must(km_cuda_ops_dequantize(gpu, &d, to, &err));
		count = (size_t)w.rows * (size_t)w.cols;
		got = fetch(to, count * 2);
		for (size_t k = 0; k < count; k++) {
			int row = (int)(k / (size_t)w.cols), col = (int)(k % (size_t)w.cols);
			float want = (float)op_case_weight_at(&w, row, col);

			if (got[k] != km_f32_to_bf16(want))
				fail_msg("weight %d (%d, %d): got %g, want %g", i, row, col,
				         (double)km_bf16_to_f32(got[k]), (double)want);
		}
		free(got);
		op_case_weight_release(&w);
		km_cuda_rewind(gpu, mark);
	}
}

/* ---- the others ---- */

static void norm_case(int tokens, int size, int stride, bool add)
{
	size_t mark = km_cuda_mark(gpu), in = (size_t)(tokens * stride),
	       out = (size_t)(tokens * size);
	float *residual = op_case_floats(in, 41), *delta = op_case_floats(out, 42);
	float *weight = op_case_floats((size_t)size, 43), *after;
	km_cuda_norm args = { take_copy(residual, in * 4),
		              add ? take_copy(delta, out * 4) : NULL,
		              take_copy(weight, (size_t)size * 4),
		              take(out * 2),
		              tokens,
		              size,
		              stride,
		              1e-5f };
	uint16_t *y;

	must(km_cuda_ops_norm(gpu, &args, &err));
	y = fetch(args.y, out * 2);
	after = fetch(args.residual, in * 4);
	for (int t = 0; t < tokens; t++) {
		float *r = residual + t * stride;
		double sum = 0;

		for (int i = 0; add && i < size; i++)
			r[i] += delta[t * size + i];
		for (int i = 0; i < size; i++)
			sum += (double)r[i] * (double)r[i];
		for (int i = 0; i < size; i++) {
			double want = (double)r[i] / sqrt(sum / size + 1e-5) * (double)weight[i];

			close_to("norm", (double)km_bf16_to_f32(y[t * size + i]), want,
			         fabs(want) * (BF16_BOUND + 1e-5));
		}
	}
	assert_memory_equal(after, residual, in * 4);
	free(residual);
	free(delta);
	free(weight);
	free(after);
	free(y);
	km_cuda_rewind(gpu, mark);
}

static void norms_are_right(void **state)
{
	static const int sizes[] = { 48, 136, 512, 1536, 7168, 9001 };

	(void)state;
	for (int i = 0; i < (short_run ? 3 : COUNT(sizes)); i++)
		for (int tokens = 1; tokens <= 5; tokens += 4) {
			norm_case(tokens, sizes[i], sizes[i], true);
			norm_case(tokens, sizes[i], sizes[i] + 64, false);
		}
}

static void rows_move_exactly(void **state)
{
	static const int32_t rows[] = { 5, 0, 6, 5, 2 };
	static const weight_case tables[] = { { KM_W_BF16, 7, 200, 0, 0, 0, KM_F32 },
		                              { KM_W_F16, 7, 33, 0, 0, 0, KM_F32 },
		                              { KM_W_F32, 7, 1000, 0, 0, 0, KM_F32 } };

	(void)state;
	for (int i = 0; i < COUNT(tables); i++) {
		size_t mark = km_cuda_mark(gpu), cols = (size_t)tables[i].cols;
		km_weight w = op_case_weight(&tables[i], 51), d = on_device(&w);
		int32_t *ids = take_copy(rows, sizeof(rows));
		float *y = take(5 * cols * 4), *again = take(5 * cols * 4), *got, *moved;

		must(km_cuda_ops_embed(gpu, ids, 5, &d, y, &err));
		must(km_cuda_ops_gather(gpu, take_copy((int32_t[]){ 4, 3, 2, 1, 0 }, 20), 5, y,
		                        again, (int)cols * 4, &err));
		got = fetch(y, 5 * cols * 4);
		moved = fetch(again, 5 * cols * 4);
		for (size_t k = 0; k < 5 * cols; k++)
			assert_true(got[k] ==
			            (float)op_case_weight_at(&w, rows[k / cols], (int)(k % cols)));
		for (size_t r = 0; r < 5; r++)
			assert_memory_equal(moved + r * cols, got + (4 - r) * cols, cols * 4);
		free(got);
		free(moved);
		op_case_weight_release(&w);
		km_cuda_rewind(gpu, mark);
	}
}

static void silu_is_right(void **state)
{
	size_t mark = km_cuda_mark(gpu), count = 3 * 1000 + 7;
	float *gate = op_case_floats(count, 61), *up = op_case_floats(count, 62);
	void *y;
	uint16_t *got;

	(void)state;
	gate[0] = 80, gate[1] = -80, gate[2] = 0, gate[3] = -200;
	y = take(count * 2);
	must(km_cuda_ops_silu_mul(gpu, take_copy(gate, count * 4), take_copy(up, count * 4), y, 1,
	                          (int)count, &err));
	got = fetch(y, count * 2);
	for (size_t i = 0; i < count; i++) {
		double want = (double)gate[i] / (1 + exp(-(double)gate[i])) * (double)up[i];

		close_to("silu_mul", (double)km_bf16_to_f32(got[i]), want,
		         fabs(want) * (BF16_BOUND + 1e-5) + 1e-30);
	}
	free(gate);
	free(up);
	free(got);
	km_cuda_rewind(gpu, mark);
}

/* ---- times ---- */

typedef struct timed_shape {
	const char *name;
	int rows[2], cols;
} timed_shape;

static const timed_shape timed_shapes[] = {
	{ "q_a and kv_a", { 576, 1536 }, 7168 },
	{ "q_b", { 12288, 0 }, 1536 },
	{ "o", { 7168, 0 }, 8192 },
	{ "shared gate and up", { 2048, 2048 }, 7168 },
	{ "shared down", { 7168, 0 }, 2048 },
	{ "head", { 163840, 0 }, 7168 },
	{ "q_b of TP8", { 1536, 0 }, 1536 },
	{ "o of TP8", { 7168, 0 }, 1024 },
	{ "shared gate and up of TP8", { 256, 256 }, 7168 },
	{ "shared down of TP8", { 7168, 0 }, 256 },
};

enum { CALLS = 40, MOST_TIMED_TOKENS = 4096 };

static const size_t POOL = (size_t)6 << 30, ROTATE = (size_t)200 << 20;

/* Microseconds of a call, from graphs of CALLS calls over weights that are not in L2. */
static double time_linear(const timed_shape *s, char *pool, char *x, char *y, int tokens, bool fp8,
                          const km_linear_device *device)
{
	size_t each = fp8 ? 1 : 2, bytes = 0, copies, stride;
	km_weight w[2];
	km_cuda_graph *graph;
	double best = 1e30;

	for (int k = 0; k < 2; k++)
		bytes += (size_t)s->rows[k] * (size_t)s->cols * each;
	stride = (bytes + (1 << 20) + 255) / 256 * 256;
	copies = bytes > ROTATE ? 2 : (ROTATE + stride - 1) / stride + 1;
	for (int warm = 0; warm < 2; warm++) {
		if (warm)
			must(km_cuda_capture_begin(gpu, &err));
		for (int i = 0; i < CALLS; i++) {
			char *at = pool + (size_t)i % copies * stride;
			km_cuda_linear args = { .x = x,
				                .x_stride = s->cols,
				                .weights = s->rows[1] ? 2 : 1,
				                .tokens = tokens };

			for (int k = 0; k < args.weights; k++) {
				w[k] = (km_weight){ .type = fp8 ? KM_W_FP8 : KM_W_BF16,
					            .rows = s->rows[k],
					            .cols = s->cols,
					            .data = at,
					            .scale = pool,
					            .scale_dtype = KM_BF16,
					            .block_rows = 128,
					            .block_cols = 128 };
				at += (size_t)s->rows[k] * (size_t)s->cols * each;
				args.w[k] = &w[k];
				args.y[k] = y + (size_t)k * ((size_t)512 << 20);
			}
			must(km_cuda_ops_linear(gpu, device, &args, &err));
		}
	}
	must(km_cuda_capture_end(gpu, &graph, &err));
	for (int i = 0; i < 6; i++) {
		double us;

		must(km_cuda_time_begin(gpu, &err));
		must(km_cuda_graph_launch(gpu, graph, &err));
		must(km_cuda_time_end(gpu, &us, &err));
		best = i && us / CALLS < best ? us / CALLS : best;
	}
	km_cuda_graph_free(graph);
	return best;
}

static double copy_gbps(char *pool)
{
	double us, best = 0;

	for (int i = 0; i < 4; i++) {
		must(km_cuda_time_begin(gpu, &err));
		must(km_cuda_copy(gpu, pool + ((size_t)2 << 30), pool, (size_t)2 << 30, &err));
		must(km_cuda_time_end(gpu, &us, &err));
		best = fmax(best, 2.0 * (double)((size_t)2 << 30) / us / 1e3);
	}
	return best;
}

static void times_of_linear_layers(void **state)
{
	static const int tokens[] = { 1, 8, 16, 32, 64 };
	size_t mark = km_cuda_mark(gpu);
	char *pool, *x, *y;
	uint16_t *random;

	(void)state;
	if (short_run)
		skip();
	pool = take(POOL);
	x = take((size_t)MOST_TIMED_TOKENS * 8192 * 2);
	y = take((size_t)1 << 30);
	random = random_bf16((size_t)1 << 22, 71);
	must(km_cuda_upload(gpu, pool, random, (size_t)1 << 23, &err));
	free(random);
	for (size_t have = (size_t)1 << 23; have < POOL; have *= 2)
		must(km_cuda_copy(gpu, pool + have, pool, have < POOL - have ? have : POOL - have,
		                  &err));
	must(km_cuda_copy(gpu, x, pool, (size_t)MOST_TIMED_TOKENS * 8192 * 2, &err));
	print_message("figure: copy: %.0f GB/s read and written\n", copy_gbps(pool));
	for (int i = 0; i < COUNT(timed_shapes); i++)
		for (int fp8 = 0; fp8 < 2; fp8++)
			for (int m = 0; m < COUNT(tokens); m++) {
				const timed_shape *s = &timed_shapes[i];
				double bytes =
					(double)(s->rows[0] + s->rows[1]) * s->cols * (fp8 ? 1 : 2);
				double ours, blas = 0;

				if (s->rows[0] > 100000 && (fp8 || tokens[m] == 64))
					continue;
				ours = time_linear(s, pool, x, y, tokens[m], fp8, &with_slab);
				if (with_blas.blas && !fp8) {
					km_linear_device only = { .blas = true };

					blas = tokens[m] > 8 ? time_linear(s, pool, x, y,
					                                    tokens[m], false, &only)
					                      : 0;
				}
				print_message("figure: linear %s, %s, %d rows: %.2f us, %.0f GB/s "
				              "of weights%s",
				              s->name, fp8 ? "fp8" : "bf16", tokens[m], ours,
				              bytes / ours / 1e3, blas ? "" : "\n");
				if (blas)
					print_message("; cuBLASLt %.2f us\n", blas);
			}
	km_cuda_rewind(gpu, mark);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest all[] = {
		cmocka_unit_test(linear_layers_are_right),
		cmocka_unit_test(slabs_are_right),
		cmocka_unit_test(cuts_change_nothing),
		cmocka_unit_test(linear_layers_make_their_x),
		cmocka_unit_test(weights_over_one_x_are_each_ones),
		cmocka_unit_test(launches_side_by_side_see_the_same),
		cmocka_unit_test(weights_become_bf16),
		cmocka_unit_test(norms_are_right),
		cmocka_unit_test(rows_move_exactly),
		cmocka_unit_test(silu_is_right),
		cmocka_unit_test(times_of_linear_layers),
	};
	int rc;

	short_run = argc > 1 && !strcmp(argv[1], "short");
	if (argc > 2)
		cmocka_set_test_filter(argv[2]);
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	if (km_cuda_open(&gpu, 0, short_run ? (size_t)256 << 20 : (size_t)9 << 30, &err) < 0) {
		printf("%s\n", err.msg);
		return 1;
	}
	with_slab.slab = true;
	with_blas.blas = !short_run && km_cuda_blas_open(gpu, &err) >= 0;
	if (!short_run && !with_blas.blas)
		printf("skip: %s\n", err.msg);
	rc = cmocka_run_group_tests(all, NULL, NULL);
	km_cuda_close(gpu);
	return rc;
}
