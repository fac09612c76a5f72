/*
 * The engine: requests in, tokens out. Two nouns: a km_engine owns one model, its KV pages and one
 * thread that schedules; a km_request is one prompt with n >= 1 samples.
 *
 * Continuous batching, chunked prefill, prefix reuse. The callback runs on the engine's thread and
 * must not block: it hands the event on (bounded queue, wake-up) and returns. Events of one sample
 * come in order; the last has `finish` set. After km_engine_cancel no more events come once the
 * final one (KM_FINISH_ABORT) has; the request's pages are free before that event is sent.
 */
#ifndef KM_ENGINE_ENGINE_H
#define KM_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "engine/sampler.h"
#include "model/model.h"
#include "text/tokenizer.h"

enum km_finish {
	KM_FINISH_NONE, KM_FINISH_STOP, KM_FINISH_LENGTH, KM_FINISH_ABORT, KM_FINISH_ERROR,
};

typedef struct km_event {
	int sample;          /* 0..n-1 */
	int32_t id;          /* the token, or -1 for an event without one */
	/* Bytes that became visible: the token's own, after those of earlier tokens that were
	 * withheld because they might have begun a stop string. May cut a UTF-8 character. A
	 * marker (an added token such as a tool-call marker) comes with its own name alone: what
	 * was withheld before it is sent first, in an event without an id, so stop strings do not
	 * match across a marker's edge. A token that ends the text is named, but its own bytes are
	 * not shown. */
	const char *text;
	size_t text_len;
	float logprob;       /* when asked for; the model's: temperature 1, no penalties */
	const km_logprob *top; /* [top_count], best first */
	int top_count;
	enum km_finish finish; /* KM_FINISH_NONE: more to come */
	const char *matched_stop; /* a stop string that ended it, or NULL */
	int32_t matched_id;       /* a stop id that ended it, or -1 */
	const char *error;        /* with KM_FINISH_ERROR: the sentence */
} km_event;

/* One prompt token's log-probability given those before it; `top` as in km_event. Position 0 has
 * none. */
typedef struct km_prompt_logprob {
	int position;
	int32_t id;
	float logprob;
	const km_logprob *top;
	int top_count;
} km_prompt_logprob;

typedef struct km_request_options {
	const int32_t *prompt; /* [prompt_len], borrowed by submit */
	int prompt_len;
	int n;
	int max_tokens;        /* 0 with prompt_logprobs: only the prompt is scored */
	km_sampling sampling;
	const char *const *stop; /* [stop_count] strings, borrowed by submit */
	int stop_count;
	const int32_t *stop_ids; /* beside the model's end-of-sequence ids */
	int stop_id_count;
	bool ignore_eos;
	int logprobs;          /* < 0: none; else how many alternatives, 0..KM_MAX_LOGPROBS */
	bool prompt_logprobs;  /* report the prompt's, with `logprobs` alternatives */
	void (*on_event)(void *ctx, const km_event *event);
	void (*on_prompt_logprob)(void *ctx, const km_prompt_logprob *logprob);
	void *ctx;
} km_request_options;

/*
 * Deterministic: a request's tokens depend on nothing but the request, whatever runs beside it and
 * however prompts are cut or found in the cache. Sums in a row do not depend on the batch in any
 * mode; what this adds is that KV which another request may read was always computed in prompt
 * form, that no request is interrupted and computed again, and that a request without a seed gets
 * one from its prompt. The price: pages for prompt and max_tokens are taken when a request starts.
 */
typedef struct km_engine_options {
	const char *model_dir;
	int64_t max_total_tokens;  /* KV slots; 0: from memory_fraction */
	double memory_fraction;    /* of available memory, for KV when max_total_tokens is 0 */
	int context_length;        /* 0: the model's, or what the KV cache holds */
	int max_running_requests;  /* samples in a batch */
	int max_queued_requests;   /* submit fails with KM_ELIMIT beyond it */
	int chunked_prefill_size;  /* prompt rows in one step at most */
	int page_size;
	enum km_kv_dtype kv_dtype;
	bool disable_prefix_cache, deterministic;
	bool count_experts; /* see km_engine_expert_counts */
	int threads;
	const char *isa;           /* NULL: the best; deterministic: the best of those that agree */
	enum km_backend_kind backend;
	int gpu;                   /* of KM_BACKEND_CUDA */
	bool disable_graphs;       /* on a GPU */
	const char *moe_config_dir; /* on a GPU: the folder of tuning files, kept; NULL: none */
	bool require_tuned;        /* on a GPU: refuse experts without a tuning file */
	bool quiet;                /* no progress on stderr */
} km_engine_options;

typedef struct km_engine_stats {
	int running, waiting; /* samples */
	int64_t pages_total, pages_used, pages_cached; /* used: by requests; cached: reusable */
	int64_t prompt_tokens, generation_tokens; /* since start */
	int64_t prefix_queries, prefix_hits;      /* in tokens, since start */
	int64_t preemptions, steps;
	int64_t forward_ns; /* of the engine's thread, in the model */
	int64_t launch_ns;  /* of that, until a step was on its way; 0: launching and waiting are one */
} km_engine_stats;

typedef struct km_engine km_engine;
typedef struct km_request km_request;

void km_engine_options_init(km_engine_options *options); /* the defaults */

/* What opening would take, in numbers, or in words for people; only config.json is read. A plan
 * that leaves no room for KV is KM_ENOMEM; so is one that does not fit, in words, which are there all the same. */
int km_engine_plan(const km_engine_options *options, km_model_plan *plan, km_err *err);
int km_engine_describe_plan(const km_engine_options *options, km_buf *out, km_err *err);

int km_engine_open(km_engine **engine, const km_engine_options *options, km_err *err);
void km_engine_close(km_engine *engine); /* aborts what is left */

/* KM_EINVAL: the request is wrong (prompt too long, an id out of range...); KM_ELIMIT: queue full;
 * KM_ECANCELED: closing; KM_EDEVICE: the device failed before. Events may come before this
 * returns. */
int km_engine_submit(km_engine *engine, const km_request_options *options, km_request **request,
                     km_err *err);
void km_engine_cancel(km_engine *engine, km_request *request); /* any thread; returns at once */
void km_request_free(km_request *request); /* from its last event on; any thread */
int km_request_cached_tokens(const km_request *request); /* prompt tokens that were not computed */
/* From submission to the step that began its prompt; negative: none has. Any thread. */
double km_request_queue_seconds(const km_request *request);

const km_config *km_engine_config(const km_engine *engine);
const km_tokenizer *km_engine_tokenizer(const km_engine *engine);
int km_engine_context_length(const km_engine *engine);
void km_engine_stats_get(const km_engine *engine, km_engine_stats *stats); /* any thread */
void km_engine_explain(const km_engine *engine, km_buf *out);
/* Whether the device failed for good: every request has failed or will, and `err` (or NULL) gets the
 * reason. Any thread. */
bool km_engine_has_failed(const km_engine *engine, km_err *err);
/* How often each expert was chosen since the start: [num_hidden_layers, n_routed_experts], a dense
 * layer's zero; NULL unless count_experts. To be called while no request runs. The last layer computes
 * only rows whose logits are wanted: of a prompt, mostly the last. */
int km_engine_expert_counts(const km_engine *engine, const int64_t **counts, km_err *err);
/* Drops reusable prefixes; KM_EINVAL while requests run. */
int km_engine_flush_cache(km_engine *engine);

#endif
