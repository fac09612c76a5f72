/*
 * The two products beside MLA decode: W_kc into the queries, W_vc into what the runs of attend have
 * left.
 *
 * ROOFLINE
 *   Each reads its half of kv_b once, 128 kB a head: at 64 heads 8.4 MB, 2.7 us on H100, at 8 heads
 *   0.3. A row and head is 131 kflop each: 64 rows of 64 heads 0.5 GFLOP, nothing. combine also
 *   reads the runs' sums, 2 kB a head and run: 17 MB where 128 blocks attended with 64 heads each,
 *   5 us or less (most of it is in L2). With few rows both are chains of latencies, not streams.
 *
 * LADDER
 *   general  mla_general.cu: any shape.
 *   here     on mma.sync, weights in registers before the predecessor has ended. TRIED 11 to 13.
 */
#include <math_constants.h>

#include "mla_decode.cuh"

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

	if (chunk == ABSORB_CHUNKS) {
		ptx_wait_predecessor();
		ptx_release_successor();
		for (; first < end; first += 16)
			rotate_tokens(a, first, head, lane);
		return;
	}
	load_w_kc(w, a, head, chunk, lane);
	ptx_wait_predecessor();
	ptx_release_successor();
#pragma unroll 1
	for (; first < end; first += 16)
		absorb_tokens(w, a, first, head, chunk, lane);
}

extern "C" cudaError_t kk_mla_absorb(const kk_mla_decode_args *a, cudaStream_t stream)
{
	int passes = (a->seqs + ABSORB_PASSES * 16 - 1) / (ABSORB_PASSES * 16);

	if (!fits(a))
		return cudaErrorInvalidValue;
	return mla_launch(absorb, {dim3(ABSORB_CHUNKS + 1, a->shape.heads, passes), 32, 0, 0}, *a,
	                  stream);
}

/*
 * combine: out[t, h, v] = sum_c W_vc[h, v, c] latent[t, h, c], where latent is put together from
 * the runs. A cluster of V_BLOCKS blocks has 16 tokens of one head; each block puts together its
 * share of the columns, writes them to all, and multiplies them with its share of the values' rows.
 * Sixteen warps divide those by 16, and the columns between those that have the same ones. A lane's
 * 16 bytes of a row are eight columns, for two k-steps, as in router_gemm.cu; the latents are read
 * in the same order.
 */
enum {
	COMBINE_THREADS = 512,
	COMBINE_WARPS = COMBINE_THREADS / 32,
	COMBINE_TOKENS = 16,
	LATENT_PITCH = LATENT + 32,
	WAYS = 8, /* sums of a column: of runs 0, 8, ..., of runs 1, 9, ... */
};

/* Turns of the ways whose loads the only token has on their way together. Before sm_90 four spill. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
enum { MOST_DEEP = 2 };
#else
enum { MOST_DEEP = WAYS };
#endif

struct combine_smem {
	__nv_bfloat16 latent[COMBINE_TOKENS][LATENT_PITCH]; /* padded: rows spread over banks */
	float weight[COMBINE_TOKENS][MAX_SPLITS];
	static_assert(COMBINE_WARPS == COMBINE_TOKENS, "a warp weighs the runs of one token");
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
	return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z),
	                   __fadd_rn(a.w, b.w));
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

__device__ __forceinline__ float4 scale4(float weight, float4 v)
{
	return make_float4(__fmul_rn(weight, v.x), __fmul_rn(weight, v.y), __fmul_rn(weight, v.z),
	                   __fmul_rn(weight, v.w));
}

