/* engine/scheduler: what goes into each step, without a model. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "engine/scheduler.h"

enum { SIZE = 4, RUNNING = 8, MAX_SEQS = 64 };

typedef struct bench {
	km_pages pages;
	km_scheduler sched;
	km_chunk chunks[RUNNING];
	km_seq seqs[MAX_SEQS];
	int64_t rows; /* computed in all */
} bench;

static bench *bench_new(int pages, bool indexed, bool reserve)
{
	bench *b = km_xcalloc(1, sizeof(*b));

	km_pages_init(&b->pages, pages, SIZE, indexed, 5);
	b->sched = (km_scheduler){ .pages = &b->pages, .max_running = RUNNING, .prefill_rows = 16,
	                           .score_rows = 3, .reserve = reserve };
	return b;
}

static void bench_free(bench *b)
{
	for (int i = 0; i < MAX_SEQS; i++) {
		free(b->seqs[i].ids);
		free(b->seqs[i].pages);
	}
	km_pages_release(&b->pages);
	free(b);
}

static km_seq *add(bench *b, int at, int prompt_len, int max_tokens, uint64_t seed)
{
	km_seq *seq = &b->seqs[at];

	seq->max_len = prompt_len + max_tokens;
	seq->len = seq->prompt_len = prompt_len;
	seq->ids = km_xcalloc((size_t)seq->max_len, sizeof(int32_t));
	seq->pages = km_xcalloc((size_t)seq->max_len / SIZE + 1, sizeof(int32_t));
	for (int i = 0; i < prompt_len; i++)
		seq->ids[i] = (int32_t)(km_rng_u64(seed, (uint64_t)i) % 100);
	km_scheduler_add(&b->sched, seq);
	return seq;
}

/* What every step must keep: one chunk a sequence, decode first, budgets, pages for every row,
 * nobody writes a page that another holds. */
static void check_step(bench *b, int n)
{
	int rows = 0, scored = 0;
	bool prompts = false;

	assert_in_range(n, 0, RUNNING);
	for (int i = 0; i < n; i++) {
		const km_chunk *c = &b->chunks[i];
		const km_seq *seq = c->seq;

		assert_int_equal(seq->state, KM_SEQ_RUNNING);
		assert_int_equal(c->start, seq->computed);
		assert_true(c->count > 0 && c->start + c->count <= seq->len);
		assert_true(c->start + c->count <= seq->page_count * SIZE);
		assert_int_equal(c->decode, c->start >= seq->prefill_end);
		if (c->decode) {
			assert_false(prompts);
			assert_int_equal(c->count, 1);
		} else {
			prompts = true;
			rows += c->count;
		}
		for (int p = c->start / SIZE; p <= (c->start + c->count - 1) / SIZE; p++)
			assert_int_equal(b->pages.refs[seq->pages[p]], 1);
		for (int r = c->start; r < c->start + c->count; r++)
			scored += r >= seq->score_from && r < seq->score_to;
		for (int j = 0; j < i; j++)
			assert_ptr_not_equal(b->chunks[j].seq, seq);
		if (b->sched.reserve)
			assert_true(seq->page_count * SIZE >= seq->max_len);
		b->rows += c->count;
	}
	assert_true(rows <= b->sched.prefill_rows);
	assert_true(scored <= b->sched.score_rows);
}

/* One step with a model that says token 7 to everything; returns the number of chunks. */
static int step(bench *b)
{
	int n = km_scheduler_plan(&b->sched, b->chunks);

	check_step(b, n);
	for (int i = 0; i < n; i++) {
		const km_chunk *c = &b->chunks[i];
		km_seq *seq = c->seq;

		km_scheduler_advance(&b->sched, c);
		if (seq->score_from < seq->score_to && seq->score_from < seq->computed)
			seq->score_from =
				seq->computed < seq->score_to ? seq->computed : seq->score_to;
		if (c->last)
			seq->ids[seq->len++] = 7;
		if (seq->len == seq->max_len && (c->last || seq->computed == seq->prefill_end))
			km_scheduler_remove(&b->sched, seq);
	}
	return n;
}

static int run_dry(bench *b)
{
	int steps = 0;

	while (step(b)) {
		steps++;
		assert_true(steps < 10000);
	}
	assert_int_equal(b->sched.running.count + b->sched.waiting.count, 0);
	assert_int_equal(km_pages_used(&b->pages), 0);
	return steps;
}

