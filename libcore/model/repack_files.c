#include "model/repack_files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "format/moe_layout.h"

enum { ALIGN = 64 };

unsigned char *km_piece_memory(km_piece_buffer *b, size_t bytes)
{
	if (bytes <= b->cap)
		return b->p;
	free(b->p);
	b->cap = (bytes + ALIGN - 1) / ALIGN * ALIGN;
	b->p = aligned_alloc(ALIGN, b->cap);
	if (!b->p)
		b->cap = 0;
	return b->p;
}

static int go_on(const km_repacker *r, km_err *err)
{
	if (!r->options->cancel || !*r->options->cancel)
		return 0;
	return km_fail(err, KM_ECANCELED, "%s: interrupted; what was written is removed",
	               r->options->out_dir);
}

static int run_piece(const km_repacker *r, int i, km_piece piece, void *context,
                     km_piece_buffer *buffer, km_err *err)
{
	KM_TRY(go_on(r, err));
	return piece(context, i, buffer, err);
}

int km_repack_pieces(const km_repacker *r, int count, km_piece piece, void *context, km_err *err)
{
	atomic_int failed = 0;

#pragma omp parallel
	{
		km_piece_buffer buffer = { NULL, 0 };

#pragma omp for schedule(dynamic)
		for (int i = 0; i < count; i++) {
			km_err mine = { 0 };

			if (atomic_load(&failed) ||
			    run_piece(r, i, piece, context, &buffer, &mine) >= 0)
				continue;
#pragma omp critical
			if (!atomic_load(&failed)) {
				atomic_store(&failed, mine.code);
				km_fail(err, mine.code, "%s", mine.msg);
			}
		}
		free(buffer.p);
	}
	return atomic_load(&failed);
}

int km_repack_open(km_repacker *r, const km_repack_options *options, km_module_bind bind,
                   void *context, km_err *err)
{
	km_findings findings, notes;
	int rc;

	r->options = options;
	KM_TRY(km_config_load(&r->config, options->dir, err));
	r->opened = true;
	km_findings_init(&findings, 1);
	km_findings_init(&notes,
	                 0); /* what does not stop a model from opening does not stop this */
	rc = km_checkpoint_open(&r->cp, options->dir, &findings, &notes, err);
	if (rc >= 0)
		rc = km_checkpoint_match(&r->cp, &r->config, bind, context, &findings, err);
	if (rc >= 0)
		rc = km_findings_fail(&findings, err);
	km_findings_release(&findings);
	km_findings_release(&notes);
	return rc;
}

void km_repack_close(km_repacker *r)
{
	if (!r->opened)
		return;
	km_outdir_release(&r->out);
	km_originals_close(&r->originals);
	km_checkpoint_close(&r->cp);
	km_config_release(&r->config);
}

/* ---- bytes ---------------------------------------------------------------------------------- */

