/* JSONL lines: what is read, what is refused, and that the fast reader reads what jansson reads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/rng.h"
#include "base/utf8.h"
#include "wire/json_fast.h"
#include "wire/parse_request.h"

static const km_parse_defaults defaults = { { .tools = true, .reasoning = true }, "stop", NULL };

static void lines_are_read(void **state)
{
	static const char line[] =
		"{\"text\":\"a\\u00e9<x>\\ud83d\\ude00b\", "
	        "\"thinking\":true,\"history_tool_calls\":3,"
		"\"engine_finish\":\"length\",\"tools\":[{\"function\":{\"name\":\"f\"}}],"
		"\"literal_spans\":[[1,2],[5,7]],\"parsers\":\"reasoning\"}";
	km_parse_request r;
	km_err err;

	(void)state;
	km_parse_request_init(&r);
	assert_int_equal(km_parse_request_read(&r, &defaults, line, sizeof(line) - 1, &err), 0);
	assert_string_equal(r.text.data, "a\u00e9<x>\U0001F600b");
	assert_true(r.parser.in_reasoning && r.parser.reasoning && !r.parser.tools);
	assert_int_equal(r.parser.history_tool_calls, 3);
	assert_string_equal(r.engine_finish, "length");
	assert_int_equal(json_array_size(r.parser.declared_tools), 1);
	assert_int_equal(r.literal_count, 2);
	assert_int_equal(r.literal[0].start, 1);
	assert_int_equal(r.literal[0].end, 3);
	assert_int_equal(r.literal[1].start, 6);
	assert_int_equal(r.literal[1].end, 11);
	/* The next line starts from the defaults again. */
	assert_int_equal(
		km_parse_request_read(&r, &defaults, "{\"chunks\":[\"x\",\"y\"]}", 20, &err), 0);
	assert_string_equal(r.text.data, "xy");
	assert_true(!r.parser.in_reasoning && r.parser.tools && !r.parser.declared_tools);
	assert_int_equal(r.literal_count, 0);
	assert_string_equal(r.engine_finish, "stop");
	km_parse_request_release(&r);
}

/* A line, and a part of the sentence that refuses it. */
static const char *const refused[][2] = {
	{ "", "not JSON" },
	{ "{", "not JSON" },
	{ "[]", "must be a JSON object" },
	{ "7", "must be a JSON object" },
	{ "{}", "exactly one of" },
	{ "{\"text\":\"a\",\"chunks\":[]}", "exactly one of" },
	{ "{\"text\":7}", "\"text\" must be a string" },
	{ "{\"chunks\":\"a\"}", "must be an array of strings" },
	{ "{\"chunks\":[\"a\",1]}", "each of \"chunks\"" },
	{ "{\"text\":\"a\"} x", "not JSON" },
	{ "{\"text\":\"a\",\"thinking\":1}", "\"thinking\"" },
	{ "{\"text\":\"a\",\"history_tool_calls\":-1}", "\"history_tool_calls\"" },
	{ "{\"text\":\"a\",\"history_tool_calls\":99999999999}", "\"history_tool_calls\"" },
	{ "{\"text\":\"a\",\"history_tool_calls\":1.5}", "\"history_tool_calls\"" },
	{ "{\"text\":\"a\",\"engine_finish\":\"abort\"}", "\"engine_finish\"" },
	{ "{\"text\":\"a\",\"parsers\":\"all\"}", "\"parsers\"" },
	{ "{\"text\":\"a\",\"tools\":{}}", "\"tools\" must be an array" },
	{ "{\"text\":\"a\",\"tool_choice\":\"maybe\"}", "\"tool_choice\"" },
	{ "{\"text\":\"a\",\"tool_choice\":{\"function\":{\"name\":\"f\"}}}",
	  "not among \"tools\"" },
	{ "{\"text\":\"a\",\"literal_spans\":[[0,2]]}", "\"literal_spans\"[0]" },
	{ "{\"text\":\"ab\",\"literal_spans\":[[1,2],[0,1]]}", "\"literal_spans\"[1]" },
	{ "{\"text\":\"ab\",\"literal_spans\":[[1]]}", "\"literal_spans\"[0]" },
	{ "{\"text\":\"ab\",\"literal_spans\":[[0,1,2]]}", "\"literal_spans\"[0]" },
	{ "{\"text\":\"ab\",\"literal_spans\":[[-1,1]]}", "\"literal_spans\"[0]" },
	{ "{\"text\":\"ab\",\"literal_spans\":7}", "\"literal_spans\"" },
	{ "{\"ids\":[1]}", "need --tokenizer" },
	{ "{\"ids\":7}", "\"ids\" must be an array" },
	{ "{\"text\":\"a\tb\"}", "not JSON" },
	{ "{\"text\":\"\\x\"}", "not JSON" },
	{ "{\"text\":\"\\ud8zz\"}", "not JSON" },
	{ "{\"text\":18446744073709551615}", "\"text\" must be a string" },
	{ "{\"text\":\"a\",\"history_tool_calls\":1e999}", "\"history_tool_calls\"" },
	{ "{\"text\":\"a\",\"x\":018446744073709551615}", "not JSON" },
	{ "{\"text\":\"a\",\"x\":1e999.5}", "not JSON" },
	{ "{\"text\":\"a\",\"x\":-NaN}", "not JSON" },
	{ "{\"text\":\"a\",\"x\":nan}", "not JSON" },
};

