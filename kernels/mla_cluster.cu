/*
 * MLA decode for 8 heads and short contexts in one launch: a cluster of 16 blocks a row.
 *
 * ROOFLINE
 *   1,024 cached tokens of 1,152 bytes and 2.1 MB of kv_b: 1 us on H100. What counts is the chain:
 *   query, absorbed query, scores, weights, sums, result, each of which needs all of the one before.
 *
 * LADDER
 *   three launches  mla_absorb.cu, mla_decode.cu: any length, any number of rows
 *   here            us on H100, launches overlapping, cold: 1 row of 1,024 tokens 6.7 (three launches
 *                   12), 4 rows 9.0; with this step's KV 7.2 and 9.4 (with rope_kv's launch 14 and 15). A
 *                   tile more in a block costs 3.5 (2,048 tokens in two tiles of 64: 10.2), so a tile is
 *                   as long as fits: one to 1,536 tokens, two to 3,072. On H200, 1 row of 1,056 tokens
 *                   (76cbd31, bench_gpu_layer 1 1056): 7.0 and 7.6; three launches and rope_kv's, in the
 *                   chain of a layer, 12.7. Since W_vc has left shared memory, so that a block fits beside
 *                   the launch before: 8.0 alone, and 9.8 of a layer's chain instead of 11.2 (75c62a5).
 *
 * Block r of the 16 has head r / 2 for the products with kv_b: of W_kc half the columns, in registers,
 * of W_vc half the values, in L2 and, while the sums travel, in registers, both on their way before the predecessor
 * has ended; and every block has its run of the cached tokens, all heads of it, the first tile fetched as early but
 * for this step's row. Two exchanges, by stores that count themselves in (inbox.cuh): each block's share of
 * the absorbed queries goes to all, each block's sums for a head go to the two that have it. Products
 * are mma.sync with the heads as the eight columns: scores tokens x heads, sums latents x heads.
 *
 * Where kv_a is given, the block that has a row's last token makes that row of the cache: rope_kv.cu's
 * work, in its order, to memory and to the tile, while the queries travel.
 *
 * RULES
 *   Order: W_kc's rows in 8 runs of 16, added up by rising run; scores in four parts of the columns;
 *   weights by lane (tokens i, i + 32, i + 64), then a butterfly; tiles of 96 tokens by rising token; the
 *   16 blocks' sums by rising block; W_vc's columns 16 to a lane, then a butterfly. A row depends on its
 *   length only.
 */
#include <math_constants.h>

#include "inbox.cuh"
#include "launch.cuh"
#include "mla_decode.cuh"

enum {
	BLOCKS = 16,
	HEADS = 8,
	WARPS = 8,
	THREADS = 32 * WARPS,
	AS_THREADS = 448, /* 128 registers a thread: room beside for a block of linear_slab.cu, the launch before */
	HALF = LATENT / 2, /* columns of W_kc a block has */
	VALUES = VALUE / 2,
	PITCH = WIDTH + 8, /* rows spread over the banks */
	SUM_PITCH = LATENT + 4,
	UNIT = 16, /* tokens; runs are whole units */
	PARTS = 4, /* of the columns of scores */
	LONG = 96, /* tokens of a tile here: as many as shared memory takes */
};
static_assert(VALUES / WARPS == 8, "sum_eight");
static_assert(HALF == THREADS && LONG % 32 == 0, "a column a thread; a lane's tokens 32 apart");

struct cluster_smem {
	alignas(128) float4 inbox_sum[BLOCKS][LATENT / 4];
	alignas(16) float4 inbox_stat[BLOCKS]; /* largest score (base 2), sum of weights */
	alignas(16) __nv_bfloat16 query[HEADS][PITCH];
	union {
		alignas(16) __nv_bfloat16 tile[LONG][PITCH];
		alignas(16) float sum[HEADS][SUM_PITCH];
	};
	union { /* one after the other */
		alignas(16) float absorbed[WARPS][HALF];
		alignas(16) float score[PARTS][LONG][HEADS + 1];
		alignas(16) float latent[LATENT];
	};
	alignas(16) __nv_bfloat16 share[HALF]; /* of the absorbed query */
	alignas(16) __nv_bfloat16 fresh[WIDTH];
	alignas(16) __nv_bfloat16 weight[HEADS][LONG + 8];
	float head_q[NOPE], rescale[HEADS], largest[HEADS], total[HEADS];
	uint64_t queries, sums; /* barriers */
};
static_assert(sizeof(cluster_smem) <= 227 << 10, "what a block can have");

