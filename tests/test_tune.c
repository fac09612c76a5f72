/* device/tune, device/tuner, device/moe_tune: names by contract, hostile files, lookups, and the
 * search on a clock that is made up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/outfile.h"
#include "base/rng.h"
#include "device/moe_tune.h"
#include "device/tuner.h"
#include "format/json.h"
#include "model/moe_search.h"
#include "model/moe_tuning.h"
#include "support/fake_checkpoint.h"

static km_moe_tune_context context_of(int tp, int ep)
{
	km_moe_tune_context c = { .device = { 90, 132 } };
	km_config config;
	km_err err;

	if (km_config_load(&config, "configs/models/kimi-k2.5.json", &err) < 0 ||
	    km_moe_tuning_shape(&c.problem, &config, tp, ep, &err) < 0)
		fail_msg("%s", err.msg);
	km_config_release(&config);
	return c;
}

static void names_follow_the_contract(void **state)
{
	static const struct {
		km_tune_key key;
		const char *name;
	} cases[] = {
		{ { .experts = 384, .n = 128, .device_name = "NVIDIA H200", .dtype = "int4_w4a16" },
		  "E=384,N=128,device_name=NVIDIA_H200,dtype=int4_w4a16.json" },
		{ { .experts = 384,
		    .n = 128,
		    .device_name = "",
		    .dtype = "int4_w4a16",
		    .down = true },
		  "E=384,N=128,device_name=,dtype=int4_w4a16_down.json" },
		{ { .experts = 384,
		    .n = 128,
		    .device_name = "NVIDIA_H20",
		    .dtype = "fp8_w8a8",
		    .block_n = 128,
		    .block_k = 128 },
		  "E=384,N=128,device_name=NVIDIA_H20,dtype=fp8_w8a8,block_shape=[128, 128].json" },
		{ { .experts = 384,
		    .n = 256,
		    .device_name = "X",
		    .dtype = "int4_w4a16",
		    .block_n = 0,
		    .block_k = 32 },
		  "E=384,N=256,device_name=X,dtype=int4_w4a16.json" },
		{ { .experts = 8, .n = 14336, .device_name = "NVIDIA A100-SXM4-80GB" },
		  "E=8,N=14336,device_name=NVIDIA_A100-SXM4-80GB.json" },
		{ { .experts = 1, .n = 2, .device_name = "../up" },
		  "E=1,N=2,device_name=.._up.json" },
	};
	char name[KM_TUNE_NAME], *path;

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		km_tune_file_name(&cases[i].key, name);
		assert_string_equal(name, cases[i].name);
	}
	path = km_tune_path(
		"configs",
		&(km_tune_key){ .experts = 1, .n = 2, .device_name = "Y", .toolkit = 12090 });
	assert_string_equal(path, "configs/cuda_12_9/E=1,N=2,device_name=Y.json");
	free(path);
}

/* E and N per rank: int4's N is half the intermediate size of the rank. */
static void shapes_are_those_of_a_rank(void **state)
{
	static const struct {
		int tp, ep, experts, intermediate, n;
	} cases[] = {
		{ 1, 1, 384, 2048, 1024 }, { 2, 1, 384, 1024, 512 }, { 4, 1, 384, 512, 256 },
		{ 8, 1, 384, 256, 128 },   { 8, 8, 48, 2048, 1024 }, { 8, 2, 192, 512, 256 }
	};
	km_config config;
	km_moe_problem p;
	km_err err;

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		km_moe_tune_context c = context_of(cases[i].tp, cases[i].ep);
		km_tune_key key = km_moe_tune_key(&c.problem, "D", 13000);

		assert_int_equal(c.problem.experts, cases[i].experts);
		assert_int_equal(c.problem.global_experts, 384);
		assert_int_equal(c.problem.intermediate, cases[i].intermediate);
		assert_int_equal(c.problem.expert_map, cases[i].ep > 1);
		assert_int_equal(c.problem.group, 32);
		assert_int_equal(key.experts, cases[i].experts);
		assert_int_equal(key.n, cases[i].n);
		assert_string_equal(key.dtype, "int4_w4a16");
	}
	assert_int_equal(km_config_load(&config, "configs/models/kimi-k2.5.json", &err), 0);
	assert_true(km_moe_tuning_shape(&p, &config, 8, 3, &err) < 0);
	assert_string_equal(err.msg, "--ep-size 3 does not divide --tp-size 8");
	assert_true(km_moe_tuning_shape(&p, &config, 10, 10, &err) < 0);
	assert_string_equal(err.msg, "--ep-size 10 does not divide the 384 experts");
	assert_true(km_moe_tuning_shape(&p, &config, 3, 1, &err) < 0);
	assert_true(km_moe_tuning_shape(&p, &config, 32, 1, &err) < 0);
	assert_non_null(strstr(err.msg, "a multiple of 128, got 64"));
	km_config_release(&config);
	assert_int_equal(km_config_load(&config, "configs/models/kimi-k2-instruct.json", &err), 0);
	assert_true(km_moe_tuning_shape(&p, &config, 8, 1, &err) < 0);
	assert_non_null(strstr(err.msg, "experts are fp8"));
	km_config_release(&config);
}

