/*
 * The dense half of one MoE layer's decode step as one GPU of eight sees it (TP8: 8 heads, an eighth
 * of the shared expert; K2.5's widths), in one graph of many layers with programmatic launches: each
 * launch alone over rotating weights, and what the chain costs up to it. The weights, 68 MB a layer,
 * are in no cache. Experts are left out; so are collectives. A launch that goes beside its predecessor
 * (device/turn.h) has no time of its own.
 *
 * Then each launch of slabs alone, cut in several ways, and the head's slice. At the end lines that
 * begin with "best" sum it up. With several tokens it says from how many on norms are launches of their own
 * (device/cuda_ops.c), and what rows of attention that do not run at once cost.
 *
 * bench_gpu_layer [TOKENS [CONTEXT]], default 1 1024; the median of replays, by events.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "dense.h"
#include "device/cuda_mla.h"
#include "device/cuda_state.h"
#include "format/dtype.h"
#include "mla.h"
#include "router.h"

enum {
	LAYERS = 6,
	ROUNDS = 3,
	REPLAYS = 9,
	HIDDEN = 7168,
	Q_LORA = 1536,
	KV_WIDTH = 576,
	HEADS = 8,
	KEY = 192,
	VALUES = HEADS * 128,
	SHARED = 256,
	EXPERTS = 384,
	TOP_K = 8,
	VOCAB = 20480,
	PAGE = 16,
};

static km_cuda *gpu;
static km_err err;
static int tokens = 1, context = 1024;

typedef struct layer {
	km_weight q_a, kv_a, q_b, o, gate, up, down, router;
	void *kv_b, *cache;
} layer;

static layer layers[LAYERS];
static km_weight head;
static float *stream, *delta, *q_a, *kv_a, *gate, *up, *norm, *logits, *scores, *expert_weights;
static void *normed, *q_a_normed, *q, *heads_out, *act, *scratch, *turns;
static int32_t *positions, *slots, *kv_len, *pages, *expert_ids;

static void must(int rc)
{
	if (rc < 0) {
		fprintf(stderr, "bench_gpu_layer: %s\n", err.msg);
		exit(1);
	}
}

static void launched(cudaError_t rc)
{
	if (rc != cudaSuccess) {
		fprintf(stderr, "bench_gpu_layer: %s\n", cudaGetErrorString(rc));
		exit(1);
	}
}

static void *take(size_t bytes)
{
	void *p = NULL;

	must(km_cuda_take(gpu, &p, bytes, "benchmark", &err));
	return p;
}

/* Random values, over and over. */
static void *take_random(size_t count, bool f32, float size)
{
	enum { VALUES_MADE = 1 << 20 };
	size_t each = f32 ? 4 : 2, made = count < VALUES_MADE ? count : VALUES_MADE;
	char *values = km_xmalloc(made * each), *to = take(count * each);

	for (size_t i = 0; i < made; i++) {
		float v = size * km_rng_normal(5, i);

		if (f32)
			memcpy(values + i * 4, &v, 4);
		else
			((uint16_t *)(void *)values)[i] = km_f32_to_bf16(v);
	}
	must(km_cuda_upload(gpu, to, values, made * each, &err));
	for (size_t at = made; at < count; at += made)
		must(km_cuda_copy(gpu, to + at * each, to,
		                  (count - at < made ? count - at : made) * each, &err));
	must(km_cuda_wait(gpu, &err));
	free(values);
	return to;
}

static km_weight take_weight(int rows, int cols)
{
	return (km_weight){ .type = KM_W_BF16,
		            .rows = rows,
		            .cols = cols,
		            .data = take_random((size_t)rows * (size_t)cols, false, 0.02f) };
}

static int32_t *take_ids(int count, int first, int step)
{
	int32_t *ids = km_xreallocarray(NULL, (size_t)count, sizeof(*ids)), *to;

	for (int i = 0; i < count; i++)
		ids[i] = first + i * step;
	to = take((size_t)count * 4);
	must(km_cuda_upload(gpu, to, ids, (size_t)count * 4, &err));
	free(ids);
	return to;
}

static km_mla_decode_plan plan;
static const km_mla_shape shape = { HEADS, 128, 64, 128, 512, false };

