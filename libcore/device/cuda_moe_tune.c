/*
 * Experts: KINDS of them are made on the host, expert e has the bytes of kind e % KINDS: enough to
 * see a wrong expert, and little to upload; all have memory of their own, as in use. Routings:
 * uniform, ROUTINGS of them rotate for small token counts, fewer for large ones, whose calls touch
 * every expert anyway.
 *
 * For the check the tokens have inputs that repeat after REPEAT rows, so that the general form has
 * to compute that many rows only, and the first and the last REPEAT rows of a candidate's result
 * can be held against them; results are poisoned before. For timing the routing does not repeat.
 *
 *   arena   gate_up [experts] | down [experts] | what depends on the tokens
 */
#include "device/cuda_moe_tune.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_moe.h"
#include "device/op.h"
#include "format/moe_layout.h"

enum {
	KINDS = 5,
	REPEAT = 64,
	ORACLE_ROWS = 2,
	MOST_GRAPHS = KM_TUNER_MAX_CANDIDATES,
	ROUTINGS = 16,
	MOST_CALLS = 32,
	POISON = 0xff,
	SLACK = 64 << 20,
};

/* Of a row, ||y - reference|| / ||reference||; two roundings to bf16 and one of the sum make
 * 0.003. */
static const double row_bound = 8e-3;
static const double sample_us = 800;
static const float routed_scale = 2.827f;

struct cached_graph {
	int values[KM_TUNE_MAX_FIELDS];
	km_cuda_graph *graph;
};

struct km_cuda_moe_tuner {
	km_cuda *cuda;
	km_moe_problem problem; /* tokens: of the last prepare */
	km_moe_device device;
	km_moe_weights weights;
	int32_t *map; /* device, or NULL */
	size_t mark;
	uint8_t *kinds; /* host: KINDS x (gate_up, down), packed */
	size_t gate_up_bytes, down_bytes;
	uint16_t *host_x; /* bf16 [REPEAT, hidden] */
	float *reference; /* [REPEAT, hidden] */
	uint16_t *result; /* bf16 [2 * REPEAT, hidden] */
	bool oracle_done;
	/* Device memory of this token count. */
	char *x;                  /* [routings, tokens, hidden] */
	int32_t *ids, *check_ids; /* [routings, tokens, top_k]; [tokens, top_k] */
	float *gate_weights, *check_weights;
	char *y;
	void *scratch;
	int routings, calls;
	struct cached_graph graphs[MOST_GRAPHS];
	int graph_count;
};

/* ---- host side ------------------------------------------------------------------------------ */

static void fill_packed(uint8_t *to, size_t bytes, int group, uint64_t seed)
{
	size_t record = (size_t)KM_MOE_RECORD_BYTES(group), count = bytes / record;

#pragma omp parallel for
	for (size_t r = 0; r < count; r++) {
		uint8_t *at = to + r * record;
		size_t i = 0;

		for (; i < KM_MOE_RECORD_CODES; i += 8) {
			uint64_t v = km_rng_u64(seed, (r * record + i) / 8);

			memcpy(at + i, &v, 8);
		}
		for (; i < record; i += 2) {
			uint64_t v = km_rng_u64(seed + 1, (r * record + i) / 2);
			uint16_t scale =
				km_f32_to_bf16(0.004f + 0.008f * (float)(v >> 40) * 0x1p-24f);

			scale |= (uint16_t)(v & 1) << 15;
			memcpy(at + i, &scale, 2);
		}
	}
}

static void fill_routing(const km_moe_problem *p, int tokens, int repeat, uint64_t seed,
                         int32_t *ids, float *weights)
{
	for (int t = 0; t < tokens; t++) {
		uint64_t row = (uint64_t)(repeat ? t % repeat : t) << 16;
		int32_t *id = ids + (size_t)t * (size_t)p->top_k;
		float *w = weights + (size_t)t * (size_t)p->top_k, sum = 0;
		int count = 0;

		for (uint64_t draw = 0; count < p->top_k; draw++) {
			int32_t e = (int32_t)(km_rng_u64(seed, row + draw) %
			                      (uint64_t)p->global_experts);
			bool taken = false;

			for (int k = 0; k < count; k++)
				taken |= id[k] == e;
			if (taken)
				continue;
			w[count] = 0.2f + (float)km_rng_uniform(seed + 1, row + draw);
			sum += w[count];
			id[count++] = e;
		}
		for (int k = 0; k < count; k++)
			w[k] /= sum;
	}
}

