/*
 * What a field may hold is said where it is read; openai_fields.c has the rows that are numbers in
 * a range and those that are refused.
 */
#include "wire/openai_request.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/utf8.h"
#include "text/chat.h"
#include "text/textfile.h"
#include "wire/openai_fields.h"

/* 0 is refused for top_p and repetition_penalty: the range below starts just above it. */
#define ABOVE_ZERO 1e-9

static int take_sampling(km_openai_request *r, km_openai_error *error)
{
	km_sampling *s = &r->sampling;
	const json_t *seed = km_openai_get(r->body, "seed");
	int64_t number;

	KM_TRY(km_openai_take_number(r->body, "temperature", 0, 2, &s->temperature, error));
	KM_TRY(km_openai_take_number(r->body, "top_p", ABOVE_ZERO, 1, &s->top_p, error));
	KM_TRY(km_openai_take_int(r->body, "top_k", -1, INT32_MAX, &s->top_k, error));
	KM_TRY(km_openai_take_number(r->body, "min_p", 0, 1, &s->min_p, error));
	KM_TRY(km_openai_take_number(r->body, "repetition_penalty", ABOVE_ZERO, 2,
	                             &s->repetition_penalty, error));
	KM_TRY(km_openai_take_number(r->body, "frequency_penalty", -2, 2, &s->frequency_penalty,
	                             error));
	KM_TRY(km_openai_take_number(r->body, "presence_penalty", -2, 2, &s->presence_penalty,
	                             error));
	if (!seed)
		return 0;
	if (!km_openai_whole(seed, &number))
		return km_openai_fail(error, 400, "seed", NULL, "seed must be a whole number.");
	s->has_seed = true;
	s->seed = (uint64_t)number;
	return 0;
}

static int take_stop(km_openai_request *r, km_openai_error *error)
{
	const json_t *stop = km_openai_get(r->body, "stop");
	size_t count = json_is_array(stop) ? json_array_size(stop) : 1;

	if (!stop)
		return 0;
	if (count > KM_MAX_STOPS)
		return km_openai_fail(error, 400, "stop", NULL,
		                      "stop has %zu strings; %d are allowed.", count, KM_MAX_STOPS);
	for (size_t i = 0; i < count; i++) {
		const json_t *item = json_is_array(stop) ? json_array_get(stop, i) : stop;

		if (!json_is_string(item) || !json_string_length(item))
			return km_openai_fail(
				error, 400, "stop", NULL,
				"stop must be a string or a list of strings, none of them empty.");
		r->stop[r->stop_count++] = json_string_value(item);
	}
	return 0;
}

static int take_id(const json_t *value, const char *key, int32_t vocab, int32_t *to,
                   km_openai_error *error)
{
	int64_t id;

	if (!km_openai_whole(value, &id))
		return km_openai_fail(error, 400, key, NULL, "%s must hold whole numbers.", key);
	if (id < 0 || id >= vocab)
		return km_openai_fail(error, 400, key, NULL,
		                      "%s holds token id %lld; this model's ids are 0 to %d.", key,
		                      (long long)id, vocab - 1);
	*to = (int32_t)id;
	return 0;
}

static int take_stop_ids(km_openai_request *r, int32_t vocab, km_openai_error *error)
{
	const json_t *ids = km_openai_get(r->body, "stop_token_ids");

	if (!ids)
		return 0;
	if (!json_is_array(ids) || json_array_size(ids) > KM_MAX_STOP_IDS)
		return km_openai_fail(error, 400, "stop_token_ids", NULL,
		                      "stop_token_ids must be a list of at most %d token ids.",
		                      KM_MAX_STOP_IDS);
	for (size_t i = 0; i < json_array_size(ids); i++)
		KM_TRY(take_id(json_array_get(ids, i), "stop_token_ids", vocab,
		               &r->stop_ids[r->stop_id_count++], error));
	return 0;
}