static void take_all(void)
{
	size_t rows = (size_t)tokens;
	km_mla_device device = { gpu->info.capability, gpu->info.multiprocessors };
	km_mla_decode_scratch at;

	for (int i = 0; i < LAYERS; i++)
		layers[i] = (layer){ .q_a = take_weight(Q_LORA, HIDDEN),
			             .kv_a = take_weight(KV_WIDTH, HIDDEN),
			             .q_b = take_weight(HEADS * KEY, Q_LORA),
			             .o = take_weight(HIDDEN, VALUES),
			             .gate = take_weight(SHARED, HIDDEN),
			             .up = take_weight(SHARED, HIDDEN),
			             .down = take_weight(HIDDEN, SHARED),
			             .router = take_weight(EXPERTS, HIDDEN),
			             .kv_b = take_random((size_t)HEADS * 256 * 512, false, 0.04f),
			             .cache = take_random(rows * (size_t)context * KV_WIDTH, false,
			                                  1) };
	head = take_weight(VOCAB, HIDDEN);
	logits = take_random(rows * VOCAB, true, 1);
	scores = take_random(rows * EXPERTS, true, 1);
	expert_weights = take_random(rows * TOP_K, true, 1);
	expert_ids = take_ids(tokens * TOP_K, 0, 1);
	stream = take_random(rows * HIDDEN, true, 1);
	delta = take_random(rows * HIDDEN, true, 1);
	norm = take_random(HIDDEN, true, 1);
	q_a = take_random(rows * Q_LORA, true, 1);
	kv_a = take_random(rows * KV_WIDTH, true, 1);
	gate = take_random(rows * SHARED, true, 1);
	up = take_random(rows * SHARED, true, 1);
	normed = take_random(rows * HIDDEN, false, 1);
	q_a_normed = take_random(rows * Q_LORA, false, 1);
	q = take_random(rows * HEADS * KEY, false, 1);
	heads_out = take_random(rows * VALUES, false, 1);
	act = take_random(rows * SHARED, false, 1);
	turns = take_random((size_t)context * 64, true, 0.5f);
	positions = take_ids(tokens, context - 1, 0);
	kv_len = take_ids(tokens, context, 0);
	slots = take_ids(tokens, context - 1, context);
	pages = take_ids(tokens * context / PAGE, 0, 1);
	plan = km_mla_plan_decode(&shape, tokens, context, &device);
	km_mla_decode_layout(&shape, &plan, tokens, &at);
	scratch = take(at.bytes);
}

/* ---- ops ---- */

static cudaError_t run_norm(float *of, const float *add, int size, void *y)
{
	kk_norm_args a = { of, add, norm, y, tokens, size, size, size, 1e-5f, true };

	return kk_norm(&a, gpu->stream);
}

static kk_linear_args linear_of(const km_weight *w, const km_weight *w2, void *y, void *y2)
{
	kk_linear_args a = { .w = { *w }, .y = { y, y2 }, .y_stride = { w->rows },
		             .weights = w2 ? 2 : 1, .tokens = tokens, .pdl = true };

	if (w2) {
		a.w[1] = *w2;
		a.y_stride[1] = w2->rows;
	}
	return a;
}

static cudaError_t run_stream(kk_linear_args a, const void *x)
{
	a.x = x;
	a.x_stride = a.w[0].cols;
	return kk_linear_stream(&a, gpu->stream);
}

/* How slabs are cut, 0: as the launcher does. Blocks a multiprocessor, most rows of a slab, kB of a
 * stage and of shared memory. */
typedef struct cut {
	int blocks, rows, stage, room;
} cut;

static cut now;

static cudaError_t run_slab(kk_linear_slab_args a)
{
	a.linear.x_stride = a.linear.w[0].cols;
	a.multiprocessors = gpu->info.multiprocessors;
	a.eps = 1e-5f;
	a.blocks_per_sm = now.blocks;
	a.rows = now.rows;
	a.stage_bytes = now.stage << 10;
	a.smem_bytes = now.room << 10;
	return kk_linear_slab(&a, gpu->stream);
}