static void fill_host(km_cuda_moe_tuner *t)
{
	const km_moe_problem *p = &t->problem;
	size_t row = (size_t)p->hidden;

	t->gate_up_bytes = km_moe_gate_up_bytes(p->hidden, p->intermediate, p->group);
	t->down_bytes = km_moe_down_bytes(p->hidden, p->intermediate, p->group);
	t->kinds = km_xmalloc(KINDS * (t->gate_up_bytes + t->down_bytes));
	fill_packed(t->kinds, KINDS * (t->gate_up_bytes + t->down_bytes), p->group, 11);
	t->host_x = km_xmalloc(REPEAT * row * 2);
	t->reference = km_xmalloc(REPEAT * row * 4);
	t->result = km_xmalloc(2 * REPEAT * row * 2);
	for (size_t i = 0; i < REPEAT * row; i++)
		t->host_x[i] = km_f32_to_bf16(km_rng_normal(12, i));
}

/* ---- memory --------------------------------------------------------------------------------- */

/* How many calls a sample has: about sample_us, by what the bytes and flops take at least. */
static int calls_of(const km_moe_problem *p, int tokens)
{
	double miss = 1.0 - (double)p->top_k / p->global_experts;
	double touched = p->experts * (1.0 - pow(miss, tokens));
	double bytes =
		touched * (double)(km_moe_gate_up_bytes(p->hidden, p->intermediate, p->group) +
	                           km_moe_down_bytes(p->hidden, p->intermediate, p->group));
	double share = (double)p->experts / p->global_experts;
	double flops = 6.0 * tokens * p->top_k * share * p->hidden * p->intermediate;
	int calls = (int)(sample_us / (6 + bytes / 2.5e6 + flops / 3e8));

	return calls < 1 ? 1 : calls > MOST_CALLS ? MOST_CALLS : calls;
}

/* As many as there are calls: with few calls each reads more weights than any cache holds. */
static int routings_of(const km_moe_problem *p, int tokens)
{
	int calls = calls_of(p, tokens);

	return calls < ROUTINGS ? calls : ROUTINGS;
}

/* Room for the general form on REPEAT tokens too, which keeps in f32 what the others keep in bf16. */
static size_t scratch_bytes(const km_moe_problem *p, const km_moe_device *d)
{
	size_t row = (size_t)p->top_k * (size_t)(p->intermediate + p->hidden) * 4;

	return km_moe_scratch_size(p, d) + REPEAT * row;
}

static size_t token_bytes(const km_moe_problem *p, const km_moe_device *d)
{
	size_t tokens = (size_t)p->tokens, places = tokens * (size_t)p->top_k,
	       hidden = (size_t)p->hidden;
	size_t rows = 0;

	for (int m = 1; m <= p->tokens; m++) { /* fewer tokens have more routings */
		size_t n = (size_t)m * (size_t)routings_of(p, m);

		rows = n > rows ? n : rows;
	}
	return rows * (hidden * 2 + (size_t)p->top_k * 8) + places * 8 + tokens * hidden * 4 +
	       scratch_bytes(p, d);
}

