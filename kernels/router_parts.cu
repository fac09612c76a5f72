/*
 * Router GEMM for some hundreds of tokens, in two launches: parts of sums, then their sums.
 *
 * ROOFLINE
 *   At 256 tokens x is 3.7 MB, w 5.5: 3.0 us of H100's memory, 1.9 of H200's, 1.8 us of tensor cores;
 *   fourteen parts of all sums are 5.5 MB, written and read in L2. A multiprocessor takes in 229 kB, at
 *   64 bytes a cycle 1.8 us, of which 1.0, the tokens', after its predecessor is done.
 *
 * LADDER
 *   (us a call, E = 384, H = 7168, 192 / 256 tokens; weights cold, launches overlapping)
 *   split    - / 13.6      router_split.cu, 128 x 64: two rounds of clusters
 *   own      - / 10.0      parts; each block fetches its own tiles: 25.7 MB from L2, at 5.1 TB/s
 *   here     8.9 / 9.2     L2 is read once for eight blocks; without overlap 10.5 / 10.9
 *   Best of others: - / 9.9 (cuBLAS; here 9.6). Router, gate and alignment at 256: 17.3, with cuBLAS 19.5.
 *   Of 9.2 (clock64 stamps): the first panel is there 1.4 us after the predecessor is done, the last 2.6,
 *   products 0.35, parts written 0.6. The rest is the second launch: 3.3 by itself where launches
 *   overlap, 2.0 where they do not, as 96 blocks and as 192; why is not known. TRIED 18.
 *
 * RULES
 *   Order of a logit's sum: the tensor cores' over a block's 512 columns, then the parts, seven by seven.
 *   It does not depend on the number of tokens. Weights are read before the previous launch has ended:
 *   nothing in the stream may be writing them.
 */

#include "launch.cuh"
#include "ptx.cuh"
#include "router.h"
#include "tensor_map.cuh"

/*
 * A cluster has all tiles (4 of experts, 2 of tokens) of one part of the columns. Each block fetches a
 * quarter of its tokens' rows and half of its experts', for all blocks that need them, so that L2 is
 * read once; all operands have room at once. 112 blocks: fifteen clusters of eight run at once.
 */
enum {
	CLUSTER = 8,
	WIDE = 4, /* tiles */
	HIGH = 2,
	TOKENS = 128, /* of a tile */
	THREADS = 256,
	SUM_THREADS = 512, /* 96 blocks; in 192, more than there are multiprocessors, the launch took 2 us more */
	PANEL = 64, /* columns */
	PANELS = 8,
	PARTS = KK_ROUTER_HIDDEN / (PANEL * PANELS),
	X_PANEL = TOKENS * 128, /* bytes */
};
static_assert(PARTS * PANELS * PANEL == KK_ROUTER_HIDDEN, "the columns, exactly");
static_assert((int)SUM_THREADS == 2 * THREADS, "two lanes for each of its threads");
static_assert((int)KK_PARTS_TOKENS == HIGH * TOKENS && (int)KK_PARTS_EXPERTS == WIDE * 96,
              "one cluster has all tiles");

template <int BE>
struct parts_form {
	enum {
		STAGE = X_PANEL + BE * 128,
		BARRIERS = PANELS * STAGE,
		SMEM = BARRIERS + PANELS * 8,
		GROUPS = BE / 8, /* of experts, as the products' registers have them */
	};
};

/* parts: [tile][PARTS][GROUPS][THREADS] */
template <int BE>
__global__ void __launch_bounds__(THREADS, 1)
router_parts(__grid_constant__ const CUtensorMap x, __grid_constant__ const CUtensorMap w, float4 *parts,
             int tokens)
{
	using form = parts_form<BE>;
	extern __shared__ __align__(1024) char parts_smem[];
	uint32_t smem = ptx_shared_address(parts_smem), barrier = smem + form::BARRIERS;
	int rank = (int)ptx_cluster_rank(), part = blockIdx.x / CLUSTER, column = part * PANELS * PANEL;
	int high = rank / WIDE, wide = rank % WIDE;
	uint32_t my_x = smem + threadIdx.x / 128 * 8192, my_w = smem + X_PANEL;
	float d[BE / 2];

	ptx_release_successor();
	if (threadIdx.x < PANELS)
		ptx_mbarrier_init(barrier + 8 * threadIdx.x, 1);
	ptx_mbarrier_init_done();
	__syncwarp();
	ptx_cluster_arrive();
	ptx_cluster_wait(); /* every block's barriers are there */
	if (threadIdx.x == 0) {
		ptx_prefetch_map(&x);
		for (int p = 0; p < PANELS; p++) {
			ptx_mbarrier_expect(barrier + 8 * p, form::STAGE);
			ptx_copy_tile(my_w + p * form::STAGE + high * (BE / 2 * 128), &w, column + p * PANEL,
			              wide * BE + high * (BE / 2), barrier + 8 * p, 0x11u << wide);
		}
	}
	ptx_wait_predecessor();
	if (threadIdx.x == 0)
		for (int p = 0; p < PANELS; p++)
			ptx_copy_tile(smem + p * form::STAGE + wide * (X_PANEL / WIDE), &x, column + p * PANEL,
			              high * TOKENS + wide * (TOKENS / WIDE), barrier + 8 * p,
			              0xfu << (WIDE * high));
	__syncwarp();
#pragma unroll
	for (int p = 0; p < PANELS; p++) {
		ptx_mbarrier_wait_cluster(barrier + 8 * p, 0);
		ptx_wgmma_fence();
#pragma unroll
		for (int k = 0; k < PANEL / 16; k++)
			ptx_wgmma<BE>(d, ptx_wgmma_matrix(my_x + p * form::STAGE, 16) + 2 * k,
			              ptx_wgmma_matrix(my_w + p * form::STAGE, 16) + 2 * k, p + k > 0);
		ptx_wgmma_commit();
	}
	ptx_wgmma_wait<0>();
	if (high * TOKENS >= tokens)
		return;
	parts += ((size_t)rank * PARTS + part) * form::GROUPS * THREADS + threadIdx.x;
#pragma unroll
	for (int j = 0; j < form::GROUPS; j++)
		parts[j * THREADS] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
}