static km_tune_entry entry_of(const km_moe_tune_context *c, int tokens, double us)
{
	km_moe_problem p = c->problem;
	km_tune_entry e = { .tokens = tokens, .us = us, .plan_us = us + 1 };
	km_moe_plan plan;

	p.tokens = tokens;
	assert_int_equal(km_moe_plan_make(&plan, &p, &c->device, NULL, NULL), 0);
	km_moe_tile_values(&plan.tile, e.values);
	return e;
}

static void what_is_written_is_read(void **state)
{
	km_moe_tune_context c = context_of(8, 1);
	km_tune_problem problem = km_moe_tune_problem(&c.problem);
	km_tune_schema schema = km_moe_tune_schema(&c);
	km_tune_table table = { .count = 0 }, read;
	const int tokens[] = { 64, 1, 4096, 8, 64 };
	char *dir = temp_dir(), *path = km_xasprintf("%s/cuda_13_0/t.json", dir), *sub;
	km_err err;

	(void)state;
	for (int i = 0; i < 5; i++) {
		km_tune_entry e = entry_of(&c, tokens[i], 10 + i);

		km_tune_put(&table, &e);
	}
	assert_int_equal(table.count, 4);
	assert_int_equal(table.entries[2].tokens, 64);
	assert_true(table.entries[2].us == 14);
	assert_int_equal(km_tune_write(&table, path, &problem, &schema, &err), 0);
	if (km_tune_read(&read, path, &problem, &schema, &err) < 0)
		fail_msg("%s", err.msg);
	assert_int_equal(read.count, 4);
	for (int i = 0; i < 4; i++)
		assert_memory_equal(&read.entries[i], &table.entries[i], sizeof(*read.entries));
	assert_int_equal(km_tune_nearest(&read, 1)->tokens, 1);
	assert_int_equal(km_tune_nearest(&read, 4)->tokens, 1);  /* 3 from 1, 4 from 8 */
	assert_int_equal(km_tune_nearest(&read, 36)->tokens, 8); /* the smaller of two */
	assert_int_equal(km_tune_nearest(&read, 1000000)->tokens, 4096);
	km_tune_release(&read);
	km_tune_release(&table);
	sub = km_xasprintf("%s/cuda_13_0", dir);
	remove_dir(sub);
	free(path);
	remove_dir(dir);
}

/* An entry for one token whose tile is the plan's own, with one field's value replaced by this
 * JSON, or left out where it is NULL; `more` is added at the end. */
static void put_entry(km_buf *out, const km_moe_tune_context *c, const char *field,
                      const char *json, const char *more)
{
	static const char *const shape[] = { "\"hidden_size\": 7168", "\"top_k\": 8",
		                             "\"group_size\": 32", "\"num_experts\": 384" };
	km_tune_schema schema = km_moe_tune_schema(c);
	km_tune_entry e = entry_of(c, 1, 10);
	const char *comma = "";

	km_buf_puts(out, "{\"1\": {");
	for (int i = 0; i < schema.count; i++) {
		bool here = !strcmp(schema.fields[i].name, field);

		if (here && !json)
			continue;
		km_buf_printf(out, "%s\"%s\": ", comma, schema.fields[i].name);
		if (here)
			km_buf_puts(out, json);
		else
			km_buf_printf(out, "%d", e.values[i]);
		comma = ", ";
	}
	for (int i = 0; i < 4; i++)
		if (!strstr(shape[i], field))
			km_buf_printf(out, ", %s", shape[i]);
		else if (json)
			km_buf_printf(out, ", \"%s\": %s", field, json);
	km_buf_printf(out, "%s}}", more);
}

static void refuse(const km_moe_tune_context *c, const char *text, const char *says, int code)
{
	km_tune_problem problem = km_moe_tune_problem(&c->problem);
	km_tune_schema schema = km_moe_tune_schema(c);
	km_tune_table table;
	km_err err = { 0 };
	int rc = km_tune_parse(&table, text, strlen(text), "t", &problem, &schema, &err);

	if (rc != code || !strstr(err.msg, says))
		fail_msg("%s: %d '%s', expected %d '%s'", text, rc, err.msg, code, says);
	assert_int_equal(table.count, 0);
}

