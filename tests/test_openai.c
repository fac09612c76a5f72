/* wire/: request validation, and answers from events, whole and streamed. */
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
#include "wire/json_text.h"
#include "wire/openai_request.h"

static const char *const names[] = { "kimi-test", "other" };

static km_openai_limits limits(void)
{
	return (km_openai_limits){
		.vocab_size = 4096, .models = names, .model_count = 2,
		.sampling = { .temperature = 1, .top_p = 1, .top_k = -1, .repetition_penalty = 1 },
	};
}

static int parse(km_openai_request *r, enum km_endpoint endpoint, const char *body,
                 km_openai_error *error)
{
	km_openai_limits l = limits();

	return km_openai_request_parse(r, endpoint, body, strlen(body), &l, error);
}

/* Members after the messages. */
static int parse_chat(km_openai_request *r, const char *rest, km_openai_error *error)
{
	char *body = km_xasprintf("{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]%s}",
	                          rest);
	int rc = parse(r, KM_ENDPOINT_CHAT, body, error);

	free(body);
	return rc;
}

static void defaults_and_values_are_read(void **state)
{
	km_openai_request r;
	km_openai_error e;

	(void)state;
	assert_int_equal(parse_chat(&r, "", &e), 0);
	assert_int_equal(r.n, 1);
	assert_int_equal(r.max_tokens, -1);
	assert_int_equal(r.logprobs, -1);
	assert_int_equal(r.thinking, -1);
	assert_true(r.add_generation_prompt && r.separate_reasoning && r.stream_reasoning);
	assert_false(r.stream || r.parse_tools);
	km_openai_request_release(&r);

	assert_int_equal(
		parse_chat(
			&r,
			",\"model\":\"other\",\"stream\":true,\"stream_options\":{\"include_"
	                "usage\":true},"
			"\"max_tokens\":5,\"max_completion_tokens\":7.0,\"temperature\":0,\"top_"
	                "p\":0.5,\"top_k\":3,"
			"\"min_p\":0.1,\"repetition_penalty\":1.5,\"frequency_penalty\":-1,"
	                "\"presence_penalty\":2,"
			"\"seed\":-3,\"stop\":[\"a\",\"bc\"],\"stop_token_ids\":[5],\"n\":2,"
	                "\"logprobs\":true,"
			"\"top_logprobs\":4,\"logit_bias\":{\"7\":-100,\"8\":1.5},\"ignore_eos\":"
	                "true,"
			"\"skip_special_tokens\":false,\"user\":\"u\",\"unheard_of\":{\"x\":[1]}",
			&e),
		0);
	assert_int_equal(r.max_tokens, 7);
	assert_true(r.sampling.temperature == 0 && r.sampling.top_p == 0.5 &&
	            r.sampling.top_k == 3);
	assert_true(r.sampling.has_seed && r.sampling.seed == (uint64_t)-3);
	assert_int_equal(r.stop_count, 2);
	assert_string_equal(r.stop[1], "bc");
	assert_int_equal(r.stop_ids[0], 5);
	assert_int_equal(r.logprobs, 4);
	assert_int_equal(r.sampling.bias_count, 2);
	assert_true(r.bias[0].id == 7 && r.bias[0].bias == -100.0f);
	assert_true(r.include_usage && r.stream && r.ignore_eos && !r.skip_special_tokens);
	km_openai_request_release(&r);
}

/* null is how clients write "not given", also for what would be refused. */
static void null_is_absent(void **state)
{
	km_openai_request r;
	km_openai_error e;

	(void)state;
	assert_int_equal(parse_chat(&r,
	                            ",\"model\":null,\"stream\":null,\"temperature\":null,\"stop\":"
	                            "null,\"tools\":null,"
	                            "\"tool_choice\":null,\"response_format\":null,\"max_tokens\":"
	                            "null,\"logit_bias\":null,"
	                            "\"functions\":null,\"best_of\":null,\"chat_template_kwargs\":"
	                            "null,\"seed\":null",
	                            &e),
	                 0);
	km_openai_request_release(&r);
}

