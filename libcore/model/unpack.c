/*
 * Out of the layout: the files as they were before. A file's old header is in its metadata, word
 * for word; each tensor that it lists is copied, or is part of a repacked one: codes, scales or
 * shape of gate, up or down. A repacked tensor is read, held against its checksum and unpacked once
 * for each file that has parts of it: once, but at the border of two files.
 */
#include "model/repack.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "format/checksum.h"
#include "format/json.h"
#include "format/moe_layout.h"
#include "model/repack_files.h"

enum { MAX_CONFIG = 16 << 20 };

enum what { CODES, SCALES, SHAPE };

struct unpack {
	km_repacker base;
	int64_t bytes, tensors, experts;
};

/* A tensor of the old header, and where it comes from. */
struct target {
	const km_tensor *t;    /* old */
	const km_tensor *from; /* now: itself, or the repacked tensor that it is part of */
	bool part, down;
	int matrix; /* gate 0, up 1 */
	enum what what;
};

struct old_file {
	struct unpack *u;
	km_safetensors header;
	struct target *targets; /* [header.count], parts by repacked tensor, then copies */
	int parts;
	uint64_t data_at, bytes;
	struct piece {
		int target, count; /* parts: targets of one repacked tensor */
		uint64_t begin;    /* copies */
	} * pieces;
	int piece_count;
	km_outfile out;
};

/* ---- what comes from where ------------------------------------------------------------------ */

static const km_tensor *find(const struct unpack *u, const char *key, size_t len)
{
	int64_t at = km_name_map_find(&u->base.cp.keys, key, len);

	return at < 0 ? NULL : u->base.cp.shards.tensors[at];
}

/* "layers.3.mlp.experts.7.up_proj.weight_scale": of which repacked tensor, and what of it. */
static const km_tensor *find_whole(const struct unpack *u, const char *key, struct target *to)
{
	static const char *const whats[] = { "weight_packed", "weight_scale", "weight_shape" };
	const char *suffix = strrchr(key, '.'), *proj = suffix;
	char module[32], name[320];

	if (!suffix)
		return NULL;
	while (proj > key && proj[-1] != '.')
		proj--;
	if (proj == key || suffix - proj >= (ptrdiff_t)sizeof(module))
		return NULL;
	memcpy(module, proj, (size_t)(suffix - proj));
	module[suffix - proj] = '\0';
	to->down = !strcmp(module, "down_proj");
	to->matrix = !strcmp(module, "up_proj");
	if (!to->down && !to->matrix && strcmp(module, "gate_proj") != 0)
		return NULL;
	for (int i = 0; i < 3; i++) {
		if (strcmp(suffix + 1, whats[i]) != 0)
			continue;
		to->what = (enum what)i;
		snprintf(name, sizeof(name), "%.*s%s.weight_repacked", (int)(proj - key), key,
		         to->down ? "down_proj" : "gate_up_proj");
		return find(u, name, strlen(name));
	}
	return NULL;
}

/* Is the old tensor of the kind that the unpacked part is? */
static bool part_fits(const struct unpack *u, const struct target *to)
{
	const km_config *c = &u->base.config;
	const km_tensor *t = to->t;
	int64_t rows = to->down ? c->hidden_size : c->moe_intermediate_size;
	int64_t cols = to->down ? c->moe_intermediate_size : c->hidden_size;

	switch (to->what) {
	case CODES:
		return t->dtype == KM_I32 && t->ndim == 2 && t->shape[0] == rows &&
		       t->shape[1] == cols / 8;
	case SCALES:
		return t->dtype == KM_BF16 && t->ndim == 2 && t->shape[0] == rows &&
		       t->shape[1] == cols / c->quant.group_size;
	case SHAPE:
		return (t->dtype == KM_I32 || t->dtype == KM_I64) && t->ndim == 1 &&
		       t->shape[0] == 2;
	}
	return false;
}

