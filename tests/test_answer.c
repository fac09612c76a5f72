/* wire/: answers from engine events, whole and streamed; the two must say the same. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "text/vocab_synth.h"
#include "wire/answer.h"

#define S "<|tool_calls_section_begin|>"
#define s_ "<|tool_calls_section_end|>"
#define B "<|tool_call_begin|>"
#define A "<|tool_call_argument_begin|>"
#define E "<|tool_call_end|>"

static const char *const names[] = { "kimi-test" };

struct fixture {
	char dir[64];
	km_tokenizer *tokenizer;
	km_answer_model model;
};

static int set_up(void **state)
{
	struct fixture *f = km_xcalloc(1, sizeof(*f));
	km_err err;

	snprintf(f->dir, sizeof(f->dir), "/tmp/kimi-answer-XXXXXX");
	if (!mkdtemp(f->dir) || km_vocab_synthesize(f->dir, 2048, &err) < 0 ||
	    km_tokenizer_open(&f->tokenizer, f->dir, &err) < 0)
		return -1;
	km_answer_model_init(&f->model, f->tokenizer, names[0]);
	f->model.tool_parser = f->model.reasoning_parser = true;
	*state = f;
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;
	char path[128];

	km_tokenizer_close(f->tokenizer);
	snprintf(path, sizeof(path), "%s/tiktoken.model", f->dir);
	unlink(path);
	snprintf(path, sizeof(path), "%s/tokenizer_config.json", f->dir);
	unlink(path);
	rmdir(f->dir);
	free(f);
	return 0;
}

struct run {
	struct fixture *f;
	const char *body;   /* the request */
	const char *output; /* what the model says; special tokens by name */
	bool in_reasoning;
	enum km_finish finish;
	const char *stop;   /* the stop string that ended it */
	size_t delay;       /* bytes that a stop string's check holds back */
	enum km_endpoint endpoint;
};

static const char tools[] = ",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}},"
	                    "{\"type\":\"function\",\"function\":{\"name\":\"get_weather\"}}]";

static char *chat_body(const char *rest)
{
	return km_xasprintf("{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]%s}", rest);
}

/* Feeds the output token by token; text comes `delay` bytes late, as under a stop string. */
static void feed(km_answer *answer, const struct run *run, km_buf *out)
{
	km_ids ids = { 0 };
	km_buf queue = KM_BUF_INIT, visible = KM_BUF_INIT;
	km_err err;
	km_queued queued;

	assert_int_equal(km_tokenizer_encode(run->f->tokenizer, run->output, strlen(run->output),
	                                     true, &ids, &err),
	                 0);
	for (size_t i = 0; i < ids.len; i++) {
		bool last = i + 1 == ids.len;
		km_logprob top[2] = { { ids.data[i], -0.5f }, { 65, -1.25f } };
		km_event e = { .id = ids.data[i], .logprob = -0.5f, .top = top, .top_count = 2,
			       .matched_id = -1 };
		size_t len;
		const char *bytes = km_tokenizer_bytes(run->f->tokenizer, ids.data[i], &len);

		km_buf_append(&visible, bytes, len);
		e.text = visible.data;
		e.text_len = last && !run->stop ? visible.len :
		             visible.len > run->delay ? visible.len - run->delay : 0;
		if (last) {
			e.finish = run->finish;
			e.matched_stop = run->stop;
		}
		km_queue_event(&queue, 0, 1, &e);
		km_buf_drop(&visible, e.text_len);
	}
	for (size_t at = 0; at < queue.len;) {
		at = km_queue_read(&queue, at, &queued);
		km_answer_take(answer, &queued, out);
	}
	assert_true(km_answer_done(answer));
	km_ids_release(&ids);
	km_buf_release(&queue);
	km_buf_release(&visible);
}

