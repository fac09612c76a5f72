/*
 * bench_ops [OPTION]...: speed of the ops on this machine's CPU, on the shapes of the mini model
 * (or of K2 with --shape k2).
 *
 * Bytes and flops are the ops' own costs. GB/s are shown as a share of the read bandwidth, GFLOP/s
 * as a share of the f32 multiply-add peak, both measured here first with the same threads. Each
 * case walks over several copies of its weights, more than fit the cache, as a model's layers do.
 * Rates and shares are those of the best run, since the machine may have other work; the median
 * stands beside.
 */
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/option.h"
#include "base/rng.h"
#include "device/op.h"
#include "support/op_case.h"

enum { RUNS = 15, PASSES = 7 };

struct values {
	int64_t threads, copies_mib;
	const char *isa, *only, *shape;
};

static const km_option table[] = {
	{ .kind = KM_OPT_INT, .names = "threads,t", .arg = "N",
	  .offset = offsetof(struct values, threads), .help = "threads; 0: all", .max = 4096 },
	{ .kind = KM_OPT_INT, .names = "copies", .arg = "MIB",
	  .offset = offsetof(struct values, copies_mib),
	  .help = "weights that a case walks over, in MiB (256)", .min = 1, .max = 65536 },
	{ .kind = KM_OPT_STRING, .names = "isa", .arg = "NAME",
	  .offset = offsetof(struct values, isa), .help = "form (the best)" },
	{ .kind = KM_OPT_STRING, .names = "only", .arg = "TEXT",
	  .offset = offsetof(struct values, only), .help = "cases whose name has TEXT in it" },
	{ .kind = KM_OPT_CHOICE, .names = "shape", .arg = "NAME",
	  .offset = offsetof(struct values, shape), .choices = "mini|k2", .help = "model (mini)" },
};

static const km_usage usage = { "bench_ops", "[OPTION]...", "speed of the ops", table,
	                        sizeof(table) / sizeof(*table), 0 };

typedef struct machine {
	double read_gbs, peak_gflops;
	const km_ops *ops;
	const struct values *values;
} machine;

typedef struct shape {
	int hidden, heads, nope, rope, v, lora, q_lora, moe_intermediate, experts, top_k, vocab;
} shape;

static const shape mini = { 1024, 16, 128, 64, 128, 512, 512, 256, 384, 8, 163840 };
static const shape k2 = { 7168, 64, 128, 64, 128, 512, 1536, 2048, 24, 8, 163840 };

/* GB/s of reading memory once: the best of some passes over 512 MiB. */
static double read_bandwidth(void)
{
	enum { WORDS = 1 << 26 };
	uint64_t *data = km_xmalloc((size_t)WORDS * 8), sink = 0;
	double best = 0;

#pragma omp parallel for schedule(static)
	for (int i = 0; i < WORDS; i++)
		data[i] = (uint64_t)i;
	for (int pass = 0; pass < PASSES; pass++) {
		double start = km_now_s(), seconds;

#pragma omp parallel for schedule(static) reduction(^ : sink)
		for (int i = 0; i < WORDS; i += 32) {
			uint64_t part = 0;

			for (int j = 0; j < 32; j++)
				part ^= data[i + j];
			sink ^= part;
		}
		seconds = km_now_s() - start;
		best = fmax(best, WORDS * 8.0 / seconds * 1e-9);
	}
	if (sink == 1)
		puts("");
	free(data);
	return best;
}

/* f32 multiply-adds of one core, 12 chains of the widest vector. */
#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx512f"))) static float fma_512(long rounds)
{
	__m512 a[12], b = _mm512_set1_ps(0.999f);

	for (int i = 0; i < 12; i++)
		a[i] = _mm512_set1_ps((float)i);
	for (long k = 0; k < rounds; k++)
#pragma GCC unroll 12
		for (int i = 0; i < 12; i++)
			a[i] = _mm512_fmadd_ps(a[i], b, b);
	for (int i = 1; i < 12; i++)
		a[0] = _mm512_add_ps(a[0], a[i]);
	return _mm512_reduce_add_ps(a[0]);
}

