/*
 * Router GEMM: logits[t, e] = x[t] . w[e], bf16 in, f32 sums; alone, and in one launch with gate and
 * alignment.
 *
 * ROOFLINE
 *   Bytes: 2 E H for the weights, 2 M H for x; at E = 384, H = 7168: 5.5 MB, 1.78 us at H100's
 *   3.10 TB/s (1.22 at H200's 4.50), 3.4 with a launch. Flops: 2 M E H = 5.5 MFLOP a token, 0.007 us of
 *   tensor cores: bound by memory up to some 2,000 tokens. What it takes besides the stream of
 *   weights is x: each group of blocks that has only some of the experts reads all of x again, from
 *   L2 (16 times 14 kB a token), so blocks split the columns too.
 *
 * LADDER (us a call, E = 384, H = 7168, 1 / 8 / 16 / 64 / 128 tokens; weights cold, launches overlapping)
 *   general  7.1 / 24 / 24 / 61 / -       a block an expert, CUDA cores; any shape, f32 weights.
 *   resident 3.3 / 3.5 / 3.9 / 7.3 / 12   below; hidden 7168.
 *   inbox    2.6 / 2.9 / 3.4 / - / -      no second barrier of the cluster (TRIED 16)
 *   Above 16 tokens router_split.cu (5.1 at 64, 6.8 at 128), then router_parts.cu (9.2 at 256), above
 *   256 cuBLASLt (11.8 at 512; device/cuda_blas.c).
 *   Best of others: 3.4 / 5.1 / 7.5 / 8.2 / 9.0 (SGLang's CUDA-core kernel to 14 tokens, then cuBLAS).
 *   In one launch with gate and alignment: 6.9 / 8.3 / 10.6 / 17 without overlap (apart: 8.6 / 9.4 /
 *   11.2 / 15); with overlap it loses (TRIED 9). TRIED 1, 2, 6, 8.
 *
 * RULES
 *   Order of sums: fixed, told below; no atomics on sums. The counters of the fused forms say when data
 *   is there, never what; whoever arrives last, the result is the same. Weights and bias are read
 *   before the previous launch has ended: nothing in the stream may be writing them.
 */
#include <cuda_bf16.h>

#include "align.cuh"
#include "gate.cuh"
#include "inbox.cuh"

/*
 * Resident form. RANKS blocks share 8 NT experts; they, and the GEMM_WARPS warps of each, split the
 * columns, STEPS x 32 for each warp; a lane holds 16 bytes of a row, eight columns, which two
 * tensor-core steps take as their columns (2t, 2t + 1, 2t + 8, 2t + 9): columns may come in any
 * order as long as x and w agree. So neither operand passes through shared memory, all of the weights
 * are on their way before the first is used, and before the previous kernel has ended.
 *
 * Order of a logit's sum: a warp's even and odd steps, the two, then the warps, then the blocks. It
 * does not depend on M, and is the same alone and fused.
 */
enum {
	RANKS = 8,
	GEMM_WARPS = 7,
	STEPS = 4,
	BLOCK_THREADS = 256,
	OWN = 8, /* tokens whose sums, and gate, one block finishes: a warp for each */
	TILE = 16,
	PASS = RANKS * OWN, /* tokens of a cluster's pass */
};
static_assert(RANKS * GEMM_WARPS * STEPS * 32 == KK_ROUTER_HIDDEN, "the columns, exactly");
static_assert((int)BLOCK_THREADS == (int)ALIGN_THREADS && BLOCK_THREADS / 32 == OWN,
              "a warp for each token");
static_assert(KK_SCRATCH_BYTES >= KK_SCRATCH_SYNC_BYTES + RANKS * OWN * 512 * 4, "the partial sums");

/* What one warp adds to a tile of tokens. */
template <int NT>
using tile_part = float[TILE][8 * NT];

struct place {
	int lane, warp, group, rank; /* group: of 8 NT experts */
};

