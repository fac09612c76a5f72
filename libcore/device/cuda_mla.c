#include "device/cuda_mla.h"

#include "device/cuda_state.h"
#include "mla.h"

static km_mla_device device_of(const km_cuda *cuda)
{
	return (km_mla_device){ cuda->info.capability, cuda->info.multiprocessors };
}

static int check(cudaError_t rc, const char *what, const km_mla_shape *s, km_err *err)
{
	if (rc == cudaErrorInvalidValue)
		return km_fail(
			err, KM_EUNSUPPORTED,
			"%s: no kernel for %d heads of %d + %d, values of %d, kv_lora_rank %d",
			what, s->heads, s->nope_dim, s->rope_dim, s->v_dim, s->kv_lora_rank);
	return rc == cudaSuccess ? 0 : km_cuda_fail(err, rc, what);
}

int km_cuda_mla_decode(km_cuda *cuda, const km_mla_decode_plan *p, const km_mla_shape *s, int seqs,
                       const km_mla_decode_buffers *b, km_err *err)
{
	km_mla_decode_scratch at;
	char *scratch = b->scratch;
	kk_mla_decode_args a = {
		.shape = *s, .seqs = seqs, .splits = p->splits, .v_blocks = p->v_blocks,
		.page_size = b->cache.page_size, .pages_per_seq = b->cache.pages_per_seq,
		.scale = b->scale, .q = b->q, .kv_b = b->kv_b, .cos_sin = b->cos_sin,
		.positions = b->positions, .kv_len = b->kv_len, .pages = b->cache.pages,
		.cache = b->cache.data, .out = b->out, .pdl = cuda->info.capability >= 90,
		.kv_a = b->kv_a, .norm = b->norm, .slots = b->slots,
		.kv_a_stride = s->kv_lora_rank + s->rope_dim, .eps = b->eps,
	};

	if (p->cluster)
		return check(kk_mla_decode_cluster(&a, cuda->stream), "MLA decode", s, err);
	km_mla_decode_layout(s, p, seqs, &at);
	a.query = scratch + at.query;
	a.partial = (float *)(scratch + at.partial);
	a.stats = (float *)(scratch + at.stats);
	KM_TRY(check((p->tensor ? kk_mla_absorb : kk_mla_absorb_general)(&a, cuda->stream),
	             "MLA's absorbed query", s, err));
	KM_TRY(check((p->tensor ? kk_mla_attend : kk_mla_attend_general)(&a, cuda->stream),
	             "MLA decode", s, err));
	return check((p->tensor ? kk_mla_combine : kk_mla_combine_general)(&a, cuda->stream),
	             "MLA's result", s, err);
}

static kk_mla_prefill_args prefill_args(const km_cuda *cuda, const km_mla_wave *w,
                                        const km_mla_shape *s, const km_mla_prefill_buffers *b)
{
	return (kk_mla_prefill_args){
		.shape = *s,
		.page_size = b->cache.page_size,
		.pages_per_seq = b->cache.pages_per_seq,
		.scale = b->scale,
		.runs = b->runs + w->runs_from,
		.tiles = b->tiles + w->tiles_from,
		.run_count = w->runs,
		.tile_count = w->tiles,
		.pages = b->cache.pages,
		.positions = b->positions,
		.cache = b->cache.data,
		.latents = b->latents,
		.kv = b->kv,
		.q = b->q,
		.state = b->state,
		.out = b->out,
		.pdl = cuda->info.capability >= 90,
	};
}

int km_cuda_mla_gather(km_cuda *cuda, const km_mla_wave *w, const km_mla_shape *s,
                       const km_mla_prefill_buffers *b, km_err *err)
{
	kk_mla_prefill_args a = prefill_args(cuda, w, s, b);

	return check(kk_mla_gather(&a, cuda->stream), "MLA's gathered latents", s, err);
}

int km_cuda_mla_prefill(km_cuda *cuda, const km_mla_wave *w, const km_mla_shape *s,
                        const km_mla_prefill_buffers *b, km_err *err)
{
	kk_mla_prefill_args a = prefill_args(cuda, w, s, b);
	km_mla_device device = device_of(cuda);

	return check((km_mla_tensor_fits(s, &device) ? kk_mla_prefill
	                                             : kk_mla_prefill_general)(&a, cuda->stream),
	             "MLA prefill", s, err);
}
