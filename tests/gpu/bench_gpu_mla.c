/*
 * How fast attention is on this GPU: each part of a decode step, prefill, rope and KV write.
 *
 * A graph of calls over rotating caches and weights (160 MB of them or more, so that they come from
 * memory), replayed; the median of the replays, by events. "bound": the time of the bytes or of the
 * flops, whichever is longer, at the device's rates (device/roofline.h); "share" is of that.
 *
 * bench_gpu_mla [decode|splits|prefill|all]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_mla.h"
#include "device/cuda_state.h"
#include "device/roofline.h"
#include "format/dtype.h"
#include "mla.h"

enum { PAGE = 16, REPLAYS = 9, MAX_CALLS = 160, ROOM = 8192 };

static const size_t POOL_BYTES = (size_t)10 << 30, ROTATED_BYTES = (size_t)160 << 20;

static km_cuda *gpu;
static km_err err;
static km_roofline roofline;
static void *pool, *weights; /* random bf16 or e4m3 */

static void must(int rc)
{
	if (rc < 0) {
		fprintf(stderr, "bench_gpu_mla: %s\n", err.msg);
		exit(1);
	}
}

static void launched(cudaError_t rc)
{
	if (rc != cudaSuccess) {
		fprintf(stderr, "bench_gpu_mla: %s\n", cudaGetErrorString(rc));
		exit(1);
	}
}

static void *take(size_t bytes)
{
	void *p = NULL;

	must(km_cuda_take(gpu, &p, bytes, "benchmark", &err));
	return p;
}

static void *take_copy(const void *from, size_t bytes)
{
	void *p = take(bytes);

	must(km_cuda_upload(gpu, p, from, bytes, &err));
	return p;
}

/* Fills with a million values over and over. */
static void fill(void *to, size_t bytes, bool fp8, float size)
{
	enum { VALUES = 1 << 20 };
	size_t block = (size_t)VALUES * (fp8 ? 1 : 2);
	uint8_t *values = km_xmalloc(block);

	for (size_t i = 0; i < VALUES; i++) {
		float v = size * km_rng_normal(9, i);

		if (fp8)
			values[i] = km_f32_to_f8_e4m3(v);
		else
			((uint16_t *)(void *)values)[i] = km_f32_to_bf16(v);
	}
	must(km_cuda_upload(gpu, to, values, bytes < block ? bytes : block, &err));
	for (size_t at = block; at < bytes; at += block)
		must(km_cuda_copy(gpu, (char *)to + at, to, bytes - at < block ? bytes - at : block,
		                  &err));
	must(km_cuda_wait(gpu, &err));
	free(values);
}

