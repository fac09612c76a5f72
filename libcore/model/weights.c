/*
 * Opening is fast because nothing is read but headers, norms and biases: 207,360 routed tensors are
 * names in a hash map and pointers into the maps.
 *
 * The format does not promise that a tensor's data is aligned for its type: old writers did not pad
 * the header. Kernels want that, so such a tensor is copied to aligned memory, with a warning; no
 * published checkpoint of the family has one.
 *
 * Experts in the GPU's layout are pointers into the maps too where a device reads them. The CPU's kernels
 * read the plain packing, so for them they are unpacked into memory as large as they are.
 *
 * One bad scale makes every answer NaN, so the scales of a checkpoint that is small enough to be
 * read in a second are looked at too. Those of K2.5 are 63 GB: kimi-convert --verify reads them.
 */
#include "model/weights.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/log.h"
#include "base/mem.h"
#include "format/odd_values.h"
#include "format/moe_layout.h"
#include "model/checkpoint.h"
#include "model/host_memory.h"

enum { REPORTED = 1, NOTED = 8, ALIGN = 64 };

static const int64_t small_bytes = INT64_C(4) << 30;

struct km_weights_files {
	km_checkpoint checkpoint;
	km_arena arena; /* layers, expert tables, f32 copies */
	void **copies;  /* owned: tensors that were misaligned in their file */
	int copy_count;
};

/* A repacked tensor, and the weights that it becomes when it is unpacked: gate and up, or down. */
struct repacked {
	const km_tensor *t;
	km_weight *to[2];
	void *copy; /* owned by km_weights_files */
};

struct loader {
	const km_config *config;
	km_weights *weights;
	struct km_weights_files *files;
	struct repacked *repacked;
	int repacked_count, repacked_cap;
	bool check_scales, packed;
};

void *km_weights_memory(km_weights *weights, size_t bytes)
{
	struct km_weights_files *files = weights->files;
	void *memory = aligned_alloc(ALIGN, (bytes + ALIGN - 1) / ALIGN * ALIGN);

	if (!memory)
		return NULL;
	files->copies = km_xreallocarray(files->copies, (size_t)files->copy_count + 1,
	                                 sizeof(*files->copies));
	files->copies[files->copy_count++] = memory;
	return memory;
}

static const void *aligned_data(struct loader *l, const km_tensor *t)
{
	void *copy;

	if ((uintptr_t)t->data % km_dtype_bytes(t->dtype) == 0)
		return t->data;
	copy = km_weights_memory(l->weights, t->bytes);
	return copy ? memcpy(copy, t->data, t->bytes) : NULL;
}

static int load_vector(struct loader *l, const km_tensor *t, const float **out, km_err *err)
{
	size_t count = (size_t)t->shape[0];
	float *values = km_arena_alloc(&l->files->arena, count * sizeof(*values));
	const void *data = aligned_data(l, t);

	if (!data)
		return km_fail(err, KM_ENOMEM, "tensor %s: no memory for an aligned copy", t->name);
	km_dtype_to_f32(t->dtype, data, values, count);
	for (size_t i = 0; i < count; i++)
		if (!isfinite(values[i]))
			return km_fail(err, KM_EFORMAT,
			               "%s: tensor %s: element %zu is not a finite number",
			               km_shards_path(&l->files->checkpoint.shards, t), t->name, i);
	*out = values;
	return 0;
}

static enum km_weight_type plain_type(enum km_dtype dtype)
{
	return dtype == KM_F32 ? KM_W_F32 : dtype == KM_F16 ? KM_W_F16 : KM_W_BF16;
}

static void set_type(km_weight *w, const km_module *m, const km_quant_config *quant, enum km_dtype dtype)
{
	switch (m->form) {
	case KM_FORM_PLAIN:
		w->type = plain_type(dtype);
		return;
	case KM_FORM_FP8:
		w->type = KM_W_FP8;
		w->block_rows = quant->block_rows;
		w->block_cols = quant->block_cols;
		return;
	case KM_FORM_INT4:
		w->type = KM_W_INT4;
		w->group = quant->group_size ? quant->group_size : w->cols;
		return;
	case KM_FORM_REPACKED:
	case KM_FORM_COUNT:
		return;
	}
}

