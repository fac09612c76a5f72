#include "format/shards.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/mem.h"
#include "format/json.h"
#include "format/moe_layout.h"
#include "format/name_map.h"
#include "format/scan.h"

enum { MAX_INDEX = 512 << 20, MAX_FILES = 1 << 16 };

static const char index_name[] = "model.safetensors.index.json";

/* ---- the index ------------------------------------------------------------------------------ */

/* A shard is a plain file name: an index must not reach out of its folder. */
static bool is_plain_name(const char *s)
{
	return *s && *s != '.' && !strchr(s, '/') && strlen(s) < 256;
}

static int read_weight_map(km_shard_index *index, km_scan *s)
{
	bool first = true, more;
	size_t cap = 0;

	KM_TRY(km_scan_expect(s, '{'));
	for (;;) {
		struct km_shard_entry e;
		size_t len;

		KM_TRY(km_scan_next(s, '}', &first, &more));
		if (!more)
			return 0;
		KM_TRY(km_scan_string(s, &e.tensor, &len));
		KM_TRY(km_scan_expect(s, ':'));
		KM_TRY(km_scan_string(s, &e.file, &len));
		if (!is_plain_name(e.file))
			return km_fail(s->err, KM_EFORMAT, "%s: tensor %s: '%s' is not a file name",
			               s->name, e.tensor, e.file);
		if ((size_t)index->count == cap) {
			cap = cap ? cap * 2 : 1024;
			index->entries =
				km_xreallocarray(index->entries, cap, sizeof(*index->entries));
		}
		index->entries[index->count++] = e;
	}
}

/* Any value: a whole number, or -1. It is only ever a note, and no reason not to read the rest. */
static int read_total_size(km_scan *s, int64_t *total)
{
	const char *begin = s->p;
	uint64_t size = 0;
	km_scan value;

	*total = -1;
	KM_TRY(km_scan_skip(s));
	km_scan_init(&value, begin, (size_t)(s->p - begin), s->name, s->arena, NULL);
	if (km_scan_uint(&value, &size) >= 0 && km_scan_end(&value) >= 0 && size <= INT64_MAX)
		*total = (int64_t)size;
	return 0;
}

static int read_index_metadata(km_shard_index *index, km_scan *s)
{
	bool first = true, more;
	const char *key;
	size_t len;

	if (!km_scan_try(s, '{'))
		return km_scan_skip(s);
	for (;;) {
		KM_TRY(km_scan_next(s, '}', &first, &more));
		if (!more)
			return 0;
		KM_TRY(km_scan_string(s, &key, &len));
		KM_TRY(km_scan_expect(s, ':'));
		KM_TRY(strcmp(key, "total_size") != 0 ? km_scan_skip(s)
		                                      : read_total_size(s, &index->total_size));
	}
}

int km_shard_index_parse(km_shard_index *index, const char *text, size_t len, const char *name,
                         km_arena *arena, km_err *err)
{
	bool first = true, more, seen = false;
	const char *key;
	size_t key_len;
	km_scan s;

	*index = (km_shard_index){ .total_size = -1 };
	km_scan_init(&s, text, len, name, arena, err);
	KM_TRY(km_scan_expect(&s, '{'));
	for (;;) {
		KM_TRY(km_scan_next(&s, '}', &first, &more));
		if (!more)
			break;
		KM_TRY(km_scan_string(&s, &key, &key_len));
		KM_TRY(km_scan_expect(&s, ':'));
		if (!strcmp(key, "metadata")) {
			KM_TRY(read_index_metadata(index, &s));
		} else if (!strcmp(key, "weight_map")) {
			if (seen)
				return km_scan_fail(&s, "weight_map is there twice");
			seen = true;
			KM_TRY(read_weight_map(index, &s));
		} else {
			KM_TRY(km_scan_skip(&s));
		}
	}
	KM_TRY(km_scan_end(&s));
	if (!seen)
		return km_fail(err, KM_EFORMAT, "%s: weight_map is missing", name);
	return 0;
}

void km_shard_index_release(km_shard_index *index)
{
	free(index->entries);
	index->entries = NULL;
	index->count = 0;
}

/* ---- the files ------------------------------------------------------------------------------ */