static kk_mla_decode_args decode_of(const layer *l)
{
	km_mla_decode_scratch at;

	km_mla_decode_layout(&shape, &plan, tokens, &at);
	return (kk_mla_decode_args){
		.shape = shape, .seqs = tokens, .splits = plan.splits, .v_blocks = plan.v_blocks,
		.page_size = PAGE, .pages_per_seq = context / PAGE, .scale = 0.1447f, .q = q,
		.kv_b = l->kv_b, .cos_sin = turns, .positions = positions, .kv_len = kv_len,
		.pages = pages, .cache = l->cache, .query = (char *)scratch + at.query,
		.partial = (float *)(void *)((char *)scratch + at.partial),
		.stats = (float *)(void *)((char *)scratch + at.stats), .out = heads_out, .pdl = true,
	};
}

#define OP(name) static cudaError_t op_##name(const layer *l)

OP(norm) { (void)l; return run_norm(stream, delta, HIDDEN, normed); }
OP(a) { return run_stream(linear_of(&l->q_a, &l->kv_a, q_a, kv_a), normed); }
OP(norm_only) { (void)l; return run_norm(stream, NULL, HIDDEN, normed); }
OP(q_norm) { (void)l; return run_norm(q_a, NULL, Q_LORA, q_a_normed); }
OP(q_b)
{
	kk_linear_args a = linear_of(&l->q_b, NULL, q, NULL);

	a.y_bf16 = true;
	return run_stream(a, q_a_normed);
}
OP(o) { return run_stream(linear_of(&l->o, NULL, delta, NULL), heads_out); }
OP(gate_up) { return run_stream(linear_of(&l->gate, &l->up, gate, up), normed); }
OP(silu)
{
	kk_silu_mul_args a = { gate, up, act, tokens, SHARED, true };

	(void)l;
	return kk_silu_mul(&a, gpu->stream);
}
OP(down) { return run_stream(linear_of(&l->down, NULL, delta, NULL), act); }
OP(rope_kv)
{
	kk_rope_kv_args a = {
		.tokens = tokens, .q_from = tokens, .heads = HEADS, .nope_dim = 128, .rope_dim = 64,
		.kv_lora_rank = 512, .kv_a = kv_a, .kv_a_stride = KV_WIDTH, .norm = norm,
		.eps = 1e-5f, .cos_sin = turns, .positions = positions, .slots = slots,
		.cache = l->cache, .pdl = true,
	};

	return kk_rope_kv(&a, gpu->stream);
}
OP(absorb) { kk_mla_decode_args a = decode_of(l); return kk_mla_absorb(&a, gpu->stream); }
OP(attend) { kk_mla_decode_args a = decode_of(l); return kk_mla_attend(&a, gpu->stream); }
OP(combine) { kk_mla_decode_args a = decode_of(l); return kk_mla_combine(&a, gpu->stream); }

OP(cluster) { kk_mla_decode_args a = decode_of(l); return kk_mla_decode_cluster(&a, gpu->stream); }
OP(cluster_rows)
{
	kk_mla_decode_args a = decode_of(l);

	a.kv_a = kv_a;
	a.norm = norm;
	a.slots = slots;
	a.kv_a_stride = KV_WIDTH;
	a.eps = 1e-5f;
	return kk_mla_decode_cluster(&a, gpu->stream);
}