struct cluster_run {
	int seq, rank, head, half, from, to; /* its run of tokens */
	int last;                            /* the row that this step adds */
};

__device__ __forceinline__ void load_w_kc(uint4 (&w)[NOPE / WARPS], const kk_mla_decode_args &a,
                                          const cluster_run &r, int warp, int lane)
{
	const __nv_bfloat16 *from =
		(const __nv_bfloat16 *)a.kv_b +
		((size_t)r.head * (NOPE + VALUE) + warp * (NOPE / WARPS)) * LATENT + r.half * HALF +
		lane * 8;

#pragma unroll
	for (int i = 0; i < NOPE / WARPS; i++)
		w[i] = ptx_load_stream(from + (size_t)i * LATENT);
}

__device__ __forceinline__ const __nv_bfloat16 *w_vc_of(const kk_mla_decode_args &a, const cluster_run &r)
{
	return (const __nv_bfloat16 *)a.kv_b +
	       ((size_t)r.head * (NOPE + VALUE) + NOPE + r.half * VALUES) * LATENT;
}

/* A warp's values, 16 columns of each to a lane. */
struct values {
	uint4 w[VALUES / WARPS][2];
};

__device__ __forceinline__ void load_w_vc(values &v, const kk_mla_decode_args &a, const cluster_run &r, int warp,
                                          int lane)
{
	const __nv_bfloat16 *from = w_vc_of(a, r) + warp * (VALUES / WARPS) * LATENT + lane * 8;

#pragma unroll
	for (int i = 0; i < VALUES / WARPS; i++)
#pragma unroll
		for (int h = 0; h < 2; h++)
			v.w[i][h] = ptx_load_stream(from + i * LATENT + h * 256);
}

/* The pieces j, j + 4, ... of 16 bytes of a token, the i-th of a tile; zeros where it is not there. */
__device__ __forceinline__ void fetch_token(cluster_smem *m, const kk_mla_decode_args &a, size_t slot, bool there,
                                            int i, int j)
{
	if (a.shape.fp8) {
		const char *from = (const char *)a.cache + slot * WIDTH;

#pragma unroll
		for (int k = 0; k < WIDTH / 64; k++) {
			uint4 v = there ? ptx_load_fresh(from + (k * 4 + j) * 16)
			                : make_uint4(0, 0, 0, 0);
			uint4 *to = (uint4 *)&m->tile[i][(k * 4 + j) * 16];

			to[0] = mla_widen8(v.x, v.y);
			to[1] = mla_widen8(v.z, v.w);
		}
		return;
	}
#pragma unroll
	for (int k = 0; k < WIDTH / 32; k++)
		ptx_copy_async(ptx_shared_address(&m->tile[i][(k * 4 + j) * 8]),
		               (const char *)a.cache + slot * (WIDTH * 2) + (k * 4 + j) * 16, there);
}

/* Of the tile that begins with token `first`. */
__device__ __forceinline__ int units_of(const cluster_run &r, int first)
{
	return (min((int)LONG, r.to - first) + UNIT - 1) / UNIT;
}

/* `late`: only this step's row; else all others. */
__device__ __forceinline__ void fetch_tile(cluster_smem *m, const kk_mla_decode_args &a,
                                           const cluster_run &r, int first, bool late)
{
	constexpr int EACH = (LONG * 4 + THREADS - 1) / THREADS;
	int tokens = units_of(r, first) * UNIT, mine = (int)threadIdx.x / 4;
	size_t slot[EACH];

#pragma unroll
	for (int k = 0; k < EACH; k++) { /* all pages' numbers on their way at once */
		int token = first + mine + k * (THREADS / 4);

		slot[k] = 0;
		if (token < r.to)
			slot[k] = mla_slot(a.pages + (size_t)r.seq * a.pages_per_seq, a.page_size, token);
	}
#pragma unroll
	for (int k = 0; k < EACH; k++) {
		int i = mine + k * (THREADS / 4);

		if (i < tokens && (first + i == r.last) == late)
			fetch_token(m, a, slot[k], first + i < r.to, i, (int)threadIdx.x % 4);
	}
}

