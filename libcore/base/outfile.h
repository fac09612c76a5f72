/*
 * Output files that appear whole or not at all: written under a temporary name in the same folder,
 * fsync'ed, then renamed over the target, a symbolic link's own if it is one. Released without a commit, the
 * temporary file is removed and the target is as it was. What is no regular file (a pipe, a device), and what is in
 * /dev, is written to as it stands.
 */
#ifndef KM_BASE_OUTFILE_H
#define KM_BASE_OUTFILE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct km_outfile {
	int fd; /* -1 when closed */
	char *path, *temp; /* temp NULL: written in place */
} km_outfile;

/* Whether it can be opened, as far as that shows without doing so: for those who have much to do first. */
int km_outfile_check(const char *path, km_err *err);
int km_outfile_open(km_outfile *out, const char *path, km_err *err);
int km_outfile_write(km_outfile *out, const void *data, size_t bytes, km_err *err);
int km_outfile_write_at(km_outfile *out, uint64_t offset, const void *data, size_t bytes,
                        km_err *err);
/* fails now if the disk is full */
int km_outfile_reserve(km_outfile *out, uint64_t bytes, km_err *err);
int km_outfile_commit(km_outfile *out, km_err *err); /* and closes */
void km_outfile_release(km_outfile *out);            /* safe after commit */

/* The whole of it at once. */
int km_outfile_save(const char *path, const void *data, size_t bytes, km_err *err);

#endif
