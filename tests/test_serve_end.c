/*
 * How serving ends: draining, stopping at once, and an engine whose device has failed, over sockets
 * and in a batch.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <signal.h>

#include "base/clock.h"
#include "support/told_server.h"
#include "wire/batch_lines.h"

static void draining_finishes_what_runs(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	int fd, idle;

	f->engine.token_us = 5000;
	idle = http_dial(f->port); /* a kept connection: its next request gets 503 */
	fd = http_start(f->port, "{\"prompt\":\"abcd\",\"max_tokens\":60,\"stream\":true}");
	assert_true(settles(f, 1, 2000));
	km_serve_drain(f->serve);
	assert_int_equal(http_dial(f->port), -1);
	http_send(idle, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
	http_receive(idle, &out);
	assert_non_null(strstr(out.data, " 503 "));
	close(idle);
	assert_true(km_serve_wait_idle(f->serve, 5));
	km_buf_clear(&out);
	http_receive(fd, &out);
	assert_non_null(strstr(out.data, "[DONE]"));
	close(fd);
	f->engine.token_us = 200;
	km_buf_release(&out);
}

/* A request whose rest does not come does not run, and is not waited for. */
static void draining_leaves_who_says_no_more(void **state)
{
	struct fixture *f = *state;
	double start;
	int fd = http_dial(f->port);

	http_send(fd, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{");
	usleep(200000); /* its headers have been read */
	start = km_now_s();
	km_serve_drain(f->serve);
	assert_true(km_serve_wait_idle(f->serve, 5));
	assert_true(km_now_s() - start < 1.7); /* request_timeout_s is 2 */
	close(fd);
}

/* km_serve_run on a thread of its own, as the tool's main thread has it. */
struct runner {
	km_serve *serve;
	atomic_int stops;
	pthread_t thread;
	int rc;
	km_err err;
	double seconds;
};

static int count_stops(void *ctx)
{
	return ((struct runner *)ctx)->stops;
}

static void *runner_main(void *ctx)
{
	struct runner *r = ctx;
	km_serve_until until = { .stop = count_stops, .ctx = r, .drain_s = 5 };
	double start = km_now_s();

	r->rc = km_serve_run(r->serve, &until, &r->err);
	r->seconds = km_now_s() - start;
	return NULL;
}

static void runner_start(struct runner *r, const struct fixture *f)
{
	*r = (struct runner){ .serve = f->serve };
	assert_int_equal(pthread_create(&r->thread, NULL, runner_main, r), 0);
}

static void stopping_drains_and_stopping_twice_does_not(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	struct runner r;
	int fd;

	f->engine.token_us = 5000;
	runner_start(&r, f);
	fd = http_start(f->port, "{\"prompt\":\"abcd\",\"max_tokens\":60,\"stream\":true}");
	assert_true(settles(f, 1, 2000));
	r.stops = 1;
	http_receive(fd, &out);
	assert_non_null(strstr(out.data, "[DONE]"));
	close(fd);
	pthread_join(r.thread, NULL);
	assert_int_equal(r.rc, 0);

	km_serve_close(f->serve);
	open_server(f, &plain);
	f->engine.paused = true; /* the request would never end */
	runner_start(&r, f);
	fd = http_start(f->port, "{\"prompt\":\"abcd\",\"max_tokens\":60,\"stream\":true}");
	assert_true(settles(f, 1, 2000));
	r.stops = 2;
	pthread_join(r.thread, NULL);
	assert_int_equal(r.rc, 0);
	assert_true(r.seconds < 4);
	close(fd);
	km_buf_release(&out);
}

static void a_failed_device_ends_the_server(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	struct runner r;
	int whole, stream;

	f->engine.token_us = 5000;
	runner_start(&r, f);
	whole = http_start(f->port, "{\"prompt\":\"abcd\",\"max_tokens\":9000}");
	stream = http_start(f->port, "{\"prompt\":\"abcd\",\"max_tokens\":9000,\"stream\":true}");
	assert_true(settles(f, 2, 2000));
	pause_ms(100);
	f->engine.broken = true;
	http_receive(whole, &out);
	assert_non_null(strstr(out.data, "HTTP/1.1 500 "));
	assert_non_null(strstr(out.data, "\"type\":\"server_error\""));
	km_buf_clear(&out);
	http_receive(stream, &out);
	assert_non_null(strstr(out.data, "data: {\"error\":{"));
	assert_non_null(strstr(out.data, "[DONE]"));
	pthread_join(r.thread, NULL);
	assert_int_equal(r.rc, KM_EDEVICE);
	assert_string_equal(r.err.msg, "the device is gone");
	assert_true(r.seconds < 4);
	assert_int_equal(http_dial(f->port), -1);
	close(whole);
	close(stream);
	km_buf_release(&out);
}

static void a_failed_device_refuses_what_comes(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;

	f->engine.broken = true;
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                          "{\"prompt\":\"abcd\",\"max_tokens\":3}", &out),
	                 500);
	assert_non_null(strstr(out.data, "the device is gone"));
	assert_int_equal(http_ask(f->port, "GET", "/health", "", &out), 503);
	km_buf_release(&out);
}