/* This step's row, by one warp, in rope_kv.cu's order: to the cache and to `fresh`. */
__device__ __forceinline__ void put_eight(cluster_smem *m, const kk_mla_decode_args &a, int slot,
                                          int at, const float (&v)[8])
{
	uint4 wide = make_uint4(mla_pack(v[0], v[1]), mla_pack(v[2], v[3]), mla_pack(v[4], v[5]),
	                        mla_pack(v[6], v[7]));

	if (a.shape.fp8) {
		uint32_t word[2] = {};

#pragma unroll
		for (int i = 0; i < 8; i++)
			word[i / 4] |=
				(uint32_t)__nv_cvt_float_to_fp8(v[i], __NV_SATFINITE, __NV_E4M3)
				<< i % 4 * 8;
		wide = mla_widen8(word[0], word[1]);
		if (slot >= 0)
			*(uint2 *)((char *)a.cache + (size_t)slot * WIDTH + at) =
				make_uint2(word[0], word[1]);
	} else if (slot >= 0) {
		*(uint4 *)((__nv_bfloat16 *)a.cache + (size_t)slot * WIDTH + at) = wide;
	}
	*(uint4 *)&m->fresh[at] = wide;
}

struct new_row {
	float4 x[4];
	float sum; /* of squares, this lane's */
	float k_pe[8];
	int slot, position;
};

__device__ __forceinline__ void load_row(new_row &n, const kk_mla_decode_args &a, const cluster_run &r, int lane)
{
	const float *latent = a.kv_a + (size_t)r.seq * a.kv_a_stride, *k_pe = latent + LATENT;

	n.position = a.positions[r.seq], n.slot = a.slots[r.seq];
#pragma unroll
	for (int i = 0; i < 4; i++)
		n.x[i] = __ldcg((const float4 *)(latent + i / 2 * 256 + lane * 8 + i % 2 * 4));
	if (lane < ROPE / 8)
#pragma unroll
		for (int i = 0; i < 8; i++)
			n.k_pe[i] = __ldcg(k_pe + lane * 8 + i);
	n.sum = 0.0f;
#pragma unroll
	for (int i = 0; i < 4; i++) { /* rope_kv's order of the sum: four of each 128 */
		float4 y = __ldcg((const float4 *)(latent + lane * 4 + i * 128));

		n.sum += y.x * y.x;
		n.sum += y.y * y.y;
		n.sum += y.z * y.z;
		n.sum += y.w * y.w;
	}
}

__device__ __forceinline__ void make_row(cluster_smem *m, const new_row &n, const kk_mla_decode_args &a,
                                         const cluster_run &r, int lane)
{
	const float *turn = a.cos_sin + (size_t)n.position * ROPE;
	const float4 *x = n.x;
	int slot = n.slot;
	float4 w[4];
	float sum = n.sum, v[8];

#pragma unroll
	for (int i = 0; i < 4; i++)
		w[i] = *(const float4 *)(a.norm + i / 2 * 256 + lane * 8 + i % 2 * 4);
	float factor = 1.0f / sqrtf(mla_sum_lanes(sum) / (float)LATENT + a.eps);
#pragma unroll
	for (int h = 0; h < 2; h++) {
#pragma unroll
		for (int i = 0; i < 8; i++)
			v[i] = (&x[2 * h + i / 4].x)[i % 4] * factor * (&w[2 * h + i / 4].x)[i % 4];
		put_eight(m, a, slot, h * 256 + lane * 8, v);
	}
	if (lane >= ROPE / 8)
		return;
#pragma unroll
	for (int i = 0; i < 8; i += 2) {
		float cosine = turn[(lane * 8 + i) / 2], sine = turn[(lane * 8 + i + ROPE) / 2];
		float first = n.k_pe[i], second = n.k_pe[i + 1];

		v[i] = first * cosine - second * sine;
		v[i + 1] = second * cosine + first * sine;
	}
	put_eight(m, a, slot, LATENT + lane * 8, v);
}