static void hostile_files_are_sentences(void **state)
{
	static const struct {
		const char *text, *says;
		int code;
	} cases[] = {
		{ "", "is not valid JSON", KM_EFORMAT },
		{ "{\"1\": {", "is not valid JSON", KM_EFORMAT },
		{ "[]", "a JSON object is expected", KM_EFORMAT },
		{ "{}", "has no entry", KM_EFORMAT },
		{ "{\"1\": 3}", "t: 1: an object is expected", KM_EFORMAT },
		{ "{\"1\": {}}", "1.hidden_size: ", KM_EFORMAT },
		{ "{\"1\": {}, \"1\": {}}", "is not valid JSON", KM_EFORMAT },
		{ "{\"\": {}}", "\"\" is not a token count", KM_EFORMAT },
		{ "{\"01\": {}}", "\"01\" is not a token count", KM_EFORMAT },
		{ "{\"-4\": {}}", "\"-4\" is not a token count", KM_EFORMAT },
		{ "{\"1e3\": {}}", "\"1e3\" is not a token count", KM_EFORMAT },
		{ "{\"0\": {}}", "\"0\" is not a token count", KM_EFORMAT },
		{ "{\"1048577\": {}}", "is not a token count from 1 to 1048576", KM_EFORMAT },
		{ "{\"99999999999999999999\": {}}", "is not a token count", KM_EFORMAT },
		{ "{\"1\": {\"BLOCK_SIZE_M\": 16, \"BLOCK_SIZE_N\": 32, \"num_warps\": 4}}",
		  "is a table of SGLang or vLLM", KM_EUNSUPPORTED },
		{ "{\"triton_version\": \"3.5.0\", \"1\": {\"num_stages\": 4, \"USE_TMA\": false}}",
		  "is a table of SGLang or vLLM", KM_EUNSUPPORTED },
	};
	static const struct {
		const char *field, *json, *more, *says;
		int code;
	} entries[] = {
		{ "num_stages", "true", "", "1.num_stages: ", KM_EFORMAT },
		{ "num_stages", "\"4\"", "", "1.num_stages: ", KM_EFORMAT },
		{ "BLOCK_SIZE_N", "16.0", "", "1.BLOCK_SIZE_N: ", KM_EFORMAT },
		{ "num_stages", "4000000000", "", "1.num_stages: ", KM_EFORMAT },
		{ "BLOCK_SIZE_M", "-8", "", "1.BLOCK_SIZE_M: ", KM_EFORMAT },
		{ "BLOCK_SIZE_N", NULL, "", "1.BLOCK_SIZE_N: ", KM_EFORMAT },
		{ "top_k", NULL, "", "1.top_k: ", KM_EFORMAT },
		{ "", NULL, ", \"us\": -1", "1.us: ", KM_EFORMAT },
		{ "", NULL, ", \"us\": \"fast\"", "1.us: ", KM_EFORMAT },
		{ "", NULL, ", \"waves_per_eu\": 2", "1.waves_per_eu: no kernel has such a field",
		  KM_EFORMAT },
		/* tiles that no kernel was built for */
		{ "BLOCK_SIZE_N", "48", "", "entry 1: tuning entry: no kernel has",
		  KM_EUNSUPPORTED },
		{ "BLOCK_SIZE_K", "96", "", "got 96", KM_EUNSUPPORTED },
		{ "GROUP_SIZE_M", "3", "", "GROUP_SIZE_M is ", KM_EUNSUPPORTED },
		{ "num_warps", "5", "", "got 5", KM_EUNSUPPORTED },
		{ "num_stages", "60", "", "num_stages is 2 to ", KM_EUNSUPPORTED },
		/* another problem */
		{ "hidden_size", "4096", "",
		  "1.hidden_size: was tuned for 4096, this shape has 7168", KM_ENOTFOUND },
		{ "num_experts", "3840", "", "1.num_experts: was tuned for 3840", KM_ENOTFOUND },
	};
	km_moe_tune_context c = context_of(8, 1);
	km_buf text = KM_BUF_INIT;

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
		refuse(&c, cases[i].text, cases[i].says, cases[i].code);
	for (size_t i = 0; i < sizeof(entries) / sizeof(*entries); i++) {
		const char *field = *entries[i].field ? entries[i].field : "none";

		km_buf_clear(&text);
		put_entry(&text, &c, field, entries[i].json, entries[i].more);
		refuse(&c, text.data, entries[i].says, entries[i].code);
	}
	km_buf_release(&text);
}

