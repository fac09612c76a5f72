/*
 * Attention on a GPU against the CPU's ops.
 *
 * Bounds, of a row's head (‖got - want‖ / ‖want‖): decode 0.02, prefill 0.02, where queries,
 * weights of the softmax and rebuilt keys are rounded to bf16 (2^-9 each, on scores of about 3, so
 * some 0.006 is normal); over a whole case 0.008. Outputs are poisoned before each launch. Each
 * form is run twice and must give the same bits; so must a sequence alone and in company, prefill
 * in waves of any size, and a graph replayed with other lengths. `test_gpu_mla short` does less,
 * for runs under a sanitizer; `test_gpu_mla all PATTERN` runs some of the tests.
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
#include "device/cuda_mla.h"
#include "device/cuda_ops.h"
#include "device/cuda_state.h"
#include "format/dtype.h"
#include "mla.h"
#include "support/mla_case.h"
#include "support/on_gpu.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

static const double ROW_BOUND = 0.02, CASE_BOUND = 0.008;

static bool short_run;

static void launched(cudaError_t rc)
{
	if (rc != cudaSuccess)
		fail_msg("%s", cudaGetErrorString(rc));
}

static void *fetch(const void *from, size_t bytes)
{
	void *to = km_xmalloc(bytes);

	must(km_cuda_download(gpu, to, from, bytes, &err));
	return to;
}

static km_mla_device device(void)
{
	const km_cuda_info *info = km_cuda_info_of(gpu);

	return (km_mla_device){ info->capability, info->multiprocessors };
}

static km_mla_shape k2_shape(int heads, bool fp8)
{
	return (km_mla_shape){ heads, 128, 64, 128, 512, fp8 };
}

/* A case's arrays on the GPU. */
typedef struct rig {
	mla_case c;
	size_t mark, out_bytes, cache_bytes;
	km_mla_decode_buffers d;
	km_mla_prefill_buffers p;
	void *out, *cache;
	int32_t *kv_len, *pages, *positions;
} rig;

static void rig_open(rig *r, const km_mla_shape *shape, const mla_case_step *step, uint64_t seed)
{
	mla_case *c = &r->c;
	size_t heads = (size_t)shape->heads,
	       width = (size_t)(shape->kv_lora_rank + shape->rope_dim);
	size_t tokens, seqs = (size_t)step->seqs, key = (size_t)(shape->nope_dim + shape->rope_dim);

	memset(r, 0, sizeof(*r));
	mla_case_init(c, shape, step, seed);
	mla_case_solve(c);
	r->mark = km_cuda_mark(gpu);
	tokens = (size_t)c->batch.tokens;
	r->out_bytes = tokens * heads * (size_t)shape->v_dim * 2;
	r->cache_bytes = (size_t)c->slots * width * (shape->fp8 ? 1 : 2);
	r->out = take(r->out_bytes);
	r->cache = take_copy(c->cache, r->cache_bytes);
	r->pages = take_copy(c->pages, seqs * (size_t)c->batch.pages_per_seq * 4);
	r->positions = take_copy(c->positions, tokens * 4);
	r->kv_len = take_copy(c->kv_len, seqs * 4);
	r->d = (km_mla_decode_buffers){
		.cache = { r->cache, r->pages, c->batch.pages_per_seq, c->batch.page_size },
		.q = take_copy(c->q, tokens * heads * key * 2),
		.kv_b = take_copy(c->kv_b, heads * (size_t)((shape->nope_dim + shape->v_dim) *
		                                            shape->kv_lora_rank) * 2),
		.cos_sin = take_copy(c->cos_sin, (size_t)(c->positions_max * shape->rope_dim) * 4),
		.positions = r->positions, .kv_len = r->kv_len, .out = r->out, .scale = c->scale,
	};
	r->p = (km_mla_prefill_buffers){ .cache = r->d.cache, .positions = r->positions,
		                         .q = take_copy(c->rotated, tokens * heads * key * 2),
		                         .out = r->out, .scale = c->scale };
}

static void rig_close(rig *r)
{
	km_cuda_rewind(gpu, r->mark);
	mla_case_release(&r->c);
}

static void decode(rig *r, const km_mla_decode_plan *plan, int seqs)
{
	km_mla_decode_scratch at;
	size_t mark = km_cuda_mark(gpu);

	km_mla_decode_layout(&r->c.shape, plan, seqs, &at);
	r->d.scratch = take(at.bytes);
	must(km_cuda_mla_decode(gpu, plan, &r->c.shape, seqs, &r->d, &err));
	must(km_cuda_wait(gpu, &err));
	km_cuda_rewind(gpu, mark);
}

