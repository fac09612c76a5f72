/*
 * The experts' kernels on a GPU, against the CPU op on the same weights.
 *
 * Every tile that the planner lists, the general form among them, over routings of every kind: uniform,
 * all to one expert, few, none, ids that are not there, weights of 0, tokens already grouped by expert
 * with padded tails and empty experts. Results and scratch are poisoned before each launch. A result's
 * error is ||y - reference|| / ||reference||, at most BOUND; two forms' results differ by at most one
 * bf16 step of the larger of the value and its row's root mean square, or ROUNDED_STEPS where one of them
 * rounds weights, or places' outputs, to bf16; two runs' are the same bits.
 * `test_gpu_moe short` keeps to small shapes, for runs under a sanitizer; `prefill` to the form for many tokens.
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

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_moe.h"
#include "device/op.h"
#include "format/dtype.h"
#include "format/moe_layout.h"
#include "support/on_gpu.h"

#define BOUND 4e-3

enum { MAX_TILES = 128, ROUNDED_STEPS = 8 };

static bool short_run, prefill_run;
static km_moe_device device;

/* Experts in the checkpoint's layout on the CPU, in both layouts on the GPU. */
typedef struct expert_set {
	int experts, hidden, intermediate, group;
	enum km_weight_type type;
	uint8_t *host; /* owned: all matrices and scales */
	km_weight *gate, *up, *down; /* [experts] */
	km_moe_weights plain, packed;
} expert_set;

static void fill_random(uint8_t *to, size_t bytes, uint64_t seed)
{
#pragma omp parallel for
	for (size_t i = 0; i < bytes / 8; i++) {
		uint64_t v = km_rng_u64(seed, i);

		memcpy(to + 8 * i, &v, 8);
	}
}

static uint16_t scale_value(uint64_t seed, size_t i)
{
	float v = 0.004f + 0.008f * (float)km_rng_uniform(seed, i);

	return km_f32_to_bf16(km_rng_u64(seed + 9, i) & 1 ? v : -v);
}

static void fill_float(uint8_t *to, enum km_weight_type type, size_t count, uint64_t seed)
{
	for (size_t i = 0; i < count; i++) {
		float v = 0.05f * km_rng_normal(seed, i);
		uint16_t h = type == KM_W_F16 ? km_f32_to_f16(v) : km_f32_to_bf16(v);

		if (type == KM_W_F32)
			memcpy(to + 4 * i, &v, 4);
		else if (type == KM_W_FP8)
			to[i] = km_f32_to_f8_e4m3(v * 20);
		else
			memcpy(to + 2 * i, &h, 2);
	}
}

/* The size of a matrix, and of its scales, in km_weight's own layout. */
static size_t data_bytes(const expert_set *s, size_t rows, size_t cols)
{
	size_t n = rows * cols;

	return s->type == KM_W_INT4 ? n / 2 : s->type == KM_W_FP8 ? n : s->type == KM_W_F32 ? 4 * n : 2 * n;
}

enum { FP8_BLOCK = 64 };

static size_t scale_bytes(const expert_set *s, size_t rows, size_t cols)
{
	if (s->type == KM_W_INT4)
		return rows * (cols / (size_t)s->group) * 2;
	if (s->type == KM_W_FP8)
		return (rows + FP8_BLOCK - 1) / FP8_BLOCK * ((cols + FP8_BLOCK - 1) / FP8_BLOCK) * 4;
	return 0;
}

static km_weight make_matrix(expert_set *s, uint8_t *at, int rows, int cols, uint64_t seed)
{
	size_t data = data_bytes(s, (size_t)rows, (size_t)cols), scale = scale_bytes(s, (size_t)rows, (size_t)cols);

	if (s->type == KM_W_INT4) {
		fill_random(at, data, seed);
		for (size_t i = 0; i < scale / 2; i++) {
			uint16_t v = scale_value(seed, i);

			memcpy(at + data + 2 * i, &v, 2);
		}
	} else {
		fill_float(at, s->type, (size_t)rows * (size_t)cols, seed);
		for (size_t i = 0; i < scale / 4; i++) {
			float v = 0.03f + 0.04f * (float)km_rng_uniform(seed, i);

			memcpy(at + data + 4 * i, &v, 4);
		}
	}
	return (km_weight){ .type = s->type, .rows = rows, .cols = cols, .data = at,
		            .scale = scale ? at + data : NULL, .group = s->group,
		            .scale_dtype = s->type == KM_W_INT4 ? KM_BF16 : KM_F32,
		            .block_rows = FP8_BLOCK, .block_cols = FP8_BLOCK };
}

