/*
 * The forward pass on a GPU: golden log-probabilities (tests/data/forward), against the CPU backend
 * with the same KV type, and against itself: prompts whole, in chunks, decoded, in mixed batches; with
 * graphs and without, to the bit.
 *
 * BOUNDS  The CPU computes in f32, the GPU rounds what a linear layer reads to bf16. In these
 * random models that turns the selection of an expert where two are close, and all later
 * log-probabilities of the row jump, in the CPU's own runs with a bf16 cache as well
 * (tests/test_forward.c bounds their mean by 0.2, and by 1 with fp8). So the bounds are on the
 * median, which says whether the arithmetic is right, and on the mean; what a wrong constant does
 * to them is in tests/data/forward/README.md (0.1 to 11). Each op by itself has sharp bounds in the
 * other tests of this folder. `test_forward_cuda short` takes two cases and fewer rows, for runs
 * under a sanitizer.
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
#include "base/rng.h"
#include "device/cuda_blas.h"
#include "model/gpu.h"
#include "support/forward_case.h"

static const char *const cases[] = { "k2-instruct", "k2.5",      "k2-thinking", "hf-eps",
	                             "deepseek-v3", "no-q-lora", "int4-groups", "int4-channel" };
enum { CASES = sizeof(cases) / sizeof(*cases), SHORT_CASES = 2 };

typedef struct bounds {
	double median, mean;
} bounds;

static const bounds bf16_bounds = { 0.15, 0.4 }, fp8_bounds = { 0.4, 0.8 };

static bool short_run;

static int case_count(void)
{
	return short_run ? SHORT_CASES : CASES;
}

static km_model_options gpu_options(enum km_kv_dtype kv_dtype)
{
	km_model_options o = fwd_options(NULL, kv_dtype);

	o.backend = KM_BACKEND_CUDA;
	o.page_size = FWD_PAGE;
	o.quiet = true;
	return o;
}

static int by_size(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

typedef struct spread {
	double median, mean, max;
} spread;

/* Of the differences of each row's own next token and of its best token's log-probability. */
static spread differences(const fwd_opened *o, const fwd_sequence *a, const fwd_sequence *b,
                          int from, int to)
{
	double *all = km_xreallocarray(NULL, (size_t)(2 * (to - from)), sizeof(*all));
	int count = 0, top, ignored;
	spread s = { 0 };

	for (int t = from; t < to; t++) {
		const float *x = a->logits + (size_t)t * (size_t)o->vocab;
		const float *y = b->logits + (size_t)t * (size_t)o->vocab;
		int next = t + 1 < a->len ? a->ids[t + 1] : 0;

		all[count++] = fabs(fwd_log_prob(x, o->vocab, next, &top) -
		                    fwd_log_prob(y, o->vocab, next, &ignored));
		all[count++] = fabs(fwd_log_prob(x, o->vocab, top, &ignored) -
		                    fwd_log_prob(y, o->vocab, top, &ignored));
	}
	for (int i = 0; i < count; i++) {
		s.mean += all[i] / count;
		if (!(all[i] <= s.max))
			s.max = all[i]; /* NaN is kept */
	}
	qsort(all, (size_t)count, sizeof(*all), by_size);
	s.median = all[count / 2];
	free(all);
	return s;
}

static void check(const char *what, const char *name, const bounds *b, spread s)
{
	print_message("figure: %s, %s: difference of a log-probability: median %.2g, mean %.2g, "
	              "largest %.2g "
	              "(bounds: median %g, mean %g)\n",
	              what, name, s.median, s.mean, s.max, b->median, b->mean);
	assert_true(s.median <= b->median && s.mean <= b->mean && !isnan(s.max));
}