OP(slab_a_given)
{
	kk_linear_slab_args a = { .linear = linear_of(&l->q_a, &l->kv_a, q_a, kv_a) };

	a.linear.x = normed;
	return run_slab(a);
}
OP(slab_a)
{
	return run_slab((kk_linear_slab_args){ .linear = linear_of(&l->q_a, &l->kv_a, q_a, kv_a),
		                               .from = KK_X_NORM, .a = stream, .b = norm,
		                               .a_stride = HIDDEN });
}
OP(slab_q_b)
{
	kk_linear_slab_args a = { .linear = linear_of(&l->q_b, NULL, q, NULL), .from = KK_X_NORM,
		                  .a = q_a, .b = norm, .a_stride = Q_LORA };

	a.linear.y_bf16 = true;
	return run_slab(a);
}
OP(slab_q_b_given)
{
	kk_linear_slab_args a = { .linear = linear_of(&l->q_b, NULL, q, NULL) };

	a.linear.x = q_a_normed;
	a.linear.y_bf16 = true;
	return run_slab(a);
}
OP(slab_o)
{
	kk_linear_slab_args a = { .linear = linear_of(&l->o, NULL, stream, NULL) };

	a.linear.x = heads_out;
	a.linear.accumulate = true;
	return run_slab(a);
}
OP(slab_gate_up)
{
	return run_slab((kk_linear_slab_args){ .linear = linear_of(&l->gate, &l->up, gate, up),
		                               .from = KK_X_NORM, .a = stream, .b = norm,
		                               .a_stride = HIDDEN, .x_out = normed });
}
OP(slab_gate_up_router)
{
	kk_linear_slab_args a = { .linear = linear_of(&l->gate, &l->up, gate, up), .from = KK_X_NORM,
		                  .a = stream, .b = norm, .a_stride = HIDDEN, .x_out = normed };

	a.linear.w[2] = l->router;
	a.linear.y[2] = scores;
	a.linear.y_stride[2] = EXPERTS;
	a.linear.weights = 3;
	return run_slab(a);
}
OP(slab_gate_up_router_given)
{
	kk_linear_slab_args a = { .linear = linear_of(&l->gate, &l->up, gate, up) };

	a.linear.x = normed;
	a.linear.w[2] = l->router;
	a.linear.y[2] = scores;
	a.linear.y_stride[2] = EXPERTS;
	a.linear.weights = 3;
	return run_slab(a);
}
static cudaError_t run_down(const layer *l, enum km_turn turn)
{
	kk_linear_slab_args a = { .linear = linear_of(&l->down, NULL, stream, NULL),
		                  .from = KK_X_SILU, .a = gate, .b = up, .a_stride = SHARED,
		                  .turn = turn };

	a.linear.accumulate = true;
	return run_slab(a);
}
OP(slab_down) { return run_down(l, KM_TURN_AFTER); }
OP(slab_down_holds) { return run_down(l, KM_TURN_HOLDS); }
OP(router)
{
	kk_router_args a = { .x = normed, .w = l->router.data, .logits = scores, .tokens = tokens,
		             .experts = EXPERTS, .hidden = HIDDEN, .pdl = true };

	return kk_router_resident(&a, gpu->stream);
}
static cudaError_t run_gate(enum km_turn turn)
{
	kk_gate_args a = { .logits = scores, .bias = norm, .ids = expert_ids,
		           .weights = expert_weights, .tokens = tokens, .experts = EXPERTS,
		           .top_k = TOP_K, .scale = 2.5f, .renormalize = true, .pdl = true,
		           .turn = turn };

	return kk_gate_onepass(&a, 1, tokens, gpu->stream);
}
OP(gate) { (void)l; return run_gate(KM_TURN_AFTER); }
OP(gate_beside) { (void)l; return run_gate(KM_TURN_BESIDE); }
OP(head)
{
	(void)l;
	return run_slab((kk_linear_slab_args){ .linear = linear_of(&head, NULL, logits, NULL),
		                               .from = KK_X_NORM, .a = stream, .b = norm,
		                               .a_stride = HIDDEN });
}

typedef struct op {
	const char *name;
	cudaError_t (*run)(const layer *l);
	double megabytes; /* of weights, and of the cache */
} op;

static const op separate[] = {
	{ "add, norm", op_norm, 0 },
	{ "q_a, kv_a", op_a, 30.3 },
	{ "norm", op_q_norm, 0 },
	{ "q_b", op_q_b, 4.7 },
	{ "rope, kv", op_rope_kv, 0 },
	{ "absorb", op_absorb, 1.05 },
	{ "attend", op_attend, 1.2 },
	{ "combine", op_combine, 1.05 },
	{ "o", op_o, 14.7 },
	{ "add, norm", op_norm, 0 },
	{ "gate, up", op_gate_up, 7.3 },
	{ "silu", op_silu, 0 },
	{ "down", op_down, 3.7 },
	{ 0 },
};

static const op fused[] = {
	{ "norm, q_a, kv_a", op_slab_a, 30.3 },
	{ "norm, q_b", op_slab_q_b, 4.7 },
	{ "rope, kv", op_rope_kv, 0 },
	{ "absorb", op_absorb, 1.05 },
	{ "attend", op_attend, 1.2 },
	{ "combine", op_combine, 1.05 },
	{ "o, add", op_slab_o, 14.7 },
	{ "norm, gate, up", op_slab_gate_up, 7.3 },
	{ "silu, down, add", op_slab_down, 3.7 },
	{ 0 },
};

