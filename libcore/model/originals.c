#include "model/originals.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "format/json.h"
#include "format/moe_layout.h"

enum { MAX_INDEX = 512 << 20, MATRIX_PARTS = 3, COPIED = 1 << 2 * MATRIX_PARTS };

struct maker {
	km_originals *out;
	const km_checkpoint *cp;
	const km_config *config;
	km_findings *findings;
	unsigned char *used; /* [cp->shards.count]: 1 << part for each that is old, or COPIED */
	bool broken;         /* there was a finding */
};

/* ---- what comes from where ------------------------------------------------------------------ */

static int64_t find(const struct maker *m, const char *key, size_t len)
{
	return km_name_map_find(&m->cp->keys, key, len);
}

/* "layers.3.mlp.experts.7.up_proj.weight_scale": of which repacked tensor, and what of it. */
static int64_t find_whole(const struct maker *m, const char *key, km_original *to)
{
	static const char *const whats[] = { "weight_packed", "weight_scale", "weight_shape" };
	const char *suffix = strrchr(key, '.'), *proj = suffix;
	char module[32], name[320];
	int len;

	if (!suffix)
		return -1;
	while (proj > key && proj[-1] != '.')
		proj--;
	if (proj == key || suffix - proj >= (ptrdiff_t)sizeof(module))
		return -1;
	memcpy(module, proj, (size_t)(suffix - proj));
	module[suffix - proj] = '\0';
	to->down = !strcmp(module, "down_proj");
	to->matrix = !strcmp(module, "up_proj");
	if (!to->down && !to->matrix && strcmp(module, "gate_proj") != 0)
		return -1;
	for (int i = 0; i < 3; i++) {
		if (strcmp(suffix + 1, whats[i]) != 0)
			continue;
		to->what = (enum km_original_what)i;
		len = snprintf(name, sizeof(name), "%.*s%s.weight_repacked", (int)(proj - key), key,
		               to->down ? "down_proj" : "gate_up_proj");
		return (size_t)len < sizeof(name) ? find(m, name, (size_t)len) : -1;
	}
	return -1;
}

static bool is_same(const km_tensor *a, const km_tensor *b)
{
	return a->dtype == b->dtype && a->bytes == b->bytes && a->ndim == b->ndim &&
	       !memcmp(a->shape, b->shape, sizeof(a->shape));
}

/* Is the old tensor of the kind that the unpacked part is? */
static bool part_fits(const km_config *c, const km_original *to)
{
	const km_tensor *t = to->t;
	int64_t rows = to->down ? c->hidden_size : c->moe_intermediate_size;
	int64_t cols = to->down ? c->moe_intermediate_size : c->hidden_size;

	switch (to->what) {
	case KM_ORIGINAL_CODES:
		return t->dtype == KM_I32 && t->ndim == 2 && t->shape[0] == rows &&
		       t->shape[1] == cols / 8;
	case KM_ORIGINAL_SCALES:
		return t->dtype == KM_BF16 && t->ndim == 2 && t->shape[0] == rows &&
		       t->shape[1] == cols / c->quant.group_size;
	case KM_ORIGINAL_SHAPE:
		return (t->dtype == KM_I32 || t->dtype == KM_I64) && t->ndim == 1 &&
		       t->shape[0] == 2;
	}
	return false;
}

/* The number of the tensor that it is made from, or -1. */
static int64_t find_source(const struct maker *m, const km_tensor *t, km_original *to)
{
	const char *key;
	int64_t at;

	*to = (km_original){ .t = t };
	km_name_key(t->name, &key);
	at = find(m, key, strlen(key));
	if (at >= 0 && is_same(m->cp->shards.tensors[at], t))
		return at;
	to->part = true;
	at = find_whole(m, key, to);
	return at >= 0 && part_fits(m->config, to) ? at : -1;
}

static void add_tensor(struct maker *m, km_original_file *f, const km_tensor *t, km_original *to)
{
	int64_t at = find_source(m, t, to);
	int bit = to->part ? 1 << (to->matrix * MATRIX_PARTS + (int)to->what) : COPIED;
	const char *why = at < 0 ? "cannot be made from what is there" :
	                  m->used[at] & bit ? "is made for another file already" : NULL;

	f->parts += to->part;
	f->bytes += t->bytes;
	if (why) {
		m->broken = true;
		km_findings_add(m->findings, KM_EFORMAT,
		                "%s: " KM_META_HEADER " lists tensor %s, which %s", f->now->path,
		                t->name, why);
		return;
	}
	to->from = m->cp->shards.tensors[at];
	m->used[at] |= (unsigned char)bit;
}

static int by_source(const void *a, const void *b)
{
	const km_original *x = a, *y = b;

	if (x->part != y->part)
		return x->part ? -1 : 1;
	if (x->part && x->from->file != y->from->file)
		return x->from->file < y->from->file ? -1 : 1;
	if (x->part && x->from->offset != y->from->offset)
		return x->from->offset < y->from->offset ? -1 : 1;
	return (x->t->offset > y->t->offset) - (x->t->offset < y->t->offset);
}

/* ---- the files ------------------------------------------------------------------------------ */

