#include "device/cuda_ops.h"
#include "device/cuda_state.h"
#include "mla.h"

int km_cuda_ops_rope_kv(km_cuda *cuda, const km_cuda_rope_kv *a, km_err *err)
{
	kk_rope_kv_args args = {
		.tokens = a->tokens,
		.q_from = a->q_from,
		.heads = a->shape.heads,
		.nope_dim = a->shape.nope_dim,
		.rope_dim = a->shape.rope_dim,
		.kv_lora_rank = a->shape.kv_lora_rank,
		.q = a->q_from < a->tokens ? a->q : NULL,
		.kv_a = a->kv_a,
		.kv_a_stride = a->shape.kv_lora_rank + a->shape.rope_dim,
		.norm = a->norm,
		.eps = a->eps,
		.cos_sin = a->cos_sin,
		.positions = a->positions,
		.slots = a->slots,
		.cache = a->cache,
		.fp8 = a->shape.fp8,
		.pdl = cuda->info.capability >= 90,
	};
	cudaError_t rc;

	rc = kk_rope_kv(&args, cuda->stream);
	return rc == cudaSuccess ? 0 : km_cuda_fail(err, rc, "rope and KV write");
}
