/*
 * Reading config.json.
 *
 * Three things decide how it is read. K2.5 is a wrapper: its text fields are under `text_config`,
 * and no text field at the top counts then, except those that Hugging Face keeps at both places
 * (token ids, tie_word_embeddings). The quantisation is looked for at the top first, then in
 * text_config, and hf_quant_config.json counts only when neither has it: an old block that was left
 * in text_config loses against a new one at the top. A field is required unless the model's own
 * code (DeepseekV3 remote code and transformers' native port) has a default that checkpoints rely
 * on; the defaults are the third argument of each `_or` call.
 *
 * transformers 5 writes `rope_parameters` where the published files have `rope_scaling` and
 * `rope_theta`; both are read.
 */
#include "model/config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/fixed_math.h"
#include "base/mem.h"
#include "format/moe_layout.h"
#include "model/config_quant.h"

enum {
	MAX_FILE = 16 << 20, /* real ones have 2 to 120 kB (long ignore lists) */
	MAX_DIM = 1 << 20,
	MAX_LAYERS = 4096,
	MAX_EXPERTS = 1 << 16,
	MAX_ALL_EXPERTS = 1 << 20, /* of all layers; K2.5 has 23,040 */
	MAX_VOCAB = 1 << 24,
	MAX_POSITIONS = 1 << 28,
};

static const char *const kind_names[] = {
	[KM_KIND_DEEPSEEK_V3] = "deepseek_v3",
	[KM_KIND_KIMI_K2] = "kimi_k2",
	[KM_KIND_KIMI_K25] = "kimi_k25",
};

const char *km_model_kind_name(enum km_model_kind kind)
{
	return kind_names[kind];
}

bool km_config_is_moe_layer(const km_config *config, int layer)
{
	return config->n_routed_experts > 0 && layer >= config->first_k_dense_replace &&
	       layer % config->moe_layer_freq == 0;
}

double km_config_softmax_scale(const km_config *config)
{
	const km_rope_config *rope = &config->rope;
	double scale = 1.0 / sqrt((double)(config->qk_nope_head_dim + config->qk_rope_head_dim));
	double mscale = 1;

	if (rope->yarn && rope->factor > 1)
		mscale = 0.1 * rope->mscale_all_dim * km_fixed_log(rope->factor) + 1;
	return scale * mscale * mscale;
}

static void want_string(km_fields *f, const char *key, const char *want)
{
	const char *found = km_field_string_or(f, key, want);

	if (found && strcmp(found, want) != 0)
		km_field_fail(f, KM_EUNSUPPORTED, key, "only \"%s\" is supported, not \"%s\"", want,
		              found);
}

static void read_kind(km_config *config, km_fields *top)
{
	const char *type = km_field_string(top, "model_type");
	json_t *names = km_field_array_or_null(top, "architectures");
	const char *name = json_string_value(json_array_get(names, 0));

	if (!type)
		return;
	for (size_t i = 0; i < sizeof(kind_names) / sizeof(*kind_names); i++) {
		const char *expected = i == KM_KIND_KIMI_K25 ? "KimiK25ForConditionalGeneration"
		                                             : "DeepseekV3ForCausalLM";

		if (strcmp(type, kind_names[i]) != 0)
			continue;
		config->kind = (enum km_model_kind)i;
		if (name && strcmp(name, expected) != 0)
			km_field_fail(top, KM_EUNSUPPORTED, "architectures",
			              "a %s model is supported as %s, not as %s", type, expected,
			              name);
		config->architecture = km_xstrdup(name ? name : expected);
		return;
	}
	km_field_fail(top, KM_EUNSUPPORTED, "model_type",
	              "\"%s\" is not supported, only deepseek_v3, kimi_k2 and kimi_k25", type);
}

static void read_attention(km_config *config, km_fields *f)
{
	config->num_attention_heads = (int)km_field_int(f, "num_attention_heads", 1, 1 << 16);
	if (!json_object_get(f->object, "q_lora_rank"))
		km_field_fail(f, KM_EFORMAT, "q_lora_rank",
		              "this field is missing (null means none)");
	config->q_lora_rank = (int)km_field_int_or(f, "q_lora_rank", 0, 1, MAX_DIM);
	config->kv_lora_rank = (int)km_field_int(f, "kv_lora_rank", 1, MAX_DIM);
	config->qk_nope_head_dim = (int)km_field_int(f, "qk_nope_head_dim", 1, 1 << 16);
	config->qk_rope_head_dim = (int)km_field_int(f, "qk_rope_head_dim", 2, 1 << 16);
	config->v_head_dim = (int)km_field_int(f, "v_head_dim", 1, 1 << 16);
	if (config->qk_rope_head_dim % 2)
		km_field_fail(f, KM_EFORMAT, "qk_rope_head_dim",
		              "an even number is expected, this is %d", config->qk_rope_head_dim);
	config->attention_bias = km_field_bool_or(f, "attention_bias", false);
	if (config->attention_bias)
		km_field_fail(f, KM_EUNSUPPORTED, "attention_bias",
		              "biases in attention are not supported");
	if (!km_field_bool_or(f, "rope_interleave", true))
		km_field_fail(
			f, KM_EUNSUPPORTED, "rope_interleave",
			"weights in rotate-half order are not supported, only interleaved ones");
}

