/*
 * Norm and rope of what goes to the cache, rope of the queries that need no absorbing, in one
 * launch.
 *
 * ROOFLINE
 *   A decoding row reads 2.3 kB (kv_a, f32) and writes 1.2 (bf16 cache): nothing, so a launch (1
 *   us). A prompt's row also rotates 64 values of each head in place, 16 kB at 64 heads: 8,192 rows
 *   134 MB of half-used sectors, 45 us on H100, against 8 ms for the layer.
 *
 * RULES
 *   A row's norm: each lane sums its columns in rising order, the lanes in a butterfly. No row
 *   depends on another. Positions and slots were checked by the model.
 */
#include "mla.cuh"

enum { ROWS = 4, THREADS = 32 * ROWS };

__device__ __forceinline__ float4 read4(const float *p)
{
	return *(const float4 *)p;
}

/* Eight values, to elements [at, at + 8) of the cache. */
__device__ __forceinline__ void store8(void *cache, bool fp8, size_t at, const float (&v)[8])
{
	if (fp8) {
		uint32_t word[2] = {};

		for (int i = 0; i < 8; i++)
			word[i / 4] |=
				(uint32_t)__nv_cvt_float_to_fp8(v[i], __NV_SATFINITE, __NV_E4M3)
				<< i % 4 * 8;
		*(uint2 *)((char *)cache + at) = make_uint2(word[0], word[1]);
	} else {
		*(uint4 *)((char *)cache + at * 2) =
			make_uint4(mla_pack(v[0], v[1]), mla_pack(v[2], v[3]), mla_pack(v[4], v[5]),
		                   mla_pack(v[6], v[7]));
	}
}

__device__ __forceinline__ float norm_factor(const kk_rope_kv_args &a, const float *latent,
                                             int lane)
{
	float sum = 0.0f;

	for (int c = lane * 4; c < a.kv_lora_rank; c += 128) {
		float4 x = read4(latent + c);

		sum += x.x * x.x;
		sum += x.y * x.y;
		sum += x.z * x.z;
		sum += x.w * x.w;
	}
	return 1.0f / sqrtf(mla_sum_lanes(sum) / (float)a.kv_lora_rank + a.eps);
}

/* A warp writes one row. */
__device__ __forceinline__ void write_row(const kk_rope_kv_args &a, int row, int lane)
{
	const float *latent = a.kv_a + (size_t)row * a.kv_a_stride, *k_pe = latent + a.kv_lora_rank;
	const float *turn = a.cos_sin + (size_t)a.positions[row] * a.rope_dim;
	size_t at = (size_t)a.slots[row] * (a.kv_lora_rank + a.rope_dim);
	float factor = norm_factor(a, latent, lane), v[8];

	for (int c = lane * 8; c < a.kv_lora_rank; c += 256) {
		float4 x[2] = {read4(latent + c), read4(latent + c + 4)};
		float4 w[2] = {read4(a.norm + c), read4(a.norm + c + 4)};

		for (int i = 0; i < 8; i++)
			v[i] = (&x[0].x)[i] * factor * (&w[0].x)[i];
		store8(a.cache, a.fp8, at + c, v);
	}
	for (int c = lane * 8; c < a.rope_dim; c += 256) {
		for (int i = 0; i < 8; i += 2) {
			float cosine = turn[(c + i) / 2], sine = turn[(c + i + a.rope_dim) / 2];
			float first = k_pe[c + i], second = k_pe[c + i + 1];

			v[i] = first * cosine - second * sine;
			v[i + 1] = second * cosine + first * sine;
		}
		store8(a.cache, a.fp8, at + a.kv_lora_rank + c, v);
	}
}

/* A thread rotates four pairs of one head. */
__device__ __forceinline__ void rotate_queries(const kk_rope_kv_args &a, int64_t item)
{
	int pieces = a.rope_dim / 8, piece = (int)(item % pieces), key = a.nope_dim + a.rope_dim;
	int64_t head = item / pieces; /* of all rows */
	int row = a.q_from + (int)(head / a.heads);
	const float *turn = a.cos_sin + (size_t)a.positions[row] * a.rope_dim + piece * 4;
	uint4 *at = (uint4 *)((__nv_bfloat16 *)a.q + ((size_t)a.q_from * a.heads + head) * key +
	                      a.nope_dim + piece * 8);
	float4 c = read4(turn), s = read4(turn + a.rope_dim / 2);
	uint4 q = *at;

	q.x = mla_rotate(q.x, c.x, s.x);
	q.y = mla_rotate(q.y, c.y, s.y);
	q.z = mla_rotate(q.z, c.z, s.z);
	q.w = mla_rotate(q.w, c.w, s.w);
	*at = q;
}

__global__ void __launch_bounds__(THREADS) rope_kv(kk_rope_kv_args a)
{
	int row_blocks = (a.tokens + ROWS - 1) / ROWS, block = (int)blockIdx.x;

	ptx_release_successor();
	ptx_wait_predecessor();
	if (block < row_blocks) {
		int row = block * ROWS + (int)threadIdx.x / 32;

		if (row < a.tokens && a.slots[row] >= 0)
			write_row(a, row, (int)threadIdx.x % 32);
	} else {
		int64_t item = (int64_t)(block - row_blocks) * THREADS + threadIdx.x;

		if (item < (int64_t)(a.tokens - a.q_from) * a.heads * (a.rope_dim / 8))
			rotate_queries(a, item);
	}
}

extern "C" cudaError_t kk_rope_kv(const kk_rope_kv_args *a, cudaStream_t stream)
{
	int64_t items = (int64_t)(a->tokens - a->q_from) * a->heads * (a->rope_dim / 8);
	int64_t blocks = (a->tokens + ROWS - 1) / ROWS + (items + THREADS - 1) / THREADS;

	if (a->kv_lora_rank % 8 || a->rope_dim % 8 || a->nope_dim % 8 || a->kv_a_stride % 4 ||
	    a->q_from > a->tokens || blocks > INT32_MAX)
		return cudaErrorInvalidValue;
	return mla_launch(rope_kv, {dim3((unsigned)blocks), THREADS, 0, 0}, *a, stream);
}
