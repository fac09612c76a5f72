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
 *            64 rows x 8,192, 64 heads    9.8 / 220 / 21 / 257 (89%)
 *            64 rows x 131,072, 64 heads  12 / 3,233 / 25 / 3,282 (96%)
 *            64 rows x 8,192, 8 heads     3.6 / 209 / 13 / 228 (93%)
 *            1 row x 1,024, 8 heads       2.9 / 6.1 / 4.4 / 13.8: a chain of latencies
 *            e4m3 takes the same times, 45% of its bound: the scores done twice, and the widening.
 *            TRIED 11 to 13.
 *
 * attend: a block has 64 heads (rows of zeros where there are fewer) of one run of a sequence.
 * Their queries, 64 x 576, stay in shared memory; tiles of 64 cached tokens pass through two more
 * buffers of that size. A warpgroup fetches: pages are looked up a token at a time, so any page
 * size does, and cp.async puts 16-byte pieces where wgmma's 128-byte swizzle wants them; e4m3 goes
 * through registers and becomes bf16 on the way (exactly: 3 bits of fraction). Two warpgroups
 * compute: both do all of a tile's scores and its softmax, and each half of the sum's 512 columns,
 * 64 x 256 in registers. Doing the scores twice costs 1,152 of 3,328 cycles of tensor cores a tile,
 * which takes 5,500 to arrive; in return a weight never leaves the registers that it was made in,
 * and the two meet at no barrier.
 *
 * RULES
 *   Order: a run's tokens in tiles of 64 from its start; scores by wgmma over the columns in rising
 *   order; weights summed by lane, then across a row's four lanes; runs by their number modulo
 *   eight, rising, and the eight as a tree. A row depends on its length and the plan only. Tokens
 *   beyond the length are zeros in shared memory and weigh nothing. An e4m3 NaN reads as 480: what
 *   wrote it has spoilt that token's row too.
 */
#include <math_constants.h>

#include "mla.cuh"

enum {
	LATENT = 512,
	ROPE = 64,
	WIDTH = LATENT + ROPE,
	NOPE = 128,
	VALUE = 128,
	HEADS = 64, /* of an attending block: wgmma's rows */
	TILE = KM_MLA_TILE,
	STAGES = 2,
	COLUMN_BLOCKS = WIDTH / 64,
	COLUMN_BYTES = TILE * 128, /* 64 columns of a tile, and of the queries */
	TILE_BYTES = COLUMN_BLOCKS * COLUMN_BYTES,
	CONSUMERS = 256,
	MAX_SPLITS = 160,
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

__device__ __forceinline__ int tiles_of_run(int context, int splits)
{
	int tiles = (context + TILE - 1) / TILE;

	return (tiles + splits - 1) / splits;
}

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

			*(uint4 *)(smem + AT_QUERY + tile_at(piece / (WIDTH / 8), piece % (WIDTH / 8))) =
				v[i];
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

/* Two e4m3 in the high bytes of each half: shifted into bf16's fields they are 2^-120 of what they
 * were. */
__device__ __forceinline__ uint32_t widen_pair(uint32_t high_bytes)
{
	uint32_t v = (high_bytes & 0x80008000u) | (high_bytes >> 4 & 0x07f007f0u);
	__nv_bfloat162 up =
		__halves2bfloat162(__ushort_as_bfloat16(0x7b80), __ushort_as_bfloat16(0x7b80));
	__nv_bfloat162 wide = __hmul2(*(__nv_bfloat162 *)&v, up);

	return *(uint32_t *)&wide;
}

__device__ __forceinline__ uint4 widen8(uint32_t lo, uint32_t hi)
{
	return make_uint4(
		widen_pair(__byte_perm(lo, 0, 0x1404)), widen_pair(__byte_perm(lo, 0, 0x3424)),
		widen_pair(__byte_perm(hi, 0, 0x1404)), widen_pair(__byte_perm(hi, 0, 0x3424)));
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

			*(uint4 *)(to + k * COLUMN_BYTES) = widen8(v.x, v.y);
			*(uint4 *)(to + k * COLUMN_BYTES + odd) = widen8(v.z, v.w);
			fetch_piece(f, k);
		}
		ptx_fence_async();
		ptx_mbarrier_arrive(address + AT_FULL + 8 * stage);
	}
}

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

