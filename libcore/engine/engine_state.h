/*
 * The engine's inside, shared by its four files: engine.c (threads, queue, life), step.c (one
 * step: rows out, tokens and events in), request.c (a request's memory and checks), engine_open.c
 * (what is planned and opened; the only one that knows km_model and km_tokenizer).
 *
 * Threads. Everything is the engine thread's own but what stands under `lock`, the atomics, and a
 * request before it is submitted and after its last event. The lock is never held across a step, a
 * callback or an allocation of size.
 */
#ifndef KM_ENGINE_ENGINE_STATE_H
#define KM_ENGINE_ENGINE_STATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "engine/engine.h"
#include "engine/scheduler.h"
#include "engine/stop.h"

/* What the engine asks of a model and its vocabulary. A seam for tests, which put a model here
 * whose logits tell exactly which KV it was shown. */
typedef struct km_backend {
	int vocab_size;
	int32_t added_from;     /* ids from here on are markers, not text: see km_event.text */
	size_t max_token_bytes;
	int eos_count;
	int32_t eos[KM_MAX_EOS + 3];
	bool draws;             /* does as km_batch.draw says */
	void *ctx;
	/* forward in two halves, or NULL: see km_model_launch. The batch's arrays stay as they are
	 * until it is finished. */
	int (*launch)(void *ctx, const km_batch *batch, km_err *err);
	int (*finish)(void *ctx, const km_batch *batch, const float **logits, km_err *err);
	int (*forward)(void *ctx, const km_batch *batch, const float **logits, km_err *err);
	const char *(*token_bytes)(void *ctx, int32_t id, size_t *len); /* NULL: none */
} km_backend;

typedef struct km_engine_shape {
	int context_length, page_size, total_pages;
	int max_running, max_queued;
	int prefill_rows; /* prompt rows of a step */
	int score_rows;   /* of these, rows whose logits a prompt's log-probabilities need */
	bool prefix_cache, deterministic;
	int threads;      /* that sample */
} km_engine_shape;

/* One of a request's n answers. */
typedef struct km_sample {
	km_seq seq; /* first: the scheduler hands these back */
	struct km_request *request;
	int index;
	uint64_t seed;
	uint64_t draws;
	bool has_counts, redo; /* redo: the backend refused its row, which the host draws from next */
	km_counts counts;
	km_stop stop;
} km_sample;

struct km_request {
	km_request *next;           /* in the submit queue */
	int n, live;                /* live: samples without their final event */
	km_sample *samples;         /* [n] */
	km_sampling sampling;       /* bias: owned */
	km_stop_set stops;
	int32_t *stop_ids;
	int stop_id_count;
	bool ignore_eos, scores_prompt, admitted;
	int logprobs;
	void (*on_event)(void *ctx, const km_event *event);
	void (*on_prompt_logprob)(void *ctx, const km_prompt_logprob *logprob);
	void *ctx;
	atomic_bool cancelled;
	atomic_int cached_tokens;
	int64_t submitted_ns;
	_Atomic int64_t queue_ns;   /* < 0: no step has begun its prompt */
};

/* A row of logits and what is wanted of it. */
typedef struct km_job {
	km_sample *sample; /* NULL: it ended after the step was launched, as did the chunk's seq */
	int position;  /* the row's, in its sequence */
	bool next;     /* draws the next token; otherwise scores the prompt's token position + 1 */
	int rc;
	km_sampled out;
} km_job;

typedef struct km_step {
	int chunk_count, job_count;
	km_chunk *chunks;     /* [max_running] */
	km_job *jobs;         /* [max_running + score_rows] */
	km_batch batch;
	bool under_way;       /* launched, not finished */
	int32_t *ids, *positions, *slots; /* [max_running + prefill_rows] */
	int32_t *seq_start, *kv_len;      /* [max_running + 1] */
	int32_t *pages;       /* [max_running, pages of a context] */
	int32_t *logit_row;   /* [max_running + score_rows] */
	km_draw *draws;       /* [max_running + score_rows], or NULL: the backend draws nothing */
	km_draw_entry *entries; /* [KM_DRAW_ENTRIES] */
	int32_t *drawn;       /* [max_running + score_rows] */
	int32_t *from_drawn;  /* [max_running + prefill_rows] */
} km_step;

struct km_engine {
	km_engine_shape shape;
	km_backend backend;
	km_pages pages;
	km_scheduler scheduler;
	km_step step, ahead;   /* ahead: launched while step was under way, mostly not */
	km_sampler **samplers; /* [threads] */
	km_buf text;           /* of the event being made */
	int64_t prompt_tokens, generation_tokens, steps, forward_ns, launch_ns;
	uint64_t random; /* seeds of requests that bring none */

	pthread_t thread;
	atomic_bool cancel_wanted;
	atomic_ullong submissions;
	pthread_mutex_t lock; /* what follows */
	pthread_cond_t wake, flushed;
	km_request *submitted, *submitted_last;
	int queued;           /* requests not yet admitted */
	bool closing, flush_wanted;
	int flush_rc;
	km_err broken;        /* code 0: it is not */
	km_engine_stats stats;

	km_model *model; /* engine_open.c's; NULL behind another backend */
	km_tokenizer *tokenizer;
	int64_t *expert_counts; /* owned; NULL: not counted */
	km_model_options model_options;
	km_model_plan plan;
};

/* engine.c: starts the thread over a backend, which is copied; its ctx is kept. NULL: the system
 * gives no thread. */
km_engine *km_engine_start(const km_engine_shape *shape, const km_backend *backend);
void km_engine_stop(km_engine *engine); /* aborts, joins, frees all but model and tokenizer */
void km_engine_publish(km_engine *engine);   /* the engine thread: stats for the others to see */
void km_engine_unqueue(km_engine *engine, km_request *request); /* it is admitted, or over */

/* request.c */
int km_request_new(km_request **request, const km_engine *engine, const km_request_options *options,
                   km_err *err);

/* step.c; the engine thread */
void km_steps_init(km_engine *engine);
void km_steps_release(km_engine *engine);
void km_steps_drain(km_engine *engine); /* waits for what is under way and forgets it */
/* A failure is the model's: nothing was delivered then. */
int km_step_run(km_engine *engine, km_err *err);
bool km_engine_has_news(km_engine *engine); /* engine.c: requests came, or are to be cancelled */
void km_sample_finish(km_engine *engine, km_sample *sample, km_event *event); /* the final event */

#endif
