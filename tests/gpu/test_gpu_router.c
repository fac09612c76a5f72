/*
 * The router's kernels on a GPU, against double precision (model/router_check.h) and against the CPU op.
 *
 * Logits: random, tied, constant, huge, tiny, broken (NaN and -inf); biases of both signs, -inf among
 * them; outputs poisoned before each launch. Each form of the gate sees at least 10,000 random rows.
 *
 * `test_gpu_router short` is for runs under a sanitizer: every kernel over few rows, then 1,000 replays
 * of each form's graphs, and no cuBLASLt. There each buffer is an allocation of its own, not a piece of
 * the arena, so that memcheck sees its ends, and is not poisoned, so that initcheck sees what a kernel
 * reads before anything wrote it. There too, several replays are in flight at once, each on a stream and
 * in buffers of its own: racecheck takes 60 to 1,000 ms for a launch, two to three times that for eight.
 * `test_gpu_router few` is short with a hundredth of the replays. A second argument is a pattern of
 * tests' names; `test_gpu_router forms` prints the names of those that replay, half of a form's each.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_blas.h"
#include "device/op.h"
#include "format/dtype.h"
#include "model/router.h"
#include "model/router_check.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

static bool short_run, few, blas;
static km_cuda *gpu;
static km_err err;

static void must(int rc)
{
	if (rc < 0)
		fail_msg("%s", err.msg);
}

enum { HIDDEN = 7168, MAX_TOKENS = 4096, POISON = 0xff, FLIGHTS = 8, MAX_PIECES = 16 * (FLIGHTS + 1) };

static void *pieces[MAX_PIECES]; /* of a short run */
static size_t piece_count;

static km_cuda *streams[FLIGHTS]; /* of the replays in flight; the first is `gpu` */
static int flight_count;

static void *take(size_t bytes)
{
	void *p = NULL;

	if (short_run) {
		assert_true(piece_count < MAX_PIECES);
		assert_int_equal(cudaMalloc(&p, bytes ? bytes : 1), cudaSuccess);
		pieces[piece_count++] = p;
		return p;
	}
	must(km_cuda_take(gpu, &p, bytes, "test", &err));
	must(km_cuda_fill(gpu, p, POISON, bytes, &err));
	return p;
}

static size_t mark_pieces(void)
{
	return short_run ? piece_count : km_cuda_mark(gpu);
}

static void free_pieces(size_t mark)
{
	if (!short_run) {
		km_cuda_rewind(gpu, mark);
		return;
	}
	must(km_cuda_wait(gpu, &err));
	while (piece_count > mark)
		assert_int_equal(cudaFree(pieces[--piece_count]), cudaSuccess);
}

static void *take_copy(const void *from, size_t bytes)
{
	void *p = take(bytes);

	must(km_cuda_upload(gpu, p, from, bytes, &err));
	return p;
}

enum logits_kind { RANDOM, TIED, CONSTANT, HUGE_LOGITS, TINY, BROKEN, KINDS };

static const char *const kind_names[] = { "random", "tied", "constant", "huge", "tiny", "broken" };

static float logit_of(enum logits_kind kind, uint64_t seed, uint64_t i, int token)
{
	float v = km_rng_normal(seed, i);

	switch (kind) {
	case TIED:
		return floorf(v * 3) / 4;
	case CONSTANT:
		return (float)(token % 5) - 2;
	case HUGE_LOGITS:
		return v * 25;
	case TINY:
		return v * 1e-4f;
	case BROKEN:
		if (token % 4 == 0 || (token % 4 == 1 && i % 3 == 0))
			return NAN;
		return token % 4 == 2 || i % 2 ? -INFINITY : v;
	default:
		return v * 2;
	}
}

static float *make_logits(enum logits_kind kind, int tokens, int experts, uint64_t seed)
{
	float *x = km_xmalloc((size_t)tokens * (size_t)experts * sizeof(float));

	for (int i = 0; i < tokens * experts; i++)
		x[i] = logit_of(kind, seed, (uint64_t)i, i / experts);
	return x;
}

/* 0: none; 1: both signs; 2: -inf but for four experts; 3: large */
static float *make_bias(int kind, int experts)
{
	float *b = km_xmalloc((size_t)experts * sizeof(float));

	for (int e = 0; e < experts; e++) {
		float v = km_rng_normal(77, (uint64_t)e);

		b[e] = kind == 2 ? (e % (experts / 4) == 1 ? v : -INFINITY) : kind == 3 ? v * 40 : v * 0.5f;
	}
	return b;
}

/* A shape's buffers on the GPU, and what comes back. */
typedef struct rig {
	km_router_shape shape;
	km_router_buffers b;
	int32_t *ids, *sorted, *block_expert;
	float *weights, *logits;
} rig;

static void rig_open(rig *r, const km_router_shape *shape)
{
	size_t places = (size_t)shape->tokens * (size_t)shape->top_k;
	size_t capacity = (size_t)km_cuda_router_capacity(shape);

	memset(r, 0, sizeof(*r));
	r->shape = *shape;
	r->b.logits = take((size_t)shape->tokens * (size_t)shape->experts * 4);
	r->b.ids = take(places * 4);
	r->b.weights = take(places * 4);
	r->b.sorted = take(capacity * 4);
	r->b.block_expert = take(capacity / (size_t)shape->block * 4);
	r->b.total = take(4);
	r->b.scratch = take(km_cuda_router_scratch_bytes(shape));
	must(km_cuda_fill(gpu, r->b.scratch, 0, km_cuda_router_scratch_bytes(shape), &err));
	r->ids = km_xmalloc(places * 4);
	r->weights = km_xmalloc(places * 4);
	r->sorted = km_xmalloc(capacity * 4);
	r->block_expert = km_xmalloc(capacity * 4);
	r->logits = km_xmalloc((size_t)shape->tokens * (size_t)shape->experts * 4);
}

static void rig_close(rig *r)
{
	free(r->ids);
	free(r->weights);
	free(r->sorted);
	free(r->block_expert);
	free(r->logits);
}

