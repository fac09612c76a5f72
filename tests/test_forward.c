/*
 * model/: the forward pass against transformers' float32 (tests/data/forward/README.md says how that
 * reference was made and what it can detect), and against itself: chunks, batches, threads, forms.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <malloc.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"
#include "model/model.h"
#include "model/rope.h"
#include "support/forward_case.h"

#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif

static const char *const cases[] = { "k2-instruct", "k2-thinking", "k2.5", "hf-eps", "deepseek-v3",
	                             "no-q-lora", "int4-groups", "int4-channel" };
enum { CASES = sizeof(cases) / sizeof(*cases) };

/* The sanitizer is ten times slower; what compares this program with itself runs on fewer cases. */
#ifdef SANITIZED
enum { SELF_CASES = 3, SLOW_FORMS = false };
#else
enum { SELF_CASES = CASES, SLOW_FORMS = true };
#endif

/* Portable gives the bits of the vector forms, to which tests/test_same_bits.c holds it. */
static bool too_slow(const char *isa)
{
	return !SLOW_FORMS && !strcmp(isa, "portable");
}


static void assert_same_bits(const fwd_opened *o, const fwd_sequence *a, const fwd_sequence *b,
                             int rows)
{
	assert_memory_equal(a->logits, b->logits, (size_t)rows * (size_t)o->vocab * sizeof(float));
}

/* Both prompts of a case by one form, prefilled whole. */
static fwd_difference compare_whole(const char *name, const char *isa)
{
	fwd_opened o = fwd_open(name, fwd_options(isa, KM_KV_F32));
	fwd_difference d = { 0 };

	for (int p = 0; p < 2; p++) {
		fwd_sequence *q = fwd_score_whole(&o, p);

		fwd_compare(&o, p, q, &d);
		fwd_drop(q);
	}
	fwd_close(&o);
	return d;
}

static void log_probabilities_are_the_references(void **state)
{
	(void)state;
	for (int c = 0; c < CASES; c++) {
		km_buf line = KM_BUF_INIT;

		for (const char *const *isa = km_cpu_isas; *isa; isa++) {
			fwd_difference d;

			if (too_slow(*isa))
				continue;
			if (!km_cpu_ops(*isa)) {
				if (!c)
					print_message("skip: this machine has no %s\n", *isa);
				continue;
			}
			d = compare_whole(cases[c], *isa);
			km_buf_printf(&line, "%s%s %.2g", line.len ? ", " : "", *isa, d.max);
			assert_true(d.count > 100 && d.max <= FWD_BOUND);
			assert_int_equal(d.wrong_top, 0);
		}
		print_message("figure: fidelity %s, f32 KV: largest difference of a log-probability %s (bound %g)\n",
		              cases[c], line.data, FWD_BOUND);
		km_buf_release(&line);
	}
}

/* Past the 4096 positions that YaRN stretches from, in chunks, by the best form; then its end decoded. */
static void long_prompts_are_the_reference(void **state)
{
	km_model_options options = fwd_options(NULL, KM_KV_F32);
	fwd_difference d = { 0 }, decoded = { 0 };
	fwd_sequence *q;
	fwd_step s = { 0 };
	fwd_opened o;

	(void)state;
#ifdef SANITIZED
	print_message("skip: the long prompt takes a minute under the sanitizer\n");
	skip();
#endif
	options.max_context = options.kv_slots = FWD_LONG_CONTEXT;
	o = fwd_open("long", options);
	q = fwd_score(&o, 0, FWD_MAX_ROWS, FWD_MAX_ROWS, false);
	fwd_compare(&o, 0, q, &d);
	for (q->done = q->len - 48; q->done < q->len;) { /* the cache has these rows: they are made again */
		fwd_add(&s, q, 1, true);
		fwd_run(&o, &s);
	}
	fwd_compare(&o, 0, q, &decoded);
	print_message("figure: fidelity long (%d tokens), f32 KV: largest difference of the last %d "
	              "log-probabilities %.2g, decoding %.2g (bound %g), wrong top tokens %d\n",
	              q->len, d.count, d.max, decoded.max, FWD_BOUND, d.wrong_top + decoded.wrong_top);
	assert_true(d.count > 90 && d.max <= FWD_BOUND && decoded.max <= FWD_BOUND);
	assert_int_equal(d.wrong_top + decoded.wrong_top, 0);
	fwd_drop(q);
	fwd_close(&o);
}

