#include "wire/sse_repair.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "text/message.h"
#include "wire/json_fast.h"
#include "wire/parse_json.h"

static int on_event(void *ctx, enum km_sse_kind kind, const char *text, size_t len, km_err *err);

void km_sse_repair_init(km_sse_repair *r, const km_parser_options *options, size_t max_bytes)
{
	memset(r, 0, sizeof(*r));
	r->parser = *options;
	r->repair_ctx = options->ctx;
	km_sse_reader_init(&r->reader, max_bytes, on_event, r);
}

static void release_calls(km_sse_choice *choice)
{
	for (int i = 0; i < choice->call_count; i++) {
		free(choice->calls[i].id);
		km_buf_release(&choice->calls[i].held);
	}
	free(choice->calls);
}

void km_sse_repair_release(km_sse_repair *r)
{
	for (int i = 0; i < KM_SSE_REPAIR_MAX_CHOICES; i++) {
		km_parser_free(r->choices[i].parser);
		release_calls(&r->choices[i]);
		km_buf_release(&r->choices[i].id);
	}
	json_decref(r->envelope);
	km_buf_release(&r->odd.wide);
	km_sse_reader_release(&r->reader);
}

/* ---- chunks out ---- */

/* The envelope's members, up to and with "choices":[{"index":N, of one chunk. */
static void chunk_open(km_sse_repair *r, const km_sse_choice *choice)
{
	const char *key;
	const json_t *value;

	km_buf_puts(r->out, "data: {");
	json_object_foreach(r->envelope, key, value) {
		km_json_fast_write(r->out, key, strlen(key));
		km_buf_putc(r->out, ':');
		km_json_write(r->out, value, &r->odd);
		km_buf_putc(r->out, ',');
	}
	km_buf_printf(r->out, "\"choices\":[{\"index\":%d,", choice->index);
}

/* Ends the chunk; the first of a step carries the step's log-probabilities. */
static void chunk_close(km_sse_repair *r, const char *finish_reason)
{
	if (r->logprobs) {
		km_buf_puts(r->out, ",\"logprobs\":");
		km_json_write(r->out, r->logprobs, &r->odd);
		r->logprobs = NULL;
	}
	km_buf_puts(r->out, ",\"finish_reason\":");
	if (finish_reason)
		km_json_fast_write(r->out, finish_reason, strlen(finish_reason));
	else
		km_buf_puts(r->out, "null");
	km_buf_puts(r->out, "}]}\n\n");
}

static void send_role(km_sse_repair *r, km_sse_choice *choice)
{
	if (choice->role_sent)
		return;
	choice->role_sent = true;
	chunk_open(r, choice);
	km_buf_puts(r->out, "\"delta\":{\"role\":\"assistant\",\"content\":\"\"}");
	chunk_close(r, NULL);
}

static void on_parsed(void *ctx, const km_parser_event *event)
{
	km_sse_choice *choice = ctx;
	km_sse_repair *r = choice->repair;

	send_role(r, choice);
	chunk_open(r, choice);
	km_buf_puts(r->out, "\"delta\":");
	km_parse_json_delta(r->out, event);
	chunk_close(r, NULL);
}

static void on_mended(void *ctx, const char *what, const char *bytes, size_t len)
{
	km_sse_choice *choice = ctx;
	km_sse_repair *r = choice->repair;

	if (r->parser.on_repair)
		r->parser.on_repair(r->repair_ctx, what, bytes, len);
}

/* ---- chunks in ---- */

static void remember(km_sse_repair *r, const char *what)
{
	if (!r->first.code)
		km_fail(&r->first, KM_EFORMAT, "%s", what);
}

static km_sse_choice *choice_of(km_sse_repair *r, const json_t *value)
{
	const json_t *place = json_object_get(value, "index");
	json_int_t index = json_is_real(place) ? -1 : json_integer_value(place);
	km_parser_options options = r->parser;
	km_sse_choice *choice;

	if (index < 0 || index >= KM_SSE_REPAIR_MAX_CHOICES)
		return NULL;
	choice = &r->choices[index];
	if (!choice->parser) {
		choice->repair = r;
		choice->index = (int)index;
		options.on_event = on_parsed;
		options.on_repair = on_mended;
		options.ctx = choice;
		choice->parser = km_parser_new(&options);
	}
	return choice;
}