/* The whole answer as JSON, or all chunks joined. */
static void run_answer(const struct run *run, km_buf *out)
{
	static const int32_t prompt[] = { 72, 105, 33 };
	km_answer_prompt prompts[1] = { { prompt, 3, run->in_reasoning } };
	km_openai_limits limits = {
		.vocab_size = 2048, .models = names, .model_count = 1,
		.sampling = { .temperature = 1, .top_p = 1, .top_k = -1, .repetition_penalty = 1 },
	};
	km_openai_request r;
	km_openai_error error;
	km_answer *answer;

	if (km_openai_request_parse(&r, run->endpoint, run->body, strlen(run->body), &limits,
	                            &error) < 0)
		fail_msg("%s", error.message);
	answer = km_answer_new(&run->f->model, &r, prompts, "chatcmpl-1");
	feed(answer, run, out);
	if (r.stream)
		km_answer_end_stream(answer, out);
	else
		km_answer_json(answer, out);
	km_answer_free(answer);
	km_openai_request_release(&r);
}

static json_t *load(const char *s, size_t len)
{
	json_error_t where;
	json_t *json = json_loadb(s, len, JSON_REJECT_DUPLICATES, &where);

	if (!json)
		fail_msg("%s in %.*s", where.text, (int)len, s);
	return json;
}

/* The members that a stream's chunks add up to. */
struct joined {
	km_buf content, reasoning, arguments[4], logprobs;
	char ids[4][64], call_names[4][64];
	int calls, chunks, usages, roles;
	char finish[16];
	int64_t completion_tokens, reasoning_tokens;
	bool done;
};

static void joined_release(struct joined *j)
{
	km_buf_release(&j->content);
	km_buf_release(&j->reasoning);
	km_buf_release(&j->logprobs);
	for (int i = 0; i < 4; i++)
		km_buf_release(&j->arguments[i]);
}

static void join_call(struct joined *j, const json_t *call)
{
	int index = (int)json_integer_value(json_object_get(call, "index"));
	const json_t *function = json_object_get(call, "function");
	const char *id = json_string_value(json_object_get(call, "id"));
	const char *name = json_string_value(json_object_get(function, "name"));

	assert_in_range(index, 0, 3);
	if (id) {
		assert_int_equal(index, j->calls);
		assert_string_equal(json_string_value(json_object_get(call, "type")), "function");
		snprintf(j->ids[index], sizeof(j->ids[index]), "%s", id);
		snprintf(j->call_names[index], sizeof(j->call_names[index]), "%s", name);
		j->calls++;
	} else {
		assert_null(name);
		assert_null(json_object_get(call, "type"));
		assert_int_equal(index, j->calls - 1);
	}
	km_buf_puts(&j->arguments[index],
	            json_string_value(json_object_get(function, "arguments")));
}

static void join_logprobs(struct joined *j, const json_t *choice)
{
	const json_t *content = json_object_get(json_object_get(choice, "logprobs"), "content");

	for (size_t i = 0; i < json_array_size(content); i++)
		km_buf_puts(&j->logprobs, json_string_value(json_object_get(
						  json_array_get(content, i), "token")));
}

static void join_choice(struct joined *j, const json_t *choice)
{
	const json_t *delta = json_object_get(choice, "delta");
	const char *content = json_string_value(json_object_get(delta, "content"));
	const char *reasoning = json_string_value(json_object_get(delta, "reasoning_content"));
	const char *finish = json_string_value(json_object_get(choice, "finish_reason"));
	const json_t *calls = json_object_get(delta, "tool_calls");

	join_logprobs(j, choice);
	if (json_object_get(delta, "role")) {
		assert_int_equal(j->chunks, 0);
		assert_string_equal(content, "");
		j->roles++;
	} else if (finish) {
		assert_int_equal(json_object_size(delta), 0);
		snprintf(j->finish, sizeof(j->finish), "%s", finish);
	} else {
		assert_int_equal(json_object_size(delta), 1);
		assert_int_equal(!!content + !!reasoning + !!calls, 1);
	}
	km_buf_puts(&j->content, content ? content : "");
	km_buf_puts(&j->reasoning, reasoning ? reasoning : "");
	for (size_t i = 0; i < json_array_size(calls); i++)
		join_call(j, json_array_get(calls, i));
	j->chunks++;
}

