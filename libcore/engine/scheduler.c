#include "engine/scheduler.h"

#include <stddef.h>

#include "base/err.h"

static void list_insert(km_seq_list *list, km_seq *before, km_seq *seq)
{
	km_seq *after = before, *ahead = before ? before->prev : list->last;

	seq->prev = ahead;
	seq->next = after;
	*(ahead ? &ahead->next : &list->first) = seq;
	*(after ? &after->prev : &list->last) = seq;
	list->count++;
}

static void list_remove(km_seq_list *list, km_seq *seq)
{
	*(seq->prev ? &seq->prev->next : &list->first) = seq->next;
	*(seq->next ? &seq->next->prev : &list->last) = seq->prev;
	seq->prev = seq->next = NULL;
	list->count--;
}

static int pages_for(const km_scheduler *s, int tokens)
{
	return (tokens + s->pages->page_size - 1) / s->pages->page_size;
}

static int min_int(int a, int b)
{
	return a < b ? a : b;
}

static void drop_pages(km_scheduler *s, km_seq *seq)
{
	km_pages_give_all(s->pages, seq->pages, seq->page_count);
	seq->page_count = seq->entered = seq->computed = 0;
}

void km_scheduler_add(km_scheduler *s, km_seq *seq)
{
	KM_ASSERT(seq->state == KM_SEQ_NEW);
	seq->state = KM_SEQ_WAITING;
	/* A prompt that is only scored stops before its last row, which scores nothing. */
	seq->prefill_end = seq->max_len > seq->prompt_len ? seq->len : seq->len - 1;
	KM_ASSERT(seq->prefill_end > 0);
	list_insert(&s->waiting, NULL, seq);
}

void km_scheduler_remove(km_scheduler *s, km_seq *seq)
{
	if (seq->state == KM_SEQ_RUNNING)
		list_remove(&s->running, seq);
	else if (seq->state == KM_SEQ_WAITING)
		list_remove(&s->waiting, seq);
	drop_pages(s, seq);
	seq->state = KM_SEQ_DONE;
}

static void preempt_newest(km_scheduler *s)
{
	km_seq *victim = s->running.last;

	KM_ASSERT(!s->reserve);
	drop_pages(s, victim);
	if (victim->len > victim->prompt_len)
		victim->prefill_end = victim->len;
	list_remove(&s->running, victim);
	list_insert(&s->waiting, s->waiting.first, victim);
	victim->state = KM_SEQ_WAITING;
	s->preemptions++;
}

/* Room for one more row, at the expense of newer sequences; false when `seq` itself had to go. */
static bool grow(km_scheduler *s, km_seq *seq)
{
	while (seq->page_count * s->pages->page_size <= seq->computed) {
		int32_t page = km_pages_take(s->pages);

		if (page >= 0) {
			seq->pages[seq->page_count++] = page;
			continue;
		}
		preempt_newest(s);
		if (seq->state != KM_SEQ_RUNNING)
			return false;
	}
	return true;
}

static int plan_decode(km_scheduler *s, km_chunk *chunks)
{
	km_seq *seq = s->running.first;
	int n = 0;

	/* grow() removes from the list's end alone, so that `next` of a sequence that stays is
	 * good. */
	for (; seq; seq = seq->next) {
		if (seq->computed < seq->prefill_end)
			continue;
		KM_ASSERT(seq->computed == seq->len - 1);
		if (!grow(s, seq))
			break;
		chunks[n++] = (km_chunk){ .seq = seq, .start = seq->computed, .count = 1,
		                          .decode = true, .last = true };
	}
	return n;
}

/* The next chunk of a prompt under the row budgets, which it lowers; false when they are spent. */
static bool plan_prefill(km_seq *seq, int *rows, int *score_rows, km_chunk *chunk)
{
	int start = seq->computed, count = min_int(seq->prefill_end - start, *rows);
	int from = seq->score_from > start ? seq->score_from : start, scored;

	if (from < seq->score_to) /* rows before `from` cost no logits */
		count = min_int(count, from - start + *score_rows);
	scored = min_int(start + count, seq->score_to) - from;
	if (scored < 0)
		scored = 0;
	if (count <= 0)
		return false;
	*rows -= count;
	*score_rows -= scored;
	*chunk = (km_chunk){ .seq = seq, .start = start, .count = count };
	chunk->last = start + count == seq->prefill_end && seq->max_len > seq->prompt_len;
	return true;
}

