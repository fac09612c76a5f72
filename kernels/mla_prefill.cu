/*
 * MLA prefill in the plain form: rows of a prompt against keys and values that have been rebuilt
 * from the cached latents (kv_b's product, a matrix product like any other, is not here).
 *
 * ROOFLINE
 *   For a row, a head and a key: 2 * (192 + 128) flops. A prompt of 8,192 at 64 heads: 1.37 TFLOP,
 *   1.8 ms at 780 TFLOP/s; the rebuilding of 8,192 tokens another 0.14 TFLOP, 0.18 ms. Bytes: a
 *   block of 128 rows reads 80 kB of keys and values for each 128 keys, from L2, for 2,560 cycles
 *   of tensor cores: 32 bytes a cycle, half of what a multiprocessor can take. Exponentials: 128 x
 *   128 a tile, 1,024 cycles of 16 a cycle, beside the products. Bound by tensor cores from some
 *   hundred keys on.
 *
 * LADDER
 *   general  mla_general.cu: any shape.
 *   here     nope and v 128, rope 64, on wgmma. On an H100, 64 heads, prompts of 512 / 2,048 /
 *            8,192: 30 / 200 / 2,440 to 2,560 us, 180 / 430 / 540 to 560 TFLOP/s. TRIED 14.
 *
 * A block has 128 rows of one head: 64 for each of two warpgroups, a third fetches. Keys are [nope
 * | rope], the rope part the same for all heads, from the gathered latents. Keys and values have
 * two buffers each of 128 tokens, given back apart: the scores of a tile are issued, then the last
 * tile's sum of values, and while that runs the weights of this one are made.
 *
 * RULES
 *   A row's keys come in tiles of 128 from the context's start, whichever wave and block they are
 *   in; tiles that a row does not see change nothing in it, bit for bit, so its result depends on
 *   its own context only. Rows' positions rise within a tile; they need not be adjacent.
 */
#include <math_constants.h>

#include "mla.cuh"

enum {
	NOPE = 128,
	ROPE = 64,
	KEY = NOPE + ROPE,
	VALUE = 128,
	ROWS = KM_MLA_PREFILL_TILE,
	TILE = KM_MLA_PREFILL_TILE,
	STAGES = 2,
	COLUMN_BYTES = TILE * 128, /* 64 columns of 128 rows */
	KEY_BYTES = KEY / 64 * COLUMN_BYTES,
	VALUE_BYTES = VALUE / 64 * COLUMN_BYTES,
	CONSUMERS = 256,
	PRODUCERS = 128,
	THREADS = CONSUMERS + PRODUCERS,
};
static_assert(ROWS == 128 && TILE == 128,
              "two warpgroups of 64 rows; queries and keys have one layout");

/* From the start of shared memory, rounded up to 1,024. */
enum {
	AT_QUERY = 0,
	AT_KEYS = KEY_BYTES,
	AT_VALUES = AT_KEYS + STAGES * KEY_BYTES,
	AT_KEYS_FULL = AT_VALUES + STAGES * VALUE_BYTES, /* barriers, 8 bytes each */
	AT_KEYS_FREE = AT_KEYS_FULL + 8 * STAGES,
	AT_VALUES_FULL = AT_KEYS_FREE + 8 * STAGES,
	AT_VALUES_FREE = AT_VALUES_FULL + 8 * STAGES,
	SMEM_BYTES = AT_VALUES_FREE + 8 * STAGES + 1024,
};

/* Where 16 bytes lie: row, and piece of the row. */
__device__ __forceinline__ uint32_t tile_at(int row, int piece)
{
	return piece / 8 * COLUMN_BYTES + row * 128 + ((piece % 8 ^ row % 8) << 4);
}

struct work {
	km_mla_tile tile;
	int head, steps; /* steps: tiles of keys */
};

__device__ __forceinline__ int seen_by(const kk_mla_prefill_args &a, const km_mla_tile &t, int row)
{
	return a.positions[t.row + min(row, t.rows - 1)] + 1 - t.first;
}