static void read_experts(km_config *config, km_fields *f)
{
	const char *scoring;

	config->first_k_dense_replace =
		(int)km_field_int(f, "first_k_dense_replace", 0, MAX_LAYERS);
	config->moe_layer_freq = (int)km_field_int_or(f, "moe_layer_freq", 1, 1, MAX_LAYERS);
	config->n_routed_experts = (int)km_field_int_or(f, "n_routed_experts", 0, 0, MAX_EXPERTS);
	if (!config->n_routed_experts)
		return; /* dense throughout: DeepseekV3's own code allows null */
	config->moe_intermediate_size = (int)km_field_int(f, "moe_intermediate_size", 1, MAX_DIM);
	config->n_shared_experts = (int)km_field_int_or(f, "n_shared_experts", 0, 0, 256);
	config->num_experts_per_tok =
		(int)km_field_int(f, "num_experts_per_tok", 1, config->n_routed_experts);
	config->n_group = (int)km_field_int(f, "n_group", 1, config->n_routed_experts);
	config->topk_group = (int)km_field_int(f, "topk_group", 1, config->n_group);
	config->norm_topk_prob = km_field_bool_or(f, "norm_topk_prob", true);
	config->routed_scaling_factor = km_field_number(f, "routed_scaling_factor", 1e-6, 1e6);
	want_string(f, "topk_method", "noaux_tc");
	scoring = km_field_string_or(f, "scoring_func", "sigmoid");
	config->scoring_softmax = scoring && !strcmp(scoring, "softmax");
	if (scoring && !config->scoring_softmax && strcmp(scoring, "sigmoid") != 0)
		km_field_fail(f, KM_EUNSUPPORTED, "scoring_func",
		              "only \"sigmoid\" and \"softmax\" are supported, not \"%s\"",
		              scoring);
	if (f->rc < 0)
		return;
	if ((int64_t)config->n_routed_experts * config->num_hidden_layers > MAX_ALL_EXPERTS)
		km_field_fail(f, KM_ELIMIT, "n_routed_experts",
		              "%d experts in %d layers are more than the %d supported",
		              config->n_routed_experts, config->num_hidden_layers, MAX_ALL_EXPERTS);
	else if (config->n_routed_experts % config->n_group)
		km_field_fail(f, KM_EFORMAT, "n_group", "%d experts cannot be split in %d groups",
		              config->n_routed_experts, config->n_group);
	else if (config->num_experts_per_tok >
	         config->n_routed_experts / config->n_group * config->topk_group)
		km_field_fail(f, KM_EFORMAT, "num_experts_per_tok",
		              "%d experts cannot come from %d of %d groups",
		              config->num_experts_per_tok, config->topk_group, config->n_group);
}

static void read_yarn(km_rope_config *rope, km_fields *r)
{
	rope->yarn = true;
	rope->factor = km_field_number(r, "factor", 1, 1e6);
	rope->original_max_position_embeddings =
	        (int)km_field_int(r, "original_max_position_embeddings", 1, MAX_POSITIONS);
	rope->beta_fast = km_field_number_or(r, "beta_fast", 32, 1e-3, 1e6);
	rope->beta_slow = km_field_number_or(r, "beta_slow", 1, 1e-3, 1e6);
	rope->mscale = km_field_number_or(r, "mscale", 1, 0, 100);
	rope->mscale_all_dim = km_field_number_or(r, "mscale_all_dim", 0, 0, 100);
	if (km_field_has(r, "attention_factor"))
		km_field_fail(r, KM_EUNSUPPORTED, "attention_factor",
		              "a fixed attention factor is not supported");
	if (!km_field_bool_or(r, "truncate", true))
		km_field_fail(r, KM_EUNSUPPORTED, "truncate",
		              "YaRN without truncation is not supported");
}

