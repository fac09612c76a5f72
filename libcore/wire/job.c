/*
 * Who holds what. The owner holds one reference, the engine one for each prompt it still works on
 * (given up with the last event of that prompt's last sample). A job that the engine lets go of
 * last is put on the service's list, and freed by whoever reaps: the HTTP server's watcher and the
 * batch loop as they go, km_service_release at the end.
 *
 * A stream's reader that falls behind by more than stream_buffer_bytes of events loses the rest:
 * the events are dropped from then on, so that memory stays bounded whatever the client does.
 */
#include "wire/job.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/mem.h"

/* Events of a whole answer are turned into text when there are this many bytes of them, not all at
 * its end: an event takes some 200 bytes, its text about 4. */
enum { DIGEST_BYTES = 256 << 10 };

struct part {
	km_job *job;
	int index;
	km_ids ids;
	km_request *request; /* NULL: not submitted */
	int live;            /* samples whose last event has not come */
	int cached;
	bool admitted;       /* its time in the queue is counted */
};

struct km_job {
	km_service *service;
	km_openai_request request;
	km_job_events events;
	char id[48];
	km_answer *answer;
	int part_count;
	struct part *parts;
	double started;
	double *last; /* [choices] when the last token came; 0: none yet */
	km_job *next_dead;

	pthread_mutex_t lock; /* over what follows */
	int references;
	int live;             /* parts */
	bool starting, cancelled, overflowed;
	km_buf queue;         /* events that the consumer has not taken */
	double first_token, finished; /* seconds since `started`; 0: not yet */

	km_buf taken;         /* the consumer's half of the queue */
	bool streaming, ended;
};

/* The service. */

static bool parser_on(const char *choice, bool automatic)
{
	return strcmp(choice, "auto") ? !strcmp(choice, "kimi_k2") : automatic;
}

static int choose_template(km_service *s)
{
	for (int t = 0; t < KM_CHAT_TEMPLATE_COUNT; t++) {
		if (!strcmp(s->options.chat_template, km_chat_template_name[t])) {
			s->chat = (enum km_chat_template)t;
			return 0;
		}
	}
	return km_chat_detect(s->options.model_dir, &s->chat, &s->no_chat);
}

static const km_sampling openai_sampling = { .temperature = 1, .top_p = 1, .top_k = -1,
	                                     .repetition_penalty = 1 };

int km_service_init(km_service *s, km_engine *engine, const km_service_options *options,
                    km_err *err)
{
	memset(s, 0, sizeof(*s));
	s->engine = engine;
	s->options = *options;
	s->limits = (km_openai_limits){
		.vocab_size = km_engine_config(engine)->vocab_size,
		.models = options->names, .model_count = options->name_count,
		.sampling = openai_sampling,
	};
	if (options->sampling_from_model)
		KM_TRY(km_openai_sampling_defaults(&s->limits.sampling, options->model_dir, err));
	km_answer_model_init(&s->model, km_engine_tokenizer(engine), options->names[0]);
	s->has_chat = choose_template(s) == 0;
	s->model.tool_parser = parser_on(options->tool_parser, s->has_chat);
	s->model.reasoning_parser = parser_on(options->reasoning_parser,
	                                      s->has_chat && km_chat_thinks(s->chat));
	km_metrics_init(&s->metrics);
	pthread_mutex_init(&s->lock, NULL);
	return 0;
}

const char *km_service_template_name(const km_service *s)
{
	return s->has_chat ? km_chat_template_name[s->chat] : "none";
}

static void job_free(km_job *job);

void km_service_reap(km_service *s)
{
	km_job *job;

	pthread_mutex_lock(&s->lock);
	job = s->dead;
	s->dead = NULL;
	pthread_mutex_unlock(&s->lock);
	while (job) {
		km_job *next = job->next_dead;

		job_free(job);
		job = next;
	}
}

void km_service_release(km_service *s)
{
	struct timespec pause = { 0, 1000000 };

	while (s->jobs) {
		km_service_reap(s);
		nanosleep(&pause, NULL);
	}
	pthread_mutex_destroy(&s->lock);
}

