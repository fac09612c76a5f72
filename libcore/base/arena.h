/*
 * A bump allocator for one lifetime (a request, a step, a parsed file).
 *
 * Memory is dropped all at once: km_arena_reset keeps the blocks for the next round,
 * km_arena_release gives them back. Allocations are 16-byte aligned and not cleared. One thread at
 * a time.
 */
#ifndef KM_BASE_ARENA_H
#define KM_BASE_ARENA_H

#include <stddef.h>

typedef struct km_arena {
	struct km_arena_block *head; /* newest block first */
	size_t used;                 /* bytes taken from the newest block */
	size_t block_bytes;          /* size of the next block */
} km_arena;

void km_arena_init(km_arena *arena, size_t block_bytes);
void km_arena_release(km_arena *arena);
void km_arena_reset(km_arena *arena);

void *km_arena_alloc(km_arena *arena, size_t bytes);
void *km_arena_calloc(km_arena *arena, size_t count, size_t bytes);
char *km_arena_strndup(km_arena *arena, const char *s, size_t n);

#endif
