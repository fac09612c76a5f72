/*
 * Into the layout. The inventory's walk gives the three linears of an expert one after another:
 * gate and up make one repacked tensor, in the file that gate's codes are in, down another. What no
 * repacked tensor takes is copied. A file's header is written last: its checksums are known then,
 * and have the same length as the zeros that kept their place.
 */
#include "model/repack.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "format/checksum.h"
#include "format/json.h"
#include "format/moe_layout.h"
#include "model/repack_files.h"

enum { MAX_CONFIG = 16 << 20, PAGE = 4096 };

/* The tensors of one linear, and its shape. */
struct linear {
	const km_tensor *codes, *scales, *shape;
	int rows, cols;
};

struct packed {
	km_tensor t;           /* what is written; file is the source's */
	struct linear from[2]; /* gate, up; or down */
	int count;
	uint64_t sum;
};

struct repack {
	km_repacker base;
	struct packed *packed;
	int count, cap;
	struct linear gate; /* of the expert that the walk is in */
	int gate_layer, gate_expert;
	unsigned char *gone; /* [all tensors, by file]: replaced by a repacked one */
	int64_t *first;      /* number of a file's first tensor in `gone` */
	km_arena names;
	int64_t bytes, tensors;
};

/* One output file: repacked tensors, then the others. */
struct shard {
	struct repack *r;
	int file;
	km_tensor *tensors; /* [packed + copies], offsets set */
	const void **from;  /* beside: struct packed *, or the km_tensor copied */
	int packed, count;
	uint64_t data_at;
	struct piece {
		int tensor;
		uint64_t begin;
	} * pieces;
	int piece_count;
	km_outfile out;
};

/* ---- what becomes what ---------------------------------------------------------------------- */

static unsigned char *gone_of(struct repack *r, const km_tensor *t)
{
	return &r->gone[r->first[t->file] + (t - r->base.cp.shards.files[t->file].tensors)];
}

/* "...experts.7.up_proj.weight_packed" to "...experts.7." and the new end. */
static const char *new_name(struct repack *r, const char *old, const char *end)
{
	size_t stem = strlen(old);
	char *name;

	for (int dots = 0; dots < 2; stem--)
		dots += old[stem - 1] == '.';
	stem++;
	name = km_arena_alloc(&r->names, stem + strlen(end) + 1);
	memcpy(name, old, stem);
	memcpy(name + stem, end, strlen(end) + 1);
	return name;
}

static int check_linear(const struct repack *r, const struct linear *l, km_err *err)
{
	const km_shards *shards = &r->base.cp.shards;
	int64_t shape[2] = { 0, 0 };
	int32_t narrow[2];

	if (l->scales->dtype != KM_BF16)
		return km_fail(err, KM_EUNSUPPORTED,
		               "%s: tensor %s: the GPU's layout has scales in BF16, this is %s",
		               km_shards_path(shards, l->scales), l->scales->name,
		               km_dtype_name(l->scales->dtype));
	if (l->shape->dtype == KM_I64) {
		KM_TRY(km_repack_read(&r->base, l->shape, 0, shape, 16, err));
	} else {
		KM_TRY(km_repack_read(&r->base, l->shape, 0, narrow, 8, err));
		shape[0] = narrow[0];
		shape[1] = narrow[1];
	}
	if (shape[0] == l->rows && shape[1] == l->cols)
		return 0;
	return km_fail(err, KM_EFORMAT,
	               "%s: tensor %s: says [%" PRId64 ", %" PRId64 "], the config [%d, %d]",
	               km_shards_path(shards, l->shape), l->shape->name, shape[0], shape[1],
	               l->rows, l->cols);
}

static int add_packed(struct repack *r, const struct linear *from, int count, km_err *err)
{
	const km_config *c = &r->base.config;
	int hidden = c->hidden_size, inner = c->moe_intermediate_size, group = c->quant.group_size;
	struct packed p = { .count = count };

	for (int i = 0; i < count; i++) {
		KM_TRY(check_linear(r, &from[i], err));
		p.from[i] = from[i];
		*gone_of(r, from[i].codes) = *gone_of(r, from[i].scales) =
			*gone_of(r, from[i].shape) = 1;
	}
	p.t = (km_tensor){ .dtype = KM_U8, .ndim = 3, .file = from[0].codes->file };
	p.t.name =
		new_name(r, from[0].codes->name,
	                 count == 2 ? "gate_up_proj.weight_repacked" : "down_proj.weight_repacked");
	p.t.shape[0] = (count == 2 ? 2 * inner : hidden) / KM_MOE_RECORD_ROWS;
	p.t.shape[1] = (count == 2 ? hidden : inner) / KM_MOE_RECORD_COLS;
	p.t.shape[2] = KM_MOE_RECORD_BYTES(group);
	p.t.bytes = count == 2 ? km_moe_gate_up_bytes(hidden, inner, group)
	                       : km_moe_down_bytes(hidden, inner, group);
	if (r->count == r->cap) {
		r->cap = r->cap ? r->cap * 2 : 256;
		r->packed = km_xreallocarray(r->packed, (size_t)r->cap, sizeof(*r->packed));
	}
	r->packed[r->count++] = p;
	return 0;
}

