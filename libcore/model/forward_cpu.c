/*
 * The blocks of a step on the CPU: the ops of device/op.h in order. With a trace each op is timed.
 */
#include "model/forward.h"

#include <omp.h>
#include <string.h>

#include "base/clock.h"

/* Runs an op as (a part of) the step's op `part`; with a trace, times it and adds its cost. */
#define RUN(model, part, kind, function, args)                                                     \
	do {                                                                                       \
		int64_t run_start_ = (model)->trace ? km_now_ns() : 0;                             \
		(model)->ops->function(args);                                                      \
		if ((model)->trace)                                                                \
			add_to_trace(&(model)->trace->op[part], kind, args,                        \
			             km_now_ns() - run_start_);                                    \
	} while (0)

static void add_to_trace(struct km_op_total *total, enum km_op op, const void *args, int64_t ns)
{
	km_cost cost = km_op_cost(op, args);

	total->calls++;
	total->ns += ns;
	total->bytes += cost.bytes;
	total->flops += cost.flops;
}

static void *layer_cache(const km_model *m, int layer)
{
	return (char *)m->kv + m->kv_layer_bytes * (size_t)layer;
}

static void linear(km_model *m, enum km_step_op part, int tokens, const float *x,
                   const km_weight *w, float *y)
{
	km_linear_args args = { tokens, x, w->cols, w, y, w->rows, false };

	RUN(m, part, KM_OP_LINEAR, linear, &args);
}

static float lora_eps(const km_model *m)
{
	return m->options.hf_lora_norm_eps ? 1e-6f : (float)m->config.rms_norm_eps;
}

/* stream += delta (when given), y = norm(stream). */
static km_rmsnorm_args add_and_norm(const km_model *m, int tokens, float *stream, const float *delta,
                                    const float *weight, float *y)
{
	int size = m->config.hidden_size;

	return (km_rmsnorm_args){ tokens, size, stream, size, delta, weight,
		                  (float)m->config.rms_norm_eps, y, size };
}

static void rope(km_model *m, const km_batch *batch, float *x, int heads, int token_stride, int head_stride)
{
	km_rope_args args = {
		batch->tokens, heads, m->config.qk_rope_head_dim, x, token_stride, head_stride,
		batch->positions, m->cos_sin,
	};

	RUN(m, KM_STEP_ROPE_KV, KM_OP_ROPE, rope, &args);
}

/* q: [tokens, heads, nope + rope], the rope part rotated. */
static void queries(km_model *m, const km_layer_weights *w, const km_batch *batch)
{
	const km_config *c = &m->config;
	km_step_buffers *s = &m->step;
	int head = c->qk_nope_head_dim + c->qk_rope_head_dim, lora = c->q_lora_rank;
	km_rmsnorm_args norm = { batch->tokens, lora, s->q_a, lora, NULL, w->q_a_norm,
		                 lora_eps(m), s->q_a_normed, lora };

	if (lora) {
		linear(m, KM_STEP_QKV_A, batch->tokens, s->normed, &w->q_a, s->q_a);
		RUN(m, KM_STEP_Q_A_NORM, KM_OP_RMSNORM, rmsnorm, &norm);
		linear(m, KM_STEP_Q_B, batch->tokens, s->q_a_normed, &w->q_b, s->q);
	} else {
		linear(m, KM_STEP_Q_B, batch->tokens, s->normed, &w->q_proj, s->q);
	}
	rope(m, batch, s->q + c->qk_nope_head_dim, c->num_attention_heads, km_config_q_width(c), head);
}

