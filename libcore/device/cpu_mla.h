/*
 * Attention over the paged cache of latents.
 *
 * ROOFLINE  Decode reads a latent (576 values) once for all heads and does 2 * (576 + 512) flops
 * with it for each of them: with 16 heads or more the FMA units are the bound, not memory, on a
 * CPU. So a block of KM_CPU_MLA_BLOCK latents is made f32 once and stays in L2 (147 KB of 1 MiB)
 * while heads, four at a time, run over it. Prefill's work is the rebuilding of keys and values, 2
 * * 512 * 256 flops for each token and head, as much as 410 rows' scores and sums.
 *
 * ORDER  Blocks start at multiples of KM_CPU_MLA_BLOCK and come in rising order; in a block, scores
 * sum as in cpu_dot.h (decode) or in rising order of the key's dimension (prefill), and values in
 * rising order of position. Nothing depends on the other rows: a row that does not see a position
 * never multiplies with it.
 */
#ifndef KM_DEVICE_CPU_MLA_H
#define KM_DEVICE_CPU_MLA_H

#include <math.h>
#include <omp.h>

#include "base/fixed_math.h"
#include "device/cpu_dot.h"

/* 4 rows' sums of values: VL registers */
enum { BLOCK = KM_CPU_MLA_BLOCK, VALUE_COLS = VL / 4 * VL };

static void widen_cache(enum km_kv_dtype dtype, const void *cache, size_t at, int count, float *to)
{
	int i = 0;

	for (; i + VL <= count; i += VL) {
		if (dtype == KM_KV_F32)
			v_store(to + i, v_load((const float *)cache + at + i));
		else if (dtype == KM_KV_BF16)
			v_store(to + i, v_load_bf16((const uint16_t *)cache + at + i));
		else
			v_store(to + i, v_mul(v_set1(256.0f),
			                      v_load_fp8_256th((const uint8_t *)cache + at + i)));
	}
	km_cpu_kv_load(dtype, cache, at + (size_t)i, count - i, to + i);
}

/* A latent's place in a block: rows padded with zeros to a multiple of LANES. */
static int latent_stride(const km_mla_args *a)
{
	return (a->kv_lora_rank + a->rope_dim + LANES - 1) / LANES * LANES;
}

static void widen_latents(const km_mla_args *a, int seq, int position, int count, float *to)
{
	int size = a->kv_lora_rank + a->rope_dim, stride = latent_stride(a);

	for (int i = 0; i < count; i++) {
		size_t slot = km_cpu_slot(a->batch, seq, position + i);

		widen_cache(a->kv_dtype, a->cache, slot * (size_t)size, size, to + i * stride);
		for (int c = size; c < stride; c++)
			to[i * stride + c] = 0;
	}
}

static int block_size(int context, int position)
{
	return context - position < BLOCK ? context - position : BLOCK;
}

typedef struct softmax_state {
	float largest, sum;
} softmax_state;

/* scores -> exp(scale * score - largest), zero from `count` on; returns what the sums so far are to
 * be multiplied with. */
static float softmax_step(softmax_state *state, float *scores, int count, float scale)
{
	vf most = v_set1(-INFINITY), sum[PARTS];
	float lanes[VL], largest = state->largest, rescale;

	for (int i = 0; i < count; i += VL) {
		vf s = v_mul(v_load(scores + i), v_set1(scale));

		v_store(scores + i, s);
		if (count - i >= VL)
			most = v_max(s, most);
		else
			for (int j = i; j < count; j++)
				largest = scores[j] > largest ? scores[j] : largest;
	}
	v_store(lanes, most);
	for (int i = 0; i < VL; i++)
		largest = lanes[i] > largest ? lanes[i] : largest;
	for (int p = 0; p < PARTS; p++)
		sum[p] = v_zero();
	for (int i = 0; i < BLOCK; i += VL) {
		float *at = scores + i;
		vf p = v_exp(v_sub(v_load(at), v_set1(largest)));

		v_store(at, p);
		for (int j = i < count ? count - i : 0; j < VL; j++)
			at[j] = 0;
		sum[i / VL % PARTS] = v_add(sum[i / VL % PARTS], v_load(at));
	}
	rescale = state->sum == 0 ? 0 : km_fixed_exp(state->largest - largest);
	state->sum = state->sum * rescale + v_sum(sum);
	state->largest = largest;
	return rescale;
}

