/* model/config: the published configs, precedence, and one sentence for what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/stat.h>

#include "base/mem.h"
#include "base/outfile.h"
#include "model/config.h"

static void load(km_config *config, const char *name)
{
	char *path = km_xasprintf("configs/models/%s.json", name);
	km_err err = { 0 };

	if (km_config_load(config, path, &err) < 0)
		fail_msg("%s", err.msg);
	free(path);
}

static void the_published_configs_are_read(void **state)
{
	km_config c;

	(void)state;
	load(&c, "kimi-k2-instruct");
	assert_int_equal(c.kind, KM_KIND_KIMI_K2);
	assert_int_equal(c.n_routed_experts, 384);
	assert_int_equal(c.quant.method, KM_QUANT_FP8_BLOCK);
	assert_int_equal(c.quant.block_rows, 128);
	assert_true(c.rope.yarn && c.rope.factor == 32 && c.rope.beta_fast == 1);
	assert_true(fabs(km_config_softmax_scale(&c) - 0.13086080) < 1e-7);
	assert_true(c.rms_norm_eps == 1e-6);
	assert_false(km_config_is_moe_layer(&c, 0));
	assert_true(km_config_is_moe_layer(&c, 1));
	km_config_release(&c);

	load(&c, "kimi-k2.5");
	assert_int_equal(c.kind, KM_KIND_KIMI_K25);
	assert_string_equal(c.architecture, "KimiK25ForConditionalGeneration");
	assert_int_equal(c.hidden_size, 7168);
	assert_int_equal(c.quant.method, KM_QUANT_INT4_PACKED);
	assert_int_equal(c.quant.group_size, 32);
	assert_int_equal(c.quant.ignore_count, 4);
	assert_true(c.rope.beta_fast == 32 && c.rope.factor == 64 && c.rms_norm_eps == 1e-5);
	assert_true(fabs(km_config_softmax_scale(&c) - 0.14467963) < 1e-7);
	assert_true(c.vision.present);
	assert_int_equal(c.vision.intermediate_size, 4304);
	assert_int_equal(c.vision.num_hidden_layers, 27);
	assert_int_equal(c.media_placeholder_token_id, 163605);
	assert_int_equal(c.eos_count, 1);
	assert_int_equal(c.dtype, KM_BF16);
	km_config_release(&c);

	load(&c, "deepseek-v3");
	assert_int_equal(c.kind, KM_KIND_DEEPSEEK_V3);
	assert_int_equal(c.n_group, 8);
	assert_int_equal(c.topk_group, 4);
	assert_int_equal(c.num_nextn_predict_layers, 1);
	assert_int_equal(c.pad_token_id, -1);
	assert_false(km_config_is_moe_layer(&c, 2));
	km_config_release(&c);
	for (size_t i = 0; i < 7; i++) {
		static const char *const others[] = { "kimi-k2-instruct-0905",
			                              "kimi-k2-thinking",
			                              "tiny-k2",
			                              "tiny-k2-thinking",
			                              "tiny-k25",
			                              "tiny-deepseek-v3",
			                              "mini" };

		load(&c, others[i]);
		km_config_release(&c);
	}
}

/* Reads configs/models/NAME.json with `edit` (a JSON merge patch; null sets null) laid over it. */
static void merge(json_t *into, json_t *edit)
{
	const char *key;
	json_t *value;

	json_object_foreach(edit, key, value) {
		json_t *old = json_object_get(into, key);

		if (json_is_object(value) && json_is_object(old))
			merge(old, value);
		else if (json_is_string(value) && !strcmp(json_string_value(value), "<remove>"))
			json_object_del(into, key);
		else
			json_object_set(into, key, value);
	}
}

static int parse_edited(km_config *c, const char *name, const char *edit, km_err *err)
{
	char *path = km_xasprintf("configs/models/%s.json", name), *text;
	json_t *doc = json_load_file(path, 0, NULL), *patch = json_loads(edit, 0, NULL);
	int rc;

	assert_non_null(doc);
	assert_non_null(patch);
	merge(doc, patch);
	text = json_dumps(doc, 0);
	rc = km_config_parse(c, text, strlen(text), "config.json", err);
	free(text);
	free(path);
	json_decref(doc);
	json_decref(patch);
	return rc;
}

