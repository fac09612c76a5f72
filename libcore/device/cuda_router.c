#include "device/cuda_router.h"

#include "device/cuda_blas.h"
#include "device/cuda_state.h"
#include "router.h"

int km_cuda_router_capacity(const km_router_shape *s)
{
	return kk_align_capacity(s->tokens, s->top_k, s->experts, s->block);
}

/* The fused forms' first, which must be zero before the first call; then the alignment's and the GEMM's
 * parts in one place: neither outlives its call. */
size_t km_cuda_router_scratch_bytes(const km_router_shape *s)
{
	size_t align = sizeof(int32_t) * (size_t)kk_align_scratch_words(s->tokens, s->top_k, s->experts);
	size_t parts = s->hidden == KK_ROUTER_HIDDEN ? kk_router_parts_bytes(s->tokens, s->experts) : 0;

	return KK_SCRATCH_BYTES + (align > parts ? align : parts);
}

static void *after_fused(const km_router_buffers *b)
{
	return (char *)b->scratch + KK_SCRATCH_BYTES;
}

static kk_router_args gemm_args(const km_router_plan *p, const km_router_shape *s,
                                const km_router_buffers *b)
{
	return (kk_router_args){ .x = b->x, .w = b->w, .logits = b->logits, .tokens = s->tokens,
		                 .experts = s->experts, .hidden = s->hidden, .w_f32 = s->weights_f32,
		                 .pdl = p->pdl };
}

static kk_gate_args gate_args(const km_router_plan *p, const km_router_shape *s,
                              const km_router_buffers *b)
{
	return (kk_gate_args){ .logits = b->logits, .bias = b->bias, .expert_map = b->expert_map,
		               .valid_tokens = b->valid, .ids = b->ids, .weights = b->weights,
		               .tokens = s->tokens, .experts = s->experts, .top_k = s->top_k,
		               .groups = s->groups, .topk_group = s->topk_group, .scale = s->scale,
		               .softmax = s->softmax, .renormalize = s->renormalize, .pdl = p->pdl };
}

static kk_align_args align_args(const km_router_plan *p, const km_router_shape *s,
                                const km_router_buffers *b)
{
	return (kk_align_args){ .ids = b->ids, .sorted = b->sorted, .block_expert = b->block_expert,
		                .total = b->total,
		                .scratch = after_fused(b),
		                .tokens = s->tokens, .top_k = s->top_k, .experts = s->experts,
		                .block = s->block, .pdl = p->pdl };
}

static const char *const part_names[] = {
	[KM_PART_GEMM] = "router GEMM", [KM_PART_GATE] = "gate", [KM_PART_ALIGN] = "alignment",
	[KM_PART_GATE_ALIGN] = "gate and alignment", [KM_PART_ROUTER_GATE] = "router GEMM and gate",
	[KM_PART_ONE_LAUNCH] = "router GEMM, gate and alignment", [KM_PART_CHAIN] = "chain",
};

static int enqueue(km_cuda *cuda, enum km_router_part part, const km_router_plan *p,
                   const km_router_shape *s, const km_router_buffers *b, km_err *err)
{
	kk_router_args gemm = gemm_args(p, s, b);
	kk_gate_args gate = gate_args(p, s, b);
	kk_align_args align = align_args(p, s, b);
	cudaError_t rc = cudaSuccess;

	switch (part) {
	case KM_PART_GEMM:
		if (p->gemm == KM_GEMM_BLAS)
			return km_cuda_blas_linear(cuda, b->x, b->w, b->logits, s->tokens, s->experts,
			                           s->hidden, err);
		rc = p->gemm == KM_GEMM_RESIDENT ? kk_router_resident(&gemm, cuda->stream)
		     : p->gemm == KM_GEMM_PARTS
		             ? kk_router_parts(&gemm, after_fused(b), cuda->stream)
		     : p->gemm == KM_GEMM_SPLIT
		             ? kk_router_split(&gemm, p->split, p->split_tokens, p->split_experts,
		                               cuda->stream)
		             : kk_router_general(&gemm, cuda->stream);
		break;
	case KM_PART_GATE:
		gate.pdl = p->gate_pdl;
		gate.turn = p->gate_turn;
		rc = p->gate == KM_GATE_ONEPASS
		             ? kk_gate_onepass(&gate, p->gate_warps, p->gate_blocks, cuda->stream)
		             : kk_gate_general(&gate, cuda->stream);
		break;
	case KM_PART_ALIGN:
		rc = kk_align(&align, cuda->stream);
		break;
	case KM_PART_GATE_ALIGN:
		rc = kk_gate_align(&gate, &align, p->fused_warps, cuda->stream);
		break;
	case KM_PART_ROUTER_GATE:
		rc = kk_router_gate_align(&gemm, &gate, NULL, b->scratch, cuda->stream);
		break;
	case KM_PART_ONE_LAUNCH:
		rc = kk_router_gate_align(&gemm, &gate, &align, b->scratch, cuda->stream);
		break;
	case KM_PART_CHAIN:
		break;
	}
	if (rc == cudaErrorInvalidValue)
		return km_fail(err, KM_EUNSUPPORTED,
		               "the %s as planned takes no %d tokens of %d experts, hidden %d, top_k %d",
		               part_names[part], s->tokens, s->experts, s->hidden, s->top_k);
	return rc == cudaSuccess ? 0 : km_cuda_fail(err, rc, part_names[part]);
}

int km_cuda_router_run(km_cuda *cuda, enum km_router_part part, const km_router_plan *p,
                       const km_router_shape *s, const km_router_buffers *b, km_err *err)
{
	if (part != KM_PART_CHAIN)
		return enqueue(cuda, part, p, s, b, err);
	if (p->chain == KM_CHAIN_ONE_LAUNCH)
		return enqueue(cuda, KM_PART_ONE_LAUNCH, p, s, b, err);
	KM_TRY(enqueue(cuda, KM_PART_GEMM, p, s, b, err));
	if (p->chain == KM_CHAIN_GATE_ALIGN)
		return enqueue(cuda, KM_PART_GATE_ALIGN, p, s, b, err);
	KM_TRY(enqueue(cuda, KM_PART_GATE, p, s, b, err));
	return enqueue(cuda, KM_PART_ALIGN, p, s, b, err);
}
