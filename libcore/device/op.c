#include "device/op.h"

#include "device/cpu.h"

static const char *const op_names[KM_OP_COUNT] = {
	[KM_OP_EMBED] = "embed",
	[KM_OP_RMSNORM] = "rmsnorm",
	[KM_OP_LINEAR] = "linear",
	[KM_OP_ROPE] = "rope",
	[KM_OP_KV_WRITE] = "kv_write",
	[KM_OP_MLA_DECODE] = "mla_decode",
	[KM_OP_MLA_PREFILL] = "mla_prefill",
	[KM_OP_SILU_MUL] = "silu_mul",
	[KM_OP_GATE] = "gate",
	[KM_OP_MOE] = "moe",
};

const char *km_op_name(enum km_op op)
{
	return op_names[op];
}

static size_t kv_bytes(enum km_kv_dtype dtype)
{
	return dtype == KM_KV_F32 ? 4 : dtype == KM_KV_BF16 ? 2 : 1;
}

static km_cost embed_cost(const km_embed_args *a)
{
	double row = (double)km_weight_bytes(a->table) / a->table->rows;

	return (km_cost){ a->tokens * (row + 4.0 * a->table->cols), 0 };
}

static km_cost rmsnorm_cost(const km_rmsnorm_args *a)
{
	double elements = (double)a->tokens * a->size;

	return (km_cost){ elements * (a->x ? 16 : 8) + 4.0 * a->size, elements * (a->x ? 5 : 4) };
}

static km_cost linear_cost(const km_linear_args *a)
{
	double rows = a->w->rows, cols = a->w->cols;

	return (km_cost){
		(double)km_weight_bytes(a->w) +
			4.0 * a->tokens * (cols + rows * (a->accumulate ? 2 : 1)),
		2.0 * a->tokens * rows * cols,
	};
}

static km_cost rope_cost(const km_rope_args *a)
{
	double elements = (double)a->tokens * a->heads * a->dim;

	return (km_cost){ 8 * elements + 4.0 * a->tokens * a->dim, 3 * elements };
}

static km_cost kv_write_cost(const km_kv_write_args *a)
{
	double elements = (double)a->tokens * (a->kv_lora_rank + a->rope_dim);

	return (km_cost){ elements * (4 + (double)kv_bytes(a->kv_dtype)), 0 };
}

static km_cost mla_cost(const km_mla_args *a, bool decode)
{
	const km_batch *batch = a->batch;
	double lora = a->kv_lora_rank, key = a->nope_dim + a->rope_dim, rows = 0, macs = 0,
	       cached = 0;

	for (int s = decode ? 0 : batch->decode_seqs;
	     s < (decode ? batch->decode_seqs : batch->seqs); s++) {
		double seen = 0, context = 0;

		for (int t = batch->seq_start[s]; t < batch->seq_start[s + 1]; t++, rows++) {
			context = batch->positions[t] + 1;
			seen += context;
		}
		cached += context;
		macs += decode ? lora * (a->nope_dim + a->v_dim) + seen * (2 * lora + a->rope_dim)
		               : context * lora * (a->nope_dim + a->v_dim) +
		                         seen * (key + a->v_dim);
	}
	return (km_cost){
		(rows ? (double)km_weight_bytes(a->kv_b) : 0) +
			cached * (lora + a->rope_dim) * (double)kv_bytes(a->kv_dtype) +
			4 * rows * a->heads * (key + a->v_dim),
		2 * macs * a->heads,
	};
}

static km_cost silu_mul_cost(const km_silu_mul_args *a)
{
	double elements = (double)a->tokens * a->size;

	return (km_cost){ 12 * elements, 4 * elements };
}

static km_cost gate_cost(const km_gate_args *a)
{
	double scores = (double)a->tokens * a->experts;

	return (km_cost){ 4 * scores + 4.0 * a->experts + 8.0 * a->tokens * a->top_k, 4 * scores };
}

