/*
 * The experts' launch that takes the gate and the shared experts' down projection along (km_moe_front).
 *
 * Kimi K2's 384 experts, small matrices, 1 to 4 rows, rows that do not count, every tile of the decode form. Ids and
 * weights are those of a gate launched by itself, to the bit. Without shared experts (weights of 0) y is what
 * the experts' launch gives for those ids, to the bit; what shared experts add is within f32's error of their
 * product in double precision. Replayed in a graph with inputs that change, y has an ordinary launch's bits.
 * `test_gpu_moe_front short` is for runs under a sanitizer.
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
#include "device/cuda_moe.h"
#include "device/cuda_router.h"
#include "format/dtype.h"
#include "format/moe_layout.h"
#include "model/router.h"
#include "support/on_gpu.h"

enum { EXPERTS = 384, TOP_K = 8, GROUP = 32, SHARED = KM_MOE_FRONT_COLS, ROWS = KM_MOE_FRONT_TOKENS,
       MAX_TILES = 128 };

static bool short_run;
static km_moe_device device;

static void send(const void *to, const void *from, size_t bytes)
{
	must(km_cuda_upload(gpu, (void *)to, from, bytes, &err));
}

/* Random codes and scales of a [rows, cols] matrix. */
static km_int4_matrix random_matrix(int rows, int cols, uint64_t seed)
{
	size_t n = (size_t)rows * (size_t)cols;
	km_int4_matrix m = { km_xmalloc(n / 2), km_xmalloc(n / GROUP * 2) };

	for (size_t i = 0; i < n / 8; i++)
		m.codes[i] = (uint32_t)km_rng_u64(seed, i);
	for (size_t i = 0; i < n / GROUP; i++)
		m.scales[i] = km_f32_to_bf16(0.004f + 0.008f * (float)km_rng_uniform(seed + 1, i));
	return m;
}

static void free_matrix(km_int4_matrix *m)
{
	free(m->codes);
	free(m->scales);
}

static km_moe_weights make_experts(int hidden, int intermediate)
{
	size_t up_bytes = km_moe_gate_up_bytes(hidden, intermediate, GROUP);
	size_t down_bytes = km_moe_down_bytes(hidden, intermediate, GROUP);
	uint8_t *ups = km_xmalloc(EXPERTS * up_bytes), *downs = km_xmalloc(EXPERTS * down_bytes);
	km_moe_weights w = { .packed = true, .group = GROUP };

	for (int e = 0; e < EXPERTS; e++) {
		uint64_t seed = 10 * (uint64_t)e;
		km_int4_matrix gate = random_matrix(intermediate, hidden, seed), up = random_matrix(intermediate, hidden, seed + 2);
		km_int4_matrix down = random_matrix(hidden, intermediate, seed + 4);

		km_moe_pack_gate_up(hidden, intermediate, GROUP, &gate, &up, ups + (size_t)e * up_bytes);
		km_moe_pack_down(hidden, intermediate, GROUP, &down, downs + (size_t)e * down_bytes);
		free_matrix(&gate);
		free_matrix(&up);
		free_matrix(&down);
	}
	w.gate_up = (km_moe_matrix){ take(EXPERTS * up_bytes), NULL, up_bytes, 0 };
	w.down = (km_moe_matrix){ take(EXPERTS * down_bytes), NULL, down_bytes, 0 };
	send(w.gate_up.data, ups, EXPERTS * up_bytes);
	send(w.down.data, downs, EXPERTS * down_bytes);
	free(ups);
	free(downs);
	return w;
}

/* A layer's buffers for up to ROWS tokens; the host has what it checks with. */
typedef struct rig {
	int hidden, tokens;
	km_moe_problem problem;
	km_moe_buffers b;
	km_moe_front front;
	km_router_shape shape;
	km_router_buffers route;
	int32_t *gate_ids, *front_ids; /* the gate's own launch's, and what the experts' has selected */
	float *gate_weights, *front_weights;
	uint16_t *down;      /* [hidden, SHARED] */
	float *before, *gate, *up;
	size_t values;
} rig;

