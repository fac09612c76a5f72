#include "device/cuda_moe.h"

#include "device/cuda_state.h"
#include "moe.h"
#include "router.h"

/*
 * Scratch, in this order, each piece at a multiple of 256 bytes (km_moe_scratch_size counts them):
 *
 *   sync          KM_MOE_SYNC_BYTES, zero before the first call: counters in 256 bytes; then a word for each tile of
 *                 places (ready), unless there are more tiles than words; the prefill form's counters; the decode
 *                 form's activations, twice 32 kB
 *   ids           [tokens, top_k], through the expert map     when there is one
 *   sorted, block_expert, total, counts                       kk_align's, unless the kernel sorts inside
 *   act           [tokens * top_k, intermediate]              both matrices' only meeting point, but for the
 *                                                             decode form's
 *   part          [tokens * top_k, hidden]                    unless the kernel sums on chip
 */
enum { READY_BYTES = 32 * 1024, DECODE_ACT_AT = 64 * 1024 };

typedef struct scratch {
	char *next;
	int32_t *sync, *ready, *ids, *sorted, *block_expert, *total, *counts;
	void *act, *part;
} scratch;

static void *piece(scratch *s, size_t bytes)
{
	void *p = s->next;

	s->next += (bytes + 255) / 256 * 256;
	return p;
}

static size_t most_tiles(const km_moe_plan *plan, const km_moe_problem *p)
{
	size_t places = (size_t)p->tokens * (size_t)p->top_k, experts = (size_t)p->experts;

	return plan->align_inside ? places
	                          : places / (size_t)plan->tile.block_m + (places < experts ? places : experts);
}

static scratch lay_out(const km_moe_plan *plan, const km_moe_problem *p, const km_moe_buffers *b)
{
	size_t places = (size_t)p->tokens * (size_t)p->top_k;
	bool general = plan->form == KM_MOE_GENERAL;
	scratch s = { .next = b->scratch };

	s.sync = piece(&s, KM_MOE_SYNC_BYTES);
	/* The decode form neither waits for tiles nor clears their words: it must not count in them. */
	if (!general && plan->form != KM_MOE_DECODE && most_tiles(plan, p) <= (READY_BYTES - 256) / 4)
		s.ready = s.sync + 64;
	if (b->expert_map)
		s.ids = piece(&s, places * 4);
	if (!general && !plan->align_inside) {
		int block = plan->tile.block_m;
		size_t capacity = (size_t)kk_align_capacity(p->tokens, p->top_k, p->experts, block);

		s.sorted = piece(&s, capacity * 4);
		s.block_expert = piece(&s, capacity / (size_t)block * 4);
		s.total = piece(&s, 4);
		s.counts = piece(&s, (size_t)kk_align_scratch_words(p->tokens, p->top_k, p->experts) * 4);
	}
	s.act = plan->form == KM_MOE_DECODE ? (char *)s.sync + DECODE_ACT_AT
	                                    : piece(&s, places * (size_t)p->intermediate * (general ? 4 : 2));
	s.part = s.next;
	return s;
}

static kk_moe_matrix matrix_of(const km_moe_matrix *m)
{
	return (kk_moe_matrix){ m->data, m->scale, m->data_stride, m->scale_stride };
}

static enum kk_moe_type type_of_scale(enum km_dtype t)
{
	return t == KM_F32 ? KK_MOE_F32 : t == KM_F16 ? KK_MOE_F16 : KK_MOE_BF16;
}

static cudaError_t run_general(km_cuda *cuda, const km_moe_plan *plan, const km_moe_problem *p,
                               const km_moe_buffers *b, const scratch *s)
{
	static const enum kk_moe_type types[] = { [KM_W_F32] = KK_MOE_F32, [KM_W_F16] = KK_MOE_F16,
		                                  [KM_W_BF16] = KK_MOE_BF16, [KM_W_FP8] = KK_MOE_FP8,
		                                  [KM_W_INT4] = KK_MOE_INT4 };
	const km_moe_weights *w = &b->experts;
	kk_moe_general_args a = {
		.x = b->x, .ids = b->expert_map ? s->ids : b->ids, .weights = b->weights,
		.gate = matrix_of(w->packed ? &w->gate_up : &w->gate), .up = matrix_of(&w->up),
		.down = matrix_of(&w->down), .type = w->packed ? KK_MOE_PACKED : types[w->type],
		.scale_type = type_of_scale(w->scale_dtype), .act = s->act, .part = s->part, .y = b->y,
		.scale = b->routed_scale, .tokens = p->tokens, .top_k = p->top_k, .experts = p->experts,
		.hidden = p->hidden, .intermediate = p->intermediate, .group = w->group,
		.block_rows = w->block_rows, .block_cols = w->block_cols, .y_bf16 = b->y_bf16,
		.accumulate = b->accumulate, .pdl = plan->pdl,
	};

	return kk_moe_general(&a, cuda->stream);
}