/* The head's query for the product with W_kc, and every head's rotated part. */
__device__ __forceinline__ void load_query(cluster_smem *m, const kk_mla_decode_args &a,
                                           const cluster_run &r, int warp, int lane)
{
	const __nv_bfloat16 *q = (const __nv_bfloat16 *)a.q + (size_t)r.seq * HEADS * (NOPE + ROPE);
	const float *turn = a.cos_sin + (size_t)a.positions[r.seq] * ROPE + lane;
	uint32_t pair = __ldcg((const unsigned *)(q + warp * (NOPE + ROPE) + NOPE) + lane);

	if (warp == 0) {
		uint2 v = __ldcg((const uint2 *)(q + r.head * (NOPE + ROPE)) + lane);

		m->head_q[lane * 4] = mla_low(v.x);
		m->head_q[lane * 4 + 1] = mla_high(v.x);
		m->head_q[lane * 4 + 2] = mla_low(v.y);
		m->head_q[lane * 4 + 3] = mla_high(v.y);
	}
	*(uint32_t *)&m->query[warp][LATENT + lane * 2] = mla_rotate(pair, turn[0], turn[ROPE / 2]);
}

/* This block's columns of its head's absorbed query, to every block of the cluster. */
__device__ __forceinline__ void absorb_and_send(cluster_smem *m, const uint4 (&w)[NOPE / WARPS],
                                                const cluster_run &r, int warp, int lane)
{
	int thread = (int)threadIdx.x;
	float sum[8] = {}, all = 0.0f;

#pragma unroll
	for (int i = 0; i < NOPE / WARPS; i++) {
		float q = m->head_q[warp * (NOPE / WARPS) + i];
		const uint32_t word[4] = {w[i].x, w[i].y, w[i].z, w[i].w};

#pragma unroll
		for (int k = 0; k < 4; k++) {
			sum[2 * k] += q * mla_low(word[k]);
			sum[2 * k + 1] += q * mla_high(word[k]);
		}
	}
	float4 *to = (float4 *)&m->absorbed[warp][lane * 8];
	to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
	to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
	__syncthreads(); /* the warps' sums are written */
#pragma unroll
	for (int k = 0; k < WARPS; k++)
		all += m->absorbed[k][thread];
	m->share[thread] = __float2bfloat16_rn(all);
	__syncthreads();    /* the share is written */
	ptx_cluster_wait(); /* every block runs, and has opened its inboxes */
#pragma unroll
	for (int k = 0; k < BLOCKS * (HALF / 8) / THREADS; k++) {
		int i = k * THREADS + thread, rank = i / (HALF / 8), piece = i % (HALF / 8);

		inbox_send(ptx_cluster_address(&m->query[r.head][r.half * HALF + piece * 8], rank),
		           ptx_cluster_address(&m->queries, rank),
		           *(const float4 *)&m->share[piece * 8]);
	}
}

/* Scores of the tile's tokens and 8 heads: a warp has a quarter of the columns and every other unit, whose
 * products it does side by side. */
__device__ __forceinline__ void score_tile(cluster_smem *m, int units, int warp, int lane)
{
	constexpr int STEPS = WIDTH / 16 / PARTS, EACH = LONG / UNIT / 2;
	int g = lane / 4, t = lane % 4, part = warp % PARTS, own = warp / PARTS;
	uint32_t rows = ptx_shared_address(
		&m->tile[own * UNIT + lane % 16][part * STEPS * 16 + lane / 16 * 8]);
	const __nv_bfloat16 *q = &m->query[g][part * STEPS * 16 + t * 2];
	float d[EACH][4] = {};

#pragma unroll 3
	for (int k = 0; k < STEPS; k++) {
		uint32_t b0 = *(const uint32_t *)(q + k * 16), b1 = *(const uint32_t *)(q + k * 16 + 8);

#pragma unroll
		for (int u = 0; u < EACH; u++) {
			uint32_t a[4];

			if (own + 2 * u >= units)
				break;
			ptx_load_matrices(a, rows + u * 2 * UNIT * PITCH * 2 + k * 32);
			ptx_mma_bf16(d[u], a[0], a[1], a[2], a[3], b0, b1);
		}
	}
#pragma unroll
	for (int u = 0; u < EACH; u++)
		if (own + 2 * u < units)
#pragma unroll
			for (int i = 0; i < 4; i++)
				m->score[part][(own + 2 * u) * UNIT + g + i / 2 * 8][t * 2 + i % 2] = d[u][i];
}