static int take_bias(km_openai_request *r, int32_t vocab, km_openai_error *error)
{
	json_t *bias = (json_t *)km_openai_get(r->body, "logit_bias");
	const char *key;
	json_t *value;

	if (!bias)
		return 0;
	if (!json_is_object(bias) || json_object_size(bias) > KM_MAX_BIAS)
		return km_openai_fail(error, 400, "logit_bias", NULL,
		                      "logit_bias must be an object of at most %d token ids.",
		                      KM_MAX_BIAS);
	r->bias = km_xcalloc(json_object_size(bias) + 1, sizeof(*r->bias));
	json_object_foreach(bias, key, value) {
		km_logit_bias *to = &r->bias[r->sampling.bias_count++];
		char *end;
		long id = strtol(key, &end, 10);

		if (end == key || *end || id < 0 || id >= vocab)
			return km_openai_fail(
				error, 400, "logit_bias", NULL,
				"logit_bias has the key '%.40s'; keys are token ids from 0 to %d.",
				key, vocab - 1);
		if (!json_is_number(value) || fabs(json_number_value(value)) > 100)
			return km_openai_fail(
				error, 400, "logit_bias", NULL,
				"logit_bias of token %ld must be a number from -100 to 100.", id);
		*to = (km_logit_bias){ (int32_t)id, (float)json_number_value(value) };
	}
	r->sampling.bias = r->bias;
	return 0;
}

static int take_stream_options(km_openai_request *r, km_openai_error *error)
{
	const json_t *options = km_openai_get(r->body, "stream_options");

	KM_TRY(km_openai_take_bool(r->body, "stream", &r->stream, error));
	if (!options)
		return 0;
	if (!json_is_object(options))
		return km_openai_fail(error, 400, "stream_options", NULL,
		                      "stream_options must be an object.");
	if (!r->stream)
		return km_openai_fail(error, 400, "stream_options", NULL,
		                      "stream_options is allowed only with stream: true.");
	KM_TRY(km_openai_take_bool(options, "include_usage", &r->include_usage, error));
	return km_openai_take_bool(options, "continuous_usage_stats", &r->continuous_usage, error);
}

static int take_model(const km_openai_request *r, const km_openai_limits *limits,
                      km_openai_error *error)
{
	const json_t *model = km_openai_get(r->body, "model");

	if (!model)
		return 0;
	if (!json_is_string(model))
		return km_openai_fail(error, 400, "model", NULL, "model must be a string.");
	for (int i = 0; i < limits->model_count; i++)
		if (!strcmp(limits->models[i], json_string_value(model)))
			return 0;
	return km_openai_fail(error, 404, "model", "model_not_found",
	                      "The model '%.200s' does not exist here; this server has '%s'.",
	                      json_string_value(model), limits->models[0]);
}

/* Chat. */

/* Clients write the switch in three ways and four spellings of a boolean; the template knows one.
 * Anything that is not clearly one of the two is refused: upstream servers count "false" as on. */
static int as_switch(const json_t *value, const char *key, int *to, km_openai_error *error)
{
	const char *s = json_string_value(value);

	if (json_is_boolean(value))
		*to = json_is_true(value);
	else if (json_is_integer(value) && (json_integer_value(value) | 1) == 1)
		*to = (int)json_integer_value(value);
	else if (s && (!strcmp(s, "true") || !strcmp(s, "True")))
		*to = 1;
	else if (s && (!strcmp(s, "false") || !strcmp(s, "False")))
		*to = 0;
	else
		return km_openai_fail(error, 400, key, NULL, "%s must be true or false.", key);
	return 0;
}

static int take_native_thinking(km_openai_request *r, const json_t *value, km_openai_error *error)
{
	const char *type = json_string_value(json_object_get(value, "type"));

	if (!json_is_object(value))
		return as_switch(value, "thinking", &r->thinking, error);
	if (!type || (strcmp(type, "enabled") && strcmp(type, "disabled")))
		return km_openai_fail(error, 400, "thinking", NULL,
		                      "thinking.type must be \"enabled\" or \"disabled\".");
	r->thinking = !strcmp(type, "enabled");
	return 0;
}

