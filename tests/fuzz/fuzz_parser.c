/*
 * The output parser under any bytes, through both front ends. Checked on each input: every way of
 * cutting it gives the same message, each byte is in an event, the format's own or listed as
 * dropped, the two front ends agree where no spelling is theirs alone, and no call starts twice.
 *
 * The first three bytes choose the options and the cuts; the rest is the model's output.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "text/message.h"
#include "text/parser.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(cond) ((cond) ? (void)0 : abort())

struct result {
	km_message message;
	size_t emitted, dropped, invented;
};

static void on_event(void *ctx, const km_parser_event *event)
{
	struct result *r = ctx;

	CHECK(event->kind != KM_PARSED_CALL || event->call_index == r->message.count);
	CHECK(event->kind < KM_PARSED_CALL || event->len || event->kind == KM_PARSED_CALL);
	km_message_add(&r->message, event);
	r->emitted += event->len;
}

static void on_repair(void *ctx, const char *what, const char *bytes, size_t len)
{
	struct result *r = ctx;

	CHECK(bytes || !len);
	r->dropped += len;
	if (strstr(what, "{}"))
		r->invented += 2;
}

static km_parser *parser_for(struct result *r, const km_parser_options *from)
{
	km_parser_options options = *from;

	memset(r, 0, sizeof(*r));
	options.on_event = on_event;
	options.on_repair = on_repair;
	options.ctx = r;
	return km_parser_new(&options);
}

static void finish(km_parser *parser, struct result *r, size_t bytes)
{
	km_parser_finish(parser);
	CHECK(km_parser_calls(parser) == r->message.count);
	CHECK(r->emitted - r->invented + r->dropped + km_parser_format_bytes(parser) == bytes);
	km_parser_free(parser);
}

static void parse_bytes(struct result *r, const km_parser_options *options, const char *s, size_t n,
                        size_t longest)
{
	km_parser *parser = parser_for(r, options);

	for (size_t at = 0, i = 0, take; at < n; at += take, i++) {
		take = 1 + km_rng_u64(longest, i) % longest;
		if (take > n - at)
			take = n - at;
		km_parser_bytes(parser, s + at, take);
	}
	finish(parser, r, n);
}

static int marker_at(const char *s, size_t n)
{
	for (int m = 0; m < KM_MARK_COUNT; m++) {
		size_t len = strlen(km_marker_text[m]);

		if (n >= len && !memcmp(s, km_marker_text[m], len))
			return m;
	}
	return -1;
}

/* As token ids: whole markers are markers, all else is text in pieces of a byte or more. */
static void parse_ids(struct result *r, const km_parser_options *options, const char *s, size_t n,
                      size_t piece)
{
	km_parser *parser = parser_for(r, options);
	size_t from = 0, at = 0;

	while (at < n) {
		int m = s[at] == '<' ? marker_at(s + at, n - at) : -1;

		if (m >= 0 || at - from >= piece) {
			km_parser_text(parser, s + from, at - from);
			from = at;
		}
		if (m >= 0) {
			km_parser_marker(parser, (enum km_marker)m);
			from = at += strlen(km_marker_text[m]);
		} else {
			at++;
		}
	}
	km_parser_text(parser, s + from, at - from);
	finish(parser, r, n);
}

static bool same_buf(const km_buf *a, const km_buf *b)
{
	return a->len == b->len && (!a->len || !memcmp(a->data, b->data, a->len));
}

static void check_same(const struct result *a, struct result *b)
{
	CHECK(same_buf(&a->message.content, &b->message.content));
	CHECK(same_buf(&a->message.reasoning, &b->message.reasoning));
	CHECK(a->message.count == b->message.count);
	for (int i = 0; i < a->message.count; i++) {
		CHECK(same_buf(&a->message.calls[i].id, &b->message.calls[i].id));
		CHECK(same_buf(&a->message.calls[i].name, &b->message.calls[i].name));
		CHECK(same_buf(&a->message.calls[i].arguments, &b->message.calls[i].arguments));
	}
	km_message_release(&b->message);
}

static const char tools_json[] =
	"[{\"type\":\"function\",\"function\":{\"name\":\"one\",\"parameters\":{\"type\":"
        "\"object\",\"properties\":"
	"{\"x\":{\"type\":\"integer\"}},\"required\":[\"x\"]}}},{\"type\":\"function\","
        "\"function\":{\"name\":\"two\","
	"\"parameters\":{\"properties\":{\"s\":{\"type\":\"string\",\"pattern\":\"^a\"}}}}}]";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	km_parser_options options = { 0 };
	struct result whole, other;
	json_t *tools;
	const char *s = (const char *)data + 3;
	size_t n = size - 3;

	if (size < 3)
		return 0;
	tools = json_loads(tools_json, 0, NULL);
	options.tools = !(data[0] & 1);
	options.reasoning = !(data[0] & 2);
	options.in_reasoning = data[0] & 4;
	options.history_tool_calls = data[0] >> 5;
	if (data[0] & 8)
		options.declared_tools = tools;
	parse_bytes(&whole, &options, s, n, n ? n : 1);
	parse_bytes(&other, &options, s, n, 1);
	check_same(&whole, &other);
	parse_bytes(&other, &options, s, n, 1 + data[1]);
	check_same(&whole, &other);
	/* the bytes' front end alone knows these */
	if (!memmem(s, n, "<|tool_call_section_", 20)) {
		parse_ids(&other, &options, s, n, 1 + data[2] % 16);
		check_same(&whole, &other);
	}
	km_message_release(&whole.message);
	json_decref(tools);
	return 0;
}