/* A warp's head: weights of the tile's tokens, the largest score so far, the weights' sum. */
__device__ __forceinline__ void weigh_tile(cluster_smem *m, const cluster_run &r, int first,
                                           float to_base2, float &largest, float &total, int head,
                                           int lane)
{
	constexpr int EACH = LONG / 32;
	float s[EACH], most = -CUDART_INF_F, mine = 0.0f;

#pragma unroll
	for (int i = 0; i < EACH; i++) {
		int token = lane + 32 * i;

		s[i] = -CUDART_INF_F;
		if (first + token < r.to)
			s[i] = ((m->score[0][token][head] + m->score[1][token][head]) +
			        (m->score[2][token][head] + m->score[3][token][head])) *
			       to_base2;
		most = fmaxf(most, s[i]);
	}
	most = fmaxf(largest, mla_max_lanes(most));
	float rescale = ptx_ex2(largest - most);
#pragma unroll
	for (int i = 0; i < EACH; i++) {
		float p = ptx_ex2(s[i] - most);

		m->weight[head][lane + 32 * i] = __float2bfloat16_rn(p);
		mine += p;
	}
	total = total * rescale + mla_sum_lanes(mine);
	largest = most;
	if (lane == 0)
		m->rescale[head] = rescale;
}

/* sums of 64 latents and 8 heads */
__device__ __forceinline__ void add_tile(float (&sum)[4][4], cluster_smem *m, int units, int warp,
                                         int lane)
{
	int g = lane / 4, t = lane % 4;
	float rescale[2] = {m->rescale[t * 2], m->rescale[t * 2 + 1]};
	uint32_t at = ptx_shared_address(
		&m->tile[lane / 16 * 8 + lane % 8][warp * 64 + lane / 8 % 2 * 8]);

#pragma unroll
	for (int i = 0; i < 16; i++)
		sum[i / 4][i % 4] *= rescale[i % 2];
#pragma unroll
	for (int k = 0; k < LONG / UNIT; k++) {
		if (k == units)
			break;
		uint32_t b0 = *(const uint32_t *)&m->weight[g][k * 16 + t * 2],
			 b1 = *(const uint32_t *)&m->weight[g][k * 16 + t * 2 + 8];

#pragma unroll
		for (int n = 0; n < 4; n++) {
			uint32_t a[4];

			ptx_load_matrices_down(a, at + k * 16 * PITCH * 2 + n * 32);
			ptx_mma_bf16(sum[n], a[0], a[1], a[2], a[3], b0, b1);
		}
	}
}

/* Every head's sums to the two blocks that have the head. */
__device__ __forceinline__ void send_sums(cluster_smem *m, const float (&sum)[4][4],
                                          const cluster_run &r, int warp, int lane)
{
	int thread = (int)threadIdx.x, g = lane / 4, t = lane % 4;

#pragma unroll
	for (int n = 0; n < 4; n++)
#pragma unroll
		for (int i = 0; i < 4; i++)
			m->sum[t * 2 + i % 2][warp * 64 + n * 16 + g + i / 2 * 8] = sum[n][i];
	__syncthreads(); /* the sums are written */
#pragma unroll
	for (int k = 0; k < HEADS * (LATENT / 4) / THREADS; k++) {
		int i = k * THREADS + thread, head = i / (LATENT / 4), piece = i % (LATENT / 4);
		float4 v = *(const float4 *)&m->sum[head][piece * 4];

#pragma unroll
		for (int half = 0; half < 2; half++)
			inbox_send(ptx_cluster_address(&m->inbox_sum[r.rank][piece], head * 2 + half),
			           ptx_cluster_address(&m->sums, head * 2 + half), v);
	}
	if (thread < BLOCKS)
		inbox_send(ptx_cluster_address(&m->inbox_stat[r.rank], thread),
		           ptx_cluster_address(&m->sums, thread),
		           make_float4(m->largest[thread / 2], m->total[thread / 2], 0.0f, 0.0f));
}