static void rig_poison(rig *r)
{
	size_t places = (size_t)r->shape.tokens * (size_t)r->shape.top_k;

	must(km_cuda_fill(gpu, r->b.ids, POISON, places * 4, &err));
	must(km_cuda_fill(gpu, r->b.weights, POISON, places * 4, &err));
	must(km_cuda_fill(gpu, r->b.sorted, POISON, (size_t)km_cuda_router_capacity(&r->shape) * 4, &err));
}

static void rig_fetch_gate(rig *r)
{
	size_t places = (size_t)r->shape.tokens * (size_t)r->shape.top_k;

	must(km_cuda_download(gpu, r->ids, r->b.ids, places * 4, &err));
	must(km_cuda_download(gpu, r->weights, r->b.weights, places * 4, &err));
}

static void rig_check_align(rig *r)
{
	int total = -1;

	must(km_cuda_download(gpu, &total, r->b.total, 4, &err));
	assert_in_range(total, 0, km_cuda_router_capacity(&r->shape));
	if (total) {
		must(km_cuda_download(gpu, r->sorted, r->b.sorted, (size_t)total * 4, &err));
		must(km_cuda_download(gpu, r->block_expert, r->b.block_expert,
		                      (size_t)(total / r->shape.block) * 4, &err));
	}
	must(km_router_check_align(&r->shape, r->ids, r->sorted, r->block_expert, total, &err));
}

static km_router_plan plan_for(const km_router_shape *shape, bool pdl)
{
	const km_cuda_info *info = km_cuda_info_of(gpu);
	km_router_device device = { info->capability, info->multiprocessors, blas,
		                    pdl && info->capability >= 90 };
	km_router_plan plan;

	must(km_router_plan_make(&plan, shape, &device, &err));
	return plan;
}

typedef struct gate_form {
	const char *name;
	enum km_router_part part;
	enum km_router_gate gate;
	int warps, blocks; /* the alignment's form takes only warps; 0: the plan's */
} gate_form;

static void check_gate_case(const gate_form *form, const km_router_shape *shape, enum logits_kind kind,
                            int bias_kind, uint64_t seed, km_router_check *check)
{
	size_t mark = mark_pieces();
	float *logits = make_logits(kind, shape->tokens, shape->experts, 5 + (uint64_t)bias_kind + 4 * seed);
	float *bias = make_bias(bias_kind, shape->experts);
	km_router_plan plan = plan_for(shape, bias_kind % 2);
	int32_t *map = km_xmalloc((size_t)shape->experts * 4);
	int32_t valid = shape->tokens - shape->tokens / 7;
	bool mapped = bias_kind == 3;
	rig r;

	for (int e = 0; e < shape->experts; e++)
		map[e] = e % 3 == 1 ? -1 : shape->experts - 1 - e;
	rig_open(&r, shape);
	must(km_cuda_upload(gpu, r.b.logits, logits, (size_t)shape->tokens * (size_t)shape->experts * 4, &err));
	if (bias_kind)
		r.b.bias = take_copy(bias, (size_t)shape->experts * 4);
	if (mapped)
		r.b.expert_map = take_copy(map, (size_t)shape->experts * 4);
	r.b.valid = take_copy(&valid, 4);
	plan.gate = form->gate;
	plan.gate_warps = form->warps;
	plan.fused_warps = form->warps ? form->warps : plan.fused_warps;
	plan.gate_blocks = form->blocks;
	must(km_cuda_router_run(gpu, form->part, &plan, shape, &r.b, &err));
	rig_fetch_gate(&r);
	if (km_router_check_gate(check, shape, logits, bias_kind ? bias : NULL, mapped ? map : NULL, valid,
	                         r.ids, r.weights, &err) < 0)
		fail_msg("%s, %s logits, bias %d, %d tokens, %d experts, top %d: %s", form->name,
		         kind_names[kind], bias_kind, shape->tokens, shape->experts, shape->top_k, err.msg);
	if (form->part == KM_PART_GATE_ALIGN)
		rig_check_align(&r);
	rig_close(&r);
	free(logits);
	free(bias);
	free(map);
	free_pieces(mark);
}

static void sweep_gate(const gate_form *form, km_router_shape shape, int cases)
{
	km_router_check check = { 0 };
	int tokens = shape.tokens; /* of random logits; fewer rows of the other kinds */

	for (int kind = 0; kind < KINDS; kind++)
		for (int bias = 0; bias < 4; bias++)
			for (int i = 0; i < (kind == RANDOM ? cases : (cases + 4) / 5); i++) {
				if (short_run && bias != kind % 4)
					continue;
				shape.tokens = kind == RANDOM || tokens < 1000 ? tokens : tokens / 5;
				check_gate_case(form, &shape, (enum logits_kind)kind, bias, (uint64_t)i, &check);
			}
	printf("figure: %s, E %d, top %d%s%s: %lld rows, %lld near ties, worst weight error %.1e\n",
	       form->name, shape.experts, shape.top_k, shape.softmax ? ", softmax" : "",
	       shape.groups > 1 ? ", groups" : "", (long long)check.rows, (long long)check.near_ties,
	       check.worst_weight);
}

static km_router_shape k2_shape(int tokens)
{
	return (km_router_shape){ .tokens = tokens, .experts = 384, .hidden = HIDDEN, .top_k = 8,
		                  .groups = 1, .topk_group = 1, .block = 8, .renormalize = true,
		                  .scale = 2.827f };
}