template <int NT>
__device__ __forceinline__ void load_weights(uint4 (&w)[NT][STEPS], const kk_router_args &r, place p)
{
	int column = ((p.rank * GEMM_WARPS + p.warp) * STEPS) * 32 + p.lane % 4 * 8;

#pragma unroll
	for (int n = 0; n < NT; n++) {
		int e = min(p.group * 8 * NT + n * 8 + p.lane / 4, r.experts - 1);

#pragma unroll
		for (int s = 0; s < STEPS; s++)
			w[n][s] = ptx_load_stream((const char *)r.w +
			                          ((size_t)e * KK_ROUTER_HIDDEN + column + s * 32) * 2);
	}
}

/* One tile's columns of this lane: rows lane / 4 and lane / 4 + 8. */
struct tile_tokens {
	uint4 lo[STEPS], hi[STEPS];
};

/* Where a lane reads: rows beyond the last are the last again; nobody reads their sums. */
struct token_source {
	const char *lo, *hi;
	bool two; /* the tile has more than eight tokens */
};

__device__ __forceinline__ token_source find_tokens(const kk_router_args &r, int first, place p)
{
	int column = ((p.rank * GEMM_WARPS + p.warp) * STEPS) * 32 + p.lane % 4 * 8;
	int lo = min(first + p.lane / 4, r.tokens - 1), hi = min(first + p.lane / 4 + 8, r.tokens - 1);
	const char *base = (const char *)r.x + (size_t)column * 2;

	return {base + (size_t)lo * KK_ROUTER_HIDDEN * 2, base + (size_t)hi * KK_ROUTER_HIDDEN * 2,
	        first + 8 < r.tokens};
}

__device__ __forceinline__ void load_step(tile_tokens &x, int s, token_source from)
{
	x.lo[s] = ptx_load_fresh(from.lo + s * 64);
	x.hi[s] = from.two ? ptx_load_fresh(from.hi + s * 64) : make_uint4(0, 0, 0, 0);
}

/* Multiplies the tile in x; each step's registers take the next tile's tokens as soon as they are free. */
template <int NT, bool MORE>
__device__ __forceinline__ void multiply(tile_tokens &x, const uint4 (&w)[NT][STEPS],
                                         tile_part<NT> &part, int lane, token_source next)
{
	int row = lane / 4, column = lane % 4 * 2;
	float d[2][NT][4] = {};

#pragma unroll
	for (int s = 0; s < STEPS; s++) {
#pragma unroll
		for (int n = 0; n < NT; n++) {
			ptx_mma_bf16(d[0][n], x.lo[s].x, x.hi[s].x, x.lo[s].y, x.hi[s].y, w[n][s].x,
			             w[n][s].y);
			ptx_mma_bf16(d[1][n], x.lo[s].z, x.hi[s].z, x.lo[s].w, x.hi[s].w, w[n][s].z,
			             w[n][s].w);
		}
		if (MORE)
			load_step(x, s, next);
	}
#pragma unroll
	for (int n = 0; n < NT; n++) {
		*(float2 *)&part[row][n * 8 + column] =
			make_float2(d[0][n][0] + d[1][n][0], d[0][n][1] + d[1][n][1]);
		*(float2 *)&part[row + 8][n * 8 + column] =
			make_float2(d[0][n][2] + d[1][n][2], d[0][n][3] + d[1][n][3]);
	}
}

/* GEMM of this block's columns for tokens [first, first + tokens): parts[tile][warp]. */
template <int NT>
__device__ __forceinline__ void multiply_tiles(const kk_router_args &r, const uint4 (&w)[NT][STEPS],
                                               tile_part<NT> *parts, int first, int tokens, place p)
{
	int tiles = (tokens + TILE - 1) / TILE, t;
	token_source from = find_tokens(r, first, p);
	tile_tokens x;

#pragma unroll
	for (int s = 0; s < STEPS; s++)
		load_step(x, s, from);
#pragma unroll 1
	for (t = 0; t < tiles - 1; t++)
		multiply<NT, true>(x, w, parts[t * GEMM_WARPS + p.warp], p.lane,
		                   find_tokens(r, first + (t + 1) * TILE, p));
	multiply<NT, false>(x, w, parts[t * GEMM_WARPS + p.warp], p.lane, from);
}