static int begin(struct repack *r, km_err *err)
{
	const km_config *c = &r->base.config;
	const km_shards *shards = &r->base.cp.shards;

	if (c->expert_layout)
		return km_fail(err, KM_EINVAL, "%s: is repacked already", r->base.options->dir);
	if (c->quant.method != KM_QUANT_INT4_PACKED || !c->n_routed_experts)
		return km_fail(err, KM_EUNSUPPORTED,
		               "%s: has no int4 experts; those alone have a layout for GPUs",
		               r->base.options->dir);
	KM_TRY(km_moe_layout_check(c->hidden_size, c->moe_intermediate_size, c->quant.group_size,
	                           err) < 0
	               ? km_fail_within(err, "%s", r->base.options->dir)
	               : 0);
	r->first = km_xcalloc((size_t)shards->file_count + 1, sizeof(*r->first));
	for (int i = 0; i < shards->file_count; i++)
		r->first[i + 1] = r->first[i] + shards->files[i].count;
	r->gone = km_xcalloc((size_t)r->first[shards->file_count] + 1, 1);
	return 0;
}

static int take_module(void *context, const km_module *m,
                       const km_tensor *const t[KM_MAX_MODULE_TENSORS], km_err *err)
{
	struct repack *r = context;
	struct linear l = { t[0], t[1], t[2], (int)m->shape[0], (int)m->shape[1] };

	if (!r->first)
		KM_TRY(begin(r, err));
	if (m->form != KM_FORM_INT4)
		return 0;
	if (m->role == KM_ROLE_EXPERT_GATE) {
		r->gate = l;
		r->gate_layer = m->layer;
		r->gate_expert = m->expert;
	} else if (m->role == KM_ROLE_EXPERT_UP && r->gate.codes && r->gate_layer == m->layer &&
	           r->gate_expert == m->expert) {
		struct linear both[2] = { r->gate, l };

		return add_packed(r, both, 2, err);
	} else if (m->role == KM_ROLE_EXPERT_DOWN) {
		return add_packed(r, &l, 1, err);
	}
	return 0;
}

/* ---- one file ------------------------------------------------------------------------------- */

static void add_tensor(struct shard *s, const km_tensor *t, const void *from, uint64_t *at)
{
	s->tensors[s->count] = *t;
	s->tensors[s->count].offset = *at;
	s->from[s->count++] = from;
	*at += t->bytes;
}

/* Copies go by falling size of element, so that each lies at a multiple of its own. */
static void plan_tensors(struct shard *s)
{
	struct repack *r = s->r;
	const km_safetensors *file = &r->base.cp.shards.files[s->file];
	size_t most = (size_t)file->count + (size_t)r->count;
	uint64_t at = 0;

	s->tensors = km_xcalloc(most, sizeof(*s->tensors));
	s->from = km_xcalloc(most, sizeof(*s->from));
	for (int i = 0; i < r->count; i++)
		if (r->packed[i].t.file == s->file)
			add_tensor(s, &r->packed[i].t, &r->packed[i], &at);
	s->packed = s->count;
	for (size_t unit = 8; unit; unit /= 2)
		for (int i = 0; i < file->count; i++)
			if (!*gone_of(r, &file->tensors[i]) &&
			    km_dtype_bytes(file->tensors[i].dtype) == unit)
				add_tensor(s, &file->tensors[i], &file->tensors[i], &at);
}

static void plan_pieces(struct shard *s)
{
	int cap = 0;

	for (int i = 0; i < s->count; i++) {
		uint64_t step = i < s->packed ? s->tensors[i].bytes : KM_COPY_BYTES;

		for (uint64_t at = 0; at < s->tensors[i].bytes; at += step) {
			if (s->piece_count == cap) {
				cap = cap ? cap * 2 : 1024;
				s->pieces = km_xreallocarray(s->pieces, (size_t)cap,
				                             sizeof(*s->pieces));
			}
			s->pieces[s->piece_count++] = (struct piece){ i, at };
		}
	}
}