static void log_probabilities_are_the_cpus(void **state)
{
	static const enum km_kv_dtype dtypes[] = { KM_KV_BF16, KM_KV_FP8 };
	static const char *const names[] = { "bf16 KV", "fp8 KV" };

	(void)state;
	for (int c = 0; c < case_count(); c++)
		for (int k = 0; k < 2; k++) {
			fwd_opened cpu = fwd_open(cases[c], fwd_options(NULL, dtypes[k]));
			fwd_opened gpu = fwd_open(cases[c], gpu_options(dtypes[k]));
			fwd_sequence *want = fwd_score_whole(&cpu, 0),
				     *got = fwd_score_whole(&gpu, 0);
			char what[64];

			snprintf(what, sizeof(what), "prefill, %s, against the CPU", names[k]);
			check(what, cases[c], k ? &fp8_bounds : &bf16_bounds,
			      differences(&cpu, want, got, 0, want->len));
			if (k == 0) {
				fwd_difference d = { 0 };

				fwd_compare(&gpu, 0, got, &d);
				print_message("figure: prefill, %s, %s, against the reference: "
				              "mean %.2g, "
				              "largest %.2g\n",
				              names[k], cases[c], d.sum / d.count, d.max);
				assert_true(d.sum / d.count <= bf16_bounds.mean);
			}
			fwd_drop(want);
			fwd_drop(got);
			fwd_close(&cpu);
			fwd_close(&gpu);
		}
}

/* Prompt to the middle, then token by token; and in uneven chunks: the forms of attention and of
 * linear layers differ, the numbers hardly do. */
static void decoding_and_chunks_agree(void **state)
{
	static const int cuts[][2] = { { 7, 9 }, { 33, 16 }, { 1, 40 } };

	(void)state;
	for (int c = 0; c < case_count(); c++) {
		fwd_opened cpu = fwd_open(cases[c], fwd_options(NULL, KM_KV_BF16));
		fwd_opened gpu = fwd_open(cases[c], gpu_options(KM_KV_BF16));
		fwd_sequence *want = fwd_score(&cpu, 1, 5, 1, true),
			     *got = fwd_score(&gpu, 1, 5, 1, true);
		fwd_sequence *whole = fwd_score_whole(&gpu, 0);

		check("decode, against the CPU", cases[c], &bf16_bounds,
		      differences(&cpu, want, got, 0, want->len));
		for (int i = 0; i < (short_run ? 1 : 3); i++) {
			fwd_sequence *cut = fwd_score(&gpu, 0, cuts[i][0], cuts[i][1], false);

			check("chunks, against whole", cases[c], &bf16_bounds,
			      differences(&gpu, whole, cut, 0, whole->len));
			fwd_drop(cut);
		}
		fwd_drop(want);
		fwd_drop(got);
		fwd_drop(whole);
		fwd_close(&cpu);
		fwd_close(&gpu);
	}
}

/* Two decoding sequences and two prompts in chunks, in the same steps, against the CPU in the same
 * steps. */
static void mixed_batches_agree(void **state)
{
	(void)state;
	for (int c = 0; c < (short_run ? 1 : CASES); c++) {
		fwd_opened o[2] = { fwd_open(cases[c], fwd_options(NULL, KM_KV_BF16)),
			            fwd_open(cases[c], gpu_options(KM_KV_BF16)) };
		fwd_sequence *q[2][FWD_MAX_SEQS];
		fwd_step *s = km_xcalloc(1, sizeof(*s));

		for (int d = 0; d < 2; d++) {
			for (int i = 0; i < FWD_MAX_SEQS; i++)
				q[d][i] = fwd_prompt(&o[d], i < 2, i);
			fwd_add(s, q[d][0], 3, false);
			fwd_add(s, q[d][1], 3, false);
			fwd_run(&o[d], s);
			while (q[d][0]->done < q[d][0]->len) {
				fwd_add(s, q[d][0], 1, true);
				if (q[d][0]->done > 2 && q[d][1]->done < q[d][1]->len)
					fwd_add(s, q[d][1], 1, true);
				fwd_add(s, q[d][2], 1 + q[d][0]->done % 3, false);
				if (q[d][3]->done + 2 <= q[d][3]->len)
					fwd_add(s, q[d][3], 2, false);
				fwd_run(&o[d], s);
			}
		}
		for (int i = 0; i < FWD_MAX_SEQS; i++)
			check("mixed batches, against the CPU", cases[c], &bf16_bounds,
			      differences(&o[0], q[0][i], q[1][i], 0, q[0][i]->done));
		for (int d = 0; d < 2; d++) {
			for (int i = 0; i < FWD_MAX_SEQS; i++)
				fwd_drop(q[d][i]);
			fwd_close(&o[d]);
		}
		free(s);
	}
}

