/* model/synthesize: whole checkpoints that open, the same bytes every time, nothing left after a
 * stop. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/rng.h"
#include "format/json.h"
#include "model/model.h"
#include "model/synth_values.h"
#include "model/synthesize.h"
#include "model/weights.h"
#include "support/fake_checkpoint.h"
#include "text/tokenizer.h"

static void make(const char *dir, const char *name, km_synth_options o, km_synth_result *result)
{
	char *path = km_xasprintf("configs/models/%s.json", name);
	km_err err;

	o.config_path = path;
	o.out_dir = dir;
	o.quiet = true;
	if (km_synthesize(&o, result, &err) < 0)
		fail_msg("%s", err.msg);
	free(path);
}

static uint64_t file_hash(const char *dir, const char *name)
{
	char *path = km_xasprintf("%s/%s", dir, name), *data;
	uint64_t hash;
	size_t len;

	assert_int_equal(km_read_file(path, 1 << 26, &data, &len, NULL), 0);
	hash = km_rng_hash(0, data, len);
	free(data);
	free(path);
	return hash;
}

static double rms_of_row(const km_weight *w, int row)
{
	double sum = 0;

	for (int c = 0; c < w->cols; c++) {
		double x;

		if (w->type == KM_W_INT4) {
			uint32_t word =
				((const uint32_t *)w->data)[(size_t)row * (size_t)(w->cols / 8) +
			                                    (size_t)(c / 8)];
			uint16_t scale =
				((const uint16_t *)
			                 w->scale)[row * (w->cols / w->group) + c / w->group];

			x = ((int)(word >> 4 * (c % 8) & 15) - 8) * (double)km_bf16_to_f32(scale);
		} else if (w->type == KM_W_FP8) {
			int blocks = (w->cols + w->block_cols - 1) / w->block_cols;
			float scale =
				((const float *)w
			                 ->scale)[row / w->block_rows * blocks + c / w->block_cols];

			x = km_f8_e4m3_to_f32(((const uint8_t *)w->data)[row * w->cols + c]) *
			    (double)scale;
		} else {
			x = km_bf16_to_f32(((const uint16_t *)w->data)[row * w->cols + c]);
		}
		sum += x * x;
	}
	return sqrt(sum / w->cols);
}

static void every_tiny_config_makes_a_checkpoint(void **state)
{
	static const char *const names[] = { "tiny-k2", "tiny-k2-thinking", "tiny-k25",
		                             "tiny-deepseek-v3" };

	(void)state;
	for (int i = 0; i < 4; i++) {
		char *dir = temp_dir();
		km_tokenizer *tokenizer;
		km_synth_result result;
		km_weights w;
		km_config c;
		km_err err;

		make(dir, names[i], (km_synth_options){ .seed = 5 }, &result);
		if (km_config_load(&c, dir, &err) < 0 || km_weights_open(&w, &c, dir, &err) < 0)
			fail_msg("%s: %s", names[i], err.msg);
		assert_int_equal(result.bytes, w.text_bytes + w.expert_bytes + w.vision_bytes);
		assert_int_equal(c.eos_count, 2);
		/* deviations of 1/sqrt(inputs) and, into the residual stream, of 1/sqrt(2 layers)
		 * times that */
		assert_true(fabs(rms_of_row(&w.layer[2].expert_up[7], 9) * 16 - 1) < 0.3);
		assert_true(fabs(rms_of_row(&w.layer[2].q_a, 3) * 16 - 1) < 0.3);
		assert_true(fabs(rms_of_row(&w.layer[2].expert_down[7], 9) * 8 * sqrt(8) - 1) <
		            0.5);
		assert_true(fabs(rms_of_row(&w.embed, 9) - 1) < 0.2);
		assert_true(fabs(w.norm[5] - 1) < 0.3);
		km_weights_close(&w);
		km_config_release(&c);
		assert_int_equal(km_tokenizer_open(&tokenizer, dir, &err), 0);
		assert_int_equal(km_tokenizer_special(tokenizer, "<|im_end|>"), 1026);
		km_tokenizer_close(tokenizer);
		remove_dir(dir);
	}
}