static void take_front(kk_moe_args *a, const km_moe_buffers *b)
{
	const km_moe_front *f = b->front;

	a->gate = (kk_gate_args){ .logits = f->logits, .bias = f->bias, .valid_tokens = f->valid, .ids = b->ids,
		                  .weights = b->weights, .tokens = a->tokens, .experts = a->experts,
		                  .top_k = a->top_k, .scale = f->scale, .renormalize = f->renormalize };
	a->shared_down = f->down;
	a->shared_gate = f->gate;
	a->shared_up = f->up;
}

static cudaError_t run_stream(km_cuda *cuda, const km_moe_plan *plan, const km_moe_problem *p,
                              const km_moe_buffers *b, const scratch *s)
{
	const km_moe_weights *w = &b->experts;
	kk_moe_args a = {
		.x = b->x, .ids = b->expert_map ? s->ids : b->ids, .weights = b->weights,
		.gate_up = w->gate_up.data, .down = w->down.data, .gate_up_stride = w->gate_up.data_stride,
		.down_stride = w->down.data_stride, .sorted = s->sorted, .block_expert = s->block_expert,
		.total = s->total, .act = s->act, .part = s->part, .y = b->y, .sync = s->sync, .ready = s->ready,
		.scale = b->routed_scale, .tokens = p->tokens, .top_k = p->top_k, .experts = p->experts,
		.hidden = p->hidden, .intermediate = p->intermediate, .group = p->group,
		.block_m = plan->tile.block_m, .block_n = plan->tile.block_n,
		.group_m = plan->tile.group_m, .warps = plan->tile.warps,
		.stages = plan->tile.stages, .x_stages = plan->x_stages, .blocks = plan->blocks,
		.smem_bytes = plan->smem_bytes, .sums_bytes = plan->sums_bytes, .y_bf16 = b->y_bf16, .accumulate = b->accumulate,
		.part_bf16 = plan->part_bf16, .inside = plan->align_inside,
		.direct = plan->form == KM_MOE_DECODE, .pdl = plan->pdl,
	};

	if (b->front)
		take_front(&a, b);
	if (!plan->align_inside) {
		kk_align_args align = { .ids = a.ids, .sorted = s->sorted, .block_expert = s->block_expert,
			                .total = s->total, .scratch = s->counts, .tokens = p->tokens,
			                .top_k = p->top_k, .experts = p->experts, .block = plan->tile.block_m,
			                .pdl = plan->pdl };
		cudaError_t rc = kk_align(&align, cuda->stream);

		if (rc != cudaSuccess)
			return rc;
	}
	return kk_moe_stream(&a, cuda->stream);
}

int km_cuda_moe_run(km_cuda *cuda, const km_moe_plan *plan, const km_moe_problem *p, const km_moe_buffers *b,
                    km_err *err)
{
	scratch s = lay_out(plan, p, b);
	cudaError_t rc = cudaSuccess;

	if (p->packed != b->experts.packed || p->expert_map != (b->expert_map != NULL))
		return km_fail(err, KM_EINVAL, "the experts' buffers are not those that were planned for: packed %d, "
		               "planned %d; expert map %d, planned %d", b->experts.packed, p->packed,
		               b->expert_map != NULL, p->expert_map);
	if (b->front && plan->form != KM_MOE_DECODE)
		return km_fail(err, KM_EINVAL, "the experts as planned (%s) take no gate along",
		               km_moe_form_name(plan->form));
	if (b->expert_map)
		rc = kk_moe_map(b->ids, b->expert_map, p->global_experts, s.ids, p->tokens * p->top_k, plan->pdl,
		                cuda->stream);
	if (rc == cudaSuccess)
		rc = plan->form == KM_MOE_GENERAL ? run_general(cuda, plan, p, b, &s)
		                                  : run_stream(cuda, plan, p, b, &s);
	if (rc == cudaErrorInvalidValue)
		return km_fail(err, KM_EUNSUPPORTED, "the experts as planned (%s) take no %d tokens of %d experts, "
		               "hidden %d, intermediate %d, top_k %d", km_moe_form_name(plan->form), p->tokens,
		               p->experts, p->hidden, p->intermediate, p->top_k);
	return rc == cudaSuccess ? 0 : km_cuda_fail(err, rc, "the experts");
}