static void pack_experts(expert_set *s)
{
	size_t up_bytes = km_moe_gate_up_bytes(s->hidden, s->intermediate, s->group);
	size_t down_bytes = km_moe_down_bytes(s->hidden, s->intermediate, s->group);
	uint8_t *packed = km_xmalloc((size_t)s->experts * (up_bytes + down_bytes));
	uint8_t *downs = packed + (size_t)s->experts * up_bytes;

#pragma omp parallel for
	for (int e = 0; e < s->experts; e++) {
		km_int4_matrix gate = { (uint32_t *)s->gate[e].data, (uint16_t *)s->gate[e].scale };
		km_int4_matrix up = { (uint32_t *)s->up[e].data, (uint16_t *)s->up[e].scale };
		km_int4_matrix down = { (uint32_t *)s->down[e].data, (uint16_t *)s->down[e].scale };

		km_moe_pack_gate_up(s->hidden, s->intermediate, s->group, &gate, &up, packed + (size_t)e * up_bytes);
		km_moe_pack_down(s->hidden, s->intermediate, s->group, &down, downs + (size_t)e * down_bytes);
	}
	s->packed = (km_moe_weights){ .packed = true, .group = s->group };
	s->packed.gate_up = (km_moe_matrix){ take_copy(packed, (size_t)s->experts * up_bytes), NULL, up_bytes, 0 };
	s->packed.down = (km_moe_matrix){ take_copy(downs, (size_t)s->experts * down_bytes), NULL, down_bytes, 0 };
	free(packed);
}

static void open_set(expert_set *s, int experts, int hidden, int intermediate, int group, enum km_weight_type type)
{
	size_t h = (size_t)hidden, n = (size_t)intermediate, up_data, up_all, down_all;
	const uint8_t *on_gpu;

	*s = (expert_set){ .experts = experts, .hidden = hidden, .intermediate = intermediate, .group = group,
		           .type = type };
	up_data = data_bytes(s, n, h);
	up_all = (up_data + scale_bytes(s, n, h) + 15) / 16 * 16;
	down_all = (data_bytes(s, h, n) + scale_bytes(s, h, n) + 15) / 16 * 16;
	s->host = km_xmalloc((size_t)experts * (2 * up_all + down_all));
	s->gate = km_xmalloc(3 * (size_t)experts * sizeof(km_weight));
	s->up = s->gate + experts;
	s->down = s->up + experts;
	for (int e = 0; e < experts; e++) {
		uint8_t *at = s->host + (size_t)e * (2 * up_all + down_all);

		s->gate[e] = make_matrix(s, at, intermediate, hidden, 100 + 3 * (uint64_t)e);
		s->up[e] = make_matrix(s, at + up_all, intermediate, hidden, 101 + 3 * (uint64_t)e);
		s->down[e] = make_matrix(s, at + 2 * up_all, hidden, intermediate, 102 + 3 * (uint64_t)e);
	}
	on_gpu = take_copy(s->host, (size_t)experts * (2 * up_all + down_all));
	s->plain = (km_moe_weights){ .type = type, .group = group, .block_rows = FP8_BLOCK, .block_cols = FP8_BLOCK,
		                     .scale_dtype = type == KM_W_INT4 ? KM_BF16 : KM_F32 };
	s->plain.gate = (km_moe_matrix){ on_gpu, on_gpu + up_data, 2 * up_all + down_all, 2 * up_all + down_all };
	s->plain.up = (km_moe_matrix){ on_gpu + up_all, on_gpu + up_all + up_data, 2 * up_all + down_all,
		                       2 * up_all + down_all };
	s->plain.down = (km_moe_matrix){ on_gpu + 2 * up_all, on_gpu + 2 * up_all + data_bytes(s, h, n),
		                         2 * up_all + down_all, 2 * up_all + down_all };
	if (type == KM_W_INT4 && !km_moe_layout_check(hidden, intermediate, group, NULL))
		pack_experts(s);
}

static void close_set(expert_set *s)
{
	free(s->host);
	free(s->gate);
}

enum routing { UNIFORM, ONE, FEW, MISSING, ZEROS, NONE, GROUPED, ROUTINGS };

