/*
 * The output parser: rules on small inputs here, the conformance corpus and random inputs below.
 * Every check of a result runs over every cut in two, byte by byte, and in one piece.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include <stdio.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/utf8.h"
#include "text/message.h"
#include "text/parser.h"
#include "wire/parse_json.h"
#include "wire/parse_request.h"

#define S "<|tool_calls_section_begin|>"
#define E "<|tool_calls_section_end|>"
#define B "<|tool_call_begin|>"
#define A "<|tool_call_argument_begin|>"
#define C "<|tool_call_end|>"

/* The sanitizers make each case twenty times as dear. */
#if defined(__SANITIZE_ADDRESS__)
enum { RANDOM_CASES = 8000 };
#else
enum { RANDOM_CASES = 40000 };
#endif

/* A message, and what the accounting of its bytes needs. */
struct result {
	km_message message;
	size_t emitted, dropped, invented;
	int repairs;
};

static void on_event(void *ctx, const km_parser_event *event)
{
	struct result *r = ctx;

	km_message_add(&r->message, event);
	r->emitted += event->len;
}

static void on_repair(void *ctx, const char *what, const char *bytes, size_t len)
{
	struct result *r = ctx;

	(void)bytes;
	r->dropped += len;
	r->repairs++;
	if (strstr(what, "{}"))
		r->invented += 2;
}

static km_parser_options both = { .tools = true, .reasoning = true };

static km_parser *parser_for(struct result *r, const km_parser_options *options)
{
	km_parser_options o = *options;

	memset(r, 0, sizeof(*r));
	o.on_event = on_event;
	o.on_repair = on_repair;
	o.ctx = r;
	return km_parser_new(&o);
}

/* Every byte is in an event, the format's own, or listed as dropped. */
static void finish(km_parser *parser, struct result *r, size_t bytes)
{
	km_parser_finish(parser);
	assert_int_equal(km_parser_calls(parser), r->message.count);
	assert_int_equal(r->emitted - r->invented + r->dropped + km_parser_format_bytes(parser),
	                 bytes);
	km_parser_free(parser);
}

static void dump(const struct result *r, km_buf *out)
{
	km_buf_clear(out);
	km_buf_puts(out, "content[");
	km_buf_append(out, r->message.content.data, r->message.content.len);
	km_buf_puts(out, "]");
	if (r->message.reasoning.len)
		km_buf_printf(out, " reasoning[%s]", r->message.reasoning.data);
	for (int i = 0; i < r->message.count; i++) {
		const km_message_call *call = &r->message.calls[i];

		km_buf_printf(out, " %s=%s(%s)", call->id.data, call->name.data,
		              call->arguments.len ? call->arguments.data : "");
	}
}

static void parse_pieces(const km_parser_options *options, const char *text, size_t len, size_t cut,
                         km_buf *out)
{
	struct result r;
	km_parser *parser = parser_for(&r, options);

	if (cut == SIZE_MAX) {
		for (size_t i = 0; i < len; i++)
			km_parser_bytes(parser, text + i, 1);
	} else {
		km_parser_bytes(parser, text, cut);
		km_parser_bytes(parser, text + cut, len - cut);
	}
	finish(parser, &r, len);
	dump(&r, out);
	km_message_release(&r.message);
}

static void expect_with(const km_parser_options *options, const char *text, const char *expected)
{
	km_buf out = KM_BUF_INIT;
	size_t len = strlen(text);

	for (size_t cut = 0; cut <= len; cut++) {
		parse_pieces(options, text, len, cut, &out);
		assert_string_equal(out.data, expected);
	}
	parse_pieces(options, text, len, SIZE_MAX, &out);
	assert_string_equal(out.data, expected);
	km_buf_release(&out);
}

static void expect(const char *text, const char *expected)
{
	expect_with(&both, text, expected);
}

