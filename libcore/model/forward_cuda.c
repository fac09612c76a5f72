/*
 * The blocks of a step on a GPU (model/forward.h). What is one launch here and several ops on the
 * CPU: q_a and kv_a over the same rows; gate and up, for few rows with the router; norm, rope and
 * write of the KV. What o, down and the experts give goes straight into the stream; for few rows a
 * linear layer makes its own x, by the norm or the SiLU before it, attention may write its rows' KV,
 * and the gate goes beside the shared experts' down.
 *
 * How a step comes to the device, and its tokens back: model/gpu_step.c. Which steps are replayed from
 * graphs, and with which padding: model/gpu_graphs.c. Rows of padding select no expert and write no KV.
 *
 * The last layer: rows that nobody wants the logits of have their KV written and are left there;
 * the stream of the others moves to kept_stream, and q is computed for them alone. A step that
 * keeps every row, such as one that only generates, moves nothing.
 */
#include "model/gpu.h"

#if KM_CUDA

#include "device/cuda_sampler.h"
#include "model/gpu_step.h"
#include "model/router.h"

/* What enqueues an op of the step, unless it is left out. */
#define OP(g, op, call) ((g)->left_out >> (op) & 1 ? 0 : (call))

/* ---- parts of blocks ---- */

static int weights_of(const km_cuda_linear *args)
{
	int count = 0;

	while (count < KM_LINEAR_WEIGHTS && args->w[count])
		count++;
	return count;
}

static int linear(const km_gpu *g, km_cuda_linear args, km_err *err)
{
	args.weights = weights_of(&args);
	args.x_stride = args.x_stride ? args.x_stride : args.w[0]->cols;
	args.scratch = g->b.dequantized;
	return km_cuda_ops_linear(g->cuda, &g->linear, &args, err);
}

/* A linear layer of what a norm or SiLU makes; `maker` is that op, where it is a launch of its own. */
static int linear_of_made(const km_gpu *g, enum km_step_op maker, enum km_step_op op,
                          km_cuda_linear args, km_err *err)
{
	args.weights = weights_of(&args);
	if (!km_cuda_linear_makes_x(&args, &g->linear)) {
		KM_TRY(OP(g, maker, km_cuda_ops_make_x(g->cuda, &args, err)));
		args.from = KM_X_GIVEN;
		args.x = args.made;
	}
	return OP(g, op, linear(g, args, err));
}

/* A linear layer's x: the stream's norm. `keep`: normed is wanted afterwards. */
static km_cuda_linear of_stream(const km_model *m, int tokens, const float *weight, bool keep)
{
	const km_gpu *g = m->gpu;

	return (km_cuda_linear){ .from = KM_X_NORM,
		                 .a = g->stream,
		                 .b = weight,
		                 .eps = (float)m->config.rms_norm_eps,
		                 .made = g->normed,
		                 .keep = keep,
		                 .tokens = tokens };
}

static float lora_eps(const km_model *m)
{
	return m->options.hf_lora_norm_eps ? 1e-6f : (float)m->config.rms_norm_eps;
}

/* q from q_a's product, or from normed where there is no q_lora. */
static int queries(const km_model *m, const km_layer_weights *w, int tokens, km_err *err)
{
	const km_gpu *g = m->gpu;
	bool lora = m->config.q_lora_rank > 0;
	km_cuda_linear q = { .x = g->normed,
		             .from = lora ? KM_X_NORM : KM_X_GIVEN,
		             .a = g->b.q_a,
		             .b = w->q_a_norm,
		             .eps = lora_eps(m),
		             .made = g->b.q_a_normed,
		             .w = { lora ? &w->q_b : &w->q_proj },
		             .y = { g->b.q },
		             .tokens = tokens,
		             .y_bf16 = true };

	if (!lora)
		return OP(g, KM_STEP_Q_B, linear(g, q, err));
	return linear_of_made(g, KM_STEP_Q_A_NORM, KM_STEP_Q_B, q, err);
}

/* What q and keys are made of, with_q q_a beside kv_a, of `args`' x. */
static int projections(const km_model *m, const km_layer_weights *w, km_cuda_linear args, bool with_q,
                       km_err *err)
{
	const km_gpu *g = m->gpu;

	args.w[0] = &w->kv_a;
	args.y[0] = g->b.kv_a;
	if (with_q && m->config.q_lora_rank) {
		args.w[1] = &w->q_a;
		args.y[1] = g->b.q_a;
	}
	if (args.from == KM_X_GIVEN)
		return OP(g, KM_STEP_QKV_A, linear(g, args, err));
	return linear_of_made(g, KM_STEP_INPUT_NORM, KM_STEP_QKV_A, args, err);
}