static int find_target(struct old_file *f, const km_tensor *t, struct target *to, km_err *err)
{
	struct unpack *u = f->u;
	const char *key;

	*to = (struct target){ .t = t };
	km_name_key(t->name, &key);
	to->from = find(u, key, strlen(key));
	if (to->from && to->from->dtype == t->dtype && to->from->bytes == t->bytes &&
	    to->from->ndim == t->ndim && !memcmp(to->from->shape, t->shape, sizeof(t->shape)))
		return 0;
	to->from = find_whole(u, key, to);
	to->part = true;
	if (to->from && part_fits(u, to))
		return 0;
	return km_fail(err, KM_EFORMAT,
	               "%s: " KM_META_HEADER
	               " lists tensor %s, which cannot be made from what is there",
	               f->header.path, t->name);
}

static int by_source(const void *a, const void *b)
{
	const struct target *x = a, *y = b;

	if (x->part != y->part)
		return x->part ? -1 : 1;
	if (x->part && x->from->file != y->from->file)
		return x->from->file < y->from->file ? -1 : 1;
	if (x->part && x->from->offset != y->from->offset)
		return x->from->offset < y->from->offset ? -1 : 1;
	return (x->t->offset > y->t->offset) - (x->t->offset < y->t->offset);
}

static int plan_targets(struct old_file *f, km_err *err)
{
	f->targets = km_xcalloc((size_t)f->header.count + 1, sizeof(*f->targets));
	for (int i = 0; i < f->header.count; i++) {
		KM_TRY(find_target(f, &f->header.tensors[i], &f->targets[i], err));
		f->parts += f->targets[i].part;
		f->bytes += f->header.tensors[i].bytes;
	}
	qsort(f->targets, (size_t)f->header.count, sizeof(*f->targets), by_source);
	return 0;
}

static void add_piece(struct old_file *f, int *cap, struct piece piece)
{
	if (f->piece_count == *cap) {
		*cap = *cap ? *cap * 2 : 256;
		f->pieces = km_xreallocarray(f->pieces, (size_t)*cap, sizeof(*f->pieces));
	}
	f->pieces[f->piece_count++] = piece;
}

static void plan_pieces(struct old_file *f)
{
	int cap = 0, i = 0, n;

	for (; i < f->parts; i += n) {
		for (n = 1; i + n < f->parts && f->targets[i + n].from == f->targets[i].from; n++)
			;
		add_piece(f, &cap, (struct piece){ i, n, 0 });
	}
	for (; i < f->header.count; i++)
		for (uint64_t at = 0; at < f->targets[i].t->bytes; at += KM_COPY_BYTES)
			add_piece(f, &cap, (struct piece){ i, 1, at });
}

/* ---- one file ------------------------------------------------------------------------------- */

static int read_whole(struct unpack *u, const km_tensor *t, unsigned char *to, km_err *err)
{
	uint64_t want, sum;

	KM_TRY(km_repack_checksum(&u->base.cp.shards, t, &want, err));
	KM_TRY(km_repack_read(&u->base, t, 0, to, t->bytes, err));
	sum = km_checksum(to, t->bytes, 0);
	if (sum == want)
		return 0;
	return km_fail(err, KM_EFORMAT,
	               "%s: tensor %s: is damaged: its checksum is %016" PRIx64 ", %016" PRIx64
	               " was written",
	               km_shards_path(&u->base.cp.shards, t), t->name, sum, want);
}

/* weight_shape of [rows, cols], as I32 or I64. */
static void shape_bytes(const struct unpack *u, const struct target *to, unsigned char out[16])
{
	const km_config *c = &u->base.config;
	int32_t shape[2] = { to->down ? c->hidden_size : c->moe_intermediate_size,
		             to->down ? c->moe_intermediate_size : c->hidden_size };
	int64_t wide[2] = { shape[0], shape[1] };

	memcpy(out, to->t->dtype == KM_I32 ? (const void *)shape : wide, to->t->bytes);
}

