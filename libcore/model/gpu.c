/*
 * A model on a GPU: what it takes, taking it, and saying what was chosen.
 *
 * The plan asks the GPU only how much memory is free and what it is; everything else follows from
 * the config. CUDA itself takes some 500 MB beside the arena, when the first call is made: that is
 * gone from what is free before anything is compared with it.
 */
#include "model/gpu.h"

#if KM_CUDA

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "device/cuda_blas.h"
#include "model/rope.h"
#include "model/router.h"

enum { ALIGN = 256, MOST_ROOM = 4096 };

/* ---- layout ---- */

static void *place(uintptr_t *at, size_t rows, size_t cols, size_t each)
{
	void *here = (void *)*at;

	*at += (rows * cols * each + ALIGN - 1) / ALIGN * ALIGN;
	return here;
}

static size_t max_of(size_t a, size_t b)
{
	return a > b ? a : b;
}

km_mla_shape km_gpu_mla_shape(const km_config *c, const km_model_options *o)
{
	return (km_mla_shape){
		c->num_attention_heads, c->qk_nope_head_dim, c->qk_rope_head_dim,
		c->v_head_dim,          c->kv_lora_rank,     o->kv_dtype == KM_KV_FP8
	};
}

km_moe_problem km_gpu_moe_problem(const km_config *c, const km_moe_weights *w, int tokens, bool pdl)
{
	return (km_moe_problem){ .tokens = tokens,
		                 .experts = c->n_routed_experts,
		                 .global_experts = c->n_routed_experts,
		                 .top_k = c->num_experts_per_tok,
		                 .hidden = c->hidden_size,
		                 .intermediate = c->moe_intermediate_size,
		                 .group = w->group,
		                 .packed = w->packed,
		                 .pdl = pdl };
}

km_moe_before km_gpu_moe_before(const km_config *c, const km_layer_weights *w)
{
	return (km_moe_before){ .groups = c->n_group,
		                .softmax = c->scoring_softmax,
		                .bias = w->router_bias != NULL,
		                .shared_cols = w->shared_down.cols,
		                .shared_bf16 = w->shared_down.type == KM_W_BF16 };
}

km_router_shape km_gpu_router_shape(const km_config *c, bool weights_f32, int tokens)
{
	return (km_router_shape){ .tokens = tokens,
		                  .experts = c->n_routed_experts,
		                  .hidden = c->hidden_size,
		                  .top_k = c->num_experts_per_tok,
		                  .groups = c->n_group,
		                  .topk_group = c->topk_group,
		                  .block = 16,
		                  .softmax = c->scoring_softmax,
		                  .renormalize = c->norm_topk_prob,
		                  .weights_f32 = weights_f32,
		                  .scale = 1 };
}

/* For decode steps of any number of sequences and any context: what the plan of a step then asks
 * for is held to this by taking fewer splits (forward_cuda.c). */
static size_t mla_scratch(const km_config *c, const km_model_options *o, const km_cuda_info *info)
{
	km_mla_shape shape = km_gpu_mla_shape(c, o);
	km_mla_device device = { info->capability, info->multiprocessors };
	int most_seqs = km_gpu_form_rows(o->max_seqs); /* a step's, with those that pad it */
	size_t most = 0;

	for (int seqs = 1; seqs <= most_seqs; seqs = seqs < most_seqs && 2 * seqs > most_seqs ? most_seqs : 2 * seqs)
		for (int context = 256; context < 2 * o->max_context + 256; context *= 2) {
			km_mla_decode_plan plan =
				km_mla_plan_decode(&shape, seqs, context, &device);
			km_mla_decode_scratch at;

			km_mla_decode_layout(&shape, &plan, seqs, &at);
			most = max_of(most, at.bytes);
		}
	return most;
}

static int moe_layer(const km_config *c) /* the first, or -1 */
{
	for (int i = 0; i < c->num_hidden_layers; i++)
		if (km_config_is_moe_layer(c, i))
			return i;
	return -1;
}

static size_t largest_dequantized(const km_weights *shapes)
{
	size_t most = 0;

	for (int i = 0; i < shapes->layers; i++) {
		const km_layer_weights *w = &shapes->layer[i];
		const km_weight *all[] = { &w->q_proj,      &w->q_a,       &w->q_b,        &w->kv_a,
			                   &w->o,           &w->gate,      &w->up,         &w->down,
			                   &w->shared_gate, &w->shared_up, &w->shared_down };

		for (size_t k = 0; k < sizeof(all) / sizeof(*all); k++)
			if (all[k]->rows && all[k]->type != KM_W_BF16)
				most = max_of(most, (size_t)all[k]->rows * (size_t)all[k]->cols);
	}
	if (shapes->head.type != KM_W_BF16)
		most = max_of(most, (size_t)shapes->head.rows * (size_t)shapes->head.cols);
	return most * 2;
}

