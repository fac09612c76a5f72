/*
 * Which steps on a GPU are replayed from graphs, and those graphs: one door for all of them.
 *
 * The blocks (forward_cuda.c) say what a step enqueues; this says of how many rows it is made up,
 * padding included, and whether that is launched kernel by kernel, captured, or replayed. A step has the
 * same rows with graphs and without, so it has the same numbers.
 *
 * Private to model/. A failure is the device's; the step is lost with it.
 */
#ifndef KM_MODEL_GPU_GRAPHS_H
#define KM_MODEL_GPU_GRAPHS_H

#include "device/cuda.h"
#include "model/forward.h"

enum { KM_GPU_FORMS = 128, KM_GPU_BUCKETS = 12 };

/* A number of rows and of cached tokens that steps which only generate are padded to. */
typedef struct km_gpu_form {
	int rows, longest, page_size;
	bool seen;            /* a step of it was launched */
	km_cuda_graph *graph; /* owned; NULL before the second step */
} km_gpu_form;

/* A number of rows that steps with prompts are padded to. */
typedef struct km_gpu_bucket {
	int rows;
	bool seen;             /* a step of it was launched */
	int pieces;            /* as many as layers */
	km_cuda_graph **piece; /* owned; each NULL before the second step */
} km_gpu_bucket;

typedef struct km_gpu_graphs {
	int forms, buckets;
	km_gpu_form form[KM_GPU_FORMS];
	km_gpu_bucket bucket[KM_GPU_BUCKETS];
	int64_t replays, piecewise; /* steps: replayed whole, and in pieces */
	int captured;               /* at open */
	size_t bytes;               /* of device memory that these took */
	double seconds;
} km_gpu_graphs;

/*
 * What a step enqueues. Pieces are counted from 0 to layers - 1, each followed by what is between it
 * and the next, or ends the step; all of them, in this order, are what km_run_steps enqueues.
 */
typedef struct km_gpu_blocks {
	/* Sends a step of `rows` rows, all of them padding, of g->longest cached tokens if it generates. */
	int (*send_padding)(km_model *m, int rows, bool generates, km_err *err);
	/* Depends on the number of rows alone. */
	int (*piece)(km_model *m, int at, km_err *err);
	/* Depends on the step. */
	int (*between)(km_model *m, int at, km_err *err);
} km_gpu_blocks;

/* Rows of a step that only generates. */
int km_gpu_form_rows(int rows);
/* Cached tokens that it is planned for. */
int km_gpu_form_length(const km_model *m, int longest);
/* Rows of any other step; 0: it is of too many to be padded. */
int km_gpu_bucket_rows(const km_model *m, int rows);

/* The graphs of usual steps, with a progress bar. */
int km_gpu_graphs_prepare(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run, km_err *err);
/* Enqueues the step m->gpu->step, which has been sent. */
int km_gpu_graphs_run(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run, km_err *err);
void km_gpu_graphs_release(km_gpu_graphs *graphs);
void km_gpu_graphs_explain(const km_model *m, km_buf *out);

#endif
