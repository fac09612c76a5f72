#include "support/mla_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "format/dtype.h"

float mla_case_bf16(uint16_t v)
{
	uint32_t bits = (uint32_t)v << 16;
	float f;

	memcpy(&f, &bits, sizeof(f));
	return f;
}

uint16_t mla_case_to_bf16(float v)
{
	return km_f32_to_bf16(v);
}

static uint16_t *random_bf16(size_t count, float size, uint64_t seed)
{
	uint16_t *to = km_xreallocarray(NULL, count, sizeof(*to));

	for (size_t i = 0; i < count; i++)
		to[i] = km_f32_to_bf16(size * km_rng_normal(seed, i));
	return to;
}

static void *random_cache(bool fp8, size_t count, uint64_t seed)
{
	uint8_t *to;

	if (!fp8)
		return random_bf16(count, 1, seed);
	to = km_xmalloc(count);
	for (size_t i = 0; i < count; i++)
		to[i] = km_f32_to_f8_e4m3(km_rng_normal(seed, i));
	return to;
}

/* Pages in random order: Fisher and Yates. */
static void shuffle(int32_t *to, int count, uint64_t seed)
{
	for (int i = 0; i < count; i++)
		to[i] = i;
	for (int i = count - 1; i > 0; i--) {
		int j = (int)(km_rng_u64(seed, (uint64_t)i) % (uint64_t)(i + 1));
		int32_t t = to[i];

		to[i] = to[j];
		to[j] = t;
	}
}

static bool kept(const mla_case_step *s, int seq, int row)
{
	return seq < s->decode_seqs || row % s->every == 0 || row == s->rows[seq] - 1;
}

static int count_tokens(const mla_case_step *s, int *longest)
{
	int tokens = 0;

	*longest = 1;
	for (int i = 0; i < s->seqs; i++) {
		*longest = s->past[i] + s->rows[i] > *longest ? s->past[i] + s->rows[i] : *longest;
		for (int r = 0; r < s->rows[i]; r++)
			tokens += kept(s, i, r);
	}
	return tokens;
}

static void make_batch(mla_case *c, const mla_case_step *s, uint64_t seed)
{
	km_batch *b = &c->batch;
	int longest, row = 0;

	b->tokens = count_tokens(s, &longest);
	b->seqs = s->seqs;
	b->decode_seqs = s->decode_seqs;
	b->page_size = s->page_size;
	b->pages_per_seq = longest / s->page_size + 1;
	c->positions_max = longest;
	c->slots = s->seqs * b->pages_per_seq * s->page_size;
	c->pages = km_xcalloc((size_t)(s->seqs * b->pages_per_seq), sizeof(int32_t));
	c->positions = km_xcalloc((size_t)b->tokens, sizeof(int32_t));
	c->slot = km_xcalloc((size_t)b->tokens, sizeof(int32_t));
	c->seq_start = km_xcalloc((size_t)s->seqs + 1, sizeof(int32_t));
	c->kv_len = km_xcalloc((size_t)s->seqs, sizeof(int32_t));
	shuffle(c->pages, s->seqs * b->pages_per_seq, seed);
	for (int i = 0; i < s->seqs; i++) {
		c->kv_len[i] = s->past[i] + s->rows[i];
		for (int r = 0; r < s->rows[i]; r++) {
			int at = s->past[i] + r;

			if (!kept(s, i, r))
				continue;
			c->positions[row] = at;
			c->slot[row++] =
				c->pages[i * b->pages_per_seq + at / s->page_size] * s->page_size +
				at % s->page_size;
		}
		c->seq_start[i + 1] = row;
	}
	b->positions = c->positions;
	b->slots = c->slot;
	b->seq_start = c->seq_start;
	b->kv_len = c->kv_len;
	b->pages = c->pages;
}

static void make_turns(mla_case *c)
{
	int dim = c->shape.rope_dim;

	c->cos_sin = km_xreallocarray(NULL, (size_t)c->positions_max * (size_t)dim, sizeof(float));
	for (int p = 0; p < c->positions_max; p++)
		for (int i = 0; i < dim / 2; i++) {
			float angle = (float)p * powf(10000.0f, -2.0f * (float)i / (float)dim);

			c->cos_sin[p * dim + i] = cosf(angle);
			c->cos_sin[p * dim + dim / 2 + i] = sinf(angle);
		}
}

