/*
 * What is quantised: with fp8, every linear of attention, dense MLP and experts that the config
 * does not list, never lm_head (Hugging Face and the engines leave it out by themselves); with
 * compressed-tensors, every linear that no ignore pattern matches, lm_head too. The router, the
 * embedding and the vision tower are not linears of the quantised text model.
 */
#include "model/inventory.h"

#include <stdio.h>
#include <string.h>

#include "format/moe_layout.h"

/* With at most 8 bytes for a parameter (f32 is 4, fp8 with a scale for each is 5), no sum of bytes
 * passes 63 bits, with room for the modules' small tensors. */
static const int64_t max_params = INT64_MAX / 16;

struct walk {
	const km_config *config;
	int64_t params; /* of the modules so far */
	km_ignore_rules *rules;
	km_module_visit visit;
	void *context;
	km_err *err;
	char key[256];
	size_t stem; /* length of "layers.3." in key */
	int layer, expert;
};

static const char *const class_names[KM_CLASS_COUNT] = {
	[KM_CLASS_EMBED] = "embedding",
	[KM_CLASS_HEAD] = "head",
	[KM_CLASS_ATTENTION] = "attention",
	[KM_CLASS_DENSE_MLP] = "dense_mlp",
	[KM_CLASS_ROUTER] = "router",
	[KM_CLASS_SHARED_EXPERTS] = "shared_experts",
	[KM_CLASS_EXPERTS] = "routed_experts",
	[KM_CLASS_NORMS] = "norms",
	[KM_CLASS_VISION] = "vision_tower",
	[KM_CLASS_PROJECTOR] = "projector",
	[KM_CLASS_SKIPPED] = "not_used",
};

const char *km_tensor_class_name(enum km_tensor_class class)
{
	return class_names[class];
}

int64_t km_module_params(const km_module *module)
{
	int64_t n = 1;

	for (int i = 0; i < module->ndim; i++)
		n *= module->shape[i];
	return n;
}

static void set_key(struct walk *w, const char *name)
{
	snprintf(w->key + w->stem, sizeof(w->key) - w->stem, "%s", name);
}

static int count_params(struct walk *w, const km_module *m)
{
	int64_t n = 1;

	for (int i = 0; i < m->ndim; i++)
		if (__builtin_mul_overflow(n, m->shape[i], &n))
			n = INT64_MAX;
	if (!__builtin_add_overflow(w->params, n, &w->params) && w->params <= max_params)
		return 0;
	return km_fail(w->err, KM_ELIMIT,
	               "%s: with it the model has more than %.3g parameters, which is more than "
	               "is supported",
	               w->key, (double)max_params);
}

static int emit(struct walk *w, km_module *m)
{
	m->key = w->key;
	m->layer = w->layer;
	m->expert = w->expert;
	for (int i = 0; i < m->ndim; i++)
		if (m->shape[i] > INT32_MAX)
			return km_fail(w->err, KM_ELIMIT,
			               "%s: a size of %lld is more than is supported", w->key,
			               (long long)m->shape[i]);
	KM_TRY(count_params(w, m));
	return w->visit(w->context, m, w->err);
}

static int vector(struct walk *w, const char *name, enum km_role role, int64_t size)
{
	km_module m = { .suffix = "weight",
		        .role = role,
		        .class = KM_CLASS_NORMS,
		        .ndim = 1,
		        .shape = { size } };

	set_key(w, name);
	return emit(w, &m);
}

static int matrix(struct walk *w, const char *name, enum km_role role, enum km_tensor_class class,
                  int64_t rows, int64_t cols)
{
	km_module m = {
		.suffix = "weight", .role = role, .class = class, .ndim = 2, .shape = { rows, cols }
	};

	set_key(w, name);
	return emit(w, &m);
}

static int linear(struct walk *w, const char *name, enum km_role role, enum km_tensor_class class,
                  int64_t rows, int64_t cols)
{
	const km_quant_config *quant = &w->config->quant;
	km_module m = {
		.suffix = "weight", .role = role, .class = class, .ndim = 2, .shape = { rows, cols }
	};
	int64_t group = quant->group_size ? quant->group_size : cols;

	int ignored;

	set_key(w, name);
	if (quant->method == KM_QUANT_NONE ||
	    (quant->method == KM_QUANT_FP8_BLOCK && role == KM_ROLE_HEAD))
		return emit(w, &m);
	ignored = km_ignore_rules_match(w->rules, w->key, w->err);
	if (ignored)
		return ignored < 0 ? ignored : emit(w, &m);
	m.form = quant->method == KM_QUANT_FP8_BLOCK ? KM_FORM_FP8 : KM_FORM_INT4;
	if (m.form == KM_FORM_INT4 && (cols % 8 || cols % group))
		return km_fail(w->err, KM_EFORMAT,
		               "%s: its %lld columns cannot be packed as int4 in groups of %lld",
		               w->key, (long long)cols, (long long)group);
	return emit(w, &m);
}

