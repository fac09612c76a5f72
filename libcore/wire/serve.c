#include "wire/serve.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/option.h"
#include "wire/json_fast.h"
#include "wire/json_text.h"

/* Workers only validate and tokenise; two keep one long prompt from holding up the rest. */
enum { WORKERS = 2 };

struct km_serve {
	km_service *service;
	km_serve_options options;
	km_http *http;
	int64_t started;
};

static void reply_json(km_exchange *x, km_buf *body)
{
	km_http_reply(x, 200, "application/json", body);
}

/* Generation. */

/* A job and the exchange that it answers. */
struct pending {
	km_exchange *exchange; /* kept */
	km_job *job;
};

static void on_wake(void *ctx)
{
	km_http_wake(((struct pending *)ctx)->exchange);
}

static void on_overflow(void *ctx)
{
	km_http_cut(((struct pending *)ctx)->exchange);
}

static void on_last(void *ctx)
{
	struct pending *p = ctx;

	km_exchange_release(p->exchange);
	free(p);
}

static enum km_pull on_pull(void *ctx, km_buf *out, int *status)
{
	struct pending *p = ctx;
	km_openai_error error;

	switch (km_job_read(p->job, out, &error)) {
	case KM_JOB_WAITING:
		return KM_PULL_WAIT;
	case KM_JOB_STREAMING:
		return KM_PULL_MORE;
	case KM_JOB_DONE:
		return km_job_is_stream(p->job) ? KM_PULL_END : KM_PULL_REPLY;
	case KM_JOB_FAILED:
		break;
	}
	*status = error.status;
	km_openai_error_json(&error, out);
	return KM_PULL_REPLY;
}

static void on_gone(void *ctx)
{
	km_job_cancel(((struct pending *)ctx)->job);
}

static void on_closed(void *ctx)
{
	struct pending *p = ctx;

	km_job_release(p->job);
}

static void generate(struct km_serve *s, km_exchange *x, enum km_endpoint endpoint)
{
	const km_buf *body = km_exchange_body(x);
	km_job_events events = { on_wake, on_overflow, on_last, NULL };
	struct pending *p;
	km_openai_error error;
	km_exchange_later later;
	json_t *json = km_openai_load(body->data ? body->data : "", body->len, &error);

	if (!json) {
		km_http_reply_error(x, &error);
		return;
	}
	p = km_xcalloc(1, sizeof(*p));
	p->exchange = km_exchange_keep(x);
	events.ctx = p;
	if (km_job_start(&p->job, s->service, endpoint, json, &events, &error) < 0) {
		km_http_reply_error(x, &error);
		return;
	}
	later = (km_exchange_later){ on_pull, on_gone, on_closed, p };
	km_http_answer_later(x, &later);
}

static void chat(struct km_serve *s, km_exchange *x)
{
	generate(s, x, KM_ENDPOINT_CHAT);
}

static void completions(struct km_serve *s, km_exchange *x)
{
	generate(s, x, KM_ENDPOINT_COMPLETIONS);
}

/* What else there is. */

static void write_model(const struct km_serve *s, const char *name, km_buf *out)
{
	km_buf_puts(out, "{\"id\":");
	km_json_puts(out, name);
	km_buf_printf(
		out, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"kimi-serve\",\"root\":",
		(long long)s->started);
	km_json_puts(out, s->service->options.model_dir);
	km_buf_printf(out, ",\"parent\":null,\"max_model_len\":%d}",
	              km_engine_context_length(s->service->engine));
}

static void models(struct km_serve *s, km_exchange *x)
{
	km_buf out = KM_BUF_INIT;

	km_buf_puts(&out, "{\"object\":\"list\",\"data\":[");
	for (int i = 0; i < s->service->options.name_count; i++) {
		if (i)
			km_buf_putc(&out, ',');
		write_model(s, s->service->options.names[i], &out);
	}
	km_buf_puts(&out, "]}");
	reply_json(x, &out);
}

static void one_model(struct km_serve *s, km_exchange *x)
{
	const char *name = km_exchange_path(x) + strlen("/v1/models/");
	km_openai_error error;
	km_buf out = KM_BUF_INIT;

	for (int i = 0; i < s->service->options.name_count; i++) {
		if (strcmp(name, s->service->options.names[i]) != 0)
			continue;
		write_model(s, name, &out);
		reply_json(x, &out);
		return;
	}
	km_openai_fail(&error, 404, "model", "model_not_found",
	               "The model '%.200s' does not exist here; this server has '%s'.", name,
	               s->service->options.names[0]);
	km_http_reply_error(x, &error);
}

