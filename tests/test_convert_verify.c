/* model/verify and model/inspect: good checkpoints pass, each kind of damage is one sentence. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <math.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "format/shards.h"
#include "model/inspect.h"
#include "model/synthesize.h"
#include "model/verify.h"
#include "support/fake_checkpoint.h"

static char *synthesized(const char *name, int64_t shard_bytes)
{
	char *dir = temp_dir(), *path = km_xasprintf("configs/models/%s.json", name);
	km_synth_options o = { .config_path = path,
		               .out_dir = dir,
		               .seed = 3,
		               .shard_bytes = shard_bytes,
		               .quiet = true };
	km_synth_result result;
	km_err err;

	if (km_synthesize(&o, &result, &err) < 0)
		fail_msg("%s", err.msg);
	free(path);
	return dir;
}

/* Writes over part of a tensor's data, wherever it is. */
static void poke(const char *dir, const char *tensor, int64_t at, const void *bytes, size_t count)
{
	km_findings findings;
	km_shards shards;
	km_err err;
	bool done = false;

	km_findings_init(&findings, 1);
	assert_int_equal(km_shards_open(&shards, dir, &findings, &err), 0);
	for (int64_t i = 0; i < shards.count; i++) {
		const km_tensor *t = shards.tensors[i];
		int fd;

		if (strcmp(t->name, tensor) != 0)
			continue;
		fd = open(km_shards_path(&shards, t), O_WRONLY);
		assert_int_equal(pwrite(fd, bytes, count,
		                        (off_t)(shards.files[t->file].data_at + t->offset) + at),
		                 count);
		close(fd);
		done = true;
	}
	assert_true(done);
	km_findings_release(&findings);
	km_shards_close(&shards);
}

static void expect(const char *dir, const char *const *says, int count)
{
	km_verify_options o = { .dir = dir, .quiet = true };
	km_verify_result result;
	km_findings f;
	km_err err;

	km_findings_init(&f, 20);
	if (km_verify(&o, &f, &result, &err) < 0)
		fail_msg("%s", err.msg);
	for (int i = 0; i < count; i++) {
		bool found = false;

		for (int k = 0; k < f.kept && !found; k++)
			found = strstr(f.items[k].sentence, says[i]) != NULL;
		if (!found)
			fail_msg("no finding says '%s'; the first of %d is '%s'", says[i],
			         (int)f.count, f.kept ? f.items[0].sentence : "");
	}
	if (f.count != count)
		fail_msg("%d findings, not %d; the last kept is '%s'", (int)f.count, count,
		         f.items[f.kept - 1].sentence);
	km_findings_release(&f);
}

static void what_we_make_is_good(void **state)
{
	static const char *const names[] = { "tiny-k2", "tiny-k2-thinking", "tiny-k25",
		                             "tiny-deepseek-v3" };

	(void)state;
	for (int i = 0; i < 4; i++) {
		char *dir = synthesized(names[i], i % 2 ? 1 << 20 : 0);

		expect(dir, NULL, 0);
		remove_dir(dir);
	}
}

static void damage_in_the_data_is_found(void **state)
{
	static const uint16_t bf16_nan = 0x7fc1, bf16_inf = 0xff80, bf16_minus = 0xbf80;
	static const int32_t wrong_shape[2] = { 64, 255 };
	static const unsigned char zeros[8192];
	char *dir = synthesized("tiny-k25", 1 << 20);

	(void)state;
	poke(dir, "language_model.model.embed_tokens.weight", 2 * 77, &bf16_nan, 2);
	poke(dir, "language_model.model.embed_tokens.weight", 2 * 99, &bf16_inf, 2);
	poke(dir, "language_model.model.layers.1.mlp.experts.3.up_proj.weight_scale", 2 * 5,
	     &bf16_minus, 2);
	poke(dir, "language_model.model.layers.1.mlp.experts.4.up_proj.weight_scale", 0, &bf16_nan,
	     2);
	poke(dir, "language_model.model.layers.2.mlp.experts.0.gate_proj.weight_shape", 0,
	     wrong_shape, 8);
	poke(dir, "language_model.model.layers.2.mlp.experts.9.gate_proj.weight_packed", 0, zeros,
	     8192);
	poke(dir, "vision_tower.encoder.blocks.0.wo.bias", 0, &bf16_nan, 2);
	expect(dir,
	       (const char *[]){
		       "embed_tokens.weight: has 1 NaN and 1 infinite elements, the first at 77",
		       "experts.3.up_proj.weight_scale: has 1 negative scales, the first at 5",
		       "experts.4.up_proj.weight_scale: has 1 NaN and 0 infinite elements, the "
	               "first at 0",
		       "experts.0.gate_proj.weight_shape: says [64, 255], the config [64, 256]",
		       "experts.9.gate_proj.weight_packed: has 2 stretches of 8192 weights of -8, "
	               "the first at",
		       "blocks.0.wo.bias: has 1 NaN",
	       },
	       6);
	remove_dir(dir);
}

