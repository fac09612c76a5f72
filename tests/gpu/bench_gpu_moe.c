/*
 * The experts' time on a GPU: routed ids to summed output, as a serving step would run it.
 *
 *   bench_gpu_moe [--tp N] [--tokens LIST] [--candidates | --all | --prefill] [--chain] [--no-overlap]
 *                 [--json FILE] [--commit ID] [--seconds S]
 *
 * Kimi K2.5's experts (384, top 8, hidden 7168, int4 in groups of 32; intermediate 2048 / N), all of them
 * in memory. A graph of many calls, each with the next of 16 (4, then 2 for many tokens) uniform random
 * routings, so that weights come from memory but for chance; the median over replays, divided by the
 * calls. The floor is the time of the distinct experts' bytes, x and y, or of the products, at the device's
 * rates (device/roofline.h).
 * With --candidates each tile the planner lists is timed, and the best is shown beside the plan's own; --all
 * shows each, --prefill each of the form for many tokens.
 * With --chain the calls begin at the hidden state: the router's GEMM and gate in one launch, then the experts
 * that it chose; the router's weights are 30 copies in rotation, its bytes are in the floor.
 * The rivals' figures are the better of SGLang's and vLLM's Marlin pipelines, same method, one H100; on
 * another device they are shown, and compared with nothing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_moe.h"
#include "device/cuda_router.h"
#include "device/roofline.h"
#include "format/dtype.h"
#include "format/moe_layout.h"
#include "model/router.h"

enum { ROUTERS = 30, EXPERTS = 384, TOP_K = 8, HIDDEN = 7168, GROUP = 32, MODELS = 6, MAX_M = 8192, MAX_TILES = 128 };

#if KM_CUDA

static const char *const rivals_device = "NVIDIA H100 80GB HBM3";

static const struct rival {
	int tp, tokens;
	double us;
} rivals[] = {
	{ 8, 1, 25.4 }, { 8, 2, 38.0 }, { 8, 4, 57.2 }, { 8, 8, 95.1 }, { 8, 16, 154.6 }, { 8, 32, 243.6 },
	{ 8, 64, 362.1 }, { 8, 128, 460.3 }, { 8, 256, 542.2 }, { 8, 512, 581.0 }, { 8, 1024, 824.5 },
	{ 8, 2048, 1252.9 }, { 8, 4096, 2505.2 }, { 1, 1, 87.1 }, { 1, 2, 153.3 }, { 1, 4, 279.4 },
	{ 1, 8, 514.5 }, { 1, 16, 926.3 }, { 1, 32, 1570.5 }, { 1, 64, 2389.7 }, { 1, 128, 3076.6 },
	{ 1, 256, 3444.3 }, { 1, 512, 3518.1 }, { 1, 1024, 4523.1 }, { 1, 2048, 6745.2 }, { 1, 4096, 15216.7 },
};

/* From the hidden state, intermediate 256. */
static const struct rival chains[] = { { 8, 1, 31.5 }, { 8, 4, 64.7 }, { 8, 16, 166 } };

static double rival_us(int tp, int tokens, bool chain)
{
	for (size_t i = 0; chain && i < sizeof(chains) / sizeof(*chains); i++)
		if (chains[i].tp == tp && chains[i].tokens == tokens)
			return chains[i].us;
	if (chain)
		return 0;
	for (size_t i = 0; i < sizeof(rivals) / sizeof(*rivals); i++)
		if (rivals[i].tp == tp && rivals[i].tokens == tokens)
			return rivals[i].us;
	return 0;
}

typedef struct bench {
	km_cuda *gpu;
	km_moe_device device;
	km_roofline roofline;
	int tp, intermediate, routings;
	bool pdl, all, prefill, chain;
	const char *commit;
	km_router_shape router;
	km_router_plan router_plan;
	km_router_buffers routers; /* of the first of ROUTERS matrices */
	km_moe_weights experts;
	char *x, *y;
	int32_t *ids;
	float *weights;
	void *scratch;
	double distinct; /* experts hit, the mean over the routings */
	double share;    /* of a second, for one measurement */
} bench;

