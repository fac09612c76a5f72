/*
 * What a model takes, computed from its config and options alone: the layout of a step's buffers, and
 * bytes by class. The weights' bytes come from the inventory of tensors that the config calls for, in its
 * own quantisation, so that a plan needs no checkpoint. What a GPU takes instead is model/gpu.c's.
 */
#include "model/gpu.h"
#include "model/host_memory.h"
#include "model/inventory.h"
#include "model/model_state.h"

#include <omp.h>

enum { ALIGNMENT = 64 };

struct weight_walk {
	const km_config *config;
	km_model_plan *plan;
};

km_mla_args km_model_mla_args(const km_config *config, const km_model_options *options)
{
	return (km_mla_args){
		.heads = config->num_attention_heads,
		.nope_dim = config->qk_nope_head_dim,
		.rope_dim = config->qk_rope_head_dim,
		.v_dim = config->v_head_dim,
		.kv_lora_rank = config->kv_lora_rank,
		.kv_dtype = options->kv_dtype,
		.scale = (float)km_config_softmax_scale(config),
	};
}

km_moe_args km_model_moe_args(const km_config *config)
{
	return (km_moe_args){
		.experts = config->n_routed_experts,
		.top_k = config->num_experts_per_tok,
		.hidden = config->hidden_size,
		.intermediate = config->moe_intermediate_size,
		.routed_scale = (float)config->routed_scaling_factor,
	};
}

static int moe_layers(const km_config *config)
{
	int count = 0;

	for (int i = 0; i < config->num_hidden_layers; i++)
		count += km_config_is_moe_layer(config, i);
	return count;
}

static int shared_width(const km_config *config)
{
	return config->moe_intermediate_size * config->n_shared_experts;
}

int km_config_widest_mlp(const km_config *config)
{
	int moe = moe_layers(config), width = moe ? shared_width(config) : 0;

	if (moe < config->num_hidden_layers && config->intermediate_size > width)
		width = config->intermediate_size;
	return width;
}