static const op cluster[] = {
	{ "norm, q_a, kv_a", op_slab_a, 30.3 },
	{ "norm, q_b", op_slab_q_b, 4.7 },
	{ "rope, kv", op_rope_kv, 0 },
	{ "attention", op_cluster, 3.3 },
	{ "o, add", op_slab_o, 14.7 },
	{ "norm, gate, up", op_slab_gate_up, 7.3 },
	{ "silu, down, add", op_slab_down, 3.7 },
	{ 0 },
};

#define ATTENTION                                                                                  \
	{ "norm, q_a, kv_a", op_slab_a, 30.3 }, { "norm, q_b", op_slab_q_b, 4.7 },                 \
	{ "kv, attention", op_cluster_rows, 3.3 }

static const op apart[] = {
	ATTENTION,
	{ "o, add", op_slab_o, 14.7 },
	{ "norm, gate, up", op_slab_gate_up, 7.3 },
	{ "silu, down, add", op_slab_down, 3.7 },
	{ "router", op_router, 5.5 },
	{ "gate of experts", op_gate, 0 },
	{ 0 },
};

static const op joined[] = {
	ATTENTION,
	{ "o, add", op_slab_o, 14.7 },
	{ "norm, .., router", op_slab_gate_up_router, 12.8 },
	{ "silu, down, add", op_slab_down, 3.7 },
	{ "gate of experts", op_gate, 0 },
	{ 0 },
};

static const op gate_beside[] = {
	ATTENTION,
	{ "o, add", op_slab_o, 14.7 },
	{ "norm, .., router", op_slab_gate_up_router, 12.8 },
	{ "silu, down, add", op_slab_down_holds, 3.7 },
	{ "gate of experts", op_gate_beside, 0 },
	{ 0 },
};

static const op norms_apart[] = {
	{ "norm", op_norm_only, 0 },
	{ "q_a, kv_a", op_slab_a_given, 30.3 },
	{ "norm", op_q_norm, 0 },
	{ "q_b", op_slab_q_b_given, 4.7 },
	{ "kv, attention", op_cluster_rows, 3.3 },
	{ "o, add", op_slab_o, 14.7 },
	{ "norm", op_norm_only, 0 },
	{ "gate, up, router", op_slab_gate_up_router_given, 12.8 },
	{ "silu, down, add", op_slab_down_holds, 3.7 },
	{ "gate of experts", op_gate_beside, 0 },
	{ 0 },
};

