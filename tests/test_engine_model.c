/* The engine over the real model: synthesized tiny checkpoints, from prompt to text. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "engine/engine_state.h"
#include "model/synthesize.h"
#include "support/count_malloc.h"
#include "support/engine_client.h"
#include "support/fake_checkpoint.h"

static const char *const names[] = { "tiny-k2-thinking", "tiny-k2" };
enum { MODELS = 2, LOAD = 64, LONGEST = 60 };
static char *dirs[MODELS];

static int make_checkpoints(void **state)
{
	(void)state;
	for (int i = 0; i < MODELS; i++) {
		char *path = km_xasprintf("configs/models/%s.json", names[i]);
		km_synth_options options = { .config_path = path, .seed = 5, .quiet = true };
		km_synth_result result;
		km_err err;

		dirs[i] = temp_dir();
		options.out_dir = dirs[i];
		if (km_synthesize(&options, &result, &err) < 0) {
			fprintf(stderr, "%s\n", err.msg);
			return -1;
		}
		free(path);
	}
	return 0;
}

static int remove_checkpoints(void **state)
{
	(void)state;
	for (int i = 0; i < MODELS; i++)
		remove_dir(dirs[i]);
	return 0;
}

static void small_options(km_engine_options *options, int model)
{
	km_engine_options_init(options);
	options->model_dir = dirs[model];
	options->context_length = 256;
	options->max_total_tokens = 8192;
	options->max_running_requests = 16;
	options->chunked_prefill_size = 32;
	options->threads = 2;
}

static km_engine *open_engine(const km_engine_options *options)
{
	km_engine *engine;
	km_err err;

	if (km_engine_open(&engine, options, &err) < 0)
		fail_msg("%s", err.msg);
	return engine;
}

static void text_of(int32_t *ids, int count, uint64_t seed)
{
	for (int i = 0; i < count; i++)
		ids[i] = (int32_t)(km_rng_u64(seed, (uint64_t)i) % 1000);
}

static void make_request(km_request_options *options, int32_t *prompt, uint64_t i)
{
	uint64_t r = km_rng_u64(3, i);
	int len = 1 + (int)(r % LONGEST), shared = (int)((r >> 8) % 60);

	text_of(prompt, LONGEST, 100 + i);
	text_of(prompt, shared < len ? shared : len, (r >> 16) % 3);
	client_options(options, prompt, len);
	options->max_tokens = 1 + (int)((r >> 20) % 16);
	options->sampling.temperature = (r >> 28) % 3 ? 0.5 + (double)((r >> 30) % 3) / 2 : 0;
	options->sampling.top_p = (r >> 32) % 2 ? 0.95 : 1;
	options->sampling.presence_penalty = (r >> 34) % 3 ? 0 : 0.5;
	options->sampling.has_seed = (r >> 36) % 2;
	options->sampling.seed = r;
	options->logprobs = (r >> 38) % 2 ? 3 : -1;
	options->prompt_logprobs = options->logprobs > 0 && (r >> 40) % 2;
}

static client *ask(km_engine *engine, km_request_options *options)
{
	client *c = client_new(engine);

	assert_int_equal(client_submit(c, options, NULL), 0);
	client_wait(c);
	return c;
}

static void same_answer(const client *a, const client *b, int sample_a, int sample_b)
{
	const client_sample *x = &a->samples[sample_a], *y = &b->samples[sample_b];

	assert_int_equal(x->count, y->count);
	assert_memory_equal(x->ids, y->ids, (size_t)x->count * sizeof(x->ids[0]));
	assert_memory_equal(x->logprobs, y->logprobs, (size_t)x->count * sizeof(x->logprobs[0]));
	assert_int_equal(x->finish, y->finish);
	assert_int_equal(x->text.len, y->text.len);
	if (x->text.len)
		assert_memory_equal(x->text.data, y->text.data, x->text.len);
}

/* 64 requests at once, a third of them cancelled midway, with and without the prefix cache, in two
 * cuts of the prompt: to the last bit of every log-probability what each gives alone. */