static void test_gate_onepass(void **state)
{
	static const gate_form forms[] = {
		{ "one pass, 1 row a block", KM_PART_GATE, KM_GATE_ONEPASS, 1, 1 << 20 },
		{ "one pass, 8 rows a block, 40 blocks", KM_PART_GATE, KM_GATE_ONEPASS, 8, 40 },
	};
	km_router_shape s = k2_shape(short_run ? 45 : 3001);

	(void)state;
	for (int f = 0; f < COUNT(forms); f++)
		for (int v = 0; v < 4; v++) {
			s.experts = v & 1 ? 256 : 384;
			s.softmax = v & 2;
			s.top_k = v == 3 ? 5 : 8;
			s.renormalize = v != 2;
			sweep_gate(&forms[f], s, 1);
		}
	s.tokens = short_run ? 21 : 2501;
	for (int v = 0; v < 8; v++) {
		s.experts = v < 4 ? 256 : v < 6 ? 512 : 128;
		s.groups = v < 4 ? 8 : 1;
		s.topk_group = v == 0 ? 1 : v == 1 ? 2 : 4;
		s.top_k = v == 4 ? 16 : v == 5 ? 10 : v == 2 ? 5 : 8;
		s.softmax = v % 2;
		sweep_gate(&forms[v % 2], s, 1);
	}
}

static void test_gate_rounds(void **state)
{
	static const gate_form form = { "by rounds", KM_PART_GATE, KM_GATE_ROUNDS, 1, 1 };
	static const struct {
		int experts, top_k, groups, topk_group;
		bool softmax;
	} shapes[] = { { 384, 8, 1, 1, false }, { 256, 8, 8, 4, false }, { 512, 10, 1, 1, true },
		       { 1024, 32, 1, 1, false }, { 7, 3, 1, 1, false }, { 160, 6, 8, 3, true },
		       { 64, 6, 1, 1, false }, { 1000, 31, 20, 5, false }, { 128, 1, 1, 1, true } };
	km_router_shape s = k2_shape(short_run ? 13 : 2501);

	(void)state;
	for (int i = 0; i < COUNT(shapes); i++) {
		s.experts = shapes[i].experts;
		s.top_k = shapes[i].top_k;
		s.groups = shapes[i].groups;
		s.topk_group = shapes[i].topk_group;
		s.softmax = shapes[i].softmax;
		sweep_gate(&form, s, 1);
	}
}

static void test_gate_align(void **state)
{
	gate_form form = { "gate and alignment", KM_PART_GATE_ALIGN, KM_GATE_ONEPASS, 0, 1 };
	static const int tokens[] = { 1, 2, 7, 8, 9, 16, 33, 63, 64 };

	(void)state;
	for (int i = 0; i < COUNT(tokens); i++)
		for (int v = 0; v < 4; v++) {
			km_router_shape s = k2_shape(tokens[i]);

			if (short_run && (i % 4 != v || i == 3 || i == 7))
				continue;
			s.experts = v & 1 ? 256 : 384;
			s.softmax = v & 2;
			s.block = v == 1 ? 64 : v == 2 ? 48 : 8;
			form.warps = 0;
			sweep_gate(&form, s, short_run ? 1 : tokens[i] == 64 ? 45 : 1);
			form.warps = v == 3 ? 8 : 16;
			if (!short_run || tokens[i] > 16)
				sweep_gate(&form, s, !short_run && tokens[i] == 16 ? 180 : 1);
		}
}

/* The same ids as the CPU op, but for experts that f32 cannot tell apart. */
static void test_same_as_cpu_op(void **state)
{
	km_router_shape s = k2_shape(short_run ? 100 : MAX_TOKENS);
	float *logits = make_logits(RANDOM, s.tokens, s.experts, 9), *bias = make_bias(1, s.experts);
	size_t places = (size_t)s.tokens * (size_t)s.top_k, mark = mark_pieces(), other = 0;
	int32_t *ids = km_xmalloc(places * 4);
	float *weights = km_xmalloc(places * 4);
	km_gate_args cpu = { .tokens = s.tokens, .experts = s.experts, .top_k = s.top_k, .groups = 1,
		             .topk_group = 1, .renormalize = true, .logits = logits, .bias = bias,
		             .ids = ids, .weights = weights };
	km_router_plan plan = plan_for(&s, true);
	rig r;

	(void)state;
	km_cpu_ops(NULL)->gate(&cpu);
	rig_open(&r, &s);
	must(km_cuda_upload(gpu, r.b.logits, logits, (size_t)s.tokens * (size_t)s.experts * 4, &err));
	r.b.bias = take_copy(bias, (size_t)s.experts * 4);
	must(km_cuda_router_run(gpu, KM_PART_GATE, &plan, &s, &r.b, &err));
	rig_fetch_gate(&r);
	for (size_t i = 0; i < places; i++)
		other += r.ids[i] != ids[i];
	printf("figure: %zu of %zu places differ from the CPU op\n", other, places);
	assert_true(other <= places / 1000);
	rig_close(&r);
	free(logits);
	free(bias);
	free(ids);
	free(weights);
	free_pieces(mark);
}

static uint16_t *make_bf16(size_t count, uint64_t seed, float scale)
{
	uint16_t *v = km_xmalloc(count * 2);

	for (size_t i = 0; i < count; i++)
		v[i] = km_f32_to_bf16(km_rng_normal(seed, i) * scale);
	return v;
}

/* The router's weights are the same in every test: made once, [512, HIDDEN] and a little more. */
static uint16_t *router_weights(void)
{
	static uint16_t *w;

	if (!w)
		w = make_bf16((size_t)1024 * 4096, 4, 0.03f);
	return w;
}

/* Router GEMM of a form, with its tokens' rows checked. */
static void check_gemm(km_router_shape s, const km_router_plan *form, bool pdl, km_router_check *check)
{
	size_t mark = mark_pieces(), weights = (size_t)s.experts * (size_t)s.hidden;
	uint16_t *x = make_bf16((size_t)s.tokens * (size_t)s.hidden, 3, 1.0f);
	uint16_t *w = router_weights();
	float *w32 = km_xmalloc(weights * 4);
	km_router_plan plan = plan_for(&s, pdl);
	rig r;

	for (size_t i = 0; i < weights && s.weights_f32; i++)
		w32[i] = km_rng_normal(4, i) * 0.03f;
	rig_open(&r, &s);
	r.b.x = take_copy(x, (size_t)s.tokens * (size_t)s.hidden * 2);
	r.b.w = s.weights_f32 ? take_copy(w32, weights * 4) : take_copy(w, weights * 2);
	plan.gemm = form->gemm;
	plan.split = form->split;
	plan.split_tokens = form->split_tokens;
	plan.split_experts = form->split_experts;
	must(km_cuda_router_run(gpu, KM_PART_GEMM, &plan, &s, &r.b, &err));
	must(km_cuda_download(gpu, r.logits, r.b.logits, (size_t)s.tokens * (size_t)s.experts * 4, &err));
	if (km_router_check_logits(check, &s, x, s.weights_f32 ? (const void *)w32 : w, r.logits, 0,
	                           s.tokens > 8 ? s.tokens / 5 : 1, &err) < 0)
		fail_msg("%d tokens, %d experts, hidden %d: %s", s.tokens, s.experts, s.hidden, err.msg);
	rig_close(&r);
	free(x);
	free(w32);
	free_pieces(mark);
}

