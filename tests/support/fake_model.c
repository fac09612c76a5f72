#include "support/fake_model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/mem.h"
#include "base/rng.h"

bool fake_draws;

static void check(const fake_model *m, const km_batch *b)
{
	int size = b->page_size;

	KM_ASSERT(b->tokens > 0 && b->tokens <= m->max_tokens && b->seqs <= m->max_seqs);
	KM_ASSERT(b->logit_rows <= m->max_rows && b->decode_seqs <= b->seqs);
	KM_ASSERT(b->seq_start[0] == 0 && b->seq_start[b->seqs] == b->tokens);
	for (int s = 0; s < b->seqs; s++) {
		const int32_t *pages = b->pages + s * b->pages_per_seq;
		int first = b->seq_start[s], end = b->seq_start[s + 1];

		KM_ASSERT(end > first && (s >= b->decode_seqs || end == first + 1));
		KM_ASSERT(b->positions[end - 1] == b->kv_len[s] - 1);
		KM_ASSERT(b->kv_len[s] <= b->pages_per_seq * size);
		for (int r = first; r < end; r++) {
			int at = b->positions[r];

			KM_ASSERT(at == b->positions[first] + r - first);
			KM_ASSERT(b->slots[r] == pages[at / size] * size + at % size);
			KM_ASSERT(b->slots[r] >= 0 && b->slots[r] < m->slots);
			KM_ASSERT(b->ids[r] >= 0 && b->ids[r] < FAKE_VOCAB);
		}
	}
}

/* Writes a row's KV and returns the hash of all that it saw, itself included. */
static uint64_t compute(fake_model *m, const km_batch *b, const int32_t *ids, int seq, int row)
{
	const int32_t *pages = b->pages + seq * b->pages_per_seq;
	uint64_t hash = 1, form = m->forms && seq < b->decode_seqs;

	for (int at = 0; at < b->positions[row]; at++)
		hash = km_rng_u64(
			hash, m->kv[pages[at / b->page_size] * b->page_size + at % b->page_size]);
	hash = km_rng_u64(hash, (uint64_t)ids[row] * 2 + form);
	m->kv[b->slots[row]] = hash;
	return hash;
}

static int run(fake_model *m, const km_batch *b, const int32_t *ids, km_err *err)
{
	int step = atomic_fetch_add(&m->steps, 1) + 1, job = 0;

	while (atomic_load(&m->hold_from) && step >= atomic_load(&m->hold_from))
		nanosleep(&(struct timespec){ .tv_nsec = 100000 }, NULL);
	check(m, b);
	if (atomic_load(&m->fail_at) && step >= atomic_load(&m->fail_at))
		return km_fail(err, atomic_load(&m->fail_code), "the fake model failed at step %d",
		               step);
	for (int s = 0; s < b->seqs; s++)
		for (int row = b->seq_start[s]; row < b->seq_start[s + 1]; row++) {
			uint64_t hash = compute(m, b, ids, s, row);
			float *out = m->logits + (size_t)job * FAKE_VOCAB;

			if (job == b->logit_rows || b->logit_row[job] != row)
				continue;
			for (int i = 0; i < FAKE_VOCAB; i++)
				out[i] = m->spread * km_rng_normal(hash, (uint64_t)i);
			if (ids[b->seq_start[s]] == atomic_load(&m->nan_id))
				out[5] = NAN;
			job++;
		}
	KM_ASSERT(job == b->logit_rows);
	return 0;
}

static int fake_forward(void *ctx, const km_batch *b, const float **logits, km_err *err)
{
	*logits = ((fake_model *)ctx)->logits;
	return run(ctx, b, b->ids, err);
}

/* ---- a model that draws ---- */

/* As a device does it: in place. */
static void adjust(float *logits, const km_draw *d, const km_draw_entry *entries)
{
	for (int i = d->bias_from; i < d->bias_from + d->biases; i++)
		logits[entries[i].id] += entries[i].bias;
	for (int i = d->counts_from; i < d->counts_from + d->counts; i++) {
		float *x = &logits[entries[i].id];

		*x = *x > 0 ? *x / d->repetition : *x * d->repetition;
		if (entries[i].output)
			*x -= (float)(d->frequency * entries[i].output + d->presence);
	}
}