__attribute__((target("avx2,fma"))) static float fma_256(long rounds)
{
	__m256 a[12], b = _mm256_set1_ps(0.999f);

	for (int i = 0; i < 12; i++)
		a[i] = _mm256_set1_ps((float)i);
	for (long k = 0; k < rounds; k++)
#pragma GCC unroll 12
		for (int i = 0; i < 12; i++)
			a[i] = _mm256_fmadd_ps(a[i], b, b);
	for (int i = 1; i < 12; i++)
		a[0] = _mm256_add_ps(a[0], a[i]);
	return _mm256_cvtss_f32(a[0]);
}

static double peak_gflops(const km_ops *ops)
{
	bool wide = !strcmp(ops->name, "avx512");
	long rounds = 3000000;
	double best = 0;

	if (!wide && strcmp(ops->name, "avx2"))
		return 0;
	for (int pass = 0; pass < PASSES; pass++) {
		double start = km_now_s();
		float sum = 0;

#pragma omp parallel reduction(+ : sum)
		sum += wide ? fma_512(rounds) : fma_256(rounds);
		best = fmax(best, (double)rounds * 12 * 2 * (wide ? 16 : 8) *
		                          omp_get_max_threads() / (km_now_s() - start) * 1e-9);
		if (sum == 1)
			puts("");
	}
	return best;
}
#else
static double peak_gflops(const km_ops *ops)
{
	(void)ops;
	return 0;
}
#endif

/* One case: calls with index 0, 1, ... that differ in what memory they touch. */
typedef struct bench {
	char name[64];
	enum km_op op;
	int variants;
	void (*call)(const struct bench *, const km_ops *, int variant);
	const void *(*args)(const struct bench *, int variant);
	void *data;
} bench;

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static void run_bench(const machine *m, const bench *b)
{
	int runs = b->variants > RUNS ? b->variants : RUNS;
	double *seconds = km_xcalloc((size_t)runs, sizeof(*seconds)), gbs, gflops;
	km_cost cost = km_op_cost(b->op, b->args(b, 0));

	b->call(b, m->ops, b->variants - 1);
	for (int i = 0; i < runs; i++) {
		double start = km_now_s();

		b->call(b, m->ops, i % b->variants);
		seconds[i] = km_now_s() - start;
	}
	qsort(seconds, (size_t)runs, sizeof(*seconds), by_value);
	gbs = cost.bytes / seconds[0] * 1e-9;
	gflops = cost.flops / seconds[0] * 1e-9;
	printf("%-36s %9.1f us (median %9.1f) %7.1f GB/s %4.0f%% %8.1f GFLOP/s", b->name,
	       seconds[0] * 1e6, seconds[runs / 2] * 1e6, gbs, 100 * gbs / m->read_gbs, gflops);
	if (m->peak_gflops > 0)
		printf(" %4.0f%%", 100 * gflops / m->peak_gflops);
	putchar('\n');
	fflush(stdout);
	free(seconds);
}

static bool wanted(const machine *m, const char *name)
{
	return !m->values->only || strstr(name, m->values->only);
}

typedef struct linear_bench {
	km_weight *weights;
	km_linear_args *args;
} linear_bench;

static void call_linear(const bench *b, const km_ops *ops, int variant)
{
	ops->linear(&((linear_bench *)b->data)->args[variant]);
}

static const void *linear_args(const bench *b, int variant)
{
	return &((linear_bench *)b->data)->args[variant];
}

static void bench_linear(const machine *m, const char *what, const weight_case *c)
{
	static const int tokens[] = { 1, 2, 4, 8, 16, 64, 512 };
	linear_bench data;
	bench b = { .op = KM_OP_LINEAR, .call = call_linear, .args = linear_args, .data = &data };
	double bytes = (double)c->rows * c->cols * (c->type == KM_W_INT4 ? 0.56 : 2);
	float *x, *y;

	if (!wanted(m, what))
		return;
	b.variants = (int)fmin(fmax(1, (double)m->values->copies_mib * 1048576 / bytes), 512);
	data.weights = km_xcalloc((size_t)b.variants, sizeof(*data.weights));
	data.args = km_xcalloc((size_t)b.variants, sizeof(*data.args));
	for (int i = 0; i < b.variants; i++)
		data.weights[i] = op_case_weight(c, (uint64_t)i);
	x = op_case_floats((size_t)512 * (size_t)c->cols, 1);
	y = op_case_floats(
		(size_t)512 * (size_t)(c->rows > 10000 ? 1 : c->rows) + (size_t)c->rows * 16, 2);
	for (int t = 0; t < (int)(sizeof(tokens) / sizeof(*tokens)); t++) {
		if (c->rows > 10000 && tokens[t] > 16)
			continue;
		for (int i = 0; i < b.variants; i++)
			data.args[i] =
				(km_linear_args){ tokens[t], x,       c->cols, &data.weights[i],
				                  y,         c->rows, false };
		snprintf(b.name, sizeof(b.name), "linear %s %dx%d, %d row%s", what, c->rows,
		         c->cols, tokens[t], tokens[t] > 1 ? "s" : "");
		run_bench(m, &b);
	}
	for (int i = 0; i < b.variants; i++)
		op_case_weight_release(&data.weights[i]);
	free(data.weights);
	free(data.args);
	free(x);
	free(y);
}

