/* engine/engine: requests against a model that tells which KV it was shown. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/mem.h"
#include "base/rng.h"
#include "support/count_malloc.h"
#include "support/engine_client.h"
#include "support/fake_model.h"

static void text_of(int32_t *ids, int count, uint64_t seed)
{
	for (int i = 0; i < count; i++)
		ids[i] = 1 + (int32_t)(km_rng_u64(seed, (uint64_t)i) % (FAKE_VOCAB - 1));
}

/* ---- a mixed load ---- */

enum { LOAD = 64, LONGEST = 100 };

typedef struct load {
	int32_t prompt[LONGEST];
	km_logit_bias bias;
	km_request_options options;
	client *client;
} load;

/* Request `i` of the load: prompts that begin alike, every sampling field used by some. */
static void make_request(load *l, uint64_t i)
{
	km_sampling *s = &l->options.sampling;
	uint64_t r = km_rng_u64(77, i);
	int len = 1 + (int)(r % LONGEST), shared = (int)((r >> 8) % 60);

	text_of(l->prompt, LONGEST, 1000 + i);
	text_of(l->prompt, shared < len ? shared : len, (r >> 16) % 3);
	client_options(&l->options, l->prompt, len);
	l->options.max_tokens = 1 + (int)((r >> 20) % 60);
	s->temperature = (r >> 28) % 4 ? 0.5 + (double)((r >> 30) % 4) : 0;
	s->top_p = (r >> 32) % 2 ? 0.9 : 1;
	s->top_k = (r >> 33) % 3 == 0 ? 20 : 0;
	s->min_p = (r >> 35) % 3 == 0 ? 0.01 : 0;
	s->repetition_penalty = (r >> 37) % 3 == 0 ? 1.2 : 1;
	s->presence_penalty = (r >> 39) % 3 == 0 ? 0.3 : 0;
	s->has_seed = (r >> 41) % 2;
	s->seed = r;
	l->bias = (km_logit_bias){ .id = 3, .bias = 1 };
	s->bias = &l->bias;
	s->bias_count = (r >> 43) % 2;
	l->options.logprobs = (r >> 45) % 3 == 0 ? 2 : -1;
	l->options.prompt_logprobs = l->options.logprobs >= 0 && (r >> 47) % 2;
}

static client *run_alone(const km_engine_shape *shape, bool forms, km_request_options *options)
{
	fake_model model = { .forms = forms };
	km_engine *engine = fake_engine(&model, shape);
	client *c = client_new(engine);

	assert_int_equal(client_submit(c, options, NULL), 0);
	client_wait(c);
	fake_close(engine, &model);
	return c;
}

static void same_answer(const client_sample *a, const client_sample *b)
{
	assert_int_equal(a->count, b->count);
	assert_memory_equal(a->ids, b->ids, (size_t)a->count * sizeof(a->ids[0]));
	assert_memory_equal(a->logprobs, b->logprobs, (size_t)a->count * sizeof(a->logprobs[0]));
	assert_int_equal(a->finish, b->finish);
	assert_int_equal(a->text.len, b->text.len);
}

/* Runs the whole load at once, a third cancelled midway; what finished must equal the same request
 * alone in an engine with another page size, no prefix cache and whole prompts. */
static void run_load(const km_engine_shape *shape, bool forms, km_engine_stats *stats)
{
	fake_model model = { .forms = forms };
	km_engine_shape alone = fake_shape();
	km_engine *engine = fake_engine(&model, shape);
	load *loads = km_xcalloc(LOAD, sizeof(*loads));
	int compared = 0, aborted = 0;

	alone.deterministic = shape->deterministic;
	alone.prefix_cache = false;
	alone.page_size = 16;
	alone.prefill_rows = 200;
	alone.score_rows = 200;
	for (uint64_t i = 0; i < LOAD; i++) {
		make_request(&loads[i], i);
		if (!shape->deterministic)
			loads[i].options.sampling.has_seed = true;
		loads[i].client = client_new(engine);
		if (i % 3 == 2)
			loads[i].client->cancel_at = 1 + (int)(i % 7);
		assert_int_equal(client_submit(loads[i].client, &loads[i].options, NULL), 0);
	}
	for (int i = 0; i < LOAD; i++) {
		client_sample *got = &loads[i].client->samples[0];

		client_wait(loads[i].client);
		assert_int_equal(got->finals, 1);
		if (got->finish == KM_FINISH_ABORT) {
			assert_int_equal(i % 3, 2);
			aborted++;
		} else {
			client *want = run_alone(&alone, forms, &loads[i].options);

			same_answer(got, &want->samples[0]);
			assert_int_equal(loads[i].client->scored, want->scored);
			assert_memory_equal(loads[i].client->scores, want->scores,
			                    sizeof(want->scores));
			assert_int_equal(want->scored,
			                 loads[i].options.prompt_logprobs ? want->scored : 0);
			compared++;
			client_free(want);
		}
	}
	assert_true(aborted > 10 && compared >= LOAD * 2 / 3);
	km_engine_stats_get(engine, stats);
	assert_int_equal(stats->running + stats->waiting, 0);
	assert_int_equal(stats->pages_used, 0);
	for (int i = 0; i < LOAD; i++)
		client_free(loads[i].client);
	fake_close(engine, &model);
	free(loads);
}