static void damage_in_fp8_is_found(void **state)
{
	static const unsigned char nan = 0xff;
	static const float minus = -1, infinite = INFINITY;
	char *dir = synthesized("tiny-k2", 0);

	(void)state;
	poke(dir, "model.layers.0.mlp.up_proj.weight", 1000, &nan, 1);
	poke(dir, "model.layers.0.mlp.up_proj.weight_scale_inv", 4, &minus, 4);
	poke(dir, "model.layers.1.mlp.gate.e_score_correction_bias", 8, &infinite, 4);
	/* biases may be negative */
	poke(dir, "model.layers.2.mlp.gate.e_score_correction_bias", 8, &minus, 4);
	expect(dir,
	       (const char *[]){
		       "up_proj.weight: has 1 NaN and 0 infinite elements, the first at 1000",
		       "up_proj.weight_scale_inv: has 1 negative scales, the first at 1",
		       "e_score_correction_bias: has 0 NaN and 1 infinite elements, the first at "
	               "2" },
	       3);
	remove_dir(dir);
}

static void all_problems_are_listed(void **state)
{
	char *dir = temp_dir();
	fake_checkpoint fake;
	km_config c;
	km_err err;

	(void)state;
	assert_int_equal(km_config_load(&c, "configs/models/tiny-deepseek-v3.json", &err), 0);
	fake_init(&fake, &c);
	fake_remove(&fake, "model.layers.3.self_attn.o_proj.weight");
	fake_add(&fake, "model.layers.9.extra", KM_U8, 1, (int64_t[]){ 1 });
	fake_reshape(fake_find(&fake, "model.norm.weight"), KM_BF16, 1, (int64_t[]){ 255 });
	fake_write(&fake, dir, 2);
	copy_config(dir, "tiny-deepseek-v3");
	write_text(dir, "tiktoken.model", "not base64!\n");
	expect(dir,
	       (const char *[]){ "o_proj.weight is missing", "model.layers.9.extra is extra",
	                         "model.norm.weight: BF16 [256] is expected, this is BF16 [255]",
	                         "tiktoken.model" },
	       4);
	fake_release(&fake);
	km_config_release(&c);
	remove_dir(dir);
}

/* Without a config the data is read all the same. */
static void a_bad_config_is_a_finding(void **state)
{
	static const uint16_t nan = 0x7fc0;
	char *dir = synthesized("tiny-deepseek-v3", 0);

	(void)state;
	write_text(dir, "config.json", "{}");
	poke(dir, "model.norm.weight", 4, &nan, 2);
	expect(dir,
	       (const char *[]){
		       "config.json: model_type: this field is missing",
		       "model.norm.weight: has 1 NaN and 0 infinite elements, the first at 2" },
	       2);
	remove_dir(dir);
}

static void a_cut_file_is_one_finding_and_the_rest_is_read(void **state)
{
	char *dir = synthesized("tiny-deepseek-v3", 2 << 20), *path;
	static const uint16_t nan = 0x7fc0;
	km_findings findings;
	km_shards shards;
	km_err err;
	int names;

	(void)state;
	km_findings_init(&findings, 1);
	assert_int_equal(km_shards_open(&shards, dir, &findings, &err), 0);
	assert_true(shards.file_count >= 3);
	path = km_xstrdup(shards.files[1].path);
	names = shards.files[1].count;
	poke(dir, shards.files[0].tensors[0].name, 0, &nan, 2);
	assert_int_equal(truncate(path, (off_t)shards.files[1].size - 1), 0);
	km_shards_close(&shards);
	km_findings_release(&findings);
	km_findings_init(&findings, 1000);
	{
		km_verify_options o = { .dir = dir, .quiet = true };
		km_verify_result result;

		assert_int_equal(km_verify(&o, &findings, &result, &err), 0);
		assert_non_null(strstr(findings.items[0].sentence, "is truncated: tensor "));
		/* the file, what it held, the NaN elsewhere */
		assert_int_equal(findings.count, 1 + names + 1);
		assert_non_null(strstr(findings.items[findings.kept - 1].sentence, "1 NaN"));
	}
	km_findings_release(&findings);
	free(path);
	remove_dir(dir);
}

/* Loading minds neither (tests/test_weights.c). */
static void what_loading_leaves_alone_is_listed(void **state)
{
	char *dir = synthesized("tiny-deepseek-v3", 0);

	(void)state;
	write_text(dir, "model-00001-of-00064.safetensors", "remains of another download");
	write_text(dir, "notes.txt", "not a weight");
	expect(dir,
	       (const char *[]){ "/model-00001-of-00064.safetensors: is not read: there is no "
	                         "model.safetensors.index.json" },
	       1);
	remove_dir(dir);
}

static void a_tower_that_is_absent_is_one_finding(void **state)
{
	char *dir = temp_dir();
	km_buf text = KM_BUF_INIT;
	fake_checkpoint fake;
	km_config c;
	km_err err;

	(void)state;
	assert_int_equal(km_config_load(&c, "configs/models/tiny-k25.json", &err), 0);
	fake_init(&fake, &c);
	fake_remove_all(&fake, "vision_tower.");
	fake_remove_all(&fake, "mm_projector.");
	fake_write(&fake, dir, 2);
	copy_config(dir, "tiny-k25");
	assert_int_equal(km_inspect(dir, false, 5, &text, &err), 0);
	assert_non_null(strstr(text.data, " 1 problems\n"));
	assert_non_null(strstr(text.data, "config.json has a vision_config, but no tensor of the"));
	km_buf_release(&text);
	fake_release(&fake);
	km_config_release(&c);
	remove_dir(dir);
}