static void wrong_lines_are_refused_with_a_sentence(void **state)
{
	km_parse_request r;
	km_err err;

	(void)state;
	km_parse_request_init(&r);
	for (size_t i = 0; i < sizeof(refused) / sizeof(*refused); i++) {
		int rc = km_parse_request_read(&r, &defaults, refused[i][0], strlen(refused[i][0]),
		                               &err);

		if (rc >= 0 || !strstr(err.msg, refused[i][1]))
			fail_msg("%s: %d %s", refused[i][0], rc, rc < 0 ? err.msg : "accepted");
	}
	km_parse_request_release(&r);
}

static void must_read(km_parse_request *r, const char *line)
{
	km_err err;

	if (km_parse_request_read(r, &defaults, line, strlen(line), &err) < 0)
		fail_msg("%s: %s", line, err.msg);
}

static void ill_formed_text_is_replaced_and_counted(void **state)
{
	static const char *const lines[][2] = {
		{ "{\"text\":\"a\xff"
		  "b\"}",
		  "a\uFFFDb" },
		{ "{\"text\":\"\\ud83dx\"}", "\uFFFDx" },
		{ "{\"text\":\"\\udc00\"}", "\uFFFD" },
		{ "{\"text\":\"\\ud83d\\ud83d\\ude00\"}", "\uFFFD\U0001F600" },
		{ "{\"text\":\"\\ud83d\\u0041\"}", "\uFFFDA" },
		{ "{\"text\":\"\xe4\xbd\"}", "\uFFFD" },
	};
	km_parse_request r;

	(void)state;
	km_parse_request_init(&r);
	for (size_t i = 0; i < sizeof(lines) / sizeof(*lines); i++) {
		must_read(&r, lines[i][0]);
		assert_string_equal(r.text.data, lines[i][1]);
		assert_int_equal(r.bad_count, 1);
		assert_true(r.bad_at >= 9);
	}
	must_read(&r, "{\"text\":\"\\\\ud83d\\ud83d\\ude00\"}");
	assert_string_equal(r.text.data, "\\ud83d\U0001F600");
	assert_int_equal(r.bad_count, 0);
	km_parse_request_release(&r);
}

/* Numbers of any size are JSON, and NaN is what some engines write all the same. */
static void other_members_may_hold_any_number(void **state)
{
	static const struct {
		const char *line;
		size_t nans;
	} lines[] = {
		{ "{\"text\":\"a\",\"x\":18446744073709551615}", 0 },
		{ "{\"x\":[-1e400,1E+999,{\"y\":9223372036854775808}],\"text\":\"a\"}", 0 },
		{ "{\"text\":\"a\",\"x\":NaN,\"y\":1e999}", 1 },
		{ "{\"text\":\"a\",\"x\":-Infinity}", 1 },
	};
	km_parse_request r;

	(void)state;
	km_parse_request_init(&r);
	for (size_t i = 0; i < sizeof(lines) / sizeof(*lines); i++) {
		must_read(&r, lines[i].line);
		assert_string_equal(r.text.data, "a");
		assert_int_equal(r.nan_count, lines[i].nans);
	}
	km_parse_request_release(&r);
}

