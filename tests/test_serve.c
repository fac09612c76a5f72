/*
 * wire/serve over real sockets, with an engine that says what the test tells it to. What random
 * weights would never say (tool calls, errors, a full queue, a pause of any length) can be said
 * here.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <sys/socket.h>

#include "base/clock.h"
#include "support/told_server.h"

static const char *field(const json_t *json, const char *a, const char *b)
{
	return json_string_value(json_object_get(json_object_get(json, a), b));
}

static void a_completion_comes_whole_and_streamed(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	json_t *json;

	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                          "{\"prompt\":\"abcd\",\"max_tokens\":3}", &out),
	                 200);
	json = json_loadb(out.data, out.len, 0, NULL);
	assert_int_equal(json_integer_value(json_object_get(json_object_get(json, "usage"),
	                                                    "completion_tokens")), 3);
	json_decref(json);
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                     "{\"prompt\":\"abcd\",\"max_tokens\":3,\"stream\":true}", &out), 200);
	assert_memory_equal(out.data, "data: {\"id\":\"cmpl-", 18);
	assert_non_null(strstr(out.data, "\"finish_reason\":\"length\""));
	assert_string_equal(out.data + out.len - 14, "data: [DONE]\n\n");
	km_buf_release(&out);
}

static void a_tool_call_is_parsed(void **state)
{
	struct fixture *f = *state;
	static const char body[] = "{\"model\":\"kimi-test\",\"messages\":[{\"role\":\"user\","
	                           "\"content\":\"weather?\"}],"
				   "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"w\","
	                           "\"parameters\":{\"type\":"
				   "\"object\",\"properties\":{}}}}]%s}";
	char text[512];
	km_buf out = KM_BUF_INIT;
	json_t *json;
	const json_t *choice, *message, *call;

	f->engine.script =
		"I should look.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.w:0"
		"<|tool_call_argument_begin|>{\"a\":1}<|tool_call_end|><|tool_calls_section_end|>";
	snprintf(text, sizeof(text), body, "");
	assert_int_equal(http_ask(f->port, "POST", "/v1/chat/completions", text, &out), 200);
	json = json_loadb(out.data, out.len, 0, NULL);
	choice = json_array_get(json_object_get(json, "choices"), 0);
	message = json_object_get(choice, "message");
	call = json_array_get(json_object_get(message, "tool_calls"), 0);
	assert_string_equal(field(choice, "message", "reasoning_content"), "I should look.");
	assert_true(json_is_null(json_object_get(message, "content")));
	assert_string_equal(json_string_value(json_object_get(call, "id")), "functions.w:0");
	assert_string_equal(field(call, "function", "arguments"), "{\"a\":1}");
	assert_string_equal(json_string_value(json_object_get(choice, "finish_reason")),
	                    "tool_calls");
	json_decref(json);
	snprintf(text, sizeof(text), body, ",\"stream\":true");
	assert_int_equal(http_ask(f->port, "POST", "/v1/chat/completions", text, &out), 200);
	assert_non_null(strstr(out.data, "\"tool_calls\":[{\"id\":\"functions.w:0\",\"index\":0,"
	                                 "\"type\":\"function\",\"function\":{\"name\":\"w\""));
	assert_non_null(strstr(out.data, "\"delta\":{},\"finish_reason\":\"tool_calls\""));
	assert_null(strstr(out.data, "tool_call_begin"));
	f->engine.script = NULL;
	km_buf_release(&out);
}

static void routes_refuse_by_the_book(void **state)
{
	static const struct {
		const char *method, *path, *body;
		int status;
	} cases[] = {
		{ "GET", "/nowhere", "", 404 },
		{ "GET", "/v1/chat/completions", "", 405 },
		{ "POST", "/health", "", 405 },
		{ "DELETE", "/v1/models", "", 405 },
		{ "GET", "/v1/models/none", "", 404 },
		{ "POST", "/v1/chat/completions", "", 400 },
		{ "POST", "/v1/chat/completions", "{\"messages\":[]}", 400 },
		{ "POST", "/v1/completions", "{\"prompt\":\"\xff\"}", 400 },
		{ "POST", "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":1000000}", 400 },
		{ "POST", "/v1/completions", "{\"prompt\":\"x\",\"model\":\"y\"}", 404 },
		{ "POST", "/tokenize", "{}", 400 },
		{ "POST", "/detokenize", "{\"tokens\":[-1]}", 400 },
	};
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		json_t *json;
		int status = http_ask(f->port, cases[i].method, cases[i].path, cases[i].body, &out);

		if (status != cases[i].status)
			fail_msg("%s %s: %d, not %d", cases[i].method, cases[i].path, status,
			         cases[i].status);
		json = json_loadb(out.data, out.len, 0, NULL);
		assert_non_null(field(json, "error", "message"));
		assert_non_null(field(json, "error", "type"));
		json_decref(json);
	}
	km_buf_release(&out);
}

static void the_small_endpoints_answer(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	char body[256];
	json_t *json;

	assert_int_equal(http_ask(f->port, "GET", "/health", "", &out), 200);
	assert_int_equal(http_ask(f->port, "HEAD", "/health", "", &out), 200);
	assert_int_equal(out.len, 0);
	assert_int_equal(http_ask(f->port, "GET", "/version", "", &out), 200);
	assert_int_equal(http_ask(f->port, "POST", "/flush_cache", "", &out), 200);
	f->engine.live++;
	assert_int_equal(http_ask(f->port, "POST", "/flush_cache", "", &out), 409);
	f->engine.live--;
	assert_int_equal(http_ask(f->port, "GET", "/v1/models", "", &out), 200);
	assert_non_null(strstr(out.data, "\"max_model_len\":100000"));
	assert_int_equal(http_ask(f->port, "GET", "/v1/models/kimi-test", "", &out), 200);
	assert_int_equal(http_ask(f->port, "GET", "/metrics", "", &out), 200);
	assert_non_null(
		strstr(out.data, "kimi:num_requests_running{model_name=\"kimi-test\"} 0\n"));
	assert_int_equal(http_ask(f->port, "POST", "/tokenize",
	                     "{\"prompt\":\"a<|im_end|>\",\"return_token_strs\":true}", &out), 200);
	json = json_loadb(out.data, out.len, 0, NULL);
	assert_int_equal(json_integer_value(json_object_get(json, "count")), 2);
	assert_string_equal(
		json_string_value(json_array_get(json_object_get(json, "token_strs"), 1)),
		"<|im_end|>");
	snprintf(body, sizeof(body), "{\"tokens\":[%d,%d]}",
	         (int)json_integer_value(json_array_get(json_object_get(json, "tokens"), 0)),
	         (int)json_integer_value(json_array_get(json_object_get(json, "tokens"), 1)));
	json_decref(json);
	assert_int_equal(http_ask(f->port, "POST", "/detokenize", body, &out), 200);
	assert_string_equal(out.data, "{\"prompt\":\"a<|im_end|>\"}");
	assert_int_equal(http_ask(f->port, "POST", "/tokenize",
	                          "{\"messages\":[{\"role\":\"user\",\"content\":\"<|im_end|>\"}]}",
	                          &out),
	                 200);
	assert_non_null(strstr(out.data, "\"count\":"));
	km_buf_release(&out);
}

static void prompts_are_scored(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	json_t *json;
	const json_t *choice, *values;

	assert_int_equal(
		http_ask(f->port, "POST", "/v1/completions",
	                 "{\"prompt\":[70,71,72],\"max_tokens\":0,\"echo\":true,\"logprobs\":0}",
	                 &out),
		200);
	json = json_loadb(out.data, out.len, 0, NULL);
	choice = json_array_get(json_object_get(json, "choices"), 0);
	values = json_object_get(json_object_get(choice, "logprobs"), "token_logprobs");
	assert_int_equal(json_array_size(values), 3);
	assert_true(json_is_null(json_array_get(values, 0)));
	assert_true(json_number_value(json_array_get(values, 2)) == -2);
	json_decref(json);
	km_buf_release(&out);
}

static size_t prompt_tokens(const struct fixture *f, const char *text)
{
	km_ids ids = { 0 };
	km_err err;
	size_t count;

	assert_int_equal(km_tokenizer_encode(f->engine.tokenizer, text, strlen(text), true, &ids,
	                                     &err),
	                 0);
	count = ids.len;
	km_ids_release(&ids);
	return count;
}

static void many_prompts_make_many_choices(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	json_t *json;
	const json_t *choices, *usage;

	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                          "{\"prompt\":[\"aaaa\",\"bbbb\"],\"n\":2,\"max_tokens\":2}",
	                          &out),
	                 200);
	json = json_loadb(out.data, out.len, 0, NULL);
	choices = json_object_get(json, "choices");
	assert_int_equal(json_array_size(choices), 4);
	for (size_t i = 0; i < 4; i++) {
		const json_t *c = json_array_get(choices, i);

		assert_int_equal(json_integer_value(json_object_get(c, "index")), i);
		assert_int_equal(*json_string_value(json_object_get(c, "text")), i < 2 ? 'a' : 'b');
	}
	usage = json_object_get(json, "usage");
	assert_int_equal(json_integer_value(json_object_get(usage, "prompt_tokens")),
	                 prompt_tokens(f, "aaaa") + prompt_tokens(f, "bbbb"));
	assert_int_equal(json_integer_value(json_object_get(usage, "completion_tokens")), 8);
	json_decref(json);
	km_buf_release(&out);
}

static void errors_before_the_first_byte_are_plain(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;

	f->engine.fail_at = 0;
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                          "{\"prompt\":\"x\",\"stream\":true}", &out),
	                 500);
	assert_non_null(strstr(out.data, "the engine broke as told"));
	f->engine.fail_at = 2;
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                          "{\"prompt\":\"x\",\"stream\":true}", &out),
	                 200);
	assert_non_null(strstr(out.data, "data: {\"error\":"));
	assert_string_equal(out.data + out.len - 14, "data: [DONE]\n\n");
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions", "{\"prompt\":\"x\"}", &out),
	                 500);
	f->engine.fail_at = -1;
	f->engine.max_requests = 0;
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                          "{\"prompt\":\"x\",\"stream\":true}", &out),
	                 429);
	f->engine.max_requests = 1;
	f->engine.paused = true;
	assert_int_equal(
		http_ask(f->port, "POST", "/v1/completions", "{\"prompt\":[\"x\",\"y\"]}", &out),
		429);
	f->engine.paused = false;
	f->engine.max_requests = 1000;
	assert_true(settles(f, 0, 2000));
	km_buf_release(&out);
}

/* A client that hangs up frees its request at once: streaming, waiting for an answer, queued. */
static void a_disconnect_cancels(void **state)
{
	struct fixture *f = *state;
	static const char *const bodies[] = {
		"{\"prompt\":\"x\",\"max_tokens\":90000,\"stream\":true}",
		"{\"prompt\":\"x\",\"max_tokens\":90000}",
	};

	for (int queued = 0; queued < 2; queued++) {
		for (size_t i = 0; i < 2; i++) {
			int64_t start;
			int fd;

			f->engine.paused = queued;
			fd = http_start(f->port, bodies[i]);
			assert_true(settles(f, 1, 2000));
			close(fd);
			start = km_now_ns();
			assert_true(settles(f, 0, 2000));
			if (i && queued)
				printf("figure: a queued request is freed %.0f ms after its client "
				       "hung up\n",
				       (double)(km_now_ns() - start) * 1e-6);
			f->engine.paused = false;
		}
	}
}

