/*
 * The ops in plain C: the specification of every other form, and what runs where there is no AVX2.
 *
 * Everything is f32. A sum over columns is kept in 16 lanes, lane l taking columns l, l + 16, ...,
 * in pieces of CHUNK columns, so that compilers vectorise it without being allowed to reorder it.
 * Softmax over the cache walks blocks of KM_CPU_MLA_BLOCK positions with a running maximum; blocks
 * start at multiples of that, so that a row's result does not depend on how its prompt was cut.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "device/cpu.h"

enum { LANES = 16, CHUNK = 512 };

static float dot(const float *a, const float *b, int n)
{
	float lane[LANES] = { 0 };
	int i = 0;

	for (; i + LANES <= n; i += LANES)
		for (int l = 0; l < LANES; l++)
			lane[l] += a[i + l] * b[i + l];
	for (int l = 0; i + l < n; l++)
		lane[l] += a[i + l] * b[i + l];
	for (int width = LANES / 2; width; width /= 2)
		for (int l = 0; l < width; l++)
			lane[l] += lane[l + width];
	return lane[0];
}

/* to += factor * x */
static void add_scaled(float *to, float factor, const float *x, int n)
{
	for (int i = 0; i < n; i++)
		to[i] += factor * x[i];
}

static float weight_dot(const km_weight *w, int row, const float *x)
{
	float buf[CHUNK], sum = 0;

	for (int col = 0; col < w->cols; col += CHUNK) {
		int n = w->cols - col < CHUNK ? w->cols - col : CHUNK;

		km_cpu_weight_row(w, row, col, n, buf);
		sum += dot(buf, x + col, n);
	}
	return sum;
}

static float silu(float x)
{
	return x / (1.0f + expf(-x));
}

static void rmsnorm_row(const km_rmsnorm_args *a, int t)
{
	float *residual = a->residual + (size_t)t * (size_t)a->residual_stride;
	float *y = a->y + (size_t)t * (size_t)a->y_stride, factor;

	if (a->x)
		add_scaled(residual, 1.0f, a->x + (size_t)t * (size_t)a->size, a->size);
	factor = 1.0f / sqrtf(dot(residual, residual, a->size) / (float)a->size + a->eps);
	for (int i = 0; i < a->size; i++)
		y[i] = residual[i] * factor * a->weight[i];
}

static void plain_rmsnorm(const km_rmsnorm_args *a)
{
	KM_CPU_FOR((double)a->tokens * a->size, t, a->tokens, rmsnorm_row(a, t));
}

static void linear_output(const km_linear_args *a, int row)
{
	float buf[CHUNK];

	for (int t = 0; t < a->tokens && !a->accumulate; t++)
		a->y[(size_t)t * (size_t)a->y_stride + (size_t)row] = 0;
	for (int col = 0; col < a->w->cols; col += CHUNK) {
		int n = a->w->cols - col < CHUNK ? a->w->cols - col : CHUNK;

		km_cpu_weight_row(a->w, row, col, n, buf);
		for (int t = 0; t < a->tokens; t++)
			a->y[(size_t)t * (size_t)a->y_stride + (size_t)row] +=
				dot(buf, a->x + (size_t)t * (size_t)a->x_stride + col, n);
	}
}

static void plain_linear(const km_linear_args *a)
{
	double work = (double)a->tokens * a->w->rows * a->w->cols;

	KM_CPU_FOR(work, row, a->w->rows, linear_output(a, row));
}

static void silu_mul_row(const km_silu_mul_args *a, int t)
{
	const float *gate = a->gate + (size_t)t * (size_t)a->stride;
	const float *up = a->up + (size_t)t * (size_t)a->stride;
	float *y = a->y + (size_t)t * (size_t)a->size;

	for (int i = 0; i < a->size; i++)
		y[i] = silu(gate[i]) * up[i];
}

static void plain_silu_mul(const km_silu_mul_args *a)
{
	KM_CPU_FOR(4.0 * a->tokens * a->size, t, a->tokens, silu_mul_row(a, t));
}

/*
 * Attention. A head's state while it walks the cache: the largest score so far, the sum of
 * exp(score - largest), and the weighted sum of values in `to`, each rescaled when the largest
 * grows.
 */
typedef struct softmax_state {
	float largest, sum;
} softmax_state;

static void softmax_block(softmax_state *state, float *to, const float *scores, int count,
                          const float *values, size_t value_stride, int value_size)
{
	float largest = state->largest, rescale;

	for (int i = 0; i < count; i++)
		largest = scores[i] > largest ? scores[i] : largest;
	rescale = state->sum == 0 ? 0 : expf(state->largest - largest);
	state->largest = largest;
	state->sum *= rescale;
	for (int c = 0; c < value_size; c++)
		to[c] *= rescale;
	for (int i = 0; i < count; i++) {
		float p = expf(scores[i] - largest);

		state->sum += p;
		add_scaled(to, p, values + (size_t)i * value_stride, value_size);
	}
}

