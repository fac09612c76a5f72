/* The benchmark's GPU half. Compiled to nothing without CUDA: its callers do not call it then. */
#include "model/router_bench.h"

#if KM_CUDA

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_blas.h"
#include "format/dtype.h"
#include "model/router.h"
#include "model/router_check.h"

enum { MOST_COPIES = 200, MOST_CALLS = 400, LEAST_CALLS = 20, REPLAYS = 25, CHECKED_ROWS = 2048 };

static const size_t ROTATE_BYTES = 150u << 20; /* three times H100's L2 */

/* Copies of one input, `stride` bytes apart. */
typedef struct copies {
	char *base;
	size_t stride;
	int count;
} copies;

typedef struct gpu_bench {
	km_cuda *cuda;
	km_router_shape shape;
	km_router_device device;
	km_router_plan plan;
	km_router_buffers b;
	copies w, x, logits;
	size_t mark;               /* of what depends on the tokens */
	double last_us;            /* the row before */
	uint16_t *host_x;          /* [pool, hidden] */
	void *host_w;              /* [experts, hidden] */
	float *host_logits, *host_bias; /* [pool, experts], [experts] */
} gpu_bench;

static int copy_count(size_t bytes)
{
	size_t n = (ROTATE_BYTES + bytes - 1) / bytes;

	return n < 1 ? 1 : n > MOST_COPIES ? MOST_COPIES : (int)n;
}

/* `rows` rows of `row_bytes`, from a pool of `pool` rows that repeats. */
static int take_copies(gpu_bench *g, copies *c, const void *pool, int pool_rows, size_t row_bytes, int rows,
                       const char *what, km_err *err)
{
	size_t bytes = row_bytes * (size_t)rows;
	void *p;

	c->stride = (bytes + 255) / 256 * 256;
	c->count = copy_count(bytes);
	KM_TRY(km_cuda_take(g->cuda, &p, c->stride * (size_t)c->count, what, err));
	c->base = p;
	for (int done = 0; done < rows; done += pool_rows) {
		int n = rows - done < pool_rows ? rows - done : pool_rows;

		KM_TRY(km_cuda_upload(g->cuda, c->base + (size_t)done * row_bytes, pool,
		                      row_bytes * (size_t)n, err));
	}
	for (int i = 1; i < c->count; i++)
		KM_TRY(km_cuda_copy(g->cuda, c->base + c->stride * (size_t)i, c->base, bytes, err));
	return 0;
}

static void fill_host(gpu_bench *g)
{
	const km_router_shape *s = &g->shape;
	size_t weights = (size_t)s->experts * (size_t)s->hidden, x = (size_t)KM_BENCH_POOL * (size_t)s->hidden;
	size_t logits = (size_t)KM_BENCH_POOL * (size_t)s->experts;

	g->host_x = km_xmalloc(x * 2);
	g->host_w = km_xmalloc(weights * 4);
	g->host_logits = km_xmalloc(logits * 4);
	g->host_bias = km_xmalloc((size_t)s->experts * 4);
	for (size_t i = 0; i < x; i++)
		g->host_x[i] = km_f32_to_bf16(km_rng_normal(2, i));
	for (size_t i = 0; i < weights; i++) {
		float v = km_rng_normal(1, i) * 0.03f;

		if (s->weights_f32)
			((float *)g->host_w)[i] = v;
		else
			((uint16_t *)g->host_w)[i] = km_f32_to_bf16(v);
	}
	for (size_t i = 0; i < logits; i++)
		g->host_logits[i] = km_rng_normal(4, i) * 2;
	for (int e = 0; e < s->experts; e++)
		g->host_bias[e] = km_rng_normal(3, (uint64_t)e) * 0.5f;
}