static void bytes_depend_on_the_seed_alone(void **state)
{
	char *dirs[3] = { temp_dir(), temp_dir(), temp_dir() };
	uint64_t hash[3];
	km_synth_result result;

	(void)state;
	for (int i = 0; i < 3; i++) {
		omp_set_num_threads(i == 0 ? 1 : 3);
		make(dirs[i], "tiny-k25", (km_synth_options){ .seed = i == 2 ? 8 : 7 }, &result);
		hash[i] = file_hash(dirs[i], "model.safetensors");
		remove_dir(dirs[i]);
	}
	omp_set_num_threads(omp_get_num_procs());
	assert_true(hash[0] == hash[1]);
	assert_true(hash[0] != hash[2]);
	if (hash[0] != UINT64_C(0xd25519c793f3c4ef))
		fail_msg("the bytes of seed 7 changed: %#llx", (unsigned long long)hash[0]);
}

static void shards_and_layers_are_as_asked(void **state)
{
	char *dir = temp_dir(), *whole = temp_dir();
	km_synth_result result;
	km_weights w, all;
	km_config c;
	km_err err;

	(void)state;
	make(dir, "tiny-k25", (km_synth_options){ .seed = 7, .layers = 2, .shard_bytes = 1 << 20 },
	     &result);
	assert_true(result.shards > 2);
	assert_int_equal(km_config_load(&c, dir, &err), 0);
	assert_int_equal(c.num_hidden_layers, 2);
	if (km_weights_open(&w, &c, dir, &err) < 0)
		fail_msg("%s", err.msg);
	km_config_release(&c);
	make(whole, "tiny-k25", (km_synth_options){ .seed = 7 }, &result);
	assert_int_equal(result.shards, 1);
	assert_int_equal(km_config_load(&c, whole, &err), 0);
	assert_int_equal(km_weights_open(&all, &c, whole, &err), 0);
	/* what is there has the numbers that it has in the whole model */
	assert_memory_equal(w.layer[1].expert_up[3].data, all.layer[1].expert_up[3].data,
	                    64 * 256 / 2);
	assert_memory_equal(w.layer[1].o.data, all.layer[1].o.data, 256 * 128 * 2);
	km_weights_close(&all);
	km_weights_close(&w);
	km_config_release(&c);
	remove_dir(dir);
	remove_dir(whole);
}

/* The folder of a config stands for it, down to the copy of its text. */
static void a_folder_stands_for_its_config(void **state)
{
	char *dir = temp_dir(), *again = temp_dir();
	km_synth_options o = { .config_path = dir, .out_dir = again, .quiet = true };
	km_synth_result result;
	km_err err;

	(void)state;
	make(dir, "tiny-k25", (km_synth_options){ .seed = 0 }, &result);
	if (km_synthesize(&o, &result, &err) < 0)
		fail_msg("%s", err.msg);
	assert_true(file_hash(dir, "config.json") == file_hash(again, "config.json"));
	assert_true(file_hash(dir, "model.safetensors") == file_hash(again, "model.safetensors"));
	remove_dir(dir);
	remove_dir(again);
}

static void nothing_is_left_when_it_stops(void **state)
{
	char *dir = temp_dir(), *inside = km_xasprintf("%s/new", dir);
	volatile sig_atomic_t cancel = 1;
	km_synth_options o = { .config_path = "configs/models/tiny-k25.json",
		               .out_dir = inside,
		               .quiet = true,
		               .cancel = &cancel };
	km_synth_result result;
	struct stat st;
	km_err err;

	(void)state;
	assert_int_equal(km_synthesize(&o, &result, &err), KM_ECANCELED);
	assert_int_equal(stat(inside, &st), -1);
	/* 595 GB; stopped at once where they fit */
	o.config_path = "configs/models/kimi-k2.5.json";
	if (km_synthesize(&o, &result, &err) == KM_ENOMEM)
		assert_non_null(strstr(err.msg, "GB are needed"));
	else
		assert_int_equal(err.code, KM_ECANCELED);
	assert_int_equal(result.bytes / 1000000000, 595);
	assert_int_equal(stat(inside, &st), -1);
	o.layers = 62;
	assert_int_equal(km_synthesize(&o, &result, &err), KM_EINVAL);
	o.layers = 0;
	write_text(dir, "file", "mine");
	o.out_dir = dir;
	assert_int_equal(km_synthesize(&o, &result, &err), KM_EINVAL);
	assert_non_null(strstr(err.msg, "is not an empty folder"));
	free(inside);
	remove_dir(dir);
}

