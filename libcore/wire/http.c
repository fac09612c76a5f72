/*
 * Suspending. libmicrohttpd polls a connection only while it is not suspended. An exchange that
 * waits is suspended by the socket thread and resumed by km_http_wake. The two meet under the
 * exchange's lock:
 *
 *     socket thread: pull says WAIT -> lock; if `woken`: clear it and pull again
 *                                             else: `suspended`, MHD_suspend_connection; unlock
 *     any thread:    lock; if `suspended`: clear it, MHD_resume_connection; else `woken`; unlock
 *
 * so a wake between the pull and the suspension is never lost. Locks, outermost first: the server's
 * list, an exchange, libmicrohttpd's own. No callback of the user's runs under an exchange's lock.
 *
 * Time limits are the watcher's, not libmicrohttpd's, whose one timeout knows neither a total time
 * nor a suspended connection. It ends a connection by shutting the socket down, which the socket
 * thread then sees.
 */
#include "wire/http.h"

#include <errno.h>
#include <microhttpd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "wire/listen.h"
#include "wire/sse.h"

enum {
	WATCH_MS = 50,
	DRAIN_PATIENCE_S = 1, /* with a request whose rest does not come */
	READ_BLOCK = 16 * 1024,
};

enum state { READING, HANDLING, SENDING, STREAMING };

struct connection {
	struct connection *prev, *next;
	int fd;
	double since;         /* when it began to wait for a request's headers */
	km_exchange *current; /* or NULL */
	bool abandoned;       /* as the watcher last saw it */
};

struct km_exchange {
	km_http *http;
	struct MHD_Connection *mhd;
	struct connection *connection;
	atomic_int references;
	char *method, *path; /* owned */
	km_buf body;
	double started, ended;
	int status;
	_Atomic double last_pull; /* the socket thread's last sign of progress, either way */

	pthread_mutex_t lock; /* over what follows */
	enum state state;
	bool suspended, woken, closed;
	bool gone;            /* the client, or our patience */
	bool told;            /* `gone` has been called */
	bool cut, ping;
	bool refused;         /* before the body: `out` is the reply */
	bool has_reply, has_later;
	const char *content_type;
	const char *allow; /* of a 405 */
	km_exchange_later later;

	/* the socket thread's */
	int64_t discarded; /* bytes of a body past the limit */
	km_buf out;
	size_t out_at;
	bool ended_stream;
	km_exchange *next_job;
};

struct km_http {
	km_http_options options;
	struct MHD_Daemon *daemon;
	int port;
	pthread_mutex_t lock; /* over the list, the jobs, `open` */
	pthread_cond_t jobs_changed, idle;
	struct connection *connections;
	km_exchange *first_job, *last_job;
	int open;
	atomic_bool draining, stopping;
	pthread_t watcher, *workers;
	int worker_count;
};

/* Exchanges. */

km_exchange *km_exchange_keep(km_exchange *x)
{
	atomic_fetch_add(&x->references, 1);
	return x;
}

void km_exchange_release(km_exchange *x)
{
	if (atomic_fetch_sub(&x->references, 1) != 1)
		return;
	pthread_mutex_destroy(&x->lock);
	km_buf_release(&x->body);
	km_buf_release(&x->out);
	free(x->method);
	free(x->path);
	free(x);
}

const char *km_exchange_method(const km_exchange *x)
{
	return x->method;
}

const char *km_exchange_path(const km_exchange *x)
{
	return x->path;
}

const km_buf *km_exchange_body(const km_exchange *x)
{
	return &x->body;
}

int km_exchange_status(const km_exchange *x)
{
	return x->status;
}

bool km_exchange_gone(const km_exchange *x)
{
	return x->gone;
}

void *km_exchange_later_ctx(const km_exchange *x)
{
	return x->has_later ? x->later.ctx : NULL;
}

double km_exchange_seconds(const km_exchange *x)
{
	return (x->ended > 0 ? x->ended : km_now_s()) - x->started;
}