/* A call's inputs on both sides. */
typedef struct rig {
	const expert_set *set;
	km_moe_problem problem;
	km_moe_buffers b;
	uint16_t *x;
	int32_t *ids, *known_ids; /* known_ids: an id that exists, weight 0 where there was none */
	float *weights, *known_weights, *reference;
	size_t scratch_bytes, values;
} rig;

static int route(enum routing kind, int experts, int tokens, int t, int k, int top_k, const int32_t *row,
                 uint64_t seed)
{
	uint64_t r = km_rng_u64(seed, (uint64_t)(t * top_k + k));
	int e;

	switch (kind) {
	case ONE:
		return experts / 2;
	case FEW:
		return (int)(r % 2) * (experts - 1);
	case NONE:
		return -1;
	case GROUPED: /* experts 0, 2, 4, ... have runs that end in padding */
		e = t * experts / tokens / 2 * 2;
		return t * experts * 4 / tokens % 4 == 3 ? -1 : e;
	default:
		break;
	}
	e = (int)(r % (uint64_t)experts);
	for (int i = 0; i < k && top_k <= experts; i++)
		if (row[i] == e) {
			e = (e + 1) % experts;
			i = -1;
		}
	if (kind == MISSING && r >> 40 & 1)
		return r >> 41 & 1 ? -1 - (int)(r >> 42 & 7) : experts + (int)(r >> 42 & 0xffff);
	return e;
}

static void set_routing(rig *r, enum routing kind, uint64_t seed)
{
	const km_moe_problem *p = &r->problem;

	for (int t = 0; t < p->tokens; t++)
		for (int k = 0; k < p->top_k; k++) {
			int at = t * p->top_k + k;
			bool known;

			r->ids[at] = route(kind, p->global_experts, p->tokens, t, k, p->top_k,
			                   r->ids + t * p->top_k, seed);
			r->weights[at] = 0.05f + 0.3f * (float)km_rng_uniform(seed + 1, (uint64_t)at);
			if (kind == ZEROS && at % 3 == 0)
				r->weights[at] = 0;
			known = r->ids[at] >= 0 && r->ids[at] < p->global_experts;
			r->known_ids[at] = known ? r->ids[at] : 0;
			r->known_weights[at] = known ? r->weights[at] : 0;
		}
	must(km_cuda_upload(gpu, (void *)r->b.ids, r->ids, (size_t)(p->tokens * p->top_k) * 4, &err));
	must(km_cuda_upload(gpu, (void *)r->b.weights, r->weights, (size_t)(p->tokens * p->top_k) * 4, &err));
}

static void compute_reference(rig *r)
{
	const km_moe_problem *p = &r->problem;
	const expert_set *s = r->set;
	float *x = km_xmalloc(r->values * sizeof(float));
	km_moe_args a = { .tokens = p->tokens, .experts = s->experts, .top_k = p->top_k, .hidden = p->hidden,
		          .intermediate = p->intermediate, .x = x, .ids = r->known_ids,
		          .weights = r->known_weights, .gate = s->gate, .up = s->up, .down = s->down,
		          .routed_scale = r->b.routed_scale, .y = r->reference };

	for (size_t i = 0; i < r->values; i++)
		x[i] = km_bf16_to_f32(r->x[i]);
	memset(r->reference, 0, r->values * sizeof(float));
	a.scratch = aligned_alloc(64, (km_moe_scratch_bytes(&a, p->tokens, omp_get_max_threads()) + 63) / 64 * 64);
	km_cpu_ops(NULL)->moe(&a);
	free(a.scratch);
	free(x);
}

static void rig_open(rig *r, const expert_set *s, int tokens, int top_k, bool packed, bool y_bf16)
{
	size_t places = (size_t)(tokens * top_k);

	memset(r, 0, sizeof(*r));
	r->set = s;
	r->problem = (km_moe_problem){ .tokens = tokens, .experts = s->experts, .global_experts = s->experts,
		                       .top_k = top_k, .hidden = s->hidden, .intermediate = s->intermediate,
		                       .group = s->group, .packed = packed };
	r->values = (size_t)tokens * (size_t)s->hidden;
	r->x = km_xmalloc(r->values * 2);
	for (size_t i = 0; i < r->values; i++)
		r->x[i] = km_f32_to_bf16(km_rng_normal(5, i));
	r->ids = km_xmalloc(places * 4);
	r->known_ids = km_xmalloc(places * 4);
	r->weights = km_xmalloc(places * 4);
	r->known_weights = km_xmalloc(places * 4);
	r->reference = km_xmalloc(r->values * 4);
	r->scratch_bytes = km_moe_scratch_size(&r->problem, &device);
	r->b = (km_moe_buffers){ .x = take_copy(r->x, r->values * 2), .ids = take(places * 4),
		                 .weights = take(places * 4), .experts = packed ? s->packed : s->plain,
		                 .routed_scale = 2.827f, .y = take(r->values * 4), .y_bf16 = y_bf16,
		                 .scratch = take(r->scratch_bytes) };
	must(km_cuda_fill(gpu, r->b.scratch, 0, KM_MOE_SYNC_BYTES, &err));
}