/* Every field that the engine acts on. */
static void what_is_asked_reaches_the_engine(void **state)
{
	struct fixture *f = *state;
	const km_request_options *o = &f->engine.last;
	const km_sampling *s = &o->sampling;
	km_buf out = KM_BUF_INIT;

	assert_int_equal(
		http_ask(f->port, "POST", "/v1/completions",
	                 "{\"prompt\":\"ab\",\"max_tokens\":3,\"n\":2,\"temperature\":0.25,"
	                 "\"top_p\":0.5,\"top_k\":7,\"min_p\":0.125,\"repetition_penalty\":1.5,"
	                 "\"frequency_penalty\":-1,\"presence_penalty\":2,\"seed\":-9,"
	                 "\"stop\":[\"x\",\"yz\"],\"stop_token_ids\":[44],\"ignore_eos\":true,"
	                 "\"logprobs\":4,\"logit_bias\":{\"55\":-3}}",
	                 &out),
		200);
	assert_int_equal(o->max_tokens, 3);
	assert_int_equal(o->n, 2);
	assert_true(s->temperature == 0.25 && s->top_p == 0.5 && s->min_p == 0.125);
	assert_int_equal(s->top_k, 7);
	assert_true(s->repetition_penalty == 1.5 && s->frequency_penalty == -1);
	assert_true(s->presence_penalty == 2 && s->has_seed && s->seed == (uint64_t)-9);
	assert_int_equal(o->stop_count, 2);
	assert_int_equal(o->stop_id_count, 1);
	assert_int_equal(f->engine.last_stop_id, 44);
	assert_int_equal(s->bias_count, 1);
	assert_int_equal(f->engine.last_bias_id, 55);
	assert_true(o->ignore_eos && !o->prompt_logprobs);
	assert_int_equal(o->logprobs, 4);
	km_buf_release(&out);
}