static int prefill_room(const km_model_options *o)
{
	int room = KM_MLA_PREFILL_TILE;

	while (room < MOST_ROOM && room < o->max_context)
		room *= 2;
	return room;
}

static size_t pages_of(const km_model_options *o)
{
	int size = o->page_size ? o->page_size : 1;

	return (size_t)((o->max_context + size - 1) / size);
}

static size_t batch_bytes(const km_gpu_buffers *b, const km_model_options *o)
{
	km_mla_prefill_plan p;
	size_t seqs = (size_t)o->max_seqs, rows = (size_t)b->rows;
	size_t padded = (size_t)km_linear_rounded(o->max_seqs);

	km_mla_prefill_capacity(&p, o->max_batch_tokens, o->max_seqs, o->max_context, b->room);
	/* ids, where they are drawn, positions, slots; kept: from, positions, no slots; kv_len twice, pages, logit rows;
	 * pieces; draws; valid */
	return 4 * (7 * rows + 2 * seqs + padded * pages_of(o) + (size_t)b->logit_rows) +
	       2 * ((size_t)p.max_runs * sizeof(km_mla_run) +
	            (size_t)p.max_tiles * sizeof(km_mla_tile)) +
	       (size_t)b->logit_rows * sizeof(km_draw) + 17 * ALIGN;
}

static uintptr_t lay_attention(km_gpu_buffers *b, const km_config *c, const km_model_options *o,
                               const km_cuda_info *info, uintptr_t at)
{
	size_t rows = (size_t)b->rows, room = (size_t)b->room,
	       heads = (size_t)c->num_attention_heads;

	b->q_a = place(&at, rows, (size_t)c->q_lora_rank, 4);
	b->q_a_normed = place(&at, rows, (size_t)c->q_lora_rank, 2);
	b->kv_a = place(&at, rows, (size_t)km_config_kv_width(c), 4);
	b->q = place(&at, rows, (size_t)km_config_q_width(c), 2);
	b->heads_out = place(&at, rows, (size_t)km_config_heads_out_width(c), 2);
	b->latents = place(&at, room, (size_t)km_config_kv_width(c), 2);
	b->kv = place(&at, room, heads * (size_t)(c->qk_nope_head_dim + c->v_head_dim), 2);
	b->mla_state = place(&at, rows, heads * (size_t)(c->v_head_dim + 2), 4);
	b->mla_scratch = place(&at, 1, mla_scratch(c, o, info), 1);
	return at;
}

static uintptr_t lay_mlp(km_gpu_buffers *b, const km_config *c, const km_weights *shapes,
                         const km_model_options *o, const km_cuda_info *info, uintptr_t at)
{
	size_t rows = (size_t)b->rows, width = (size_t)km_config_widest_mlp(c);
	size_t experts = (size_t)c->n_routed_experts, top_k = (size_t)c->num_experts_per_tok;
	km_moe_device device = { info->capability, info->multiprocessors };
	km_router_shape router;
	km_moe_weights moe;
	km_moe_problem problem;

	b->gate = place(&at, rows, width, 4);
	b->up = place(&at, rows, width, 4);
	b->act = place(&at, rows, width, 2);
	if (moe_layer(c) < 0)
		return at;
	router = km_gpu_router_shape(c, shapes->layer[moe_layer(c)].router.type == KM_W_F32,
	                             b->rows);
	moe = km_gpu_experts_shape(c, &shapes->layer[moe_layer(c)]);
	problem = km_gpu_moe_problem(c, &moe, b->rows, false);
	b->router = place(&at, rows, experts, 4);
	b->expert_weights = place(&at, rows, top_k, 4);
	b->expert_ids = place(&at, rows, top_k, 4);
	if (o->count_experts)
		b->expert_counts = place(&at, (size_t)c->num_hidden_layers, experts, 8);
	b->router_scratch = place(&at, 1, km_cuda_router_scratch_bytes(&router), 1);
	b->moe_scratch = place(&at, 1, km_moe_scratch_size(&problem, &device), 1);
	return at;
}

/* Attention and MLP share nothing but their bytes: router and experts keep counters that stay zero
 * between calls, so their region is nobody else's. */
