/*
 * Attention for any shape, on CUDA cores: the plain device form of mla_decode.cu and
 * mla_prefill.cu, their oracle on the GPU, and what small models run.
 *
 * ROOFLINE
 *   None worth stating: every head reads the cache (or its keys and values) for itself, 64 times
 *   the bytes of the tensor-core forms at 64 heads, and FP32 units do 67 TFLOP/s where tensor cores
 *   do 990.
 *
 * LADDER
 *   Rung 0 of both families. See mla_decode.cu and mla_prefill.cu for what the others won.
 *
 * RULES
 *   A score is a sum over lanes, each in rising order of column (decode), or one lane's sum in that
 *   order (prefill); the weighted sum of values goes in rising order of token; tiles of 64 (decode)
 *   and 32 (prefill) tokens start at multiples of that. Nothing depends on another row.
 */
#include <math_constants.h>

#include "mla.cuh"

enum { THREADS = 128, WARPS = THREADS / 32, TILE = 64 };

/* Block: a head of a row. query = [W_kc^T q_nope | rotated q_pe]. */
__global__ void __launch_bounds__(THREADS) absorb_general(kk_mla_decode_args a)
{
	extern __shared__ float nope[]; /* [nope_dim] */
	const km_mla_shape &s = a.shape;
	int head = (int)blockIdx.x, row = (int)blockIdx.y, lora = s.kv_lora_rank, rope = s.rope_dim;
	const __nv_bfloat16 *q = (const __nv_bfloat16 *)a.q +
	                         ((size_t)row * s.heads + head) * (s.nope_dim + rope);
	__nv_bfloat16 *to =
		(__nv_bfloat16 *)a.query + ((size_t)row * s.heads + head) * (lora + rope);
	size_t first = (size_t)head * (s.nope_dim + s.v_dim);

	ptx_release_successor();
	ptx_wait_predecessor();
	for (int n = (int)threadIdx.x; n < s.nope_dim; n += THREADS)
		nope[n] = __bfloat162float(q[n]);
	__syncthreads(); /* nope is written */
	for (int c = (int)threadIdx.x; c < lora; c += THREADS) {
		float sum = 0.0f;

		for (int n = 0; n < s.nope_dim; n++)
			sum += nope[n] * mla_bf16(a.kv_b, (first + n) * lora + c);
		to[c] = __float2bfloat16_rn(sum);
	}
	for (int i = (int)threadIdx.x; i < rope / 2; i += THREADS) {
		const float *turn = a.cos_sin + (size_t)a.positions[row] * rope + i;

		((uint32_t *)(to + lora))[i] = mla_rotate(((const uint32_t *)(q + s.nope_dim))[i],
		                                          turn[0], turn[rope / 2]);
	}
}

struct attend_smem {
	float *query, *sum; /* [lora + rope], [lora] */
	float *score;       /* [TILE] */
};

/* Scores of a tile's tokens in base 2, a warp for each in turn. */
__device__ __forceinline__ void score_tile(const kk_mla_decode_args &a, const attend_smem &m,
                                           const int32_t *pages, int first, int count)
{
	int lane = (int)threadIdx.x % 32, width = a.shape.kv_lora_rank + a.shape.rope_dim;

	for (int i = (int)threadIdx.x / 32; i < count; i += WARPS) {
		size_t at = mla_slot(pages, a.page_size, first + i) * width;
		float sum = 0.0f;

		for (int c = lane; c < width; c += 32)
			sum += m.query[c] * mla_read(a.cache, a.shape.fp8, at + c);
		sum = mla_sum_lanes(sum);
		if (lane == 0)
			m.score[i] = sum * a.scale * MLA_LOG2E;
	}
}

/* Block: a head of a sequence. */
__global__ void __launch_bounds__(THREADS) attend_general(kk_mla_decode_args a)
{
	extern __shared__ float smem[];
	int lora = a.shape.kv_lora_rank, width = lora + a.shape.rope_dim;
	attend_smem m = {smem, smem + width, smem + width + lora};
	int seq = (int)blockIdx.y;
	size_t row = (size_t)seq * a.shape.heads + blockIdx.x;
	const int32_t *pages = a.pages + (size_t)seq * a.pages_per_seq;
	float largest = -CUDART_INF_F, total = 0.0f;

	ptx_release_successor();
	ptx_wait_predecessor();
	int context = a.kv_len[seq];
	for (int c = (int)threadIdx.x; c < width; c += THREADS)
		m.query[c] = mla_bf16(a.query, row * width + c);
	for (int c = (int)threadIdx.x; c < lora; c += THREADS)
		m.sum[c] = 0.0f;
	for (int first = 0; first < context; first += TILE) {
		int count = min(context - first, (int)TILE);
		float before = largest;

		__syncthreads(); /* the query is written; the last tile's scores are used up */
		score_tile(a, m, pages, first, count);
		__syncthreads(); /* the scores are written */
		for (int i = 0; i < count; i++)
			largest = fmaxf(largest, m.score[i]);
		float rescale = total == 0.0f ? 0.0f : exp2f(before - largest);
		total *= rescale;
		for (int i = 0; i < count; i++)
			total += exp2f(m.score[i] - largest);
		for (int c = (int)threadIdx.x; c < lora; c += THREADS) {
			float sum = m.sum[c] * rescale;

			for (int i = 0; i < count; i++)
				sum += exp2f(m.score[i] - largest) *
				       mla_read(a.cache, a.shape.fp8,
				                mla_slot(pages, a.page_size, first + i) * width +
				                        c);
			m.sum[c] = sum;
		}
	}
	for (int c = (int)threadIdx.x; c < lora; c += THREADS)
		a.partial[row * lora + c] = m.sum[c];
	if (threadIdx.x == 0)
		*(float2 *)(a.stats + row * 2) = make_float2(largest, total);
}