/* Too slow by time alone: all that it leaves unread fits the buffer. */
static void a_reader_that_stalls_is_cut_off(void **state)
{
	struct fixture *f = *state;
	int small = 4096, fd;
	double start = km_now_s();

	f->service.options.stream_buffer_bytes = INT64_C(1) << 40;
	f->engine.token_us = 50;
	fd = http_start(
		f->port,
		"{\"prompt\":\"abcdefgh\",\"max_tokens\":99000,\"stream\":true,\"logprobs\":5}");
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
	assert_true(settles(f, 1, 2000));
	assert_true(settles(f, 0, 8000));
	assert_true(km_now_s() - start > 1.5 && f->engine.cancels == 1);
	close(fd);
}

/* Too slow by what it leaves unread, long before its time is up. */
static void a_reader_that_falls_behind_is_cut_off(void **state)
{
	struct fixture *f = *state;
	km_serve_options options = plain;
	int small = 4096, fd;

	km_serve_close(f->serve);
	options.stream_timeout_s = 3600;
	open_server(f, &options);
	f->engine.token_us = 0;
	fd = http_start(
		f->port,
		"{\"prompt\":\"abcdefgh\",\"max_tokens\":99000,\"stream\":true,\"logprobs\":5}");
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
	assert_true(settles(f, 1, 2000));
	assert_true(settles(f, 0, 8000));
	assert_int_equal(f->engine.cancels, 1);
	close(fd);
}