static void rig_close(rig *r)
{
	free(r->x);
	free(r->ids);
	free(r->known_ids);
	free(r->weights);
	free(r->known_weights);
	free(r->reference);
}

/* Runs once over poison and brings y as f32. */
static void run(rig *r, const km_moe_plan *plan, float *y)
{
	size_t bytes = r->values * (r->b.y_bf16 ? 2 : 4);
	uint16_t *h = (uint16_t *)y + (r->b.y_bf16 ? r->values : 0);

	must(km_cuda_fill(gpu, r->b.y, POISON, bytes, &err));
	must(km_cuda_fill(gpu, (char *)r->b.scratch + KM_MOE_SYNC_BYTES, POISON,
	                  r->scratch_bytes - KM_MOE_SYNC_BYTES, &err));
	must(km_cuda_moe_run(gpu, plan, &r->problem, &r->b, &err));
	must(km_cuda_download(gpu, r->b.y_bf16 ? (void *)h : (void *)y, r->b.y, bytes, &err));
	if (r->b.y_bf16)
		for (size_t i = 0; i < r->values; i++)
			y[i] = km_bf16_to_f32(h[i]);
}

static double error_of(const rig *r, const float *y)
{
	double wrong = 0, all = 0;
	int lost = 0;

#pragma omp parallel for reduction(+ : wrong, all, lost)
	for (size_t i = 0; i < r->values; i++) {
		double d = (double)y[i] - (double)r->reference[i];

		wrong += d * d;
		all += (double)r->reference[i] * (double)r->reference[i];
		lost += !(fabs(d) < 1e30);
	}
	if (lost)
		return INFINITY;
	return all > 0 ? sqrt(wrong / all) : wrong > 0 ? INFINITY : 0;
}

/* 2^floor(log2(v)): log2 and exp2 of every value were most of this test's time. */
static double power_below(double v)
{
	uint64_t bits;

	memcpy(&bits, &v, sizeof(bits));
	bits &= UINT64_C(0x7ff) << 52;
	memcpy(&v, &bits, sizeof(v));
	return v;
}

/* The largest difference in bf16 steps. */
static double steps_apart(const rig *r, const float *a, const float *b)
{
	double worst = 0;
	int hidden = r->problem.hidden;

#pragma omp parallel for reduction(max : worst)
	for (int t = 0; t < r->problem.tokens; t++) {
		const float *p = a + (size_t)t * (size_t)hidden, *q = b + (size_t)t * (size_t)hidden;
		double square = 0;

		for (int i = 0; i < hidden; i++)
			square += (double)p[i] * (double)p[i];
		for (int i = 0; i < hidden; i++) {
			double size = fmax(fmax(fabs((double)p[i]), fabs((double)q[i])), sqrt(square / hidden));
			double step = power_below(size) / 128, apart = fabs((double)p[i] - (double)q[i]);

			if (apart > 0 && !(apart / step <= worst))
				worst = apart / step;
		}
	}
	return worst;
}

typedef struct tally {
	double worst, apart;
	int runs;
	char where[256];
} tally;