static void load_latents(const km_mla_args *a, int seq, int position, int count, float *to)
{
	int size = a->kv_lora_rank + a->rope_dim;

	for (int i = 0; i < count; i++)
		km_cpu_kv_load(a->kv_dtype, a->cache,
		               km_cpu_slot(a->batch, seq, position + i) * (size_t)size, size,
		               to + (size_t)i * (size_t)size);
}

static int block_count(int context, int position)
{
	return context - position < KM_CPU_MLA_BLOCK ? context - position : KM_CPU_MLA_BLOCK;
}

/* query = [W_kcᵀ q_nope | q_rope]: the head's query against a latent itself. */
static void absorb_query(const km_mla_args *a, const float *q, int head, float *row, float *query)
{
	int first = head * (a->nope_dim + a->v_dim), lora = a->kv_lora_rank;

	memset(query, 0, (size_t)lora * sizeof(float));
	for (int n = 0; n < a->nope_dim; n++) {
		km_cpu_weight_row(a->kv_b, first + n, 0, lora, row);
		add_scaled(query, q[n], row, lora);
	}
	memcpy(query + lora, q + a->nope_dim, (size_t)a->rope_dim * sizeof(float));
}

/* One head of one generated token: out = W_vc sum_t p_t latent_t. */
static void decode_head(const km_mla_args *a, int seq, int head, float *scratch)
{
	int token = a->batch->seq_start[seq], context = a->batch->kv_len[seq],
	    lora = a->kv_lora_rank;
	int size = lora + a->rope_dim, key = a->nope_dim + a->rope_dim;
	const float *q = a->q + ((size_t)token * (size_t)a->heads + (size_t)head) * (size_t)key;
	float *out = a->out + ((size_t)token * (size_t)a->heads + (size_t)head) * (size_t)a->v_dim;
	float *query = scratch, *sum = query + size, *latents = sum + size;
	float scores[KM_CPU_MLA_BLOCK];
	softmax_state state = { -INFINITY, 0 };

	absorb_query(a, q, head, latents, query);
	memset(sum, 0, (size_t)lora * sizeof(float));
	for (int at = 0; at < context; at += KM_CPU_MLA_BLOCK) {
		int count = block_count(context, at);

		load_latents(a, seq, at, count, latents);
		for (int i = 0; i < count; i++)
			scores[i] = a->scale * dot(query, latents + (size_t)i * (size_t)size, size);
		softmax_block(&state, sum, scores, count, latents, (size_t)size, lora);
	}
	for (int c = 0; c < lora; c++)
		sum[c] /= state.sum;
	for (int v = 0; v < a->v_dim; v++)
		out[v] =
			weight_dot(a->kv_b, head * (a->nope_dim + a->v_dim) + a->nope_dim + v, sum);
}

static void plain_mla_decode(const km_mla_args *a)
{
	km_cost cost = km_op_cost(KM_OP_MLA_DECODE, a);
	km_cpu_mla_scratch s;

	km_cpu_mla_layout(&s, a, a->batch->tokens, omp_get_max_threads(), a->scratch);
	KM_CPU_FOR(cost.flops / 2, i, a->batch->decode_seqs * a->heads,
	           decode_head(a, i / a->heads, i % a->heads,
	                       s.thread + (size_t)omp_get_thread_num() * s.thread_floats));
}

/* [k_nope | k_rope | v] of `count` cached tokens for one head. */
static void rebuild_keys_values(const km_mla_args *a, int head, int count, const float *latents,
                                float *key_values)
{
	int size = a->kv_lora_rank + a->rope_dim, first = head * (a->nope_dim + a->v_dim);
	int stride = a->nope_dim + a->rope_dim + a->v_dim;

	for (int n = 0; n < a->nope_dim + a->v_dim; n++)
		for (int i = 0; i < count; i++)
			key_values[i * stride + n + (n < a->nope_dim ? 0 : a->rope_dim)] =
				weight_dot(a->kv_b, first + n, latents + i * size);
	for (int i = 0; i < count; i++)
		memcpy(key_values + i * stride + a->nope_dim, latents + i * size + a->kv_lora_rank,
		       (size_t)a->rope_dim * sizeof(float));
}