static int upload_experts(km_cuda_moe_tuner *t, km_err *err)
{
	const km_moe_problem *p = &t->problem;
	void *gate_up, *down;

	KM_TRY(km_cuda_take(t->cuda, &gate_up, t->gate_up_bytes * (size_t)p->experts, "experts",
	                    err));
	KM_TRY(km_cuda_take(t->cuda, &down, t->down_bytes * (size_t)p->experts, "experts", err));
	for (int e = 0; e < p->experts; e++) {
		char *g = (char *)gate_up + t->gate_up_bytes * (size_t)e;
		char *d = (char *)down + t->down_bytes * (size_t)e;
		const uint8_t *kind = t->kinds + (size_t)e * (t->gate_up_bytes + t->down_bytes);

		if (e < KINDS) {
			KM_TRY(km_cuda_upload(t->cuda, g, kind, t->gate_up_bytes, err));
			KM_TRY(km_cuda_upload(t->cuda, d, kind + t->gate_up_bytes, t->down_bytes,
			                      err));
			continue;
		}
		KM_TRY(km_cuda_copy(t->cuda, g, g - t->gate_up_bytes * KINDS, t->gate_up_bytes,
		                    err));
		KM_TRY(km_cuda_copy(t->cuda, d, d - t->down_bytes * KINDS, t->down_bytes, err));
	}
	t->weights =
		(km_moe_weights){ .packed = true,
		                  .group = p->group,
		                  .gate_up = { .data = gate_up, .data_stride = t->gate_up_bytes },
		                  .down = { .data = down, .data_stride = t->down_bytes } };
	return 0;
}

/* This is rank 0: it has the first of all experts. */
static int upload_map(km_cuda_moe_tuner *t, km_err *err)
{
	const km_moe_problem *p = &t->problem;
	size_t bytes = (size_t)p->global_experts * 4;
	int32_t *host;
	void *map;
	int rc;

	if (!p->expert_map)
		return 0;
	KM_TRY(km_cuda_take(t->cuda, &map, bytes, "expert map", err));
	host = km_xmalloc(bytes);
	for (int e = 0; e < p->global_experts; e++)
		host[e] = e < p->experts ? e : -1;
	rc = km_cuda_upload(t->cuda, map, host, bytes, err);
	free(host);
	t->map = map;
	return rc;
}

static void drop_graphs(km_cuda_moe_tuner *t)
{
	for (int i = 0; i < t->graph_count; i++)
		km_cuda_graph_free(t->graphs[i].graph);
	t->graph_count = 0;
}

static int take_rows(km_cuda_moe_tuner *t, km_err *err)
{
	size_t tokens = (size_t)t->problem.tokens, row = (size_t)t->problem.hidden * 2;
	size_t done = tokens < REPEAT ? tokens : REPEAT, all = tokens * (size_t)t->routings;
	void *x;

	KM_TRY(km_cuda_take(t->cuda, &x, all * row, "hidden states", err));
	t->x = x;
	for (size_t r = 0; r < (size_t)t->routings; r++) {
		char *to = t->x + r * tokens * row;

		KM_TRY(km_cuda_upload(t->cuda, to, t->host_x, done * row, err));
		for (size_t at = done; at < tokens; at += done)
			KM_TRY(km_cuda_copy(t->cuda, to + at * row, to,
			                    (tokens - at < done ? tokens - at : done) * row, err));
	}
	return 0;
}

/* ids and weights of `sets` routings into new device memory. */
static int take_routing(km_cuda_moe_tuner *t, int sets, int repeat, int32_t **ids, float **weights,
                        km_err *err)
{
	const km_moe_problem *p = &t->problem;
	size_t places = (size_t)p->tokens * (size_t)p->top_k, all = places * (size_t)sets;
	int32_t *host_ids = km_xmalloc(all * 4);
	float *host_weights = km_xmalloc(all * 4);
	void *a = NULL, *b = NULL;
	int rc;

	for (int i = 0; i < sets; i++)
		fill_routing(p, p->tokens, repeat, 21 + 2 * (uint64_t)i,
		             host_ids + places * (size_t)i, host_weights + places * (size_t)i);
	rc = km_cuda_take(t->cuda, &a, all * 4, "ids", err);
	if (rc >= 0)
		rc = km_cuda_take(t->cuda, &b, all * 4, "weights", err);
	if (rc >= 0)
		rc = km_cuda_upload(t->cuda, a, host_ids, all * 4, err);
	if (rc >= 0)
		rc = km_cuda_upload(t->cuda, b, host_weights, all * 4, err);
	free(host_ids);
	free(host_weights);
	*ids = a;
	*weights = b;
	return rc;
}

