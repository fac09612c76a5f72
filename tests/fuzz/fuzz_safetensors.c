/* A safetensors file (first byte 's'), a shard index ('i'), or a header alone (else) from a
 * stranger. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "format/safetensors.h"
#include "format/shards.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Each byte of each tensor lies in the input: the sanitizer watches the reads. */
static unsigned touch(const km_safetensors *file)
{
	unsigned sum = 0;

	for (int i = 0; i < file->count; i++) {
		const unsigned char *bytes = file->tensors[i].data;

		for (uint64_t k = 0; k < file->tensors[i].bytes; k++)
			sum += bytes[k];
	}
	return sum;
}

static void parse(const void *bytes, size_t size)
{
	volatile unsigned sum; /* keeps the reads */
	km_safetensors file;
	km_err err = { 0 };

	if (km_safetensors_parse(&file, bytes, size, "fuzz", &err) >= 0)
		sum = touch(&file), (void)sum;
	else
		KM_ASSERT(err.code < 0 && err.msg[0]);
	km_safetensors_close(&file);
}

/* The length in front is the one thing that mutation hardly ever gets right. */
static void parse_header(const uint8_t *data, size_t size)
{
	size_t len = 0;
	uint8_t *bytes;

	while (len < size && data[len] != '\n')
		len++;
	bytes = km_xcalloc(8 + size, 1);
	memcpy(bytes + 8, data, size);
	for (int i = 0; i < 8; i++)
		bytes[i] = (uint8_t)((uint64_t)len >> 8 * i);
	parse(bytes, 8 + size);
	free(bytes);
}

/* A header alone, as a repacked file keeps the one that it had before. */
static void parse_text(const uint8_t *data, size_t size)
{
	km_safetensors file;
	km_err err = { 0 };

	if (km_safetensors_parse_header(&file, (const char *)data, size, "fuzz", &err) >= 0)
		km_safetensors_metadata(&file, "kimi.checksums");
	else
		KM_ASSERT(err.code < 0 && err.msg[0]);
	km_safetensors_close(&file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	km_shard_index index;
	km_arena arena;
	km_err err;

	if (size && data[0] == 's') {
		parse(data + 1, size - 1);
	} else if (size && data[0] == 'i') {
		km_arena_init(&arena, 4096);
		km_shard_index_parse(&index, (const char *)data + 1, size - 1, "fuzz", &arena,
		                     &err);
		km_shard_index_release(&index);
		km_arena_release(&arena);
	} else {
		parse_header(data, size);
		parse_text(data, size);
	}
	return 0;
}