/* Rows [from, to) of `got` against the CPU's; what they are off by, over all of them. */
static double check_rows(const rig *r, const uint16_t *got, int from, int to, const char *what)
{
	const mla_case *c = &r->c;
	int heads = c->shape.heads, v = c->shape.v_dim;
	size_t first = (size_t)from * (size_t)(heads * v);

	for (int i = from * heads; i < to * heads; i++) {
		double e = mla_case_error(got + (size_t)i * (size_t)v,
		                          c->out + (size_t)i * (size_t)v, v);

		if (!(e <= ROW_BOUND))
			fail_msg(
				"%s: row %d, head %d of %d (%s, %d rows, page %d): off by %.4f, "
				"got %g %g "
				"%g %g, want %g %g %g %g",
				what, i / heads, i % heads, heads, c->shape.fp8 ? "fp8" : "bf16",
				c->batch.tokens, c->batch.page_size, e,
				(double)mla_case_bf16(got[i * v]),
				(double)mla_case_bf16(got[i * v + 1]),
				(double)mla_case_bf16(got[i * v + 64 % v]),
				(double)mla_case_bf16(got[i * v + v - 1]), (double)c->out[i * v],
				(double)c->out[i * v + 1], (double)c->out[i * v + 64 % v],
				(double)c->out[i * v + v - 1]);
	}
	return mla_case_error(got + first, c->out + first, (to - from) * heads * v);
}

static bool untouched(const uint16_t *rows, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (rows[i] != 0xffff)
			return false;
	return true;
}

/* Runs decode twice from poison. */
static double check_decode(rig *r, const km_mla_decode_plan *plan, const char *what)
{
	uint16_t *got, *again;
	size_t row = (size_t)(r->c.shape.heads * r->c.shape.v_dim);
	int seqs = r->c.batch.decode_seqs;
	double e;

	must(km_cuda_fill(gpu, r->out, POISON, r->out_bytes, &err));
	decode(r, plan, seqs);
	got = fetch(r->out, r->out_bytes);
	e = check_rows(r, got, 0, seqs, what);
	assert_true(e <= CASE_BOUND);
	assert_true(untouched(got + (size_t)seqs * row, (size_t)(r->c.batch.tokens - seqs) * row));
	must(km_cuda_fill(gpu, r->out, POISON, r->out_bytes, &err));
	decode(r, plan, seqs);
	again = fetch(r->out, r->out_bytes);
	assert_memory_equal(got, again, r->out_bytes);
	free(got);
	free(again);
	return e;
}

static km_mla_decode_plan plan_of(const rig *r, int seqs)
{
	km_mla_device d = device();

	return km_mla_plan_decode(&r->c.shape, seqs, r->c.positions_max, &d);
}

enum { MAX_SEQS = 70 };

/* Lengths about the edges of pages and tiles, and odd ones. */
static void decode_lengths(int *past, int *rows, int seqs, int longest, uint64_t seed)
{
	static const int edges[] = { 0,  1,  14,  15,  16,  17,  62,  63,
		                     64, 65, 126, 127, 128, 129, 191, 192 };

	for (int i = 0; i < seqs; i++) {
		int odd = (int)(km_rng_u64(seed, (uint64_t)i) % (uint64_t)longest);

		past[i] = i % 2 && edges[i / 2 % COUNT(edges)] < longest
		                  ? edges[i / 2 % COUNT(edges)]
		                  : odd;
		rows[i] = 1;
	}
	past[0] = longest - 1;
}

static void decode_case(int seqs, int heads, int longest, int page, bool fp8)
{
	int past[MAX_SEQS], rows[MAX_SEQS];
	mla_case_step step = { seqs, seqs, page, past, rows, 1 };
	km_mla_shape shape = k2_shape(heads, fp8);
	km_mla_decode_plan plan, general = { false, 1, 1, false };
	double worst = 0, e;
	rig r;

	decode_lengths(past, rows, seqs, longest, (uint64_t)(seqs * 131 + longest));
	rig_open(&r, &shape, &step, (uint64_t)(seqs + heads));
	plan = plan_of(&r, seqs);
	if (plan.tensor) {
		int other[][2] = { { plan.splits, plan.v_blocks }, { 1, 1 }, { 3, 2 }, { 37, 4 } };

		for (int i = 0; i < COUNT(other); i++) {
			plan.splits = other[i][0];
			plan.v_blocks = other[i][1];
			plan.cluster = false;
			e = check_decode(&r, &plan, "decode");
			worst = e > worst ? e : worst;
		}
		if (heads == 8) {
			plan.cluster = true;
			e = check_decode(&r, &plan, "decode, cluster");
			worst = e > worst ? e : worst;
		}
	}
	e = check_decode(&r, &general, "decode, general");
	printf("figure: decode, %d x %d heads, to %d tokens, page %d, %s: off by %.4f, "
	       "general %.4f\n",
	       seqs, heads, longest, page, fp8 ? "fp8" : "bf16", worst, e);
	rig_close(&r);
}