static void join(struct joined *j, const km_buf *sse)
{
	const char *at = sse->data;

	memset(j, 0, sizeof(*j));
	while (at && *at) {
		const char *end = strstr(at, "\n\n");
		json_t *json;
		const json_t *usage, *choices;

		assert_non_null(end);
		assert_false(j->done);
		assert_memory_equal(at, "data: ", 6);
		at += 6;
		if (!strncmp(at, "[DONE]", 6)) {
			j->done = true;
			at = end + 2;
			continue;
		}
		json = load(at, (size_t)(end - at));
		choices = json_object_get(json, "choices");
		usage = json_object_get(json, "usage");
		if (usage) {
			assert_int_equal(json_array_size(choices), 0);
			j->usages++;
			j->completion_tokens = json_integer_value(
				json_object_get(usage, "completion_tokens"));
			j->reasoning_tokens = json_integer_value(
				json_object_get(usage, "reasoning_tokens"));
		} else {
			join_choice(j, json_array_get(choices, 0));
		}
		json_decref(json);
		at = end + 2;
	}
	assert_true(j->done);
}

static const char *text(const km_buf *b)
{
	return b->len ? b->data : "";
}

/* Runs the same output whole and streamed, at every delay, and holds the two to each other. */
static json_t *both_ways(struct run run, const char *rest, struct joined *j)
{
	char *whole = chat_body(rest), *more = km_xasprintf(
		"%s,\"stream\":true,\"stream_options\":{\"include_usage\":true}", rest);
	char *stream = chat_body(more);
	km_buf out = KM_BUF_INIT;
	json_t *json;
	const json_t *choice, *message, *calls;
	const char *s;

	run.body = whole;
	run_answer(&run, &out);
	json = load(out.data, out.len);
	km_buf_clear(&out);
	run.body = stream;
	run_answer(&run, &out);
	join(j, &out);
	km_buf_release(&out);
	free(whole);
	free(more);
	free(stream);

	choice = json_array_get(json_object_get(json, "choices"), 0);
	message = json_object_get(choice, "message");
	calls = json_object_get(message, "tool_calls");
	s = json_string_value(json_object_get(message, "content"));
	assert_string_equal(text(&j->content), s ? s : "");
	s = json_string_value(json_object_get(message, "reasoning_content"));
	assert_string_equal(text(&j->reasoning), s ? s : "");
	assert_int_equal(json_array_size(calls), j->calls);
	for (int i = 0; i < j->calls; i++) {
		const json_t *call = json_array_get(calls, (size_t)i);
		const json_t *function = json_object_get(call, "function");

		assert_string_equal(json_string_value(json_object_get(call, "id")), j->ids[i]);
		assert_string_equal(json_string_value(json_object_get(function, "name")),
		                    j->call_names[i]);
		assert_string_equal(json_string_value(json_object_get(function, "arguments")),
		                    text(&j->arguments[i]));
	}
	assert_string_equal(json_string_value(json_object_get(choice, "finish_reason")), j->finish);
	assert_int_equal(j->usages, 1);
	assert_int_equal(j->roles, 1);
	return json;
}

static void content_streams_in_whole_characters(void **state)
{
	struct run run = { .f = *state, .output = "Hello, 世界! na\xc3\xafve \xf0\x9f\x98\x80.",
		           .finish = KM_FINISH_LENGTH };
	struct joined j;

	json_decref(both_ways(run, "", &j));
	assert_string_equal(text(&j.content), run.output);
	assert_null(strstr(text(&j.content), "\xef\xbf\xbd"));
	assert_string_equal(j.finish, "length");
	assert_int_equal(j.reasoning_tokens, 0);
	joined_release(&j);
}