/* to[i][c] = to[i][c] * rescale[i] + sum_t p[i][t] values[t][c], `cols` columns of `rows` rows, in
 * registers: `rows` is 1 or 4, `vectors` 1 (cols <= VL) or VL / 4 (cols = VALUE_COLS). */
KM_INLINE void add_values_tile(int rows, int vectors, float *const to[4], const float rescale[4],
                               const float *p, const float *values, size_t stride, int count,
                               int cols)
{
	vf acc[VL];

#pragma GCC unroll 4
	for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
		for (int j = 0; j < vectors; j++)
			acc[i * vectors + j] = v_mul(v_load_up_to(to[i] + j * VL, cols - j * VL),
			                             v_set1(rescale[i]));
	for (int t = 0; t < count; t++) {
		vf row[VL / 4];

#pragma GCC unroll 4
		for (int j = 0; j < vectors; j++)
			row[j] = v_load_up_to(values + (size_t)t * stride + j * VL, cols - j * VL);
#pragma GCC unroll 4
		for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
			for (int j = 0; j < vectors; j++)
				acc[i * vectors + j] = v_fma(v_set1(p[i * BLOCK + t]), row[j],
				                             acc[i * vectors + j]);
	}
#pragma GCC unroll 4
	for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
		for (int j = 0; j < vectors; j++)
			v_store_up_to(to[i] + j * VL, acc[i * vectors + j], cols - j * VL);
}

KM_INLINE void add_values_rows(int rows, float *const to[4], const float rescale[4], const float *p,
                               const float *values, size_t stride, int count, int cols)
{
	int c = 0;

	for (; c + VALUE_COLS <= cols; c += VALUE_COLS) {
		float *at[4] = { to[0] + c, to[rows > 1] + c, to[rows > 1 ? 2 : 0] + c,
			         to[rows - 1] + c };

		add_values_tile(rows, VL / 4, at, rescale, p, values + c, stride, count,
		                VALUE_COLS);
	}
	for (; c < cols; c += VL) {
		float *at[4] = { to[0] + c, to[rows > 1] + c, to[rows > 1 ? 2 : 0] + c,
			         to[rows - 1] + c };

		add_values_tile(rows, 1, at, rescale, p, values + c, stride, count, cols - c);
	}
}

/* For up to 4 rows: p [4, BLOCK], each row with a count of its own. */
static void add_values(int rows, float *const to[4], const float rescale[4], const float *p,
                       const float *values, size_t stride, const int counts[4], int cols)
{
	if (rows == 4 && counts[0] == counts[1] && counts[0] == counts[2] &&
	    counts[0] == counts[3]) {
		add_values_rows(4, to, rescale, p, values, stride, counts[0], cols);
		return;
	}
	for (int i = 0; i < rows; i++)
		add_values_rows(1, to + i, rescale + i, p + i * BLOCK, values, stride, counts[i],
		                cols);
}

/*
 * Decode, in three passes over at most KM_CPU_MLA_SEQS sequences: queries are absorbed head by head
 * (each weight is read once for all sequences), heads walk the cache, and their sums of latents
 * become values head by head.
 */
typedef struct decode_round {
	const km_mla_args *a;
	km_cpu_mla_scratch s;
	weight_view kv_b;
	int first, seqs;  /* sequences of the batch that this round takes */
	int heads_a_task; /* heads that share a walk over the cache */
} decode_round;

static float *decode_query(const decode_round *d, int i, int head)
{
	size_t row = (size_t)i * (size_t)d->a->heads + (size_t)head;

	return d->s.query + row * (size_t)(d->a->kv_lora_rank + d->a->rope_dim);
}