/* Full pages that are there already: of the leader, or in the index. Rows whose logits are still
 * wanted are not taken from anywhere. */
static int find_prefix(km_scheduler *s, km_seq *seq)
{
	int limit = seq->prefill_end - 1, n = 0;
	const km_seq *leader = seq->leader;

	if (seq->score_from < seq->score_to)
		limit = min_int(limit, seq->score_from);
	if (!leader || leader->state != KM_SEQ_RUNNING)
		return km_pages_match(s->pages, seq->ids, limit, seq->pages);
	limit = min_int(limit, seq->prompt_len - 1);
	limit = min_int(limit, leader->computed);
	for (; (n + 1) * s->pages->page_size <= limit; n++) {
		seq->pages[n] = leader->pages[n];
		km_pages_share(s->pages, seq->pages[n]);
	}
	return n;
}

static bool leader_is_ready(const km_seq *seq)
{
	const km_seq *leader = seq->leader;

	return !leader || leader->state == KM_SEQ_DONE ||
	       (leader->state == KM_SEQ_RUNNING && leader->computed >= leader->prompt_len);
}

static void count_prefix(km_scheduler *s, km_seq *seq, int tokens)
{
	if (seq->was_admitted)
		return;
	seq->was_admitted = true;
	seq->cached = tokens;
	if (!s->pages->indexed || seq->leader)
		return;
	s->prefix_queries += seq->prompt_len;
	s->prefix_hits += tokens;
}

/* Takes the pages that a waiting sequence starts with; false when there are too few. One page for
 * each running sequence is left alone, so that an admission does not cause the next preemption. */
static bool admit(km_scheduler *s, km_seq *seq)
{
	int found = find_prefix(s, seq);
	int want = pages_for(s, s->reserve ? seq->max_len : seq->prefill_end) - found;
	int spare = s->reserve ? 0 : s->running.count;

	if (want + spare > km_pages_available(s->pages)) {
		km_pages_give_all(s->pages, seq->pages, found);
		return false;
	}
	seq->page_count = found;
	while (want-- > 0)
		seq->pages[seq->page_count++] = km_pages_take(s->pages);
	seq->computed = found * s->pages->page_size;
	seq->entered = s->pages->indexed ? found : 0;
	count_prefix(s, seq, seq->computed);
	list_remove(&s->waiting, seq);
	list_insert(&s->running, NULL, seq);
	seq->state = KM_SEQ_RUNNING;
	return true;
}

int km_scheduler_plan(km_scheduler *s, km_chunk *chunks)
{
	int rows = s->prefill_rows, score_rows = s->score_rows, n = plan_decode(s, chunks);
	km_seq *next;

	for (km_seq *seq = s->running.first; seq && rows > 0; seq = seq->next)
		if (seq->computed < seq->prefill_end &&
		    plan_prefill(seq, &rows, &score_rows, &chunks[n]))
			n++;
	for (km_seq *seq = s->waiting.first; seq && rows > 0; seq = next) {
		next = seq->next;
		if (!leader_is_ready(seq))
			continue;
		if (s->running.count >= s->max_running || !admit(s, seq))
			break;
		if (plan_prefill(seq, &rows, &score_rows, &chunks[n]))
			n++;
	}
	return n;
}

bool km_scheduler_make_room(km_scheduler *s, const km_chunk *chunk)
{
	km_seq *seq = chunk->seq;
	int32_t page;

	if (seq->page_count * s->pages->page_size > chunk->start)
		return true;
	page = km_pages_take(s->pages);
	if (page >= 0)
		seq->pages[seq->page_count++] = page;
	return page >= 0;
}

void km_scheduler_advance(km_scheduler *s, const km_chunk *chunk)
{
	km_seq *seq = chunk->seq;
	int size = s->pages->page_size, limit;

	seq->computed = chunk->start + chunk->count;
	if (!s->pages->indexed)
		return;
	limit = s->reserve ? min_int(seq->computed, seq->prompt_len) : seq->computed;
	for (; (seq->entered + 1) * size <= limit; seq->entered++) {
		int32_t *page = &seq->pages[seq->entered];
		int32_t parent = seq->entered ? seq->pages[seq->entered - 1] : -1;

		*page = km_pages_enter(s->pages, *page, parent, seq->ids + seq->entered * size);
	}
}
