#include "wire/metrics.h"

#include <stdio.h>
#include <string.h>

#include "base/err.h"

static const double first_token_bounds[] = { 0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08,
	                                     0.1,   0.25,  0.5,  0.75, 1,    2.5,  5,
	                                     7.5,   10,    20,   30,   60,   120 };
static const double token_bounds[] = { 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15,
	                               0.2,   0.3,    0.4,   0.5,  0.75,  1,    2.5,   5 };
static const double request_bounds[] = { 0.1, 0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,
	                                 15,  20,  30,  40,  50, 60,  120, 300, 600, 1800 };

static const int statuses[KM_MAX_STATUSES] = { 200, 400, 401, 404, 405, 409, 413, 429, 500, 503 };

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

void km_metrics_init(km_metrics *m)
{
	memset(m, 0, sizeof(*m));
	m->time_to_first_token.bounds = first_token_bounds;
	m->time_to_first_token.count = COUNT(first_token_bounds);
	m->inter_token_latency.bounds = token_bounds;
	m->inter_token_latency.count = COUNT(token_bounds);
	m->e2e_request_latency.bounds = request_bounds;
	m->e2e_request_latency.count = COUNT(request_bounds);
	m->request_queue_time.bounds = request_bounds;
	m->request_queue_time.count = COUNT(request_bounds);
}

void km_histogram_add(km_histogram *h, double seconds)
{
	int i = 0;

	while (i < h->count && seconds > h->bounds[i])
		i++;
	atomic_fetch_add_explicit(&h->bucket[i], 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&h->sum_us, (int64_t)(seconds * 1e6), memory_order_relaxed);
}

void km_metrics_count_finish(km_metrics *m, enum km_finish finish, bool tool_calls)
{
	atomic_fetch_add(&m->success[tool_calls ? KM_FINISH_ERROR + 1 : (int)finish], 1);
}

void km_metrics_count_response(km_metrics *m, int status)
{
	for (int i = 0; i < KM_MAX_STATUSES && statuses[i]; i++)
		if (statuses[i] == status)
			atomic_fetch_add(&m->responses[i], 1);
}

/* Label values escape backslash, quote and newline; nothing else. */
static void write_label(km_buf *out, const char *s)
{
	for (; *s; s++) {
		if (*s == '\\' || *s == '"')
			km_buf_putc(out, '\\');
		if (*s == '\n')
			km_buf_puts(out, "\\n");
		else
			km_buf_putc(out, *s);
	}
}

struct writer {
	km_buf *out;
	const char *model;
};

static void head(const struct writer *w, const char *name, const char *type, const char *help)
{
	km_buf_printf(w->out, "# HELP kimi:%s %s\n# TYPE kimi:%s %s\n", name, help, name, type);
}

/* `extra` is "" or a further label with its comma: ",le=\"1\"". */
static void sample(const struct writer *w, const char *name, const char *extra, double value)
{
	km_buf_printf(w->out, "kimi:%s{model_name=\"", name);
	write_label(w->out, w->model);
	km_buf_printf(w->out, "\"%s} %.15g\n", extra, value);
}

static void single(const struct writer *w, const char *name, const char *type, const char *help,
                   double value)
{
	head(w, name, type, help);
	sample(w, name, "", value);
}

static void histogram(const struct writer *w, const char *name, const char *help,
                      const km_histogram *h)
{
	char full[80], label[48];
	int64_t total = 0;

	head(w, name, "histogram", help);
	snprintf(full, sizeof(full), "%s_bucket", name);
	for (int i = 0; i <= h->count; i++) {
		total += h->bucket[i];
		if (i < h->count)
			snprintf(label, sizeof(label), ",le=\"%.15g\"", h->bounds[i]);
		else
			snprintf(label, sizeof(label), ",le=\"+Inf\"");
		sample(w, full, label, (double)total);
	}
	snprintf(full, sizeof(full), "%s_sum", name);
	sample(w, full, "", (double)h->sum_us * 1e-6);
	snprintf(full, sizeof(full), "%s_count", name);
	sample(w, full, "", (double)total);
}

