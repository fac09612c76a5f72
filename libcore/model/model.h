/*
 * The forward pass: a checkpoint, planned memory, and one step at a time.
 *
 * km_model_plan_memory is instant and touches no checkpoint: bytes by class for a shape and
 * options. km_model_open refuses, in under a second and before any weight is read, what does not
 * fit. Weights stay in the files' memory map: they are page cache, and are read at first use; with
 * KM_BACKEND_CUDA they are copied to the GPU at open. One thread drives a model at a time;
 * km_model_forward allocates nothing. On the CPU a row's logits do not depend on what else is in
 * its batch, nor on how its prompt was cut into chunks; on a GPU the number of rows decides between
 * kernels that round differently.
 */
#ifndef KM_MODEL_MODEL_H
#define KM_MODEL_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "device/batch.h"
#include "device/op.h"
#include "model/config.h"
#include "model/step_op.h"

enum km_backend_kind { KM_BACKEND_CPU, KM_BACKEND_CUDA };

typedef struct km_model_options {
	int max_batch_tokens;       /* rows of one step at most */
	int max_seqs, max_logit_rows;
	int max_context;            /* tokens of one sequence at most */
	int64_t kv_slots;           /* tokens that the KV cache holds, a multiple of the page size */
	enum km_kv_dtype kv_dtype;
	int threads;                /* 0: all */
	const char *isa;            /* NULL: the best; see km_cpu_ops */
	enum km_backend_kind backend;
	int gpu;                    /* of KM_BACKEND_CUDA, counted from 0 */
	int page_size;              /* the least that a batch's pages have; 0: 1 */
	bool disable_graphs;        /* of KM_BACKEND_CUDA: launch every step kernel by kernel */
	bool capture_at_open;       /* the graphs of usual steps; else each when its second step comes */
	bool count_experts;         /* of KM_BACKEND_CUDA: what km_model_set_expert_counts needs there */
	const char *moe_config_dir; /* of KM_BACKEND_CUDA: the folder of tuning files, kept; NULL: none */
	bool require_tuned;         /* of KM_BACKEND_CUDA: experts without a tuning file are refused */
	bool quiet;                 /* no progress on stderr */
	/* The norms of q_a and kv_a take rms_norm_eps, as the serving engines do. Transformers
	 * takes its class default 1e-6 there whatever the config says; this does the same, for
	 * comparison. */
	bool hf_lora_norm_eps;
} km_model_options;

typedef struct km_model_plan {
	int64_t weight_bytes; /* of the text model, on disk and mapped */
	int64_t expert_bytes; /* of these, the routed experts' */
	int64_t kv_bytes, kv_bytes_per_token, scratch_bytes, logits_bytes, rope_bytes;
	int64_t fixed_bytes;     /* a GPU's, beside these: cuBLASLt's workspace, alignment */
	int64_t available_bytes; /* the host's or the GPU's memory that could be taken now; -1: not known */
} km_model_plan;

/* Where a step's time goes: for each of its ops the calls, the time, and the cost by km_op_cost. On the CPU
 * only. */
typedef struct km_model_trace {
	struct km_op_total {
		int64_t calls, ns;
		double bytes, flops;
	} op[KM_STEP_COUNT];
} km_model_trace;

typedef struct km_model km_model;

/* kv_slots may be 0 here: the plan then says what the rest takes. KM_EINVAL: options out of range.
 * */
int km_model_plan_memory(const km_config *config, const km_model_options *options,
                         km_model_plan *plan, km_err *err);
/* KM_ENOMEM, with a sentence about `dir`, when the plan takes more than is available. */
int km_model_plan_fits(const km_model_plan *plan, const char *dir, km_err *err);
int km_model_open(km_model **model, const char *dir, const km_model_options *options, km_err *err);

/* A model without a checkpoint, to be measured: the config at `path` (a file, or a folder with
 * config.json) with random weights. */
typedef struct km_model_random {
	int layers;   /* the first ones; 0: all */
	int shard_of; /* ranks, of whose weights this is one's slice (model/shard.h); 1: all of them */
	uint64_t seed;
} km_model_random;

int km_model_open_random(km_model **model, const char *path, const km_model_random *what,
                         const km_model_options *options, km_err *err);
/* What that makes of the config; the model's own layers are `depth`. */
int km_model_random_config(km_config *config, const char *path, const km_model_random *what, int *depth,
                           km_err *err);
void km_model_close(km_model *model);

const km_config *km_model_config(const km_model *model);

/* logits [batch->logit_rows, vocab_size]; borrowed until the next call. KM_EINVAL names what is
 * wrong with a batch; nothing was computed then. */
int km_model_forward(km_model *model, const km_batch *batch, const float **logits, km_err *err);

/*
 * The same in two halves, for models that draw. A second step may be launched, with from_drawn,
 * before the first is finished; they are finished in order. Rows that the device refuses to draw
 * from while the next step is under way have no logits. The batch is kept until it is finished.
 */
int km_model_launch(km_model *model, const km_batch *batch, km_err *err);
int km_model_finish(km_model *model, const km_batch *batch, const float **logits, km_err *err);

/* Whether km_model_forward draws tokens where a batch has `draw`. */
bool km_model_draws(const km_model *model);

/* Adds each later step's ops to `trace` (kept; NULL: no more). On the CPU only. */
void km_model_set_trace(km_model *model, km_model_trace *trace);

/* Adds the experts that each later step's rows choose to counts [layers, experts] (kept; NULL: no
 * more). On a GPU they stay there until they are fetched. */
void km_model_set_expert_counts(km_model *model, int64_t *counts);
int km_model_fetch_expert_counts(km_model *model, km_err *err);

/* Every kernel choice in words, one per line, into a km_buf. */
void km_model_explain(const km_model *model, km_buf *out);

#endif