/* Latent and rotated key of the batch's rows, into the cache. */
static void keys(km_model *m, const km_layer_weights *w, const km_batch *batch, void *cache)
{
	const km_config *c = &m->config;
	km_step_buffers *s = &m->step;
	int width = km_config_kv_width(c), latent = c->kv_lora_rank;
	km_kv_write_args args = {
		batch->tokens, latent, c->qk_rope_head_dim, s->latent, latent,
		s->kv_a + latent, width, batch->slots, cache, m->options.kv_dtype,
	};
	km_rmsnorm_args norm = { batch->tokens, latent, s->kv_a, width, NULL, w->kv_a_norm,
		                 lora_eps(m), s->latent, latent };

	linear(m, KM_STEP_QKV_A, batch->tokens, s->normed, &w->kv_a, s->kv_a);
	RUN(m, KM_STEP_ROPE_KV, KM_OP_RMSNORM, rmsnorm, &norm);
	rope(m, batch, s->kv_a + latent, 1, width, 0);
	RUN(m, KM_STEP_ROPE_KV, KM_OP_KV_WRITE, kv_write, &args);
}

static int attend(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	const km_layer_weights *w = &m->weights.layer[layer];
	km_step_buffers *s = &m->step;
	km_mla_args mla = km_model_mla_args(&m->config, &m->options);

	(void)err;
	queries(m, w, batch);
	mla.batch = batch;
	mla.q = s->q;
	mla.kv_b = &w->kv_b;
	mla.cache = layer_cache(m, layer);
	mla.out = s->heads_out;
	mla.scratch = s->mla_scratch;
	if (batch->decode_seqs)
		RUN(m, KM_STEP_MLA_DECODE, KM_OP_MLA_DECODE, mla_decode, &mla);
	if (batch->decode_seqs < batch->seqs)
		RUN(m, KM_STEP_MLA_PREFILL, KM_OP_MLA_PREFILL, mla_prefill, &mla);
	linear(m, KM_STEP_O, batch->tokens, s->heads_out, &w->o, s->delta);
	return 0;
}

/* delta = down(silu(gate x) * up x); `part` is the first of its three. */
static void mlp(km_model *m, enum km_step_op part, int tokens, const km_weight *const w[3])
{
	km_step_buffers *s = &m->step;
	km_silu_mul_args act = { tokens, w[0]->rows, s->gate, s->up, w[0]->rows, s->act };

	linear(m, part, tokens, s->normed, w[0], s->gate);
	linear(m, part, tokens, s->normed, w[1], s->up);
	RUN(m, part + 1, KM_OP_SILU_MUL, silu_mul, &act);
	linear(m, part + 2, tokens, s->act, w[2], s->delta);
}

static void count_experts(km_model *m, int layer, int tokens)
{
	int64_t *counts = m->expert_counts + (size_t)layer * (size_t)m->config.n_routed_experts;
	size_t ids = (size_t)tokens * (size_t)m->config.num_experts_per_tok;

	for (size_t i = 0; i < ids; i++)
		counts[m->step.expert_ids[i]]++;
}

/* Router logits in f32, selection, and the routed experts' sum added to delta. */
static void routed_experts(km_model *m, int layer, int tokens)
{
	const km_layer_weights *w = &m->weights.layer[layer];
	const km_config *c = &m->config;
	km_step_buffers *s = &m->step;
	km_gate_args gate = {
		tokens, c->n_routed_experts, c->num_experts_per_tok, c->n_group, c->topk_group,
		c->scoring_softmax, c->norm_topk_prob, s->router, w->router_bias, s->expert_ids,
		s->expert_weights,
	};
	km_moe_args moe = km_model_moe_args(c);

	linear(m, KM_STEP_ROUTER, tokens, s->normed, &w->router, s->router);
	RUN(m, KM_STEP_ROUTER, KM_OP_GATE, gate, &gate);
	if (m->expert_counts)
		count_experts(m, layer, tokens);
	moe.tokens = tokens;
	moe.x = s->normed;
	moe.ids = s->expert_ids;
	moe.weights = s->expert_weights;
	moe.gate = w->expert_gate;
	moe.up = w->expert_up;
	moe.down = w->expert_down;
	moe.y = s->delta;
	moe.scratch = s->moe_scratch;
	RUN(m, KM_STEP_EXPERTS, KM_OP_MOE, moe, &moe);
}

