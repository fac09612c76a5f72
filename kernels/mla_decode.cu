/*
 * MLA decode in the absorbed form: every head of a row against the same cached latents.
 *
 * ROOFLINE
 *   A cached token is 576 values, 1,152 bytes (e4m3: 576), for all heads, and 2 * (576 + 512) flops
 *   for each of them: at 64 heads 121 flops a byte (242), where H100 has 250 (780 TFLOP/s over 3.1
 *   TB/s) and H200 160. So bf16 is bound by bytes on both, fp8 about even. 64 rows at 8,192 tokens:
 *   604 MB, 195 us on H100, 126 on H200; fp8 97 by bytes, 94 by flops. One row at 1,024 tokens: 1.2
 *   MB, 0.4 us, and what counts is the chain of launches. The absorbing products read W_kc and W_vc
 *   once, 128 kB a head each: 2.7 us at 64 heads.
 *
 * LADDER
 *   general  mla_general.cu: any shape.
 *   here     kv_lora_rank 512, rope 64, nope and v 128, on wgmma; three launches. us on an H100,
 *            graph replay, cold (absorb / attend / combine / all three overlapping; attend's share
 *            of its bound):
 *            64 rows x 8,192, 64 heads    9.7 / 216 / 15 / 248 (90%); e4m3 9.7 / 212 / 15 / 245 (46%)
 *            64 rows x 131,072, 64 heads  10 / 3,226 / 15 / 3,267 (97%)
 *            64 rows x 8,192, 8 heads     3.7 / 206 / 9.8 / 224 (94%)
 *            1 row x 1,024, 64 heads      5.9 / 7.2 / 7.1 / 21
 *            1 row x 1,024, 8 heads       3.0 / 5.3 / 4.3 / 12.8: a chain of latencies
 *            TRIED 11 to 13, 28.
 *
 * attend: a block has 64 heads (rows of zeros where there are fewer) of one run of a sequence.
 * Their queries, 64 x 576, stay in shared memory; tiles of 64 cached tokens pass through two more
 * buffers of that size. Some warpgroups fetch: pages are looked up a token at a time, so any page
 * size does, and cp.async puts 16-byte pieces where wgmma's 128-byte swizzle wants them; e4m3 goes
 * through registers and becomes bf16 on the way (exactly: 3 bits of fraction). Two warpgroups
 * compute: both do all of a tile's scores and its softmax, and each half of the sum's 512 columns,
 * 64 x 256 in registers. Doing the scores twice costs 1,152 of 3,328 cycles of tensor cores a tile;
 * in return a weight never leaves the registers that it was made in, and the two meet at no barrier.
 * A tile takes 5,500 cycles, as long as one of bf16 takes to arrive, twice as long as one of e4m3.
 *
 * absorb lets attend begin only when it has itself seen the end of its predecessor, so attend's
 * producers may read lengths, pages and cache, this step's rows too, while absorb still works: only
 * the queries are waited for. The two are launched one after the other, with nothing between.
 *
 * RULES
 *   Order: a run's tokens in tiles of 64 from its start; scores by wgmma over the columns in rising
 *   order; weights summed by lane, then across a row's four lanes; runs by their number modulo
 *   eight, rising, and the eight as a tree. A row depends on its length and the plan only. Tokens
 *   beyond the length are zeros in shared memory and weigh nothing. An e4m3 NaN reads as 480: what
 *   wrote it has spoilt that token's row too.
 */
#include <math_constants.h>

#include "mla_decode.cuh"

enum {
	HEADS = 64, /* of an attending block: wgmma's rows */
	STAGES = 2,
	COLUMN_BLOCKS = WIDTH / 64,
	COLUMN_BYTES = TILE * 128, /* 64 columns of a tile, and of the queries */
	TILE_BYTES = COLUMN_BLOCKS * COLUMN_BYTES,
	CONSUMERS = 256,
};

/* Threads that fetch; what they need holds 36 registers of e4m3 each, or addresses. */
static __host__ __device__ constexpr int producers(bool fp8)
{
	return fp8 ? 256 : 128;
}
static_assert(TILE == 64 && HEADS == 64, "queries and tiles have one layout");