/* Block: a head of a row; out = W_vc sum / weight. */
__global__ void __launch_bounds__(THREADS) combine_general(kk_mla_decode_args a)
{
	extern __shared__ float latent[]; /* [lora] */
	const km_mla_shape &s = a.shape;
	int head = (int)blockIdx.x, lora = s.kv_lora_rank, lane = (int)threadIdx.x % 32;
	size_t row = (size_t)blockIdx.y * s.heads + head;
	size_t first = (size_t)head * (s.nope_dim + s.v_dim) + s.nope_dim;

	ptx_release_successor();
	ptx_wait_predecessor();
	float total = a.stats[row * 2 + 1];
	for (int c = (int)threadIdx.x; c < lora; c += THREADS)
		latent[c] = total > 0.0f ? a.partial[row * lora + c] / total : 0.0f;
	__syncthreads(); /* latent is written */
	for (int v = (int)threadIdx.x / 32; v < s.v_dim; v += WARPS) {
		float sum = 0.0f;

		for (int c = lane; c < lora; c += 32)
			sum += latent[c] * mla_bf16(a.kv_b, (first + v) * lora + c);
		sum = mla_sum_lanes(sum);
		if (lane == 0)
			((__nv_bfloat16 *)a.out)[row * s.v_dim + v] = __float2bfloat16_rn(sum);
	}
}

static bool decode_fits(const kk_mla_decode_args *a)
{
	const km_mla_shape *s = &a->shape;

	return a->splits == 1 && s->kv_lora_rank % 8 == 0 && s->rope_dim % 8 == 0 &&
	       s->nope_dim % 8 == 0 && s->v_dim % 8 == 0 && s->nope_dim <= 4096 &&
	       s->kv_lora_rank <= 4096;
}

extern "C" cudaError_t kk_mla_absorb_general(const kk_mla_decode_args *a, cudaStream_t stream)
{
	if (!decode_fits(a))
		return cudaErrorInvalidValue;
	return mla_launch(absorb_general, {dim3(a->shape.heads, a->seqs), THREADS,
	                  a->shape.nope_dim * sizeof(float), 0}, *a, stream);
}

extern "C" cudaError_t kk_mla_attend_general(const kk_mla_decode_args *a, cudaStream_t stream)
{
	size_t floats = 2 * (size_t)a->shape.kv_lora_rank + a->shape.rope_dim + TILE;

	if (!decode_fits(a) || floats * sizeof(float) > 48 * 1024)
		return cudaErrorInvalidValue;
	return mla_launch(attend_general,
	                  {dim3(a->shape.heads, a->seqs), THREADS, floats * sizeof(float), 0}, *a,
	                  stream);
}

extern "C" cudaError_t kk_mla_combine_general(const kk_mla_decode_args *a, cudaStream_t stream)
{
	if (!decode_fits(a))
		return cudaErrorInvalidValue;
	return mla_launch(combine_general, {dim3(a->shape.heads, a->seqs), THREADS,
	                  a->shape.kv_lora_rank * sizeof(float), 0}, *a, stream);
}

/*
 * Prefill: a warp for each head of a row. A lane scores a token of its own, 32 at a time; then it
 * sums the values' columns lane, lane + 32, ..., MAX_V of them at most.
 */
enum { KEYS = 32, MAX_V = 256, V_LANE = MAX_V / 32, MAX_KEY = 512 };

struct prefill_row {
	const __nv_bfloat16 *kv, *k_pe; /* of the tile's first token, this head */
	size_t kv_stride, k_pe_stride;
	float largest, total, sum[V_LANE];
};

__device__ __forceinline__ float score_key(const kk_mla_prefill_args &a, const prefill_row &r,
                                           const float *query, int key)
{
	const __nv_bfloat16 *nope = r.kv + key * r.kv_stride, *pe = r.k_pe + key * r.k_pe_stride;
	float sum = 0.0f;

	for (int c = 0; c < a.shape.nope_dim; c++)
		sum += query[c] * __bfloat162float(nope[c]);
	for (int c = 0; c < a.shape.rope_dim; c++)
		sum += query[a.shape.nope_dim + c] * __bfloat162float(pe[c]);
	return sum * a.scale * MLA_LOG2E;
}