/* Bytes that no later token can complete leave as one U+FFFD, and only at the end. */
static void half_a_character_at_the_end_is_replaced(void **state)
{
	struct fixture *f = *state;
	static const int32_t prompt[] = { 72 };
	static const char *const pieces[] = { "ab\xf0", "\x9f\x98", "\x80", "\xe4\xb8" };
	km_answer_prompt prompts[1] = { { prompt, 1, false } };
	km_openai_limits limits = { .vocab_size = 2048, .models = names, .model_count = 1 };
	char *body = chat_body("");
	km_openai_request r;
	km_openai_error error;
	km_buf out = KM_BUF_INIT;
	km_answer *answer;

	assert_int_equal(
		km_openai_request_parse(&r, KM_ENDPOINT_CHAT, body, strlen(body), &limits, &error),
		0);
	answer = km_answer_new(&f->model, &r, prompts, "chatcmpl-1");
	for (int i = 0; i < 4; i++) {
		km_queued q = { .event = { .id = 65,
			                   .text = pieces[i],
			                   .text_len = strlen(pieces[i]),
			                   .matched_id = -1,
			                   .finish = i == 3 ? KM_FINISH_LENGTH : 0 } };

		km_answer_take(answer, &q, NULL);
	}
	km_answer_json(answer, &out);
	assert_non_null(strstr(out.data, "\"content\":\"ab\xf0\x9f\x98\x80\xef\xbf\xbd\""));
	km_answer_free(answer);
	km_openai_request_release(&r);
	km_buf_release(&out);
	free(body);
}

static void reasoning_comes_apart_from_content(void **state)
{
	struct run run = { .f = *state, .output = "think hard</think>Answer.", .in_reasoning = true,
		           .finish = KM_FINISH_STOP };
	struct joined j;
	json_t *json = both_ways(run, "", &j);
	const json_t *usage = json_object_get(json, "usage");
	const json_t *details = json_object_get(usage, "prompt_tokens_details");

	assert_string_equal(text(&j.reasoning), "think hard");
	assert_string_equal(text(&j.content), "Answer.");
	assert_string_equal(j.finish, "stop");
	assert_true(j.reasoning_tokens >= 2 && j.reasoning_tokens < j.completion_tokens);
	assert_int_equal(json_integer_value(json_object_get(usage, "prompt_tokens")), 3);
	assert_int_equal(json_integer_value(json_object_get(details, "cached_tokens")), 1);
	assert_int_equal(json_integer_value(json_object_get(usage, "total_tokens")),
	                 3 + j.completion_tokens);
	json_decref(json);
	joined_release(&j);

	json = both_ways(run, ",\"separate_reasoning\":false", &j);
	assert_string_equal(text(&j.content), run.output);
	assert_int_equal(j.reasoning_tokens, 0);
	json_decref(json);
	joined_release(&j);
}

/* A section, or a call without one, ends the think block that is open. */
static void reasoning_tokens_end_where_reasoning_does(void **state)
{
	static const char call[] = B "functions.f:0" A "{}" E;
	static const char *const begins[] = { "", "</think>", S };
	int64_t tokens[3];

	for (int i = 0; i < 3; i++) {
		char *output = km_xasprintf("hmm%s%s", begins[i], call);
		struct run run = { .f = *state, .output = output, .in_reasoning = true,
			           .finish = KM_FINISH_STOP };
		struct joined j;

		json_decref(both_ways(run, tools, &j));
		assert_string_equal(text(&j.reasoning), "hmm");
		assert_int_equal(j.calls, 1);
		tokens[i] = j.reasoning_tokens;
		joined_release(&j);
		free(output);
	}
	assert_int_equal(tokens[0], tokens[2]);
	assert_int_equal(tokens[1], tokens[0] + 1); /* </think> is a token of reasoning */
}

/* stream_reasoning false: one reasoning chunk, before the first of content. */
static void reasoning_can_come_in_one_piece(void **state)
{
	struct run run = { .f = *state,
		           .output = "one two three four</think>Answer.",
		           .in_reasoning = true,
		           .finish = KM_FINISH_STOP };
	km_buf out = KM_BUF_INIT;
	char *body = chat_body(",\"stream\":true,\"stream_reasoning\":false");
	const char *first;

	run.body = body;
	run_answer(&run, &out);
	first = strstr(out.data, "reasoning_content");
	assert_non_null(strstr(out.data, "\"reasoning_content\":\"one two three four\""));
	assert_null(strstr(first + 1, "reasoning_content"));
	assert_true(first < strstr(out.data, "\"content\":\"A"));
	km_buf_release(&out);
	free(body);
}