/* Refuses one row in five, and those that cannot be drawn from. */
static int32_t draw(fake_model *m, const km_batch *b, int row)
{
	const km_draw *d = &b->draw[row];
	float *logits = m->logits + (size_t)row * FAKE_VOCAB;
	km_sampling p = { .temperature = d->scale != 0 ? 1 / (double)d->scale : 0,
		          .top_p = d->top_p,
		          .min_p = d->min_p,
		          .top_k = d->top_k,
		          .repetition_penalty = 1 };
	km_sample_args args = { .logits = logits, .sampling = &p, .seed = d->seed,
		                .index = d->index, .logprobs = -1 };
	km_sampled out;

	adjust(logits, d, b->entries);
	if (km_rng_u64(d->seed, d->index + (uint64_t)b->positions[b->logit_row[row]]) % 5 &&
	    km_sampler_sample(m->sampler, &args, &out, NULL) >= 0)
		return out.id;
	atomic_fetch_add(&m->refused, 1);
	return KM_DRAWN_BY_HOST;
}

static int fake_launch(void *ctx, const km_batch *b, km_err *err)
{
	fake_model *m = ctx;
	int32_t *drawn = m->drawn[m->launched % 2], *before = m->drawn[(m->launched + 1) % 2];

	KM_ASSERT(m->launched - m->finished < 2 && (!b->from_drawn || m->launched));
	atomic_fetch_add(&m->ahead, m->launched > m->finished);
	for (int t = 0; t < b->tokens; t++) {
		m->ids[t] = b->from_drawn ? before[b->from_drawn[t]] : b->ids[t];
		m->ids[t] = m->ids[t] < 0 ? 0 : m->ids[t];
	}
	KM_TRY(run(m, b, m->ids, err));
	for (int i = 0; i < b->logit_rows; i++) {
		KM_ASSERT(b->draw[i].by_device || m->launched == m->finished);
		drawn[i] = b->draw[i].by_device ? draw(m, b, i) : KM_DRAWN_BY_HOST;
	}
	m->launched++;
	return 0;
}

/* Logits are those of the step launched last: a row that this one refused has others by then. */
static int fake_finish(void *ctx, const km_batch *b, const float **logits, km_err *err)
{
	fake_model *m = ctx;
	const int32_t *drawn = m->drawn[m->finished++ % 2];

	(void)err;
	for (int i = 0; i < b->logit_rows; i++)
		if (b->draw[i].by_device)
			b->drawn[i] = drawn[i];
	*logits = m->logits;
	return 0;
}

/* One to three letters; from FAKE_MARKER on a name. */
static const char *fake_bytes(void *ctx, int32_t id, size_t *len)
{
	fake_model *m = ctx;

	*len = strlen(m->bytes[id]);
	return m->bytes[id];
}

km_engine_shape fake_shape(void)
{
	return (km_engine_shape){
		.context_length = 256,
		.page_size = 4,
		.total_pages = 512,
		.max_running = 16,
		.max_queued = 100,
		.prefill_rows = 24,
		.score_rows = 5,
		.prefix_cache = true,
		.threads = 2,
	};
}

km_engine *fake_engine(fake_model *m, const km_engine_shape *shape)
{
	km_backend backend = { .vocab_size = FAKE_VOCAB,
	                       .added_from = FAKE_MARKER,
	                       .max_token_bytes = 8,
	                       .eos_count = 1,
	                       .eos = { FAKE_EOS },
	                       .ctx = m,
	                       .forward = fake_forward,
	                       .token_bytes = fake_bytes };

	m->slots = shape->total_pages * shape->page_size;
	m->kv = km_xcalloc((size_t)m->slots, sizeof(*m->kv));
	m->max_seqs = shape->max_running;
	m->max_tokens = shape->max_running + shape->prefill_rows;
	m->max_rows = shape->max_running + shape->score_rows;
	m->logits = km_xcalloc((size_t)m->max_rows * FAKE_VOCAB, sizeof(float));
	if (fake_draws) {
		backend.draws = true;
		backend.launch = fake_launch;
		backend.finish = fake_finish;
		m->sampler = km_sampler_new(FAKE_VOCAB);
		m->ids = km_xcalloc((size_t)m->max_tokens, sizeof(*m->ids));
		for (int i = 0; i < 2; i++)
			m->drawn[i] = km_xcalloc((size_t)m->max_rows, sizeof(**m->drawn));
	}
	atomic_store(&m->nan_id, -1);
	if (m->spread == 0)
		m->spread = 2;
	for (int id = 0; id < FAKE_VOCAB; id++) {
		if (id >= FAKE_MARKER)
			snprintf(m->bytes[id], sizeof(m->bytes[id]), "<m%d>", id);
		else
			for (int i = 0; i < 1 + id % 3; i++)
				m->bytes[id][i] = (char)('a' + (id + i * 7) % 26);
	}
	return km_engine_start(shape, &backend);
}

void fake_close(km_engine *engine, fake_model *m)
{
	if (engine)
		km_engine_stop(engine);
	free(m->kv);
	free(m->logits);
	free(m->ids);
	free(m->drawn[0]);
	free(m->drawn[1]);
	km_sampler_free(m->sampler);
	*m = (fake_model){ 0 };
}
