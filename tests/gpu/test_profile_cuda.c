/*
 * model/profile on a GPU, over random weights: that both backends make the same model of a seed, whole
 * and as a slice, and with Kimi K2's router, whose experts' launch takes along what goes before it; that a
 * profile counts what the step does, and that it leaves the model as it was.
 *
 * BOUND  The relative difference of the logits, over all of them: activations are rounded to bf16 on the
 * GPU, and where two experts are close a row takes another one. Weights of another seed are off by 1.4.
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

#include "base/buf.h"
#include "base/mem.h"
#include "device/cuda.h"
#include "model/profile.h"

enum { SEQS = 4, ROWS = 32, CONTEXT = 64 };

static const double bound = 0.2;

typedef struct step {
	int32_t ids[ROWS], positions[ROWS], slots[ROWS], seq_start[SEQS + 1], kv_len[SEQS],
		pages[SEQS], logit_row[SEQS];
	km_batch batch;
} step;

static void make_step(step *s, int rows, int before, bool decode)
{
	s->batch = (km_batch){ .tokens = SEQS * rows, .seqs = SEQS, .decode_seqs = decode ? SEQS : 0,
		               .ids = s->ids, .positions = s->positions, .slots = s->slots,
		               .seq_start = s->seq_start, .kv_len = s->kv_len, .pages = s->pages,
		               .pages_per_seq = 1, .page_size = CONTEXT, .logit_row = s->logit_row,
		               .logit_rows = SEQS };
	s->seq_start[0] = 0;
	for (int q = 0; q < SEQS; q++) {
		s->seq_start[q + 1] = (q + 1) * rows;
		s->kv_len[q] = before + rows;
		s->pages[q] = q;
		s->logit_row[q] = (q + 1) * rows - 1;
		for (int i = 0; i < rows; i++) {
			s->ids[q * rows + i] = 11 * q + i;
			s->positions[q * rows + i] = before + i;
			s->slots[q * rows + i] = q * CONTEXT + before + i;
		}
	}
}

static const char tiny[] = "configs/models/tiny-k25.json";

static km_model *open_random(const char *config, enum km_backend_kind backend, int shard_of, uint64_t seed)
{
	km_model_random random = { 3, shard_of, seed };
	km_model_options options = { .max_batch_tokens = ROWS, .max_seqs = SEQS, .max_logit_rows = SEQS,
		                     .max_context = CONTEXT, .kv_slots = SEQS * CONTEXT,
		                     .kv_dtype = KM_KV_BF16, .page_size = CONTEXT, .backend = backend,
		                     .quiet = true };
	km_model *model;
	km_err err;

	if (km_model_open_random(&model, config, &random, &options, &err) < 0)
		fail_msg("%s", err.msg);
	return model;
}

/* A prefill and a decode step behind it: the decode step's logits, owned. */
static float *run_both(km_model *model)
{
	size_t bytes = (size_t)SEQS * (size_t)km_model_config(model)->vocab_size * sizeof(float);
	float *copy = km_xmalloc(bytes);
	const float *logits;
	step s;
	km_err err;

	make_step(&s, 8, 0, false);
	if (km_model_forward(model, &s.batch, &logits, &err) < 0)
		fail_msg("%s", err.msg);
	make_step(&s, 1, 8, true);
	if (km_model_forward(model, &s.batch, &logits, &err) < 0)
		fail_msg("%s", err.msg);
	return memcpy(copy, logits, bytes);
}

static double difference(const float *a, const float *b, size_t count)
{
	double off = 0, size = 0;

	for (size_t i = 0; i < count; i++) {
		off += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
		size += (double)b[i] * b[i];
	}
	return sqrt(off / size);
}

static void a_seed_is_one_model_on_both(void **state)
{
	(void)state;
	for (int shard_of = 1; shard_of <= 2; shard_of++) {
		km_model *cpu = open_random(tiny, KM_BACKEND_CPU, shard_of, 3);
		km_model *gpu = open_random(tiny, KM_BACKEND_CUDA, shard_of, 3);
		km_model *other = open_random(tiny, KM_BACKEND_CUDA, shard_of, 4);
		size_t count = (size_t)SEQS * (size_t)km_model_config(cpu)->vocab_size;
		float *a = run_both(cpu), *b = run_both(gpu), *c = run_both(other);

		printf("figure: random weights, slice of %d: logits off by %.4f, with another seed %.2f\n",
		       shard_of, difference(b, a, count), difference(c, a, count));
		assert_true(difference(b, a, count) < bound);
		assert_true(difference(c, a, count) > 1);
		free(a);
		free(b);
		free(c);
		km_model_close(cpu);
		km_model_close(gpu);
		km_model_close(other);
	}
}