/* Only some rows' logits, in any order, one twice: those of a step that wants all. */
static void unwanted_rows_change_little(void **state)
{
	static const int32_t rows[] = { 30, 3, 29, 3, 0, 11 };

	(void)state;
	for (int c = 0; c < case_count(); c++) {
		fwd_opened o = fwd_open(cases[c], gpu_options(KM_KV_BF16));
		fwd_sequence *whole = fwd_score(&o, 0, 31, FWD_MAX_ROWS, false),
			     *q = fwd_prompt(&o, 0, 1);
		fwd_sequence *some = fwd_prompt(&o, 0, 1);
		size_t row_bytes = (size_t)o.vocab * sizeof(float);
		fwd_step *s = km_xcalloc(1, sizeof(*s));
		const float *logits;
		km_err err;

		for (int wanted = 6; wanted >= 0; wanted -= 3) { /* none in the end */
			q->done = 0;
			fwd_add(s, q, 31, false);
			fwd_point(s);
			s->batch.logit_row = rows;
			s->batch.logit_rows = wanted;
			if (km_model_forward(o.model, &s->batch, &logits, &err) < 0)
				fail_msg("%s", err.msg);
			for (int i = 0; i < wanted; i++) {
				memcpy(some->logits + rows[i] * o.vocab, logits + i * o.vocab,
				       row_bytes);
				check("some rows, against all", cases[c], &bf16_bounds,
				      differences(&o, whole, some, rows[i], rows[i] + 1));
			}
			memset(s, 0, sizeof(*s));
		}
		fwd_drop(whole);
		fwd_drop(some);
		fwd_drop(q);
		free(s);
		fwd_close(&o);
	}
}

/* The same step twice has the same bits: no sum depends on timing. */
static void the_same_step_has_the_same_bits(void **state)
{
	(void)state;
	for (int c = 0; c < case_count(); c++) {
		fwd_opened o = fwd_open(cases[c], gpu_options(KM_KV_BF16));
		fwd_sequence *first = fwd_score(&o, 0, 20, 1, true);

		for (int i = 0; i < (short_run ? 1 : 3); i++) {
			fwd_sequence *again = fwd_score(&o, 0, 20, 1, true);

			assert_memory_equal(first->logits, again->logits,
			                    (size_t)first->len * (size_t)o.vocab * sizeof(float));
			fwd_drop(again);
		}
		fwd_drop(first);
		fwd_close(&o);
	}
}

/* Steps that only generate: replayed from graphs, and launched kernel by kernel. */
static void graphs_have_the_same_bits(void **state)
{
	(void)state;
	for (int c = 0; c < case_count(); c++) {
		km_model_options options = gpu_options(KM_KV_BF16);
		fwd_opened with, without;
		fwd_sequence *a, *b;

		with = fwd_open(cases[c], options);
		options.disable_graphs = true;
		without = fwd_open(cases[c], options);
		a = fwd_score(&with, 1, 5, 1, true);
		b = fwd_score(&without, 1, 5, 1, true);
		assert_true(with.model->gpu->graphs.replays == a->len - 5 - 1 &&
		            !without.model->gpu->graphs.replays);
		assert_memory_equal(a->logits, b->logits,
		                    (size_t)a->len * (size_t)with.vocab * sizeof(float));
		fwd_drop(a);
		fwd_drop(b);
		fwd_close(&with);
		fwd_close(&without);
	}
}

/* ---- steps with prompts, replayed in pieces ---- */

/* On either side of a bucket's border, up to all of a context. */
static const int lengths[] = { 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 127, 128 };
enum { LENGTHS = sizeof(lengths) / sizeof(*lengths), BUCKETS_OF_LENGTHS = 8 };
enum { SHORT_LENGTHS = 9, BUCKETS_OF_SHORT_LENGTHS = 6 };

/* Launched, captured, replayed. */
static int round_count(void)
{
	return short_run ? 3 : 4;
}

/* The same steps, with graphs and without. */
typedef struct pair {
	fwd_opened o[2];
	int64_t steps; /* with prompts, of one of the two */
} pair;