static int write_part(struct old_file *f, const struct target *to, const km_int4_matrix *m,
                      km_err *err)
{
	unsigned char shape[16];
	const void *data = to->what == CODES ? (const void *)m->codes : m->scales;

	if (to->what == SHAPE) {
		shape_bytes(f->u, to, shape);
		data = shape;
	}
	KM_TRY(km_outfile_write_at(&f->out, f->data_at + to->t->offset, data, to->t->bytes, err));
	km_progress_add(&f->u->base.progress, (int64_t)to->t->bytes);
	return 0;
}

static int unpack_piece(struct old_file *f, const struct piece *piece, km_piece_buffer *buffer,
                        km_err *err)
{
	const struct target *first = &f->targets[piece->target];
	const km_config *c = &f->u->base.config;
	int hidden = c->hidden_size, inner = c->moe_intermediate_size, group = c->quant.group_size;
	size_t codes = (size_t)hidden * (size_t)inner / 2,
	       scales = (size_t)hidden * (size_t)(inner / group) * 2;
	const km_tensor *t = first->from;
	unsigned char *p = km_piece_memory(buffer, t->bytes + 2 * (codes + scales)),
		      *at = p + t->bytes;
	km_int4_matrix m[2];

	if (!p)
		return km_fail(err, KM_ENOMEM, "tensor %s: there is no memory to unpack it",
		               t->name);
	KM_TRY(read_whole(f->u, t, p, err));
	for (int i = 0; i < 2; i++, at += codes + scales)
		m[i] = (km_int4_matrix){ (uint32_t *)(void *)at, (uint16_t *)(void *)(at + codes) };
	if (first->down)
		km_moe_unpack_down(hidden, inner, group, p, &m[0]);
	else
		km_moe_unpack_gate_up(hidden, inner, group, p, &m[0], &m[1]);
	for (int i = 0; i < piece->count; i++)
		KM_TRY(write_part(f, &first[i], &m[first[i].matrix], err));
	return 0;
}

static int do_piece(void *context, int i, km_piece_buffer *buffer, km_err *err)
{
	struct old_file *f = context;
	const struct piece *piece = &f->pieces[i];
	const struct target *to = &f->targets[piece->target];

	if (to->part)
		return unpack_piece(f, piece, buffer, err);
	return km_repack_copy(&f->u->base, to->from, piece->begin, &f->out,
	                      f->data_at + to->t->offset, buffer, err);
}

static int fill_file(struct old_file *f, const char *header, size_t len, km_err *err)
{
	unsigned char size[8];

	for (int i = 0; i < 8; i++)
		size[i] = (unsigned char)((uint64_t)len >> 8 * i & 0xff);
	f->data_at = 8 + len;
	KM_TRY(km_outfile_reserve(&f->out, f->data_at + f->bytes, err));
	KM_TRY(km_outfile_write_at(&f->out, 0, size, 8, err));
	KM_TRY(km_outfile_write_at(&f->out, 8, header, len, err));
	KM_TRY(km_repack_pieces(&f->u->base, f->piece_count, do_piece, f, err));
	return km_outfile_commit(&f->out, err);
}

static const char *header_of(const km_safetensors *file, km_err *err)
{
	const char *header = km_safetensors_metadata(file, KM_META_HEADER);

	if (!header)
		km_fail(err, KM_EFORMAT,
		        "%s: has no " KM_META_HEADER ": what it was before is not known",
		        file->path);
	return header;
}