static void a_reader_that_does_not_read_stalls_nobody(void **state)
{
	struct fixture *f = *state;
	int small = 4096, fd;
	km_buf out = KM_BUF_INIT;

	f->engine.token_us = 0;
	fd = http_start(
		f->port,
		"{\"prompt\":\"abcdefgh\",\"max_tokens\":90000,\"stream\":true,\"logprobs\":5}");
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
	assert_true(settles(f, 1, 2000));
	/* Others are served meanwhile, and well before the slow one is given up. */
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                          "{\"prompt\":\"x\",\"max_tokens\":2}", &out),
	                 200);
	assert_true(settles(f, 0, 8000));
	f->engine.token_us = 200;
	close(fd);
	km_buf_release(&out);
}

static void half_open_sockets_stall_nobody(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	int fds[60];
	char byte;

	for (int i = 0; i < 60; i++) {
		fds[i] = http_dial(f->port);
		assert_true(fds[i] >= 0);
		if (i % 3 == 1)
			http_send(fds[i], "POST /v1/completions HTTP/1.1\r\nHost");
		if (i % 3 == 2)
			http_send(fds[i], "POST /v1/completions HTTP/1.1\r\nHost: "
			                  "x\r\nContent-Length: 50\r\n\r\n{");
	}
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                          "{\"prompt\":\"x\",\"max_tokens\":2}", &out),
	                 200);
	for (int i = 0; i < 60; i++) { /* all are closed after request_timeout_s */
		assert_true(recv(fds[i], &byte, 1, 0) <= 0);
		close(fds[i]);
	}
	km_buf_release(&out);
}