static void a_prompt_is_cut_and_decode_goes_on(void **state)
{
	bench *b = bench_new(100, false, false);
	km_seq *small = add(b, 0, 3, 20, 1), *large;

	(void)state;
	assert_int_equal(step(b), 1);
	large = add(b, 1, 40, 2, 2);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(step(b), 2);
		assert_ptr_equal(b->chunks[0].seq, small);
		assert_true(b->chunks[0].decode);
		assert_int_equal(b->chunks[1].count, i < 2 ? 16 : 8);
		assert_int_equal(b->chunks[1].last, i == 2);
	}
	assert_int_equal(large->len, 41);
	assert_int_equal(small->len, 7);
	run_dry(b);
	assert_int_equal(b->rows, 3 + 19 + 40 + 1);
	bench_free(b);
}

static void first_come_first_served(void **state)
{
	bench *b = bench_new(10, false, true);
	km_seq *a = add(b, 0, 20, 8, 1), *large = add(b, 1, 20, 4, 2), *small = add(b, 2, 1, 1, 3);

	(void)state;
	while (a->state != KM_SEQ_DONE) {
		step(b);
		assert_int_equal(small->state,
		                 KM_SEQ_WAITING); /* it would fit, and does not pass */
	}
	step(b);
	assert_int_equal(large->state, KM_SEQ_RUNNING);
	run_dry(b);
	assert_int_equal(b->sched.preemptions, 0);
	bench_free(b);
}

static void the_newest_gives_way_and_comes_back(void **state)
{
	bench *b = bench_new(12, true, false);
	km_seq *a = add(b, 0, 8, 24, 1), *c = add(b, 1, 8, 24, 2);

	(void)state;
	while (!b->sched.preemptions)
		assert_true(step(b) > 0);
	assert_int_equal(a->state, KM_SEQ_RUNNING);
	assert_int_equal(c->state, KM_SEQ_WAITING);
	assert_int_equal(c->prefill_end, c->len); /* its own output is prompt now */
	assert_true(c->len > c->prompt_len);
	run_dry(b);
	assert_int_equal(a->len, 32);
	assert_int_equal(c->len, 32);
	assert_int_equal(c->cached, 0); /* what it found on coming back is not the prompt's hit */
	bench_free(b);
}

static void a_prefix_saves_rows_but_never_the_last(void **state)
{
	bench *b = bench_new(100, true, false);
	km_seq *again;

	(void)state;
	add(b, 0, 16, 4, 1);
	run_dry(b);
	assert_int_equal(b->rows, 19);
	again = add(b, 1, 16, 4, 1);
	run_dry(b);
	assert_int_equal(again->cached, 12);
	assert_int_equal(b->rows, 19 + 4 + 3);
	assert_int_equal(b->sched.prefix_queries, 32);
	assert_int_equal(b->sched.prefix_hits, 12);
	bench_free(b);
}

/* A conversation goes on with what was generated: its pages are there, but in the deterministic
 * mode, where only rows of prompt form may be shared, they are not. */
static void generated_pages_are_reused_unless_reserved(void **state)
{
	(void)state;
	for (int reserve = 0; reserve < 2; reserve++) {
		bench *b = bench_new(100, true, reserve);
		km_seq *first = add(b, 0, 8, 13, 1), *second;

		run_dry(b);
		second = &b->seqs[1];
		second->max_len = 30;
		second->len = second->prompt_len = 25;
		second->ids = km_xcalloc(30, sizeof(int32_t));
		second->pages = km_xcalloc(8, sizeof(int32_t));
		memcpy(second->ids, first->ids, 21 * sizeof(int32_t));
		km_scheduler_add(&b->sched, second);
		run_dry(b);
		assert_int_equal(second->cached, reserve ? 8 : 20);
		bench_free(b);
	}
}

static void samples_share_the_prompt_of_their_leader(void **state)
{
	(void)state;
	for (int indexed = 0; indexed < 2; indexed++) {
		bench *b = bench_new(100, indexed, true);
		km_seq *leader = add(b, 0, 22, 3, 1), *followers[3];

		for (int i = 0; i < 3; i++) {
			followers[i] = add(b, i + 1, 22, 3, 1);
			followers[i]->leader = leader;
		}
		add(b, 4, 2, 1, 9); /* is not held up by them */
		step(b);
		assert_int_equal(followers[0]->state, KM_SEQ_WAITING);
		step(b);
		assert_int_equal(b->seqs[4].state, KM_SEQ_DONE);
		step(b);
		for (int i = 0; i < 3; i++) {
			assert_int_equal(followers[i]->state, KM_SEQ_RUNNING);
			assert_memory_equal(followers[i]->pages, leader->pages,
			                    5 * sizeof(int32_t));
			assert_true(followers[i]->pages[5] != leader->pages[5]);
		}
		run_dry(b);
		assert_int_equal(b->rows, 22 + 2 + 2 + 3 * (2 + 2));
		bench_free(b);
	}
}