static void check_plan(rig *r, const km_moe_plan *plan, const char *what, const float *first, float *y, tally *t)
{
	bool rounded = r->problem.packed && r->problem.tokens > 32; /* the first form's places' outputs */
	float *again = km_xmalloc(r->values * sizeof(float));
	double error, apart;
	char name[200];

	snprintf(name, sizeof(name), "%s, tile %d x %d, group %d, %d stages, %d tokens, top %d, %d experts, %d x %d, %s",
	         km_moe_form_name(plan->form), plan->tile.block_m, plan->tile.block_n, plan->tile.group_m,
	         plan->tile.stages, r->problem.tokens, r->problem.top_k, r->problem.experts,
	         r->problem.hidden, r->problem.intermediate, what);
	run(r, plan, y);
	error = error_of(r, y);
	if (!(error <= BOUND))
		fail_msg("%s: error %g", name, error);
	run(r, plan, again);
	if (memcmp(y, again, r->values * sizeof(float)) != 0)
		fail_msg("%s: two runs differ", name);
	apart = first ? steps_apart(r, first, y) : 0;
	if (!(apart <= (plan->part_bf16 || rounded ? ROUNDED_STEPS : 1)))
		fail_msg("%s: %g bf16 steps from another form", name, apart);
	if (error > t->worst) {
		t->worst = error;
		snprintf(t->where, sizeof(t->where), "%s", name);
	}
	t->apart = apart > t->apart ? apart : t->apart;
	t->runs++;
	free(again);
}

static const char *const routing_names[] = { "uniform", "one expert", "two experts", "missing ids",
	                                     "weights of 0", "no expert", "grouped, padded tails" };

/* The general form, the plan's own choice, and one in `stride` of the candidates. */
static void check_all(rig *r, enum routing kind, int stride, tally *t)
{
	km_moe_tile tiles[MAX_TILES];
	int n = km_moe_candidates(&r->problem, &device, tiles, MAX_TILES);
	float *first = km_xmalloc(r->values * sizeof(float)), *y = km_xmalloc(r->values * sizeof(float));
	km_moe_plan plan;

	set_routing(r, kind, 40 + (uint64_t)kind);
	compute_reference(r);
	must(km_moe_plan_make(&plan, &r->problem, &device, NULL, &err));
	check_plan(r, &plan, routing_names[kind], NULL, first, t);
	if (prefill_run)
		stride = 1;
	for (int i = (int)kind % stride; i < n; i += stride) {
		must(km_moe_plan_make(&plan, &r->problem, &device, &tiles[i], &err));
		if (prefill_run && plan.form != KM_MOE_PREFILL)
			continue;
		check_plan(r, &plan, routing_names[kind], first, y, t);
		if (plan.form == KM_MOE_DECODE) { /* its tile, by the other way */
			plan.form = KM_MOE_GROUPED;
			check_plan(r, &plan, routing_names[kind], first, y, t);
		}
		if (plan.align_inside && r->problem.tokens >= 8) { /* the same by kk_align; fewer tokens have less room */
			plan.align_inside = false;
			check_plan(r, &plan, routing_names[kind], first, y, t);
		}
	}
	if (r->problem.tokens * r->problem.top_k <= 2048) {
		plan = (km_moe_plan){ .form = KM_MOE_GENERAL };
		check_plan(r, &plan, routing_names[kind], n ? first : NULL, y, t);
	}
	free(first);
	free(y);
}

static void report(const char *what, const tally *t)
{
	printf("figure: %s: %d checks, worst error %.2e (%s), forms at most %.2f bf16 steps apart\n", what,
	       t->runs, t->worst, t->where, t->apart);
}

/* Small shapes, every routing, every tile. */
static void test_small(void **state)
{
	static const struct {
		int experts, hidden, intermediate, group;
	} sets[] = { { 8, 1024, 128, 32 }, { 7, 512, 256, 64 }, { 16, 1536, 384, 128 } };
	static const int tokens[] = { 1, 2, 5, 8, 9, 33, 64, 65, 200, 500 };
	tally t = { 0 };

	(void)state;
	for (int i = 0; i < (short_run ? 1 : 3); i++) {
		size_t mark = km_cuda_mark(gpu);
		expert_set s;

		open_set(&s, sets[i].experts, sets[i].hidden, sets[i].intermediate, sets[i].group, KM_W_INT4);
		for (int m = 0; m < 10; m += short_run ? 2 : 1)
			for (int kind = 0; kind < ROUTINGS; kind++) {
				size_t inner = km_cuda_mark(gpu);
				int top_k = kind == GROUPED ? 1 : m % 3 == 1 ? 3 : 7 - i;
				rig r;

				if (short_run && (kind + m / 2) % 3)
					continue;
				if (prefill_run && tokens[m] <= 128)
					continue;
				rig_open(&r, &s, tokens[m], top_k, true, m % 2 == 0);
				check_all(&r, (enum routing)kind, short_run ? 9 : 3, &t);
				rig_close(&r);
				km_cuda_rewind(gpu, inner);
			}
		close_set(&s);
		km_cuda_rewind(gpu, mark);
	}
	report("small shapes", &t);
}

