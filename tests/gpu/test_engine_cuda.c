/*
 * The engine on a GPU, from prompt to tokens, over synthesised checkpoints: an fp8 one, an int4
 * one, and an int4 one whose attention and experts have the shapes that the tensor-core kernels
 * take.
 *
 * Prompts' log-probabilities are compared with the CPU engine's (why by median:
 * test_forward_cuda.c). Then a load of requests of mixed lengths, a third of them cancelled, leaves
 * no page behind, and a greedy request gives the same tokens before and after it. `test_engine_cuda
 * short` does a tenth, for runs under a sanitizer.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/rng.h"
#include "engine/engine.h"
#include "model/gpu.h"
#include "model/synthesize.h"
#include "support/engine_client.h"
#include "support/fake_checkpoint.h"

static const char *const names[] = { "tiny-k2", "tiny-k25", "wide" };
enum { MODELS = 3, PROMPTS = 12, LONGEST = 400, LOAD = 300, AT_ONCE = 64 };

static const double MEDIAN_BOUND = 0.05, MEAN_BOUND = 0.2;

static bool short_run;
static char *dirs[MODELS];

/* tiny-k25 with K2.5's attention, and experts that the packed layout holds. */
static void write_wide(const char *path)
{
	static const struct {
		const char *key;
		int value;
	} fields[] = { { "hidden_size", 512 },        { "q_lora_rank", 192 },
		       { "kv_lora_rank", 512 },       { "qk_rope_head_dim", 64 },
		       { "qk_nope_head_dim", 128 },   { "v_head_dim", 128 },
		       { "num_attention_heads", 16 }, { "moe_intermediate_size", 256 },
		       { "n_routed_experts", 32 },    { "num_experts_per_tok", 8 } };
	json_t *config = json_load_file("configs/models/tiny-k25.json", 0, NULL), *text;

	assert_non_null(config);
	text = json_object_get(config, "text_config");
	for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++)
		json_object_set_new(text, fields[i].key, json_integer(fields[i].value));
	json_object_set_new(json_object_get(config, "vision_config"), "text_hidden_size",
	                    json_integer(512));
	assert_int_equal(json_dump_file(config, path, 0), 0);
	json_decref(config);
}