static void put_header(const struct shard *s, km_buf *out)
{
	const struct repack *r = s->r;
	const km_safetensors *file = &r->base.cp.shards.files[s->file];
	char version[16],
		*header = km_xstrndup((const char *)file->map + 8, (size_t)file->data_at - 8);
	km_buf sums = KM_BUF_INIT;
	km_metadata meta[] = { { KM_META_LAYOUT, KM_EXPERT_LAYOUT },
		               { KM_META_VERSION, version },
		               { KM_META_CHECKSUMS, "" },
		               { KM_META_HEADER, header } };

	snprintf(version, sizeof(version), "%d", KM_MOE_LAYOUT_VERSION);
	for (int i = 0; i < s->packed; i++)
		km_buf_printf(&sums, "%016" PRIx64, ((const struct packed *)s->from[i])->sum);
	if (sums.data)
		meta[2].value = sums.data;
	km_safetensors_put_header_with(out, s->tensors, s->count, meta, 4, PAGE);
	km_buf_release(&sums);
	free(header);
}

static int pack(struct shard *s, struct packed *p, uint64_t to, km_piece_buffer *buffer,
                km_err *err)
{
	const km_config *c = &s->r->base.config;
	int hidden = c->hidden_size, inner = c->moe_intermediate_size, group = c->quant.group_size;
	size_t codes = p->from[0].codes->bytes, scales = p->from[0].scales->bytes;
	unsigned char *out = km_piece_memory(buffer, p->t.bytes + 2 * (codes + scales)), *at;
	km_int4_matrix m[2];

	if (!out)
		return km_fail(err, KM_ENOMEM, "tensor %s: there is no memory to repack it",
		               p->t.name);
	at = out + p->t.bytes; /* records and matrices are multiples of 64 bytes */
	for (int i = 0; i < p->count; i++, at += codes + scales) {
		KM_TRY(km_repack_read(&s->r->base, p->from[i].codes, 0, at, codes, err));
		KM_TRY(km_repack_read(&s->r->base, p->from[i].scales, 0, at + codes, scales, err));
		m[i] = (km_int4_matrix){ (uint32_t *)(void *)at, (uint16_t *)(void *)(at + codes) };
	}
	if (p->count == 2)
		km_moe_pack_gate_up(hidden, inner, group, &m[0], &m[1], out);
	else
		km_moe_pack_down(hidden, inner, group, &m[0], out);
	p->sum = km_checksum(out, p->t.bytes, 0);
	KM_TRY(km_outfile_write_at(&s->out, to, out, p->t.bytes, err));
	km_progress_add(&s->r->base.progress, (int64_t)p->t.bytes);
	return 0;
}

static int do_piece(void *context, int i, km_piece_buffer *buffer, km_err *err)
{
	struct shard *s = context;
	const struct piece *piece = &s->pieces[i];
	uint64_t to = s->data_at + s->tensors[piece->tensor].offset;

	if (piece->tensor < s->packed)
		return pack(s, (struct packed *)(uintptr_t)s->from[piece->tensor], to, buffer, err);
	return km_repack_copy(&s->r->base, s->from[piece->tensor], piece->begin, &s->out, to,
	                      buffer, err);
}

static int fill_file(struct shard *s, km_err *err)
{
	const km_tensor *last = s->count ? &s->tensors[s->count - 1] : NULL;
	km_buf header = KM_BUF_INIT;
	int rc;

	put_header(s, &header);
	s->data_at = header.len;
	rc = km_outfile_reserve(&s->out, header.len + (last ? last->offset + last->bytes : 0), err);
	if (rc >= 0)
		rc = km_repack_pieces(&s->r->base, s->piece_count, do_piece, s, err);
	if (rc >= 0) {
		km_buf_clear(&header);
		put_header(s, &header);
		KM_ASSERT(header.len == s->data_at);
		rc = km_outfile_write_at(&s->out, 0, header.data, header.len, err);
	}
	km_buf_release(&header);
	return rc < 0 ? rc : km_outfile_commit(&s->out, err);
}

static const char *base_name(const km_safetensors *file)
{
	return strrchr(file->path, '/') + 1;
}

static int write_shard(struct repack *r, int file, km_buf *index, km_err *err)
{
	const char *name = base_name(&r->base.cp.shards.files[file]);
	struct shard s = { .r = r, .file = file, .out = { .fd = -1 } };
	char *path = km_xasprintf("%s/%s", r->base.out.temp, name);
	int rc;

	plan_tensors(&s);
	plan_pieces(&s);
	rc = km_outfile_open(&s.out, path, err);
	if (rc >= 0)
		rc = fill_file(&s, err);
	for (int i = 0; i < s.count; i++) {
		km_buf_printf(index, "%s\n    \"%s\": \"%s\"", index->len ? "," : "",
		              s.tensors[i].name, name);
		r->bytes += (int64_t)s.tensors[i].bytes;
	}
	r->tensors += s.count;
	km_outfile_release(&s.out);
	free(s.tensors);
	free(s.from);
	free(s.pieces);
	free(path);
	return rc;
}