static int open_bench(gpu_bench *g, const km_router_bench_options *o, km_err *err)
{
	const km_cuda_info *info;
	km_cuda_info first;
	void *p;

	*g = (gpu_bench){ .shape = o->shape };
	KM_TRY(km_cuda_describe(0, &first, err));
	KM_TRY(km_cuda_open(&g->cuda, 0, first.memory_bytes / 4, err));
	info = km_cuda_info_of(g->cuda);
	g->device = (km_router_device){ .capability = info->capability,
		                        .multiprocessors = info->multiprocessors,
		                        .pdl = o->overlap && info->capability >= 90 };
	g->device.blas = km_cuda_blas_open(g->cuda, NULL) == 0;
	fill_host(g);
	KM_TRY(take_copies(g, &g->w, g->host_w, g->shape.experts,
	                   (size_t)g->shape.hidden * (g->shape.weights_f32 ? 4 : 2), g->shape.experts,
	                   "router weights", err));
	KM_TRY(km_cuda_take(g->cuda, &p, (size_t)g->shape.experts * 4, "bias", err));
	g->b.bias = p;
	KM_TRY(km_cuda_upload(g->cuda, p, g->host_bias, (size_t)g->shape.experts * 4, err));
	g->mark = km_cuda_mark(g->cuda);
	return 0;
}

static void close_bench(gpu_bench *g)
{
	km_cuda_close(g->cuda);
	free(g->host_x);
	free(g->host_w);
	free(g->host_logits);
	free(g->host_bias);
}

/* What depends on the number of tokens: taken anew for each. */
static int set_tokens(gpu_bench *g, int tokens, km_err *err)
{
	km_router_shape *s = &g->shape;
	size_t places, capacity, scratch;
	void *p;

	s->tokens = tokens;
	places = (size_t)tokens * (size_t)s->top_k;
	capacity = (size_t)km_cuda_router_capacity(s);
	scratch = km_cuda_router_scratch_bytes(s);
	KM_TRY(km_router_plan_make(&g->plan, s, &g->device, err));
	km_cuda_rewind(g->cuda, g->mark);
	KM_TRY(take_copies(g, &g->x, g->host_x, KM_BENCH_POOL, (size_t)s->hidden * 2, tokens, "hidden", err));
	KM_TRY(take_copies(g, &g->logits, g->host_logits, KM_BENCH_POOL, (size_t)s->experts * 4, tokens,
	                   "logits", err));
	KM_TRY(km_cuda_take(g->cuda, &p, places * 4, "ids", err));
	g->b.ids = p;
	KM_TRY(km_cuda_take(g->cuda, &p, places * 4, "weights", err));
	g->b.weights = p;
	KM_TRY(km_cuda_take(g->cuda, &p, capacity * 4, "sorted places", err));
	g->b.sorted = p;
	KM_TRY(km_cuda_take(g->cuda, &p, capacity * 4, "block experts", err));
	g->b.block_expert = p;
	KM_TRY(km_cuda_take(g->cuda, &p, 4, "total", err));
	g->b.total = p;
	KM_TRY(km_cuda_take(g->cuda, &p, scratch, "scratch", err));
	g->b.scratch = p;
	return km_cuda_fill(g->cuda, p, 0, scratch, err);
}

static enum km_router_part part_of(const char *form)
{
	return !strcmp(form, "router")       ? KM_PART_GEMM
	       : !strcmp(form, "gate")       ? KM_PART_GATE
	       : !strcmp(form, "align")      ? KM_PART_ALIGN
	       : !strcmp(form, "gate+align") ? KM_PART_GATE_ALIGN
	       : !strcmp(form, "one-launch") ? KM_PART_ONE_LAUNCH
	                                     : KM_PART_CHAIN;
}

static int call(gpu_bench *g, enum km_router_part part, int i, km_err *err)
{
	km_router_buffers b = g->b;

	b.w = g->w.base + g->w.stride * (size_t)(i % g->w.count);
	b.x = g->x.base + g->x.stride * (size_t)(i % g->x.count);
	b.logits = (float *)(g->logits.base + g->logits.stride * (size_t)(i % g->logits.count));
	return km_cuda_router_run(g->cuda, part, &g->plan, &g->shape, &b, err);
}