static void take_content(km_sse_choice *choice, const json_t *text)
{
	if (!json_string_length(text))
		return;
	if (choice->native_reasoning)
		km_parser_marker(choice->parser, KM_MARK_THINK_END);
	choice->native_reasoning = false;
	choice->any_text = true;
	km_parser_bytes(choice->parser, json_string_value(text), json_string_length(text));
}

/* The engine's own reasoning field. It may hold leaked markers too, so it goes through the parser,
 * as the inside of a think block. */
static void take_reasoning(km_sse_choice *choice, const json_t *text)
{
	const km_parser_options *options = &choice->repair->parser;

	if (!json_string_length(text))
		return;
	if (!options->reasoning) {
		km_parser_event event = { .kind = KM_PARSED_REASONING,
			                  .text = json_string_value(text),
			                  .len = json_string_length(text) };

		on_parsed(choice, &event);
		return;
	}
	if (!choice->native_reasoning && (choice->any_text || !options->in_reasoning))
		km_parser_marker(choice->parser, KM_MARK_THINK);
	choice->native_reasoning = true;
	choice->any_text = true;
	km_parser_bytes(choice->parser, json_string_value(text), json_string_length(text));
}

/* NULL for what is not there or empty: some engines repeat a call's id and name as "". */
static const char *filled(const json_t *object, const char *key)
{
	const char *s = json_string_value(json_object_get(object, key));

	return s && *s ? s : NULL;
}

/* Which of the engine's calls the `at`-th of a delta's `count` is a part of. Without an index, an
 * id that is new opens a call, and so does a name where there is one already; what has neither goes
 * on with the last call or, where the delta has several, with the one in its place. */
static json_int_t place_of(const km_sse_choice *choice, const json_t *call, size_t at, size_t count)
{
	const json_t *index = json_object_get(call, "index");
	const char *id = filled(call, "id");
	int place = count > 1 ? (int)at : choice->call_count - (choice->call_count > 0);

	if (json_is_integer(index))
		return json_integer_value(index);
	for (int i = 0; id && i < choice->call_count; i++) {
		if (choice->calls[i].id && !strcmp(choice->calls[i].id, id))
			return i;
	}
	if (id || (filled(json_object_get(call, "function"), "name") &&
	           place < choice->call_count && choice->calls[place].index >= 0))
		return choice->call_count;
	return place;
}

/* The engine's call in that place, made where it is new; NULL: out of range. */
static km_sse_call *call_at(km_sse_choice *choice, json_int_t place)
{
	if (place < 0 || place > 4096)
		return NULL;
	while (place >= choice->call_count) {
		km_sse_call *call;

		choice->calls = km_xreallocarray(choice->calls, (size_t)choice->call_count + 1,
		                                 sizeof(*choice->calls));
		call = &choice->calls[choice->call_count++];
		*call = (km_sse_call){ .index = -1 };
		km_buf_init(&call->held, KM_PARSER_INFER_MAX);
	}
	return &choice->calls[place];
}

/* A call's first chunk, with the arguments that came before its name. */
static void give_call(km_sse_choice *choice, km_sse_call *call, const char *name)
{
	km_parser_event event = { .kind = KM_PARSED_CALL, .name = name };

	call->index = event.call_index = km_parser_take_call(choice->parser);
	event.text = call->held.len ? call->held.data : "";
	event.len = call->held.len;
	km_buf_clear(&choice->id);
	km_buf_printf(&choice->id, "functions.%s:%d", name,
	              choice->repair->parser.history_tool_calls + event.call_index);
	event.id = choice->id.data;
	on_parsed(choice, &event);
	km_buf_release(&call->held);
}