static void test_gemm_resident(void **state)
{
	static const int experts[] = { 384, 256, 512, 160, 8 }, tokens[] = { 1, 5, 8, 9, 16, 17, 33, 64, 65, 130 };
	const km_router_plan form = { .gemm = KM_GEMM_RESIDENT };
	km_router_check check = { 0 };

	(void)state;
	for (int e = 0; e < COUNT(experts); e++)
		for (int t = 0; t < COUNT(tokens) && (e == 0 || !short_run || t < 2); t++) {
			km_router_shape s = k2_shape(tokens[t]);

			s.experts = experts[e];
			s.top_k = experts[e] < 8 ? 1 : 8;
			check_gemm(s, &form, t % 2, &check);
		}
	printf("figure: resident GEMM: worst logit error %.1e of the products' sizes\n", check.worst_logit);
}

static void test_gemm_split(void **state)
{
	static const int experts[] = { 384, 256, 512, 160, 8 }, tokens[] = { 1, 16, 33, 64, 65, 130, 300 };
	static const km_router_plan forms[] = {
		{ .gemm = KM_GEMM_SPLIT, .split = 16, .split_tokens = 64, .split_experts = 32 },
		{ .gemm = KM_GEMM_SPLIT, .split = 16, .split_tokens = 64, .split_experts = 48 },
		{ .gemm = KM_GEMM_SPLIT, .split = 16, .split_tokens = 64, .split_experts = 64 },
		{ .gemm = KM_GEMM_SPLIT, .split = 16, .split_tokens = 128, .split_experts = 64 },
	};
	km_router_check check = { 0 };

	(void)state;
	if (km_cuda_info_of(gpu)->capability != 90) {
		printf("skip: the split GEMM is for capability 9.0\n");
		skip();
	}
	for (int f = 0; f < COUNT(forms); f++)
		for (int e = 0; e < COUNT(experts); e++)
			for (int t = 0; t < COUNT(tokens) && (!short_run || t == (f + e) % COUNT(tokens)); t++) {
				km_router_shape s = k2_shape(tokens[t]);

				s.experts = experts[e];
				if (e == 0 || short_run || t == f)
					check_gemm(s, &forms[f], t % 2, &check);
			}
	printf("figure: split GEMM: worst logit error %.1e of the products' sizes\n", check.worst_logit);
}

/* Parts, then their sums: every number of tiles, ragged ones, both widths. */
static void test_gemm_parts(void **state)
{
	static const int experts[] = { 384, 256, 160, 8 }, tokens[] = { 256, 129, 200, 1, 128 };
	static const km_router_plan form = { .gemm = KM_GEMM_PARTS };
	km_router_check check = { 0 };

	(void)state;
	if (km_cuda_info_of(gpu)->capability != 90) {
		printf("skip: the GEMM in parts is for capability 9.0\n");
		skip();
	}
	for (int e = 0; e < COUNT(experts); e++)
		for (int t = 0; t < COUNT(tokens); t++) {
			km_router_shape s = k2_shape(tokens[t]);

			s.experts = experts[e];
			if (!short_run || e == t % COUNT(experts))
				check_gemm(s, &form, t % 2, &check);
		}
	printf("figure: GEMM in parts: worst logit error %.1e of the products' sizes\n", check.worst_logit);
}

static void test_gemm_general(void **state)
{
	const km_router_plan form = { .gemm = KM_GEMM_GENERAL };
	static const struct {
		int tokens, experts, hidden;
		bool f32;
	} shapes[] = { { 1, 384, 7168, false }, { 13, 384, 7168, true }, { 3, 7, 8, false },
		       { 17, 33, 1000, true }, { 8, 1024, 4096, false } };
	km_router_check check = { 0 };

	(void)state;
	for (int i = 0; i < COUNT(shapes); i++) {
		km_router_shape s = k2_shape(shapes[i].tokens);

		s.experts = shapes[i].experts;
		s.top_k = 1;
		s.hidden = shapes[i].hidden;
		s.weights_f32 = shapes[i].f32;
		check_gemm(s, &form, i % 2, &check);
	}
	printf("figure: general GEMM: worst logit error %.1e of the products' sizes\n", check.worst_logit);
}

static void test_gemm_blas(void **state)
{
	const km_router_plan form = { .gemm = KM_GEMM_BLAS };
	km_router_check check = { 0 };

	(void)state;
	if (!blas) {
		printf("skip: %s\n", short_run ? "cuBLASLt is not ours to check" : err.msg);
		skip();
	}
	check_gemm(k2_shape(129), &form, true, &check);
	check_gemm(k2_shape(1000), &form, false, &check);
	printf("figure: cuBLASLt: worst logit error %.1e of the products' sizes\n", check.worst_logit);
}