/* Kimi's own shapes with fewer experts. */
static void test_kimi(void **state)
{
	static const struct {
		int intermediate, tokens, experts, top_k;
	} cases[] = { { 256, 1, 24, 8 }, { 256, 2, 24, 8 }, { 256, 4, 24, 8 }, { 256, 8, 24, 8 },
		      { 256, 16, 24, 8 }, { 256, 64, 24, 8 }, { 256, 300, 24, 8 }, { 256, 1024, 24, 10 },
		      { 128, 3, 16, 8 }, { 512, 7, 12, 8 }, { 1024, 33, 8, 1 }, { 2048, 1, 8, 8 },
		      { 2048, 3, 8, 4 }, { 2048, 150, 8, 8 } };
	tally t = { 0 };

	(void)state;
	if (short_run) {
		printf("skip: Kimi's shapes, in a short run\n");
		skip();
	}
	for (int i = 0; i < (int)(sizeof(cases) / sizeof(*cases)); i++) {
		size_t mark = km_cuda_mark(gpu);
		expert_set s;
		rig r;

		if (prefill_run && cases[i].tokens <= 128)
			continue;
		open_set(&s, cases[i].experts, 7168, cases[i].intermediate, 32, KM_W_INT4);
		rig_open(&r, &s, cases[i].tokens, cases[i].top_k, true, i % 4 != 1);
		check_all(&r, i % 5 == 4 ? MISSING : UNIFORM, 3, &t);
		rig_close(&r);
		close_set(&s);
		km_cuda_rewind(gpu, mark);
	}
	report("Kimi's shapes", &t);
}

/* Weights of every other kind, and shapes that only the general form takes. */
static void test_general(void **state)
{
	static const enum km_weight_type types[] = { KM_W_INT4, KM_W_FP8, KM_W_BF16, KM_W_F16, KM_W_F32 };
	tally t = { 0 };

	(void)state;
	for (int i = 0; i < 5; i++) {
		size_t mark = km_cuda_mark(gpu);
		expert_set s;

		open_set(&s, 6, 200 + 56 * (i % 2), 96 + 32 * (i % 3), 8, types[i]);
		for (int kind = 0; kind < ROUTINGS; kind++) {
			size_t inner = km_cuda_mark(gpu);
			rig r;

			rig_open(&r, &s, 1 + 4 * kind, kind == GROUPED ? 1 : 3, false, kind % 2);
			check_all(&r, (enum routing)kind, 1, &t);
			rig_close(&r);
			km_cuda_rewind(gpu, inner);
		}
		close_set(&s);
		km_cuda_rewind(gpu, mark);
	}
	report("other weights", &t);
}

/* y += : what was there stays, with the same sum. */
static void test_accumulate(void **state)
{
	static const int tokens[] = { 1, 14, 27, 40, 300 };
	size_t mark = km_cuda_mark(gpu), n;
	expert_set s;

	(void)state;
	open_set(&s, 8, 1024, 128, 32, KM_W_INT4);
	for (int m = 0; m < 5; m++)
		for (int general = 0; general < 2; general++) {
			size_t inner = km_cuda_mark(gpu);
			float *y, *before;
			km_moe_plan plan;
			rig r;

			rig_open(&r, &s, tokens[m], 4, true, false);
			n = r.values;
			y = km_xmalloc(n * 4);
			before = km_xmalloc(n * 4);
			set_routing(&r, MISSING, 3);
			compute_reference(&r);
			for (size_t i = 0; i < n; i++)
				before[i] = km_rng_normal(8, i);
			must(km_cuda_upload(gpu, r.b.y, before, n * 4, &err));
			r.b.accumulate = true;
			must(km_moe_plan_make(&plan, &r.problem, &device, NULL, &err));
			if (general)
				plan = (km_moe_plan){ .form = KM_MOE_GENERAL };
			must(km_cuda_moe_run(gpu, &plan, &r.problem, &r.b, &err));
			must(km_cuda_download(gpu, y, r.b.y, n * 4, &err));
			for (size_t i = 0; i < n; i++)
				y[i] -= before[i];
			assert_true(error_of(&r, y) <= BOUND);
			rig_close(&r);
			free(y);
			free(before);
			km_cuda_rewind(gpu, inner);
		}
	close_set(&s);
	km_cuda_rewind(gpu, mark);
}