static float *decode_latent(const decode_round *d, int i, int head)
{
	return d->s.latent +
	       ((size_t)i * (size_t)d->a->heads + (size_t)head) * (size_t)d->a->kv_lora_rank;
}

static size_t decode_row(const decode_round *d, int i, int head)
{
	return (size_t)d->a->batch->seq_start[d->first + i] * (size_t)d->a->heads + (size_t)head;
}

/* query[c] += sum of q[n] * w[n][c] over WEIGHT_ROWS rows, or `rows` where there are fewer. */
static void absorb_rows(const float *q, const float *w, int rows, int count, float *query)
{
	for (int c = 0; c < count; c += VL) {
		vf sum = v_load_up_to(query + c, count - c);

		for (int n = 0; n < rows; n++)
			sum = v_fma(v_set1(q[n]), v_load(w + n * CHUNK + c), sum);
		v_store_up_to(query + c, sum, count - c);
	}
}

static void absorb_head(const decode_round *d, int head)
{
	const km_mla_args *a = d->a;
	int first = head * (a->nope_dim + a->v_dim), lora = a->kv_lora_rank;
	int key = a->nope_dim + a->rope_dim;
	float w[WEIGHT_ROWS * CHUNK] __attribute__((aligned(64)));

	for (int i = 0; i < d->seqs; i++) {
		memset(decode_query(d, i, head), 0, (size_t)lora * sizeof(float));
		memcpy(decode_query(d, i, head) + lora,
		       a->q + decode_row(d, i, head) * (size_t)key + a->nope_dim,
		       (size_t)a->rope_dim * sizeof(float));
	}
	for (int n = 0; n < a->nope_dim; n += WEIGHT_ROWS) {
		int rows = a->nope_dim - n < WEIGHT_ROWS ? a->nope_dim - n : WEIGHT_ROWS;

		for (int c = 0; c < lora; c += CHUNK) {
			int count = lora - c < CHUNK ? lora - c : CHUNK;

			for (int r = 0; r < rows; r++)
				widen_row(&d->kv_b, first + n + r, c, count, w + r * CHUNK);
			for (int i = 0; i < d->seqs; i++)
				absorb_rows(a->q + decode_row(d, i, head) * (size_t)key + n, w,
				            rows, count, decode_query(d, i, head) + c);
		}
	}
}

/* scores[i * BLOCK + t] of 4 queries with a block's latents. */
static void latent_scores(const float *const query[4], const float *latents, size_t stride,
                          int size, int count, float *scores)
{
	for (int t = 0; t < count; t += TILE_COLS) {
		float lanes[VL];

		run_tile(query, latents + (size_t)t * stride, stride, size, NULL, true, true, lanes);
		for (int i = 0; i < 4; i++)
			memcpy(scores + i * BLOCK + t, lanes + i * TILE_COLS,
			       TILE_COLS * sizeof(float));
	}
}

static void walk_block(const decode_round *d, int i, int head, int heads, const float *latents,
                       int count, softmax_state *states)
{
	int size = d->a->kv_lora_rank + d->a->rope_dim, stride = latent_stride(d->a);
	float scores[4 * BLOCK] __attribute__((aligned(64))), rescale[4], *to[4];
	const int counts[4] = { count, count, count, count };
	const float *query[4];

	for (int h = 0; h < 4; h++) {
		query[h] = decode_query(d, i, head + (h < heads ? h : heads - 1));
		to[h] = decode_latent(d, i, head + (h < heads ? h : heads - 1));
	}
	latent_scores(query, latents, (size_t)stride, size, count, scores);
	for (int h = 0; h < heads; h++)
		rescale[h] = softmax_step(&states[h], scores + h * BLOCK, count, d->a->scale);
	add_values(heads, to, rescale, scores, latents, (size_t)stride, counts, d->a->kv_lora_rank);
}