static void interruption_is_not_a_verdict(void **state)
{
	char *dir = synthesized("tiny-k2", 0);
	volatile sig_atomic_t cancel = 1;
	km_verify_options o = { .dir = dir, .quiet = true, .cancel = &cancel };
	km_verify_result result;
	km_findings f;
	km_err err;

	(void)state;
	km_findings_init(&f, 5);
	assert_int_equal(km_verify(&o, &f, &result, &err), KM_ECANCELED);
	km_findings_release(&f);
	remove_dir(dir);
}

static void inspection_counts_what_is_there(void **state)
{
	char *dir = synthesized("tiny-k25", 0);
	km_buf text = KM_BUF_INIT;
	json_t *doc;
	km_err err;

	(void)state;
	assert_int_equal(km_inspect(dir, true, 5, &text, &err), 0);
	doc = json_loads(text.data, 0, NULL);
	assert_non_null(doc);
	assert_string_equal(json_string_value(json_object_get(doc, "kind")), "kimi_k25");
	assert_int_equal(json_integer_value(json_object_get(doc, "missing_tensors")), 0);
	assert_int_equal(json_integer_value(json_object_get(
				 json_object_get(json_object_get(doc, "classes"), "routed_experts"),
				 "tensors")),
	                 3 * 16 * 3 * 3);
	json_decref(doc);
	km_buf_clear(&text);
	/* total_size of the published checkpoint, to the byte */
	assert_int_equal(km_inspect("configs/models/kimi-k2.5.json", true, 5, &text, &err), 0);
	doc = json_loads(text.data, 0, NULL);
	assert_int_equal(json_integer_value(json_object_get(doc, "parameters")) / 1000000000, 1026);
	assert_int_equal(json_integer_value(json_object_get(doc, "active_parameters")) / 100000000,
	                 328);
	assert_int_equal(json_integer_value(json_object_get(doc, "bytes")), INT64_C(595148192736));
	json_decref(doc);
	km_buf_clear(&text);
	assert_int_equal(km_inspect(dir, false, 5, &text, &err), 0);
	assert_non_null(strstr(text.data, "1 file, 0 tensors missing, 0 problems"));
	km_buf_release(&text);
	remove_dir(dir);
}

/* Each size is allowed, their products and sums do not fit. */
static void sizes_whose_sums_do_not_fit_are_refused(void **state)
{
	static const struct {
		const char *key;
		int value;
	} sizes[] = {
		{ "hidden_size", 1 << 20 },           { "intermediate_size", 1 << 20 },
		{ "moe_intermediate_size", 1 << 20 }, { "n_routed_experts", 1 << 16 },
		{ "num_hidden_layers", 16 },
	};
	char *dir = temp_dir(), *config = km_xasprintf("%s/config.json", dir), *text;
	char *out = km_xasprintf("%s/out", dir);
	json_t *doc = json_load_file("configs/models/tiny-deepseek-v3.json", 0, NULL);
	km_synth_options o = { .config_path = config, .out_dir = out, .quiet = true };
	km_synth_result result;
	km_buf buf = KM_BUF_INIT;
	km_err err;

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		json_object_set_new(doc, sizes[i].key, json_integer(sizes[i].value));
	text = json_dumps(doc, 0);
	write_text(dir, "config.json", text);
	assert_int_equal(km_inspect(config, true, 5, &buf, &err), KM_ELIMIT);
	assert_non_null(strstr(err.msg, ".mlp.experts."));
	assert_non_null(strstr(err.msg, "with it the model has more than 5.76e+17 parameters"));
	assert_int_equal(km_synthesize(&o, &result, &err), KM_ELIMIT);
	km_buf_release(&buf);
	free(text);
	free(out);
	free(config);
	json_decref(doc);
	remove_dir(dir);
}

int main(void)
{
	const struct CMUnitTest all[] = {
		cmocka_unit_test(what_we_make_is_good),
		cmocka_unit_test(damage_in_the_data_is_found),
		cmocka_unit_test(damage_in_fp8_is_found),
		cmocka_unit_test(all_problems_are_listed),
		cmocka_unit_test(a_bad_config_is_a_finding),
		cmocka_unit_test(a_cut_file_is_one_finding_and_the_rest_is_read),
		cmocka_unit_test(what_loading_leaves_alone_is_listed),
		cmocka_unit_test(a_tower_that_is_absent_is_one_finding),
		cmocka_unit_test(interruption_is_not_a_verdict),
		cmocka_unit_test(inspection_counts_what_is_there),
		cmocka_unit_test(sizes_whose_sums_do_not_fit_are_refused),
	};

	return cmocka_run_group_tests(all, NULL, NULL);
}