/* Every tile that the planner lists is legal in a file, at its own token count. */
static void every_candidate_is_legal(void **state)
{
	static const int tokens[] = { 1, 8, 64, 300, 4096 }, tps[] = { 1, 2, 4, 8 };
	int count = 0;

	(void)state;
	for (int k = 0; k < 20; k++) {
		km_moe_tune_context c = context_of(tps[k % 4], 1);
		km_tune_schema schema = km_moe_tune_schema(&c);
		km_moe_tile tiles[KM_TUNER_MAX_CANDIDATES];
		km_moe_problem p = c.problem;
		int n, values[KM_TUNE_MAX_FIELDS];
		km_err err;

		p.tokens = tokens[k / 4];
		n = km_moe_candidates(&p, &c.device, tiles, KM_TUNER_MAX_CANDIDATES);
		assert_true(n > 1 && n < KM_TUNER_MAX_CANDIDATES);
		for (int i = 0; i < n; i++, count++) {
			km_moe_tile_values(&tiles[i], values);
			if (schema.check(schema.context, p.tokens, values, &err) < 0)
				fail_msg("%d tokens: %s", p.tokens, err.msg);
			for (int f = 0; f < schema.count; f++)
				assert_in_range(values[f], schema.fields[f].min,
				                schema.fields[f].max);
		}
	}
	print_message("figure: %d candidates at 20 shapes, all legal\n", count);
}

static void lookups_say_what_missed(void **state)
{
	km_moe_tune_context c = context_of(8, 1), other = context_of(4, 1);
	km_tune_problem problem = km_moe_tune_problem(&c.problem);
	km_tune_schema schema = km_moe_tune_schema(&c);
	km_tune_key key = km_moe_tune_key(&c.problem, "NVIDIA H100 80GB HBM3", 13000), want;
	char *dir = temp_dir(), *path = km_tune_path(dir, &key);
	km_tune_table table = { .count = 0 };
	km_moe_tuning t;
	km_err err;
	km_tune_entry e = entry_of(&c, 64, 20);

	(void)state;
	assert_int_equal(km_moe_tuning_open(&t, dir, &key, &c, false, &err), 0);
	assert_false(t.found);
	assert_non_null(strstr(t.why.data, ", and no other under "));
	km_moe_tuning_release(&t);

	km_tune_put(&table, &e);
	assert_int_equal(km_tune_write(&table, path, &problem, &schema, &err), 0);
	assert_int_equal(km_moe_tuning_open(&t, dir, &key, &c, true, &err), 0);
	assert_true(t.found);
	km_moe_tuning_release(&t);

	want = key;
	snprintf(want.device_name, sizeof(want.device_name), "NVIDIA H200");
	assert_int_equal(km_moe_tuning_open(&t, dir, &want, &c, false, &err), 0);
	assert_false(t.found);
	assert_non_null(strstr(
		t.why.data,
		"json: device_name is \"NVIDIA_H100_80GB_HBM3\" there, not \"NVIDIA_H200\""));
	km_moe_tuning_release(&t);
	assert_int_equal(km_moe_tuning_open(&t, dir, &want, &c, true, &err), KM_ENOTFOUND);
	assert_non_null(strstr(err.msg, "device_name is "));
	km_moe_tuning_release(&t);

	want = km_moe_tune_key(&other.problem, key.device_name, 12080);
	assert_int_equal(km_moe_tuning_open(&t, dir, &want, &other, false, &err), 0);
	assert_non_null(
		strstr(t.why.data,
	               "the toolkit is \"cuda_13_0\" there, not \"cuda_12_8\", N is \"128\" there, "
	               "not \"256\""));
	km_moe_tuning_release(&t);

	/* another problem under the same name is a miss, another program's table an error */
	other = c;
	other.problem.hidden = 4096;
	assert_int_equal(km_moe_tuning_open(&t, dir, &key, &other, false, &err), 0);
	assert_false(t.found);
	assert_non_null(
		strstr(t.why.data, "64.hidden_size: was tuned for 7168, this shape has 4096"));
	km_moe_tuning_release(&t);
	assert_int_equal(km_outfile_save(path, "{\"1\":{\"num_warps\":4}}", 21, NULL), 0);
	assert_int_equal(km_moe_tuning_open(&t, dir, &key, &c, false, &err), KM_EUNSUPPORTED);
	km_moe_tuning_release(&t);
	km_tune_release(&table);
	remove_dir(km_xasprintf("%s/cuda_13_0", dir));
	remove_dir(dir);
	free(path);
}

static void only_the_general_form_has_no_table(void **state)
{
	km_moe_tune_context c = context_of(8, 1);
	km_buf out = KM_BUF_INIT;
	km_tune_key key;
	km_moe_tuning t;
	km_err err;

	(void)state;
	c.problem.hidden = 128; /* no tile fits */
	key = km_moe_tune_key(&c.problem, "X", 13000);
	assert_int_equal(km_moe_tuning_open(&t, "/nowhere", &key, &c, false, &err), 0);
	assert_false(t.found);
	assert_true(t.general);
	assert_non_null(strstr(t.why.data, "only the general form takes these experts"));
	km_moe_tuning_explain(&t, &c.problem, &c.device, &out);
	assert_non_null(strstr(out.data, "tuning: none: only the general form takes"));
	km_buf_release(&out);
	km_moe_tuning_release(&t);
	assert_int_equal(km_moe_tuning_open(&t, "/nowhere", &key, &c, true, &err), KM_ENOTFOUND);
	assert_non_null(strstr(err.msg, "only the general form takes these experts"));
	km_moe_tuning_release(&t);
}

