/*
 * Weights to the GPU. One walk over a model's matrices and vectors serves the plan and the loading:
 * the plan only adds up what each would take, so the two cannot differ.
 */
#include "model/gpu.h"

#if KM_CUDA

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/progress.h"
#include "device/cuda_moe_pack.h"
#include "device/cuda_upload.h"
#include "format/moe_layout.h"

enum { ALIGN = 256 };

typedef struct placer {
	const km_config *config;
	km_cuda *cuda; /* NULL: only counts */
	km_upload *upload;
	km_progress *progress;
	int threads;
	int64_t bytes, expert_bytes;
} placer;

static size_t rounded(size_t bytes)
{
	return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

static size_t data_bytes(const km_weight *w)
{
	size_t count = (size_t)w->rows * (size_t)w->cols;

	switch (w->type) {
	case KM_W_F32: return count * 4;
	case KM_W_F16:
	case KM_W_BF16: return count * 2;
	case KM_W_FP8: return count;
	case KM_W_INT4: return count / 2;
	}
	return 0;
}

static size_t scale_bytes(const km_weight *w)
{
	size_t rows = (size_t)w->rows, cols = (size_t)w->cols, each;

	if (w->type != KM_W_FP8 && w->type != KM_W_INT4)
		return 0;
	each = km_dtype_bytes(w->scale_dtype);
	if (w->type == KM_W_INT4)
		return rows * (cols / (size_t)w->group) * each;
	return (rows + (size_t)w->block_rows - 1) / (size_t)w->block_rows *
	       ((cols + (size_t)w->block_cols - 1) / (size_t)w->block_cols) * each;
}

/* Room on the device; NULL where only counting. */
static int take(placer *p, size_t bytes, void **piece, km_err *err)
{
	*piece = NULL;
	p->bytes += (int64_t)rounded(bytes);
	return p->cuda ? km_cuda_take(p->cuda, piece, bytes, "weights", err) : 0;
}

static int put(placer *p, void *to, const void *from, size_t bytes, km_err *err)
{
	if (!p->cuda || !bytes)
		return 0;
	KM_TRY(km_upload_put(p->upload, to, from, bytes, err));
	km_progress_add(p->progress, (int64_t)bytes);
	return 0;
}

static int place(placer *p, const void *from, size_t bytes, const void **to, km_err *err)
{
	void *piece;

	KM_TRY(take(p, bytes, &piece, err));
	*to = piece;
	return put(p, piece, from, bytes, err);
}

static int place_weight(placer *p, const km_weight *from, km_weight *to, km_err *err)
{
	*to = *from;
	if (!from->rows)
		return 0;
	KM_TRY(place(p, from->data, data_bytes(from), &to->data, err));
	return scale_bytes(from) ? place(p, from->scale, scale_bytes(from), &to->scale, err) : 0;
}

/* As bf16, whatever it is: what the GPU cannot use as it is comes to the arena's free end for a
 * moment. */
static int place_bf16(placer *p, const km_weight *from, km_weight *to, km_err *err)
{
	km_weight raw;
	void *piece;
	size_t mark;

	if (from->type == KM_W_BF16 || !from->rows)
		return place_weight(p, from, to, err);
	*to = (km_weight){ .type = KM_W_BF16, .rows = from->rows, .cols = from->cols };
	KM_TRY(take(p, data_bytes(to), &piece, err));
	to->data = piece;
	if (!p->cuda)
		return 0;
	mark = km_cuda_mark(p->cuda);
	KM_TRY(place_weight(p, from, &raw, err));
	p->bytes -= (int64_t)(rounded(data_bytes(from)) + rounded(scale_bytes(from)));
	KM_TRY(km_cuda_ops_dequantize(p->cuda, &raw, piece, err));
	km_cuda_rewind(p->cuda,
	               mark); /* the next bytes that come here do so on the same stream, later */
	return 0;
}

static int place_vector(placer *p, const float *from, int size, const float **to, km_err *err)
{
	const void *piece;

	KM_TRY(place(p, from, (size_t)size * sizeof(float), &piece, err));
	*to = piece;
	return 0;
}

/* ---- experts ---- */

bool km_gpu_experts_are_packed(const km_config *c, const km_layer_weights *w)
{
	if (w->packed_gate_up && w->packed_gate_up[0])
		return true;
	return w->expert_gate[0].type == KM_W_INT4 && w->expert_gate[0].scale_dtype == KM_BF16 &&
	       w->expert_down[0].group == w->expert_gate[0].group &&
	       km_moe_layout_check(c->hidden_size, c->moe_intermediate_size,
	                           w->expert_gate[0].group, NULL) == 0;
}

/* The scales of a matrix, each repeated for the narrower groups that `to` has. */
static int put_scales(placer *p, void *there, const km_weight *from, const km_weight *to,
                      km_err *err)
{
	size_t each = scale_bytes(from), size = km_dtype_bytes(from->scale_dtype),
	       bytes = scale_bytes(to);
	size_t repeats = each ? bytes / each : 1;
	char *wide;
	int rc;

	if (repeats == 1)
		return put(p, there, from->scale, each, err);
	wide = km_xmalloc(bytes);
	for (size_t i = 0; i < bytes / size; i++)
		memcpy(wide + i * size, (const char *)from->scale + i / repeats * size, size);
	rc = put(p, there, wide, bytes, err);
	free(wide);
	return rc;
}

/* The first expert whose matrix is e's: an earlier one only where random weights are shared. */
static int twin_of(const km_weight *matrix, int e)
{
	for (int i = 0; matrix[e].data && i < e; i++)
		if (matrix[i].data == matrix[e].data)
			return i;
	return e;
}

/* Of pieces that lie `stride` apart on the device, one to another's place. */
static int copy_there(placer *p, void *pieces, size_t stride, int from, int to, km_err *err)
{
	KM_TRY(km_cuda_copy(p->cuda, (char *)pieces + (size_t)to * stride,
	                    (char *)pieces + (size_t)from * stride, stride, err));
	km_progress_add(p->progress, (int64_t)stride);
	return 0;
}

/* One matrix of all experts, side by side, unchanged but for the width of int4 groups. */
static int place_matrix(placer *p, const km_weight *from, int group, km_moe_matrix *to, km_err *err)
{
	int count = p->config->n_routed_experts;
	km_weight there = from[0];
	void *data, *scale;

	there.group = group;
	*to = (km_moe_matrix){ .data_stride = rounded(data_bytes(&there)),
		               .scale_stride = rounded(scale_bytes(&there)) };
	KM_TRY(take(p, (size_t)count * to->data_stride, &data, err));
	KM_TRY(take(p, (size_t)count * to->scale_stride, &scale, err));
	to->data = data;
	to->scale = to->scale_stride ? scale : NULL;
	for (int e = 0; p->cuda && e < count; e++) {
		int twin = twin_of(from, e);

		if (twin < e) {
			KM_TRY(copy_there(p, data, to->data_stride, twin, e, err));
			if (to->scale)
				KM_TRY(copy_there(p, scale, to->scale_stride, twin, e, err));
			continue;
		}
		KM_TRY(put(p, (char *)data + (size_t)e * to->data_stride, from[e].data,
		           data_bytes(from), err));
		KM_TRY(put_scales(p, (char *)scale + (size_t)e * to->scale_stride, &from[e], &there,
		                  err));
	}
	return 0;
}

/* One int4 matrix as the checkpoint has it, to `*at`, which moves on. */
static int put_raw(placer *p, const km_weight *from, char **at, km_int4_matrix *there, km_err *err)
{
	there->codes = (void *)*at;
	there->scales = (void *)(*at + rounded(data_bytes(from)));
	*at += rounded(data_bytes(from)) + rounded(scale_bytes(from));
	KM_TRY(put(p, there->codes, from->data, data_bytes(from), err));
	return put(p, there->scales, from->scale, scale_bytes(from), err);
}

static size_t raw_bytes(const km_config *c, int group)
{
	size_t codes = (size_t)c->hidden_size * (size_t)c->moe_intermediate_size / 2;

	return 3 * (rounded(codes) + rounded(codes * 4 / (size_t)group));
}

/* Expert e into the layout, by way of `raw` on the device: the next expert comes there on the same
 * stream, later. */
static int pack_there(placer *p, const km_layer_weights *w, int e, char *raw,
                      const km_cuda_moe_pack *to, km_err *err)
{
	km_cuda_moe_pack args = *to;

	KM_TRY(put_raw(p, &w->expert_gate[e], &raw, &args.gate, err));
	KM_TRY(put_raw(p, &w->expert_up[e], &raw, &args.up, err));
	KM_TRY(put_raw(p, &w->expert_down[e], &raw, &args.down, err));
	return km_cuda_moe_pack_expert(p->cuda, &args, err);
}

/* Expert e: from the checkpoint's map when it is repacked there, as an earlier one when it is the
 * same, or packed on the device. */
static int put_packed(placer *p, const km_layer_weights *w, int e, char *raw,
                      const km_moe_weights *to, km_err *err)
{
	int hidden = p->config->hidden_size, width = p->config->moe_intermediate_size;
	char *gate_up = (char *)(uintptr_t)to->gate_up.data, *down = (char *)(uintptr_t)to->down.data;
	int twin = twin_of(w->expert_gate, e);
	km_cuda_moe_pack args = { .hidden = hidden,
		                  .intermediate = width,
		                  .group = to->group,
		                  .packed_gate_up = gate_up + (size_t)e * to->gate_up.data_stride,
		                  .packed_down = down + (size_t)e * to->down.data_stride };

	if (twin < e) {
		KM_TRY(copy_there(p, gate_up, to->gate_up.data_stride, twin, e, err));
		return copy_there(p, down, to->down.data_stride, twin, e, err);
	}
	if (!w->packed_gate_up || !w->packed_gate_up[e])
		return pack_there(p, w, e, raw, &args, err);
	KM_TRY(put(p, args.packed_gate_up, w->packed_gate_up[e],
	           km_moe_gate_up_bytes(hidden, width, to->group), err));
	return put(p, args.packed_down, w->packed_down[e],
	           km_moe_down_bytes(hidden, width, to->group), err);
}

/* What is packed on the device comes to the arena's free end for a moment: step buffers, which
 * will be there, hold several rows of every width and are larger than an expert. */
static int place_packed(placer *p, const km_layer_weights *w, km_moe_weights *to, km_err *err)
{
	const km_config *c = p->config;
	int count = c->n_routed_experts;
	size_t first = km_moe_gate_up_bytes(c->hidden_size, c->moe_intermediate_size, to->group);
	size_t second = km_moe_down_bytes(c->hidden_size, c->moe_intermediate_size, to->group);
	size_t mark;
	void *gate_up, *down, *raw = NULL;

	to->gate_up = (km_moe_matrix){ .data_stride = rounded(first) };
	to->down = (km_moe_matrix){ .data_stride = rounded(second) };
	KM_TRY(take(p, (size_t)count * rounded(first), &gate_up, err));
	KM_TRY(take(p, (size_t)count * rounded(second), &down, err));
	to->gate_up.data = gate_up;
	to->down.data = down;
	if (!p->cuda)
		return 0;
	mark = km_cuda_mark(p->cuda);
	KM_TRY(km_cuda_take(p->cuda, &raw, raw_bytes(c, to->group), "an expert to be repacked", err));
	for (int e = 0; e < count; e++)
		KM_TRY(put_packed(p, w, e, raw, to, err));
	km_cuda_rewind(p->cuda, mark);
	return 0;
}

/* The kernels read all experts of a layer in one way: one that the quantiser left alone, among others,
 * cannot be there. */
static int check_alike(const placer *p, const km_layer_weights *w, const km_moe_weights *to,
                       km_err *err)
{
	for (int e = 0; e < p->config->n_routed_experts; e++) {
		const km_weight *all[] = { &w->expert_gate[e], &w->expert_up[e],
			                   &w->expert_down[e] };

		if (to->packed && w->packed_gate_up && w->packed_gate_up[e] && w->packed_down[e])
			continue;
		for (int i = 0; i < 3; i++)
			if (!all[i]->rows || all[i]->type != to->type ||
			    all[i]->scale_dtype != to->scale_dtype ||
			    (to->packed && all[i]->group != to->group))
				return km_fail(err, KM_EUNSUPPORTED,
				               "on a GPU the experts of a layer have one type of "
				               "weight, and those of this checkpoint do not: "
				               "expert %d is another than expert 0",
				               e);
	}
	return 0;
}

static int place_experts(placer *p, const km_layer_weights *w, km_moe_weights *to, km_err *err)
{
	*to = km_gpu_experts_shape(p->config, w);
	if (p->cuda)
		KM_TRY(check_alike(p, w, to, err));
	if (to->packed)
		return place_packed(p, w, to, err);
	KM_TRY(place_matrix(p, w->expert_gate, to->group, &to->gate, err));
	KM_TRY(place_matrix(p, w->expert_up, to->group, &to->up, err));
	return place_matrix(p, w->expert_down, to->group, &to->down, err);
}

/* ---- a model ---- */

/* The router's kernels take bf16 and f32. */
static int place_router(placer *p, const km_layer_weights *from, km_layer_weights *to, km_err *err)
{
	KM_TRY(from->router.type == KM_W_F32 ? place_weight(p, &from->router, &to->router, err)
	                                     : place_bf16(p, &from->router, &to->router, err));
	if (p->cuda && !from->router_bias)
		return 0;
	return place_vector(p, from->router_bias, p->config->n_routed_experts, &to->router_bias,
	                    err);
}

static int place_layer(placer *p, const km_layer_weights *from, km_gpu_layer *layer, bool moe,
                       km_err *err)
{
	const km_config *c = p->config;
	km_layer_weights *to = &layer->w;
	int64_t before;

	KM_TRY(place_vector(p, from->input_norm, c->hidden_size, &to->input_norm, err));
	KM_TRY(place_vector(p, from->post_attention_norm, c->hidden_size, &to->post_attention_norm,
	                    err));
	if (c->q_lora_rank)
		KM_TRY(place_vector(p, from->q_a_norm, c->q_lora_rank, &to->q_a_norm, err));
	KM_TRY(place_vector(p, from->kv_a_norm, c->kv_lora_rank, &to->kv_a_norm, err));
	KM_TRY(place_weight(p, &from->q_proj, &to->q_proj, err));
	KM_TRY(place_weight(p, &from->q_a, &to->q_a, err));
	KM_TRY(place_weight(p, &from->q_b, &to->q_b, err));
	KM_TRY(place_weight(p, &from->kv_a, &to->kv_a, err));
	KM_TRY(place_bf16(p, &from->kv_b, &to->kv_b, err));
	KM_TRY(place_weight(p, &from->o, &to->o, err));
	KM_TRY(place_weight(p, &from->gate, &to->gate, err));
	KM_TRY(place_weight(p, &from->up, &to->up, err));
	KM_TRY(place_weight(p, &from->down, &to->down, err));
	if (!moe)
		return 0;
	KM_TRY(place_router(p, from, to, err));
	KM_TRY(place_weight(p, &from->shared_gate, &to->shared_gate, err));
	KM_TRY(place_weight(p, &from->shared_up, &to->shared_up, err));
	KM_TRY(place_weight(p, &from->shared_down, &to->shared_down, err));
	before = p->bytes;
	KM_TRY(place_experts(p, from, &layer->experts, err));
	p->expert_bytes += p->bytes - before;
	return 0;
}

static int place_model(placer *p, const km_weights *from, km_gpu_weights *to, km_err *err)
{
	const km_config *c = p->config;

	KM_TRY(place_weight(p, &from->embed, &to->embed, err));
	if (c->tie_word_embeddings)
		to->head = to->embed;
	else
		KM_TRY(place_weight(p, &from->head, &to->head, err));
	KM_TRY(place_vector(p, from->norm, c->hidden_size, &to->norm, err));
	to->layers = c->num_hidden_layers;
	to->layer = km_xcalloc((size_t)to->layers, sizeof(*to->layer));
	for (int i = 0; i < to->layers; i++)
		KM_TRY(place_layer(p, &from->layer[i], &to->layer[i], km_config_is_moe_layer(c, i),
		                   err));
	return 0;
}

int64_t km_gpu_weights_bytes(const km_config *config, const km_weights *shapes,
                             int64_t *expert_bytes)
{
	placer p = { .config = config };
	km_gpu_weights nowhere = { .layers = 0 };

	if (place_model(&p, shapes, &nowhere, NULL) < 0)
		p.bytes = -1;
	km_gpu_weights_release(&nowhere);
	*expert_bytes = p.expert_bytes;
	return p.bytes;
}

int km_gpu_weights_load(km_gpu_weights *weights, km_cuda *cuda, const km_config *config,
                        const km_weights *from, const km_model_options *options, km_err *err)
{
	int64_t experts;
	km_progress progress;
	placer p = {
		.config = config, .cuda = cuda, .progress = &progress, .threads = options->threads
	};
	int rc;

	KM_TRY(km_upload_open(&p.upload, cuda, options->threads, err));
	km_progress_init(&progress, "loading", "B", km_gpu_weights_bytes(config, from, &experts),
	                 options->quiet);
	rc = place_model(&p, from, weights, err);
	km_upload_close(p.upload);
	if (rc >= 0)
		rc = km_cuda_wait(cuda, err);
	km_progress_finish(&progress);
	return rc;
}

void km_gpu_weights_release(km_gpu_weights *weights)
{
	free(weights->layer);
	*weights = (km_gpu_weights){ .layers = 0 };
}

#endif