/* A few experts' random bytes, with scales near 0.01, copied to all. */
static int make_matrix(bench *b, km_moe_matrix *m, size_t bytes, km_err *err)
{
	size_t record = KM_MOE_RECORD_BYTES(GROUP), all = bytes * MODELS;
	uint8_t *host = km_xmalloc(all), *to = NULL;
	int rc = 0;

	for (size_t at = 0; at + 8 <= all; at += 8) {
		uint64_t v = km_rng_u64(1, at);

		if (at % record >= KM_MOE_RECORD_CODES)
			v = (v & UINT64_C(0x807f807f807f807f)) | UINT64_C(0x3c003c003c003c00);
		memcpy(host + at, &v, 8);
	}
	rc = km_cuda_take(b->gpu, (void **)&to, bytes * EXPERTS, "experts", err);
	for (int e = 0; e < EXPERTS && rc == 0; e += MODELS)
		rc = e == 0 ? km_cuda_upload(b->gpu, to, host, all, err)
		            : km_cuda_copy(b->gpu, to + (size_t)e * bytes, to, all, err);
	*m = (km_moe_matrix){ to, NULL, bytes, 0 };
	free(host);
	return rc;
}

static int open_router(bench *b, km_err *err)
{
	size_t values = (size_t)EXPERTS * HIDDEN;
	uint16_t *w = km_xmalloc(values * 2);
	km_router_shape most = { .tokens = MAX_M, .experts = EXPERTS, .hidden = HIDDEN, .top_k = TOP_K, .groups = 1,
		                 .topk_group = 1, .block = 8, .renormalize = true, .scale = 1 };
	km_router_buffers *r = &b->routers;
	void *to = NULL;
	int rc;

	for (size_t i = 0; i < values; i++)
		w[i] = km_f32_to_bf16(0.02f * km_rng_normal(9, i));
	b->router = most;
	rc = km_cuda_take(b->gpu, &to, values * 2 * ROUTERS, "router", err);
	for (int i = 0; i < ROUTERS && rc == 0; i++)
		rc = km_cuda_upload(b->gpu, (char *)to + (size_t)i * values * 2, w, values * 2, err);
	r->w = to;
	if (rc == 0)
		rc = km_cuda_take(b->gpu, (void **)&r->logits, (size_t)MAX_M * EXPERTS * 4, "logits", err);
	if (rc == 0)
		rc = km_cuda_take(b->gpu, &to, EXPERTS * 4, "bias", err);
	if (rc == 0)
		rc = km_cuda_fill(b->gpu, to, 0, EXPERTS * 4, err);
	r->bias = to;
	if (rc == 0)
		rc = km_cuda_take(b->gpu, &r->scratch, km_cuda_router_scratch_bytes(&most), "router", err);
	if (rc == 0)
		rc = km_cuda_fill(b->gpu, r->scratch, 0, km_cuda_router_scratch_bytes(&most), err);
	free(w);
	return rc;
}

static int open_bench(bench *b, km_err *err)
{
	km_moe_problem most = { .tokens = MAX_M, .experts = EXPERTS, .global_experts = EXPERTS, .top_k = TOP_K,
		                .hidden = HIDDEN, .intermediate = b->intermediate, .group = GROUP,
		                .packed = true };
	size_t scratch = km_moe_scratch_size(&most, &b->device), rows = (size_t)MAX_M * HIDDEN;
	uint16_t *x = km_xmalloc(rows * 2);
	int rc;

	for (size_t i = 0; i < rows; i++)
		x[i] = km_f32_to_bf16(km_rng_normal(2, i));
	b->experts = (km_moe_weights){ .packed = true, .group = GROUP };
	rc = make_matrix(b, &b->experts.gate_up, km_moe_gate_up_bytes(HIDDEN, b->intermediate, GROUP), err);
	if (rc == 0)
		rc = make_matrix(b, &b->experts.down, km_moe_down_bytes(HIDDEN, b->intermediate, GROUP), err);
	if (rc == 0)
		rc = km_cuda_take(b->gpu, (void **)&b->x, rows * 2, "x", err);
	if (rc == 0)
		rc = km_cuda_take(b->gpu, (void **)&b->y, rows * 2, "y", err);
	if (rc == 0)
		rc = km_cuda_take(b->gpu, (void **)&b->ids, (size_t)MAX_M * TOP_K * 4 * 2, "ids", err);
	if (rc == 0)
		rc = km_cuda_take(b->gpu, (void **)&b->weights, (size_t)MAX_M * TOP_K * 4 * 2, "weights", err);
	if (rc == 0)
		rc = km_cuda_take(b->gpu, &b->scratch, scratch, "scratch", err);
	if (rc == 0)
		rc = km_cuda_fill(b->gpu, b->scratch, 0, KM_MOE_SYNC_BYTES, err);
	if (rc == 0)
		rc = km_cuda_upload(b->gpu, b->x, x, rows * 2, err);
	if (rc == 0 && b->chain)
		rc = open_router(b, err);
	free(x);
	return rc;
}