static void deterministic_load_equals_each_alone(void **state)
{
	(void)state;
	for (int mode = 0; mode < 4; mode++) {
		km_engine_shape shape = fake_shape();
		km_engine_stats stats;

		shape.deterministic = true;
		shape.prefix_cache = mode & 1;
		shape.total_pages = mode & 2 ? 80 : 512; /* 80: a few requests' worth */
		shape.prefill_rows = mode & 2 ? 7 : 24;
		run_load(&shape, true, &stats);
		assert_int_equal(stats.preemptions, 0);
		assert_true((stats.prefix_hits > 0) == shape.prefix_cache);
	}
}

/* Without the reservation sequences are interrupted; where both forms of a row agree, that and the
 * reuse of generated pages must not show either. */
static void preempted_load_equals_each_alone(void **state)
{
	(void)state;
	for (int mode = 0; mode < 2; mode++) {
		km_engine_shape shape = fake_shape();
		km_engine_stats stats;

		shape.prefix_cache = mode & 1;
		shape.total_pages = 64;
		run_load(&shape, false, &stats);
		assert_true(stats.preemptions > 0);
	}
}

/* The other way round: the test above could not fail if the model did not tell forms apart. */
static void the_model_tells_the_forms_apart(void **state)
{
	int32_t prompt[8];
	km_request_options options;
	km_engine_shape shape = fake_shape();
	client *a, *b;

	(void)state;
	text_of(prompt, 8, 1);
	client_options(&options, prompt, 8);
	options.sampling.has_seed = true;
	options.ignore_eos = true;
	a = run_alone(&shape, true, &options);
	b = run_alone(&shape, false, &options);
	assert_int_equal(a->samples[0].ids[0], b->samples[0].ids[0]); /* the prompt's own */
	assert_memory_not_equal(a->samples[0].ids, b->samples[0].ids, 16 * sizeof(int32_t));
	client_free(a);
	client_free(b);
}

/* ---- prefix, samples ---- */

static void a_prefix_gives_the_same_tokens(void **state)
{
	int32_t prompt[40];
	fake_model model = { .forms = true };
	km_engine_shape shape = fake_shape();
	km_engine *engine;
	km_request_options options;
	client *runs[3];

	(void)state;
	shape.deterministic = true;
	engine = fake_engine(&model, &shape);
	text_of(prompt, 40, 1);
	for (int i = 0; i < 3; i++) {
		client_options(&options, prompt, i < 2 ? 40 : 37);
		runs[i] = client_new(engine);
		assert_int_equal(client_submit(runs[i], &options, NULL), 0);
		client_wait(runs[i]);
	}
	assert_int_equal(km_request_cached_tokens(runs[0]->request), 0);
	assert_true(km_request_queue_seconds(runs[0]->request) >= 0);
	assert_int_equal(km_request_cached_tokens(runs[1]->request), 36); /* never the last token */
	assert_int_equal(km_request_cached_tokens(runs[2]->request), 36);
	same_answer(&runs[0]->samples[0], &runs[1]->samples[0]);
	for (int i = 0; i < 3; i++)
		client_free(runs[i]);
	fake_close(engine, &model);
}

static void samples_equal_requests_with_their_seeds(void **state)
{
	int32_t prompt[30];

	(void)state;
	text_of(prompt, 30, 4);
	for (int mode = 0; mode < 4; mode++) {
		km_engine_shape shape = fake_shape();
		km_request_options options;
		client *many, *one;

		shape.deterministic = mode & 1;
		shape.prefix_cache = mode & 2;
		client_options(&options, prompt, 30 - mode);
		options.n = 5;
		options.sampling.has_seed = true;
		options.sampling.seed = 10;
		options.prompt_logprobs = true;
		options.logprobs = 1;
		many = run_alone(&shape, true, &options);
		assert_int_equal(many->scored, 29 - mode);
		options.n = 1;
		for (int i = 0; i < 5; i++) {
			options.sampling.seed = 10 + (uint64_t)i;
			one = run_alone(&shape, true, &options);
			same_answer(&many->samples[i], &one->samples[0]);
			client_free(one);
		}
		assert_memory_not_equal(many->samples[0].ids, many->samples[1].ids, 8);
		client_free(many);
	}
}

/* ---- how texts end ---- */

static km_engine *default_engine(fake_model *model)
{
	km_engine_shape shape = fake_shape();

	return fake_engine(model, &shape);
}

static client *ask(km_engine *engine, km_request_options *options)
{
	client *c = client_new(engine);

	assert_int_equal(client_submit(c, options, NULL), 0);
	client_wait(c);
	return c;
}

