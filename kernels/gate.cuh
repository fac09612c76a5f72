/*
 * One row of the gate, by one warp: the device functions that gate.cu, align.cu and router_gemm.cu
 * share. What they compute is said in router.h; how, in gate.cu.
 */
#ifndef KK_GATE_CUH
#define KK_GATE_CUH

#include "ptx.cuh"
#include "router.h"

enum {
	GATE_LIST = 32,   /* candidates that the one-pass form ranks, one a lane */
	GATE_GROUPS = 16, /* pairs of lanes whose maxima bound the top_k-th best */
};

static constexpr unsigned FULL = 0xffffffffu;
static constexpr float LOG2E = 1.4426950408889634f;

/* Rises with the value; 0 is below every number, so it stands for "not valid". */
__device__ __forceinline__ uint32_t gate_key(float c)
{
	uint32_t u = __float_as_uint(c);

	return u ^ ((uint32_t)((int32_t)u >> 31) | 0x80000000u);
}

__device__ __forceinline__ float gate_unkey(uint32_t k)
{
	return __uint_as_float(k ^ (k & 0x80000000u ? 0x80000000u : 0xffffffffu));
}

/* NaN, -inf: never selected. */
__device__ __forceinline__ bool gate_valid(float x, float c)
{
	return x > -INFINITY && c > -INFINITY;
}

/* What turns a row's logits into scores. Sigmoid: nothing. Softmax: score = e^(x - max) * inverse. */
struct gate_row_scale {
	float max, inverse;
};

/* The score as the weights see it: within 4 ulp of the real one. The difference from the maximum is
 * rounded, which a score far below feels: what the rounding took is put back. */
template <bool SOFTMAX>
__device__ __forceinline__ float gate_score(float x, gate_row_scale r)
{
	float d = x - r.max, back = d + r.max, lost = (x - back) + ((back - d) - r.max);
	float e = SOFTMAX ? expf(d) : 0.0f;

	return SOFTMAX ? fmaf(e, lost, e) * r.inverse : ptx_rcp(1.0f + expf(-x));
}

/* The same within 4e-7, for the bound that leaves most experts out. */
template <bool SOFTMAX>
__device__ __forceinline__ float gate_score_fast(float x, gate_row_scale r)
{
	return SOFTMAX ? ptx_ex2((x - r.max) * LOG2E) * r.inverse
	               : ptx_rcp(1.0f + ptx_ex2(x * -LOG2E));
}

/* NaN when the row has one, as CPU's. */
__device__ __forceinline__ float warp_max(float v)
{
	for (int d = 16; d; d >>= 1) {
		float o = __shfl_xor_sync(FULL, v, d);
		v = o > v || o != o ? o : v;
	}
	return v;
}

__device__ __forceinline__ float warp_sum(float v)
{
	for (int d = 16; d; d >>= 1)
		v += __shfl_xor_sync(FULL, v, d);
	return v;
}

/* A warp's scratch in shared memory. */
struct __align__(16) gate_scratch {
	uint64_t list[GATE_LIST];    /* candidates: id, then key << 32 | ~id */
	uint32_t group[GATE_GROUPS]; /* keys of the group maxima, then scores by rank */
};

/* Slot `slot` of the row. */
__device__ __forceinline__ void gate_put(const kk_gate_args &a, int row, int slot, int id, float weight,
                                         int32_t *ids_copy)
{
	size_t at = (size_t)row * a.top_k + slot;

	a.ids[at] = id;
	a.weights[at] = weight;
	if (ids_copy)
		ids_copy[slot] = id;
}

__device__ __forceinline__ int gate_physical(const kk_gate_args &a, int id)
{
	return a.expert_map ? __ldg(a.expert_map + id) : id;
}

__device__ __forceinline__ float gate_factor(const kk_gate_args &a, float sum)
{
	return a.renormalize ? ptx_rcp(sum + 1e-20f) * a.scale : a.scale;
}

__device__ __forceinline__ void gate_store_padding(const kk_gate_args &a, int row, int lane,
                                                   int32_t *ids_copy)
{
	if (lane < a.top_k)
		gate_put(a, row, lane, -1, 0.0f, ids_copy);
}

