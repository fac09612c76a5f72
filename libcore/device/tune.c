#include "device/tune.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/outfile.h"
#include "format/json.h"

enum { MAX_FILE = 4 << 20, MAX_LISTED = 4096 };

static const double most_us = 1e9;

/* ---- names ---------------------------------------------------------------------------------- */

/* A device's name must not leave its folder, whatever a driver calls it. */
static void device_in_name(const char *name, char *out, size_t cap)
{
	size_t i = 0;

	for (; name[i] && i + 1 < cap; i++)
		out[i] = name[i] == ' ' || name[i] == '/' ? '_' : name[i];
	out[i] = '\0';
}

void km_tune_file_name(const km_tune_key *key, char out[KM_TUNE_NAME])
{
	char device[256], dtype[64] = "", block[64] = "";

	device_in_name(key->device_name, device, sizeof(device));
	if (key->dtype)
		snprintf(dtype, sizeof(dtype), ",dtype=%s", key->dtype);
	if (key->block_n && key->block_k)
		snprintf(block, sizeof(block), ",block_shape=[%d, %d]", key->block_n, key->block_k);
	snprintf(out, KM_TUNE_NAME, "E=%d,N=%d,device_name=%s%s%s%s.json", key->experts, key->n,
	         device, dtype, block, key->down ? "_down" : "");
}

void km_tune_dir_name(const km_tune_key *key, char out[32])
{
	snprintf(out, 32, "cuda_%d_%d", key->toolkit / 1000, key->toolkit % 1000 / 10);
}

char *km_tune_path(const char *root, const km_tune_key *key)
{
	char dir[32], name[KM_TUNE_NAME];

	km_tune_dir_name(key, dir);
	km_tune_file_name(key, name);
	return km_xasprintf("%s/%s/%s", root, dir, name);
}