static void expect_root(const char *program, const char *want)
{
	char *root = km_tune_root_of(program);

	assert_string_equal(root, want);
	free(root);
}

/* DIR/a/b/bin/tool: DIR/configs, until DIR/a/b/share/kimi/configs is there. */
static void tables_lie_beside_the_program(void **state)
{
	static const char *const folders[] = { "a", "a/b", "a/b/bin", "configs", "a/b/share",
		                               "a/b/share/kimi", "a/b/share/kimi/configs" };
	char *temp = temp_dir(), *dir = realpath(temp, NULL);
	char *program = km_xasprintf("%s/a/b/bin/tool", dir);
	char *built = km_xasprintf("%s/configs", dir);
	char *installed = km_xasprintf("%s/a/b/share/kimi/configs", dir);
	char *neither = km_xasprintf("%s/a/b/bin/../share/kimi/configs", dir);

	(void)state;
	for (int i = 0; i < 7; i++) {
		char *folder = km_xasprintf("%s/%s", dir, folders[i]);

		assert_int_equal(mkdir(folder, 0777), 0);
		free(folder);
		if (i >= 2)
			expect_root(program, i == 2 ? neither : i < 6 ? built : installed);
	}
	for (int i = 6; i >= 0; i--)
		remove_dir(km_xasprintf("%s/%s", dir, folders[i]));
	remove_dir(temp);
	free(program);
	free(built);
	free(installed);
	free(neither);
	free(dir);
}

static void a_plan_takes_the_nearest_entry_that_fits(void **state)
{
	km_moe_tune_context c = context_of(8, 1);
	km_moe_tuning t = { .found = true };
	const km_tune_entry *taken;
	km_moe_plan plan, own;
	km_moe_problem p = c.problem;
	km_tune_entry e = entry_of(&c, 1, 10);
	km_buf out = KM_BUF_INIT;
	km_err err;

	(void)state;
	km_tune_put(&t.table, &e);
	t.table.path = km_xstrdup("T.json");
	for (int tokens = 1; tokens <= 4096; tokens *= 2) {
		p.tokens = tokens;
		assert_int_equal(km_moe_tuning_plan(&plan, &t, &p, &c.device, &taken, &err), 0);
		assert_non_null(taken);
		assert_true(plan.tuned);
		assert_int_equal(plan.tile.block_m, e.values[0]);
		assert_int_equal(plan.tile.block_n, e.values[1]);
		assert_true(plan.tile.stages <= e.values[5]);
		km_buf_clear(&out);
		km_moe_tuning_explain(&t, &p, &c.device, &out);
		assert_non_null(strstr(out.data, tokens == 1 ? "entry 1 of T.json\n"
		                                             : "entry 1 of T.json, the nearest"));
	}
	p.intermediate = 2048 / 8; /* what no kernel of the entry fits: the plan's own */
	p.hidden = 7168;
	t.table.entries[0].values[1] = 48;
	assert_int_equal(km_moe_tuning_plan(&plan, &t, &p, &c.device, &taken, &err), 0);
	assert_null(taken);
	assert_int_equal(km_moe_plan_make(&own, &p, &c.device, NULL, &err), 0);
	assert_memory_equal(&plan.tile, &own.tile, sizeof(own.tile));
	km_buf_clear(&out);
	km_moe_tuning_explain(&t, &p, &c.device, &out);
	assert_non_null(strstr(out.data, "does not fit 4096 tokens"));
	km_buf_release(&out);
	km_moe_tuning_release(&t);
}

/* ---- the search, on a made-up device -------------------------------------------------------- */

/* Candidate i of n takes us[i], give or take `noise`; time passes as it is sampled. */
struct fake {
	int n, tokens, prepared, samples, checks;
	double us[64], noise, clock, slow_check;
	int wrong, broken; /* a candidate that computes wrongly; a check that fails */
	int cancel_after;  /* samples; 0: never */
	volatile sig_atomic_t cancel;
	int shown_done, shown_wrong;
	double last_left;
};

static int fake_prepare(void *context, int tokens, km_err *err)
{
	struct fake *f = context;

	(void)err;
	f->tokens = tokens;
	f->prepared++;
	f->clock += 0.01;
	return 0;
}

static int fake_candidates(void *context, int tokens, km_tune_entry *out, int max, km_err *err)
{
	struct fake *f = context;

	(void)tokens, (void)err;
	assert_true(f->n <= max);
	for (int i = 0; i < f->n; i++)
		out[i].values[0] = i + 1;
	return f->n;
}