static pair open_pair(int c, km_model_options options)
{
	pair p = { 0 };

	p.o[0] = fwd_open(cases[c], options);
	options.disable_graphs = true;
	p.o[1] = fwd_open(cases[c], options);
	return p;
}

/* Every step with prompts was replayed, but for the first of each bucket not captured at open. */
static void close_pair(pair *p, bool at_open)
{
	const km_gpu_graphs *with = &p->o[0].model->gpu->graphs, *without = &p->o[1].model->gpu->graphs;

	assert_int_equal(with->piecewise, p->steps - (at_open ? 0 : with->buckets));
	assert_true(with->piecewise > 0);
	assert_int_equal(without->piecewise + without->replays + without->captured, 0);
	fwd_close(&p->o[0]);
	fwd_close(&p->o[1]);
}

static fwd_sequence *random_prompt(const fwd_opened *o, int len, int place, uint64_t seed)
{
	fwd_sequence *q = fwd_prompt(o, 0, place);

	assert_true(len <= FWD_PAGE * q->page_count);
	free(q->logits);
	q->len = len;
	for (int i = 0; i < len; i++)
		q->ids[i] = (int32_t)(km_rng_u64(seed, (uint64_t)i) % (uint64_t)o->vocab);
	q->logits = km_xcalloc((size_t)len * (size_t)o->vocab, sizeof(float));
	return q;
}

static int left_of(const fwd_sequence *q, int rows)
{
	return rows < q->len - q->done ? rows : q->len - q->done;
}

/* Runs a step of the pair's half `o`. */
static void run_step(pair *p, fwd_opened *o, fwd_step *s)
{
	p->steps += o == &p->o[0] && s->batch.decode_seqs < s->batch.tokens;
	fwd_run(o, s);
}

/* Runs one for the logits of up to two rows, its first and its last. */
static void run_step_for(pair *p, fwd_opened *o, fwd_step *s, int wanted, float *to)
{
	int32_t rows[2] = { 0, s->batch.tokens - 1 };
	const float *logits;
	km_err err;

	fwd_point(s);
	s->batch.logit_row = rows;
	s->batch.logit_rows = wanted;
	if (km_model_forward(o->model, &s->batch, &logits, &err) < 0)
		fail_msg("%s", err.msg);
	memcpy(to, logits, (size_t)wanted * (size_t)o->vocab * sizeof(float));
	for (int i = 0; i < s->batch.seqs; i++)
		s->owner[i]->done += s->seq_start[i + 1] - s->seq_start[i];
	p->steps += o == &p->o[0];
	memset(s, 0, sizeof(*s));
}

/* Makes and runs `q`, FWD_MAX_SEQS sequences. */
typedef void run_some(pair *p, fwd_opened *o, fwd_sequence **q, uint64_t seed);

/* Two that decode, and two prompts in chunks of many sizes, in the same steps. */
static void run_mixed(pair *p, fwd_opened *o, fwd_sequence **q, uint64_t seed)
{
	static const int len[FWD_MAX_SEQS] = { 24, 21, 128, 128 }, chunk[] = { 1, 2, 5, 13, 30, 3, 40 };
	fwd_step *s = km_xcalloc(1, sizeof(*s));

	for (int i = 0; i < FWD_MAX_SEQS; i++)
		q[i] = random_prompt(o, len[i], i, seed + (uint64_t)i);
	fwd_add(s, q[0], 3, false);
	fwd_add(s, q[1], 3, false);
	run_step(p, o, s);
	for (int i = 0; q[0]->done < q[0]->len; i++) {
		for (int k = 0; k < FWD_MAX_SEQS; k++) {
			int rows = left_of(q[k], k < 2 ? 1 : chunk[(i + k) % 7]);

			if (rows)
				fwd_add(s, q[k], rows, k < 2);
		}
		run_step(p, o, s);
	}
	free(s);
}

/* Four prompts at once, up to all rows that are planned. */
static void run_wide(pair *p, fwd_opened *o, fwd_sequence **q, uint64_t seed)
{
	static const int chunk[][FWD_MAX_SEQS] = { { 60, 20, 64, 5 }, { 64, 64, 64, 64 }, { 4, 44, 0, 59 } };
	fwd_step *s = km_xcalloc(1, sizeof(*s));

	for (int i = 0; i < FWD_MAX_SEQS; i++)
		q[i] = random_prompt(o, 128, i, seed + (uint64_t)i);
	for (int i = 0; i < 3; i++) {
		for (int k = 0; k < FWD_MAX_SEQS; k++)
			if (chunk[i][k])
				fwd_add(s, q[k], chunk[i][k], false);
		run_step(p, o, s);
	}
	free(s);
}

