/*
 * One step's work, flattened: the rows (tokens) of several sequences.
 *
 * Sequences [0, decode_seqs) have one row each, a generated token: they take the absorbed attention
 * form. The others are prompt chunks of one or more rows: they take the plain form, whatever their
 * length, so that a row's result does not depend on how its prompt was cut. An op takes any rising
 * positions of a chunk, or none: the last layer computes only the rows that somebody wants. All
 * arrays are borrowed for the call. A KV slot is page * page_size + offset.
 */
#ifndef KM_DEVICE_BATCH_H
#define KM_DEVICE_BATCH_H

#include <stdint.h>

#include "device/draw.h"

typedef struct km_batch {
	int tokens, seqs, decode_seqs;
	const int32_t *ids;       /* [tokens], each in [0, vocab) */
	const int32_t *positions; /* [tokens], 0-based in their sequence */
	const int32_t *slots;     /* [tokens], where this step writes their KV */
	const int32_t *seq_start; /* [seqs + 1], first row of each sequence */
	const int32_t *kv_len;    /* [seqs], cached tokens, this step's rows included */
	const int32_t *pages;     /* [seqs, pages_per_seq] */
	int pages_per_seq, page_size;
	const int32_t *logit_row; /* [logit_rows], the rows whose logits are wanted */
	int logit_rows;
	/* What a backend that can draws tokens from, or NULL: logits are all that is wanted. A backend
	 * that cannot leaves `drawn` alone. */
	const km_draw *draw;          /* [logit_rows] */
	const km_draw_entry *entries; /* [entry_count] */
	int entry_count;
	/* [tokens], or NULL: the rows' ids are tokens that the step launched before draws, by its rows of
	 * logits; `ids` does not count then. Only steps that generate have it. */
	const int32_t *from_drawn;
	int32_t *drawn; /* [logit_rows], KM_DRAWN_BY_HOST from the caller: tokens, whose rows of logits
	                 * are then nowhere */
} km_batch;

#endif