static int rope_and_kv(const km_model *m, int layer, const km_gpu_batch *b, bool with_q,
                       const int32_t *slots, km_err *err)
{
	const km_gpu *g = m->gpu;
	km_cuda_rope_kv args = {
		.tokens = b->tokens,
		.q_from = with_q ? b->decode_seqs : b->tokens,
		.shape = km_gpu_mla_shape(&m->config, &m->options),
		.q = g->b.q,
		.kv_a = g->b.kv_a,
		.norm = g->weights.layer[layer].w.kv_a_norm,
		.eps = lora_eps(m),
		.cos_sin = g->cos_sin,
		.positions = b->positions,
		.slots = slots,
		.cache = g->kv + (size_t)layer * g->kv_layer_bytes,
	};

	return OP(g, KM_STEP_ROPE_KV, km_cuda_ops_rope_kv(g->cuda, &args, err));
}

static km_mla_cache cache_of(const km_gpu *g, int layer, const km_gpu_batch *b)
{
	return (km_mla_cache){ g->kv + (size_t)layer * g->kv_layer_bytes, b->pages,
		               b->pages_per_seq, b->page_size };
}

/* The plan for the step's longest sequence, with as many splits as the scratch has room for. */
static km_mla_decode_plan decode_plan(const km_model *m, const km_mla_shape *shape, int seqs)
{
	const km_gpu *g = m->gpu;
	km_mla_device device = { g->info.capability, g->info.multiprocessors };
	size_t room = (size_t)((char *)g->b.gate - (char *)g->b.mla_scratch);
	km_mla_decode_plan plan;
	km_mla_decode_scratch at;

	plan = km_mla_plan_decode(shape, seqs, g->longest, &device);
	for (;; plan.splits--) {
		km_mla_decode_layout(shape, &plan, seqs, &at);
		if (at.bytes <= room || plan.splits == 1)
			return plan;
	}
}

/* Whether attention writes the step's KV: it can where every row is a sequence's next. */
static bool attention_writes(const km_model *m)
{
	km_mla_shape shape = km_gpu_mla_shape(&m->config, &m->options);

	return m->gpu->generating && decode_plan(m, &shape, m->gpu->all.decode_seqs).cluster;
}

static int attend_decoding(const km_model *m, int layer, const km_gpu_batch *b, km_err *err)
{
	const km_gpu *g = m->gpu;
	km_mla_shape shape = km_gpu_mla_shape(&m->config, &m->options);
	km_mla_decode_plan plan = decode_plan(m, &shape, b->decode_seqs);
	bool writes = attention_writes(m);
	km_mla_decode_buffers buffers = {
		.cache = cache_of(g, layer, b),
		.q = g->b.q,
		.kv_b = g->weights.layer[layer].w.kv_b.data,
		.cos_sin = g->cos_sin,
		.positions = b->positions,
		.kv_len = b->kv_len,
		.scratch = g->b.mla_scratch,
		.out = g->b.heads_out,
		.scale = (float)km_config_softmax_scale(&m->config),
		.kv_a = writes ? g->b.kv_a : NULL,
		.norm = g->weights.layer[layer].w.kv_a_norm,
		.slots = b->slots,
		.eps = lora_eps(m),
	};

	return OP(g, KM_STEP_MLA_DECODE,
	          km_cuda_mla_decode(g->cuda, &plan, &shape, b->decode_seqs, &buffers, err));
}