/* ---- running -------------------------------------------------------------------------------- */

static km_moe_buffers check_buffers(const km_cuda_moe_tuner *t, bool y_bf16)
{
	return (km_moe_buffers){ .x = t->x,
		                 .ids = t->check_ids,
		                 .weights = t->check_weights,
		                 .expert_map = t->map,
		                 .experts = t->weights,
		                 .routed_scale = routed_scale,
		                 .y = t->y,
		                 .y_bf16 = y_bf16,
		                 .scratch = t->scratch };
}

/* The plain packing of one kind's three matrices, for the CPU's op. */
static void unpack_kind(const km_cuda_moe_tuner *t, int kind, km_weight w[3])
{
	const km_moe_problem *p = &t->problem;
	size_t codes = (size_t)p->hidden * (size_t)p->intermediate / 2;
	size_t scales = (size_t)p->hidden * (size_t)(p->intermediate / p->group) * 2;
	const uint8_t *from = t->kinds + (size_t)kind * (t->gate_up_bytes + t->down_bytes);
	km_int4_matrix m[3];

	for (int i = 0; i < 3; i++) {
		m[i] = (km_int4_matrix){ km_xmalloc(codes), km_xmalloc(scales) };
		w[i] = (km_weight){ .type = KM_W_INT4,
			            .rows = i < 2 ? p->intermediate : p->hidden,
			            .cols = i < 2 ? p->hidden : p->intermediate,
			            .data = m[i].codes,
			            .scale = m[i].scales,
			            .scale_dtype = KM_BF16,
			            .group = p->group };
	}
	km_moe_unpack_gate_up(p->hidden, p->intermediate, p->group, from, &m[0], &m[1]);
	km_moe_unpack_down(p->hidden, p->intermediate, p->group, from + t->gate_up_bytes, &m[2]);
}

static double row_error(const float *y, const float *reference, int n)
{
	double off = 0, size = 0;

	for (int i = 0; i < n; i++) {
		double d = (double)y[i] - reference[i];

		off += d * d;
		size += (double)reference[i] * reference[i];
	}
	/* a row none of whose experts is here is 0 */
	return size > 0 ? sqrt(off / size) : off == 0 ? 0 : INFINITY;
}

/* y of the first rows by the CPU. Places of experts that are elsewhere have weight 0. */
static void run_cpu(const km_cuda_moe_tuner *t, int rows, km_weight *w[3], float *y)
{
	const km_moe_problem *p = &t->problem;
	size_t places = (size_t)rows * (size_t)p->top_k, values = (size_t)rows * (size_t)p->hidden;
	km_moe_args a = { .tokens = rows,
		          .experts = p->experts,
		          .top_k = p->top_k,
		          .hidden = p->hidden,
		          .intermediate = p->intermediate,
		          .gate = w[0],
		          .up = w[1],
		          .down = w[2],
		          .routed_scale = routed_scale,
		          .y = y };
	int32_t *ids = km_xmalloc(places * 4);
	float *weights = km_xmalloc(places * 4), *x = km_xmalloc(values * 4);
	size_t bytes = km_moe_scratch_bytes(&a, rows, omp_get_max_threads());

	fill_routing(p, rows, REPEAT, 21, ids, weights);
	for (size_t i = 0; i < places; i++)
		if (ids[i] >= p->experts) {
			ids[i] = 0;
			weights[i] = 0;
		}
	km_dtype_to_f32(KM_BF16, t->host_x, x, values);
	memset(y, 0, values * 4);
	a.x = x;
	a.ids = ids;
	a.weights = weights;
	a.scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
	KM_ASSERT(a.scratch);
	km_cpu_ops(NULL)->moe(&a);
	free(a.scratch);
	free(ids);
	free(weights);
	free(x);
}

