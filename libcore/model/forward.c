/*
 * One step: embedding, layers, head, for either backend (model/forward.h has what a backend does).
 *
 * On a CPU the stream of hidden states is updated in one place only, the norm that opens the next block: it
 * adds the last block's output ("delta") to the stream and normalises the sum in one pass.
 * Everything else writes buffers of its own. Routed and shared experts meet in delta: the shared
 * ones are written there, the routed sum (times routed_scaling_factor, in f32) is added. On a GPU what makes a
 * block's output adds it to the stream itself.
 *
 * Of the last layer most prompt rows matter only to the KV cache. Once that is written, the rows
 * whose logits are wanted (and the decoding ones) move together, and all that follows sees only
 * them.
 *
 * This file only orders steps and checks the batch: steps and ops check nothing.
 */
#include "model/forward.h"

#include <inttypes.h>
#include <stdlib.h>

#include "base/mem.h"

void km_kept_init(km_kept *kept, const km_model_options *o)
{
	size_t rows = (size_t)o->max_batch_tokens;

	kept->row = km_xcalloc(rows, sizeof(int32_t));
	kept->from = km_xcalloc(rows, sizeof(int32_t));
	kept->positions = km_xcalloc(rows, sizeof(int32_t));
	kept->start = km_xcalloc((size_t)o->max_seqs + 1, sizeof(int32_t));
}

void km_kept_release(km_kept *kept)
{
	free(kept->row);
	free(kept->from);
	free(kept->positions);
	free(kept->start);
	*kept = (km_kept){ .row = NULL };
}

void km_kept_choose(km_kept *k, const km_batch *batch)
{
	int rows = 0;

	for (int t = 0; t < batch->tokens; t++)
		k->row[t] = t < batch->decode_seqs ? 0 : -1;
	for (int i = 0; i < batch->logit_rows; i++)
		k->row[batch->logit_row[i]] = 0;
	for (int seq = 0; seq < batch->seqs; seq++) {
		k->start[seq] = rows;
		for (int t = batch->seq_start[seq]; t < batch->seq_start[seq + 1]; t++) {
			if (k->row[t] < 0)
				continue;
			k->from[rows] = t;
			k->positions[rows] = batch->positions[t];
			k->row[t] = rows++;
		}
	}
	k->start[batch->seqs] = rows;
	k->batch = *batch;
	k->batch.tokens = rows;
	k->batch.positions = k->positions;
	k->batch.seq_start = k->start;
	k->batch.ids = k->batch.slots = NULL; /* used up */
}

int km_steps_run_layers(km_model *m, const km_batch *batch, int from, int to, km_err *err)
{
	const km_steps *s = m->steps;
	int layers = m->config.num_hidden_layers;

	for (int i = from; i < to; i++) {
		KM_TRY(s->project(m, i, batch, err));
		if (i == layers - 1) {
			batch = &m->kept.batch;
			KM_TRY(s->keep(m, batch, err));
		}
		if (!batch->tokens)
			return 0;
		KM_TRY(s->attend(m, i, batch, err));
		KM_TRY(s->feed_forward(m, i, batch, err));
	}
	return 0;
}

int km_steps_run_head(km_model *m, km_err *err)
{
	return m->kept.batch.logit_rows ? m->steps->head(m, &m->kept.batch, err) : 0;
}

int km_steps_run(km_model *m, const km_batch *batch, km_err *err)
{
	KM_TRY(m->steps->embed(m, batch, err));
	KM_TRY(km_steps_run_layers(m, batch, 0, m->config.num_hidden_layers, err));
	return km_steps_run_head(m, err);
}

static int check_counts(const km_model *m, const km_batch *b, km_err *err)
{
	const km_model_options *o = &m->options;

	if (b->tokens < 1 || b->tokens > o->max_batch_tokens || b->seqs < 1 || b->seqs > o->max_seqs ||
	    b->decode_seqs < 0 || b->decode_seqs > b->seqs)
		return km_fail(err, KM_EINVAL,
		               "a batch of %d rows, %d sequences (%d decoding) is outside the planned %d rows, "
		               "%d sequences",
		               b->tokens, b->seqs, b->decode_seqs, o->max_batch_tokens, o->max_seqs);
	if (b->logit_rows < 0 || b->logit_rows > o->max_logit_rows)
		return km_fail(err, KM_EINVAL, "a batch wants %d rows of logits, %d are planned",
		               b->logit_rows, o->max_logit_rows);
	if (b->page_size < 1 || b->pages_per_seq < 1 || o->kv_slots % b->page_size)
		return km_fail(err, KM_EINVAL, "pages of %d tokens do not divide a KV cache of %" PRId64,
		               b->page_size, o->kv_slots);
	return 0;
}