static int fake_check(void *context, int tokens, const int *values, double *us, km_err *err)
{
	struct fake *f = context;

	*us = f->us[values[0] - 1];
	assert_int_equal(tokens, f->tokens);
	f->checks++;
	f->clock += f->slow_check;
	if (values[0] == f->broken)
		return km_fail(err, KM_EDEVICE, "an illegal memory access");
	if (values[0] != f->wrong)
		return 1;
	km_fail(err, KM_EDEVICE, "row 3 is off by 0.5");
	return 0;
}

static int fake_sample(void *context, int tokens, const int *values, double *us, km_err *err)
{
	struct fake *f = context;

	(void)err;
	assert_int_equal(tokens, f->tokens);
	assert_true(values[0] != f->wrong); /* never timed */
	*us = f->us[values[0] - 1] *
	      (1 + f->noise * (km_rng_uniform(5, (uint64_t)f->samples) - 0.5));
	f->clock += 0.001;
	if (++f->samples == f->cancel_after)
		f->cancel = 1;
	return 0;
}

static double fake_now(void *context)
{
	return ((struct fake *)context)->clock;
}

static void fake_show(void *context, const km_tuner_state *s)
{
	struct fake *f = context;

	assert_true(s->left <= s->candidates && s->checked <= s->candidates && s->index < s->count);
	assert_true(!s->best || s->best_us > 0);
	f->shown_done += s->done;
	f->last_left = s->left_s;
}

static void fake_wrong(void *context, int tokens, const int *values, const char *why)
{
	struct fake *f = context;

	assert_int_equal(tokens, f->tokens);
	assert_int_equal(values[0], f->wrong);
	assert_string_equal(why, "row 3 is off by 0.5");
	f->shown_wrong++;
}

static int fake_run(struct fake *f, const int *tokens, int count, double budget,
                    km_tune_table *table, km_err *err)
{
	km_tuner_backend b = {
		f, fake_prepare, fake_candidates, fake_check, fake_sample, fake_now
	};
	km_tuner_options o = { .tokens = tokens,
		               .count = count,
		               .budget_s = budget,
		               .cancel = &f->cancel,
		               .show = fake_show,
		               .show_context = f,
		               .wrong = fake_wrong };

	return km_tuner_run(&b, &o, table, err);
}

static struct fake fake_of(int n)
{
	struct fake f = { .n = n, .noise = 0.02, .wrong = -1, .broken = -1 };

	for (int i = 0; i < n; i++)
		f.us[i] = 100 + 3 * (double)((i * 7 + 3) % n);
	return f;
}

static void the_fastest_wins(void **state)
{
	const int tokens[] = { 1, 16, 4096 };
	km_tune_table table = { .count = 0 };
	struct fake f = fake_of(50);
	int best = 0;
	km_err err;

	(void)state;
	for (int i = 1; i < 50; i++)
		best = f.us[i] < f.us[best] ? i : best;
	assert_true(best > 0);
	assert_int_equal(fake_run(&f, tokens, 3, 100, &table, &err), 0);
	assert_int_equal(table.count, 3);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(table.entries[i].tokens, tokens[i]);
		assert_int_equal(table.entries[i].values[0], best + 1);
		assert_true(table.entries[i].us > 98 && table.entries[i].us < 102);
		assert_true(table.entries[i].plan_us > table.entries[i].us);
	}
	assert_int_equal(f.prepared, 3);
	assert_int_equal(f.checks, 150);
	assert_int_equal(f.shown_done, 3);
	assert_true(f.last_left == 0);
	print_message("figure: %d samples for 50 candidates at 3 token counts\n", f.samples);
	assert_true(f.samples < 3 * 450);
	km_tune_release(&table);
}

static void within_noise_the_plan_stays(void **state)
{
	const int tokens[] = { 8 };
	km_tune_table table = { .count = 0 };
	struct fake f = fake_of(4);
	km_err err;

	(void)state;
	f.noise = 0;
	f.us[0] = 100;
	f.us[1] = 99.5; /* half a percent */
	f.us[2] = f.us[3] = 120;
	assert_int_equal(fake_run(&f, tokens, 1, 100, &table, &err), 0);
	assert_int_equal(table.entries[0].values[0], 1);
	assert_true(table.entries[0].us == 100 && table.entries[0].plan_us == 100);
	f.us[1] = 98;
	assert_int_equal(fake_run(&f, tokens, 1, 100, &table, &err), 0);
	assert_int_equal(table.entries[0].values[0], 2);
	km_tune_release(&table);
}