/* Two neighbouring lanes add up half of the parts each, all on their way together, for the two pairs of
 * logits that one thread of router_parts held. A block has a group of experts of a tile. */
template <int BE>
__global__ void __launch_bounds__(SUM_THREADS) router_sum_parts(kk_router_args r, const float4 *parts)
{
	constexpr int GROUPS = parts_form<BE>::GROUPS, EACH = PARTS / 2;
	int half = threadIdx.x % 2, t = threadIdx.x / 2, j = blockIdx.x % GROUPS, tile = blockIdx.x / GROUPS;
	int e = tile % WIDE * BE + 8 * j + t % 4 * 2;
	int token = tile / WIDE * TOKENS + t / 32 * 16 + t % 32 / 4 + 8 * half;
	float4 v[EACH], sum;

	parts += (((size_t)tile * PARTS + half * EACH) * GROUPS + j) * THREADS + t;
	ptx_release_successor();
	ptx_wait_predecessor();
#pragma unroll
	for (int k = 0; k < EACH; k++)
		v[k] = __ldcg(parts + (size_t)k * GROUPS * THREADS);
	sum = v[0];
#pragma unroll
	for (int k = 1; k < EACH; k++)
		sum.x += v[k].x, sum.y += v[k].y, sum.z += v[k].z, sum.w += v[k].w;
	sum.x += __shfl_xor_sync(0xffffffffu, sum.x, 1);
	sum.y += __shfl_xor_sync(0xffffffffu, sum.y, 1);
	sum.z += __shfl_xor_sync(0xffffffffu, sum.z, 1);
	sum.w += __shfl_xor_sync(0xffffffffu, sum.w, 1);
	if (e < r.experts && token < r.tokens)
		*(float2 *)(r.logits + (size_t)token * r.experts + e) =
			half ? make_float2(sum.z, sum.w) : make_float2(sum.x, sum.y);
}

/* A matrix of bf16 [rows, KK_ROUTER_HIDDEN], in boxes of a panel's columns and `box` rows; rows beyond the
 * last are zeros. */
static cudaError_t make_map(CUtensorMap *map, const void *data, int rows, int box)
{
	tensor_shape t = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, 2, data,
	                  {KK_ROUTER_HIDDEN, (cuuint64_t)rows}, {KK_ROUTER_HIDDEN * 2}, {PANEL, (cuuint32_t)box}};

	return make_tensor_map(map, t);
}

template <int BE>
static cudaError_t launch_products(const kk_router_args *r, float4 *parts, cudaStream_t stream)
{
	cudaLaunchConfig_t config = {};
	cudaLaunchAttribute attr[2] = {};
	CUtensorMap x, w;
	cudaError_t rc = make_map(&x, r->x, r->tokens, TOKENS / WIDE);

	if (rc == cudaSuccess)
		rc = make_map(&w, r->w, r->experts, BE / HIGH);
	if (rc == cudaSuccess)
		rc = cudaFuncSetAttribute((const void *)router_parts<BE>,
		                          cudaFuncAttributeMaxDynamicSharedMemorySize, parts_form<BE>::SMEM);
	if (rc != cudaSuccess)
		return rc;
	attr[0].id = cudaLaunchAttributeClusterDimension;
	attr[0].val.clusterDim = {CLUSTER, 1, 1};
	attr[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
	attr[1].val.programmaticStreamSerializationAllowed = 1;
	config.gridDim = dim3(PARTS * CLUSTER);
	config.blockDim = dim3(THREADS);
	config.dynamicSmemBytes = parts_form<BE>::SMEM;
	config.stream = stream;
	config.attrs = attr;
	config.numAttrs = r->pdl ? 2 : 1;
	return cudaLaunchKernelEx(&config, router_parts<BE>, x, w, parts, r->tokens);
}

template <int BE>
static cudaError_t launch_parts(const kk_router_args *r, float4 *parts, cudaStream_t stream)
{
	int tiles = (r->tokens + TOKENS - 1) / TOKENS * WIDE;
	cudaError_t rc = launch_products<BE>(r, parts, stream);

	return rc != cudaSuccess ? rc
	                         : launch(router_sum_parts<BE>, dim3(tiles * parts_form<BE>::GROUPS),
	                                  SUM_THREADS, r->pdl, stream, *r, (const float4 *)parts);
}

size_t kk_router_parts_bytes(int tokens, int experts)
{
	int high = tokens > TOKENS ? HIGH : 1, wide = experts > WIDE * 64 ? WIDE * 96 : WIDE * 64;

	return experts <= KK_PARTS_EXPERTS ? (size_t)high * TOKENS * wide * PARTS * sizeof(float) : 0;
}

cudaError_t kk_router_parts(const kk_router_args *r, void *parts, cudaStream_t stream)
{
	if (r->tokens < 1 || r->tokens > KK_PARTS_TOKENS || r->hidden != KK_ROUTER_HIDDEN || r->w_f32 ||
	    r->experts < 8 || r->experts % 2 || r->experts > KK_PARTS_EXPERTS)
		return cudaErrorInvalidValue;
	return r->experts <= WIDE * 64 ? launch_parts<64>(r, (float4 *)parts, stream)
	                               : launch_parts<96>(r, (float4 *)parts, stream);
}