/* More clients that go in the middle of a request than there are connections keep nobody out. */
static void half_a_request_from_who_is_gone_is_over(void **state)
{
	static const char *const halves[] = { "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
		                              "POST /v1/completions HTTP/1.1\r\nHo" };
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;
	double start = km_now_s();

	for (int i = 0; i < 400; i++) {
		int fd = http_dial(f->port);

		if (fd < 0) /* all are taken: the watcher frees them */
			continue;
		http_send(fd, halves[i % 2]);
		close(fd);
	}
	while (http_ask(f->port, "GET", "/health", "", &out) != 200)
		assert_true(km_now_s() - start < 1.5);
	assert_true(km_now_s() - start < 1.5); /* request_timeout_s is 2 */
	km_buf_release(&out);
}

static void oversized_bodies_are_refused(void **state)
{
	struct fixture *f = *state;
	char *big = km_xmalloc((2 << 20) + 1);
	km_buf out = KM_BUF_INIT;
	int fd = http_dial(f->port);

	/* By its length, before a byte of it. */
	http_send(fd,
	          "POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n");
	http_receive(fd, &out);
	assert_non_null(strstr(out.data, " 413 "));
	close(fd);
	/* In chunks, of a length that nobody told. */
	fd = http_dial(f->port);
	memset(big, 'x', 2 << 20);
	big[2 << 20] = '\0';
	http_send(fd, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
	              "Transfer-Encoding: chunked\r\n\r\n180000\r\n");
	big[0x180000] = '\0';
	http_send(fd, big);
	http_send(fd, "\r\n0\r\n\r\n");
	km_buf_clear(&out);
	http_receive(fd, &out);
	assert_non_null(strstr(out.data, " 413 "));
	close(fd);
	/* In chunks without end: cut off, not read for ever. */
	fd = http_dial(f->port);
	http_send(fd, "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
	              "Transfer-Encoding: chunked\r\n\r\n");
	memset(big, 'x', 0x10000);
	memcpy(big, "fff8\r\n", 6); /* a chunk in 64 KiB */
	memcpy(big + 0xfffe, "\r\n", 2);
	for (int sent = 0; send(fd, big, 0x10000, MSG_NOSIGNAL) > 0; sent++)
		assert_true(sent < 512); /* 32 MiB: what sockets hold, and some */
	close(fd);
	free(big);
	km_buf_release(&out);
}

static void silence_is_filled_with_comments(void **state)
{
	struct fixture *f = *state;
	km_buf out = KM_BUF_INIT;

	f->engine.token_us = 700000;
	assert_int_equal(http_ask(f->port, "POST", "/v1/completions",
	                     "{\"prompt\":\"x\",\"max_tokens\":2,\"stream\":true}", &out), 200);
	f->engine.token_us = 200;
	assert_non_null(strstr(out.data, "\n\n: ping\n\n"));
	km_buf_release(&out);
}

struct client {
	const struct fixture *f;
	bool hang_up;
	char *answer;
};

static void *client_main(void *ctx)
{
	struct client *c = ctx;
	km_buf out = KM_BUF_INIT;
	char some[64];

	if (c->hang_up) {
		int fd = http_start(c->f->port,
		                    "{\"prompt\":\"abcd\",\"max_tokens\":90000,\"stream\":true}");

		recv(fd, some, sizeof(some), 0);
		close(fd);
	} else if (http_ask(c->f->port, "POST", "/v1/completions",
	               "{\"prompt\":\"abcd\",\"max_tokens\":60,\"stream\":true}", &out) == 200) {
		c->answer = km_xstrdup(out.data);
	}
	km_buf_release(&out);
	return NULL;
}

static int count(const char *text, const char *what)
{
	int n = 0;

	for (; (text = strstr(text, what)); text++)
		n++;
	return n;
}

