/*
 * The speed of one batch: a prefill of BATCH prompts of INPUT random tokens, then OUTPUT - 1 greedy steps
 * of all of them, as SGLang's bench_one_batch measures it, and where a step's time goes.
 *
 * No scheduler, no tokenizer, no requests: the model alone, one step after the other, on the host's clock.
 * Prefill is cut into steps of `chunk` rows and ends when all first tokens are known; decode latency is the
 * median step. Both are warmed up before. The last prefill step and the last decode step are then
 * profiled by op (model/profile.h).
 */
#ifndef KM_ENGINE_BENCH_ONE_BATCH_H
#define KM_ENGINE_BENCH_ONE_BATCH_H

#include "base/buf.h"
#include "device/roofline.h"
#include "engine/engine.h"
#include "model/profile.h"

typedef struct km_bench_case {
	int batch, input, output;
} km_bench_case;

typedef struct km_bench_options {
	const char *model;   /* a checkpoint folder; with random weights also a config file */
	const char *cases;   /* "BATCH,INPUT,OUTPUT;..." */
	const km_model_random *random; /* NULL: the checkpoint's weights */
	/* Device, cache type, page size, kernels, tables, quiet; what is about requests is not used. */
	const km_engine_options *engine;
	int chunk;           /* prefill rows in a step at most; 0: 8192 */
	bool skip_prefill;   /* decode over random latents */
	const char *commit;  /* of the program, for the report */
} km_bench_options;

typedef struct km_bench_result {
	km_bench_case shape;
	int prefill_steps, decode_steps; /* 0: there was none */
	double prefill_s, decode_s;      /* decode: the median step; total: all of them */
	double total_s;
	km_profile prefill, decode;      /* of the last step of each */
	int prefill_rows, prefill_context, decode_context; /* of those steps */
} km_bench_result;

typedef struct km_bench_report {
	const km_bench_options *options;
	km_roofline roofline;
	char device[320];
	int layers, depth, moe_layers; /* layers of `depth` that the config has */
	double weight_bytes;
	km_buf left_out; /* a slice's exchanges, or empty */
	int count;
	km_bench_result *results; /* owned */
} km_bench_report;

/* KM_EINVAL: the cases are wrong; nothing was opened then. */
int km_bench_parse(const char *cases, km_bench_case **list, int *count, km_err *err);
int km_bench_one_batch(const km_bench_options *options, km_bench_report *report, km_err *err);
void km_bench_report_text(const km_bench_report *report, km_buf *out);
void km_bench_report_json(const km_bench_report *report, km_buf *out);
void km_bench_report_release(km_bench_report *report);

#endif
