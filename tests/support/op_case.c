#include "support/op_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"

float *op_case_floats(size_t count, uint64_t seed)
{
	float *f = km_xreallocarray(NULL, count ? count : 1, sizeof(*f));

	for (size_t i = 0; i < count; i++)
		f[i] = km_rng_normal(seed, i);
	return f;
}

float *op_case_poison(size_t count)
{
	float *f = km_xreallocarray(NULL, count ? count : 1, sizeof(*f));

	for (size_t i = 0; i < count; i++)
		f[i] = NAN;
	return f;
}

static void put_float(enum km_dtype dtype, void *to, size_t i, float f)
{
	switch (dtype) {
	case KM_F32:
		((float *)to)[i] = f;
		return;
	case KM_F16:
		((uint16_t *)to)[i] = km_f32_to_f16(f);
		return;
	case KM_BF16:
		((uint16_t *)to)[i] = km_f32_to_bf16(f);
		return;
	default:
		((uint8_t *)to)[i] = km_f32_to_f8_e4m3(f);
		return;
	}
}

static double get_float(enum km_dtype dtype, const void *from, size_t i)
{
	float f;

	km_dtype_to_f32(dtype, (const char *)from + i * km_dtype_bytes(dtype), &f, 1);
	return f;
}

static void *random_elements(enum km_dtype dtype, size_t count, float size, uint64_t seed)
{
	void *to = km_xreallocarray(NULL, count, km_dtype_bytes(dtype));

	for (size_t i = 0; i < count; i++)
		put_float(dtype, to, i, size * km_rng_normal(seed, i));
	return to;
}

/* Positive scales within a factor of 2 of `size`. */
static void *random_scales(enum km_dtype dtype, size_t count, float size, uint64_t seed)
{
	void *to = km_xreallocarray(NULL, count, km_dtype_bytes(dtype));

	for (size_t i = 0; i < count; i++)
		put_float(dtype, to, i, size * (0.5f + (float)km_rng_uniform(seed, i)));
	return to;
}

static uint8_t *random_nibbles(size_t bytes, uint64_t seed)
{
	uint8_t *to = km_xmalloc(bytes);

	for (size_t i = 0; i < bytes; i++)
		to[i] = (uint8_t)km_rng_u64(seed, i);
	return to;
}

km_weight op_case_weight(const weight_case *c, uint64_t seed)
{
	size_t count = (size_t)c->rows * (size_t)c->cols, blocks;
	float size = 1.0f / sqrtf((float)c->cols);
	km_weight w = { .type = c->type, .rows = c->rows, .cols = c->cols };

	switch (c->type) {
	case KM_W_F32:
		w.data = random_elements(KM_F32, count, size, seed);
		break;
	case KM_W_F16:
		w.data = random_elements(KM_F16, count, size, seed);
		break;
	case KM_W_BF16:
		w.data = random_elements(KM_BF16, count, size, seed);
		break;
	case KM_W_FP8:
		w.block_rows = c->block_rows;
		w.block_cols = c->block_cols;
		w.scale_dtype = c->scale_dtype;
		blocks = (size_t)((c->rows + c->block_rows - 1) / c->block_rows) *
		         (size_t)((c->cols + c->block_cols - 1) / c->block_cols);
		w.data = random_elements(KM_F8_E4M3, count, 4, seed);
		w.scale = random_scales(c->scale_dtype, blocks, size / 4, seed + 1);
		break;
	case KM_W_INT4:
		w.group = c->group ? c->group : c->cols;
		w.scale_dtype = c->scale_dtype;
		w.data = random_nibbles(count / 2, seed);
		w.scale =
			random_scales(c->scale_dtype, count / (size_t)w.group, size / 4, seed + 1);
		break;
	}
	return w;
}

void op_case_weight_release(km_weight *w)
{
	free((void *)(uintptr_t)w->data);
	free((void *)(uintptr_t)w->scale);
	memset(w, 0, sizeof(*w));
}

