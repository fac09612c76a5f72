/*
 * A limit of a control group counts page cache as used, the kernel drops it first when the limit is
 * near; so what is left under a limit is limit - usage + inactive file pages.
 */
#include "model/host_memory.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* The number after `key` at the start of a line ("" takes the file's first); -1 when not there. */
static int64_t number_in_file(const char *path, const char *key)
{
	FILE *file = fopen(path, "re");
	char line[512];
	int64_t value = -1;
	size_t len = strlen(key);

	if (!file)
		return -1;
	while (fgets(line, sizeof(line), file))
		if (!strncmp(line, key, len) && sscanf(line + len, "%" SCNd64, &value) == 1)
			break;
	fclose(file);
	return value;
}

struct cgroup_names {
	const char *limit, *usage, *inactive;
};

static const struct cgroup_names version1 = { "memory.limit_in_bytes", "memory.usage_in_bytes",
	                                      "total_inactive_file " };
static const struct cgroup_names version2 = { "memory.max", "memory.current", "inactive_file " };

/* What one group leaves, or -1 when it sets no limit. */
static int64_t left_in_group(const char *dir, const struct cgroup_names *names)
{
	char path[1100];
	int64_t limit, usage, inactive;

	snprintf(path, sizeof(path), "%s/%s", dir, names->limit);
	limit = number_in_file(path, "");
	snprintf(path, sizeof(path), "%s/%s", dir, names->usage);
	usage = number_in_file(path, "");
	/* v1 writes no limit as a huge number */
	if (limit < 0 || usage < 0 || limit > INT64_MAX / 4)
		return -1;
	snprintf(path, sizeof(path), "%s/memory.stat", dir);
	inactive = number_in_file(path, names->inactive);
	usage -= inactive > 0 ? inactive : 0;
	return limit > usage ? limit - usage : 0;
}

/* The least that `group` below `mount` and its parents leave. */
static int64_t left_in_parents(const char *mount, const char *group,
                               const struct cgroup_names *names)
{
	char dir[1024];
	int64_t least = -1;
	size_t root = strlen(mount);

	if (snprintf(dir, sizeof(dir), "%s%s", mount, group) >= (int)sizeof(dir))
		return -1;
	for (;;) {
		int64_t left = left_in_group(dir, names);
		char *slash = strrchr(dir, '/');

		if (left >= 0 && (least < 0 || left < least))
			least = left;
		if (strlen(dir) <= root || !slash)
			return least;
		*slash = '\0';
	}
}

/* /proc/self/cgroup has a line "ID:CONTROLLERS:PATH" for each hierarchy; v2's is "0::PATH". */
static int64_t left_in_cgroups(void)
{
	FILE *file = fopen("/proc/self/cgroup", "re");
	char line[1024];
	int64_t least = -1;

	if (!file)
		return -1;
	while (fgets(line, sizeof(line), file)) {
		char *controllers = strchr(line, ':');
		char *group = controllers ? strchr(controllers + 1, ':') : NULL;
		int64_t left = -1;

		if (!group)
			continue;
		*group++ = '\0';
		group[strcspn(group, "\n")] = '\0';
		if (!strcmp(group, "/"))
			*group = '\0';
		if (!strcmp(controllers, ":memory"))
			left = left_in_parents("/sys/fs/cgroup/memory", group, &version1);
		else if (!strcmp(controllers, ":"))
			left = left_in_parents("/sys/fs/cgroup", group, &version2);
		if (left >= 0 && (least < 0 || left < least))
			least = left;
	}
	fclose(file);
	return least;
}

int64_t km_host_memory_available(void)
{
	int64_t kib = number_in_file("/proc/meminfo", "MemAvailable:");
	int64_t free_bytes = kib < 0 ? -1 : kib * 1024, group = left_in_cgroups();

	return group >= 0 && (free_bytes < 0 || group < free_bytes) ? group : free_bytes;
}