static int attend_prompts(const km_model *m, int layer, const km_gpu_batch *b, km_err *err)
{
	const km_gpu *g = m->gpu;
	const km_weight *kv_b = &g->weights.layer[layer].w.kv_b;
	km_mla_shape shape = km_gpu_mla_shape(&m->config, &m->options);
	km_mla_prefill_buffers buffers = {
		.cache = cache_of(g, layer, b),
		.runs = b->runs,
		.tiles = b->tiles,
		.positions = b->positions,
		.q = g->b.q,
		.latents = g->b.latents,
		.kv = g->b.kv,
		.state = b->prefill.state ? g->b.mla_state : NULL,
		.out = g->b.heads_out,
		.scale = (float)km_config_softmax_scale(&m->config),
	};

	for (int i = 0; i < b->prefill.waves; i++) {
		const km_mla_wave *wave = &b->prefill.wave[i];
		km_cuda_linear keys_values = { .x = g->b.latents,
			                       .x_stride = km_config_kv_width(&m->config),
			                       .w = { kv_b },
			                       .y = { g->b.kv },
			                       .tokens = wave->tokens,
			                       .y_bf16 = true };

		KM_TRY(OP(g, KM_STEP_KV_B,
		          km_cuda_mla_gather(g->cuda, wave, &shape, &buffers, err)));
		KM_TRY(OP(g, KM_STEP_KV_B, linear(g, keys_values, err)));
		KM_TRY(OP(g, KM_STEP_MLA_PREFILL,
		          km_cuda_mla_prefill(g->cuda, wave, &shape, &buffers, err)));
	}
	return 0;
}

/* stream += down(silu(gate x) * up x), x the stream's norm, which is kept; `op` is the first of its
 * three. */
typedef struct mlp {
	enum km_step_op op;
	const float *norm;
	const km_weight *gate, *up, *down;
	const km_weight *router; /* over the same x, in the launch of gate and up; NULL: none */
} mlp;

static int gate_and_up(const km_model *m, const mlp *p, int tokens, km_err *err)
{
	const km_gpu *g = m->gpu;
	km_cuda_linear args = of_stream(m, tokens, p->norm, true);

	args.w[0] = p->gate;
	args.w[1] = p->up;
	args.w[2] = p->router;
	args.y[0] = g->b.gate;
	args.y[1] = g->b.up;
	args.y[2] = g->b.router;
	return linear_of_made(g, KM_STEP_POST_NORM, p->op, args, err);
}

static km_cuda_linear down(const km_model *m, const mlp *p, int tokens)
{
	const km_gpu *g = m->gpu;

	return (km_cuda_linear){ .from = KM_X_SILU,
		                 .a = g->b.gate,
		                 .b = g->b.up,
		                 .made = g->b.act,
		                 .w = { p->down },
		                 .y = { g->stream },
		                 .weights = 1,
		                 .tokens = tokens,
		                 .accumulate = true };
}

static int dense_mlp(const km_model *m, const mlp *p, int tokens, km_err *err)
{
	KM_TRY(gate_and_up(m, p, tokens, err));
	return linear_of_made(m->gpu, p->op + 1, p->op + 2, down(m, p, tokens), err);
}

/* Whether the router's product is part of the launch of the shared experts' gate and up. */
static bool router_joins(const km_model *m, int tokens)
{
	return tokens <= m->gpu->joined_rows;
}

/* ids and weights of the selected experts; the turn is the gate's where the router has joined. */
static int route(const km_model *m, const km_gpu_layer *layer, int tokens, enum km_turn turn, km_err *err)
{
	const km_gpu *g = m->gpu;
	km_router_device device = { g->info.capability, g->info.multiprocessors, g->linear.blas,
		                    g->pdl };
	km_router_shape shape =
		km_gpu_router_shape(&m->config, layer->w.router.type == KM_W_F32, tokens);
	km_router_shape gemm = shape;
	km_router_buffers buffers = {
		.x = g->normed,
		.w = layer->w.router.data,
		.bias = layer->w.router_bias,
		.valid = g->valid,
		.logits = g->b.router,
		.ids = g->b.expert_ids,
		.weights = g->b.expert_weights,
		.scratch = g->b.router_scratch,
	};
	km_router_plan plan;

	KM_TRY(km_router_plan_make(&plan, &shape, &device, err));
	plan.gate_turn = turn;
	if (router_joins(m, tokens))
		return km_cuda_router_run(g->cuda, KM_PART_GATE, &plan, &shape, &buffers, err);
	if (plan.chain == KM_CHAIN_ONE_LAUNCH)
		return km_cuda_router_run(g->cuda, KM_PART_ROUTER_GATE, &plan, &shape, &buffers,
		                          err);
	if (plan.gemm == KM_GEMM_BLAS)
		gemm.tokens = km_linear_rounded(tokens);
	KM_TRY(km_cuda_router_run(g->cuda, KM_PART_GEMM, &plan, &gemm, &buffers, err));
	return km_cuda_router_run(g->cuda, KM_PART_GATE, &plan, &shape, &buffers, err);
}