/* Weakest first: the API's own field, then enable_thinking, then the template's own name. */
static int take_thinking(km_openai_request *r, km_openai_error *error)
{
	const json_t *kwargs = km_openai_get(r->body, "chat_template_kwargs");
	const json_t *native = km_openai_get(r->body, "thinking"), *value;
	int preserve = 0;

	if (native)
		KM_TRY(take_native_thinking(r, native, error));
	if ((value = km_openai_get(r->body, "enable_thinking")))
		KM_TRY(as_switch(value, "enable_thinking", &r->thinking, error));
	if (!kwargs)
		return 0;
	if (!json_is_object(kwargs))
		return km_openai_fail(error, 400, "chat_template_kwargs", NULL,
		                      "chat_template_kwargs must be an object.");
	if ((value = km_openai_get(kwargs, "enable_thinking")))
		KM_TRY(as_switch(value, "chat_template_kwargs.enable_thinking", &r->thinking,
		                 error));
	if ((value = km_openai_get(kwargs, "thinking")))
		KM_TRY(as_switch(value, "chat_template_kwargs.thinking", &r->thinking, error));
	if ((value = km_openai_get(kwargs, "preserve_thinking")))
		KM_TRY(as_switch(value, "chat_template_kwargs.preserve_thinking", &preserve,
		                 error));
	r->preserve_thinking = preserve;
	return 0;
}

static int check_part(const json_t *part, size_t message, km_openai_error *error)
{
	const char *type = json_string_value(json_object_get(part, "type"));
	char param[64];

	snprintf(param, sizeof(param), "messages[%zu].content", message);
	if (!type)
		return km_openai_fail(error, 400, param, NULL,
		                      "%s: each part must be an object with a type.", param);
	if (!strcmp(type, "text")) {
		if (!json_is_string(json_object_get(part, "text")))
			return km_openai_fail(error, 400, param, NULL,
			                      "%s: a text part must have a text.", param);
		return 0;
	}
	return km_openai_fail(error, 400, param, "unsupported",
	                      "%s: parts of type '%.40s' are not built; only text is read.", param,
	                      type);
}

static int check_history_calls(const json_t *calls, size_t message, km_openai_error *error)
{
	char param[64];

	snprintf(param, sizeof(param), "messages[%zu].tool_calls", message);
	if (!json_is_array(calls))
		return km_openai_fail(error, 400, param, NULL, "%s must be a list.", param);
	for (size_t i = 0; i < json_array_size(calls); i++) {
		const json_t *call = json_array_get(calls, i);
		const json_t *function = json_object_get(call, "function");

		if (!json_is_string(json_object_get(call, "id")) ||
		    !json_is_string(json_object_get(function, "name")))
			return km_openai_fail(error, 400, param, NULL,
			                      "%s[%zu] must have an id and a function with a name.",
			                      param, i);
	}
	return 0;
}

static int check_message(const json_t *message, size_t i, km_openai_error *error)
{
	const json_t *content = km_openai_get(message, "content"),
		     *calls = km_openai_get(message, "tool_calls");
	const char *role = json_string_value(json_object_get(message, "role"));
	char param[64];

	snprintf(param, sizeof(param), "messages[%zu]", i);
	if (!json_is_object(message) || !role || !*role)
		return km_openai_fail(error, 400, param, NULL, "%s must be an object with a role.",
		                      param);
	if (content && !json_is_string(content) && !json_is_array(content))
		return km_openai_fail(error, 400, param, NULL,
		                      "%s.content must be a string or a list of parts.", param);
	for (size_t k = 0; k < json_array_size(content); k++)
		KM_TRY(check_part(json_array_get(content, k), i, error));
	if (!content && strcmp(role, "assistant") != 0)
		return km_openai_fail(error, 400, param, NULL, "%s has no content.", param);
	if (!calls || strcmp(role, "assistant") != 0)
		return 0;
	return check_history_calls(calls, i, error);
}

static int take_messages(km_openai_request *r, km_openai_error *error)
{
	const json_t *messages = km_openai_get(r->body, "messages");

	if (!json_is_array(messages))
		return km_openai_fail(error, 400, "messages", NULL, "messages must be a list.");
	if (!json_array_size(messages))
		return km_openai_fail(error, 400, "messages", NULL, "Messages cannot be empty.");
	for (size_t i = 0; i < json_array_size(messages); i++)
		KM_TRY(check_message(json_array_get(messages, i), i, error));
	r->messages = messages;
	r->history_tool_calls = km_chat_count_calls(messages);
	return 0;
}