void km_gpu_lay_out(km_gpu_buffers *b, const km_config *c, const km_weights *shapes,
                    const km_model_options *o, const km_cuda_info *info, void *base)
{
	uintptr_t at = (uintptr_t)base, start;
	size_t rows, logits, hidden = (size_t)c->hidden_size;

	*b = (km_gpu_buffers){ .rows = km_linear_rounded(o->max_batch_tokens),
		               .logit_rows = km_linear_rounded(o->max_logit_rows),
		               .room = prefill_room(o),
		               .pages = (int)pages_of(o) };
	rows = (size_t)b->rows;
	logits = (size_t)b->logit_rows;
	b->stream = place(&at, rows, hidden, 4);
	b->normed = place(&at, rows, hidden, 2);
	b->kept_stream = place(&at, rows, hidden, 4);
	b->kept_normed = place(&at, rows, hidden, 2);
	at = lay_attention(b, c, o, info, at);
	at = lay_mlp(b, c, shapes, o, info, at);
	b->head_stream = place(&at, logits, hidden, 4);
	b->head_normed = place(&at, logits, hidden, 2);
	b->dequantized = place(&at, 1, largest_dequantized(shapes), 1);
	b->entries_at = (batch_bytes(b, o) + ALIGN - 1) / ALIGN * ALIGN;
	b->batch_bytes = b->entries_at + KM_DRAW_ENTRIES * sizeof(km_draw_entry);
	b->batch = place(&at, 1, b->batch_bytes, 1);
	b->drawn = place(&at, logits, 1, 4);
	start = at;
	b->logits = place(&at, logits, (size_t)c->vocab_size, 4);
	b->logits_bytes = at - start;
	b->bytes = at - (uintptr_t)base;
}

/* ---- plan ---- */

static int check_options(const km_config *c, const km_model_options *o, km_err *err)
{
	if (o->kv_dtype == KM_KV_F32)
		return km_fail(err, KM_EUNSUPPORTED,
		               "on a GPU the KV cache is bf16 or fp8, not float32");
	if (c->kv_lora_rank % 8 || c->qk_rope_head_dim % 8 || c->qk_nope_head_dim % 8 ||
	    c->v_head_dim % 8)
		return km_fail(
			err, KM_EUNSUPPORTED,
			"attention on a GPU wants sizes that 8 divides: kv_lora_rank %d, heads of "
			"%d + %d, values of %d",
			c->kv_lora_rank, c->qk_nope_head_dim, c->qk_rope_head_dim, c->v_head_dim);
	if ((int64_t)o->max_seqs * (o->max_context + KM_MLA_PREFILL_TILE) >= INT32_MAX)
		return km_fail(err, KM_ELIMIT, "on a GPU %d sequences of %d tokens are more than can be counted: fewer "
		               "running requests or a shorter context", o->max_seqs, o->max_context);
	return 0;
}

/* One scale per channel makes groups of each matrix's own width: the kernels have one width for
 * all, which divides them. */
static int common_group(int a, int b)
{
	while (b) {
		int rest = a % b;

		a = b;
		b = rest;
	}
	return a;
}

/* Of a layer's routed experts, as the loader will have them, without their memory. Those of a
 * repacked checkpoint have no weights of their own to ask. */
km_moe_weights km_gpu_experts_shape(const km_config *c, const km_layer_weights *w)
{
	const km_weight *gate = &w->expert_gate[0];

	if (!gate->rows)
		return (km_moe_weights){ .packed = true,
			                 .type = KM_W_INT4,
			                 .scale_dtype = KM_BF16,
			                 .group = c->quant.group_size };
	return (km_moe_weights){
		.packed = km_gpu_experts_are_packed(c, w),
		.type = gate->type,
		.group = common_group(gate->group, w->expert_down[0].group),
		.scale_dtype = gate->scale_dtype,
		.block_rows = gate->block_rows,
		.block_cols = gate->block_cols,
	};
}

static void plan_bytes(const km_config *c, const km_model_options *o, const km_weights *shapes,
                       const km_cuda_info *info, km_model_plan *plan)
{
	km_gpu_buffers b;

	km_gpu_lay_out(&b, c, shapes, o, info, NULL);
	plan->weight_bytes = km_gpu_weights_bytes(c, shapes, &plan->expert_bytes);
	plan->logits_bytes = (int64_t)b.logits_bytes;
	plan->scratch_bytes = (int64_t)(b.bytes - b.logits_bytes);
	plan->fixed_bytes = KM_CUDA_BLAS_BYTES + 4 * ALIGN;
}