static int64_t *counts_of(const km_model *m, const km_gpu_layer *layer)
{
	return m->gpu->b.expert_counts +
	       (layer - m->gpu->weights.layer) * m->config.n_routed_experts;
}

/* The experts' call: their sum, added to the stream. */
typedef struct experts_call {
	km_moe_problem problem;
	km_moe_plan plan;
	km_moe_buffers buffers;
} experts_call;

static int plan_experts(experts_call *e, const km_model *m, const km_gpu_layer *layer, int tokens, km_err *err)
{
	const km_gpu *g = m->gpu;
	km_moe_device device = { g->info.capability, g->info.multiprocessors };

	e->problem = km_gpu_moe_problem(&m->config, &layer->experts, tokens, g->pdl);
	e->buffers = (km_moe_buffers){
		.x = g->normed,
		.ids = g->b.expert_ids,
		.weights = g->b.expert_weights,
		.experts = layer->experts,
		.routed_scale = (float)m->config.routed_scaling_factor,
		.y = g->stream,
		.accumulate = true,
		.scratch = g->b.moe_scratch,
	};
	return km_moe_tuning_plan(&e->plan, &g->tuning, &e->problem, &device, NULL, err);
}

static int run_experts(const km_model *m, const km_gpu_layer *layer, const experts_call *e, km_err *err)
{
	const km_gpu *g = m->gpu;

	KM_TRY(OP(g, KM_STEP_EXPERTS, km_cuda_moe_run(g->cuda, &e->plan, &e->problem, &e->buffers, err)));
	if (!g->b.expert_counts)
		return 0;
	return km_cuda_ops_count(g->cuda, g->b.expert_ids, e->problem.tokens, e->problem.top_k, g->valid,
	                         counts_of(m, layer), err);
}

/* ---- blocks ---- */

static bool is_last(const km_model *m, int layer)
{
	return layer == m->config.num_hidden_layers - 1;
}

static int embed(km_model *m, const km_batch *batch, km_err *err)
{
	km_gpu *g = m->gpu;

	return OP(g, KM_STEP_EMBED,
	          km_cuda_ops_embed(g->cuda, g->all.ids, batch->tokens, &g->weights.embed,
	                            g->stream, err));
}

static bool has_queries(const km_model *m, int layer)
{
	return !is_last(m, layer) || m->gpu->whole;
}

/* What q and the cache's rows are made of. */
static int project_rows(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	const km_layer_weights *w = &m->gpu->weights.layer[layer].w;
	bool with_q = has_queries(m, layer), keep = !with_q || !m->config.q_lora_rank;

	KM_TRY(projections(m, w, of_stream(m, batch->tokens, w->input_norm, keep), with_q, err));
	return with_q ? queries(m, w, batch->tokens, err) : 0;
}

/* Rotated queries, and the cache's rows, unless attention makes them. */
static int rotate_and_write(km_model *m, int layer, km_err *err)
{
	const km_gpu_batch *b = &m->gpu->all;

	return attention_writes(m) ? 0
	                           : rope_and_kv(m, layer, b, has_queries(m, layer), b->slots, err);
}

static int project(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	KM_TRY(project_rows(m, layer, batch, err));
	return rotate_and_write(m, layer, err);
}

static int keep(km_model *m, const km_batch *kept, km_err *err)
{
	km_gpu *g = m->gpu;
	int hidden = m->config.hidden_size, layer = m->config.num_hidden_layers - 1;
	const km_layer_weights *w = &g->weights.layer[layer].w;

	if (g->whole || !kept->tokens)
		return 0;
	KM_TRY(OP(g, KM_STEP_KEEP,
	          km_cuda_ops_gather(g->cuda, g->kept_from, kept->tokens, g->b.stream,
	                             g->b.kept_stream, hidden * 4, err)));
	KM_TRY(OP(g, KM_STEP_KEEP,
	          km_cuda_ops_gather(g->cuda, g->kept_from, kept->tokens, g->b.normed,
	                             g->b.kept_normed, hidden * 2, err)));
	g->stream = g->b.kept_stream;
	g->normed = g->b.kept_normed;
	KM_TRY(projections(m, w, (km_cuda_linear){ .x = g->normed, .tokens = kept->tokens }, true,
	                   err));
	KM_TRY(queries(m, w, kept->tokens, err));
	return rope_and_kv(m, layer, &g->kept, true, g->no_slots, err);
}