/* scores -> weights as wgmma's a; what earlier sums are to be multiplied with. */
__device__ __forceinline__ void weigh(running &s, const float (&score)[32],
                                      uint32_t (&weights)[4][4], float (&rescale)[2],
                                      float to_base2)
{
	float most[2] = {s.largest[0], s.largest[1]};

#pragma unroll
	for (int i = 0; i < 32; i++)
		most[i / 2 % 2] = fmaxf(most[i / 2 % 2], score[i]);
#pragma unroll
	for (int h = 0; h < 2; h++) {
		most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 1));
		most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 2));
		rescale[h] = ptx_ex2((s.largest[h] - most[h]) * to_base2);
		s.largest[h] = most[h];
		s.total[h] *= rescale[h];
		most[h] *= to_base2;
	}
#pragma unroll
	for (int i = 0; i < 32; i += 2) {
		float p = ptx_ex2(score[i] * to_base2 - most[i / 2 % 2]);
		float next = ptx_ex2(score[i + 1] * to_base2 - most[i / 2 % 2]);

		s.total[i / 2 % 2] += p;
		s.total[i / 2 % 2] += next;
		weights[i / 8][i / 2 % 4] = mla_pack(p, next);
	}
}

/* Two products of 128 columns: one of 256 would need more registers than a block of 512 threads
 * begins with. */
__device__ __forceinline__ void add_values(float (&sum)[2][64], const uint32_t (&weights)[4][4],
                                           const float (&rescale)[2], uint64_t values)
{
#pragma unroll
	for (int i = 0; i < 128; i++)
		sum[i / 64][i % 64] *= rescale[i / 2 % 2];
	ptx_wgmma_fence();
#pragma unroll
	for (int k = 0; k < TILE / 16; k++)
#pragma unroll
		for (int c = 0; c < 2; c++)
			ptx_wgmma_128_down(sum[c], weights[k],
			                   values + ((k * 2048 + c * 2 * COLUMN_BYTES) >> 4), true);
	ptx_wgmma_commit();
	ptx_wgmma_wait<0>();
}

/* This warpgroup's 256 columns, and once each row's largest score and sum of weights. */
__device__ __forceinline__ void store_run(const kk_mla_decode_args &a, const attend_run &r,
                                          const float (&sum)[2][64], const running &s,
                                          float to_base2, int group, int thread)
{
	int lane = thread % 32;

#pragma unroll
	for (int h = 0; h < 2; h++) {
		int head = thread / 32 * 16 + lane / 4 + 8 * h;
		float total = s.total[h];
		size_t run = run_index(a, r, head);
		float *to = a.partial + run * LATENT + group * 256 + lane % 4 * 2;

		total += __shfl_xor_sync(0xffffffffu, total, 1);
		total += __shfl_xor_sync(0xffffffffu, total, 2);
		if (head >= r.heads)
			continue;
#pragma unroll
		for (int j = 0; j < 32; j++)
			*(float2 *)(to + j * 8) = make_float2(sum[j / 16][j % 16 * 4 + 2 * h],
			                                      sum[j / 16][j % 16 * 4 + 2 * h + 1]);
		if (group == 0 && lane % 4 == 0)
			*(float2 *)(a.stats + run * 2) = make_float2(s.largest[h] * to_base2, total);
	}
}

