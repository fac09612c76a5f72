/* Server-sent events: the reader, the writer, and the repair of streams that leak. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/mem.h"
#include "wire/sse.h"
#include "wire/sse_repair.h"

#define S "<|tool_calls_section_begin|>"
#define E "<|tool_calls_section_end|>"
#define B "<|tool_call_begin|>"
#define A "<|tool_call_argument_begin|>"
#define C "<|tool_call_end|>"

static int collect(void *ctx, enum km_sse_kind kind, const char *text, size_t len, km_err *err)
{
	(void)err;
	km_buf_puts(ctx, kind == KM_SSE_COMMENT ? "#" : "[");
	km_buf_append(ctx, text, len);
	km_buf_puts(ctx, kind == KM_SSE_COMMENT ? "\n" : "]");
	return 0;
}

static void events_are_read_however_they_are_cut(void **state)
{
	static const char stream[] = "\xef\xbb\xbf"
				     "data: one\n\ndata:two\r\n\r\n: ping\rdata: a\rdata: b\r\r"
				     "event: x\nid: 7\ndata\ndata:  c\n\nretry: 5\n\nnothing: "
	                             "here\n\ndata: [DONE]\n\ndata: cut\n";
	static const char expected[] = "[one][two]#ping\n[a\nb][\n c][[DONE]]";

	(void)state;
	for (size_t step = 1; step < sizeof(stream); step++) {
		km_buf out = KM_BUF_INIT;
		km_sse_reader reader;
		km_err err;

		km_sse_reader_init(&reader, 1000, collect, &out);
		for (size_t at = 0; at < sizeof(stream) - 1; at += step) {
			size_t n = sizeof(stream) - 1 - at;

			assert_int_equal(
				km_sse_reader_push(&reader, stream + at, n < step ? n : step, &err),
				0);
		}
		assert_string_equal(out.data, expected);
		assert_true(km_sse_reader_cut(&reader));
		km_sse_reader_release(&reader);
		km_buf_release(&out);
	}
}

static void long_events_are_refused(void **state)
{
	km_buf out = KM_BUF_INIT;
	km_sse_reader reader;
	km_err err;

	(void)state;
	km_sse_reader_init(&reader, 10, collect, &out);
	assert_int_equal(km_sse_reader_push(&reader, "data: 1234567", 13, &err), KM_ELIMIT);
	assert_non_null(strstr(err.msg, "longer than 10 bytes"));
	km_sse_reader_release(&reader);
	km_buf_release(&out);
}

static void what_is_written_is_read(void **state)
{
	km_buf text = KM_BUF_INIT, out = KM_BUF_INIT;
	km_sse_reader reader;
	km_err err;

	(void)state;
	km_sse_comment(&text, "ping", 4);
	km_buf_puts(&text, "data: \n\n");
	km_sse_comment(&text, "two\nlines", 9);
	km_sse_done(&text);
	assert_string_equal(text.data,
	                    ": ping\n\ndata: \n\n: two\n: lines\n\ndata: [DONE]\n\n");
	km_sse_reader_init(&reader, 0, collect, &out);
	assert_int_equal(km_sse_reader_push(&reader, text.data, text.len, &err), 0);
	assert_string_equal(out.data, "#ping\n[]#two\n#lines\n[[DONE]]");
	km_sse_reader_release(&reader);
	km_buf_release(&out);
	km_buf_release(&text);
}

/* ---- repair ---- */

/* What a client assembles from a stream, as one line. */
struct client {
	km_buf content, reasoning, calls;
	const char *finish;
	int chunks, usages, logprobs, others;
	bool role, done;
};

