#include "wire/batch_lines.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/progress.h"
#include "wire/json_text.h"

struct batch;

struct slot {
	struct batch *batch;
	km_job *job;     /* NULL: free */
	char *custom_id; /* owned */
	bool ready;      /* under the batch's lock: there is something to read */
	km_buf out;
};

struct batch {
	km_service *service;
	const km_batch_options *options;
	km_batch_result *result;
	struct slot *slots;
	int running;
	int64_t line;
	km_buf input;    /* read and not yet taken */
	size_t searched; /* bytes of it that hold no newline */
	bool ended;      /* nothing more will be read */
	bool too_long;   /* the line at hand was, and its beginning is gone */
	km_progress progress;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	_Atomic int unreleased; /* jobs that may still call */
};

/* Output. */

static int write_line(struct batch *b, const km_buf *line, km_err *err)
{
	if (fwrite(line->data, 1, line->len, b->options->out) != line->len ||
	    fflush(b->options->out))
		return km_fail(err, KM_EIO, "cannot write the answers: %s", strerror(errno));
	return 0;
}

static void write_head(struct batch *b, const char *custom_id, km_buf *line)
{
	km_buf_printf(line,
	              "{\"id\":\"batch_req_%lld\",\"custom_id\":", (long long)b->result->done + 1);
	if (custom_id)
		km_json_puts(line, custom_id);
	else
		km_buf_puts(line, "null");
}

static int finish_line(struct batch *b, km_buf *line, bool failed, km_err *err)
{
	int rc = write_line(b, line, err);

	km_buf_release(line);
	b->result->done++;
	b->result->failed += failed;
	km_progress_add(&b->progress, 1);
	return rc;
}

static int write_response(struct batch *b, const char *custom_id, int status,
                          const char *request_id, const km_buf *body, km_err *err)
{
	km_buf line = KM_BUF_INIT;

	write_head(b, custom_id, &line);
	km_buf_printf(&line, ",\"response\":{\"status_code\":%d,\"request_id\":", status);
	if (request_id)
		km_json_puts(&line, request_id);
	else
		km_buf_puts(&line, "null");
	km_buf_puts(&line, ",\"body\":");
	km_buf_append(&line, body->data, body->len);
	km_buf_puts(&line, "},\"error\":null}\n");
	return finish_line(b, &line, status != 200, err);
}

static int write_refusal(struct batch *b, const char *custom_id, const km_openai_error *error,
                         km_err *err)
{
	km_buf body = KM_BUF_INIT;
	int rc;

	km_openai_error_json(error, &body);
	rc = write_response(b, custom_id, error->status, NULL, &body, err);
	km_buf_release(&body);
	return rc;
}

/* A line that is no request. */
static int write_bad_line(struct batch *b, const char *custom_id, const char *message, km_err *err)
{
	km_buf line = KM_BUF_INIT, text = KM_BUF_INIT;

	write_head(b, custom_id, &line);
	km_buf_puts(&line, ",\"response\":null,\"error\":{\"code\":\"invalid_line\",\"message\":");
	km_buf_printf(&text, "Line %lld: %s", (long long)b->line, message);
	km_json_puts(&line, text.data);
	km_buf_release(&text);
	km_buf_puts(&line, "}}\n");
	return finish_line(b, &line, true, err);
}

/* Jobs. */

static void on_wake(void *ctx)
{
	struct slot *s = ctx;

	pthread_mutex_lock(&s->batch->lock);
	s->ready = true;
	pthread_cond_signal(&s->batch->changed);
	pthread_mutex_unlock(&s->batch->lock);
}

static void on_last(void *ctx)
{
	((struct slot *)ctx)->batch->unreleased--;
}

static struct slot *free_slot(struct batch *b)
{
	for (int i = 0; i < b->options->concurrency; i++)
		if (!b->slots[i].job)
			return &b->slots[i];
	return NULL;
}

static void slot_clear(struct slot *s)
{
	free(s->custom_id);
	s->custom_id = NULL;
	s->job = NULL;
	km_buf_clear(&s->out);
}