static int attention(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	const km_gpu *g = m->gpu;
	const km_gpu_batch *b = is_last(m, layer) && !g->whole ? &g->kept : &g->all;

	if (batch->decode_seqs)
		KM_TRY(attend_decoding(m, layer, b, err));
	return attend_prompts(m, layer, b, err);
}

static int output(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	const km_gpu *g = m->gpu;
	km_cuda_linear out = { .x = g->b.heads_out,
		               .w = { &g->weights.layer[layer].w.o },
		               .y = { g->stream },
		               .tokens = batch->tokens,
		               .accumulate = true };

	return OP(g, KM_STEP_O, linear(g, out, err));
}

static int attend(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	KM_TRY(attention(m, layer, batch, err));
	return output(m, layer, batch, err);
}

/*
 * Whether the gate goes beside the shared experts' down (device/turn.h): both read what the launch of
 * gate, up and router wrote, down writes the stream, the gate ids and weights. Down is the one that
 * holds the other back, since it has weights to fetch in the meantime; the experts, behind the gate, wait
 * for both. Timed without one of the two, the other is a launch like any.
 */
static bool gate_goes_beside(const km_model *m, const km_cuda_linear *of, int tokens)
{
	const km_gpu *g = m->gpu;
	uint32_t both = UINT32_C(1) << KM_STEP_SHARED_DOWN | UINT32_C(1) << KM_STEP_ROUTER;

	return router_joins(m, tokens) && !(g->left_out & both) &&
	       km_cuda_linear_makes_x(of, &g->linear);
}

/* Whether the experts' launch takes the gate and the shared experts' down along: one launch for three. Timed without
 * one of them, each is a launch of its own. */
static bool experts_take(const km_model *m, const km_layer_weights *w, const experts_call *e)
{
	uint32_t all = UINT32_C(1) << KM_STEP_SHARED_DOWN | UINT32_C(1) << KM_STEP_ROUTER | UINT32_C(1) << KM_STEP_EXPERTS;
	km_moe_before before = km_gpu_moe_before(&m->config, w);

	return router_joins(m, e->problem.tokens) && !(m->gpu->left_out & all) &&
	       km_moe_plan_takes(&e->plan, &e->problem, &before);
}

/* All three in one launch. */
static int run_experts_with_front(const km_model *m, const km_gpu_layer *layer, experts_call *e, km_err *err)
{
	const km_gpu *g = m->gpu;
	km_router_shape shape = km_gpu_router_shape(&m->config, false, e->problem.tokens);
	km_moe_front front = { .logits = g->b.router,
		               .bias = layer->w.router_bias,
		               .valid = g->valid,
		               .renormalize = shape.renormalize,
		               .scale = shape.scale,
		               .down = layer->w.shared_down.data,
		               .gate = g->b.gate,
		               .up = g->b.up };

	e->buffers.front = &front;
	return run_experts(m, layer, e, err);
}

/* Shared and routed experts. */
static int both_experts(const km_model *m, const km_gpu_layer *layer, const mlp *shared, experts_call *e, km_err *err)
{
	int tokens = e->problem.tokens;
	km_cuda_linear args;
	bool beside;

	KM_TRY(gate_and_up(m, shared, tokens, err));
	if (experts_take(m, &layer->w, e))
		return run_experts_with_front(m, layer, e, err);
	args = down(m, shared, tokens);
	beside = gate_goes_beside(m, &args, tokens);
	args.turn = beside ? KM_TURN_HOLDS : KM_TURN_AFTER;
	KM_TRY(linear_of_made(m->gpu, shared->op + 1, shared->op + 2, args, err));
	KM_TRY(OP(m->gpu, KM_STEP_ROUTER,
	          route(m, layer, tokens, beside ? KM_TURN_BESIDE : KM_TURN_AFTER, err)));
	return run_experts(m, layer, e, err);
}

