/*
 * The sampler on a GPU against the CPU's, on the same logits: the same token, row by row, for every
 * way to sample, vocabularies of all sizes, peaked, flat and tied logits, biases and penalties,
 * seeds and draw numbers. A row may be refused only where the header allows it, and what is refused
 * must draw the CPU's token from the logits that the GPU left, biases and penalties in them.
 *
 * `test_gpu_sampler short` takes fewer rows and small vocabularies, for runs under a sanitizer;
 * without it, times are printed as well.
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
#include "device/cuda_sampler.h"
#include "engine/sampler.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

enum { ROWS = 96, SHORT_ROWS = 4, LARGEST = 163840, MOST_ENTRIES = 40, TIMED = 20, POOL = 1000003 };

static bool short_run;
static km_cuda *gpu;
static km_err err;

/* What lies on the device for one call. */
static struct {
	float *logits;
	km_draw *draw;
	km_draw_entry *entries;
	int32_t *drawn;
} there;

static void must(int rc)
{
	if (rc < 0)
		fail_msg("%s", err.msg);
}

static int open_gpu(void **state)
{
	size_t logits = (size_t)256 * LARGEST * 4;

	(void)state;
	must(km_cuda_open(&gpu, 0, logits + (8 << 20), &err));
	must(km_cuda_take(gpu, (void **)&there.logits, logits, "logits", &err));
	must(km_cuda_take(gpu, (void **)&there.draw, 256 * sizeof(km_draw), "draws", &err));
	must(km_cuda_take(gpu, (void **)&there.entries, KM_DRAW_ENTRIES * sizeof(km_draw_entry),
	                  "entries", &err));
	must(km_cuda_take(gpu, (void **)&there.drawn, 256 * 4, "tokens", &err));
	return 0;
}

static int close_gpu(void **state)
{
	(void)state;
	km_cuda_close(gpu);
	return 0;
}

/* ---- one call ---- */

typedef struct call {
	int rows, vocab, entry_count;
	float *logits, *left; /* [rows, vocab]: before, and as the GPU left them */
	km_sampling sampling[ROWS];
	km_logit_bias bias[ROWS][3];
	km_counts counts[ROWS];
	bool has_counts[ROWS];
	km_draw draw[ROWS];
	km_draw_entry entries[ROWS * MOST_ENTRIES];
	int32_t drawn[ROWS];
} call;

static km_sample_args args_of(const call *c, int row, const float *logits)
{
	return (km_sample_args){ .logits = logits + (size_t)row * (size_t)c->vocab,
		                 .sampling = &c->sampling[row],
		                 .counts = c->has_counts[row] ? &c->counts[row] : NULL,
		                 .seed = 1000 + (uint64_t)row / 5,
		                 .index = (uint64_t)row % 5,
		                 .logprobs = -1 };
}

static void lay_entries(call *c, int row)
{
	km_sample_args args = args_of(c, row, c->logits);
	km_draw *d = &c->draw[row];

	*d = km_sampler_draw(&args, c->vocab);
	d->bias_from = c->entry_count;
	d->biases = c->sampling[row].bias_count;
	for (int i = 0; i < d->biases; i++)
		c->entries[c->entry_count++] = (km_draw_entry){ .id = c->bias[row][i].id,
			                                        .bias = c->bias[row][i].bias };
	d->counts_from = c->entry_count;
	d->counts = args.counts ? args.counts->count : 0;
	for (int i = 0; i < d->counts; i++)
		c->entries[c->entry_count++] =
			(km_draw_entry){ .id = c->counts[row].id[i],
		                         .output = c->counts[row].output[i] };
}