static void rig_open(rig *r, int hidden, int intermediate)
{
	size_t most = (size_t)ROWS * (size_t)hidden;

	*r = (rig){ .hidden = hidden };
	r->problem = (km_moe_problem){ .tokens = ROWS, .experts = EXPERTS, .global_experts = EXPERTS, .top_k = TOP_K,
		                       .hidden = hidden, .intermediate = intermediate, .group = GROUP, .packed = true };
	r->front = (km_moe_front){ .logits = take(ROWS * EXPERTS * 4), .bias = take(EXPERTS * 4), .valid = take(4),
		                   .renormalize = true, .scale = 1, .down = take((size_t)hidden * SHARED * 2),
		                   .gate = take(ROWS * SHARED * 4), .up = take(ROWS * SHARED * 4) };
	r->gate_ids = take(ROWS * TOP_K * 4);
	r->gate_weights = take(ROWS * TOP_K * 4);
	r->front_ids = take(ROWS * TOP_K * 4);
	r->front_weights = take(ROWS * TOP_K * 4);
	r->b = (km_moe_buffers){ .x = take(most * 2), .experts = make_experts(hidden, intermediate), .routed_scale = 2.827f,
		                 .y = take(most * 4), .accumulate = true,
		                 .scratch = take(km_moe_scratch_size(&r->problem, &device)) };
	must(km_cuda_fill(gpu, r->b.scratch, 0, KM_MOE_SYNC_BYTES, &err));
	r->shape = (km_router_shape){ .experts = EXPERTS, .hidden = hidden, .top_k = TOP_K, .groups = 1, .topk_group = 1,
		                      .block = 16, .renormalize = true, .scale = 1 };
	r->route = (km_router_buffers){ .logits = (float *)r->front.logits, .bias = r->front.bias,
		                        .valid = r->front.valid, .ids = r->gate_ids, .weights = r->gate_weights };
	r->down = km_xmalloc((size_t)hidden * SHARED * 2);
	r->before = km_xmalloc(most * 4);
	r->gate = km_xmalloc(ROWS * SHARED * 4);
	r->up = km_xmalloc(ROWS * SHARED * 4);
}

static void rig_close(rig *r)
{
	free(r->down);
	free(r->before);
	free(r->gate);
	free(r->up);
}

static void fill(float *to, size_t count, uint64_t seed, float scale)
{
	for (size_t i = 0; i < count; i++)
		to[i] = scale * km_rng_normal(seed, i);
}

/* New inputs; of the rows `valid` count. */
static void set_inputs(rig *r, int tokens, int valid, bool shared, uint64_t seed)
{
	float logits[ROWS * EXPERTS], bias[EXPERTS];
	int32_t rows = valid;
	uint16_t *x = km_xmalloc((size_t)ROWS * (size_t)r->hidden * 2);

	r->tokens = r->problem.tokens = r->shape.tokens = tokens;
	r->values = (size_t)tokens * (size_t)r->hidden;
	fill(logits, (size_t)tokens * EXPERTS, seed, 1);
	fill(bias, EXPERTS, seed + 1, 0.1f);
	if (seed % 5 == 4) /* a tie of all, but for the bias; and no expert that can be selected */
		for (int e = 0; e < EXPERTS; e++)
			logits[e] = 1, logits[(tokens - 1) * EXPERTS + e] = tokens > 1 ? NAN : 1;
	fill(r->before, r->values, seed + 2, 1);
	fill(r->gate, (size_t)tokens * SHARED, seed + 3, 1);
	fill(r->up, (size_t)tokens * SHARED, seed + 4, 1);
	for (size_t i = 0; i < r->values; i++)
		x[i] = km_f32_to_bf16(km_rng_normal(seed + 5, i));
	for (size_t i = 0; i < (size_t)r->hidden * SHARED; i++)
		r->down[i] = shared ? km_f32_to_bf16(0.05f * km_rng_normal(seed + 6, i)) : 0;
	send(r->front.logits, logits, (size_t)tokens * EXPERTS * 4);
	send(r->front.bias, bias, sizeof(bias));
	send(r->front.valid, &rows, 4);
	send(r->front.gate, r->gate, (size_t)tokens * SHARED * 4);
	send(r->front.up, r->up, (size_t)tokens * SHARED * 4);
	send(r->front.down, r->down, (size_t)r->hidden * SHARED * 2);
	send(r->b.x, x, r->values * 2);
	free(x);
}

