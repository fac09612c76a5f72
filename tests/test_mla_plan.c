/*
 * How attention on a GPU is cut up, without one: every cached token that a row sees is in exactly
 * one of its tiles, in rising order, and what the tile reads was gathered in the same wave.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "device/mla_plan.h"

static const km_mla_device h100 = { 90, 132 };

static km_mla_shape k2_shape(int heads)
{
	return (km_mla_shape){ .heads = heads, .nope_dim = 128, .rope_dim = 64, .v_dim = 128,
		               .kv_lora_rank = 512 };
}

static void test_tensor_fits(void **state)
{
	km_mla_shape s = k2_shape(64);
	km_mla_device other = { 80, 108 };

	(void)state;
	assert_true(km_mla_tensor_fits(&s, &h100));
	assert_false(km_mla_tensor_fits(&s, &other));
	s.kv_lora_rank = 128;
	assert_false(km_mla_tensor_fits(&s, &h100));
	assert_int_equal(km_mla_plan_decode(&s, 4, 4096, &h100).splits, 1);
}

static void test_splits(void **state)
{
	km_mla_shape s = k2_shape(64);

	(void)state;
	for (int seqs = 1; seqs <= 300; seqs += 1 + seqs / 7)
		for (int context = 1; context < 300000; context += 1 + context / 3) {
			km_mla_decode_plan p = km_mla_plan_decode(&s, seqs, context, &h100);
			int tiles = (context + KM_MLA_TILE - 1) / KM_MLA_TILE;

			assert_true(p.tensor);
			assert_in_range(p.splits, 1, tiles);
			assert_true(p.v_blocks == 1 || p.v_blocks == 2 || p.v_blocks == 4);
		}
	/* One sequence takes the whole GPU, 128 of them a block each. */
	assert_in_range(km_mla_plan_decode(&s, 1, 131072, &h100).splits, 100, 132);
	assert_in_range(km_mla_plan_decode(&s, 64, 8192, &h100).splits, 2, 2);
	assert_in_range(km_mla_plan_decode(&s, 128, 8192, &h100).splits, 1, 1);
	s.heads = 8;
	assert_int_equal(km_mla_plan_decode(&s, 1, 1024, &h100).v_blocks, 4);
	/* Up to two tiles of each of the 16 blocks that share a row, a few rows. */
	assert_true(km_mla_plan_decode(&s, 1, 1024, &h100).cluster);
	assert_true(km_mla_plan_decode(&s, 6, 2048, &h100).cluster);
	assert_false(km_mla_plan_decode(&s, 7, 1024, &h100).cluster);
	assert_false(km_mla_plan_decode(&s, 1, 2049, &h100).cluster);
	s.heads = 64;
	assert_false(km_mla_plan_decode(&s, 1, 1024, &h100).cluster);
}

static void test_layout(void **state)
{
	km_mla_shape s = k2_shape(3);
	km_mla_decode_plan p = { true, 5, 1, false };
	km_mla_decode_scratch at;

	(void)state;
	km_mla_decode_layout(&s, &p, 7, &at);
	assert_true(at.query == 0 && at.partial >= 7 * 3 * 576 * 2 && at.partial % 256 == 0);
	assert_true(at.stats >= at.partial + (size_t)7 * 3 * 5 * 512 * 4 && at.stats % 256 == 0);
	assert_true(at.bytes >= at.stats + 7 * 3 * 5 * 2 * 4);
}

enum { MAX_SEQS = 9, MAX_ROWS = 700 };

typedef struct step {
	km_batch batch;
	int32_t start[MAX_SEQS + 1], positions[MAX_ROWS];
} step;

/* Chunks after cached tokens; every third one has only some rows left, as in the last layer. */
static void make_step(step *s, uint64_t seed, int longest)
{
	int row = 0;

	memset(s, 0, sizeof(*s));
	s->batch.seqs = 1 + (int)(km_rng_u64(seed, 0) % MAX_SEQS);
	s->batch.decode_seqs = (int)(km_rng_u64(seed, 1) % (uint64_t)s->batch.seqs);
	for (int i = 0; i < s->batch.seqs; i++) {
		int at = (int)(km_rng_u64(seed, 10 + (uint64_t)i) % (uint64_t)longest);
		int rows = i < s->batch.decode_seqs
		                   ? 1
		                   : 1 + (int)(km_rng_u64(seed, 30 + (uint64_t)i) % 70);

		s->start[i] = row;
		for (int r = 0; r < rows; r++, row++) {
			s->positions[row] = at;
			at += 1 +
			      (i % 3 == 2 ? (int)(km_rng_u64(seed, 100 + (uint64_t)row) % 9) : 0);
		}
	}
	s->start[s->batch.seqs] = row;
	s->batch.tokens = row;
	s->batch.seq_start = s->start;
	s->batch.positions = s->positions;
}