static bool never(void *ctx)
{
	(void)ctx;
	return false;
}

/* Lines go in for as long as somebody reads them. */
static void *feeder_main(void *ctx)
{
	static const char line[] =
		"{\"custom_id\":\"a\",\"method\":\"POST\",\"url\":\"/v1/completions\","
		"\"body\":{\"prompt\":\"abcd\",\"max_tokens\":5}}\n";
	int fd = *(int *)ctx;

	while (write(fd, line, sizeof(line) - 1) > 0)
		;
	return NULL;
}

static void a_failed_device_ends_a_batch(void **state)
{
	struct fixture *f = *state;
	km_batch_options options = { .concurrency = 4, .max_line_bytes = 4096, .quiet = true,
		                     .stop = never };
	km_batch_result result;
	pthread_t feeder;
	int64_t lines = 0;
	int pipes[2];
	km_err err;

	assert_int_equal(pipe(pipes), 0);
	signal(SIGPIPE, SIG_IGN);
	options.in = pipes[0];
	options.out = tmpfile();
	assert_non_null(options.out);
	f->engine.breaks_after = 6;
	pthread_create(&feeder, NULL, feeder_main, &pipes[1]);
	assert_int_equal(km_batch_run(&f->service, &options, &result, &err), KM_EDEVICE);
	assert_string_equal(err.msg, "the device is gone");
	close(pipes[0]);
	pthread_join(feeder, NULL);
	close(pipes[1]);
	assert_int_equal(result.done - result.failed, 6);
	rewind(options.out);
	for (int c; (c = fgetc(options.out)) != EOF;)
		lines += c == '\n';
	assert_int_equal(lines, result.done); /* whoever had begun was told */
	fclose(options.out);
}

static void time_in_the_queue_is_counted(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;

	for (int i = 0; i < 2; i++)
		assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
		                          "{\"prompt\":\"abcd\",\"max_tokens\":3,\"n\":2}", &out),
		                 200);
	assert_int_equal(http_ask(f->port, "GET", "/metrics", "", &out), 200);
	assert_non_null(strstr(out.data, "kimi:request_queue_time_seconds_count{"
	                                 "model_name=\"kimi-test\"} 2\n"));
	assert_non_null(strstr(out.data, "kimi:request_queue_time_seconds_sum{"
	                                 "model_name=\"kimi-test\"} 0.5\n"));
	km_buf_release(&out);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(draining_finishes_what_runs, set_up, tear_down),
		cmocka_unit_test_setup_teardown(draining_leaves_who_says_no_more, set_up, tear_down),
		cmocka_unit_test_setup_teardown(stopping_drains_and_stopping_twice_does_not, set_up,
		                                tear_down),
		cmocka_unit_test_setup_teardown(a_failed_device_ends_the_server, set_up, tear_down),
		cmocka_unit_test_setup_teardown(a_failed_device_refuses_what_comes, set_up,
		                                tear_down),
		cmocka_unit_test_setup_teardown(a_failed_device_ends_a_batch, set_up, tear_down),
		cmocka_unit_test_setup_teardown(time_in_the_queue_is_counted, set_up, tear_down),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