static void health(struct km_serve *s, km_exchange *x)
{
	km_buf out = KM_BUF_INIT;
	km_openai_error error;
	km_err err;

	if (km_engine_has_failed(s->service->engine, &err)) {
		km_openai_fail(&error, 503, NULL, NULL, "%s", err.msg);
		km_http_reply_error(x, &error);
		return;
	}
	km_buf_puts(&out, "{\"status\":\"ok\"}");
	reply_json(x, &out);
}

static void version(struct km_serve *s, km_exchange *x)
{
	km_buf out = KM_BUF_INIT;

	(void)s;
	km_buf_puts(&out, "{\"version\":\"" KM_VERSION "\"}");
	reply_json(x, &out);
}

static void metrics(struct km_serve *s, km_exchange *x)
{
	km_engine_stats stats;
	km_buf out = KM_BUF_INIT;

	km_engine_stats_get(s->service->engine, &stats);
	km_metrics_write(&s->service->metrics, &stats, s->service->options.names[0], &out);
	km_http_reply(x, 200, "text/plain; version=0.0.4; charset=utf-8", &out);
}

static void flush_cache(struct km_serve *s, km_exchange *x)
{
	km_openai_error error;
	km_buf out = KM_BUF_INIT;

	if (km_engine_flush_cache(s->service->engine) < 0) {
		km_openai_fail(&error, 409, NULL, NULL,
		               "Requests are running; the cache is flushed only between them.");
		km_http_reply_error(x, &error);
		return;
	}
	km_buf_puts(&out, "{\"success\":true}");
	reply_json(x, &out);
}

static void write_token_strings(const struct km_serve *s, const km_ids *ids, km_buf *out)
{
	km_buf_puts(out, ",\"token_strs\":[");
	for (size_t i = 0; i < ids->len; i++) {
		size_t len = 0;
		const char *bytes = km_tokenizer_bytes(s->service->model.tokenizer, ids->data[i],
		                                       &len);

		if (i)
			km_buf_putc(out, ',');
		km_json_fast_write(out, bytes ? bytes : "", bytes ? len : 0);
	}
	km_buf_putc(out, ']');
}

static int tokenize_prompt(const struct km_serve *s, const json_t *prompt, km_ids *ids,
                           km_openai_error *error)
{
	km_err err = { 0 };

	if (!json_is_string(prompt))
		return km_openai_fail(error, 400, "prompt", NULL,
		                      "The body must have a prompt (a string) or messages.");
	if (km_tokenizer_encode(s->service->model.tokenizer, json_string_value(prompt),
	                        json_string_length(prompt), true, ids, &err) < 0)
		return km_openai_fail_err(error, "prompt", &err);
	return 0;
}

/* Takes over the reference to `body`. */
static int tokenize_messages(const struct km_serve *s, json_t *body, km_ids *ids,
                             km_openai_error *error)
{
	km_openai_request r;
	int rc;

	KM_TRY(km_openai_request_from_json(&r, KM_ENDPOINT_CHAT, body, &s->service->limits, error));
	rc = km_service_encode_chat(s->service, &r, ids, error);
	km_openai_request_release(&r);
	return rc;
}

static void tokenize(struct km_serve *s, km_exchange *x)
{
	const km_buf *body = km_exchange_body(x);
	km_openai_error error;
	km_ids ids = { 0 };
	km_buf out = KM_BUF_INIT;
	json_t *json = km_openai_load(body->data ? body->data : "", body->len, &error);
	bool strings = json_is_true(json_object_get(json, "return_token_strs"));
	int rc = KM_EINVAL;

	if (json_object_get(json, "messages"))
		rc = tokenize_messages(s, json_incref(json), &ids, &error);
	else if (json)
		rc = tokenize_prompt(s, json_object_get(json, "prompt"), &ids, &error);
	json_decref(json);
	if (rc < 0) {
		km_http_reply_error(x, &error);
	} else {
		km_buf_printf(&out, "{\"count\":%zu,\"max_model_len\":%d,\"tokens\":[", ids.len,
		              km_engine_context_length(s->service->engine));
		for (size_t i = 0; i < ids.len; i++)
			km_buf_printf(&out, "%s%d", i ? "," : "", ids.data[i]);
		km_buf_putc(&out, ']');
		if (strings)
			write_token_strings(s, &ids, &out);
		km_buf_putc(&out, '}');
		reply_json(x, &out);
	}
	km_ids_release(&ids);
}

