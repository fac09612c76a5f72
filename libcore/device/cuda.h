/*
 * One GPU: discovery, a stream, a planned arena, transfers, graphs, timing.
 *
 * km_cuda_open takes all of the device memory that will be used, once; pieces are handed out from
 * it and never returned but by rewinding to a mark. Work is enqueued on the one stream and awaited
 * only by km_cuda_wait, the downloads and the timers. Between capture_begin and capture_end
 * enqueued work is recorded instead of run; nothing may be awaited then. A CUDA error is KM_EDEVICE
 * and sticky: close; no memory is KM_ENOMEM, and passes. One thread at a time.
 *
 * A build without CUDA, and one with it on a machine that has no GPU, have km_cuda_count say 0 and
 * why.
 */
#ifndef KM_DEVICE_CUDA_H
#define KM_DEVICE_CUDA_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

typedef struct km_cuda km_cuda;
typedef struct km_cuda_graph km_cuda_graph;
typedef struct km_cuda_fence km_cuda_fence;

typedef struct km_cuda_info {
	char name[256];     /* "NVIDIA H100 80GB HBM3" */
	char toolkit[64];   /* "CUDA 13.0, driver 13.0" */
	int runtime;        /* 13000: the toolkit that this program was built with */
	int capability;     /* 90 */
	int multiprocessors;
	size_t l2_bytes, memory_bytes;
	double memory_gbps; /* by the memory's clock and width; 0: not known */
} km_cuda_info;

/* How many GPUs there are; with 0, err says why. */
#if KM_CUDA
int km_cuda_count(km_err *err);
int km_cuda_describe(int device, km_cuda_info *info, km_err *err);
/* Device memory that could be taken now. */
int km_cuda_free_bytes(int device, size_t *bytes, km_err *err);
#else
static inline int km_cuda_count(km_err *err)
{
	km_fail(err, KM_EUNSUPPORTED, "this build has no CUDA (it was made with CUDA=0 or without nvcc)");
	return 0;
}

static inline int km_cuda_describe(int device, km_cuda_info *info, km_err *err)
{
	(void)device, (void)info;
	return km_fail(err, KM_EUNSUPPORTED, "this build has no CUDA");
}

static inline int km_cuda_free_bytes(int device, size_t *bytes, km_err *err)
{
	(void)device, (void)bytes;
	return km_fail(err, KM_EUNSUPPORTED, "this build has no CUDA");
}
#endif

int km_cuda_open(km_cuda **cuda, int device, size_t arena_bytes, km_err *err);
void km_cuda_close(km_cuda *cuda);
const km_cuda_info *km_cuda_info_of(const km_cuda *cuda);

/* A 256-byte aligned piece of the arena, not cleared; KM_ENOMEM names `what` when it does not fit.
 * */
int km_cuda_take(km_cuda *cuda, void **piece, size_t bytes, const char *what, km_err *err);
size_t km_cuda_mark(const km_cuda *cuda);
void km_cuda_rewind(km_cuda *cuda, size_t mark);

int km_cuda_upload(km_cuda *cuda, void *to, const void *from, size_t bytes, km_err *err);
int km_cuda_download(km_cuda *cuda, void *to, const void *from, size_t bytes, km_err *err);
int km_cuda_copy(km_cuda *cuda, void *to, const void *from, size_t bytes, km_err *err);
int km_cuda_fill(km_cuda *cuda, void *to, unsigned char value, size_t bytes, km_err *err);
int km_cuda_wait(km_cuda *cuda, km_err *err);

/* Host memory that the GPU reads and writes itself, and transfers that are only enqueued; the
 * host's side is such memory, left alone until km_cuda_wait. */
int km_cuda_pin(km_cuda *cuda, void **host, size_t bytes, km_err *err);
void km_cuda_unpin(km_cuda *cuda, void *host);
int km_cuda_send(km_cuda *cuda, void *to, const void *from, size_t bytes, km_err *err);
int km_cuda_fetch(km_cuda *cuda, void *to, const void *from, size_t bytes, km_err *err);

int km_cuda_capture_begin(km_cuda *cuda, km_err *err);
int km_cuda_capture_end(km_cuda *cuda, km_cuda_graph **graph, km_err *err);
int km_cuda_graph_launch(km_cuda *cuda, km_cuda_graph *graph, km_err *err);
int km_cuda_graph_launches(const km_cuda_graph *graph); /* kernels, copies, fills */
void km_cuda_graph_free(km_cuda_graph *graph);

/* A point in what was enqueued, to be waited for while later work goes on. */
int km_cuda_fence_open(km_cuda *cuda, km_cuda_fence **fence, km_err *err);
int km_cuda_fence_set(km_cuda *cuda, km_cuda_fence *fence, km_err *err);
int km_cuda_fence_wait(km_cuda_fence *fence, km_err *err);
void km_cuda_fence_close(km_cuda_fence *fence);

/* Device time between the two calls, which enqueue; time_end waits. */
int km_cuda_time_begin(km_cuda *cuda, km_err *err);
int km_cuda_time_end(km_cuda *cuda, double *us, km_err *err);

#endif