double op_case_weight_at(const km_weight *w, int row, int col)
{
	static const enum km_dtype dtypes[] = {
		[KM_W_F32] = KM_F32,
		[KM_W_F16] = KM_F16,
		[KM_W_BF16] = KM_BF16,
		[KM_W_FP8] = KM_F8_E4M3,
	};
	size_t at = (size_t)row * (size_t)w->cols + (size_t)col;

	if (w->type == KM_W_INT4) {
		uint32_t word = ((const uint32_t *)w->data)[at / 8];
		size_t group =
			(size_t)row * (size_t)(w->cols / w->group) + (size_t)(col / w->group);

		return ((int)(word >> at % 8 * 4 & 15) - 8) *
		       get_float(w->scale_dtype, w->scale, group);
	}
	if (w->type == KM_W_FP8) {
		size_t across = (size_t)((w->cols + w->block_cols - 1) / w->block_cols);

		return get_float(KM_F8_E4M3, w->data, at) *
		       get_float(w->scale_dtype, w->scale,
		                 (size_t)(row / w->block_rows) * across +
		                         (size_t)(col / w->block_cols));
	}
	return get_float(dtypes[w->type], w->data, at);
}

/* A permutation of [0, count): Fisher and Yates. */
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

void op_case_step(step_case *s, int seqs, int decode_seqs, const int *past, const int *lens,
                  uint64_t seed)
{
	enum { PAGE = 16 };
	int tokens = 0, longest = 0;

	for (int i = 0; i < seqs; i++) {
		tokens += lens[i];
		longest = past[i] + lens[i] > longest ? past[i] + lens[i] : longest;
	}
	memset(s, 0, sizeof(*s));
	s->batch.pages_per_seq = longest / PAGE + 2;
	s->batch.page_size = PAGE;
	s->slot_count = seqs * s->batch.pages_per_seq * PAGE;
	s->pages = km_xcalloc((size_t)(seqs * s->batch.pages_per_seq), sizeof(int32_t));
	shuffle(s->pages, seqs * s->batch.pages_per_seq, seed);
	s->positions = km_xcalloc((size_t)tokens, sizeof(int32_t));
	s->slots = km_xcalloc((size_t)tokens, sizeof(int32_t));
	s->seq_start = km_xcalloc((size_t)seqs + 1, sizeof(int32_t));
	s->kv_len = km_xcalloc((size_t)seqs, sizeof(int32_t));
	for (int i = 0, t = 0; i < seqs; i++) {
		s->kv_len[i] = past[i] + lens[i];
		for (int p = past[i]; p < s->kv_len[i]; p++, t++) {
			s->positions[t] = p;
			s->slots[t] =
				s->pages[i * s->batch.pages_per_seq + p / PAGE] * PAGE + p % PAGE;
		}
		s->seq_start[i + 1] = t;
	}
	s->batch.tokens = tokens;
	s->batch.seqs = seqs;
	s->batch.decode_seqs = decode_seqs;
	s->batch.positions = s->positions;
	s->batch.slots = s->slots;
	s->batch.seq_start = s->seq_start;
	s->batch.kv_len = s->kv_len;
	s->batch.pages = s->pages;
}

void op_case_step_release(step_case *s)
{
	free(s->positions);
	free(s->slots);
	free(s->seq_start);
	free(s->kv_len);
	free(s->pages);
	memset(s, 0, sizeof(*s));
}

static enum km_dtype cache_dtype(enum km_kv_dtype dtype)
{
	return dtype == KM_KV_F32 ? KM_F32 : dtype == KM_KV_BF16 ? KM_BF16 : KM_F8_E4M3;
}

void *op_case_cache(enum km_kv_dtype dtype, size_t count, uint64_t seed)
{
	return random_elements(cache_dtype(dtype), count, 1, seed);
}

double op_case_cache_at(enum km_kv_dtype dtype, const void *cache, size_t i)
{
	return get_float(cache_dtype(dtype), cache, i);
}