/* The alignment alone, ids of any kind among them, few and many. */
static void test_align(void **state)
{
	static const struct {
		int tokens, top_k, experts, block;
	} shapes[] = { { 1, 8, 384, 8 }, { 2, 8, 384, 64 }, { 4, 8, 384, 5 }, { 8, 8, 256, 16 },
		       { 9, 8, 384, 8 }, { 64, 8, 384, 8 }, { 64, 8, 384, 128 }, { 64, 32, 1024, 16 },
		       { 65, 8, 384, 8 }, { 100, 10, 512, 16 }, { 300, 8, 384, 8 }, { 260, 7, 384, 64 },
		       { 1000, 8, 48, 48 }, { 513, 8, 700, 1 }, { 777, 3, 1, 32 }, { 4096, 8, 384, 64 },
		       { 40000, 8, 384, 64 } };

	(void)state;
	for (int i = 0; i < COUNT(shapes) - (short_run ? 2 : 0); i++)
		for (int skew = 0; skew < 3; skew++) {
			km_router_shape s = { .tokens = shapes[i].tokens, .experts = shapes[i].experts,
				              .hidden = 8, .top_k = shapes[i].top_k,
				              .block = shapes[i].block, .scale = 1 };
			size_t mark = mark_pieces();
			km_router_plan plan = { .pdl = skew == 1, .gate_pdl = skew == 1 };
			rig r;

			rig_open(&r, &s);
			for (int p = 0; p < s.tokens * s.top_k; p++) {
				uint64_t v = km_rng_u64(11 + (uint64_t)skew, (uint64_t)p);
				int range = skew == 0 ? s.experts : skew == 1 ? s.experts + 5 : 3;

				r.ids[p] = (int32_t)(v % (uint64_t)range) - (skew == 1 ? 3 : 0);
			}
			must(km_cuda_upload(gpu, r.b.ids, r.ids, (size_t)s.tokens * (size_t)s.top_k * 4, &err));
			must(km_cuda_router_run(gpu, KM_PART_ALIGN, &plan, &s, &r.b, &err));
			rig_check_align(&r);
			rig_close(&r);
			free_pieces(mark);
		}
}

/* One launch from hidden state to sorted experts: its logits, its gate over those, its alignment. */
static void test_one_launch(void **state)
{
	static const int tokens[] = { 1, 3, 8, 9, 16, 40, 64 };
	km_router_check check = { 0 };

	(void)state;
	for (int i = 0; i < COUNT(tokens); i++)
		for (int v = short_run ? i % 4 : 0; v < (short_run ? i % 4 + 1 : 4); v++) {
			km_router_shape s = k2_shape(tokens[i]);
			size_t mark = mark_pieces(), n;
			int32_t valid = s.tokens - s.tokens / 5;
			km_router_plan plan;
			uint16_t *x, *w;
			float *bias;
			rig r;

			s.experts = v & 1 ? 256 : 384;
			s.softmax = v == 3;
			n = (size_t)s.tokens * (size_t)s.experts;
			plan = plan_for(&s, v & 2);
			x = make_bf16((size_t)s.tokens * HIDDEN, 41 + (uint64_t)i, 1.0f);
			w = router_weights();
			bias = make_bias(1, s.experts);
			rig_open(&r, &s);
			r.b.x = take_copy(x, (size_t)s.tokens * HIDDEN * 2);
			r.b.w = take_copy(w, (size_t)s.experts * HIDDEN * 2);
			r.b.bias = take_copy(bias, (size_t)s.experts * 4);
			r.b.valid = take_copy(&valid, 4);
			for (int align = 0; align < 2; align++) {
				rig_poison(&r);
				must(km_cuda_router_run(gpu, align ? KM_PART_ONE_LAUNCH : KM_PART_ROUTER_GATE,
				                        &plan, &s, &r.b, &err));
				must(km_cuda_download(gpu, r.logits, r.b.logits, n * 4, &err));
				rig_fetch_gate(&r);
				must(km_router_check_logits(&check, &s, x, w, r.logits, 0,
				                            s.tokens > 4 ? s.tokens / 4 : 1, &err));
				must(km_router_check_gate(&check, &s, r.logits, bias, NULL, valid, r.ids,
				                          r.weights, &err));
				if (align)
					rig_check_align(&r);
			}
			rig_close(&r);
			free(x);
			free(bias);
			free_pieces(mark);
		}
	printf("figure: one launch: worst logit error %.1e, worst weight error %.1e\n", check.worst_logit,
	       check.worst_weight);
}

/*
 * Graphs: every form captured for each of its buckets of tokens, with and without overlap, and replayed
 * with inputs, and numbers of rows that count, that change between replays: 500 replays of each of the two,
 * a test each.
 */
typedef struct replay_case {
	const char *name;
	enum km_router_part part;
	int tokens[4], replays[4]; /* buckets, and how often each is replayed */
	int experts, top_k, hidden;
	int gemm, gate; /* -1: the plan's */
	int split_tokens, split_experts;
	bool softmax, f32;
	int groups; /* 0: none; else tokens choose from four */
} replay_case;