/* From the start of shared memory, rounded up to 1,024. */
enum {
	AT_QUERY = 0,
	AT_TILES = TILE_BYTES,
	AT_FULL = AT_TILES + STAGES * TILE_BYTES, /* barriers, 8 bytes each */
	AT_EMPTY = AT_FULL + 8 * STAGES,
	ATTEND_BYTES = AT_EMPTY + 8 * STAGES + 1024,
};

/* Where 16 bytes lie in a tile: row, and piece of the row's 72. */
__device__ __forceinline__ uint32_t tile_at(int row, int piece)
{
	return piece / 8 * COLUMN_BYTES + row * 128 + ((piece % 8 ^ row % 8) << 4);
}

/* What one block does. */
struct attend_run {
	int seq, first_head, heads, split;
	int context;  /* cached tokens of the sequence */
	int from, to; /* tiles */
};

__device__ __forceinline__ attend_run find_run(const kk_mla_decode_args &a)
{
	attend_run r;

	r.split = (int)blockIdx.x;
	r.first_head = (int)blockIdx.y * HEADS;
	r.seq = (int)blockIdx.z;
	r.heads = min(a.shape.heads - r.first_head, (int)HEADS);
	r.context = max(a.kv_len[r.seq], 0);
	int each = tiles_of_run(r.context, a.splits);
	r.from = r.split * each;
	r.to = min(r.from + each, (r.context + TILE - 1) / TILE);
	return r;
}

__device__ __forceinline__ size_t run_index(const kk_mla_decode_args &a, const attend_run &r,
                                            int head)
{
	return ((size_t)r.seq * a.shape.heads + r.first_head + head) * a.splits + r.split;
}

/* Queries of the block's heads, zeros below them; by the threads that will use them. */
__device__ __forceinline__ void load_queries(const kk_mla_decode_args &a, const attend_run &r,
                                             char *smem)
{
	const uint4 *from = (const uint4 *)a.query +
	                    ((size_t)r.seq * a.shape.heads + r.first_head) * (WIDTH / 8);
	constexpr int EACH = HEADS * (WIDTH / 8) / CONSUMERS, HALF = EACH / 2;

	static_assert(2 * HALF * CONSUMERS == HEADS * (WIDTH / 8), "every piece has its thread");
#pragma unroll
	for (int half = 0; half < 2; half++) {
		uint4 v[HALF];

#pragma unroll
		for (int i = 0; i < HALF; i++) {
			int piece = (half * HALF + i) * CONSUMERS + (int)threadIdx.x;

			v[i] = piece / (WIDTH / 8) < r.heads ? from[piece] : make_uint4(0, 0, 0, 0);
		}
#pragma unroll
		for (int i = 0; i < HALF; i++) {
			int piece = (half * HALF + i) * CONSUMERS + (int)threadIdx.x;

			int row = piece / (WIDTH / 8);

			*(uint4 *)(smem + AT_QUERY + tile_at(row, piece % (WIDTH / 8))) = v[i];
		}
	}
}

/*
 * bf16: thread 8 i + j fetches piece j of each 64 columns of rows i, i + 16, i + 32, i + 48. The
 * next tile's pages are looked up while this one's pieces are on their way.
 */
struct fetch_rows {
	const char *from[4];
	bool valid[4];
};

__device__ __forceinline__ void find_rows(fetch_rows &f, const kk_mla_decode_args &a,
                                          const attend_run &r, int tile, int thread)
{
	const int32_t *pages = a.pages + (size_t)r.seq * a.pages_per_seq;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		int token = tile * TILE + thread / 8 + i * 16;

		f.valid[i] = token < r.context;
		f.from[i] = (const char *)a.cache + thread % 8 * 16;
		if (f.valid[i])
			f.from[i] += mla_slot(pages, a.page_size, token) * (WIDTH * 2);
	}
}

__device__ __forceinline__ void produce_bf16(const kk_mla_decode_args &a, const attend_run &r,
                                             uint32_t smem, int thread)
{
	uint32_t to = smem + AT_TILES + tile_at(thread / 8, thread % 8);
	fetch_rows f;

	find_rows(f, a, r, r.from, thread);
	for (int tile = r.from, n = 0; tile < r.to; tile++, n++) {
		int stage = n % STAGES;

		ptx_mbarrier_wait(smem + AT_EMPTY + 8 * stage, (n / STAGES & 1) ^ 1);
#pragma unroll
		for (int i = 0; i < 4; i++)
#pragma unroll
			for (int c = 0; c < COLUMN_BLOCKS; c++)
				ptx_copy_async(to + stage * TILE_BYTES + c * COLUMN_BYTES +
				                       i * 16 * 128,
				               f.from[i] + c * 128, f.valid[i]);
		ptx_mbarrier_arrive_copied(smem + AT_FULL + 8 * stage);
		if (tile + 1 < r.to)
			find_rows(f, a, r, tile + 1, thread);
	}
	ptx_copy_wait_all();
}