static int check_rows(const km_model *m, const km_batch *b, km_err *err)
{
	for (int t = 0; t < b->tokens; t++) {
		if (!b->from_drawn && (b->ids[t] < 0 || b->ids[t] >= m->config.vocab_size))
			return km_fail(err, KM_EINVAL, "row %d: token id %d is outside the vocabulary of %d", t,
			               b->ids[t], m->config.vocab_size);
		if (b->positions[t] < 0 || b->positions[t] >= m->options.max_context)
			return km_fail(err, KM_EINVAL, "row %d: position %d is outside the context of %d", t,
			               b->positions[t], m->options.max_context);
		if (b->slots[t] < 0 || b->slots[t] >= m->options.kv_slots)
			return km_fail(err, KM_EINVAL, "row %d: KV slot %d is outside the cache of %" PRId64, t,
			               b->slots[t], m->options.kv_slots);
	}
	for (int i = 0; i < b->logit_rows; i++)
		if (b->logit_row[i] < 0 || b->logit_row[i] >= b->tokens)
			return km_fail(err, KM_EINVAL, "logits of row %d are wanted from a batch of %d rows",
			               b->logit_row[i], b->tokens);
	return 0;
}

static int check_sequence(const km_model *m, const km_batch *b, int seq, km_err *err)
{
	int rows = b->seq_start[seq + 1] - b->seq_start[seq], len = b->kv_len[seq];
	int64_t pages = m->options.kv_slots / b->page_size;
	const int32_t *page = b->pages + (size_t)seq * (size_t)b->pages_per_seq;

	if (rows < 1 || (seq < b->decode_seqs && rows != 1) || len < rows || len > m->options.max_context ||
	    len > (int64_t)b->pages_per_seq * b->page_size)
		return km_fail(err, KM_EINVAL,
		               "sequence %d has %d rows and %d cached tokens (%d pages of %d; %d decode)",
		               seq, rows, len, b->pages_per_seq, b->page_size, b->decode_seqs);
	for (int i = 0; i * b->page_size < len; i++)
		if (page[i] < 0 || page[i] >= pages)
			return km_fail(err, KM_EINVAL, "sequence %d: page %d is outside the cache's %" PRId64, seq,
			               page[i], pages);
	for (int r = 0; r < rows; r++) {
		int at = len - rows + r, row = b->seq_start[seq] + r;
		int slot = page[at / b->page_size] * b->page_size + at % b->page_size;

		if (b->positions[row] != at || b->slots[row] != slot)
			return km_fail(err, KM_EINVAL,
			               "row %d of sequence %d is token %d, but has position %d and slot %d",
			               r, seq, at, b->positions[row], b->slots[row]);
	}
	return 0;
}

static int check_batch(const km_model *m, const km_batch *b, km_err *err)
{
	KM_TRY(check_counts(m, b, err));
	KM_TRY(check_rows(m, b, err));
	if (b->seq_start[0] != 0 || b->seq_start[b->seqs] != b->tokens)
		return km_fail(err, KM_EINVAL, "a batch of %d rows has sequences from row %d to %d", b->tokens,
		               b->seq_start[0], b->seq_start[b->seqs]);
	for (int i = 0; i < b->seqs; i++)
		if (b->seq_start[i + 1] > b->tokens || b->seq_start[i] < 0)
			return km_fail(err, KM_EINVAL, "sequence %d starts at row %d of %d", i, b->seq_start[i],
			               b->tokens);
	for (int i = 0; i < b->seqs; i++)
		KM_TRY(check_sequence(m, b, i, err));
	return 0;
}

int km_forward_prepare(km_model *m, km_err *err)
{
	if (!m->steps->prepare || !m->options.capture_at_open)
		return 0;
	return m->steps->prepare(m, km_steps_run, err);
}

int km_model_launch(km_model *m, const km_batch *batch, km_err *err)
{
	const float *none;
	int rc;

	KM_TRY(check_batch(m, batch, err));
	km_kept_choose(&m->kept, batch);
	rc = m->steps->begin(m, batch, err);
	if (rc >= 0)
		rc = m->steps->replay(m, batch, km_steps_run, err);
	return rc < 0 ? m->steps->end(m, batch, rc, &none, err) : 0;
}

int km_model_finish(km_model *m, const km_batch *batch, const float **logits, km_err *err)
{
	return m->steps->end(m, batch, 0, logits, err);
}

int km_model_forward(km_model *m, const km_batch *batch, const float **logits, km_err *err)
{
	KM_TRY(km_model_launch(m, batch, err));
	return km_model_finish(m, batch, logits, err);
}