/* What takes longest under racecheck first. The split product of 128 x 64 is in two. */
static const replay_case replay_cases[] = {
	{ "replays of split, 128 x 64", KM_PART_GEMM, { 9 }, { 250 }, 8, 8, 7168, KM_GEMM_SPLIT, -1, 128, 64, false, false, 0 },
	{ "replays of split, 128 x 64, one token", KM_PART_GEMM, { 1 }, { 250 }, 8, 8, 7168, KM_GEMM_SPLIT, -1, 128, 64, false, false, 0 },
	{ "replays of parts, 64", KM_PART_GEMM, { 9, 130 }, { 490, 10 }, 8, 8, 7168, KM_GEMM_PARTS, -1, 0, 0, false, false, 0 },
	{ "replays of parts, 96", KM_PART_GEMM, { 9, 130 }, { 490, 10 }, 264, 8, 7168, KM_GEMM_PARTS, -1, 0, 0, false, false, 0 },
	{ "replays of split, 64 x 64", KM_PART_GEMM, { 1, 9 }, { 250, 250 }, 8, 8, 7168, KM_GEMM_SPLIT, -1, 64, 64, false, false, 0 },
	{ "replays of resident, 392 experts", KM_PART_GEMM, { 1 }, { 500 }, 392, 8, 7168, KM_GEMM_RESIDENT, -1, 0, 0, false, false, 0 },
	{ "replays of split, 64 x 48", KM_PART_GEMM, { 1, 9 }, { 250, 250 }, 8, 8, 7168, KM_GEMM_SPLIT, -1, 64, 48, false, false, 0 },
	{ "replays of resident, 264 experts", KM_PART_GEMM, { 1 }, { 500 }, 264, 8, 7168, KM_GEMM_RESIDENT, -1, 0, 0, false, false, 0 },
	{ "replays of split, 64 x 32", KM_PART_GEMM, { 1, 9 }, { 250, 250 }, 8, 8, 7168, KM_GEMM_SPLIT, -1, 64, 32, false, false, 0 },
	{ "replays of chain", KM_PART_CHAIN, { 1, 8, 16, 64 }, { 235, 235, 29, 1 }, 384, 8, 7168, -1, -1, 0, 0, false, false, 0 },
	{ "replays of router, gate", KM_PART_ROUTER_GATE, { 1, 8, 16, 64 }, { 230, 230, 32, 8 }, 256, 8, 7168, -1, -1, 0, 0, false, false, 0 },
	{ "replays of router, gate, softmax", KM_PART_ROUTER_GATE, { 1, 16 }, { 450, 50 }, 384, 8, 7168, -1, -1, 0, 0, true, false, 0 },
	{ "replays of one launch", KM_PART_ONE_LAUNCH, { 1, 8, 16, 64 }, { 230, 230, 32, 8 }, 256, 8, 7168, -1, -1, 0, 0, false, false, 0 },
	{ "replays of one launch, 384 experts", KM_PART_ONE_LAUNCH, { 1, 16 }, { 450, 50 }, 384, 8, 7168, -1, -1, 0, 0, false, false, 0 },
	{ "replays of resident", KM_PART_GEMM, { 1, 9, 70 }, { 400, 80, 20 }, 16, 8, 7168, KM_GEMM_RESIDENT, -1, 0, 0, false, false, 0 },
	{ "replays of gate", KM_PART_GATE, { 1, 8, 16, 64 }, { 220, 220, 40, 20 }, 384, 8, 7168, -1, -1, 0, 0, false, false, 0 },
	{ "replays of gate, softmax", KM_PART_GATE, { 1, 40 }, { 450, 50 }, 256, 8, 64, -1, -1, 0, 0, true, false, 0 },
	{ "replays of gate by rounds", KM_PART_GATE, { 1, 5 }, { 250, 250 }, 60, 6, 64, -1, KM_GATE_ROUNDS, 0, 0, false, false, 0 },
	{ "replays of alignment", KM_PART_ALIGN, { 1, 8, 64, 400 }, { 220, 220, 50, 10 }, 384, 8, 64, -1, -1, 0, 0, false, false, 0 },
	{ "replays of large alignment", KM_PART_ALIGN, { 400 }, { 500 }, 16, 8, 64, -1, -1, 0, 0, false, false, 0 },
	{ "replays of gate, alignment", KM_PART_GATE_ALIGN, { 1, 8, 16, 64 }, { 220, 220, 40, 20 }, 384, 8, 7168, -1, -1, 0, 0, false, false, 0 },
	{ "replays of general", KM_PART_GEMM, { 1, 9 }, { 250, 250 }, 8, 8, 64, KM_GEMM_GENERAL, -1, 0, 0, false, false, 0 },
	{ "replays of general, f32", KM_PART_GEMM, { 1, 9 }, { 250, 250 }, 8, 8, 64, KM_GEMM_GENERAL, -1, 0, 0, false, true, 0 },
	{ "replays of gate, softmax, 384 experts", KM_PART_GATE, { 1, 8 }, { 450, 50 }, 384, 8, 64, -1, -1, 0, 0, true, false, 0 },
	{ "replays of gate, 128 experts", KM_PART_GATE, { 1, 8 }, { 450, 50 }, 128, 8, 64, -1, -1, 0, 0, false, false, 0 },
	{ "replays of gate, 512 experts, top 16", KM_PART_GATE, { 1, 8 }, { 450, 50 }, 512, 16, 64, -1, -1, 0, 0, false, false, 0 },
	{ "replays of gate in groups", KM_PART_GATE, { 1, 8 }, { 450, 50 }, 256, 8, 64, -1, -1, 0, 0, false, false, 8 },
	{ "replays of gate by rounds, softmax", KM_PART_GATE, { 1, 5 }, { 450, 50 }, 60, 6, 64, -1, KM_GATE_ROUNDS, 0, 0, true, false, 0 },
	{ "replays of alignment, 100 and 200", KM_PART_ALIGN, { 100, 200 }, { 450, 50 }, 384, 8, 64, -1, -1, 0, 0, false, false, 0 },
	{ "replays of gate, alignment, softmax", KM_PART_GATE_ALIGN, { 8, 16 }, { 450, 50 }, 256, 8, 64, -1, -1, 0, 0, true, false, 0 },
};

static km_router_plan replay_plan(const replay_case *c, const km_router_shape *s, bool pdl)
{
	km_router_plan plan = plan_for(s, pdl);

	plan.gate = c->gate < 0 ? plan.gate : (enum km_router_gate)c->gate;
	if (c->gemm >= 0) {
		plan.gemm = (enum km_router_gemm)c->gemm;
		plan.split = 16;
		plan.split_tokens = c->split_tokens;
		plan.split_experts = c->split_experts;
	}
	return plan;
}

/* Selected ids for the alignment alone; some take no place. */
static void fill_ids(rig *r, int replay)
{
	for (int p = 0; p < r->shape.tokens * r->shape.top_k; p++)
		r->ids[p] = (int32_t)(km_rng_u64(200 + (uint64_t)replay, (uint64_t)p) %
		                      (uint64_t)(r->shape.experts + 2)) - 1;
	must(km_cuda_upload(gpu, r->b.ids, r->ids, (size_t)r->shape.tokens * (size_t)r->shape.top_k * 4, &err));
}

static bool makes_logits(const replay_case *c)
{
	return c->part != KM_PART_GATE && c->part != KM_PART_ALIGN && c->part != KM_PART_GATE_ALIGN;
}

