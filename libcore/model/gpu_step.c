/*
 * A step's way to the GPU and back (model/gpu_step.h).
 *
 * A step's arrays (ids, pages, the pieces of attention) are laid side by side in pinned memory and
 * sent at once; then everything is enqueued, and the host waits once, for the tokens drawn or, of
 * rows that it draws from itself, the logits. Two steps have staging memory of their own; on the device
 * there is one place, since steps follow one another there.
 *
 * A step is padded to one of few numbers of rows (model/gpu_graphs.c), unless it has very many. One that
 * only generates is padded all the way through, with sequences of no cached tokens that write no KV; of
 * one with prompts only the ids are, since attention has the step's own rows alone. What graphs know
 * comes first in the arrays, at places that follow from the number of rows.
 */
#include "model/gpu_step.h"

#if KM_CUDA

#include <string.h>

#include "device/cuda_sampler.h"
#include "model/gpu.h"

/* ---- a step's arrays ---- */

/* Copies to the staging memory; where that will be on the device. */
static const void *pack(const km_gpu *g, size_t *at, const void *from, size_t bytes)
{
	const void *there = g->b.batch + *at;

	if (from)
		memcpy(g->staging + *at, from, bytes);
	*at += (bytes + 255) / 256 * 256;
	KM_ASSERT(*at <= g->b.entries_at);
	return there;
}

static const int32_t *pack_ids(const km_gpu *g, size_t *at, const int32_t *from, int count)
{
	return pack(g, at, from, (size_t)count * sizeof(int32_t));
}

static int cut_prefill(const km_gpu *g, km_gpu_batch *b, const km_batch *batch, size_t *at,
                       km_err *err)
{
	const km_mla_wave *last;
	km_mla_prefill_plan *p = &b->prefill;

	p->waves = 0;
	if (batch->decode_seqs == batch->seqs)
		return 0;
	KM_TRY(km_mla_plan_prefill(p, batch, g->b.room, err));
	if (!p->waves)
		return 0;
	last = &p->wave[p->waves - 1];
	b->runs = pack(g, at, p->runs, (size_t)(last->runs_from + last->runs) * sizeof(*p->runs));
	b->tiles =
		pack(g, at, p->tiles, (size_t)(last->tiles_from + last->tiles) * sizeof(*p->tiles));
	return 0;
}

/* `count` numbers, then `padding` up to `rows`. */
static const int32_t *pack_padded(const km_gpu *g, size_t *at, const int32_t *from, int count,
                                  int rows, int32_t padding)
{
	int32_t *to = (int32_t *)(void *)(g->staging + *at);

	for (int i = 0; i < rows; i++)
		to[i] = i < count ? from[i] : padding;
	return pack_ids(g, at, NULL, rows);
}

/* A step to be padded to `rows`; 0: as it is. What graphs know comes first, at places that follow from
 * the number of rows alone. */
static int pack_all(km_gpu *g, const km_batch *batch, int rows, size_t *at, km_err *err)
{
	km_gpu_batch *b = &g->all;
	int32_t valid = batch->tokens;

	g->step = *batch;
	g->step.tokens = rows ? rows : batch->tokens;
	b->ids = pack_padded(g, at, batch->ids, batch->tokens, g->step.tokens, 0);
	g->valid = rows ? pack_ids(g, at, &valid, 1) : NULL;
	b->tokens = batch->tokens;
	b->decode_seqs = batch->decode_seqs;
	b->pages_per_seq = batch->pages_per_seq;
	b->page_size = batch->page_size;
	b->positions = pack_ids(g, at, batch->positions, batch->tokens);
	b->slots = pack_ids(g, at, batch->slots, batch->tokens);
	b->kv_len = pack_ids(g, at, batch->kv_len, batch->seqs);
	b->pages = pack_ids(g, at, batch->pages, batch->seqs * batch->pages_per_seq);
	return cut_prefill(g, b, batch, at, err);
}

/* Kept rows have their KV already: they write to no slot. */
static int pack_kept(km_gpu *g, const km_kept *kept, size_t *at, km_err *err)
{
	km_gpu_batch *b = &g->kept;
	km_mla_prefill_plan plan = b->prefill;
	int rows = kept->batch.tokens;

	*b = g->all;
	b->prefill = plan;
	b->tokens = rows;
	b->positions = pack_ids(g, at, kept->positions, rows);
	g->kept_from = pack_ids(g, at, kept->from, rows);
	memset(g->staging + *at, 0xff, (size_t)rows * sizeof(int32_t));
	g->no_slots = pack_ids(g, at, NULL, rows);
	return cut_prefill(g, b, &kept->batch, at, err);
}