/* A prompt beside one that decodes; of most rows nobody wants the logits. */
static void run_unwanted(pair *p, fwd_opened *o, fwd_sequence **q, uint64_t seed)
{
	static const int chunk[] = { 12, 7, 1, 20, 3, 33, 2, 17, 30, 3 };
	fwd_step *s = km_xcalloc(1, sizeof(*s));

	for (int i = 0; i < FWD_MAX_SEQS; i++)
		q[i] = random_prompt(o, i ? 128 : 20, i, seed + (uint64_t)i);
	fwd_add(s, q[0], 5, false);
	run_step_for(p, o, s, 0, q[0]->logits);
	for (int i = 0; i < 10; i++) {
		fwd_add(s, q[0], 1, true);
		fwd_add(s, q[1], chunk[i], false);
		run_step_for(p, o, s, i % 3, q[1]->logits + 2 * i * o->vocab);
	}
	free(s);
}

static void run_both(pair *p, run_some *run, uint64_t seed)
{
	fwd_sequence *q[2][FWD_MAX_SEQS];

	for (int d = 0; d < 2; d++)
		run(p, &p->o[d], q[d], seed);
	for (int i = 0; i < FWD_MAX_SEQS; i++) {
		assert_memory_equal(q[0][i]->logits, q[1][i]->logits,
		                    (size_t)q[0][i]->len * (size_t)p->o[0].vocab * sizeof(float));
		fwd_drop(q[0][i]);
		fwd_drop(q[1][i]);
	}
}

static void run_whole(pair *p, fwd_opened *o, fwd_sequence *q)
{
	fwd_step *s = km_xcalloc(1, sizeof(*s));

	fwd_add(s, q, q->len, false);
	run_step(p, o, s);
	free(s);
}

/* Each row has its own logits: the same bits are not those of nothing. */
static void assert_rows_differ(const fwd_opened *o, const fwd_sequence *q)
{
	size_t vocab = (size_t)o->vocab;

	for (int t = 1; t < q->len; t++)
		assert_memory_not_equal(q->logits + (size_t)t * vocab,
		                        q->logits + (size_t)(t - 1) * vocab, vocab * sizeof(float));
}

/* Of all rows so far as many choices were counted, in both, as there are: padding chooses none. */
static void check_counts(pair *p, int64_t rows)
{
	const km_config *c = km_model_config(p->o[0].model);
	size_t count = (size_t)c->num_hidden_layers * (size_t)c->n_routed_experts;
	int64_t *counts[2], sum = 0, layers = 0;

	for (int i = 0; i < c->num_hidden_layers; i++)
		layers += km_config_is_moe_layer(c, i);
	for (int d = 0; d < 2; d++) {
		km_err err;

		counts[d] = km_xcalloc(count, sizeof(**counts));
		km_model_set_expert_counts(p->o[d].model, counts[d]);
		if (km_model_fetch_expert_counts(p->o[d].model, &err) < 0)
			fail_msg("%s", err.msg);
		km_model_set_expert_counts(p->o[d].model, NULL);
	}
	for (size_t i = 0; i < count; i++)
		sum += counts[0][i];
	assert_int_equal(sum, rows * layers * c->num_experts_per_tok);
	assert_memory_equal(counts[0], counts[1], count * sizeof(**counts));
	free(counts[0]);
	free(counts[1]);
}

