/*
 * What the CPU forms of the ops share: reading weights and cache rows as f32, where a position of a
 * sequence lies, when a call is worth several threads, and how scratch is laid out. Private to
 * device/cpu_*.c, device/op.c and the tests of the ops.
 */
#ifndef KM_DEVICE_CPU_H
#define KM_DEVICE_CPU_H

#include "device/op.h"

/* Elements [col, col + count) of row `row` as f32: exact, but for one rounding of value * scale. */
void km_cpu_weight_row(const km_weight *w, int row, int col, int count, float *to);

/* `count` elements of the cache that start at element `at`. */
void km_cpu_kv_load(enum km_kv_dtype dtype, const void *cache, size_t at, int count, float *to);

/* The slot of a position of a sequence. */
static inline size_t km_cpu_slot(const km_batch *batch, int seq, int position)
{
	const int32_t *pages = batch->pages + (size_t)seq * (size_t)batch->pages_per_seq;

	return (size_t)pages[position / batch->page_size] * (size_t)batch->page_size +
	       (size_t)(position % batch->page_size);
}

/*
 * Threads for a call of that many multiply-adds, or elements moved: one where it is too small to
 * pay for more, else all. Nothing between: libgomp keeps one team and makes another, by malloc,
 * whenever a region asks for a different number of threads. For the same reason one thread enters
 * no region.
 */
int km_cpu_threads(double work);

/* `statement` for each `i` of [0, count): a range to each thread, or one in turn to whoever is
 * free. */
#define KM_CPU_FOR(work, i, count, statement)                                                      \
	KM_CPU_FOR_AS("omp parallel for schedule(static)", work, i, count, statement)
#define KM_CPU_FOR_IN_TURN(work, i, count, statement)                                              \
	KM_CPU_FOR_AS("omp parallel for schedule(dynamic)", work, i, count, statement)
#define KM_CPU_FOR_AS(pragma, work, i, count, statement)                                           \
	do {                                                                                       \
		if (km_cpu_threads(work) == 1) {                                                   \
			for (int i = 0; i < (count); i++)                                          \
				statement;                                                         \
		} else {                                                                           \
			_Pragma(pragma)                                                            \
			for (int i = 0; i < (count); i++)                                          \
				statement;                                                         \
		}                                                                                  \
	} while (0)

/* How much an op takes at once, whatever its call has: it bounds the scratch. */
enum {
	KM_CPU_MLA_SEQS = 16,   /* decode: sequences */
	KM_CPU_MLA_BLOCK = 64,  /* cached tokens; a block starts at a multiple of it */
	KM_CPU_MOE_TOKENS = 512,
};

/* Scratch, in the order of the fields; each starts at a multiple of 64 bytes. The layout functions
 * return the bytes, and fill the pointers when `base` is given. */
typedef struct km_cpu_mla_scratch {
	float *query;  /* [MLA_SEQS, heads, kv_lora_rank + rope_dim], absorbed */
	float *latent; /* [MLA_SEQS, heads, kv_lora_rank], the weighted sum of the cached ones */
	float *thread; /* [threads, thread_floats] */
	size_t thread_floats;
} km_cpu_mla_scratch;

size_t km_cpu_mla_layout(km_cpu_mla_scratch *s, const km_mla_args *a, int max_tokens, int threads,
                         void *base);

typedef struct km_cpu_moe_scratch {
	int32_t *first;  /* [experts + 2], where each expert's pairs start in the order by expert */
	int32_t *active; /* [experts], the experts that have any */
	int32_t *pair;   /* [MOE_TOKENS * top_k], t * top_k + k, by expert, then rising */
	int32_t *place;  /* [MOE_TOKENS * top_k], where a pair is in that order */
	float *act;      /* [MOE_TOKENS * top_k, intermediate], in that order */
	float *down;     /* [MOE_TOKENS * top_k, hidden], in that order */
} km_cpu_moe_scratch;

size_t km_cpu_moe_layout(km_cpu_moe_scratch *s, const km_moe_args *a, int max_tokens, void *base);

/* Ops that move more than they compute have one form for all. */
void km_cpu_embed(const km_embed_args *a);
void km_cpu_rope(const km_rope_args *a);
void km_cpu_kv_write(const km_kv_write_args *a);
void km_cpu_gate(const km_gate_args *a);

extern const km_ops km_cpu_plain_ops, km_cpu_portable_ops;
extern const km_ops km_cpu_avx2_ops, km_cpu_avx512_ops; /* x86-64 */

#endif
