/*
 * A test program's GPU, and memory on it that begins as poison. What fails ends the test with a sentence.
 * For programs of one file, behind cmocka.h: `gpu` is opened by its main.
 */
#ifndef TESTS_ON_GPU_H
#define TESTS_ON_GPU_H

#include "device/cuda.h"

enum { POISON = 0xff };

static km_cuda *gpu;
static km_err err;

static inline void must(int rc)
{
	if (rc < 0)
		fail_msg("%s", err.msg);
}

/* Of the GPU's arena: km_cuda_mark and km_cuda_rewind give it back. */
static inline void *take(size_t bytes)
{
	void *p = NULL;

	must(km_cuda_take(gpu, &p, bytes, "test", &err));
	must(km_cuda_fill(gpu, p, POISON, bytes, &err));
	return p;
}

static inline void *take_copy(const void *from, size_t bytes)
{
	void *p = take(bytes);

	must(km_cuda_upload(gpu, p, from, bytes, &err));
	return p;
}

#endif