static void prompts_in_pieces_have_the_same_bits(void **state)
{
	(void)state;
	for (int c = 0; c < case_count(); c++) {
		km_model_options options = gpu_options(c % 2 ? KM_KV_FP8 : KM_KV_BF16);
		int count = short_run ? SHORT_LENGTHS : LENGTHS;
		int64_t rows = 0;
		pair p;

		options.count_experts = true;
		p = open_pair(c, options);
		for (int i = 0; i < round_count() * count; i++) {
			fwd_sequence *q[2];
			int len = lengths[i % count];

			for (int d = 0; d < 2; d++) {
				q[d] = random_prompt(&p.o[d], len, 0, 100 + (uint64_t)i);
				run_whole(&p, &p.o[d], q[d]);
			}
			assert_memory_equal(q[0]->logits, q[1]->logits,
			                    (size_t)len * (size_t)p.o[0].vocab * sizeof(float));
			assert_rows_differ(&p.o[0], q[0]);
			rows += len;
			fwd_drop(q[0]);
			fwd_drop(q[1]);
		}
		check_counts(&p, rows);
		assert_int_equal(p.o[0].model->gpu->graphs.buckets,
		                 short_run ? BUCKETS_OF_SHORT_LENGTHS : BUCKETS_OF_LENGTHS);
		close_pair(&p, false);
	}
}

static void chunks_in_pieces_have_the_same_bits(void **state)
{
	(void)state;
	for (int c = 0; c < (short_run ? 1 : CASES); c++) {
		pair p = open_pair(c, gpu_options(c % 2 ? KM_KV_BF16 : KM_KV_FP8));

		for (int i = 0; i < round_count(); i++) {
			run_both(&p, run_mixed, 1000 + 10 * (uint64_t)i);
			run_both(&p, run_wide, 2000 + 10 * (uint64_t)i);
			run_both(&p, run_unwanted, 3000 + 10 * (uint64_t)i);
		}
		close_pair(&p, false);
	}
}

/* Captured at open: one form for each of 1, 2 and 4 rows, and the pieces of 1 to 256 rows, in 10
 * buckets. */
static void graphs_are_there_at_open(void **state)
{
	(void)state;
	for (int c = 0; c < (short_run ? 1 : SHORT_CASES); c++) {
		km_model_options options = gpu_options(KM_KV_BF16);
		const km_gpu_graphs *graphs;
		pair p;

		options.capture_at_open = true;
		options.count_experts = true;
		p = open_pair(c, options);
		graphs = &p.o[0].model->gpu->graphs;
		check_counts(&p, 0);
		assert_int_equal(graphs->captured,
		                 3 + 10 * km_model_config(p.o[0].model)->num_hidden_layers);
		print_message("figure: %s: %d graphs captured at open in %.2f s, %.1f MB\n", cases[c],
		              graphs->captured, graphs->seconds, (double)graphs->bytes / 1e6);
		run_both(&p, run_mixed, 1);
		run_both(&p, run_wide, 2);
		run_both(&p, run_unwanted, 3);
		assert_int_equal(graphs->buckets, 10);
		assert_int_equal(graphs->forms, 3);
		close_pair(&p, true);
	}
}

static size_t free_bytes(void)
{
	size_t bytes;
	km_err err;

	if (km_cuda_free_bytes(0, &bytes, &err) < 0)
		fail_msg("%s", err.msg);
	return bytes;
}

/* Not under a sanitizer, which takes memory of its own. */
static void steps_take_no_memory(void **state)
{
	enum { STEPS = 200 };
	fwd_opened o;
	size_t before = 0;

	(void)state;
	if (short_run)
		skip();
	o = fwd_open("k2.5", gpu_options(KM_KV_BF16));
	for (int i = -3 * LENGTHS; i < STEPS; i++) {
		fwd_sequence *q = random_prompt(&o, lengths[(i + 3 * LENGTHS) % LENGTHS], 0,
		                                (uint64_t)(i + 3 * LENGTHS));
		fwd_step *s = km_xcalloc(1, sizeof(*s));

		if (!i)
			before = free_bytes();
		fwd_add(s, q, q->len, false);
		fwd_run(&o, s);
		fwd_drop(q);
		free(s);
	}
	print_message("figure: %d steps with prompts took %+.1f MB of device memory\n", (int)STEPS,
	              ((double)before - (double)free_bytes()) / 1e6);
	assert_true(free_bytes() >= before);
	assert_int_equal(o.model->gpu->graphs.piecewise, STEPS + 3 * LENGTHS - BUCKETS_OF_LENGTHS);
	fwd_close(&o);
}