static void read_rope(km_config *config, km_fields *f)
{
	bool new_form = km_field_has(f, "rope_parameters");
	const char *key = new_form ? "rope_parameters" : "rope_scaling";
	km_fields r = { f->name, key, km_field_object_or_null(f, key), f->err, 0 };
	char prefix[64];
	const char *type;

	snprintf(prefix, sizeof(prefix), "%s%s.", f->prefix, key);
	r.prefix = prefix;
	r.rc = f->rc;
	config->rope.factor = 1;
	if (r.object && km_field_has(&r, "rope_theta"))
		config->rope.theta = km_field_number(&r, "rope_theta", 1, 1e12);
	else
		config->rope.theta = km_field_number(f, "rope_theta", 1, 1e12);
	if (r.rc >= 0)
		r.rc = f->rc;
	if (r.object) {
		type = km_field_string_or(&r, "rope_type", NULL);
		if (!type)
			type = km_field_string(&r, "type");
		if (type && !strcmp(type, "yarn"))
			read_yarn(&config->rope, &r);
		else if (type && strcmp(type, "default") != 0)
			km_field_fail(&r, KM_EUNSUPPORTED, "type",
			              "rope type \"%s\" is not supported, only \"yarn\"", type);
	}
	f->rc = r.rc;
}

static enum km_dtype read_dtype(km_fields *f)
{
	const char *key = km_field_has(f, "dtype") ? "dtype" : "torch_dtype";
	const char *name = km_field_string_or(f, key, "float32");

	if (name && !strcmp(name, "bfloat16"))
		return KM_BF16;
	if (name && !strcmp(name, "float16"))
		return KM_F16;
	if (name && strcmp(name, "float32") != 0)
		km_field_fail(f, KM_EUNSUPPORTED, key,
		              "only bfloat16, float16 and float32 are supported, not \"%s\"", name);
	return KM_F32;
}

static void read_text(km_config *config, km_fields *f)
{
	want_string(f, "hidden_act", "silu");
	config->hidden_size = (int)km_field_int(f, "hidden_size", 1, MAX_DIM);
	config->num_hidden_layers = (int)km_field_int(f, "num_hidden_layers", 1, MAX_LAYERS);
	config->intermediate_size = (int)km_field_int(f, "intermediate_size", 1, MAX_DIM);
	config->vocab_size = (int)km_field_int(f, "vocab_size", 1, MAX_VOCAB);
	config->max_position_embeddings =
		(int)km_field_int(f, "max_position_embeddings", 1, MAX_POSITIONS);
	config->num_nextn_predict_layers =
		(int)km_field_int_or(f, "num_nextn_predict_layers", 0, 0, 64);
	config->rms_norm_eps = km_field_number(f, "rms_norm_eps", 1e-12, 1);
	read_attention(config, f);
	read_experts(config, f);
	read_rope(config, f);
	config->dtype = read_dtype(f);
}

/* The published files call them vt_hidden_size and so on; one loader's own class drops the prefix.
 */
static int vision_int(km_fields *f, const char *vt_key, int max)
{
	return (int)km_field_int(f, km_field_has(f, vt_key) ? vt_key : vt_key + 3, 1, max);
}

static void read_merge_kernel(km_vision_config *vision, km_fields *f)
{
	json_t *value = json_object_get(f->object, "merge_kernel_size");
	json_int_t height, width;

	if (json_is_array(value) && json_array_size(value) == 2) {
		height = json_integer_value(json_array_get(value, 0));
		width = json_integer_value(json_array_get(value, 1));
	} else {
		height = width = json_integer_value(value);
	}
	if (height < 1 || width < 1 || height > 64 || width > 64)
		km_field_fail(f, KM_EFORMAT, "merge_kernel_size",
		              "two integers from 1 to 64 are expected");
	vision->merge_kernel_height = (int)height;
	vision->merge_kernel_width = (int)width;
}