static void wrong_fields_are_named(void **state)
{
	static const struct {
		const char *rest, *param;
		int status;
	} cases[] = {
		{ ",\"model\":\"gpt-4\"", "model", 404 },
		{ ",\"model\":4", "model", 400 },
		{ ",\"temperature\":\"hot\"", "temperature", 400 },
		{ ",\"temperature\":2.1", "temperature", 400 },
		{ ",\"top_p\":0", "top_p", 400 },
		{ ",\"top_k\":-2", "top_k", 400 },
		{ ",\"top_k\":1.5", "top_k", 400 },
		{ ",\"min_p\":-0.1", "min_p", 400 },
		{ ",\"repetition_penalty\":0", "repetition_penalty", 400 },
		{ ",\"frequency_penalty\":3", "frequency_penalty", 400 },
		{ ",\"presence_penalty\":-3", "presence_penalty", 400 },
		{ ",\"seed\":\"x\"", "seed", 400 },
		{ ",\"seed\":1.5", "seed", 400 },
		{ ",\"n\":0", "n", 400 },
		{ ",\"n\":129", "n", 400 },
		{ ",\"max_tokens\":0", "max_tokens", 400 },
		{ ",\"max_tokens\":-1", "max_tokens", 400 },
		{ ",\"max_completion_tokens\":\"9\"", "max_completion_tokens", 400 },
		{ ",\"stop\":[\"\"]", "stop", 400 },
		{ ",\"stop\":5", "stop", 400 },
		{ ",\"stop\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]", "stop", 400 },
		{ ",\"stop_token_ids\":[4096]", "stop_token_ids", 400 },
		{ ",\"stop_token_ids\":{}", "stop_token_ids", 400 },
		{ ",\"logit_bias\":{\"x\":1}", "logit_bias", 400 },
		{ ",\"logit_bias\":{\"5\":101}", "logit_bias", 400 },
		{ ",\"logit_bias\":[]", "logit_bias", 400 },
		{ ",\"logprobs\":5", "logprobs", 400 },
		{ ",\"top_logprobs\":2", "top_logprobs", 400 },
		{ ",\"logprobs\":true,\"top_logprobs\":21", "top_logprobs", 400 },
		{ ",\"stream\":\"yes\"", "stream", 400 },
		{ ",\"stream_options\":{\"include_usage\":true}", "stream_options", 400 },
		{ ",\"stream\":true,\"stream_options\":5", "stream_options", 400 },
		{ ",\"tools\":{}", "tools", 400 },
		{ ",\"tools\":[{\"type\":\"retrieval\"}]", "tools[0]", 400 },
		{ ",\"tools\":[{\"type\":\"function\",\"function\":{}}]", "tools[0]", 400 },
		{ ",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":["
		  "]}}]",
		  "tools[0]", 400 },
		{ ",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"strict\":true}"
		  "}]",
		  "tools[0]", 400 },
		{ ",\"tool_choice\":\"required\"", "tool_choice", 400 },
		{ ",\"tool_choice\":\"sometimes\"", "tool_choice", 400 },
		{ ",\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"g\"}}",
		  "tool_choice", 400 },
		{ ",\"response_format\":{\"type\":\"json_object\"}", "response_format", 400 },
		{ ",\"response_format\":{\"type\":\"json_schema\"}", "response_format", 400 },
		{ ",\"response_format\":{}", "response_format", 400 },
		{ ",\"best_of\":2", "best_of", 400 },
		{ ",\"guided_json\":{}", "guided_json", 400 },
		{ ",\"min_tokens\":3", "min_tokens", 400 },
		{ ",\"functions\":[]", "functions", 400 },
		{ ",\"echo\":true", "echo", 400 },
		{ ",\"modalities\":[\"audio\"]", "modalities", 400 },
		{ ",\"chat_template_kwargs\":{\"thinking\":\"maybe\"}",
		  "chat_template_kwargs.thinking", 400 },
		{ ",\"thinking\":{\"type\":\"on\"}", "thinking", 400 },
		{ ",\"continue_final_message\":true", "continue_final_message", 400 },
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		km_openai_request r;
		km_openai_error e = { 0 };

		if (parse_chat(&r, cases[i].rest, &e) >= 0)
			fail_msg("accepted: %s", cases[i].rest);
		assert_string_equal(e.param, cases[i].param);
		assert_int_equal(e.status, cases[i].status);
		assert_true(strlen(e.message) > 10);
	}
}

/* A tool that is there is refused as not built, one that is not as not there. */
static void forced_tools_are_looked_up(void **state)
{
	static const char rest[] =
		",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}],"
		"\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"%s\"}}";
	km_openai_request r;
	km_openai_error e;

	(void)state;
	for (int i = 0; i < 2; i++) {
		char *body = km_xasprintf(rest, i ? "g" : "f");

		assert_true(parse_chat(&r, body, &e) < 0);
		assert_non_null(strstr(e.message, i ? "Tool 'g' not found in tools list."
		                                    : "constrained output, which is not built"));
		free(body);
	}
}

static void wrong_messages_are_named(void **state)
{
	static const struct {
		const char *body, *param, *words;
	} cases[] = {
		{ "{}", "messages", "messages must be a list" },
		{ "{\"messages\":[]}", "messages", "Messages cannot be empty." },
		{ "{\"messages\":[5]}", "messages[0]", "role" },
		{ "{\"messages\":[{\"role\":\"user\"}]}", "messages[0]", "no content" },
		{ "{\"messages\":[{\"role\":\"user\",\"content\":5}]}", "messages[0]",
		  "string or a list" },
		{ "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_"
		  "url\":{}}]}]}",
		  "messages[0].content", "image_url" },
		{ "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]}",
		  "messages[0].content", "text" },
		{ "{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"id\":\"a\"}]}]}",
		  "messages[0].tool_calls", "function" },
		{ "[]", "", "object" },
		{ "{\"messages\":", "", "not JSON" },
		{ "{\"messages\":\"\xff\"}", "", "UTF-8" },
		{ "{\"messages\":\"a\\u0000b\"}", "", "holds \\u0000 (line 1 column" },
		{ "{\"seed\":18446744073709551615}", "", "too large to be read (line 1 column" },
		{ "{\"x\":[-9223372036854775809]}", "", "go from -9223372036854775808" },
		{ "{\"x\":1e999}", "", "others to 1.7976931348623157e308" },
		{ "", "", "not JSON" },
	};
	char deep[400];
	km_openai_request r;
	km_openai_error e;

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		assert_true(parse(&r, KM_ENDPOINT_CHAT, cases[i].body, &e) < 0);
		assert_string_equal(e.param, cases[i].param);
		assert_non_null(strstr(e.message, cases[i].words));
		assert_int_equal(e.status, 400);
	}
	memset(deep, '[', sizeof(deep) - 1);
	deep[sizeof(deep) - 1] = '\0';
	assert_true(parse(&r, KM_ENDPOINT_CHAT, deep, &e) < 0);
	assert_non_null(strstr(e.message, "deeper"));
}