static void bench_linears(const machine *m, const shape *s)
{
	int key = s->nope + s->rope;
	weight_case head = { .type = KM_W_BF16, .rows = s->vocab, .cols = s->hidden };
	weight_case int4 = { .type = KM_W_INT4, .rows = 4096, .cols = s->hidden, .group = 32,
		             .scale_dtype = KM_BF16 };
	weight_case fp8 = { .type = KM_W_FP8, .rows = 4096, .cols = s->hidden, .block_rows = 128,
		            .block_cols = 128, .scale_dtype = KM_F32 };

	bench_linear(m, "q_a bf16", &(weight_case){ KM_W_BF16, s->q_lora, s->hidden, 0, 0, 0, 0 });
	bench_linear(m, "q_b bf16",
	             &(weight_case){ KM_W_BF16, s->heads * key, s->q_lora, 0, 0, 0, 0 });
	bench_linear(m, "kv_a bf16",
	             &(weight_case){ KM_W_BF16, s->lora + s->rope, s->hidden, 0, 0, 0, 0 });
	bench_linear(m, "o bf16",
	             &(weight_case){ KM_W_BF16, s->hidden, s->heads * s->v, 0, 0, 0, 0 });
	bench_linear(m, "router bf16",
	             &(weight_case){ KM_W_BF16, s->experts, s->hidden, 0, 0, 0, 0 });
	bench_linear(m, "f32", &(weight_case){ KM_W_F32, 1024, s->hidden, 0, 0, 0, 0 });
	bench_linear(m, "f16", &(weight_case){ KM_W_F16, 4096, s->hidden, 0, 0, 0, 0 });
	bench_linear(m, "int4", &int4);
	bench_linear(m, "fp8", &fp8);
	bench_linear(m, "head bf16", &head);
}

enum { MOE_VARIANTS = 24 };

static void call_moe(const bench *b, const km_ops *ops, int variant)
{
	ops->moe(&((km_moe_args *)b->data)[variant]);
}

static const void *moe_args(const bench *b, int variant)
{
	return &((km_moe_args *)b->data)[variant];
}

static void random_experts(int32_t *ids, int tokens, int top_k, int experts, uint64_t seed)
{
	for (int t = 0; t < tokens; t++)
		for (int k = 0; k < top_k; k++) {
			bool again = true;

			for (uint64_t try = 0; again; try++) {
				ids[t * top_k + k] =
					(int32_t)(km_rng_u64(seed + try,
				                             (uint64_t)(t * top_k + k)) %
				                  (uint64_t)experts);
				again = false;
				for (int j = 0; j < k; j++)
					again |= ids[t * top_k + j] == ids[t * top_k + k];
			}
		}
}