__device__ __forceinline__ void consume(const kk_mla_decode_args &a, const attend_run &r,
                                        uint32_t smem, int group, int thread)
{
	running s = {{-CUDART_INF_F, -CUDART_INF_F}, {0.0f, 0.0f}};
	uint64_t queries = ptx_wgmma_matrix(smem + AT_QUERY, 16);
	float sum[2][64], to_base2 = a.scale * MLA_LOG2E;

#pragma unroll
	for (int i = 0; i < 128; i++)
		sum[i / 64][i % 64] = 0.0f;
	for (int tile = r.from, n = 0; tile < r.to; tile++, n++) {
		uint32_t at = smem + AT_TILES + n % STAGES * TILE_BYTES;
		float score[32], rescale[2];
		uint32_t weights[4][4];

		ptx_mbarrier_wait(smem + AT_FULL + 8 * (n % STAGES), n / STAGES & 1);
		ptx_fence_async(); /* cp.async's writes, seen by the wait, are wgmma's to read */
		score_tile(score, queries, ptx_wgmma_matrix(at, 16));
		if ((tile + 1) * TILE > r.context)
			hide_beyond(score, r.context - tile * TILE, thread % 32);
		weigh(s, score, weights, rescale, to_base2);
		add_values(sum, weights, rescale,
		           ptx_wgmma_matrix(at + group * 4 * COLUMN_BYTES, COLUMN_BYTES));
		if (thread % 32 == 0) /* the warp's products are done: the tile may go */
			ptx_mbarrier_arrive(smem + AT_EMPTY + 8 * (n % STAGES));
	}
	store_run(a, r, sum, s, to_base2, group, thread);
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
	ptx_wait_predecessor();
	attend_run r = find_run(a);
	if (r.from >= r.to) {
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
		load_queries(a, r, aligned);
		ptx_fence_async();
		ptx_barrier_some(1, CONSUMERS); /* the queries are written */
		consume(a, r, smem, group, thread % 128);
	}
}

static bool fits(const kk_mla_decode_args *a)
{
	const km_mla_shape *s = &a->shape;

	return s->kv_lora_rank == LATENT && s->rope_dim == ROPE && s->nope_dim == NOPE &&
	       s->v_dim == VALUE && a->splits >= 1 && a->splits <= MAX_SPLITS && a->seqs <= 65535;
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
	return mla_launch(kernel, grid, threads, ATTEND_BYTES, a->pdl, stream, *a);
}

/*
 * absorb: query[t, h, c] = sum_n q[t, h, n] W_kc[h, n, c], and q's rotated part behind it. A warp
 * has 64 columns of a head, all 128 rows of them in registers (16 kB on its way before the
 * predecessor has ended), and passes 16 tokens at a time by them. The columns of W are contiguous
 * and the sum runs down its rows, so a lane reads 16 bytes of eight rows and pairs them by byte
 * permutation: n-tile j takes the columns 8 g + j of lane group g, in any order since the result is
 * put back by the same rule, and a k-step takes rows that one lane has.
 */
enum { ABSORB_COLUMNS = 64, ABSORB_CHUNKS = LATENT / ABSORB_COLUMNS, ABSORB_PASSES = 2 };

struct absorb_weights {
	uint4 row[NOPE / 32][8]; /* rows 32 s + 8 t + i */
};

