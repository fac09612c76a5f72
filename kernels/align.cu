/*
 * Alignment: the selected experts' ids to runs of places, one run an expert, padded to blocks; alone,
 * and in one launch with the gate.
 *
 * ROOFLINE
 *   4 bytes in and 4 (1 + padding) out a place: 0.1 us at 4,096 tokens and top_k 8 on H100, 0.06 on
 *   H200. It is latency: a launch, and what runs in a row between barriers.
 *
 * LADDER (us a call, E = 384, top 8, block 8, 1 / 8 / 64 / 1,024 tokens; launches overlapping)
 *   chunks   two launches: count, then place                      - / - / - / 7.6
 *   bits     one block; a bit for each place of each expert       - / - / 3.7 / -
 *   pairs    one block; each place looks at every other           1.5 / 2.2 / - / -
 *   In one launch with the gate 2.3 / 3.1 / 5.7 / -. Best of others (SGLang): 1.1 / 3.4 / 4.4 / 7.2.
 *   TRIED 5, 7, 10.
 *
 * RULES
 *   Ids are checked here: what is outside [0, experts) takes no place, and no memory is touched for it.
 *   Places of an expert come in rising order. Counting uses integer atomics, whose order cannot be seen.
 */
#include "align.cuh"
#include "gate.cuh"

int kk_align_capacity(int tokens, int top_k, int experts, int block)
{
	return align_capacity(tokens * top_k, experts, block);
}

enum {
	SMALL_SMEM = 96 * 1024, /* of one block, on any supported GPU */
	SMALL_PLACES = 3072,
	CHUNK_THREADS = 256,
	CHUNK_WARPS = CHUNK_THREADS / 32,
	CHUNK_PLACES = 1024,
	STEPS = CHUNK_PLACES / CHUNK_THREADS, /* of a warp, at least, with their loads under way together */
	MAX_CHUNKS = 512,
	SCAN_THREADS = 1024,
	SCAN_WARPS = SCAN_THREADS / 32,
	SCAN_PER = MAX_CHUNKS / SCAN_WARPS, /* chunks of a warp */
};

/* Chunks of whole rounds of CHUNK_THREADS places. */
static int chunk_places(int places)
{
	int n = (places + MAX_CHUNKS - 1) / MAX_CHUNKS;

	n = n < CHUNK_PLACES ? (int)CHUNK_PLACES : n;
	return (n + CHUNK_THREADS - 1) / CHUNK_THREADS * CHUNK_THREADS;
}

static int chunk_count(int places)
{
	return (places + chunk_places(places) - 1) / chunk_places(places);
}

/* One block does it all while its scratch fits. */
static bool is_small(int tokens, int top_k, int experts)
{
	int places = tokens * top_k;

	return places <= SMALL_PLACES &&
	       (ALIGN_STAGE + 32 + align_offsets(experts) + align_count_words(places, experts)) *
	                       sizeof(int) <= SMALL_SMEM;
}

int kk_align_scratch_words(int tokens, int top_k, int experts)
{
	return is_small(tokens, top_k, experts) ? 0 : (chunk_count(tokens * top_k) + 1) * experts;
}

/* One block: 32 threads compare by shuffles, 256 in pairs, more count by words, PER places each. */
template <int THREADS, int PER>
__global__ void __launch_bounds__(THREADS) align_small(kk_align_args a)
{
	extern __shared__ float4 smem[];
	__shared__ __align__(16) int32_t ids[ALIGN_PAIRS];
	int places = a.tokens * a.top_k, t = threadIdx.x, e[PER];
	align_scratch s = align_carve(smem, a);
	bool staged = align_stage(places, a.experts, a.block) > 0;

	ptx_release_successor();
	if (THREADS > 32)
		align_prepare<THREADS>(a, s);
	ptx_wait_predecessor();
#pragma unroll
	for (int k = 0; k < PER; k++)
		e[k] = THREADS * k + t < places ? __ldcg(a.ids + THREADS * k + t) : -1;
	if constexpr (THREADS == 32) {
		if (places <= 8)
			align_warp<8>(a, e[0], t);
		else
			align_warp<ALIGN_WARP>(a, e[0], t);
	} else if constexpr (THREADS == 256) {
		if (t < ALIGN_PAIRS)
			ids[t] = e[0];
		__syncthreads(); /* the ids are here, the scratch is prepared */
		align_finish<THREADS>(a, s, align_pairs<4>(a, ids, s, staged), staged);
	} else {
		__syncthreads(); /* the scratch is prepared */
		align_finish<THREADS>(a, s, align_words<THREADS, PER>(a, e, s, staged), staged);
	}
}