static void calls_come_out(void **state)
{
	(void)state;
	expect("plain text", "content[plain text]");
	expect(S B "functions.a:0" A "{\"x\":1}" C E, "content[] functions.a:0=a({\"x\":1})");
	expect("Let me see. " S " \n" B " functions.a.b-c:7 \n" A "\n{} \n" C "\n" B "b:1" A C E
	       "\n",
	       "content[Let me see. ] functions.a.b-c:0=a.b-c({}) functions.b:1=b({})");
	expect(B "functions.a:0" A "{}" C "then", "content[then] functions.a:0=a({})");
	expect("<|tool_call_section_begin|>" B "functions.a:0" A "{}" C "<|tool_call_section_end|>",
	       "content[] functions.a:0=a({})");
}

static void calls_that_do_not_end_well(void **state)
{
	(void)state;
	expect(S B "functions.a:0" A "{\"x\": \"Bei", "content[] functions.a:0=a({\"x\": \"Bei)");
	expect(S B "functions.a:0" A, "content[] functions.a:0=a()");
	expect("x" S B "functions.a:0", "content[x]");
	expect(S B "functions.a:0" A "{}" E "after", "content[after] functions.a:0=a({})");
	expect(S B "functions.a:0" A "{}" B "functions.b:1" A "[]" S B "functions.c:2" A "1" C E,
	       "content[] functions.a:0=a({}) functions.b:1=b([]) functions.c:2=c(1)");
	expect(S B "functions.a:0" B "functions.b:0" A "{}" C E, "content[] functions.b:0=b({})");
	expect(S B "weird@id" A "{}" C B "functions.b:0" A "{}" C E,
	       "content[] functions.b:0=b({})");
	expect(S B "functions.a:0" C E "t", "content[t]");
}

static void white_space_around_sections(void **state)
{
	(void)state;
	expect(" \n" S B "functions.a:0" A "{}" C E " \n", "content[] functions.a:0=a({})");
	expect("\n" S E, "content[\n]");
	expect("\n" S E " ", "content[\n]");
	expect("\n" S E "t", "content[\nt]");
	expect("a \n" S B "functions.a:0" A "{}" C E "\n" S B "functions.a:0" A "{}" C E "\n b ",
	       "content[a \n\n b ] functions.a:0=a({}) functions.a:1=a({})");
	expect(" \n ", "content[ \n ]");
	expect("", "content[]");
}

static void stray_markers_do_not_leak(void **state)
{
	(void)state;
	expect("a" A "b" C "c" E "d</think>e", "content[abcde]");
	expect("a <", "content[a <]");
	expect("a <|tool_call", "content[a <|tool_call]");
	expect("<<think>x</think>y", "content[<y] reasoning[x]");
	expect("1 <|tool_call_begix <thi <</thinl", "content[1 <|tool_call_begix <thi <</thinl]");
	expect(S "noise" B "functions.a:0" A "{}" C "noise" S "</think>" E "x",
	       "content[x] functions.a:0=a({})");
}

static void reasoning_is_set_apart(void **state)
{
	km_parser_options inside = both, tools = { .tools = true }, none = { 0 },
			  think = { .reasoning = true };

	(void)state;
	inside.in_reasoning = true;
	expect("<think>a</think>b", "content[b] reasoning[a]");
	expect("<think></think>b", "content[b]");
	expect("<think><think>a</think>b<think>c</think>d", "content[bd] reasoning[ac]");
	expect("<think>a" S B "functions.a:0" A "{}" C E,
	       "content[] reasoning[a] functions.a:0=a({})");
	expect("<think>a" B "functions.a:0" A "{}" C, "content[] reasoning[a] functions.a:0=a({})");
	expect_with(&inside, "a</think>\n\nb", "content[\n\nb] reasoning[a]");
	expect_with(&inside, "<think>a", "content[] reasoning[a]");
	expect_with(&tools, "<think>a</think>" S B "functions.a:0" A "{}" C E,
	            "content[<think>a</think>] functions.a:0=a({})");
	expect_with(&none, "<think>" S C, "content[<think>" S C "]");
	expect_with(&think, "<think>a" S B "x" C, "content[" S B "x" C "] reasoning[a]");
}