static void test_decode(void **state)
{
	(void)state;
	decode_case(1, 8, 130, 16, false);
	decode_case(1, 64, 77, 16, true);
	decode_case(5, 3, 200, 7, false);
	decode_case(2, 8, 99, 16, true);
	if (short_run)
		return;
	decode_case(2, 64, 1024, 64, false);
	decode_case(3, 1, 700, 1, true);
	decode_case(17, 16, 333, 16, false);
	decode_case(16, 100, 500, 16, false);
	decode_case(33, 8, 4096, 16, true);
	decode_case(70, 64, 1500, 16, false);
	decode_case(2, 8, 4001, 256, false);
}

/* The cluster form writes this step's rows as rope_kv does, and goes on from the same bits. */
static void rows_case(int seqs, int longest, bool fp8)
{
	int past[MAX_SEQS], rows[MAX_SEQS];
	int32_t slots[MAX_SEQS];
	mla_case_step step = { seqs, seqs, 16, past, rows, 1 };
	km_mla_shape shape = k2_shape(8, fp8);
	km_mla_decode_plan plan = { .tensor = true, .splits = 1, .v_blocks = 1, .cluster = true };
	km_cuda_rope_kv rope = { .tokens = seqs, .q_from = seqs, .shape = shape, .eps = 1e-5f };
	float *kv_a = km_xreallocarray(NULL, (size_t)seqs * 576, sizeof(float));
	void *got[2], *cache[2];
	float norm[512];
	rig r;

	decode_lengths(past, rows, seqs, longest, 17);
	rig_open(&r, &shape, &step, 23);
	for (int i = 0; i < seqs * 576; i++)
		kv_a[i] = km_rng_normal(31, (uint64_t)i);
	for (int i = 0; i < 512; i++)
		norm[i] = 1 + 0.1f * km_rng_normal(32, (uint64_t)i);
	for (int i = 0; i < seqs; i++)
		slots[i] = r.c.pages[i * r.c.batch.pages_per_seq + past[i] / 16] * 16 + past[i] % 16;
	r.d.kv_a = rope.kv_a = take_copy(kv_a, (size_t)seqs * 576 * 4);
	r.d.norm = rope.norm = take_copy(norm, sizeof(norm));
	r.d.slots = rope.slots = take_copy(slots, (size_t)seqs * 4);
	r.d.eps = rope.eps;
	rope.cos_sin = r.d.cos_sin;
	rope.positions = r.positions;
	rope.cache = r.cache;
	for (int i = 0; i < 2; i++) {
		must(km_cuda_upload(gpu, r.cache, r.c.cache, r.cache_bytes, &err));
		must(km_cuda_fill(gpu, r.out, POISON, r.out_bytes, &err));
		if (i)
			must(km_cuda_ops_rope_kv(gpu, &rope, &err));
		r.d.kv_a = i ? NULL : rope.kv_a;
		decode(&r, &plan, seqs);
		got[i] = fetch(r.out, r.out_bytes);
		cache[i] = fetch(r.cache, r.cache_bytes);
	}
	assert_memory_equal(cache[0], cache[1], r.cache_bytes);
	assert_memory_equal(got[0], got[1], r.out_bytes);
	assert_true(memcmp(cache[0], r.c.cache, r.cache_bytes) != 0);
	for (int i = 0; i < 2; i++) {
		free(got[i]);
		free(cache[i]);
	}
	free(kv_a);
	rig_close(&r);
}

static void test_decode_rows(void **state)
{
	km_mla_shape shape = k2_shape(8, false);
	km_mla_device d = device();

	(void)state;
	if (!km_mla_tensor_fits(&shape, &d))
		skip();
	rows_case(3, 150, false);
	rows_case(2, 70, true);
	if (short_run)
		return;
	rows_case(5, 2500, false);
	rows_case(6, 1100, true);
}

/* Small models' shapes: the general forms. */
static void test_decode_small(void **state)
{
	static const km_mla_shape shapes[] = {
		{ 4, 16, 8, 16, 32, false },
		{ 4, 32, 16, 32, 64, true },
		{ 16, 16, 32, 16, 128, false },
	};
	int past[] = { 99, 0, 16 }, rows[] = { 1, 1, 1 };
	mla_case_step step = { 3, 3, 16, past, rows, 1 };

	(void)state;
	for (int i = 0; i < COUNT(shapes); i++) {
		km_mla_decode_plan plan;
		rig r;

		rig_open(&r, &shapes[i], &step, 7);
		plan = plan_of(&r, 3);
		assert_false(plan.tensor);
		check_decode(&r, &plan, "decode, small");
		rig_close(&r);
	}
}