/* The block's sums for a token of a pass and experts e to e + 3. */
template <int NT>
__device__ __forceinline__ float4 sum_warps(const tile_part<NT> *parts, int token, int e)
{
	float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

#pragma unroll
	for (int w = 0; w < GEMM_WARPS; w++) {
		float4 v = *(const float4 *)&parts[token / TILE * GEMM_WARPS + w][token % TILE][e];

		sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
	}
	return sum;
}

template <int NT>
struct __align__(16) own_sums {
	float from[RANKS][OWN][8 * NT]; /* of this block's tokens, from each block of the cluster */
	uint64_t inbox;
};

/* Tokens of the pass from `first` on that this block finishes. */
__device__ __forceinline__ int own_tokens(const kk_router_args &r, int first, int rank)
{
	return min(max(r.tokens - first - rank * OWN, 0), (int)OWN);
}

/* Arrives at the cluster's barrier; ready to receive. */
template <int NT>
__device__ __forceinline__ void cluster_begin(own_sums<NT> *own)
{
	if (threadIdx.x == 0)
		inbox_open(&own->inbox);
	__syncwarp();
	ptx_cluster_arrive();
}

/* A cluster's pass over up to PASS tokens, after cluster_begin: leaves this block's own tokens' logits in
 * global memory. */
template <int NT>
__device__ __forceinline__ void cluster_pass(const kk_router_args &r, own_sums<NT> *own,
                                             tile_part<NT> *parts, const uint4 (&w)[NT][STEPS],
                                             int first, place p)
{
	int tokens = min(r.tokens - first, (int)PASS), mine = own_tokens(r, first, p.rank);

	if (p.warp < GEMM_WARPS)
		multiply_tiles<NT>(r, w, parts, first, tokens, p);
	__syncthreads(); /* the parts are written */
	if (threadIdx.x == 0)
		inbox_expect(&own->inbox, RANKS * mine * 8 * NT * 4);
	__syncwarp();
	ptx_cluster_wait(); /* every block of the cluster runs: its memory may be written */
	for (int i = threadIdx.x; i < tokens * 2 * NT; i += BLOCK_THREADS) {
		int token = i / (2 * NT), e = i % (2 * NT) * 4, owner = token / OWN;

		inbox_send(ptx_cluster_address(&own->from[p.rank][token % OWN][e], owner),
		           ptx_cluster_address(&own->inbox, owner), sum_warps<NT>(parts, token, e));
	}
	if (mine > 0)
		inbox_wait(&own->inbox);
	for (int i = threadIdx.x; i < mine * 8 * NT; i += BLOCK_THREADS) {
		int token = first + p.rank * OWN + i / (8 * NT), e = p.group * 8 * NT + i % (8 * NT);
		float sum = 0.0f;

		if (e >= r.experts)
			continue;
#pragma unroll
		for (int k = 0; k < RANKS; k++)
			sum += own->from[k][i / (8 * NT)][i % (8 * NT)];
		r.logits[(size_t)token * r.experts + e] = sum;
	}
}

template <int NT>
static constexpr size_t parts_bytes(int tokens)
{
	return ((tokens < PASS ? tokens : (int)PASS) + TILE - 1) / TILE * GEMM_WARPS *
	       sizeof(tile_part<NT>);
}

template <int NT>
__global__ void __launch_bounds__(BLOCK_THREADS, NT < 4 ? 2 : 1) router_resident(kk_router_args r)
{
	extern __shared__ float4 smem[];
	__shared__ own_sums<NT> own;
	tile_part<NT> *parts = (tile_part<NT> *)smem;
	place p = {(int)threadIdx.x % 32, (int)threadIdx.x / 32, (int)blockIdx.x / RANKS,
	           (int)ptx_cluster_rank()};
	uint4 w[NT][STEPS];

	ptx_release_successor();
	cluster_begin<NT>(&own);
	if (p.warp < GEMM_WARPS)
		load_weights<NT>(w, r, p);
	ptx_wait_predecessor();
	cluster_pass<NT>(r, &own, parts, w, blockIdx.y * PASS, p);
}