/* The gate's and the alignment's results, against copy 0's logits as they are on the GPU. */
static int check_selection(gpu_bench *g, bool aligned, km_err *err)
{
	km_router_shape s = g->shape;
	size_t places = (size_t)s.tokens * (size_t)s.top_k, n;
	int32_t *ids = km_xmalloc(places * 4), total = 0, *sorted = NULL, *blocks = NULL;
	float *weights = km_xmalloc(places * 4), *logits;
	km_router_check check = { 0 };
	int rc;

	rc = km_cuda_download(g->cuda, ids, g->b.ids, places * 4, err);
	if (rc == 0)
		rc = km_cuda_download(g->cuda, weights, g->b.weights, places * 4, err);
	s.tokens = s.tokens < CHECKED_ROWS ? s.tokens : CHECKED_ROWS;
	n = (size_t)s.tokens * (size_t)s.experts;
	logits = km_xmalloc(n * 4);
	if (rc == 0)
		rc = km_cuda_download(g->cuda, logits, g->logits.base, n * 4, err);
	if (rc == 0)
		rc = km_router_check_gate(&check, &s, logits, g->host_bias, NULL, s.tokens, ids, weights, err);
	if (rc == 0 && aligned)
		rc = km_cuda_download(g->cuda, &total, g->b.total, 4, err);
	if (rc == 0 && aligned && total >= 0 && total <= km_cuda_router_capacity(&g->shape)) {
		sorted = km_xmalloc((size_t)total * 4 + 4);
		blocks = km_xmalloc((size_t)total * 4 + 4);
		rc = km_cuda_download(g->cuda, sorted, g->b.sorted, (size_t)total * 4, err);
		if (rc == 0)
			rc = km_cuda_download(g->cuda, blocks, g->b.block_expert,
			                      (size_t)(total / s.block) * 4, err);
		if (rc == 0)
			rc = km_router_check_align(&g->shape, ids, sorted, blocks, total, err);
	}
	free(ids);
	free(weights);
	free(logits);
	free(sorted);
	free(blocks);
	return rc;
}

static int check_logits(gpu_bench *g, km_err *err)
{
	km_router_shape s = g->shape;
	km_router_check check = { 0 };
	float *logits;
	int rc;

	s.tokens = s.tokens < KM_BENCH_POOL ? s.tokens : KM_BENCH_POOL;
	logits = km_xmalloc((size_t)s.tokens * (size_t)s.experts * 4);
	rc = km_cuda_download(g->cuda, logits, g->logits.base, (size_t)s.tokens * (size_t)s.experts * 4, err);
	if (rc == 0)
		rc = km_router_check_logits(&check, &s, g->host_x, g->host_w, logits, 0,
		                            s.tokens > 4 ? s.tokens / 4 : 1, err);
	free(logits);
	return rc;
}

/* Runs the form once on copy 0, over poisoned outputs, and checks what it made. */
static int check_form(gpu_bench *g, enum km_router_part part, km_err *err)
{
	size_t places = (size_t)g->shape.tokens * (size_t)g->shape.top_k;
	bool logits = part == KM_PART_GEMM || part == KM_PART_CHAIN || part == KM_PART_ONE_LAUNCH;

	if (logits)
		KM_TRY(km_cuda_fill(g->cuda, g->logits.base, 0xff, g->logits.stride, err));
	if (part == KM_PART_ALIGN)
		KM_TRY(call(g, KM_PART_GATE, 0, err));
	else
		KM_TRY(km_cuda_fill(g->cuda, g->b.ids, 0xff, places * 4, err));
	KM_TRY(call(g, part, 0, err));
	KM_TRY(km_cuda_wait(g->cuda, err));
	if (logits)
		KM_TRY(check_logits(g, err));
	return part == KM_PART_GEMM ? 0 : check_selection(g, part != KM_PART_GATE, err);
}

static int time_graph(gpu_bench *g, enum km_router_part part, km_router_bench_row *row, km_err *err)
{
	km_cuda_graph *graph = NULL;
	double us[REPLAYS], once;
	int calls = g->w.count > g->logits.count ? g->w.count : g->logits.count, rc;

	KM_TRY(km_cuda_time_begin(g->cuda, err));
	KM_TRY(call(g, part, 0, err));
	KM_TRY(km_cuda_time_end(g->cuda, &once, err));
	calls = calls < LEAST_CALLS ? LEAST_CALLS : calls > MOST_CALLS ? MOST_CALLS : calls;
	if (once * calls > 20e3)
		calls = LEAST_CALLS;
	KM_TRY(km_cuda_capture_begin(g->cuda, err));
	rc = 0;
	for (int i = 0; i < calls && rc == 0; i++)
		rc = call(g, part, i, err);
	if (km_cuda_capture_end(g->cuda, &graph, rc ? NULL : err) < 0 || rc < 0)
		return rc < 0 ? rc : KM_EDEVICE;
	for (int i = -2; i < REPLAYS && rc == 0; i++) {
		double t = 0;

		rc = km_cuda_time_begin(g->cuda, err);
		if (rc == 0)
			rc = km_cuda_graph_launch(g->cuda, graph, err);
		if (rc == 0)
			rc = km_cuda_time_end(g->cuda, &t, err);
		if (i >= 0)
			us[i] = t / calls;
	}
	km_cuda_graph_free(graph);
	if (rc == 0)
		km_router_bench_quantiles(us, REPLAYS, &row->us_median, &row->us_p95);
	return rc;
}

