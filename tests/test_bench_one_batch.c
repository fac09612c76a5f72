/*
 * engine/bench_one_batch and what it stands on: random weights, one rank's slice, a step's costs by
 * formula against the ops' own, the profile's sums. Times are not tested, but for adding up.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/bench_one_batch.h"
#include "model/shard.h"
#include "model/weights_random.h"

#define TINY "configs/models/tiny-k25.json"

static void cases_are_parsed(void **state)
{
	static const char *const wrong[] = { "",       "1",       "1,2",      "1,2,3,4", "0,2,3",
		                             "1,-2,3", "1,2,x",   "1,2,3;x",  "1 ,2,3",  " 1,2,3",
		                             ";",      "1,2,3;;", "99999999999999999999,1,1" };
	km_bench_case *c;
	km_err err;
	int count;

	(void)state;
	assert_int_equal(km_bench_parse("1,2,3;40,5,6", &c, &count, &err), 0);
	assert_int_equal(count, 2);
	assert_int_equal(c[1].batch, 40);
	assert_int_equal(c[1].input, 5);
	assert_int_equal(c[1].output, 6);
	free(c);
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
		assert_int_equal(km_bench_parse(wrong[i], &c, &count, &err), KM_EINVAL);
		assert_non_null(strstr(err.msg, "BATCH,INPUT,OUTPUT"));
		assert_null(c);
	}
}

static void a_slice_is_cut_where_a_rank_is(void **state)
{
	km_config whole, slice;
	km_weights all, part;
	km_err err;

	(void)state;
	assert_int_equal(km_config_load(&whole, "configs/models/kimi-k2.5.json", &err), 0);
	assert_int_equal(km_config_load(&slice, "configs/models/kimi-k2.5.json", &err), 0);
	assert_int_equal(km_config_shard(&slice, 8, &err), 0);
	assert_int_equal(km_weights_shapes(&all, &whole, &err), 0);
	assert_int_equal(km_weights_shapes(&part, &slice, &err), 0);
	assert_int_equal(part.layer[1].q_a.rows, all.layer[1].q_a.rows);
	assert_int_equal(part.layer[1].kv_a.rows, all.layer[1].kv_a.rows);
	assert_int_equal(part.layer[1].router.rows, all.layer[1].router.rows);
	assert_int_equal(part.layer[1].q_b.rows * 8, all.layer[1].q_b.rows);
	assert_int_equal(part.layer[1].kv_b.rows * 8, all.layer[1].kv_b.rows);
	assert_int_equal(part.layer[1].o.rows, all.layer[1].o.rows);
	assert_int_equal(part.layer[1].o.cols * 8, all.layer[1].o.cols);
	assert_int_equal(part.layer[0].gate.rows * 8, all.layer[0].gate.rows);
	assert_int_equal(part.layer[0].down.cols * 8, all.layer[0].down.cols);
	assert_int_equal(part.layer[1].shared_up.rows * 8, all.layer[1].shared_up.rows);
	assert_int_equal(part.layer[1].expert_gate[383].rows * 8, all.layer[1].expert_gate[383].rows);
	assert_int_equal(part.layer[1].expert_down[0].cols * 8, all.layer[1].expert_down[0].cols);
	assert_int_equal(part.head.rows * 8, all.head.rows);
	assert_int_equal(part.embed.rows * 8, all.embed.rows);
	km_weights_close(&all);
	km_weights_close(&part);
	assert_int_equal(km_config_shard(&whole, 3, &err), KM_EINVAL);
	assert_string_equal(err.msg, "num_attention_heads 64 cannot be cut for 3 ranks: each needs a "
	                             "multiple of 1");
	/* 2048 / 64 columns are a group of 32, no more can be cut. */
	assert_int_equal(km_config_shard(&whole, 128, &err), KM_EINVAL);
	assert_int_equal(whole.num_attention_heads, 64);
	km_config_release(&whole);
	km_config_release(&slice);
}