/* `count` times `value`, in a list that is ignored. */
static int parse_list(const char *value, size_t count, km_openai_error *error)
{
	km_buf body = KM_BUF_INIT;
	km_openai_request r;
	int rc;

	km_buf_puts(&body, "{\"prompt\":\"Hi\",\"x\":[");
	for (size_t i = 0; i < count; i++)
		km_buf_printf(&body, "%s%s", i ? "," : "", value);
	km_buf_puts(&body, "]}");
	rc = parse(&r, KM_ENDPOINT_COMPLETIONS, body.data, error);
	if (!rc)
		km_openai_request_release(&r);
	km_buf_release(&body);
	return rc;
}

static void too_many_values_are_refused(void **state)
{
	km_openai_error e;

	(void)state;
	assert_int_equal(parse_list("163585", 500000, &e), 0);
	assert_int_equal(parse_list("\"[,{\\\",[\"", 500000, &e), 0); /* strings hold no values */
	assert_true(parse_list("{}", KM_MAX_JSON_VALUES / 2 + 1, &e) < 0);
	assert_int_equal(e.status, 400);
	assert_non_null(strstr(e.message, "more than 2000000 values"));
	assert_true(parse_list("1", KM_MAX_JSON_VALUES + 1, &e) < 0);
	assert_non_null(strstr(e.message, "more than 2000000 values"));
}