static int check_scale(const struct loader *l, const km_tensor *t, km_err *err)
{
	km_odd_values odd;

	if (!l->check_scales)
		return 0;
	odd = km_odd_values_count(t->dtype, t->data, t->bytes / km_dtype_bytes(t->dtype), true);
	if (odd.first < 0)
		return 0;
	return km_fail(err, KM_EFORMAT, "%s: tensor %s: scale %" PRId64 " is %s",
	               km_shards_path(&l->files->checkpoint.shards, t), t->name, odd.first,
	               odd.nan || odd.inf ? "not a finite number" : "negative");
}

static int load_matrix(struct loader *l, const km_module *m, const km_tensor *const *t,
                       km_weight *w, km_err *err)
{
	const km_quant_config *quant = &l->config->quant;

	*w = (km_weight){ .rows = (int)m->shape[0], .cols = (int)m->shape[1] };
	set_type(w, m, quant, t[0]->dtype);
	w->data = aligned_data(l, t[0]);
	if (t[1]) {
		KM_TRY(check_scale(l, t[1], err));
		w->scale = aligned_data(l, t[1]);
		w->scale_dtype = t[1]->dtype;
	}
	if (!w->data || (t[1] && !w->scale))
		return km_fail(err, KM_ENOMEM, "tensor %s: no memory for an aligned copy",
		               t[0]->name);
	return 0;
}

/* ---- experts in the GPU's layout ------------------------------------------------------------- */

static void note_repacked(struct loader *l, km_layer_weights *layer, const km_module *m, const km_tensor *t)
{
	bool down = m->role == KM_ROLE_EXPERT_DOWN;
	struct repacked r = { .t = t };

	(down ? layer->packed_down : layer->packed_gate_up)[m->expert] = t->data;
	r.to[0] = down ? &layer->expert_down[m->expert] : &layer->expert_gate[m->expert];
	r.to[1] = down ? NULL : &layer->expert_up[m->expert];
	if (l->repacked_count == l->repacked_cap) {
		l->repacked_cap = l->repacked_cap ? l->repacked_cap * 2 : 256;
		l->repacked = km_xreallocarray(l->repacked, (size_t)l->repacked_cap, sizeof(*l->repacked));
	}
	l->repacked[l->repacked_count++] = r;
}

/* Into the plain packing: codes, then scales, of one matrix or two. */
static int unpack_one(struct loader *l, const struct repacked *r)
{
	const km_config *c = l->config;
	int hidden = c->hidden_size, inner = c->moe_intermediate_size, group = c->quant.group_size;
	size_t codes = (size_t)hidden * (size_t)inner / 2, scales = (size_t)hidden * (size_t)(inner / group) * 2;
	unsigned char *at = r->copy;
	km_int4_matrix m[2];

	for (int i = 0; i < 2 && r->to[i]; i++, at += codes + scales) {
		m[i] = (km_int4_matrix){ (uint32_t *)(void *)at, (uint16_t *)(void *)(at + codes) };
		*r->to[i] = (km_weight){ .type = KM_W_INT4, .rows = r->to[1] ? inner : hidden,
			                 .cols = r->to[1] ? hidden : inner, .data = m[i].codes,
			                 .scale = m[i].scales, .scale_dtype = KM_BF16, .group = group };
	}
	if (r->to[1])
		km_moe_unpack_gate_up(hidden, inner, group, r->t->data, &m[0], &m[1]);
	else
		km_moe_unpack_down(hidden, inner, group, r->t->data, &m[0]);
	for (int i = 0; l->check_scales && i < 2 && r->to[i]; i++)
		if (km_odd_values_count(KM_BF16, m[i].scales, scales / 2, true).first >= 0)
			return -1;
	return 0;
}

static int unpack_all(struct loader *l, const char *dir, km_err *err)
{
	int64_t available = km_host_memory_available(), bytes = 0;
	struct km_weights_files *files = l->files;
	int bad = -1;

	for (int i = 0; i < l->repacked_count; i++)
		bytes += (int64_t)l->repacked[i].t->bytes;
	if (available >= 0 && bytes > available)
		return km_fail(err, KM_ENOMEM,
		               "%s: its experts are in the GPU's layout: unpacking them for the CPU takes %.1f "
		               "GB, %.1f GB are available; kimi-convert --unpack makes a checkpoint that needs "
		               "no unpacking", dir, (double)bytes / 1e9, (double)available / 1e9);
	files->copies = km_xreallocarray(files->copies, (size_t)(files->copy_count + l->repacked_count),
	                                 sizeof(*files->copies));
	for (int i = 0; i < l->repacked_count; i++) {
		l->repacked[i].copy = aligned_alloc(ALIGN, l->repacked[i].t->bytes);
		if (!l->repacked[i].copy)
			return km_fail(err, KM_ENOMEM, "tensor %s: no memory to unpack it",
			               l->repacked[i].t->name);
		files->copies[files->copy_count++] = l->repacked[i].copy;
	}
#pragma omp parallel for schedule(dynamic)
	for (int i = 0; i < l->repacked_count; i++)
		if (unpack_one(l, &l->repacked[i]) < 0) {
#pragma omp critical
			if (bad < 0 || i < bad)
				bad = i;
		}
	if (bad < 0)
		return 0;
	return km_fail(err, KM_EFORMAT, "%s: tensor %s: has a scale that is negative or no finite number",
	               km_shards_path(&files->checkpoint.shards, l->repacked[bad].t),
	               l->repacked[bad].t->name);
}

