/*
 * What repacking and unpacking share: the checkpoint they read, the folder they write, pieces of
 * work on all threads. Used by model/repack.c and model/unpack.c; the checksums by model/verify.c
 * too.
 */
#ifndef KM_MODEL_REPACK_FILES_H
#define KM_MODEL_REPACK_FILES_H

#include "base/outdir.h"
#include "base/outfile.h"
#include "base/progress.h"
#include "model/checkpoint.h"
#include "model/originals.h"
#include "model/repack.h"

#define KM_REPACK_MARK_BEGIN                                                                       \
	"\n  \"kimi_repacked\": {\"layout\": \"" KM_EXPERT_LAYOUT "\", \"version\": "

/* Bytes of a tensor that are copied at a time. */
enum { KM_COPY_BYTES = 4 << 20 };

typedef struct km_repacker {
	const km_repack_options *options;
	km_config config;
	km_checkpoint cp;
	km_originals originals; /* unpacking: opened by it */
	km_outdir out;
	km_progress progress;
	bool opened;
} km_repacker;

/* A thread's memory, which grows. */
typedef struct km_piece_buffer {
	unsigned char *p;
	size_t cap;
} km_piece_buffer;

/* At least `bytes`, uninitialised, aligned to 64; NULL: there is no more memory. */
unsigned char *km_piece_memory(km_piece_buffer *buffer, size_t bytes);

/* Does pieces 0..count on all threads; the first failure stops the rest. */
typedef int (*km_piece)(void *context, int piece, km_piece_buffer *buffer, km_err *err);
int km_repack_pieces(const km_repacker *r, int count, km_piece piece, void *context, km_err *err);

/* Opens the checkpoint, calling `bind` for each module; a problem with it is an error. */
int km_repack_open(km_repacker *r, const km_repack_options *options, km_module_bind bind,
                   void *context, km_err *err);
void km_repack_close(km_repacker *r);

/* Reads bytes [begin, begin + bytes) of a tensor, with read() so that a failing disk is a
 * sentence. */
int km_repack_read(const km_repacker *r, const km_tensor *t, uint64_t begin, void *to, size_t bytes,
                   km_err *err);
/* Copies one piece of a tensor: the one at `begin`, at most KM_COPY_BYTES. */
int km_repack_copy(km_repacker *r, const km_tensor *t, uint64_t begin, km_outfile *out, uint64_t to,
                   km_piece_buffer *buffer, km_err *err);

/* Opens the new folder with room for `bytes` of tensors and for what copy_rest copies. */
int km_repack_open_out(km_repacker *r, uint64_t bytes, km_err *err);

/* Saves one small file in the new folder; copies all regular files but weights, index,
 * config.json. */
int km_repack_save(const km_repacker *r, const char *name, const void *data, size_t bytes,
                   km_err *err);
int km_repack_copy_file(const km_repacker *r, const char *from, const char *to, km_err *err);
int km_repack_copy_rest(const km_repacker *r, km_err *err);

/* What a repacked tensor's bytes must add up to. KM_EFORMAT: its file does not say. */
int km_repack_checksum(const km_shards *shards, const km_tensor *t, uint64_t *sum, km_err *err);

#endif