static int feed_forward(km_model *m, int layer, const km_batch *batch, km_err *err)
{
	const km_gpu *g = m->gpu;
	const km_gpu_layer *l = &g->weights.layer[layer];
	const km_layer_weights *w = &l->w;
	int tokens = batch->tokens, hidden = m->config.hidden_size;
	mlp dense = { KM_STEP_MLP_GATE_UP, w->post_attention_norm, &w->gate, &w->up, &w->down, NULL };
	mlp shared = { KM_STEP_SHARED_GATE_UP, w->post_attention_norm, &w->shared_gate,
		       &w->shared_up,          &w->shared_down,
		       router_joins(m, tokens) ? &w->router : NULL };
	km_cuda_norm norm = { g->stream, NULL,   w->post_attention_norm,        g->normed, tokens,
		              hidden,    hidden, (float)m->config.rms_norm_eps };
	experts_call e;

	if (!km_config_is_moe_layer(&m->config, layer))
		return dense_mlp(m, &dense, tokens, err);
	KM_TRY(plan_experts(&e, m, l, tokens, err));
	if (m->config.n_shared_experts)
		return both_experts(m, l, &shared, &e, err);
	KM_TRY(OP(g, KM_STEP_POST_NORM, km_cuda_ops_norm(g->cuda, &norm, err)));
	KM_TRY(OP(g, KM_STEP_ROUTER, route(m, l, tokens, KM_TURN_AFTER, err)));
	return run_experts(m, l, &e, err);
}

/* Tokens from the logits, where the batch asks for them. */
static int draw(const km_model *m, int rows, km_err *err)
{
	const km_gpu *g = m->gpu;
	km_cuda_sampling args = {
		.logits = g->b.logits,
		.draw = g->draw,
		.entries = (const km_draw_entry *)(const void *)(g->b.batch + g->b.entries_at),
		.drawn = g->b.drawn,
		.rows = rows,
		.vocab = m->config.vocab_size,
	};

	if (!km_model_draws(m))
		return 0;
	return km_cuda_sample(g->cuda, &args, err);
}

static int head(km_model *m, const km_batch *batch, km_err *err)
{
	const km_gpu *g = m->gpu;
	int rows = batch->logit_rows, hidden = m->config.hidden_size;
	km_cuda_linear logits = { .from = KM_X_NORM,
		                  .a = g->logit_from ? g->b.head_stream : g->stream,
		                  .b = g->weights.norm,
		                  .eps = (float)m->config.rms_norm_eps,
		                  .made = g->b.head_normed,
		                  .w = { &g->weights.head },
		                  .y = { g->b.logits },
		                  .tokens = rows };

	if (g->logit_from)
		KM_TRY(OP(g, KM_STEP_KEEP,
		          km_cuda_ops_gather(g->cuda, g->logit_from, rows, g->stream,
		                             g->b.head_stream, hidden * 4, err)));
	KM_TRY(linear_of_made(g, KM_STEP_FINAL_NORM, KM_STEP_HEAD, logits, err));
	return OP(g, KM_STEP_RESULT, draw(m, rows, err));
}

/* ---- steps ---- */

/* The pieces of a step and what is between them: model/gpu_graphs.c. */
static int piece(km_model *m, int at, km_err *err)
{
	const km_batch *step = &m->gpu->step;

	if (at) {
		KM_TRY(output(m, at - 1, step, err));
		KM_TRY(feed_forward(m, at - 1, step, err));
	} else {
		KM_TRY(embed(m, step, err));
	}
	return is_last(m, at) ? 0 : project_rows(m, at, step, err);
}

static int between(km_model *m, int at, km_err *err)
{
	const km_batch *step = &m->gpu->step;

	if (is_last(m, at)) {
		KM_TRY(km_steps_run_layers(m, step, at, at + 1, err));
		return km_steps_run_head(m, err);
	}
	KM_TRY(rotate_and_write(m, at, err));
	return attention(m, at, step, err);
}

static const km_gpu_blocks blocks = { km_gpu_step_send_padding, piece, between };

static int prepare(km_model *m, km_run_steps *run, km_err *err)
{
	return km_gpu_graphs_prepare(m, &blocks, run, err);
}

static int replay(km_model *m, const km_batch *batch, km_run_steps *run, km_err *err)
{
	KM_TRY(km_gpu_graphs_run(m, &blocks, run, err));
	return km_gpu_step_fetch(m, batch, err);
}

const km_steps km_gpu_steps = {
	.prepare = prepare,
	.begin = km_gpu_step_begin,
	.replay = replay,
	.embed = embed,
	.project = project,
	.keep = keep,
	.attend = attend,
	.feed_forward = feed_forward,
	.head = head,
	.end = km_gpu_step_end,
};

#endif