static void texts_end_where_they_should(void **state)
{
	int32_t prompt[6], third, stop_ids[1];
	fake_model model = { 0 };
	km_engine *engine = default_engine(&model);
	km_request_options options;
	km_logit_bias bias = { .id = FAKE_EOS, .bias = 1000 };
	client *c;

	(void)state;
	text_of(prompt, 6, 1);
	client_options(&options, prompt, 6);
	options.sampling.has_seed = true;
	options.ignore_eos = true;
	c = ask(engine, &options);
	assert_int_equal(c->samples[0].finish, KM_FINISH_LENGTH);
	assert_int_equal(c->samples[0].count, 16);
	third = c->samples[0].ids[2];
	client_free(c);

	stop_ids[0] = third;
	options.stop_ids = stop_ids;
	options.stop_id_count = 1;
	c = ask(engine, &options);
	assert_int_equal(c->samples[0].finish, KM_FINISH_STOP);
	assert_int_equal(c->samples[0].matched_id, third);
	assert_true(c->samples[0].count <= 3 &&
	            c->samples[0].ids[c->samples[0].count - 1] == third);
	client_free(c);

	options.stop_id_count = 0;
	options.sampling.bias = &bias;
	options.sampling.bias_count = 1;
	options.ignore_eos = false;
	c = ask(engine, &options);
	assert_int_equal(c->samples[0].count, 1);
	assert_int_equal(c->samples[0].matched_id, FAKE_EOS);
	assert_int_equal(c->samples[0].text.len, 0); /* named, not shown */
	client_free(c);
	options.ignore_eos = true;
	c = ask(engine, &options);
	assert_int_equal(c->samples[0].count, 16);
	assert_int_equal(c->samples[0].finish, KM_FINISH_LENGTH);
	client_free(c);
	fake_close(engine, &model);
}

/* Sixteen tokens are equally far above the rest, and logits differ by less than the penalty: a
 * token that was said cannot be said again before the others. */
static void what_was_said_is_penalised(void **state)
{
	int32_t prompt[6];
	km_logit_bias bias[16];
	fake_model model = { .spread = 0.2f };
	km_engine *engine = default_engine(&model);
	km_request_options options;

	(void)state;
	text_of(prompt, 6, 1);
	client_options(&options, prompt, 6);
	for (int i = 0; i < 16; i++)
		bias[i] = (km_logit_bias){ .id = 20 + i, .bias = 100 };
	options.sampling.bias = bias;
	options.sampling.bias_count = 16;
	options.n = 2;
	for (int penalty = 0; penalty < 2; penalty++) {
		client *c;

		options.sampling.frequency_penalty = penalty ? 0 : 2;
		options.sampling.presence_penalty = penalty ? 2 : 0;
		options.sampling.temperature = 0.01; /* nothing but the best, samples differ */
		c = ask(engine, &options);
		for (int s = 0; s < 2; s++) {
			uint64_t seen = 0;

			assert_int_equal(c->samples[s].count, 16);
			for (int i = 0; i < 16; i++)
				seen |= UINT64_C(1) << (c->samples[s].ids[i] - 20);
			assert_int_equal(seen, 0xffff);
		}
		client_free(c);
	}
	fake_close(engine, &model);
}

/* Any piece of the text as a stop string, whatever tokens it lies in: the text ends before its
 * first occurrence, and otherwise is all there. */
static void stop_strings_cut_the_text(void **state)
{
	int32_t prompt[6];
	fake_model model = { 0 };
	km_engine *engine = default_engine(&model);
	km_request_options options;
	client *whole, *c;
	int across = 0;

	(void)state;
	text_of(prompt, 6, 2);
	client_options(&options, prompt, 6);
	options.sampling.has_seed = true;
	options.ignore_eos = true;
	options.max_tokens = 30;
	for (int id = FAKE_MARKER; id < FAKE_VOCAB; id++) {
		static km_logit_bias none[FAKE_VOCAB - FAKE_MARKER];

		none[id - FAKE_MARKER] = (km_logit_bias){ .id = id, .bias = -100 };
		options.sampling.bias = none;
		options.sampling.bias_count = FAKE_VOCAB - FAKE_MARKER;
	}
	whole = ask(engine, &options);
	for (size_t at = 0; at + 5 < whole->samples[0].text.len; at += 3) {
		char stop[6], other[] = "zzzzzzzz";
		const char *const stops[] = { other, stop };
		const char *text = whole->samples[0].text.data;
		size_t end;

		memcpy(stop, text + at, 5);
		stop[5] = '\0';
		end = (size_t)(strstr(text, stop) - text);
		options.stop = stops;
		options.stop_count = 2;
		c = ask(engine, &options);
		assert_int_equal(c->samples[0].finish, KM_FINISH_STOP);
		assert_string_equal(c->samples[0].matched_stop, stop);
		assert_int_equal(c->samples[0].text.len, end);
		if (end)
			assert_memory_equal(c->samples[0].text.data, text, end);
		across += c->samples[0].count >= 2; /* no token has five letters */
		client_free(c);
	}
	assert_true(across > 5);
	{
		static const char *const stops[] = { "abcdefgh", "zzzzz" };

		options.stop = stops;
		c = ask(engine, &options);
		assert_int_equal(c->samples[0].finish, KM_FINISH_LENGTH);
		assert_string_equal(c->samples[0].text.data, whole->samples[0].text.data);
		client_free(c);
	}
	client_free(whole);
	fake_close(engine, &model);
}