static void what_is_wrong_or_unsupported_is_named(void **state)
{
	static const struct {
		const char *base, *edit;
		int code;
		const char *says;
	} cases[] = {
		{ "kimi-k2-instruct", "{\"hidden_size\":\"<remove>\"}", KM_EFORMAT,
		  "config.json: hidden_size: this field is missing" },
		{ "kimi-k2-instruct", "{\"hidden_size\":7168.0}", KM_EFORMAT,
		  "config.json: hidden_size: an integer is expected, this is a number with a "
		  "fraction" },
		{ "kimi-k2-instruct", "{\"hidden_size\":0}", KM_EFORMAT,
		  "config.json: hidden_size: a value from 1 to 1048576 is expected, this is 0" },
		{ "kimi-k2-instruct", "{\"hidden_act\":\"gelu\"}", KM_EUNSUPPORTED,
		  "config.json: hidden_act: only \"silu\" is supported, not \"gelu\"" },
		{ "kimi-k2-instruct", "{\"model_type\":\"llama\"}", KM_EUNSUPPORTED,
		  "model_type: \"llama\"" },
		{ "kimi-k2-instruct", "{\"architectures\":[\"X\"]}", KM_EUNSUPPORTED, "not as X" },
		{ "kimi-k2-instruct", "{\"attention_bias\":true}", KM_EUNSUPPORTED,
		  "attention_bias" },
		{ "kimi-k2-instruct", "{\"rope_interleave\":false}", KM_EUNSUPPORTED,
		  "rope_interleave" },
		{ "kimi-k2-instruct", "{\"rope_scaling\":{\"type\":\"linear\"}}", KM_EUNSUPPORTED,
		  "config.json: rope_scaling.type: rope type \"linear\" is not supported" },
		{ "kimi-k2-instruct", "{\"rope_scaling\":{\"factor\":\"<remove>\"}}", KM_EFORMAT,
		  "rope_scaling.factor: this field is missing" },
		{ "kimi-k2-instruct", "{\"topk_method\":\"group_limited_greedy\"}", KM_EUNSUPPORTED,
		  "topk_method" },
		{ "kimi-k2-instruct", "{\"scoring_func\":\"tanh\"}", KM_EUNSUPPORTED,
		  "scoring_func" },
		{ "kimi-k2-instruct", "{\"num_hidden_layers\":4096}", KM_ELIMIT,
		  "384 experts in 4096 layers are more than the 1048576 supported" },
		{ "kimi-k2-instruct", "{\"num_experts_per_tok\":385}", KM_EFORMAT,
		  "num_experts_per_tok" },
		{ "deepseek-v3", "{\"n_group\":7}", KM_EFORMAT,
		  "256 experts cannot be split in 7 groups" },
		{ "deepseek-v3", "{\"n_group\":128,\"topk_group\":3}", KM_EFORMAT,
		  "8 experts cannot come from 3 of 128 groups" },
		{ "kimi-k2-instruct", "{\"torch_dtype\":\"int8\"}", KM_EUNSUPPORTED,
		  "torch_dtype" },
		{ "kimi-k2-instruct", "{\"eos_token_id\":[1,2,3,4,5,6,7,8,9]}", KM_ELIMIT,
		  "eos_token_id" },
		{ "kimi-k2-instruct", "{\"eos_token_id\":\"</s>\"}", KM_EFORMAT, "eos_token_id" },
		{ "kimi-k2.5", "{\"text_config\":\"<remove>\"}", KM_EFORMAT,
		  "config.json: text_config: this field is missing" },
		{ "kimi-k2.5",
		  "{\"text_config\":{\"kv_lora_rank\":\"<remove>\"},\"kv_lora_rank\":512}",
		  KM_EFORMAT, "config.json: text_config.kv_lora_rank: this field is missing" },
		{ "kimi-k2.5", "{\"text_config\":{\"model_type\":\"llama\"}}", KM_EUNSUPPORTED,
		  "text_config.model_type" },
		{ "kimi-k2.5", "{\"vision_config\":{\"text_hidden_size\":4096}}", KM_EFORMAT,
		  "vision_config.text_hidden_size" },
		{ "kimi-k2.5", "{\"vision_config\":{\"mm_projector_type\":\"mlp\"}}",
		  KM_EUNSUPPORTED, "mm_projector_type" },
		{ "kimi-k2-instruct", "{\"quantization_config\":{\"weight_block_size\":null}}",
		  KM_EUNSUPPORTED, "one scale per tensor" },
		{ "kimi-k2-instruct",
		  "{\"quantization_config\":{\"activation_scheme\":\"static\"}}", KM_EUNSUPPORTED,
		  "quantization_config.activation_scheme" },
		{ "kimi-k2-instruct", "{\"quantization_config\":{\"fmt\":\"e5m2\"}}",
		  KM_EUNSUPPORTED, "fmt" },
		{ "kimi-k2-instruct", "{\"quantization_config\":{\"quant_method\":\"gptq\"}}",
		  KM_EUNSUPPORTED, "\"gptq\" is not supported" },
		{ "kimi-k2-instruct", "{\"quantization_config\":{\"quant_method\":\"quark\"}}",
		  KM_EUNSUPPORTED, "MXFP4" },
		{ "kimi-k2.5",
		  "{\"quantization_config\":{\"quant_method\":\"modelopt\",\"quant_algo\":"
		  "\"NVFP4\"}}",
		  KM_EUNSUPPORTED, "ModelOpt's NVFP4 quantisation is not supported" },
		{ "kimi-k2-thinking",
		  "{\"quantization_config\":{\"format\":\"nvfp4-pack-quantized\"}}",
		  KM_EUNSUPPORTED, "nvfp4-pack-quantized" },
		{ "kimi-k2-thinking",
		  "{\"quantization_config\":{\"kv_cache_scheme\":{\"num_bits\":8}}}",
		  KM_EUNSUPPORTED, "kv_cache_scheme" },
		{ "kimi-k2-thinking", "{\"quantization_config\":{\"config_groups\":{\"g2\":{}}}}",
		  KM_EUNSUPPORTED, "exactly one group is supported, there are 2" },
		{ "kimi-k2-thinking", "{\"quantization_config\":{\"ignore\":[1]}}", KM_EFORMAT,
		  "quantization_config.ignore: entry 0 is not a string" },
	};
	km_config c;

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		km_err err = { 0 };
		int rc = parse_edited(&c, cases[i].base, cases[i].edit, &err);

		if (rc != cases[i].code || !strstr(err.msg, cases[i].says))
			fail_msg("%s: code %d, '%s'", cases[i].edit, rc, err.msg);
	}
}