const float **km_weights_vector(km_weights *w, const km_module *m)
{
	km_layer_weights *layer = m->layer >= 0 ? &w->layer[m->layer] : NULL;

	switch (m->role) {
	case KM_ROLE_NORM: return &w->norm;
	case KM_ROLE_INPUT_NORM: return &layer->input_norm;
	case KM_ROLE_POST_ATTENTION_NORM: return &layer->post_attention_norm;
	case KM_ROLE_Q_A_NORM: return &layer->q_a_norm;
	case KM_ROLE_KV_A_NORM: return &layer->kv_a_norm;
	case KM_ROLE_ROUTER_BIAS: return &layer->router_bias;
	default: return NULL;
	}
}

km_weight *km_weights_matrix(km_weights *w, const km_module *m)
{
	km_layer_weights *layer = m->layer >= 0 ? &w->layer[m->layer] : NULL;

	switch (m->role) {
	case KM_ROLE_EMBED: return &w->embed;
	case KM_ROLE_HEAD: return &w->head;
	case KM_ROLE_Q: return &layer->q_proj;
	case KM_ROLE_Q_A: return &layer->q_a;
	case KM_ROLE_Q_B: return &layer->q_b;
	case KM_ROLE_KV_A: return &layer->kv_a;
	case KM_ROLE_KV_B: return &layer->kv_b;
	case KM_ROLE_O: return &layer->o;
	case KM_ROLE_GATE: return &layer->gate;
	case KM_ROLE_UP: return &layer->up;
	case KM_ROLE_DOWN: return &layer->down;
	case KM_ROLE_ROUTER: return &layer->router;
	case KM_ROLE_SHARED_GATE: return &layer->shared_gate;
	case KM_ROLE_SHARED_UP: return &layer->shared_up;
	case KM_ROLE_SHARED_DOWN: return &layer->shared_down;
	case KM_ROLE_EXPERT_GATE: return &layer->expert_gate[m->expert];
	case KM_ROLE_EXPERT_UP: return &layer->expert_up[m->expert];
	case KM_ROLE_EXPERT_DOWN: return &layer->expert_down[m->expert];
	default: return NULL; /* vision: accounted for, not loaded */
	}
}

static int load_module(void *context, const km_module *m,
                       const km_tensor *const tensors[KM_MAX_MODULE_TENSORS], km_err *err)
{
	struct loader *l = context;
	km_layer_weights *layer = m->layer >= 0 ? &l->weights->layer[m->layer] : NULL;
	const float **vector = km_weights_vector(l->weights, m);
	km_weight *matrix = km_weights_matrix(l->weights, m);

	if (m->form == KM_FORM_REPACKED) {
		note_repacked(l, layer, m, tensors[0]);
		return 0;
	}
	if (vector)
		return load_vector(l, tensors[0], vector, err);
	return matrix ? load_matrix(l, m, tensors, matrix, err) : 0;
}

static void make_layers(struct loader *l)
{
	const km_config *c = l->config;
	km_arena *arena = &l->files->arena;
	size_t experts = (size_t)c->n_routed_experts;

	l->weights->layers = c->num_hidden_layers;
	l->weights->layer =
		km_arena_calloc(arena, (size_t)c->num_hidden_layers, sizeof(*l->weights->layer));
	for (int i = 0; i < c->num_hidden_layers; i++) {
		km_layer_weights *layer = &l->weights->layer[i];

		if (!km_config_is_moe_layer(c, i))
			continue;
		layer->expert_gate = km_arena_calloc(arena, experts, sizeof(km_weight));
		layer->expert_up = km_arena_calloc(arena, experts, sizeof(km_weight));
		layer->expert_down = km_arena_calloc(arena, experts, sizeof(km_weight));
		if (!c->expert_layout)
			continue;
		layer->packed_gate_up = km_arena_calloc(arena, experts, sizeof(uint8_t *));
		layer->packed_down = km_arena_calloc(arena, experts, sizeof(uint8_t *));
	}
}