/* The general form, which everything else is held against, against the CPU: once for a problem. */
static int check_reference(km_cuda_moe_tuner *t, int rows, km_err *err)
{
	const km_moe_problem *p = &t->problem;
	km_weight kinds[KINDS][3], *w[3];
	float *y = km_xmalloc((size_t)rows * (size_t)p->hidden * 4);
	double worst = 0;

	for (int i = 0; i < 3; i++)
		w[i] = km_xcalloc((size_t)p->experts, sizeof(**w));
	for (int k = 0; k < KINDS; k++)
		unpack_kind(t, k, kinds[k]);
	for (int e = 0; e < p->experts; e++)
		for (int i = 0; i < 3; i++)
			w[i][e] = kinds[e % KINDS][i];
	run_cpu(t, rows, w, y);
	for (int r = 0; r < rows; r++) {
		double error = row_error(t->reference + (size_t)r * (size_t)p->hidden,
		                         y + (size_t)r * (size_t)p->hidden, p->hidden);

		worst = error > worst || isnan(error) ? error : worst;
	}
	for (int k = 0; k < KINDS; k++)
		for (int i = 0; i < 3; i++) {
			free((void *)(uintptr_t)kinds[k][i].data);
			free((void *)(uintptr_t)kinds[k][i].scale);
		}
	for (int i = 0; i < 3; i++)
		free(w[i]);
	free(y);
	if (worst <= row_bound)
		return 0;
	return km_fail(err, KM_EDEVICE,
	               "the general form, which candidates are compared with, is off from the "
	               "CPU's result by %.2g of a row",
	               worst);
}

static int make_reference(km_cuda_moe_tuner *t, km_err *err)
{
	km_moe_problem p = t->problem;
	km_moe_plan general = { .form = KM_MOE_GENERAL };
	km_moe_buffers b = check_buffers(t, false);
	size_t bytes;
	int oracle;

	p.tokens = p.tokens < REPEAT ? p.tokens : REPEAT;
	p.pdl = false;
	bytes = (size_t)p.tokens * (size_t)p.hidden * 4;
	KM_TRY(km_cuda_fill(t->cuda, t->y, POISON, bytes, err));
	KM_TRY(km_cuda_moe_run(t->cuda, &general, &p, &b, err));
	KM_TRY(km_cuda_download(t->cuda, t->reference, t->y, bytes, err));
	oracle = p.tokens < ORACLE_ROWS ? p.tokens : ORACLE_ROWS;
	if (t->oracle_done)
		return 0;
	t->oracle_done = oracle == ORACLE_ROWS;
	return check_reference(t, oracle, err);
}

static int prepare(void *context, int tokens, km_err *err)
{
	km_cuda_moe_tuner *t = context;
	void *p;

	drop_graphs(t);
	km_cuda_rewind(t->cuda, t->mark);
	t->problem.tokens = tokens;
	t->routings = routings_of(&t->problem, tokens);
	t->calls = calls_of(&t->problem, tokens) / t->routings * t->routings;
	KM_TRY(take_rows(t, err));
	KM_TRY(take_routing(t, t->routings, 0, &t->ids, &t->gate_weights, err));
	KM_TRY(take_routing(t, 1, REPEAT, &t->check_ids, &t->check_weights, err));
	KM_TRY(km_cuda_take(t->cuda, &p, (size_t)tokens * (size_t)t->problem.hidden * 4, "results",
	                    err));
	t->y = p;
	KM_TRY(km_cuda_take(t->cuda, &t->scratch, scratch_bytes(&t->problem, &t->device), "scratch",
	                    err));
	KM_TRY(km_cuda_fill(t->cuda, t->scratch, 0, KM_MOE_SYNC_BYTES, err));
	return make_reference(t, err);
}

/* A tile so small that an expert's weights would be read more than eight times over. */
static bool is_hopeless(const km_moe_problem *p, const km_moe_tile *tile)
{
	return (double)p->tokens * p->top_k / p->global_experts > 8.0 * tile->block_m;
}

