/*
 * JSONL lines of any bytes: the fast reader and jansson give the same verdict and read the same,
 * and what is read goes through the parser and comes out as JSON. Tools, and with them schemas, are
 * the input's own.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "text/message.h"
#include "wire/parse_json.h"
#include "wire/parse_request.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(cond) ((cond) ? (void)0 : abort())

static void check_output(const km_parse_request *request)
{
	km_parser_options options = request->parser;
	km_buf out = KM_BUF_INIT;
	km_message message;
	km_parser *parser;
	json_t *read;

	km_message_init(&message);
	options.on_event = km_message_add;
	options.ctx = &message;
	parser = km_parser_new(&options);
	km_parse_request_feed(request, parser, 0, request->text.len);
	km_parser_finish(parser);
	km_parser_free(parser);
	km_parse_json_message(&out, &message, request->engine_finish);
	read = json_loadb(out.data, out.len, JSON_ALLOW_NUL, NULL);
	CHECK(read && !memchr(out.data, '\n', out.len));
	json_decref(read);
	km_message_release(&message);
	km_buf_release(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const km_parse_defaults defaults = { { .tools = true, .reasoning = true },
		                                    "stop",
		                                    NULL };
	km_parse_request fast, slow;
	km_err err;
	int a, b;

	km_parse_request_init(&fast);
	km_parse_request_init(&slow);
	a = km_parse_request_read(&fast, &defaults, (const char *)data, size, &err);
	b = km_parse_request_read_slowly(&slow, &defaults, (const char *)data, size, &err);
	CHECK(a == b);
	if (!a) {
		CHECK(fast.text.len == slow.text.len);
		CHECK(!fast.text.len || !memcmp(fast.text.data, slow.text.data, fast.text.len));
		CHECK(fast.parser.in_reasoning == slow.parser.in_reasoning);
		CHECK(fast.parser.history_tool_calls == slow.parser.history_tool_calls);
		CHECK(!fast.parser.declared_tools == !slow.parser.declared_tools);
		CHECK(!fast.parser.declared_tools ||
		      json_equal(fast.parser.declared_tools, slow.parser.declared_tools));
		CHECK(fast.parser.tools == slow.parser.tools &&
		      fast.parser.reasoning == slow.parser.reasoning);
		CHECK(!strcmp(fast.engine_finish, slow.engine_finish));
		check_output(&slow);
	}
	km_parse_request_release(&fast);
	km_parse_request_release(&slow);
	return 0;
}
