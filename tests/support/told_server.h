/*
 * A server whose engine says what the test tells it to: the file that includes this defines the
 * engine's functions, so that the linker leaves libcore's out. Not one of the helpers in the
 * archive, where a test of the real engine would find it.
 */
#ifndef TESTS_TOLD_SERVER_H
#define TESTS_TOLD_SERVER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "support/http_client.h"
#include "text/vocab_synth.h"
#include "wire/serve.h"

/* The engine. */

enum { SAMPLES = 4 };

struct km_request {
	km_request *next;
	int n, position, prompt_len, max_tokens;
	bool finished[SAMPLES];
	km_ids output;
	bool ends; /* with a stop, after `output` */
	bool prompt_logprobs;
	int32_t *prompt;
	km_request_options options;
	atomic_bool cancelled;
	bool over;
	km_engine *engine;
};

struct km_engine {
	km_config config;
	km_tokenizer *tokenizer;
	pthread_t thread;
	pthread_mutex_t lock;
	km_request *first;
	atomic_bool stop;
	const char *script;    /* what every request is told; NULL: its own prompt, over and over */
	atomic_int token_us;   /* pause between tokens */
	atomic_bool paused;    /* requests wait in the queue */
	atomic_int fail_at;    /* token at which a request fails; -1: never */
	atomic_bool broken;    /* the device failed for good */
	int breaks_after;      /* that many requests were answered; 0: never */
	int max_requests;
	atomic_int live, cancels;
	km_request_options last; /* request, the arrays gone but these: */
	int32_t last_stop_id, last_bias_id;
};

static void emit(km_request *q, int sample, const km_engine *e)
{
	km_event event = { .sample = sample, .id = -1, .matched_id = -1 };
	size_t len = 0;

	if (q->cancelled) {
		event.finish = KM_FINISH_ABORT;
	} else if (q->position == e->fail_at || e->broken) {
		event.finish = KM_FINISH_ERROR;
		event.error = "the engine broke as told";
	} else if (q->ends && q->position == (int)q->output.len) {
		event.finish = KM_FINISH_STOP;
		event.matched_id = km_tokenizer_special(e->tokenizer, "<|im_end|>");
		event.id = event.matched_id;
	} else if (q->max_tokens == 0) {
		event.finish = KM_FINISH_LENGTH;
	} else {
		event.id = q->output.data[(size_t)q->position % q->output.len];
		event.text = km_tokenizer_bytes(e->tokenizer, event.id, &len);
		event.text_len = len;
		event.logprob = -1;
		if (q->position + 1 == q->max_tokens)
			event.finish = KM_FINISH_LENGTH;
	}
	q->finished[sample] = event.finish != KM_FINISH_NONE;
	q->options.on_event(q->options.ctx, &event);
}

static bool step(km_request *q, km_engine *e)
{
	bool over = true;

	if (q->prompt_logprobs && !q->cancelled) {
		for (int i = 1; i < q->prompt_len; i++) {
			km_prompt_logprob lp = { .position = i, .id = q->prompt[i], .logprob = -2 };

			q->options.on_prompt_logprob(q->options.ctx, &lp);
		}
		q->prompt_logprobs = false;
	}
	for (int i = 0; i < q->n; i++)
		if (!q->finished[i])
			emit(q, i, e);
	q->position++;
	for (int i = 0; i < q->n; i++)
		over &= q->finished[i];
	return over;
}

static void step_all(km_engine *e)
{
	km_request **at = &e->first;

	while (*at) {
		km_request *q = *at;
		bool over;

		if (e->paused && !q->cancelled) {
			at = &q->next;
			continue;
		}
		over = step(q, e);
		if (!over) {
			at = &q->next;
			continue;
		}
		*at = q->next;
		e->live--;
		if (e->breaks_after && !--e->breaks_after)
			e->broken = true;
		q->over = true; /* from here on it may be freed by anyone */
	}
}

static void *engine_main(void *ctx)
{
	km_engine *e = ctx;

	while (!e->stop) {
		pthread_mutex_lock(&e->lock);
		step_all(e);
		pthread_mutex_unlock(&e->lock);
		usleep((useconds_t)e->token_us);
	}
	return NULL;
}

int km_engine_submit(km_engine *e, const km_request_options *options, km_request **request,
                     km_err *err)
{
	km_request *q = km_xcalloc(1, sizeof(*q)), **at = &e->first;
	size_t n = (size_t)options->prompt_len;

	if (km_engine_has_failed(e, err)) {
		free(q);
		return err->code;
	}
	if (e->live >= e->max_requests) {
		free(q);
		return km_fail(err, KM_ELIMIT, "the queue is full: %d requests", e->max_requests);
	}
	q->engine = e;
	q->options = e->last = *options;
	e->last_stop_id = options->stop_id_count ? options->stop_ids[0] : -1;
	e->last_bias_id = options->sampling.bias_count ? options->sampling.bias[0].id : -1;
	q->n = options->n;
	q->prompt_len = options->prompt_len;
	q->prompt = km_xreallocarray(NULL, n, sizeof(*q->prompt));
	memcpy(q->prompt, options->prompt, n * sizeof(*q->prompt));
	q->max_tokens = options->max_tokens;
	q->prompt_logprobs = options->prompt_logprobs;
	q->ends = e->script != NULL;
	if (e->script)
		assert_int_equal(km_tokenizer_encode(e->tokenizer, e->script, strlen(e->script),
		                                     true, &q->output, err),
		                 0);
	else
		km_ids_append(&q->output, options->prompt, n);
	*request = q; /* before the first event can come */
	pthread_mutex_lock(&e->lock);
	while (*at)
		at = &(*at)->next;
	*at = q;
	e->live++;
	pthread_mutex_unlock(&e->lock);
	return 0;
}

