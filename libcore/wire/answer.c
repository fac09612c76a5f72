/*
 * From a token to a chunk, for one choice:
 *
 *     event -> marker or text -> km_parser -> channel (reasoning, content, arguments of call k)
 *           -> UTF-8 gate -> a chunk of the stream, or the choice's buffers
 *
 * The gate holds at most 3 bytes and belongs to the open channel: when the channel changes, what it
 * holds can never be completed and leaves as U+FFFD on the old channel. Log-probabilities wait in
 * the choice until a chunk leaves, so a token that shows nothing (a marker, half a character) is
 * not lost.
 */
#include "wire/answer.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/mem.h"
#include "wire/json_fast.h"
#include "wire/json_text.h"
#include "wire/logprobs.h"
#include "wire/sse.h"

enum channel { NO_CHANNEL, REASONING, CONTENT, ARGUMENTS };

struct call {
	char *id, *name; /* owned */
	km_buf arguments;
};

struct choice {
	struct km_answer *answer;
	int index;
	km_parser *parser; /* NULL: text is content */
	bool started, in_reasoning;
	enum channel channel;
	int call_index;
	km_utf8_stream gate;
	km_buf reasoning, content; /* collected; in a stream only held reasoning */
	struct call *calls;
	int call_count;
	km_buf logprobs;      /* chat: entries, comma-separated */
	km_logprob_lists lists; /* completions */
	int64_t characters;   /* completions: begun so far, for text_offset */
	int32_t *unshown;     /* tokens whose bytes are not all out, see take_late */
	int unshown_count;
	size_t shown;         /* bytes of the first of them that are */
	int64_t tokens, reasoning_tokens;
	enum km_finish finish;
	char *matched_stop;   /* owned, or NULL */
	int32_t matched_id;
	km_buf *out;          /* borrowed during km_answer_take */
};

struct km_answer {
	const km_answer_model *model;
	const km_openai_request *request;
	char *id;
	int64_t created;
	int prompt_count;
	km_answer_prompt *prompts;
	int *cached;                  /* [prompt_count] */
	km_logprob_lists *prompt_lists; /* [prompt_count], echo with logprobs */
	int64_t *prompt_characters;     /* [prompt_count], in those lists so far */
	int count;                    /* choices: prompts times n */
	struct choice *choices;
	int finished;
	char *error;                  /* owned */
	km_buf scratch;
};

void km_answer_model_init(km_answer_model *model, const km_tokenizer *tokenizer, const char *name)
{
	*model = (km_answer_model){ .tokenizer = tokenizer, .name = name };
	for (int i = 0; i < KM_MARK_COUNT; i++)
		model->marker[i] = km_tokenizer_special(tokenizer, km_marker_text[i]);
}

static void append(km_buf *to, const km_buf *from)
{
	if (from->len)
		km_buf_append(to, from->data, from->len);
}

/* Chunks. */

static bool is_chat(const km_answer *a)
{
	return a->request->endpoint == KM_ENDPOINT_CHAT;
}

static void write_usage(const km_answer_usage *u, km_buf *out)
{
	km_buf_printf(out,
	              "\"usage\":{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,"
	              "\"total_tokens\":%lld,\"prompt_tokens_details\":{\"cached_tokens\":%lld},"
	              "\"completion_tokens_details\":{\"reasoning_tokens\":%lld},\"reasoning_"
	              "tokens\":%lld}",
	              (long long)u->prompt_tokens, (long long)u->completion_tokens,
	              (long long)(u->prompt_tokens + u->completion_tokens),
	              (long long)u->cached_tokens, (long long)u->reasoning_tokens,
	              (long long)u->reasoning_tokens);
}

static void write_head(const km_answer *a, const char *object, km_buf *out)
{
	km_buf_printf(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", a->id,
	              object, (long long)a->created);
	km_json_puts(out, a->model->name);
}

/* The choice's pending log-probabilities as a "logprobs" member, if any were asked for. */
static void write_logprobs(struct choice *c, km_buf *out)
{
	if (c->answer->request->logprobs < 0)
		return;
	km_buf_puts(out, ",\"logprobs\":");
	if (is_chat(c->answer)) {
		km_buf_puts(out, "{\"content\":[");
		append(out, &c->logprobs);
		km_buf_puts(out, "]}");
		km_buf_clear(&c->logprobs);
	} else {
		km_logprob_lists_write(&c->lists, out);
		km_logprob_lists_clear(&c->lists);
	}
}