/* ---- the folder ----------------------------------------------------------------------------- */

static int write_index(const struct repack *r, const km_buf *names, km_err *err)
{
	km_buf out = KM_BUF_INIT;
	int rc;

	if (!r->base.cp.shards.indexed)
		return 0;
	km_buf_printf(&out,
	              "{\n  \"metadata\": {\n    \"total_size\": %" PRId64
	              "\n  },\n  \"weight_map\": {%s\n  }\n}\n",
	              r->bytes, names->data ? names->data : "");
	rc = km_repack_save(&r->base, "model.safetensors.index.json", out.data, out.len, err);
	km_buf_release(&out);
	KM_TRY(rc);
	return km_repack_copy_file(&r->base, "model.safetensors.index.json", KM_ORIGINAL_INDEX,
	                           err);
}

/* The config's own text with the mark put in after its first brace. */
static int write_config(const struct repack *r, km_err *err)
{
	char *path = km_xasprintf("%s/config.json", r->base.options->dir), *text = NULL;
	km_buf out = KM_BUF_INIT;
	size_t len = 0, brace = 0;
	int rc = km_read_file(path, MAX_CONFIG, &text, &len, err);

	if (rc >= 0) {
		brace = strcspn(text, "{") + 1;
		km_buf_append(&out, text, brace);
		km_buf_printf(&out, KM_REPACK_MARK_BEGIN "%d},", KM_MOE_LAYOUT_VERSION);
		km_buf_append(&out, text + brace, len - brace);
		rc = km_repack_save(&r->base, "config.json", out.data, out.len, err);
	}
	km_buf_release(&out);
	free(text);
	free(path);
	return rc;
}

static uint64_t bytes_to_write(const struct repack *r)
{
	const km_shards *shards = &r->base.cp.shards;
	uint64_t bytes = 0;

	for (int i = 0; i < r->count; i++)
		bytes += r->packed[i].t.bytes;
	for (int f = 0; f < shards->file_count; f++)
		for (int i = 0; i < shards->files[f].count; i++)
			if (!r->gone[r->first[f] + i])
				bytes += shards->files[f].tensors[i].bytes;
	return bytes;
}

/* One that is there already would not come back. */
static int check_original_index(const km_repacker *b, km_err *err)
{
	char *path = km_xasprintf("%s/" KM_ORIGINAL_INDEX, b->options->dir);
	bool there = access(path, F_OK) == 0;

	free(path);
	return there ? km_fail(err, KM_EINVAL,
	                       "%s: has a file " KM_ORIGINAL_INDEX
	                       ", the name under which the index is kept; move it away",
	                       b->options->dir) : 0;
}

static int write_all(struct repack *r, km_err *err)
{
	km_repacker *b = &r->base;
	uint64_t bytes = bytes_to_write(r);
	km_buf index = KM_BUF_INIT;
	int rc;

	KM_TRY(check_original_index(b, err));
	KM_TRY(km_repack_open_out(b, bytes, err));
	km_progress_init(&b->progress, "repacking", "B", (int64_t)bytes, b->options->quiet);
	rc = km_repack_copy_rest(b, err);
	for (int f = 0; f < b->cp.shards.file_count && rc >= 0; f++)
		rc = write_shard(r, f, &index, err);
	if (rc >= 0)
		km_progress_finish(&b->progress);
	if (rc >= 0)
		rc = write_index(r, &index, err);
	km_buf_release(&index);
	KM_TRY(rc);
	KM_TRY(write_config(r, err));
	return km_outdir_commit(&b->out, err);
}

int km_repack(const km_repack_options *options, km_repack_result *result, km_err *err)
{
	struct repack r = { .gate_layer = -1 };
	int rc;

	km_arena_init(&r.names, 1 << 16);
	rc = km_repack_open(&r.base, options, take_module, &r, err);
	if (rc >= 0 && !r.count)
		rc = km_fail(err, KM_EUNSUPPORTED,
		             "%s: has no int4 experts; those alone have a layout for GPUs",
		             options->dir);
	if (rc >= 0)
		rc = write_all(&r, err);
	*result = (km_repack_result){ r.base.cp.shards.file_count, r.tensors, r.bytes, r.count };
	km_repack_close(&r.base);
	km_arena_release(&r.names);
	free(r.packed);
	free(r.gone);
	free(r.first);
	return rc;
}