void km_engine_cancel(km_engine *e, km_request *request)
{
	e->cancels += !atomic_exchange(&request->cancelled, true);
}

/* The engine's thread may still be on its way out of the callback that gave the last event. */
void km_request_free(km_request *q)
{
	pthread_mutex_lock(&q->engine->lock);
	assert_true(q->over);
	pthread_mutex_unlock(&q->engine->lock);
	free(q->prompt);
	km_ids_release(&q->output);
	free(q);
}

int km_request_cached_tokens(const km_request *request)
{
	return request->prompt_len / 2;
}

double km_request_queue_seconds(const km_request *request)
{
	return request->position ? 0.25 : -1;
}

bool km_engine_has_failed(const km_engine *e, km_err *err)
{
	if (e->broken)
		km_fail(err, KM_EDEVICE, "the device is gone");
	return e->broken;
}

const km_config *km_engine_config(const km_engine *e)
{
	return &e->config;
}

const km_tokenizer *km_engine_tokenizer(const km_engine *e)
{
	return e->tokenizer;
}

int km_engine_flush_cache(km_engine *e)
{
	return e->live ? KM_EINVAL : 0;
}

int km_engine_context_length(const km_engine *e)
{
	(void)e;
	return 100000;
}

void km_engine_stats_get(const km_engine *e, km_engine_stats *stats)
{
	*stats = (km_engine_stats){ .running = e->live, .pages_total = 64, .pages_used = e->live };
}

/* The server under test. */

struct fixture {
	char dir[64];
	struct km_engine engine;
	km_service service;
	km_serve *serve;
	int port;
};

static const char *const names[] = { "kimi-test" };

static void write_file(const char *dir, const char *name, const char *text)
{
	char path[128];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	f = fopen(path, "w");
	assert_non_null(f);
	fputs(text, f);
	fclose(f);
}

static void open_server(struct fixture *f, const km_serve_options *options)
{
	km_err err;

	if (km_serve_open(&f->serve, &f->service, options, &err) < 0)
		fail_msg("%s", err.msg);
	f->port = km_serve_port(f->serve);
}

static const km_serve_options plain = { .host = "127.0.0.1", .max_body_bytes = 1 << 20,
	                                .max_connections = 256, .request_timeout_s = 2,
	                                .stream_timeout_s = 2, .keepalive_s = 0.2 };

static int set_up(void **state)
{
	static km_service_options options;
	struct fixture *f = km_xcalloc(1, sizeof(*f));
	km_err err;

	snprintf(f->dir, sizeof(f->dir), "/tmp/kimi-serve-XXXXXX");
	if (!mkdtemp(f->dir) || km_vocab_synthesize(f->dir, 2048, &err) < 0 ||
	    km_tokenizer_open(&f->engine.tokenizer, f->dir, &err) < 0)
		return -1;
	write_file(f->dir, "generation_config.json", "{\"temperature\":0.6,\"eos_token_id\":5}");
	f->engine.config.vocab_size = 2048;
	f->engine.fail_at = -1;
	f->engine.max_requests = 1000;
	f->engine.token_us = 200;
	pthread_mutex_init(&f->engine.lock, NULL);
	pthread_create(&f->engine.thread, NULL, engine_main, &f->engine);
	options = (km_service_options){
		.model_dir = f->dir, .names = names, .name_count = 1, .chat_template = "k2.5",
		.tool_parser = "auto", .reasoning_parser = "auto", .sampling_from_model = true,
		.stream_buffer_bytes = 1 << 20,
	};
	if (km_service_init(&f->service, &f->engine, &options, &err) < 0)
		return -1;
	assert_true(f->service.limits.sampling.temperature == 0.6);
	open_server(f, &plain);
	*state = f;
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;
	static const char *const files[] = { "tiktoken.model", "tokenizer_config.json",
		                             "generation_config.json" };
	char path[128];

	km_serve_close(f->serve);
	km_service_release(&f->service);
	f->engine.stop = true;
	pthread_join(f->engine.thread, NULL);
	km_tokenizer_close(f->engine.tokenizer);
	for (size_t i = 0; i < 3; i++) {
		snprintf(path, sizeof(path), "%s/%s", f->dir, files[i]);
		unlink(path);
	}
	rmdir(f->dir);
	free(f);
	return 0;
}

static void pause_ms(int ms)
{
	usleep((useconds_t)ms * 1000);
}

/* Waits until the engine works on `live` requests. */
static bool settles(struct fixture *f, int live, int ms)
{
	for (; ms > 0 && f->engine.live != live; ms -= 5)
		pause_ms(5);
	return f->engine.live == live;
}

#endif