static bool is_folder(const char *path)
{
	struct stat st;

	return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

char *km_tune_root_of(const char *program)
{
	const char *end = strrchr(program, '/');
	char *folder = km_xasprintf("%.*s", end ? (int)(end - program) : 1, end ? program : ".");
	char *installed = km_xasprintf("%s/../share/kimi/configs", folder);
	char *built = km_xasprintf("%s/../../../configs", folder);
	char *root = !is_folder(installed) && is_folder(built) ? built : installed, *real;

	free(root == built ? installed : built);
	free(folder);
	real = realpath(root, NULL);
	if (!real)
		return root;
	free(root);
	return real;
}

char *km_tune_own_root(void)
{
	char *program = realpath("/proc/self/exe", NULL);
	char *root = km_tune_root_of(program ? program : "");

	free(program);
	return root;
}

/* ---- reading -------------------------------------------------------------------------------- */

enum { PROBLEM = 4 };
static const char *const problem_names[PROBLEM] = { "hidden_size", "top_k", "group_size",
	                                            "num_experts" };

static int problem_value(const km_tune_problem *p, int i)
{
	return i == 0   ? p->hidden_size
	       : i == 1 ? p->top_k
	       : i == 2 ? p->group_size
	                : p->num_experts;
}

static bool is_known(const char *key, const km_tune_schema *schema)
{
	for (int i = 0; i < schema->count; i++)
		if (!strcmp(key, schema->fields[i].name))
			return true;
	for (int i = 0; i < PROBLEM; i++)
		if (!strcmp(key, problem_names[i]))
			return true;
	return !strcmp(key, "us") || !strcmp(key, "plan_us");
}

/* Triton's fused-MoE configs, as SGLang and vLLM write them, have tiles and nothing of the
 * problem. */
static bool is_triton(const json_t *entry)
{
	for (int i = 0; i < PROBLEM; i++)
		if (json_object_get(entry, problem_names[i]))
			return false;
	return json_object_get(entry, "BLOCK_SIZE_M") || json_object_get(entry, "num_warps") ||
	       json_object_get(entry, "num_stages");
}

static int refuse_triton(const char *path, km_err *err)
{
	return km_fail(err, KM_EUNSUPPORTED,
	               "%s: is a table of SGLang or vLLM: its BLOCK_SIZE_M, num_warps and so on "
	               "are tiles of "
	               "Triton's kernels and mean nothing to these; kimi-tune makes one that does",
	               path);
}

static int parse_tokens(const char *path, const char *key, int *tokens, km_err *err)
{
	int n = 0;

	for (const char *s = key; *s; s++) {
		if (*s < '0' || *s > '9' || s - key > 7 || (s > key && !n))
			return km_fail(err, KM_EFORMAT,
			               "%s: \"%.40s\" is not a token count from 1 to %d", path, key,
			               KM_TUNE_MAX_TOKENS);
		n = n * 10 + (*s - '0');
	}
	if (n < 1 || n > KM_TUNE_MAX_TOKENS)
		return km_fail(err, KM_EFORMAT, "%s: \"%.40s\" is not a token count from 1 to %d",
		               path, key, KM_TUNE_MAX_TOKENS);
	*tokens = n;
	return 0;
}

static void read_problem(km_fields *f, const km_tune_problem *problem)
{
	for (int i = 0; i < PROBLEM; i++) {
		int64_t found = km_field_int(f, problem_names[i], 1, INT32_MAX);

		if (f->rc >= 0 && found != problem_value(problem, i))
			km_field_fail(f, KM_ENOTFOUND, problem_names[i],
			              "was tuned for %lld, this shape has %d", (long long)found,
			              problem_value(problem, i));
	}
}

static int read_entry(km_tune_entry *e, const char *path, const char *key, json_t *object,
                      const km_tune_problem *problem, const km_tune_schema *schema, km_err *err)
{
	char prefix[64];
	km_fields f = { path, prefix, object, err, 0 };
	const char *name;
	json_t *value;

	*e = (km_tune_entry){ 0 };
	KM_TRY(parse_tokens(path, key, &e->tokens, err));
	snprintf(prefix, sizeof(prefix), "%d.", e->tokens);
	if (!json_is_object(object))
		return km_fail(err, KM_EFORMAT, "%s: %d: an object is expected", path, e->tokens);
	if (is_triton(object))
		return refuse_triton(path, err);
	json_object_foreach(object, name, value) if (!is_known(name, schema)) return km_fail(
		err, KM_EFORMAT, "%s: %d.%.64s: no kernel has such a field", path, e->tokens, name);
	read_problem(&f, problem);
	for (int i = 0; i < schema->count; i++)
		e->values[i] = (int)km_field_int(&f, schema->fields[i].name, schema->fields[i].min,
		                                 schema->fields[i].max);
	e->us = km_field_number_or(&f, "us", 0, 0, most_us);
	e->plan_us = km_field_number_or(&f, "plan_us", 0, 0, most_us);
	KM_TRY(f.rc);
	if (!schema->check || schema->check(schema->context, e->tokens, e->values, err) >= 0)
		return 0;
	return km_fail_within(err, "%s: entry %d", path, e->tokens);
}

static int read_entries(km_tune_table *table, json_t *doc, const char *path,
                        const km_tune_problem *problem, const km_tune_schema *schema, km_err *err)
{
	const char *key;
	json_t *value;

	if (json_object_get(doc, "triton_version"))
		return refuse_triton(path, err);
	json_object_foreach(doc, key, value)
	{
		km_tune_entry e;

		KM_TRY(read_entry(&e, path, key, value, problem, schema, err));
		km_tune_put(table, &e);
	}
	if (!table->count)
		return km_fail(err, KM_EFORMAT, "%s: has no entry", path);
	return 0;
}

int km_tune_parse(km_tune_table *table, const char *text, size_t len, const char *name,
                  const km_tune_problem *problem, const km_tune_schema *schema, km_err *err)
{
	json_t *doc = km_json_parse_object(text, len, name, err);
	int rc;

	KM_ASSERT(schema->count <= KM_TUNE_MAX_FIELDS);
	*table = (km_tune_table){ .count = 0 };
	if (!doc)
		return KM_EFORMAT;
	table->path = km_xstrdup(name);
	rc = read_entries(table, doc, name, problem, schema, err);
	json_decref(doc);
	if (rc < 0)
		km_tune_release(table);
	return rc;
}

int km_tune_read(km_tune_table *table, const char *path, const km_tune_problem *problem,
                 const km_tune_schema *schema, km_err *err)
{
	char *text = NULL;
	size_t len;
	int rc;

	*table = (km_tune_table){ .count = 0 };
	KM_TRY(km_read_file(path, MAX_FILE, &text, &len, err));
	rc = km_tune_parse(table, text, len, path, problem, schema, err);
	free(text);
	return rc;
}

void km_tune_release(km_tune_table *table)
{
	free(table->path);
	free(table->entries);
	*table = (km_tune_table){ .count = 0 };
}

void km_tune_put(km_tune_table *table, const km_tune_entry *entry)
{
	int at = 0;

	while (at < table->count && table->entries[at].tokens < entry->tokens)
		at++;
	if (at == table->count || table->entries[at].tokens != entry->tokens) {
		table->entries = km_xreallocarray(table->entries, (size_t)table->count + 1,
		                                  sizeof(*table->entries));
		memmove(table->entries + at + 1, table->entries + at,
		        sizeof(*table->entries) * (size_t)(table->count - at));
		table->count++;
	}
	table->entries[at] = *entry;
}

const km_tune_entry *km_tune_nearest(const km_tune_table *table, int tokens)
{
	const km_tune_entry *best = NULL;

	for (int i = 0; i < table->count; i++)
		if (!best || abs(table->entries[i].tokens - tokens) < abs(best->tokens - tokens))
			best = &table->entries[i];
	return best;
}

/* ---- writing -------------------------------------------------------------------------------- */

void km_tune_format(const km_tune_table *table, const km_tune_problem *problem,
                    const km_tune_schema *schema, km_buf *out)
{
	km_buf_putc(out, '{');
	for (int i = 0; i < table->count; i++) {
		const km_tune_entry *e = &table->entries[i];

		km_buf_printf(out, "%s\n    \"%d\": {", i ? "," : "", e->tokens);
		for (int k = 0; k < schema->count; k++)
			km_buf_printf(out, "%s\n        \"%s\": %d", k ? "," : "",
			              schema->fields[k].name, e->values[k]);
		for (int k = 0; k < PROBLEM; k++)
			km_buf_printf(out, ",\n        \"%s\": %d", problem_names[k],
			              problem_value(problem, k));
		if (e->us > 0)
			km_buf_printf(out, ",\n        \"us\": %.2f", e->us);
		if (e->plan_us > 0)
			km_buf_printf(out, ",\n        \"plan_us\": %.2f", e->plan_us);
		km_buf_puts(out, "\n    }");
	}
	km_buf_puts(out, "\n}\n");
}

static int make_folders(const char *path, km_err *err)
{
	char *copy = km_xstrdup(path);
	int rc = 0;

	for (char *s = strchr(copy + 1, '/'); s && !rc; s = strchr(s + 1, '/')) {
		*s = '\0';
		if (mkdir(copy, 0777) < 0 && errno != EEXIST)
			rc = km_fail(err, KM_EIO, "%s: cannot be made: %s", copy, strerror(errno));
		*s = '/';
	}
	free(copy);
	return rc;
}

int km_tune_make_place(const char *path, km_err *err)
{
	const char *end = strrchr(path, '/');
	char *folder = km_xasprintf("%.*s", end ? (int)(end - path) + 1 : 1, end ? path : ".");
	int rc = make_folders(path, err);

	if (rc >= 0 && access(folder, W_OK | X_OK) < 0)
		rc = km_fail(err, KM_EIO, "%s: cannot be written there: %s", path, strerror(errno));
	free(folder);
	return rc;
}

int km_tune_write(const km_tune_table *table, const char *path, const km_tune_problem *problem,
                  const km_tune_schema *schema, km_err *err)
{
	km_buf out = KM_BUF_INIT;
	int rc = make_folders(path, err);

	if (rc >= 0) {
		km_tune_format(table, problem, schema, &out);
		rc = km_outfile_save(path, out.data, out.len, err);
	}
	km_buf_release(&out);
	return rc;
}

/* ---- looking up ----------------------------------------------------------------------------- */

/* A file's place, taken apart: what the contract's name says, in words to compare. */
struct parsed {
	char dir[64], e[16], n[16], device[256], dtype[64], block[64];
	bool down;
};

static bool take_until(const char **s, const char *prefix, const char *stops, char *out, size_t cap)
{
	size_t len = strlen(prefix), n;

	if (strncmp(*s, prefix, len) != 0)
		return false;
	*s += len;
	n = strcspn(*s, stops);
	if (n >= cap)
		return false;
	memcpy(out, *s, n);
	out[n] = '\0';
	*s += n;
	return true;
}

static bool parse_name(const char *dir, const char *name, struct parsed *p)
{
	char body[KM_TUNE_NAME];
	size_t len = strlen(name);
	const char *s = body;

	*p = (struct parsed){ .down = false };
	if (len < 5 || len >= sizeof(body) || strlen(dir) >= sizeof(p->dir) ||
	    strcmp(name + len - 5, ".json") != 0)
		return false;
	memcpy(body, name, len - 5);
	body[len - 5] = '\0';
	len -= 5;
	if (len > 5 && !strcmp(body + len - 5, "_down")) {
		p->down = true;
		body[len - 5] = '\0';
	}
	memcpy(p->dir, dir, strlen(dir) + 1);
	if (!take_until(&s, "E=", ",", p->e, sizeof(p->e)) ||
	    !take_until(&s, ",N=", ",", p->n, sizeof(p->n)) ||
	    !take_until(&s, ",device_name=", ",", p->device, sizeof(p->device)))
		return false;
	take_until(&s, ",dtype=", ",", p->dtype, sizeof(p->dtype));
	take_until(&s, ",block_shape=", "", p->block, sizeof(p->block));
	return !*s;
}

static int compare_field(const char *name, const char *want, const char *have, km_buf *out)
{
	if (!strcmp(want, have))
		return 0;
	km_buf_printf(out, "%s%s is \"%s\" there, not \"%s\"", out->len ? ", " : "", name, have,
	              want);
	return 1;
}

/* How many fields differ; `out` says which. */
static int compare_names(const struct parsed *want, const struct parsed *have, km_buf *out)
{
	return compare_field("the toolkit", want->dir, have->dir, out) +
	       compare_field("E", want->e, have->e, out) +
	       compare_field("N", want->n, have->n, out) +
	       compare_field("device_name", want->device, have->device, out) +
	       compare_field("dtype", want->dtype, have->dtype, out) +
	       compare_field("block_shape", want->block, have->block, out);
}

struct nearest {
	struct parsed want;
	int misses;
	char *path; /* owned */
	km_buf what;
};

static int by_name(const struct dirent **a, const struct dirent **b)
{
	return strcmp((*a)->d_name, (*b)->d_name);
}

static void look_in(struct nearest *near, const char *root, const char *dir)
{
	char *path = km_xasprintf("%s/%s", root, dir);
	struct dirent **names = NULL;
	int count = scandir(path, &names, NULL, by_name);

	for (int i = 0; i < count; i++) {
		struct parsed have;
		km_buf what = KM_BUF_INIT;
		int misses;

		if (i < MAX_LISTED && parse_name(dir, names[i]->d_name, &have) &&
		    have.down == near->want.down) {
			misses = compare_names(&near->want, &have, &what);
			if (!near->path || misses < near->misses) {
				km_buf swap = near->what;

				free(near->path);
				near->path = km_xasprintf("%s/%s", path, names[i]->d_name);
				near->misses = misses;
				near->what = what;
				what = swap;
			}
		}
		km_buf_release(&what);
		free(names[i]);
	}
	free(names);
	free(path);
}

/* Which of the files under root comes closest, and where it differs. */
static void explain_miss(const char *root, const km_tune_key *key, const char *path, km_buf *why)
{
	struct nearest near = { .misses = 0 };
	char dir[32], name[KM_TUNE_NAME];
	struct dirent **dirs = NULL;
	int count = scandir(root, &dirs, NULL, by_name);

	km_tune_dir_name(key, dir);
	km_tune_file_name(key, name);
	parse_name(dir, name, &near.want);
	for (int i = 0; i < count; i++) {
		if (!strncmp(dirs[i]->d_name, "cuda_", 5))
			look_in(&near, root, dirs[i]->d_name);
		free(dirs[i]);
	}
	free(dirs);
	if (near.path)
		km_buf_printf(why, "there is no tuning file %s; the nearest is %s: %s", path,
		              near.path, near.misses ? near.what.data : "it cannot be opened");
	else
		km_buf_printf(why, "there is no tuning file %s, and no other under %s", path, root);
	free(near.path);
	km_buf_release(&near.what);
}

int km_tune_find(km_tune_table *table, const char *root, const km_tune_key *key,
                 const km_tune_problem *problem, const km_tune_schema *schema, bool required,
                 km_buf *why, km_err *err)
{
	char *path = km_tune_path(root, key);
	int rc = km_tune_read(table, path, problem, schema, err);

	if (rc == KM_ENOTFOUND) {
		km_buf miss = KM_BUF_INIT;

		if (access(path, F_OK) == 0)
			km_buf_puts(&miss, err->msg);
		else
			explain_miss(root, key, path, &miss);
		rc = required ? km_fail(err, KM_ENOTFOUND, "%s", miss.data) : 0;
		km_buf_puts(why, miss.data);
		km_buf_release(&miss);
	} else if (rc >= 0) {
		rc = 1;
	}
	free(path);
	return rc;
}
