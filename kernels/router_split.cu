/*
 * Router GEMM for tens to hundreds of tokens: the columns split over a cluster, warpgroup products.
 *
 * ROOFLINE
 *   As router_gemm.cu says: 5.5 MB of weights, 1.78 us on H100. At 64 tokens what the multiprocessors
 *   take from L2 is more than that: each block reads its columns of its tokens and of its experts, in
 *   all (experts / BE) times x and (tokens / 64 WGS) times w.
 *
 * LADDER
 *   (us a call, E = 384, H = 7168, 32 / 64 / 128 tokens; weights cold, launches overlapping)
 *   resident, as it was  5.3 / 7.6 / 12.8  router_gemm.cu; groups of experts take all of x from L2
 *   split                4.7 / 6.1 / 8.7   fewer groups, tensor cores fed from shared memory
 *   wide sums            4.3 / 5.4 / 7.4   sums through shared memory, 16 bytes a lane (TRIED 15)
 *   inbox                5.0 / 5.1 / 6.8   no barrier to say that they have arrived (TRIED 16)
 *   Best of others: 7.9 / 8.2 / 9.0 (cuBLAS). Above: router_parts.cu. TRIED 15 to 18.
 *
 * RULES
 *   Order of a logit's sum: the tensor cores' over a block's 448 columns, then the blocks in rising order
 *   of columns. It does not depend on the number of tokens. Weights are read before the previous launch
 *   has ended: nothing in the stream may be writing them.
 */
#include "inbox.cuh"
#include "ptx.cuh"
#include "router.h"

/*
 * SPLIT blocks, a cluster, share BE experts and 64 WGS tokens, and take CHUNK columns each. All of a
 * block's operands have room in shared memory at once, so every copy is on its way before the first
 * product, and those of the weights before the previous launch has ended; nothing is ever waited for
 * twice. Each block then sends every other its part of the sums, and finishes 1 / SPLIT of the tokens.
 * Sixteen blocks to a cluster is more than the eight that every GPU must take; H100 and H200 do.
 */
enum { PANEL = 64 }; /* columns */

template <int SPLIT, int WGS, int BE>
struct split_form {
	enum {
		CHUNK = KK_ROUTER_HIDDEN / SPLIT,
		PANELS = CHUNK / PANEL,
		THREADS = 128 * WGS,
		TOKENS = 64 * WGS,
		OWN = TOKENS / SPLIT, /* tokens that a block finishes, at most */
		W_PANEL = BE * 128,   /* bytes */
		X_PANEL = TOKENS * 128,
		OPERANDS = PANELS * (W_PANEL + X_PANEL),
		SUMS = SPLIT * OWN * BE * 4, /* received: [from][own token][expert] */
		INBOX = OPERANDS + SUMS,
		SMEM = INBOX + 16,
		TILE = TOKENS * (BE + 8) * 4, /* this block's sums, in the operands' place */
		BLOCKS = SMEM <= 113 * 1024 ? 2 : 1, /* on a multiprocessor */
	};
	static_assert(PANELS * PANEL * SPLIT == KK_ROUTER_HIDDEN, "the columns, exactly");
	static_assert((int)TILE <= (int)OPERANDS && SMEM <= 227 * 1024, "room for the tile, and for all");
};

/* This block's columns of ROWS rows, panel after panel, each a group of copies; rows at or beyond `last`
 * are `last - 1` again. */