/* Through the ids' front end: text that merely looks like a marker is text. */
static void look_alikes_are_text(void **state)
{
	static const char look_alike[] = "{\"s\":\"" C "</think>\"}";
	struct result r;
	km_parser *parser = parser_for(&r, &both);

	(void)state;
	km_parser_text(parser, S "<thi", sizeof(S "<thi") - 1);
	km_parser_marker(parser, KM_MARK_SECTION_BEGIN);
	km_parser_marker(parser, KM_MARK_CALL_BEGIN);
	km_parser_text(parser, "functions.w", 11);
	km_parser_text(parser, ":0", 2);
	km_parser_marker(parser, KM_MARK_ARGUMENT_BEGIN);
	km_parser_text(parser, look_alike, sizeof(look_alike) - 1);
	km_parser_marker(parser, KM_MARK_CALL_END);
	km_parser_marker(parser, KM_MARK_SECTION_END);
	finish(parser, &r, sizeof(S "<thi" S B "functions.w:0" A C E) - 1 + sizeof(look_alike) - 1);
	assert_string_equal(r.message.content.data, S "<thi");
	assert_string_equal(r.message.calls[0].arguments.data, look_alike);
	assert_int_equal(r.repairs, 0);
	km_message_release(&r.message);
}

/* ---- the corpus ---- */

static const km_parse_defaults corpus_defaults = { { .tools = true, .reasoning = true },
	                                           "stop",
	                                           NULL };

struct corpus {
	km_parse_request request;
	json_t *line, *expected;
	int cases, parses;
};

static void check_case(struct corpus *c, km_parser *parser, struct result *r, size_t bytes)
{
	km_buf out = KM_BUF_INIT;
	json_t *got;

	finish(parser, r, bytes);
	km_parse_json_message(&out, &r->message,
	                      km_finish_reason(r->message.count, c->request.engine_finish));
	got = json_loads(out.data, JSON_ALLOW_NUL, NULL);
	if (!json_equal(got, c->expected)) {
		print_message("case \"%s\": got %s\n",
		              json_string_value(json_object_get(c->line, "name")), out.data);
		fail();
	}
	json_decref(got);
	km_buf_release(&out);
	km_message_release(&r->message);
	c->parses++;
}

static void check_cut(struct corpus *c, size_t cut)
{
	struct result r;
	km_parser *parser = parser_for(&r, &c->request.parser);

	km_parse_request_feed(&c->request, parser, 0, cut);
	km_parse_request_feed(&c->request, parser, cut, c->request.text.len);
	check_case(c, parser, &r, c->request.text.len);
}

static void check_pieces(struct corpus *c, uint64_t seed, size_t longest)
{
	struct result r;
	km_parser *parser = parser_for(&r, &c->request.parser);
	size_t at = 0, end;

	for (uint64_t i = 0; at < c->request.text.len; i++, at = end) {
		end = at + 1 + km_rng_u64(seed, i) % longest;
		if (end > c->request.text.len)
			end = c->request.text.len;
		km_parse_request_feed(&c->request, parser, at, end);
	}
	check_case(c, parser, &r, c->request.text.len);
}

static enum km_marker marker_at(const char *s, size_t n)
{
	for (int m = 0; m < KM_MARK_COUNT; m++) {
		size_t len = strlen(km_marker_text[m]);

		if (n >= len && !memcmp(s, km_marker_text[m], len))
			return (enum km_marker)m;
	}
	return KM_MARK_COUNT;
}