static int check_tool(const json_t *tool, size_t i, km_openai_error *error)
{
	const char *type = json_string_value(json_object_get(tool, "type"));
	const json_t *function = km_openai_get(tool, "function"),
		     *parameters = km_openai_get(function, "parameters");
	const char *name = json_string_value(json_object_get(function, "name"));
	char param[64];

	snprintf(param, sizeof(param), "tools[%zu]", i);
	if (!type || strcmp(type, "function") != 0)
		return km_openai_fail(error, 400, param, NULL, "%s.type must be \"function\".",
		                      param);
	if (!name || !*name)
		return km_openai_fail(error, 400, param, NULL, "%s.function must have a name.",
		                      param);
	if (parameters && !json_is_object(parameters))
		return km_openai_fail(
			error, 400, param, NULL,
			"Tool %zu function has invalid 'parameters' schema: it must be an object.",
			i);
	if (json_is_true(km_openai_get(function, "strict")) ||
	    json_is_true(km_openai_get(tool, "strict")))
		return km_openai_fail(
			error, 400, param, "unsupported",
			"%s: strict tools need constrained output, which is not built.", param);
	return 0;
}

static bool has_tool(const json_t *tools, const char *name)
{
	for (size_t i = 0; i < json_array_size(tools); i++) {
		const json_t *function = json_object_get(json_array_get(tools, i), "function");
		const char *s = json_string_value(json_object_get(function, "name"));

		if (s && !strcmp(s, name))
			return true;
	}
	return false;
}

static int check_named_choice(const json_t *choice, const json_t *tools, km_openai_error *error)
{
	const json_t *function = json_object_get(choice, "function");
	const char *name = json_string_value(json_object_get(function, "name"));

	if (!name)
		return km_openai_fail(
			error, 400, "tool_choice", NULL,
			"tool_choice must be \"none\", \"auto\", \"required\" or name a function.");
	if (!has_tool(tools, name))
		return km_openai_fail(error, 400, "tool_choice", NULL,
		                      "Tool '%.100s' not found in tools list.", name);
	return km_openai_fail(
		error, 400, "tool_choice", "unsupported",
		"tool_choice naming a function needs constrained output, which is not built.");
}

static int take_tools(km_openai_request *r, km_openai_error *error)
{
	const json_t *tools = km_openai_get(r->body, "tools"),
		     *choice = km_openai_get(r->body, "tool_choice");
	const char *word = json_string_value(choice);

	if (tools && !json_is_array(tools))
		return km_openai_fail(error, 400, "tools", NULL, "tools must be a list.");
	for (size_t i = 0; i < json_array_size(tools); i++)
		KM_TRY(check_tool(json_array_get(tools, i), i, error));
	if (word && !strcmp(word, "required")) {
		if (!json_array_size(tools))
			return km_openai_fail(
				error, 400, "tool_choice", NULL,
				"Tools cannot be empty if tool choice is set to required.");
		return km_openai_fail(
			error, 400, "tool_choice", "unsupported",
			"tool_choice \"required\" needs constrained output, which is not built.");
	}
	if (choice && !(word && (!strcmp(word, "none") || !strcmp(word, "auto"))))
		return check_named_choice(choice, tools, error);
	KM_TRY(km_openai_take_bool(r->body, "parallel_tool_calls", &r->parallel_tool_calls, error));
	if (!json_array_size(tools) || (word && !strcmp(word, "none")))
		return 0;
	r->tools = tools;
	r->parse_tools = true;
	return 0;
}

static int check_response_format(const km_openai_request *r, km_openai_error *error)
{
	const json_t *format = km_openai_get(r->body, "response_format");
	const char *type = json_string_value(json_object_get(format, "type"));

	if (!format || (type && !strcmp(type, "text")))
		return 0;
	if (!type)
		return km_openai_fail(error, 400, "response_format", NULL,
		                      "response_format must have a type.");
	if (!strcmp(type, "json_schema") &&
	    !json_is_object(json_object_get(json_object_get(format, "json_schema"), "schema")))
		return km_openai_fail(
			error, 400, "response_format", NULL,
			"response_format of type json_schema must have a json_schema.schema.");
	return km_openai_fail(
		error, 400, "response_format", "unsupported",
		"response_format '%.40s' needs constrained output, which is not built; "
		"only \"text\" is.",
		type);
}