static const char *check_line(const json_t *line, enum km_endpoint *endpoint)
{
	const char *method = json_string_value(json_object_get(line, "method"));
	const char *url = json_string_value(json_object_get(line, "url"));

	if (!json_is_string(json_object_get(line, "custom_id")))
		return "custom_id must be a string.";
	if (!method || strcmp(method, "POST") != 0)
		return "method must be \"POST\".";
	if (url && !strcmp(url, "/v1/chat/completions"))
		*endpoint = KM_ENDPOINT_CHAT;
	else if (url && !strcmp(url, "/v1/completions"))
		*endpoint = KM_ENDPOINT_COMPLETIONS;
	else
		return "url must be \"/v1/chat/completions\" or \"/v1/completions\".";
	if (!json_is_object(json_object_get(line, "body")))
		return "body must be an object.";
	if (json_is_true(json_object_get(json_object_get(line, "body"), "stream")))
		return "stream has no meaning in a batch.";
	return NULL;
}

static int start(struct batch *b, const json_t *line, enum km_endpoint endpoint, km_err *err)
{
	const char *custom_id = json_string_value(json_object_get(line, "custom_id"));
	json_t *body = json_object_get(line, "body");
	struct slot *s = free_slot(b);
	km_job_events events = { on_wake, on_wake, on_last, s };
	km_openai_error error;

	s->ready = false;
	b->unreleased++;
	if (km_job_start(&s->job, b->service, endpoint, json_incref(body), &events, &error) < 0) {
		s->job = NULL;
		return write_refusal(b, custom_id, &error, err);
	}
	s->custom_id = km_xstrdup(custom_id);
	b->running++;
	return 0;
}

static int take_line(struct batch *b, const char *text, size_t len, km_err *err)
{
	km_openai_error error;
	enum km_endpoint endpoint;
	json_t *json;
	const char *wrong;
	int rc;

	json = km_openai_load(text, len, &error);
	if (!json)
		return write_bad_line(b, NULL, error.message, err);
	wrong = check_line(json, &endpoint);
	if (wrong)
		rc = write_bad_line(b, json_string_value(json_object_get(json, "custom_id")), wrong,
		                    err);
	else
		rc = start(b, json, endpoint, err);
	json_decref(json);
	return rc;
}

/* Whatever has finished is written; the slot is free again. */
static int collect(struct batch *b, struct slot *s, km_err *err)
{
	km_openai_error error;
	enum km_job_state state = km_job_read(s->job, &s->out, &error);
	km_job *job = s->job;
	int rc;

	if (state == KM_JOB_WAITING || state == KM_JOB_STREAMING)
		return 0;
	if (state == KM_JOB_FAILED)
		rc = write_refusal(b, s->custom_id, &error, err);
	else
		rc = write_response(b, s->custom_id, 200, km_job_id(job), &s->out, err);
	slot_clear(s);
	b->running--;
	km_job_release(job);
	return rc;
}

static bool take_ready(struct batch *b, struct slot *s)
{
	bool ready;

	pthread_mutex_lock(&b->lock);
	ready = s->job && s->ready;
	s->ready = false;
	pthread_mutex_unlock(&b->lock);
	return ready;
}

static int collect_all(struct batch *b, km_err *err)
{
	for (int i = 0; i < b->options->concurrency; i++)
		if (take_ready(b, &b->slots[i]))
			KM_TRY(collect(b, &b->slots[i], err));
	km_service_reap(b->service);
	return 0;
}

/* Waits for a job, but not so long that Ctrl-C would not be noticed. */
static void wait_a_little(struct batch *b)
{
	struct timespec until;
	bool ready = false;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += 50000000;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	pthread_mutex_lock(&b->lock);
	for (int i = 0; i < b->options->concurrency; i++)
		ready |= b->slots[i].job && b->slots[i].ready;
	if (!ready)
		pthread_cond_timedwait(&b->changed, &b->lock, &until);
	pthread_mutex_unlock(&b->lock);
}

/* Input. */

enum { READ_BYTES = 1 << 16 };

/* Reads once, if there is something to read now or within `wait_ms`. */
static int read_some(struct batch *b, int wait_ms, km_err *err)
{
	struct pollfd p = { .fd = b->options->in, .events = POLLIN };
	ssize_t n;

	if (poll(&p, 1, wait_ms) <= 0)
		return 0;
	km_buf_reserve(&b->input, READ_BYTES);
	n = read(b->options->in, b->input.data + b->input.len, READ_BYTES);
	if (n < 0 && errno != EINTR && errno != EAGAIN)
		return km_fail(err, KM_EIO, "cannot read the requests: %s", strerror(errno));
	b->ended |= n == 0;
	b->input.len += n > 0 ? (size_t)n : 0;
	return 0;
}