static void bench_moe(const machine *m, const shape *s)
{
	static const int tokens[] = { 1, 2, 8, 64, 512 };
	weight_case up = { .type = KM_W_INT4,
		           .rows = s->moe_intermediate,
		           .cols = s->hidden,
		           .group = 32,
		           .scale_dtype = KM_BF16 };
	weight_case down = up;
	km_moe_args args[MOE_VARIANTS];
	bench b = { .op = KM_OP_MOE, .variants = MOE_VARIANTS, .call = call_moe, .args = moe_args,
		    .data = args };
	km_weight *weights;

	if (!wanted(m, "moe int4"))
		return;
	down.rows = s->hidden;
	down.cols = s->moe_intermediate;
	weights = km_xcalloc((size_t)s->experts * 3, sizeof(*weights));
	for (int e = 0; e < s->experts * 3; e++)
		weights[e] = op_case_weight(e < s->experts * 2 ? &up : &down, (uint64_t)e);
	for (int i = 0; i < (int)(sizeof(tokens) / sizeof(*tokens)); i++) {
		size_t pairs = (size_t)tokens[i] * (size_t)s->top_k;
		int32_t *ids = km_xcalloc(pairs * MOE_VARIANTS, sizeof(*ids));
		km_moe_args a = {
			.tokens = tokens[i],
			.experts = s->experts,
			.top_k = s->top_k,
			.hidden = s->hidden,
			.intermediate = s->moe_intermediate,
			.gate = weights,
			.up = weights + s->experts,
			.down = weights + s->experts * 2,
			.routed_scale = 1e-3f,
			.x = op_case_floats((size_t)tokens[i] * (size_t)s->hidden, 5),
			.y = op_case_floats((size_t)tokens[i] * (size_t)s->hidden, 6),
			.weights = op_case_floats(pairs, 7),
		};

		a.scratch = aligned_alloc(
			64, km_moe_scratch_bytes(&a, a.tokens, omp_get_max_threads()));
		for (int v = 0; v < MOE_VARIANTS; v++) {
			random_experts(ids + pairs * (size_t)v, a.tokens, a.top_k, a.experts,
			               (uint64_t)v * 1000);
			args[v] = a;
			args[v].ids = ids + pairs * (size_t)v;
		}
		snprintf(b.name, sizeof(b.name), "moe int4 top %d of %d, %d row%s", s->top_k,
		         s->experts, a.tokens, a.tokens > 1 ? "s" : "");
		run_bench(m, &b);
		free((void *)(uintptr_t)a.x);
		free((void *)(uintptr_t)a.weights);
		free(a.y);
		free(a.scratch);
		free(ids);
	}
	for (int e = 0; e < s->experts * 3; e++)
		op_case_weight_release(&weights[e]);
	free(weights);
}

static void call_mla(const bench *b, const km_ops *ops, int variant)
{
	const km_mla_args *a = &((km_mla_args *)b->data)[variant];

	if (b->op == KM_OP_MLA_DECODE)
		ops->mla_decode(a);
	else
		ops->mla_prefill(a);
}

static const void *mla_args(const bench *b, int variant)
{
	return &((km_mla_args *)b->data)[variant];
}

static void bench_mla(const machine *m, const shape *s, int past, int rows, enum km_kv_dtype dtype)
{
	enum { VARIANTS = 4 };
	weight_case kv_b = { .type = KM_W_BF16,
		             .rows = s->heads * (s->nope + s->v),
		             .cols = s->lora };
	bool decode = rows == 1;
	km_mla_args args[VARIANTS];
	km_weight weights[VARIANTS];
	bench b = { .op = decode ? KM_OP_MLA_DECODE : KM_OP_MLA_PREFILL, .variants = VARIANTS,
		    .call = call_mla, .args = mla_args, .data = args };
	size_t size = (size_t)(s->lora + s->rope), out = (size_t)rows * (size_t)(s->heads * s->v);
	step_case step;

	snprintf(b.name, sizeof(b.name), "%s %s cache, %d + %d", km_op_name(b.op),
	         dtype == KM_KV_BF16 ? "bf16" : dtype == KM_KV_FP8 ? "fp8" : "f32", past, rows);
	if (!wanted(m, b.name))
		return;
	op_case_step(&step, 1, decode, &past, &rows, 9);
	for (int v = 0; v < VARIANTS; v++) {
		weights[v] = op_case_weight(&kv_b, (uint64_t)v);
		args[v] = (km_mla_args){
			.batch = &step.batch,
			.heads = s->heads,
			.nope_dim = s->nope,
			.rope_dim = s->rope,
			.v_dim = s->v,
			.kv_lora_rank = s->lora,
			.kv_b = &weights[v],
			.kv_dtype = dtype,
			.cache = op_case_cache(dtype, (size_t)step.slot_count * size, (uint64_t)v),
			.scale = 0.1f,
			.q = op_case_floats((size_t)rows * (size_t)(s->heads * (s->nope + s->rope)),
			                    3),
			.out = op_case_floats(out, 4),
		};
		args[v].scratch =
			aligned_alloc(64, km_mla_scratch_bytes(&args[v], rows, past + rows,
		                                               omp_get_max_threads()));
	}
	run_bench(m, &b);
	for (int v = 0; v < VARIANTS; v++) {
		op_case_weight_release(&weights[v]);
		free((void *)(uintptr_t)args[v].cache);
		free((void *)(uintptr_t)args[v].q);
		free(args[v].out);
		free(args[v].scratch);
	}
	op_case_step_release(&step);
}