/* Prompts. */

/* A switch that the model's template has no place for would be ignored without a word. */
static int check_thinking(const km_service *s, int thinking, km_openai_error *error)
{
	if (thinking < 0 || s->chat == KM_CHAT_K25)
		return 0;
	if (s->chat == KM_CHAT_K2_THINKING && !thinking)
		return km_openai_fail(error, 400, "thinking", "unsupported",
		                      "This model always thinks; thinking cannot be turned off.");
	if (!km_chat_thinks(s->chat) && thinking)
		return km_openai_fail(error, 400, "thinking", "unsupported",
		                      "This model does not think; thinking cannot be turned on.");
	return 0;
}

int km_service_encode_chat(const km_service *s, const km_openai_request *r, km_ids *ids,
                           km_openai_error *error)
{
	km_chat_options options;
	km_chat chat;
	km_err err = { 0 };
	int rc;

	if (!s->has_chat)
		return km_openai_fail(error, 400, "messages", "unsupported", "%s", s->no_chat.msg);
	KM_TRY(check_thinking(s, r->thinking, error));
	km_chat_options_init(&options, s->chat);
	options.thinking = r->thinking != 0;
	options.preserve_thinking = r->preserve_thinking;
	options.add_generation_prompt = r->add_generation_prompt;
	options.continue_final_message = r->continue_final_message;
	options.rewrite_call_ids = s->options.rewrite_call_ids;
	km_chat_init(&chat);
	rc = km_chat_render(&chat, &options, r->messages, r->tools, &err);
	if (rc >= 0)
		rc = km_chat_encode(&chat, s->model.tokenizer, ids, &err);
	if (rc < 0)
		km_openai_fail_err(error, "messages", &err);
	else
		rc = chat.in_reasoning;
	km_chat_release(&chat);
	return rc;
}

/* A prompt's text may hold special tokens by name: whoever writes raw prompts writes those. */
static int encode_prompt(const km_service *s, km_openai_prompt *prompt, km_ids *ids,
                         km_openai_error *error)
{
	km_err err = { 0 };
	int rc;

	if (!prompt->text) {
		km_ids_append(ids, prompt->ids.data, prompt->ids.len);
		return 0;
	}
	rc = km_tokenizer_encode(s->model.tokenizer, prompt->text, prompt->len, true, ids, &err);
	return rc < 0 ? km_openai_fail_err(error, "prompt", &err) : 0;
}

/* The longest answer a prompt leaves room for; an answer that was asked for must fit. */
static int check_length(const km_service *s, const km_openai_request *r, size_t prompt_tokens,
                        int *max_tokens, km_openai_error *error)
{
	int context = km_engine_context_length(s->engine);
	const char *field = r->endpoint == KM_ENDPOINT_CHAT ? "messages" : "prompt";

	if (prompt_tokens + (r->max_tokens != 0) > (size_t)context)
		return km_openai_fail(error, 400, field, "context_length_exceeded",
		                      "The prompt has %zu tokens; this model's context holds %d, "
		                      "the answer included.",
		                      prompt_tokens, context);
	*max_tokens = r->max_tokens < 0 ? context - (int)prompt_tokens : r->max_tokens;
	if (*max_tokens > context - (int)prompt_tokens)
		return km_openai_fail(error, 400, "max_tokens", "context_length_exceeded",
		                      "The prompt's %zu tokens and max_tokens %d are more than the "
		                      "context of %d.",
		                      prompt_tokens, *max_tokens, context);
	return 0;
}

/* Events, on the engine's thread. */

static void leave(km_job *job)
{
	km_service *s = job->service;
	bool last;

	pthread_mutex_lock(&job->lock);
	last = --job->references == 0;
	pthread_mutex_unlock(&job->lock);
	if (!last)
		return;
	pthread_mutex_lock(&s->lock);
	job->next_dead = s->dead;
	s->dead = job;
	pthread_mutex_unlock(&s->lock);
}

static bool has_room(const km_job *job)
{
	return !job->request.stream ||
	       (int64_t)job->queue.len < job->service->options.stream_buffer_bytes;
}