/*
 * e4m3: thread 4 i + j fetches pieces j, j + 4, ... (of 16 values) of row i into registers, which
 * take the next tile's as soon as this one's are stored: 36 kB are always on their way.
 */
enum { FP8_PIECES = WIDTH / 16 / 4 };

struct fetch_fp8 {
	uint4 v[FP8_PIECES];
	const char *from; /* NULL: zeros */
};

__device__ __forceinline__ const char *find_row_fp8(const kk_mla_decode_args &a,
                                                    const attend_run &r, int tile, int thread)
{
	int token = tile * TILE + thread / 4;

	if (tile >= r.to || token >= r.context)
		return nullptr;
	return (const char *)a.cache + thread % 4 * 16 +
	       mla_slot(a.pages + (size_t)r.seq * a.pages_per_seq, a.page_size, token) * WIDTH;
}

__device__ __forceinline__ void fetch_piece(fetch_fp8 &f, int k)
{
	f.v[k] = f.from ? ptx_load_stream(f.from + k * 64) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void produce_fp8(const kk_mla_decode_args &a, const attend_run &r,
                                            char *smem, uint32_t address, int thread)
{
	/* a piece's two halves in the first 64 columns; the others' are COLUMN_BYTES further
	 * each */
	int even = tile_at(thread / 4, thread % 4 * 2),
	    odd = tile_at(thread / 4, thread % 4 * 2 + 1) - even;
	fetch_fp8 f;

	f.from = find_row_fp8(a, r, r.from, thread);
#pragma unroll
	for (int k = 0; k < FP8_PIECES; k++)
		fetch_piece(f, k);
	for (int tile = r.from, n = 0; tile < r.to; tile++, n++) {
		int stage = n % STAGES;
		char *to = smem + AT_TILES + stage * TILE_BYTES + even;

		f.from = find_row_fp8(a, r, tile + 1, thread);
		ptx_mbarrier_wait(address + AT_EMPTY + 8 * stage, (n / STAGES & 1) ^ 1);
#pragma unroll
		for (int k = 0; k < FP8_PIECES; k++) {
			uint4 v = f.v[k];

			*(uint4 *)(to + k * COLUMN_BYTES) = mla_widen8(v.x, v.y);
			*(uint4 *)(to + k * COLUMN_BYTES + odd) = mla_widen8(v.z, v.w);
			fetch_piece(f, k);
		}
		ptx_fence_async();
		ptx_mbarrier_arrive(address + AT_FULL + 8 * stage);
	}
}

/* A computing thread's place: which warpgroup, and which thread of it. */
struct consumer {
	uint32_t address; /* of shared memory, rounded up to 1,024 */
	int group, thread;
	float to_base2;   /* scores times this are exponents of 2 */
};

/* A warpgroup's softmax: this thread's rows lane / 4 and lane / 4 + 8 of its warp's 16. */
struct running {
	float largest[2]; /* of the scores, unscaled */
	float total[2];   /* this lane's part */
};

/* Scores of 64 heads and a tile's tokens. */
__device__ __forceinline__ void score_tile(float (&score)[32], uint64_t queries, uint64_t tile)
{
	ptx_wgmma_fence();
#pragma unroll
	for (int k = 0; k < WIDTH / 16; k++) {
		uint64_t on = (k / 4 * COLUMN_BYTES + k % 4 * 32) >> 4;

		ptx_wgmma<64>(score, queries + on, tile + on, k > 0);
	}
	ptx_wgmma_commit();
	ptx_wgmma_wait<0>();
}

__device__ __forceinline__ void hide_beyond(float (&score)[32], int count, int lane)
{
#pragma unroll
	for (int i = 0; i < 32; i++)
		if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= count)
			score[i] = -CUDART_INF_F;
}