/* The gate by itself: its ids and weights are the reference. */
static void run_gate(rig *r)
{
	km_router_device d = { device.capability, device.multiprocessors, false, false };
	km_router_plan plan;

	must(km_router_plan_make(&plan, &r->shape, &d, &err));
	must(km_cuda_router_run(gpu, KM_PART_GATE, &plan, &r->shape, &r->route, &err));
}

/* y of the experts, with what goes before or without. */
static void run_experts(rig *r, const km_moe_plan *plan, bool front, float *y)
{
	size_t places = (size_t)r->tokens * TOP_K * 4;

	r->b.front = front ? &r->front : NULL;
	r->b.ids = front ? r->front_ids : r->gate_ids;
	r->b.weights = front ? r->front_weights : r->gate_weights;
	must(km_cuda_fill(gpu, r->front_ids, POISON, places, &err));
	must(km_cuda_fill(gpu, r->front_weights, POISON, places, &err));
	send(r->b.y, r->before, r->values * 4);
	must(km_cuda_moe_run(gpu, plan, &r->problem, &r->b, &err));
	must(km_cuda_download(gpu, y, r->b.y, r->values * 4, &err));
}

static void check_selected(const rig *r)
{
	size_t bytes = (size_t)r->tokens * TOP_K * 4;
	uint32_t ours[ROWS * TOP_K], theirs[ROWS * TOP_K];

	must(km_cuda_download(gpu, ours, r->front_ids, bytes, &err));
	must(km_cuda_download(gpu, theirs, r->gate_ids, bytes, &err));
	assert_memory_equal(ours, theirs, bytes);
	must(km_cuda_download(gpu, ours, r->front_weights, bytes, &err));
	must(km_cuda_download(gpu, theirs, r->gate_weights, bytes, &err));
	assert_memory_equal(ours, theirs, bytes);
}

/* How far the shared experts' part, with - without, is from its product, of the bound: f32's rounding of 256 products and
 * of the two sums that it is a difference of. */
static double shared_error(const rig *r, const float *with, const float *without)
{
	double worst = 0;

	for (int t = 0; t < r->tokens; t++) {
		double act[SHARED];

		for (int i = 0; i < SHARED; i++) {
			double g = r->gate[t * SHARED + i];

			act[i] = g / (1 + exp(-g)) * r->up[t * SHARED + i];
		}
		for (int row = 0; row < r->hidden; row++) {
			size_t at = (size_t)t * (size_t)r->hidden + (size_t)row;
			double sum = 0, size = 0, apart;

			for (int i = 0; i < SHARED; i++) {
				double p = act[i] * (double)km_bf16_to_f32(r->down[(size_t)row * SHARED + (size_t)i]);

				sum += p;
				size += fabs(p);
			}
			apart = fabs((double)with[at] - (double)without[at] - sum);
			/* an activation is rounded to bf16: 2^-9 of each product */
			worst = fmax(worst, apart / (size / 512 + 0x1p-22 * (fabs((double)with[at]) + fabs((double)without[at]))));
		}
	}
	return worst;
}

static km_moe_plan plan_of(const rig *r, const km_moe_tile *tile)
{
	km_moe_before before = { 1, false, true, SHARED, true };
	km_moe_plan plan;

	must(km_moe_plan_make(&plan, &r->problem, &device, tile, &err));
	assert_true(plan.form != KM_MOE_DECODE || km_moe_plan_takes(&plan, &r->problem, &before));
	return plan;
}

static int check_tile(rig *r, const km_moe_tile *tile, int valid, uint64_t seed, double *worst)
{
	km_moe_plan plan = plan_of(r, tile);
	float *with = km_xmalloc(r->values * 4), *without = km_xmalloc(r->values * 4);
	int tokens = r->tokens;

	if (plan.form == KM_MOE_DECODE) {
		set_inputs(r, tokens, valid, false, seed);
		run_gate(r);
		run_experts(r, &plan, false, without);
		run_experts(r, &plan, true, with);
		check_selected(r);
		assert_memory_equal(with, without, r->values * 4);
		set_inputs(r, tokens, valid, true, seed);
		run_experts(r, &plan, true, with);
		check_selected(r);
		*worst = fmax(*worst, shared_error(r, with, without));
	}
	free(with);
	free(without);
	return plan.form == KM_MOE_DECODE;
}