static void random_weights_are_the_seed_s(void **state)
{
	km_random_weights how = { .seed = 5, .depth = 4 };
	km_weights a, b, c;
	km_config config;
	km_err err;
	size_t bytes;

	(void)state;
	assert_int_equal(km_config_load(&config, TINY, &err), 0);
	assert_int_equal(km_weights_random(&a, &config, &how, &err), 0);
	how.shared = true;
	assert_int_equal(km_weights_random(&b, &config, &how, &err), 0);
	how.seed = 6;
	assert_int_equal(km_weights_random(&c, &config, &how, &err), 0);
	bytes = (size_t)config.moe_intermediate_size * (size_t)config.hidden_size / 2;
	for (int e = 0; e < config.n_routed_experts; e++) {
		int twin = e % KM_RANDOM_EXPERTS;
		const km_weight *own = &a.layer[2].expert_gate[e], *shared = &b.layer[2].expert_gate[e];

		assert_memory_equal(own->data, shared->data, bytes);
		assert_memory_equal(own->data, a.layer[2].expert_gate[twin].data, bytes);
		assert_ptr_equal(shared->scale, b.layer[2].expert_gate[twin].scale);
		assert_true(e < KM_RANDOM_EXPERTS || own->data != a.layer[2].expert_gate[twin].data);
	}
	assert_memory_not_equal(a.layer[2].expert_gate[0].data, a.layer[2].expert_gate[1].data, bytes);
	assert_memory_not_equal(a.layer[2].expert_gate[0].data, a.layer[1].expert_gate[0].data, bytes);
	assert_memory_not_equal(a.layer[2].o.data, c.layer[2].o.data, 64);
	assert_true(fabsf(a.layer[1].input_norm[3] - 1) < 0.3f);
	assert_true(fabsf(a.layer[1].router_bias[3]) < 0.3f);
	km_weights_close(&a);
	km_weights_close(&b);
	km_weights_close(&c);
	km_config_release(&config);
}

/* ---- a step's costs ---- */

enum { ROWS = 24, SEQS = 3, CONTEXT = 32 };

struct step {
	int32_t ids[ROWS], positions[ROWS], slots[ROWS], seq_start[SEQS + 1], kv_len[SEQS],
		pages[SEQS], logit_row[SEQS];
	km_batch batch;
};

/* `rows` of each of three sequences, behind `before` cached tokens. */
static void make_step(struct step *s, int rows, int before, bool decode)
{
	s->batch = (km_batch){ .tokens = SEQS * rows, .seqs = SEQS, .decode_seqs = decode ? SEQS : 0,
		               .ids = s->ids, .positions = s->positions, .slots = s->slots,
		               .seq_start = s->seq_start, .kv_len = s->kv_len, .pages = s->pages,
		               .pages_per_seq = 1, .page_size = CONTEXT, .logit_row = s->logit_row,
		               .logit_rows = SEQS };
	for (int q = 0; q < SEQS; q++) {
		s->seq_start[q] = q * rows;
		s->seq_start[q + 1] = (q + 1) * rows;
		s->kv_len[q] = before + rows;
		s->pages[q] = q;
		s->logit_row[q] = (q + 1) * rows - 1;
		for (int i = 0; i < rows; i++) {
			s->ids[q * rows + i] = 7 * q + i;
			s->positions[q * rows + i] = before + i;
			s->slots[q * rows + i] = q * CONTEXT + before + i;
		}
	}
}

static km_model *open_tiny(int layers, int shard_of)
{
	km_model_random random = { layers, shard_of, 1 };
	km_model_options options = { .max_batch_tokens = ROWS, .max_seqs = SEQS, .max_logit_rows = SEQS,
		                     .max_context = CONTEXT, .kv_slots = SEQS * CONTEXT,
		                     .kv_dtype = KM_KV_BF16, .threads = 1 };
	km_model *model;
	km_err err;

	if (km_model_open_random(&model, TINY, &random, &options, &err) < 0)
		fail_msg("%s", err.msg);
	return model;
}