/* The length of the first line, newline included; 0: it is not all there yet. */
static size_t whole_line(struct batch *b)
{
	const char *end;

	if (b->searched < b->input.len) {
		end = memchr(b->input.data + b->searched, '\n', b->input.len - b->searched);
		if (end)
			return (size_t)(end - b->input.data) + 1;
		b->searched = b->input.len;
	}
	return b->ended ? b->input.len : 0;
}

static bool is_blank(const char *s, size_t len)
{
	while (len && strchr(" \t\r\n", s[len - 1]))
		len--;
	return !len;
}

/* A line longer than a request may be is an error on its own: it is skipped, not kept. */
static int take_input(struct batch *b, size_t len, km_err *err)
{
	int rc = 0;

	b->line++;
	if (b->too_long || len > b->options->max_line_bytes)
		rc = write_bad_line(b, NULL, "the line is longer than a request may be.", err);
	else if (!is_blank(b->input.data, len))
		rc = take_line(b, b->input.data, len, err);
	km_buf_drop(&b->input, len);
	b->searched = 0;
	b->too_long = false;
	return rc;
}

static bool has_input(const struct batch *b)
{
	return !b->ended || b->input.len || b->too_long;
}

/* One turn: takes a line if there is one and room for it, else waits for a job or for input. */
static int turn(struct batch *b, km_err *err)
{
	size_t len = 0;

	if (has_input(b) && free_slot(b)) {
		len = whole_line(b);
		if (!len && b->input.len > b->options->max_line_bytes) {
			b->too_long = true;
			b->searched = 0;
			km_buf_clear(&b->input);
		}
		if (!len && !b->ended)
			KM_TRY(read_some(b, b->running ? 1 : 50, err));
		if (len || (b->ended && b->too_long && !b->input.len))
			return take_input(b, len, err);
	} else {
		wait_a_little(b);
	}
	return 0;
}

static void drop_input(struct batch *b)
{
	b->ended = true;
	b->too_long = false;
	b->searched = 0;
	km_buf_clear(&b->input);
}

static int run(struct batch *b, km_err *err)
{
	bool failed = false;
	int rc = 0;

	while (rc >= 0 && (has_input(b) || b->running)) {
		b->result->stopped = b->options->stop && b->options->stop(b->options->ctx);
		if (b->result->stopped)
			break;
		failed = failed || km_engine_has_failed(b->service->engine, NULL);
		if (failed)
			drop_input(b);
		rc = turn(b, err);
		if (rc >= 0)
			rc = collect_all(b, err);
	}
	if (rc >= 0 && km_engine_has_failed(b->service->engine, err))
		rc = KM_EDEVICE;
	return rc;
}

/* A file's lines are counted beforehand, so that the bar has an end; a pipe's cannot be. */
static int64_t count_lines(int fd)
{
	char block[READ_BYTES];
	struct stat st;
	int64_t lines = 0;
	off_t at = lseek(fd, 0, SEEK_CUR);
	ssize_t n;

	if (at < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode))
		return 0;
	while ((n = pread(fd, block, sizeof(block), at)) > 0) {
		for (ssize_t i = 0; i < n; i++)
			lines += block[i] == '\n';
		at += n;
	}
	return lines;
}

static void cancel_rest(struct batch *b)
{
	struct timespec pause = { 0, 1000000 };

	for (int i = 0; i < b->options->concurrency; i++) {
		if (b->slots[i].job)
			km_job_release(b->slots[i].job);
		b->slots[i].job = NULL;
		free(b->slots[i].custom_id);
	}
	while (b->unreleased) { /* until the engine has let go of all */
		km_service_reap(b->service);
		nanosleep(&pause, NULL);
	}
}

int km_batch_run(km_service *service, const km_batch_options *options, km_batch_result *result,
                 km_err *err)
{
	struct batch b = { .service = service, .options = options, .result = result };
	int rc;

	*result = (km_batch_result){ 0 };
	b.slots = km_xcalloc((size_t)options->concurrency, sizeof(*b.slots));
	for (int i = 0; i < options->concurrency; i++)
		b.slots[i].batch = &b;
	pthread_mutex_init(&b.lock, NULL);
	pthread_cond_init(&b.changed, NULL);
	km_progress_init(&b.progress, "answering", "requests", count_lines(options->in),
	                 options->quiet);
	rc = run(&b, err);
	cancel_rest(&b);
	km_progress_finish(&b.progress);
	km_buf_release(&b.input);
	for (int i = 0; i < options->concurrency; i++)
		km_buf_release(&b.slots[i].out);
	free(b.slots);
	pthread_mutex_destroy(&b.lock);
	pthread_cond_destroy(&b.changed);
	return rc;
}