/* The head's latent, put together from all blocks', rounded as what a linear layer reads. */
__device__ __forceinline__ void join_sums(cluster_smem *m)
{
	int thread = (int)threadIdx.x;
	float largest = -CUDART_INF_F, total = 0.0f, weight[BLOCKS];
	float2 sum = make_float2(0.0f, 0.0f);

#pragma unroll
	for (int i = 0; i < BLOCKS; i++)
		largest = fmaxf(largest, m->inbox_stat[i].x);
#pragma unroll
	for (int i = 0; i < BLOCKS; i++) {
		float2 stat = *(const float2 *)&m->inbox_stat[i];

		weight[i] = stat.y > 0.0f ? ptx_ex2(stat.x - largest) : 0.0f;
		total += weight[i] * stat.y;
	}
	float scale = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
	for (int i = 0; i < BLOCKS; i++) {
		float2 v = ((const float2 *)m->inbox_sum[i])[thread];

		sum.x += weight[i] * v.x;
		sum.y += weight[i] * v.y;
	}
	*(float2 *)&m->latent[thread * 2] =
		make_float2(__bfloat162float(__float2bfloat16_rn(sum.x * scale)),
	                    __bfloat162float(__float2bfloat16_rn(sum.y * scale)));
	__syncthreads(); /* the latent is written */
}

/* Eight sums over the lanes at once, each in mla_sum_lanes' order; lane l has that of l / 4. */
__device__ __forceinline__ float sum_eight(float (&v)[8], int lane)
{
#pragma unroll
	for (int n = 4; n > 0; n /= 2) {
		bool upper = lane & 4 * n;

#pragma unroll
		for (int i = 0; i < n; i++) {
			float give = upper ? v[i] : v[i + n], keep = upper ? v[i + n] : v[i];

			v[i] = keep + __shfl_xor_sync(0xffffffffu, give, 4 * n);
		}
	}
	v[0] += __shfl_xor_sync(0xffffffffu, v[0], 2);
	return v[0] + __shfl_xor_sync(0xffffffffu, v[0], 1);
}

__device__ __forceinline__ void store_values(cluster_smem *m, const values &v, const kk_mla_decode_args &a,
                                             const cluster_run &r, int warp, int lane)
{
	float x[16], all[VALUES / WARPS] = {};

#pragma unroll
	for (int i = 0; i < 4; i++)
		*(float4 *)&x[i * 4] =
			*(const float4 *)&m->latent[i / 2 * 256 + lane * 8 + i % 2 * 4];
#pragma unroll
	for (int i = 0; i < VALUES / WARPS; i++) {
#pragma unroll
		for (int h = 0; h < 2; h++) {
			const uint32_t word[4] = {v.w[i][h].x, v.w[i][h].y, v.w[i][h].z, v.w[i][h].w};

#pragma unroll
			for (int k = 0; k < 4; k++) {
				all[i] += x[h * 8 + 2 * k] * mla_low(word[k]);
				all[i] += x[h * 8 + 2 * k + 1] * mla_high(word[k]);
			}
		}
	}
	float mine = sum_eight(all, lane);
	if (lane % 4 == 0)
		((__nv_bfloat16 *)a.out)[((size_t)r.seq * HEADS + r.head) * VALUE + r.half * VALUES +
		                         warp * (VALUES / WARPS) + lane / 4] = __float2bfloat16_rn(mine);
}