static void wrong_results_are_never_timed(void **state)
{
	const int tokens[] = { 8, 9 };
	km_tune_table table = { .count = 0 };
	struct fake f = fake_of(10);
	km_err err;

	(void)state;
	f.us[5] = 1; /* fast and wrong */
	f.wrong = 6;
	assert_int_equal(fake_run(&f, tokens, 2, 100, &table, &err), 0);
	assert_int_equal(f.shown_wrong, 2);
	assert_true(table.entries[0].values[0] != 6);
	f.wrong = 1;
	assert_int_equal(fake_run(&f, tokens, 2, 100, &table, &err), KM_EDEVICE);
	assert_string_equal(err.msg, "the plan's own choice computes wrongly: row 3 is off by 0.5");
	f.wrong = -1;
	f.broken = 4;
	assert_int_equal(fake_run(&f, tokens, 2, 100, &table, &err), KM_EDEVICE);
	assert_string_equal(err.msg, "an illegal memory access");
	km_tune_release(&table);
}

static void the_budget_holds(void **state)
{
	const int tokens[] = { 8, 16 };
	km_tune_table table = { .count = 0 };
	struct fake f = fake_of(60);
	km_err err;

	(void)state;
	assert_int_equal(fake_run(&f, tokens, 2, 0.05, &table, &err), 0);
	/* one sample of each and the duel are what it takes at least: 60 + 30 of 1 ms */
	assert_true(f.clock < 2 * (0.01 + 0.06 + 0.03 + 0.06));
	assert_int_equal(table.count, 2);
	km_tune_release(&table);
}

static void a_stop_keeps_what_is_known(void **state)
{
	const int tokens[] = { 1, 2, 4, 8 };
	km_tune_table table = { .count = 0 };
	struct fake f = fake_of(10);
	km_err err;

	(void)state;
	f.cancel_after = 150;
	assert_int_equal(fake_run(&f, tokens, 4, 100, &table, &err), KM_ECANCELED);
	assert_string_equal(err.msg, "interrupted");
	assert_in_range(table.count, 1, 3);
	assert_int_equal(f.shown_done, table.count);
	km_tune_release(&table);
}

static void a_table_is_checked(void **state)
{
	km_tune_table table = { .count = 0 };
	struct fake f = fake_of(4);
	km_tuner_backend b = {
		&f, fake_prepare, fake_candidates, fake_check, fake_sample, fake_now
	};
	km_tuner_checked checked[3];
	km_tune_entry e = { .tokens = 1, .values = { 1 }, .us = 100 };
	km_buf out = KM_BUF_INIT;
	km_err err;
	int off;

	(void)state;
	f.noise = 0;
	f.us[0] = 103;
	f.us[1] = 150;
	km_tune_put(&table, &e);
	e = (km_tune_entry){ .tokens = 2, .values = { 2 }, .us = 100 };
	km_tune_put(&table, &e);
	e = (km_tune_entry){ .tokens = 3, .values = { 3 }, .us = 100 };
	km_tune_put(&table, &e);
	f.wrong = 3;
	assert_int_equal(km_tuner_check(&b, &table, NULL, checked, &err), 0);
	assert_true(checked[0].right && checked[0].off > 0.029 && checked[0].off < 0.031);
	assert_true(checked[1].off > 0.49);
	assert_false(checked[2].right);
	km_moe_checked_report(checked, 3, 0.1, false, &out, &off);
	assert_int_equal(off, 2);
	assert_non_null(strstr(out.data, "+50.0%  more than allowed"));
	assert_non_null(strstr(out.data, "wrong: row 3 is off by 0.5"));
	km_buf_clear(&out);
	km_moe_checked_report(checked, 2, 0.6, true, &out, &off);
	assert_int_equal(off, 0);
	assert_non_null(strstr(out.data, "\"ok\": true"));
	table.entries[0].us = 0;
	table.path = km_xstrdup("t");
	assert_int_equal(km_tuner_check(&b, &table, NULL, checked, &err), KM_EINVAL);
	assert_string_equal(err.msg, "t: entry 1 has no \"us\" to check");
	km_buf_release(&out);
	km_tune_release(&table);
}

/* ---- a whole run, as kimi-tune's ------------------------------------------------------------ */

/* Candidates of the real kernel on the fake device: the plan's own, and one that is faster. */
static int real_candidates(void *context, int tokens, km_tune_entry *out, int max, km_err *err)
{
	km_moe_tune_context c = context_of(8, 1);
	km_moe_tile tiles[KM_TUNER_MAX_CANDIDATES];

	(void)context, (void)err;
	c.problem.tokens = tokens;
	assert_true(km_moe_candidates(&c.problem, &c.device, tiles, max) > 1);
	out[0] = entry_of(&c, tokens, 0);
	for (int i = 0; i < 2; i++) {
		km_moe_tile_values(&tiles[i], out[1].values);
		if (memcmp(out[0].values, out[1].values, sizeof(out[0].values)) != 0)
			break;
	}
	return 2;
}

static int right(void *context, int tokens, const int *values, double *us, km_err *err)
{
	(void)context, (void)tokens, (void)values, (void)err;
	*us = 1;
	return 1;
}