/* Each sequence alone, under the plan of all, gives the bits that it gave in company. */
static void alone_case(int longest, int splits, int v_blocks)
{
	enum { SEQS = 19 };
	int past[SEQS], rows[SEQS], seqs = short_run ? 3 : SEQS;
	mla_case_step step = { seqs, seqs, 16, past, rows, 1 };
	km_mla_shape shape = k2_shape(short_run ? 3 : 20, false);
	size_t row = (size_t)(shape.heads * shape.v_dim) * 2;
	km_mla_decode_plan plan = { true, splits, v_blocks, false };
	uint16_t *all;
	rig r;

	decode_lengths(past, rows, seqs, longest, 3);
	rig_open(&r, &shape, &step, 5);
	decode(&r, &plan, seqs);
	all = fetch(r.out, r.out_bytes);
	for (int i = 0; i < seqs; i++) {
		rig one = r;
		uint16_t *alone;

		one.d.q = (const char *)r.d.q + (size_t)(i * shape.heads) * 192 * 2;
		one.d.positions = r.positions + i;
		one.d.kv_len = r.kv_len + i;
		one.d.cache.pages = r.pages + i * r.c.batch.pages_per_seq;
		must(km_cuda_fill(gpu, r.out, POISON, r.out_bytes, &err));
		decode(&one, &plan, 1);
		alone = fetch(r.out, row);
		assert_memory_equal(alone, (char *)all + (size_t)i * row, row);
		free(alone);
	}
	free(all);
	rig_close(&r);
}

static void test_decode_alone(void **state)
{
	km_mla_shape shape = k2_shape(1, false);
	km_mla_device d = device();

	(void)state;
	if (!km_mla_tensor_fits(&shape, &d))
		skip();
	alone_case(900, 5, 2);
	alone_case(short_run ? 120 : 900, 2, 1);
	alone_case(900, 2, 4);
	alone_case(900, 17, 1);
}

/* One graph, three sets of lengths; a row of no cached tokens is zeros. */
static void graph_case(bool tensor, bool cluster)
{
	enum { SEQS = 4 };
	static const int lengths[][SEQS] = { { 900, 1, 64, 65 },
		                             { 3, 640, 0, 129 },
		                             { 0, 0, 512, 899 } };
	int past[SEQS] = { 899, 899, 899, 899 }, rows[SEQS] = { 1, 1, 1, 1 };
	mla_case_step step = { SEQS, SEQS, 16, past, rows, 1 };
	km_mla_shape shape = tensor ? k2_shape(8, true) : (km_mla_shape){ 4, 16, 8, 16, 32, false };
	size_t row = (size_t)(shape.heads * shape.v_dim);
	km_mla_decode_plan plan = { tensor, tensor ? 6 : 1, 4, cluster };
	km_mla_decode_scratch at;
	km_cuda_graph *graph = NULL;
	rig r;

	rig_open(&r, &shape, &step, 11);
	decode(&r, &plan, SEQS); /* what a first launch sets up is no part of a graph */
	km_mla_decode_layout(&shape, &plan, SEQS, &at);
	r.d.scratch = take(at.bytes);
	must(km_cuda_capture_begin(gpu, &err));
	must(km_cuda_mla_decode(gpu, &plan, &shape, SEQS, &r.d, &err));
	must(km_cuda_capture_end(gpu, &graph, &err));
	for (int i = 0; i < COUNT(lengths); i++) {
		uint16_t *direct, *replayed;

		must(km_cuda_upload(gpu, r.kv_len, lengths[i], sizeof(lengths[i]), &err));
		decode(&r, &plan, SEQS);
		direct = fetch(r.out, r.out_bytes);
		r.d.scratch = NULL;
		must(km_cuda_fill(gpu, r.out, POISON, r.out_bytes, &err));
		must(km_cuda_graph_launch(gpu, graph, &err));
		replayed = fetch(r.out, r.out_bytes);
		assert_memory_equal(direct, replayed, r.out_bytes);
		for (int s = 0; s < SEQS; s++)
			for (size_t v = 0; v < row && !lengths[i][s]; v++)
				assert_true((replayed[(size_t)s * row + v] & 0x7fff) == 0);
		free(direct);
		free(replayed);
	}
	km_cuda_graph_free(graph);
	rig_close(&r);
}