/* The fused forms' shared memory after the parts: bias, a row of logits and a scratch for each warp,
 * the alignment's. */
template <int NT>
struct fused_smem {
	float bias[128 * NT];
	float row[OWN][128 * NT];
	gate_scratch gate[OWN];
	int32_t ids[KK_FUSED_TOKENS * KK_FAST_TOP_K];
};

/* What needs no data of the predecessor. `from`, `step`: the threads that fetch the bias. */
template <int NT>
__device__ __forceinline__ void fused_prepare(const kk_gate_args &g, const kk_align_args &a,
                                              fused_smem<NT> *s, align_scratch as, int from, int step)
{
	for (int j = from; j < 32 * NT; j += step)
		((float4 *)s->bias)[j] =
			g.bias ? ((const float4 *)g.bias)[j] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
	if (!a.ids)
		return;
	align_prepare<BLOCK_THREADS>(a, as);
	for (int i = threadIdx.x; i < KK_FUSED_TOKENS * KK_FAST_TOP_K; i += BLOCK_THREADS)
		s->ids[i] = -1;
}

/* This warp's row, whose logits are in x. */
template <int NT, bool SOFTMAX>
__device__ __forceinline__ void fused_gate(const kk_gate_args &g, fused_smem<NT> *s, int row,
                                           const float (&x)[4 * NT], int lane, int warp)
{
	float bias[4 * NT];
	int32_t *ids = s->ids + row * g.top_k;

	gate_recall<4 * NT>(bias, s->bias, lane);
	if (g.valid_tokens && row >= __ldcg(g.valid_tokens))
		gate_store_padding(g, row, lane, ids);
	else
		gate_row_onepass<4 * NT, SOFTMAX>(g, row, lane, x, bias, s->row[warp], s->bias,
		                                  &s->gate[warp], ids);
}

/*
 * Router, gate and, when asked, alignment, up to OWN tokens. Every block leaves its partial sums in
 * `partial` and counts itself in; the last to do so does the rest, a warp for each token. No clusters: a
 * cluster's barrier costs as much as the count (0.4 us), and both would be on the way.
 */
template <int NT, bool SOFTMAX>
__global__ void __launch_bounds__(BLOCK_THREADS, 2)
router_fused_few(kk_router_args r, kk_gate_args g, kk_align_args a, int32_t *sync, float *partial)
{
	constexpr int E = 128 * NT;
	extern __shared__ float4 smem[];
	__shared__ bool last;
	tile_part<NT> *parts = (tile_part<NT> *)smem;
	fused_smem<NT> *s = (fused_smem<NT> *)(parts + GEMM_WARPS);
	align_scratch as = align_carve(s + 1, a);
	place p = {(int)threadIdx.x % 32, (int)threadIdx.x / 32, (int)blockIdx.x / RANKS,
	           (int)blockIdx.x % RANKS};
	{
		uint4 w[NT][STEPS];

		ptx_release_successor();
		if (p.warp < GEMM_WARPS)
			load_weights<NT>(w, r, p);
		fused_prepare<NT>(g, a, s, as, p.warp < GEMM_WARPS ? E : p.lane, 32);
		ptx_wait_predecessor();
		if (p.warp < GEMM_WARPS)
			multiply_tiles<NT>(r, w, parts, 0, OWN, p);
	}
	__syncthreads(); /* the parts are written */
	for (int i = threadIdx.x; i < r.tokens * 2 * NT; i += BLOCK_THREADS) {
		int token = i / (2 * NT), e = i % (2 * NT) * 4;

		*(float4 *)&partial[((size_t)token * RANKS + p.rank) * E + p.group * 8 * NT + e] =
			sum_warps<NT>(parts, token, e);
	}
	__syncthreads(); /* this block's partial sums are written */
	if (threadIdx.x == 0) {
		last = ptx_arrive_acq_rel(sync) == (int)gridDim.x - 1;
		if (last)
			*sync = 0;
	}
	__syncthreads(); /* `last` is known; if so, all partial sums are visible */
	if (!last)
		return;
	if (p.warp < r.tokens) {
		const float4 *from = (const float4 *)(partial + (size_t)p.warp * RANKS * E) + p.lane;
		float4 *to = (float4 *)(r.logits + (size_t)p.warp * E) + p.lane;
		float4 v[NT][RANKS];
		float x[4 * NT];

#pragma unroll
		for (int j = 0; j < NT; j++)
#pragma unroll
			for (int k = 0; k < RANKS; k++)
				v[j][k] = __ldcg(from + (k * E + 128 * j) / 4);
#pragma unroll
		for (int j = 0; j < NT; j++) {
			float4 sum = v[j][0];

#pragma unroll
			for (int k = 1; k < RANKS; k++) {
				sum.x += v[j][k].x;
				sum.y += v[j][k].y;
				sum.z += v[j][k].z;
				sum.w += v[j][k].w;
			}
			to[32 * j] = sum;
			x[4 * j] = sum.x, x[4 * j + 1] = sum.y, x[4 * j + 2] = sum.z;
			x[4 * j + 3] = sum.w;
		}
		fused_gate<NT, SOFTMAX>(g, s, p.warp, x, p.lane, p.warp);
	}
	if (!a.ids)
		return;
	__syncthreads(); /* the ids are written */
	align_block_sort<BLOCK_THREADS, 2>(a, s->ids, as);
}