static void read_vision(km_config *config, km_fields *f)
{
	km_vision_config *vision = &config->vision;

	vision->present = true;
	vision->patch_size = (int)km_field_int(f, "patch_size", 1, 1024);
	vision->init_pos_emb_height = (int)km_field_int(f, "init_pos_emb_height", 1, 4096);
	vision->init_pos_emb_width = (int)km_field_int(f, "init_pos_emb_width", 1, 4096);
	vision->init_pos_emb_time = (int)km_field_int_or(f, "init_pos_emb_time", 1, 1, 4096);
	vision->hidden_size = vision_int(f, "vt_hidden_size", MAX_DIM);
	vision->num_hidden_layers = vision_int(f, "vt_num_hidden_layers", MAX_LAYERS);
	vision->num_attention_heads = vision_int(f, "vt_num_attention_heads", MAX_DIM);
	vision->intermediate_size = vision_int(f, "vt_intermediate_size", MAX_DIM);
	vision->mm_hidden_size =
		(int)km_field_int_or(f, "mm_hidden_size", vision->hidden_size, 1, MAX_DIM);
	read_merge_kernel(vision, f);
	want_string(f, "mm_projector_type", "patchmerger");
	want_string(f, "merge_type", "sd2_tpool");
	want_string(f, "pos_emb_type", "divided_fixed");
	if (f->rc >= 0 && vision->hidden_size % vision->num_attention_heads)
		km_field_fail(f, KM_EFORMAT, "vt_num_attention_heads",
		              "%d does not divide vt_hidden_size %d", vision->num_attention_heads,
		              vision->hidden_size);
	if (km_field_int_or(f, "text_hidden_size", config->hidden_size, 1, MAX_DIM) !=
	    config->hidden_size)
		km_field_fail(f, KM_EFORMAT, "text_hidden_size",
		              "it differs from the text model's hidden_size %d",
		              config->hidden_size);
}

static void add_eos(km_config *config, km_fields *f, const json_t *value)
{
	json_int_t id = json_integer_value(value);

	if (!json_is_integer(value) || id < 0 || id > INT32_MAX) {
		km_field_fail(f, KM_EFORMAT, "eos_token_id",
		              "a token id or a list of them is expected");
		return;
	}
	for (int i = 0; i < config->eos_count; i++)
		if (config->eos[i] == id)
			return;
	if (config->eos_count == KM_MAX_EOS)
		km_field_fail(f, KM_ELIMIT, "eos_token_id", "there are more than %d end tokens",
		              KM_MAX_EOS);
	else
		config->eos[config->eos_count++] = (int)id;
}

static void read_eos(km_config *config, km_fields *f)
{
	json_t *value = json_object_get(f->object, "eos_token_id");

	if (!km_field_has(f, "eos_token_id"))
		return;
	if (!json_is_array(value))
		add_eos(config, f, value);
	for (size_t i = 0; i < json_array_size(value); i++)
		add_eos(config, f, json_array_get(value, i));
}

static int either_id(km_fields *top, km_fields *text, const char *key)
{
	int64_t id = km_field_int_or(top, key, -1, -1, INT32_MAX);

	return (int)(id >= 0 ? id : km_field_int_or(text, key, -1, -1, INT32_MAX));
}

static void read_tokens(km_config *config, km_fields *top, km_fields *text)
{
	read_eos(config, top);
	if (text->object != top->object)
		read_eos(config, text);
	config->bos_token_id = either_id(top, text, "bos_token_id");
	config->pad_token_id = either_id(top, text, "pad_token_id");
	config->media_placeholder_token_id = either_id(top, text, "media_placeholder_token_id");
	config->tie_word_embeddings = km_field_bool_or(
	        text, "tie_word_embeddings", km_field_bool_or(top, "tie_word_embeddings", false));
}

static int read_quant(km_config *config, km_fields *top, km_fields *text)
{
	json_t *object = km_field_object_or_null(top, "quantization_config");
	km_fields q = { top->name, "quantization_config.", NULL, top->err, 0 };

	if (!object)
		object = km_field_object_or_null(text, "quantization_config");
	KM_TRY(top->rc);
	KM_TRY(text->rc);
	if (object) {
		q.object = object;
		km_quant_config_read(&config->quant, &q);
	}
	return q.rc;
}

static int read_layout(km_config *config, km_fields *top)
{
	km_fields r = { top->name, "kimi_repacked.", km_field_object_or_null(top, "kimi_repacked"),
		        top->err, top->rc };
	const char *layout;

	if (!r.object)
		return r.rc;
	layout = km_field_string(&r, "layout");
	if (layout && strcmp(layout, KM_EXPERT_LAYOUT) != 0)
		km_field_fail(&r, KM_EUNSUPPORTED, "layout",
		              "only \"%s\" is supported, not \"%.64s\"", KM_EXPERT_LAYOUT, layout);
	config->expert_layout = (int)km_field_int(&r, "version", 1, INT32_MAX);
	if (r.rc >= 0 && config->expert_layout != KM_MOE_LAYOUT_VERSION)
		km_field_fail(&r, KM_EUNSUPPORTED, "version",
		              "this program reads version %d of the experts' layout, this is %d: "
		              "unpack it with the kimi-convert that made it",
		              KM_MOE_LAYOUT_VERSION, config->expert_layout);
	if (r.rc >= 0 && config->quant.method != KM_QUANT_INT4_PACKED)
		km_field_fail(&r, KM_EFORMAT, "layout",
		              "it is of int4 experts, and quantization_config "
		              "makes none");
	KM_TRY(r.rc);
	return km_moe_layout_check(config->hidden_size, config->moe_intermediate_size,
	                           config->quant.group_size, top->err) < 0
	               ? km_fail_within(top->err, "%s", top->name) : 0;
}