static void run(call *c)
{
	size_t bytes = (size_t)c->rows * (size_t)c->vocab * 4;
	km_cuda_sampling args = { .logits = there.logits,
		                  .draw = there.draw,
		                  .entries = there.entries,
		                  .drawn = there.drawn,
		                  .rows = c->rows,
		                  .vocab = c->vocab };

	c->entry_count = 0;
	for (int row = 0; row < c->rows; row++)
		lay_entries(c, row);
	must(km_cuda_upload(gpu, there.logits, c->logits, bytes, &err));
	must(km_cuda_upload(gpu, there.draw, c->draw, sizeof(c->draw), &err));
	must(km_cuda_upload(gpu, there.entries, c->entries, sizeof(c->entries), &err));
	must(km_cuda_fill(gpu, there.drawn, 0x77, sizeof(c->drawn), &err));
	must(km_cuda_sample(gpu, &args, &err));
	must(km_cuda_download(gpu, c->drawn, there.drawn, sizeof(c->drawn), &err));
	must(km_cuda_download(gpu, c->left, there.logits, bytes, &err));
}

/* How many rows the GPU refused; every other token, and these from what it left, are the CPU's. */
static int compare(const call *c, const char *what)
{
	km_sampler *sampler = km_sampler_new(c->vocab);
	int refused = 0;

	for (int row = 0; row < c->rows; row++) {
		km_sample_args args = args_of(c, row, c->logits);
		km_sampling plain = c->sampling[row];
		km_sampled want, got = { .id = c->drawn[row] };
		km_err why;
		int rc = km_sampler_sample(sampler, &args, &want, &why), again = 0;

		if (c->drawn[row] == KM_DRAWN_BY_HOST) {
			refused++;
			plain.bias_count = 0;
			args = args_of(c, row, c->left);
			args.sampling = &plain;
			args.counts = NULL;
			again = km_sampler_sample(sampler, &args, &got, &why);
		}
		if ((rc < 0) != (again < 0) || (rc >= 0 && got.id != want.id))
			fail_msg("%s, vocabulary of %d, row %d: token %d, the CPU's is %d (%d)", what,
			         c->vocab, row, got.id, want.id, rc);
	}
	km_sampler_free(sampler);
	return refused;
}

static call *new_call(int vocab, int rows)
{
	call *c = km_xcalloc(1, sizeof(*c));
	size_t bytes;

	c->rows = short_run ? SHORT_ROWS : rows;
	c->vocab = vocab;
	bytes = (size_t)c->rows * (size_t)vocab * 4;
	c->logits = km_xmalloc(bytes);
	c->left = km_xmalloc(bytes);
	for (int row = 0; row < c->rows; row++)
		km_sampling_init(&c->sampling[row]);
	return c;
}

static void free_call(call *c)
{
	for (int row = 0; row < c->rows; row++)
		if (c->has_counts[row])
			km_counts_release(&c->counts[row]);
	free(c->logits);
	free(c->left);
	free(c);
}

/* ---- logits ---- */

enum shape { PEAKED, FLAT, TIED, SPIKED, SHAPES };
static const char *const shape_names[] = { "peaked", "flat", "tied", "spiked" };

static float value(enum shape shape, uint64_t seed, size_t i)
{
	float x = km_rng_normal(seed, i);

	if (shape == SPIKED)
		return km_rng_u64(seed, i) % 7 ? -INFINITY : 4 * x - 90;
	return shape == PEAKED ? 6 * x : shape == FLAT ? x / 2 : roundf(3 * x);
}

/* Rows of a large vocabulary are the same random numbers, each from another place on. */
static void fill(call *c, enum shape shape, uint64_t seed)
{
	size_t count = (size_t)c->rows * (size_t)c->vocab, pool = count < POOL ? count : POOL;
	float *random = km_xreallocarray(NULL, pool, sizeof(float));

	for (size_t i = 0; i < pool; i++)
		random[i] = value(shape, seed, i);
	for (size_t i = 0; i < count; i++)
		c->logits[i] = random[(i + i / (size_t)c->vocab * 977) % pool];
	free(random);
	for (int row = 0; row < c->rows; row++) /* every row can be drawn from */
		c->logits[(size_t)row * (size_t)c->vocab + (size_t)(row % c->vocab)] = 1.5f;
}