static void test_decode_graph(void **state)
{
	km_mla_shape shape = k2_shape(8, true);
	km_mla_device d = device();

	(void)state;
	graph_case(false, false);
	if (!km_mla_tensor_fits(&shape, &d))
		return;
	graph_case(true, false);
	graph_case(true, true);
}

/* kv = latents[:, :lora] kv_bᵀ of a wave's tokens, rounded to bf16. */
static uint16_t *rebuild(const rig *r, const uint16_t *latents, int tokens)
{
	const km_mla_shape *s = &r->c.shape;
	int lora = s->kv_lora_rank, width = lora + s->rope_dim,
	    cols = s->heads * (s->nope_dim + s->v_dim);
	uint16_t *kv = km_xreallocarray(NULL, (size_t)tokens * (size_t)cols, 2);
	float *w = km_xreallocarray(NULL, (size_t)cols * (size_t)lora, sizeof(float));

	for (size_t i = 0; i < (size_t)cols * (size_t)lora; i++)
		w[i] = mla_case_bf16(r->c.kv_b[i]);
#pragma omp parallel for
	for (int t = 0; t < tokens; t++) {
		float x[512];

		for (int c = 0; c < lora; c++)
			x[c] = mla_case_bf16(latents[(size_t)t * (size_t)width + (size_t)c]);
		for (int n = 0; n < cols; n++) {
			float lane[16] = { 0 }, sum = 0;

			for (int c = 0; c < lora; c += 16)
				for (int l = 0; l < 16; l++)
					lane[l] += x[c + l] *
					           w[(size_t)n * (size_t)lora + (size_t)(c + l)];
			for (int l = 0; l < 16; l++)
				sum += lane[l];
			kv[(size_t)t * (size_t)cols + (size_t)n] = mla_case_to_bf16(sum);
		}
	}
	free(w);
	return kv;
}

static void run_wave(rig *r, const km_mla_prefill_plan *plan, const km_mla_wave *w, void *kv,
                     bool general)
{
	const km_mla_shape *s = &r->c.shape;
	size_t width = (size_t)(s->kv_lora_rank + s->rope_dim);
	size_t cols = (size_t)(s->heads * (s->nope_dim + s->v_dim));
	uint16_t *latents, *host;
	kk_mla_prefill_args a = {
		.shape = *s,
		.page_size = r->p.cache.page_size,
		.pages_per_seq = r->p.cache.pages_per_seq,
		.scale = r->p.scale,
		.runs = r->p.runs + w->runs_from,
		.tiles = r->p.tiles + w->tiles_from,
		.run_count = w->runs,
		.tile_count = w->tiles,
		.pages = r->p.cache.pages,
		.positions = r->p.positions,
		.cache = r->p.cache.data,
		.latents = r->p.latents,
		.kv = kv,
		.q = r->p.q,
		.state = r->p.state,
		.out = r->p.out,
	};

	(void)plan;
	must(km_cuda_mla_gather(gpu, w, s, &r->p, &err));
	latents = fetch(r->p.latents, (size_t)w->tokens * width * 2);
	host = rebuild(r, latents, w->tokens);
	must(km_cuda_upload(gpu, kv, host, (size_t)w->tokens * cols * 2, &err));
	if (general)
		launched(kk_mla_prefill_general(&a, gpu->stream));
	else
		must(km_cuda_mla_prefill(gpu, w, s, &r->p, &err));
	must(km_cuda_wait(gpu, &err));
	free(latents);
	free(host);
}

/* All waves of a plan for scratch of `room` tokens, from poison. Returns the rows. */
static uint16_t *prefill(rig *r, int room, bool general)
{
	const km_mla_shape *s = &r->c.shape;
	size_t heads = (size_t)s->heads, mark = km_cuda_mark(gpu);
	km_mla_prefill_plan plan = { 0 };
	void *kv = take((size_t)room * heads * (size_t)(s->nope_dim + s->v_dim) * 2);
	uint16_t *got;

	km_mla_prefill_capacity(&plan, r->c.batch.tokens, r->c.batch.seqs, r->c.positions_max,
	                        room);
	plan.runs = km_xcalloc((size_t)plan.max_runs, sizeof(*plan.runs));
	plan.tiles = km_xcalloc((size_t)plan.max_tiles, sizeof(*plan.tiles));
	plan.wave = km_xcalloc((size_t)plan.max_waves, sizeof(*plan.wave));
	must(km_mla_plan_prefill(&plan, &r->c.batch, room, &err));
	r->p.runs = take_copy(plan.runs, (size_t)plan.max_runs * sizeof(*plan.runs));
	r->p.tiles = take_copy(plan.tiles, (size_t)plan.max_tiles * sizeof(*plan.tiles));
	r->p.latents = take((size_t)room * (size_t)(s->kv_lora_rank + s->rope_dim) * 2);
	r->p.kv = kv;
	r->p.state = plan.state
	                     ? take((size_t)r->c.batch.tokens * heads * (size_t)(s->v_dim + 2) * 4)
	                     : NULL;
	must(km_cuda_fill(gpu, r->out, POISON, r->out_bytes, &err));
	for (int i = 0; i < plan.waves; i++)
		run_wave(r, &plan, &plan.wave[i], kv, general);
	got = fetch(r->out, r->out_bytes);
	free(plan.runs);
	free(plan.tiles);
	free(plan.wave);
	km_cuda_rewind(gpu, mark);
	return got;
}