static int time_launches(gpu_bench *g, enum km_router_part part, km_router_bench_row *row, km_err *err)
{
	enum { ROUNDS = 7, CALLS = 100 };
	double us[ROUNDS], p95;
	int calls = row->us_median > 50 ? 20 : CALLS;

	for (int r = 0; r < ROUNDS; r++) {
		int64_t start = km_now_ns();

		for (int i = 0; i < calls; i++)
			KM_TRY(call(g, part, i, err));
		KM_TRY(km_cuda_wait(g->cuda, err));
		us[r] = (double)(km_now_ns() - start) * 1e-3 / calls;
	}
	km_router_bench_quantiles(us, ROUNDS, &row->launch_us_median, &p95);
	return 0;
}

static int time_row(gpu_bench *g, km_router_bench_row *row, km_err *err)
{
	enum km_router_part part = part_of(row->form);

	if (g->shape.tokens != row->tokens)
		KM_TRY(set_tokens(g, row->tokens, err));
	KM_TRY(check_form(g, part, err));
	/* A long GEMM draws the card to its power limit and lowers its clock for the next form. */
	nanosleep(&(struct timespec){ .tv_nsec = g->last_us > 30 ? 100000000 : 10000000 }, NULL);
	KM_TRY(time_graph(g, part, row, err));
	g->last_us = row->us_median;
	return time_launches(g, part, row, err);
}

int km_router_bench_time_gpu(km_router_bench_report *report, const km_router_bench_options *o,
                             km_progress *progress, km_err *err)
{
	gpu_bench g;
	int rc = open_bench(&g, o, err);

	g.shape.tokens = 0;
	for (int i = 0; i < report->count && rc == 0; i++) {
		rc = time_row(&g, &report->rows[i], err);
		if (rc < 0)
			km_fail_within(err, "%s at %d tokens", report->rows[i].form, report->rows[i].tokens);
		km_progress_add(progress, 1);
	}
	close_bench(&g);
	return rc;
}

static const int tune_tokens[] = { 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256 };

/* In the order in which they overtake each other. */
static const enum km_router_gemm tune_gemms[] = { KM_GEMM_RESIDENT, KM_GEMM_SPLIT, KM_GEMM_PARTS, KM_GEMM_BLAS };
static const enum km_router_chain tune_chains[] = { KM_CHAIN_ONE_LAUNCH, KM_CHAIN_GATE_ALIGN, KM_CHAIN_SEPARATE };

enum { TUNE_COUNT = sizeof(tune_tokens) / sizeof(tune_tokens[0]), GEMMS = 4, CHAINS = 3, FUSED_TOKENS = 64 };

static bool has_gemm(const gpu_bench *g, enum km_router_gemm gemm)
{
	return gemm == KM_GEMM_RESIDENT || (gemm == KM_GEMM_BLAS ? g->device.blas : g->device.capability == 90);
}

/* Alone and in a chain, one after the other: cuBLASLt's launches overlap with nothing, which alone does not
 * show, and a chain hides what its other parts wait for. */
static int tune_gemm(gpu_bench *g, enum km_router_gemm gemm, double *us, km_err *err)
{
	km_router_bench_row alone, chain;

	km_router_plan_force(&g->plan, &g->shape, gemm);
	g->plan.chain = g->shape.tokens > FUSED_TOKENS ? KM_CHAIN_SEPARATE : KM_CHAIN_GATE_ALIGN;
	KM_TRY(time_graph(g, KM_PART_GEMM, &alone, err));
	KM_TRY(time_graph(g, KM_PART_CHAIN, &chain, err));
	*us = alone.us_median + chain.us_median;
	return 0;
}