/* A replay in flight, with a stream and buffers of its own. */
typedef struct flight {
	km_cuda *gpu;
	rig r;
	km_cuda_graph *graph;
	int32_t valid;
} flight;

/* What the flights of a bucket share: shape, weights, two inputs, and the logits that each of these gave. */
typedef struct replay_inputs {
	km_router_shape shape;
	uint16_t *x[2];
	float *w32, *bias, *first[2];
	const void *w; /* w32, or bf16 */
	void *device_w, *device_bias;
	bool seen[2];
} replay_inputs;

/* One replay's inputs, and poison where its outputs go. */
static void change_inputs(flight *f, const replay_case *c, const uint16_t *x, int replay)
{
	rig *r = &f->r;
	int bucket = r->shape.tokens;
	size_t n = (size_t)bucket * (size_t)r->shape.experts * sizeof(float);

	f->valid = 1 + replay * 7 % bucket;
	rig_poison(r);
	must(km_cuda_upload(gpu, (void *)r->b.valid, &f->valid, 4, &err));
	if (makes_logits(c)) {
		must(km_cuda_fill(gpu, r->b.logits, POISON, n, &err));
		must(km_cuda_upload(gpu, (void *)r->b.x, x, (size_t)bucket * (size_t)r->shape.hidden * 2, &err));
	} else if (c->part == KM_PART_ALIGN) {
		fill_ids(r, replay);
	} else {
		float *logits = make_logits(replay % 9 == 8 ? BROKEN : RANDOM, bucket, r->shape.experts,
		                            100 + (uint64_t)replay);

		must(km_cuda_upload(gpu, r->b.logits, logits, n, &err));
		free(logits);
	}
}

/* The logits that an x gives are checked once, and are the same bits ever after. */
static void check_replay_logits(rig *r, replay_inputs *in, int x)
{
	size_t n = (size_t)r->shape.tokens * (size_t)r->shape.experts * sizeof(float);
	km_router_check check = { 0 };

	if (in->seen[x]) {
		assert_memory_equal(r->logits, in->first[x], n);
		return;
	}
	must(km_router_check_logits(&check, &r->shape, in->x[x], in->w, r->logits, 0,
	                            r->shape.tokens > 8 ? r->shape.tokens / 4 : 1, &err));
	memcpy(in->first[x], r->logits, n);
	in->seen[x] = true;
}

static void check_replay(flight *f, const replay_case *c, const float *bias)
{
	rig *r = &f->r;
	km_router_check check = { 0 };

	if (c->part != KM_PART_ALIGN)
		must(km_cuda_download(gpu, r->logits, r->b.logits,
		                      (size_t)r->shape.tokens * (size_t)r->shape.experts * 4, &err));
	if (c->part != KM_PART_ALIGN && c->part != KM_PART_GEMM) {
		rig_fetch_gate(r);
		must(km_router_check_gate(&check, &r->shape, r->logits, bias, NULL, f->valid, r->ids, r->weights,
		                          &err));
	}
	if (c->part != KM_PART_GATE && c->part != KM_PART_ROUTER_GATE && c->part != KM_PART_GEMM)
		rig_check_align(r);
}

static void open_inputs(replay_inputs *in, const replay_case *c, int bucket)
{
	size_t weights = (size_t)c->experts * (size_t)c->hidden;

	*in = (replay_inputs){ .shape = k2_shape(bucket) };
	in->shape.experts = c->experts;
	in->shape.top_k = c->top_k;
	in->shape.hidden = c->hidden;
	in->shape.softmax = c->softmax;
	in->shape.weights_f32 = c->f32;
	in->shape.groups = c->groups ? c->groups : 1;
	in->shape.topk_group = c->groups ? 4 : 1;
	in->bias = make_bias(1, c->experts);
	in->w32 = km_xcalloc(weights, sizeof(float));
	for (size_t i = 0; i < weights && c->f32; i++)
		in->w32[i] = km_rng_normal(4, i) * 0.03f;
	in->w = c->f32 ? (void *)in->w32 : router_weights();
	for (int i = 0; i < 2; i++) {
		in->x[i] = make_bf16((size_t)bucket * (size_t)c->hidden, 32 + (uint64_t)i, 1.0f);
		in->first[i] = km_xcalloc((size_t)bucket * (size_t)c->experts, sizeof(float));
	}
	in->device_w = take_copy(in->w, weights * (c->f32 ? 4 : 2));
	in->device_bias = take_copy(in->bias, (size_t)c->experts * 4);
}

static void close_inputs(replay_inputs *in)
{
	for (int i = 0; i < 2; i++) {
		free(in->x[i]);
		free(in->first[i]);
	}
	free(in->w32);
	free(in->bias);
}

static void open_flight(flight *f, km_cuda *on, const replay_case *c, const replay_inputs *in, bool pdl)
{
	km_router_plan plan = replay_plan(c, &in->shape, pdl);

	f->gpu = on;
	f->valid = in->shape.tokens;
	rig_open(&f->r, &in->shape);
	f->r.b.x = take_copy(in->x[0], (size_t)in->shape.tokens * (size_t)c->hidden * 2);
	f->r.b.w = in->device_w;
	f->r.b.bias = in->device_bias;
	f->r.b.valid = take_copy(&f->valid, 4);
	must(km_cuda_wait(gpu, &err)); /* the buffers are filled */
	if (blas && makes_logits(c))
		must(km_cuda_router_run(on, c->part, &plan, &in->shape, &f->r.b, &err)); /* cuBLASLt chooses */
	must(km_cuda_capture_begin(on, &err));
	must(km_cuda_router_run(on, c->part, &plan, &in->shape, &f->r.b, &err));
	must(km_cuda_capture_end(on, &f->graph, &err));
}