static void long_prompts_are_the_reference(void **state)
{
	km_model_options options = gpu_options(KM_KV_BF16);
	fwd_difference d = { 0 };
	fwd_sequence *q;
	fwd_opened o;

	(void)state;
	if (short_run)
		skip();
	options.max_context = options.kv_slots = FWD_LONG_CONTEXT;
	o = fwd_open("long", options);
	q = fwd_score(&o, 0, FWD_MAX_ROWS, FWD_MAX_ROWS, false);
	fwd_compare(&o, 0, q, &d);
	print_message("figure: long prompt (%d tokens) on the GPU: mean difference %.2g, largest "
	              "%.2g, of the last "
	              "%d log-probabilities\n",
	              q->len, d.sum / d.count, d.max, d.count);
	assert_true(d.count > 90 && d.sum / d.count <= bf16_bounds.mean);
	fwd_drop(q);
	fwd_close(&o);
}

static void the_plan_is_what_is_taken(void **state)
{
	(void)state;
	for (int c = 0; c < case_count(); c++) {
		km_model_options options = gpu_options(KM_KV_BF16);
		fwd_opened o = fwd_open(cases[c], options);
		km_model_plan plan;
		double planned, taken = (double)km_cuda_mark(o.model->gpu->cuda);
		km_err err;

		assert_int_equal(
			km_model_plan_memory(km_model_config(o.model), &options, &plan, &err), 0);
		planned = (double)(plan.weight_bytes + plan.kv_bytes + plan.rope_bytes +
		                   plan.scratch_bytes + plan.logits_bytes + plan.fixed_bytes);
		if (!o.model->gpu->linear.blas)
			taken += KM_CUDA_BLAS_BYTES;
		print_message(
			"figure: %s: %.0f bytes of device memory planned, %.0f taken (%+.3f%%)\n",
			cases[c], planned, taken, (taken - planned) / planned * 100);
		assert_true(taken <= planned && taken >= 0.99 * planned);
		fwd_close(&o);
	}
}

static void what_is_not_built_is_refused(void **state)
{
	fwd_opened o = fwd_open("k2.5", fwd_options(NULL, KM_KV_BF16));
	km_model_options options = gpu_options(KM_KV_F32);
	km_model *model;
	km_err err;

	(void)state;
	assert_int_equal(km_model_open(&model, o.dir, &options, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "float32"));
	options = gpu_options(KM_KV_BF16);
	options.gpu = 99;
	assert_int_equal(km_model_open(&model, o.dir, &options, &err), KM_EINVAL);
	options = gpu_options(KM_KV_BF16);
	options.kv_slots = INT32_MAX / FWD_PAGE * FWD_PAGE;
	assert_int_equal(km_model_open(&model, o.dir, &options, &err), KM_ENOMEM);
	assert_null(model);
	fwd_close(&o);
}

static void choices_are_explained(void **state)
{
	fwd_opened o = fwd_open("k2.5", gpu_options(KM_KV_FP8));
	km_buf out = KM_BUF_INIT;

	(void)state;
	km_model_explain(o.model, &out);
	print_message("%s", out.data);
	assert_non_null(strstr(out.data, "GPU o ["));
	assert_non_null(strstr(out.data, "GPU attention:"));
	km_buf_release(&out);
	fwd_close(&o);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest all[] = {
		cmocka_unit_test(log_probabilities_are_the_cpus),
		cmocka_unit_test(decoding_and_chunks_agree),
		cmocka_unit_test(mixed_batches_agree),
		cmocka_unit_test(unwanted_rows_change_little),
		cmocka_unit_test(the_same_step_has_the_same_bits),
		cmocka_unit_test(graphs_have_the_same_bits),
		cmocka_unit_test(prompts_in_pieces_have_the_same_bits),
		cmocka_unit_test(chunks_in_pieces_have_the_same_bits),
		cmocka_unit_test(graphs_are_there_at_open),
		cmocka_unit_test(steps_take_no_memory),
		cmocka_unit_test(long_prompts_are_the_reference),
		cmocka_unit_test(the_plan_is_what_is_taken),
		cmocka_unit_test(what_is_not_built_is_refused),
		cmocka_unit_test(choices_are_explained),
	};
	km_err err;

	short_run = argc > 1 && !strcmp(argv[1], "short");
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	return cmocka_run_group_tests(all, NULL, NULL);
}
