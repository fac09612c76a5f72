/*
 * The gate: logits to the top_k experts of each token and their weights, one launch.
 *
 * ROOFLINE
 *   Bytes: 4 E a token in, 8 top_k out; at E = 384, top_k = 8: 1.6 kB. H100, at the 3.10 TB/s that a
 *   read reaches: 0.53 us at 1,024 tokens, 20.65 at 40,000; H200, at 4.50: 0.37, 14.2.
 *   Arithmetic: about 300 warp instructions a row, 75 cycles of a multiprocessor's four schedulers; its
 *   share of the memory brings a row every 119 cycles. So memory is the bound from some thousands of
 *   tokens on; before, it is latency: a kernel that only reads and writes as much takes 1.2 us at 1
 *   to 64 tokens, 1.9 at 256, 2.25 at 1,024, 4.1 at 4,096 (all H100).
 *
 * LADDER (us a call, E = 384, top 8, 1 / 64 / 256 / 4,096 tokens; launches overlap but at 4,096)
 *   rounds   4.9 / 5.1 / 6.9 / 11   top_k times the best of what is left. Any shape; groups.
 *   one pass 1.5 / 1.7 / 2.2 / 5.7  a bound first, then only what is above it is ranked, by counting;
 *                                   E 128, 256 and 384, top_k up to 8; 512, up to 16; 256 in 8 groups.
 *   Best of others (SGLang's Triton router): 2.8 / 3.0 / 3.8 / 11.9. TRIED 3, 4, 5, 20.
 *
 * RULES
 *   Ids: this file makes them; every id is in [0, E), or what expert_map has there, or -1 in padding
 *   rows. Order of sums: a row's weights are summed by rank. Ties: the lower id. Which experts are
 *   ranked is decided by scores within 4e-7 and a margin of twice that; how they rank, and their
 *   weights, by scores within 4 ulp. A row never depends on another.
 */
#include <cmath>

#include "gate.cuh"
#include "turn.cuh"

template <int PER_LANE>
static constexpr size_t onepass_smem(int warps)
{
	return 32 * PER_LANE * sizeof(float) * (warps + 1) + warps * sizeof(gate_scratch);
}

/* A warp takes rows warp, warp + all warps, ...; the next row's loads are under way while it works. */
template <int PER_LANE, bool SOFTMAX, int TOP, int GROUPS>
__global__ void gate_onepass(kk_gate_args a)
{
	constexpr int E = 32 * PER_LANE;
	extern __shared__ float4 smem[];
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
	float *bias_s = (float *)smem, *xs = bias_s + E * (1 + warp);
	gate_scratch *s = (gate_scratch *)(bias_s + E * (1 + warps)) + warp;
	int stride = gridDim.x * warps, row = blockIdx.x * warps + warp, valid;
	float bias[PER_LANE], x[PER_LANE], next[PER_LANE];

	turn_begin(a.turn);
	gate_load_bias<PER_LANE>(bias, a.bias, lane);
	turn_wait(a.turn);
	if (row < a.tokens)
		gate_load<PER_LANE>(x, a.logits + (size_t)row * E, lane);
	if (warp == 0)
		gate_keep<PER_LANE>(bias_s, bias, lane);
	valid = a.valid_tokens ? min(__ldcg(a.valid_tokens), a.tokens) : a.tokens;
	__syncthreads(); /* bias_s is written */
	for (; row < valid; row += stride) {
		if (row + stride < valid)
			gate_load<PER_LANE>(next, a.logits + (size_t)(row + stride) * E, lane);
		gate_row_onepass<PER_LANE, SOFTMAX, TOP, GROUPS>(a, row, lane, x, bias, xs, bias_s, s, NULL);
#pragma unroll
		for (int i = 0; i < PER_LANE; i++)
			x[i] = next[i];
	}
	for (; row < a.tokens; row += stride)
		gate_store_padding(a, row, lane, NULL);
	turn_end(a.turn);
}

template <int PER_LANE, int TOP, int GROUPS>
static cudaError_t launch_onepass(const kk_gate_args *a, int warps, int blocks, cudaStream_t stream)
{
	void (*kernel)(kk_gate_args) = a->softmax ? gate_onepass<PER_LANE, true, TOP, GROUPS>
	                                          : gate_onepass<PER_LANE, false, TOP, GROUPS>;
	cudaLaunchAttribute pdl = {};
	cudaLaunchConfig_t config = {};
	int rows = (a->tokens + warps - 1) / warps;

	config.gridDim = dim3(rows < blocks ? rows : blocks);
	config.blockDim = dim3(32 * warps);
	config.dynamicSmemBytes = onepass_smem<PER_LANE>(warps);
	config.stream = stream;
	pdl.id = cudaLaunchAttributeProgrammaticStreamSerialization;
	pdl.val.programmaticStreamSerializationAllowed = a->pdl;
	config.attrs = &pdl;
	config.numAttrs = a->pdl;
	return cudaLaunchKernelEx(&config, kernel, *a);
}

