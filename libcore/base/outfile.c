#include "base/outfile.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"

static int io_fail(km_outfile *out, const char *doing, km_err *err)
{
	return km_fail(err, KM_EIO, "%s: %s: %s", out->path, doing, strerror(errno));
}

/* A pipe, a terminal or a device is written to, not replaced; so is /dev/stdout, whatever it stands for. */
static bool is_written_in_place(const char *path)
{
	struct stat st;

	return stat(path, &st) == 0 && (!(S_ISREG(st.st_mode) || S_ISDIR(st.st_mode)) || !strncmp(path, "/dev/", 5));
}

static int open_in_place(km_outfile *out, const char *path, km_err *err)
{
	out->path = km_xstrdup(path);
	out->temp = NULL;
	out->fd = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
	if (out->fd >= 0)
		return 0;
	io_fail(out, "cannot be opened", err);
	km_outfile_release(out);
	return KM_EIO;
}

/* Where a symbolic link leads, so that its target is replaced and not the link. */
static char *target_of(const char *path)
{
	char *target = realpath(path, NULL), *copy = km_xstrdup(target ? target : path);

	free(target);
	return copy;
}

static bool can_be_opened(const char *path)
{
	struct stat st;
	char *target;
	bool can;

	if (is_written_in_place(path))
		return access(path, W_OK) == 0;
	target = target_of(path);
	can = stat(target, &st) < 0 || !S_ISDIR(st.st_mode);
	if (!can)
		errno = EISDIR;
	can = can && access(dirname(target), W_OK | X_OK) == 0;
	free(target);
	return can;
}

int km_outfile_check(const char *path, km_err *err)
{
	return can_be_opened(path) ? 0 : km_fail(err, KM_EIO, "%s: cannot be created: %s", path, strerror(errno));
}

int km_outfile_open(km_outfile *out, const char *path, km_err *err)
{
	mode_t mask = umask(0);

	umask(mask);
	if (is_written_in_place(path))
		return open_in_place(out, path, err);
	out->path = target_of(path);
	out->temp = km_xasprintf("%s.tmp-XXXXXX", out->path);
	out->fd = mkostemp(out->temp, O_CLOEXEC);
	if (out->fd < 0) {
		io_fail(out, "cannot be created", err);
		free(out->temp);
		out->temp = NULL;
		km_outfile_release(out);
		return KM_EIO;
	}
	if (fchmod(out->fd, 0666 & ~mask) < 0) {
		io_fail(out, "cannot set its mode", err);
		km_outfile_release(out);
		return KM_EIO;
	}
	return 0;
}

int km_outfile_write(km_outfile *out, const void *data, size_t bytes, km_err *err)
{
	const char *p = data;

	while (bytes) {
		ssize_t n = write(out->fd, p, bytes < (1u << 30) ? bytes : 1u << 30);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return io_fail(out, "cannot be written", err);
		p += n;
		bytes -= (size_t)n;
	}
	return 0;
}

int km_outfile_write_at(km_outfile *out, uint64_t offset, const void *data, size_t bytes,
                        km_err *err)
{
	const char *p = data;

	while (bytes) {
		ssize_t n =
			pwrite(out->fd, p, bytes < (1u << 30) ? bytes : 1u << 30, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return io_fail(out, "cannot be written", err);
		p += n;
		offset += (uint64_t)n;
		bytes -= (size_t)n;
	}
	return 0;
}

int km_outfile_reserve(km_outfile *out, uint64_t bytes, km_err *err)
{
	int rc = posix_fallocate(out->fd, 0, (off_t)bytes);

	if (rc == 0 || rc == EOPNOTSUPP || rc == EINVAL)
		return 0;
	errno = rc;
	return io_fail(out, "cannot reserve its space", err);
}

static int sync_folder(const char *path)
{
	char *copy = km_xstrdup(path);
	int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int rc = -1;

	free(copy);
	if (fd >= 0) {
		rc = fsync(fd);
		close(fd);
	}
	return rc;
}

int km_outfile_commit(km_outfile *out, km_err *err)
{
	int fd = out->fd;

	if (fsync(fd) < 0 && (out->temp || errno != EINVAL))
		return io_fail(out, "cannot be flushed to disk", err);
	out->fd = -1;
	if (close(fd) < 0)
		return io_fail(out, "cannot be closed", err);
	if (!out->temp)
		return 0;
	if (rename(out->temp, out->path) < 0)
		return io_fail(out, "cannot be put in place", err);
	free(out->temp);
	out->temp = NULL;
	if (sync_folder(out->path) < 0 && errno != EINVAL)
		return io_fail(out, "its folder cannot be flushed to disk", err);
	return 0;
}

void km_outfile_release(km_outfile *out)
{
	if (out->fd >= 0)
		close(out->fd);
	if (out->temp)
		unlink(out->temp);
	free(out->temp);
	free(out->path);
	*out = (km_outfile){ .fd = -1 };
}

int km_outfile_save(const char *path, const void *data, size_t bytes, km_err *err)
{
	km_outfile out;
	int rc;

	KM_TRY(km_outfile_open(&out, path, err));
	rc = km_outfile_write(&out, data, bytes, err);
	if (rc >= 0)
		rc = km_outfile_commit(&out, err);
	km_outfile_release(&out);
	return rc;
}