static int thinking_of(const char *rest)
{
	km_openai_request r;
	km_openai_error e;
	int thinking;

	assert_int_equal(parse_chat(&r, rest, &e), 0);
	thinking = r.thinking;
	km_openai_request_release(&r);
	return thinking;
}

static void thinking_has_many_spellings(void **state)
{
	(void)state;
	assert_int_equal(thinking_of(",\"chat_template_kwargs\":{\"thinking\":false}"), 0);
	assert_int_equal(thinking_of(",\"chat_template_kwargs\":{\"enable_thinking\":false}"), 0);
	assert_int_equal(thinking_of(",\"chat_template_kwargs\":{\"thinking\":true,"
	                             "\"enable_thinking\":false}"), 1);
	assert_int_equal(thinking_of(",\"chat_template_kwargs\":{\"thinking\":\"false\"}"), 0);
	assert_int_equal(thinking_of(",\"chat_template_kwargs\":{\"thinking\":0}"), 0);
	assert_int_equal(thinking_of(",\"thinking\":{\"type\":\"disabled\"}"), 0);
	assert_int_equal(thinking_of(",\"thinking\":{\"type\":\"enabled\"}"), 1);
	assert_int_equal(thinking_of(",\"enable_thinking\":false"), 0);
}

static void tools_and_history_are_counted(void **state)
{
	static const char body[] = "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"},"
				   "{\"role\":\"assistant\",\"content\":null,\"tool_calls\":["
				   "{\"id\":\"functions.f:0\",\"type\":\"function\",\"function\":{"
	                           "\"name\":\"f\",\"arguments\":\"{}\"}},"
				   "{\"id\":\"functions.f:1\",\"type\":\"function\",\"function\":{"
	                           "\"name\":\"f\",\"arguments\":\"{}\"}}]},"
				   "{\"role\":\"tool\",\"tool_call_id\":\"functions.f:0\","
	                           "\"content\":[{\"type\":\"text\","
				   "\"text\":\"r\"}]}],\"tool_choice\":\"%s\",\"tools\":[{\"type\":"
	                           "\"function\",\"function\":"
				   "{\"name\":\"f\",\"parameters\":{\"type\":\"object\"}}}]}";
	char text[1024];
	km_openai_request r;
	km_openai_error e;

	(void)state;
	snprintf(text, sizeof(text), body, "auto");
	assert_int_equal(parse(&r, KM_ENDPOINT_CHAT, text, &e), 0);
	assert_int_equal(r.history_tool_calls, 2);
	assert_true(r.parse_tools && r.tools);
	km_openai_request_release(&r);
	snprintf(text, sizeof(text), body, "none");
	assert_int_equal(parse(&r, KM_ENDPOINT_CHAT, text, &e), 0);
	assert_false(r.parse_tools);
	assert_null(r.tools);
	km_openai_request_release(&r);
	snprintf(text, sizeof(text), body, "required");
	assert_true(parse(&r, KM_ENDPOINT_CHAT, text, &e) < 0);
	assert_string_equal(e.code, "unsupported");
}

