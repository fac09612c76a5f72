/*
 * Experts on their way to a GPU: a repacked checkpoint and the one it was made from have the same bits
 * there; a tuning file is found, its tiles are run, and a missing one is refused where it is required.
 * The model is small and random, of shapes that the tiles take.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "format/json.h"
#include "model/gpu.h"
#include "model/repack.h"
#include "model/synthesize.h"
#include "support/fake_checkpoint.h"

enum { ROWS = 40, PAGE = 16, PAGES = 8, STEPS = 3 };

/* A folder with the checkpoint `in` of two layers, and `repacked`. */
static char *make(const char *ignore)
{
	char *dir = temp_dir(), *config = km_xasprintf("%s/c.json", dir);
	char *in = km_xasprintf("%s/in", dir), *out = km_xasprintf("%s/repacked", dir);
	km_synth_options o = {
		.config_path = config, .out_dir = in, .seed = 5, .layers = 2, .quiet = true
	};
	km_repack_options r = { .dir = in, .out_dir = out, .quiet = true };
	km_repack_result repacked;
	km_synth_result result;
	json_t *doc, *text, *quant;
	char *dump;
	km_err err;

	doc = json_load_file("configs/models/tiny-k25.json", 0, NULL);
	assert_non_null(doc);
	text = json_object_get(doc, "text_config");
	json_object_set_new(text, "hidden_size", json_integer(1024));
	json_object_set_new(text, "moe_intermediate_size", json_integer(256));
	json_object_set_new(json_object_get(doc, "vision_config"), "text_hidden_size",
	                    json_integer(1024));
	quant = json_object_get(doc, "quantization_config");
	quant = quant ? quant : json_object_get(text, "quantization_config");
	if (ignore)
		json_array_append_new(json_object_get(quant, "ignore"), json_string(ignore));
	dump = json_dumps(doc, 0);
	write_text(dir, "c.json", dump);
	if (km_synthesize(&o, &result, &err) < 0 || km_repack(&r, &repacked, &err) < 0)
		fail_msg("%s", err.msg);
	free(dump);
	json_decref(doc);
	free(config);
	free(in);
	free(out);
	return dir;
}

static void remove_all(char *dir)
{
	remove_dir(km_xasprintf("%s/in", dir));
	remove_dir(km_xasprintf("%s/repacked", dir));
	remove_dir(dir);
}

static km_model_options options(void)
{
	return (km_model_options){ .max_batch_tokens = 64,
		                   .max_seqs = 4,
		                   .max_logit_rows = 64,
		                   .max_context = PAGE * PAGES,
		                   .kv_slots = PAGE * PAGES,
		                   .kv_dtype = KM_KV_BF16,
		                   .backend = KM_BACKEND_CUDA,
		                   .page_size = PAGE,
		                   .threads = 2,
		                   .quiet = true };
}

static km_model *open_model(const char *dir, const char *name, km_model_options o)
{
	char *path = km_xasprintf("%s/%s", dir, name);
	km_model *m;
	km_err err;

	if (km_model_open(&m, path, &o, &err) < 0)
		fail_msg("%s: %s", path, err.msg);
	free(path);
	return m;
}

/* Logits of a prompt's rows, then of one row a step: [ROWS + STEPS, vocab]. */
static float *run(km_model *m)
{
	int vocab = km_model_config(m)->vocab_size;
	float *all = km_xcalloc((size_t)(ROWS + STEPS) * (size_t)vocab, sizeof(*all));
	int32_t ids[ROWS], positions[ROWS], slots[ROWS], rows[ROWS], pages[PAGES], start[2] = { 0 };
	km_err err;

	for (int i = 0; i < PAGES; i++)
		pages[i] = i;
	for (int at = 0; at < ROWS + STEPS;) {
		int count = at ? 1 : ROWS, len = at + count;
		km_batch b = { .tokens = count,
			       .seqs = 1,
			       .decode_seqs = at > 0,
			       .ids = ids,
			       .positions = positions,
			       .slots = slots,
			       .seq_start = start,
			       .kv_len = &len,
			       .pages = pages,
			       .pages_per_seq = PAGES,
			       .page_size = PAGE,
			       .logit_row = rows,
			       .logit_rows = count };
		const float *logits;

		start[1] = count;
		for (int i = 0; i < count; i++) {
			ids[i] = (at + i) * 37 % (vocab < 256 ? vocab : 256);
			positions[i] = slots[i] = at + i;
			rows[i] = i;
		}
		if (km_model_forward(m, &b, &logits, &err) < 0)
			fail_msg("%s", err.msg);
		memcpy(all + (size_t)at * (size_t)vocab, logits,
		       (size_t)count * (size_t)vocab * sizeof(*all));
		at += count;
	}
	return all;
}

static void a_repacked_checkpoint_has_the_same_bits(void **state)
{
	char *dir = make(NULL);
	km_model *a = open_model(dir, "in", options()), *b = open_model(dir, "repacked", options());
	size_t bytes =
		(size_t)(ROWS + STEPS) * (size_t)km_model_config(a)->vocab_size * sizeof(float);
	float *x = run(a), *y = run(b);

	(void)state;
	assert_true(a->gpu->weights.layer[1].experts.packed &&
	            b->gpu->weights.layer[1].experts.packed);
	assert_int_equal(km_cuda_mark(a->gpu->cuda), km_cuda_mark(b->gpu->cuda));
	assert_memory_equal(x, y, bytes);
	assert_true(isfinite(x[0]) && x[0] != x[1]);
	free(x);
	free(y);
	km_model_close(a);
	km_model_close(b);
	remove_all(dir);
}