/* The marker's event holds its name and nothing else, though "a" might have begun a stop string. */
static void check_marker(client *c, const km_event *event)
{
	if (event->id >= FAKE_MARKER) {
		KM_ASSERT(event->text_len == 5 && memcmp(event->text, "<m9", 3) == 0);
		c->pages_used_at_end = -1;
	}
}

static void markers_come_alone(void **state)
{
	/* Each letter alone may begin one. */
	static const char *const stops[] = { "a<m", "b<m", "c<m", "d<m", "e<m", "f<m", "g<m",
	                                     "h<m", "i<m", "j<m", "k<m", "l<m", "m<m", "n<m",
	                                     "o<m", "p<m", "q<m", "r<m", "s<m", "t<m", "u<m",
	                                     "v<m", "w<m", "x<m", "y<m", "z<m" };
	int32_t prompt[6];
	fake_model model = { 0 };
	km_engine *engine = default_engine(&model);
	km_request_options options;
	km_logit_bias some[] = { { 91, 3 }, { 92, 3 } };
	client *c = client_new(engine);

	(void)state;
	text_of(prompt, 6, 2);
	client_options(&options, prompt, 6);
	options.stop = stops;
	options.stop_count = 26;
	options.ignore_eos = true;
	options.max_tokens = 100;
	options.sampling.has_seed = true;
	options.sampling.bias = some;
	options.sampling.bias_count = 2;
	c->spy = check_marker;
	assert_int_equal(client_submit(c, &options, NULL), 0);
	client_wait(c);
	assert_int_equal(c->samples[0].finish, KM_FINISH_LENGTH);
	assert_true(c->samples[0].idless > 3);
	client_free(c);

	static const char *const name[] = { "m91>" };
	options.stop = name;
	options.stop_count = 1;
	c = ask(engine, &options);
	assert_string_equal(c->samples[0].matched_stop, "m91>");
	assert_int_equal(c->samples[0].text.data[c->samples[0].text.len - 1], '<');
	client_free(c);
	fake_close(engine, &model);
}

/* ---- prompts' log-probabilities ---- */

static void prompts_are_scored_however_cut(void **state)
{
	int32_t prompt[90];
	fake_model model = { 0 };
	km_engine *engine = default_engine(&model); /* 24 rows a step, 5 with logits */
	km_engine_shape wide = fake_shape();
	km_request_options options;
	client *a, *b;

	(void)state;
	text_of(prompt, 90, 2);
	client_options(&options, prompt, 90);
	options.max_tokens = 1;
	a = ask(engine, &options); /* its pages are in the index now */
	client_free(a);
	options.prompt_logprobs = true;
	options.logprobs = 3;
	options.max_tokens = 0;
	wide.prefill_rows = wide.score_rows = 100;
	a = ask(engine, &options);
	b = run_alone(&wide, false, &options);
	assert_int_equal(a->scored, 89);
	assert_int_equal(a->score_tops, 89 * 3);
	assert_int_equal(km_request_cached_tokens(a->request), 0);
	assert_memory_equal(a->scores, b->scores, sizeof(a->scores));
	assert_int_equal(a->samples[0].finish, KM_FINISH_LENGTH);
	assert_int_equal(a->samples[0].count, 0);
	client_free(a);
	client_free(b);
	options.prompt_len = 1;
	options.n = 3;
	a = ask(engine, &options);
	assert_int_equal(a->scored, 0);
	client_free(a);
	options.prompt_len = 20;
	a = ask(engine, &options);
	assert_int_equal(a->scored, 19);
	client_free(a);
	fake_close(engine, &model);
}

/* ---- what is refused ---- */

static void wrong_requests_are_refused(void **state)
{
	int32_t prompt[300] = { 1, 2, 3 };
	const char *const empty[] = { "" };
	fake_model model = { 0 };
	km_engine *engine = default_engine(&model);
	km_request_options options;
	client *c = client_new(engine);
	km_err err;

	(void)state;
#define REFUSED(change, word1, word2)                                                              \
	do {                                                                                       \
		client_options(&options, prompt, 3);                                               \
		change;                                                                            \
		assert_int_equal(client_submit(c, &options, &err), KM_EINVAL);                     \
		assert_null(c->request);                                                           \
		assert_non_null(strstr(err.msg, word1));                                           \
		assert_non_null(strstr(err.msg, word2));                                           \
	} while (0)
	REFUSED(options.prompt_len = 0, "prompt", "no tokens");
	REFUSED(options.prompt_len = 300, "300", "256");
	REFUSED(options.prompt_len = 256, "256", "answer");
	REFUSED(options.max_tokens = 254, "254", "257");
	REFUSED(options.max_tokens = INT32_MAX, "2147483647", "256");
	REFUSED(options.max_tokens = 0, "max_tokens", "1");
	REFUSED(options.max_tokens = -1, "max_tokens", "-1");
	REFUSED(prompt[1] = FAKE_VOCAB, "token 1", "96");
	REFUSED(prompt[1] = -1, "token 1", "-1");
	prompt[1] = 2;
	REFUSED((options.stop_ids = &options.n, options.n = 96, options.stop_id_count = 1),
	        "stop id", "96");
	REFUSED(options.n = 0, "n is 0", "1");
	REFUSED(options.logprobs = 21, "21", "20");
	REFUSED((options.stop = empty, options.stop_count = 1), "stop", "empty");
	REFUSED(options.sampling.temperature = -1, "temperature", "-1");
	client_options(&options, prompt, 256 - 16);
	assert_int_equal(client_submit(c, &options, &err), 0); /* exactly full */
	client_wait(c);
	client_free(c);
	fake_close(engine, &model);
}