/* Headers are parsed in parallel: a large checkpoint has 64 of 400 kB each. */
static void open_files(km_shards *shards, char **paths, km_findings *findings)
{
	km_err *errs = km_xcalloc((size_t)shards->file_count, sizeof(*errs));
	int *codes = km_xcalloc((size_t)shards->file_count, sizeof(*codes));

#pragma omp parallel for schedule(dynamic)
	for (int i = 0; i < shards->file_count; i++)
		codes[i] = km_safetensors_open(&shards->files[i], paths[i], &errs[i]);
	for (int i = 0; i < shards->file_count; i++) {
		if (codes[i] >= 0)
			continue;
		km_findings_add_err(findings, &errs[i]);
		shards->files[i].count = 0;
		shards->files[i].data_at = 0;
	}
	free(errs);
	free(codes);
}

static void collect(km_shards *shards, km_name_map *names, km_findings *findings)
{
	int64_t total = 0;

	for (int i = 0; i < shards->file_count; i++)
		total += shards->files[i].count;
	shards->tensors = km_xcalloc((size_t)total, sizeof(*shards->tensors));
	km_name_map_init(names, (size_t)total);
	for (int i = 0; i < shards->file_count; i++) {
		for (int k = 0; k < shards->files[i].count; k++) {
			km_tensor *t = &shards->files[i].tensors[k];
			int64_t old =
				km_name_map_add(names, t->name, strlen(t->name), shards->count);

			t->file = i;
			if (old >= 0)
				km_findings_add(findings, KM_EFORMAT, "%s: tensor %s is in %s too",
				                shards->files[i].path, t->name,
				                km_shards_path(shards, shards->tensors[old]));
			else
				shards->tensors[shards->count++] = t;
		}
	}
}

static bool opened(const km_safetensors *file)
{
	return file->data_at != 0;
}

/* `file_of[e]` is the number of the file that entry e names. */
static void compare_index(const km_shards *shards, const km_shard_index *index, const int *file_of,
                          const km_name_map *names, km_findings *findings)
{
	unsigned char *listed = km_xcalloc((size_t)shards->count, 1);

	for (int64_t e = 0; e < index->count; e++) {
		const struct km_shard_entry *entry = &index->entries[e];
		int64_t at = km_name_map_find(names, entry->tensor, strlen(entry->tensor));

		if (at < 0) {
			if (opened(&shards->files[file_of[e]]))
				km_findings_add(
					findings, KM_ENOTFOUND,
					"%s/%s: lists tensor %s in %s, which does not hold it",
					shards->dir, index_name, entry->tensor, entry->file);
			continue;
		}
		if (shards->tensors[at]->file != file_of[e])
			km_findings_add(findings, KM_EFORMAT,
			                "%s/%s: lists tensor %s in %s, but it is in %s",
			                shards->dir, index_name, entry->tensor, entry->file,
			                km_shards_path(shards, shards->tensors[at]));
		if (listed[at])
			km_findings_add(findings, KM_EFORMAT, "%s/%s: lists tensor %s twice",
			                shards->dir, index_name, entry->tensor);
		listed[at] = 1;
	}
	for (int64_t i = 0; i < shards->count; i++)
		if (!listed[i])
			km_findings_add(findings, KM_EFORMAT, "%s: tensor %s is not listed in %s",
			                km_shards_path(shards, shards->tensors[i]),
			                shards->tensors[i]->name, index_name);
	free(listed);
}

static int open_indexed(km_shards *shards, const char *index_path, km_findings *findings,
                        km_err *err)
{
	km_shard_index index = { .entries = NULL };
	km_name_map files = { NULL, 0, 0 }, names = { NULL, 0, 0 };
	int *file_of = NULL;
	char *text = NULL, **paths = NULL;
	size_t len;
	int rc = km_read_file(index_path, MAX_INDEX, &text, &len, err);

	if (rc >= 0)
		rc = km_shard_index_parse(&index, text, len, index_path, &shards->arena, err);
	free(text);
	if (rc >= 0 && !index.count)
		rc = km_fail(err, KM_EFORMAT, "%s: weight_map is empty", index_path);
	if (rc < 0)
		goto done;
	shards->index_total_size = index.total_size;
	file_of = km_xcalloc((size_t)index.count, sizeof(*file_of));
	km_name_map_init(&files, 64);
	for (int64_t e = 0; e < index.count; e++) {
		const char *file = index.entries[e].file;
		int64_t at = km_name_map_add(&files, file, strlen(file), shards->file_count);

		if (at < 0) {
			at = shards->file_count++;
			paths = km_xreallocarray(paths, (size_t)shards->file_count, sizeof(*paths));
			paths[at] = km_xasprintf("%s/%s", shards->dir, file);
		}
		file_of[e] = (int)at;
		if (shards->file_count > MAX_FILES) {
			rc = km_fail(err, KM_ELIMIT, "%s: names more than %d files", index_path,
			             MAX_FILES);
			shards->file_count = 0;
			goto done;
		}
	}
	shards->files = km_xcalloc((size_t)shards->file_count, sizeof(*shards->files));
	open_files(shards, paths, findings);
	collect(shards, &names, findings);
	compare_index(shards, &index, file_of, &names, findings);
done:
	for (size_t i = 0; i < files.count; i++)
		free(paths[i]);
	free(paths);
	free(file_of);
	km_name_map_release(&files);
	km_name_map_release(&names);
	km_shard_index_release(&index);
	return rc;
}