/* What makes a random model useful to test with: finite logits of the deviation that the head aims
 * at, distributions that are peaked but not certain, different tokens after different prompts. */
static void random_models_compute_ordinary_numbers(void **state)
{
	enum { T = 48, PAGE = 16, VOCAB = 1280 };
	static const char *const names[] = { "tiny-k2", "tiny-k2-thinking", "tiny-k25",
		                             "tiny-deepseek-v3" };
	static const int32_t seq_start[] = { 0, T }, kv_len[] = { T }, pages[] = { 0, 1, 2 };
	int32_t ids[T], positions[T];
	km_batch batch = { .tokens = T, .seqs = 1, .ids = ids, .positions = positions,
		           .slots = positions, .seq_start = seq_start, .kv_len = kv_len,
		           .pages = pages, .pages_per_seq = 3, .page_size = PAGE,
		           .logit_row = positions, .logit_rows = T };
	km_model_options o = { .max_batch_tokens = T, .max_seqs = 1, .max_logit_rows = T,
		               .max_context = T, .kv_slots = T, .kv_dtype = KM_KV_BF16 };

	(void)state;
	for (int i = 0; i < T; i++) {
		ids[i] = (int32_t)(km_rng_u64(9, (uint64_t)i) % 1024);
		positions[i] = i;
	}
	for (int n = 0; n < 4; n++) {
		char *dir = temp_dir();
		double square = 0, peak = 0;
		int changes = 0, before = -1;
		km_synth_result result;
		const float *logits;
		km_model *model;
		km_err err;

		make(dir, names[n], (km_synth_options){ .seed = 11 }, &result);
		if (km_model_open(&model, dir, &o, &err) < 0 ||
		    km_model_forward(model, &batch, &logits, &err) < 0)
			fail_msg("%s: %s", names[n], err.msg);
		for (int t = 0; t < T; t++) {
			const float *row = logits + (size_t)t * VOCAB;
			double sum = 0;
			int best = 0;

			for (int v = 0; v < VOCAB; v++) {
				assert_true(isfinite(row[v]));
				square += (double)row[v] * row[v] / ((double)T * VOCAB);
				if (row[v] > row[best])
					best = v;
			}
			for (int v = 0; v < VOCAB; v++)
				sum += exp((double)row[v] - row[best]);
			peak += 1 / sum / T;
			changes += best != before;
			before = best;
		}
		if (sqrt(square) < 3 || sqrt(square) > 5 || peak < 0.1 || peak > 0.8 ||
		    changes < T / 2)
			fail_msg("%s: deviation %.2f, mean peak %.2f, %d changes", names[n],
			         sqrt(square), peak, changes);
		km_model_close(model);
		remove_dir(dir);
	}
}

static void the_tables_are_normal(void **state)
{
	km_synth_tables t;
	int sum = 0;

	(void)state;
	km_synth_tables_init(&t);
	for (int i = 0; i < 256; i++) {
		assert_true(t.int4[i] >= 1 && t.int4[i] <= 15);
		assert_true((t.fp8[i] & 0x7f) != 0x7f);
		sum += t.int4[i] - 8;
	}
	assert_int_equal(sum, 0);
	assert_int_equal(t.int4[0], 1);
	assert_int_equal(t.int4[255], 15);
	assert_true(km_f8_e4m3_to_f32(t.fp8[255]) == 448);
	assert_true(t.int4_rms > 2 && t.int4_rms < 4);
}

int main(void)
{
	const struct CMUnitTest all[] = {
		cmocka_unit_test(every_tiny_config_makes_a_checkpoint),
		cmocka_unit_test(bytes_depend_on_the_seed_alone),
		cmocka_unit_test(shards_and_layers_are_as_asked),
		cmocka_unit_test(a_folder_stands_for_its_config),
		cmocka_unit_test(nothing_is_left_when_it_stops),
		cmocka_unit_test(random_models_compute_ordinary_numbers),
		cmocka_unit_test(the_tables_are_normal),
	};

	return cmocka_run_group_tests(all, NULL, NULL);
}
