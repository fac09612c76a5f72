/*
 * bf16 GEMM with f32 or bf16 output through cuBLASLt, which is opened at run time
 * (libcublasLt.so, of the toolkit's release): the toolkit's static library is 700 MB and not everywhere, and only large
 * token counts want it.
 */
#ifndef KM_DEVICE_CUDA_BLAS_H
#define KM_DEVICE_CUDA_BLAS_H

#include <stdbool.h>

#include "device/cuda.h"

enum { KM_CUDA_BLAS_BYTES = 32 << 20 }; /* of the arena: the library's workspace */

/* Opens the library and takes its workspace; KM_ENOTFOUND says what is missing. Not under capture.
 * */
int km_cuda_blas_open(km_cuda *cuda, km_err *err);

/* y[t, r] = x[t] . w[r] (+ y[t, r] when accumulate), all on the device. */
typedef struct km_cuda_matmul {
	const void *x; /* bf16 [tokens, x_stride], cols used */
	const void *w; /* bf16 [rows, cols] */
	void *y;       /* f32 or bf16 [tokens, y_stride], rows written */
	int tokens, rows, cols, x_stride, y_stride;
	bool y_bf16, accumulate;
} km_cuda_matmul;

/* The algorithm is looked up once for each shape, by the library's own ranking; there is room for
 * KM_CUDA_BLAS_SHAPES of them, so callers round `tokens` up to few values. */
enum { KM_CUDA_BLAS_SHAPES = 1024 };
int km_cuda_blas_matmul(km_cuda *cuda, const km_cuda_matmul *args, km_err *err);

/* x, y packed, y f32. */
int km_cuda_blas_linear(km_cuda *cuda, const void *x, const void *w, float *y, int tokens, int rows,
                        int cols, km_err *err);

#endif
