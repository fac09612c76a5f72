/*
 * A model's shape, from config.json: Kimi K2, K2-Thinking, K2.5 and DeepSeek-V3-like models.
 *
 * Every text field is read through `text_config` when there is one, the quantisation too. Nothing
 * is assumed: a missing field that has no default in the model's own code is an error naming it,
 * and a value that this program cannot compute with (another activation, a rope type that is not
 * YaRN) is refused by name. Plain data after loading; any thread may read it.
 */
#ifndef KM_MODEL_CONFIG_H
#define KM_MODEL_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "format/dtype.h"

enum km_model_kind {
	KM_KIND_DEEPSEEK_V3, /* model_type deepseek_v3 */
	KM_KIND_KIMI_K2,     /* kimi_k2: K2-Instruct and K2-Thinking */
	KM_KIND_KIMI_K25,    /* kimi_k25: the wrapper with a vision tower */
};

enum km_quant_method { KM_QUANT_NONE, KM_QUANT_FP8_BLOCK, KM_QUANT_INT4_PACKED };

typedef struct km_quant_config {
	enum km_quant_method method;
	int group_size;             /* int4: columns per scale; 0: per channel */
	int block_rows, block_cols; /* fp8 */
	int ignore_count;
	char **ignore;              /* owned: names, or "re:" and a regular expression */
} km_quant_config;

typedef struct km_rope_config {
	double theta;
	bool yarn;
	double factor, beta_fast, beta_slow, mscale, mscale_all_dim;
	int original_max_position_embeddings;
} km_rope_config;

typedef struct km_vision_config {
	bool present;
	int patch_size, init_pos_emb_height, init_pos_emb_width, init_pos_emb_time;
	int hidden_size, num_hidden_layers, num_attention_heads, intermediate_size;
	int merge_kernel_height, merge_kernel_width, mm_hidden_size;
} km_vision_config;

enum { KM_MAX_EOS = 8 };

/* What config.json says under "kimi_repacked" of a checkpoint whose routed experts are in the
 * layout of format/moe_layout.h. */
#define KM_EXPERT_LAYOUT "kimi-int4-moe"

typedef struct km_config {
	enum km_model_kind kind;
	char *architecture; /* owned: "DeepseekV3ForCausalLM" */
	int hidden_size, num_hidden_layers, first_k_dense_replace, moe_layer_freq;
	int intermediate_size, moe_intermediate_size;
	int n_routed_experts, n_shared_experts, num_experts_per_tok, n_group, topk_group;
	bool norm_topk_prob, scoring_softmax;
	double routed_scaling_factor;
	int num_attention_heads, q_lora_rank /* 0: q_proj instead */, kv_lora_rank;
	int qk_nope_head_dim, qk_rope_head_dim, v_head_dim;
	int vocab_size, max_position_embeddings, num_nextn_predict_layers;
	bool tie_word_embeddings, attention_bias;
	double rms_norm_eps;
	km_rope_config rope;
	km_quant_config quant;
	/* the version of KM_EXPERT_LAYOUT; 0: the checkpoint's own packing */
	int expert_layout;
	km_vision_config vision;
	enum km_dtype dtype;      /* of unquantised weights */
	int eos_count;
	int eos[KM_MAX_EOS];      /* config.json's and generation_config.json's, together */
	int bos_token_id, pad_token_id, media_placeholder_token_id; /* -1: none */
} km_config;

int km_config_load(km_config *config, const char *path,
                   km_err *err); /* a file, or a folder with config.json */
int km_config_parse(km_config *config, const char *json, size_t len, const char *name, km_err *err);
void km_config_release(km_config *config);

const char *km_model_kind_name(enum km_model_kind kind);
bool km_config_is_moe_layer(const km_config *config, int layer);
double km_config_softmax_scale(const km_config *config); /* (nope + rope)^-1/2 * mscale² */

#endif
