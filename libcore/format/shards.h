/*
 * The safetensors files of a checkpoint folder, opened together: model.safetensors alone, or the
 * shards that model.safetensors.index.json names.
 *
 * What is wrong with one file or one name is a finding, so that a check can list all of it; a
 * return code is for a folder that cannot be read at all. The index and the files must agree: each
 * listed tensor is in the file it is said to be in, each tensor of a file is listed. Plain data
 * after opening; any thread may read it.
 */
#ifndef KM_FORMAT_SHARDS_H
#define KM_FORMAT_SHARDS_H

#include "base/err.h"
#include "format/findings.h"
#include "format/safetensors.h"

typedef struct km_shards {
	char *dir;             /* owned */
	km_safetensors
		*files; /* [file_count]; one that could not be opened has path but no tensors */
	int file_count;
	km_tensor **tensors;   /* [count], by file, then offset; names are unique */
	int64_t count;
	bool indexed;
	int64_t index_total_size; /* metadata.total_size, -1 when absent or no whole number */
	km_arena arena;
} km_shards;

int km_shards_open(km_shards *shards, const char *dir, km_findings *findings, km_err *err);
void km_shards_close(km_shards *shards); /* also after a failure */

/* A sentence for each file of the folder that ends in .safetensors and is none of these: remains of
 * another download, most often, of which nothing is ever read. Not for one that has no tensors but
 * the header that it had before its checkpoint was repacked. */
void km_shards_report_unread(const km_shards *shards, km_findings *findings);

static inline const char *km_shards_path(const km_shards *shards, const km_tensor *t)
{
	return shards->files[t->file].path;
}

/* An index alone, for fuzzing and for converters: (tensor, file) pairs in the arena. */
typedef struct km_shard_index {
	struct km_shard_entry {
		const char *tensor, *file;
	} *entries; /* owned */
	int64_t count, total_size;
} km_shard_index;

int km_shard_index_parse(km_shard_index *index, const char *text, size_t len, const char *name,
                         km_arena *arena, km_err *err);
void km_shard_index_release(km_shard_index *index);

#endif