static void packed_weights_other_than_ours_are_named(void **state)
{
	static const char *const cases[][2] = {
		{ "\"num_bits\":8", "only 4 bits are supported, not 8" },
		{ "\"symmetric\":false", "asymmetric int4" },
		{ "\"actorder\":\"group\"", "actorder" },
		{ "\"type\":\"float\"", "only \"int\" is supported" },
		{ "\"strategy\":\"tensor\"", "strategy" },
		{ "\"group_size\":16", "only 32, 64 and 128 are supported, not 16" },
		{ "\"dynamic\":true", "dynamic" },
	};
	km_config c;
	km_err err;

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		char *edit =
			km_xasprintf("{\"quantization_config\":{\"config_groups\":{\"group_0\":"
		                     "{\"weights\":{%s}}}}}",
		                     cases[i][0]);

		assert_int_equal(parse_edited(&c, "kimi-k2-thinking", edit, &err), KM_EUNSUPPORTED);
		assert_non_null(strstr(err.msg, cases[i][1]));
		free(edit);
	}
	assert_int_equal(
		parse_edited(
			&c, "kimi-k2-thinking",
			"{\"quantization_config\":{\"config_groups\":{\"group_0\":{\"weights\":"
			"{\"strategy\":\"channel\",\"group_size\":null}}}}}",
			&err),
		0);
	assert_int_equal(c.quant.group_size, 0);
	km_config_release(&c);
}

/* Spec: the top-level block wins over the one left in text_config. */
static void the_outer_quantisation_wins(void **state)
{
	km_config c;
	km_err err;

	(void)state;
	assert_int_equal(parse_edited(&c, "kimi-k2.5",
	                              "{\"quantization_config\":{\"quant_method\":\"fp8\","
	                              "\"weight_block_size\":[128,128]}}",
	                              &err), 0);
	assert_int_equal(c.quant.method, KM_QUANT_FP8_BLOCK);
	km_config_release(&c);
}