static int feed_forward(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	const km_layer_weights *w = &m->weights.layer[layer];
	km_step_buffers *s = &m->step;
	const km_weight *const dense[] = { &w->gate, &w->up, &w->down };
	const km_weight *const shared[] = { &w->shared_gate, &w->shared_up, &w->shared_down };
	int tokens = batch->tokens;
	km_rmsnorm_args norm =
		add_and_norm(m, tokens, s->hidden, s->delta, w->post_attention_norm, s->normed);

	(void)err;
	RUN(m, KM_STEP_POST_NORM, KM_OP_RMSNORM, rmsnorm, &norm);
	if (!km_config_is_moe_layer(&m->config, layer)) {
		mlp(m, KM_STEP_MLP_GATE_UP, tokens, dense);
		return 0;
	}
	if (m->config.n_shared_experts)
		mlp(m, KM_STEP_SHARED_GATE_UP, tokens, shared);
	else
		memset(s->delta, 0, (size_t)tokens * (size_t)m->config.hidden_size * 4);
	routed_experts(m, layer, tokens);
	return 0;
}

static void move_row(const km_model *m, float *rows, int to, int from)
{
	size_t size = (size_t)m->config.hidden_size;

	if (to != from)
		memcpy(rows + (size_t)to * size, rows + (size_t)from * size, size * sizeof(float));
}

/* Rows only move down: none is written before it is read. */
static int keep(km_model *m, const km_batch *kept, km_err *err)
{
	(void)err;
	for (int i = 0; i < kept->tokens; i++) {
		move_row(m, m->step.hidden, i, m->kept.from[i]);
		move_row(m, m->step.normed, i, m->kept.from[i]);
	}
	return 0;
}

static int project(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	const km_layer_weights *w = &m->weights.layer[layer];
	km_step_buffers *s = &m->step;

	km_rmsnorm_args norm = add_and_norm(m, batch->tokens, s->hidden, layer ? s->delta : NULL,
	                                    w->input_norm, s->normed);

	(void)err;
	RUN(m, KM_STEP_INPUT_NORM, KM_OP_RMSNORM, rmsnorm, &norm);
	keys(m, w, batch, layer_cache(m, layer));
	return 0;
}

static int head(km_model *m, const km_batch *batch, km_err *err)
{
	km_step_buffers *s = &m->step;
	size_t hidden = (size_t)m->config.hidden_size;
	km_rmsnorm_args norm = add_and_norm(m, batch->logit_rows, s->head_hidden, s->head_delta,
	                                    m->weights.norm, s->head_normed);

	(void)err;
	for (int i = 0; i < batch->logit_rows; i++) {
		size_t from = (size_t)m->kept.row[batch->logit_row[i]] * hidden, to = (size_t)i * hidden;

		memcpy(s->head_hidden + to, s->hidden + from, hidden * 4);
		memcpy(s->head_delta + to, s->delta + from, hidden * 4);
	}
	RUN(m, KM_STEP_FINAL_NORM, KM_OP_RMSNORM, rmsnorm, &norm);
	linear(m, KM_STEP_HEAD, batch->logit_rows, s->head_normed, &m->weights.head, s->logits);
	return 0;
}

/* OpenMP's number of threads is the calling thread's own: set for the step, put back after it. */
static int begin(km_model *m, const km_batch *batch, km_err *err)
{
	(void)batch, (void)err;
	m->caller_threads = omp_get_max_threads();
	omp_set_num_threads(m->options.threads);
	return 0;
}

static int replay(km_model *m, const km_batch *batch, km_run_steps *run, km_err *err)
{
	return run(m, batch, err);
}

static int embed(km_model *m, const km_batch *batch, km_err *err)
{
	km_embed_args args = { batch->tokens, batch->ids, &m->weights.embed, m->step.hidden };

	(void)err;
	RUN(m, KM_STEP_EMBED, KM_OP_EMBED, embed, &args);
	return 0;
}

static int end(km_model *m, const km_batch *batch, int rc, const float **logits, km_err *err)
{
	(void)batch, (void)err;
	omp_set_num_threads(m->caller_threads);
	*logits = m->step.logits;
	return rc;
}

const km_steps km_cpu_steps = {
	.begin = begin, .replay = replay, .embed = embed, .project = project, .keep = keep,
	.attend = attend, .feed_forward = feed_forward, .head = head, .end = end,
};