static void a_full_queue_says_so(void **state)
{
	int32_t prompt[4] = { 1, 2, 3, 4 };
	fake_model model = { 0 };
	km_engine_shape shape = fake_shape();
	km_engine *engine;
	km_request_options options;
	client *clients[6];
	km_err err;
	int rc = 0, n = 0;

	(void)state;
	shape.max_running = 1;
	shape.max_queued = 3;
	engine = fake_engine(&model, &shape);
	atomic_store(&model.hold_from, 1);
	for (; n < 6 && rc == 0; n++) {
		client_options(&options, prompt, 4);
		clients[n] = client_new(engine);
		rc = client_submit(clients[n], &options, &err);
		if (n == 0) /* let the first one in */
			while (atomic_load(&model.steps) == 0)
				nanosleep(&(struct timespec){ .tv_nsec = 100000 }, NULL);
	}
	assert_int_equal(rc, KM_ELIMIT);
	assert_int_equal(n, 5); /* one runs, three wait, the fifth is refused */
	assert_non_null(strstr(err.msg, "3 requests"));
	km_engine_cancel(engine, clients[2]->request); /* while waiting */
	atomic_store(&model.hold_from, 0);
	for (int i = 0; i < n; i++) {
		client_wait(clients[i]);
		assert_int_equal(clients[i]->samples[0].finish == KM_FINISH_ABORT, i == 2);
		client_free(clients[i]);
	}
	fake_close(engine, &model);
}

/* Cancelled in its prompt or in its answer: at the next step's end its pages are back,
 * before it is told. */
static void a_cancelled_request_holds_nothing(void **state)
{
	int32_t prompt[200];
	km_request_options options;

	(void)state;
	text_of(prompt, 200, 1);
	for (int at = 1; at < 40; at += 3) {
		fake_model model = { 0 };
		km_engine *engine = default_engine(&model);
		client *c = client_new(engine);

		client_options(&options, prompt, 200); /* 9 steps of 24 rows */
		options.max_tokens = 50;
		options.n = 2;
		options.ignore_eos = true;
		atomic_store(&model.hold_from, at);
		assert_int_equal(client_submit(c, &options, NULL), 0);
		while (atomic_load(&model.steps) < at)
			sched_yield();
		km_engine_cancel(engine, c->request);
		atomic_store(&model.hold_from, 0);
		client_wait(c);
		assert_int_equal(atomic_load(&model.steps), at);
		assert_int_equal(c->samples[0].finish, KM_FINISH_ABORT);
		assert_int_equal(c->samples[1].finish, KM_FINISH_ABORT);
		assert_int_equal(c->pages_used_at_end, 0);
		client_free(c);
		fake_close(engine, &model);
	}
}

/* ---- failures ---- */

static void a_failed_step_fails_everybody(void **state)
{
	(void)state;
	for (int device = 0; device < 2; device++) {
		int32_t prompt[30];
		fake_model model = { 0 };
		km_engine *engine = default_engine(&model);
		km_request_options options;
		client *clients[5], *again;
		km_engine_stats stats;
		km_err err;
		int rc;

		text_of(prompt, 30, 1);
		client_options(&options, prompt, 30);
		options.max_tokens = 200;
		options.ignore_eos = true;
		atomic_store(&model.fail_code, device ? KM_EDEVICE : KM_EIO);
		atomic_store(&model.fail_at, 20);
		for (int i = 0; i < 5; i++) {
			clients[i] = client_new(engine);
			assert_int_equal(client_submit(clients[i], &options, NULL), 0);
		}
		for (int i = 0; i < 5; i++) {
			client_wait(clients[i]);
			assert_int_equal(clients[i]->samples[0].finish, KM_FINISH_ERROR);
			assert_string_equal(clients[i]->samples[0].error,
			                    "the fake model failed at step 20");
			client_free(clients[i]);
		}
		atomic_store(&model.fail_at, 0);
		again = client_new(engine);
		rc = client_submit(again, &options, &err);
		assert_int_equal(rc, device ? KM_EDEVICE : 0);
		assert_int_equal(km_engine_has_failed(engine, NULL), device);
		if (device)
			assert_string_equal(err.msg, "the fake model failed at step 20");
		client_wait(again);
		if (!device)
			assert_int_equal(again->samples[0].count, 200);
		client_free(again);
		km_engine_stats_get(engine, &stats);
		assert_int_equal(stats.pages_used, 0);
		fake_close(engine, &model);
	}
}