static void tool_calls_carry_ids_and_arguments(void **state)
{
	struct run run = { .f = *state,
		           .output = "I look." S B "functions.get_weather:0" A
		                     "{\"city\": \"Paris\"}" E B "functions.f:1" A "{}" E s_,
		           .finish = KM_FINISH_STOP };
	struct joined j;
	json_t *json = both_ways(run, tools, &j);

	assert_int_equal(j.calls, 2);
	assert_string_equal(j.ids[0], "functions.get_weather:0");
	assert_string_equal(j.ids[1], "functions.f:1");
	assert_string_equal(text(&j.arguments[0]), "{\"city\": \"Paris\"}");
	assert_string_equal(text(&j.content), "I look.");
	assert_string_equal(j.finish, "tool_calls");
	json_decref(json);
	joined_release(&j);

	json = both_ways(run, ",\"parallel_tool_calls\":false,\"tools\":[{\"type\":\"function\","
	                      "\"function\":{\"name\":\"f\"}}]", &j);
	assert_int_equal(j.calls, 1);
	json_decref(json);
	joined_release(&j);

	run.finish = KM_FINISH_LENGTH; /* only a stop becomes tool_calls */
	json = both_ways(run, tools, &j);
	assert_string_equal(j.finish, "length");
	json_decref(json);
	joined_release(&j);
}

/* Ids count through the conversation, whatever number the model wrote. */
static void ids_go_on_from_the_history(void **state)
{
	static const char body[] =
		"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\","
		"\"content\":\"\",\"tool_calls\":[{\"id\":\"functions.f:0\",\"type\":\"function\","
		"\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}}]},{\"role\":\"tool\","
		"\"tool_call_id\":\"functions.f:0\",\"content\":\"1\"}],\"tools\":[{\"type\":"
		"\"function\",\"function\":{\"name\":\"f\"}}]%s}";
	struct run run = { .f = *state, .output = S B "functions.f:7" A "{}" E s_,
		           .finish = KM_FINISH_STOP };
	char text[1024];
	km_buf out = KM_BUF_INIT;

	for (int stream = 0; stream < 2; stream++) {
		snprintf(text, sizeof(text), body, stream ? ",\"stream\":true" : "");
		run.body = text;
		km_buf_clear(&out);
		run_answer(&run, &out);
		assert_non_null(strstr(out.data, "\"id\":\"functions.f:1\",\"index\":0,"));
	}
	km_buf_release(&out);
}

static void usage_can_come_with_every_chunk(void **state)
{
	struct run run = { .f = *state, .output = "abc", .finish = KM_FINISH_LENGTH };
	char *body =
		chat_body(",\"stream\":true,\"stream_options\":{\"continuous_usage_stats\":true}");
	km_buf out = KM_BUF_INIT;
	int chunks = 0, usages = 0;

	run.body = body;
	run_answer(&run, &out);
	for (const char *at = out.data; (at = strstr(at, "data: {")); at++)
		chunks++;
	for (const char *at = out.data; (at = strstr(at, "\"usage\":")); at++)
		usages++;
	assert_true(chunks >= 3);
	assert_int_equal(chunks, usages);
	km_buf_release(&out);
	free(body);
}

static void without_tools_markers_are_text(void **state)
{
	struct run run = { .f = *state, .output = "a" B "b", .finish = KM_FINISH_STOP };
	struct joined j;

	run.f->model.reasoning_parser = false;
	json_decref(both_ways(run, "", &j));
	run.f->model.reasoning_parser = true;
	assert_string_equal(text(&j.content), run.output);
	assert_string_equal(j.finish, "stop");
	joined_release(&j);
}

static void special_tokens_are_hidden_unless_asked_for(void **state)
{
	struct run run = { .f = *state, .output = "a<|im_user|>b", .finish = KM_FINISH_STOP };
	struct joined j;

	json_decref(both_ways(run, "", &j));
	assert_string_equal(text(&j.content), "ab");
	joined_release(&j);
	json_decref(both_ways(run, ",\"skip_special_tokens\":false", &j));
	assert_string_equal(text(&j.content), run.output);
	joined_release(&j);
}