static int plan_is_slow(void *context, int tokens, const int *values, double *us, km_err *err)
{
	struct fake *f = context;
	km_moe_tune_context c = context_of(8, 1);
	km_tune_entry own = entry_of(&c, tokens, 0);

	(void)err;
	*us = memcmp(values, own.values, sizeof(own.values)) ? 50 : 60;
	f->clock += 0.001;
	if (++f->samples == f->cancel_after)
		f->cancel = 1;
	return 0;
}

static int run_search(struct fake *f, const char *path, bool resume, bool json, char **text,
                      km_err *err)
{
	km_tuner_backend b = { f, fake_prepare, real_candidates, right, plan_is_slow, fake_now };
	const int tokens[] = { 1, 16, 256 };
	km_moe_tune_context c = context_of(8, 1);
	km_moe_target target;
	km_moe_search s = { .target = &target,
		            .path = path,
		            .tokens = tokens,
		            .count = 3,
		            .budget_s = 1,
		            .resume = resume,
		            .json = json,
		            .quiet = true,
		            .cancel = &f->cancel,
		            .backend = &b };
	size_t len;
	int rc;

	assert_int_equal(km_moe_target_make(&target, &c.problem, "NVIDIA H100 80GB HBM3", err), 0);
	s.out = open_memstream(text, &len);
	rc = km_moe_search_run(&s, err);
	fclose(s.out);
	return rc;
}

static void a_stopped_run_is_resumed(void **state)
{
	char *dir = temp_dir(), *path = km_xasprintf("%s/deep/er/t.json", dir), *text, *beyond;
	km_moe_tune_context c = context_of(8, 1);
	km_tune_problem problem = km_moe_tune_problem(&c.problem);
	km_tune_schema schema = km_moe_tune_schema(&c);
	struct fake f = fake_of(2);
	km_tune_table table;
	json_t *doc;
	km_err err;

	(void)state;
	f.cancel_after = 50; /* a token count takes 34 or 36 samples */
	assert_int_equal(run_search(&f, path, false, false, &text, &err), KM_ECANCELED);
	assert_non_null(
		strstr(err.msg, "t.json holds 1 token counts, --resume goes on: interrupted"));
	assert_non_null(strstr(text, "      1      50.00      60.00   20.0%"));
	assert_null(strstr(text, "\n     16 "));
	free(text);
	assert_int_equal(km_tune_read(&table, path, &problem, &schema, &err), 0);
	assert_int_equal(table.count, 1);
	km_tune_release(&table);

	f = fake_of(2);
	assert_int_equal(run_search(&f, path, true, true, &text, &err), 0);
	assert_int_equal(f.prepared, 2);
	doc = json_loads(text, 0, NULL);
	assert_non_null(doc);
	assert_true(json_is_true(json_object_get(doc, "complete")));
	assert_int_equal(json_array_size(json_object_get(doc, "rows")), 3);
	json_decref(doc);
	free(text);
	assert_int_equal(km_tune_read(&table, path, &problem, &schema, &err), 0);
	assert_int_equal(table.count, 3);
	for (int i = 0; i < 3; i++)
		assert_true(table.entries[i].us == 50 && table.entries[i].plan_us == 60);
	km_tune_release(&table);

	f = fake_of(2);
	assert_int_equal(run_search(&f, path, true, false, &text, &err), 0);
	assert_int_equal(f.prepared, 0);
	free(text);

	/* where nothing can be written nothing is timed */
	f = fake_of(2);
	beyond = km_xasprintf("%s/below", path);
	assert_int_equal(run_search(&f, beyond, false, false, &text, &err), KM_EIO);
	assert_int_equal(f.prepared, 0);
	assert_int_equal(f.samples, 0);
	free(text);
	free(beyond);
	remove_dir(km_xasprintf("%s/deep/er", dir));
	remove_dir(km_xasprintf("%s/deep", dir));
	remove_dir(dir);
	free(path);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(names_follow_the_contract),
		cmocka_unit_test(shapes_are_those_of_a_rank),
		cmocka_unit_test(what_is_written_is_read),
		cmocka_unit_test(hostile_files_are_sentences),
		cmocka_unit_test(every_candidate_is_legal),
		cmocka_unit_test(lookups_say_what_missed),
		cmocka_unit_test(only_the_general_form_has_no_table),
		cmocka_unit_test(tables_lie_beside_the_program),
		cmocka_unit_test(a_plan_takes_the_nearest_entry_that_fits),
		cmocka_unit_test(the_fastest_wins),
		cmocka_unit_test(within_noise_the_plan_stays),
		cmocka_unit_test(wrong_results_are_never_timed),
		cmocka_unit_test(the_budget_holds),
		cmocka_unit_test(a_stop_keeps_what_is_known),
		cmocka_unit_test(a_table_is_checked),
		cmocka_unit_test(a_stopped_run_is_resumed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