__device__ __forceinline__ void load_queries(const kk_mla_prefill_args &a, const work &w,
                                             char *smem)
{
	constexpr int PIECES = KEY / 8, EACH = ROWS * PIECES / THREADS;
	uint4 v[EACH];

	static_assert(EACH * THREADS == ROWS * PIECES, "every piece has its thread");
#pragma unroll
	for (int i = 0; i < EACH; i++) {
		int piece = i * THREADS + (int)threadIdx.x, row = piece / PIECES;
		size_t at = ((size_t)(w.tile.row + row) * a.shape.heads + w.head) * PIECES +
		            piece % PIECES;

		v[i] = row < w.tile.rows ? ((const uint4 *)a.q)[at] : make_uint4(0, 0, 0, 0);
	}
#pragma unroll
	for (int i = 0; i < EACH; i++) {
		int piece = i * THREADS + (int)threadIdx.x;

		*(uint4 *)(smem + AT_QUERY + tile_at(piece / PIECES, piece % PIECES)) = v[i];
	}
}

/* Thread 8 i + j fetches piece j of each 64 columns of rows i, i + 16, ...; zeros beyond the last
 * token. */
__device__ __forceinline__ void produce(const kk_mla_prefill_args &a, const work &w, uint32_t smem,
                                        int thread)
{
	int row = thread / 8, width = a.shape.kv_lora_rank + ROPE;
	size_t kv_bytes = (size_t)a.shape.heads * (NOPE + VALUE) * 2;
	const char *kv = (const char *)a.kv + (w.tile.offset + row) * kv_bytes +
	                 (size_t)w.head * (NOPE + VALUE) * 2 + thread % 8 * 16;
	const char *pe = (const char *)a.latents +
	                 ((size_t)(w.tile.offset + row) * width + a.shape.kv_lora_rank) * 2 +
	                 thread % 8 * 16;
	uint32_t to = smem + tile_at(row, thread % 8);

#pragma unroll 1
	for (int n = 0; n < w.steps; n++) {
		int stage = n % STAGES, left = w.tile.count - n * TILE - row;
		uint32_t parity = (n / STAGES & 1) ^ 1;
		uint32_t keys = to + AT_KEYS + stage * KEY_BYTES,
			 values = to + AT_VALUES + stage * VALUE_BYTES;

		ptx_mbarrier_wait(smem + AT_KEYS_FREE + 8 * stage, parity);
#pragma unroll
		for (int i = 0; i < TILE / 16; i++) {
			bool valid = i * 16 < left;
			const char *k = valid ? kv + i * 16 * kv_bytes : (const char *)a.kv;
			const char *r = valid ? pe + (size_t)i * 16 * width * 2
			                      : (const char *)a.kv;

			ptx_copy_async(keys + i * 2048, k, valid);
			ptx_copy_async(keys + COLUMN_BYTES + i * 2048, k + 128, valid);
			ptx_copy_async(keys + 2 * COLUMN_BYTES + i * 2048, r, valid);
		}
		ptx_mbarrier_arrive_copied(smem + AT_KEYS_FULL + 8 * stage);
		ptx_mbarrier_wait(smem + AT_VALUES_FREE + 8 * stage, parity);
#pragma unroll
		for (int i = 0; i < TILE / 16; i++) {
			bool valid = i * 16 < left;
			const char *v = valid ? kv + i * 16 * kv_bytes + NOPE * 2
			                      : (const char *)a.kv;

			ptx_copy_async(values + i * 2048, v, valid);
			ptx_copy_async(values + COLUMN_BYTES + i * 2048, v + 128, valid);
		}
		ptx_mbarrier_arrive_copied(smem + AT_VALUES_FULL + 8 * stage);
		kv += TILE * kv_bytes;
		pe += (size_t)TILE * width * 2;
	}
	ptx_copy_wait_all();
}

/* A warpgroup's softmax: this thread's rows lane / 4 and lane / 4 + 8 of its warp's 16. */
struct running {
	float largest[2]; /* of the scores, unscaled */
	float tile[2];    /* of the tile's weights, this lane's part */
	float total[2];   /* whole, in all four lanes of a row: it must be the same after a pause */
	int seen[2];      /* keys of the piece that the row sees */
	int all_see;      /* that every row of the warpgroup sees */
};