/* Each row's largest score, in all four of its lanes. */
__device__ __forceinline__ void find_largest(float (&most)[2], const float (&score)[32])
{
	most[0] = most[1] = -CUDART_INF_F;
#pragma unroll
	for (int i = 0; i < 32; i++)
		most[i / 2 % 2] = fmaxf(most[i / 2 % 2], score[i]);
#pragma unroll
	for (int h = 0; h < 2; h++) {
		most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 1));
		most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 2));
	}
}

/* scores -> weights as wgmma's a, by the largest so far and the new ones' `most`; what earlier sums
 * are to be multiplied with. */
__device__ __forceinline__ void weigh(running &s, const float (&score)[32], const float (&most)[2],
                                      uint32_t (&weights)[4][4], float (&rescale)[2],
                                      float to_base2)
{
	float zero[2];

#pragma unroll
	for (int h = 0; h < 2; h++) {
		float largest = fmaxf(s.largest[h], most[h]);

		rescale[h] = ptx_ex2((s.largest[h] - largest) * to_base2);
		s.largest[h] = largest;
		s.total[h] *= rescale[h];
		zero[h] = largest * to_base2;
	}
#pragma unroll
	for (int i = 0; i < 32; i += 2) {
		float p = ptx_ex2(score[i] * to_base2 - zero[i / 2 % 2]);
		float next = ptx_ex2(score[i + 1] * to_base2 - zero[i / 2 % 2]);

		s.total[i / 2 % 2] += p;
		s.total[i / 2 % 2] += next;
		weights[i / 8][i / 2 % 4] = mla_pack(p, next);
	}
}

__device__ __forceinline__ void rescale_sum(float (&sum)[2][64], const float (&rescale)[2])
{
#pragma unroll
	for (int i = 0; i < 128; i++)
		sum[i / 64][i % 64] *= rescale[i / 2 % 2];
}

/* Begins the sum of a tile's values. Two products of 128 columns: one of 256 would need more
 * registers than a block of 512 threads begins with. */
__device__ __forceinline__ void issue_values(float (&sum)[2][64], const uint32_t (&weights)[4][4],
                                             uint64_t values)
{
	ptx_wgmma_fence();
#pragma unroll
	for (int k = 0; k < TILE / 16; k++)
#pragma unroll
		for (int c = 0; c < 2; c++)
			ptx_wgmma_128_down(sum[c], weights[k],
			                   values + ((k * 2048 + c * 2 * COLUMN_BYTES) >> 4), true);
	ptx_wgmma_commit();
}

/* This warpgroup's 256 columns, and once each row's largest score and sum of weights. */
__device__ __forceinline__ void store_run(const consumer &c, const kk_mla_decode_args &a,
                                          const attend_run &r, const float (&sum)[2][64],
                                          const running &s)
{
	int lane = c.thread % 32;

#pragma unroll
	for (int h = 0; h < 2; h++) {
		int head = c.thread / 32 * 16 + lane / 4 + 8 * h;
		float total = s.total[h];
		size_t run = run_index(a, r, head);
		float *to = a.partial + run * LATENT + c.group * 256 + lane % 4 * 2;

		total += __shfl_xor_sync(0xffffffffu, total, 1);
		total += __shfl_xor_sync(0xffffffffu, total, 2);
		if (head >= r.heads)
			continue;
#pragma unroll
		for (int j = 0; j < 32; j++)
			*(float2 *)(to + j * 8) = make_float2(sum[j / 16][j % 16 * 4 + 2 * h],
			                                      sum[j / 16][j % 16 * 4 + 2 * h + 1]);
		if (c.group == 0 && lane % 4 == 0)
			*(float2 *)(a.stats + run * 2) =
				make_float2(s.largest[h] * c.to_base2, total);
	}
}

__device__ __forceinline__ void begin_sum(float (&sum)[2][64], running &s)
{
	s = {{-CUDART_INF_F, -CUDART_INF_F}, {0.0f, 0.0f}};
#pragma unroll
	for (int i = 0; i < 128; i++)
		sum[i / 64][i % 64] = 0.0f;
}

/* A tile of this warpgroup's, once it is there. */
__device__ __forceinline__ void await_tile(const consumer &c, int stage, uint32_t parity)
{
	ptx_mbarrier_wait(c.address + AT_FULL + 8 * stage, parity);
	ptx_fence_async(); /* cp.async's writes, seen by the wait, are wgmma's to read */
}

