#include "model/step_cost.h"

struct walk {
	const km_step_shape *s;
	const km_config *c;
	const km_layer_weights *w;
	km_step_cost *costs;
	double cached, seen; /* of prompts: cached tokens, and those that its rows see, added up */
};

static void add(struct walk *k, enum km_step_op op, double weights, double rest, double flops)
{
	km_step_cost *cost = &k->costs[op];

	cost->calls++;
	cost->weight_bytes += weights;
	cost->bytes += weights + rest;
	cost->flops += flops;
}

static double bytes_of(const km_weight *w)
{
	return w->rows ? (double)km_weight_bytes(w) : 0;
}

enum output { F32, AS_INPUT, TO_STREAM };

static void linear(struct walk *k, enum km_step_op op, double rows, const km_weight *w,
                   enum output output)
{
	double y = output == AS_INPUT ? k->s->x_bytes : 4;

	if (output == TO_STREAM && k->s->sums_where_made)
		y = 8;
	add(k, op, bytes_of(w), rows * (k->s->x_bytes * (double)w->cols + y * w->rows),
	    2 * rows * w->rows * w->cols);
}

static void norm(struct walk *k, enum km_step_op op, double rows, double size, bool sum)
{
	sum = sum && !k->s->sums_where_made;
	add(k, op, 4 * size, rows * size * ((sum ? 12 : 4) + k->s->x_bytes),
	    rows * size * (sum ? 5 : 4));
}

static double kv_token_bytes(const struct walk *k)
{
	double each = k->s->kv_dtype == KM_KV_F32 ? 4 : k->s->kv_dtype == KM_KV_BF16 ? 2 : 1;

	return each * (k->c->kv_lora_rank + k->c->qk_rope_head_dim);
}

static double head_values(const km_config *c) /* of a token's query and output, all heads */
{
	return (double)c->num_attention_heads *
	       (c->qk_nope_head_dim + c->qk_rope_head_dim + c->v_head_dim);
}

/* q_a (or nothing) beside kv_a, and what makes q of it. */
static void project(struct walk *k, const km_batch *b, bool last)
{
	const km_config *c = k->c;
	double all = b->tokens, q_rows = last ? k->s->kept->tokens : all;
	double width = c->kv_lora_rank + c->qk_rope_head_dim, prompts = q_rows - b->decode_seqs;

	norm(k, KM_STEP_INPUT_NORM, all, c->hidden_size, true);
	linear(k, KM_STEP_QKV_A, all, &k->w->kv_a, F32);
	if (c->q_lora_rank && q_rows > 0) {
		linear(k, KM_STEP_QKV_A, q_rows, &k->w->q_a, F32);
		norm(k, KM_STEP_Q_A_NORM, q_rows, c->q_lora_rank, false);
		k->costs[KM_STEP_QKV_A].calls--; /* one launch, and x is read once */
		k->costs[KM_STEP_QKV_A].bytes -= q_rows * k->s->x_bytes * (double)c->hidden_size;
	}
	if (q_rows > 0)
		linear(k, KM_STEP_Q_B, q_rows, c->q_lora_rank ? &k->w->q_b : &k->w->q_proj, AS_INPUT);
	add(k, KM_STEP_ROPE_KV, 0,
	    all * (4 * width + kv_token_bytes(k)) +
	            2 * k->s->x_bytes * prompts * c->num_attention_heads * c->qk_rope_head_dim,
	    all * (4 * c->kv_lora_rank + 3 * c->qk_rope_head_dim));
}

static void attend(struct walk *k, const km_batch *b)
{
	const km_config *c = k->c;
	double heads = c->num_attention_heads, lora = c->kv_lora_rank, rope = c->qk_rope_head_dim;
	double made = heads * (c->qk_nope_head_dim + c->v_head_dim), x = k->s->x_bytes;
	double cached = 0, prompts = b->tokens - b->decode_seqs;

	for (int i = 0; i < b->decode_seqs; i++)
		cached += b->positions[i] + 1;
	if (b->decode_seqs)
		add(k, KM_STEP_MLA_DECODE, bytes_of(&k->w->kv_b) + cached * kv_token_bytes(k),
		    x * b->decode_seqs * head_values(c),
		    2 * (b->decode_seqs * made * lora + heads * cached * (2 * lora + rope)));
	linear(k, KM_STEP_O, b->tokens, &k->w->o, TO_STREAM);
	if (prompts <= 0)
		return;
	k->cached = k->seen = 0;
	for (int i = b->decode_seqs; i < b->seqs; i++) {
		int from = b->seq_start[i], to = b->seq_start[i + 1];

		for (int t = from; t < to; t++)
			k->seen += b->positions[t] + 1;
		k->cached += to > from ? b->positions[to - 1] + 1 : 0;
	}
	add(k, KM_STEP_KV_B, bytes_of(&k->w->kv_b) + k->cached * kv_token_bytes(k),
	    k->cached * x * made, 2 * k->cached * lora * made);
	add(k, KM_STEP_MLA_PREFILL, 0, x * (k->cached * (made + rope) + prompts * head_values(c)),
	    2 * k->seen * head_values(c));
}