/* Prompt by the plain form up to the middle, then token by token by the absorbed form: the difference
 * from the reference, and the largest from the plain form. */
static double compare_decoded(const char *name, const char *isa, fwd_difference *d)
{
	fwd_opened o = fwd_open(name, fwd_options(isa, KM_KV_F32));
	fwd_sequence *decoded = fwd_score(&o, 1, 5, 1, true), *whole = fwd_score_whole(&o, 1);
	double forms = fwd_largest_difference(&o, decoded, whole);

	fwd_compare(&o, 1, decoded, d);
	fwd_drop(decoded);
	fwd_drop(whole);
	fwd_close(&o);
	return forms;
}

static void decoding_is_the_reference_too(void **state)
{
	double reference = 0, forms = 0;

	(void)state;
	for (int c = 0; c < CASES; c++)
		for (const char *const *isa = km_cpu_isas; *isa; isa++) {
			fwd_difference d = { 0 };

			if (!km_cpu_ops(*isa) || too_slow(*isa))
				continue;
			forms = fmax(forms, compare_decoded(cases[c], *isa, &d));
			reference = fmax(reference, d.max);
			assert_true(d.count > 40 && d.max <= FWD_BOUND && forms <= FWD_BOUND);
			assert_int_equal(d.wrong_top, 0);
		}
	print_message("figure: fidelity of decoding, all configs and forms: %.2g against the reference, %.2g "
	              "against the prefill form (bound %g)\n",
	              reference, forms, FWD_BOUND);
}

/* Whether a form is compared with itself: under the sanitizer, not the plain one if there is another. */
static bool compared_with_itself(const char *isa)
{
#ifdef SANITIZED
	if (!strcmp(isa, "plain") && strcmp(km_cpu_ops(NULL)->name, "plain") != 0)
		return false;
#endif
	return km_cpu_ops(isa) != NULL;
}

static void chunks_do_not_change_a_bit(void **state)
{
	static const int chunks[][2] = { { 1, 1 }, { 7, 9 }, { 33, 16 }, { 64, 5 } };
	static const enum km_kv_dtype dtypes[] = { KM_KV_F32, KM_KV_BF16, KM_KV_FP8 };

	(void)state;
	for (const char *const *isa = km_cpu_isas; *isa; isa++)
		for (int k = 0; compared_with_itself(*isa) && k < 3; k++) {
			fwd_opened o = fwd_open(cases[k], fwd_options(*isa, dtypes[k]));
			fwd_sequence *whole = fwd_score_whole(&o, 0);

			for (size_t i = 0; i < sizeof(chunks) / sizeof(*chunks); i++) {
				fwd_sequence *cut = fwd_score(&o, 0, chunks[i][0], chunks[i][1], false);

				assert_same_bits(&o, whole, cut, whole->len);
				fwd_drop(cut);
			}
			fwd_drop(whole);
			fwd_close(&o);
		}
}

/* Two decoding sequences and two prompts in chunks, in the same steps: as each alone. */
static void batches_do_not_change_a_bit(void **state)
{
	(void)state;
	for (const char *const *isa = km_cpu_isas; *isa; isa++)
		for (int c = 0; compared_with_itself(*isa) && c < SELF_CASES; c++) {
			fwd_opened o = fwd_open(cases[c], fwd_options(*isa, KM_KV_BF16));
			fwd_sequence *decoding = fwd_score(&o, 1, 3, 1, true), *chunked = fwd_score(&o, 0, 10, 4, false);
			fwd_sequence *q[FWD_MAX_SEQS];
			fwd_step s = { 0 };

			for (int i = 0; i < FWD_MAX_SEQS; i++)
				q[i] = fwd_prompt(&o, i < 2, i);
			fwd_add(&s, q[0], 3, false);
			fwd_add(&s, q[1], 3, false);
			fwd_run(&o, &s);
			while (q[0]->done < q[0]->len) {
				fwd_add(&s, q[0], 1, true);
				if (q[0]->done > 2 && q[1]->done < q[1]->len)
					fwd_add(&s, q[1], 1, true);
				fwd_add(&s, q[2], 1 + q[0]->done % 3, false);
				if (q[3]->done + 2 <= q[3]->len)
					fwd_add(&s, q[3], 2, false);
				fwd_run(&o, &s);
			}
			assert_same_bits(&o, decoding, q[0], q[0]->done);
			assert_same_bits(&o, decoding, q[1], q[1]->done);
			assert_true(q[2]->done > 20 && q[3]->done > 20);
			assert_same_bits(&o, chunked, q[2], q[2]->done);
			assert_same_bits(&o, chunked, q[3], q[3]->done);
			for (int i = 0; i < FWD_MAX_SEQS; i++)
				fwd_drop(q[i]);
			fwd_drop(decoding);
			fwd_drop(chunked);
			fwd_close(&o);
		}
}