/* Tokens of at most two runs: all of a thread's together, by the same roundings as sum_ways's. */
template <int V_BLOCKS>
__device__ __forceinline__ void put_together_short(combine_smem *m, const float *partial,
                                                   size_t next, int tokens, int column, int group)
{
	constexpr int GROUPS = COMBINE_THREADS / (LATENT / 4 / V_BLOCKS),
		      EACH = COMBINE_TOKENS / GROUPS;
	float4 v[EACH][2];

#pragma unroll
	for (int i = 0; i < EACH; i++)
#pragma unroll
		for (int run = 0; run < 2; run++) {
			int token = group + i * GROUPS;

			v[i][run] = run < m->runs[token]
			                    ? *(const float4 *)(partial + token * next +
			                                        (size_t)run * LATENT)
			                    : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
		}
#pragma unroll
	for (int i = 0; i < EACH; i++) {
		int token = group + i * GROUPS, runs = m->runs[token];
		float4 sum[2];

#pragma unroll
		for (int run = 0; run < 2; run++)
			sum[run] = scale4(run < runs ? m->weight[token][run] : 0.0f, v[i][run]);
		if (token < tokens)
			store_latent<V_BLOCKS>(m, token, column, add4(sum[0], sum[1]));
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
		constexpr int SHARES = GROUPS < WAYS ? GROUPS : WAYS;
		constexpr int DEEP = SHARES < MOST_DEEP ? SHARES : MOST_DEEP;
		float4 sum[WAYS / SHARES], all[WAYS];

		if (group < SHARES) {
			sum_ways<SHARES, DEEP>(sum, m->weight[0], partial, group, m->runs[0]);
#pragma unroll
			for (int k = 0; k < WAYS / SHARES; k++)
				m->way[group + k * SHARES][quad] = sum[k];
		}
		__syncthreads(); /* the ways are written */
		if (group)
			return;
#pragma unroll
		for (int k = 0; k < WAYS; k++)
			all[k] = m->way[k][quad];
		store_latent<V_BLOCKS>(m, 0, column, sum_of_ways(all));
		return;
	}
	int tokens = min(a.seqs - first, (int)COMBINE_TOKENS), most = 0;
#pragma unroll
	for (int token = 0; token < COMBINE_TOKENS; token++)
		most = max(most, m->runs[token]);
	if (most <= 2) {
		put_together_short<V_BLOCKS>(m, partial, next, tokens, column, group);
		return;
	}
#pragma unroll 1
	for (int token = group; token < tokens; token += GROUPS) {
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
	/* GROUPS warps have different values, PARTS different columns */
	constexpr int VALUES = VALUE / V_BLOCKS, GROUPS = VALUES / 16;
	constexpr int PARTS = COMBINE_WARPS / GROUPS, STEPS = LATENT / PARTS / 32;
	__shared__ combine_smem m;
	int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, head = (int)blockIdx.y;
	int value = (int)blockIdx.x * VALUES, first = (int)blockIdx.z * COMBINE_TOKENS;
	int column = warp / GROUPS * STEPS * 32;
	uint4 w[2][STEPS];

	static_assert(GROUPS * PARTS == COMBINE_WARPS && STEPS * PARTS * 32 == LATENT, "shares");
	ptx_release_successor();
	if (V_BLOCKS > 1)
		ptx_cluster_arrive();
	load_w_vc<STEPS>(w, a, head, value + warp % GROUPS * 16, column, lane);
	ptx_wait_predecessor();
	weigh_runs(&m, a, first + warp, head, warp, lane);
	__syncthreads(); /* the runs' weights are written */
	if (V_BLOCKS > 1)
		ptx_cluster_wait(); /* every block of the cluster runs: its memory may be written */
	put_together<V_BLOCKS>(&m, a, first, head, (int)blockIdx.x);
	if (V_BLOCKS > 1)
		ptx_cluster_arrive(), ptx_cluster_wait(); /* all have written the latents */
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
		for (int k = 0; k < PARTS; k++)
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
		return mla_launch(combine<1>, {grid, COMBINE_THREADS, 0, 0}, *a, stream);
	case 2:
		return mla_launch(combine<2>, {grid, COMBINE_THREADS, 0, 2}, *a, stream);
	case 4:
		return mla_launch(combine<4>, {grid, COMBINE_THREADS, 0, 4}, *a, stream);
	default:
		return cudaErrorInvalidValue;
	}
}