int km_gpu_plan(const km_config *config, const km_model_options *options, km_model_plan *plan,
                km_err *err)
{
	km_weights shapes;
	km_cuda_info info;
	size_t available;
	int count = km_cuda_count(err);

	KM_TRY(check_options(config, options, err));
	if (!count)
		return KM_ENOTFOUND;
	if (options->gpu < 0 || options->gpu >= count)
		return km_fail(err, KM_EINVAL, "GPU %d: there are %d, counted from 0", options->gpu,
		               count);
	KM_TRY(km_cuda_describe(options->gpu, &info, err));
	KM_TRY(km_cuda_free_bytes(options->gpu, &available, err));
	KM_TRY(km_weights_shapes(&shapes, config, err));
	plan_bytes(config, options, &shapes, &info, plan);
	km_weights_close(&shapes);
	plan->available_bytes = (int64_t)available;
	return 0;
}

/* ---- open ---- */

static void open_linear(km_gpu *g)
{
	g->linear.slab = g->info.capability >= 90;
	g->linear.blas = km_cuda_blas_open(g->cuda, &g->no_blas) >= 0;
}

static int load_rope(km_gpu *g, const km_model *m, km_err *err)
{
	size_t bytes = (size_t)m->options.max_context * (size_t)m->config.qk_rope_head_dim * 4;
	float *table = km_xmalloc(bytes);
	void *piece = NULL;
	int rc = km_cuda_take(g->cuda, &piece, bytes, "rotary table", err);

	km_rope_table(&m->config.rope, m->config.qk_rope_head_dim, m->options.max_context, table);
	if (rc >= 0)
		rc = km_cuda_upload(g->cuda, piece, table, bytes, err);
	free(table);
	g->cos_sin = piece;
	return rc;
}

static void open_plan(km_mla_prefill_plan *p, const km_model_options *o, int room)
{
	km_mla_prefill_capacity(p, o->max_batch_tokens, o->max_seqs, o->max_context, room);
	p->runs = km_xreallocarray(NULL, (size_t)p->max_runs, sizeof(*p->runs));
	p->tiles = km_xreallocarray(NULL, (size_t)p->max_tiles, sizeof(*p->tiles));
	p->wave = km_xreallocarray(NULL, (size_t)p->max_waves, sizeof(*p->wave));
}

static int open_memory(km_gpu *g, const km_model *m, km_err *err)
{
	const km_model_options *o = &m->options;
	void *piece;

	g->kv_layer_bytes = (size_t)o->kv_slots * (size_t)km_config_kv_width(&m->config) *
	                    km_kv_dtype_bytes(o->kv_dtype);
	KM_TRY(km_cuda_take(g->cuda, &piece,
	                    g->kv_layer_bytes * (size_t)m->config.num_hidden_layers, "KV cache",
	                    err));
	g->kv = piece;
	KM_TRY(load_rope(g, m, err));
	km_gpu_lay_out(&g->b, &m->config, &m->weights, o, &g->info, NULL);
	KM_TRY(km_cuda_take(g->cuda, &piece, g->b.bytes, "step buffers", err));
	km_gpu_lay_out(&g->b, &m->config, &m->weights, o, &g->info, piece);
	/* Counters in it start as zero; what is read beyond a step's rows is never a NaN that was
	 * left there. */
	KM_TRY(km_cuda_fill(g->cuda, piece, 0, g->b.bytes, err));
	KM_TRY(km_cuda_fill(g->cuda, g->kv, 0,
	                    g->kv_layer_bytes * (size_t)m->config.num_hidden_layers, err));
	for (int i = 0; i < 2; i++) {
		KM_TRY(km_cuda_pin(g->cuda, (void **)&g->under_way[i].staging, g->b.batch_bytes, err));
		KM_TRY(km_cuda_pin(g->cuda, (void **)&g->under_way[i].drawn,
		                   (size_t)g->b.logit_rows * 4, err));
		KM_TRY(km_cuda_fence_open(g->cuda, &g->under_way[i].done, err));
	}
	g->staging = g->under_way[0].staging;
	KM_TRY(km_cuda_pin(g->cuda, (void **)&g->logits,
	                   (size_t)g->b.logit_rows * (size_t)m->config.vocab_size * 4, err));
	open_plan(&g->all.prefill, o, g->b.room);
	open_plan(&g->kept.prefill, o, g->b.room);
	return km_cuda_wait(g->cuda, err);
}