static int read_all(km_config *config, json_t *doc, const char *name, km_err *err)
{
	km_fields top = { name, "", doc, err, 0 };
	km_fields text = { name, "text_config.", km_field_object_or_null(&top, "text_config"), err,
		           0 };
	km_fields vision = { name, "vision_config.", km_field_object_or_null(&top, "vision_config"),
		             err, 0 };

	read_kind(config, &top);
	if (config->kind == KM_KIND_KIMI_K25 && !text.object)
		km_field_fail(&top, KM_EFORMAT, "text_config", "this field is missing");
	if (!text.object) {
		text.object = doc;
		text.prefix = "";
	} else if (top.rc >= 0) {
		const char *type = km_field_string_or(&text, "model_type", "kimi_k2");

		if (type && strcmp(type, "kimi_k2") != 0 && strcmp(type, "deepseek_v3") != 0)
			km_field_fail(&text, KM_EUNSUPPORTED, "model_type",
			              "\"%s\" is not supported, only kimi_k2 and deepseek_v3",
			              type);
	}
	KM_TRY(top.rc);
	read_text(config, &text);
	read_tokens(config, &top, &text);
	KM_TRY(text.rc);
	KM_TRY(top.rc);
	if (vision.object)
		read_vision(config, &vision);
	KM_TRY(vision.rc);
	KM_TRY(read_quant(config, &top, &text));
	return read_layout(config, &top);
}

static int parse_into(km_config *config, const char *text, size_t len, const char *name,
                      km_err *err)
{
	json_t *doc = km_json_parse_object(text, len, name, err);
	int rc;

	if (!doc)
		return KM_EFORMAT;
	rc = read_all(config, doc, name, err);
	json_decref(doc);
	return rc;
}

int km_config_parse(km_config *config, const char *json, size_t len, const char *name, km_err *err)
{
	int rc;

	*config = (km_config){ .bos_token_id = -1 };
	rc = parse_into(config, json, len, name, err);
	if (rc < 0)
		km_config_release(config);
	return rc;
}

/* A file beside config.json that may be missing: `use` reads it. */
static int with_neighbour(km_config *config, const char *dir, const char *name,
                          void (*use)(km_config *, km_fields *), km_err *err)
{
	char *path = km_xasprintf("%s/%s", dir, name), *text = NULL;
	km_fields f = { path, "", NULL, err, 0 };
	size_t len = 0;
	int rc = km_read_file(path, MAX_FILE, &text, &len, err);

	if (rc >= 0) {
		f.object = km_json_parse_object(text, len, path, err);
		f.rc = f.object ? 0 : KM_EFORMAT;
		if (f.object)
			use(config, &f);
		json_decref(f.object);
	}
	free(text);
	free(path);
	return rc == KM_ENOTFOUND ? 0 : rc < 0 ? rc : f.rc;
}

static void use_hf_quant(km_config *config, km_fields *f)
{
	(void)config;
	km_quant_refuse_modelopt(f);
}

static int load_dir(km_config *config, const char *dir, km_err *err)
{
	char *path = km_xasprintf("%s/config.json", dir), *text = NULL;
	size_t len;
	int rc = km_read_file(path, MAX_FILE, &text, &len, err);

	if (rc >= 0)
		rc = parse_into(config, text, len, path, err);
	free(text);
	free(path);
	KM_TRY(rc);
	KM_TRY(with_neighbour(config, dir, "generation_config.json", read_eos, err));
	if (config->quant.method == KM_QUANT_NONE)
		KM_TRY(with_neighbour(config, dir, "hf_quant_config.json", use_hf_quant, err));
	return 0;
}

int km_config_load(km_config *config, const char *path, km_err *err)
{
	struct stat st;
	char *text = NULL;
	size_t len;
	int rc;

	*config = (km_config){ .bos_token_id = -1 };
	if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) {
		rc = load_dir(config, path, err);
	} else {
		rc = km_read_file(path, MAX_FILE, &text, &len, err);
		if (rc >= 0)
			rc = parse_into(config, text, len, path, err);
		free(text);
	}
	if (rc < 0)
		km_config_release(config);
	return rc;
}

void km_config_release(km_config *config)
{
	free(config->architecture);
	config->architecture = NULL;
	km_quant_config_release(&config->quant);
}