static void account(km_weights *w, const km_checkpoint *cp)
{
	for (int k = 0; k < KM_CLASS_COUNT; k++) {
		int64_t *to = k == KM_CLASS_EXPERTS                              ? &w->expert_bytes
		            : k == KM_CLASS_SKIPPED                              ? &w->skipped_bytes
		            : k == KM_CLASS_VISION || k == KM_CLASS_PROJECTOR ? &w->vision_bytes
		                                                                 : &w->text_bytes;
		*to += cp->bytes[k];
	}
}

static int open_all(struct loader *l, const char *dir, km_findings *findings, km_findings *notes,
                    km_err *err)
{
	km_checkpoint *cp = &l->files->checkpoint;
	int64_t bytes = 0;

	KM_TRY(km_checkpoint_open(cp, dir, findings, notes, err));
	for (int64_t i = 0; i < cp->shards.count; i++)
		bytes += (int64_t)cp->shards.tensors[i]->bytes;
	l->check_scales = bytes <= small_bytes;
	make_layers(l);
	KM_TRY(km_checkpoint_match(cp, l->config, load_module, l, findings, err));
	KM_TRY(km_findings_fail(findings, err));
	if (l->config->tie_word_embeddings)
		l->weights->head = l->weights->embed;
	account(l->weights, cp);
	if (l->files->copy_count)
		km_log(KM_LOG_WARN,
		       "%s: %d tensors are misaligned in their files and were copied to memory",
		       dir, l->files->copy_count);
	return l->packed ? 0 : unpack_all(l, dir, err);
}

static int open_weights(km_weights *weights, const km_config *config, const char *dir, bool packed,
                        km_err *err)
{
	struct km_weights_files *files = km_xcalloc(1, sizeof(*files));
	struct loader l = { .config = config, .weights = weights, .files = files, .packed = packed };
	km_findings findings, notes;
	int rc;

	*weights = (km_weights){ .files = files };
	km_arena_init(&files->arena, 1 << 20);
	km_findings_init(&findings, REPORTED);
	km_findings_init(&notes, NOTED);
	rc = open_all(&l, dir, &findings, &notes, err);
	for (int i = 0; rc >= 0 && i < notes.kept; i++)
		km_log(KM_LOG_WARN, "%s", notes.items[i].sentence);
	km_findings_release(&findings);
	km_findings_release(&notes);
	free(l.repacked);
	if (rc < 0)
		km_weights_close(weights);
	return rc;
}

int km_weights_open(km_weights *weights, const km_config *config, const char *dir, km_err *err)
{
	return open_weights(weights, config, dir, false, err);
}

int km_weights_open_packed(km_weights *weights, const km_config *config, const char *dir, km_err *err)
{
	return open_weights(weights, config, dir, true, err);
}

/* ---- shapes alone ---- */

static int shape_module(void *context, const km_module *m, km_err *err)
{
	struct loader *l = context;
	km_weight *w = km_weights_matrix(l->weights, m);
	km_wanted wanted[KM_MAX_MODULE_TENSORS];

	(void)err;
	if (!w)
		return 0;
	*w = (km_weight){ .rows = (int)m->shape[0], .cols = (int)m->shape[1] };
	if (km_module_tensors(m, l->config, wanted) > 1)
		w->scale_dtype = wanted[1].usual;
	set_type(w, m, &l->config->quant, wanted[0].usual);
	return 0;
}

int km_weights_shapes(km_weights *weights, const km_config *config, km_err *err)
{
	struct km_weights_files *files = km_xcalloc(1, sizeof(*files));
	struct loader l = { .config = config, .weights = weights, .files = files };
	int rc;

	*weights = (km_weights){ .files = files };
	km_arena_init(&files->arena, 1 << 20);
	make_layers(&l);
	rc = km_inventory_visit(config, shape_module, &l, err);
	if (rc < 0)
		km_weights_close(weights);
	else if (config->tie_word_embeddings)
		weights->head = weights->embed;
	return rc;
}

void km_weights_close(km_weights *weights)
{
	struct km_weights_files *files = weights->files;

	if (!files)
		return;
	for (int i = 0; i < files->copy_count; i++)
		free(files->copies[i]);
	free(files->copies);
	km_checkpoint_close(&files->checkpoint);
	km_arena_release(&files->arena);
	free(files);
	*weights = (km_weights){ .layers = 0 };
}