static int open_single(km_shards *shards, const char *path, km_findings *findings)
{
	char *paths[] = { (char *)(uintptr_t)path };
	km_name_map names;

	shards->file_count = 1;
	shards->files = km_xcalloc(1, sizeof(*shards->files));
	open_files(shards, paths, findings);
	collect(shards, &names, findings);
	km_name_map_release(&names);
	return 0;
}

static bool exists(const char *path)
{
	struct stat st;

	return stat(path, &st) == 0;
}

int km_shards_open(km_shards *shards, const char *dir, km_findings *findings, km_err *err)
{
	char *index_path = km_xasprintf("%s/%s", dir, index_name);
	char *single = km_xasprintf("%s/model.safetensors", dir);
	int rc;

	*shards = (km_shards){ .dir = km_xstrdup(dir), .index_total_size = -1 };
	km_arena_init(&shards->arena, 1 << 16);
	if (exists(index_path)) {
		shards->indexed = true;
		rc = open_indexed(shards, index_path, findings, err);
	} else if (exists(single)) {
		rc = open_single(shards, single, findings);
	} else {
		rc = km_fail(err, KM_ENOTFOUND, "%s: has neither %s nor model.safetensors", dir,
		             index_name);
	}
	free(index_path);
	free(single);
	return rc;
}

static bool is_open(const km_shards *shards, const char *name)
{
	size_t dir = strlen(shards->dir) + 1;

	for (int i = 0; i < shards->file_count; i++)
		if (!strcmp(shards->files[i].path + dir, name))
			return true;
	return false;
}

static int is_safetensors(const struct dirent *entry)
{
	static const char end[] = ".safetensors";
	size_t n = strlen(entry->d_name), m = sizeof(end) - 1;

	return n > m && entry->d_name[0] != '.' && !strcmp(entry->d_name + n - m, end);
}

/* A file of a repacked checkpoint that has nothing but its old header: no index can name it. */
static bool is_bare(const km_shards *shards, const char *name)
{
	char *path = km_xasprintf("%s/%s", shards->dir, name);
	km_safetensors file;
	bool bare = km_safetensors_open(&file, path, NULL) >= 0 && !file.count &&
	            km_safetensors_metadata(&file, KM_META_HEADER);

	km_safetensors_close(&file);
	free(path);
	return bare;
}

void km_shards_report_unread(const km_shards *shards, km_findings *findings)
{
	struct dirent **entries;
	int count = scandir(shards->dir, &entries, is_safetensors, alphasort);

	for (int i = 0; i < count; i++) {
		if (!is_open(shards, entries[i]->d_name) && !is_bare(shards, entries[i]->d_name))
			km_findings_add(findings, KM_EFORMAT, "%s/%s: is not read: %s",
			                shards->dir, entries[i]->d_name,
			                shards->indexed ?
			                        "model.safetensors.index.json does not name it" :
			                        "there is no model.safetensors.index.json");
		free(entries[i]);
	}
	if (count >= 0)
		free(entries);
}

void km_shards_close(km_shards *shards)
{
	for (int i = 0; i < shards->file_count && shards->files; i++)
		km_safetensors_close(&shards->files[i]);
	free(shards->files);
	free(shards->tensors);
	free(shards->dir);
	km_arena_release(&shards->arena);
	*shards = (km_shards){ .dir = NULL };
}