static void bench_attention(const machine *m, const shape *s)
{
	static const int contexts[] = { 0, 511, 4095, 32767 };

	for (int i = 0; i < 4; i++)
		for (enum km_kv_dtype d = KM_KV_F32; d <= KM_KV_FP8; d++)
			bench_mla(m, s, contexts[i], 1, d);
	bench_mla(m, s, 0, 512, KM_KV_BF16);
	bench_mla(m, s, 4096, 512, KM_KV_BF16);
}

static void call_small(const bench *b, const km_ops *ops, int variant)
{
	(void)variant;
	if (b->op == KM_OP_RMSNORM)
		ops->rmsnorm(b->data);
	else if (b->op == KM_OP_SILU_MUL)
		ops->silu_mul(b->data);
	else
		ops->gate(b->data);
}

static const void *small_args(const bench *b, int variant)
{
	(void)variant;
	return b->data;
}

static void bench_small(const machine *m, const shape *s, int tokens)
{
	size_t size = (size_t)tokens * (size_t)s->hidden;
	float *x = op_case_floats(size, 1), *y = op_case_floats(size, 2),
	      *z = op_case_floats(size, 3);
	int32_t *ids = km_xcalloc((size_t)tokens * (size_t)s->top_k, sizeof(*ids));
	km_rmsnorm_args norm = { tokens, s->hidden, x, s->hidden, z, y, 1e-6f, y, s->hidden };
	km_silu_mul_args silu = { tokens, s->hidden, x, y, s->hidden, z };
	km_gate_args gate = { .tokens = tokens, .experts = s->experts, .top_k = s->top_k,
		              .renormalize = true, .logits = x, .ids = ids, .weights = y };
	bench b = { .variants = 1, .call = call_small, .args = small_args };
	const struct {
		enum km_op op;
		void *data;
	} ops[] = { { KM_OP_RMSNORM, &norm }, { KM_OP_SILU_MUL, &silu }, { KM_OP_GATE, &gate } };

	for (int i = 0; i < 3; i++) {
		b.op = ops[i].op;
		b.data = ops[i].data;
		snprintf(b.name, sizeof(b.name), "%s, %d row%s", km_op_name(b.op), tokens,
		         tokens > 1 ? "s" : "");
		if (wanted(m, b.name))
			run_bench(m, &b);
	}
	free(x);
	free(y);
	free(z);
	free(ids);
}

int main(int argc, char **argv)
{
	struct values values = { .copies_mib = 256, .shape = "mini" };
	machine m = { .values = &values };
	int operands, rc;
	const shape *s;
	km_err err;

	rc = km_option_parse(&usage, &values, argc, argv, &operands, &err);
	if (rc == KM_OPTION_DONE)
		return 0;
	if (rc < 0 || !(m.ops = km_cpu_ops(values.isa))) {
		fprintf(stderr, "bench_ops: %s\n",
		        rc < 0 ? err.msg : "this machine cannot run that form");
		return 2;
	}
	if (values.threads)
		omp_set_num_threads((int)values.threads);
	s = !strcmp(values.shape, "k2") ? &k2 : &mini;
	m.read_gbs = read_bandwidth();
	m.peak_gflops = peak_gflops(m.ops);
	printf("%s form, %d threads; this machine reads %.1f GB/s and multiplies %.0f GFLOP/s\n",
	       m.ops->name, omp_get_max_threads(), m.read_gbs, m.peak_gflops);
	bench_linears(&m, s);
	bench_moe(&m, s);
	bench_attention(&m, s);
	bench_small(&m, s, 1);
	bench_small(&m, s, 512);
	return 0;
}