static void prefill_case(const km_mla_shape *shape, const mla_case_step *step)
{
	static const int rooms[] = { 4096, 128, 512, 4096 };
	size_t row = (size_t)(shape->heads * shape->v_dim);
	uint16_t *first = NULL;
	double e = 0, general;
	rig r;

	rig_open(&r, shape, step, (uint64_t)(shape->heads * 7 + step->seqs));
	for (int i = 0; i < (short_run ? 2 : COUNT(rooms)); i++) {
		uint16_t *got = prefill(&r, rooms[i], false);

		e = check_rows(&r, got, step->decode_seqs, r.c.batch.tokens, "prefill");
		assert_true(e <= CASE_BOUND);
		assert_true(untouched(got, (size_t)step->decode_seqs * row));
		if (first)
			assert_memory_equal(first, got, r.out_bytes);
		else
			first = km_xmalloc(r.out_bytes);
		memcpy(first, got, r.out_bytes);
		free(got);
	}
	free(first);
	first = prefill(&r, 256, true);
	general = check_rows(&r, first, step->decode_seqs, r.c.batch.tokens, "prefill, general");
	assert_true(general <= CASE_BOUND);
	free(first);
	printf("figure: prefill, %d sequences, %d rows, %d heads, %s: off by %.4f, general %.4f\n",
	       step->seqs, r.c.batch.tokens, shape->heads, shape->fp8 ? "fp8" : "bf16", e, general);
	rig_close(&r);
}

static void test_prefill(void **state)
{
	static const int none[] = { 0, 0, 0 }, short_rows[] = { 130, 1, 65 };
	static const int past[] = { 50, 300, 7, 0, 640, 128, 1 },
			 rows[] = { 1, 1, 200, 128, 129, 64, 300 };
	static const int long_past[] = { 0 }, long_rows[] = { 1100 };
	km_mla_shape small = { 4, 16, 8, 16, 32, false }, k2 = k2_shape(3, false),
		     fp8 = k2_shape(16, true);
	km_mla_shape one = k2_shape(1, false), all = k2_shape(64, false),
		     odd = { 2, 32, 16, 32, 64, true };

	(void)state;
	prefill_case(&k2, &(mla_case_step){ 3, 0, 16, none, short_rows, 1 });
	if (short_run)
		return;
	prefill_case(&small, &(mla_case_step){ 7, 2, 16, past, rows, 1 });
	prefill_case(&odd, &(mla_case_step){ 7, 2, 16, past, rows, 3 });
	prefill_case(&fp8, &(mla_case_step){ 7, 2, 16, past, rows, 1 });
	prefill_case(&k2, &(mla_case_step){ 7, 1, 5, past, rows, 1 });
	prefill_case(&k2, &(mla_case_step){ 7, 2, 16, past, rows, 17 });
	prefill_case(&one, &(mla_case_step){ 1, 0, 16, long_past, long_rows, 1 });
	prefill_case(&all, &(mla_case_step){ 1, 0, 64, long_past, (const int[]){ 300 }, 1 });
}

/* A step of both kinds: decode rows by decode, the others by prefill, into one array. */
static void test_mixed(void **state)
{
	static const int past[] = { 50, 300, 7, 0 }, rows[] = { 1, 1, 100, 64 };
	mla_case_step step = { 4, 2, 16, past, rows, 1 };
	km_mla_shape shape = k2_shape(8, false);
	km_mla_decode_plan plan;
	uint16_t *got;
	rig r;

	(void)state;
	rig_open(&r, &shape, &step, 23);
	free(prefill(&r, 512, false));
	plan = plan_of(&r, 2);
	decode(&r, &plan, 2);
	got = fetch(r.out, r.out_bytes);
	assert_true(check_rows(&r, got, 0, r.c.batch.tokens, "mixed") <= CASE_BOUND);
	free(got);
	rig_close(&r);
}