static void deterministic_load(int model, enum km_kv_dtype kv, int count)
{
	static int32_t prompts[LOAD][LONGEST];
	km_request_options requests[LOAD];
	client *clients[LOAD], *want[LOAD];
	km_engine_options options;
	km_engine *engine;
	km_engine_stats stats;

	small_options(&options, model);
	options.deterministic = true;
	options.disable_prefix_cache = true;
	options.kv_dtype = kv;
	options.chunked_prefill_size = 128;
	options.page_size = 8;
	engine = open_engine(&options);
	for (int i = 0; i < count; i++) {
		make_request(&requests[i], prompts[i], (uint64_t)i);
		want[i] = ask(engine, &requests[i]);
	}
	km_engine_close(engine);
	small_options(&options, model);
	options.deterministic = true;
	options.kv_dtype = kv;
	options.max_total_tokens = 1024; /* admission has to wait */
	options.chunked_prefill_size = 13;
	engine = open_engine(&options);
	for (int i = 0; i < count; i++) {
		clients[i] = client_new(engine);
		clients[i]->cancel_at = i % 3 == 2 ? 1 + i % 5 : 0;
		assert_int_equal(client_submit(clients[i], &requests[i], NULL), 0);
	}
	for (int i = 0; i < count; i++) {
		client_wait(clients[i]);
		if (clients[i]->samples[0].finish == KM_FINISH_ABORT) {
			assert_int_equal(i % 3, 2);
		} else {
			same_answer(clients[i], want[i], 0, 0);
			assert_int_equal(clients[i]->scored, want[i]->scored);
			assert_memory_equal(clients[i]->scores, want[i]->scores,
			                    sizeof(want[i]->scores));
		}
		client_free(clients[i]);
		client_free(want[i]);
	}
	km_engine_stats_get(engine, &stats);
	assert_int_equal(stats.running + stats.waiting, 0);
	assert_int_equal(stats.pages_used, 0);
	assert_int_equal(stats.preemptions, 0);
	assert_true(stats.prefix_hits > 0);
	km_engine_close(engine);
}

static void deterministic_int4_bf16_kv(void **state)
{
	(void)state;
	deterministic_load(0, KM_KV_BF16, LOAD);
}

static void deterministic_fp8_fp8_kv(void **state)
{
	(void)state;
	deterministic_load(1, KM_KV_FP8, LOAD / 3);
}

static void prefix_samples_and_text(void **state)
{
	int32_t prompt[100];
	km_engine_options options;
	km_request_options request;
	km_engine *engine;
	client *first, *again, *many;
	const km_tokenizer *tokenizer;
	km_buf text = KM_BUF_INIT;

	(void)state;
	small_options(&options, 0);
	options.deterministic = true;
	engine = open_engine(&options);
	tokenizer = km_engine_tokenizer(engine);
	assert_int_equal(km_engine_context_length(engine), 256);
	text_of(prompt, 100, 8);
	client_options(&request, prompt, 100);
	request.ignore_eos = true;
	request.sampling.has_seed = true;
	request.sampling.seed = 40;
	first = ask(engine, &request);
	again = ask(engine, &request);
	assert_int_equal(km_request_cached_tokens(first->request), 0);
	assert_int_equal(km_request_cached_tokens(again->request), 96);
	same_answer(first, again, 0, 0);
	for (int i = 0; i < first->samples[0].count; i++) {
		size_t len;
		const char *bytes = km_tokenizer_bytes(tokenizer, first->samples[0].ids[i], &len);

		if (bytes)
			km_buf_append(&text, bytes, len);
	}
	assert_int_equal(text.len, first->samples[0].text.len);
	assert_memory_equal(text.data, first->samples[0].text.data, text.len);
	request.n = 4;
	request.sampling.seed = 38; /* 38, 39, 40, 41 */
	many = ask(engine, &request);
	same_answer(first, many, 0, 2);
	client_free(first);
	client_free(again);
	client_free(many);
	km_buf_release(&text);
	km_engine_close(engine);
}

/* Not deterministic, a KV cache for a few: everybody still gets all tokens that were asked for. */
static void preemption_loses_nothing(void **state)
{
	int32_t prompts[12][40];
	km_engine_options options;
	km_request_options request;
	km_engine *engine;
	client *clients[12];
	km_engine_stats stats;

	(void)state;
	small_options(&options, 0);
	options.max_total_tokens = options.context_length = 256;
	engine = open_engine(&options);
	for (int i = 0; i < 12; i++) {
		text_of(prompts[i], 40, 50 + (uint64_t)i);
		client_options(&request, prompts[i], 40);
		request.ignore_eos = true;
		request.max_tokens = 60;
		clients[i] = client_new(engine);
		assert_int_equal(client_submit(clients[i], &request, NULL), 0);
	}
	for (int i = 0; i < 12; i++) {
		client_wait(clients[i]);
		assert_int_equal(clients[i]->samples[0].finish, KM_FINISH_LENGTH);
		assert_int_equal(clients[i]->samples[0].count, 60);
		client_free(clients[i]);
	}
	km_engine_stats_get(engine, &stats);
	assert_true(stats.preemptions > 0);
	assert_int_equal(stats.pages_used, 0);
	assert_int_equal(stats.generation_tokens, 12 * 60);
	km_engine_close(engine);
}

static long allocations_at[2];