static void an_expert_of_another_type_is_refused(void **state)
{
	char *dir = make("re:.*layers\\.1\\.mlp\\.experts\\.3\\.up_proj.*");
	static const char *const names[] = { "in", "repacked" };
	km_model_options o = options();

	(void)state;
	for (int i = 0; i < 2; i++) {
		char *path = km_xasprintf("%s/%s", dir, names[i]);
		km_model *m;
		km_err err;

		assert_int_equal(km_model_open(&m, path, &o, &err), KM_EUNSUPPORTED);
		assert_non_null(strstr(err.msg, "expert 3 is another than expert 0"));
		free(path);
	}
	remove_all(dir);
}

/* Tables of the model's shape, on this device, whose tiles are not the plan's own. */
static char *write_table(const char *dir, const km_gpu *g, const km_config *c, int *tiles)
{
	km_moe_tune_context context = {
		.problem = km_gpu_moe_problem(c, &g->weights.layer[1].experts, 1, g->pdl),
		.device = { g->info.capability, g->info.multiprocessors },
	};
	static const int tokens[] = { 1, ROWS };
	km_tune_key key = km_moe_tune_key(&context.problem, g->info.name, g->info.runtime);
	km_tune_problem problem = km_moe_tune_problem(&context.problem);
	km_tune_schema schema = km_moe_tune_schema(&context);
	km_tune_table table = { .count = 0 };
	char *path = km_tune_path(dir, &key);
	km_err err;

	for (int i = 0; i < 2; i++) {
		km_tune_entry e = { .tokens = tokens[i] };
		km_moe_tile list[256];
		km_moe_plan own;
		int n;

		context.problem.tokens = tokens[i];
		assert_int_equal(km_moe_plan_make(&own, &context.problem, &context.device, NULL, &err),
		                 0);
		n = km_moe_candidates(&context.problem, &context.device, list, 256);
		for (int k = 0; k < n && k < 256; k++)
			if (list[k].block_m != own.tile.block_m || list[k].block_n != own.tile.block_n) {
				km_moe_tile_values(&list[k], e.values);
				tiles[i] = list[k].block_n;
			}
		assert_true(e.values[0]);
		km_tune_put(&table, &e);
	}
	if (km_tune_write(&table, path, &problem, &schema, &err) < 0)
		fail_msg("%s", err.msg);
	km_tune_release(&table);
	return path;
}

static void remove_table(char *path)
{
	*strrchr(path, '/') = '\0';
	remove_dir(path);
}

/* Of the best token's log-probability, over the rows. In a random model the choice of an expert turns
 * where two are close, and a row's difference jumps then: tests/gpu/test_forward_cuda.c. */
static double mean_difference(const float *x, const float *y, int vocab)
{
	double mean = 0;

	for (int r = 0; r < ROWS + STEPS; r++, x += vocab, y += vocab) {
		double sx = 0, sy = 0;
		int top = 0;

		for (int i = 0; i < vocab; i++) {
			sx += exp(x[i]);
			sy += exp(y[i]);
			top = x[i] > x[top] ? i : top;
		}
		mean += fabs(x[top] - log(sx) - (y[top] - log(sy))) / (ROWS + STEPS);
	}
	return mean;
}

static void a_table_is_found_and_run(void **state)
{
	char *dir = make(NULL), *tables = temp_dir(), *path;
	km_model_options o = options();
	km_model *own = open_model(dir, "in", o), *tuned, *refused;
	int vocab = km_model_config(own)->vocab_size, tiles[2] = { 0 }, others = 0;
	km_buf out = KM_BUF_INIT;
	char wanted[64];
	float *x, *y;
	double mean;
	km_err err;
	char *in = km_xasprintf("%s/in", dir);

	(void)state;
	o.moe_config_dir = tables;
	o.require_tuned = true;
	assert_int_equal(km_model_open(&refused, in, &o, &err), KM_ENOTFOUND);
	assert_non_null(strstr(err.msg, "there is no tuning file"));
	o.require_tuned = false; /* said on stderr */
	refused = open_model(dir, "in", o);
	assert_false(refused->gpu->tuning.found);
	km_model_close(refused);

	path = write_table(tables, own->gpu, km_model_config(own), tiles);
	o.require_tuned = true;
	tuned = open_model(dir, "in", o);
	assert_true(tuned->gpu->tuning.found);
	x = run(own);
	y = run(tuned);
	mean = mean_difference(x, y, vocab);
	for (int i = 0; i < (ROWS + STEPS) * vocab; i++)
		others += x[i] != y[i];
	print_message("figure: other tiles: %.0f%% of the logits have other bits, a log-probability "
	              "differs by %.2g in the mean\n",
	              100.0 * others / ((ROWS + STEPS) * vocab), mean);
	assert_true(mean < 0.2);
	km_model_explain(tuned, &out);
	assert_non_null(strstr(out.data, "tuning: entry 1 of "));
	assert_non_null(strstr(out.data, ", by a tuning entry"));
	snprintf(wanted, sizeof(wanted), " places x %d rows", tiles[0]);
	assert_non_null(strstr(out.data, wanted));
	km_buf_release(&out);
	free(x);
	free(y);
	km_model_close(own);
	km_model_close(tuned);
	remove_table(path);
	remove_dir(tables);
	remove_all(dir);
	free(in);
}

int main(void)
{
	static const struct CMUnitTest all[] = {
		cmocka_unit_test(a_repacked_checkpoint_has_the_same_bits),
		cmocka_unit_test(an_expert_of_another_type_is_refused),
		cmocka_unit_test(a_table_is_found_and_run),
	};
	km_err err;

	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	return cmocka_run_group_tests(all, NULL, NULL);
}