/* What the engine does: markers are ids, all else is text, in pieces. */
static void check_ids(struct corpus *c, size_t piece)
{
	const km_parse_request *q = &c->request;
	struct result r;
	km_parser *parser = parser_for(&r, &q->parser);
	size_t at = 0, span = 0, from = 0;

	while (at < q->text.len) {
		enum km_marker marker;

		while (span < q->literal_count && q->literal[span].end <= at)
			span++;
		marker = span < q->literal_count && q->literal[span].start <= at
		                 ? KM_MARK_COUNT : marker_at(q->text.data + at, q->text.len - at);
		if (marker != KM_MARK_COUNT && span < q->literal_count &&
		    q->literal[span].start < at + strlen(km_marker_text[marker]))
			marker = KM_MARK_COUNT;
		if (marker != KM_MARK_COUNT || at - from == piece) {
			km_parser_text(parser, q->text.data + from, at - from);
			from = at;
		}
		if (marker == KM_MARK_COUNT) {
			at++;
			continue;
		}
		km_parser_marker(parser, marker);
		from = at += strlen(km_marker_text[marker]);
	}
	km_parser_text(parser, q->text.data + from, at - from);
	check_case(c, parser, &r, q->text.len);
}

/* Every cut in two for texts up to 3000 bytes; for longer ones each cut within 30 bytes of a '<'
 * that is among the first and last 1500, and every 997th. */
static bool is_worth_a_cut(const km_buf *text, size_t cut)
{
	if (text->len <= 3000 || cut % 997 == 0)
		return true;
	if (cut > 1500 && cut + 1500 < text->len)
		return false;
	for (size_t i = cut < 30 ? 0 : cut - 30; i < cut + 30 && i < text->len; i++) {
		if (text->data[i] == '<')
			return true;
	}
	return false;
}

static void check_corpus_line(struct corpus *c, const char *line, size_t len)
{
	km_err err;
	int rc = km_parse_request_read(&c->request, &corpus_defaults, line, len, &err);

	if (rc < 0)
		fail_msg("%s: %.*s", err.msg, (int)len, line);
	c->line = json_loadb(line, len, JSON_ALLOW_NUL, NULL);
	c->expected = json_object_get(c->line, "expect");
	assert_non_null(json_object_get(c->line, "source"));
	assert_non_null(c->expected);
	for (size_t cut = 0; cut <= c->request.text.len; cut++) {
		if (is_worth_a_cut(&c->request.text, cut))
			check_cut(c, cut);
	}
	check_pieces(c, 0, 1);
	for (uint64_t seed = 1; seed < 20; seed++)
		check_pieces(c, seed, 1 + seed * 3);
	if (!c->request.text.len || !strstr(c->request.text.data, "<|tool_call_section")) {
		for (size_t piece = 1; piece < 9; piece++)
			check_ids(c, piece);
	}
	json_decref(c->line);
	c->cases++;
}

static void corpus_holds_through_every_cut(void **state)
{
	static const char *const files[] = { "upstream", "reports", "adversarial" };
	struct corpus c = { 0 };
	char *line = NULL;
	size_t cap = 0;

	(void)state;
	km_parse_request_init(&c.request);
	for (size_t i = 0; i < sizeof(files) / sizeof(*files); i++) {
		char path[80];
		FILE *file;
		int before = c.cases;
		ssize_t len;

		snprintf(path, sizeof(path), "tests/data/parse/%s.jsonl", files[i]);
		file = fopen(path, "r");
		assert_non_null(file);
		while ((len = getline(&line, &cap, file)) > 0)
			check_corpus_line(&c, line, (size_t)len - (line[len - 1] == '\n'));
		fclose(file);
		printf("figure: %d corpus cases from %s\n", c.cases - before, path);
	}
	printf("figure: %d corpus cases in %d parses\n", c.cases, c.parses);
	assert_true(c.cases >= 150);
	free(line);
	km_parse_request_release(&c.request);
}

/* ---- random inputs ---- */