static int check_continue(const km_openai_request *r, km_openai_error *error)
{
	const json_t *last = json_array_get(r->messages, json_array_size(r->messages) - 1);
	const char *role = json_string_value(json_object_get(last, "role"));

	if (!r->continue_final_message)
		return 0;
	if (strcmp(role, "assistant") != 0)
		return km_openai_fail(error, 400, "continue_final_message", NULL,
		                      "continue_final_message needs a last message of the "
		                      "assistant's, not '%.40s'.",
		                      role);
	if (json_is_true(km_openai_get(r->body, "add_generation_prompt")))
		return km_openai_fail(
			error, 400, "continue_final_message", NULL,
			"continue_final_message and add_generation_prompt exclude each other.");
	return 0;
}

static int take_chat_logprobs(km_openai_request *r, km_openai_error *error)
{
	bool wanted = false;
	int top = -1;

	KM_TRY(km_openai_take_bool(r->body, "logprobs", &wanted, error));
	KM_TRY(km_openai_take_int(r->body, "top_logprobs", 0, KM_MAX_LOGPROBS, &top, error));
	if (top > 0 && !wanted)
		return km_openai_fail(error, 400, "top_logprobs", NULL,
		                      "top_logprobs is allowed only with logprobs: true.");
	if (wanted)
		r->logprobs = top < 0 ? 0 : top;
	return 0;
}

static int take_chat(km_openai_request *r, km_openai_error *error)
{
	KM_TRY(km_openai_check_refused(r->body, KM_REFUSED_IN_CHAT, error));
	KM_TRY(take_messages(r, error));
	KM_TRY(take_tools(r, error));
	KM_TRY(check_response_format(r, error));
	KM_TRY(take_thinking(r, error));
	KM_TRY(km_openai_take_bool(r->body, "separate_reasoning", &r->separate_reasoning, error));
	KM_TRY(km_openai_take_bool(r->body, "stream_reasoning", &r->stream_reasoning, error));
	KM_TRY(km_openai_take_bool(r->body, "continue_final_message", &r->continue_final_message,
	                           error));
	KM_TRY(check_continue(r, error));
	r->add_generation_prompt = !r->continue_final_message;
	KM_TRY(km_openai_take_bool(r->body, "add_generation_prompt", &r->add_generation_prompt,
	                           error));
	KM_TRY(take_chat_logprobs(r, error));
	KM_TRY(km_openai_take_int(r->body, "max_tokens", 1, INT32_MAX, &r->max_tokens, error));
	return km_openai_take_int(r->body, "max_completion_tokens", 1, INT32_MAX, &r->max_tokens,
	                          error);
}

/* Completions. */

static int take_prompt_ids(const json_t *ids, int32_t vocab, km_openai_prompt *to,
                           km_openai_error *error)
{
	size_t count = json_array_size(ids);

	to->ids.data = km_xreallocarray(NULL, count + 1, sizeof(*to->ids.data));
	to->ids.cap = count + 1;
	for (size_t i = 0; i < count; i++)
		KM_TRY(take_id(json_array_get(ids, i), "prompt", vocab,
		               &to->ids.data[to->ids.len++], error));
	return 0;
}

static int take_prompt(const json_t *value, int32_t vocab, km_openai_prompt *to,
                       km_openai_error *error)
{
	if (json_is_string(value)) {
		to->text = json_string_value(value);
		to->len = json_string_length(value);
	} else if (json_is_array(value)) {
		KM_TRY(take_prompt_ids(value, vocab, to, error));
	} else {
		return km_openai_fail(error, 400, "prompt", NULL,
		                      "prompt must be a string, token ids, or a list of either.");
	}
	if (!to->len && !to->ids.len)
		return km_openai_fail(error, 400, "prompt", NULL, "prompt cannot be empty.");
	return 0;
}

