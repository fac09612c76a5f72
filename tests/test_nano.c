/*
 * tests/data/nano: what kimi-nano was trained on is what serving gives it. prompts.jsonl holds conversations
 * with the ids that scripts/train-nano made of them; the template and the tokenizer here must make the same.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "text/chat.h"
#include "text/tokenizer.h"

#define MODEL "tests/data/nano"

static void check_prompt(const km_tokenizer *tokenizer, const json_t *row, int line)
{
	const json_t *expected = json_object_get(row, "ids");
	km_chat_options options;
	km_chat chat;
	km_ids ids = { 0 };
	km_err err = { 0 };

	km_chat_options_init(&options, KM_CHAT_K25);
	options.thinking = json_is_true(json_object_get(row, "thinking"));
	km_chat_init(&chat);
	if (km_chat_render(&chat, &options, json_object_get(row, "messages"),
			   json_object_get(row, "tools"), &err) ||
	    km_chat_encode(&chat, tokenizer, &ids, &err))
		fail_msg("line %d: %s", line, err.msg);
	if (ids.len != json_array_size(expected))
		fail_msg("line %d: %zu ids, trained on %zu:\n%s", line, ids.len,
			 json_array_size(expected), chat.text.data);
	for (size_t i = 0; i < ids.len; i++)
		if (ids.data[i] != json_integer_value(json_array_get(expected, i)))
			fail_msg("line %d: id %zu is %d", line, i, ids.data[i]);
	km_ids_release(&ids);
	km_chat_release(&chat);
}

static void prompts_are_what_training_saw(void **state)
{
	km_tokenizer *tokenizer;
	km_err err = { 0 };
	FILE *file = fopen(MODEL "/prompts.jsonl", "r");
	json_t *row;
	int lines = 0;

	(void)state;
	assert_non_null(file);
	if (km_tokenizer_open(&tokenizer, MODEL, &err))
		fail_msg("%s", err.msg);
	while ((row = json_loadf(file, JSON_DISABLE_EOF_CHECK, NULL))) {
		check_prompt(tokenizer, row, ++lines);
		json_decref(row);
	}
	assert_int_equal(lines, 80);
	fclose(file);
	km_tokenizer_close(tokenizer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(prompts_are_what_training_saw),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