/* Only some rows' logits, in any order, one twice: the same bits as when all are wanted. */
static void unwanted_rows_do_not_change_a_bit(void **state)
{
	static const int32_t rows[] = { 30, 3, 29, 3, 0, 11 };

	(void)state;
	for (const char *const *isa = km_cpu_isas; *isa; isa++)
		for (int c = 0; compared_with_itself(*isa) && c < SELF_CASES; c++) {
			fwd_opened o = fwd_open(cases[c], fwd_options(*isa, KM_KV_F32));
			fwd_sequence *whole = fwd_score(&o, 0, 31, FWD_MAX_ROWS, false), *q = fwd_prompt(&o, 0, 1);
			size_t row_bytes = (size_t)o.vocab * sizeof(float);
			fwd_step s = { 0 };
			const float *logits;

			for (int wanted = 6; wanted >= 0; wanted -= 3) { /* none in the end */
				q->done = 0;
				fwd_add(&s, q, 31, false);
				fwd_point(&s);
				s.batch.logit_row = rows;
				s.batch.logit_rows = wanted;
				assert_int_equal(km_model_forward(o.model, &s.batch, &logits, NULL), 0);
				for (int i = 0; i < wanted; i++)
					assert_memory_equal(logits + i * o.vocab, whole->logits + rows[i] * o.vocab,
					                    row_bytes);
				memset(&s, 0, sizeof(s));
			}
			q->done = 31; /* the rows that nobody wanted are in the cache */
			fwd_add(&s, q, q->len - 31, false);
			fwd_run(&o, &s);
			assert_memory_equal(q->logits + 31 * o.vocab, whole->logits + 31 * o.vocab,
			                    (size_t)(q->len - 31) * row_bytes);
			fwd_drop(whole);
			fwd_drop(q);
			fwd_close(&o);
		}
}

static void threads_do_not_change_a_bit(void **state)
{
	(void)state;
	for (int c = 0; c < SELF_CASES; c++) {
		km_model_options options = fwd_options(NULL, KM_KV_F32);
		fwd_sequence *q[2];
		fwd_opened o;

		for (int i = 0; i < 2; i++) {
			options.threads = i ? 3 : 1;
			o = fwd_open(cases[c], options);
			q[i] = fwd_score(&o, 0, 50, 1, true);
			if (i)
				assert_same_bits(&o, q[0], q[1], q[0]->len);
			fwd_close(&o);
		}
		fwd_drop(q[0]);
		fwd_drop(q[1]);
	}
}

/* A rounded cache can turn the selection of an expert where two are close, and the log-probabilities
 * of these random models jump then; so the bound is on the mean. Only f32 meets the reference's bound. */
static void rounded_caches_stay_close(void **state)
{
	static const double bounds[] = { [KM_KV_BF16] = 0.2, [KM_KV_FP8] = 1.0 };

	(void)state;
	for (int c = 0; c < SELF_CASES; c++) {
		fwd_difference d[KM_KV_FP8 + 1] = { { 0 } };

		for (int k = KM_KV_BF16; k <= KM_KV_FP8; k++) {
			fwd_opened o = fwd_open(cases[c], fwd_options(NULL, (enum km_kv_dtype)k));
			fwd_sequence *q = fwd_score_whole(&o, 0);

			fwd_compare(&o, 0, q, &d[k]);
			fwd_drop(q);
			fwd_close(&o);
			assert_true(d[k].sum / d[k].count <= bounds[k]);
		}
		print_message("figure: fidelity %s, mean difference (largest): bf16 KV %.2g (%.2g), fp8 KV %.2g "
		              "(%.2g)\n",
		              cases[c], d[KM_KV_BF16].sum / d[KM_KV_BF16].count, d[KM_KV_BF16].max,
		              d[KM_KV_FP8].sum / d[KM_KV_FP8].count, d[KM_KV_FP8].max);
	}
}