/* Text held back for a stop string arrives with later tokens; markers keep their place. */
static void late_text_keeps_markers_in_place(void **state)
{
	struct run run = { .f = *state,
		           .output = "why</think>Hm." S B "functions.f:0" A "{\"a\":1}" E s_ "tail",
		           .in_reasoning = true, .finish = KM_FINISH_STOP };
	char *rest = km_xasprintf("%s,\"stop\":[\"never said\"]", tools);
	struct joined j;

	for (run.delay = 0; run.delay < 40; run.delay += 3) {
		json_decref(both_ways(run, rest, &j));
		assert_string_equal(text(&j.reasoning), "why");
		assert_string_equal(text(&j.content), "Hm.tail");
		assert_string_equal(text(&j.arguments[0]), "{\"a\":1}");
		joined_release(&j);
	}
	free(rest);
}

static void a_stop_string_is_reported_and_hidden(void **state)
{
	struct run run = { .f = *state,
		           .output = "one END",
		           .finish = KM_FINISH_STOP,
		           .stop = " END",
		           .delay = 4 };
	struct joined j;
	json_t *json = both_ways(run, ",\"stop\":\" END\"", &j);
	const json_t *choice = json_array_get(json_object_get(json, "choices"), 0);

	assert_string_equal(text(&j.content), "one");
	assert_string_equal(json_string_value(json_object_get(choice, "matched_stop")), " END");
	json_decref(json);
	joined_release(&j);
}

static void logprobs_cover_every_token(void **state)
{
	struct run run = { .f = *state, .output = "why</think>Na\xc3\xafve.", .in_reasoning = true,
		           .finish = KM_FINISH_LENGTH };
	struct joined j;
	json_t *json = both_ways(run, ",\"logprobs\":true,\"top_logprobs\":2", &j);
	const json_t *choice = json_array_get(json_object_get(json, "choices"), 0);
	const json_t *content = json_object_get(json_object_get(choice, "logprobs"), "content");
	const json_t *first = json_array_get(content, 0);
	km_buf bytes = KM_BUF_INIT;

	assert_int_equal(json_array_size(content), j.completion_tokens);
	for (size_t i = 0; i < json_array_size(content); i++) {
		const json_t *list = json_object_get(json_array_get(content, i), "bytes");

		for (size_t k = 0; k < json_array_size(list); k++)
			km_buf_putc(&bytes, (char)json_integer_value(json_array_get(list, k)));
	}
	assert_string_equal(text(&bytes), run.output);
	assert_true(json_real_value(json_object_get(first, "logprob")) == -0.5);
	assert_int_equal(json_array_size(json_object_get(first, "top_logprobs")), 2);
	assert_non_null(strstr(text(&j.logprobs), "</think>"));
	km_buf_release(&bytes);
	json_decref(json);
	joined_release(&j);
}

