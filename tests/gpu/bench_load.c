/*
 * What a load could reach: host memory to the GPU, and a file to pinned memory, by copying from a
 * map and by reading, with several numbers of threads.
 *
 *   bench_load [FILE]   without a file: one of 1 GB, made for it, in the page cache
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"
#include "device/cuda.h"
#include "support/fake_checkpoint.h"

enum { SLOT = 32 << 20, SLOTS = 4 };

static km_err err;
static char *slot[SLOTS];

static void must(int rc)
{
	if (rc < 0) {
		fprintf(stderr, "%s\n", err.msg);
		exit(1);
	}
}

static void to_device(km_cuda *gpu, void *there)
{
	enum { TIMES = 128 };
	double us;

	for (int i = 0; i < SLOTS; i++)
		memset(slot[i], i, SLOT);
	must(km_cuda_time_begin(gpu, &err));
	for (int i = 0; i < TIMES; i++)
		must(km_cuda_send(gpu, there, slot[i % SLOTS], SLOT, &err));
	must(km_cuda_time_end(gpu, &us, &err));
	printf("figure: pinned memory to the GPU: %.1f GB/s\n", (double)TIMES * SLOT / us / 1e3);
}

typedef struct source {
	int fd;
	const char *map;
	size_t size;
} source;

static void copy_slot(const source *s, size_t at, char *to, int threads, bool read)
{
	size_t each = SLOT / (size_t)threads;

#pragma omp parallel for num_threads(threads) schedule(static, 1)
	for (int i = 0; i < threads; i++) {
		size_t from = at + (size_t)i * each;

		if (!read)
			memcpy(to + (size_t)i * each, s->map + from, each);
		else if (pread(s->fd, to + (size_t)i * each, each, (off_t)from) != (ssize_t)each)
			perror("pread");
	}
}

/* One way through 4 GB of the file (all of a smaller one). */
static void time_source(const source *s, int threads, bool read)
{
	size_t most = s->size / SLOT < 128 ? s->size / SLOT : 128;
	double start = km_now_s();

	for (size_t i = 0; i < most; i++)
		copy_slot(s, i * SLOT, slot[i % SLOTS], threads, read);
	start = km_now_s() - start;
	printf("figure: file to pinned memory, %s, %d threads: %.1f GB/s\n",
	       read ? "reading" : "copying from a map", threads,
	       (double)most * SLOT / start / 1e9);
}

static void time_map(const char *path, source *s, int threads)
{
	struct stat st;

	s->fd = open(path, O_RDONLY | O_CLOEXEC);
	if (s->fd < 0 || fstat(s->fd, &st) < 0)
		exit(1);
	s->size = (size_t)st.st_size;
	s->map = mmap(NULL, s->size, PROT_READ, MAP_SHARED, s->fd, 0);
	if (s->map == MAP_FAILED)
		exit(1);
	time_source(s, threads, false);
	time_source(s, threads, true);
	munmap((void *)(uintptr_t)s->map, s->size);
	close(s->fd);
}

/* A new file in a new folder. */
static char *make_file(const char *dir)
{
	char *path = km_xasprintf("%s/noise", dir);
	FILE *f = fopen(path, "w");

	for (int i = 0; f && i < SLOT; i++)
		slot[0][i] = (char)(i * 2654435761u >> 13);
	for (int i = 0; f && i < 32; i++)
		if (fwrite(slot[0], SLOT, 1, f) != 1)
			break;
	if (!f || fclose(f)) {
		perror(path);
		exit(1);
	}
	return path;
}

int main(int argc, char **argv)
{
	static const int threads[] = { 1, 4, 8, 16 };
	km_cuda *gpu;
	void *there;
	source s;
	const char *path = argc > 1 ? argv[1] : NULL;
	char *dir = NULL, *made = NULL;

	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	must(km_cuda_open(&gpu, 0, SLOT, &err));
	must(km_cuda_take(gpu, &there, SLOT, "bench", &err));
	for (int i = 0; i < SLOTS; i++)
		must(km_cuda_pin(gpu, (void **)&slot[i], SLOT, &err));
	to_device(gpu, there);
	if (argc < 2)
		path = made = make_file(dir = temp_dir());
	for (int i = 0; i < 4; i++)
		time_map(path, &s, threads[i]);
	for (int i = 0; i < SLOTS; i++)
		km_cuda_unpin(gpu, slot[i]);
	km_cuda_close(gpu);
	if (dir)
		remove_dir(dir);
	free(made);
	return 0;
}