static const char *const pieces[] = {
	S,
	E,
	B,
	A,
	C,
	"<think>",
	"</think>",
	"<|tool_call_section_begin|>",
	"<|tool_call_section_end|>",
	S,
	E,
	B,
	A,
	C,
	B "functions.f:0" A "{}" C,
	"functions.get_x:3",
	"call_7",
	"0",
	"weird@id",
	" ",
	"\n",
	" \r\n\t",
	"{\"x\":1}",
	"{\"y\":\"a\"}",
	"{\"x\"",
	"{}",
	"text",
	"a b ",
	"\xe4\xbd\xa0",
	"\xf0\x9f\x98\x80",
	"\xf0\x9f",
	"\xff",
	"\xe4",
	"\x80",
	"<",
	"<|",
	"<thi",
	"</",
	"<|tool_call",
	"<|tool_calls_section_",
	"_begin|>",
	"|>",
	"end|>",
	"!!!!",
	"\"",
	":",
	"functions.",
	"",
};

static void random_input(km_buf *text, uint64_t seed)
{
	size_t count = km_rng_u64(seed, 0) % 40;

	km_buf_clear(text);
	km_buf_puts(text, "");
	for (size_t i = 1; i <= count; i++)
		km_buf_puts(text, pieces[km_rng_u64(seed, i) % (sizeof(pieces) / sizeof(*pieces))]);
}

static bool has_marker(const km_buf *buf, bool tools, bool reasoning)
{
	for (size_t i = 0; i < buf->len; i++) {
		enum km_marker m = marker_at(buf->data + i, buf->len - i);

		if (m != KM_MARK_COUNT && (m >= KM_MARK_THINK ? reasoning : tools))
			return true;
	}
	return false;
}

/* Each event made valid by itself, joined: what a stream's client has in the end. */
struct stream {
	km_buf content, reasoning, arguments;
};

static void on_stream_event(void *ctx, const km_parser_event *e)
{
	struct stream *s = ctx;

	km_utf8_append_valid(e->kind == KM_PARSED_CONTENT     ? &s->content
	                     : e->kind == KM_PARSED_REASONING ? &s->reasoning
	                                                      : &s->arguments,
	                     e->text, e->len);
}

static void check_valid(const km_buf *raw, const km_buf *streamed)
{
	km_buf whole = KM_BUF_INIT;

	km_utf8_append_valid(&whole, raw->data, raw->len);
	assert_int_equal(whole.len, streamed->len);
	if (whole.len)
		assert_memory_equal(whole.data, streamed->data, whole.len);
	km_buf_release(&whole);
}

static void check_stream(const km_parser_options *options, const km_buf *text,
                         const struct result *r, uint64_t seed)
{
	struct stream s = { KM_BUF_INIT, KM_BUF_INIT, KM_BUF_INIT };
	km_parser_options o = *options;
	km_parser *parser;
	km_buf arguments = KM_BUF_INIT;
	size_t end;

	o.on_event = on_stream_event;
	o.ctx = &s;
	parser = km_parser_new(&o);
	for (size_t at = 0, i = 0; at < text->len; at = end, i++) {
		end = at + 1 + km_rng_u64(seed, i) % 5;
		if (end > text->len)
			end = text->len;
		km_parser_bytes(parser, text->data + at, end - at);
	}
	km_parser_finish(parser);
	km_parser_free(parser);
	check_valid(&r->message.content, &s.content);
	check_valid(&r->message.reasoning, &s.reasoning);
	/* Between calls a client has a boundary too. */
	for (int i = 0; i < r->message.count; i++)
		km_utf8_append_valid(&arguments, r->message.calls[i].arguments.data,
		                     r->message.calls[i].arguments.len);
	assert_int_equal(arguments.len, s.arguments.len);
	if (arguments.len)
		assert_memory_equal(arguments.data, s.arguments.data, arguments.len);
	km_buf_release(&arguments);
	km_buf_release(&s.content);
	km_buf_release(&s.reasoning);
	km_buf_release(&s.arguments);
}

