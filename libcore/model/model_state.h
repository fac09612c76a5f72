/*
 * What a km_model is made of: shared by the files that open it (model.c) and step it (forward.c),
 * by nobody else.
 *
 * A step's buffers lie in one block, planned at open. The three phases of a step never live at the same
 * time and share one region:
 *
 *   | hidden | normed | delta | phase .................................................| logits |
 *                              A attention: q_a q_a_normed kv_a latent q heads_out op_scratch
 *                              B mlp:       gate up act router expert_weights expert_ids op_scratch
 *                              C head:      head_hidden head_delta head_normed
 */
#ifndef KM_MODEL_MODEL_STATE_H
#define KM_MODEL_MODEL_STATE_H

#include "model/model.h"
#include "model/weights.h"

typedef struct km_step_buffers {
	float *hidden; /* [tokens, hidden_size], the residual stream */
	float *normed; /* [tokens, hidden_size] */
	float *delta;  /* [tokens, hidden_size], what a block adds to the stream */
	/* A */
	float *q_a, *q_a_normed; /* [tokens, q_lora_rank] */
	float *kv_a;             /* [tokens, kv_lora_rank + rope] */
	float *latent;           /* [tokens, kv_lora_rank] */
	float *q;                /* [tokens, heads, nope + rope] */
	float *heads_out;        /* [tokens, heads, v] */
	void *mla_scratch;
	/* B */
	float *gate, *up, *act;  /* [tokens, widest MLP] */
	float *router;           /* [tokens, experts] */
	float *expert_weights;   /* [tokens, top_k] */
	int32_t *expert_ids;     /* [tokens, top_k] */
	void *moe_scratch;
	/* C */
	float *head_hidden, *head_delta, *head_normed; /* [logit_rows, hidden_size] */

	float *logits; /* [logit_rows, vocab_size] */
	size_t bytes, logits_bytes; /* of all, of logits */
} km_step_buffers;

/* The rows that the last layer keeps of a batch, host memory. */
typedef struct km_kept {
	int32_t *row;       /* [tokens], where a row goes, or -1 */
	int32_t *from;      /* [kept rows], where a row came from */
	int32_t *positions; /* [kept rows] */
	int32_t *start;     /* [seqs + 1] */
	km_batch batch;     /* what the kept rows make */
} km_kept;

struct km_model {
	km_config config;
	km_weights weights;
	km_model_options options; /* isa and threads resolved */
	const struct km_steps *steps; /* the backend's */
	km_kept kept;
	struct km_gpu *gpu; /* model/gpu.h's; NULL on the CPU, whose what follows is */
	const km_ops *ops;
	int caller_threads;
	km_step_buffers step;
	void *block;     /* the step buffers, mapped */
	void *kv;        /* [layers, kv_slots, kv_lora_rank + rope] of kv_dtype, mapped */
	size_t kv_layer_bytes;
	float *cos_sin;  /* [max_context, rope], mapped */
	size_t cos_sin_bytes;
	km_model_trace *trace;
	int64_t *expert_counts; /* [layers, experts] or NULL; the caller's */
};

/* Lays a step's buffers out from `block` on; NULL only sizes them. */
void km_step_lay_out(km_step_buffers *step, const km_config *config, const km_model_options *options,
                     void *block);

static inline int km_config_kv_width(const km_config *config)
{
	return config->kv_lora_rank + config->qk_rope_head_dim;
}

static inline int km_config_q_width(const km_config *config)
{
	return config->num_attention_heads * (config->qk_nope_head_dim + config->qk_rope_head_dim);
}

static inline int km_config_heads_out_width(const km_config *config)
{
	return config->num_attention_heads * config->v_head_dim;
}

int km_config_widest_mlp(const km_config *config); /* of dense layers and of shared experts */

static inline size_t km_kv_dtype_bytes(enum km_kv_dtype dtype)
{
	return dtype == KM_KV_F32 ? 4 : dtype == KM_KV_BF16 ? 2 : 1;
}

/* The shapes alone, as the scratch sizes want them. */
km_mla_args km_model_mla_args(const km_config *config, const km_model_options *options);
km_moe_args km_model_moe_args(const km_config *config);

#endif