/* Heads [head, head + heads) of one sequence over its whole context. */
static void walk_cache(const decode_round *d, int i, int head, int heads, float *scratch)
{
	const km_mla_args *a = d->a;
	int seq = d->first + i, context = a->batch->kv_len[seq], lora = a->kv_lora_rank;
	float *latents = scratch;
	softmax_state *states = (softmax_state *)(latents + BLOCK * latent_stride(a));

	for (int h = 0; h < heads; h++) {
		states[h] = (softmax_state){ -INFINITY, 0 };
		memset(decode_latent(d, i, head + h), 0, (size_t)lora * sizeof(float));
	}
	for (int at = 0; at < context; at += BLOCK) {
		int count = block_size(context, at);

		widen_latents(a, seq, at, count, latents);
		for (int h = 0; h < heads; h += 4)
			walk_block(d, i, head + h, heads - h < 4 ? heads - h : 4, latents, count,
			           states + h);
	}
	for (int h = 0; h < heads; h++) {
		float *sum = decode_latent(d, i, head + h);
		vf factor = v_set1(1.0f / states[h].sum);

		for (int c = 0; c < lora; c += VL)
			v_store_up_to(sum + c, v_mul(v_load_up_to(sum + c, lora - c), factor),
			              lora - c);
	}
}

static void values_head(const decode_round *d, int head)
{
	const km_mla_args *a = d->a;
	int first = head * (a->nope_dim + a->v_dim) + a->nope_dim;
	float sums[DOT_TOKENS * DOT_ROWS];
	const float *x[KM_CPU_MLA_SEQS] = { NULL };

	for (int i = 0; i < d->seqs; i++)
		x[i] = decode_latent(d, i, head);
	for (int v = 0; v < a->v_dim; v += DOT_ROWS) {
		int rows = a->v_dim - v < DOT_ROWS ? a->v_dim - v : DOT_ROWS;

		dot_rows(&d->kv_b, first + v, rows, x, d->seqs, sums);
		for (int i = 0; i < d->seqs; i++)
			memcpy(a->out + decode_row(d, i, head) * (size_t)a->v_dim + v,
			       sums + i * DOT_ROWS, (size_t)rows * sizeof(float));
	}
}

static void walk_task(const decode_round *d, int tasks, int task)
{
	int heads = d->a->heads, head = task % tasks * d->heads_a_task;
	int count = heads - head < d->heads_a_task ? heads - head : d->heads_a_task;

	walk_cache(d, task / tasks, head, count,
	           d->s.thread + (size_t)omp_get_thread_num() * d->s.thread_floats);
}

static void decode_alone(const decode_round *d, int tasks)
{
	for (int head = 0; head < d->a->heads; head++)
		absorb_head(d, head);
	for (int i = 0; i < d->seqs * tasks; i++)
		walk_task(d, tasks, i);
	for (int head = 0; head < d->a->heads; head++)
		values_head(d, head);
}

static void decode_one_round(const decode_round *d, int threads)
{
	int heads = d->a->heads, tasks = (heads + d->heads_a_task - 1) / d->heads_a_task;

	if (threads == 1) {
		decode_alone(d, tasks);
		return;
	}
#pragma omp parallel
	{
#pragma omp for schedule(static)
		for (int head = 0; head < heads; head++)
			absorb_head(d, head);
#pragma omp for schedule(dynamic)
		for (int i = 0; i < d->seqs * tasks; i++)
			walk_task(d, tasks, i);
#pragma omp for schedule(static)
		for (int head = 0; head < heads; head++)
			values_head(d, head);
	}
}

/* Heads that share a walk: all where sequences alone keep the threads busy, else a share, in
 * fours. */
static int share_heads(int heads, int seqs, int threads)
{
	int walks = (threads + seqs - 1) / seqs, share = (heads + walks - 1) / walks;

	return (share + 3) / 4 * 4;
}