/* The tiny model with 384 experts, 8 a row, and shared experts of 256 columns. */
static void write_k2_router(char *path)
{
	int fd = mkstemp(path);
	json_t *config = json_load_file(tiny, 0, NULL), *text = json_object_get(config, "text_config");

	assert_true(fd >= 0 && text);
	json_object_set_new(text, "n_routed_experts", json_integer(384));
	json_object_set_new(text, "num_experts_per_tok", json_integer(8));
	json_object_set_new(text, "moe_intermediate_size", json_integer(256));
	json_object_set_new(text, "hidden_size", json_integer(512));
	json_object_set_new(json_object_get(config, "vision_config"), "text_hidden_size", json_integer(512));
	assert_int_equal(json_dumpfd(config, fd, 0), 0);
	json_decref(config);
	close(fd);
}

static void what_experts_take_along_is_the_cpus(void **state)
{
	char path[] = "/tmp/k2-router-XXXXXX";
	km_model *cpu, *gpu;
	km_buf words = KM_BUF_INIT;
	float *a, *b;
	size_t count;

	(void)state;
	write_k2_router(path);
	cpu = open_random(path, KM_BACKEND_CPU, 1, 5);
	gpu = open_random(path, KM_BACKEND_CUDA, 1, 5);
	unlink(path);
	km_model_explain(gpu, &words);
	assert_non_null(strstr(words.data, "up to 4 rows their launch takes along the gate"));
	km_buf_release(&words);
	count = (size_t)SEQS * (size_t)km_model_config(cpu)->vocab_size;
	a = run_both(cpu);
	b = run_both(gpu);
	printf("figure: the gate and the shared experts' down in the experts' launch: logits off by %.4f\n",
	       difference(b, a, count));
	assert_true(difference(b, a, count) < bound);
	free(a);
	free(b);
	km_model_close(cpu);
	km_model_close(gpu);
}

static void check_profile(const km_profile *p, enum km_step_op attention)
{
	double sum = 0;
	int launches = 0;

	for (int i = 0; i < KM_STEP_COUNT; i++) {
		const km_profile_op *op = &p->op[i];

		assert_true(op->cost.calls || !op->launches);
		assert_true(!op->launches || op->us > 0);
		sum += op->us;
		launches += op->launches;
	}
	assert_true(fabs(sum - p->sum_us) < 1e-6 * sum);
	assert_int_equal(launches, p->launches);
	assert_true(p->step_us > 0 && p->layers_us > 0 && p->layers_us < p->step_us);
	assert_true(p->op[attention].launches > 0 && p->op[KM_STEP_EXPERTS].launches > 0);
	assert_true(p->op[KM_STEP_O].cost.bytes > 0 && p->op[KM_STEP_HEAD].us > 0);
	assert_true(p->distinct_experts >= 4 && p->distinct_experts <= 16);
}

static void a_profile_counts_and_leaves_no_trace(void **state)
{
	km_model *gpu = open_random(tiny, KM_BACKEND_CUDA, 1, 3);
	size_t bytes = (size_t)SEQS * (size_t)km_model_config(gpu)->vocab_size * sizeof(float);
	float *before = run_both(gpu), *after;
	km_profile p;
	step s;
	km_err err;

	(void)state;
	make_step(&s, 8, 0, false);
	assert_int_equal(km_model_profile(gpu, &s.batch, &p, &err), 0);
	assert_int_equal(p.layers, 1);
	check_profile(&p, KM_STEP_MLA_PREFILL);
	make_step(&s, 1, 8, true);
	assert_int_equal(km_model_profile(gpu, &s.batch, &p, &err), 0);
	assert_int_equal(p.layers, 2);
	check_profile(&p, KM_STEP_MLA_DECODE);
	after = run_both(gpu);
	assert_memory_equal(before, after, bytes);
	assert_int_equal(km_model_fill_cache(gpu, 1, &err), 0);
	assert_int_equal(km_model_profile(gpu, &s.batch, &p, &err), 0);
	check_profile(&p, KM_STEP_MLA_DECODE);
	free(before);
	free(after);
	km_model_close(gpu);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_seed_is_one_model_on_both),
		cmocka_unit_test(what_experts_take_along_is_the_cpus),
		cmocka_unit_test(a_profile_counts_and_leaves_no_trace),
	};
	km_err err;

	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