static int client_event(void *ctx, enum km_sse_kind kind, const char *text, size_t len, km_err *err)
{
	struct client *c = ctx;
	json_t *chunk, *choice, *delta, *call;
	const char *s;

	(void)err;
	if (kind == KM_SSE_COMMENT)
		return 0;
	if (len == 6 && !memcmp(text, "[DONE]", 6)) {
		c->done = true;
		return 0;
	}
	chunk = json_loadb(text, len, 0, NULL);
	assert_non_null(chunk);
	c->chunks++;
	if (json_is_object(json_object_get(chunk, "usage")))
		c->usages++;
	choice = json_array_get(json_object_get(chunk, "choices"), 0);
	if (choice)
		assert_string_equal(json_string_value(json_object_get(chunk, "object")),
		                    "chat.completion.chunk");
	if (json_object_get(choice, "logprobs"))
		c->logprobs++;
	delta = json_object_get(choice, "delta");
	c->role |= json_object_get(delta, "role") != NULL;
	c->others += json_object_get(delta, "refusal") != NULL;
	if ((s = json_string_value(json_object_get(delta, "content"))))
		km_buf_puts(&c->content, s);
	if ((s = json_string_value(json_object_get(delta, "reasoning_content"))))
		km_buf_puts(&c->reasoning, s);
	call = json_array_get(json_object_get(delta, "tool_calls"), 0);
	if ((s = json_string_value(json_object_get(call, "id"))))
		km_buf_printf(&c->calls,
		              " %d:%s:", (int)json_integer_value(json_object_get(call, "index")),
		              s);
	if ((s = json_string_value(
		     json_object_get(json_object_get(call, "function"), "arguments"))))
		km_buf_puts(&c->calls, s);
	if ((s = json_string_value(json_object_get(choice, "finish_reason"))))
		c->finish = !strcmp(s, "stop")         ? "stop"
		            : !strcmp(s, "tool_calls") ? "tool_calls"
		                                       : "other";
	json_decref(chunk);
	return 0;
}

static void client_release(struct client *c)
{
	km_buf_release(&c->content);
	km_buf_release(&c->reasoning);
	km_buf_release(&c->calls);
}

static int repaired(const char *stream, size_t len, size_t step, const km_parser_options *options,
                    struct client *c, km_err *err)
{
	km_sse_repair *repair = km_xcalloc(1, sizeof(*repair));
	km_buf out = KM_BUF_INIT;
	km_sse_reader reader;
	int rc;

	memset(c, 0, sizeof(*c));
	km_buf_puts(&c->content, "");
	km_buf_puts(&c->reasoning, "");
	km_buf_puts(&c->calls, "");
	km_sse_repair_init(repair, options, 1 << 20);
	for (size_t at = 0; at < len; at += step)
		assert_int_equal(km_sse_repair_push(repair, stream + at,
		                                    len - at < step ? len - at : step, &out, err),
		                 0);
	rc = km_sse_repair_end(repair, &out, err);
	km_sse_repair_release(repair);
	km_sse_reader_init(&reader, 0, client_event, c);
	assert_int_equal(km_sse_reader_push(&reader, out.data, out.len, err), 0);
	assert_false(km_sse_reader_cut(&reader));
	km_sse_reader_release(&reader);
	km_buf_release(&out);
	free(repair);
	return rc;
}

static const km_parser_options both = { .tools = true, .reasoning = true, .history_tool_calls = 2 };

static void check(const char *stream, const char *content, const char *reasoning, const char *calls,
                  const char *finish)
{
	struct client c;
	km_err err;

	for (size_t step = 1; step < 40; step += 3) {
		assert_int_equal(repaired(stream, strlen(stream), step, &both, &c, &err), 0);
		assert_string_equal(c.content.data, content);
		assert_string_equal(c.reasoning.data, reasoning);
		assert_string_equal(c.calls.data, calls);
		assert_string_equal(c.finish, finish);
		assert_true(c.done && c.role);
		client_release(&c);
	}
}

#define HEAD                                                                                       \
	"{\"id\":\"c1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\","       \
	"\"choices\":[{\"index\":0,"
#define DELTA(members) "data: " HEAD "\"delta\":{" members "},\"finish_reason\":null}]}\n\n"
#define FINISH(reason) "data: " HEAD "\"delta\":{},\"finish_reason\":\"" reason "\"}]}\n\n"
#define DONE "data: [DONE]\n\n"
#define ROLE DELTA("\"role\":\"assistant\",\"content\":\"\"")