static int attention(struct walk *w)
{
	const km_config *c = w->config;
	const enum km_tensor_class A = KM_CLASS_ATTENTION;
	int64_t heads = c->num_attention_heads, qk = c->qk_nope_head_dim + c->qk_rope_head_dim;

	if (c->q_lora_rank) {
		KM_TRY(linear(w, "self_attn.q_a_proj", KM_ROLE_Q_A, A, c->q_lora_rank,
		              c->hidden_size));
		KM_TRY(vector(w, "self_attn.q_a_layernorm", KM_ROLE_Q_A_NORM, c->q_lora_rank));
		KM_TRY(linear(w, "self_attn.q_b_proj", KM_ROLE_Q_B, A, heads * qk, c->q_lora_rank));
	} else {
		KM_TRY(linear(w, "self_attn.q_proj", KM_ROLE_Q, A, heads * qk, c->hidden_size));
	}
	KM_TRY(linear(w, "self_attn.kv_a_proj_with_mqa", KM_ROLE_KV_A, A,
	              c->kv_lora_rank + c->qk_rope_head_dim, c->hidden_size));
	KM_TRY(vector(w, "self_attn.kv_a_layernorm", KM_ROLE_KV_A_NORM, c->kv_lora_rank));
	KM_TRY(linear(w, "self_attn.kv_b_proj", KM_ROLE_KV_B, A,
	              heads * (c->qk_nope_head_dim + c->v_head_dim), c->kv_lora_rank));
	return linear(w, "self_attn.o_proj", KM_ROLE_O, A, c->hidden_size, heads * c->v_head_dim);
}

/* Of a repacked checkpoint: is this linear int4, or did an ignore rule keep it as it was? */
static int is_repacked(struct walk *w, const char *name)
{
	int ignored;

	set_key(w, name);
	ignored = km_ignore_rules_match(w->rules, w->key, w->err);
	return ignored < 0 ? ignored : !ignored;
}

static int repacked(struct walk *w, const char *name, enum km_role role, int64_t rows, int64_t cols)
{
	km_module m = { .suffix = "weight_repacked", .role = role, .class = KM_CLASS_EXPERTS,
		        .form = KM_FORM_REPACKED, .ndim = 2, .shape = { rows, cols } };

	set_key(w, name);
	return emit(w, &m);
}

static int expert(struct walk *w)
{
	const km_config *c = w->config;
	const enum km_tensor_class E = KM_CLASS_EXPERTS;
	int64_t hidden = c->hidden_size, inner = c->moe_intermediate_size;
	int gate = 0, up = 0, down = 0;

	if (c->expert_layout) {
		KM_TRY(gate = is_repacked(w, "gate_proj"));
		KM_TRY(up = is_repacked(w, "up_proj"));
		KM_TRY(down = is_repacked(w, "down_proj"));
	}
	if (gate && up) {
		KM_TRY(repacked(w, "gate_up_proj", KM_ROLE_EXPERT_GATE_UP, 2 * inner, hidden));
	} else {
		KM_TRY(linear(w, "gate_proj", KM_ROLE_EXPERT_GATE, E, inner, hidden));
		KM_TRY(linear(w, "up_proj", KM_ROLE_EXPERT_UP, E, inner, hidden));
	}
	return down ? repacked(w, "down_proj", KM_ROLE_EXPERT_DOWN, hidden, inner)
	            : linear(w, "down_proj", KM_ROLE_EXPERT_DOWN, E, hidden, inner);
}

static int experts(struct walk *w)
{
	const km_config *c = w->config;
	size_t stem = w->stem;

	for (int e = 0; e < c->n_routed_experts; e++) {
		w->expert = e;
		w->stem = stem + (size_t)snprintf(w->key + stem, sizeof(w->key) - stem,
		                                  "mlp.experts.%d.", e);
		KM_TRY(expert(w));
	}
	w->expert = -1;
	w->stem = stem;
	return 0;
}