#ifndef SANITIZED
/* malloc and its kin, counted: the ones of this program come before the C library's. */
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *p, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);

static atomic_long allocations;

void *malloc(size_t bytes)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_malloc(bytes);
}

void *calloc(size_t count, size_t bytes)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_calloc(count, bytes);
}

void *realloc(void *p, size_t bytes)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_realloc(p, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_memalign(alignment, bytes);
}

void *memalign(size_t alignment, size_t bytes) /* libgomp makes its teams with this */
{
	return aligned_alloc(alignment, bytes);
}

int posix_memalign(void **p, size_t alignment, size_t bytes)
{
	*p = aligned_alloc(alignment, bytes);
	return *p ? 0 : ENOMEM;
}

static void a_step_allocates_nothing(void **state)
{
	(void)state;
	for (const char *const *isa = km_cpu_isas; *isa; isa++)
		for (int c = 0; km_cpu_ops(*isa) && c < CASES; c++) {
			km_model_options options = fwd_options(*isa, KM_KV_BF16);
			fwd_sequence *q;
			fwd_step *s = km_xcalloc(1, sizeof(*s));
			fwd_opened o;
			long before;

			options.threads = 2;
			o = fwd_open(cases[c], options);
			q = fwd_prompt(&o, 0, 0);
			fwd_add(s, q, 20, false); /* the first step starts the threads */
			fwd_run(&o, s);
			before = atomic_load(&allocations);
			fwd_add(s, q, 20, false);
			fwd_run(&o, s);
			fwd_add(s, q, 1, true);
			fwd_run(&o, s);
			assert_int_equal(atomic_load(&allocations) - before, 0);
			free(s);
			fwd_drop(q);
			fwd_close(&o);
		}
}
#else
static void a_step_allocates_nothing(void **state)
{
	(void)state;
	print_message("skip: allocations are counted in the plain build, the sanitizer has its own malloc\n");
	skip();
}
#endif

static void what_does_not_fit_is_refused_at_once(void **state)
{
	fwd_opened o = fwd_open("k2-thinking", fwd_options(NULL, KM_KV_BF16));
	km_model_options options = fwd_options(NULL, KM_KV_BF16);
	char *weights = km_xasprintf("%s/model.safetensors", o.dir);
	km_model *model;
	km_model_plan plan;
	int64_t start;
	km_err err;

	(void)state;
	assert_int_equal(km_model_plan_memory(km_model_config(o.model), &options, &plan, &err), 0);
	assert_int_equal(plan.kv_bytes_per_token, 3 * 48 * 2);
	assert_int_equal(plan.kv_bytes, FWD_KV_SLOTS * 3 * 48 * 2);
	assert_int_equal(plan.logits_bytes, FWD_MAX_ROWS * 320 * 4);
	assert_true(plan.available_bytes > 0 && plan.expert_bytes < plan.weight_bytes);
	assert_int_equal(unlink(weights), 0); /* it is refused before any weight is looked at */
	options.kv_slots = INT32_MAX / FWD_PAGE * FWD_PAGE;
	start = km_now_ns();
	assert_int_equal(km_model_open(&model, o.dir, &options, &err), KM_ENOMEM);
	assert_true(km_now_ns() - start < 1000000000);
	assert_non_null(strstr(err.msg, "does not fit"));
	assert_null(model);
	options = fwd_options("sparc", KM_KV_BF16);
	assert_int_equal(km_model_open(&model, o.dir, &options, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "sparc"));
	options = fwd_options(NULL, KM_KV_BF16);
	options.max_context = 5000;
	assert_int_equal(km_model_open(&model, o.dir, &options, &err), KM_EINVAL);
	options = fwd_options(NULL, KM_KV_BF16);
	assert_true(km_model_open(&model, o.dir, &options, &err) < 0);
	free(weights);
	fwd_close(&o);
}