static void leaked_markers_become_calls(void **state)
{
	(void)state;
	check(ROLE DELTA("\"content\":\"<think>hm</think>I look. \"")
	              DELTA("\"content\":\"" S B "functions.f:0"
	                    "\"") DELTA("\"content\":\"" A "{}<|tool_call\"")
	                      DELTA("\"content\":\"_end|>" E "\"") FINISH("stop") DONE,
	      "I look. ", "hm", " 0:functions.f:2:{}", "tool_calls");
}

static void reasoning_that_the_engine_found_is_kept(void **state)
{
	(void)state;
	check(ROLE DELTA("\"reasoning_content\":\"I th\",\"content\":null")
	              DELTA("\"reasoning\":\"ink" S B "functions.f:0\"")
	                      DELTA("\"reasoning_content\":\"" A "{}" C E "\"")
	                              DELTA("\"content\":\"done\"") FINISH("stop") DONE,
	      "done", "I think", " 0:functions.f:2:{}", "tool_calls");
	check(DELTA("\"reasoning_content\":\"a\"") DELTA("\"content\":\"b\"")
	              DELTA("\"reasoning_content\":\"c\"") DELTA("\"content\":\"d\"") FINISH("stop")
	                      DONE,
	      "bd", "ac", "", "stop");
}

static void calls_that_the_engine_found_are_renumbered(void **state)
{
	(void)state;
	check(ROLE DELTA("\"content\":\"x" B "functions.a:0" A "{}" C "\"")
	              DELTA("\"tool_calls\":[{\"index\":0,\"id\":\"call_9\",\"type\":\"function\","
	                    "\"function\":{\"name\":\"b\",\"arguments\":\"{\"}}]") DELTA(
			      "\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"}\"}}]")
	                      FINISH("tool_calls") DONE,
	      "x", "", " 0:functions.a:2:{} 1:functions.b:3:{}", "tool_calls");
	/* An engine that says tool_calls and has none. */
	check(DELTA("\"content\":\"x" S E "\"") FINISH("tool_calls") DONE, "x", "", "", "stop");
	check(DELTA("\"content\":\"" B "functions.a:0" A "{}" C "\"") FINISH("length") DONE, "", "",
	      " 0:functions.a:2:{}", "other");
}

#define CALLS(list) DELTA("\"tool_calls\":[" list "]")
#define MORE(members, arguments) "{" members "\"function\":{\"arguments\":\"" arguments "\"}}"
#define NAMED(members, name, arguments)                                                            \
	"{" members "\"function\":{\"name\":\"" name "\",\"arguments\":\"" arguments "\"}}"
#define ID(id) "\"id\":\"" id "\","
#define FIRST "\"index\":0,"

static void calls_without_an_index_are_told_apart(void **state)
{
	static const char two[] = " 0:functions.f:2:{} 1:functions.g:3:[]";

	(void)state;
	/* By their ids, in one delta or each in its own; what has no id goes on with the last. */
	check(CALLS(NAMED(ID("a"), "f", "{}") "," NAMED(ID("b"), "g", "["))
	              CALLS(NAMED(ID(""), "", "]")) FINISH("tool_calls") DONE,
	      "", "", two, "tool_calls");
	check(CALLS(NAMED(ID("a"), "f", "")) CALLS(NAMED(ID("a"), "f", "{}"))
	              CALLS(NAMED("\"index\":null," ID("b"), "g", "[]")) FINISH("tool_calls") DONE,
	      "", "", two, "tool_calls");
	/* By their names, and then by their places. */
	check(CALLS(NAMED("", "f", "{}")) CALLS(NAMED("", "g", "[]")) FINISH("tool_calls") DONE, "",
	      "", two, "tool_calls");
	check(CALLS(NAMED("", "f", "") "," NAMED("", "f", ""))
	              CALLS(MORE("", "1") "," MORE("", "2")) FINISH("tool_calls") DONE,
	      "", "", " 0:functions.f:2: 1:functions.f:3:12", "tool_calls");
}