cudaError_t kk_gate_onepass(const kk_gate_args *a, int warps, int blocks, cudaStream_t stream)
{
	int groups = a->groups > 1 ? a->groups : 0;

	if (a->tokens < 1 || a->top_k < 1 || a->top_k > (a->experts == 512 ? 16 : (int)KK_FAST_TOP_K) ||
	    warps < 1 || warps > 16 || blocks < 1)
		return cudaErrorInvalidValue;
	switch (a->experts * 100 + groups) {
	case 12800:
		return launch_onepass<4, 8, 0>(a, warps, blocks, stream);
	case 25600:
		return launch_onepass<8, 8, 0>(a, warps, blocks, stream);
	case 25608:
		return launch_onepass<8, 8, 8>(a, warps, blocks, stream);
	case 38400:
		return launch_onepass<12, 8, 0>(a, warps, blocks, stream);
	case 51200:
		return launch_onepass<16, 16, 0>(a, warps, blocks, stream);
	}
	return cudaErrorInvalidValue;
}

/* The topk_group best groups, a bit each: by the sum of a group's two best (of one where there is but
 * one), ties to the lower group; the warp's keys are complete. */
__device__ static unsigned best_groups(const uint32_t *keys, const kk_gate_args &a, int lane)
{
	int size = a.experts / a.groups, rank = 0;
	float mine = -INFINITY;

	for (int g = 0; g < a.groups; g++) {
		uint32_t first = 0, second = 0;

		for (int e = lane; e < size; e += 32) {
			uint32_t k = keys[g * size + e];

			second = max(second, min(first, k));
			first = max(first, k);
		}
		for (int d = 16; d; d >>= 1) {
			uint32_t f = __shfl_xor_sync(FULL, first, d);

			second = max(max(second, __shfl_xor_sync(FULL, second, d)), min(first, f));
			first = max(first, f);
		}
		if (lane == g)
			mine = first ? gate_unkey(first) + (second ? gate_unkey(second) : 0.0f)
			             : -INFINITY;
	}
	for (int g = 0; g < a.groups; g++) {
		float other = __shfl_sync(FULL, mine, g);

		rank += other > mine || (other == mine && g < lane);
	}
	return __ballot_sync(FULL, lane < a.groups && rank < a.topk_group);
}

enum { GENERAL_WARPS = 4 };

template <bool SOFTMAX>
__device__ __forceinline__ void gate_row_general(const kk_gate_args &a, int row, int lane, uint32_t *keys)
{
	const float *x = a.logits + (size_t)row * a.experts;
	gate_row_scale scale = {0.0f, 1.0f};
	float score = 0.0f, sum;
	int id = 0, n;

	if (a.valid_tokens && row >= __ldcg(a.valid_tokens)) {
		gate_store_padding(a, row, lane, NULL);
		return;
	}
	if (SOFTMAX) {
		float m = -INFINITY, sum = 0.0f;

		for (int e = lane; e < a.experts; e += 32)
			m = x[e] > m || x[e] != x[e] ? x[e] : m;
		scale.max = warp_max(m);
		for (int e = lane; e < a.experts; e += 32)
			sum += expf(x[e] - scale.max);
		scale.inverse = 1.0f / warp_sum(sum);
	}
	for (int e = lane; e < a.experts; e += 32) {
		float c = gate_score<SOFTMAX>(x[e], scale) + (a.bias ? a.bias[e] : 0.0f);

		keys[e] = gate_valid(x[e], c) ? gate_key(c) : 0;
	}
	__syncwarp();
	if (a.groups > 1) {
		unsigned chosen = best_groups(keys, a, lane);

		for (int e = lane; e < a.experts; e += 32)
			if (!(chosen >> (e / (a.experts / a.groups)) & 1))
				keys[e] = 0;
		__syncwarp();
	}
	n = gate_rounds(keys, a.experts, a.top_k, lane, &id);
	if (lane < n)
		score = gate_score<SOFTMAX>(x[id], scale);
	sum = warp_sum(score);
	if (lane < a.top_k)
		gate_put(a, row, lane, lane < n ? gate_physical(a, id) : 0,
		         lane < n ? score * gate_factor(a, sum) : 0.0f, NULL);
}

template <bool SOFTMAX>
__global__ void __launch_bounds__(32 * GENERAL_WARPS) gate_general(kk_gate_args a)
{
	extern __shared__ float4 smem[];
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x * GENERAL_WARPS + warp;

	turn_begin(a.turn);
	turn_wait(a.turn);
	if (row < a.tokens)
		gate_row_general<SOFTMAX>(a, row, lane, (uint32_t *)smem + warp * a.experts);
	turn_end(a.turn);
}

cudaError_t kk_gate_general(const kk_gate_args *a, cudaStream_t stream)
{
	void (*kernel)(kk_gate_args) = a->softmax ? gate_general<true> : gate_general<false>;
	cudaLaunchAttribute pdl = {};
	cudaLaunchConfig_t config = {};

	if (a->tokens < 1 || a->experts < 1 || a->experts > KK_MAX_EXPERTS || a->top_k < 1 ||
	    a->top_k > KK_MAX_TOP_K || (a->groups > 1 && (a->groups > 32 || a->experts % a->groups)))
		return cudaErrorInvalidValue;
	config.gridDim = dim3((a->tokens + GENERAL_WARPS - 1) / GENERAL_WARPS);
	config.blockDim = dim3(32 * GENERAL_WARPS);
	config.dynamicSmemBytes = (size_t)a->experts * sizeof(uint32_t) * GENERAL_WARPS;
	config.stream = stream;
	pdl.id = cudaLaunchAttributeProgrammaticStreamSerialization;
	pdl.val.programmaticStreamSerializationAllowed = a->pdl;
	config.attrs = &pdl;
	config.numAttrs = a->pdl;
	return cudaLaunchKernelEx(&config, kernel, *a);
}