/* What the kernels refuse is known now, not at the first request. */
static int check_router(const km_gpu *g, const km_config *c, km_err *err)
{
	km_router_device device = { g->info.capability, g->info.multiprocessors, g->linear.blas,
		                    g->pdl };
	km_router_shape shape = km_gpu_router_shape(c, false, 1);
	km_router_plan plan;

	return moe_layer(c) < 0 ? 0 : km_router_plan_make(&plan, &shape, &device, err);
}

static bool takes_slabs(const km_gpu *g, const km_weight *w, int rows)
{
	return km_linear_plan(w, rows, &g->linear) == KM_LINEAR_SLAB;
}

/* Slabs in every layer, for a power of 2 of rows: a step and what it is padded to then have one answer. */
static int joined_rows(const km_gpu *g, const km_config *c)
{
	int rows = c->n_shared_experts && moe_layer(c) >= 0 ? 8 : 0;

	for (int i = 0; i < c->num_hidden_layers; i++) {
		const km_layer_weights *w = &g->weights.layer[i].w;

		while (rows && km_config_is_moe_layer(c, i) &&
		       !(takes_slabs(g, &w->shared_gate, rows) && takes_slabs(g, &w->shared_up, rows) &&
		         takes_slabs(g, &w->router, rows)))
			rows /= 2;
	}
	return rows;
}

int km_gpu_open(km_model *m, const km_model_plan *plan, km_err *err)
{
	km_gpu *g = km_xcalloc(1, sizeof(*g));
	size_t arena = (size_t)(plan->weight_bytes + plan->kv_bytes + plan->rope_bytes +
	                        plan->scratch_bytes + plan->logits_bytes + plan->fixed_bytes);
	int64_t start = km_now_ns();

	m->gpu = g;
	m->steps = &km_gpu_steps;
	KM_TRY(km_cuda_open(&g->cuda, m->options.gpu, arena, err));
	g->info = *km_cuda_info_of(g->cuda);
	if (g->info.capability < 80)
		return km_fail(err, KM_EUNSUPPORTED,
		               "%s has compute capability %d.%d, 8.0 is needed", g->info.name,
		               g->info.capability / 10, g->info.capability % 10);
	g->pdl = g->info.capability >= 90;
	open_linear(g);
	KM_TRY(check_router(g, &m->config, err));
	if (moe_layer(&m->config) >= 0)
		KM_TRY(km_gpu_tuning_open(g, m, moe_layer(&m->config), err));
	KM_TRY(km_gpu_weights_load(&g->weights, g->cuda, &m->config, &m->weights, &m->options,
	                           err));
	g->joined_rows = joined_rows(g, &m->config);
	g->loaded_bytes = plan->weight_bytes;
	g->load_seconds = (double)(km_now_ns() - start) / 1e9;
	return open_memory(g, m, err);
}

int km_gpu_fetch_expert_counts(km_model *m, km_err *err)
{
	size_t count = (size_t)m->config.num_hidden_layers * (size_t)m->config.n_routed_experts;

	return km_cuda_download(m->gpu->cuda, m->expert_counts, m->gpu->b.expert_counts, count * 8,
	                        err);
}

static void close_plan(km_mla_prefill_plan *p)
{
	free(p->runs);
	free(p->tiles);
	free(p->wave);
}

void km_gpu_close(km_gpu *g)
{
	if (!g)
		return;
	km_gpu_weights_release(&g->weights);
	km_moe_tuning_release(&g->tuning);
	km_gpu_graphs_release(&g->graphs);
	if (g->cuda) {
		km_cuda_unpin(g->cuda, g->logits);
		for (int i = 0; i < 2; i++) {
			km_cuda_unpin(g->cuda, g->under_way[i].staging);
			km_cuda_unpin(g->cuda, g->under_way[i].drawn);
			km_cuda_fence_close(g->under_way[i].done);
		}
	}
	km_cuda_close(g->cuda);
	close_plan(&g->all.prefill);
	close_plan(&g->kept.prefill);
	free(g);
}

/* ---- in words ---- */

static void explain_linear(const km_gpu *g, const char *name, const km_weight *w, km_buf *out)
{
	if (!w->rows)
		return;
	km_buf_printf(out, "GPU %s [%d, %d]: ", name, w->rows, w->cols);
	km_linear_explain(w, &g->linear, out);
	km_buf_puts(out, "\n");
}

