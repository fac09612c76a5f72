/*
 * bench_model DIR: speed of a checkpoint on this machine's CPU.
 *
 * Decode: one sequence, greedy; bytes touched are the ops' own costs (each weight read once, the
 * cache once), shown as a share of the read bandwidth measured here with the same threads. Prefill:
 * one chunk of random tokens. All three are taken in every run and the best of each counts: on a
 * shared machine a bandwidth from another minute means nothing. --ops adds the time by op.
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
#include "model/model.h"

enum { PAGE = 16 };

struct values {
	int64_t threads, prefill, decode, runs;
	const char *isa, *kv;
	bool ops, explain;
};

static const km_option table[] = {
	{ .kind = KM_OPT_INT, .names = "threads,t", .arg = "N",
	  .offset = offsetof(struct values, threads), .help = "threads; 0: all", .max = 4096 },
	{ .kind = KM_OPT_INT, .names = "prefill", .arg = "N",
	  .offset = offsetof(struct values, prefill), .help = "prompt tokens (512)", .min = 1,
	  .max = 65536 },
	{ .kind = KM_OPT_INT, .names = "decode", .arg = "N",
	  .offset = offsetof(struct values, decode), .help = "generated tokens a run (32)",
	  .min = 1, .max = 65536 },
	{ .kind = KM_OPT_INT, .names = "runs", .arg = "N", .offset = offsetof(struct values, runs),
	  .help = "runs, of which the best counts (3)", .min = 1, .max = 1000 },
	{ .kind = KM_OPT_STRING, .names = "isa", .arg = "NAME",
	  .offset = offsetof(struct values, isa), .help = "kernels (the best)" },
	{ .kind = KM_OPT_CHOICE, .names = "kv", .arg = "TYPE",
	  .offset = offsetof(struct values, kv), .choices = "f32|bf16|fp8",
	  .help = "KV cache (bf16)" },
	{ .kind = KM_OPT_FLAG, .names = "ops", .offset = offsetof(struct values, ops),
	  .help = "time by op" },
	{ .kind = KM_OPT_FLAG, .names = "explain", .offset = offsetof(struct values, explain),
	  .help = "kernel choices" },
};

static const km_usage usage = { "bench_model", "[OPTION]... DIR", "decode and prefill speed", table,
	                        sizeof(table) / sizeof(*table), 1 };

/* GB/s of reading memory once, with `threads` threads: the best of two passes over 1 GiB. */
static double read_bandwidth(int threads)
{
	enum { WORDS = 1 << 27 };
	uint64_t *data = km_xmalloc((size_t)WORDS * 8), sink = 0;
	double best = 0;

#pragma omp parallel for num_threads(threads) schedule(static)
	for (int i = 0; i < WORDS; i++)
		data[i] = (uint64_t)i;
	for (int pass = 0; pass < 2; pass++) {
		double start = km_now_s(), rate;
		uint64_t sum = 0;

#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : sum)
		for (int i = 0; i < WORDS; i++)
			sum ^= data[i];
		sink ^= sum;
		rate = (double)WORDS * 8e-9 / (km_now_s() - start);
		best = rate > best ? rate : best;
	}
	free(data);
	return sink == 1 ? best + 1e-9 : best; /* the sums are used */
}

/* One sequence in pages 0, 1, 2...: rows [done, done + rows) of `ids`, logits of the last. */
struct run {
	km_model *model;
	int32_t *ids, *positions, *pages;
	int done;
};

static const float *step(struct run *r, int rows, bool decode)
{
	int32_t start[] = { 0, rows }, len = r->done + rows, last = rows - 1;
	const float *logits = NULL;
	km_batch batch = {
		.tokens = rows,
		.seqs = 1,
		.decode_seqs = decode,
		.ids = r->ids + r->done,
		.positions = r->positions + r->done,
		.slots = r->positions + r->done,
		.seq_start = start,
		.kv_len = &len,
		.pages = r->pages,
		.pages_per_seq = 65536 * 2 / PAGE,
		.page_size = PAGE,
		.logit_row = &last,
		.logit_rows = 1,
	};
	km_err err;

	if (km_model_forward(r->model, &batch, &logits, &err) < 0) {
		fprintf(stderr, "bench_model: %s\n", err.msg);
		exit(1);
	}
	r->done += rows;
	return logits;
}

static int best_token(const float *logits, int vocab)
{
	int best = 0;

	for (int i = 1; i < vocab; i++)
		if (logits[i] > logits[best])
			best = i;
	return best;
}

struct speed {
	double seconds, bytes, flops;
	km_model_trace trace;
};

static void finish(struct speed *best, const km_model_trace *trace, double seconds)
{
	if (best->seconds && seconds >= best->seconds)
		return;
	*best = (struct speed){ .seconds = seconds, .trace = *trace };
	for (int i = 0; i < KM_STEP_COUNT; i++) {
		best->bytes += trace->op[i].bytes;
		best->flops += trace->op[i].flops;
	}
}

/* Returns the read bandwidth. */
static double measure(struct run *r, const struct values *v, struct speed *prefill,
                      struct speed *decode)
{
	int vocab = km_model_config(r->model)->vocab_size;
	int threads = v->threads ? (int)v->threads : omp_get_num_procs();
	double bandwidth = 0;