static void a_call_is_given_when_its_name_comes(void **state)
{
	static const char nameless[] = CALLS(MORE(FIRST ID("a"), "{}")) FINISH("tool_calls") DONE;
	struct client c;
	km_err err;

	(void)state;
	check(CALLS(MORE(FIRST ID("a"), "{")) CALLS(NAMED(FIRST, "f", "\\\"x\\\":"))
	              CALLS(MORE(FIRST, "1}")) FINISH("tool_calls") DONE,
	      "", "", " 0:functions.f:2:{\"x\":1}", "tool_calls");
	check(CALLS("{\"id\":\"a\"},{\"id\":\"b\"}")
	              CALLS(NAMED("", "f", "{}") "," NAMED("", "g", "[]")) FINISH("tool_calls")
	                      DONE,
	      "", "", " 0:functions.f:2:{} 1:functions.g:3:[]", "tool_calls");
	assert_int_equal(repaired(nameless, strlen(nameless), 9, &both, &c, &err), KM_EFORMAT);
	assert_non_null(strstr(err.msg, "without a name"));
	assert_string_equal(c.calls.data, "");
	assert_string_equal(c.finish, "stop");
	client_release(&c);
}

static void completions_become_chat(void **state)
{
	(void)state;
	check("data: "
	      "{\"id\":\"x\",\"object\":\"text_completion\",\"choices\":[{\"index\":0,\"text\":\"<"
	      "think>a</think>b" B "functions.f:7\",\"logprobs\":null,\"finish_reason\":null}]}\n\n"
	      "data: "
	      "{\"id\":\"x\",\"object\":\"text_completion\",\"choices\":[{\"index\":0,\"text\":\"" A
	      "{}" C "\",\"finish_reason\":\"stop\"}]}\n\n" DONE,
	      "b", "a", " 0:functions.f:2:{}", "tool_calls");
}

static void what_is_beside_the_text_is_handed_on(void **state)
{
	static const char stream[] =
		ROLE "data: " HEAD
		     "\"delta\":{\"content\":\"<|tool_\"},\"logprobs\":{\"content\":[1]},\"finish_"
	             "reason\":null}]}\n\n" DELTA("\"content\":\"x\",\"refusal\":\"no\"")
			     FINISH("stop") "data: "
	                                    "{\"id\":\"c1\",\"choices\":[],\"usage\":{\"total_"
	                                    "tokens\":3}}\n\n: ping\n\n" DONE;
	struct client c;
	km_err err;

	(void)state;
	assert_int_equal(repaired(stream, sizeof(stream) - 1, 50, &both, &c, &err), 0);
	assert_string_equal(c.content.data, "<|tool_x");
	assert_int_equal(c.logprobs, 1);
	assert_int_equal(c.usages, 1);
	assert_int_equal(c.others, 1);
	client_release(&c);
}

static void choices_are_kept_apart(void **state)
{
	static const char stream[] = "data: "
	                             "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a<|tool_"
	                             "call\"}},{\"index\":1,\"delta\":{\"content\":\"b\"}}]}\n\n"
				     "data: "
	                             "{\"choices\":[{\"index\":1,\"delta\":{\"content\":\"_end|>\"}"
	                             ",\"finish_reason\":\"stop\"}]}\n\n"
				     "data: "
	                             "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"_end|>\"}"
	                             ",\"finish_reason\":\"stop\"}]}\n\n" DONE;
	struct client c;
	km_err err;

	(void)state;
	assert_int_equal(repaired(stream, sizeof(stream) - 1, 7, &both, &c, &err), 0);
	assert_string_equal(c.content.data, "ab_end|>");
	client_release(&c);
}

static void cut_streams_say_so(void **state)
{
	static const char stream[] =
		ROLE DELTA("\"content\":\"sure, " B "functions.f:0" A "{\\\"a\\\": 1<|tool\"")
			DELTA("\"content\":\"_call_end|>\"") FINISH("stop") DONE;
	size_t first = strlen(
		ROLE DELTA("\"content\":\"sure, " B "functions.f:0" A "{\\\"a\\\": 1<|tool\""));
	struct client c;
	km_err err;

	(void)state;
	for (size_t len = 0; len < sizeof(stream) - 1; len++) {
		int rc = repaired(stream, len, 64, &both, &c, &err);

		/* but for the newlines at its end the stream is whole */
		assert_int_equal(rc, len < sizeof(stream) - 3 ? KM_EFORMAT : 0);
		assert_int_equal(c.done, !rc);
		if (rc) {
			assert_non_null(strstr(err.msg, "ends without [DONE]"));
		}
		if (len >= first) {
			assert_string_equal(c.content.data, "sure, ");
			assert_string_equal(c.calls.data, " 0:functions.f:2:{\"a\": 1");
		}
		client_release(&c);
	}
}