static void time_token(km_job *job, const struct part *p, const km_event *e)
{
	double now = km_now_s(), *last = &job->last[p->index * job->request.n + e->sample];
	km_metrics *m = &job->service->metrics;

	if (e->id < 0)
		return;
	if (*last > 0)
		km_histogram_add(&m->inter_token_latency, now - *last);
	if (job->first_token == 0) {
		job->first_token = now - job->started;
		km_histogram_add(&m->time_to_first_token, job->first_token);
	}
	*last = now;
}

static void time_queue(km_job *job, struct part *p)
{
	double seconds = p->admitted ? -1 : km_request_queue_seconds(p->request);

	if (seconds < 0)
		return;
	p->admitted = true;
	km_histogram_add(&job->service->metrics.request_queue_time, seconds);
}

static void on_event(void *ctx, const km_event *e)
{
	struct part *p = ctx;
	km_job *job = p->job;
	km_job_events events = job->events;
	bool part_over, job_over, wake, overflow;

	pthread_mutex_lock(&job->lock);
	time_queue(job, p);
	time_token(job, p, e);
	if (!p->cached)
		p->cached = km_request_cached_tokens(p->request);
	overflow = !job->overflowed && !has_room(job);
	job->overflowed |= overflow;
	if (!job->overflowed)
		km_queue_event(&job->queue, p->index, p->cached, e);
	part_over = e->finish != KM_FINISH_NONE && --p->live == 0;
	job_over = part_over && --job->live == 0 && !job->starting;
	if (job_over) {
		job->finished = km_now_s() - job->started;
		km_histogram_add(&job->service->metrics.e2e_request_latency, job->finished);
	}
	wake = job_over || (!job->overflowed && !job->starting &&
	                    (job->request.stream || job->queue.len > DIGEST_BYTES));
	pthread_mutex_unlock(&job->lock);
	if (overflow)
		events.overflow(events.ctx);
	else if (wake)
		events.wake(events.ctx);
	if (part_over)
		leave(job);
}

static void on_prompt_logprob(void *ctx, const km_prompt_logprob *lp)
{
	struct part *p = ctx;
	km_job *job = p->job;

	pthread_mutex_lock(&job->lock);
	if (!job->overflowed)
		km_queue_prompt_logprob(&job->queue, p->index, lp);
	pthread_mutex_unlock(&job->lock);
}

/* Starting. */

static int encode(km_job *job, km_answer_prompt *prompts, km_openai_error *error)
{
	km_openai_request *r = &job->request;

	for (int i = 0; i < job->part_count; i++) {
		struct part *p = &job->parts[i];
		int rc, ignored;

		if (r->endpoint == KM_ENDPOINT_CHAT)
			rc = km_service_encode_chat(job->service, r, &p->ids, error);
		else
			rc = encode_prompt(job->service, &r->prompts[i], &p->ids, error);
		KM_TRY(rc);
		if (!p->ids.len)
			return km_openai_fail(error, 400, "prompt", NULL,
			                      "The prompt has no tokens.");
		KM_TRY(check_length(job->service, r, p->ids.len, &ignored, error));
		prompts[i] = (km_answer_prompt){ p->ids.data, (int)p->ids.len, rc == 1 };
	}
	return 0;
}

static int submit(km_job *job, struct part *p, km_openai_error *error)
{
	const km_openai_request *r = &job->request;
	km_request_options options = {
		.prompt = p->ids.data,
		.prompt_len = (int)p->ids.len,
		.n = r->n,
		.sampling = r->sampling,
		.stop = r->stop,
		.stop_count = r->stop_count,
		.stop_ids = r->stop_ids,
		.stop_id_count = r->stop_id_count,
		.ignore_eos = r->ignore_eos,
		.logprobs = r->logprobs,
		.prompt_logprobs = r->echo && (r->logprobs >= 0 || !r->max_tokens),
		.on_event = on_event,
		.on_prompt_logprob = on_prompt_logprob,
		.ctx = p,
	};
	km_err err = { 0 };
	int rc;

	KM_TRY(check_length(job->service, r, p->ids.len, &options.max_tokens, error));
	pthread_mutex_lock(&job->lock);
	job->references++;
	job->live++;
	p->live = r->n;
	pthread_mutex_unlock(&job->lock);
	/* The engine sets `request` before the first event, which may come before this returns. */
	rc = km_engine_submit(job->service->engine, &options, &p->request, &err);
	if (rc >= 0)
		return 0;
	pthread_mutex_lock(&job->lock);
	job->references--;
	job->live--;
	pthread_mutex_unlock(&job->lock);
	return km_openai_fail_err(error, NULL, &err);
}