static void numbers_are_written_as_they_were_read(void **state)
{
	static const char *const values[] = {
		"18446744073709551615",
		"[-9223372036854775809,9223372036854775807,1234567890123456789,7,-0.5]",
		"{\"a\":1e400,\"b\":[-1.25E+4000,1e300,\"1e400 \\\"1e401\"],\"1e402\":null}",
		"[1e400,1e300,-1e300,1.7976931348623157e308,1e400]",
	};
	km_json_odd odd = { 0 };
	km_buf out = KM_BUF_INIT;
	json_error_t error;

	(void)state;
	for (size_t i = 0; i < sizeof(values) / sizeof(*values); i++) {
		json_t *value = km_json_load(values[i], strlen(values[i]), &error, &odd);

		assert_non_null(value);
		km_buf_clear(&out);
		km_json_write(&out, value, &odd);
		assert_string_equal(out.data, values[i]);
		json_decref(value);
	}
	km_buf_release(&odd.wide);
	km_buf_release(&out);
}

static const char *const pieces[] = {
	"{\"text\":\"",
	"{\"text\" : \"",
	"{\"chunks\":[\"",
	"\",\"",
	"\"]",
	"\"",
	"}",
	"\"}",
	"\"}",
	" }\r",
	",\"thinking\":true",
	",\"thinking\":false",
	",\"thinking\": nul",
	",\"history_tool_calls\":12",
	",\"history_tool_calls\":01",
	",\"history_tool_calls\":1e3",
	",\"history_tool_calls\": 7 ",
	",\"engine_finish\":\"length\"",
	",\"engine_finish\":\"stop\"",
	",\"engine_finish\":\"st\\u006fp\"",
	",\"parsers\":\"tool\"",
	",\"parsers\":\"none\"",
	",\"tools\":[]",
	",\"text\":\"b\"",
	",\"x\":{\"y\":[1,2]}",
	",\"x\":18446744073709551615",
	",\"x\":[-1e999,NaN]",
	"plain text of some length",
	"<|tool_call_begin|>",
	"\\n",
	"\\\"",
	"\\\\",
	"\\/",
	"\\u00e9",
	"\\u0000",
	"\\ud83d\\ude00",
	"\\ud83d",
	"\\ude00",
	"\\uD83",
	"\\q",
	"\xe4\xbd\xa0",
	"\xf0\x9f\x98\x80",
	"\xff",
	"\xe4\xbd",
	"\t",
	"\x01",
	"\x7f",
	"'",
	",",
	":",
	"[",
	"]",
	"1",
	"null",
	"exactly eight bytes, and more",
	"\",\"parsers\":\"both\"}",
	",\"tools\":[{\"function\":{\"name\":\"f\"}}]",
	",\"tools\":[\"]\\\"[\"]",
	",\"tools\":[1,]",
	",\"tools\":null",
	",\"tool_choice\":\"none\"",
	",\"tool_choice\":\"auto\"",
	",\"thinking\":null",
	"\",\"tools\":[{\"function\":{\"name\":\"g\"}}]}",
	"\",\"tool_choice\":\"none\",\"tools\":[],\"parsers\":\"tool\"}",
	"\",\"thinking\":true}",
	"\",\"history_tool_calls\":3}",
	"\",\"engine_finish\":\"length\"}",
};

static bool same(const km_parse_request *a, const km_parse_request *b)
{
	return a->text.len == b->text.len &&
	       (!a->text.len || !memcmp(a->text.data, b->text.data, a->text.len)) &&
	       a->parser.in_reasoning == b->parser.in_reasoning &&
	       a->parser.tools == b->parser.tools && a->parser.reasoning == b->parser.reasoning &&
	       a->parser.history_tool_calls == b->parser.history_tool_calls &&
	       !strcmp(a->engine_finish, b->engine_finish) && a->bad_count == b->bad_count &&
	       (a->parser.declared_tools
	                ? json_equal(a->parser.declared_tools, b->parser.declared_tools)
	                : !b->parser.declared_tools);
}