void km_http_wake(km_exchange *x)
{
	pthread_mutex_lock(&x->lock);
	if (x->suspended && !x->closed) {
		x->suspended = false;
		MHD_resume_connection(x->mhd);
	} else {
		x->woken = true;
	}
	pthread_mutex_unlock(&x->lock);
}

void km_http_cut(km_exchange *x)
{
	pthread_mutex_lock(&x->lock);
	x->cut = true;
	pthread_mutex_unlock(&x->lock);
}

void km_http_reply(km_exchange *x, int status, const char *content_type, km_buf *body)
{
	pthread_mutex_lock(&x->lock);
	KM_ASSERT(x->state == HANDLING && !x->has_reply && !x->has_later);
	km_buf_release(&x->out);
	x->out = *body;
	*body = (km_buf)KM_BUF_INIT;
	x->status = status;
	x->content_type = content_type;
	x->has_reply = true;
	pthread_mutex_unlock(&x->lock);
	km_http_wake(x);
}

void km_http_reply_error(km_exchange *x, const km_openai_error *error)
{
	km_buf body = KM_BUF_INIT;

	km_openai_error_json(error, &body);
	km_http_reply(x, error->status, "application/json", &body);
}

void km_http_answer_later(km_exchange *x, const km_exchange_later *later)
{
	bool gone;

	pthread_mutex_lock(&x->lock);
	KM_ASSERT(x->state == HANDLING && !x->has_reply && !x->has_later);
	x->later = *later;
	x->has_later = true;
	gone = x->gone && !x->told;
	x->told |= gone;
	pthread_mutex_unlock(&x->lock);
	if (gone)
		later->gone(later->ctx);
	km_http_wake(x);
}

/* The client will not have the reply: its owner is told, once it has one. */
static void set_gone(km_exchange *x)
{
	bool tell;

	pthread_mutex_lock(&x->lock);
	x->gone = true;
	tell = x->has_later && !x->told;
	x->told |= tell;
	pthread_mutex_unlock(&x->lock);
	if (tell)
		x->later.gone(x->later.ctx);
}

/* Socket thread: true when it is suspended now; false when a wake came first. */
static bool suspend(km_exchange *x)
{
	bool suspended;

	pthread_mutex_lock(&x->lock);
	suspended = !x->woken;
	x->woken = false;
	if (suspended) {
		x->suspended = true;
		MHD_suspend_connection(x->mhd);
	}
	pthread_mutex_unlock(&x->lock);
	return suspended;
}

static bool is_gone(km_exchange *x)
{
	bool gone;

	pthread_mutex_lock(&x->lock);
	gone = x->gone;
	pthread_mutex_unlock(&x->lock);
	return gone;
}

static bool take_ping(km_exchange *x)
{
	bool ping;

	pthread_mutex_lock(&x->lock);
	ping = x->ping;
	x->ping = false;
	pthread_mutex_unlock(&x->lock);
	return ping;
}

/* Output. */

/* Pulls until there are bytes, the end, or nothing to do but wait. False: wait. */
static bool refill(km_exchange *x)
{
	for (;;) {
		int status = 200;
		enum km_pull got;

		km_buf_clear(&x->out);
		x->out_at = 0;
		if (is_gone(x))
			return true;
		got = x->later.pull(x->later.ctx, &x->out, &status);
		KM_ASSERT(got != KM_PULL_REPLY);
		x->ended_stream = got == KM_PULL_END;
		if (x->out.len || x->ended_stream)
			return true;
		if (take_ping(x)) {
			km_sse_comment(&x->out, "ping", 4);
			return true;
		}
		if (suspend(x))
			return false;
	}
}

static ssize_t read_out(void *ctx, uint64_t position, char *to, size_t max)
{
	km_exchange *x = ctx;
	size_t n;

	(void)position;
	x->last_pull = km_now_s();
	if (x->state == STREAMING && x->out_at == x->out.len) {
		if (x->ended_stream)
			return MHD_CONTENT_READER_END_OF_STREAM;
		if (!refill(x))
			return 0;
	}
	if (is_gone(x))
		return MHD_CONTENT_READER_END_WITH_ERROR;
	n = x->out.len - x->out_at;
	if (!n)
		return MHD_CONTENT_READER_END_OF_STREAM;
	n = n < max ? n : max;
	memcpy(to, x->out.data + x->out_at, n);
	x->out_at += n;
	return (ssize_t)n;
}