/* Counts each chunk's places of each expert: scratch[chunk][expert]. */
__global__ void __launch_bounds__(CHUNK_THREADS) align_count(kk_align_args a, int per_chunk)
{
	extern __shared__ float4 smem[];
	int *count = (int *)smem;
	int places = a.tokens * a.top_k, first = blockIdx.x * per_chunk;
	int last = min(first + per_chunk, places);

	ptx_release_successor();
	for (int e = threadIdx.x; e < a.experts; e += CHUNK_THREADS)
		count[e] = 0;
	ptx_wait_predecessor();
	__syncthreads(); /* the counts are clear */
#pragma unroll 4
	for (int i = first + threadIdx.x; i < last; i += CHUNK_THREADS) {
		int e = __ldcg(a.ids + i);

		if (e >= 0 && e < a.experts)
			atomicAdd(&count[e], 1);
	}
	__syncthreads(); /* the counts are complete */
	for (int e = threadIdx.x; e < a.experts; e += CHUNK_THREADS)
		a.scratch[blockIdx.x * a.experts + e] = count[e];
}

/* Each chunk's counts become the sums of the chunks before it; what follows the last chunk, the sums of
 * all. A block takes 32 experts, a warp a run of chunks. */
__global__ void __launch_bounds__(SCAN_THREADS) align_scan(kk_align_args a, int chunks)
{
	__shared__ int sums[SCAN_WARPS][33];
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, e = blockIdx.x * 32 + lane;
	int per = (chunks + SCAN_WARPS - 1) / SCAN_WARPS, first = warp * per, before = 0, all = 0;
	int n[SCAN_PER];

	ptx_release_successor();
	ptx_wait_predecessor();
#pragma unroll
	for (int i = 0; i < SCAN_PER; i++) {
		bool take = i < per && first + i < chunks && e < a.experts;

		n[i] = take ? __ldcg(a.scratch + (first + i) * a.experts + e) : 0;
		all += n[i];
	}
	sums[warp][lane] = all;
	__syncthreads(); /* the warps' sums are written */
#pragma unroll
	for (int w = 0; w < SCAN_WARPS; w++)
		before += w < warp ? sums[w][lane] : 0;
#pragma unroll
	for (int i = 0; i < SCAN_PER; i++) {
		if (i < per && first + i < chunks && e < a.experts)
			a.scratch[(first + i) * a.experts + e] = before;
		before += n[i];
	}
	if (warp == SCAN_WARPS - 1 && e < a.experts)
		a.scratch[chunks * a.experts + e] = before;
}

/* The experts of places i, i + 32, ...; -1 for what takes no place, and from `end` on. */
__device__ __forceinline__ void load_ids(int (&e)[STEPS], const kk_align_args &a, int i, int end)
{
#pragma unroll
	for (int k = 0; k < STEPS; k++)
		e[k] = i + 32 * k < end ? __ldcg(a.ids + i + 32 * k) : -1;
#pragma unroll
	for (int k = 0; k < STEPS; k++)
		e[k] = e[k] < a.experts ? max(e[k], -1) : -1;
}

/* Lays out the runs (each block for itself, from the sums of all) and places its chunk: each warp a
 * contiguous piece, in order, equal ids of one step ranked by lane. */
__global__ void __launch_bounds__(CHUNK_THREADS) align_place(kk_align_args a, int per_chunk)
{
	extern __shared__ float4 smem[];
	int *base = (int *)smem; /* [CHUNK_WARPS, experts] */
	__shared__ int warp_total[CHUNK_WARPS];
	int t = threadIdx.x, lane = t % 32, warp = t / 32, places = a.tokens * a.top_k, at = 0;
	int first = blockIdx.x * per_chunk, last = min(first + per_chunk, places);
	int piece = per_chunk / CHUNK_WARPS; /* a multiple of 32 */
	int w0 = min(first + warp * piece, last), w1 = min(w0 + piece, last);
	int *mine = base + warp * a.experts, e[STEPS];

	ptx_release_successor();
	for (int i = t; i < CHUNK_WARPS * a.experts; i += CHUNK_THREADS)
		base[i] = 0;
	ptx_wait_predecessor();
	__syncthreads(); /* the counts are clear */
	for (int i = w0 + lane; i - lane < w1; i += 32 * STEPS) {
		load_ids(e, a, i, w1);
#pragma unroll
		for (int k = 0; k < STEPS; k++)
			if (e[k] >= 0)
				atomicAdd(&mine[e[k]], 1);
	}
	for (int e0 = 0; e0 < a.experts; e0 += CHUNK_THREADS) {
		int x = e0 + t, all = 0, run = 0, start, total;

		if (x < a.experts) {
			all = __ldcg(a.scratch + gridDim.x * a.experts + x);
			run = __ldcg(a.scratch + blockIdx.x * a.experts + x);
		}
		/* Its barrier also ends the counting above. */
		start = at + block_scan<CHUNK_THREADS>(align_padded(all, a.block), warp_total, &total);
		run += start;
		if (x < a.experts) {
			int n[CHUNK_WARPS];

			if (x % (int)gridDim.x == (int)blockIdx.x)
				align_put_run(a, x, start, all, false);
#pragma unroll
			for (int w = 0; w < CHUNK_WARPS; w++)
				n[w] = base[w * a.experts + x];
#pragma unroll
			for (int w = 0; w < CHUNK_WARPS; w++) {
				base[w * a.experts + x] = run;
				run += n[w];
			}
		}
		at += total;
		__syncthreads(); /* each warp's next positions are known, the totals have been read */
	}
	if (t == 0 && blockIdx.x == 0)
		*a.total = at;
	for (int i = w0 + lane; i - lane < w1; i += 32 * STEPS) {
		load_ids(e, a, i, w1);
#pragma unroll
		for (int k = 0; k < STEPS; k++) {
			unsigned same = __match_any_sync(FULL, e[k]);
			int rank = __popc(same & ((1u << lane) - 1));

			if (e[k] >= 0)
				a.sorted[mine[e[k]] + rank] = i + 32 * k;
			__syncwarp();
			if (e[k] >= 0 && rank == 0)
				mine[e[k]] += __popc(same);
			__syncwarp();
		}
	}
}

