/*
 * The engine's speed over a checkpoint folder: prompt and generated tokens per second for a number
 * of streams at once, and how much of a decode step is not the model's.
 *
 *     bench_engine DIR [STREAMS [PROMPT_TOKENS [TOKENS [THREADS]]]]
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "engine/engine_state.h"
#include "support/engine_client.h"

typedef struct timing {
	double start, first, last; /* of stream 0's events */
	km_engine *engine;
} timing;

typedef struct bench_stream {
	timing *timing;
	int index, live_tokens;
	atomic_int over;
} bench_stream;

static void on_event(void *ctx, const km_event *event)
{
	bench_stream *s = ctx;
	double now = km_now_s();

	if (event->id >= 0 && s->live_tokens++ == 0 && s->timing->first < now)
		s->timing->first = now; /* the last stream's first token: from here on all decode */
	s->timing->last = now;
	if (event->finish != KM_FINISH_NONE)
		atomic_store(&s->over, 1);
}

static int number(int argc, char **argv, int at, int otherwise)
{
	return argc > at ? (int)strtol(argv[at], NULL, 10) : otherwise;
}

int main(int argc, char **argv)
{
	int streams = number(argc, argv, 2, 1), prompt_len = number(argc, argv, 3, 512);
	int tokens = number(argc, argv, 4, 64);
	km_engine_options options;
	km_request_options request;
	km_model_trace trace = { 0 };
	km_request **requests;
	bench_stream *all;
	km_engine *engine;
	timing t = { 0 };
	double model = 0, total;
	int32_t *prompt;
	km_err err;

	if (argc < 2) {
		fprintf(stderr,
		        "usage: bench_engine DIR [STREAMS [PROMPT_TOKENS [TOKENS [THREADS]]]]\n");
		return 2;
	}
	km_engine_options_init(&options);
	options.model_dir = argv[1];
	options.max_running_requests = streams;
	options.context_length = prompt_len + tokens;
	options.max_total_tokens = (int64_t)streams * (prompt_len + tokens + 16);
	options.threads = number(argc, argv, 5, 0);
	if (km_engine_open(&engine, &options, &err) < 0) {
		fprintf(stderr, "bench_engine: %s\n", err.msg);
		return 1;
	}
	all = km_xcalloc((size_t)streams, sizeof(*all));
	requests = km_xcalloc((size_t)streams, sizeof(*requests));
	prompt = km_xcalloc((size_t)prompt_len, sizeof(*prompt));
	for (int round = 0; round < 2; round++) { /* the first warms the page cache */
		t = (timing){ .start = km_now_s(), .engine = engine };
		trace = (km_model_trace){ 0 };
		km_model_set_trace(engine->model, &trace);
		for (int i = 0; i < streams; i++) {
			for (int j = 0; j < prompt_len; j++)
				prompt[j] = (int32_t)(km_rng_u64((uint64_t)(round * 1000 + i),
				                                 (uint64_t)j) %
				                      (uint64_t)(engine->backend.added_from - 1));
			client_options(&request, prompt, prompt_len);
			request.max_tokens = tokens;
			request.ignore_eos = true;
			request.sampling.top_p = 0.95;
			request.on_event = on_event;
			all[i] = (bench_stream){ .timing = &t, .index = i };
			request.ctx = &all[i];
			if (km_engine_submit(engine, &request, &requests[i], &err) < 0) {
				fprintf(stderr, "bench_engine: %s\n", err.msg);
				return 1;
			}
		}
		for (int i = 0; i < streams; i++) {
			while (!atomic_load(&all[i].over))
				nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
			km_request_free(requests[i]);
		}
	}
	for (int i = 0; i < KM_STEP_COUNT; i++)
		model += (double)trace.op[i].ns * 1e-9;
	total = t.last - t.start;
	printf("%d streams, %d prompt tokens, %d tokens each\n", streams, prompt_len, tokens);
	printf("  until all have a token  %8.3f s, %9.1f prompt tokens/s\n", t.first - t.start,
	       (double)streams * prompt_len / (t.first - t.start));
	if (tokens > 1)
		printf("  from there              %8.3f s, %9.1f tokens/s\n", t.last - t.first,
		       (double)streams * (tokens - 1) / (t.last - t.first));
	printf("  in the model's ops      %8.3f s of %.3f s: %.1f %% elsewhere\n", model, total,
	       100 * (1 - model / total));
	km_engine_close(engine);
	free(all);
	free(requests);
	free(prompt);
	return 0;
}