static void simd_mla_decode(const km_mla_args *a)
{
	int seqs = a->batch->decode_seqs;
	int threads = km_cpu_threads(km_op_cost(KM_OP_MLA_DECODE, a).flops / 2);
	decode_round d = { .a = a, .kv_b = view_weight(a->kv_b) };

	km_cpu_mla_layout(&d.s, a, a->batch->tokens, omp_get_max_threads(), a->scratch);
	for (d.first = 0; d.first < seqs; d.first += KM_CPU_MLA_SEQS) {
		d.seqs = seqs - d.first < KM_CPU_MLA_SEQS ? seqs - d.first : KM_CPU_MLA_SEQS;
		d.heads_a_task = share_heads(a->heads, d.seqs, threads);
		decode_one_round(&d, threads);
	}
}

/*
 * Prefill: one head of one prompt chunk at a time. A block's keys are rebuilt lying on their side,
 * [key, BLOCK], so that a query's scores fill vectors without a sum over lanes.
 */
typedef struct prefill_head {
	const km_mla_args *a;
	const weight_view *kv_b;
	int seq, head, rows;   /* rows of this sequence in the batch */
	float *latents;        /* [BLOCK, latent_stride] */
	float *keys;           /* [nope_dim + rope_dim, BLOCK] */
	float *values;         /* [BLOCK, v_dim] */
	softmax_state *states; /* [rows] */
} prefill_head;

static void rebuild_block(const prefill_head *p, int count)
{
	const km_mla_args *a = p->a;
	int stride = latent_stride(a), first = p->head * (a->nope_dim + a->v_dim);
	float sums[DOT_TOKENS * DOT_ROWS];
	const float *x[BLOCK] = { NULL };

	for (int t = 0; t < count; t++)
		x[t] = p->latents + t * stride;
	for (int n = 0; n < a->nope_dim; n += DOT_ROWS) {
		int rows = a->nope_dim - n < DOT_ROWS ? a->nope_dim - n : DOT_ROWS;

		dot_rows(p->kv_b, first + n, rows, x, count, sums);
		for (int r = 0; r < rows; r++)
			for (int t = 0; t < count; t++)
				p->keys[(n + r) * BLOCK + t] = sums[t * DOT_ROWS + r];
	}
	for (int r = 0; r < a->rope_dim; r++)
		for (int t = 0; t < count; t++)
			p->keys[(a->nope_dim + r) * BLOCK + t] = x[t][a->kv_lora_rank + r];
	for (int v = 0; v < a->v_dim; v += DOT_ROWS) {
		int rows = a->v_dim - v < DOT_ROWS ? a->v_dim - v : DOT_ROWS;

		dot_rows(p->kv_b, first + a->nope_dim + v, rows, x, count, sums);
		for (int t = 0; t < count; t++)
			memcpy(p->values + t * a->v_dim + v, sums + t * DOT_ROWS,
			       (size_t)rows * sizeof(float));
	}
}

/* scores[i * BLOCK + t] = q[i] . keys[.][t], for a whole block. */
static void key_scores(const float *const q[4], const float *keys, int size, float *scores)
{
	for (int t = 0; t < BLOCK; t += VALUE_COLS) {
		vf acc[VL];

#pragma GCC unroll 16
		for (int i = 0; i < VL; i++)
			acc[i] = v_zero();
		for (int c = 0; c < size; c++) {
			vf row[VL / 4];

#pragma GCC unroll 4
			for (int j = 0; j < VL / 4; j++)
				row[j] = v_load(keys + c * BLOCK + t + j * VL);
#pragma GCC unroll 4
			for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
				for (int j = 0; j < VL / 4; j++)
					acc[i * (VL / 4) + j] = v_fma(v_set1(q[i][c]), row[j],
					                              acc[i * (VL / 4) + j]);
		}
#pragma GCC unroll 4
		for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
			for (int j = 0; j < VL / 4; j++)
				v_store(scores + i * BLOCK + t + j * VL, acc[i * (VL / 4) + j]);
	}
}