static km_job *job_new(km_service *s, enum km_endpoint endpoint, const km_job_events *events)
{
	km_job *job = km_xcalloc(1, sizeof(*job));

	job->service = s;
	job->events = *events;
	job->references = 1;
	job->starting = true;
	job->started = km_now_s();
	pthread_mutex_init(&job->lock, NULL);
	snprintf(job->id, sizeof(job->id), "%s-%08llx%08llx",
	         endpoint == KM_ENDPOINT_CHAT ? "chatcmpl" : "cmpl", (unsigned long long)time(NULL),
	         (unsigned long long)s->next_id++);
	s->jobs++;
	return job;
}

static int start(km_job *job, km_openai_error *error)
{
	km_openai_request *r = &job->request;
	size_t count = r->prompt_count ? (size_t)r->prompt_count : 1;
	km_answer_prompt *prompts = km_xcalloc(count, sizeof(*prompts));
	int rc;

	job->part_count = (int)count;
	job->parts = km_xcalloc(count, sizeof(*job->parts));
	job->last = km_xcalloc(count * (size_t)r->n, sizeof(*job->last));
	for (int i = 0; i < job->part_count; i++)
		job->parts[i] = (struct part){ .job = job, .index = i };
	rc = encode(job, prompts, error);
	if (rc >= 0)
		job->answer = km_answer_new(&job->service->model, r, prompts, job->id);
	free(prompts);
	for (int i = 0; rc >= 0 && i < job->part_count; i++)
		rc = submit(job, &job->parts[i], error);
	return rc;
}

int km_job_start(km_job **out, km_service *s, enum km_endpoint endpoint, json_t *body,
                 const km_job_events *events, km_openai_error *error)
{
	km_job *job = job_new(s, endpoint, events);
	bool wake;
	int rc = km_openai_request_from_json(&job->request, endpoint, body, &s->limits, error);

	if (rc >= 0)
		rc = start(job, error);
	if (rc < 0) {
		km_job_release(job);
		return rc;
	}
	pthread_mutex_lock(&job->lock);
	job->starting = false;
	wake = job->live == 0 || (job->request.stream && job->queue.len);
	if (job->live == 0)
		job->finished = km_now_s() - job->started;
	pthread_mutex_unlock(&job->lock);
	*out = job;
	if (wake)
		events->wake(events->ctx);
	return 0;
}

/* Reading. */

static void take_all(km_job *job, km_buf *out)
{
	km_queued queued;

	for (size_t at = 0; at < job->taken.len;) {
		at = km_queue_read(&job->taken, at, &queued);
		km_answer_take(job->answer, &queued, out);
		job->streaming |= job->request.stream && !queued.is_prompt;
	}
}

static enum km_job_state finish(km_job *job, km_buf *out, km_openai_error *error)
{
	const char *failure = km_answer_error(job->answer);

	job->ended = true;
	if (job->request.stream && (!failure || out->len || job->streaming)) {
		km_answer_end_stream(job->answer, out);
		return KM_JOB_DONE;
	}
	if (failure) {
		km_openai_fail(error, 500, NULL, NULL, "%s", failure);
		return KM_JOB_FAILED;
	}
	km_answer_json(job->answer, out);
	return KM_JOB_DONE;
}

/* A stream that failed before its first chunk is a plain error: nothing was sent yet. */
static bool failed_before_first_chunk(const km_job *job, bool was_streaming, const km_buf *out)
{
	return km_answer_error(job->answer) && !was_streaming && !out->len;
}