static void replay_bucket(const replay_case *c, int bucket, int replays, bool pdl)
{
	size_t mark = mark_pieces();
	flight flights[FLIGHTS];
	replay_inputs in;

	open_inputs(&in, c, bucket);
	for (int k = 0; k < flight_count; k++)
		open_flight(&flights[k], streams[k], c, &in, pdl);
	for (int i = 0; i < replays; i += flight_count) {
		int now = replays - i < flight_count ? replays - i : flight_count, x = i / flight_count % 2;

		for (int k = 0; k < now; k++)
			change_inputs(&flights[k], c, in.x[x], i + k);
		for (int k = 0; k < now; k++)
			must(km_cuda_graph_launch(flights[k].gpu, flights[k].graph, &err));
		for (int k = 0; k < now; k++) {
			must(km_cuda_wait(flights[k].gpu, &err));
			check_replay(&flights[k], c, in.bias);
			if (makes_logits(c))
				check_replay_logits(&flights[k].r, &in, x);
		}
	}
	for (int k = 0; k < flight_count; k++) {
		km_cuda_graph_free(flights[k].graph);
		rig_close(&flights[k].r);
	}
	close_inputs(&in);
	free_pieces(mark);
}

typedef struct replay_test {
	const replay_case *c;
	bool overlap;
	char name[80];
} replay_test;

static void replay_form(void **state)
{
	const replay_test *test = *state;
	const replay_case *c = test->c;
	int replays = 0;

	if ((c->gemm == KM_GEMM_SPLIT || c->gemm == KM_GEMM_PARTS) && km_cuda_info_of(gpu)->capability != 90) {
		printf("skip: %s is for capability 9.0\n", test->name);
		skip();
	}
	for (int b = 0; b < COUNT(c->tokens) && c->tokens[b]; b++) {
		int n = few ? (c->replays[b] + 99) / 100 : c->replays[b];

		replay_bucket(c, c->tokens[b], n, test->overlap);
		replays += n;
	}
	printf("figure: %d %s\n", replays, test->name);
}

/* A form's two tests, with and without overlap. */
static void name_replays(replay_test *tests)
{
	for (int i = 0; i < 2 * COUNT(replay_cases); i++) {
		tests[i] = (replay_test){ .c = &replay_cases[i / 2], .overlap = i % 2 };
		snprintf(tests[i].name, sizeof(tests[i].name), "%s%s", tests[i].c->name,
		         tests[i].overlap ? ", overlapping" : "");
	}
}

static void test_large_replay(void **state)
{
	static const replay_case large = { .part = KM_PART_CHAIN, .experts = 384, .top_k = 8, .hidden = HIDDEN,
		                           .gemm = -1, .gate = -1 };

	(void)state;
	for (int i = 0; i < 4 && !short_run; i++)
		replay_bucket(&large, i < 2 ? 200 : 300, 20, i % 2);
}

/* What the plans believe of the kernels. */
static void test_plan_limits(void **state)
{
	km_router_shape s = k2_shape(64);
	size_t mark = mark_pieces();
	km_router_plan plan = plan_for(&s, false);
	rig r;

	(void)state;
	s.tokens = 65;
	rig_open(&r, &s);
	r.b.x = r.b.w = r.b.logits;
	assert_int_equal(km_cuda_router_run(gpu, KM_PART_ONE_LAUNCH, &plan, &s, &r.b, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "65 tokens of 384 experts"));
	assert_int_equal(km_cuda_router_run(gpu, KM_PART_GATE_ALIGN, &plan, &s, &r.b, &err), KM_EUNSUPPORTED);
	s.tokens = 8;
	s.hidden = 4096;
	plan.gemm = KM_GEMM_RESIDENT;
	assert_int_equal(km_cuda_router_run(gpu, KM_PART_GEMM, &plan, &s, &r.b, &err), KM_EUNSUPPORTED);
	s.hidden = HIDDEN;
	s.top_k = 9;
	plan.gate = KM_GATE_ONEPASS;
	assert_int_equal(km_cuda_router_run(gpu, KM_PART_GATE, &plan, &s, &r.b, &err), KM_EUNSUPPORTED);
	rig_close(&r);
	free_pieces(mark);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest checks[] = {
		cmocka_unit_test(test_gate_onepass), cmocka_unit_test(test_gate_rounds),
		cmocka_unit_test(test_gate_align), cmocka_unit_test(test_same_as_cpu_op),
		cmocka_unit_test(test_gemm_resident), cmocka_unit_test(test_gemm_split),
		cmocka_unit_test(test_gemm_parts), cmocka_unit_test(test_gemm_general),
		cmocka_unit_test(test_gemm_blas), cmocka_unit_test(test_align),
		cmocka_unit_test(test_one_launch), cmocka_unit_test(test_large_replay),
		cmocka_unit_test(test_plan_limits),
	};
	struct CMUnitTest tests[COUNT(checks) + 2 * COUNT(replay_cases)];
	replay_test replays[2 * COUNT(replay_cases)];
	int failed;

	name_replays(replays);
	if (argc > 1 && !strcmp(argv[1], "forms")) {
		for (int i = 0; i < COUNT(replays); i++)
			puts(replays[i].name);
		return 0;
	}
	few = argc > 1 && !strcmp(argv[1], "few");
	short_run = few || (argc > 1 && !strcmp(argv[1], "short"));
	if (argc > 2)
		cmocka_set_test_filter(argv[2]);
	setvbuf(stdout, NULL, _IOLBF, 0); /* what was done shows where a run is cut short */
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	for (; flight_count < (short_run ? FLIGHTS : 1); flight_count++)
		if (km_cuda_open(&streams[flight_count], 0, (size_t)1 << (short_run ? 20 : 30), &err) < 0) {
			fprintf(stderr, "%s\n", err.msg);
			return 1;
		}
	gpu = streams[0];
	blas = !short_run && km_cuda_blas_open(gpu, &err) == 0;
	printf("figure: %s, %s\n", km_cuda_info_of(gpu)->name, km_cuda_info_of(gpu)->toolkit);
	memcpy(tests, checks, sizeof(checks));
	for (int i = 0; i < COUNT(replays); i++)
		tests[COUNT(checks) + i] = (struct CMUnitTest){ .name = replays[i].name,
			                                        .test_func = replay_form,
			                                        .initial_state = &replays[i] };
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	while (flight_count)
		km_cuda_close(streams[--flight_count]);
	return failed;
}