static void penalise(call *c, int row)
{
	km_sampling *p = &c->sampling[row];

	p->repetition_penalty = 1 + 0.1 * (row % 4);
	p->frequency_penalty = 0.3 * (row % 3);
	p->presence_penalty = row % 2 ? -0.2 : 0.45;
	km_counts_init(&c->counts[row], MOST_ENTRIES);
	c->has_counts[row] = true;
	for (int i = 0; i < 30; i++) /* some of the best, and some of any */
		km_counts_add(&c->counts[row],
		              i ? (int32_t)(km_rng_u64(5, (uint64_t)(row * 64 + i)) %
		                            (uint64_t)c->vocab)
		                : row % c->vocab,
		              i % 3);
}

static void bias(call *c, int row)
{
	km_logit_bias *b = c->bias[row];

	b[0] = (km_logit_bias){ c->vocab / 2, 3.3f };
	b[1] = (km_logit_bias){ row % c->vocab, -100 };
	b[2] = (km_logit_bias){ c->vocab / 2, 0.77f }; /* the first's again */
	c->sampling[row].bias = b;
	c->sampling[row].bias_count = 3;
}

/* ---- tests ---- */

static const struct {
	const char *name;
	double temperature, top_p, min_p;
	int top_k;
	bool may_refuse; /* out of flat logits: more candidates than are sorted */
} ways[] = {
	{ "greedy", 0, 1, 0, 0, false },
	{ "temperature", 1, 1, 0, 0, false },
	{ "low temperature", 0.05, 1, 0, 0, false },
	{ "high temperature", 30, 1, 0, 0, false },
	{ "top_p", 1, 0.95, 0, 0, false },
	{ "half top_p", 0.8, 0.5, 0, 0, false },
	{ "small top_p", 1, 0.1, 0, 0, true },
	{ "top_k", 1, 1, 0, 40, false },
	{ "top_k 1", 1, 1, 0, 1, false },
	{ "large top_k", 1.2, 1, 0, 3000, true }, /* found by steps, which may be too wide */
	{ "top_k, top_p", 0.9, 0.9, 0, 50, false },
	{ "min_p", 1, 1, 0.05, 0, true },
	{ "top_p, min_p", 1, 0.95, 0.02, 0, true },
	{ "all", 0.7, 0.8, 0.1, 200, false },
	{ "tiny top_p", 1, 1e-9, 0, 0, false },
};

/* Rows: so few that several blocks of threads share one, and more. */
static const struct {
	int vocab, rows;
	bool when_short;
} sizes[] = {
	{ 1, ROWS, false },    { 50, ROWS, false },  { 512, ROWS, true },     { 1500, ROWS, false },
	{ 2560, ROWS, false }, { 4099, ROWS, false }, { 40000, 24, true }, { LARGEST, 48, false },
};

static void tokens_are_the_cpus(void **state)
{
	int refused = 0, rows = 0, must_not = 0;

	(void)state;
	for (int v = 0; v < COUNT(sizes); v++)
		for (int shape = 0; shape < (short_run ? sizes[v].when_short : SHAPES); shape++) {
			call *c = new_call(sizes[v].vocab, sizes[v].rows);

			fill(c, (enum shape)shape, 70 + (uint64_t)shape);
			for (int w = 0; w < COUNT(ways); w++) {
				char what[64];
				int some;

				for (int row = 0; row < c->rows; row++) {
					km_sampling *p = &c->sampling[row];

					p->temperature = ways[w].temperature;
					p->top_p = ways[w].top_p;
					p->min_p = ways[w].min_p;
					p->top_k = ways[w].top_k;
				}
				run(c);
				snprintf(what, sizeof(what), "%s, %s logits", ways[w].name,
				         shape_names[shape]);
				some = compare(c, what);
				refused += some;
				rows += c->rows;
				must_not += some && !ways[w].may_refuse;
				if (some)
					print_message("refused: %d rows, %s, vocabulary of %d\n",
					              some, what, c->vocab);
			}
			free_call(c);
		}
	print_message("figure: sampler: %d rows, every token the CPU's; %d refused, drawn by the "
	              "host\n",
	              rows, refused);
	assert_int_equal(must_not, 0);
}