/* Up to 4 rows of the chunk, from `r` on, meet the block at `position`. */
static void prefill_rows(const prefill_head *p, int r, int rows, int position)
{
	const km_mla_args *a = p->a;
	int start = a->batch->seq_start[p->seq], key = a->nope_dim + a->rope_dim, counts[4];
	float scores[4 * BLOCK] __attribute__((aligned(64))), rescale[4], *to[4];
	const float *q[4];

	for (int i = 0; i < 4; i++) {
		int token = start + r + (i < rows ? i : rows - 1);
		size_t row = (size_t)token * (size_t)a->heads + (size_t)p->head;

		q[i] = a->q + row * (size_t)key;
		to[i] = a->out + row * (size_t)a->v_dim;
		counts[i] = block_size(a->batch->positions[token] + 1, position);
	}
	key_scores(q, p->keys, key, scores);
	for (int i = 0; i < rows; i++)
		rescale[i] =
			softmax_step(&p->states[r + i], scores + i * BLOCK, counts[i], a->scale);
	add_values(rows, to, rescale, scores, p->values, (size_t)a->v_dim, counts, a->v_dim);
}

static float *prefill_out(const prefill_head *p, int r)
{
	size_t token = (size_t)(p->a->batch->seq_start[p->seq] + r);

	return p->a->out + (token * (size_t)p->a->heads + (size_t)p->head) * (size_t)p->a->v_dim;
}

static void run_prefill_head(const prefill_head *p)
{
	const km_mla_args *a = p->a;
	const int32_t *positions = a->batch->positions + a->batch->seq_start[p->seq];
	int context = p->rows ? positions[p->rows - 1] + 1 : 0, first = 0;

	for (int r = 0; r < p->rows; r++) {
		p->states[r] = (softmax_state){ -INFINITY, 0 };
		memset(prefill_out(p, r), 0, (size_t)a->v_dim * sizeof(float));
	}
	for (int at = 0; at < context; at += BLOCK) {
		int count = block_size(context, at);

		while (first < p->rows && positions[first] < at)
			first++;
		widen_latents(a, p->seq, at, count, p->latents);
		rebuild_block(p, count);
		for (int r = first; r < p->rows; r += 4)
			prefill_rows(p, r, p->rows - r < 4 ? p->rows - r : 4, at);
	}
	for (int r = 0; r < p->rows; r++) {
		float *out = prefill_out(p, r), factor = 1.0f / p->states[r].sum;

		for (int v = 0; v < a->v_dim; v++)
			out[v] *= factor;
	}
}

static void prefill_one_head(const km_mla_args *a, const weight_view *kv_b,
                             const km_cpu_mla_scratch *s, int i)
{
	const km_batch *batch = a->batch;
	prefill_head p = { .a = a, .kv_b = kv_b };

	p.seq = batch->decode_seqs + i / a->heads;
	p.head = i % a->heads;
	p.rows = batch->seq_start[p.seq + 1] - batch->seq_start[p.seq];
	p.latents = s->thread + (size_t)omp_get_thread_num() * s->thread_floats;
	p.keys = p.latents + BLOCK * latent_stride(a);
	p.values = p.keys + BLOCK * (a->nope_dim + a->rope_dim);
	p.states = (softmax_state *)(p.values + BLOCK * a->v_dim);
	run_prefill_head(&p);
}

static void simd_mla_prefill(const km_mla_args *a)
{
	const km_batch *batch = a->batch;
	int seqs = batch->seqs - batch->decode_seqs;
	weight_view kv_b = view_weight(a->kv_b);
	km_cpu_mla_scratch s;

	km_cpu_mla_layout(&s, a, batch->tokens, omp_get_max_threads(), a->scratch);
	KM_CPU_FOR_IN_TURN(km_op_cost(KM_OP_MLA_PREFILL, a).flops / 2, i, seqs * a->heads,
	                   prefill_one_head(a, &kv_b, &s, i));
}

#endif
