/*
 * tests/data/nano: what kimi-nano was trained on is what serving gives it. prompts.jsonl holds conversations
 * with the ids that scripts/train-nano made of them; the template and the tokenizer here must make the same.
 * transformers.json holds log-probabilities by Hugging Face transformers (scripts/check-nano-transformers); the
 * forward pass here must give the same within BOUND. A mistake that a trained model shows where random weights
 * may not, such as a wrong selection of experts, is far beyond it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "support/forward_case.h"
#include "text/chat.h"
#include "text/tokenizer.h"

#define MODEL "tests/data/nano"
#define BOUND 2e-4 /* of a log-probability; rounding alone makes 3e-5 */

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

/* All documents, prefilled whole, the first also by the decode form from its tenth token on. */
static fwd_difference compare_documents(const char *isa, int *tokens)
{
	km_model_options options = fwd_options(isa, KM_KV_F32);
	fwd_opened o = { .golden = json_load_file(MODEL "/transformers.json", 0, NULL) };
	fwd_difference d = { 0 };
	km_err err = { 0 };

	assert_non_null(o.golden);
	if (km_model_open(&o.model, MODEL, &options, &err) < 0)
		fail_msg("%s", err.msg);
	o.vocab = km_model_config(o.model)->vocab_size;
	*tokens = 0;
	for (int p = 0; p < (int)json_array_size(json_object_get(o.golden, "prompts")); p++) {
		fwd_sequence *q = fwd_score_whole(&o, p);

		fwd_compare(&o, p, q, &d);
		*tokens += q->len;
		fwd_drop(q);
		if (p > 0)
			continue;
		q = fwd_score(&o, p, 10, 1, true);
		fwd_compare(&o, p, q, &d);
		fwd_drop(q);
	}
	km_model_close(o.model);
	json_decref(o.golden);
	return d;
}

static void log_probabilities_are_those_of_transformers(void **state)
{
	static const char *const forms[] = { NULL, "plain" };

	(void)state;
	for (int i = 0; i < 2; i++) {
		int tokens;
		fwd_difference d = compare_documents(forms[i], &tokens);

		print_message("figure: kimi-nano against transformers, %s form: %d tokens, largest difference of a "
		              "log-probability %.2g (bound %g), wrong top tokens %d\n",
		              forms[i] ? forms[i] : "the best", tokens, d.max, BOUND, d.wrong_top);
		assert_true(tokens > 800 && d.count > 2 * tokens - 20 && d.max <= BOUND);
		assert_int_equal(d.wrong_top, 0);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(prompts_are_what_training_saw),
		cmocka_unit_test(log_probabilities_are_those_of_transformers),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