/* Places rows * cols elements of 4 bytes (floats and ids are that) and moves on. */
static void *place(uintptr_t *at, int rows, int cols)
{
	void *here = (void *)*at;

	*at += ((size_t)rows * (size_t)cols * 4 + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	return here;
}

static uintptr_t place_attention(km_step_buffers *s, const km_config *c, const km_model_options *o,
                                 uintptr_t at)
{
	int rows = o->max_batch_tokens;
	km_mla_args mla = km_model_mla_args(c, o);

	s->q_a = place(&at, rows, c->q_lora_rank);
	s->q_a_normed = place(&at, rows, c->q_lora_rank);
	s->kv_a = place(&at, rows, km_config_kv_width(c));
	s->latent = place(&at, rows, c->kv_lora_rank);
	s->q = place(&at, rows, km_config_q_width(c));
	s->heads_out = place(&at, rows, km_config_heads_out_width(c));
	s->mla_scratch = (void *)at;
	return at + km_mla_scratch_bytes(&mla, rows, o->max_context, o->threads);
}

static uintptr_t place_mlp(km_step_buffers *s, const km_config *c, const km_model_options *o,
                           uintptr_t at)
{
	int rows = o->max_batch_tokens, width = km_config_widest_mlp(c);
	km_moe_args moe = km_model_moe_args(c);

	s->gate = place(&at, rows, width);
	s->up = place(&at, rows, width);
	s->act = place(&at, rows, width);
	if (!moe_layers(c))
		return at;
	s->router = place(&at, rows, c->n_routed_experts);
	s->expert_weights = place(&at, rows, c->num_experts_per_tok);
	s->expert_ids = place(&at, rows, c->num_experts_per_tok);
	s->moe_scratch = (void *)at;
	return at + km_moe_scratch_bytes(&moe, rows, o->threads);
}

static uintptr_t place_head(km_step_buffers *s, const km_config *c, const km_model_options *o,
                            uintptr_t at)
{
	s->head_hidden = place(&at, o->max_logit_rows, c->hidden_size);
	s->head_delta = place(&at, o->max_logit_rows, c->hidden_size);
	s->head_normed = place(&at, o->max_logit_rows, c->hidden_size);
	return at;
}

void km_step_lay_out(km_step_buffers *s, const km_config *c, const km_model_options *o, void *block)
{
	uintptr_t at = (uintptr_t)block, phase, end;
	int rows = o->max_batch_tokens;

	s->hidden = place(&at, rows, c->hidden_size);
	s->normed = place(&at, rows, c->hidden_size);
	s->delta = place(&at, rows, c->hidden_size);
	phase = place_attention(s, c, o, at);
	end = place_mlp(s, c, o, at);
	phase = end > phase ? end : phase;
	end = place_head(s, c, o, at);
	phase = end > phase ? end : phase;
	at = (phase + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	phase = at;
	s->logits = place(&at, o->max_logit_rows, c->vocab_size);
	s->logits_bytes = at - phase;
	s->bytes = at - (uintptr_t)block;
}

/* Adds the bytes of one module's tensors. The vision tower stays on disk. */
static int add_module(void *context, const km_module *module, km_err *err)
{
	km_model_plan *plan = ((struct weight_walk *)context)->plan;
	const km_config *config = ((struct weight_walk *)context)->config;
	km_wanted wanted[KM_MAX_MODULE_TENSORS];
	int count = km_module_tensors(module, config, wanted);

	(void)err;
	if (module->class == KM_CLASS_VISION || module->class == KM_CLASS_PROJECTOR)
		return 0;
	for (int i = 0; i < count; i++) {
		int64_t bytes = (int64_t)km_dtype_bytes(wanted[i].usual);

		for (int d = 0; d < wanted[i].ndim; d++)
			bytes *= wanted[i].shape[d];
		plan->weight_bytes += bytes;
		if (module->class == KM_CLASS_EXPERTS)
			plan->expert_bytes += bytes;
	}
	return 0;
}

static int check_options(const km_config *config, const km_model_options *o, km_err *err)
{
	if (o->max_batch_tokens < 1 || o->max_seqs < 1 || o->max_logit_rows < 1)
		return km_fail(err, KM_EINVAL,
		               "a model needs room for at least one row, sequence and row of logits, "
		               "not %d, %d, %d",
		               o->max_batch_tokens, o->max_seqs, o->max_logit_rows);
	if (o->max_context < 1 || o->max_context > config->max_position_embeddings)
		return km_fail(err, KM_EINVAL, "a context of %d tokens is outside this model's 1 to %d",
		               o->max_context, config->max_position_embeddings);
	if (o->kv_slots < 0 || o->kv_slots > INT32_MAX)
		return km_fail(err, KM_EINVAL, "a KV cache of %lld tokens is outside 0 to %d",
		               (long long)o->kv_slots, INT32_MAX);
	if (o->threads < 0)
		return km_fail(err, KM_EINVAL, "%d threads make no sense: 0 takes all", o->threads);
	if (config->qk_rope_head_dim > 1024 || config->qk_rope_head_dim % 2)
		return km_fail(err, KM_EUNSUPPORTED, "qk_rope_head_dim %d is not an even number up to 1024",
		               config->qk_rope_head_dim);
	if (config->attention_bias)
		return km_fail(err, KM_EUNSUPPORTED,
		               "attention_bias is true, and biases in attention are not built");
	return 0;
}

static int gpu_plan(const km_config *config, const km_model_options *options, km_model_plan *plan,
                    km_err *err)
{
#if KM_CUDA
	return km_gpu_plan(config, options, plan, err);
#else
	(void)config, (void)options, (void)plan;
	km_cuda_count(err); /* says why there is none */
	return KM_EUNSUPPORTED;
#endif
}

int km_model_plan_memory(const km_config *config, const km_model_options *options,
                         km_model_plan *plan, km_err *err)
{
	km_model_options resolved = *options;
	km_step_buffers step = { 0 };

	KM_TRY(check_options(config, options, err));
	if (!resolved.threads)
		resolved.threads = omp_get_num_procs();
	km_step_lay_out(&step, config, &resolved, NULL);
	*plan = (km_model_plan){ 0 };
	KM_TRY(km_inventory_visit(config, add_module, &(struct weight_walk){ config, plan }, err));
	plan->kv_bytes_per_token = (int64_t)config->num_hidden_layers * km_config_kv_width(config) *
	                           (int64_t)km_kv_dtype_bytes(options->kv_dtype);
	plan->kv_bytes = plan->kv_bytes_per_token * options->kv_slots;
	plan->logits_bytes = (int64_t)step.logits_bytes;
	plan->scratch_bytes = (int64_t)(step.bytes - step.logits_bytes);
	plan->rope_bytes = (int64_t)options->max_context * config->qk_rope_head_dim * 4;
	plan->available_bytes = km_host_memory_available();
	return options->backend == KM_BACKEND_CUDA ? gpu_plan(config, options, plan, err) : 0;
}