enum km_job_state km_job_read(km_job *job, km_buf *out, km_openai_error *error)
{
	bool was_streaming = job->streaming;
	km_buf swap;

	if (job->ended)
		return KM_JOB_DONE;
	km_buf_clear(&job->taken);
	pthread_mutex_lock(&job->lock);
	swap = job->queue;
	job->queue = job->taken;
	job->taken = swap;
	pthread_mutex_unlock(&job->lock);
	take_all(job, out);
	if (failed_before_first_chunk(job, was_streaming, out))
		job->streaming = false;
	if (km_answer_done(job->answer) || (job->request.stream && km_answer_error(job->answer)))
		return finish(job, out, error);
	return out->len ? KM_JOB_STREAMING : KM_JOB_WAITING;
}

bool km_job_is_stream(const km_job *job)
{
	return job->request.stream;
}

const char *km_job_id(const km_job *job)
{
	return job->id;
}

/* The engine's requests are cancelled outside the lock: its callbacks take it. They cannot be freed
 * meanwhile, because the caller is the owner and holds a reference. */
void km_job_cancel(km_job *job)
{
	bool first;

	pthread_mutex_lock(&job->lock);
	first = !job->cancelled;
	job->cancelled = true;
	pthread_mutex_unlock(&job->lock);
	for (int i = 0; first && i < job->part_count; i++)
		if (job->parts[i].request)
			km_engine_cancel(job->service->engine, job->parts[i].request);
}

static void count_finishes(const km_job *job)
{
	for (int i = 0; job->answer && i < job->part_count * job->request.n; i++) {
		const char *why = km_answer_finish_reason(job->answer, i);
		enum km_finish finish = KM_FINISH_ABORT; /* not read to its end */

		if (why)
			finish = !strcmp(why, "length") ? KM_FINISH_LENGTH :
			         !strcmp(why, "error")  ? KM_FINISH_ERROR :
			         !strcmp(why, "abort")  ? KM_FINISH_ABORT : KM_FINISH_STOP;
		km_metrics_count_finish(&job->service->metrics, finish,
		                        why && !strcmp(why, "tool_calls"));
	}
}

static void job_free(km_job *job)
{
	km_service *s = job->service;
	bool submitted = false;

	for (int i = 0; i < job->part_count; i++) {
		submitted |= job->parts[i].request != NULL;
		if (job->parts[i].request)
			km_request_free(job->parts[i].request);
		km_ids_release(&job->parts[i].ids);
	}
	if (submitted)
		count_finishes(job);
	km_answer_free(job->answer);
	if (job->request.body)
		km_openai_request_release(&job->request);
	free(job->parts);
	free(job->last);
	km_buf_release(&job->queue);
	km_buf_release(&job->taken);
	pthread_mutex_destroy(&job->lock);
	job->events.last(job->events.ctx);
	free(job);
	s->jobs--;
}

void km_job_release(km_job *job)
{
	bool last;

	pthread_mutex_lock(&job->lock);
	last = job->references == 1;
	pthread_mutex_unlock(&job->lock);
	if (!last)
		km_job_cancel(job);
	pthread_mutex_lock(&job->lock);
	last = --job->references == 0;
	pthread_mutex_unlock(&job->lock);
	if (last)
		job_free(job);
}

void km_job_describe(const km_job *job, km_buf *out)
{
	km_answer_usage u = km_answer_usage_get(job->answer);

	km_buf_printf(out, "%s prompt %lld (cached %lld) output %lld", job->id,
	              (long long)u.prompt_tokens, (long long)u.cached_tokens,
	              (long long)u.completion_tokens);
	if (job->first_token > 0)
		km_buf_printf(out, " first token %.0f ms", job->first_token * 1e3);
	for (int i = 0; i < job->part_count * job->request.n; i++) {
		const char *why = km_answer_finish_reason(job->answer, i);

		km_buf_printf(out, "%s%s", i ? "," : " finish ", why ? why : "cut");
	}
}