/* The block's run of the cache. The first tile is on its way but for this step's row. */
__device__ __forceinline__ void attend_run(cluster_smem *m, const kk_mla_decode_args &a,
                                           const cluster_run &r, float (&sum)[4][4], int warp,
                                           int lane)
{
	float largest = -CUDART_INF_F, total = 0.0f;

#pragma unroll 1
	for (int first = r.from; first < r.to; first += LONG) {
		int units = units_of(r, first), last = r.last - first;

		if (first > r.from)
			fetch_tile(m, a, r, first, false);
		if (!a.kv_a) {
			fetch_tile(m, a, r, first, true);
		} else if (last >= 0 && last < units * UNIT && (int)threadIdx.x < WIDTH / 8) {
			((uint4 *)m->tile[last])[threadIdx.x] =
				((const uint4 *)m->fresh)[threadIdx.x];
		}
		ptx_copy_wait_all();
		__syncthreads(); /* the tile is there */
		score_tile(m, units, warp, lane);
		__syncthreads(); /* the scores are written */
		weigh_tile(m, r, first, a.scale * MLA_LOG2E, largest, total, warp, lane);
		__syncthreads(); /* the weights are written */
		add_tile(sum, m, units, warp, lane);
		__syncthreads(); /* the tile has been read */
	}
	if (lane == 0) {
		m->largest[warp] = largest;
		m->total[warp] = total;
	}
}

/* Block x: of the cluster; y: row. */
__global__ void __launch_bounds__(AS_THREADS, 1) decode_cluster(kk_mla_decode_args a)
{
	extern __shared__ __align__(128) char raw[];
	cluster_smem *m = (cluster_smem *)raw;
	int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32;
	cluster_run r;
	uint4 w[NOPE / WARPS];
	values v;
	new_row row;
	float sum[4][4] = {};

	ptx_release_successor();
	r.seq = (int)blockIdx.y, r.rank = (int)blockIdx.x, r.head = r.rank / 2, r.half = r.rank % 2;
	if (thread == 0) {
		inbox_open(&m->queries);
		inbox_open(&m->sums);
	}
	__syncthreads(); /* the barriers are begun */
	if (thread == 0) {
		inbox_expect(&m->queries, HEADS * LATENT * 2);
		inbox_expect(&m->sums, BLOCKS * (LATENT * 4 + 16));
		ptx_prefetch_bulk(w_vc_of(a, r), VALUES * LATENT * 2);
	}
	ptx_cluster_arrive();
	int context = max(a.kv_len[r.seq], 0);
	int each = (context + BLOCKS * UNIT - 1) / (BLOCKS * UNIT) * UNIT;
	r.last = context - 1;
	r.from = r.rank * each;
	r.to = min(r.from + each, context);
	if (r.from < r.to)
		fetch_tile(m, a, r, r.from, false);
	load_w_kc(w, a, r, warp, lane);
	ptx_wait_predecessor();
	load_query(m, a, r, warp, lane);
	bool makes = a.kv_a && r.last >= r.from && r.last < r.to && warp == WARPS - 1;
	if (makes)
		load_row(row, a, r, lane);
	__syncthreads(); /* the query is written */
	absorb_and_send(m, w, r, warp, lane);
	if (makes)
		make_row(m, row, a, r, lane);
	__syncthreads(); /* this step's row is written */
	inbox_wait(&m->queries);
	attend_run(m, a, r, sum, warp, lane);
	load_w_vc(v, a, r, warp, lane);
	send_sums(m, sum, r, warp, lane);
	inbox_wait(&m->sums);
	join_sums(m);
	store_values(m, v, a, r, warp, lane);
}

extern "C" cudaError_t kk_mla_decode_cluster(const kk_mla_decode_args *a, cudaStream_t stream)
{
	cudaError_t rc;

	if (!fits(a) || a->shape.heads != HEADS)
		return cudaErrorInvalidValue;
	rc = allow_shared(decode_cluster, sizeof(cluster_smem));
	if (rc == cudaSuccess)
		rc = cudaFuncSetAttribute(decode_cluster,
		                          cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
	if (rc != cudaSuccess)
		return rc;
	return mla_launch(decode_cluster,
	                  {dim3(BLOCKS, a->seqs), THREADS, sizeof(cluster_smem), BLOCKS}, *a, stream);
}