/* Random lines, half of them wrong somewhere: both readers accept the same, and read the same. */
static void both_readers_agree(void **state)
{
	km_parse_request fast, slow;
	km_buf line = KM_BUF_INIT;
	int cases = 200000, accepted = 0, by_scanner = 0;
	km_err err;

	(void)state;
	km_parse_request_init(&fast);
	km_parse_request_init(&slow);
	for (uint64_t seed = 0; seed < (uint64_t)cases; seed++) {
		uint64_t count = km_rng_u64(seed, 0) % 12;
		int a, b;

		km_buf_clear(&line);
		km_buf_puts(&line, pieces[km_rng_u64(seed, 1) % 3]);
		for (uint64_t i = 0; i < count; i++)
			km_buf_puts(&line, pieces[km_rng_u64(seed, 2 + i) %
			                          (sizeof(pieces) / sizeof(*pieces))]);
		if (seed % 2)
			km_buf_puts(&line, seed % 4 == 1 ? "\"}"
			                                 : pieces[sizeof(pieces) / sizeof(*pieces) -
			                                          1 - seed / 4 % 6]);
		a = km_parse_request_read(&fast, &defaults, line.data, line.len, &err);
		by_scanner += !a && !fast.root;
		b = km_parse_request_read_slowly(&slow, &defaults, line.data, line.len, &err);
		if (a != b || (!a && !same(&fast, &slow)))
			fail_msg("readers differ (%d, %d) on %s", a, b, line.data);
		accepted += !a;
	}
	printf("figure: %d random lines read alike; %d accepted, %d of them by the scanner\n",
	       cases, accepted, by_scanner);
	assert_true(by_scanner > 5000);
	km_parse_request_release(&fast);
	km_parse_request_release(&slow);
	km_buf_release(&line);
}

/* Any bytes, written and read back, are themselves made valid; jansson reads the same. */
static void strings_survive_the_round_trip(void **state)
{
	km_buf raw = KM_BUF_INIT, valid = KM_BUF_INIT, quoted = KM_BUF_INIT, back = KM_BUF_INIT;

	(void)state;
	for (uint64_t seed = 0; seed < 50000; seed++) {
		size_t n = km_rng_u64(seed, 0) % 50;
		json_t *value;

		km_buf_clear(&raw);
		km_buf_clear(&valid);
		km_buf_clear(&quoted);
		km_buf_clear(&back);
		km_buf_puts(&valid, "");
		for (size_t i = 1; i <= n; i++) {
			uint64_t v = km_rng_u64(seed, i);

			km_buf_putc(&raw, (char)(v % 5 ? ' ' + (v >> 8) % 95 : v >> 16));
		}
		km_utf8_append_valid(&valid, raw.data, raw.len);
		km_json_fast_write(&quoted, raw.data, raw.len);
		assert_int_equal(km_json_fast_read(quoted.data, quoted.len, &back), quoted.len);
		value = json_loadb(quoted.data, quoted.len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
		assert_non_null(value);
		assert_int_equal(back.len, valid.len);
		assert_int_equal(json_string_length(value), valid.len);
		if (valid.len) {
			assert_memory_equal(back.data, valid.data, valid.len);
			assert_memory_equal(json_string_value(value), valid.data, valid.len);
		}
		json_decref(value);
	}
	km_buf_release(&raw);
	km_buf_release(&valid);
	km_buf_release(&quoted);
	km_buf_release(&back);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(lines_are_read),
		cmocka_unit_test(wrong_lines_are_refused_with_a_sentence),
		cmocka_unit_test(ill_formed_text_is_replaced_and_counted),
		cmocka_unit_test(other_members_may_hold_any_number),
		cmocka_unit_test(numbers_are_written_as_they_were_read),
		cmocka_unit_test(both_readers_agree),
		cmocka_unit_test(strings_survive_the_round_trip),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