static const char *chunk_object(const km_answer *a)
{
	return is_chat(a) ? "chat.completion.chunk" : "text_completion";
}

static void chunk_begin(struct choice *c)
{
	km_buf_puts(c->out, "data: ");
	write_head(c->answer, chunk_object(c->answer), c->out);
	km_buf_printf(c->out, ",\"choices\":[{\"index\":%d,", c->index);
}

static void chunk_end(struct choice *c)
{
	km_buf_puts(c->out, "}]");
	if (c->answer->request->continuous_usage) {
		km_answer_usage usage = km_answer_usage_get(c->answer);

		km_buf_putc(c->out, ',');
		write_usage(&usage, c->out);
	}
	km_buf_puts(c->out, "}\n\n");
}

static void send_role(struct choice *c)
{
	chunk_begin(c);
	km_buf_puts(c->out,
	            "\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null");
	chunk_end(c);
}

static void write_call_head(const struct call *call, int index, km_buf *out)
{
	km_buf_puts(out, "\"id\":");
	km_json_puts(out, call->id);
	km_buf_printf(out, ",\"index\":%d,\"type\":\"function\",\"function\":{\"name\":", index);
	km_json_puts(out, call->name);
	km_buf_puts(out, ",\"arguments\":");
}

/* A delta that carries text on a channel; `head` with the id and name of a call that begins. */
static void send_delta(struct choice *c, const struct call *head, const char *text, size_t len)
{
	chunk_begin(c);
	if (!is_chat(c->answer)) {
		km_buf_puts(c->out, "\"text\":");
		km_json_fast_write(c->out, text, len);
	} else if (c->channel == ARGUMENTS) {
		km_buf_puts(c->out, "\"delta\":{\"tool_calls\":[{");
		if (head)
			write_call_head(head, c->call_index, c->out);
		else
			km_buf_printf(c->out,
			              "\"index\":%d,\"function\":{\"arguments\":", c->call_index);
		km_json_fast_write(c->out, text, len);
		km_buf_puts(c->out, "}}]}");
	} else {
		km_buf_printf(c->out, "\"delta\":{\"%s\":",
		              c->channel == REASONING ? "reasoning_content" : "content");
		km_json_fast_write(c->out, text, len);
		km_buf_putc(c->out, '}');
	}
	write_logprobs(c, c->out);
	km_buf_puts(c->out, ",\"finish_reason\":null");
	chunk_end(c);
}

static void write_matched(const struct choice *c, km_buf *out)
{
	if (c->matched_stop) {
		km_buf_puts(out, ",\"matched_stop\":");
		km_json_puts(out, c->matched_stop);
	} else if (c->matched_id >= 0) {
		km_buf_printf(out, ",\"matched_stop\":%d", c->matched_id);
	}
}

static const char *finish_reason(const struct choice *c)
{
	switch (c->finish) {
	case KM_FINISH_STOP:
		return c->parser && km_parser_calls(c->parser) ? "tool_calls" : "stop";
	case KM_FINISH_LENGTH:
		return "length";
	case KM_FINISH_ERROR:
		return "error";
	case KM_FINISH_ABORT:
		return "abort";
	case KM_FINISH_NONE:
		break;
	}
	return NULL;
}

static void send_finish(struct choice *c)
{
	chunk_begin(c);
	km_buf_puts(c->out, is_chat(c->answer) ? "\"delta\":{}" : "\"text\":\"\"");
	write_logprobs(c, c->out);
	km_buf_printf(c->out, ",\"finish_reason\":\"%s\"", finish_reason(c));
	write_matched(c, c->out);
	chunk_end(c);
}

/* Channels. */

static struct call *open_call(struct choice *c)
{
	return c->call_count ? &c->calls[c->call_count - 1] : NULL;
}

static void add_call(struct choice *c, const char *id, const char *name)
{
	c->calls = km_xreallocarray(c->calls, (size_t)c->call_count + 1, sizeof(*c->calls));
	c->calls[c->call_count++] = (struct call){ .id = km_xstrdup(id), .name = km_xstrdup(name) };
}

static bool streaming(const struct choice *c)
{
	return c->answer->request->stream;
}