static void take_call(km_sse_choice *choice, const json_t *value, size_t at, size_t count)
{
	const json_t *function = json_object_get(value, "function");
	const json_t *arguments = json_object_get(function, "arguments");
	const char *id = filled(value, "id"), *name = filled(function, "name");
	km_sse_call *call = call_at(choice, place_of(choice, value, at, count));
	km_parser_event event = { .kind = KM_PARSED_ARGUMENTS };

	if (!call) {
		remember(choice->repair, "the stream has a tool call with an index out of range");
		return;
	}
	if (id && !call->id)
		call->id = km_xstrdup(id);
	event.call_index = call->index;
	event.text = json_is_string(arguments) ? json_string_value(arguments) : "";
	event.len = json_string_length(arguments);
	if (call->index >= 0) {
		if (event.len)
			on_parsed(choice, &event);
		return;
	}
	km_buf_append(&call->held, event.text, event.len);
	if (call->held.overflow)
		remember(choice->repair, "the stream has a tool call whose name comes too late");
	if (name)
		give_call(choice, call, name);
}

/* A call that never got a name cannot be given. */
static void check_names(km_sse_choice *choice)
{
	for (int i = 0; i < choice->call_count; i++) {
		const km_sse_call *call = &choice->calls[i];

		if (call->index >= 0 || (!call->id && !call->held.len))
			continue;
		remember(choice->repair, "the stream has a tool call without a name");
		on_mended(choice, "the engine's call has no name", call->held.data, call->held.len);
	}
}

static void take_delta(km_sse_choice *choice, const json_t *delta)
{
	static const char *const known[] = { "role", "content", "reasoning_content", "reasoning",
	                                     "tool_calls" };
	km_sse_repair *r = choice->repair;
	const json_t *reasoning = json_object_get(delta, "reasoning_content");
	const json_t *calls = json_object_get(delta, "tool_calls"), *call;
	json_t *rest;
	const char *key;
	json_t *value;
	void *next;
	size_t i;

	if (!json_is_string(reasoning))
		reasoning = json_object_get(delta, "reasoning");
	take_reasoning(choice, reasoning);
	take_content(choice, json_object_get(delta, "content"));
	json_array_foreach((json_t *)calls, i, call)
		take_call(choice, call, i, json_array_size(calls));
	rest = json_copy((json_t *)delta);
	for (i = 0; i < sizeof(known) / sizeof(*known); i++)
		json_object_del(rest, known[i]);
	json_object_foreach_safe(rest, next, key, value) {
		if (json_is_null(value))
			json_object_del(rest, key);
	}
	if (json_object_size(rest)) {
		send_role(r, choice);
		chunk_open(r, choice);
		km_buf_puts(r->out, "\"delta\":");
		km_json_write(r->out, rest, &r->odd);
		chunk_close(r, NULL);
	}
	json_decref(rest);
}

static void finish_choice(km_sse_choice *choice, const char *engine)
{
	km_sse_repair *r = choice->repair;
	int calls;

	if (choice->finished)
		return;
	choice->finished = true;
	km_parser_finish(choice->parser);
	check_names(choice);
	calls = km_parser_calls(choice->parser);
	if (!strcmp(engine, "tool_calls") || !strcmp(engine, "function_call"))
		engine = "stop";
	send_role(r, choice);
	chunk_open(r, choice);
	km_buf_puts(r->out, "\"delta\":{}");
	chunk_close(r, km_finish_reason(calls, engine));
}

static void take_choice(km_sse_repair *r, const json_t *value)
{
	const json_t *delta = json_object_get(value, "delta");
	const json_t *finish = json_object_get(value, "finish_reason");
	km_sse_choice *choice = choice_of(r, value);
	size_t before = r->out->len;

	if (!choice) {
		remember(r, "the stream has a choice with an index out of range");
		return;
	}
	r->logprobs = json_object_get(value, "logprobs");
	if (json_is_null(r->logprobs))
		r->logprobs = NULL;
	if (json_is_string(json_object_get(delta, "role")))
		send_role(r, choice);
	if (json_is_object(delta))
		take_delta(choice, delta);
	else
		take_content(choice, json_object_get(value, "text"));
	if (json_is_string(finish))
		finish_choice(choice, json_string_value(finish));
	/* What the chunk carried beside its text must not wait for text that is held. */
	if (r->out->len == before &&
	    (r->logprobs || json_is_object(json_object_get(r->envelope, "usage")))) {
		chunk_open(r, choice);
		km_buf_puts(r->out, "\"delta\":{}");
		chunk_close(r, NULL);
	}
	r->logprobs = NULL;
}