static void nan_fails_the_request_that_met_it(void **state)
{
	int32_t bad[4] = { 7, 2, 3, 4 }, good[4] = { 8, 2, 3, 4 };
	fake_model model = { 0 };
	km_engine *engine = default_engine(&model);
	km_request_options options;
	client *a = client_new(engine), *b = client_new(engine);

	(void)state;
	atomic_store(&model.nan_id, 7);
	client_options(&options, bad, 4);
	assert_int_equal(client_submit(a, &options, NULL), 0);
	client_options(&options, good, 4);
	options.sampling.bias = &(km_logit_bias){ .id = 7, .bias = -100 };
	options.sampling.bias_count = 1;
	assert_int_equal(client_submit(b, &options, NULL), 0);
	client_wait(a);
	client_wait(b);
	assert_int_equal(a->samples[0].finish, KM_FINISH_ERROR);
	assert_non_null(strstr(a->samples[0].error, "token id 5"));
	assert_int_not_equal(b->samples[0].finish, KM_FINISH_ERROR);
	client_free(a);
	client_free(b);
	fake_close(engine, &model);
}

/* Lets the model go on, a step at a time, until told to end. */
typedef struct ticker {
	fake_model *model;
	atomic_int end;
} ticker;

static void *tick(void *arg)
{
	ticker *t = arg;

	while (!atomic_load(&t->end)) {
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
		atomic_fetch_add(&t->model->hold_from, 1);
	}
	return NULL;
}

static void closing_aborts_what_is_left(void **state)
{
	int32_t prompt[30];
	fake_model model = { 0 };
	km_engine_shape shape = fake_shape();
	km_engine *engine;
	km_request_options options;
	client *clients[10];
	ticker t = { .model = &model };
	pthread_t thread;

	(void)state;
	shape.max_running = 4;
	engine = fake_engine(&model, &shape);
	text_of(prompt, 30, 1);
	client_options(&options, prompt, 30);
	options.n = 2;
	options.max_tokens = 200;
	options.ignore_eos = true;
	atomic_store(&model.hold_from, 1);
	for (int i = 0; i < 10; i++) {
		clients[i] = client_new(engine);
		assert_int_equal(client_submit(clients[i], &options, NULL), 0);
	}
	assert_int_equal(pthread_create(&thread, NULL, tick, &t), 0);
	km_engine_stop(engine);
	atomic_store(&t.end, 1);
	pthread_join(thread, NULL);
	for (int i = 0; i < 10; i++) {
		assert_int_equal(clients[i]->live, 0); /* told before the engine was gone */
		for (int s = 0; s < 2; s++)
			assert_int_equal(clients[i]->samples[s].finish, KM_FINISH_ABORT);
		client_free(clients[i]);
	}
	fake_close(NULL, &model);
}

/* ---- counters, flushing, memory ---- */

static void flushing_waits_for_quiet(void **state)
{
	int32_t prompt[30];
	fake_model model = { 0 };
	km_engine *engine = default_engine(&model);
	km_request_options options;
	km_engine_stats stats;
	ticker t = { .model = &model };
	pthread_t thread;
	client *c;

	(void)state;
	text_of(prompt, 30, 1);
	client_options(&options, prompt, 30);
	options.ignore_eos = true;
	c = ask(engine, &options);
	client_free(c);
	km_engine_stats_get(engine, &stats);
	assert_int_equal(stats.pages_used, 0);
	assert_true(stats.pages_cached >= 7);
	assert_int_equal(stats.prompt_tokens, 30);
	assert_int_equal(stats.generation_tokens, 16);
	options.max_tokens = 220;
	c = client_new(engine);
	atomic_store(&model.hold_from, atomic_load(&model.steps) + 1);
	assert_int_equal(client_submit(c, &options, NULL), 0);
	assert_int_equal(pthread_create(&thread, NULL, tick, &t), 0);
	assert_int_equal(km_engine_flush_cache(engine), KM_EINVAL);
	atomic_store(&t.end, 1);
	pthread_join(thread, NULL);
	atomic_store(&model.hold_from, 0);
	client_wait(c);
	client_free(c);
	assert_int_equal(km_engine_flush_cache(engine), 0);
	km_engine_stats_get(engine, &stats);
	assert_int_equal(stats.pages_cached, 0);
	fake_close(engine, &model);
}

static long allocations_at[2];

static void watch_allocations(client *c, const km_event *event)
{
	if (event->sample == 0 && c->samples[0].count == 20)
		allocations_at[0] = atomic_load(&allocations);
	if (event->sample == 0 && c->samples[0].count == 180)
		allocations_at[1] = atomic_load(&allocations);
}