/* A row of E logits or biases as the one-pass form has it: x[4 j + i] is that of expert 128 j + 4 lane + i. */
template <int PER_LANE>
__device__ __forceinline__ void gate_load(float (&x)[PER_LANE], const float *row, int lane)
{
#pragma unroll
	for (int j = 0; j < PER_LANE / 4; j++) {
		float4 v = __ldcg((const float4 *)(row + 128 * j) + lane);

		x[4 * j] = v.x;
		x[4 * j + 1] = v.y;
		x[4 * j + 2] = v.z;
		x[4 * j + 3] = v.w;
	}
}

/* 0 without a row. */
template <int PER_LANE>
__device__ __forceinline__ void gate_load_bias(float (&bias)[PER_LANE], const float *row, int lane)
{
#pragma unroll
	for (int i = 0; i < PER_LANE; i++)
		bias[i] = 0.0f;
	if (row)
		gate_load<PER_LANE>(bias, row, lane);
}

/* From shared memory, and to it. */
template <int PER_LANE>
__device__ __forceinline__ void gate_recall(float (&x)[PER_LANE], const float *row, int lane)
{
#pragma unroll
	for (int j = 0; j < PER_LANE / 4; j++) {
		float4 v = *(const float4 *)(row + 128 * j + 4 * lane);

		x[4 * j] = v.x, x[4 * j + 1] = v.y, x[4 * j + 2] = v.z, x[4 * j + 3] = v.w;
	}
}