template <int PANELS, int ROWS, int THREADS, bool GROUPS>
__device__ __forceinline__ void copy_rows(uint32_t to, const void *from, int first, int last, int rank)
{
	constexpr int STEP = THREADS / 8, TIMES = (ROWS + STEP - 1) / STEP;
	int row = threadIdx.x / 8, piece = threadIdx.x % 8;
	const char *base = (const char *)from + (size_t)rank * PANELS * PANEL * 2 + piece * 16;

	static_assert(STEP % 8 == 0, "one swizzle a thread");
	to += row * 128 + ((piece ^ row % 8) * 16);
#pragma unroll
	for (int p = 0; p < PANELS; p++) {
#pragma unroll
		for (int i = 0; i < TIMES; i++) {
			int r = first + row + i * STEP;

			if ((GROUPS ? r < last : true) && (ROWS % STEP == 0 || row + i * STEP < ROWS))
				ptx_copy_async(to + p * ROWS * 128 + i * STEP * 128,
				               base + (size_t)min(r, last - 1) * (KK_ROUTER_HIDDEN * 2) +
				                       p * PANEL * 2);
		}
		if (GROUPS)
			ptx_copy_commit();
	}
}

/* The products of panel P and all later ones, as they arrive. */
template <int PANELS, int WGS, int BE, int P>
__device__ __forceinline__ void multiply_panels(float (&d)[BE / 2], uint32_t x, uint32_t w)
{
	if constexpr (P < PANELS) {
		ptx_copy_wait<PANELS - 1 - P>();
		ptx_fence_async();
		__syncthreads(); /* the panel has arrived, for every thread */
		ptx_wgmma_fence();
#pragma unroll
		for (int k = 0; k < PANEL / 16; k++)
			ptx_wgmma<BE>(d, ptx_wgmma_matrix(x + P * WGS * 8192, 16) + 2 * k,
			              ptx_wgmma_matrix(w + P * BE * 128, 16) + 2 * k, P + k > 0);
		ptx_wgmma_commit();
		multiply_panels<PANELS, WGS, BE, P + 1>(d, x, w);
	}
}

/* This thread's two rows of the tile, row after row of PITCH words: the next eight rows' neighbours start
 * eight banks further on. */