void mla_case_init(mla_case *c, const km_mla_shape *shape, const mla_case_step *step, uint64_t seed)
{
	size_t heads = (size_t)shape->heads, key = (size_t)(shape->nope_dim + shape->rope_dim);
	size_t width = (size_t)(shape->kv_lora_rank + shape->rope_dim);

	memset(c, 0, sizeof(*c));
	c->shape = *shape;
	c->scale = 1.9f / sqrtf((float)key);
	make_batch(c, step, seed);
	make_turns(c);
	c->q = random_bf16((size_t)c->batch.tokens * heads * key, 1, seed + 1);
	c->kv_b = random_bf16(heads * (size_t)(shape->nope_dim + shape->v_dim) *
	                              (size_t)shape->kv_lora_rank,
	                      1.0f / sqrtf((float)shape->kv_lora_rank), seed + 2);
	c->cache = random_cache(shape->fp8, (size_t)c->slots * width, seed + 3);
	c->rotated =
		km_xreallocarray(NULL, (size_t)c->batch.tokens * heads * key, sizeof(uint16_t));
	c->out = km_xreallocarray(NULL, (size_t)c->batch.tokens * heads * (size_t)shape->v_dim,
	                          sizeof(float));
}

/* The queries as f32, rotated; the prompt's rows rounded to bf16 once more, as on the device. */
static float *rotate(mla_case *c)
{
	const km_mla_shape *s = &c->shape;
	int key = s->nope_dim + s->rope_dim, row = s->heads * key;
	size_t count = (size_t)c->batch.tokens * (size_t)row;
	float *q = km_xreallocarray(NULL, count, sizeof(*q));
	km_rope_args rope = { c->batch.tokens, s->heads, s->rope_dim, q + s->nope_dim, row, key,
		              c->positions, c->cos_sin };

	for (size_t i = 0; i < count; i++)
		q[i] = mla_case_bf16(c->q[i]);
	km_cpu_ops("plain")->rope(&rope);
	for (size_t i = 0; i < count; i++)
		c->rotated[i] = km_f32_to_bf16(q[i]);
	return q;
}

void mla_case_solve(mla_case *c)
{
	const km_mla_shape *s = &c->shape;
	km_weight kv_b = { .type = KM_W_BF16, .rows = s->heads * (s->nope_dim + s->v_dim),
		           .cols = s->kv_lora_rank, .data = c->kv_b };
	float *q = rotate(c);
	km_mla_args a = {
		.batch = &c->batch,
		.heads = s->heads,
		.nope_dim = s->nope_dim,
		.rope_dim = s->rope_dim,
		.v_dim = s->v_dim,
		.kv_lora_rank = s->kv_lora_rank,
		.q = q,
		.kv_b = &kv_b,
		.cache = c->cache,
		.kv_dtype = s->fp8 ? KM_KV_FP8 : KM_KV_BF16,
		.scale = c->scale,
		.out = c->out,
	};
	const km_ops *ops = km_cpu_ops(NULL);

	/* aligned_alloc wants a multiple of the alignment, which the layout's pieces are */
	a.scratch = aligned_alloc(
		64,
		(km_mla_scratch_bytes(&a, c->batch.tokens, c->positions_max, 64) + 63) / 64 * 64);
	KM_ASSERT(a.scratch);
	if (c->batch.decode_seqs)
		ops->mla_decode(&a);
	if (c->batch.decode_seqs < c->batch.seqs)
		ops->mla_prefill(&a);
	free(a.scratch);
	free(q);
}

void mla_case_release(mla_case *c)
{
	free(c->positions);
	free(c->slot);
	free(c->seq_start);
	free(c->kv_len);
	free(c->pages);
	free(c->q);
	free(c->kv_b);
	free(c->cos_sin);
	free(c->cache);
	free(c->rotated);
	free(c->out);
	memset(c, 0, sizeof(*c));
}

double mla_case_error(const uint16_t *got, const float *want, int count)
{
	double off = 0, size = 0;

	for (int i = 0; i < count; i++) {
		double g = (double)mla_case_bf16(got[i]), d = g - (double)want[i];

		if (!isfinite(g))
			return INFINITY;
		off += d * d;
		size += (double)want[i] * (double)want[i];
	}
	return size > 0 ? sqrt(off / size) : off > 0 ? INFINITY : 0;
}
