/*
 * Counts this program's allocations: malloc and its kin are libc's with a counter before them.
 * Included by one file of a test program. Under a sanitizer, which has a malloc of its own, nothing
 * is counted and COUNTS_MALLOC is 0.
 */
#ifndef TESTS_COUNT_MALLOC_H
#define TESTS_COUNT_MALLOC_H

#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTS_MALLOC 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define COUNTS_MALLOC 0
#endif
#endif
#ifndef COUNTS_MALLOC
#define COUNTS_MALLOC 1
#endif

static atomic_long allocations;

#if COUNTS_MALLOC
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *p, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);

void *malloc(size_t bytes)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_malloc(bytes);
}

void *calloc(size_t count, size_t bytes)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_calloc(count, bytes);
}

void *realloc(void *p, size_t bytes)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_realloc(p, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_memalign(alignment, bytes);
}

void *memalign(size_t alignment, size_t bytes) /* libgomp makes its teams with this */
{
	return aligned_alloc(alignment, bytes);
}

int posix_memalign(void **p, size_t alignment, size_t bytes)
{
	*p = aligned_alloc(alignment, bytes);
	return *p ? 0 : ENOMEM;
}
#endif

/* LLVM's OpenMP runtime allocates in every parallel region, whatever is in it; GNU's does not. */
static bool openmp_allocates(void)
{
	long before = 0;

	for (int i = 0; i < 10; i++) {
		if (i == 5)
			before = atomic_load(&allocations);
#pragma omp parallel for num_threads(2)
		for (int j = 0; j < 2; j++)
			atomic_signal_fence(memory_order_seq_cst);
	}
	return atomic_load(&allocations) != before;
}

/* Can a program's own allocations be told from others? Says why not. */
static bool can_count_allocations(void)
{
	if (!COUNTS_MALLOC)
		printf("skip: allocations are not counted under a sanitizer\n");
	else if (openmp_allocates())
		printf("skip: this OpenMP runtime allocates in every parallel region\n");
	else
		return true;
	return false;
}

#endif