static int make_checkpoints(void **state)
{
	(void)state;
	for (int i = 0; i < MODELS; i++) {
		char *path = km_xasprintf("configs/models/%s.json", names[i]), *wide = temp_dir();
		km_synth_options options = { .config_path = path, .seed = 5, .quiet = true };
		km_synth_result result;
		km_err err;

		if (i == MODELS - 1) {
			free(path);
			options.config_path = path = km_xasprintf("%s/config.json", wide);
			write_wide(path);
		}
		options.out_dir = dirs[i] = temp_dir();
		if (km_synthesize(&options, &result, &err) < 0) {
			fprintf(stderr, "%s\n", err.msg);
			return -1;
		}
		free(path);
		remove_dir(wide);
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

static km_engine *open_engine(int model, bool gpu, bool graphs)
{
	km_engine_options options;
	km_engine *engine;
	km_err err;

	km_engine_options_init(&options);
	options.model_dir = dirs[model];
	options.context_length = 1024;
	options.max_total_tokens = 65536;
	options.max_running_requests = AT_ONCE;
	options.chunked_prefill_size = 256;
	options.backend = gpu ? KM_BACKEND_CUDA : KM_BACKEND_CPU;
	options.disable_graphs = !graphs;
	options.disable_prefix_cache = true; /* a prompt found there is computed in other pieces */
	options.quiet = true;
	if (km_engine_open(&engine, &options, &err) < 0)
		fail_msg("%s: %s", names[model], err.msg);
	return engine;
}

static int length_of(int i)
{
	return 2 + (int)(km_rng_u64(91, (uint64_t)i) % (LONGEST - 2));
}

static void make_prompt(int32_t *ids, int i)
{
	for (int t = 0; t < length_of(i); t++)
		ids[t] = (int32_t)(km_rng_u64(92 + (uint64_t)i, (uint64_t)t) % 1000);
}

static client *submit(km_engine *engine, int i, int max_tokens, bool scored, int cancel_at)
{
	int32_t ids[LONGEST];
	client *c = client_new(engine);
	km_request_options options;
	km_err err;

	make_prompt(ids, i);
	client_options(&options, ids, length_of(i));
	options.max_tokens = max_tokens;
	options.ignore_eos = true;
	options.sampling.temperature = 0;
	options.prompt_logprobs = scored;
	options.logprobs = 0;
	c->cancel_at = cancel_at;
	if (client_submit(c, &options, &err) < 0)
		fail_msg("%s", err.msg);
	return c;
}

static int by_size(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static void compare_engines(int model, km_engine *cpu, km_engine *gpu)
{
	int prompts = short_run ? 2 : PROMPTS, count = 0, same = 0;
	double *all = km_xcalloc((size_t)(prompts * LONGEST), sizeof(*all)), mean = 0;
	client *want[PROMPTS], *got[PROMPTS];

	for (int i = 0; i < prompts; i++) {
		want[i] = submit(cpu, i, 8, true, 0);
		got[i] = submit(gpu, i, 8, true, 0);
	}
	for (int i = 0; i < prompts; i++) {
		client_wait(want[i]);
		client_wait(got[i]);
		assert_int_equal(got[i]->samples[0].finish, KM_FINISH_LENGTH);
		assert_int_equal(got[i]->scored, length_of(i) - 1);
		for (int t = 1; t < length_of(i); t++, count++) {
			all[count] = fabs((double)want[i]->scores[t] - (double)got[i]->scores[t]);
			mean += all[count];
		}
		same += want[i]->samples[0].ids[0] == got[i]->samples[0].ids[0];
		client_free(want[i]);
		client_free(got[i]);
	}
	qsort(all, (size_t)count, sizeof(*all), by_size);
	mean /= count;
	print_message("figure: engine, %s: log-probabilities of %d prompt tokens against the CPU: "
	              "median difference "
	              "%.2g, mean %.2g, largest %.2g (bounds: median %g, mean %g); first greedy "
	              "token the same in "
	              "%d of %d\n",
	              names[model], count, all[count / 2], mean, all[count - 1], MEDIAN_BOUND,
	              MEAN_BOUND, same, prompts);
	assert_true(all[count / 2] <= MEDIAN_BOUND && mean <= MEAN_BOUND && !isnan(mean));
	free(all);
}

static void log_probabilities_are_the_cpus(void **state)
{
	(void)state;
	for (int m = short_run ? MODELS - 1 : 0; m < MODELS; m++) {
		km_engine *cpu = open_engine(m, false, true), *gpu = open_engine(m, true, true);

		compare_engines(m, cpu, gpu);
		km_engine_close(cpu);
		km_engine_close(gpu);
	}
}

static void greedy(km_engine *engine, int32_t *ids, int count)
{
	client *c = submit(engine, 3, count, false, 0);

	client_wait(c);
	assert_int_equal(c->samples[0].count, count);
	memcpy(ids, c->samples[0].ids, (size_t)count * sizeof(*ids));
	client_free(c);
}

static void a_load_leaves_nothing_behind(void **state)
{
	(void)state;
	for (int m = short_run ? MODELS - 1 : 0; m < MODELS; m++) {
		int load = short_run ? LOAD / 10 : LOAD, cancelled = 0;
		km_engine *engine = open_engine(m, true, true),
			  *plain = open_engine(m, true, false);
		client **c = km_xcalloc((size_t)load, sizeof(*c));
		int32_t before[24], after[24], without[24];
		km_engine_stats stats;

		greedy(engine, before, 24);
		greedy(plain, without, 24);
		assert_memory_equal(before, without, sizeof(before)); /* graphs change nothing */
		for (int i = 0; i < load; i++)
			c[i] = submit(engine, i, 1 + i % 40, i % 7 == 0,
			              i % 3 == 0 ? 1 + i % 5 : 0);
		for (int i = 0; i < load; i++) {
			client_wait(c[i]);
			assert_int_not_equal(c[i]->samples[0].finish, KM_FINISH_ERROR);
			cancelled += c[i]->samples[0].finish == KM_FINISH_ABORT;
			client_free(c[i]);
		}
		greedy(engine, after, 24);
		assert_memory_equal(before, after, sizeof(before));
		km_engine_stats_get(engine, &stats);
		assert_int_equal(stats.pages_used, 0);
		assert_int_equal(stats.running + stats.waiting, 0);
		print_message("figure: engine, %s: %d requests, %d cancelled, %lld tokens in %lld "
		              "steps, no page "
		              "left in use\n",
		              names[m], load, cancelled, (long long)stats.generation_tokens,
		              (long long)stats.steps);
		km_engine_close(engine);
		km_engine_close(plain);
		free(c);
	}
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest all[] = {
		cmocka_unit_test(log_probabilities_are_the_cpus),
		cmocka_unit_test(a_load_leaves_nothing_behind),
	};
	km_err err;

	short_run = argc > 1 && !strcmp(argv[1], "short");
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	return cmocka_run_group_tests(all, make_checkpoints, remove_checkpoints);
}