__device__ __forceinline__ void free_tile(const consumer &c, int stage)
{
	if (c.thread % 32 == 0) /* the warp's products are done */
		ptx_mbarrier_arrive(c.address + AT_EMPTY + 8 * stage);
}

/* A tile, its scores by each warpgroup for itself. */
__device__ __forceinline__ void consume_tile(const consumer &c, const attend_run &r, int tile,
                                             int n, float (&sum)[2][64], running &s)
{
	int stage = n % STAGES;
	uint32_t at = c.address + AT_TILES + stage * TILE_BYTES;
	float score[32], most[2], rescale[2];
	uint32_t weights[4][4];

	await_tile(c, stage, n / STAGES & 1);
	score_tile(score, ptx_wgmma_matrix(c.address + AT_QUERY, 16), ptx_wgmma_matrix(at, 16));
	if ((tile + 1) * TILE > r.context)
		hide_beyond(score, r.context - tile * TILE, c.thread % 32);
	find_largest(most, score);
	weigh(s, score, most, weights, rescale, c.to_base2);
	rescale_sum(sum, rescale);
	issue_values(sum, weights, ptx_wgmma_matrix(at + c.group * 4 * COLUMN_BYTES, COLUMN_BYTES));
	ptx_wgmma_wait<0>();
	free_tile(c, stage);
}

__device__ __forceinline__ void consume(const consumer &c, const kk_mla_decode_args &a,
                                              const attend_run &r)
{
	float sum[2][64];
	running s;

	begin_sum(sum, s);
	for (int tile = r.from, n = 0; tile < r.to; tile++, n++)
		consume_tile(c, r, tile, n, sum, s);
	store_run(c, a, r, sum, s);
}

template <bool FP8>
__global__ void __launch_bounds__(CONSUMERS + producers(FP8), 1) attend(kk_mla_decode_args a)
{
	extern __shared__ char raw[];
	uint32_t raw_at = (uint32_t)__cvta_generic_to_shared(raw),
		 smem = (raw_at + 1023) / 1024 * 1024;
	char *aligned = raw + (smem - raw_at);
	int thread = (int)threadIdx.x, group = thread / 128;

	ptx_release_successor();
	if (thread < STAGES) {
		ptx_mbarrier_init(smem + AT_FULL + 8 * thread, producers(FP8));
		ptx_mbarrier_init(smem + AT_EMPTY + 8 * thread, CONSUMERS / 32);
	}
	__syncthreads(); /* the barriers are begun */
	attend_run r = find_run(a);
	if (r.from >= r.to) {
		ptx_wait_predecessor();
		if (thread < r.heads)
			*(float2 *)(a.stats + run_index(a, r, thread) * 2) =
				make_float2(-CUDART_INF_F, 0.0f);
		return;
	}
	/* 168 a thread at the start, 128 with e4m3: what some give up is what the others get, or
	 * they wait for ever */
	if (group >= CONSUMERS / 128) {
		ptx_fewer_registers<FP8 ? 64 : 40>();
		if (FP8)
			produce_fp8(a, r, aligned, smem, thread - CONSUMERS);
		else
			produce_bf16(a, r, smem, thread - CONSUMERS);
	} else {
		ptx_more_registers<FP8 ? 192 : 232>();
		ptx_wait_predecessor();
		load_queries(a, r, aligned);
		ptx_fence_async();
		ptx_barrier_some(1, CONSUMERS); /* the queries are written */
		consumer c = {smem, group, thread % 128, a.scale * MLA_LOG2E};
		consume(c, a, r);
	}
}

extern "C" cudaError_t kk_mla_attend(const kk_mla_decode_args *a, cudaStream_t stream)
{
	void (*kernel)(kk_mla_decode_args) = a->shape.fp8 ? attend<true> : attend<false>;
	dim3 grid(a->splits, (a->shape.heads + HEADS - 1) / HEADS, a->seqs);
	int threads = CONSUMERS + producers(a->shape.fp8);
	cudaError_t rc;

	if (!fits(a))
		return cudaErrorInvalidValue;
	rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
	                          ATTEND_BYTES);
	if (rc != cudaSuccess)
		return rc;
	return mla_launch(kernel, {grid, threads, ATTEND_BYTES, 0}, *a, stream);
}