static int take_prompts(km_openai_request *r, int32_t vocab, km_openai_error *error)
{
	const json_t *prompt = km_openai_get(r->body, "prompt"), *first = json_array_get(prompt, 0);
	bool many = json_is_array(prompt) && (json_is_string(first) || json_is_array(first));
	size_t count = many ? json_array_size(prompt) : 1;

	if (!prompt)
		return km_openai_fail(error, 400, "prompt", NULL, "prompt is missing.");
	if (count * (size_t)r->n > KM_MAX_SAMPLES)
		return km_openai_fail(error, 400, "prompt", NULL,
		                      "%zu prompts with n = %d ask for more than %d answers.",
		                      count, r->n, KM_MAX_SAMPLES);
	r->prompts = km_xcalloc(count, sizeof(*r->prompts));
	r->prompt_count = (int)count;
	for (size_t i = 0; i < count; i++)
		KM_TRY(take_prompt(many ? json_array_get(prompt, i) : prompt, vocab, &r->prompts[i],
		                   error));
	return 0;
}

/* OpenAI's default of 16 tokens, which the peers keep too. */
enum { COMPLETION_TOKENS = 16 };

static int take_completions(km_openai_request *r, int32_t vocab, km_openai_error *error)
{
	KM_TRY(km_openai_check_refused(r->body, KM_REFUSED_IN_COMPLETIONS, error));
	KM_TRY(check_response_format(r, error));
	KM_TRY(take_prompts(r, vocab, error));
	KM_TRY(km_openai_take_bool(r->body, "echo", &r->echo, error));
	KM_TRY(km_openai_take_int(r->body, "logprobs", 0, KM_MAX_LOGPROBS, &r->logprobs, error));
	r->max_tokens = COMPLETION_TOKENS;
	KM_TRY(km_openai_take_int(r->body, "max_tokens", 0, INT32_MAX, &r->max_tokens, error));
	if (!r->max_tokens && !r->echo)
		return km_openai_fail(error, 400, "max_tokens", NULL,
		                      "max_tokens 0 makes sense only with echo: true.");
	if (!r->max_tokens && r->n > 1)
		return km_openai_fail(error, 400, "n", NULL, "n must be 1 when max_tokens is 0.");
	return 0;
}

static int take_all(km_openai_request *r, const km_openai_limits *limits, km_openai_error *error)
{
	KM_TRY(take_model(r, limits, error));
	KM_TRY(km_openai_check_refused(r->body, KM_REFUSED_EVERYWHERE, error));
	KM_TRY(km_openai_take_int(r->body, "n", 1, KM_MAX_SAMPLES, &r->n, error));
	KM_TRY(take_sampling(r, error));
	KM_TRY(take_stop(r, error));
	KM_TRY(take_stop_ids(r, limits->vocab_size, error));
	KM_TRY(take_bias(r, limits->vocab_size, error));
	KM_TRY(km_openai_take_bool(r->body, "ignore_eos", &r->ignore_eos, error));
	KM_TRY(km_openai_take_bool(r->body, "skip_special_tokens", &r->skip_special_tokens, error));
	KM_TRY(take_stream_options(r, error));
	if (r->endpoint == KM_ENDPOINT_CHAT)
		return take_chat(r, error);
	return take_completions(r, limits->vocab_size, error);
}

int km_openai_request_from_json(km_openai_request *request, enum km_endpoint endpoint, json_t *body,
                                const km_openai_limits *limits, km_openai_error *error)
{
	int rc;

	*request = (km_openai_request){
		.endpoint = endpoint, .body = body, .parallel_tool_calls = true, .thinking = -1,
		.separate_reasoning = true, .stream_reasoning = true, .n = 1, .max_tokens = -1,
		.logprobs = -1, .skip_special_tokens = true, .sampling = limits->sampling,
	};
	rc = take_all(request, limits, error);
	if (rc < 0)
		km_openai_request_release(request);
	return rc;
}

int km_openai_request_parse(km_openai_request *request, enum km_endpoint endpoint, const char *body,
                            size_t len, const km_openai_limits *limits, km_openai_error *error)
{
	json_t *json = km_openai_load(body, len, error);

	if (!json)
		return KM_EINVAL;
	return km_openai_request_from_json(request, endpoint, json, limits, error);
}