/* Each way to break a batch of two sequences gives KM_EINVAL. */
static void wrong_batches_are_refused(void **state)
{
	fwd_opened o = fwd_open("int4-groups", fwd_options(NULL, KM_KV_BF16));
	const float *logits;
	km_err err;

	(void)state;
	for (int way = -1; way < 12; way++) {
		fwd_sequence *a = fwd_prompt(&o, 0, 0), *b = fwd_prompt(&o, 1, 1);
		fwd_step s = { 0 };
		int rc;

		fwd_add(&s, a, 1, true);
		fwd_add(&s, b, 10, false);
		fwd_point(&s);
		switch (way) {
		case 0: s.ids[3] = 320; break;
		case 1: s.ids[3] = -1; break;
		case 2: s.positions[4] = 7; break;
		case 3: s.slots[5]++; break;
		case 4: s.pages[FWD_PAGES_PER_SEQ] = FWD_KV_SLOTS / FWD_PAGE; break;
		case 5: s.kv_len[1] = FWD_PAGE * FWD_PAGES_PER_SEQ + 1; break;
		case 6: s.kv_len[1] = 9; break;
		case 7: s.seq_start[1] = 0; break;
		case 8: s.logit_row[0] = 11; break;
		case 9: s.batch.tokens = FWD_MAX_ROWS + 1; break;
		case 10: s.batch.page_size = 7; break;
		case 11: s.batch.decode_seqs = 2; break;
		}
		rc = km_model_forward(o.model, &s.batch, &logits, &err);
		assert_int_equal(rc, way < 0 ? 0 : KM_EINVAL);
		fwd_drop(a);
		fwd_drop(b);
	}
	fwd_close(&o);
}

static void rotary_frequencies_follow_the_betas(void **state)
{
	km_rope_config rope = { .theta = 50000, .yarn = true, .factor = 64, .beta_fast = 1, .beta_slow = 1,
		                .mscale = 1, .mscale_all_dim = 1, .original_max_position_embeddings = 4096 };
	float f[32], plain[32];

	(void)state;
	assert_true(km_rope_frequencies(&rope, 64, f) == 1);
	rope.yarn = false;
	km_rope_frequencies(&rope, 64, plain);
	for (int i = 0; i < 32; i++) /* K2: a hard step between dimensions 19 and 20 */
		assert_true(fabsf(f[i] / plain[i] * (i < 20 ? 1 : 64) - 1) < 1e-5f);
	rope.yarn = true;
	rope.beta_fast = 32;
	km_rope_frequencies(&rope, 64, f);
	for (int i = 0; i < 32; i++) { /* K2.5: a ramp from 8 to 20 */
		float ramp = fminf(fmaxf((float)(i - 8) / 12, 0), 1);

		assert_true(fabsf(f[i] / (plain[i] * (1 - ramp) + plain[i] / 64 * ramp) - 1) < 1e-5f);
	}
	rope.mscale = 0.707;
	assert_true(fabs((double)km_rope_frequencies(&rope, 64, f) -
	                 (0.0707 * log(64) + 1) / (0.1 * log(64) + 1)) < 1e-6);
}

static void choices_are_explained(void **state)
{
	fwd_opened o = fwd_open("k2.5", fwd_options("plain", KM_KV_FP8));
	km_buf out = KM_BUF_INIT;

	(void)state;
	km_model_explain(o.model, &out);
	assert_non_null(strstr(out.data, "YaRN, theta 50000, factor 64 over 1024 positions, betas 32 and 1"));
	assert_non_null(strstr(out.data, "KV cache: fp8"));
	assert_non_null(strstr(out.data, "layers 1-1 expert_down: int4 [64, 64], BF16 scales for groups of "
	                                 "32, plain form"));
	assert_non_null(strstr(out.data, "layers 0-1 q_a: bf16 [48, 64]"));
	km_buf_release(&out);
	fwd_close(&o);
}

int main(void)
{
	const struct CMUnitTest all[] = {
		cmocka_unit_test(rotary_frequencies_follow_the_betas),
		cmocka_unit_test(log_probabilities_are_the_references),
		cmocka_unit_test(long_prompts_are_the_reference),
		cmocka_unit_test(decoding_is_the_reference_too),
		cmocka_unit_test(chunks_do_not_change_a_bit),
		cmocka_unit_test(batches_do_not_change_a_bit),
		cmocka_unit_test(unwanted_rows_do_not_change_a_bit),
		cmocka_unit_test(threads_do_not_change_a_bit),
		cmocka_unit_test(rounded_caches_stay_close),
		cmocka_unit_test(a_step_allocates_nothing),
		cmocka_unit_test(what_does_not_fit_is_refused_at_once),
		cmocka_unit_test(wrong_batches_are_refused),
		cmocka_unit_test(choices_are_explained),
	};

	return cmocka_run_group_tests(all, NULL, NULL);
}