/* The router's product in shared_gate_up's launch: counted there, once, and x read once less a layer. */
static void check_joined(const km_step_shape *of, const km_step_cost *apart)
{
	km_step_shape shape = *of;
	km_step_cost joined[KM_STEP_COUNT], above[KM_STEP_COUNT];
	const km_step_cost *router = &apart[KM_STEP_ROUTER], *shared = &apart[KM_STEP_SHARED_GATE_UP];
	double x = (double)router->calls * of->batch->tokens * 4 * of->config->hidden_size;

	shape.router_joined_rows = of->batch->tokens;
	km_step_costs(&shape, joined);
	shape.router_joined_rows = of->batch->tokens - 1;
	km_step_costs(&shape, above);
	for (int i = 0; i < KM_STEP_COUNT; i++) {
		assert_true(above[i].bytes == apart[i].bytes);
		assert_int_equal(joined[i].calls, apart[i].calls);
		if (i != KM_STEP_ROUTER && i != KM_STEP_SHARED_GATE_UP)
			assert_true(joined[i].bytes == apart[i].bytes);
	}
	assert_true(router->flops > 0 && joined[KM_STEP_ROUTER].flops == 0);
	assert_true(joined[KM_STEP_ROUTER].weight_bytes == 0);
	assert_true(fabs(joined[KM_STEP_SHARED_GATE_UP].flops - router->flops - shared->flops) < 1);
	assert_true(fabs(joined[KM_STEP_SHARED_GATE_UP].bytes + joined[KM_STEP_ROUTER].bytes + x -
	                 router->bytes - shared->bytes) < 1);
}

/* Ops that are one op on the CPU too: their formula gives what the ops say of themselves. */
static void check_costs(km_model *model, const struct step *s)
{
	static const enum km_step_op same[] = {
		KM_STEP_EMBED, KM_STEP_Q_A_NORM, KM_STEP_Q_B, KM_STEP_MLA_DECODE, KM_STEP_O,
		KM_STEP_POST_NORM, KM_STEP_MLP_ACT, KM_STEP_MLP_DOWN, KM_STEP_SHARED_DOWN,
		KM_STEP_EXPERTS, KM_STEP_FINAL_NORM, KM_STEP_HEAD,
	};
	const km_config *config = km_model_config(model);
	km_random_weights how = { .seed = 1, .depth = 4, .shared = true };
	km_step_cost costs[KM_STEP_COUNT];
	int experts[16];
	km_step_shape shape = { .config = config, .batch = &s->batch, .kept = &s->batch,
		                .kv_dtype = KM_KV_BF16, .experts = experts, .x_bytes = 4 };
	km_weights weights;
	km_profile p;
	km_err err;

	assert_int_equal(km_model_profile(model, &s->batch, &p, &err), 0);
	assert_int_equal(km_weights_random(&weights, config, &how, &err), 0);
	shape.weights = &weights;
	for (int i = 0; i < config->num_hidden_layers; i++)
		experts[i] = 0;
	km_step_costs(&shape, costs);
	for (size_t i = 0; i < sizeof(same) / sizeof(*same); i++) {
		enum km_step_op op = same[i];
		double bytes = costs[op].bytes;

		if (op == KM_STEP_EXPERTS) /* those that were chosen */
			bytes += p.distinct_experts * (config->num_hidden_layers - 1) * 3 *
			         config->hidden_size * config->moe_intermediate_size * (0.5 + 2.0 / 32);
		assert_int_equal(p.op[op].cost.calls, costs[op].calls);
		if (fabs(p.op[op].cost.bytes - bytes) > 1e-6 * bytes)
			fail_msg("%s: %.0f bytes by formula, %.0f by the op", km_step_op_name(op), bytes,
			         p.op[op].cost.bytes);
		assert_true(fabs(p.op[op].cost.flops - costs[op].flops) <= 1e-9 * costs[op].flops);
	}
	assert_true(p.op[KM_STEP_ROUTER].cost.bytes > 0 && p.op[KM_STEP_QKV_A].cost.flops > 0);
	assert_true(fabs(p.op[KM_STEP_QKV_A].cost.flops - costs[KM_STEP_QKV_A].flops) < 1);
	check_joined(&shape, costs);
	km_weights_close(&weights);
}

static void costs_are_the_ops_own(void **state)
{
	km_model *model = open_tiny(3, 1);
	struct step s;

	(void)state;
	make_step(&s, 1, 9, true);
	check_costs(model, &s);
	km_model_close(model);
	model = open_tiny(2, 2);
	check_costs(model, &s);
	km_model_close(model);
}