static void completions_echo_and_score_the_prompt(void **state)
{
	struct fixture *f = *state;
	static const char body[] =
		"{\"prompt\":[72,105,33],\"echo\":true,\"logprobs\":1,\"max_tokens\":0}";
	static const int32_t prompt[] = { 72, 105, 33 };
	km_answer_prompt prompts[1] = { { prompt, 3, false } };
	km_openai_limits limits = { .vocab_size = 2048, .models = names, .model_count = 1 };
	km_openai_request r;
	km_openai_error error;
	km_buf queue = KM_BUF_INIT, out = KM_BUF_INIT;
	km_event end = { .id = -1, .matched_id = -1, .finish = KM_FINISH_LENGTH };
	km_answer *answer;
	json_t *json;
	const json_t *choice, *lp;
	km_queued queued;

	assert_int_equal(km_openai_request_parse(&r, KM_ENDPOINT_COMPLETIONS, body, strlen(body),
	                                         &limits, &error),
	                 0);
	answer = km_answer_new(&f->model, &r, prompts, "cmpl-1");
	for (int i = 1; i < 3; i++) {
		km_logprob top = { i == 1 ? 66 : 0xc8, -0.25f };
		km_prompt_logprob p = { i, prompt[i], -1.5f - (float)i, &top, 1 };

		km_queue_prompt_logprob(&queue, 0, &p);
	}
	km_queue_event(&queue, 0, 0, &end);
	for (size_t at = 0; at < queue.len;) {
		at = km_queue_read(&queue, at, &queued);
		km_answer_take(answer, &queued, NULL);
	}
	km_answer_json(answer, &out);
	json = load(out.data, out.len);
	choice = json_array_get(json_object_get(json, "choices"), 0);
	lp = json_object_get(choice, "logprobs");
	assert_string_equal(json_string_value(json_object_get(json, "object")), "text_completion");
	assert_int_equal(strlen(json_string_value(json_object_get(choice, "text"))), 3);
	assert_int_equal(json_array_size(json_object_get(lp, "tokens")), 3);
	assert_true(json_is_null(json_array_get(json_object_get(lp, "token_logprobs"), 0)));
	assert_true(json_real_value(json_array_get(json_object_get(lp, "token_logprobs"), 2)) ==
	            -3.5);
	assert_true(json_is_null(json_array_get(json_object_get(lp, "top_logprobs"), 0)));
	assert_int_equal(json_object_size(json_array_get(json_object_get(lp, "top_logprobs"), 1)),
	                 2);
	/* half a character has no name in JSON but its bytes' */
	assert_non_null(json_object_get(json_array_get(json_object_get(lp, "top_logprobs"), 2),
	                                "bytes:\\xc8"));
	assert_int_equal(json_integer_value(json_array_get(json_object_get(lp, "text_offset"), 2)),
	                 2);
	json_decref(json);
	km_answer_free(answer);
	km_openai_request_release(&r);
	km_buf_release(&queue);
	km_buf_release(&out);
}

/* Where a token begins in the text: a special token is listed, and counts only where it shows. */
static void offsets_are_of_the_text_that_shows(void **state)
{
	static const struct {
		const char *body, *text;
		int offsets[3];
	} cases[] = {
		{ "{\"prompt\":[72,105,33],\"logprobs\":0}", "ab", { 0, 1, 1 } },
		{ "{\"prompt\":[72,105,33],\"logprobs\":0,\"skip_special_tokens\":false}",
		  "a<|im_user|>b", { 0, 1, 12 } },
	};
	struct run run = { .f = *state, .output = "a<|im_user|>b", .finish = KM_FINISH_LENGTH,
		           .endpoint = KM_ENDPOINT_COMPLETIONS };

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		km_buf out = KM_BUF_INIT;
		json_t *json;
		const json_t *choice, *offsets;

		run.body = cases[i].body;
		run_answer(&run, &out);
		json = load(out.data, out.len);
		choice = json_array_get(json_object_get(json, "choices"), 0);
		offsets = json_object_get(json_object_get(choice, "logprobs"), "text_offset");
		assert_string_equal(json_string_value(json_object_get(choice, "text")),
		                    cases[i].text);
		assert_int_equal(json_array_size(offsets), 3);
		for (size_t k = 0; k < 3; k++)
			assert_int_equal(json_integer_value(json_array_get(offsets, k)),
			                 cases[i].offsets[k]);
		json_decref(json);
		km_buf_release(&out);
	}
}