static void write_gauges(const struct writer *w, const km_engine_stats *s)
{
	single(w, "num_requests_running", "gauge", "Sequences in the batch.", s->running);
	single(w, "num_requests_waiting", "gauge", "Sequences in the queue.", s->waiting);
	single(w, "kv_cache_usage_perc", "gauge", "Share of KV pages held by requests; 1 is all.",
	       s->pages_total ? (double)s->pages_used / (double)s->pages_total : 0);
	head(w, "kv_cache_pages", "gauge",
	     "KV pages held by requests, kept for reuse, and in all.");
	sample(w, "kv_cache_pages", ",state=\"used\"", (double)s->pages_used);
	sample(w, "kv_cache_pages", ",state=\"cached\"", (double)s->pages_cached);
	sample(w, "kv_cache_pages", ",state=\"total\"", (double)s->pages_total);
}

static void write_counters(const struct writer *w, const km_engine_stats *s)
{
	single(w, "prompt_tokens_total", "counter", "Prompt tokens computed or reused.",
	       (double)s->prompt_tokens);
	single(w, "generation_tokens_total", "counter", "Tokens generated.",
	       (double)s->generation_tokens);
	single(w, "prefix_cache_queries_total", "counter",
	       "Prompt tokens looked up in the prefix cache.", (double)s->prefix_queries);
	single(w, "prefix_cache_hits_total", "counter", "Prompt tokens found there.",
	       (double)s->prefix_hits);
	single(w, "num_preemptions_total", "counter",
	       "Sequences that gave their pages back for a while.", (double)s->preemptions);
	single(w, "engine_steps_total", "counter", "Forward passes.", (double)s->steps);
}

static void write_requests(const struct writer *w, const km_metrics *m)
{
	static const struct {
		int at;
		const char *label;
	} reasons[] = {
		{ KM_FINISH_STOP, ",finished_reason=\"stop\"" },
		{ KM_FINISH_LENGTH, ",finished_reason=\"length\"" },
		{ KM_FINISH_ABORT, ",finished_reason=\"abort\"" },
		{ KM_FINISH_ERROR, ",finished_reason=\"error\"" },
		{ KM_FINISH_ERROR + 1, ",finished_reason=\"tool_calls\"" },
	};
	char label[40];

	head(w, "request_success_total", "counter", "Choices that ended, by why.");
	for (int i = 0; i < COUNT(reasons); i++)
		sample(w, "request_success_total", reasons[i].label,
		       (double)m->success[reasons[i].at]);
	head(w, "http_responses_total", "counter", "Replies by status.");
	for (int i = 0; i < KM_MAX_STATUSES && statuses[i]; i++) {
		snprintf(label, sizeof(label), ",status=\"%d\"", statuses[i]);
		sample(w, "http_responses_total", label, (double)m->responses[i]);
	}
	single(w, "client_disconnects_total", "counter",
	       "Clients gone before their answer was whole.", (double)m->disconnected);
}

void km_metrics_write(const km_metrics *m, const km_engine_stats *stats, const char *model,
                      km_buf *out)
{
	struct writer w = { out, model };

	write_gauges(&w, stats);
	write_counters(&w, stats);
	write_requests(&w, m);
	histogram(&w, "time_to_first_token_seconds", "From a request's arrival to its first token.",
	          &m->time_to_first_token);
	histogram(&w, "inter_token_latency_seconds", "Between the tokens of a choice.",
	          &m->inter_token_latency);
	histogram(&w, "e2e_request_latency_seconds", "From a request's arrival to its last token.",
	          &m->e2e_request_latency);
	histogram(&w, "request_queue_time_seconds",
	          "From a request's arrival at the engine to its prompt's first step.",
	          &m->request_queue_time);
}