static int by_size(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

/* Median us of a call: the graph holds `calls` of them. */
static double replay(km_cuda_graph *graph, int calls)
{
	double us[REPLAYS];

	must(km_cuda_graph_launch(gpu, graph, &err));
	for (int i = 0; i < REPLAYS; i++) {
		must(km_cuda_time_begin(gpu, &err));
		must(km_cuda_graph_launch(gpu, graph, &err));
		must(km_cuda_time_end(gpu, &us[i], &err));
	}
	qsort(us, REPLAYS, sizeof(us[0]), by_size);
	km_cuda_graph_free(graph);
	return us[REPLAYS / 2] / calls;
}

typedef cudaError_t (*decode_part)(const kk_mla_decode_args *, cudaStream_t);

static cudaError_t whole(const kk_mla_decode_args *a, cudaStream_t stream)
{
	cudaError_t rc = kk_mla_absorb(a, stream);

	if (rc == cudaSuccess)
		rc = kk_mla_attend(a, stream);
	return rc == cudaSuccess ? kk_mla_combine(a, stream) : rc;
}

static double time_decode(const kk_mla_decode_args *sets, int count, decode_part part)
{
	int calls = count < 8 ? count * (8 / count) : count;
	km_cuda_graph *graph;

	for (int i = 0; i < count && i < 2; i++)
		launched(part(&sets[i], gpu->stream));
	must(km_cuda_capture_begin(gpu, &err));
	for (int i = 0; i < calls; i++)
		launched(part(&sets[i % count], gpu->stream));
	must(km_cuda_capture_end(gpu, &graph, &err));
	return replay(graph, calls);
}

typedef struct decode_bench {
	km_mla_shape shape;
	int seqs, context, count;
	kk_mla_decode_args set[MAX_CALLS];
} decode_bench;

static int32_t *random_pages(int pages, uint64_t seed)
{
	int32_t *p = km_xreallocarray(NULL, (size_t)pages, sizeof(*p));

	for (int i = 0; i < pages; i++)
		p[i] = i;
	for (int i = pages - 1; i > 0; i--) {
		int j = (int)(km_rng_u64(seed, (uint64_t)i) % (uint64_t)(i + 1)), t = p[i];

		p[i] = p[j];
		p[j] = t;
	}
	return p;
}

/* Sets of arguments over caches that lie behind each other in the pool. */
static void make_sets(decode_bench *b, const km_mla_decode_plan *plan)
{
	const km_mla_shape *s = &b->shape;
	int pages = b->context / PAGE, all = pages * b->seqs;
	size_t cache = (size_t)b->seqs * (size_t)b->context * (s->fp8 ? 576 : 1152);
	size_t kv_b = (size_t)s->heads * 256 * 512 * 2,
	       q_bytes = (size_t)(b->seqs * s->heads * 192) * 2;
	int32_t *table = random_pages(all, 3);
	int32_t *len = km_xreallocarray(NULL, (size_t)b->seqs, sizeof(*len));
	km_mla_decode_scratch at;
	void *pages_at, *len_at, *positions_at, *q, *turns;

	for (int i = 0; i < b->seqs; i++)
		len[i] = b->context - i % 13;
	pages_at = take_copy(table, (size_t)all * 4);
	len_at = take_copy(len, (size_t)b->seqs * 4);
	for (int i = 0; i < b->seqs; i++)
		len[i]--;
	positions_at = take_copy(len, (size_t)b->seqs * 4);
	turns = take((size_t)b->context * 64 * 4);
	must(km_cuda_fill(gpu, turns, 0x3e, (size_t)b->context * 64 * 4, &err)); /* 0.186 */
	q = take(q_bytes);
	fill(q, q_bytes, false, 1);
	b->count = (int)(ROTATED_BYTES / (cache + kv_b)) + 1;
	b->count = b->count > MAX_CALLS ? MAX_CALLS : b->count;
	while ((size_t)b->count * cache > POOL_BYTES && b->count > 1)
		b->count--;
	km_mla_decode_layout(s, plan, b->seqs, &at);
	for (int i = 0; i < b->count; i++) {
		char *scratch = take(at.bytes);

		b->set[i] = (kk_mla_decode_args){
			.shape = *s,
			.seqs = b->seqs,
			.splits = plan->splits,
			.v_blocks = plan->v_blocks,
			.page_size = PAGE,
			.pages_per_seq = pages,
			.scale = 0.1447f,
			.q = q,
			.kv_b = (char *)weights + (size_t)(i % 10) * ((size_t)64 * 256 * 512 * 2),
			.cos_sin = turns,
			.positions = positions_at,
			.kv_len = len_at,
			.pages = pages_at,
			.cache = (char *)pool + (size_t)i * cache,
			.query = scratch + at.query,
			.partial = (float *)(void *)(scratch + at.partial),
			.stats = (float *)(void *)(scratch + at.stats),
			.pdl = true,
			.out = take((size_t)(b->seqs * s->heads * 128) * 2),
		};
	}
	free(table);
	free(len);
}

/* 0 where the device's rates are not known; so then is every share. */
static double bound(double bytes, double flops)
{
	return km_roofline_us(&roofline, bytes, flops);
}

static km_mla_decode_plan plan_for(const km_mla_shape *s, int seqs, int context)
{
	km_mla_device d = { gpu->info.capability, gpu->info.multiprocessors };

	return km_mla_plan_decode(s, seqs, context, &d);
}

static void bench_decode(int seqs, int context, int heads, bool fp8)
{
	decode_bench b = { .shape = { heads, 128, 64, 128, 512, fp8 },
		           .seqs = seqs,
		           .context = context };
	km_mla_decode_plan plan = plan_for(&b.shape, seqs, context);
	size_t mark = km_cuda_mark(gpu);
	double tokens = (double)seqs * context, rows = (double)seqs * heads;
	double cache = tokens * (fp8 ? 576 : 1152), kv_b = heads * 256.0 * 512 * 2;
	double attend = bound(cache, tokens * heads * 2 * 1088);
	double all = bound(cache + kv_b + rows * 320 * 2,
	                   (tokens * heads * 1088 + rows * 512 * 256) * 2);
	double us[4];

	make_sets(&b, &plan);
	us[0] = time_decode(b.set, b.count, kk_mla_absorb);
	us[1] = time_decode(b.set, b.count, kk_mla_attend);
	us[2] = time_decode(b.set, b.count, kk_mla_combine);
	us[3] = time_decode(b.set, b.count, whole);
	printf("%5d %7d %5d %4s %6d %2d %9.2f %9.2f %8.1f %6.0f%% %9.2f %9.2f %8.1f %6.0f%%\n",
	       seqs, context, heads, fp8 ? "fp8" : "bf16", plan.splits, plan.v_blocks, us[0], us[1],
	       attend, 100 * attend / us[1], us[2], us[3], all, 100 * all / us[3]);
	fflush(stdout);
	km_cuda_rewind(gpu, mark);
}

static void bench_splits(int seqs, int context, int heads, bool fp8, int splits)
{
	decode_bench b = { .shape = { heads, 128, 64, 128, 512, fp8 },
		           .seqs = seqs,
		           .context = context };
	size_t mark = km_cuda_mark(gpu);

	for (int v_blocks = 1; v_blocks <= 4; v_blocks *= 2) {
		km_mla_decode_plan plan = { true, splits, v_blocks, false };

		make_sets(&b, &plan);
		printf("splits: %d x %d, %d heads, %s: splits %d, v_blocks %d: attend %.2f, "
		       "combine %.2f, "
		       "all %.2f us\n",
		       seqs, context, heads, fp8 ? "fp8" : "bf16", splits, v_blocks,
		       time_decode(b.set, b.count, kk_mla_attend),
		       time_decode(b.set, b.count, kk_mla_combine),
		       time_decode(b.set, b.count, whole));
		fflush(stdout);
		km_cuda_rewind(gpu, mark);
	}
}

typedef cudaError_t (*prefill_part)(const kk_mla_prefill_args *, cudaStream_t);

static double time_prefill(const kk_mla_prefill_args *a, prefill_part part)
{
	km_cuda_graph *graph;

	launched(part(a, gpu->stream));
	must(km_cuda_capture_begin(gpu, &err));
	for (int i = 0; i < 4; i++)
		launched(part(a, gpu->stream));
	must(km_cuda_capture_end(gpu, &graph, &err));
	return replay(graph, 4);
}

static int32_t *count_up(int count)
{
	int32_t *p = km_xreallocarray(NULL, (size_t)count, sizeof(*p));

	for (int i = 0; i < count; i++)
		p[i] = i;
	return p;
}

/* One prompt of `rows` tokens, nothing cached before. */
static void bench_prefill(int rows, int heads)
{
	km_mla_prefill_plan plan = { 0 };
	int32_t starts[2] = { 0, rows }, *up = count_up(ROOM);
	km_batch batch = { .tokens = rows, .seqs = 1, .positions = up, .seq_start = starts };
	size_t mark = km_cuda_mark(gpu), q_bytes = (size_t)rows * (size_t)heads * 192 * 2;
	size_t kv_bytes = (size_t)ROOM * (size_t)heads * 256 * 2;
	kk_mla_prefill_args a = { .shape = { heads, 128, 64, 128, 512, false }, .page_size = PAGE,
		                  .pages_per_seq = ROOM / PAGE, .scale = 0.1447f, .pdl = true };
	double flops = (double)rows * rows / 2 * heads * 2 * 320, us, gather;

	km_mla_prefill_capacity(&plan, ROOM, 1, ROOM, ROOM);
	plan.runs = km_xcalloc((size_t)plan.max_runs, sizeof(*plan.runs));
	plan.tiles = km_xcalloc((size_t)plan.max_tiles, sizeof(*plan.tiles));
	plan.wave = km_xcalloc((size_t)plan.max_waves, sizeof(*plan.wave));
	must(km_mla_plan_prefill(&plan, &batch, ROOM, &err));
	a.runs = take_copy(plan.runs, (size_t)plan.max_runs * sizeof(*plan.runs));
	a.tiles = take_copy(plan.tiles, (size_t)plan.max_tiles * sizeof(*plan.tiles));
	a.run_count = plan.wave[0].runs;
	a.tile_count = plan.wave[0].tiles;
	a.positions = a.pages = take_copy(up, ROOM * 4);
	a.cache = pool;
	a.latents = take((size_t)ROOM * 576 * 2);
	a.kv = take(kv_bytes);
	a.q = take(q_bytes);
	a.out = take((size_t)rows * (size_t)heads * 128 * 2);
	fill((void *)(uintptr_t)a.q, q_bytes, false, 1);
	fill((void *)(uintptr_t)a.kv, kv_bytes, false, 1);
	gather = time_prefill(&a, kk_mla_gather);
	us = time_prefill(&a, kk_mla_prefill);
	printf("prefill: %d rows, %d heads: attention %.1f us, %.0f TFLOP/s, %.0f%% of bound; "
	       "gather %.2f us\n",
	       rows, heads, us, flops / us * 1e-6, 100 * bound(0, flops) / us, gather);
	fflush(stdout);
	free(plan.runs);
	free(plan.tiles);
	free(plan.wave);
	free(up);
	km_cuda_rewind(gpu, mark);
}

static void bench_rope_kv(int tokens, int q_from, int heads)
{
	enum { CALLS = 20 };
	size_t mark = km_cuda_mark(gpu), q_bytes = (size_t)tokens * (size_t)heads * 192 * 2;
	int32_t *up = count_up(tokens);
	kk_rope_kv_args a = {
		.tokens = tokens, .q_from = q_from, .heads = heads, .nope_dim = 128, .rope_dim = 64,
		.kv_lora_rank = 512, .q = take(q_bytes), .kv_a = take((size_t)tokens * 576 * 4),
		.kv_a_stride = 576, .norm = take(512 * 4), .eps = 1e-5f,
		.cos_sin = take((size_t)tokens * 64 * 4), .cache = pool, .pdl = true,
	};
	km_cuda_graph *graph;

	a.positions = a.slots = take_copy(up, (size_t)tokens * 4);
	fill(a.q, q_bytes, false, 1);
	fill((void *)(uintptr_t)a.kv_a, (size_t)tokens * 576 * 4, false, 1);
	must(km_cuda_fill(gpu, (void *)(uintptr_t)a.cos_sin, 0x3e, (size_t)tokens * 64 * 4, &err));
	must(km_cuda_fill(gpu, (void *)(uintptr_t)a.norm, 0x3e, 512 * 4, &err));
	launched(kk_rope_kv(&a, gpu->stream));
	must(km_cuda_capture_begin(gpu, &err));
	for (int i = 0; i < CALLS; i++)
		launched(kk_rope_kv(&a, gpu->stream));
	must(km_cuda_capture_end(gpu, &graph, &err));
	printf("rope_kv: %d rows, queries of %d, %d heads: %.2f us\n", tokens, tokens - q_from,
	       heads, replay(graph, CALLS));
	free(up);
	km_cuda_rewind(gpu, mark);
}

static void all_decode(void)
{
	static const int contexts[] = { 1024, 8192, 131072 }, seqs[] = { 1, 16, 64 },
			 heads[] = { 64, 8 };

	printf("  seqs context heads  kv splits vb    absorb    attend    bound  share   combine"
	       "       all    bound  share\n");
	for (int fp8 = 0; fp8 < 2; fp8++) {
		fill(pool, POOL_BYTES, fp8, 1);
		for (int h = 0; h < 2; h++)
			for (int c = 0; c < 3; c++)
				for (int s = 0; s < 3; s++)
					bench_decode(seqs[s], contexts[c], heads[h], fp8);
	}
	fill(pool, POOL_BYTES, false, 1);
}

static void all_splits(void)
{
	static const int few[] = { 1, 2, 3, 4, 6 }, many[] = { 16, 32, 66, 132, 160 };

	for (int i = 0; i < 5; i++) {
		bench_splits(64, 8192, 64, false, few[i]);
		bench_splits(1, 8192, 64, false, many[i]);
		bench_splits(1, 131072, 64, false, many[i]);
	}
	bench_splits(1, 1024, 8, false, 16);
	bench_splits(1, 1024, 8, false, 8);
}

static void all_prefill(void)
{
	static const int rows[] = { 128, 512, 2048, 8192 };

	for (int i = 0; i < 4; i++) {
		bench_prefill(rows[i], 64);
		bench_prefill(rows[i], 8);
	}
	bench_rope_kv(1, 1, 64);
	bench_rope_kv(64, 64, 64);
	bench_rope_kv(8192, 0, 64);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "all";
	bool all = strcmp(what, "all") == 0;
	km_buf rates = KM_BUF_INIT;

	if (argc > 2 || (!all && strcmp(what, "decode") && strcmp(what, "splits") && strcmp(what, "prefill"))) {
		fprintf(stderr, "usage: bench_gpu_mla [decode|splits|prefill|all]\n");
		return 2;
	}
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	must(km_cuda_open(&gpu, 0, POOL_BYTES + ((size_t)6 << 30), &err));
	km_roofline_of_gpu(&gpu->info, &roofline);
	km_roofline_describe(&roofline, &rates);
	printf("# %s, %s; us a call; bound: %s\n", gpu->info.name, gpu->info.toolkit, rates.data);
	km_buf_release(&rates);
	pool = take(POOL_BYTES);
	weights = take((size_t)10 * 64 * 256 * 512 * 2);
	fill(pool, POOL_BYTES, false, 1);
	fill(weights, (size_t)10 * 64 * 256 * 512 * 2, false, 0.04f);
	if (all || strcmp(what, "prefill") == 0)
		all_prefill();
	if (all || strcmp(what, "decode") == 0)
		all_decode();
	if (all || strcmp(what, "splits") == 0)
		all_splits();
	km_cuda_close(gpu);
	return 0;
}