/* Whole characters for the open channel. */
static void put_text(struct choice *c, const char *text, size_t len)
{
	const km_openai_request *r = c->answer->request;

	if (!len)
		return;
	if (streaming(c) && !(c->channel == REASONING && !r->stream_reasoning))
		send_delta(c, NULL, text, len);
	else if (c->channel == REASONING)
		km_buf_append(&c->reasoning, text, len);
	else if (c->channel == CONTENT)
		km_buf_append(&c->content, text, len);
	else
		km_buf_append(&open_call(c)->arguments, text, len);
}

static void push_bytes(struct choice *c, const char *bytes, size_t len)
{
	km_buf *scratch = &c->answer->scratch;

	km_buf_clear(scratch);
	km_utf8_stream_push(&c->gate, bytes, len, scratch);
	put_text(c, scratch->data, scratch->len);
}

static void leave_channel(struct choice *c)
{
	km_buf *scratch = &c->answer->scratch;

	km_buf_clear(scratch);
	km_utf8_stream_flush(&c->gate, scratch);
	put_text(c, scratch->data, scratch->len);
	if (c->channel == REASONING && streaming(c) &&
	    c->reasoning.len) { /* stream_reasoning: false */
		send_delta(c, NULL, c->reasoning.data, c->reasoning.len);
		km_buf_clear(&c->reasoning);
	}
	c->channel = NO_CHANNEL;
}

static void enter_channel(struct choice *c, enum channel channel, int call_index)
{
	if (c->channel == channel && (channel != ARGUMENTS || c->call_index == call_index))
		return;
	leave_channel(c);
	c->channel = channel;
	c->call_index = call_index;
}

static void begin_call(struct choice *c, const km_parser_event *event)
{
	enter_channel(c, ARGUMENTS, event->call_index);
	add_call(c, event->id, event->name);
	if (streaming(c)) {
		km_buf *scratch = &c->answer->scratch;

		km_buf_clear(scratch);
		km_utf8_stream_push(&c->gate, event->text, event->len, scratch);
		send_delta(c, open_call(c), scratch->len ? scratch->data : "", scratch->len);
	} else if (event->len) {
		push_bytes(c, event->text, event->len);
	}
}

static void on_parsed(void *ctx, const km_parser_event *event)
{
	struct choice *c = ctx;
	bool is_call = event->kind == KM_PARSED_CALL || event->kind == KM_PARSED_ARGUMENTS;

	if (is_call && event->call_index > 0 && !c->answer->request->parallel_tool_calls)
		return;
	switch (event->kind) {
	case KM_PARSED_CALL:
		begin_call(c, event);
		return;
	case KM_PARSED_REASONING:
		enter_channel(c, REASONING, 0);
		break;
	case KM_PARSED_CONTENT:
		enter_channel(c, CONTENT, 0);
		break;
	case KM_PARSED_ARGUMENTS:
		enter_channel(c, ARGUMENTS, event->call_index);
		break;
	}
	if (event->len)
		push_bytes(c, event->text, event->len);
}

/* Log-probabilities. */

static bool is_hidden(const km_answer *a, int32_t id)
{
	return a->request->skip_special_tokens && km_tokenizer_is_special(a->model->tokenizer, id);
}

static void add_logprob(struct choice *c, const km_event *e)
{
	const km_answer *a = c->answer;
	km_scored_token token = { e->id, true, e->logprob, e->top, e->top_count };

	if (a->request->logprobs < 0)
		return;
	if (is_chat(a)) {
		if (c->logprobs.len)
			km_buf_putc(&c->logprobs, ',');
		km_logprob_entry_write(a->model->tokenizer, &token, &c->logprobs);
		return;
	}
	km_logprob_lists_add(&c->lists, a->model->tokenizer, &token, a->request->logprobs,
	                     c->characters);
	if (!is_hidden(a, e->id))
		c->characters += km_token_characters(a->model->tokenizer, e->id);
}

/* Echo: a choice begins with its prompt. */

static void add_prompt_token(km_answer *a, int prompt, const km_scored_token *token)
{
	const km_tokenizer *tokenizer = a->model->tokenizer;

	km_logprob_lists_add(&a->prompt_lists[prompt], tokenizer, token, a->request->logprobs,
	                     a->prompt_characters[prompt]);
	a->prompt_characters[prompt] += km_token_characters(tokenizer, token->id);
}