/* One rank of `ranks` holds experts rank, rank + ranks, ...: what it holds, moved together. */
static void take_rank(const expert_set *s, int rank, int ranks, km_moe_weights *w, int32_t *map)
{
	int count = s->experts / ranks;
	size_t up = s->packed.gate_up.data_stride, down = s->packed.down.data_stride;
	char *ups = take((size_t)count * up), *downs = take((size_t)count * down);

	for (int e = 0; e < s->experts; e++) {
		map[e] = e % ranks == rank ? e / ranks : -1;
		if (map[e] < 0)
			continue;
		must(km_cuda_copy(gpu, ups + (size_t)map[e] * up, (const char *)s->packed.gate_up.data + (size_t)e * up,
		                  up, &err));
		must(km_cuda_copy(gpu, downs + (size_t)map[e] * down, (const char *)s->packed.down.data + (size_t)e * down,
		                  down, &err));
	}
	*w = s->packed;
	w->gate_up.data = ups;
	w->down.data = downs;
}

/* The ranks' f32 results, added in either order, are the single rank's to the rounding of `ranks` sums. */
static void check_ranks(const expert_set *s, int tokens, int ranks, enum routing kind, double *worst)
{
	size_t mark = km_cuda_mark(gpu);
	int32_t map[64];
	float *whole, *part, *up, *down;
	km_moe_plan plan;
	double most = 0;
	rig r;

	rig_open(&r, s, tokens, kind == GROUPED ? 1 : 6, true, false);
	whole = km_xcalloc(r.values, 4);
	part = km_xcalloc(r.values * (size_t)ranks, 4);
	up = km_xcalloc(r.values, 4);
	down = km_xcalloc(r.values, 4);
	set_routing(&r, kind, 77);
	must(km_moe_plan_make(&plan, &r.problem, &device, NULL, &err));
	run(&r, &plan, whole);
	r.problem.experts = s->experts / ranks;
	r.problem.expert_map = true;
	for (int rank = 0; rank < ranks; rank++) {
		km_moe_plan mine;

		take_rank(s, rank, ranks, &r.b.experts, map);
		r.b.expert_map = take_copy(map, (size_t)s->experts * 4);
		must(km_moe_plan_make(&mine, &r.problem, &device, NULL, &err));
		run(&r, &mine, part + (size_t)rank * r.values);
	}
	for (size_t i = 0; i < r.values; i++) {
		most = fmax(most, fabs((double)whole[i]));
		for (int rank = 0; rank < ranks; rank++) {
			up[i] += part[(size_t)rank * r.values + i];
			down[i] += part[(size_t)(ranks - 1 - rank) * r.values + i];
		}
	}
	for (size_t i = 0; i < r.values; i++) {
		double apart = fmax(fabs((double)up[i] - (double)whole[i]), fabs((double)down[i] - (double)whole[i]));

		if (!(apart <= 1e-6 * most))
			fail_msg("%d ranks, %d tokens, %s: %g apart of %g", ranks, tokens, routing_names[kind],
			         apart, most);
		*worst = most > 0 ? fmax(*worst, apart / most) : *worst;
	}
	rig_close(&r);
	free(whole);
	free(part);
	free(up);
	free(down);
	km_cuda_rewind(gpu, mark);
}

static void test_ranks(void **state)
{
	static const int tokens[] = { 1, 6, 40, 70 };
	size_t mark = km_cuda_mark(gpu);
	double worst = 0;
	expert_set s;

	(void)state;
	open_set(&s, 16, 1024, 128, 32, KM_W_INT4);
	for (int m = 0; m < 4; m++)
		for (int kind = 0; kind < ROUTINGS; kind++)
			if (!short_run || (m + kind) % 5 == 0)
				check_ranks(&s, tokens[m], kind % 2 ? 2 : 4, (enum routing)kind, &worst);
	close_set(&s);
	km_cuda_rewind(gpu, mark);
	printf("figure: expert parallelism: ranks' sums within %.1e of the largest output, bound 1e-6\n", worst);
}

/* The kernels' counters, which go round, two launches before they do. */
static void age_counters(const rig *r)
{
	int32_t counters[64];

	for (int i = 0; i < 64; i++)
		counters[i] = 0x7ffffe00;
	must(km_cuda_upload(gpu, r->b.scratch, counters, sizeof(counters), &err));
}

