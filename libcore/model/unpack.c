/*
 * Out of the layout: the files as they were before. A file's old header is in its metadata, word
 * for word; each tensor that it lists is copied, or is part of a repacked one: codes, scales or
 * shape of gate, up or down (model/originals.h). Before anything is written, all that is there has
 * its place in one of the files. A repacked tensor is read, held against its checksum and unpacked
 * once for each file that has parts of it: once, but at the border of two files.
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

struct unpack {
	km_repacker base;
	int64_t bytes, tensors, experts;
};

struct old_file {
	struct unpack *u;
	const km_original_file *was;
	uint64_t data_at;
	struct piece {
		int target, count; /* parts: targets of one repacked tensor */
		uint64_t begin;    /* copies */
	} * pieces;
	int piece_count;
	km_outfile out;
};

/* ---- one file ------------------------------------------------------------------------------- */

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
	const km_original *targets = f->was->tensors;
	int cap = 0, i = 0, n;

	for (; i < f->was->parts; i += n) {
		for (n = 1; i + n < f->was->parts && targets[i + n].from == targets[i].from; n++)
			;
		add_piece(f, &cap, (struct piece){ i, n, 0 });
	}
	for (; i < f->was->before.count; i++)
		for (uint64_t at = 0; at < targets[i].t->bytes; at += KM_COPY_BYTES)
			add_piece(f, &cap, (struct piece){ i, 1, at });
}

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
static void shape_bytes(const struct unpack *u, const km_original *to, unsigned char out[16])
{
	const km_config *c = &u->base.config;
	int32_t shape[2] = { to->down ? c->hidden_size : c->moe_intermediate_size,
		             to->down ? c->moe_intermediate_size : c->hidden_size };
	int64_t wide[2] = { shape[0], shape[1] };

	memcpy(out, to->t->dtype == KM_I32 ? (const void *)shape : wide, to->t->bytes);
}

static int write_part(struct old_file *f, const km_original *to, const km_int4_matrix *m,
                      km_err *err)
{
	unsigned char shape[16];
	const void *data = to->what == KM_ORIGINAL_CODES ? (const void *)m->codes : m->scales;

	if (to->what == KM_ORIGINAL_SHAPE) {
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
	const km_original *first = &f->was->tensors[piece->target];
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
	const km_original *to = &f->was->tensors[piece->target];

	if (to->part)
		return unpack_piece(f, piece, buffer, err);
	return km_repack_copy(&f->u->base, to->from, piece->begin, &f->out,
	                      f->data_at + to->t->offset, buffer, err);
}

static int fill_file(struct old_file *f, km_err *err)
{
	const char *header = f->was->header;
	size_t len = strlen(header);
	unsigned char size[8];

	for (int i = 0; i < 8; i++)
		size[i] = (unsigned char)((uint64_t)len >> 8 * i & 0xff);
	f->data_at = 8 + len;
	KM_TRY(km_outfile_reserve(&f->out, f->data_at + f->was->bytes, err));
	KM_TRY(km_outfile_write_at(&f->out, 0, size, 8, err));
	KM_TRY(km_outfile_write_at(&f->out, 8, header, len, err));
	KM_TRY(km_repack_pieces(&f->u->base, f->piece_count, do_piece, f, err));
	return km_outfile_commit(&f->out, err);
}

static int write_file(struct unpack *u, const km_original_file *was, km_err *err)
{
	struct old_file f = { .u = u, .was = was, .out = { .fd = -1 } };
	char *path = km_xasprintf("%s%s", u->base.out.temp, strrchr(was->now->path, '/'));
	int rc;

	plan_pieces(&f);
	rc = km_outfile_open(&f.out, path, err);
	if (rc >= 0)
		rc = fill_file(&f, err);
	u->bytes += (int64_t)was->bytes;
	u->tensors += was->before.count;
	km_outfile_release(&f.out);
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

	for (int f = 0; f < b->originals.count; f++)
		bytes += b->originals.files[f].bytes;
	KM_TRY(km_repack_open_out(b, bytes, err));
	km_progress_init(&b->progress, "unpacking", "B", (int64_t)bytes, b->options->quiet);
	rc = km_repack_copy_rest(b, err);
	for (int f = 0; f < b->originals.count && rc >= 0; f++)
		rc = write_file(u, &b->originals.files[f], err);
	KM_TRY(rc);
	km_progress_finish(&b->progress);
	if (b->cp.shards.indexed)
		KM_TRY(km_repack_copy_file(b, KM_ORIGINAL_INDEX, "model.safetensors.index.json",
		                           err));
	KM_TRY(write_config(u, err));
	return km_outdir_commit(&b->out, err);
}

static int open_originals(struct unpack *u, km_err *err)
{
	km_repacker *b = &u->base;
	km_findings findings;
	int rc;

	if (!b->config.expert_layout)
		return km_fail(err, KM_EINVAL,
		               "%s: is not repacked (config.json has no kimi_repacked)",
		               b->options->dir);
	km_findings_init(&findings, 1);
	km_originals_open(&b->originals, &b->cp, &b->config, &findings);
	rc = km_findings_fail(&findings, err);
	km_findings_release(&findings);
	return rc;
}

int km_unpack(const km_repack_options *options, km_repack_result *result, km_err *err)
{
	struct unpack u = { .bytes = 0 };
	int rc = km_repack_open(&u.base, options, count_module, &u, err);

	if (rc >= 0)
		rc = open_originals(&u, err);
	if (rc >= 0)
		rc = write_all(&u, err);
	*result = (km_repack_result){ u.base.originals.count, u.tensors, u.bytes, u.experts };
	km_repack_close(&u.base);
	return rc;
}