static void hand_on(km_sse_repair *r, const json_t *chunk)
{
	km_buf_puts(r->out, "data: ");
	km_json_write(r->out, chunk, &r->odd);
	km_buf_puts(r->out, "\n\n");
}

static void take_chunk(km_sse_repair *r, json_t *chunk)
{
	const json_t *choices = json_object_get(chunk, "choices"), *choice;
	size_t i;

	if (json_object_get(chunk, "error"))
		remember(r, "the stream carries an error of the server's");
	if (!json_array_size(choices)) { /* usage, errors, what other servers add */
		hand_on(r, chunk);
		return;
	}
	json_decref(r->envelope);
	r->envelope = json_copy(chunk);
	json_object_del(r->envelope, "choices");
	json_object_set_new(r->envelope, "object", json_string("chat.completion.chunk"));
	json_array_foreach(choices, i, choice)
		take_choice(r, choice);
}

static int on_event(void *ctx, enum km_sse_kind kind, const char *text, size_t len, km_err *err)
{
	km_sse_repair *r = ctx;
	json_error_t error;
	json_t *chunk;

	(void)err;
	if (kind == KM_SSE_COMMENT) {
		km_sse_comment(r->out, text, len);
		return 0;
	}
	if (len == 6 && !memcmp(text, "[DONE]", 6)) {
		r->done = true;
		for (int i = 0; i < KM_SSE_REPAIR_MAX_CHOICES; i++) {
			if (r->choices[i].parser && !r->choices[i].finished)
				remember(r, "a choice of the stream has no finish_reason");
		}
		km_sse_done(r->out);
		return 0;
	}
	chunk = km_json_load(text, len, &error, &r->odd);
	if (r->odd.bad_count && r->parser.on_repair)
		r->parser.on_repair(r->repair_ctx, "an event that is not UTF-8", NULL, 0);
	if (r->odd.nan_count && r->parser.on_repair)
		r->parser.on_repair(r->repair_ctx, "NaN or Infinity is given as null", NULL, 0);
	if (!json_is_object(chunk))
		remember(r, "the stream has an event that is not a JSON object");
	else
		take_chunk(r, chunk);
	json_decref(chunk);
	return 0;
}

int km_sse_repair_push(km_sse_repair *r, const char *bytes, size_t len, km_buf *out, km_err *err)
{
	r->out = out;
	return km_sse_reader_push(&r->reader, bytes, len, err);
}

/* Did the end of input cut no more than newlines off [DONE]? Of no other event is that sure. */
static bool ends_at_done(const km_sse_reader *reader)
{
	static const char *const tails[] = { "data: [DONE]", "data:[DONE]" };
	const km_buf *line = &reader->line, *data = &reader->data;

	if (reader->has_data)
		return !line->len && data->len == 6 && !memcmp(data->data, "[DONE]", 6);
	for (size_t i = 0; i < sizeof(tails) / sizeof(*tails); i++) {
		if (line->len == strlen(tails[i]) && !memcmp(line->data, tails[i], line->len))
			return true;
	}
	return false;
}

int km_sse_repair_end(km_sse_repair *r, km_buf *out, km_err *err)
{
	r->out = out;
	if (ends_at_done(&r->reader))
		KM_TRY(km_sse_reader_push(&r->reader, "\n\n", 2, err));
	if (r->first.code)
		return km_fail(err, r->first.code, "%s", r->first.msg);
	if (!r->done)
		return km_fail(err, KM_EFORMAT,
		               "the stream ends without [DONE]: what was certain has been written");
	return 0;
}