static void pack_logit_rows(km_gpu *g, const km_kept *kept, const km_batch *batch, size_t *at)
{
	int32_t *to = (int32_t *)(void *)(g->staging + *at);
	bool moved = batch->logit_rows != kept->batch.tokens;

	for (int i = 0; i < batch->logit_rows; i++) {
		to[i] = kept->row[batch->logit_row[i]];
		moved = moved || to[i] != i;
	}
	g->logit_from = moved ? pack_ids(g, at, NULL, batch->logit_rows) : NULL;
}

/* How `rows` rows of logits, at least those of the batch, are drawn from. */
static void pack_draws(km_gpu *g, const km_batch *batch, int rows, size_t *at)
{
	km_draw *to = (km_draw *)(void *)(g->staging + *at);

	for (int i = 0; i < rows; i++)
		to[i] = batch->draw && i < batch->logit_rows ? batch->draw[i]
		                                             : (km_draw){ .by_device = 0 };
	g->draw = pack(g, at, NULL, (size_t)rows * sizeof(*to));
}

/* Entries have a place of their own, which graphs know; what graphs do not know is packed last. */
static int send(const km_gpu *g, const km_batch *batch, size_t bytes, km_err *err)
{
	size_t entries = (size_t)batch->entry_count * sizeof(*batch->entries);
	const int32_t *from = NULL;

	if (batch->from_drawn)
		from = pack_ids(g, &bytes, batch->from_drawn, batch->tokens);
	KM_TRY(km_cuda_send(g->cuda, g->b.batch, g->staging, bytes, err));
	if (from)
		KM_TRY(km_cuda_next_ids(g->cuda, from, g->b.drawn, (int32_t *)(uintptr_t)g->all.ids,
		                        batch->tokens, err));
	if (!batch->draw || !entries)
		return 0;
	KM_ASSERT(batch->entry_count <= KM_DRAW_ENTRIES);
	memcpy(g->staging + g->b.entries_at, batch->entries, entries);
	return km_cuda_send(g->cuda, g->b.batch + g->b.entries_at, g->staging + g->b.entries_at,
	                    entries, err);
}

/* ---- steps that only generate ---- */

static int longest_of(const km_batch *batch)
{
	int longest = 1;

	for (int s = 0; s < batch->decode_seqs; s++)
		longest = batch->kv_len[s] > longest ? batch->kv_len[s] : longest;
	return longest;
}

/* Every row a sequence of its own, and its logits wanted in order. */
static bool only_generates(const km_gpu *g, const km_batch *batch)
{
	int rows = km_gpu_form_rows(batch->tokens);

	if (batch->decode_seqs != batch->tokens || batch->logit_rows != batch->tokens ||
	    rows > g->b.rows || rows > g->b.logit_rows)
		return false;
	for (int i = 0; i < batch->logit_rows; i++)
		if (batch->logit_row[i] != i)
			return false;
	return true;
}

static const int32_t *pack_pages(const km_gpu *g, size_t *at, const km_batch *batch, int rows,
                                 int width)
{
	int32_t *to = (int32_t *)(void *)(g->staging + *at);
	int some = batch->pages_per_seq < width ? batch->pages_per_seq : width;

	memset(to, 0, (size_t)rows * (size_t)width * sizeof(*to));
	for (int s = 0; s < batch->seqs; s++)
		memcpy(to + (size_t)s * (size_t)width,
		       batch->pages + (size_t)s * (size_t)batch->pages_per_seq,
		       (size_t)some * sizeof(*to));
	return pack_ids(g, at, NULL, rows * width);
}

static void pack_generating(km_model *m, const km_batch *batch, int rows, size_t *at)
{
	km_gpu *g = m->gpu;
	km_gpu_batch *b = &g->all;
	int tokens = batch->tokens;
	int32_t valid = tokens;

	b->tokens = b->decode_seqs = rows;
	b->page_size = batch->page_size;
	b->pages_per_seq = (g->longest + batch->page_size - 1) / batch->page_size;
	b->ids = pack_padded(g, at, batch->ids, tokens, rows, 0);
	b->positions = pack_padded(g, at, batch->positions, tokens, rows, 0);
	b->slots = pack_padded(g, at, batch->slots, tokens, rows, -1);
	b->kv_len = pack_padded(g, at, batch->kv_len, tokens, rows, 0);
	g->valid = pack_ids(g, at, &valid, 1);
	pack_draws(g, batch, rows, at);
	b->pages = pack_pages(g, at, batch, rows, b->pages_per_seq);
	b->prefill.waves = 0;
	g->logit_from = NULL;
	g->whole = true;
	g->step =
		(km_batch){ .tokens = rows, .seqs = rows, .decode_seqs = rows, .logit_rows = rows };
	m->kept.batch = g->step;
}