static int detokenize_all(const struct km_serve *s, const json_t *tokens, km_buf *text,
                          km_openai_error *error)
{
	const km_tokenizer *tokenizer = s->service->model.tokenizer;

	if (!json_is_array(tokens))
		return km_openai_fail(error, 400, "tokens", NULL,
		                      "tokens must be a list of token ids.");
	for (size_t i = 0; i < json_array_size(tokens); i++) {
		const json_t *id = json_array_get(tokens, i);
		const char *bytes = NULL;
		size_t len;

		if (json_is_integer(id) && json_integer_value(id) >= 0 &&
		    json_integer_value(id) <= INT32_MAX)
			bytes = km_tokenizer_bytes(tokenizer, (int32_t)json_integer_value(id),
			                           &len);
		if (!bytes)
			return km_openai_fail(error, 400, "tokens", NULL,
			                      "tokens[%zu] is no token id.", i);
		km_buf_append(text, bytes, len);
	}
	return 0;
}

static void detokenize(struct km_serve *s, km_exchange *x)
{
	const km_buf *body = km_exchange_body(x);
	km_openai_error error;
	km_buf text = KM_BUF_INIT, out = KM_BUF_INIT;
	json_t *json = km_openai_load(body->data ? body->data : "", body->len, &error);

	if (!json || detokenize_all(s, json_object_get(json, "tokens"), &text, &error) < 0) {
		km_http_reply_error(x, &error);
	} else {
		km_buf_puts(&out, "{\"prompt\":");
		km_json_fast_write(&out, text.data ? text.data : "", text.len);
		km_buf_putc(&out, '}');
		reply_json(x, &out);
	}
	json_decref(json);
	km_buf_release(&text);
}

/* Routes. */

struct route {
	const char *method, *path;
	bool prefix, open; /* any path that begins so; needs no key */
	void (*handle)(struct km_serve *serve, km_exchange *exchange);
};

static const struct route routes[] = {
	{ "POST", "/v1/chat/completions", false, false, chat },
	{ "POST", "/v1/completions", false, false, completions },
	{ "GET", "/v1/models", false, false, models },
	{ "GET", "/v1/models/", true, false, one_model },
	{ "GET", "/health", false, true, health },
	{ "GET", "/metrics", false, true, metrics },
	{ "GET", "/version", false, false, version },
	{ "POST", "/tokenize", false, false, tokenize },
	{ "POST", "/detokenize", false, false, detokenize },
	{ "POST", "/flush_cache", false, false, flush_cache },
};

enum { ROUTES = sizeof(routes) / sizeof(routes[0]) };

static const struct route *find_route(const char *path)
{
	for (int i = 0; i < ROUTES; i++) {
		size_t len = strlen(routes[i].path);

		if (routes[i].prefix ? !strncmp(path, routes[i].path, len) && path[len] :
		                       !strcmp(path, routes[i].path))
			return &routes[i];
	}
	return NULL;
}

static bool same_method(const struct route *route, const char *method)
{
	return !strcmp(route->method, method) ||
	       (!strcmp(route->method, "GET") && !strcmp(method, "HEAD"));
}

/* Looks at every byte whatever the first difference, so that time tells nothing of the key. */
static bool key_matches(const char *key, const char *authorization)
{
	static const char scheme[] = "Bearer ";
	size_t n = strlen(key), given;
	unsigned char differ = 0;

	if (!authorization || strncasecmp(authorization, scheme, sizeof(scheme) - 1) != 0)
		return false;
	authorization += sizeof(scheme) - 1;
	given = strlen(authorization);
	for (size_t i = 0; i < n; i++)
		differ |= (unsigned char)(key[i] ^ (i < given ? authorization[i] : 0));
	return given == n && !differ;
}