static enum MHD_Result send_response(km_exchange *x, bool stream)
{
	uint64_t size = stream ? MHD_SIZE_UNKNOWN : x->out.len;
	struct MHD_Response *response;
	enum MHD_Result rc;

	response = MHD_create_response_from_callback(size, READ_BLOCK, read_out, x, NULL);
	if (!response)
		return MHD_NO;
	pthread_mutex_lock(&x->lock);
	x->state = stream ? STREAMING : SENDING;
	pthread_mutex_unlock(&x->lock);
	x->last_pull = km_now_s();
	MHD_add_response_header(response, "Content-Type",
	                        stream ? "text/event-stream" : x->content_type);
	if (stream) {
		MHD_add_response_header(response, "Cache-Control", "no-cache");
		MHD_add_response_header(response, "X-Accel-Buffering", "no");
	}
	if (x->http->draining)
		MHD_add_response_header(response, "Connection", "close");
	if (x->status == 429 || x->status == 503)
		MHD_add_response_header(response, "Retry-After", "1");
	if (x->status == 401)
		MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
	if (x->allow)
		MHD_add_response_header(response, "Allow", x->allow);
	rc = MHD_queue_response(x->mhd, (unsigned)x->status, response);
	MHD_destroy_response(response);
	return rc;
}

/* The exchange has been handed over and its connection was resumed, or never suspended. */
static enum MHD_Result answer(km_exchange *x)
{
	for (;;) {
		bool has_reply, has_later;
		int status = 200;

		pthread_mutex_lock(&x->lock);
		has_reply = x->has_reply;
		has_later = x->has_later;
		pthread_mutex_unlock(&x->lock);
		if ((has_reply || has_later) &&
		    is_gone(x)) /* not before: a worker may still hold it */
			return MHD_NO;
		if (has_reply)
			return send_response(x, false);
		if (has_later) {
			enum km_pull got = x->later.pull(x->later.ctx, &x->out, &status);

			if (got != KM_PULL_WAIT) {
				x->status = status;
				x->content_type = "application/json";
				x->ended_stream = got == KM_PULL_END;
				return send_response(x, got != KM_PULL_REPLY);
			}
		}
		if (suspend(x))
			return MHD_YES;
	}
}

/* Input. */

static void refuse(km_exchange *x, const km_openai_error *error)
{
	km_openai_error_json(error, &x->out);
	x->status = error->status;
	x->allow = error->allow;
	x->content_type = "application/json";
	x->refused = true;
}

static bool length_fits(const km_exchange *x)
{
	const char *s = MHD_lookup_connection_value(x->mhd, MHD_HEADER_KIND, "Content-Length");

	return !s || strtoll(s, NULL, 10) <= x->http->options.max_body_bytes;
}

static void too_large(km_exchange *x)
{
	km_openai_error error;

	km_openai_fail(&error, 413, NULL, "request_too_large",
	               "The body is larger than %lld bytes.",
	               (long long)x->http->options.max_body_bytes);
	refuse(x, &error);
}

static km_exchange *begin(km_http *http, struct MHD_Connection *mhd, const char *method,
                          const char *path)
{
	const union MHD_ConnectionInfo *info;
	km_exchange *x = km_xcalloc(1, sizeof(*x));

	x->http = http;
	x->mhd = mhd;
	x->references = 1;
	x->method = km_xstrdup(method);
	x->path = km_xstrdup(path);
	x->started = km_now_s();
	x->last_pull = x->started;
	km_buf_init(&x->body, (size_t)http->options.max_body_bytes);
	pthread_mutex_init(&x->lock, NULL);
	info = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
	x->connection = info ? info->socket_context : NULL;
	pthread_mutex_lock(&http->lock);
	http->open++;
	if (x->connection)
		x->connection->current = x;
	pthread_mutex_unlock(&http->lock);
	return x;
}