/* One head of all rows of one prompt chunk; each row sees the positions up to its own. */
static void prefill_head(const km_mla_args *a, int seq, int head, float *scratch)
{
	const km_batch *batch = a->batch;
	int start = batch->seq_start[seq], rows = batch->seq_start[seq + 1] - start;
	int key = a->nope_dim + a->rope_dim, size = a->kv_lora_rank + a->rope_dim;
	float *latents = scratch, *key_values = latents + KM_CPU_MLA_BLOCK * size;
	softmax_state *states = (softmax_state *)(key_values + KM_CPU_MLA_BLOCK * (key + a->v_dim));
	int context = rows ? batch->positions[start + rows - 1] + 1 : 0;
	float scores[KM_CPU_MLA_BLOCK];

	for (int at = 0; at < context; at += KM_CPU_MLA_BLOCK) {
		int loaded = block_count(context, at);

		load_latents(a, seq, at, loaded, latents);
		rebuild_keys_values(a, head, loaded, latents, key_values);
		for (int r = 0; r < rows; r++) {
			size_t row = (size_t)(start + r) * (size_t)a->heads + (size_t)head;
			int count = block_count(batch->positions[start + r] + 1, at);
			float *out = a->out + row * (size_t)a->v_dim;

			if (at == 0) {
				states[r] = (softmax_state){ -INFINITY, 0 };
				memset(out, 0, (size_t)a->v_dim * sizeof(float));
			}
			if (count <= 0)
				continue;
			for (int i = 0; i < count; i++)
				scores[i] = a->scale * dot(a->q + row * (size_t)key,
				                           key_values + i * (key + a->v_dim), key);
			softmax_block(&states[r], out, scores, count, key_values + key,
			              (size_t)(key + a->v_dim), a->v_dim);
		}
	}
	for (int r = 0; r < rows; r++)
		for (int v = 0; v < a->v_dim; v++)
			a->out[((size_t)(start + r) * (size_t)a->heads + (size_t)head) *
			               (size_t)a->v_dim +
			       (size_t)v] /= states[r].sum;
}

static void plain_mla_prefill(const km_mla_args *a)
{
	int seqs = a->batch->seqs - a->batch->decode_seqs;
	km_cost cost = km_op_cost(KM_OP_MLA_PREFILL, a);
	km_cpu_mla_scratch s;

	km_cpu_mla_layout(&s, a, a->batch->tokens, omp_get_max_threads(), a->scratch);
	KM_CPU_FOR(cost.flops / 2, i, seqs * a->heads,
	           prefill_head(a, a->batch->decode_seqs + i / a->heads, i % a->heads,
	                        s.thread + (size_t)omp_get_thread_num() * s.thread_floats));
}

/* One selected expert of one token: down = W_down(silu(W_gate x) * W_up x). */
static void expert_row(const km_moe_args *a, int expert, const float *x, float *act, float *down)
{
	for (int i = 0; i < a->intermediate; i++)
		act[i] =
			silu(weight_dot(&a->gate[expert], i, x)) * weight_dot(&a->up[expert], i, x);
	for (int i = 0; i < a->hidden; i++)
		down[i] = weight_dot(&a->down[expert], i, act);
}

static void moe_row(const km_moe_args *a, int t, float *act, float *down)
{
	float *y = a->y + (size_t)t * (size_t)a->hidden;

	for (int k = 0; k < a->top_k; k++)
		if (a->weights[t * a->top_k + k] != 0)
			expert_row(a, a->ids[t * a->top_k + k],
			           a->x + (size_t)t * (size_t)a->hidden,
			           act + (size_t)k * (size_t)a->intermediate,
			           down + (size_t)k * (size_t)a->hidden);
	for (int i = 0; i < a->hidden; i++) {
		float sum = 0;

		for (int k = 0; k < a->top_k; k++)
			if (a->weights[t * a->top_k + k] != 0)
				sum += a->weights[t * a->top_k + k] * down[k * a->hidden + i];
		y[i] += a->routed_scale * sum;
	}
}

/* A row's places in the scratch are those of its number modulo KM_CPU_MOE_TOKENS. */
static void plain_moe(const km_moe_args *a)
{
	double work = 3.0 * KM_CPU_MOE_TOKENS * a->top_k * a->hidden * a->intermediate;
	km_cpu_moe_scratch s;

	km_cpu_moe_layout(&s, a, a->tokens, a->scratch);
	for (int from = 0; from < a->tokens; from += KM_CPU_MOE_TOKENS) {
		int rows =
			a->tokens - from < KM_CPU_MOE_TOKENS ? a->tokens - from : KM_CPU_MOE_TOKENS;

		KM_CPU_FOR(work, t, rows,
		           moe_row(a, from + t,
		                   s.act + (size_t)t * (size_t)(a->top_k * a->intermediate),
		                   s.down + (size_t)t * (size_t)(a->top_k * a->hidden)));
	}
}

const km_ops km_cpu_plain_ops = {
	.name = "plain",
	.embed = km_cpu_embed,
	.rmsnorm = plain_rmsnorm,
	.linear = plain_linear,
	.rope = km_cpu_rope,
	.kv_write = km_cpu_kv_write,
	.mla_decode = plain_mla_decode,
	.mla_prefill = plain_mla_prefill,
	.silu_mul = plain_silu_mul,
	.gate = km_cpu_gate,
	.moe = plain_moe,
};