static void plan_open(km_mla_prefill_plan *p, int max_context, int room)
{
	memset(p, 0, sizeof(*p));
	km_mla_prefill_capacity(p, MAX_ROWS, MAX_SEQS, max_context, room);
	p->runs = km_xcalloc((size_t)p->max_runs, sizeof(*p->runs));
	p->tiles = km_xcalloc((size_t)p->max_tiles, sizeof(*p->tiles));
	p->wave = km_xcalloc((size_t)p->max_waves, sizeof(*p->wave));
}

static void plan_close(km_mla_prefill_plan *p)
{
	free(p->runs);
	free(p->tiles);
	free(p->wave);
}

static int seq_of(const step *s, int row)
{
	int seq = 0;

	while (s->start[seq + 1] <= row)
		seq++;
	return seq;
}

/* The wave's scratch holds the tile's tokens where the tile says. */
static void check_gathered(const km_mla_prefill_plan *p, const km_mla_wave *w, const km_mla_tile *t,
                           int seq)
{
	int found = 0;

	for (int i = w->runs_from; i < w->runs_from + w->runs; i++) {
		const km_mla_run *r = &p->runs[i];

		assert_in_range(r->count, 1, KM_MLA_RUN);
		assert_true(r->offset + r->count <= w->tokens);
		if (r->seq != seq || r->first < t->first || r->first >= t->first + t->count)
			continue;
		assert_int_equal(r->offset - t->offset, r->first - t->first);
		found += r->count;
	}
	assert_int_equal(found, t->count);
}

static void check_tile(const step *s, const km_mla_tile *t, int *seen, int seq)
{
	assert_in_range(t->rows, 1, KM_MLA_PREFILL_TILE);
	assert_true(t->row >= s->start[seq] && t->row + t->rows <= s->start[seq + 1]);
	assert_int_equal(t->offset % KM_MLA_PREFILL_TILE, 0);
	assert_int_equal(t->first % KM_MLA_PREFILL_TILE, 0);
	assert_int_equal(t->resumes, t->first > 0);
	assert_int_equal(t->goes_on, s->positions[t->row + t->rows - 1] >= t->first + t->count);
	for (int r = t->row; r < t->row + t->rows; r++) {
		int end = s->positions[r] + 1 < t->first + t->count ? s->positions[r] + 1
		                                                    : t->first + t->count;

		assert_true(seen[r] == t->first || seen[r] == s->positions[r] + 1);
		seen[r] = end > seen[r] ? end : seen[r];
	}
}

static void check_plan(const step *s, const km_mla_prefill_plan *p, int room)
{
	int seen[MAX_ROWS] = { 0 };

	for (int i = 0; i < p->waves; i++) {
		const km_mla_wave *w = &p->wave[i];

		assert_in_range(w->tokens, 1, room);
		for (int t = w->tiles_from; t < w->tiles_from + w->tiles; t++) {
			int seq = seq_of(s, p->tiles[t].row);

			check_gathered(p, w, &p->tiles[t], seq);
			check_tile(s, &p->tiles[t], seen, seq);
		}
	}
	for (int r = s->start[s->batch.decode_seqs]; r < s->batch.tokens; r++)
		assert_int_equal(seen[r], s->positions[r] + 1);
	for (int r = 0; r < s->start[s->batch.decode_seqs]; r++)
		assert_int_equal(seen[r], 0);
}

static void test_prefill_covers(void **state)
{
	static const int rooms[] = { 128, 256, 1024, 8192 };
	km_mla_prefill_plan p;
	km_err err;
	step s;

	(void)state;
	for (uint64_t seed = 0; seed < 120; seed++) {
		int longest = seed % 2 ? 300 : 3000, room = rooms[seed % 4];

		make_step(&s, seed, longest);
		plan_open(&p, longest + 800, room);
		assert_int_equal(km_mla_plan_prefill(&p, &s.batch, room, &err), 0);
		check_plan(&s, &p, room);
		plan_close(&p);
	}
}

static void test_prefill_limits(void **state)
{
	km_mla_prefill_plan p;
	km_err err;
	step s;

	(void)state;
	make_step(&s, 4, 3000);
	plan_open(&p, 4000, 256);
	p.max_waves = 1;
	assert_int_equal(km_mla_plan_prefill(&p, &s.batch, 256, &err), KM_ELIMIT);
	assert_non_null(strstr(err.msg, "1 waves"));
	plan_close(&p);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_tensor_fits), cmocka_unit_test(test_splits),
		cmocka_unit_test(test_layout), cmocka_unit_test(test_prefill_covers),
		cmocka_unit_test(test_prefill_limits),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
