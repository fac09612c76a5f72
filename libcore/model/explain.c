/*
 * A model's choices in words. A weight is named once for each run of layers where it has the same type
 * and shape, so that a checkpoint that mixes quantisations shows it.
 */
#include "model/gpu.h"
#include "model/rope.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const char *const kv_names[] = { [KM_KV_F32] = "f32", [KM_KV_BF16] = "bf16",
	                                [KM_KV_FP8] = "fp8 e4m3 (scale 1)" };

static void weight_words(const km_weight *w, char *out, size_t size)
{
	switch (w->type) {
	case KM_W_F32:
		snprintf(out, size, "f32 [%d, %d]", w->rows, w->cols);
		break;
	case KM_W_F16:
		snprintf(out, size, "f16 [%d, %d]", w->rows, w->cols);
		break;
	case KM_W_BF16:
		snprintf(out, size, "bf16 [%d, %d]", w->rows, w->cols);
		break;
	case KM_W_FP8:
		snprintf(out, size, "fp8 e4m3 [%d, %d], %s scales for blocks of %d x %d", w->rows, w->cols,
		         km_dtype_name(w->scale_dtype), w->block_rows, w->block_cols);
		break;
	case KM_W_INT4:
		snprintf(out, size, "int4 [%d, %d], %s scales for groups of %d", w->rows, w->cols,
		         km_dtype_name(w->scale_dtype), w->group);
		break;
	}
}

static void explain_head(const km_model *m, km_buf *out)
{
	const km_config *c = &m->config;
	char words[160];

	km_buf_printf(out, "model: %s (%s), %d layers, hidden size %d, vocabulary %d\n",
	              km_model_kind_name(c->kind), c->architecture, c->num_hidden_layers, c->hidden_size,
	              c->vocab_size);
	if (m->gpu)
		km_buf_puts(out, "backend: GPU\n");
	else
		km_buf_printf(out, "backend: CPU, %s forms, %d threads; activations are f32\n", m->ops->name,
		              m->options.threads);
	weight_words(&m->weights.embed, words, sizeof(words));
	km_buf_printf(out, "embedding: %s\n", words);
	weight_words(&m->weights.head, words, sizeof(words));
	km_buf_printf(out, "head: %s%s, only on rows whose logits are wanted\n", words,
	              c->tie_word_embeddings ? " (the embedding)" : "");
}

static void explain_attention(const km_model *m, km_buf *out)
{
	const km_config *c = &m->config;
	const km_rope_config *r = &c->rope;
	float frequency[512], factor = km_rope_frequencies(r, c->qk_rope_head_dim, frequency);

	km_buf_printf(out,
	              "attention: MLA, %d heads, latent %d + rope %d; generated tokens take the absorbed form, "
	              "prompt tokens the plain form; softmax scale %.7g\n",
	              c->num_attention_heads, c->kv_lora_rank, c->qk_rope_head_dim,
	              km_config_softmax_scale(c));
	if (r->yarn)
		km_buf_printf(out,
		              "rope: YaRN, theta %g, factor %g over %d positions, betas %g and %g, cos and sin "
		              "times %.7g; interleaved pairs\n",
		              r->theta, r->factor, r->original_max_position_embeddings, r->beta_fast,
		              r->beta_slow, (double)factor);
	else
		km_buf_printf(out, "rope: plain, theta %g; interleaved pairs\n", r->theta);
	km_buf_printf(out, "norms: eps %g%s\n", c->rms_norm_eps,
	              m->options.hf_lora_norm_eps ? ", 1e-06 for q_a and kv_a as transformers has it" : "");
	km_buf_printf(out, "KV cache: %s, %" PRId64 " tokens of %zu bytes, pages as each batch says\n",
	              kv_names[m->options.kv_dtype], m->options.kv_slots,
	              (size_t)km_config_kv_width(c) * km_kv_dtype_bytes(m->options.kv_dtype) *
	                      (size_t)c->num_hidden_layers);
}

static void explain_moe(const km_model *m, km_buf *out)
{
	const km_config *c = &m->config;
	int first = 0;

	while (first < c->num_hidden_layers && !km_config_is_moe_layer(c, first))
		first++;
	if (first == c->num_hidden_layers)
		return;
	km_buf_printf(out, "router: f32 logits, %s scores, %s", c->scoring_softmax ? "softmax" : "sigmoid",
	              m->weights.layer[first].router_bias ? "a bias for selection only, " : "no bias, ");
	if (c->n_group > 1)
		km_buf_printf(out, "%d of %d groups, ", c->topk_group, c->n_group);
	km_buf_printf(out, "top %d of %d experts (ties to the lower id), weights %s\n",
	              c->num_experts_per_tok, c->n_routed_experts,
	              c->norm_topk_prob ? "renormalised" : "as scored");
	km_buf_printf(out, "experts: routed sum in f32 times %g, %d shared experts added unscaled\n",
	              c->routed_scaling_factor, c->n_shared_experts);
}

struct named_weight {
	const char *name;
	size_t offset;
	bool array; /* one weight an expert: the first stands for all */
};

#define WEIGHT(field) { #field, offsetof(km_layer_weights, field), false }
#define EXPERTS(field) { #field, offsetof(km_layer_weights, field), true }
static const struct named_weight named_weights[] = {
	WEIGHT(q_proj), WEIGHT(q_a), WEIGHT(q_b), WEIGHT(kv_a), WEIGHT(kv_b), WEIGHT(o),
	WEIGHT(gate), WEIGHT(up), WEIGHT(down), WEIGHT(router),
	WEIGHT(shared_gate), WEIGHT(shared_up), WEIGHT(shared_down),
	EXPERTS(expert_gate), EXPERTS(expert_up), EXPERTS(expert_down),
};

static const km_weight *find_weight(const km_model *m, const struct named_weight *named, int layer)
{
	const char *at = (const char *)&m->weights.layer[layer] + named->offset;
	const km_weight *w;

	if (!named->array)
		return (const km_weight *)(const void *)at;
	memcpy(&w, at, sizeof(w));
	return w;
}

static bool same_form(const km_weight *a, const km_weight *b)
{
	return !a == !b && (!a || (!a->data == !b->data && a->type == b->type && a->rows == b->rows &&
	                           a->cols == b->cols && a->group == b->group));
}

static void explain_weight(const km_model *m, const struct named_weight *named, km_buf *out)
{
	int layers = m->config.num_hidden_layers;
	char words[160];

	for (int from = 0, to; from < layers; from = to) {
		const km_weight *w = find_weight(m, named, from);

		for (to = from + 1; to < layers && same_form(w, find_weight(m, named, to)); to++)
			;
		if (!w || !w->data)
			continue;
		weight_words(w, words, sizeof(words));
		km_buf_printf(out, "layers %d-%d %s: %s", from, to - 1, named->name, words);
		if (!m->gpu)
			km_buf_printf(out, ", %s form", m->ops->name);
		km_buf_puts(out, "\n");
	}
}

void km_model_explain(const km_model *model, km_buf *out)
{
	explain_head(model, out);
	explain_attention(model, out);
	explain_moe(model, out);
	for (size_t i = 0; i < sizeof(named_weights) / sizeof(*named_weights); i++)
		explain_weight(model, &named_weights[i], out);
#if KM_CUDA
	if (model->gpu)
		km_gpu_explain(model, out);
#endif
}