/* Each expert that a row selects is read once. */
static km_cost moe_cost(const km_moe_args *a)
{
	double weights = 0, pairs = 0;

	for (int e = 0; e < a->experts; e++) {
		int rows = 0;

		for (int i = 0; i < a->tokens * a->top_k; i++)
			rows += a->ids[i] == e && a->weights[i] != 0;
		pairs += rows;
		if (rows)
			weights +=
				(double)(km_weight_bytes(&a->gate[e]) + km_weight_bytes(&a->up[e]) +
			                 km_weight_bytes(&a->down[e]));
	}
	return (km_cost){
		weights + 4.0 * a->tokens * (3.0 * a->hidden + 2.0 * a->top_k),
		2 * pairs * 3.0 * a->hidden * a->intermediate,
	};
}

km_cost km_op_cost(enum km_op op, const void *args)
{
	switch (op) {
	case KM_OP_EMBED:
		return embed_cost(args);
	case KM_OP_RMSNORM:
		return rmsnorm_cost(args);
	case KM_OP_LINEAR:
		return linear_cost(args);
	case KM_OP_ROPE:
		return rope_cost(args);
	case KM_OP_KV_WRITE:
		return kv_write_cost(args);
	case KM_OP_MLA_DECODE:
		return mla_cost(args, true);
	case KM_OP_MLA_PREFILL:
		return mla_cost(args, false);
	case KM_OP_SILU_MUL:
		return silu_mul_cost(args);
	case KM_OP_GATE:
		return gate_cost(args);
	case KM_OP_MOE:
		return moe_cost(args);
	case KM_OP_COUNT:
		break;
	}
	return (km_cost){ 0, 0 };
}

static int smaller(int a, int b)
{
	return a < b ? a : b;
}

/* Hands out the next `count` 4-byte elements of the scratch at `base`, which may be NULL. */
static void *carve(void *base, size_t *used, size_t count)
{
	void *piece = base ? (char *)base + *used : NULL;

	*used += (count * 4 + 63) / 64 * 64;
	return piece;
}

/* A thread's floats hold the f32 latents of a block, and: for prefill the rebuilt keys and values
 * of a block, scores of a few rows, and each row's running maximum and sum; for decode the same for
 * the heads. */
size_t km_cpu_mla_layout(km_cpu_mla_scratch *s, const km_mla_args *a, int max_tokens, int threads,
                         void *base)
{
	size_t seqs = (size_t)smaller(max_tokens, KM_CPU_MLA_SEQS), heads = (size_t)a->heads,
	       used = 0;
	size_t lora = (size_t)a->kv_lora_rank, rope = (size_t)a->rope_dim, block = KM_CPU_MLA_BLOCK;
	size_t padded = (lora + rope + 15) / 16 * 16;
	size_t key_value = (size_t)(a->nope_dim + a->v_dim) + rope;

	s->query = carve(base, &used, seqs * heads * (lora + rope));
	s->latent = carve(base, &used, seqs * heads * lora);
	s->thread_floats = block * padded + block * key_value + 2 * (size_t)max_tokens + 2 * heads +
	                   2 * (lora + rope);
	s->thread_floats = (s->thread_floats + 15) / 16 * 16;
	s->thread = carve(base, &used, (size_t)threads * s->thread_floats);
	return used;
}

size_t km_mla_scratch_bytes(const km_mla_args *shape, int max_tokens, int max_context, int threads)
{
	km_cpu_mla_scratch s;

	(void)max_context; /* the CPU forms walk the context in blocks */
	return km_cpu_mla_layout(&s, shape, max_tokens, threads, NULL);
}

size_t km_cpu_moe_layout(km_cpu_moe_scratch *s, const km_moe_args *a, int max_tokens, void *base)
{
	size_t pairs = (size_t)smaller(max_tokens, KM_CPU_MOE_TOKENS) * (size_t)a->top_k, used = 0;

	s->first = carve(base, &used, (size_t)a->experts + 2);
	s->active = carve(base, &used, (size_t)a->experts);
	s->pair = carve(base, &used, pairs);
	s->place = carve(base, &used, pairs);
	s->act = carve(base, &used, pairs * (size_t)a->intermediate);
	s->down = carve(base, &used, pairs * (size_t)a->hidden);
	return used;
}

size_t km_moe_scratch_bytes(const km_moe_args *shape, int max_tokens, int threads)
{
	km_cpu_moe_scratch s;

	(void)threads; /* a thread's tiles live on its stack */
	return km_cpu_moe_layout(&s, shape, max_tokens, NULL);
}
