/*
 * A model on one GPU: its weights, KV cache and step buffers in one arena of device memory, planned
 * to the byte before anything is taken, and the blocks of a step made of few launches
 * (forward_cuda.c).
 *
 *   | weights | KV cache | rotary table | step buffers | cuBLASLt's workspace |
 *
 * Weights keep the checkpoint's type, but for two: kv_b becomes bf16 (attention on a GPU reads it
 * so), and int4 experts go into the layout of format/moe_layout.h where that holds their shape. An
 * expert's matrices lie one expert after the other. Host memory: the ring of device/cuda_upload.h
 * while loading; a step's logits and its arrays, pinned, afterwards. The checkpoint's files stay
 * mapped, which is page cache.
 *
 * Private to model/. Nothing here is compiled without CUDA but the plan, whose pure half needs no
 * GPU.
 */
#ifndef KM_MODEL_GPU_H
#define KM_MODEL_GPU_H

#include "device/cuda.h"
#include "device/cuda_mla.h"
#include "device/cuda_moe.h"
#include "device/cuda_ops.h"
#include "device/cuda_router.h"
#include "device/moe_tune.h"
#include "model/forward.h"
#include "model/gpu_graphs.h"
#include "model/step_op.h"

typedef struct km_gpu_layer {
	km_layer_weights w;     /* pointers to the device; the expert arrays are NULL */
	km_moe_weights experts; /* of a MoE layer */
} km_gpu_layer;

typedef struct km_gpu_weights {
	km_weight embed, head;
	const float *norm;
	int layers;
	km_gpu_layer *layer; /* owned, host */
} km_gpu_weights;

/* Bytes of device memory that the weights take, from their shapes. */
int64_t km_gpu_weights_bytes(const km_config *config, const km_weights *shapes,
                             int64_t *expert_bytes);
/* Takes them from the arena and fills them, with a progress bar unless `quiet`. */
int km_gpu_weights_load(km_gpu_weights *weights, km_cuda *cuda, const km_config *config,
                        const km_weights *from, const km_model_options *options, km_err *err);
void km_gpu_weights_release(km_gpu_weights *weights);

/* A step's buffers on the device. Rows: max_batch_tokens, rounded as km_linear_rounded has it. */
typedef struct km_gpu_buffers {
	float *stream;         /* [rows, hidden] */
	void *normed;          /* bf16 [rows, hidden] */
	float *kept_stream;    /* [rows, hidden]: the stream after the last layer's cut */
	void *kept_normed;
	float *q_a, *kv_a;   /* [rows, q_lora_rank], [rows, kv_lora_rank + rope] */
	void *q_a_normed;    /* bf16 */
	void *q, *heads_out; /* bf16 [rows, heads, nope + rope], [rows, heads, v] */
	void *latents, *kv; /* bf16 [room, kv_lora_rank + rope], [room, heads, nope + v]: prefill */
	float *mla_state;   /* [rows, heads, v + 2] */
	void *mla_scratch;  /* decode */
	float *gate, *up;   /* [rows, widest MLP] */
	void *act;          /* bf16 */
	float *router;      /* [rows, experts] */
	float *expert_weights; /* [rows, top_k] */
	int32_t *expert_ids;
	int64_t *expert_counts; /* [layers, experts], or NULL: not counted */
	void *router_scratch, *moe_scratch;
	float *head_stream; /* [logit rows, hidden] */
	void *head_normed;
	float *logits;     /* [logit rows, vocab] */
	int32_t *drawn;    /* [logit rows] */
	void *dequantized; /* bf16, the largest weight that needs it */
	char *batch;       /* a step's arrays */
	size_t bytes, logits_bytes, batch_bytes, entries_at; /* entries_at: in batch, to its end */
	int rows, logit_rows, room;
	int pages; /* of a sequence, at most */
} km_gpu_buffers;

/* Lays them out from `base` on; NULL only sizes them. */
void km_gpu_lay_out(km_gpu_buffers *buffers, const km_config *config, const km_weights *shapes,
                    const km_model_options *options, const km_cuda_info *info, void *base);

