/*
 * The safetensors format, one file.
 *
 *   u64 little-endian N (at most 100 MB) | N bytes of JSON, padded with spaces | data
 *   header: { "name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
 *             "__metadata__": {"key": "string", ...} }
 *
 * Offsets count from the end of the header. As the format's own reader does, this one wants the
 * tensors to cover the data exactly: no hole, no overlap, nothing after the last. A file is mapped,
 * never read as a whole; tensor data is borrowed from the map and may be misaligned for its type.
 * Source: github.com/huggingface/safetensors, README "Format".
 */
#ifndef KM_FORMAT_SAFETENSORS_H
#define KM_FORMAT_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/buf.h"
#include "base/err.h"
#include "format/dtype.h"

enum { KM_MAX_DIMS = 6, KM_SAFETENSORS_MAX_HEADER = 100000000 };

typedef struct km_tensor {
	const char *name; /* in the file's arena */
	const void *data;
	uint64_t offset, bytes; /* from the start of the data */
	int64_t shape[KM_MAX_DIMS];
	enum km_dtype dtype;
	int ndim, file; /* `file`: the owner's number for it */
} km_tensor;

typedef struct km_metadata {
	const char *key, *value;
} km_metadata;

typedef struct km_safetensors {
	char *path;            /* owned */
	const void *map;       /* the whole file */
	size_t size;
	bool mapped;
	uint64_t data_at;      /* where the data starts in the file */
	km_tensor *tensors;    /* [count] by offset */
	int count;
	km_metadata *metadata; /* [metadata_count], the strings in the arena */
	int metadata_count;
	km_arena arena;
} km_safetensors;

int km_safetensors_open(km_safetensors *file, const char *path, km_err *err);
/* The same from memory, `bytes` kept; `name` is for sentences. */
int km_safetensors_parse(km_safetensors *file, const void *bytes, size_t size, const char *name,
                         km_err *err);
/* A header's JSON text alone: the same checks, but for the data that is not there. */
int km_safetensors_parse_header(km_safetensors *file, const char *json, size_t len,
                                const char *name, km_err *err);
void km_safetensors_close(km_safetensors *file); /* also after a failure */

/* The value under `key` in __metadata__, or NULL. */
const char *km_safetensors_metadata(const km_safetensors *file, const char *key);

/* "BF16 [2, 3]" for sentences. */
const char *km_tensor_describe(char out[160], enum km_dtype dtype, int ndim, const int64_t *shape);

/* Writing: appends the 8 bytes and the header (padded to a multiple of 8) for tensors whose name,
 * dtype, shape, offset and bytes are set. */
void km_safetensors_put_header(km_buf *out, const km_tensor *tensors, int count);
/* The same with `metadata` after {"format": "pt"}; the data starts at a multiple of `align`, a
 * multiple of 8. */
void km_safetensors_put_header_with(km_buf *out, const km_tensor *tensors, int count,
                                    const km_metadata *metadata, int metadata_count, size_t align);

#endif