static bool is_among(const int32_t *row, int count, int32_t id)
{
	for (int i = 0; i < count; i++)
		if (row[i] == id)
			return true;
	return false;
}

/* Fills a routing of distinct experts for each token; returns how many experts it names. */
static int make_routing(int32_t *ids, int tokens, uint64_t seed)
{
	char hit[EXPERTS] = { 0 };
	int distinct = 0;
	uint64_t n = 0;

	for (int t = 0; t < tokens; t++)
		for (int k = 0; k < TOP_K; k++) {
			int32_t *row = ids + (size_t)t * TOP_K;

			do
				row[k] = (int32_t)(km_rng_u64(seed, n++) % EXPERTS);
			while (is_among(row, k, row[k]));
			distinct += !hit[row[k]];
			hit[row[k]] = 1;
		}
	return distinct;
}

static int make_routings(bench *b, int tokens, km_err *err)
{
	size_t places = (size_t)tokens * TOP_K, all;
	int32_t *ids;
	float *weights;
	int rc;

	b->routings = tokens <= 128 ? 16 : tokens <= 1024 ? 4 : 2;
	all = places * (size_t)b->routings;
	ids = km_xmalloc(all * 4);
	weights = km_xmalloc(all * 4);
	b->distinct = 0;
	for (int r = 0; r < b->routings; r++)
		b->distinct += make_routing(ids + (size_t)r * places, tokens, 31 + (uint64_t)r) / (double)b->routings;
	for (size_t i = 0; i < all; i++)
		weights[i] = 0.05f + 0.2f * (float)km_rng_uniform(7, i);
	rc = km_cuda_upload(b->gpu, b->ids, ids, all * 4, err);
	if (rc == 0)
		rc = km_cuda_upload(b->gpu, b->weights, weights, all * 4, err);
	free(ids);
	free(weights);
	return rc;
}

/* The weights of what was hit, x and y. */
static double least_bytes(const bench *b, int tokens)
{
	double experts = b->distinct * 3.0 * HIDDEN * b->intermediate * 0.5625, rows = 2.0 * tokens * HIDDEN * 2;

	return experts + rows + (b->chain ? 2.0 * EXPERTS * HIDDEN : 0);
}

static double least_flops(const bench *b, int tokens)
{
	double experts = 6.0 * tokens * TOP_K * HIDDEN * b->intermediate;

	return experts + (b->chain ? 2.0 * tokens * EXPERTS * HIDDEN : 0);
}

static double floor_us(const bench *b, int tokens)
{
	return km_roofline_us(&b->roofline, least_bytes(b, tokens), least_flops(b, tokens));
}