	for (int64_t n = 0; n <= v->runs; n++) { /* the first only warms up */
		km_model_trace trace = { 0 };
		const float *logits;
		double start;

		r->done = 0;
		for (int i = 0; i < v->prefill; i++)
			r->ids[i] =
				(int32_t)(km_rng_u64((uint64_t)n, (uint64_t)i) % (uint64_t)vocab);
		km_model_set_trace(r->model, &trace);
		start = km_now_s();
		logits = step(r, (int)v->prefill, false);
		if (n)
			finish(prefill, &trace, km_now_s() - start);
		memset(&trace, 0, sizeof(trace));
		start = km_now_s();
		for (int i = 0; i < v->decode; i++) {
			r->ids[r->done] = best_token(logits, vocab);
			logits = step(r, 1, true);
		}
		if (n)
			finish(decode, &trace, km_now_s() - start);
		bandwidth = fmax(bandwidth, read_bandwidth(threads));
	}
	return bandwidth;
}

static void show_ops(const char *what, const struct speed *s, double tokens)
{
	printf("%s, by op:\n%-14s %9s %7s %9s %9s %9s\n", what, "op", "us/token", "share", "calls",
	       "GB/s", "GFLOP/s");
	for (int i = 0; i < KM_STEP_COUNT; i++) {
		const struct km_op_total *t = &s->trace.op[i];

		if (t->calls)
			printf("%-14s %9.1f %6.1f%% %9lld %9.2f %9.2f\n", km_step_op_name((enum km_step_op)i),
			       (double)t->ns * 1e-3 / tokens, (double)t->ns * 1e-7 / s->seconds,
			       (long long)t->calls, t->bytes / (double)t->ns,
			       t->flops / (double)t->ns);
	}
}

static void show(const struct values *v, double bandwidth, const struct speed *prefill,
                 const struct speed *decode)
{
	double p = (double)v->prefill, d = (double)v->decode;
	double rate = decode->bytes * 1e-9 / decode->seconds;

	printf("figure: read bandwidth %.1f GB/s\n", bandwidth);
	printf("figure: decode %.2f tokens/s at context %lld: %.1f MB a token, %.1f GB/s, %.0f%% "
	       "of bandwidth\n",
	       d / decode->seconds, (long long)v->prefill, decode->bytes * 1e-6 / d, rate,
	       100 * rate / bandwidth);
	printf("figure: prefill of %lld tokens %.2f tokens/s, %.1f GFLOP/s, %.1f times decode\n",
	       (long long)v->prefill, p / prefill->seconds,
	       prefill->flops * 1e-9 / prefill->seconds,
	       p / prefill->seconds / (d / decode->seconds));
	if (v->ops) {
		show_ops("prefill", prefill, p);
		show_ops("decode", decode, d);
	}
}

static int open_model(struct run *r, const char *dir, const struct values *v, km_err *err)
{
	enum km_kv_dtype kv = !strcmp(v->kv, "f32")   ? KM_KV_F32
	                      : !strcmp(v->kv, "fp8") ? KM_KV_FP8
	                                              : KM_KV_BF16;
	int context = (int)((v->prefill + v->decode + PAGE - 1) / PAGE * PAGE);
	km_model_options options = {
		.max_batch_tokens = (int)v->prefill,
		.max_seqs = 1,
		.max_logit_rows = 1,
		.max_context = context,
		.kv_slots = context,
		.kv_dtype = kv,
		.threads = (int)v->threads,
		.isa = v->isa,
	};

	r->ids = km_xcalloc((size_t)context, sizeof(int32_t));
	r->positions = km_xcalloc((size_t)context, sizeof(int32_t));
	r->pages = km_xcalloc((size_t)context, sizeof(int32_t));
	for (int i = 0; i < context; i++)
		r->positions[i] = r->pages[i] = i;
	return km_model_open(&r->model, dir, &options, err);
}

int main(int argc, char **argv)
{
	struct values v = { .prefill = 512, .decode = 32, .runs = 3, .kv = "bf16" };
	struct speed prefill = { 0 }, decode = { 0 };
	struct run r = { 0 };
	double bandwidth;
	int operands, rc;
	km_err err;

	rc = km_option_parse(&usage, &v, argc, argv, &operands, &err);
	if (rc == KM_OPTION_DONE)
		return 0;
	if (rc < 0 || operands != 1) {
		fprintf(stderr, "bench_model: %s\n",
		        rc < 0 ? err.msg : "one checkpoint folder is wanted");
		return 2;
	}
	if (open_model(&r, argv[1], &v, &err) < 0) {
		fprintf(stderr, "bench_model: %s\n", err.msg);
		return 1;
	}
	if (v.explain) {
		km_buf out = KM_BUF_INIT;

		km_model_explain(r.model, &out);
		fputs(out.data, stdout);
		km_buf_release(&out);
	}
	bandwidth = measure(&r, &v, &prefill, &decode);
	show(&v, bandwidth, &prefill, &decode);
	km_model_close(r.model);
	free(r.ids);
	free(r.positions);
	free(r.pages);
	return 0;
}
