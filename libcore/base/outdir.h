/*
 * Output folders that appear whole or not at all: everything is made in a folder of a temporary
 * name beside the target, which is renamed at the end. Released without a commit, the temporary
 * folder and the files in it are removed and the target is as it was. It holds files only, no
 * folders.
 */
#ifndef KM_BASE_OUTDIR_H
#define KM_BASE_OUTDIR_H

#include <stdint.h>

#include "base/err.h"

typedef struct km_outdir {
	char *path, *temp; /* temp: where to write; NULL after the commit */
} km_outdir;

/* The target, of a symbolic link what it leads to, must be an empty folder or not be there, be no
 * mount point, and have a name other than "." and "..": KM_EINVAL; the disk must have `bytes` free:
 * KM_ENOMEM. */
int km_outdir_open(km_outdir *out, const char *path, uint64_t bytes, km_err *err);
int km_outdir_commit(km_outdir *out, km_err *err); /* its files are flushed by who wrote them */
void km_outdir_release(km_outdir *out);            /* safe after commit */

#endif