/* x and y in rotation too: of many tokens the whole, of few a piece of the same buffer. */
static km_moe_buffers call_buffers(const bench *b, int tokens, int call)
{
	size_t places = (size_t)tokens * TOP_K, rows = (size_t)tokens * HIDDEN * 2;
	size_t pieces = MAX_M / (size_t)tokens, piece = (size_t)call % (pieces < 64 ? pieces : 64);
	size_t routing = (size_t)(call % b->routings) * places;

	return (km_moe_buffers){ .x = b->x + piece * rows, .y = b->y + piece * rows, .y_bf16 = true,
		                 .ids = b->ids + routing, .weights = b->weights + routing,
		                 .experts = b->experts, .routed_scale = 2.827f, .scratch = b->scratch };
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static int run_call(bench *b, const km_moe_plan *plan, const km_moe_problem *p, int call, km_err *err)
{
	km_moe_buffers buffers = call_buffers(b, p->tokens, call);

	if (b->chain) {
		km_router_buffers r = b->routers;

		r.x = buffers.x;
		r.w = (const char *)r.w + (size_t)(call % ROUTERS) * EXPERTS * HIDDEN * 2;
		r.ids = (int32_t *)buffers.ids;
		r.weights = (float *)buffers.weights;
		KM_TRY(km_cuda_router_run(b->gpu, KM_PART_ROUTER_GATE, &b->router_plan, &b->router, &r, err));
	}
	return km_cuda_moe_run(b->gpu, plan, p, &buffers, err);
}

/* Without a graph, a call: what the processor's launches cost where they are slower than the work. */
static int time_launches(bench *b, const km_moe_plan *plan, const km_moe_problem *p, double *us, km_err *err)
{
	int calls = 64;

	for (int round = 0; round < 2; round++) {
		KM_TRY(km_cuda_time_begin(b->gpu, err));
		for (int i = 0; i < calls; i++)
			KM_TRY(run_call(b, plan, p, i, err));
		KM_TRY(km_cuda_time_end(b->gpu, us, err));
	}
	*us /= calls;
	return 0;
}

/* Median over replays, a call; p95 too where wanted. */
static int time_plan(bench *b, const km_moe_plan *plan, const km_moe_problem *p, double *us, double *p95,
                     km_err *err)
{
	double guess = least_bytes(b, p->tokens) / 2e6 + least_flops(b, p->tokens) / 5e8, took[64]; /* us */
	int calls = (int)(b->share * 1e6 / 8 / guess), replays, rc = 0;
	km_cuda_graph *graph = NULL;

	calls = calls < b->routings ? b->routings : calls > 320 ? 320 : calls / b->routings * b->routings;
	replays = (int)(b->share * 1e6 / guess / calls);
	replays = replays < 3 ? 3 : replays > 64 ? 64 : replays;
	KM_TRY(km_cuda_capture_begin(b->gpu, err));
	for (int i = 0; i < calls && rc == 0; i++)
		rc = run_call(b, plan, p, i, err);
	KM_TRY(km_cuda_capture_end(b->gpu, &graph, err));
	for (int i = -1; i < replays && rc == 0; i++) {
		double t = 0;

		rc = km_cuda_time_begin(b->gpu, err);
		if (rc == 0)
			rc = km_cuda_graph_launch(b->gpu, graph, err);
		if (rc == 0)
			rc = km_cuda_time_end(b->gpu, &t, err);
		if (i >= 0)
			took[i] = t / calls;
	}
	km_cuda_graph_free(graph);
	if (rc == 0) {
		qsort(took, (size_t)replays, sizeof(*took), compare);
		*us = took[replays / 2];
		if (p95)
			*p95 = took[replays * 95 / 100 < replays - 1 ? replays * 95 / 100 : replays - 1];
	}
	return rc;
}

static void tile_text(char *to, size_t size, const km_moe_plan *plan)
{
	snprintf(to, size, "%s %dx%d g%d s%d+%d", km_moe_form_name(plan->form), plan->tile.block_m,
	         plan->tile.block_n, plan->tile.group_m, plan->tile.stages, plan->x_stages);
}

static int best_candidate(bench *b, const km_moe_problem *p, double *us, char *name, size_t size, km_err *err)
{
	km_moe_tile tiles[MAX_TILES];
	int n = km_moe_candidates(p, &b->device, tiles, MAX_TILES);

	*us = 0;
	for (int i = 0; i < n; i++) {
		km_moe_plan plan;
		double t = 0;

		KM_TRY(km_moe_plan_make(&plan, p, &b->device, &tiles[i], err));
		if (b->prefill && plan.form != KM_MOE_PREFILL)
			continue;
		KM_TRY(time_plan(b, &plan, p, &t, NULL, err));
		if (*us == 0 || t < *us) {
			*us = t;
			tile_text(name, size, &plan);
		}
		if (b->all) {
			char text[64];

			tile_text(text, sizeof(text), &plan);
			printf("    %-32s %9.2f\n", text, t);
		}
	}
	return 0;
}

typedef struct row {
	int tokens;
	double us, p95, launch_us, floor_us;
	double rival_us; /* 0: none */
	char plan[64];
} row;

static bool rivals_ran_here(const bench *b)
{
	return !strcmp(km_cuda_info_of(b->gpu)->name, rivals_device);
}

/* What is not known, and what was measured on another device, is a dash. */
static void put_row(const bench *b, const row *r)
{
	printf("%2d %6d %-32s %9.2f ", b->tp, r->tokens, r->plan, r->us);
	if (r->floor_us > 0)
		printf("%9.2f %5.1f%% ", r->floor_us, 100 * r->floor_us / r->us);
	else
		printf("%9s %6s ", "-", "-");
	if (r->rival_us > 0)
		printf("%10.1f ", r->rival_us);
	else
		printf("%10s ", "-");
	if (r->rival_us > 0 && rivals_ran_here(b))
		printf("%6.2f ", r->rival_us / r->us);
	else
		printf("%6s ", "-");
	printf("%8.1f", 1e-6 * least_flops(b, r->tokens) / r->us);
}

static void put_or_null(FILE *json, const char *name, double v, int digits)
{
	if (v > 0)
		fprintf(json, ", \"%s\": %.*f", name, digits, v);
	else
		fprintf(json, ", \"%s\": null", name);
}

static void put_json_row(const bench *b, const row *r, FILE *json, bool first)
{
	double baseline = rivals_ran_here(b) ? r->rival_us : 0;

	fprintf(json, "%s\n  {\"tokens\": %d, \"form\": \"%s\", \"us_median\": %.3f, \"us_p95\": %.3f, "
	        "\"launch_us_median\": %.3f, \"gbps\": %.2f", first ? "" : ",", r->tokens,
	        b->chain ? "router+experts" : "experts", r->us, r->p95, r->launch_us,
	        least_bytes(b, r->tokens) / r->us / 1e3);
	put_or_null(json, "roofline", r->floor_us / r->us, 4);
	put_or_null(json, "baseline", baseline, 1);
	put_or_null(json, "baseline_ratio", baseline / r->us, 3);
	fprintf(json, ", \"tp\": %d, \"tile\": \"%s\"", b->tp, r->plan);
	put_or_null(json, "floor_us", r->floor_us, 3);
	fprintf(json, "}");
}

static int bench_tokens(bench *b, int tokens, bool candidates, FILE *json, bool first, km_err *err)
{
	km_moe_problem p = { .tokens = tokens, .experts = EXPERTS, .global_experts = EXPERTS, .top_k = TOP_K,
		             .hidden = HIDDEN, .intermediate = b->intermediate, .group = GROUP, .packed = true,
		             .pdl = b->pdl };
	row r = { .tokens = tokens, .rival_us = rival_us(b->tp, tokens, b->chain) };
	double best = 0;
	char best_name[64] = "";
	km_moe_plan plan;

	KM_TRY(make_routings(b, tokens, err));
	KM_TRY(km_moe_plan_make(&plan, &p, &b->device, NULL, err));
	if (b->chain) {
		km_router_device d = { .capability = b->device.capability,
			               .multiprocessors = b->device.multiprocessors, .blas = true,
			               .pdl = b->pdl };

		b->router.tokens = tokens;
		KM_TRY(km_router_plan_make(&b->router_plan, &b->router, &d, err));
	}
	KM_TRY(time_plan(b, &plan, &p, &r.us, &r.p95, err));
	if (json)
		KM_TRY(time_launches(b, &plan, &p, &r.launch_us, err));
	tile_text(r.plan, sizeof(r.plan), &plan);
	r.floor_us = floor_us(b, tokens);
	if (candidates)
		KM_TRY(best_candidate(b, &p, &best, best_name, sizeof(best_name), err));
	put_row(b, &r);
	if (candidates)
		printf("   %-32s %9.2f %5.1f%%", best_name, best, 100 * r.floor_us / best);
	printf("\n");
	fflush(stdout);
	if (json)
		put_json_row(b, &r, json, first);
	return 0;
}

static void put_head(const bench *b, bool candidates, FILE *json)
{
	const km_cuda_info *info = km_cuda_info_of(b->gpu);
	km_buf rates = KM_BUF_INIT;

	km_roofline_describe(&b->roofline, &rates);
	printf("# %s, %s; floor: %s\n# rival: the better of SGLang's and vLLM's Marlin pipelines, on an %s%s\n",
	       info->name, info->toolkit, rates.data, rivals_device,
	       rivals_ran_here(b) ? "" : ", so without a ratio here");
	printf("TP      M plan                                    us     floor  share H100 rival  ratio  TFLOP/s%s\n",
	       candidates ? "   best of all tiles" : "");
	if (json) {
		fprintf(json, "{\"device\": \"%s\",\n \"toolkit\": \"%s\",\n \"commit\": \"%s\",\n \"roofline_source\": "
		        "\"%s\"", info->name, info->toolkit, b->commit, b->roofline.source);
		put_or_null(json, "roofline_gbps", b->roofline.gbps, 0);
		put_or_null(json, "roofline_tflops", b->roofline.tflops, 0);
		fprintf(json, ",\n \"shape\": {\"experts\": %d, \"top_k\": %d, \"hidden\": %d, \"intermediate\": %d, "
		        "\"group\": %d, \"overlap\": %s},\n \"rows\": [", EXPERTS, TOP_K, HIDDEN, b->intermediate,
		        GROUP, b->pdl ? "true" : "false");
	}
	km_buf_release(&rates);
}

static int run_all(bench *b, const char *list, bool candidates, const char *path, km_err *err)
{
	FILE *json = path ? fopen(path, "w") : NULL;
	bool first = true;
	int rc = 0;

	if (path && !json)
		return km_fail(err, KM_EIO, "%s cannot be written", path);
	put_head(b, candidates, json);
	while (*list && rc == 0) {
		char *end;
		long tokens = strtol(list, &end, 10);

		if (end == list || tokens < 1 || tokens > MAX_M) {
			rc = km_fail(err, KM_EINVAL, "--tokens: 1 to %d, with commas, got %s", MAX_M, list);
			break;
		}
		rc = bench_tokens(b, (int)tokens, candidates, json, first, err);
		first = false;
		list = *end == ',' ? end + 1 : end;
	}
	if (json) {
		bool written = fprintf(json, "\n]}\n") > 0 && !ferror(json);

		if ((fclose(json) || !written) && rc == 0)
			rc = km_fail(err, KM_EIO, "%s cannot be written", path);
	}
	return rc;
}

int main(int argc, char **argv)
{
	bench b = { .tp = 8, .pdl = true, .share = 0.05, .commit = "" };
	const char *list = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096", *json = NULL;
	bool candidates = false;
	km_err err;
	int rc;

	for (int i = 1; i < argc; i++) {
		bool more = i + 1 < argc;

		if (!strcmp(argv[i], "--tp") && more)
			b.tp = (int)strtol(argv[++i], NULL, 10);
		else if (!strcmp(argv[i], "--tokens") && more)
			list = argv[++i];
		else if (!strcmp(argv[i], "--seconds") && more)
			b.share = strtod(argv[++i], NULL);
		else if (!strcmp(argv[i], "--json") && more)
			json = argv[++i];
		else if (!strcmp(argv[i], "--commit") && more)
			b.commit = argv[++i];
		else if (!strcmp(argv[i], "--chain"))
			b.chain = true;
		else if (!strcmp(argv[i], "--candidates"))
			candidates = true;
		else if (!strcmp(argv[i], "--all"))
			candidates = b.all = true;
		else if (!strcmp(argv[i], "--prefill"))
			candidates = b.all = b.prefill = true;
		else if (!strcmp(argv[i], "--no-overlap"))
			b.pdl = false;
		else {
			fprintf(stderr, "bench_gpu_moe: what is %s?\n", argv[i]);
			return 2;
		}
	}
	if (b.tp < 1 || b.tp > 16 || 2048 % b.tp || !(b.share > 0)) {
		fprintf(stderr, "bench_gpu_moe: --tp is 1, 2, 4, 8 or 16, --seconds above 0\n");
		return 2;
	}
	b.intermediate = 2048 / b.tp;
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	rc = km_cuda_open(&b.gpu, 0, ((size_t)14 << 30) / (size_t)b.tp + ((size_t)3 << 30), &err);
	if (rc == 0) {
		b.device = (km_moe_device){ km_cuda_info_of(b.gpu)->capability,
			                    km_cuda_info_of(b.gpu)->multiprocessors };
		km_roofline_of_gpu(km_cuda_info_of(b.gpu), &b.roofline);
		rc = open_bench(&b, &err);
	}
	if (rc == 0)
		rc = run_all(&b, list, candidates, json, &err);
	if (rc < 0)
		fprintf(stderr, "bench_gpu_moe: %s\n", err.msg);
	if (b.gpu)
		km_cuda_close(b.gpu);
	return rc < 0;
}

#else

int main(void)
{
	printf("skip: this build has no CUDA\n");
	return 0;
}

#endif