static int candidates(void *context, int tokens, km_tune_entry *out, int max, km_err *err)
{
	km_cuda_moe_tuner *t = context;
	km_moe_problem p = t->problem;
	km_moe_tile *tiles;
	km_moe_plan own;
	int n, count = 0;

	p.tokens = tokens;
	KM_TRY(km_moe_plan_make(&own, &p, &t->device, NULL, err));
	if (own.form == KM_MOE_GENERAL)
		return km_fail(err, KM_EUNSUPPORTED,
		               "at %d tokens only the general form fits, which has nothing "
		               "to tune",
		               tokens);
	km_moe_tile_values(&own.tile, out[count++].values);
	tiles = km_xcalloc((size_t)max, sizeof(*tiles));
	n = km_moe_candidates(&p, &t->device, tiles, max);
	for (int i = 0; i < n && i < max && count < max; i++)
		if (memcmp(&tiles[i], &own.tile, sizeof(own.tile)) != 0 &&
		    !is_hopeless(&p, &tiles[i]))
			km_moe_tile_values(&tiles[i], out[count++].values);
	free(tiles);
	return count;
}

static int plan_of(const km_cuda_moe_tuner *t, const int *values, km_moe_plan *plan, km_err *err)
{
	km_moe_tile tile = km_moe_tile_of(values);

	return km_moe_plan_make(plan, &t->problem, &t->device, &tile, err);
}

/* The first rows of the result, and the last ones. */
static int compare_rows(km_cuda_moe_tuner *t, int first, int count, const uint16_t *y, km_err *err)
{
	size_t row = (size_t)t->problem.hidden;
	float *values = km_xmalloc(row * 4);
	double worst = 0;
	int at = 0;

	for (int i = 0; i < count; i++) {
		double error;

		km_dtype_to_f32(KM_BF16, y + (size_t)i * row, values, row);
		error = row_error(values, t->reference + (size_t)((first + i) % REPEAT) * row,
		                  (int)row);
		if (error > worst || isnan(error)) {
			worst = error;
			at = first + i;
		}
		if (isnan(error))
			break;
	}
	free(values);
	if (worst <= row_bound)
		return 1;
	km_fail(err, KM_EDEVICE, "row %d of %d is off by %.2g", at, t->problem.tokens, worst);
	return 0;
}

static int check(void *context, int tokens, const int *values, double *us, km_err *err)
{
	km_cuda_moe_tuner *t = context;
	size_t row = (size_t)t->problem.hidden * 2;
	int rows = tokens < REPEAT ? tokens : REPEAT, rc;
	km_moe_buffers b = check_buffers(t, true);
	km_moe_plan plan;

	KM_ASSERT(tokens == t->problem.tokens);
	if (plan_of(t, values, &plan, err) < 0)
		return 0;
	KM_TRY(km_cuda_fill(t->cuda, t->y, POISON, (size_t)tokens * row, err));
	KM_TRY(km_cuda_time_begin(t->cuda, err));
	rc = km_cuda_moe_run(t->cuda, &plan, &t->problem, &b, err);
	if (rc < 0)
		return rc == KM_EUNSUPPORTED ? 0 : rc;
	KM_TRY(km_cuda_time_end(t->cuda, us, err));
	KM_TRY(km_cuda_download(t->cuda, t->result, t->y, (size_t)rows * row, err));
	rc = compare_rows(t, 0, rows, t->result, err);
	if (rc != 1 || tokens <= REPEAT)
		return rc;
	KM_TRY(km_cuda_download(t->cuda, t->result, t->y + (size_t)(tokens - rows) * row,
	                        (size_t)rows * row, err));
	return compare_rows(t, tokens - rows, rows, t->result, err);
}

