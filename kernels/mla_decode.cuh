/* What mla_decode.cu and mla_absorb.cu share: the one shape that they take, and how runs are
 * cut. */
#ifndef KK_MLA_DECODE_CUH
#define KK_MLA_DECODE_CUH

#include "mla.cuh"

enum {
	LATENT = 512,
	ROPE = 64,
	WIDTH = LATENT + ROPE,
	NOPE = 128,
	VALUE = 128,
	TILE = KM_MLA_TILE,
	MAX_SPLITS = 160,
};

__device__ __forceinline__ int tiles_of_run(int context, int splits)
{
	int tiles = (context + TILE - 1) / TILE;

	return (tiles + splits - 1) / splits;
}

static bool fits(const kk_mla_decode_args *a)
{
	const km_mla_shape *s = &a->shape;

	return s->kv_lora_rank == LATENT && s->rope_dim == ROPE && s->nope_dim == NOPE &&
	       s->v_dim == VALUE && a->splits >= 1 && a->splits <= MAX_SPLITS && a->seqs <= 65535;
}

#endif