__device__ __forceinline__ uint32_t word(const uint4 &v, int i)
{
	return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ uint32_t pair_rows(const uint4 &upper, const uint4 &lower, int j)
{
	return __byte_perm(word(upper, j / 2), word(lower, j / 2), j % 2 ? 0x7632 : 0x5410);
}

__device__ __forceinline__ void load_w_kc(absorb_weights &w, const kk_mla_decode_args &a, int head,
                                          int chunk, int lane)
{
	const __nv_bfloat16 *from = (const __nv_bfloat16 *)a.kv_b +
	                            ((size_t)head * (NOPE + VALUE) + lane % 4 * 8) * LATENT +
	                            chunk * ABSORB_COLUMNS + lane / 4 * 8;

#pragma unroll
	for (int s = 0; s < NOPE / 32; s++)
#pragma unroll
		for (int i = 0; i < 8; i++)
			w.row[s][i] = ptx_load_stream(from + (size_t)(s * 32 + i) * LATENT);
}

__device__ __forceinline__ void absorb_tokens(const absorb_weights &w, const kk_mla_decode_args &a,
                                              int first, int head, int chunk, int lane)
{
	int heads = a.shape.heads, g = lane / 4, t = lane % 4;
	int row[2] = {min(first + g, a.seqs - 1), min(first + g + 8, a.seqs - 1)};
	uint4 q[2][NOPE / 32];
	float d[8][4] = {};

#pragma unroll
	for (int h = 0; h < 2; h++)
#pragma unroll
		for (int s = 0; s < NOPE / 32; s++)
			q[h][s] = ptx_load_fresh((const __nv_bfloat16 *)a.q +
			                         ((size_t)row[h] * heads + head) * (NOPE + ROPE) +
			                         s * 32 + t * 8);
#pragma unroll
	for (int s = 0; s < NOPE / 32; s++)
#pragma unroll
		for (int j = 0; j < 8; j++)
#pragma unroll
			for (int k = 0; k < 2; k++) {
				const uint4 *r = &w.row[s][4 * k];

				ptx_mma_bf16(d[j], word(q[0][s], 2 * k), word(q[1][s], 2 * k),
				             word(q[0][s], 2 * k + 1), word(q[1][s], 2 * k + 1),
				             pair_rows(r[0], r[1], j), pair_rows(r[2], r[3], j));
			}
#pragma unroll
	for (int h = 0; h < 2; h++) {
		uint4 *to = (uint4 *)((__nv_bfloat16 *)a.query +
		                      ((size_t)row[h] * heads + head) * WIDTH +
		                      chunk * ABSORB_COLUMNS + t * 16);

		if (first + g + 8 * h >= a.seqs)
			continue;
#pragma unroll
		for (int c = 0; c < 2; c++) /* columns 2t, 2t + 1 of each n-tile */
			to[c] = make_uint4(mla_pack(d[0][2 * h + c], d[1][2 * h + c]),
			                   mla_pack(d[2][2 * h + c], d[3][2 * h + c]),
			                   mla_pack(d[4][2 * h + c], d[5][2 * h + c]),
			                   mla_pack(d[6][2 * h + c], d[7][2 * h + c]));
	}
}

/* The head's last 64 values of 16 tokens: a lane has one pair of each. All loads before all
 * stores. */
__device__ __forceinline__ void rotate_tokens(const kk_mla_decode_args &a, int first, int head,
                                              int lane)
{
	int position = a.positions[min(first + lane % 16, a.seqs - 1)];
	uint32_t pair[16];
	float2 turn[16];

#pragma unroll
	for (int i = 0; i < 16; i++) {
		size_t at = (size_t)min(first + i, a.seqs - 1) * a.shape.heads + head;
		const float *from =
			a.cos_sin + (size_t)__shfl_sync(0xffffffffu, position, i) * ROPE + lane;

		pair[i] = ((const uint32_t *)a.q)[(at * (NOPE + ROPE) + NOPE) / 2 + lane];
		turn[i] = make_float2(from[0], from[ROPE / 2]);
	}
#pragma unroll
	for (int i = 0; i < 16; i++) {
		size_t at = (size_t)(first + i) * a.shape.heads + head;

		if (first + i < a.seqs)
			((uint32_t *)a.query)[(at * WIDTH + LATENT) / 2 + lane] =
				mla_rotate(pair[i], turn[i].x, turn[i].y);
	}
}

/* Block: a warp. x: chunk of columns, the last for the rotated part; y: head; z: of tokens. */
__global__ void __launch_bounds__(32) absorb(kk_mla_decode_args a)
{
	int chunk = (int)blockIdx.x, head = (int)blockIdx.y, lane = (int)threadIdx.x;
	int first = (int)blockIdx.z * ABSORB_PASSES * 16;
	int end = min(first + ABSORB_PASSES * 16, a.seqs);
	absorb_weights w;

	ptx_release_successor();
	if (chunk == ABSORB_CHUNKS) {
		ptx_wait_predecessor();
		for (; first < end; first += 16)
			rotate_tokens(a, first, head, lane);
		return;
	}
	load_w_kc(w, a, head, chunk, lane);
	ptx_wait_predecessor();
#pragma unroll 1
	for (; first < end; first += 16)
		absorb_tokens(w, a, first, head, chunk, lane);
}

extern "C" cudaError_t kk_mla_absorb(const kk_mla_decode_args *a, cudaStream_t stream)
{
	int passes = (a->seqs + ABSORB_PASSES * 16 - 1) / (ABSORB_PASSES * 16);

	if (!fits(a))
		return cudaErrorInvalidValue;
	return mla_launch(absorb, dim3(ABSORB_CHUNKS + 1, a->shape.heads, passes), 32, 0, a->pdl,
	                  stream, *a);
}

/*
 * combine: out[t, h, v] = sum_c W_vc[h, v, c] latent[t, h, c], where latent is put together from
 * the runs. A cluster of V_BLOCKS blocks has 16 tokens of one head; each block puts together its
 * share of the columns, writes them to all, and multiplies them with its share of the values' rows.
 * Eight warps divide those by 16, and the columns between those that have the same ones. A lane's
 * 16 bytes of a row are eight columns, for two k-steps, as in router_gemm.cu; the latents are read
 * in the same order.
 */
enum {
	COMBINE_THREADS = 256,
	COMBINE_WARPS = 8,
	COMBINE_TOKENS = 16,
	LATENT_PITCH = LATENT + 32,
	WAYS = 8, /* sums of a column: of runs 0, 8, ..., of runs 1, 9, ... */
};

struct combine_smem {
	__nv_bfloat16 latent[COMBINE_TOKENS][LATENT_PITCH]; /* the padding spreads rows over the banks */
	float weight[COMBINE_TOKENS][MAX_SPLITS];
	union {
		float4 way[WAYS][LATENT / 4];                       /* of the only token */
		float part[COMBINE_WARPS][COMBINE_TOKENS][16];
	};
	int runs[COMBINE_TOKENS];
};

/* A warp: how much each run of a token counts. */
__device__ __forceinline__ void weigh_runs(combine_smem *m, const kk_mla_decode_args &a, int seq,
                                           int head, int token, int lane)
{
	int context = seq < a.seqs ? max(a.kv_len[seq], 0) : 0,
	    each = tiles_of_run(context, a.splits);
	int runs = context ? ((context + TILE - 1) / TILE + each - 1) / each : 0;
	const float2 *stats =
		(const float2 *)a.stats + ((size_t)seq * a.shape.heads + head) * a.splits;
	float largest = -CUDART_INF_F, total = 0.0f;

	if (lane == 0)
		m->runs[token] = runs;
	for (int i = lane; i < runs; i += 32)
		largest = fmaxf(largest, stats[i].x);
	largest = mla_max_lanes(largest);
	for (int i = lane; i < runs; i += 32) {
		float2 run = stats[i];
		float weight = ptx_ex2(run.x - largest);

		m->weight[token][i] = weight;
		total += weight * run.y;
	}
	total = mla_sum_lanes(total);
	for (int i = lane; i < runs; i += 32)
		m->weight[token][i] /= total;
}

__device__ __forceinline__ void add_run(float4 &sum, float weight, float4 v)
{
	sum.x += weight * v.x;
	sum.y += weight * v.y;
	sum.z += weight * v.z;
	sum.w += weight * v.w;
}

__device__ __forceinline__ float4 add4(float4 a, float4 b)
{
	return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/* WAYS / STRIDE of a token's sums of four columns, ways first, first + STRIDE, ...; DEEP times as
 * many loads are on their way together. A run that there is not is no load, and adds zero times
 * zero. */
template <int STRIDE, int DEEP>
__device__ __forceinline__ void sum_ways(float4 (&sum)[WAYS / STRIDE], const float *weight,
                                         const float *partial, int first, int runs)
{
	constexpr int N = WAYS / STRIDE;
	float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

#pragma unroll
	for (int k = 0; k < N; k++)
		sum[k] = zero;
#pragma unroll 1
	for (int from = first; from < runs; from += WAYS * DEEP) {
		float4 v[DEEP][N];

#pragma unroll
		for (int d = 0; d < DEEP; d++)
#pragma unroll
			for (int k = 0; k < N; k++) {
				int run = from + d * WAYS + k * STRIDE;

				v[d][k] = run < runs ? *(const float4 *)(partial +
				                                         (size_t)run * LATENT)
				                     : zero;
			}
#pragma unroll
		for (int d = 0; d < DEEP; d++)
#pragma unroll
			for (int k = 0; k < N; k++) {
				int run = from + d * WAYS + k * STRIDE;

				add_run(sum[k], run < runs ? weight[run] : 0.0f, v[d][k]);
			}
	}
}

__device__ __forceinline__ float4 sum_of_ways(const float4 (&w)[WAYS])
{
	return add4(add4(add4(w[0], w[1]), add4(w[2], w[3])),
	            add4(add4(w[4], w[5]), add4(w[6], w[7])));
}

/* Four columns, to every block of the cluster. */
template <int V_BLOCKS>
__device__ __forceinline__ void store_latent(combine_smem *m, int token, int column, float4 v)
{
	__nv_bfloat16 *to = &m->latent[token][column];
	uint32_t lo = mla_pack(v.x, v.y), hi = mla_pack(v.z, v.w);

	if constexpr (V_BLOCKS == 1) {
		*(uint2 *)to = make_uint2(lo, hi);
	} else {
#pragma unroll
		for (int rank = 0; rank < V_BLOCKS; rank++) {
			uint32_t at = ptx_cluster_address(to, rank);

			ptx_cluster_store(at, __uint_as_float(lo));
			ptx_cluster_store(at + 4, __uint_as_float(hi));
		}
	}
}

/* This block's columns of its tokens. Of one token the threads divide the ways, of several the
 * tokens; each column's sum is the same either way. */
template <int V_BLOCKS>
__device__ __forceinline__ void put_together(combine_smem *m, const kk_mla_decode_args &a,
                                             int first, int head, int rank)
{
	constexpr int QUADS = LATENT / 4 / V_BLOCKS, GROUPS = COMBINE_THREADS / QUADS;
	int quad = (int)threadIdx.x % QUADS, group = (int)threadIdx.x / QUADS;
	int column = (rank * QUADS + quad) * 4;
	const float *partial =
		a.partial + ((size_t)first * a.shape.heads + head) * a.splits * LATENT + column;
	size_t next = (size_t)a.shape.heads * a.splits * LATENT; /* token */

	if (first + 1 == a.seqs) {
		float4 sum[WAYS / GROUPS], all[WAYS];

		sum_ways<GROUPS, GROUPS>(sum, m->weight[0], partial, group, m->runs[0]);
#pragma unroll
		for (int k = 0; k < WAYS / GROUPS; k++)
			m->way[group + k * GROUPS][quad] = sum[k];
		__syncthreads(); /* the ways are written */
		if (group)
			return;
#pragma unroll
		for (int k = 0; k < WAYS; k++)
			all[k] = m->way[k][quad];
		store_latent<V_BLOCKS>(m, 0, column, sum_of_ways(all));
		return;
	}
#pragma unroll 2
	for (int token = group; token < min(a.seqs - first, (int)COMBINE_TOKENS); token += GROUPS) {
		float4 all[WAYS];

		sum_ways<1, 1>(all, m->weight[token], partial + token * next, 0, m->runs[token]);
		store_latent<V_BLOCKS>(m, token, column, sum_of_ways(all));
	}
}

template <int STEPS>
__device__ __forceinline__ void load_w_vc(uint4 (&w)[2][STEPS], const kk_mla_decode_args &a,
                                          int head, int value, int column, int lane)
{
#pragma unroll
	for (int n = 0; n < 2; n++)
#pragma unroll
		for (int s = 0; s < STEPS; s++)
			w[n][s] = ptx_load_stream(
				(const __nv_bfloat16 *)a.kv_b +
				((size_t)head * (NOPE + VALUE) + NOPE + value + n * 8 + lane / 4) *
					LATENT +
				column + s * 32 + lane % 4 * 8);
}

/* A warp: 16 tokens, 16 values, STEPS * 32 columns. */
template <int STEPS>
__device__ __forceinline__ void multiply_w_vc(combine_smem *m, const uint4 (&w)[2][STEPS],
                                              int column, int warp, int lane)
{
	int g = lane / 4, t = lane % 4;
	float d[2][4] = {};

#pragma unroll
	for (int s = 0; s < STEPS; s++) {
		uint4 lo = *(const uint4 *)&m->latent[g][column + s * 32 + t * 8];
		uint4 hi = *(const uint4 *)&m->latent[g + 8][column + s * 32 + t * 8];

#pragma unroll
		for (int n = 0; n < 2; n++) {
			ptx_mma_bf16(d[n], lo.x, hi.x, lo.y, hi.y, w[n][s].x, w[n][s].y);
			ptx_mma_bf16(d[n], lo.z, hi.z, lo.w, hi.w, w[n][s].z, w[n][s].w);
		}
	}
#pragma unroll
	for (int n = 0; n < 2; n++)
#pragma unroll
		for (int h = 0; h < 2; h++)
			*(float2 *)&m->part[warp][g + 8 * h][n * 8 + t * 2] =
				make_float2(d[n][2 * h], d[n][2 * h + 1]);
}

template <int V_BLOCKS>
__global__ void __launch_bounds__(COMBINE_THREADS, 1) combine(kk_mla_decode_args a)
{
	constexpr int VALUES = VALUE / V_BLOCKS, STEPS = LATENT / V_BLOCKS / 32;
	constexpr int GROUPS = VALUES / 16; /* warps that have different values */
	__shared__ combine_smem m;
	int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, head = (int)blockIdx.y;
	int value = (int)blockIdx.x * VALUES, first = (int)blockIdx.z * COMBINE_TOKENS;
	int column = warp / GROUPS * STEPS * 32;
	uint4 w[2][STEPS];

	static_assert(GROUPS * V_BLOCKS == COMBINE_WARPS, "a share of the columns for each warp");
	ptx_release_successor();
	if (V_BLOCKS > 1)
		ptx_cluster_arrive();
	load_w_vc<STEPS>(w, a, head, value + warp % GROUPS * 16, column, lane);
	ptx_wait_predecessor();
	for (int token = warp; token < COMBINE_TOKENS; token += COMBINE_WARPS)
		weigh_runs(&m, a, first + token, head, token, lane);
	__syncthreads(); /* the runs' weights are written */
	if (V_BLOCKS > 1)
		ptx_cluster_wait(); /* every block of the cluster runs: its memory may be written */
	put_together<V_BLOCKS>(&m, a, first, head, (int)blockIdx.x);
	if (V_BLOCKS > 1)
		ptx_cluster_arrive(), ptx_cluster_wait(); /* the latents are written, here and by the others */
	else
		__syncthreads(); /* the latents are written */
	multiply_w_vc<STEPS>(&m, w, column, warp, lane);
	__syncthreads(); /* the parts are written */
	for (int i = (int)threadIdx.x; i < COMBINE_TOKENS * VALUES; i += COMBINE_THREADS) {
		int token = i / VALUES, v = i % VALUES;
		float sum = 0.0f;

		if (first + token >= a.seqs)
			break;
#pragma unroll
		for (int k = 0; k < V_BLOCKS; k++)
			sum += m.part[k * GROUPS + v / 16][token][v % 16];
		((__nv_bfloat16 *)a.out)[((size_t)(first + token) * a.shape.heads + head) * VALUE +
		                         value + v] = __float2bfloat16_rn(sum);
	}
}

extern "C" cudaError_t kk_mla_combine(const kk_mla_decode_args *a, cudaStream_t stream)
{
	dim3 grid(a->v_blocks, a->shape.heads, (a->seqs + COMBINE_TOKENS - 1) / COMBINE_TOKENS);

	if (!fits(a))
		return cudaErrorInvalidValue;
	switch (a->v_blocks) {
	case 1:
		return mla_launch(combine<1>, grid, COMBINE_THREADS, 0, a->pdl, stream, *a);
	case 2:
		return mla_launch(combine<2>, grid, COMBINE_THREADS, 0, a->pdl, stream, *a, 2);
	case 4:
		return mla_launch(combine<4>, grid, COMBINE_THREADS, 0, a->pdl, stream, *a, 4);
	default:
		return cudaErrorInvalidValue;
	}
}
