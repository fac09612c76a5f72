/* What the CPU forms share: exact readers, and the ops that move more than they compute. */
#include "device/cpu.h"

#include <omp.h>
#include <string.h>

int km_cpu_threads(double work)
{
	return work < 2e5 || omp_in_parallel() ? 1 : omp_get_max_threads();
}

static float scale_at(const km_weight *w, size_t i)
{
	float scale;

	km_dtype_to_f32(w->scale_dtype, (const char *)w->scale + i * km_dtype_bytes(w->scale_dtype),
	                &scale, 1);
	return scale;
}

static void fp8_row(const km_weight *w, int row, int col, int count, float *to)
{
	const uint8_t *data = (const uint8_t *)w->data + (size_t)row * (size_t)w->cols;
	size_t blocks = (size_t)((w->cols + w->block_cols - 1) / w->block_cols);
	size_t first = (size_t)(row / w->block_rows) * blocks;
	float scale = 0;

	for (int i = 0; i < count; i++) {
		if (i == 0 || (col + i) % w->block_cols == 0)
			scale = scale_at(w, first + (size_t)((col + i) / w->block_cols));
		to[i] = km_f8_e4m3_to_f32(data[col + i]) * scale;
	}
}

static void int4_row(const km_weight *w, int row, int col, int count, float *to)
{
	const uint8_t *data = (const uint8_t *)w->data + (size_t)row * (size_t)w->cols / 2;
	size_t first = (size_t)row * (size_t)(w->cols / w->group);
	float scale = 0;

	for (int i = 0; i < count; i++) {
		int c = col + i;

		if (i == 0 || c % w->group == 0)
			scale = scale_at(w, first + (size_t)(c / w->group));
		to[i] = (float)((data[c / 2] >> c % 2 * 4 & 15) - 8) * scale;
	}
}

void km_cpu_weight_row(const km_weight *w, int row, int col, int count, float *to)
{
	size_t at = (size_t)row * (size_t)w->cols + (size_t)col;

	switch (w->type) {
	case KM_W_F32:
		memcpy(to, (const float *)w->data + at, (size_t)count * sizeof(float));
		return;
	case KM_W_F16:
		km_dtype_to_f32(KM_F16, (const uint16_t *)w->data + at, to, (size_t)count);
		return;
	case KM_W_BF16:
		km_dtype_to_f32(KM_BF16, (const uint16_t *)w->data + at, to, (size_t)count);
		return;
	case KM_W_FP8:
		fp8_row(w, row, col, count, to);
		return;
	case KM_W_INT4:
		int4_row(w, row, col, count, to);
		return;
	}
}

void km_cpu_kv_load(enum km_kv_dtype dtype, const void *cache, size_t at, int count, float *to)
{
	static const enum km_dtype dtypes[] = {
		[KM_KV_F32] = KM_F32, [KM_KV_BF16] = KM_BF16, [KM_KV_FP8] = KM_F8_E4M3,
	};
	const char *from = (const char *)cache + at * km_dtype_bytes(dtypes[dtype]);

	km_dtype_to_f32(dtypes[dtype], from, to, (size_t)count);
}

static void kv_store(enum km_kv_dtype dtype, void *cache, size_t at, int count, const float *from)
{
	if (dtype == KM_KV_F32)
		memcpy((float *)cache + at, from, (size_t)count * sizeof(float));
	else if (dtype == KM_KV_BF16)
		for (int i = 0; i < count; i++)
			((uint16_t *)cache)[at + (size_t)i] = km_f32_to_bf16(from[i]);
	else
		for (int i = 0; i < count; i++)
			((uint8_t *)cache)[at + (size_t)i] = km_f32_to_f8_e4m3(from[i]);
}

void km_cpu_embed(const km_embed_args *a)
{
	int size = a->table->cols;

	KM_CPU_FOR(
		(double)a->tokens * size, t, a->tokens,
		km_cpu_weight_row(a->table, a->ids[t], 0, size, a->y + (size_t)t * (size_t)size));
}

static void rope_row(const km_rope_args *a, int t)
{
	const float *cos = a->cos_sin + (size_t)a->positions[t] * (size_t)a->dim;
	const float *sin = cos + a->dim / 2;

	for (int h = 0; h < a->heads; h++) {
		float *x = a->x + (size_t)t * (size_t)a->token_stride +
		           (size_t)h * (size_t)a->head_stride;

		for (int i = 0; i < a->dim / 2; i++) {
			float x0 = x[2 * i], x1 = x[2 * i + 1];

			x[2 * i] = x0 * cos[i] - x1 * sin[i];
			x[2 * i + 1] = x1 * cos[i] + x0 * sin[i];
		}
	}
}

void km_cpu_rope(const km_rope_args *a)
{
	KM_CPU_FOR((double)a->tokens * a->heads * a->dim, t, a->tokens, rope_row(a, t));
}

static void kv_write_row(const km_kv_write_args *a, int t)
{
	int lora = a->kv_lora_rank;
	size_t at = (size_t)a->slots[t] * (size_t)(lora + a->rope_dim);

	kv_store(a->kv_dtype, a->cache, at, lora, a->latent + (size_t)t * (size_t)a->latent_stride);
	kv_store(a->kv_dtype, a->cache, at + (size_t)lora, a->rope_dim,
	         a->k_pe + (size_t)t * (size_t)a->k_pe_stride);
}

void km_cpu_kv_write(const km_kv_write_args *a)
{
	KM_CPU_FOR((double)a->tokens * (a->kv_lora_rank + a->rope_dim), t, a->tokens,
	           kv_write_row(a, t));
}