static void watch_allocations(client *c, const km_event *event)
{
	if (event->sample == 0 && c->samples[0].count == 10)
		allocations_at[0] = atomic_load(&allocations);
	if (event->sample == 0 && c->samples[0].count == 90)
		allocations_at[1] = atomic_load(&allocations);
}

static void a_decode_step_allocates_nothing(void **state)
{
	int32_t prompt[40];
	km_engine_options options;
	km_request_options request;
	km_engine *engine;
	client *c;

	(void)state;
	if (!can_count_allocations())
		skip();
	text_of(prompt, 40, 1);
	for (int n = 1; n <= 3; n++) {
		small_options(&options, 0);
		options.threads = n == 2 ? 0 : n;
		engine = open_engine(&options);
		client_options(&request, prompt, 40);
		request.n = n;
		request.max_tokens = 100;
		request.ignore_eos = true;
		request.logprobs = 5;
		c = client_new(engine);
		for (int i = 0; i < n; i++)
			km_buf_reserve(&c->samples[i].text, 1 << 16);
		c->spy = watch_allocations;
		allocations_at[1] = -1;
		assert_int_equal(client_submit(c, &request, NULL), 0);
		client_wait(c);
		assert_int_equal(c->samples[0].count, 100);
		assert_true(allocations_at[0] > 0);
		assert_int_equal(allocations_at[1] - allocations_at[0], 0);
		client_free(c);
		km_engine_close(engine);
	}
}

static void impossible_engines_are_refused(void **state)
{
	km_engine_options options;
	km_engine *engine;
	km_model_plan plan;
	km_err err;
	km_buf words = KM_BUF_INIT;

	(void)state;
#define REFUSED(change, code, word)                                                                \
	do {                                                                                       \
		small_options(&options, 0);                                                        \
		change;                                                                            \
		assert_int_equal(km_engine_open(&engine, &options, &err), code);                   \
		assert_null(engine);                                                               \
		assert_non_null(strstr(err.msg, word));                                            \
	} while (0)
	REFUSED(options.model_dir = "/nonexistent", KM_ENOTFOUND, "/nonexistent");
	REFUSED(options.model_dir = NULL, KM_EINVAL, "folder");
	REFUSED(options.context_length = 10000, KM_EINVAL, "8192");
	REFUSED((options.context_length = 1 << 30, options.max_total_tokens = 0), KM_EINVAL,
	        "1073741824");
	REFUSED(options.page_size = 0, KM_EINVAL, "page size");
	REFUSED(options.max_running_requests = 0, KM_EINVAL, "running");
	REFUSED(options.max_total_tokens = 3, KM_EINVAL, "page");
	REFUSED((options.max_total_tokens = 0, options.memory_fraction = 0), KM_EINVAL, "fraction");
	REFUSED((options.max_total_tokens = 0, options.memory_fraction = 1e-6), KM_ENOMEM, "fit");
	REFUSED((options.context_length = 0, options.max_total_tokens = INT32_MAX), KM_ENOMEM,
	        "fit");
	REFUSED(options.isa = "vax", KM_EUNSUPPORTED, "vax");
	REFUSED((options.isa = "plain", options.deterministic = true), KM_EUNSUPPORTED, "portable");

	small_options(&options, 0);
	options.max_total_tokens = 0;
	options.context_length = 0;
	assert_int_equal(km_engine_plan(&options, &plan, &err), 0);
	assert_true(plan.kv_bytes > 0 && plan.weight_bytes > 0);
	assert_int_equal(km_engine_describe_plan(&options, &words, &err), 0);
	assert_non_null(strstr(words.data, "KV cache"));
	km_buf_release(&words);
}

static void everything_is_explained(void **state)
{
	km_engine_options options;
	km_engine *engine;
	km_buf words = KM_BUF_INIT;

	(void)state;
	small_options(&options, 1);
	engine = open_engine(&options);
	km_engine_explain(engine, &words);
	assert_non_null(strstr(words.data, "512 pages of 16 tokens"));
	assert_non_null(strstr(words.data, "context length"));
	assert_non_null(strstr(words.data, "end of sequence"));
	assert_non_null(strstr(words.data, "prefix cache"));
	km_buf_release(&words);
	km_engine_close(engine);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(deterministic_int4_bf16_kv),
		cmocka_unit_test(deterministic_fp8_fp8_kv),
		cmocka_unit_test(prefix_samples_and_text),
		cmocka_unit_test(preemption_loses_nothing),
		cmocka_unit_test(a_decode_step_allocates_nothing),
		cmocka_unit_test(impossible_engines_are_refused),
		cmocka_unit_test(everything_is_explained),
	};

	return cmocka_run_group_tests(tests, make_checkpoints, remove_checkpoints);
}