static void a_decode_step_allocates_nothing(void **state)
{
	static const char *const stops[] = { "qqqqqq", "never seen" };
	int32_t prompt[30];
	fake_model model = { 0 };
	km_engine *engine = default_engine(&model);
	km_request_options options;
	client *c = client_new(engine);

	(void)state;
	if (!can_count_allocations()) {
		client_free(c);
		fake_close(engine, &model);
		skip();
	}
	text_of(prompt, 30, 1);
	client_options(&options, prompt, 30);
	options.n = 3;
	options.max_tokens = 200;
	options.ignore_eos = true;
	options.logprobs = 20;
	options.stop = stops;
	options.stop_count = 2;
	options.sampling.top_k = 30;
	options.sampling.top_p = 0.95;
	options.sampling.min_p = 0.001;
	options.sampling.repetition_penalty = 1.1;
	options.sampling.frequency_penalty = 0.1;
	for (int i = 0; i < 3; i++)
		km_buf_reserve(&c->samples[i].text, 4096);
	c->spy = watch_allocations;
	allocations_at[1] = -1;
	assert_int_equal(client_submit(c, &options, NULL), 0);
	client_wait(c);
	assert_int_equal(c->samples[0].count, 200);
	assert_true(allocations_at[0] > 0); /* the counter counts */
	assert_int_equal(allocations_at[1] - allocations_at[0], 0);
	client_free(c);
	fake_close(engine, &model);
}

/* ---- many threads ---- */

enum { SUBMITTERS = 4, EACH = 60 };

typedef struct submitter {
	km_engine *engine;
	uint64_t seed;
	int answered, aborted, refused;
} submitter;

/* Sends, cancels at any moment, flushes and looks at the counters, and frees at once what has
 * ended. */
static void *submit_and_cancel(void *arg)
{
	submitter *s = arg;
	client *open[4] = { NULL };
	int32_t prompt[60];
	km_engine_stats stats;

	for (uint64_t i = 0; i < EACH; i++) {
		uint64_t r = km_rng_u64(s->seed, i);
		int at = (int)(i % 4);
		km_request_options options;

		if (open[at]) {
			client_wait(open[at]);
			s->answered += open[at]->samples[0].finish == KM_FINISH_LENGTH ||
			               open[at]->samples[0].finish == KM_FINISH_STOP;
			s->aborted += open[at]->samples[0].finish == KM_FINISH_ABORT;
			client_free(open[at]);
		}
		text_of(prompt, 60, r % 5);
		client_options(&options, prompt, 1 + (int)((r >> 8) % 60));
		options.n = 1 + (int)((r >> 16) % 3);
		options.max_tokens = 1 + (int)((r >> 20) % 40);
		open[at] = client_new(s->engine);
		if (client_submit(open[at], &options, NULL) < 0)
			s->refused++;
		else if ((r >> 30) % 2)
			km_engine_cancel(s->engine, open[at]->request);
		if ((r >> 32) % 4 == 0)
			km_engine_flush_cache(s->engine);
		km_engine_stats_get(s->engine, &stats);
		KM_ASSERT(stats.pages_used <= stats.pages_total);
	}
	for (int i = 0; i < 4; i++) {
		client_wait(open[i]);
		client_free(open[i]);
	}
	return NULL;
}

static void many_threads_at_once(void **state)
{
	fake_model model = { 0 };
	km_engine_shape shape = fake_shape();
	km_engine *engine;
	submitter submitters[SUBMITTERS];
	pthread_t threads[SUBMITTERS];
	km_engine_stats stats;
	int answered = 0, aborted = 0;

	(void)state;
	shape.max_queued = 12;
	shape.total_pages = 100;
	engine = fake_engine(&model, &shape);
	for (int i = 0; i < SUBMITTERS; i++) {
		submitters[i] = (submitter){ .engine = engine, .seed = (uint64_t)i };
		assert_int_equal(
			pthread_create(&threads[i], NULL, submit_and_cancel, &submitters[i]), 0);
	}
	for (int i = 0; i < SUBMITTERS; i++) {
		pthread_join(threads[i], NULL);
		answered += submitters[i].answered;
		aborted += submitters[i].aborted;
	}
	assert_true(answered > 20 && aborted > 20);
	km_engine_stats_get(engine, &stats);
	assert_int_equal(stats.running + stats.waiting + (int)stats.pages_used, 0);
	fake_close(engine, &model);
}

/* Seeds: given, equal answers; not given, others; deterministic, the prompt's. */
static void seeds_decide(void **state)
{
	int32_t prompt[10];

	(void)state;
	text_of(prompt, 10, 1);
	for (int deterministic = 0; deterministic < 2; deterministic++)
		for (int seeded = 0; seeded < 2; seeded++) {
			km_engine_shape shape = fake_shape();
			km_request_options options;
			client *a, *b;
			bool same;

			shape.deterministic = deterministic;
			client_options(&options, prompt, 10);
			options.ignore_eos = true;
			options.sampling.has_seed = seeded;
			a = run_alone(&shape, true, &options);
			b = run_alone(&shape, true, &options);
			same = memcmp(a->samples[0].ids, b->samples[0].ids, 16 * sizeof(int32_t)) ==
			       0;
			assert_int_equal(same, deterministic || seeded);
			client_free(a);
			client_free(b);
		}
}