static void check_random(const km_parser_options *options, const km_buf *text, uint64_t seed)
{
	km_buf whole = KM_BUF_INIT, other = KM_BUF_INIT;
	struct result r;
	km_parser *parser;

	parse_pieces(options, text->data, text->len, 0, &whole);
	parse_pieces(options, text->data, text->len, SIZE_MAX, &other);
	assert_string_equal(whole.data, other.data);
	for (uint64_t i = 0; i < 4; i++) {
		parse_pieces(options, text->data, text->len,
		             km_rng_u64(seed, 100 + i) % (text->len + 1), &other);
		assert_string_equal(whole.data, other.data);
	}
	parser = parser_for(&r, options);
	km_parser_bytes(parser, text->data, text->len);
	finish(parser, &r, text->len);
	check_stream(options, text, &r, seed);
	km_message_release(&r.message);
	km_buf_release(&whole);
	km_buf_release(&other);
}

/* Random soups of markers, parts of markers, ids, JSON and ill-formed UTF-8. */
static void random_inputs_keep_the_properties(void **state)
{
	json_t *tools = json_loads(
		"[{\"function\":{\"name\":\"one\",\"parameters\":{\"properties\":{\"x\":{}}}}},"
		"{\"function\":{\"name\":\"two\",\"parameters\":{\"properties\":{\"y\":{}}}}}]",
		0, NULL);
	uint64_t cases = RANDOM_CASES;
	km_buf text = KM_BUF_INIT;

	(void)state;
	for (uint64_t seed = 0; seed < cases; seed++) {
		uint64_t bits = km_rng_u64(seed, 1000);
		km_parser_options o = { .tools = bits & 7,
			                .reasoning = bits & 56,
			                .in_reasoning = bits & 64,
			                .history_tool_calls = (int)(bits >> 7 & 3),
			                .declared_tools = bits & 512 ? tools : NULL };

		random_input(&text, seed);
		check_random(&o, &text, seed);
	}
	printf("figure: %llu random inputs: every split, deltas, accounting\n",
	       (unsigned long long)cases);
	km_buf_release(&text);
	json_decref(tools);
}

/* Whole markers and text without '<': nothing that comes out may hold a marker. */
static void no_marker_comes_out(void **state)
{
	km_buf text = KM_BUF_INIT;

	(void)state;
	for (uint64_t seed = 0; seed < 20000; seed++) {
		size_t count = km_rng_u64(seed, 0) % 30;
		struct result r;
		km_parser *parser;

		km_buf_clear(&text);
		km_buf_puts(&text, "");
		for (size_t i = 1; i <= count; i++) {
			const char *piece =
				pieces[km_rng_u64(seed, i) % (sizeof(pieces) / sizeof(*pieces))];

			if (piece[0] != '<' || marker_at(piece, strlen(piece)) != KM_MARK_COUNT)
				km_buf_puts(&text, piece);
		}
		parser = parser_for(&r, &both);
		km_parser_bytes(parser, text.data, text.len);
		finish(parser, &r, text.len);
		assert_false(has_marker(&r.message.content, true, true));
		assert_false(has_marker(&r.message.reasoning, true, true));
		km_message_release(&r.message);
	}
	km_buf_release(&text);
}

/* ---- size ---- */

/* Ten megabytes of arguments a byte at a time: time grows as the size does, memory does not
 * grow. */