km_mla_shape km_gpu_mla_shape(const km_config *config, const km_model_options *options);
km_moe_problem km_gpu_moe_problem(const km_config *config, const km_moe_weights *weights,
                                  int tokens, bool pdl);
km_moe_before km_gpu_moe_before(const km_config *config, const km_layer_weights *weights);
km_router_shape km_gpu_router_shape(const km_config *config, bool weights_f32, int tokens);
bool km_gpu_experts_are_packed(const km_config *config, const km_layer_weights *weights);
km_moe_weights km_gpu_experts_shape(const km_config *config, const km_layer_weights *weights);

/* A step's batch: what is read on the device, and the cut of attention into pieces. Its rows are those that
 * attention has: of a step that only generates with padding, of any other without. */
typedef struct km_gpu_batch {
	int tokens, decode_seqs, pages_per_seq, page_size;
	const int32_t *ids, *positions, *slots, *kv_len, *pages; /* device */
	km_mla_prefill_plan prefill;                             /* host arrays, owned */
	const km_mla_run *runs;                                  /* device */
	const km_mla_tile *tiles;
} km_gpu_batch;

typedef struct km_gpu {
	km_cuda *cuda;
	km_cuda_info info;
	km_gpu_weights weights;
	km_gpu_buffers b;
	km_linear_device linear;
	/* Up to so many rows, the router's product is part of the launch of the shared experts' gate
	 * and up; 0: never. */
	int joined_rows;
	km_moe_tuning tuning; /* of the experts' tiles */
	km_err no_blas; /* why cuBLASLt is not there, when it is not */
	char *kv;       /* device, [layers, kv_slots, kv_lora_rank + rope] */
	size_t kv_layer_bytes;
	const float *cos_sin; /* device */
	char *staging;        /* pinned: a step's arrays; one of the two below */
	int64_t launched, finished; /* steps; at most two are under way, and each has its: */
	struct {
		char *staging;
		int32_t *drawn; /* pinned */
		km_cuda_fence *done;
	} under_way[2];
	float *logits;        /* pinned */
	const km_draw *draw;  /* device, [logit rows] */
	float *stream;        /* b.stream, or b.kept_stream from the last layer's cut on */
	void *normed;
	bool pdl;        /* launches may begin in their predecessor's tail */
	bool whole;      /* the last layer keeps every row */
	bool generating; /* the step only generates */
	km_batch step;   /* the step as its blocks see it: with its rows of padding */
	const int32_t *valid; /* device: how many of its rows are no padding; NULL: of too many to pad */
	int longest; /* cached tokens of a decoding sequence that the step is planned for */
	km_gpu_graphs graphs;
	uint32_t left_out; /* bits 1 << enum km_step_op that are not enqueued; 0 but to time the others */
	km_gpu_batch all, kept; /* the step's batch, and what the last layer keeps of it */
	const int32_t *kept_from, *no_slots, *logit_from; /* device */
	double load_seconds;
	int64_t loaded_bytes;
} km_gpu;

#if KM_CUDA
/* What a GPU takes in place of the CPU's numbers; available_bytes: the device's. */
int km_gpu_plan(const km_config *config, const km_model_options *options, km_model_plan *plan,
                km_err *err);
int km_gpu_open(km_model *model, const km_model_plan *plan, km_err *err);
void km_gpu_close(km_gpu *gpu);
int km_gpu_fetch_expert_counts(km_model *model, km_err *err);

/* The experts' tuning file: looked up once, before any weight is read, and said on stderr: which it is, or
 * which part of its name missed. Without options.moe_config_dir there is none. KM_ENOTFOUND without one
 * where options.require_tuned is set. */
int km_gpu_tuning_open(km_gpu *gpu, const km_model *model, int moe_layer, km_err *err);
void km_gpu_explain(const km_model *model, km_buf *out);

extern const km_steps km_gpu_steps;
#endif

#endif
