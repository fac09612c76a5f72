/*
 * The scheduler: which rows go into the next step. Pure bookkeeping over sequences and pages; it
 * knows no model, no text and no thread.
 *
 * A step has at most one chunk of each running sequence. Sequences that generate come first, one
 * row each; then prompts, oldest first, cut to what is left of the row budget; then waiting
 * sequences are admitted, first come first served. A sequence at the queue's head that does not
 * fit holds up those behind it: nobody starves.
 *
 * Pages for a sequence's whole prompt are taken at admission, so that only generation can run out.
 * It then takes the pages of the newest running sequence, which goes back to the head of the queue
 * and later computes its prompt and its own output again as one longer prompt. With `reserve`
 * admission takes pages to max_len and nothing is ever taken back: the deterministic mode, where a
 * row must not be computed once in decode form and once in prefill form. There the index is also
 * given prompt pages only.
 *
 * A sequence with a `leader` (samples 1..n-1 of a request) waits until the leader's prompt is
 * computed and then shares its full pages; the rows of the last partial page it computes itself,
 * so that no shared page is ever written. The prompt's last row is always computed: its logits are
 * wanted.
 */
#ifndef KM_ENGINE_SCHEDULER_H
#define KM_ENGINE_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/pages.h"

enum km_seq_state { KM_SEQ_NEW, KM_SEQ_WAITING, KM_SEQ_RUNNING, KM_SEQ_DONE };

typedef struct km_seq {
	/* Set by the owner before it is added. */
	int32_t *ids;    /* [max_len], the owner's; len are known */
	int32_t *pages;  /* [pages for max_len], the owner's; page_count are taken */
	int len, prompt_len, max_len;
	/* Rows whose logits the owner wants beside the last; the owner moves score_from. */
	int score_from, score_to;
	struct km_seq *leader;    /* or NULL; lives as long as this */

	/* The scheduler's. */
	enum km_seq_state state;
	int computed;    /* tokens whose KV is in pages */
	int prefill_end; /* rows before it are prompt rows */
	int page_count, entered; /* pages taken; of these, in the prefix index */
	int cached;      /* prompt tokens that the first admission found in the index */
	bool was_admitted;
	struct km_seq *prev, *next;
} km_seq;

typedef struct km_chunk {
	km_seq *seq;
	int start, count; /* rows, by position */
	bool decode;
	bool last;        /* its last row's logits give the next token */
} km_chunk;

typedef struct km_seq_list {
	km_seq *first, *last;
	int count;
} km_seq_list;

typedef struct km_scheduler {
	km_pages *pages; /* kept */
	int max_running, prefill_rows; /* prompt rows in a step */
	int score_rows;  /* rows of prompts whose logits are wanted, in a step */
	bool reserve;
	km_seq_list running, waiting; /* running: oldest admission first */
	int64_t preemptions, prefix_queries, prefix_hits; /* the last two in tokens */
} km_scheduler;

/* To the end of the queue; from wherever it is, freeing its pages. */
void km_scheduler_add(km_scheduler *scheduler, km_seq *seq);
void km_scheduler_remove(km_scheduler *scheduler, km_seq *seq);

/* The next step: chunks [max_running]; returns how many, those that decode first. 0 only when
 * nothing is running or waiting. */
int km_scheduler_plan(km_scheduler *scheduler, km_chunk *chunks);

/* Takes a page for a chunk of one row where its sequence has none, if one is there to be had. */
bool km_scheduler_make_room(km_scheduler *scheduler, const km_chunk *chunk);

/* After the step's KV is written: moves the sequence on, enters its full pages into the index. */
void km_scheduler_advance(km_scheduler *scheduler, const km_chunk *chunk);

#endif