/* Begins the scores of 64 rows and a tile's keys. */
__device__ __forceinline__ void issue_scores(float (&score)[64], uint64_t queries, uint64_t keys)
{
	ptx_wgmma_fence();
#pragma unroll
	for (int k = 0; k < KEY / 16; k++) {
		uint64_t on = (k / 4 * COLUMN_BYTES + k % 4 * 32) >> 4;

		ptx_wgmma<128>(score, queries + on, keys + on, k > 0);
	}
	ptx_wgmma_commit();
}

__device__ __forceinline__ void issue_values(float (&sum)[64], const uint32_t (&weights)[8][4],
                                             uint64_t values)
{
	ptx_wgmma_fence();
#pragma unroll
	for (int k = 0; k < TILE / 16; k++)
		ptx_wgmma_128_down(sum, weights[k], values + (k * 2048 >> 4), true);
	ptx_wgmma_commit();
}

/* scores -> weights, in place; what earlier sums are to be multiplied with. */
__device__ __forceinline__ void weigh(running &s, float (&score)[64], float (&rescale)[2],
                                      int first, float to_base2, int lane)
{
	float most[2] = {s.largest[0], s.largest[1]};

	if (first + TILE > s.all_see)
#pragma unroll
		for (int i = 0; i < 64; i++)
			if (first + i / 4 * 8 + lane % 4 * 2 + i % 2 >= s.seen[i / 2 % 2])
				score[i] = -CUDART_INF_F;
#pragma unroll
	for (int i = 0; i < 64; i++)
		most[i / 2 % 2] = fmaxf(most[i / 2 % 2], score[i]);
#pragma unroll
	for (int h = 0; h < 2; h++) {
		most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 1));
		most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 2));
		rescale[h] = ptx_ex2((s.largest[h] - most[h]) * to_base2);
		s.largest[h] = most[h];
		s.tile[h] = 0.0f;
		most[h] *= to_base2;
	}
#pragma unroll
	for (int i = 0; i < 64; i++) {
		score[i] = ptx_ex2(score[i] * to_base2 - most[i / 2 % 2]);
		s.tile[i / 2 % 2] += score[i];
	}
}

/* Rescales the sum; the weights as wgmma's a, and their total. No product may be running. */
__device__ __forceinline__ void settle(running &s, float (&sum)[64], uint32_t (&weights)[8][4],
                                       const float (&score)[64], const float (&rescale)[2])
{
#pragma unroll
	for (int i = 0; i < 64; i++)
		sum[i] *= rescale[i / 2 % 2];
#pragma unroll
	for (int i = 0; i < 64; i += 2)
		weights[i / 8][i / 2 % 4] = mla_pack(score[i], score[i + 1]);
#pragma unroll
	for (int h = 0; h < 2; h++) {
		float tile = s.tile[h];

		tile += __shfl_xor_sync(0xffffffffu, tile, 1);
		tile += __shfl_xor_sync(0xffffffffu, tile, 2);
		s.total[h] = s.total[h] * rescale[h] + tile;
	}
}

/* State of a row and head: v_dim sums, largest score, sum of weights. */
__device__ __forceinline__ void begin_rows(const kk_mla_prefill_args &a, const work &w, running &s,
                                           float (&sum)[64], int row, int lane)
{
#pragma unroll
	for (int h = 0; h < 2; h++) {
		bool resumes = w.tile.resumes && row + 8 * h < w.tile.rows;
		const float *state =
			a.state +
			((size_t)(w.tile.row + row + 8 * h) * a.shape.heads + w.head) * (VALUE + 2);

		s.largest[h] = resumes ? state[VALUE] : -CUDART_INF_F;
		s.total[h] = resumes ? state[VALUE + 1] : 0.0f;
#pragma unroll
		for (int j = 0; j < 16; j++) {
			float2 v = resumes ? *(const float2 *)(state + j * 8 + lane % 4 * 2)
			                   : make_float2(0.0f, 0.0f);

			sum[4 * j + 2 * h] = v.x;
			sum[4 * j + 2 * h + 1] = v.y;
		}
	}
}

