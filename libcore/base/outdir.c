#include "base/outdir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/mem.h"

static int io_fail(const char *path, const char *doing, km_err *err)
{
	return km_fail(err, KM_EIO, "%s: %s: %s", path, doing, strerror(errno));
}

static int count_entries(const char *dir)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	int count = 0;

	if (!d)
		return -1;
	while ((e = readdir(d)))
		count += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
	closedir(d);
	return count;
}

static void remove_flat(const char *dir)
{
	DIR *d = opendir(dir);
	struct dirent *e;

	while (d && (e = readdir(d)))
		unlinkat(dirfd(d), e->d_name, 0);
	if (d)
		closedir(d);
	rmdir(dir);
}

/* Nothing can be renamed to a mount point; one of the same disk shows on newer systems alone. */
static bool is_mount_point(const char *path)
{
	char *parent = km_xasprintf("%s/..", path);
	struct stat in, above;
	struct statx root;
	bool is = stat(path, &in) == 0 && stat(parent, &above) == 0 && in.st_dev != above.st_dev;

	free(parent);
	return is || (statx(AT_FDCWD, path, 0, 0, &root) == 0 &&
	              root.stx_attributes & STATX_ATTR_MOUNT_ROOT);
}

static int check_target(const char *path, km_err *err)
{
	struct stat st;

	if (lstat(path, &st) < 0)
		return errno == ENOENT ? 0 : io_fail(path, "cannot be looked at", err);
	if (S_ISLNK(st.st_mode))
		return km_fail(err, KM_EINVAL,
		               "%s: is a symbolic link to what is not there; nothing is written",
		               path);
	if (!S_ISDIR(st.st_mode) || count_entries(path) != 0)
		return km_fail(err, KM_EINVAL,
		               "%s: is not an empty folder; nothing is written there", path);
	if (is_mount_point(path))
		return km_fail(err, KM_EINVAL,
		               "%s: is a mount point, which the finished folder cannot take the "
		               "place of; give a folder inside it", path);
	return 0;
}

/* The name without slashes at its end, or what it leads to if it is a symbolic link. NULL: it has
 * no last component that something can be renamed to. */
static char *target_of(const char *path)
{
	size_t len = strlen(path);
	char *name, *target, *last;
	struct stat st;

	while (len > 1 && path[len - 1] == '/')
		len--;
	name = km_xstrndup(path, len);
	last = strrchr(name, '/');
	last = last ? last + 1 : name;
	if (!*last || !strcmp(last, ".") || !strcmp(last, "..")) {
		free(name);
		return NULL;
	}
	target = lstat(name, &st) == 0 && S_ISLNK(st.st_mode) ? realpath(name, NULL) : NULL;
	if (!target)
		return name;
	free(name);
	return target;
}

static int check_room(const char *dir, const char *path, uint64_t bytes, km_err *err)
{
	struct statvfs fs;
	double room;

	if (statvfs(dir, &fs) < 0)
		return io_fail(dir, "cannot be looked at", err);
	room = (double)fs.f_bavail * (double)fs.f_frsize;
	if (room < (double)bytes)
		return km_fail(err, KM_ENOMEM, "%s: %.1f GB are needed, the disk has %.1f GB free",
		               path, (double)bytes / 1e9, room / 1e9);
	return 0;
}

int km_outdir_open(km_outdir *out, const char *path, uint64_t bytes, km_err *err)
{
	mode_t mask = umask(0);
	int rc;

	umask(mask);
	*out = (km_outdir){ target_of(path), NULL };
	if (!out->path)
		return km_fail(err, KM_EINVAL,
		               "\"%s\" is not the name of a folder that can be made; nothing is "
		               "written", path);
	KM_TRY(check_target(out->path, err));
	out->temp = km_xasprintf("%s.tmp-XXXXXX", out->path);
	if (!mkdtemp(out->temp)) {
		rc = io_fail(out->path, "cannot be made", err);
		free(out->temp);
		out->temp = NULL;
		return rc;
	}
	if (chmod(out->temp, 0777 & ~mask) < 0)
		return io_fail(out->temp, "cannot set its mode", err);
	return check_room(out->temp, out->path, bytes, err);
}

static int sync_folder(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC), rc = -1;

	if (fd >= 0) {
		rc = fsync(fd);
		close(fd);
	}
	return rc < 0 && errno != EINVAL ? -1 : 0;
}

int km_outdir_commit(km_outdir *out, km_err *err)
{
	char *copy;
	int rc;

	if (sync_folder(out->temp) < 0)
		return io_fail(out->temp, "cannot be flushed to disk", err);
	if (rename(out->temp, out->path) < 0)
		return io_fail(out->path, "cannot be put in place", err);
	free(out->temp);
	out->temp = NULL;
	copy = km_xstrdup(out->path);
	rc = sync_folder(dirname(copy));
	free(copy);
	return rc < 0 ? io_fail(out->path, "its folder cannot be flushed to disk", err) : 0;
}

void km_outdir_release(km_outdir *out)
{
	if (out->temp)
		remove_flat(out->temp);
	free(out->temp);
	free(out->path);
	*out = (km_outdir){ NULL, NULL };
}