template <int PER_LANE>
__device__ __forceinline__ void gate_keep(float *row, const float (&x)[PER_LANE], int lane)
{
#pragma unroll
	for (int j = 0; j < PER_LANE / 4; j++)
		*(float4 *)(row + 128 * j + 4 * lane) =
			make_float4(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
}

/*
 * Rounds: top_k times the best of what is left. Any E, any top_k; the warp's keys lie in shared
 * memory, lane l owns experts l, l + 32, ...; each lane keeps its best, and only the winner looks
 * for its next. Returns how many were found; lane r holds the r-th's id.
 */
__device__ inline int gate_rounds(uint32_t *keys, int experts, int top_k, int lane, int *id)
{
	uint32_t best = 0;
	int best_id = 0, r;

	for (int e = lane; e < experts; e += 32)
		if (keys[e] > best) {
			best = keys[e];
			best_id = e;
		}
	for (r = 0; r < top_k; r++) {
		uint32_t m = __reduce_max_sync(FULL, best);
		int winner;

		if (m == 0)
			break;
		winner = (int)__reduce_min_sync(FULL, best == m ? (unsigned)best_id : FULL);
		if (lane == r)
			*id = winner;
		if (winner % 32 == lane) {
			keys[winner] = 0;
			best = 0;
			for (int e = lane; e < experts; e += 32)
				if (keys[e] > best) {
					best = keys[e];
					best_id = e;
				}
		}
	}
	__syncwarp();
	return r;
}

/* How many of the half list from FIRST come before `mine`; unused places are 0. Unrolled: rolled, with
 * its loads one after the other, it took 0.05 us more (TRIED 5). */
template <int FIRST>
__device__ __forceinline__ int gate_rank(const uint64_t *list, uint64_t mine)
{
	int rank = 0;

#pragma unroll
	for (int i = 0; i < GATE_LIST / 2; i += 2) {
		ulonglong2 o = *(const ulonglong2 *)(list + FIRST + i);

		rank += (o.x > mine) + (o.y > mine);
	}
	return rank;
}

/*
 * The experts of all but the topk_group best groups become -inf. A group's score is the sum of its two best
 * (of one where there is but one); ties go to the lower group. Returns the chosen groups, a bit each.
 */
template <int PER_LANE, int GROUPS>
__device__ __forceinline__ unsigned gate_keep_groups(float (&c)[PER_LANE], int topk_group, int lane)
{
	constexpr int CHUNKS = PER_LANE / 4, LANES = 8 * PER_LANE / GROUPS, A_CHUNK = GROUPS / CHUNKS;
	float score[CHUNKS];
	int rank[CHUNKS];
	unsigned chosen = 0;

#pragma unroll
	for (int j = 0; j < CHUNKS; j++) {
		float a = fmaxf(c[4 * j], c[4 * j + 1]), b = fminf(c[4 * j], c[4 * j + 1]);
		float d = fmaxf(c[4 * j + 2], c[4 * j + 3]), e = fminf(c[4 * j + 2], c[4 * j + 3]);
		float first = fmaxf(a, d), second = fmaxf(fminf(a, d), fmaxf(b, e));

#pragma unroll
		for (int l = 1; l < LANES; l *= 2) {
			float f = __shfl_xor_sync(FULL, first, l), s = __shfl_xor_sync(FULL, second, l);

			second = fmaxf(fmaxf(second, s), fminf(first, f));
			first = fmaxf(first, f);
		}
		score[j] = first + (second > -INFINITY ? second : 0.0f);
		rank[j] = 0;
	}
#pragma unroll
	for (int g = 0; g < GROUPS; g++) {
		float other = __shfl_sync(FULL, score[g / A_CHUNK], g % A_CHUNK * LANES);

#pragma unroll
		for (int j = 0; j < CHUNKS; j++)
			rank[j] += other > score[j] ||
			           (other == score[j] && g < A_CHUNK * j + lane / LANES);
	}
#pragma unroll
	for (int j = 0; j < CHUNKS; j++) {
		bool keep = rank[j] < topk_group;
		unsigned lanes = __ballot_sync(FULL, keep);

#pragma unroll
		for (int i = 0; i < 4; i++)
			c[4 * j + i] = keep ? c[4 * j + i] : -INFINITY;
#pragma unroll
		for (int g = 0; g < A_CHUNK; g++)
			chosen |= (lanes >> (g * LANES) & 1) << (A_CHUNK * j + g);
	}
	return chosen;
}

/*
 * One pass. The logits of the row are in this lane's registers (x[4 j + i] is expert 128 j + 4 lane
 * + i) and in the warp's shared memory `xs`; bias likewise. GROUPS of experts, or 0; top_k up to TOP.
 * Lanes l and l ^ 16 share a group; the
 * top_k-th best of the 16 group maxima bounds the top_k-th best expert from below, and the few
 * experts above it (10 of 384 in the mean) are ranked by counting. The rare rest goes by rounds:
 * more than 32 above the bound or more than 4 in one lane, fewer than top_k groups with a valid
 * expert, an expert above the bound whose logit is -inf.
 */
template <int PER_LANE, bool SOFTMAX, int TOP = KK_FAST_TOP_K, int GROUPS = 0>
__device__ __forceinline__ void gate_row_onepass(const kk_gate_args &a, int row, int lane,
                                                 const float (&x)[PER_LANE],
                                                 const float (&bias)[PER_LANE], float *xs,
                                                 const float *bias_s, gate_scratch *s,
                                                 int32_t *ids_copy)
{
	constexpr int CHUNKS = PER_LANE / 4;
	float c[PER_LANE], top = -INFINITY, score = 0.0f, logit = 0.0f, b, sum = 0.0f;
	gate_row_scale scale = {0.0f, 1.0f};
	uint32_t key, bound, level[4], has[4], before = (1u << lane) - 1, chosen = FULL;
	float *ranked = (float *)s->group;
	int n = 0, found, rank = 0, id = 0;

	gate_keep<PER_LANE>(xs, x, lane);
	if (SOFTMAX) {
		float m = x[0], total = 0.0f;

#pragma unroll
		for (int i = 1; i < PER_LANE; i++)
			m = x[i] > m || x[i] != x[i] ? x[i] : m;
		scale.max = warp_max(m);
#pragma unroll
		for (int i = 0; i < PER_LANE; i++)
			total += ptx_ex2((x[i] - scale.max) * LOG2E);
		scale.inverse = 1.0f / warp_sum(total);
	}
#pragma unroll
	for (int i = 0; i < PER_LANE; i++)
		if (GROUPS) {
			float exact = gate_score<SOFTMAX>(x[i], scale) + bias[i];

			c[i] = gate_valid(x[i], exact) ? exact : -INFINITY;
		} else {
			c[i] = gate_score_fast<SOFTMAX>(x[i], scale) + bias[i];
		}
	if constexpr (GROUPS > 0)
		chosen = gate_keep_groups<PER_LANE, GROUPS>(c, a.topk_group, lane);
#pragma unroll
	for (int j = 0; j < CHUNKS; j++)
		top = fmaxf(top, fmaxf(fmaxf(c[4 * j], c[4 * j + 1]), fmaxf(c[4 * j + 2], c[4 * j + 3])));
	top = fmaxf(top, __shfl_xor_sync(FULL, top, 16));
	key = gate_key(top);
	if (lane < GATE_GROUPS)
		s->group[lane] = key;
	__syncwarp();
#pragma unroll
	for (int q = 0; q < GATE_GROUPS / 4; q++) {
		uint4 o = *(const uint4 *)(s->group + 4 * q);

		rank += (o.x > key) + (o.y > key) + (o.z > key) + (o.w > key);
	}
	bound = __reduce_min_sync(FULL, rank < a.top_k ? key : FULL);
	/* Twice the error of the fast scores, and of adding the bias to them. */
	b = gate_unkey(bound);
	b -= fmaf(fabsf(b), 2.4e-7f, 1e-6f);
	level[0] = 0;
#pragma unroll
	for (int j = 0; j < CHUNKS; j++) {
		uint32_t four = 0;

#pragma unroll
		for (int i = 0; i < 4; i++)
			four |= c[4 * j + i] >= b ? 1u << (4 * j + i) : 0;
		level[0] |= four;
	}
#pragma unroll
	for (int l = 1; l < 4; l++)
		level[l] = level[l - 1] & (level[l - 1] - 1);
#pragma unroll
	for (int l = 0; l < 4; l++)
		has[l] = __ballot_sync(FULL, level[l] != 0);
#pragma unroll
	for (int l = 0; l < 4; l++) {
		int bit = __ffs(level[l]) - 1, at = n + __popc(has[l] & before);

		if (level[l] && at < GATE_LIST)
			s->list[at] = (unsigned)(32 * (bit & ~3) + 4 * lane + (bit & 3));
		n += __popc(has[l]);
	}
	__syncwarp();
	if (lane < n && lane < GATE_LIST) {
		id = (int)(uint32_t)s->list[lane];
		logit = xs[id];
	}
	if (__any_sync(FULL, (level[3] & (level[3] - 1)) || (lane < n && !(logit > -INFINITY))) ||
	    n < a.top_k || n > GATE_LIST || bound <= gate_key(-INFINITY)) {
		uint32_t *keys = (uint32_t *)xs;

		for (int e = lane; e < 32 * PER_LANE; e += 32) {
			float xe = xs[e], ce = gate_score<SOFTMAX>(xe, scale) + bias_s[e];

			if (GROUPS && !(chosen >> (e * GROUPS / (32 * PER_LANE)) & 1))
				ce = -INFINITY;
			keys[e] = gate_valid(xe, ce) ? gate_key(ce) : 0;
		}
		__syncwarp();
		found = gate_rounds(keys, 32 * PER_LANE, a.top_k, lane, &id);
		if (lane < found)
			score = gate_score<SOFTMAX>(
				__ldcg(a.logits + (size_t)row * 32 * PER_LANE + id), scale);
		rank = lane;
		n = found;
	} else {
		uint64_t mine = 0;

		if (lane < n) {
			score = gate_score<SOFTMAX>(logit, scale);
			mine = (uint64_t)gate_key(score + bias_s[id]) << 32 | (uint32_t)~id;
		}
		__syncwarp();
		s->list[lane] = mine;
		__syncwarp();
		rank = gate_rank<0>(s->list, mine);
		if (n > GATE_LIST / 2)
			rank += gate_rank<GATE_LIST / 2>(s->list, mine);
		found = a.top_k;
	}
	if (lane < n && rank < found)
		ranked[rank] = score;
	__syncwarp();
	/* The order of this sum depends on the ranks alone. */
#pragma unroll
	for (int i = 0; i < TOP; i++)
		sum += i < found ? ranked[i] : 0.0f;
	if (lane < n && rank < found)
		gate_put(a, row, rank, gate_physical(a, id), score * gate_factor(a, sum), ids_copy);
	if (lane >= found && lane < a.top_k)
		gate_put(a, row, lane, 0, 0.0f, ids_copy);
	__syncwarp();
}

#endif