__device__ __forceinline__ void end_rows(const kk_mla_prefill_args &a, const work &w,
                                         const running &s, const float (&sum)[64], int row,
                                         int lane)
{
#pragma unroll
	for (int h = 0; h < 2; h++) {
		size_t at = (size_t)(w.tile.row + row + 8 * h) * a.shape.heads + w.head;
		float inverse = 1.0f / s.total[h];

		if (row + 8 * h >= w.tile.rows)
			continue;
		if (w.tile.goes_on) {
			float *state = a.state + at * (VALUE + 2);

#pragma unroll
			for (int j = 0; j < 16; j++)
				*(float2 *)(state + j * 8 + lane % 4 * 2) =
					make_float2(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]);
			if (lane % 4 == 0)
				*(float2 *)(state + VALUE) = make_float2(s.largest[h], s.total[h]);
			continue;
		}
#pragma unroll
		for (int j = 0; j < 16; j++)
			((uint32_t *)a.out)[(at * VALUE + j * 8) / 2 + lane % 4] = mla_pack(
				sum[4 * j + 2 * h] * inverse, sum[4 * j + 2 * h + 1] * inverse);
	}
}

/* A warpgroup's way through the keys. */
__device__ __forceinline__ void consume(const kk_mla_prefill_args &a, const work &w, uint32_t smem,
                                        int group, int thread)
{
	int lane = thread % 32, row = group * 64 + thread / 32 * 16 + lane / 4;
	uint64_t queries = ptx_wgmma_matrix(smem + AT_QUERY + group * 64 * 128, 16);
	float sum[64], score[64], rescale[2], to_base2 = a.scale * MLA_LOG2E;
	uint32_t weights[8][4];
	running s;

	begin_rows(a, w, s, sum, row, lane);
	s.seen[0] = seen_by(a, w.tile, row);
	s.seen[1] = seen_by(a, w.tile, row + 8);
	s.all_see = seen_by(a, w.tile, group * 64);

	ptx_mbarrier_wait(smem + AT_KEYS_FULL, 0);
	ptx_fence_async(); /* cp.async's writes, seen by the wait, are wgmma's to read */
	issue_scores(score, queries, ptx_wgmma_matrix(smem + AT_KEYS, 16));
	ptx_wgmma_wait<0>();
	if (lane == 0)
		ptx_mbarrier_arrive(smem + AT_KEYS_FREE);
	weigh(s, score, rescale, 0, to_base2, lane);
	settle(s, sum, weights, score, rescale);
#pragma unroll 1
	for (int n = 1; n < w.steps; n++) {
		int stage = n % STAGES, last = (n - 1) % STAGES;

		ptx_mbarrier_wait(smem + AT_KEYS_FULL + 8 * stage, n / STAGES & 1);
		ptx_fence_async();
		issue_scores(score, queries,
		             ptx_wgmma_matrix(smem + AT_KEYS + stage * KEY_BYTES, 16));
		ptx_mbarrier_wait(smem + AT_VALUES_FULL + 8 * last, (n - 1) / STAGES & 1);
		ptx_fence_async();
		issue_values(sum, weights,
		             ptx_wgmma_matrix(smem + AT_VALUES + last * VALUE_BYTES, COLUMN_BYTES));
		ptx_wgmma_wait<1>(); /* the scores are done, the values not */
		if (lane == 0)
			ptx_mbarrier_arrive(smem + AT_KEYS_FREE + 8 * stage);
		weigh(s, score, rescale, n * TILE, to_base2, lane);
		ptx_wgmma_wait<0>();
		if (lane == 0)
			ptx_mbarrier_arrive(smem + AT_VALUES_FREE + 8 * last);
		settle(s, sum, weights, score, rescale);
	}
	int last = (w.steps - 1) % STAGES;
	ptx_mbarrier_wait(smem + AT_VALUES_FULL + 8 * last, (w.steps - 1) / STAGES & 1);
	ptx_fence_async();
	issue_values(sum, weights,
	             ptx_wgmma_matrix(smem + AT_VALUES + last * VALUE_BYTES, COLUMN_BYTES));
	ptx_wgmma_wait<0>();
	end_rows(a, w, s, sum, row, lane);
}