static void other_spellings_mean_the_same(void **state)
{
	km_config c;
	km_err err;

	(void)state;
	assert_int_equal(
		parse_edited(&c, "kimi-k2-instruct",
	                     "{\"rope_scaling\":\"<remove>\",\"rope_theta\":\"<remove>\","
	                     "\"rope_parameters\":{\"rope_type\":\"yarn\",\"rope_theta\":10000.0,"
	                     "\"factor\":40,\"original_max_position_embeddings\":4096},"
	                     "\"q_lora_rank\":null,\"eos_token_id\":[7,8,7]}",
	                     &err),
		0);
	assert_true(c.rope.yarn && c.rope.theta == 10000 && c.rope.beta_fast == 32 &&
	            c.rope.mscale_all_dim == 0);
	assert_int_equal(c.q_lora_rank, 0);
	assert_int_equal(c.eos_count, 2);
	assert_true(fabs(km_config_softmax_scale(&c) - 1 / sqrt(192)) < 1e-12);
	km_config_release(&c);
	assert_int_equal(parse_edited(&c, "kimi-k2-instruct",
	                              "{\"rope_scaling\":null,\"n_routed_experts\":null}", &err),
	                 0);
	assert_false(c.rope.yarn);
	assert_false(km_config_is_moe_layer(&c, 5));
	km_config_release(&c);
	assert_int_equal(
		parse_edited(
			&c, "kimi-k2.5",
			"{\"vision_config\":{\"vt_hidden_size\":\"<remove>\",\"hidden_size\":640,"
			"\"merge_kernel_size\":2}}",
			&err),
		0);
	assert_int_equal(c.vision.hidden_size, 640);
	assert_int_equal(c.vision.merge_kernel_width, 2);
	km_config_release(&c);
}

static void save(const char *dir, const char *name, const char *text)
{
	char *path = km_xasprintf("%s/%s", dir, name);

	assert_int_equal(km_outfile_save(path, text, strlen(text), NULL), 0);
	free(path);
}

static void drop(const char *dir, const char *name)
{
	char *path = km_xasprintf("%s/%s", dir, name);

	unlink(path);
	free(path);
}

static void a_folder_adds_its_other_files(void **state)
{
	char dir[] = "/tmp/km-config-XXXXXX";
	char *text;
	json_t *doc = json_load_file("configs/models/tiny-k25.json", 0, NULL);
	km_config c;
	km_err err;

	(void)state;
	assert_non_null(mkdtemp(dir));
	assert_int_equal(km_config_load(&c, dir, &err), KM_ENOTFOUND);
	assert_non_null(strstr(err.msg, "/config.json"));
	text = json_dumps(doc, 0);
	save(dir, "config.json", text);
	free(text);
	save(dir, "generation_config.json", "{\"eos_token_id\": [1026]}");
	save(dir, "hf_quant_config.json", "{\"quantization\":{\"quant_algo\":\"NVFP4\"}}");
	/* a block in config.json hides the other file */
	assert_int_equal(km_config_load(&c, dir, &err), 0);
	assert_int_equal(c.eos_count, 2);
	assert_int_equal(c.eos[0], 1025);
	assert_int_equal(c.eos[1], 1026);
	km_config_release(&c);
	json_object_del(json_object_get(doc, "text_config"), "quantization_config");
	text = json_dumps(doc, 0);
	save(dir, "config.json", text);
	free(text);
	assert_int_equal(km_config_load(&c, dir, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "hf_quant_config.json: quant_algo: ModelOpt's NVFP4"));
	drop(dir, "config.json");
	drop(dir, "generation_config.json");
	drop(dir, "hf_quant_config.json");
	assert_int_equal(rmdir(dir), 0);
	json_decref(doc);
}

static void broken_json_is_one_sentence(void **state)
{
	static const char *const texts[] = {
		"", "{", "[]", "{} x", "{\"a\":1,\"a\":2}", "{\"a\":\"\\u0000\"}", "nul"
	};
	km_config c;

	(void)state;
	for (size_t i = 0; i < sizeof(texts) / sizeof(*texts); i++) {
		km_err err = { 0 };

		assert_int_equal(
			km_config_parse(&c, texts[i], strlen(texts[i]), "config.json", &err),
			KM_EFORMAT);
		assert_true(!strncmp(err.msg, "config.json: ", 13));
	}
}

int main(void)
{
	const struct CMUnitTest all[] = {
		cmocka_unit_test(the_published_configs_are_read),
		cmocka_unit_test(what_is_wrong_or_unsupported_is_named),
		cmocka_unit_test(packed_weights_other_than_ours_are_named),
		cmocka_unit_test(the_outer_quantisation_wins),
		cmocka_unit_test(other_spellings_mean_the_same),
		cmocka_unit_test(a_folder_adds_its_other_files),
		cmocka_unit_test(broken_json_is_one_sentence),
	};

	return cmocka_run_group_tests(all, NULL, NULL);
}