static void mlp(struct walk *k, enum km_step_op op, double rows, const km_weight *const w[3])
{
	double width = w[0]->rows;

	linear(k, op, rows, w[0], F32);
	linear(k, op, rows, w[1], F32);
	k->costs[op].calls--;
	k->costs[op].bytes -= rows * k->s->x_bytes * w[0]->cols;
	add(k, op + 1, 0, rows * width * (8 + k->s->x_bytes), 4 * rows * width);
	linear(k, op + 2, rows, w[2], TO_STREAM);
}

/* Repacked experts have no matrices of their own to ask: int4, with bf16 scales. */
static double expert_bytes(const struct walk *k, double size)
{
	if (!k->w->expert_gate[0].rows)
		return size * (0.5 + 2.0 / k->c->quant.group_size);
	return bytes_of(&k->w->expert_gate[0]) + bytes_of(&k->w->expert_up[0]) +
	       bytes_of(&k->w->expert_down[0]);
}

/* The product, where it is counted, and the selection. */
static void route(struct walk *k, double rows)
{
	double selection = rows * (4.0 * k->c->n_routed_experts + 8.0 * k->c->num_experts_per_tok);

	if (rows > k->s->router_joined_rows) {
		linear(k, KM_STEP_ROUTER, rows, &k->w->router, F32);
		k->costs[KM_STEP_ROUTER].bytes += selection;
		return;
	}
	linear(k, KM_STEP_SHARED_GATE_UP, rows, &k->w->router, F32);
	k->costs[KM_STEP_SHARED_GATE_UP].calls--;
	k->costs[KM_STEP_SHARED_GATE_UP].bytes -= rows * k->s->x_bytes * k->w->router.cols;
	add(k, KM_STEP_ROUTER, 0, selection, 0);
}

static void experts(struct walk *k, int layer, double rows)
{
	const km_config *c = k->c;
	double size = 3.0 * c->hidden_size * c->moe_intermediate_size, top_k = c->num_experts_per_tok;
	double expert = expert_bytes(k, size);

	route(k, rows);
	add(k, KM_STEP_EXPERTS, k->s->experts[layer] * expert,
	    rows * (c->hidden_size * (8.0 + k->s->x_bytes) + 8 * top_k), 2 * rows * top_k * size);
}

static void feed_forward(struct walk *k, int layer, double rows)
{
	const km_weight *const dense[] = { &k->w->gate, &k->w->up, &k->w->down };
	const km_weight *const shared[] = { &k->w->shared_gate, &k->w->shared_up,
		                            &k->w->shared_down };

	norm(k, KM_STEP_POST_NORM, rows, k->c->hidden_size, true);
	if (!km_config_is_moe_layer(k->c, layer)) {
		mlp(k, KM_STEP_MLP_GATE_UP, rows, dense);
		return;
	}
	if (k->c->n_shared_experts)
		mlp(k, KM_STEP_SHARED_GATE_UP, rows, shared);
	experts(k, layer, rows);
}

void km_step_costs(const km_step_shape *s, km_step_cost costs[KM_STEP_COUNT])
{
	struct walk k = { .s = s, .c = s->config, .costs = costs };
	const km_weights *w = s->weights;
	int layers = s->config->num_hidden_layers, logit_rows = s->batch->logit_rows;
	double hidden = s->config->hidden_size, kept = s->kept->tokens;

	for (int i = 0; i < KM_STEP_COUNT; i++)
		costs[i] = (km_step_cost){ 0 };
	add(&k, KM_STEP_EMBED, s->batch->tokens * bytes_of(&w->embed) / w->embed.rows,
	    4 * s->batch->tokens * hidden, 0);
	for (int i = 0; i < layers; i++) {
		bool cut = i == layers - 1 && kept < s->batch->tokens;
		const km_batch *b = cut ? s->kept : s->batch;

		k.w = &w->layer[i];
		project(&k, s->batch, cut);
		if (!b->tokens)
			return;
		if (cut)
			add(&k, KM_STEP_KEEP, 0, kept * hidden * (8 + 2 * s->x_bytes), 0);
		attend(&k, b);
		feed_forward(&k, i, b->tokens);
	}
	if (!logit_rows)
		return;
	norm(&k, KM_STEP_FINAL_NORM, logit_rows, hidden, true);
	linear(&k, KM_STEP_HEAD, logit_rows, &w->head, F32);
}