__global__ void __launch_bounds__(THREADS, 1) prefill(kk_mla_prefill_args a)
{
	extern __shared__ char raw[];
	uint32_t raw_at = (uint32_t)__cvta_generic_to_shared(raw),
		 smem = (raw_at + 1023) / 1024 * 1024;
	int thread = (int)threadIdx.x, group = thread / 128;
	work w;

	ptx_release_successor();
	if (thread < STAGES) {
		ptx_mbarrier_init(smem + AT_KEYS_FULL + 8 * thread, PRODUCERS);
		ptx_mbarrier_init(smem + AT_KEYS_FREE + 8 * thread, CONSUMERS / 32);
		ptx_mbarrier_init(smem + AT_VALUES_FULL + 8 * thread, PRODUCERS);
		ptx_mbarrier_init(smem + AT_VALUES_FREE + 8 * thread, CONSUMERS / 32);
	}
	ptx_wait_predecessor();
	w.tile = a.tiles[blockIdx.x];
	w.head = (int)blockIdx.y;
	w.steps = (min(seen_by(a, w.tile, ROWS), w.tile.count) + TILE - 1) / TILE;
	load_queries(a, w, raw + (smem - raw_at));
	ptx_fence_async();
	__syncthreads(); /* the queries are written, the barriers begun */
	/* 168 a thread at the start: what 128 threads give up is what 256 get, or they wait for
	 * ever */
	if (group == CONSUMERS / 128) {
		ptx_fewer_registers<24>();
		produce(a, w, smem, thread - CONSUMERS);
	} else {
		ptx_more_registers<240>();
		consume(a, w, smem, group, thread % 128);
	}
}

extern "C" cudaError_t kk_mla_prefill(const kk_mla_prefill_args *a, cudaStream_t stream)
{
	const km_mla_shape *s = &a->shape;
	cudaError_t rc;

	if (s->nope_dim != NOPE || s->rope_dim != ROPE || s->v_dim != VALUE ||
	    s->kv_lora_rank % 8 || s->heads > 65535)
		return cudaErrorInvalidValue;
	rc = cudaFuncSetAttribute(prefill, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
	if (rc != cudaSuccess)
		return rc;
	return mla_launch(prefill, {dim3(a->tile_count, s->heads), THREADS, SMEM_BYTES, 0}, *a,
	                  stream);
}

/* Cached tokens, wherever their pages are, to adjacent rows, as bf16. Block: a run. */
enum { GATHER_THREADS = 256 };

__device__ __forceinline__ uint4 widen8(uint2 from)
{
	uint32_t to[4];

#pragma unroll
	for (int i = 0; i < 4; i++) {
		uint32_t two = (i < 2 ? from.x : from.y) >> i % 2 * 16;
		__half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)two, __NV_E4M3);
		float2 f = __half22float2(h);

		to[i] = mla_pack(f.x, f.y);
	}
	return make_uint4(to[0], to[1], to[2], to[3]);
}

__global__ void __launch_bounds__(GATHER_THREADS) gather(kk_mla_prefill_args a)
{
	int width = a.shape.kv_lora_rank + a.shape.rope_dim, pieces = width / 8;
	km_mla_run r = a.runs[blockIdx.x];
	const int32_t *pages = a.pages + (size_t)r.seq * a.pages_per_seq;

	ptx_release_successor();
	ptx_wait_predecessor();
#pragma unroll 6
	for (int i = (int)threadIdx.x; i < r.count * pieces; i += GATHER_THREADS) {
		int token = i / pieces;
		size_t from = mla_slot(pages, a.page_size, r.first + token) * pieces + i % pieces;
		uint4 v = a.shape.fp8 ? widen8(((const uint2 *)a.cache)[from])
		                      : ((const uint4 *)a.cache)[from];

		((uint4 *)a.latents)[(size_t)(r.offset + token) * pieces + i % pieces] = v;
	}
}

extern "C" cudaError_t kk_mla_gather(const kk_mla_prefill_args *a, cudaStream_t stream)
{
	if ((a->shape.kv_lora_rank + a->shape.rope_dim) % 8)
		return cudaErrorInvalidValue;
	return mla_launch(gather, {dim3(a->run_count), GATHER_THREADS, 0, 0}, *a, stream);
}