/*
 * The same for up to PASS tokens. A block that owns tokens counts itself in when their logits for its
 * cluster's experts are written; the last of the clusters' blocks of that rank gates those tokens, a
 * warp each; the last rank to have done so aligns. sync[rank] and sync[RANKS] count.
 */
template <int NT, bool SOFTMAX>
__global__ void __launch_bounds__(BLOCK_THREADS, 2)
router_fused(kk_router_args r, kk_gate_args g, kk_align_args a, int32_t *sync)
{
	constexpr int E = 128 * NT;
	extern __shared__ float4 smem[];
	__shared__ own_sums<NT> own;
	__shared__ bool last;
	tile_part<NT> *parts = (tile_part<NT> *)smem;
	fused_smem<NT> *s =
		(fused_smem<NT> *)(parts + (r.tokens + TILE - 1) / TILE * GEMM_WARPS);
	align_scratch as = align_carve(s + 1, a);
	place p = {(int)threadIdx.x % 32, (int)threadIdx.x / 32, (int)blockIdx.x / RANKS,
	           (int)ptx_cluster_rank()};
	int clusters = gridDim.x / RANKS, owners = (r.tokens + OWN - 1) / OWN;
	int row = p.rank * OWN + p.warp;
	{
		uint4 w[NT][STEPS];

		ptx_release_successor();
		cluster_begin<NT>(&own);
		if (p.warp < GEMM_WARPS)
			load_weights<NT>(w, r, p);
		if (p.rank < owners)
			fused_prepare<NT>(g, a, s, as, p.warp < GEMM_WARPS ? E : p.lane, 32);
		ptx_wait_predecessor();
		cluster_pass<NT>(r, &own, parts, w, 0, p);
	}
	if (p.rank >= owners)
		return;
	__syncthreads(); /* this block's logits are written */
	if (threadIdx.x == 0) {
		last = ptx_arrive_acq_rel(sync + p.rank) == clusters - 1;
		if (last)
			sync[p.rank] = 0;
	}
	__syncthreads(); /* `last` is known; if so, its tokens' logits are visible */
	if (!last)
		return;
	if (row < r.tokens) {
		float x[4 * NT];

		gate_load<4 * NT>(x, r.logits + (size_t)row * E, p.lane);
		fused_gate<NT, SOFTMAX>(g, s, row, x, p.lane, p.warp);
	}
	if (!a.ids)
		return;
	__syncthreads(); /* this block's ids are written */
	if (owners > 1) {
		if (threadIdx.x == 0) {
			last = ptx_arrive_acq_rel(sync + RANKS) == owners - 1;
			if (last)
				sync[RANKS] = 0;
		}
		__syncthreads(); /* `last` is known; if so, all ids are visible */
		if (!last)
			return;
		for (int i = threadIdx.x; i < g.tokens * g.top_k; i += BLOCK_THREADS)
			s->ids[i] = __ldcg(g.ids + i);
		__syncthreads(); /* all ids are here */
	}
	align_block_sort<BLOCK_THREADS, 2>(a, s->ids, as);
}