static void completions_take_four_kinds_of_prompt(void **state)
{
	km_openai_request r;
	km_openai_error e;

	(void)state;
	assert_int_equal(parse(&r, KM_ENDPOINT_COMPLETIONS, "{\"prompt\":\"ab\"}", &e), 0);
	assert_int_equal(r.max_tokens, 16);
	assert_string_equal(r.prompts[0].text, "ab");
	km_openai_request_release(&r);
	assert_int_equal(parse(&r, KM_ENDPOINT_COMPLETIONS, "{\"prompt\":[1,2,3]}", &e), 0);
	assert_int_equal(r.prompt_count, 1);
	assert_int_equal(r.prompts[0].ids.len, 3);
	km_openai_request_release(&r);
	assert_int_equal(parse(&r, KM_ENDPOINT_COMPLETIONS,
	                       "{\"prompt\":[\"a\",\"b\"],\"n\":2,\"echo\":true,\"logprobs\":0,"
	                       "\"max_tokens\":3,\"best_of\":1,\"suffix\":\"\"}", &e), 0);
	assert_int_equal(r.prompt_count, 2);
	assert_int_equal(r.logprobs, 0);
	km_openai_request_release(&r);
	assert_int_equal(parse(&r, KM_ENDPOINT_COMPLETIONS,
	                       "{\"prompt\":[[1],[2,3]],\"max_tokens\":0,\"echo\":true}", &e), 0);
	assert_int_equal(r.prompts[1].ids.data[1], 3);
	km_openai_request_release(&r);
	assert_true(parse(&r, KM_ENDPOINT_COMPLETIONS, "{\"prompt\":[[1],\"x\"],\"suffix\":\"y\"}",
	                  &e) < 0);
	assert_string_equal(e.param, "suffix");
	assert_true(parse(&r, KM_ENDPOINT_COMPLETIONS, "{\"prompt\":[[1],[99999]]}", &e) < 0);
	assert_string_equal(e.param, "prompt");
	assert_true(parse(&r, KM_ENDPOINT_COMPLETIONS, "{\"prompt\":\"\"}", &e) < 0);
	assert_true(parse(&r, KM_ENDPOINT_COMPLETIONS, "{\"prompt\":\"x\",\"max_tokens\":0}", &e) <
	            0);
	assert_true(parse(&r, KM_ENDPOINT_COMPLETIONS, "{\"prompt\":\"x\",\"best_of\":3}", &e) < 0);
	assert_true(parse(&r, KM_ENDPOINT_COMPLETIONS, "{}", &e) < 0);
}

static void errors_are_nested(void **state)
{
	km_openai_error e;
	km_buf out = KM_BUF_INIT;
	json_t *root, *json;

	(void)state;
	km_openai_fail(&e, 400, "stop", NULL, "a \"quoted\"\nline");
	km_openai_error_json(&e, &out);
	root = json_loadb(out.data, out.len, 0, NULL);
	json = json_object_get(root, "error");
	assert_string_equal(json_string_value(json_object_get(json, "message")),
	                    "a \"quoted\"\nline");
	assert_string_equal(json_string_value(json_object_get(json, "type")),
	                    "invalid_request_error");
	assert_string_equal(json_string_value(json_object_get(json, "param")), "stop");
	assert_int_equal(json_integer_value(json_object_get(json, "code")), 400);
	km_buf_release(&out);
	json_decref(root);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(defaults_and_values_are_read),
		cmocka_unit_test(null_is_absent),
		cmocka_unit_test(wrong_fields_are_named),
		cmocka_unit_test(forced_tools_are_looked_up),
		cmocka_unit_test(wrong_messages_are_named),
		cmocka_unit_test(too_many_values_are_refused),
		cmocka_unit_test(thinking_has_many_spellings),
		cmocka_unit_test(tools_and_history_are_counted),
		cmocka_unit_test(completions_take_four_kinds_of_prompt),
		cmocka_unit_test(errors_are_nested),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