static enum MHD_Result first_call(km_http *http, struct MHD_Connection *mhd, const char *method,
                                  const char *path, void **per_request)
{
	km_exchange *x = begin(http, mhd, method, path);
	km_openai_error error;

	*per_request = x;
	if (http->draining) {
		km_openai_fail(&error, 503, NULL, "shutting_down", "The server is shutting down.");
		refuse(x, &error);
	} else if (http->options.admit(
			   http->options.ctx, method, path,
			   MHD_lookup_connection_value(mhd, MHD_HEADER_KIND, "Authorization"),
			   &error) < 0) {
		refuse(x, &error);
	} else if (!length_fits(x)) {
		too_large(x);
	}
	return x->refused ? send_response(x, false) : MHD_YES;
}

static enum MHD_Result take_body(km_exchange *x, const char *data, size_t *len)
{
	x->last_pull = km_now_s();
	km_buf_append(&x->body, data, *len);
	if (x->body.overflow)
		x->discarded += (int64_t)*len;
	*len = 0;
	/* A body in chunks of unknown length: as much again is read past the limit so that the client is
	 * still listening when it is told, but not without end. */
	return x->discarded > x->http->options.max_body_bytes + (1 << 20) ? MHD_NO : MHD_YES;
}

static void hand_over(km_exchange *x)
{
	km_http *http = x->http;

	pthread_mutex_lock(&x->lock);
	x->state = HANDLING;
	pthread_mutex_unlock(&x->lock);
	km_exchange_keep(x);
	pthread_mutex_lock(&http->lock);
	if (http->last_job)
		http->last_job->next_job = x;
	else
		http->first_job = x;
	http->last_job = x;
	pthread_cond_signal(&http->jobs_changed);
	pthread_mutex_unlock(&http->lock);
}

static enum MHD_Result on_access(void *ctx, struct MHD_Connection *mhd, const char *path,
                                 const char *method, const char *version, const char *data,
                                 size_t *len, void **per_request)
{
	km_exchange *x = *per_request;

	(void)version;
	if (!x)
		return first_call(ctx, mhd, method, path, per_request);
	if (*len)
		return take_body(x, data, len);
	if (x->state == READING && x->body.overflow) {
		too_large(x);
		return send_response(x, false);
	}
	if (x->state == READING)
		hand_over(x);
	return answer(x);
}

static void on_completed(void *ctx, struct MHD_Connection *mhd, void **per_request,
                         enum MHD_RequestTerminationCode why)
{
	km_http *http = ctx;
	km_exchange *x = *per_request;

	(void)mhd;
	if (!x)
		return;
	*per_request = NULL;
	if (why != MHD_REQUEST_TERMINATED_COMPLETED_OK)
		set_gone(x);
	pthread_mutex_lock(&http->lock); /* the watcher is not looking at it */
	if (x->connection) {
		x->connection->current = NULL;
		x->connection->since = km_now_s();
	}
	pthread_mutex_unlock(&http->lock);
	x->ended = km_now_s();
	pthread_mutex_lock(&x->lock);
	x->closed = true;
	pthread_mutex_unlock(&x->lock);
	http->options.done(http->options.ctx, x);
	if (x->has_later)
		x->later.closed(x->later.ctx);
	km_exchange_release(x);
	pthread_mutex_lock(&http->lock);
	http->open--;
	pthread_cond_broadcast(&http->idle);
	pthread_mutex_unlock(&http->lock);
}

static void on_connection(void *ctx, struct MHD_Connection *mhd, void **socket_context,
                          enum MHD_ConnectionNotificationCode what)
{
	km_http *http = ctx;
	struct connection *c = *socket_context;