static void test_tiles(void **state)
{
	size_t mark = km_cuda_mark(gpu);
	double worst = 0;
	int checks = 0;
	rig r;

	(void)state;
	rig_open(&r, short_run ? 512 : 1536, short_run ? 128 : 256);
	for (int tokens = 1; tokens <= ROWS; tokens++) {
		km_moe_tile tiles[MAX_TILES];
		int n;

		r.problem.tokens = r.tokens = r.shape.tokens = tokens;
		r.values = (size_t)tokens * (size_t)r.hidden;
		n = km_moe_candidates(&r.problem, &device, tiles, MAX_TILES);
		for (int i = 0; i < n; i += short_run ? 5 : 1)
			checks += check_tile(&r, &tiles[i], tokens - i % 2, (uint64_t)(100 * tokens + i), &worst);
	}
	assert_true(checks >= 8);
	assert_true(worst <= 1);
	rig_close(&r);
	km_cuda_rewind(gpu, mark);
	printf("figure: %d tiles, the shared experts' part within %.2f of its bound\n", checks, worst);
}

static void test_graph(void **state)
{
	size_t mark = km_cuda_mark(gpu);
	int replays = short_run ? 4 : 250;
	rig r;

	(void)state;
	rig_open(&r, 512, 128);
	for (int i = 0; i < 4; i++) {
		int tokens = 1 + i;
		float *ours, *theirs;
		km_cuda_graph *graph = NULL;
		km_moe_plan plan;

		r.problem.pdl = i % 2;
		set_inputs(&r, tokens, tokens, true, 7);
		plan = plan_of(&r, NULL);
		ours = km_xmalloc(r.values * 4);
		theirs = km_xmalloc(r.values * 4);
		run_experts(&r, &plan, true, theirs);
		must(km_cuda_capture_begin(gpu, &err));
		must(km_cuda_moe_run(gpu, &plan, &r.problem, &r.b, &err));
		must(km_cuda_capture_end(gpu, &graph, &err));
		for (int k = 0; k < replays; k++) {
			set_inputs(&r, tokens, 1 + k * 7 % tokens, true, 1000 + (uint64_t)k);
			run_experts(&r, &plan, true, theirs);
			send(r.b.y, r.before, r.values * 4);
			must(km_cuda_graph_launch(gpu, graph, &err));
			must(km_cuda_download(gpu, ours, r.b.y, r.values * 4, &err));
			if (memcmp(ours, theirs, r.values * 4) != 0)
				fail_msg("%d tokens, replay %d differs from a launch", tokens, k);
		}
		km_cuda_graph_free(graph);
		free(ours);
		free(theirs);
	}
	rig_close(&r);
	km_cuda_rewind(gpu, mark);
	printf("figure: %d replays with inputs that change\n", 4 * replays);
}

static void test_refusals(void **state)
{
	size_t mark = km_cuda_mark(gpu);
	float y[ROWS * 512];
	km_moe_plan plan;
	rig r;

	(void)state;
	rig_open(&r, 512, 128);
	set_inputs(&r, 1, 1, true, 1);
	plan = plan_of(&r, NULL);
	run_experts(&r, &plan, true, y);
	plan.form = KM_MOE_GROUPED;
	assert_int_equal(km_cuda_moe_run(gpu, &plan, &r.problem, &r.b, &err), KM_EINVAL);
	assert_non_null(strstr(err.msg, "no gate along"));
	plan.form = KM_MOE_DECODE;
	r.b.y_bf16 = true;
	assert_int_equal(km_cuda_moe_run(gpu, &plan, &r.problem, &r.b, &err), KM_EUNSUPPORTED);
	rig_close(&r);
	km_cuda_rewind(gpu, mark);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_tiles), cmocka_unit_test(test_graph),
		                            cmocka_unit_test(test_refusals) };
	int failed;

	short_run = argc > 1 && !strcmp(argv[1], "short");
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	if (km_cuda_open(&gpu, 0, (size_t)1 << 30, &err) < 0) {
		fprintf(stderr, "%s\n", err.msg);
		return 1;
	}
	device = (km_moe_device){ km_cuda_info_of(gpu)->capability, km_cuda_info_of(gpu)->multiprocessors };
	if (device.capability < 90) {
		printf("skip: the decode form needs capability 9.0\n");
		km_cuda_close(gpu);
		return 0;
	}
	printf("figure: %s, %s\n", km_cuda_info_of(gpu)->name, km_cuda_info_of(gpu)->toolkit);
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	km_cuda_close(gpu);
	return failed;
}