/* Requests that a model which draws needs nothing from the host for, so that most steps are launched
 * before the last one's tokens are there; some end by a token, some are cancelled, some rows are
 * refused. */
typedef struct ahead {
	km_engine_stats stats;
	int launched, refused; /* ahead; rows */
} ahead;

static ahead go_ahead(const km_engine_shape *shape, int count, int longest, uint64_t seed)
{
	fake_model model = { .forms = false };
	km_engine *engine = fake_engine(&model, shape);
	ahead all;
	load *loads = km_xcalloc((size_t)count, sizeof(*loads));

	for (int i = 0; i < count; i++) {
		make_request(&loads[i], seed + (uint64_t)i);
		loads[i].options.logprobs = -1;
		loads[i].options.prompt_logprobs = false;
		if (loads[i].options.prompt_len > longest)
			loads[i].options.prompt_len = longest;
		loads[i].options.max_tokens = 40 + i % 30;
		loads[i].options.ignore_eos = i % 2;
		loads[i].options.sampling.has_seed = true;
		loads[i].options.sampling.repetition_penalty = 1;
		loads[i].options.sampling.frequency_penalty = 0;
		loads[i].options.sampling.presence_penalty = 0;
		loads[i].client = client_new(engine);
		if (i % 5 == 2)
			loads[i].client->cancel_at = 1 + i % 11;
		assert_int_equal(client_submit(loads[i].client, &loads[i].options, NULL), 0);
	}
	for (int i = 0; i < count; i++) {
		client_sample *got = &loads[i].client->samples[0];
		client *want;

		client_wait(loads[i].client);
		if (got->finish == KM_FINISH_ABORT)
			continue;
		want = run_alone(shape, false, &loads[i].options);
		same_answer(got, &want->samples[0]);
		client_free(want);
	}
	km_engine_stats_get(engine, &all.stats);
	assert_int_equal(all.stats.pages_used, 0);
	all.launched = model.ahead;
	all.refused = model.refused;
	for (int i = 0; i < count; i++)
		client_free(loads[i].client);
	free(loads);
	fake_close(engine, &model);
	return all;
}

static void steps_go_ahead(void **state)
{
	km_engine_shape shape = fake_shape();
	ahead got;

	(void)state;
	got = go_ahead(&shape, LOAD, LONGEST, 0);
	print_message("figure: %lld steps, %d of them launched ahead, %d rows refused\n",
	              (long long)got.stats.steps, got.launched, got.refused);
	assert_int_equal(got.launched > 20 && got.refused > 20, fake_draws);
}

/* A refused row's request may lose its pages before the row is computed again: it comes back as a prompt, cut into
 * chunks, the first of which draws nothing. */
static void a_refused_row_is_preempted(void **state)
{
	int64_t preempted = 0;

	(void)state;
	for (int i = 0; i < 60; i++) {
		km_engine_shape shape = fake_shape();

		shape.context_length = 144;
		shape.total_pages = 36 + i % 8;
		shape.prefill_rows = 3 + i % 7;
		preempted += go_ahead(&shape, 6, 20, 1000 * (uint64_t)i).stats.preemptions;
	}
	print_message("figure: %lld preemptions\n", (long long)preempted);
	assert_true(preempted > 20);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(deterministic_load_equals_each_alone),
		cmocka_unit_test(preempted_load_equals_each_alone),
		cmocka_unit_test(the_model_tells_the_forms_apart),
		cmocka_unit_test(a_prefix_gives_the_same_tokens),
		cmocka_unit_test(samples_equal_requests_with_their_seeds),
		cmocka_unit_test(texts_end_where_they_should),
		cmocka_unit_test(what_was_said_is_penalised),
		cmocka_unit_test(stop_strings_cut_the_text),
		cmocka_unit_test(markers_come_alone),
		cmocka_unit_test(prompts_are_scored_however_cut),
		cmocka_unit_test(wrong_requests_are_refused),
		cmocka_unit_test(a_full_queue_says_so),
		cmocka_unit_test(a_cancelled_request_holds_nothing),
		cmocka_unit_test(a_failed_step_fails_everybody),
		cmocka_unit_test(nan_fails_the_request_that_met_it),
		cmocka_unit_test(closing_aborts_what_is_left),
		cmocka_unit_test(flushing_waits_for_quiet),
		cmocka_unit_test(a_decode_step_allocates_nothing),
		cmocka_unit_test(many_threads_at_once),
		cmocka_unit_test(seeds_decide),
		cmocka_unit_test(steps_go_ahead),
		cmocka_unit_test(a_refused_row_is_preempted),
	};

	int failed = cmocka_run_group_tests(tests, NULL, NULL);

	/* All of it again over a model that draws tokens, a step ahead. */
	fake_draws = true;
	return failed + cmocka_run_group_tests(tests, NULL, NULL);
}