static void take_prompt_logprob(km_answer *a, const km_queued *q)
{
	const km_prompt_logprob *lp = &q->prompt_logprob;
	km_scored_token first = { .id = a->prompts[q->prompt].ids[0] };
	km_scored_token token = { lp->id, true, lp->logprob, lp->top, lp->top_count };

	if (a->request->logprobs < 0 || lp->position < 1)
		return;
	if (!a->prompt_lists[q->prompt].count)
		add_prompt_token(a, q->prompt, &first);
	add_prompt_token(a, q->prompt, &token);
}

static void echo_prompt(struct choice *c)
{
	km_answer *a = c->answer;
	int prompt = c->index / a->request->n;
	const km_answer_prompt *p = &a->prompts[prompt];
	const km_tokenizer *tokenizer = a->model->tokenizer;
	km_scored_token only = { .id = p->ids[0] };

	km_logprob_lists_copy(&c->lists, &a->prompt_lists[prompt]);
	if (a->request->logprobs >= 0 && !c->lists.count) /* one token: nothing was scored */
		km_logprob_lists_add(&c->lists, tokenizer, &only, 0, 0);
	enter_channel(c, CONTENT, 0);
	for (int i = 0; i < p->count; i++) {
		size_t len = 0;
		const char *bytes = km_tokenizer_bytes(tokenizer, p->ids[i], &len);

		if (bytes)
			km_utf8_stream_push(&c->gate, bytes, len, &c->content);
		c->characters += km_token_characters(tokenizer, p->ids[i]);
	}
	if (streaming(c) && c->content.len) {
		send_delta(c, NULL, c->content.data, c->content.len);
		km_buf_clear(&c->content);
	}
}

/* Events. */

static int marker_of(const km_answer_model *model, int32_t id)
{
	for (int i = 0; i < KM_MARK_COUNT; i++)
		if (id >= 0 && model->marker[i] == id)
			return i;
	return -1;
}

static void put_plain(struct choice *c, const char *text, size_t len)
{
	if (!len)
		return;
	if (c->parser) {
		km_parser_text(c->parser, text, len);
		return;
	}
	enter_channel(c, CONTENT, 0);
	push_bytes(c, text, len);
}

static void count_token(struct choice *c, int marker)
{
	bool reasons = c->answer->model->reasoning_parser && c->answer->request->separate_reasoning;

	c->tokens++;
	if (marker == KM_MARK_THINK)
		c->in_reasoning = true;
	if (marker == KM_MARK_SECTION_BEGIN || marker == KM_MARK_CALL_BEGIN)
		c->in_reasoning = false; /* either ends an open think block */
	if (reasons && is_chat(c->answer))
		c->reasoning_tokens += c->in_reasoning;
	if (marker == KM_MARK_THINK_END)
		c->in_reasoning = false;
}

/* A whole token: `text` are its bytes. */
static void take_whole(struct choice *c, int32_t id, const char *text, size_t len)
{
	int marker = c->parser ? marker_of(c->answer->model, id) : -1;

	if (marker >= 0)
		km_parser_marker(c->parser, (enum km_marker)marker);
	else if (!is_hidden(c->answer, id))
		put_plain(c, text, len);
}

static void pop_unshown(struct choice *c)
{
	c->shown = 0;
	c->unshown_count--;
	memmove(c->unshown, c->unshown + 1, (size_t)c->unshown_count * sizeof(*c->unshown));
}

/*
 * With stop strings an event's text is not its token's: bytes that may begin a stop string come
 * with a later event or, when they did begin one, never. What has come is always a prefix of the
 * tokens' bytes joined, so the tokens wait here until theirs are out. A marker counts when its last
 * byte is out; one that a stop string cut was never written.
 */
static void take_late(struct choice *c, const char *text, size_t len)
{
	const km_answer *a = c->answer;

	while (c->unshown_count) {
		int32_t id = c->unshown[0];
		int marker = c->parser ? marker_of(a->model, id) : -1;
		size_t whole = 0, n;

		if (!km_tokenizer_bytes(a->model->tokenizer, id, &whole))
			whole = 0;
		n = len < whole - c->shown ? len : whole - c->shown;
		if (marker < 0 && !is_hidden(a, id))
			put_plain(c, text, n);
		c->shown += n;
		text += n;
		len -= n;
		if (c->shown < whole)
			return;
		if (marker >= 0)
			km_parser_marker(c->parser, (enum km_marker)marker);
		pop_unshown(c);
	}
	put_plain(c, text, len);
}