/* The forms' times at g's token count; INFINITY where there is none. The chains have the best GEMM. */
static int tune_at(gpu_bench *g, double *gemm_us, double *chain_us, km_err *err)
{
	km_router_bench_row row;
	int best = 0;

	for (int f = 0; f < GEMMS; f++) {
		gemm_us[f] = INFINITY;
		if (has_gemm(g, tune_gemms[f]))
			KM_TRY(tune_gemm(g, tune_gemms[f], &gemm_us[f], err));
		best = gemm_us[f] < gemm_us[best] ? f : best;
	}
	km_router_plan_force(&g->plan, &g->shape, tune_gemms[best]);
	for (int f = 0; f < CHAINS; f++) {
		chain_us[f] = INFINITY;
		if (g->shape.tokens > FUSED_TOKENS && tune_chains[f] != KM_CHAIN_SEPARATE)
			continue;
		g->plan.chain = tune_chains[f];
		KM_TRY(time_graph(g, KM_PART_CHAIN, &row, err));
		chain_us[f] = row.us_median;
	}
	return 0;
}

/* "name 1.23", with a comma from the second on. */
static void put_times(km_buf *out, const char *const *names, const double *us, int count)
{
	bool any = false;

	for (int f = 0; f < count; f++)
		if (isfinite(us[f])) {
			km_buf_printf(out, "%s%s %.2f", any ? ", " : "", names[f], us[f]);
			any = true;
		}
}

static int tune_rows(gpu_bench *g, km_buf *out, km_err *err)
{
	static const char *const gemms[] = { "resident", "split", "parts", "cuBLASLt" };
	static const char *const chains[] = { "one launch", "gate+align", "separate" };
	double gemm_us[TUNE_COUNT * GEMMS], chain_us[TUNE_COUNT * CHAINS];
	int gemm[GEMMS], chain[CHAINS];

	for (int i = 0; i < TUNE_COUNT; i++) {
		KM_TRY(set_tokens(g, tune_tokens[i], err));
		KM_TRY(tune_at(g, gemm_us + i * GEMMS, chain_us + i * CHAINS, err));
	}
	km_router_bench_limits(gemm_us, tune_tokens, TUNE_COUNT, GEMMS, gemm);
	km_router_bench_limits(chain_us, tune_tokens, TUNE_COUNT, CHAINS, chain);
	km_buf_printf(out, "\t/* %s, %d experts, %s: us of each GEMM alone and in a chain; of each chain */\n",
	              km_cuda_info_of(g->cuda)->name, g->shape.experts, g->device.pdl ? "overlap" : "no overlap");
	for (int i = 0; i < TUNE_COUNT; i++) {
		km_buf_printf(out, "\t/* %3d tokens: ", tune_tokens[i]);
		put_times(out, gemms, gemm_us + i * GEMMS, GEMMS);
		km_buf_puts(out, "; ");
		put_times(out, chains, chain_us + i * CHAINS, CHAINS);
		km_buf_puts(out, " */\n");
	}
	km_buf_printf(out, "\t{ %d, %d, %s, %d, %d, %d, %d, %d },\n", g->device.capability, g->shape.experts,
	              g->device.pdl ? "true" : "false", gemm[0], gemm[1], gemm[2], chain[0], chain[1]);
	return 0;
}

int km_router_bench_tune(const km_router_bench_options *o, km_buf *out, km_err *err)
{
	static const int experts[] = { 256, 384 };
	km_router_bench_options options = *o;
	int rc = 0;

	if (!km_cuda_count(err))
		return km_fail_within(err, "tuning needs a GPU");
	for (int i = 0; i < 4 && rc == 0; i++) {
		gpu_bench g;

		options.shape = (km_router_shape){ .experts = experts[i / 2], .hidden = 7168, .top_k = 8,
			                           .groups = 1, .topk_group = 1, .block = 8,
			                           .renormalize = true, .scale = 1 };
		options.overlap = i % 2 == 0;
		rc = open_bench(&g, &options, err);
		if (rc == 0)
			rc = tune_rows(&g, out, err);
		close_bench(&g);
	}
	return rc;
}

#endif
