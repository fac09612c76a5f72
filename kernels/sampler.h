/*
 * Launcher of the sampler: a row of logits to a token (device/draw.h). Pointers are device memory;
 * the call may be captured.
 */
#ifndef KK_SAMPLER_H
#define KK_SAMPLER_H

#include <cuda_runtime_api.h>
#include <stdbool.h>

#include "device/draw.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kk_sample_args {
	float *logits;                /* [rows, vocab]; biases and penalties are added in place */
	const km_draw *draw;          /* [rows] */
	const km_draw_entry *entries; /* of all rows */
	int32_t *drawn;               /* [rows]: a token, or KM_DRAWN_BY_HOST */
	int rows, vocab;
	int shared_rows;              /* up to this many rows, several blocks of threads share one */
	bool pdl;
} kk_sample_args;

/* cudaErrorInvalidValue: vocab above KM_DRAW_VOCAB. */
cudaError_t kk_sample(const kk_sample_args *args, cudaStream_t stream);

/* ids[i] = drawn[from[i]], or 0 where that row was refused. */
cudaError_t kk_next_ids(const int32_t *from, const int32_t *drawn, int32_t *ids, int count,
                        cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