/* Captured once, replayed with routings that change; each replay's bits are an ordinary run's. */
static void replay(const expert_set *s, int tokens, int replays, bool pdl)
{
	size_t mark = km_cuda_mark(gpu);
	km_cuda_graph *graph = NULL;
	float *ours, *theirs;
	km_moe_plan plan;
	rig r;

	rig_open(&r, s, tokens, 6, true, true);
	age_counters(&r);
	r.problem.pdl = pdl;
	ours = km_xmalloc(r.values * 4);
	theirs = km_xmalloc(r.values * 4);
	must(km_moe_plan_make(&plan, &r.problem, &device, NULL, &err));
	set_routing(&r, UNIFORM, 1);
	run(&r, &plan, ours);
	must(km_cuda_capture_begin(gpu, &err));
	must(km_cuda_moe_run(gpu, &plan, &r.problem, &r.b, &err));
	must(km_cuda_capture_end(gpu, &graph, &err));
	for (int i = 0; i < replays; i++) {
		set_routing(&r, (enum routing)(i % ROUTINGS), 1000 + (uint64_t)i);
		run(&r, &plan, theirs);
		must(km_cuda_fill(gpu, r.b.y, POISON, r.values * 2, &err));
		must(km_cuda_graph_launch(gpu, graph, &err));
		must(km_cuda_download(gpu, ours, r.b.y, r.values * 2, &err));
		for (size_t v = r.values; v-- > 0;)
			ours[v] = km_bf16_to_f32(((uint16_t *)ours)[v]);
		if (memcmp(ours, theirs, r.values * 4) != 0)
			fail_msg("%d tokens, replay %d differs from a run", tokens, i);
	}
	km_cuda_graph_free(graph);
	rig_close(&r);
	free(ours);
	free(theirs);
	km_cuda_rewind(gpu, mark);
}

static void test_graph(void **state)
{
	static const int tokens[] = { 1, 8, 24, 100, 300 };
	size_t mark = km_cuda_mark(gpu);
	int replays = short_run ? 3 : 125;
	expert_set s;

	(void)state;
	open_set(&s, 8, 1024, 128, 32, KM_W_INT4);
	for (size_t m = 0; m < sizeof(tokens) / sizeof(*tokens); m++)
		for (int pdl = 0; pdl < 2; pdl++)
			replay(&s, tokens[m], replays, pdl);
	close_set(&s);
	km_cuda_rewind(gpu, mark);
	printf("figure: %d replays with changing routing\n", 10 * replays);
}

static void test_refusals(void **state)
{
	size_t mark = km_cuda_mark(gpu);
	expert_set s;
	km_moe_plan plan;
	rig r;

	(void)state;
	open_set(&s, 4, 512, 128, 32, KM_W_INT4);
	rig_open(&r, &s, 4, 2, true, true);
	must(km_moe_plan_make(&plan, &r.problem, &device, NULL, &err));
	plan.tile.block_n = 48;
	assert_int_equal(km_cuda_moe_run(gpu, &plan, &r.problem, &r.b, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "no 4 tokens of 4 experts"));
	r.problem.expert_map = true;
	assert_int_equal(km_cuda_moe_run(gpu, &plan, &r.problem, &r.b, &err), KM_EINVAL);
	assert_non_null(strstr(err.msg, "expert map"));
	rig_close(&r);
	close_set(&s);
	km_cuda_rewind(gpu, mark);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_small), cmocka_unit_test(test_general), cmocka_unit_test(test_accumulate),
		cmocka_unit_test(test_ranks), cmocka_unit_test(test_graph), cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_kimi),
	};
	int failed;

	for (int i = 1; i < argc; i++) {
		short_run |= !strcmp(argv[i], "short");
		prefill_run |= !strcmp(argv[i], "prefill");
	}
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	if (km_cuda_open(&gpu, 0, (size_t)2 << 30, &err) < 0) {
		fprintf(stderr, "%s\n", err.msg);
		return 1;
	}
	device = (km_moe_device){ km_cuda_info_of(gpu)->capability, km_cuda_info_of(gpu)->multiprocessors };
	printf("figure: %s, %s\n", km_cuda_info_of(gpu)->name, km_cuda_info_of(gpu)->toolkit);
	if (prefill_run)
		cmocka_set_test_filter(short_run ? "test_small" : "test_kimi");
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	km_cuda_close(gpu);
	return failed;
}