void km_openai_request_release(km_openai_request *request)
{
	for (int i = 0; i < request->prompt_count; i++)
		km_ids_release(&request->prompts[i].ids);
	free(request->prompts);
	free(request->bias);
	json_decref(request->body);
	memset(request, 0, sizeof(*request));
}

struct outline {
	int depth;
	size_t values; /* all but the first, and empty lists and objects twice */
};

/* Looked at before the parser, which recurses and makes hundreds of bytes of a value of three:
 * brackets and commas outside strings. */
static struct outline json_outline(const char *s, size_t len)
{
	struct outline outline = { 0 };
	int depth = 0;
	bool in_string = false;

	for (size_t i = 0; i < len; i++) {
		if (in_string) {
			if (s[i] == '\\')
				i++;
			else if (s[i] == '"')
				in_string = false;
		} else if (s[i] == '"') {
			in_string = true;
		} else if (s[i] == '{' || s[i] == '[') {
			outline.values++;
			outline.depth = ++depth > outline.depth ? depth : outline.depth;
		} else if (s[i] == '}' || s[i] == ']') {
			depth--;
		} else if (s[i] == ',') {
			outline.values++;
		}
	}
	return outline;
}

static void fail_parse(const json_error_t *where, km_openai_error *error)
{
	switch (json_error_code(where)) {
	case json_error_null_character:
		/* Not cut at: no model was taught one, and half the ways that a string goes through from here
		 * on end at it. */
		km_openai_fail(
			error, 400, NULL, "invalid_json",
			"A string of the body holds \\u0000 (line %d column %d), which is not "
			"accepted.",
			where->line, where->column);
		return;
	case json_error_numeric_overflow:
		km_openai_fail(
			error, 400, NULL, "invalid_json",
			"The body holds a number that is too large to be read (line %d column %d): "
			"whole numbers go from -9223372036854775808 to 9223372036854775807, others "
			"to 1.7976931348623157e308.",
			where->line, where->column);
		return;
	default:
		km_openai_fail(error, 400, NULL, "invalid_json",
		               "The body is not JSON: line %d column %d: %s.", where->line,
		               where->column, where->text);
	}
}

json_t *km_openai_load(const char *body, size_t len, km_openai_error *error)
{
	json_error_t where;
	struct outline outline;
	json_t *json;
	size_t bad;

	if (!km_utf8_valid(body, len, &bad)) {
		km_openai_fail(error, 400, NULL, "invalid_json", "The body is not UTF-8: byte %zu.",
		               bad);
		return NULL;
	}
	outline = json_outline(body, len);
	if (outline.depth > KM_MAX_JSON_DEPTH) {
		km_openai_fail(error, 400, NULL, "invalid_json",
		               "The body is nested deeper than %d levels.", KM_MAX_JSON_DEPTH);
		return NULL;
	}
	if (outline.values > KM_MAX_JSON_VALUES) {
		km_openai_fail(error, 400, NULL, "invalid_json",
		               "The body holds more than %d values.", KM_MAX_JSON_VALUES);
		return NULL;
	}
	json = json_loadb(body, len, 0, &where);
	if (!json) {
		fail_parse(&where, error);
		return NULL;
	}
	if (!json_is_object(json)) {
		km_openai_fail(error, 400, NULL, "invalid_json", "The body must be a JSON object.");
		json_decref(json);
		return NULL;
	}
	return json;
}

int km_openai_sampling_defaults(km_sampling *sampling, const char *model_dir, km_err *err)
{
	char *path = km_xasprintf("%s/generation_config.json", model_dir);
	json_t *json;
	int rc = km_textfile_read_json(&json, path, err);
	km_openai_request r = { .body = json, .sampling = *sampling };
	km_openai_error error;

	if (rc == KM_ENOTFOUND)
		rc = 0; /* the caller's stay */
	else if (!rc && take_sampling(&r, &error) < 0)
		rc = km_fail(err, KM_EFORMAT, "%s: %s", path, error.message);
	if (!rc)
		*sampling = r.sampling;
	json_decref(json);
	free(path);
	return rc;
}