static int on_admit(void *ctx, const char *method, const char *path, const char *authorization,
                    km_openai_error *error)
{
	const struct km_serve *s = ctx;
	const struct route *route = find_route(path);

	if (s->options.api_key && !(route && route->open) &&
	    !key_matches(s->options.api_key, authorization))
		return km_openai_fail(error, 401, NULL, "invalid_api_key",
		                      "This server needs an API key: Authorization: Bearer KEY.");
	if (!route)
		return km_openai_fail(error, 404, NULL, NULL, "There is no %.200s here.", path);
	if (!same_method(route, method)) {
		km_openai_fail(error, 405, NULL, NULL, "%s takes %s, not %.20s.", route->path,
		               route->method, method);
		error->allow = route->method;
		return KM_EINVAL;
	}
	return 0;
}

static void on_handle(void *ctx, km_exchange *x)
{
	find_route(km_exchange_path(x))->handle(ctx, x);
}

/* A path is a stranger's bytes: what could break a line of the log is shown as '?'. */
static void write_path(km_buf *out, const char *path)
{
	for (int i = 0; path[i] && i < 200; i++)
		km_buf_putc(out, path[i] > ' ' && path[i] < 0x7f ? path[i] : '?');
}

static void on_done(void *ctx, const km_exchange *x)
{
	struct km_serve *s = ctx;
	struct pending *p = km_exchange_later_ctx(x);
	km_buf line = KM_BUF_INIT;

	km_metrics_count_response(&s->service->metrics, km_exchange_status(x));
	if (km_exchange_gone(x))
		s->service->metrics.disconnected++;
	if (!s->options.log_requests)
		return;
	km_buf_printf(&line, "%.10s ", km_exchange_method(x));
	write_path(&line, km_exchange_path(x));
	km_buf_printf(&line, " %d %.3f s", km_exchange_status(x), km_exchange_seconds(x));
	if (p) {
		km_buf_putc(&line, ' ');
		km_job_describe(p->job, &line);
	}
	km_log(KM_LOG_INFO, "%s%s", line.data, km_exchange_gone(x) ? ", client gone" : "");
	km_buf_release(&line);
}

static void on_tick(void *ctx)
{
	km_service_reap(((struct km_serve *)ctx)->service);
}

int km_serve_open(km_serve **out, km_service *service, const km_serve_options *options, km_err *err)
{
	km_serve *s = km_xcalloc(1, sizeof(*s));
	km_http_options http = {
		.host = options->host,
		.port = options->port,
		.max_body_bytes = options->max_body_bytes,
		.max_connections = options->max_connections,
		.request_timeout_s = options->request_timeout_s,
		.stream_timeout_s = options->stream_timeout_s,
		.keepalive_s = options->keepalive_s,
		.workers = WORKERS,
		.admit = on_admit,
		.handle = on_handle,
		.done = on_done,
		.tick = on_tick,
		.ctx = s,
	};
	int rc;

	s->service = service;
	s->options = *options;
	s->started = time(NULL);
	rc = km_http_open(&s->http, &http, err);
	if (rc < 0) {
		free(s);
		return rc;
	}
	*out = s;
	return 0;
}

int km_serve_port(const km_serve *s)
{
	return km_http_port(s->http);
}

void km_serve_drain(km_serve *s)
{
	km_http_drain(s->http);
}

bool km_serve_wait_idle(km_serve *s, double seconds)
{
	return km_http_wait_idle(s->http, seconds);
}

int km_serve_run(km_serve *s, const km_serve_until *until, km_err *err)
{
	struct timespec tick = { 0, 50000000 };
	double end;
	bool failed = false;

	while (!failed && !until->stop(until->ctx)) {
		nanosleep(&tick, NULL);
		failed = km_engine_has_failed(s->service->engine, err);
	}
	if (!failed)
		km_log(KM_LOG_INFO, "finishing the running requests; once more to stop at once");
	km_serve_drain(s);
	end = km_now_s() + until->drain_s;
	while (until->stop(until->ctx) < 2 && km_now_s() < end && !km_serve_wait_idle(s, 0.1))
		;
	return failed || km_engine_has_failed(s->service->engine, err) ? KM_EDEVICE : 0;
}

void km_serve_close(km_serve *s)
{
	if (!s)
		return;
	km_http_close(s->http);
	free(s);
}