static void penalties_and_biases_are_the_cpus(void **state)
{
	(void)state;
	for (int v = 1; v < COUNT(sizes); v++)
		for (int shape = 0; shape < (short_run ? sizes[v].when_short : SHAPES); shape++) {
			call *c = new_call(sizes[v].vocab, sizes[v].rows);

			fill(c, (enum shape)shape, 80 + (uint64_t)shape);
			for (int row = 0; row < c->rows; row++) {
				int w = row % COUNT(ways);

				c->sampling[row].temperature = ways[w].temperature;
				c->sampling[row].top_p = ways[w].top_p;
				c->sampling[row].min_p = ways[w].min_p;
				c->sampling[row].top_k = ways[w].top_k;
				if (row % 3 != 1)
					penalise(c, row);
				if (row % 3 != 0)
					bias(c, row);
			}
			run(c);
			compare(c, "penalties and biases");
			free_call(c);
		}
}

/* NaN, +infinity, nothing but -infinity: the CPU says which. And rows that are the host's. */
static void bad_rows_are_refused(void **state)
{
	call *c = new_call(2560, ROWS);

	(void)state;
	fill(c, PEAKED, 3);
	for (int row = 0; row < c->rows; row++) {
		float *x = c->logits + (size_t)row * 2560;

		c->sampling[row].temperature = row % 2;
		if (row % 4 == 0)
			x[77 + row] = NAN;
		else if (row % 4 == 1)
			x[2559] = INFINITY;
		else if (row % 4 == 2)
			for (int i = 0; i < 2560; i++)
				x[i] = -INFINITY;
	}
	run(c);
	assert_int_equal(compare(c, "bad rows"), c->rows * 3 / 4);
	free_call(c);
}

static double time_rows(const call *c, int rows)
{
	km_cuda_sampling args = { .logits = there.logits,
		                  .draw = there.draw,
		                  .entries = there.entries,
		                  .drawn = there.drawn,
		                  .rows = rows,
		                  .vocab = c->vocab };
	double us = 0, best = 1e9;

	for (int i = 0; i < TIMED; i++) {
		must(km_cuda_time_begin(gpu, &err));
		must(km_cuda_sample(gpu, &args, &err));
		must(km_cuda_time_end(gpu, &us, &err));
		best = us < best ? us : best;
	}
	return best;
}

static void times(void **state)
{
	static const int some[] = { 0, 1, 4, 10, 11 };
	static const int counts[] = { 1, 32, ROWS };

	(void)state;
	for (int shape = 0; shape < 2; shape++) {
		call *c = new_call(LARGEST, ROWS);

		fill(c, (enum shape)shape, 90);
		for (int s = 0; s < COUNT(some); s++) {
			for (int row = 0; row < c->rows; row++) {
				c->sampling[row].temperature = ways[some[s]].temperature;
				c->sampling[row].top_p = ways[some[s]].top_p;
				c->sampling[row].min_p = ways[some[s]].min_p;
				c->sampling[row].top_k = ways[some[s]].top_k;
			}
			run(c);
			print_message("figure: sampler, %d logits, %s, %s: %.1f us for %d row, %.1f for "
			              "%d, %.1f for %d\n",
			              LARGEST, shape_names[shape], ways[some[s]].name,
			              time_rows(c, counts[0]), counts[0], time_rows(c, counts[1]),
			              counts[1], time_rows(c, counts[2]), counts[2]);
		}
		free_call(c);
	}
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest all[] = {
		cmocka_unit_test(tokens_are_the_cpus),
		cmocka_unit_test(penalties_and_biases_are_the_cpus),
		cmocka_unit_test(bad_rows_are_refused),
		cmocka_unit_test(times),
	};

	short_run = argc > 1 && !strcmp(argv[1], "short");
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	return _cmocka_run_group_tests("sampler", all, (size_t)(COUNT(all) - short_run), open_gpu,
	                               close_gpu);
}