static void a_profile_adds_up(void **state)
{
	km_model *model = open_tiny(4, 1);
	int top_k = km_model_config(model)->num_experts_per_tok;
	struct step s;
	km_profile p;
	double sum = 0;
	km_err err;

	(void)state;
	make_step(&s, 8, 0, false);
	assert_int_equal(km_model_profile(model, &s.batch, &p, &err), 0);
	for (int i = 0; i < KM_STEP_COUNT; i++)
		sum += p.op[i].us;
	assert_true(fabs(sum - p.sum_us) < 1e-6 * sum && sum <= p.step_us && p.layers_us < p.step_us);
	assert_int_equal(p.layers, 2); /* the last keeps three rows of 24 */
	assert_true(p.layers_are_moe);
	assert_int_equal(p.op[KM_STEP_MLA_DECODE].cost.calls, 0);
	assert_int_equal(p.op[KM_STEP_MLA_PREFILL].cost.calls, 4);
	make_step(&s, 1, 8, true);
	assert_int_equal(km_model_profile(model, &s.batch, &p, &err), 0);
	assert_int_equal(p.layers, 3);
	assert_true(p.distinct_experts >= top_k && p.distinct_experts <= SEQS * top_k);
	s.positions[1]++;
	assert_int_equal(km_model_profile(model, &s.batch, &p, &err), KM_EINVAL);
	km_model_close(model);
}

/* ---- the whole ---- */

static void reports_have_what_was_asked(void **state)
{
	km_model_random random = { 3, 2, 1 };
	km_engine_options engine;
	km_bench_options options = { .model = TINY, .cases = "2,20,4;1,8,1", .random = &random,
		                     .engine = &engine, .chunk = 12, .commit = "a \"b\"" };
	km_bench_report report;
	km_buf text = KM_BUF_INIT, json = KM_BUF_INIT;
	json_error_t why;
	json_t *doc, *result;
	km_err err;

	(void)state;
	km_engine_options_init(&engine);
	engine.threads = 1;
	assert_int_equal(km_bench_one_batch(&options, &report, &err), 0);
	assert_int_equal(report.results[0].prefill_steps, 4); /* 40 rows, 12 at a time */
	assert_int_equal(report.results[0].decode_steps, 3);
	assert_int_equal(report.results[0].decode_context, 23);
	assert_int_equal(report.results[1].decode_steps, 0);
	km_bench_report_text(&report, &text);
	assert_non_null(strstr(text.data, "one rank's slice of 2\nleft out 7 all-reduces of [rows, 256]"));
	assert_non_null(strstr(text.data, "\nexperts "));
	km_bench_report_json(&report, &json);
	doc = json_loads(json.data, 0, &why);
	if (!doc)
		fail_msg("%s", why.text);
	assert_string_equal(json_string_value(json_object_get(doc, "commit")), "a \"b\"");
	result = json_array_get(json_object_get(doc, "results"), 1);
	assert_true(json_is_null(json_object_get(result, "decode_step")));
	assert_true(json_is_null(json_object_get(result, "median_decode_latency_s")));
	result = json_object_get(result, "prefill_step");
	assert_true(json_number_value(json_object_get(result, "layer_us")) > 0);
	assert_true(json_array_size(json_object_get(result, "ops")) > 10);
	json_decref(doc);
	km_buf_release(&text);
	km_buf_release(&json);
	km_bench_report_release(&report);
	random.layers = 9;
	assert_int_equal(km_bench_one_batch(&options, &report, &err), KM_EINVAL);
	assert_non_null(strstr(err.msg, "has 4 layers, 9 cannot be taken"));
	km_bench_report_release(&report);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(cases_are_parsed),
		cmocka_unit_test(a_slice_is_cut_where_a_rank_is),
		cmocka_unit_test(random_weights_are_the_seed_s),
		cmocka_unit_test(costs_are_the_ops_own),
		cmocka_unit_test(a_profile_adds_up),
		cmocka_unit_test(reports_have_what_was_asked),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