template <int BE>
__device__ __forceinline__ void keep_sums(const float (&d)[BE / 2], float *tile)
{
	int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;

#pragma unroll
	for (int half = 0; half < 2; half++)
#pragma unroll
		for (int j = 0; j < BE / 8; j++)
			*(float2 *)(tile + (row + 8 * half) * (BE + 8) + 8 * j + lane % 4 * 2) =
				make_float2(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
}

/* Sends the tile's rows to the blocks that own their tokens, in pieces of 16 bytes, neighbours together:
 * straight from the products' registers, in pieces of 8, it took 2.4 us more at 64 tokens (TRIED 15). */
template <int OWN, int BE, int THREADS>
__device__ __forceinline__ void send_sums(const float *tile, float *sums, uint64_t *inbox, int tokens, int own,
                                          int rank)
{
	for (int i = threadIdx.x; i < tokens * (BE / 4); i += THREADS) {
		int token = i / (BE / 4), column = i % (BE / 4) * 4, owner = token / own;
		float *to = sums + ((size_t)rank * OWN + token % own) * BE + column;

		inbox_send(ptx_cluster_address(to, owner), ptx_cluster_address(inbox, owner),
		           *(const float4 *)(tile + token * (BE + 8) + column));
	}
}

template <int SPLIT, int WGS, int BE>
__global__ void __launch_bounds__(128 * WGS, split_form<SPLIT, WGS, BE>::BLOCKS) router_split(kk_router_args r)
{
	using form = split_form<SPLIT, WGS, BE>;
	extern __shared__ __align__(1024) char split_smem[];
	int rank = (int)ptx_cluster_rank(), e0 = blockIdx.x / SPLIT * BE, first = blockIdx.y * form::TOKENS;
	int tokens = min(r.tokens - first, (int)form::TOKENS), own = (tokens + SPLIT - 1) / SPLIT;
	uint32_t w = (uint32_t)__cvta_generic_to_shared(split_smem), x = w + form::PANELS * form::W_PANEL;
	float *sums = (float *)(split_smem + (int)form::OPERANDS), *tile = (float *)split_smem;
	uint64_t *inbox = (uint64_t *)(split_smem + form::INBOX);
	int mine = min(max(tokens - rank * own, 0), own); /* tokens that this block finishes */
	float d[BE / 2] = {};

	ptx_release_successor();
	if (threadIdx.x == 0)
		inbox_open(inbox);
	__syncwarp();
	ptx_cluster_arrive();
	copy_rows<form::PANELS, BE, form::THREADS, false>(w, r.w, e0, r.experts, rank);
	ptx_wait_predecessor();
	copy_rows<form::PANELS, form::TOKENS, form::THREADS, true>(x, r.x, first, r.tokens, rank);
	multiply_panels<form::PANELS, WGS, BE, 0>(d, x + threadIdx.x / 128 * 8192, w);
	ptx_wgmma_wait<0>();
	ptx_cluster_wait(); /* every block of the cluster runs: its memory may be written */
	__syncthreads(); /* this block has used its operands */
	keep_sums<BE>(d, tile);
	__syncthreads(); /* the tile is written */
	if (threadIdx.x == 0)
		inbox_expect(inbox, SPLIT * mine * BE * 4);
	send_sums<form::OWN, BE, form::THREADS>(tile, sums, inbox, tokens, own, rank);
	if (mine > 0)
		inbox_wait(inbox);
	for (int i = threadIdx.x; i < mine * (BE / 2); i += form::THREADS) {
		int token = i / (BE / 2), e = i % (BE / 2) * 2, at = first + rank * own + token;
		float2 sum = make_float2(0.0f, 0.0f);

		if (e0 + e >= r.experts)
			continue;
#pragma unroll
		for (int k = 0; k < SPLIT; k++) {
			float2 v = *(const float2 *)(sums + ((size_t)k * form::OWN + token) * BE + e);

			sum.x += v.x;
			sum.y += v.y;
		}
		*(float2 *)(r.logits + (size_t)at * r.experts + e0 + e) = sum;
	}
}

static bool split_fits(const kk_router_args *r)
{
	return r->tokens >= 1 && r->hidden == KK_ROUTER_HIDDEN && !r->w_f32 && r->experts >= 8 &&
	       r->experts % 2 == 0 && r->experts <= KK_MAX_EXPERTS;
}

template <int SPLIT, int WGS, int BE>
static cudaError_t launch_split(const kk_router_args *r, cudaStream_t stream)
{
	using form = split_form<SPLIT, WGS, BE>;
	const void *kernel = (const void *)router_split<SPLIT, WGS, BE>;
	cudaLaunchConfig_t config = {};
	cudaLaunchAttribute attr[2] = {};
	cudaError_t rc;

	rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, form::SMEM);
	if (rc == cudaSuccess)
		rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
	if (rc != cudaSuccess)
		return rc;
	config.gridDim = dim3((r->experts + BE - 1) / BE * SPLIT, (r->tokens + form::TOKENS - 1) / form::TOKENS);
	config.blockDim = dim3(form::THREADS);
	config.dynamicSmemBytes = form::SMEM;
	config.stream = stream;
	config.attrs = attr;
	attr[0].id = cudaLaunchAttributeClusterDimension;
	attr[0].val.clusterDim = {SPLIT, 1, 1};
	attr[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
	attr[1].val.programmaticStreamSerializationAllowed = 1;
	config.numAttrs = r->pdl ? 2 : 1;
	return cudaLaunchKernelEx(&config, router_split<SPLIT, WGS, BE>, *r);
}

cudaError_t kk_router_split(const kk_router_args *r, int split, int tokens_tile, int experts_tile,
                            cudaStream_t stream)
{
	if (!split_fits(r))
		return cudaErrorInvalidValue;
	switch (split * 1000000 + tokens_tile * 1000 + experts_tile) {
	case 16064032:
		return launch_split<16, 1, 32>(r, stream);
	case 16064048:
		return launch_split<16, 1, 48>(r, stream);
	case 16064064:
		return launch_split<16, 1, 64>(r, stream);
	case 16128064:
		return launch_split<16, 2, 64>(r, stream);
	}
	return cudaErrorInvalidValue;
}