#define WHOLE DELTA("\"content\":\"a\"") FINISH("stop")

static void a_done_that_lost_its_newlines_is_taken(void **state)
{
	static const char *const whole[] = { WHOLE "data: [DONE]", WHOLE "data:[DONE]",
		                             WHOLE "data: [DONE]\n", WHOLE "data: [DONE]\r",
		                             WHOLE "data: [DONE]\r\n" };
	static const char *const cut[] = { WHOLE "data: [DONE", WHOLE "[DONE]",
		                           WHOLE "data: b\ndata: [DONE]",
		                           WHOLE "data: [DONE]\ndata: b" };
	struct client c;
	km_err err;

	(void)state;
	for (size_t i = 0; i < sizeof(whole) / sizeof(*whole); i++)
		check(whole[i], "a", "", "", "stop");
	for (size_t i = 0; i < sizeof(cut) / sizeof(*cut); i++) {
		assert_int_equal(repaired(cut[i], strlen(cut[i]), 9, &both, &c, &err), KM_EFORMAT);
		assert_false(c.done);
		client_release(&c);
	}
}

static void errors_in_the_stream_are_remembered(void **state)
{
	static const char *const streams[][2] = {
		{ "data: {\"error\":{\"message\":\"x\"}}\n\n" DONE, "an error of the server" },
		{ "data: not json\n\n" DONE, "not a JSON object" },
		{ DELTA("\"content\":\"a\"") DONE, "no finish_reason" },
		{ "data: {\"choices\":[{\"index\":999,\"delta\":{}}]}\n\n" DONE,
		  "index out of range" },
	};
	struct client c;
	km_err err;

	(void)state;
	for (size_t i = 0; i < sizeof(streams) / sizeof(*streams); i++) {
		assert_int_equal(repaired(streams[i][0], strlen(streams[i][0]), 9, &both, &c, &err),
		                 KM_EFORMAT);
		assert_non_null(strstr(err.msg, streams[i][1]));
		client_release(&c);
	}
}

static void text_that_is_not_utf8_is_replaced(void **state)
{
	(void)state;
	check(DELTA("\"content\":\"a\xff"
	            "b\\ud83d\"") DELTA("\"content\":\"c\"") FINISH("stop") DONE,
	      "a\uFFFDb\uFFFDc", "", "", "stop");
}

static void with_the_reasoning_parser_off(void **state)
{
	static const char stream[] = DELTA("\"reasoning_content\":\"a\"")
		DELTA("\"content\":\"<think>b\"") FINISH("stop") DONE;
	km_parser_options tools = { .tools = true };
	struct client c;
	km_err err;

	(void)state;
	assert_int_equal(repaired(stream, sizeof(stream) - 1, 11, &tools, &c, &err), 0);
	assert_string_equal(c.reasoning.data, "a");
	assert_string_equal(c.content.data, "<think>b");
	client_release(&c);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(events_are_read_however_they_are_cut),
		cmocka_unit_test(long_events_are_refused),
		cmocka_unit_test(what_is_written_is_read),
		cmocka_unit_test(leaked_markers_become_calls),
		cmocka_unit_test(reasoning_that_the_engine_found_is_kept),
		cmocka_unit_test(calls_that_the_engine_found_are_renumbered),
		cmocka_unit_test(calls_without_an_index_are_told_apart),
		cmocka_unit_test(a_call_is_given_when_its_name_comes),
		cmocka_unit_test(completions_become_chat),
		cmocka_unit_test(what_is_beside_the_text_is_handed_on),
		cmocka_unit_test(choices_are_kept_apart),
		cmocka_unit_test(cut_streams_say_so),
		cmocka_unit_test(a_done_that_lost_its_newlines_is_taken),
		cmocka_unit_test(errors_in_the_stream_are_remembered),
		cmocka_unit_test(text_that_is_not_utf8_is_replaced),
		cmocka_unit_test(with_the_reasoning_parser_off),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