int km_gpu_step_begin(km_model *m, const km_batch *batch, km_err *err)
{
	km_gpu *g = m->gpu;
	size_t bytes = 0;

	KM_ASSERT(g->launched - g->finished < 2);
	g->staging = g->under_way[g->launched++ % 2].staging;
	if (batch->pages_per_seq > g->b.pages)
		return km_fail(err, KM_EINVAL, "page tables of %d pages a sequence, %d are planned",
		               batch->pages_per_seq, g->b.pages);
	g->stream = g->b.stream;
	g->normed = g->b.normed;
	g->generating = only_generates(g, batch);
	if (g->generating) {
		g->longest = km_gpu_form_length(m, longest_of(batch));
		pack_generating(m, batch, km_gpu_form_rows(batch->tokens), &bytes);
		return send(g, batch, bytes, err);
	}
	g->longest = longest_of(batch);
	g->whole = m->kept.batch.tokens == batch->tokens;
	KM_TRY(pack_all(g, batch, km_gpu_bucket_rows(m, batch->tokens), &bytes, err));
	if (!g->whole)
		KM_TRY(pack_kept(g, &m->kept, &bytes, err));
	pack_logit_rows(g, &m->kept, batch, &bytes);
	pack_draws(g, batch, batch->logit_rows, &bytes);
	return send(g, batch, bytes, err);
}

int km_gpu_step_send_padding(km_model *m, int rows, bool generates, km_err *err)
{
	km_gpu *g = m->gpu;
	km_batch none = { .page_size = m->options.page_size, .pages_per_seq = 1 };
	size_t bytes = 0;

	g->stream = g->b.stream;
	g->normed = g->b.normed;
	g->generating = generates;
	if (generates)
		pack_generating(m, &none, rows, &bytes);
	else
		KM_TRY(pack_all(g, &none, rows, &bytes, err));
	return send(g, &none, bytes, err);
}

/* ---- back ---- */

static bool by_device(const km_batch *batch, int row)
{
	return batch->draw && batch->draw[row].by_device;
}

static int fetch_row(const km_model *m, int row, km_err *err)
{
	size_t vocab = (size_t)m->config.vocab_size, at = (size_t)row * vocab;

	return km_cuda_fetch(m->gpu->cuda, m->gpu->logits + at, m->gpu->b.logits + at, vocab * 4,
	                     err);
}

int km_gpu_step_fetch(km_model *m, const km_batch *batch, km_err *err)
{
	km_gpu *g = m->gpu;
	int at = (int)((g->launched - 1) % 2);

	if (batch->draw && batch->logit_rows)
		KM_TRY(km_cuda_fetch(g->cuda, g->under_way[at].drawn, g->b.drawn,
		                     (size_t)batch->logit_rows * sizeof(int32_t), err));
	for (int i = 0; i < batch->logit_rows; i++)
		if (!by_device(batch, i))
			KM_TRY(fetch_row(m, i, err));
	return km_cuda_fence_set(g->cuda, g->under_way[at].done, err);
}

/* Tokens drawn, and the logits of rows refused unless the next step has overwritten them. */
static int take_drawn(const km_model *m, const km_batch *batch, const int32_t *drawn, km_err *err)
{
	const km_gpu *g = m->gpu;
	int refused = 0;

	for (int i = 0; i < batch->logit_rows; i++) {
		if (!by_device(batch, i))
			continue;
		batch->drawn[i] = drawn[i];
		if (drawn[i] != KM_DRAWN_BY_HOST || g->launched > g->finished)
			continue;
		KM_TRY(fetch_row(m, i, err));
		refused++;
	}
	return refused ? km_cuda_wait(g->cuda, err) : 0;
}

/* The step's staging memory is another's from here on, whatever came of this one. */
int km_gpu_step_end(km_model *m, const km_batch *batch, int rc, const float **logits, km_err *err)
{
	km_gpu *g = m->gpu;
	int at = (int)(g->finished % 2);

	*logits = g->logits;
	if (rc < 0) {
		km_cuda_wait(g->cuda, NULL);
		g->launched--;
		return rc;
	}
	g->finished++;
	KM_TRY(km_cuda_fence_wait(g->under_way[at].done, err));
	return take_drawn(m, batch, g->under_way[at].drawn, err);
}

#endif