static void samples_interleave_by_index(void **state)
{
	struct fixture *f = *state;
	char *body = chat_body(",\"n\":2,\"stream\":true");
	static const int32_t prompt[] = { 72 };
	km_answer_prompt prompts[1] = { { prompt, 1, false } };
	km_openai_limits limits = { .vocab_size = 2048, .models = names, .model_count = 1 };
	km_openai_request r;
	km_openai_error error;
	km_buf queue = KM_BUF_INIT, out = KM_BUF_INIT;
	km_answer *answer;
	km_queued queued;

	assert_int_equal(
		km_openai_request_parse(&r, KM_ENDPOINT_CHAT, body, strlen(body), &limits, &error),
		0);
	answer = km_answer_new(&f->model, &r, prompts, "chatcmpl-1");
	for (int i = 0; i < 6; i++) {
		km_event e = { .sample = i % 2,
			       .id = 65 + i,
			       .text = "x",
			       .text_len = 1,
			       .matched_id = -1,
			       .finish = i < 4 ? KM_FINISH_NONE : KM_FINISH_STOP };

		km_queue_event(&queue, 0, 0, &e);
	}
	for (size_t at = 0; at < queue.len;) {
		at = km_queue_read(&queue, at, &queued);
		km_answer_take(answer, &queued, &out);
	}
	assert_true(km_answer_done(answer));
	assert_non_null(strstr(out.data, "\"index\":1,\"delta\":{\"role\":\"assistant\""));
	assert_non_null(strstr(out.data, "\"index\":1,\"delta\":{},\"finish_reason\":\"stop\""));
	assert_int_equal(km_answer_usage_get(answer).completion_tokens, 6);
	assert_int_equal(km_answer_usage_get(answer).prompt_tokens, 1);
	km_answer_free(answer);
	km_openai_request_release(&r);
	km_buf_release(&queue);
	km_buf_release(&out);
	free(body);
}

static void an_engine_error_ends_the_stream(void **state)
{
	struct fixture *f = *state;
	char *body = chat_body(",\"stream\":true,\"stream_options\":{\"include_usage\":true}");
	static const int32_t prompt[] = { 72 };
	km_answer_prompt prompts[1] = { { prompt, 1, false } };
	km_openai_limits limits = { .vocab_size = 2048, .models = names, .model_count = 1 };
	km_openai_request r;
	km_openai_error error;
	km_queued q = { .event = { .id = 65, .text = "x", .text_len = 1, .matched_id = -1 } };
	km_buf out = KM_BUF_INIT;
	km_answer *answer;

	assert_int_equal(
		km_openai_request_parse(&r, KM_ENDPOINT_CHAT, body, strlen(body), &limits, &error),
		0);
	answer = km_answer_new(&f->model, &r, prompts, "chatcmpl-1");
	km_answer_take(answer, &q, &out);
	q.event = (km_event){
		.id = -1, .matched_id = -1, .finish = KM_FINISH_ERROR, .error = "it broke"
	};
	km_answer_take(answer, &q, &out);
	assert_true(km_answer_done(answer));
	km_answer_end_stream(answer, &out);
	assert_non_null(strstr(out.data, "data: {\"error\":{\"message\":\"it broke\""));
	assert_string_equal(out.data + out.len - 14, "data: [DONE]\n\n");
	km_answer_free(answer);
	km_openai_request_release(&r);
	km_buf_release(&out);
	free(body);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(content_streams_in_whole_characters),
		cmocka_unit_test(half_a_character_at_the_end_is_replaced),
		cmocka_unit_test(reasoning_comes_apart_from_content),
		cmocka_unit_test(reasoning_tokens_end_where_reasoning_does),
		cmocka_unit_test(reasoning_can_come_in_one_piece),
		cmocka_unit_test(tool_calls_carry_ids_and_arguments),
		cmocka_unit_test(ids_go_on_from_the_history),
		cmocka_unit_test(usage_can_come_with_every_chunk),
		cmocka_unit_test(without_tools_markers_are_text),
		cmocka_unit_test(special_tokens_are_hidden_unless_asked_for),
		cmocka_unit_test(late_text_keeps_markers_in_place),
		cmocka_unit_test(a_stop_string_is_reported_and_hidden),
		cmocka_unit_test(logprobs_cover_every_token),
		cmocka_unit_test(completions_echo_and_score_the_prompt),
		cmocka_unit_test(offsets_are_of_the_text_that_shows),
		cmocka_unit_test(samples_interleave_by_index),
		cmocka_unit_test(an_engine_error_ends_the_stream),
	};

	return cmocka_run_group_tests(tests, set_up, tear_down);
}
