/* Tokens from rows of logits, on the GPU (device/draw.h): enqueued on its stream, which may be
 * captured. All pointers are device memory. */
#ifndef KM_DEVICE_CUDA_SAMPLER_H
#define KM_DEVICE_CUDA_SAMPLER_H

#include "device/cuda.h"
#include "device/draw.h"

typedef struct km_cuda_sampling {
	float *logits;                /* [rows, vocab]; biases and penalties are added in place */
	const km_draw *draw;          /* [rows] */
	const km_draw_entry *entries; /* of all rows */
	int32_t *drawn;               /* [rows]: a token, or KM_DRAWN_BY_HOST */
	int rows, vocab;              /* vocab at most KM_DRAW_VOCAB */
} km_cuda_sampling;

/* ids[i] = drawn[from[i]], or 0 where that row was refused. */
int km_cuda_next_ids(km_cuda *cuda, const int32_t *from, const int32_t *drawn, int32_t *ids,
                     int count, km_err *err);
int km_cuda_sample(km_cuda *cuda, const km_cuda_sampling *args, km_err *err);

#endif