__device__ __forceinline__ void add_keys(const kk_mla_prefill_args &a, prefill_row &r,
                                         const float *query, int first, int count, int lane)
{
	float score = lane < count ? score_key(a, r, query, first + lane) : -CUDART_INF_F;
	float largest = fmaxf(r.largest, mla_max_lanes(score));
	float rescale = r.total == 0.0f ? 0.0f : exp2f(r.largest - largest);
	float weight = lane < count ? exp2f(score - largest) : 0.0f;

	r.largest = largest;
	r.total = r.total * rescale + mla_sum_lanes(weight);
#pragma unroll
	for (int j = 0; j < V_LANE; j++)
		r.sum[j] *= rescale;
	for (int i = 0; i < count; i++) {
		const __nv_bfloat16 *v = r.kv + (first + i) * r.kv_stride + a.shape.nope_dim;
		float p = __shfl_sync(0xffffffffu, weight, i);

#pragma unroll
		for (int j = 0; j < V_LANE; j++)
			if (lane + 32 * j < a.shape.v_dim)
				r.sum[j] += p * __bfloat162float(v[lane + 32 * j]);
	}
}

/* The row's softmax comes from the state, or begins. */
__device__ __forceinline__ void begin_row(const kk_mla_prefill_args &a, prefill_row &r,
                                          const float *state, bool resumes, int lane)
{
	r.largest = resumes ? state[a.shape.v_dim] : -CUDART_INF_F;
	r.total = resumes ? state[a.shape.v_dim + 1] : 0.0f;
#pragma unroll
	for (int j = 0; j < V_LANE; j++)
		r.sum[j] = resumes && lane + 32 * j < a.shape.v_dim ? state[lane + 32 * j] : 0.0f;
}

__device__ __forceinline__ void end_row(const kk_mla_prefill_args &a, const prefill_row &r,
                                        float *state, __nv_bfloat16 *out, bool goes_on, int lane)
{
#pragma unroll
	for (int j = 0; j < V_LANE; j++) {
		int c = lane + 32 * j;

		if (c < a.shape.v_dim && goes_on)
			state[c] = r.sum[j];
		else if (c < a.shape.v_dim)
			out[c] = __float2bfloat16_rn(r.sum[j] / r.total);
	}
	if (goes_on && lane == 0) {
		state[a.shape.v_dim] = r.largest;
		state[a.shape.v_dim + 1] = r.total;
	}
}

/* Block: WARPS rows of a tile, one head. */
__global__ void __launch_bounds__(THREADS) prefill_general(kk_mla_prefill_args a)
{
	__shared__ float queries[WARPS][MAX_KEY];
	const km_mla_shape &s = a.shape;
	int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, head = (int)blockIdx.y;
	int key = s.nope_dim + s.rope_dim, width = s.kv_lora_rank + s.rope_dim;
	km_mla_tile t = a.tiles[blockIdx.z];
	int in_tile = (int)blockIdx.x * WARPS + warp, row = t.row + in_tile;

	ptx_release_successor();
	ptx_wait_predecessor();
	if (in_tile >= t.rows)
		return;
	size_t at = (size_t)row * s.heads + head,
	       kv_stride = (size_t)s.heads * (s.nope_dim + s.v_dim);
	float *state = a.state ? a.state + at * (s.v_dim + 2) : nullptr;
	prefill_row r;

	r.kv_stride = kv_stride;
	r.k_pe_stride = width;
	r.kv = (const __nv_bfloat16 *)a.kv + t.offset * kv_stride +
	       (size_t)head * (s.nope_dim + s.v_dim);
	r.k_pe = (const __nv_bfloat16 *)a.latents + (size_t)t.offset * width + s.kv_lora_rank;
	for (int c = lane; c < key; c += 32)
		queries[warp][c] = mla_bf16(a.q, at * key + c);
	__syncwarp(); /* the query is written */
	begin_row(a, r, state, t.resumes, lane);
	int seen = min(a.positions[row] + 1 - t.first, t.count);
	for (int first = 0; first < seen; first += KEYS)
		add_keys(a, r, queries[warp], first, min(seen - first, (int)KEYS), lane);
	end_row(a, r, state, (__nv_bfloat16 *)a.out + at * s.v_dim, t.goes_on, lane);
}

extern "C" cudaError_t kk_mla_prefill_general(const kk_mla_prefill_args *a, cudaStream_t stream)
{
	const km_mla_shape *s = &a->shape;
	dim3 grid(KM_MLA_PREFILL_TILE / WARPS, s->heads, a->tile_count);

	if (s->v_dim > MAX_V || s->nope_dim + s->rope_dim > MAX_KEY || a->tile_count > 65535)
		return cudaErrorInvalidValue;
	return mla_launch(prefill_general, {grid, THREADS, 0, 0}, *a, stream);
}