/* Tokens up to which the experts' launch takes along what goes before it. */
static int taken_along(const km_model *m, const km_gpu_layer *l)
{
	const km_gpu *g = m->gpu;
	km_moe_device device = { g->info.capability, g->info.multiprocessors };
	km_moe_before before = km_gpu_moe_before(&m->config, &l->w);
	int most = 0;

	for (int tokens = 1; tokens <= KM_MOE_FRONT_TOKENS && tokens <= g->joined_rows; tokens++) {
		km_moe_problem problem = km_gpu_moe_problem(&m->config, &l->experts, tokens, g->pdl);
		km_moe_plan plan;

		if (km_moe_tuning_plan(&plan, &g->tuning, &problem, &device, NULL, NULL) >= 0 &&
		    km_moe_plan_takes(&plan, &problem, &before))
			most = tokens;
	}
	return most;
}

static void explain_moe(const km_model *m, const km_gpu_layer *l, km_buf *out)
{
	const km_gpu *g = m->gpu;
	km_router_device device = { g->info.capability, g->info.multiprocessors, g->linear.blas,
		                    g->pdl };
	km_moe_device moe_device = { g->info.capability, g->info.multiprocessors };
	static const int tokens[] = { 1, 64, 1024 };
	int along = taken_along(m, l);

	if (g->joined_rows)
		km_buf_printf(out,
		              "GPU router: up to %d rows its product is part of the launch of the shared "
		              "experts' gate and up; of the router's plan only the gate is launched\n",
		              g->joined_rows);
	if (along)
		km_buf_printf(out,
		              "GPU experts: up to %d rows their launch takes along the gate and the shared experts' "
		              "down, which are then no launches of their own\n",
		              along);
	for (int i = 0; i < 3; i++) {
		km_router_shape shape =
			km_gpu_router_shape(&m->config, l->w.router.type == KM_W_F32, tokens[i]);
		km_moe_problem problem =
			km_gpu_moe_problem(&m->config, &l->experts, tokens[i], g->pdl);
		km_router_plan router;
		km_moe_plan moe;

		if (km_router_plan_make(&router, &shape, &device, NULL) >= 0)
			km_router_plan_explain(&router, &shape, &device, out);
		if (km_moe_tuning_plan(&moe, &g->tuning, &problem, &moe_device, NULL, NULL) < 0)
			continue;
		km_moe_plan_explain(&moe, &problem, &moe_device, out);
		km_moe_tuning_explain(&g->tuning, &problem, &moe_device, out);
	}
}

void km_gpu_explain(const km_model *m, km_buf *out)
{
	const km_gpu *g = m->gpu;
	const km_gpu_layer *first = &g->weights.layer[0];
	int moe = moe_layer(&m->config);
	km_mla_shape shape = km_gpu_mla_shape(&m->config, &m->options);
	km_mla_device device = { g->info.capability, g->info.multiprocessors };

	km_buf_printf(
		out,
		"GPU %d: %s, %s, %d multiprocessors; %.2f GB of weights loaded in %.2f s, %.2f "
		"GB/s\n",
		m->options.gpu, g->info.name, g->info.toolkit, g->info.multiprocessors,
		(double)g->loaded_bytes / 1e9, g->load_seconds,
		(double)g->loaded_bytes / 1e9 / g->load_seconds);
	km_buf_printf(out, "GPU activations: bf16 before linear layers, f32 between\n");
	km_gpu_graphs_explain(m, out);
	if (!g->linear.blas)
		km_buf_printf(out, "GPU matrix products without cuBLASLt: %s\n", g->no_blas.msg);
	km_buf_printf(out, "GPU attention: %s\n",
	              km_mla_tensor_fits(&shape, &device)
	                      ? "tensor-core forms"
	                      : "general forms: the tensor-core forms take 512 + 64 "
	                        "latents, heads of 128 + 64 and 128, capability 9.0");
	explain_linear(g, "q_a", &first->w.q_a, out);
	explain_linear(g, "q_b", &first->w.q_b, out);
	explain_linear(g, "q", &first->w.q_proj, out);
	explain_linear(g, "kv_a", &first->w.kv_a, out);
	explain_linear(g, "o", &first->w.o, out);
	explain_linear(g, "gate", &first->w.gate, out);
	explain_linear(g, "head", &g->weights.head, out);
	if (moe < 0)
		return;
	explain_linear(g, "shared_gate", &g->weights.layer[moe].w.shared_gate, out);
	explain_linear(g, "shared_down", &g->weights.layer[moe].w.shared_down, out);
	explain_moe(m, &g->weights.layer[moe], out);
}

#endif