/* One warp, one expert, GENERAL_TOKENS tokens; lanes stride the columns by eight. */
enum { GENERAL_WARPS = 4, GENERAL_TOKENS = 8 };

template <typename T>
__device__ __forceinline__ void load8(float (&v)[8], const T *p);

template <>
__device__ __forceinline__ void load8(float (&v)[8], const __nv_bfloat16 *p)
{
	uint4 u = *(const uint4 *)p;
	uint32_t q[4] = {u.x, u.y, u.z, u.w};

#pragma unroll
	for (int i = 0; i < 4; i++) {
		v[2 * i] = __uint_as_float(q[i] << 16);
		v[2 * i + 1] = __uint_as_float(q[i] & 0xffff0000u);
	}
}

template <>
__device__ __forceinline__ void load8(float (&v)[8], const float *p)
{
	float4 a = *(const float4 *)p, b = *(const float4 *)(p + 4);

	v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

template <typename T>
__global__ void __launch_bounds__(32 * GENERAL_WARPS) router_general(kk_router_args r)
{
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	int e = blockIdx.x, first = blockIdx.y * GENERAL_TOKENS;
	int tokens = min(GENERAL_TOKENS, r.tokens - first);
	const T *w = (const T *)r.w + (size_t)e * r.hidden;
	const __nv_bfloat16 *x = (const __nv_bfloat16 *)r.x + (size_t)first * r.hidden;
	__shared__ float part[GENERAL_WARPS][GENERAL_TOKENS];
	float sum[GENERAL_TOKENS] = {};

	ptx_release_successor();
	ptx_wait_predecessor();
	for (int k = threadIdx.x * 8; k < r.hidden; k += 32 * GENERAL_WARPS * 8) {
		float wv[8], xv[8];

		load8(wv, w + k);
#pragma unroll
		for (int m = 0; m < GENERAL_TOKENS; m++)
			if (m < tokens) {
				load8(xv, x + (size_t)m * r.hidden + k);
#pragma unroll
				for (int i = 0; i < 8; i++)
					sum[m] = fmaf(wv[i], xv[i], sum[m]);
			}
	}
#pragma unroll
	for (int m = 0; m < GENERAL_TOKENS; m++) {
		sum[m] = warp_sum(sum[m]);
		if (lane == 0)
			part[warp][m] = sum[m];
	}
	__syncthreads(); /* the warps' sums are written */
	if (threadIdx.x < tokens) {
		float all = 0.0f;

		for (int i = 0; i < GENERAL_WARPS; i++)
			all += part[i][threadIdx.x];
		r.logits[(size_t)(first + threadIdx.x) * r.experts + e] = all;
	}
}

/* The attributes of a launch: programmatic start when asked, the cluster when there is one. */
struct launch_setup {
	cudaLaunchConfig_t config = {};
	cudaLaunchAttribute attr[2] = {};

	launch_setup(dim3 grid, int threads, size_t smem, bool pdl, int cluster, cudaStream_t stream)
	{
		config.gridDim = grid;
		config.blockDim = dim3(threads);
		config.dynamicSmemBytes = smem;
		config.stream = stream;
		config.attrs = attr;
		if (pdl) {
			attr[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
			attr[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
		}
		if (cluster > 1) {
			attr[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
			attr[config.numAttrs++].val.clusterDim = {(unsigned)cluster, 1, 1};
		}
	}
};

/* More than 48 kB of shared memory must be asked for. */
static cudaError_t allow_smem(const void *kernel, const launch_setup &setup)
{
	if (setup.config.dynamicSmemBytes <= 32 * 1024)
		return cudaSuccess;
	return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
	                            (int)setup.config.dynamicSmemBytes);
}

static bool resident_fits(const kk_router_args *r)
{
	return r->tokens >= 1 && r->hidden == KK_ROUTER_HIDDEN && !r->w_f32 && r->experts >= 8 &&
	       r->experts <= 512;
}

template <int NT>
static cudaError_t launch_resident(const kk_router_args *r, cudaStream_t stream)
{
	int clusters = (r->experts + 8 * NT - 1) / (8 * NT);
	launch_setup setup(dim3(clusters * RANKS, (r->tokens + PASS - 1) / PASS), BLOCK_THREADS,
	                   parts_bytes<NT>(r->tokens), r->pdl, RANKS, stream);
	cudaError_t rc = allow_smem((const void *)router_resident<NT>, setup);

	return rc != cudaSuccess ? rc : cudaLaunchKernelEx(&setup.config, router_resident<NT>, *r);
}

cudaError_t kk_router_resident(const kk_router_args *r, cudaStream_t stream)
{
	if (!resident_fits(r))
		return cudaErrorInvalidValue;
	if (r->experts <= 256)
		return launch_resident<2>(r, stream);
	return r->experts <= 384 ? launch_resident<3>(r, stream) : launch_resident<4>(r, stream);
}

cudaError_t kk_router_general(const kk_router_args *r, cudaStream_t stream)
{
	launch_setup setup(dim3(r->experts, (r->tokens + GENERAL_TOKENS - 1) / GENERAL_TOKENS),
	                   32 * GENERAL_WARPS, 0, r->pdl, 1, stream);

	if (r->tokens < 1 || r->hidden < 8 || r->hidden % 8 || r->experts < 1 ||
	    r->experts > KK_MAX_EXPERTS)
		return cudaErrorInvalidValue;
	return r->w_f32 ? cudaLaunchKernelEx(&setup.config, router_general<float>, *r)
	                : cudaLaunchKernelEx(&setup.config, router_general<__nv_bfloat16>, *r);
}

template <int NT, bool SOFTMAX>
static cudaError_t launch_fused(const kk_router_args *r, const kk_gate_args *g, const kk_align_args *a,
                                void *scratch, cudaStream_t stream)
{
	int32_t *sync = (int32_t *)scratch;
	float *partial = (float *)((char *)scratch + KK_SCRATCH_SYNC_BYTES);
	bool few = r->tokens <= OWN;
	kk_align_args none = {};
	size_t smem = parts_bytes<NT>(r->tokens) + sizeof(fused_smem<NT>) +
	              (a ? align_smem(a->tokens * a->top_k, a->experts, a->block) : 0);
	launch_setup setup(dim3(16 * RANKS), BLOCK_THREADS, smem, r->pdl, few ? 1 : (int)RANKS, stream);
	cudaError_t rc = allow_smem(few ? (const void *)router_fused_few<NT, SOFTMAX>
	                                : (const void *)router_fused<NT, SOFTMAX>, setup);

	if (rc != cudaSuccess)
		return rc;
	if (few)
		return cudaLaunchKernelEx(&setup.config, router_fused_few<NT, SOFTMAX>, *r, *g,
		                          a ? *a : none, sync, partial);
	return cudaLaunchKernelEx(&setup.config, router_fused<NT, SOFTMAX>, *r, *g, a ? *a : none, sync);
}

cudaError_t kk_router_gate_align(const kk_router_args *r, const kk_gate_args *g,
                                 const kk_align_args *a, void *scratch, cudaStream_t stream)
{
	if (!resident_fits(r) || r->tokens > KK_FUSED_TOKENS || g->tokens != r->tokens ||
	    g->experts != r->experts || g->groups > 1 || g->top_k < 1 || g->top_k > KK_FAST_TOP_K ||
	    (a && (a->tokens != r->tokens || a->top_k != g->top_k || a->block < 1 || !a->ids ||
	           a->experts < 1 || a->experts > KK_MAX_EXPERTS)))
		return cudaErrorInvalidValue;
	switch (r->experts) {
	case 256:
		return g->softmax ? launch_fused<2, true>(r, g, a, scratch, stream)
		                  : launch_fused<2, false>(r, g, a, scratch, stream);
	case 384:
		return g->softmax ? launch_fused<3, true>(r, g, a, scratch, stream)
		                  : launch_fused<3, false>(r, g, a, scratch, stream);
	}
	return cudaErrorInvalidValue;
}