static void scored_prompts_are_cut_to_the_logits_there_are(void **state)
{
	bench *b = bench_new(100, true, false);
	km_seq *scored, *only, *plain;

	(void)state;
	add(b, 0, 12, 1, 1);
	run_dry(b);
	scored = add(b, 1, 12, 2,
	             1); /* the index has its prompt: its rows are computed all the same */
	scored->score_to = 11;
	only = add(b, 2, 6, 0, 2);
	only->score_to = 5;
	plain = add(b, 3, 9, 1, 3);
	step(b);
	assert_int_equal(b->chunks[0].count, 3);
	assert_int_equal(b->chunks[1].seq == plain ? b->chunks[1].count : b->chunks[2].count, 9);
	run_dry(b);
	assert_int_equal(scored->cached, 0);
	assert_int_equal(scored->score_from, 11);
	assert_int_equal(only->score_from, 5);
	assert_int_equal(b->rows, 12 + 13 + 5 + 9);
	bench_free(b);
}

/* Random arrivals, lengths, shared prompts, removals midway, in a pool that is too small. */
static void random_load_ends_with_nothing_held(void **state)
{
	(void)state;
	for (int mode = 0; mode < 4; mode++) {
		bool reserve = mode & 1, indexed = mode & 2;
		bench *b = bench_new(30, indexed, reserve);
		int added = 0;

		for (uint64_t t = 0; added < MAX_SEQS; t++) {
			uint64_t r = km_rng_u64((uint64_t)mode, t);

			if (r % 3 == 0) {
				km_seq *seq = add(b, added++, 1 + (int)((r >> 8) % 60),
				                  1 + (int)((r >> 16) % 50), (r >> 24) % 4);

				if ((r >> 32) % 4 == 0)
					seq->score_to = seq->prompt_len - 1;
			}
			if ((r >> 40) % 9 == 0 && added) {
				km_seq *seq = &b->seqs[(r >> 44) % (uint64_t)added];

				if (seq->state != KM_SEQ_DONE)
					km_scheduler_remove(&b->sched, seq);
			}
			step(b);
		}
		run_dry(b);
		for (int i = 0; i < MAX_SEQS; i++)
			assert_int_equal(b->seqs[i].state, KM_SEQ_DONE);
		assert_true(reserve ? b->sched.preemptions == 0 : b->sched.preemptions > 0);
		assert_true(indexed ? b->sched.prefix_hits > 0 : b->sched.prefix_hits == 0);
		bench_free(b);
	}
}

/* A request that needs every page there is starts, at once and after another; one page more never. */
static void the_last_page_can_be_had(void **state)
{
	(void)state;
	for (int reserve = 0; reserve < 2; reserve++) {
		bench *b = bench_new(4, false, reserve);
		km_seq *all = add(b, 0, reserve ? 10 : 16, reserve ? 6 : 1, 1), *next;

		assert_int_equal(km_scheduler_plan(&b->sched, b->chunks), 1);
		assert_ptr_equal(b->chunks[0].seq, all);
		assert_int_equal(all->page_count, 4);
		next = add(b, 1, 16, 0, 2);
		assert_int_equal(next->state, KM_SEQ_WAITING);
		km_scheduler_remove(&b->sched, all);
		assert_int_equal(km_scheduler_plan(&b->sched, b->chunks), 1);
		assert_ptr_equal(b->chunks[0].seq, next);
		km_scheduler_remove(&b->sched, next);
		assert_int_equal(km_pages_available(&b->pages), 4);
		bench_free(b);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_prompt_is_cut_and_decode_goes_on),
		cmocka_unit_test(first_come_first_served),
		cmocka_unit_test(the_newest_gives_way_and_comes_back),
		cmocka_unit_test(a_prefix_saves_rows_but_never_the_last),
		cmocka_unit_test(generated_pages_are_reused_unless_reserved),
		cmocka_unit_test(samples_share_the_prompt_of_their_leader),
		cmocka_unit_test(scored_prompts_are_cut_to_the_logits_there_are),
		cmocka_unit_test(random_load_ends_with_nothing_held),
		cmocka_unit_test(the_last_page_can_be_had),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