/* What the CPU writes to the cache, as f32, and its rotated queries. */
typedef struct kv_case {
	int tokens, heads, nope, rope, lora, stride, slots;
	float *kv_a, *norm, *cos_sin, *cache;
	uint16_t *q;
	float *q_want;
	int32_t *positions, *slot;
} kv_case;

enum { POSITIONS = 300 };

static float *normals(size_t count, uint64_t seed)
{
	float *f = km_xreallocarray(NULL, count, sizeof(*f));

	for (size_t i = 0; i < count; i++)
		f[i] = km_rng_normal(seed, i);
	return f;
}

static void kv_case_init(kv_case *c, int tokens, int heads, int nope, int rope, int lora)
{
	size_t q_count = (size_t)(tokens * heads * (nope + rope));

	*c = (kv_case){ .tokens = tokens, .heads = heads, .nope = nope, .rope = rope, .lora = lora,
		        .stride = lora + rope + 12, .slots = 2 * tokens + 3 };
	c->kv_a = normals((size_t)(tokens * c->stride), 1);
	c->norm = normals((size_t)lora, 2);
	c->cos_sin = normals((size_t)(POSITIONS * rope), 3);
	c->q = km_xmalloc(q_count * 2);
	c->q_want = normals(q_count, 4);
	for (size_t i = 0; i < q_count; i++) {
		c->q[i] = mla_case_to_bf16(c->q_want[i]);
		c->q_want[i] = mla_case_bf16(c->q[i]);
	}
	c->positions = km_xcalloc((size_t)tokens, 4);
	c->slot = km_xcalloc((size_t)tokens, 4);
	for (int t = 0; t < tokens; t++) {
		c->positions[t] = (int)(km_rng_u64(5, (uint64_t)t) % POSITIONS);
		c->slot[t] = t % 5 == 4 ? -1 : 2 * (tokens - t);
	}
	c->cache = km_xcalloc((size_t)(c->slots * (lora + rope)), sizeof(float));
}

static void kv_case_solve(kv_case *c)
{
	const km_ops *ops = km_cpu_ops("plain");
	float *latent = km_xmalloc((size_t)(c->tokens * c->lora) * 4);
	int key = c->nope + c->rope;
	km_rmsnorm_args norm = { c->tokens, c->lora, c->kv_a, c->stride, NULL,
		                 c->norm,   1e-5f,   latent,  c->lora };
	km_rope_args k = { c->tokens, 1, c->rope,      c->kv_a + c->lora,
		           c->stride, 0, c->positions, c->cos_sin };
	km_rope_args q = { c->tokens, c->heads, c->rope, c->q_want + c->nope, c->heads * key, key,
		           c->positions, c->cos_sin };

	ops->rmsnorm(&norm);
	ops->rope(&k);
	ops->rope(&q);
	for (int t = 0; t < c->tokens; t++) {
		float *to = c->cache +
		            (size_t)(c->slot[t] < 0 ? 0 : c->slot[t]) * (size_t)(c->lora + c->rope);

		if (c->slot[t] < 0)
			continue;
		memcpy(to, latent + t * c->lora, (size_t)c->lora * 4);
		memcpy(to + c->lora, c->kv_a + t * c->stride + c->lora, (size_t)c->rope * 4);
	}
	free(latent);
}

static void kv_case_release(kv_case *c)
{
	free(c->kv_a);
	free(c->norm);
	free(c->cos_sin);
	free(c->cache);
	free(c->q);
	free(c->q_want);
	free(c->positions);
	free(c->slot);
}

static void check_cache(const kv_case *c, const void *got, bool fp8)
{
	size_t width = (size_t)(c->lora + c->rope), bytes = width * (fp8 ? 1 : 2);
	bool *written = km_xcalloc((size_t)c->slots, sizeof(bool));

	for (int t = 0; t < c->tokens; t++)
		if (c->slot[t] >= 0)
			written[c->slot[t]] = true;
	for (int s = 0; s < c->slots; s++)
		for (size_t i = 0; i < width; i++) {
			size_t at = (size_t)s * width + i;
			float g = fp8 ? km_f8_e4m3_to_f32(((const uint8_t *)got)[at])
			              : mla_case_bf16(((const uint16_t *)got)[at]);

			if (!written[s]) {
				for (size_t b = 0; b < bytes; b++)
					assert_int_equal(
						((const uint8_t *)got)[(size_t)s * bytes + b],
						POISON);
				break;
			}
			/* half a step of the type, and a little for sums in another order */
			if (!(fabsf(g - c->cache[at]) <=
			      fabsf(c->cache[at]) * (fp8 ? 0.064f : 0.0040f) +
			              (fp8 ? 0.00099f : 1e-6f)))
				fail_msg("slot %d, column %zu: %g, not %g", s, i, (double)g,
				         (double)c->cache[at]);
		}
	free(written);
}