static int read_header(km_original_file *f, km_err *err)
{
	char *name;
	int rc;

	f->header = km_safetensors_metadata(f->now, KM_META_HEADER);
	if (!f->header)
		return km_fail(err, KM_EFORMAT,
		               "%s: has no " KM_META_HEADER ": what it was before is not known",
		               f->now->path);
	name = km_xasprintf("%s: " KM_META_HEADER, f->now->path);
	rc = km_safetensors_parse_header(&f->before, f->header, strlen(f->header), name, err);
	free(name);
	return rc;
}

static void add_file(struct maker *m, const km_safetensors *now)
{
	km_original_file *f = &m->out->files[m->out->count++];
	km_err err;

	f->now = now;
	if (read_header(f, &err) < 0) {
		m->broken = true;
		km_findings_add_err(m->findings, &err);
		return;
	}
	f->tensors = km_xcalloc((size_t)f->before.count + 1, sizeof(*f->tensors));
	for (int i = 0; i < f->before.count; i++)
		add_tensor(m, f, &f->before.tensors[i], &f->tensors[i]);
	if (!m->broken)
		qsort(f->tensors, (size_t)f->before.count, sizeof(*f->tensors), by_source);
}

static void add_bare(struct maker *m, const char *name)
{
	km_originals *o = m->out;
	char *path = km_xasprintf("%s/%s", m->cp->shards.dir, name);
	km_safetensors *file;
	km_err err;

	o->bare = km_xreallocarray(o->bare, (size_t)o->bare_count + 1, sizeof(*o->bare));
	file = &o->bare[o->bare_count++];
	if (km_safetensors_open(file, path, &err) < 0) {
		m->broken = true;
		km_findings_add_err(m->findings, &err);
		file->data_at = 0;
	}
	free(path);
}

/* Opens each file that the original index names and the checkpoint lacks. */
static void add_bare_of(struct maker *m, const km_shard_index *index)
{
	const km_shards *shards = &m->cp->shards;
	km_name_map names;

	km_name_map_init(&names, (size_t)shards->file_count);
	for (int i = 0; i < shards->file_count; i++) {
		const char *name = strrchr(shards->files[i].path, '/') + 1;

		km_name_map_add(&names, name, strlen(name), i);
	}
	for (int64_t e = 0; e < index->count; e++) {
		const char *name = index->entries[e].file;

		if (km_name_map_add(&names, name, strlen(name), shards->file_count + e) < 0)
			add_bare(m, name);
	}
	km_name_map_release(&names);
}

static void open_bare(struct maker *m)
{
	char *path = km_xasprintf("%s/" KM_ORIGINAL_INDEX, m->cp->shards.dir), *text = NULL;
	km_shard_index index = { .entries = NULL };
	km_arena names;
	size_t len = 0;
	km_err err;
	int rc;

	km_arena_init(&names, 1 << 16);
	rc = km_read_file(path, MAX_INDEX, &text, &len, &err);
	if (rc >= 0)
		rc = km_shard_index_parse(&index, text, len, path, &names, &err);
	if (rc >= 0) {
		add_bare_of(m, &index);
	} else {
		m->broken = true;
		km_findings_add_err(m->findings, &err);
	}
	km_shard_index_release(&index);
	km_arena_release(&names);
	free(text);
	free(path);
}

/* ---- nothing is lost ------------------------------------------------------------------------ */

/* What must be made from a tensor: all that went into it. */
static int all_of(const km_tensor *t)
{
	if (km_name_ends(t->name, ".gate_up_proj.weight_repacked"))
		return (1 << 2 * MATRIX_PARTS) - 1;
	return km_name_ends(t->name, ".down_proj.weight_repacked") ? (1 << MATRIX_PARTS) - 1 : COPIED;
}

static void report_lost(const struct maker *m)
{
	const km_shards *shards = &m->cp->shards;

	for (int64_t i = 0; i < shards->count; i++)
		if (m->used[i] != all_of(shards->tensors[i]))
			km_findings_add(m->findings, KM_EFORMAT,
			                "%s: tensor %s: no " KM_META_HEADER
			                " lists %s: unpacking would lose it",
			                km_shards_path(shards, shards->tensors[i]),
			                shards->tensors[i]->name,
			                all_of(shards->tensors[i]) == COPIED ?
			                        "it" : "all that it was made of");
}

void km_originals_open(km_originals *o, const km_checkpoint *cp, const km_config *config,
                       km_findings *findings)
{
	struct maker m = { o, cp, config, findings, NULL, false };

	*o = (km_originals){ .count = 0 };
	m.used = km_xcalloc((size_t)cp->shards.count, 1);
	if (cp->shards.indexed)
		open_bare(&m);
	o->files = km_xcalloc((size_t)(cp->shards.file_count + o->bare_count), sizeof(*o->files));
	for (int i = 0; i < cp->shards.file_count; i++)
		add_file(&m, &cp->shards.files[i]);
	for (int i = 0; i < o->bare_count; i++)
		if (o->bare[i].data_at) /* opened */
			add_file(&m, &o->bare[i]);
	if (!m.broken)
		report_lost(&m);
	free(m.used);
}

void km_originals_close(km_originals *o)
{
	for (int i = 0; i < o->count; i++) {
		if (o->files[i].before.path)
			km_safetensors_close(&o->files[i].before);
		free(o->files[i].tensors);
	}
	for (int i = 0; i < o->bare_count; i++)
		km_safetensors_close(&o->bare[i]);
	free(o->files);
	free(o->bare);
	*o = (km_originals){ .count = 0 };
}