static int moe(struct walk *w)
{
	const km_config *c = w->config;
	const enum km_tensor_class S = KM_CLASS_SHARED_EXPERTS;
	int64_t shared = (int64_t)c->n_shared_experts * c->moe_intermediate_size;
	km_module bias = { .suffix = "e_score_correction_bias", .role = KM_ROLE_ROUTER_BIAS,
		           .class = KM_CLASS_ROUTER, .ndim = 1, .shape = { c->n_routed_experts } };

	KM_TRY(matrix(w, "mlp.gate", KM_ROLE_ROUTER, KM_CLASS_ROUTER, c->n_routed_experts,
	              c->hidden_size));
	KM_TRY(emit(w, &bias));
	KM_TRY(experts(w));
	if (!shared)
		return 0;
	KM_TRY(linear(w, "mlp.shared_experts.gate_proj", KM_ROLE_SHARED_GATE, S, shared,
	              c->hidden_size));
	KM_TRY(linear(w, "mlp.shared_experts.up_proj", KM_ROLE_SHARED_UP, S, shared,
	              c->hidden_size));
	return linear(w, "mlp.shared_experts.down_proj", KM_ROLE_SHARED_DOWN, S, c->hidden_size,
	              shared);
}

static int layer(struct walk *w, int index)
{
	const km_config *c = w->config;
	const enum km_tensor_class D = KM_CLASS_DENSE_MLP;

	w->layer = index;
	w->stem = (size_t)snprintf(w->key, sizeof(w->key), "layers.%d.", index);
	KM_TRY(vector(w, "input_layernorm", KM_ROLE_INPUT_NORM, c->hidden_size));
	KM_TRY(attention(w));
	KM_TRY(vector(w, "post_attention_layernorm", KM_ROLE_POST_ATTENTION_NORM, c->hidden_size));
	if (km_config_is_moe_layer(c, index))
		return moe(w);
	KM_TRY(linear(w, "mlp.gate_proj", KM_ROLE_GATE, D, c->intermediate_size, c->hidden_size));
	KM_TRY(linear(w, "mlp.up_proj", KM_ROLE_UP, D, c->intermediate_size, c->hidden_size));
	return linear(w, "mlp.down_proj", KM_ROLE_DOWN, D, c->hidden_size, c->intermediate_size);
}

/* ---- the vision tower ----------------------------------------------------------------------- */

static int vision_one(struct walk *w, const char *name, km_module *m)
{
	set_key(w, name);
	m->class = strncmp(w->key, "mm_projector.", 13) ? KM_CLASS_VISION : KM_CLASS_PROJECTOR;
	return emit(w, m);
}

static int vision_norm(struct walk *w, const char *name, int64_t size)
{
	km_module weight = {
		.suffix = "weight", .role = KM_ROLE_VISION_NORM, .ndim = 1, .shape = { size }
	};
	km_module bias = {
		.suffix = "bias", .role = KM_ROLE_VISION_BIAS, .ndim = 1, .shape = { size }
	};

	KM_TRY(vision_one(w, name, &weight));
	return vision_one(w, name, &bias);
}

static int vision_linear(struct walk *w, const char *name, int64_t rows, int64_t cols)
{
	km_module weight = { .suffix = "weight",
		             .role = KM_ROLE_VISION_WEIGHT,
		             .ndim = 2,
		             .shape = { rows, cols } };
	km_module bias = {
		.suffix = "bias", .role = KM_ROLE_VISION_BIAS, .ndim = 1, .shape = { rows }
	};

	KM_TRY(vision_one(w, name, &weight));
	return vision_one(w, name, &bias);
}

static int vision_block(struct walk *w, int index)
{
	const km_vision_config *v = &w->config->vision;

	w->stem =
		(size_t)snprintf(w->key, sizeof(w->key), "vision_tower.encoder.blocks.%d.", index);
	KM_TRY(vision_norm(w, "norm0", v->hidden_size));
	KM_TRY(vision_norm(w, "norm1", v->hidden_size));
	KM_TRY(vision_linear(w, "wqkv", 3 * (int64_t)v->hidden_size, v->hidden_size));
	KM_TRY(vision_linear(w, "wo", v->hidden_size, v->hidden_size));
	KM_TRY(vision_linear(w, "mlp.fc0", v->intermediate_size, v->hidden_size));
	return vision_linear(w, "mlp.fc1", v->hidden_size, v->intermediate_size);
}