static void sixty_four_clients_and_a_third_hang_up(void **state)
{
	struct fixture *f = *state;
	struct client clients[64];
	pthread_t threads[64];
	km_buf out = KM_BUF_INIT;

	for (int i = 0; i < 64; i++) {
		clients[i] = (struct client){ f, i % 3 == 0, NULL };
		pthread_create(&threads[i], NULL, client_main, &clients[i]);
	}
	for (int i = 0; i < 64; i++) {
		pthread_join(threads[i], NULL);
		if (clients[i].hang_up)
			continue;
		assert_non_null(clients[i].answer);
		assert_int_equal(count(clients[i].answer, "\"text\":\""), 61);
		assert_int_equal(count(clients[i].answer, "[DONE]"), 1);
		free(clients[i].answer);
	}
	assert_true(settles(f, 0, 3000));
	assert_int_equal(http_ask(f->port, "GET", "/metrics", "", &out), 200);
	assert_non_null(
		strstr(out.data, "kimi:num_requests_running{model_name=\"kimi-test\"} 0\n"));
	assert_non_null(strstr(out.data, "state=\"used\"} 0\n"));
	km_buf_release(&out);
}

static void a_key_is_asked_for(void **state)
{
	struct fixture *f = *state;
	km_serve_options options = plain;
	km_buf out = KM_BUF_INIT;

	km_serve_close(f->serve);
	options.api_key = "secret";
	open_server(f, &options);
	assert_int_equal(http_ask(f->port, "GET", "/v1/models", "", &out), 401);
	assert_int_equal(http_ask_with(f->port, "GET", "/v1/models",
	                               "Authorization: Bearer wrong!\r\n", "", &out),
	                 401);
	assert_int_equal(http_ask_with(f->port, "GET", "/v1/models",
	                               "Authorization: Bearer secre\r\n", "", &out),
	                 401);
	assert_int_equal(http_ask_with(f->port, "GET", "/v1/models",
	                               "Authorization: Bearer secrets\r\n", "", &out),
	                 401);
	assert_int_equal(http_ask_with(f->port, "GET", "/v1/models",
	                               "Authorization: Bearer secret\r\n", "", &out),
	                 200);
	assert_int_equal(http_ask(f->port, "GET", "/health", "", &out), 200);
	assert_int_equal(http_ask(f->port, "GET", "/metrics", "", &out), 200);
	km_buf_release(&out);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(a_completion_comes_whole_and_streamed, set_up,
		                                tear_down),
		cmocka_unit_test_setup_teardown(a_tool_call_is_parsed, set_up, tear_down),
		cmocka_unit_test_setup_teardown(routes_refuse_by_the_book, set_up, tear_down),
		cmocka_unit_test_setup_teardown(the_small_endpoints_answer, set_up, tear_down),
		cmocka_unit_test_setup_teardown(prompts_are_scored, set_up, tear_down),
		cmocka_unit_test_setup_teardown(many_prompts_make_many_choices, set_up, tear_down),
		cmocka_unit_test_setup_teardown(errors_before_the_first_byte_are_plain, set_up,
		                                tear_down),
		cmocka_unit_test_setup_teardown(a_disconnect_cancels, set_up, tear_down),
		cmocka_unit_test_setup_teardown(what_is_asked_reaches_the_engine, set_up,
		                                tear_down),
		cmocka_unit_test_setup_teardown(a_reader_that_stalls_is_cut_off, set_up, tear_down),
		cmocka_unit_test_setup_teardown(a_reader_that_falls_behind_is_cut_off, set_up,
		                                tear_down),
		cmocka_unit_test_setup_teardown(a_reader_that_does_not_read_stalls_nobody, set_up,
		                                tear_down),
		cmocka_unit_test_setup_teardown(half_open_sockets_stall_nobody, set_up, tear_down),
		cmocka_unit_test_setup_teardown(half_a_request_from_who_is_gone_is_over, set_up, tear_down),
		cmocka_unit_test_setup_teardown(oversized_bodies_are_refused, set_up, tear_down),
		cmocka_unit_test_setup_teardown(silence_is_filled_with_comments, set_up, tear_down),
		cmocka_unit_test_setup_teardown(sixty_four_clients_and_a_third_hang_up, set_up,
		                                tear_down),
		cmocka_unit_test_setup_teardown(a_key_is_asked_for, set_up, tear_down),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