static int capture(km_cuda_moe_tuner *t, const km_moe_plan *plan, km_cuda_graph **graph,
                   km_err *err)
{
	size_t places = (size_t)t->problem.tokens * (size_t)t->problem.top_k;
	size_t rows = (size_t)t->problem.tokens * (size_t)t->problem.hidden * 2;
	int rc = km_cuda_capture_begin(t->cuda, err), ended;

	KM_TRY(rc);
	for (int i = 0; i < t->calls && rc >= 0; i++) {
		km_moe_buffers b = check_buffers(t, true);
		size_t r = (size_t)(i % t->routings);

		b.x = t->x + r * rows;
		b.ids = t->ids + r * places;
		b.weights = t->gate_weights + r * places;
		rc = km_cuda_moe_run(t->cuda, plan, &t->problem, &b, err);
	}
	ended = km_cuda_capture_end(t->cuda, graph, rc < 0 ? NULL : err);
	if (rc < 0 && ended >= 0)
		km_cuda_graph_free(*graph);
	return rc < 0 ? rc : ended;
}

static int graph_of(km_cuda_moe_tuner *t, const int *values, km_cuda_graph **graph, km_err *err)
{
	struct cached_graph *c = t->graphs;
	km_moe_plan plan;

	for (; c < t->graphs + t->graph_count; c++)
		if (!memcmp(c->values, values, sizeof(c->values))) {
			*graph = c->graph;
			return 0;
		}
	if (t->graph_count == MOST_GRAPHS)
		return km_fail(err, KM_ELIMIT, "more than %d candidates", MOST_GRAPHS);
	KM_TRY(plan_of(t, values, &plan, err));
	KM_TRY(capture(t, &plan, graph, err));
	memcpy(c->values, values, sizeof(c->values));
	c->graph = *graph;
	t->graph_count++;
	return km_cuda_graph_launch(t->cuda, *graph, err); /* the first is slower: not timed */
}

static int sample(void *context, int tokens, const int *values, double *us, km_err *err)
{
	km_cuda_moe_tuner *t = context;
	km_cuda_graph *graph;

	KM_ASSERT(tokens == t->problem.tokens);
	KM_TRY(graph_of(t, values, &graph, err));
	KM_TRY(km_cuda_time_begin(t->cuda, err));
	KM_TRY(km_cuda_graph_launch(t->cuda, graph, err));
	KM_TRY(km_cuda_time_end(t->cuda, us, err));
	*us /= t->calls;
	return 0;
}

static double seconds(void *context)
{
	(void)context;
	return km_now_s();
}

/* ---- opening -------------------------------------------------------------------------------- */

static int open_parts(km_cuda_moe_tuner *t, km_err *err)
{
	const km_moe_problem *p = &t->problem;
	size_t bytes;

	fill_host(t);
	bytes = (t->gate_up_bytes + t->down_bytes) * (size_t)p->experts +
	        token_bytes(p, &t->device) + SLACK;
	KM_TRY(km_cuda_open(&t->cuda, 0, bytes, err));
	KM_TRY(upload_experts(t, err));
	KM_TRY(upload_map(t, err));
	t->mark = km_cuda_mark(t->cuda);
	return km_cuda_wait(t->cuda, err);
}

int km_cuda_moe_tuner_open(km_cuda_moe_tuner **out, km_tuner_backend *backend,
                           const km_moe_problem *problem, const km_moe_device *device, km_err *err)
{
	km_cuda_moe_tuner *t = km_xcalloc(1, sizeof(*t));
	int rc;

	t->problem = *problem;
	t->device = *device;
	rc = open_parts(t, err);
	if (rc < 0) {
		km_cuda_moe_tuner_close(t);
		return rc;
	}
	*backend = (km_tuner_backend){ .context = t,
		                       .prepare = prepare,
		                       .candidates = candidates,
		                       .check = check,
		                       .sample = sample,
		                       .now = seconds };
	*out = t;
	return 0;
}

void km_cuda_moe_tuner_close(km_cuda_moe_tuner *t)
{
	if (!t)
		return;
	drop_graphs(t);
	km_cuda_close(t->cuda);
	free(t->kinds);
	free(t->host_x);
	free(t->reference);
	free(t->result);
	free(t);
}