static int vision(struct walk *w)
{
	const km_vision_config *v = &w->config->vision;
	int64_t merged =
		(int64_t)v->mm_hidden_size * v->merge_kernel_height * v->merge_kernel_width;
	km_module patch = { .suffix = "weight", .role = KM_ROLE_VISION_WEIGHT, .ndim = 4,
		            .shape = { v->hidden_size, 3, v->patch_size, v->patch_size } };
	km_module patch_bias = { .suffix = "bias", .role = KM_ROLE_VISION_BIAS, .ndim = 1,
		                 .shape = { v->hidden_size } };
	km_module position = { .suffix = "weight",
		               .role = KM_ROLE_VISION_POSITION,
		               .ndim = 3,
		               .shape = { v->init_pos_emb_height, v->init_pos_emb_width,
		                          v->hidden_size } };

	w->layer = -1;
	w->stem = 0;
	KM_TRY(vision_one(w, "vision_tower.patch_embed.proj", &patch));
	KM_TRY(vision_one(w, "vision_tower.patch_embed.proj", &patch_bias));
	KM_TRY(vision_one(w, "vision_tower.patch_embed.pos_emb", &position));
	for (int i = 0; i < v->num_hidden_layers; i++)
		KM_TRY(vision_block(w, i));
	w->stem = 0;
	KM_TRY(vision_norm(w, "vision_tower.encoder.final_layernorm", v->hidden_size));
	KM_TRY(vision_norm(w, "mm_projector.pre_norm", v->mm_hidden_size));
	KM_TRY(vision_linear(w, "mm_projector.proj.0", merged, merged));
	return vision_linear(w, "mm_projector.proj.2", w->config->hidden_size, merged);
}

/* ---- the walk ------------------------------------------------------------------------------- */

static int walk_all(struct walk *w)
{
	const km_config *c = w->config;

	KM_TRY(matrix(w, "embed_tokens", KM_ROLE_EMBED, KM_CLASS_EMBED, c->vocab_size,
	              c->hidden_size));
	for (int i = 0; i < c->num_hidden_layers; i++)
		KM_TRY(layer(w, i));
	w->layer = -1;
	w->stem = 0;
	KM_TRY(vector(w, "norm", KM_ROLE_NORM, c->hidden_size));
	if (!c->tie_word_embeddings)
		KM_TRY(linear(w, "lm_head", KM_ROLE_HEAD, KM_CLASS_HEAD, c->vocab_size,
		              c->hidden_size));
	return c->vision.present ? vision(w) : 0;
}

int km_inventory_visit(const km_config *config, km_module_visit visit, void *context, km_err *err)
{
	struct walk w = { .config = config,
		          .visit = visit,
		          .context = context,
		          .err = err,
		          .layer = -1,
		          .expert = -1 };
	int rc;

	KM_TRY(km_ignore_rules_open(&w.rules, config, err));
	rc = walk_all(&w);
	km_ignore_rules_close(w.rules);
	return rc;
}

/* ---- the tensors of a module ---------------------------------------------------------------- */

enum {
	FLOATS = 1u << KM_F32 | 1u << KM_F16 | 1u << KM_BF16,
};

static km_wanted tensor2(const char *suffix, unsigned dtypes, enum km_dtype usual, int64_t rows,
                         int64_t cols)
{
	return (km_wanted){ suffix, dtypes, usual, 2, { rows, cols } };
}

int km_module_tensors(const km_module *m, const km_config *config,
                      km_wanted wanted[KM_MAX_MODULE_TENSORS])
{
	const km_quant_config *quant = &config->quant;
	int64_t rows = m->shape[0], cols = m->shape[1],
		group = quant->group_size ? quant->group_size : cols;

	switch (m->form) {
	case KM_FORM_PLAIN:
		wanted[0] = (km_wanted){ m->suffix,
			                 FLOATS,
			                 m->role == KM_ROLE_ROUTER_BIAS ? KM_F32 : config->dtype,
			                 m->ndim,
			                 { 0 } };
		memcpy(wanted[0].shape, m->shape, sizeof(m->shape));
		return 1;
	case KM_FORM_FP8:
		wanted[0] = tensor2("weight", 1u << KM_F8_E4M3, KM_F8_E4M3, rows, cols);
		wanted[1] = tensor2("weight_scale_inv", 1u << KM_F32 | 1u << KM_BF16, KM_F32,
		                    (rows + quant->block_rows - 1) / quant->block_rows,
		                    (cols + quant->block_cols - 1) / quant->block_cols);
		return 2;
	case KM_FORM_INT4:
		wanted[0] = tensor2("weight_packed", 1u << KM_I32, KM_I32, rows, cols / 8);
		wanted[1] = tensor2("weight_scale", FLOATS, config->dtype, rows, cols / group);
		wanted[2] = (km_wanted){
			"weight_shape", 1u << KM_I32 | 1u << KM_I64, KM_I32, 1, { 2 }
		};
		return 3;
	case KM_FORM_REPACKED:
		wanted[0] = (km_wanted){ "weight_repacked", 1u << KM_U8, KM_U8, 3,
			                 { rows / KM_MOE_RECORD_ROWS, cols / KM_MOE_RECORD_COLS,
			                   KM_MOE_RECORD_BYTES(group) } };
		return 1;
	case KM_FORM_COUNT:
		break;
	}
	return 0;
}