static void take_token(struct choice *c, const km_event *e)
{
	bool is_stop = e->matched_id >= 0 && e->matched_id == e->id;

	count_token(c, marker_of(c->answer->model, e->id));
	if (!is_stop)
		add_logprob(c, e);
	if (!c->answer->request->stop_count) {
		if (!is_stop)
			take_whole(c, e->id, e->text, e->text_len);
		return;
	}
	if (!is_stop) {
		c->unshown = km_xreallocarray(c->unshown, (size_t)c->unshown_count + 1,
		                              sizeof(*c->unshown));
		c->unshown[c->unshown_count++] = e->id;
	}
	take_late(c, e->text, e->text_len);
}

static void start_choice(struct choice *c)
{
	c->started = true;
	if (streaming(c) && is_chat(c->answer))
		send_role(c);
	if (c->answer->request->echo)
		echo_prompt(c);
}

static void finish_choice(struct choice *c, const km_event *e)
{
	if (c->parser)
		km_parser_finish(c->parser);
	leave_channel(c);
	c->finish = e->finish;
	c->matched_id = e->matched_id;
	c->matched_stop = e->matched_stop ? km_xstrdup(e->matched_stop) : NULL;
	c->answer->finished++;
	if (e->finish == KM_FINISH_ERROR && !c->answer->error)
		c->answer->error = km_xstrdup(e->error ? e->error : "The engine failed.");
	else if (streaming(c) && e->finish != KM_FINISH_ABORT)
		send_finish(c);
}

void km_answer_take(km_answer *a, const km_queued *q, km_buf *out)
{
	const km_event *e = &q->event;
	struct choice *c;

	if (q->is_prompt) {
		take_prompt_logprob(a, q);
		return;
	}
	c = &a->choices[q->prompt * a->request->n + e->sample];
	KM_ASSERT(e->sample >= 0 && e->sample < a->request->n && c->finish == KM_FINISH_NONE);
	a->cached[q->prompt] = q->cached_tokens;
	c->out = out;
	if (!c->started && (e->finish == KM_FINISH_NONE || e->finish == KM_FINISH_STOP ||
	                    e->finish == KM_FINISH_LENGTH))
		start_choice(c);
	if (e->id >= 0)
		take_token(c, e);
	else if (e->text_len)
		take_late(c, e->text, e->text_len);
	if (e->finish != KM_FINISH_NONE)
		finish_choice(c, e);
	c->out = NULL;
}

/* Whole answers. */

static void write_calls(const struct choice *c, km_buf *out)
{
	km_buf_puts(out, ",\"tool_calls\":[");
	for (int i = 0; i < c->call_count; i++) {
		const struct call *call = &c->calls[i];

		km_buf_puts(out, i ? ",{" : "{");
		write_call_head(call, i, out);
		km_json_fast_write(out, call->arguments.len ? call->arguments.data : "",
		                   call->arguments.len);
		km_buf_puts(out, "}}");
	}
	km_buf_putc(out, ']');
}

static void write_text(const km_buf *text, km_buf *out)
{
	km_json_fast_write(out, text->len ? text->data : "", text->len);
}

static void write_message(const struct choice *c, km_buf *out)
{
	km_buf_puts(out, "\"message\":{\"role\":\"assistant\",\"content\":");
	if (c->call_count && !c->content.len)
		km_buf_puts(out, "null");
	else
		write_text(&c->content, out);
	if (c->reasoning.len) {
		km_buf_puts(out, ",\"reasoning_content\":");
		write_text(&c->reasoning, out);
	}
	if (c->call_count)
		write_calls(c, out);
	km_buf_putc(out, '}');
}

void km_answer_json(km_answer *a, km_buf *out)
{
	km_answer_usage usage = km_answer_usage_get(a);

	write_head(a, is_chat(a) ? "chat.completion" : "text_completion", out);
	km_buf_puts(out, ",\"choices\":[");
	for (int i = 0; i < a->count; i++) {
		struct choice *c = &a->choices[i];

		km_buf_printf(out, "%s{\"index\":%d,", i ? "," : "", i);
		if (is_chat(a)) {
			write_message(c, out);
		} else {
			km_buf_puts(out, "\"text\":");
			write_text(&c->content, out);
		}
		if (a->request->logprobs < 0)
			km_buf_puts(out, ",\"logprobs\":null");
		write_logprobs(c, out);
		km_buf_printf(out, ",\"finish_reason\":\"%s\"", finish_reason(c));
		write_matched(c, out);
		km_buf_putc(out, '}');
	}
	km_buf_puts(out, "],");
	write_usage(&usage, out);
	km_buf_putc(out, '}');
}