static void long_arguments_stay_linear(void **state)
{
	static const char head[] = S B "functions.w:0" A "{\"t\":\"", tail[] = "\"}" C E;
	size_t sizes[2] = { 2500000, 10000000 };
	double seconds[2];

	(void)state;
	for (int i = 0; i < 2; i++) {
		struct result r;
		km_parser *parser = parser_for(&r, &both);
		int64_t start = km_now_ns();

		km_parser_bytes(parser, head, sizeof(head) - 1);
		for (size_t at = 0; at < sizes[i]; at++)
			km_parser_bytes(parser, at % 7 ? "x" : at % 2 ? " " : "<", 1);
		km_parser_bytes(parser, tail, sizeof(tail) - 1);
		finish(parser, &r, sizeof(head) + sizeof(tail) - 2 + sizes[i]);
		seconds[i] = (double)(km_now_ns() - start) * 1e-9;
		assert_int_equal(r.message.calls[0].arguments.len, sizes[i] + 8);
		assert_int_equal(r.repairs, 0);
		km_message_release(&r.message);
	}
	printf("figure: 10 MB of arguments a byte at a time: %.0f ns a byte (2.5 MB: %.0f ns)\n",
	       seconds[1] * 1e9 / (double)sizes[1], seconds[0] * 1e9 / (double)sizes[0]);
	assert_true(seconds[1] < seconds[0] * 4 * 4); /* 4 times the size; quadratic would be 16 */
}

static void what_is_held_is_bounded(void **state)
{
	struct result r;
	km_parser *parser = parser_for(&r, &both);
	char *spaces = km_xmalloc(KM_PARSER_HOLD_MAX);
	size_t bytes = 0;

	(void)state;
	memset(spaces, ' ', KM_PARSER_HOLD_MAX);
	km_parser_bytes(parser, spaces, KM_PARSER_HOLD_MAX);
	assert_int_equal(r.message.content.len, 0);
	km_parser_bytes(parser, spaces, 1);
	assert_int_equal(r.message.content.len, KM_PARSER_HOLD_MAX + 1);
	bytes = KM_PARSER_HOLD_MAX + 1 + sizeof(S B) - 1;
	km_parser_bytes(parser, S B, sizeof(S B) - 1);
	memset(spaces, 'h', KM_PARSER_HOLD_MAX);
	km_parser_bytes(parser, spaces, KM_PARSER_HOLD_MAX);
	km_parser_bytes(parser, spaces, 10);
	assert_int_equal(r.dropped, KM_PARSER_HOLD_MAX + 10);
	km_parser_bytes(parser, A "{}" C E, sizeof(A "{}" C E) - 1);
	finish(parser, &r, bytes + KM_PARSER_HOLD_MAX + 10 + sizeof(A "{}" C E) - 1);
	assert_int_equal(r.message.count, 0);
	km_message_release(&r.message);
	free(spaces);
}

static void calls_from_elsewhere_take_numbers(void **state)
{
	struct result r;
	km_parser_options o = both;
	km_parser *parser;

	(void)state;
	o.history_tool_calls = 3;
	parser = parser_for(&r, &o);
	assert_int_equal(km_parser_take_call(parser), 0);
	km_parser_bytes(parser, B "functions.f:0" A "{", sizeof(B "functions.f:0" A "{") - 1);
	assert_int_equal(km_parser_take_call(parser), 2);
	km_parser_bytes(parser, "}" C, sizeof("}" C) - 1);
	km_parser_finish(parser);
	assert_string_equal(r.message.calls[1].id.data, "functions.f:4");
	assert_string_equal(r.message.calls[1].arguments.data, "{}");
	assert_int_equal(km_parser_calls(parser), 3);
	km_parser_free(parser);
	km_message_release(&r.message);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(calls_come_out),
		cmocka_unit_test(calls_that_do_not_end_well),
		cmocka_unit_test(white_space_around_sections),
		cmocka_unit_test(stray_markers_do_not_leak),
		cmocka_unit_test(reasoning_is_set_apart),
		cmocka_unit_test(look_alikes_are_text),
		cmocka_unit_test(calls_from_elsewhere_take_numbers),
		cmocka_unit_test(corpus_holds_through_every_cut),
		cmocka_unit_test(random_inputs_keep_the_properties),
		cmocka_unit_test(no_marker_comes_out),
		cmocka_unit_test(long_arguments_stay_linear),
		cmocka_unit_test(what_is_held_is_bounded),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