static void check_queries(const kv_case *c, const uint16_t *got, int q_from)
{
	int key = c->nope + c->rope;

	for (int i = 0; i < c->tokens * c->heads * key; i++) {
		int row = i / key / c->heads;

		if (row < q_from || i % key < c->nope)
			assert_int_equal(got[i], c->q[i]);
		else if (!(fabsf(mla_case_bf16(got[i]) - c->q_want[i]) <=
		           fabsf(c->q_want[i]) * 0.004f + 1e-6f))
			fail_msg("row %d, value %d: %g, not %g", row, i % key,
			         (double)mla_case_bf16(got[i]), (double)c->q_want[i]);
	}
}

static void rope_kv_case(int tokens, int q_from, int heads, int nope, int rope, int lora, bool fp8)
{
	size_t mark = km_cuda_mark(gpu), q_bytes, cache_bytes;
	kk_rope_kv_args a;
	void *q, *cache;
	kv_case c;

	kv_case_init(&c, tokens, heads, nope, rope, lora);
	q_bytes = (size_t)(tokens * heads * (nope + rope)) * 2;
	cache_bytes = (size_t)(c.slots * (lora + rope)) * (fp8 ? 1 : 2);
	a = (kk_rope_kv_args){
		.tokens = tokens,
		.q_from = q_from,
		.heads = heads,
		.nope_dim = nope,
		.rope_dim = rope,
		.kv_lora_rank = lora,
		.q = take_copy(c.q, q_bytes),
		.kv_a = take_copy(c.kv_a, (size_t)(tokens * c.stride) * 4),
		.kv_a_stride = c.stride,
		.norm = take_copy(c.norm, (size_t)lora * 4),
		.eps = 1e-5f,
		.cos_sin = take_copy(c.cos_sin, (size_t)(POSITIONS * rope) * 4),
		.positions = take_copy(c.positions, (size_t)tokens * 4),
		.slots = take_copy(c.slot, (size_t)tokens * 4),
		.cache = take(cache_bytes),
		.fp8 = fp8,
		.pdl = true,
	};
	kv_case_solve(&c);
	launched(kk_rope_kv(&a, gpu->stream));
	q = fetch(a.q, q_bytes);
	cache = fetch(a.cache, cache_bytes);
	check_cache(&c, cache, fp8);
	check_queries(&c, q, q_from);
	free(q);
	free(cache);
	kv_case_release(&c);
	km_cuda_rewind(gpu, mark);
}

static void test_rope_kv(void **state)
{
	(void)state;
	rope_kv_case(1, 1, 8, 128, 64, 512, false);
	rope_kv_case(9, 3, 3, 128, 64, 512, true);
	rope_kv_case(5, 0, 4, 16, 8, 32, false);
	if (short_run)
		return;
	rope_kv_case(70, 0, 64, 128, 64, 512, false);
	rope_kv_case(70, 70, 64, 128, 64, 512, true);
	rope_kv_case(33, 5, 16, 16, 32, 128, true);
	rope_kv_case(6, 2, 1, 32, 16, 64, true);
}

/* Shapes that nothing was built for are refused, not run. */
static void test_refused(void **state)
{
	km_mla_shape shape = k2_shape(4, false);
	km_mla_decode_plan plan = { true, 1, 1, false };
	km_mla_decode_buffers none = { .cache = { .page_size = 16 } };

	(void)state;
	shape.kv_lora_rank = 256;
	assert_int_equal(km_cuda_mla_decode(gpu, &plan, &shape, 1, &none, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "kv_lora_rank 256"));
	shape = k2_shape(4, false);
	plan.v_blocks = 3;
	plan.splits = 0;
	assert_int_equal(km_cuda_mla_decode(gpu, &plan, &shape, 1, &none, &err), KM_EUNSUPPORTED);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_rope_kv), cmocka_unit_test(test_decode_small),
		cmocka_unit_test(test_decode), cmocka_unit_test(test_decode_alone),
		cmocka_unit_test(test_decode_rows),
		cmocka_unit_test(test_decode_graph), cmocka_unit_test(test_prefill),
		cmocka_unit_test(test_mixed), cmocka_unit_test(test_refused),
	};
	int failed;

	short_run = argc > 1 && strcmp(argv[1], "short") == 0;
	if (argc > 2)
		cmocka_set_test_filter(argv[2]);
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	must(km_cuda_open(&gpu, 0, (size_t)1 << 30, &err));
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	km_cuda_close(gpu);
	return failed;
}