void km_answer_end_stream(km_answer *a, km_buf *out)
{
	if (a->error) {
		km_openai_error error;

		km_openai_fail(&error, 500, NULL, NULL, "%s", a->error);
		km_buf_puts(out, "data: ");
		km_openai_error_json(&error, out);
		km_buf_puts(out, "\n\n");
	} else if (a->request->include_usage) {
		km_answer_usage usage = km_answer_usage_get(a);

		km_buf_puts(out, "data: ");
		write_head(a, chunk_object(a), out);
		km_buf_puts(out, ",\"choices\":[],");
		write_usage(&usage, out);
		km_buf_puts(out, "}\n\n");
	}
	km_sse_done(out);
}

bool km_answer_done(const km_answer *a)
{
	return a->finished == a->count;
}

const char *km_answer_error(const km_answer *a)
{
	return a->error;
}

const char *km_answer_finish_reason(const km_answer *a, int choice)
{
	return finish_reason(&a->choices[choice]);
}

km_answer_usage km_answer_usage_get(const km_answer *a)
{
	km_answer_usage u = { 0 };

	for (int i = 0; i < a->prompt_count; i++) {
		u.prompt_tokens += a->prompts[i].count;
		u.cached_tokens += a->cached[i];
	}
	for (int i = 0; i < a->count; i++) {
		u.completion_tokens += a->choices[i].tokens;
		u.reasoning_tokens += a->choices[i].reasoning_tokens;
	}
	return u;
}

static void choice_init(km_answer *a, struct choice *c, int index)
{
	const km_openai_request *r = a->request;
	km_parser_options options = {
		.tools = a->model->tool_parser && r->parse_tools,
		.reasoning = a->model->reasoning_parser && r->separate_reasoning,
		.in_reasoning = a->prompts[index / r->n].in_reasoning,
		.history_tool_calls = r->history_tool_calls,
		.declared_tools = r->tools,
		.on_event = on_parsed,
		.ctx = c,
	};

	*c = (struct choice){ .answer = a, .index = index, .matched_id = -1,
	                      .in_reasoning = options.in_reasoning };
	if (is_chat(a) && (options.tools || options.reasoning))
		c->parser = km_parser_new(&options);
}

km_answer *km_answer_new(const km_answer_model *model, const km_openai_request *request,
                         const km_answer_prompt *prompts, const char *id)
{
	km_answer *a = km_xcalloc(1, sizeof(*a));
	size_t count = request->prompt_count ? (size_t)request->prompt_count : 1;

	a->model = model;
	a->request = request;
	a->id = km_xstrdup(id);
	a->created = time(NULL);
	a->prompt_count = (int)count;
	a->prompts = km_xcalloc(count, sizeof(*a->prompts));
	memcpy(a->prompts, prompts, count * sizeof(*prompts));
	a->cached = km_xcalloc(count, sizeof(*a->cached));
	a->prompt_lists = km_xcalloc(count, sizeof(*a->prompt_lists));
	a->prompt_characters = km_xcalloc(count, sizeof(*a->prompt_characters));
	a->count = (int)count * request->n;
	a->choices = km_xcalloc((size_t)a->count, sizeof(*a->choices));
	for (int i = 0; i < a->count; i++)
		choice_init(a, &a->choices[i], i);
	return a;
}

static void choice_release(struct choice *c)
{
	for (int i = 0; i < c->call_count; i++) {
		free(c->calls[i].id);
		free(c->calls[i].name);
		km_buf_release(&c->calls[i].arguments);
	}
	free(c->calls);
	free(c->matched_stop);
	km_buf_release(&c->reasoning);
	km_buf_release(&c->content);
	km_buf_release(&c->logprobs);
	free(c->unshown);
	km_logprob_lists_release(&c->lists);
	if (c->parser)
		km_parser_free(c->parser);
}

void km_answer_free(km_answer *a)
{
	if (!a)
		return;
	for (int i = 0; i < a->count; i++)
		choice_release(&a->choices[i]);
	for (int i = 0; i < a->prompt_count; i++)
		km_logprob_lists_release(&a->prompt_lists[i]);
	free(a->choices);
	free(a->prompt_lists);
	free(a->prompt_characters);
	free(a->cached);
	free(a->prompts);
	free(a->id);
	free(a->error);
	km_buf_release(&a->scratch);
	free(a);
}
