/*
 * A device's rates, for libcore/device/roofline.c: reading 2 and 6 GiB by 1 to 8 blocks a multiprocessor, and
 * bf16 products of 8192 x 8192 x 8192 by cuBLASLt, in bursts of ten with half a second between them. Medians of
 * five, by events. What was read is added up, and must be what was written.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_blas.h"
#include "device/cuda_state.h"
#include "device/roofline.h"
#include "format/dtype.h"
#include "read.h"

enum { REPEATS = 5, BURST = 10, SIDE = 8192, BLOCK_WORDS = 1 << 20 };

static const size_t MOST_BYTES = (size_t)6 << 30, MATRIX_BYTES = (size_t)SIDE * SIDE * 2;

static km_cuda *gpu;
static km_err err;

static void must(int rc)
{
	if (rc < 0) {
		fprintf(stderr, "bench_gpu_roofline: %s\n", err.msg);
		exit(1);
	}
}

static void *take(size_t bytes)
{
	void *p = NULL;

	must(km_cuda_take(gpu, &p, bytes, "benchmark", &err));
	return p;
}

/* A block of words over and over; returns the sum of one. */
static uint32_t fill(char *to, size_t bytes, const uint32_t *block)
{
	size_t size = (size_t)BLOCK_WORDS * sizeof(*block);
	uint32_t sum = 0;

	for (int i = 0; i < BLOCK_WORDS; i++)
		sum += block[i];
	must(km_cuda_upload(gpu, to, block, size, &err));
	for (size_t at = size; at < bytes; at += size)
		must(km_cuda_copy(gpu, to + at, to, size, &err));
	must(km_cuda_wait(gpu, &err));
	return sum;
}

static int by_size(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *us)
{
	qsort(us, REPEATS, sizeof(*us), by_size);
	return us[REPEATS / 2];
}

/* GB/s. */
static double read_rate(kk_read_args a, uint32_t expected)
{
	double us[REPEATS];

	for (int i = -1; i < REPEATS; i++) {
		uint32_t sum = 0;
		double took;

		must(km_cuda_fill(gpu, a.sum, 0, sizeof(sum), &err));
		must(km_cuda_time_begin(gpu, &err));
		if (kk_read(&a, gpu->stream) != cudaSuccess)
			must(km_fail(&err, KM_EDEVICE, "the kernel that reads was not launched"));
		must(km_cuda_time_end(gpu, &took, &err));
		must(km_cuda_download(gpu, &sum, a.sum, sizeof(sum), &err));
		if (sum != expected)
			must(km_fail(&err, KM_EDEVICE, "%zu bytes add up to %u, not %u", a.bytes, sum, expected));
		if (i >= 0)
			us[i] = took;
	}
	return (double)a.bytes / median(us) * 1e-3;
}

static double bench_reading(void)
{
	uint32_t *block = km_xmalloc((size_t)BLOCK_WORDS * sizeof(*block)), sum;
	size_t mark = km_cuda_mark(gpu);
	kk_read_args a = { .data = take(MOST_BYTES), .sum = take(sizeof(uint32_t)) };
	double best = 0;

	for (int i = 0; i < BLOCK_WORDS; i++)
		block[i] = (uint32_t)km_rng_u64(3, (uint64_t)i);
	sum = fill((char *)(uintptr_t)a.data, MOST_BYTES, block);
	for (a.bytes = (size_t)2 << 30; a.bytes <= MOST_BYTES; a.bytes *= 3)
		for (int blocks = 1; blocks <= 8; blocks *= 2) {
			double rate;

			a.blocks = blocks * gpu->info.multiprocessors;
			rate = read_rate(a, sum * (uint32_t)(a.bytes / BLOCK_WORDS / sizeof(*block)));
			best = rate > best ? rate : best;
			printf("reading %zu GiB, %d blocks a multiprocessor: %.0f GB/s\n", a.bytes >> 30, blocks,
			       rate);
			fflush(stdout);
		}
	free(block);
	km_cuda_rewind(gpu, mark);
	return best;
}

/* TFLOP/s. */
static double bench_products(void)
{
	uint16_t *block = km_xmalloc((size_t)BLOCK_WORDS * 4);
	void *x = take(MATRIX_BYTES), *w = take(MATRIX_BYTES);
	km_cuda_matmul a = { .x = x, .w = w, .y = take(MATRIX_BYTES), .tokens = SIDE, .rows = SIDE, .cols = SIDE,
		             .x_stride = SIDE, .y_stride = SIDE, .y_bf16 = true };
	const struct timespec pause = { .tv_nsec = 500000000 };
	double us[REPEATS];

	for (int i = 0; i < BLOCK_WORDS * 2; i++)
		block[i] = km_f32_to_bf16(km_rng_normal(4, (uint64_t)i));
	fill(x, MATRIX_BYTES, (const uint32_t *)(const void *)block);
	fill(w, MATRIX_BYTES, (const uint32_t *)(const void *)block);
	for (int i = -1; i < REPEATS; i++) {
		double took;

		must(km_cuda_time_begin(gpu, &err));
		for (int k = 0; k < BURST; k++)
			must(km_cuda_blas_matmul(gpu, &a, &err));
		must(km_cuda_time_end(gpu, &took, &err));
		if (i >= 0)
			us[i] = took;
		nanosleep(&pause, NULL);
	}
	free(block);
	return 2.0 * SIDE * SIDE * SIDE * BURST / median(us) * 1e-6;
}

int main(void)
{
	km_buf now = KM_BUF_INIT;
	km_roofline r;
	double gbps;

	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	must(km_cuda_open(&gpu, 0, MOST_BYTES + KM_CUDA_BLAS_BYTES + ((size_t)1 << 20), &err));
	km_roofline_of_gpu(&gpu->info, &r);
	km_roofline_describe(&r, &now);
	printf("# %s, %s; in use: %s\n", gpu->info.name, gpu->info.toolkit, now.data);
	gbps = bench_reading();
	must(km_cuda_blas_open(gpu, &err));
	printf("bf16 products of %d^3: %.0f TFLOP/s\nreading, the best: %.0f GB/s\n", SIDE, bench_products(), gbps);
	km_buf_release(&now);
	km_cuda_close(gpu);
	return 0;
}