	pthread_mutex_lock(&http->lock);
	if (what == MHD_CONNECTION_NOTIFY_STARTED) {
		c = km_xcalloc(1, sizeof(*c));
		c->fd = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
		c->since = km_now_s();
		c->next = http->connections;
		if (c->next)
			c->next->prev = c;
		http->connections = c;
		*socket_context = c;
	} else if (c) {
		if (c->next)
			c->next->prev = c->prev;
		*(c->prev ? &c->prev->next : &http->connections) = c->next;
		free(c);
		*socket_context = NULL;
	}
	pthread_mutex_unlock(&http->lock);
}

/* The watcher. */

static bool hung_up(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLRDHUP };

	return poll(&p, 1, 0) > 0 && p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL);
}

/* The client has closed before its request was whole, and everything that it sent was read. libmicrohttpd does not
 * notice where the last bytes and the close come together. */
static bool is_abandoned(int fd)
{
	char byte;

	return hung_up(fd) && recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) <= 0;
}

/* Seen twice: what was read a moment ago may make the request whole. */
static bool was_abandoned(struct connection *c, bool reading)
{
	bool before = c->abandoned;

	c->abandoned = reading && is_abandoned(c->fd);
	return before && c->abandoned;
}

static bool is_late(const km_http *http, const km_exchange *x, double now)
{
	if (x->state == READING)
		return now - x->started > http->options.request_timeout_s ||
		       (http->draining && now - x->last_pull > DRAIN_PATIENCE_S);
	if (x->state == SENDING || (x->state == STREAMING && !x->suspended))
		return now - x->last_pull > http->options.stream_timeout_s;
	return false;
}

static void watch_exchange(km_http *http, struct connection *c, km_exchange *x, double now)
{
	bool end, ping;

	pthread_mutex_lock(&x->lock);
	end = !x->gone && (x->cut || is_late(http, x, now) || was_abandoned(c, x->state == READING) ||
	                   ((x->state == HANDLING || x->state == STREAMING) && hung_up(c->fd)));
	ping = x->state == STREAMING && x->suspended &&
	       now - x->last_pull > http->options.keepalive_s;
	x->ping |= ping;
	pthread_mutex_unlock(&x->lock);
	if (end) {
		set_gone(x);
		shutdown(c->fd, SHUT_RDWR);
	}
	if (end || ping)
		km_http_wake(x);
}

static void watch_all(km_http *http)
{
	double now = km_now_s();

	for (struct connection *c = http->connections; c; c = c->next) {
		if (c->current)
			watch_exchange(http, c, c->current, now);
		else if (was_abandoned(c, true) || now - c->since > http->options.request_timeout_s)
			shutdown(c->fd, SHUT_RDWR);
	}
}

static void *watcher_main(void *ctx)
{
	km_http *http = ctx;
	struct timespec pause = { 0, WATCH_MS * 1000000 };

	while (!http->stopping) {
		nanosleep(&pause, NULL);
		pthread_mutex_lock(&http->lock);
		watch_all(http);
		pthread_mutex_unlock(&http->lock);
		http->options.tick(http->options.ctx);
	}
	return NULL;
}

/* The body is the worker's alone: nobody else looks at it after it is whole. It may be large, and
 * the exchange may live as long as an answer takes, so it goes when `handle` is done with it. */
static void handle(km_http *http, km_exchange *x)
{
	http->options.handle(http->options.ctx, x);
	km_buf_release(&x->body);
	km_exchange_release(x);
}

static void *worker_main(void *ctx)
{
	km_http *http = ctx;

	pthread_mutex_lock(&http->lock);
	for (;;) {
		km_exchange *x = http->first_job;

		if (!x) {
			if (http->stopping)
				break;
			pthread_cond_wait(&http->jobs_changed, &http->lock);
			continue;
		}
		http->first_job = x->next_job;
		if (!http->first_job)
			http->last_job = NULL;
		pthread_mutex_unlock(&http->lock);
		handle(http, x);
		pthread_mutex_lock(&http->lock);
	}
	pthread_mutex_unlock(&http->lock);
	return NULL;
}

/* Opening and closing. */