static int by_size(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static void enqueue(const op *ops, int from, int to)
{
	for (int i = 0; i < LAYERS * ROUNDS; i++)
		for (int k = from; k < to; k++)
			launched(ops[k].run(&layers[i % LAYERS]));
}

/* Median us of a layer's ops from .. to - 1. */
static double time_ops(const op *ops, int from, int to)
{
	km_cuda_graph *graph;
	double us[REPLAYS];

	enqueue(ops, from, to);
	must(km_cuda_capture_begin(gpu, &err));
	enqueue(ops, from, to);
	must(km_cuda_capture_end(gpu, &graph, &err));
	must(km_cuda_graph_launch(gpu, graph, &err));
	for (int i = 0; i < REPLAYS; i++) {
		must(km_cuda_time_begin(gpu, &err));
		must(km_cuda_graph_launch(gpu, graph, &err));
		must(km_cuda_time_end(gpu, &us[i], &err));
	}
	km_cuda_graph_free(graph);
	qsort(us, REPLAYS, sizeof(us[0]), by_size);
	return us[REPLAYS / 2] / (LAYERS * ROUNDS);
}

/* Beside its predecessor, and so never alone. */
static bool is_beside(const op *o)
{
	return o->run == op_gate_beside;
}

static double show(const char *what, const op *ops)
{
	double before = 0, megabytes = 0;

	printf("%s, %d tokens, context %d:  alone us (TB/s), chain so far us\n", what, tokens, context);
	for (int i = 0; ops[i].name; i++) {
		double alone = is_beside(&ops[i]) ? 0 : time_ops(ops, i, i + 1),
		       chain = time_ops(ops, 0, i + 1);

		megabytes += ops[i].megabytes;
		if (is_beside(&ops[i]))
			printf("  %-16s %7s  %5s   %7.2f  (+%.2f)\n", ops[i].name, "-", "-", chain,
			       chain - before);
		else
			printf("  %-16s %7.2f  %5.2f   %7.2f  (+%.2f)\n", ops[i].name, alone,
			       ops[i].megabytes / alone, chain, chain - before);
		before = chain;
	}
	printf("  whole: %.2f us, %.1f MB, %.2f TB/s\n", before, megabytes, megabytes / before);
	fflush(stdout);
	return before;
}

/* ---- cuts ---- */

static const cut cuts[] = {
	{ 0 },
	{ .stage = 8 },
	{ .stage = 16 },
	{ .stage = 64 },
	{ .room = 216 },
	{ .stage = 16, .room = 216 },
	{ .rows = 16, .room = 216 },
	{ .rows = 16, .stage = 16, .room = 216 },
	{ .rows = 32, .room = 216 },
	{ .blocks = 1 },
	{ .blocks = 1, .stage = 16 },
	{ .blocks = 2 },
	{ .blocks = 2, .stage = 16, .room = 110 },
	{ .blocks = 2, .rows = 16, .stage = 16, .room = 110 },
};
enum { CUTS = sizeof(cuts) / sizeof(cuts[0]) };

static const op cut_ops[] = {
	{ "norm, q_a, kv_a", op_slab_a, 30.3 },
	{ "q_a, kv_a", op_slab_a_given, 30.3 },
	{ "norm, q_b", op_slab_q_b, 4.7 },
	{ "o, add", op_slab_o, 14.7 },
	{ "norm, gate, up", op_slab_gate_up, 7.3 },
	{ "norm, .., router", op_slab_gate_up_router, 12.8 },
	{ "silu, down, add", op_slab_down, 3.7 },
	{ "norm, head", op_head, 293.6 },
};
enum { CUT_OPS = sizeof(cut_ops) / sizeof(cut_ops[0]) };

/* Whether the launcher takes the cut: not all stages fit all room. */
static bool is_taken(const op *o)
{
	return o->run(&layers[0]) != cudaErrorInvalidValue;
}

static int show_cut(const op *o, double *best_us, double *chosen_us)
{
	int best = 0;

	for (int k = 0; k < CUTS; k++) {
		double us;

		now = cuts[k];
		if (!is_taken(o))
			continue;
		us = time_ops(o, 0, 1);
		printf("cut: %-16s blocks %d rows %2d stage %2d room %3d: %7.2f us, %.2f TB/s\n",
		       o->name, now.blocks, now.rows, now.stage, now.room, us,
		       o->megabytes / us);
		if (!k)
			*chosen_us = *best_us = us;
		if (us < *best_us)
			*best_us = us, best = k;
	}
	now = (cut){ 0 };
	fflush(stdout);
	return best;
}

static void show_cuts(void)
{
	int best[CUT_OPS];
	double us[CUT_OPS], chosen[CUT_OPS];

	for (int i = 0; i < CUT_OPS; i++)
		best[i] = show_cut(&cut_ops[i], &us[i], &chosen[i]);
	for (int i = 0; i < CUT_OPS; i++) {
		const cut *c = &cuts[best[i]];

		printf("best: %-16s blocks %d rows %2d stage %2d room %3d: %7.2f us, %.2f TB/s; "
		       "as it is %.2f, %.2f\n",
		       cut_ops[i].name, c->blocks, c->rows, c->stage, c->room, us[i],
		       cut_ops[i].megabytes / us[i], chosen[i], cut_ops[i].megabytes / chosen[i]);
	}
}

int main(int argc, char **argv)
{
	double us[4];

	if (argc > 1)
		tokens = (int)strtol(argv[1], NULL, 10);
	if (argc > 2)
		context = (int)strtol(argv[2], NULL, 10);
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	must(km_cuda_open(&gpu, 0, (size_t)2 << 30, &err));
	printf("# %s, %s\n", gpu->info.name, gpu->info.toolkit);
	take_all();
	show("separate", separate);
	show("fused", fused);
	show("cluster", cluster);
	us[0] = show("router apart", apart);
	us[1] = show("router joined", joined);
	us[2] = show("router joined, gate beside down", gate_beside);
	us[3] = show("router joined, gate beside down, norms apart", norms_apart);
	printf("best: chain: router apart %.2f us, joined %.2f, gate beside down %.2f, norms apart %.2f\n",
	       us[0], us[1], us[2], us[3]);
	show_cuts();
	km_cuda_close(gpu);
	return 0;
}