static int read_exactly(int fd, void *buffer, size_t bytes, uint64_t offset)
{
	char *p = buffer;

	while (bytes) {
		ssize_t n = pread(fd, p, bytes, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? errno : ENODATA;
		p += n;
		offset += (uint64_t)n;
		bytes -= (size_t)n;
	}
	return 0;
}

int km_repack_read(const km_repacker *r, const km_tensor *t, uint64_t begin, void *to, size_t bytes,
                   km_err *err)
{
	const km_safetensors *file = &r->cp.shards.files[t->file];
	int fd = open(file->path, O_RDONLY | O_CLOEXEC);
	int rc = fd < 0 ? errno : read_exactly(fd, to, bytes, file->data_at + t->offset + begin);

	if (fd >= 0)
		close(fd);
	if (!rc)
		return 0;
	return km_fail(err, KM_EIO, "%s: tensor %s: cannot be read: %s", file->path, t->name,
	               strerror(rc));
}

int km_repack_copy(km_repacker *r, const km_tensor *t, uint64_t begin, km_outfile *out, uint64_t to,
                   km_piece_buffer *buffer, km_err *err)
{
	uint64_t left = t->bytes - begin;
	size_t bytes = left < KM_COPY_BYTES ? (size_t)left : KM_COPY_BYTES;
	unsigned char *p = km_piece_memory(buffer, bytes);

	if (!p)
		return km_fail(err, KM_ENOMEM, "tensor %s: there is no memory for %zu bytes",
		               t->name, bytes);
	KM_TRY(km_repack_read(r, t, begin, p, bytes, err));
	KM_TRY(km_outfile_write_at(out, to + begin, p, bytes, err));
	km_progress_add(&r->progress, (int64_t)bytes);
	return 0;
}

/* ---- the other files ------------------------------------------------------------------------ */

int km_repack_save(const km_repacker *r, const char *name, const void *data, size_t bytes,
                   km_err *err)
{
	char *path = km_xasprintf("%s/%s", r->out.temp, name);
	int rc = km_outfile_save(path, data, bytes, err);

	free(path);
	return rc;
}

static int copy_bytes(const km_repacker *r, int from, km_outfile *to, const char *path,
                      km_err *err)
{
	char *buffer = km_xmalloc(1 << 20);
	ssize_t n = 1;
	int rc = 0;

	while (n > 0 && rc >= 0) {
		n = read(from, buffer, 1 << 20);
		if (n < 0 && errno == EINTR)
			n = 1;
		else if (n < 0)
			rc = km_fail(err, KM_EIO, "%s: cannot be read: %s", path, strerror(errno));
		else
			rc = km_outfile_write(to, buffer, (size_t)n, err);
		if (rc >= 0)
			rc = go_on(r, err);
	}
	free(buffer);
	return rc;
}

int km_repack_copy_file(const km_repacker *r, const char *from, const char *to, km_err *err)
{
	char *source = km_xasprintf("%s/%s", r->options->dir, from);
	char *target = km_xasprintf("%s/%s", r->out.temp, to);
	int fd = open(source, O_RDONLY | O_CLOEXEC), rc;
	km_outfile out;

	rc = fd < 0 ? km_fail(err, KM_EIO, "%s: cannot be opened: %s", source, strerror(errno))
	            : km_outfile_open(&out, target, err);
	if (rc >= 0) {
		rc = copy_bytes(r, fd, &out, source, err);
		if (rc >= 0)
			rc = km_outfile_commit(&out, err);
		km_outfile_release(&out);
	}
	if (fd >= 0)
		close(fd);
	free(source);
	free(target);
	return rc;
}

static bool is_rewritten(const km_repacker *r, const char *name)
{
	if (!strcmp(name, "config.json") || !strcmp(name, "model.safetensors.index.json") ||
	    !strcmp(name, KM_ORIGINAL_INDEX))
		return true;
	for (int i = 0; i < r->cp.shards.file_count; i++)
		if (!strcmp(name, strrchr(r->cp.shards.files[i].path, '/') + 1))
			return true;
	for (int i = 0; i < r->originals.bare_count; i++)
		if (!strcmp(name, strrchr(r->originals.bare[i].path, '/') + 1))
			return true;
	return false;
}

/* `size` is -1 for what is no regular file. */
typedef int (*rest_visit)(const km_repacker *r, const char *name, int64_t size, void *context,
                          km_err *err);

static int visit_rest(const km_repacker *r, rest_visit visit, void *context, km_err *err)
{
	DIR *d = opendir(r->options->dir);
	struct dirent *e;
	int rc = 0;

	if (!d)
		return km_fail(err, KM_EIO, "%s: cannot be listed: %s", r->options->dir,
		               strerror(errno));
	while (rc >= 0 && (e = readdir(d))) {
		struct stat st;

		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..") ||
		    is_rewritten(r, e->d_name))
			continue;
		if (fstatat(dirfd(d), e->d_name, &st, 0) < 0 || !S_ISREG(st.st_mode))
			st.st_size = -1;
		rc = visit(r, e->d_name, st.st_size, context, err);
	}
	closedir(d);
	return rc;
}

static int add_size(const km_repacker *r, const char *name, int64_t size, void *context,
                    km_err *err)
{
	uint64_t *bytes = context;

	(void)r, (void)name, (void)err;
	*bytes += size > 0 ? (uint64_t)size : 0;
	return 0;
}

int km_repack_open_out(km_repacker *r, uint64_t bytes, km_err *err)
{
	bytes += 64000000; /* headers twice over, index */
	KM_TRY(visit_rest(r, add_size, &bytes, err));
	return km_outdir_open(&r->out, r->options->out_dir, bytes, err);
}

static int copy_one(const km_repacker *r, const char *name, int64_t size, void *context,
                    km_err *err)
{
	(void)context;
	if (size >= 0)
		return km_repack_copy_file(r, name, name, err);
	km_log(KM_LOG_WARN, "%s/%s is no regular file and is not copied", r->options->dir, name);
	return 0;
}

int km_repack_copy_rest(const km_repacker *r, km_err *err)
{
	return visit_rest(r, copy_one, NULL, err);
}

/* ---- checksums ------------------------------------------------------------------------------ */

int km_repack_checksum(const km_shards *shards, const km_tensor *t, uint64_t *sum, km_err *err)
{
	const km_safetensors *file = &shards->files[t->file];
	const char *all = km_safetensors_metadata(file, KM_META_CHECKSUMS);
	size_t at = (size_t)(t - file->tensors) * 16, len = all ? strlen(all) : 0;

	*sum = 0;
	for (int i = 0; i < 16 && len >= at + 16; i++) {
		char c = all[at + (size_t)i];
		int digit = c >= '0' && c <= '9'   ? c - '0'
		            : c >= 'a' && c <= 'f' ? c - 'a' + 10
		                                   : -1;

		if (digit < 0)
			break;
		*sum = *sum << 4 | (unsigned)digit;
		if (i == 15)
			return 0;
	}
	return km_fail(err, KM_EFORMAT, "%s: tensor %s: %s has no checksum of it", file->path,
	               t->name, KM_META_CHECKSUMS);
}