static int write_file(struct unpack *u, const km_safetensors *now, km_err *err)
{
	struct old_file f = { .u = u, .out = { .fd = -1 } };
	char *path = km_xasprintf("%s%s", u->base.out.temp, strrchr(now->path, '/'));
	const char *header = header_of(now, err);
	int rc = header ? km_safetensors_parse_header(&f.header, header, strlen(header), now->path,
	                                              err)
	                : KM_EFORMAT;

	if (rc >= 0)
		rc = plan_targets(&f, err);
	if (rc >= 0) {
		plan_pieces(&f);
		rc = km_outfile_open(&f.out, path, err);
	}
	if (rc >= 0)
		rc = fill_file(&f, header, strlen(header), err);
	u->bytes += (int64_t)f.bytes;
	u->tensors += f.header.count;
	km_outfile_release(&f.out);
	if (f.header.path)
		km_safetensors_close(&f.header);
	free(f.targets);
	free(f.pieces);
	free(path);
	return rc;
}

/* ---- the folder ----------------------------------------------------------------------------- */

/* The config's text without the mark that repacking put in. */
static int write_config(const struct unpack *u, km_err *err)
{
	char *path = km_xasprintf("%s/config.json", u->base.options->dir), *text = NULL;
	char mark[128];
	const char *at;
	size_t len = 0;
	int rc = km_read_file(path, MAX_CONFIG, &text, &len, err);

	snprintf(mark, sizeof(mark), KM_REPACK_MARK_BEGIN "%d},", u->base.config.expert_layout);
	at = rc >= 0 ? strstr(text, mark) : NULL;
	if (rc >= 0 && !at)
		rc = km_fail(err, KM_EFORMAT,
		             "%s: kimi_repacked is not as kimi-convert wrote it; it is expected "
		             "as '%s'",
		             path, mark + 3);
	if (rc >= 0) {
		size_t before = (size_t)(at - text), after = before + strlen(mark);
		char *out = km_xmalloc(len + 1);

		memcpy(out, text, before);
		memcpy(out + before, text + after, len - after);
		rc = km_repack_save(&u->base, "config.json", out, len - strlen(mark), err);
		free(out);
	}
	free(text);
	free(path);
	return rc;
}

static int count_module(void *context, const km_module *m,
                        const km_tensor *const t[KM_MAX_MODULE_TENSORS], km_err *err)
{
	struct unpack *u = context;

	(void)t, (void)err;
	u->experts += m->form == KM_FORM_REPACKED;
	return 0;
}

static int write_all(struct unpack *u, km_err *err)
{
	km_repacker *b = &u->base;
	uint64_t bytes = 0;
	int rc = 0;

	/* what is written is as large as what is there, but for headers */
	for (int f = 0; f < b->cp.shards.file_count; f++)
		for (int i = 0; i < b->cp.shards.files[f].count; i++)
			bytes += b->cp.shards.files[f].tensors[i].bytes;
	KM_TRY(km_outdir_open(&b->out, b->options->out_dir, bytes + 64000000, err));
	km_progress_init(&b->progress, "unpacking", "B", (int64_t)bytes, b->options->quiet);
	rc = km_repack_copy_rest(b, err);
	for (int f = 0; f < b->cp.shards.file_count && rc >= 0; f++)
		rc = write_file(u, &b->cp.shards.files[f], err);
	KM_TRY(rc);
	km_progress_finish(&b->progress);
	if (b->cp.shards.indexed)
		KM_TRY(km_repack_copy_file(b, KM_ORIGINAL_INDEX, "model.safetensors.index.json",
		                           err));
	KM_TRY(write_config(u, err));
	return km_outdir_commit(&b->out, err);
}

int km_unpack(const km_repack_options *options, km_repack_result *result, km_err *err)
{
	struct unpack u = { .bytes = 0 };
	int rc = km_repack_open(&u.base, options, count_module, &u, err);

	if (rc >= 0 && !u.base.config.expert_layout)
		rc = km_fail(err, KM_EINVAL,
		             "%s: is not repacked (config.json has no kimi_repacked)",
		             options->dir);
	if (rc >= 0)
		rc = write_all(&u, err);
	*result = (km_repack_result){ u.base.cp.shards.file_count, u.tensors, u.bytes, u.experts };
	km_repack_close(&u.base);
	return rc;
}