static void on_mhd_log(void *ctx, const char *format, va_list ap)
{
	char line[512];
	size_t len;

	(void)ctx;
	vsnprintf(line, sizeof(line), format, ap);
	len = strcspn(line, "\n");
	km_log(KM_LOG_DEBUG, "http: %.*s", (int)len, line);
}

static void start_threads(km_http *http)
{
	http->workers = km_xcalloc((size_t)http->options.workers, sizeof(*http->workers));
	for (int i = 0; i < http->options.workers; i++)
		http->worker_count += !pthread_create(&http->workers[i], NULL, worker_main, http);
	KM_ASSERT(http->worker_count == http->options.workers);
	KM_ASSERT(!pthread_create(&http->watcher, NULL, watcher_main, http));
}

int km_http_open(km_http **out, const km_http_options *options, km_err *err)
{
	km_http *http;
	int fd = km_listen(options->host, options->port, err);

	if (fd < 0)
		return fd;
	http = km_xcalloc(1, sizeof(*http));
	http->options = *options;
	http->port = km_listen_port(fd);
	pthread_mutex_init(&http->lock, NULL);
	pthread_cond_init(&http->jobs_changed, NULL);
	pthread_cond_init(&http->idle, NULL);
	http->daemon = MHD_start_daemon(
		MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0,
		NULL, NULL, on_access, http, MHD_OPTION_EXTERNAL_LOGGER, on_mhd_log, NULL,
		MHD_OPTION_LISTEN_SOCKET, fd, MHD_OPTION_CONNECTION_LIMIT,
		(unsigned)options->max_connections, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
		(size_t)(64 * 1024), MHD_OPTION_NOTIFY_COMPLETED, on_completed, http,
		MHD_OPTION_NOTIFY_CONNECTION, on_connection, http, MHD_OPTION_END);
	if (!http->daemon) {
		close(fd);
		pthread_mutex_destroy(&http->lock);
		free(http);
		return km_fail(err, KM_EIO, "cannot start the HTTP server on %s port %d",
		               options->host, options->port);
	}
	start_threads(http);
	*out = http;
	return 0;
}

int km_http_port(const km_http *http)
{
	return http->port;
}

void km_http_drain(km_http *http)
{
	MHD_socket fd;

	if (atomic_exchange(&http->draining, true))
		return;
	fd = MHD_quiesce_daemon(http->daemon);
	if (fd != MHD_INVALID_SOCKET)
		close(fd);
}

bool km_http_wait_idle(km_http *http, double seconds)
{
	struct timespec until;
	bool idle;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += (time_t)seconds;
	until.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	pthread_mutex_lock(&http->lock);
	while (http->open && pthread_cond_timedwait(&http->idle, &http->lock, &until) != ETIMEDOUT)
		;
	idle = !http->open;
	pthread_mutex_unlock(&http->lock);
	return idle;
}

void km_http_abort(km_http *http)
{
	pthread_mutex_lock(&http->lock);
	for (struct connection *c = http->connections; c; c = c->next) {
		if (c->current)
			set_gone(c->current);
		shutdown(c->fd, SHUT_RDWR);
		if (c->current)
			km_http_wake(c->current);
	}
	pthread_mutex_unlock(&http->lock);
}

void km_http_close(km_http *http)
{
	if (!http)
		return;
	km_http_drain(http);
	km_http_abort(http);
	/* libmicrohttpd must not be stopped over a suspended connection; all were woken, and a
	 * worker that is still busy with one wakes it when it is done. */
	while (!km_http_wait_idle(http, 1))
		km_http_abort(http);
	pthread_mutex_lock(&http->lock);
	http->stopping = true;
	pthread_cond_broadcast(&http->jobs_changed);
	pthread_mutex_unlock(&http->lock);
	pthread_join(http->watcher, NULL);
	for (int i = 0; i < http->worker_count; i++)
		pthread_join(http->workers[i], NULL);
	MHD_stop_daemon(http->daemon);
	free(http->workers);
	pthread_mutex_destroy(&http->lock);
	pthread_cond_destroy(&http->jobs_changed);
	pthread_cond_destroy(&http->idle);
	free(http);
}