/* `cluster` blocks to a cluster when it is above 1. */
struct align_setup {
	cudaLaunchConfig_t config = {};
	cudaLaunchAttribute attr[2] = {};

	align_setup(int blocks, int threads, size_t smem, bool pdl, int cluster, cudaStream_t stream)
	{
		config.gridDim = dim3(blocks);
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

/* With what a kernel has of its own, more than 48 kB of shared memory must be asked for. */
static cudaError_t allow_smem(const void *kernel, size_t smem)
{
	return smem <= 40 * 1024 ? cudaSuccess
	                         : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
	                                                (int)smem);
}

static bool fits(const kk_align_args *a)
{
	return a->tokens >= 1 && a->top_k >= 1 && a->top_k <= KK_MAX_TOP_K && a->experts >= 1 &&
	       a->experts <= KK_MAX_EXPERTS && a->block >= 1;
}

template <int THREADS, int PER>
static cudaError_t launch_small(const kk_align_args *a, cudaStream_t stream)
{
	size_t smem = align_smem(a->tokens * a->top_k, a->experts, a->block);
	align_setup setup(1, THREADS, smem, a->pdl, 1, stream);
	cudaError_t rc = allow_smem((const void *)align_small<THREADS, PER>, smem);

	return rc != cudaSuccess ? rc : cudaLaunchKernelEx(&setup.config, align_small<THREADS, PER>, *a);
}

static cudaError_t launch_many(const kk_align_args *a, cudaStream_t stream)
{
	int places = a->tokens * a->top_k, per_chunk = chunk_places(places), chunks = chunk_count(places);
	size_t row = (size_t)a->experts * sizeof(int);
	align_setup count(chunks, CHUNK_THREADS, row, a->pdl, 1, stream);
	align_setup scan((a->experts + 31) / 32, SCAN_THREADS, 0, a->pdl, 1, stream);
	align_setup place(chunks, CHUNK_THREADS, row * CHUNK_WARPS, a->pdl, 1, stream);
	cudaError_t rc = cudaLaunchKernelEx(&count.config, align_count, *a, per_chunk);

	if (rc == cudaSuccess)
		rc = cudaLaunchKernelEx(&scan.config, align_scan, *a, chunks);
	return rc != cudaSuccess ? rc : cudaLaunchKernelEx(&place.config, align_place, *a, per_chunk);
}

cudaError_t kk_align(const kk_align_args *a, cudaStream_t stream)
{
	int places = a->tokens * a->top_k;

	if (!fits(a))
		return cudaErrorInvalidValue;
	if (!is_small(a->tokens, a->top_k, a->experts))
		return a->scratch ? launch_many(a, stream) : cudaErrorInvalidValue;
	if (places <= ALIGN_WARP)
		return launch_small<32, 1>(a, stream);
	if (places <= ALIGN_PAIRS)
		return launch_small<256, 1>(a, stream);
	if (places <= 512)
		return launch_small<512, 1>(a, stream);
	return places <= 1024 ? launch_small<512, 2>(a, stream) : launch_small<1024, 3>(a, stream);
}

/*
 * Gate and alignment: blocks of WARPS warps, a row each, in one cluster. They leave their ids in the first
 * block's shared memory, which aligns; where there is but one block, nobody waits for a cluster.
 */
template <int PER_LANE, bool SOFTMAX, int WARPS>
__global__ void __launch_bounds__(32 * WARPS) gate_align(kk_gate_args g, kk_align_args a)
{
	constexpr int E = 32 * PER_LANE, PLACES = KK_FUSED_TOKENS * KK_FAST_TOP_K, THREADS = 32 * WARPS;
	extern __shared__ float4 smem[];
	__shared__ __align__(16) int32_t ids[PLACES];
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x * WARPS + warp;
	float *bias_s = (float *)smem, *xs = bias_s + E * (1 + warp);
	gate_scratch *s = (gate_scratch *)(bias_s + E * (1 + WARPS)) + warp;
	align_scratch as = align_carve((gate_scratch *)(bias_s + E * (1 + WARPS)) + WARPS, a);
	int32_t *to = ids;
	float bias[PER_LANE], x[PER_LANE];

	ptx_release_successor();
	for (int i = threadIdx.x; i < PLACES; i += THREADS)
		ids[i] = -1;
	if (gridDim.x > 1)
		ptx_cluster_arrive();
	gate_load_bias<PER_LANE>(bias, g.bias, lane);
	if (warp == 0)
		gate_keep<PER_LANE>(bias_s, bias, lane);
	if (blockIdx.x == 0)
		align_prepare<THREADS>(a, as);
	ptx_wait_predecessor();
	if (row < g.tokens)
		gate_load<PER_LANE>(x, g.logits + (size_t)row * E, lane);
	__syncthreads(); /* bias_s is written, the scratch is prepared */
	if (gridDim.x > 1) {
		ptx_cluster_wait(); /* the first block's ids are clear */
		to = ptx_cluster_pointer(ids, 0);
	}
	if (row < g.tokens) {
		if (g.valid_tokens && row >= __ldcg(g.valid_tokens))
			gate_store_padding(g, row, lane, to + row * g.top_k);
		else
			gate_row_onepass<PER_LANE, SOFTMAX>(g, row, lane, x, bias, xs, bias_s, s,
			                                    to + row * g.top_k);
	}
	if (gridDim.x > 1) {
		ptx_cluster_arrive();
		if (blockIdx.x > 0)
			return;
		ptx_cluster_wait(); /* all ids are here */
	} else {
		__syncthreads(); /* all ids are here */
	}
	align_block_sort<THREADS, WARPS == 16 ? 1 : 2>(a, ids, as);
}

template <int PER_LANE, bool SOFTMAX, int WARPS>
static cudaError_t launch_gate_align(const kk_gate_args *g, const kk_align_args *a, cudaStream_t stream)
{
	int blocks = (g->tokens + WARPS - 1) / WARPS;
	size_t smem = 32 * PER_LANE * sizeof(float) * (1 + WARPS) + WARPS * sizeof(gate_scratch) +
	              align_smem(a->tokens * a->top_k, a->experts, a->block);
	align_setup setup(blocks, 32 * WARPS, smem, g->pdl, blocks, stream);
	cudaError_t rc = allow_smem((const void *)gate_align<PER_LANE, SOFTMAX, WARPS>, smem);

	return rc != cudaSuccess ? rc
	                         : cudaLaunchKernelEx(&setup.config, gate_align<PER_LANE, SOFTMAX, WARPS>,
	                                              *g, *a);
}

template <int PER_LANE, bool SOFTMAX>
static cudaError_t choose_gate_align(const kk_gate_args *g, const kk_align_args *a, int warps,
                                     cudaStream_t stream)
{
	switch (warps) {
	case 8:
		return launch_gate_align<PER_LANE, SOFTMAX, 8>(g, a, stream);
	case 16:
		return launch_gate_align<PER_LANE, SOFTMAX, 16>(g, a, stream);
	}
	return cudaErrorInvalidValue;
}

cudaError_t kk_gate_align(const kk_gate_args *g, const kk_align_args *a, int warps, cudaStream_t stream)
{
	if (!fits(a) || g->tokens != a->tokens || g->tokens > KK_FUSED_TOKENS || g->tokens > 8 * warps ||
	    g->groups > 1 || g->top_k > KK_FAST_TOP_K || g->top_k != a->top_k)
		return cudaErrorInvalidValue;
	switch (g->experts) {
	case 256:
		return g->softmax ? choose_gate_align<8, true>(g, a, warps, stream)
		                  : choose_gate_align<8, false>(g, a, warps, stream);
	case 384:
		return g->softmax ? choose_gate_align<12, true>(g, a, warps, stream)
		                  : choose_gate_align<12, false>(g, a, warps, stream);
	}
	return cudaErrorInvalidValue;
}
