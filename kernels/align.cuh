/*
 * The alignment of few places by one block, shared by align.cu and router_gemm.cu.
 *
 * Up to 32 places: one warp, nothing in shared memory. Up to 64: each place compares itself with every
 * other. More: a warp ranks 32 neighbouring places by the lanes that hold the same expert and leaves how
 * many there are; a thread for each expert turns these numbers into sums, and a scan over the experts into
 * positions. The sorted list is put together in shared memory, where it fits.
 */
#ifndef KK_ALIGN_CUH
#define KK_ALIGN_CUH

#include "ptx.cuh"
#include "router.h"

enum {
	ALIGN_THREADS = 256, /* of the fused forms */
	ALIGN_STAGE = 8192,
	ALIGN_WARP = 32,     /* places that one warp sorts */
	ALIGN_PAIRS = 64,    /* places that are compared with each other */
};

/* In shared memory. */
struct align_scratch {
	int *stage;      /* the sorted list, where it cannot be longer than ALIGN_STAGE: full of `places` */
	int *warp_total; /* [32] */
	int *offset;     /* [max(experts, ALIGN_PAIRS)] */
	uint16_t *count; /* [places / 32 rounded up, align_row]; all 0 */
};

__host__ __device__ inline int align_capacity(int places, int experts, int block)
{
	int runs = places < experts ? places : experts, n = places + runs * (block - 1);

	return (n + block - 1) / block * block;
}

/* Words of the stage: a multiple of four; 0 when the list is built in global memory. */
__host__ __device__ inline int align_stage(int places, int experts, int block)
{
	int n;

	if (places <= ALIGN_WARP)
		return 0;
	n = (align_capacity(places, experts, block) + 3) / 4 * 4;
	return n <= ALIGN_STAGE ? n : 0;
}

/* Experts of a row of counts: whole 16 bytes. */
__host__ __device__ inline int align_row(int experts)
{
	return (experts + 7) / 8 * 8;
}

__host__ __device__ inline int align_count_words(int places, int experts)
{
	return places > ALIGN_PAIRS ? (places + 31) / 32 * align_row(experts) / 2 : 0;
}

__host__ __device__ inline int align_offsets(int experts)
{
	return experts < ALIGN_PAIRS ? (int)ALIGN_PAIRS : (experts + 3) / 4 * 4;
}

__host__ __device__ inline size_t align_smem(int places, int experts, int block)
{
	if (places <= ALIGN_WARP)
		return 0;
	return (align_stage(places, experts, block) + 32 + align_offsets(experts) +
	        align_count_words(places, experts)) *
	       sizeof(int);
}

/* `base` is 16-byte aligned. */
__device__ __forceinline__ align_scratch align_carve(void *base, const kk_align_args &a)
{
	align_scratch s;

	s.stage = (int *)base;
	s.warp_total = s.stage + align_stage(a.tokens * a.top_k, a.experts, a.block);
	s.offset = s.warp_total + 32;
	s.count = (uint16_t *)(s.offset + align_offsets(a.experts));
	return s;
}

/* Before align_block_sort, with a barrier between; needs no data, so it may run early. */
template <int THREADS>
__device__ __forceinline__ void align_prepare(const kk_align_args &a, align_scratch s)
{
	int places = a.tokens * a.top_k, fill = align_stage(places, a.experts, a.block) / 4;
	int words = align_count_words(places, a.experts) / 4;

	for (int i = threadIdx.x; i < fill; i += THREADS)
		((int4 *)s.stage)[i] = make_int4(places, places, places, places);
	for (int i = threadIdx.x; i < words; i += THREADS)
		((int4 *)s.count)[i] = make_int4(0, 0, 0, 0);
}

/* x / block, for x < 2^23; blocks are mostly powers of two. */
__device__ __forceinline__ int align_blocks(int x, int block)
{
	return block & (block - 1) ? x / block : x >> (__ffs(block) - 1);
}

/* `count` places, padded. */
__device__ __forceinline__ int align_padded(int count, int block)
{
	return align_blocks(count + block - 1, block) * block;
}

/* Exclusive sums of `v` over the block's threads, in their order; *total is the sum of all. */
template <int THREADS>
__device__ __forceinline__ int block_scan(int v, int *warp_total, int *total)
{
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = v, before = 0, all = 0;

#pragma unroll
	for (int d = 1; d < 32; d <<= 1) {
		int o = __shfl_up_sync(0xffffffffu, sum, d);

		if (lane >= d)
			sum += o;
	}
	if (lane == 31)
		warp_total[warp] = sum;
	__syncthreads(); /* the warps' totals are written */
#pragma unroll
	for (int w = 0; w < THREADS / 32; w++) {
		int t = warp_total[w];

		before += w < warp ? t : 0;
		all += t;
	}
	*total = all;
	return before + sum - v;
}

/* A run of `count` places of expert e at `at`: its blocks, and its padding unless it is staged. */
__device__ __forceinline__ int align_put_run(const kk_align_args &a, int e, int at, int count, bool staged)
{
	int places = a.tokens * a.top_k, blocks = align_blocks(count + a.block - 1, a.block);
	int first = align_blocks(at, a.block), end = at + blocks * a.block;

	for (int b = 0; b < blocks; b++)
		a.block_expert[first + b] = e;
	if (!staged)
		for (int i = at + count; i < end; i++)
			a.sorted[i] = places;
	return end;
}

/* Words [0, count) of `to`, from `from` or, without it, all `fill`; by threads t, t + step, ... */
__device__ __forceinline__ void align_store(int32_t *to, const int *from, int fill, int count, int t, int step)
{
	if (count % 4) {
		for (int i = t; i < count; i += step)
			to[i] = from ? from[i] : fill;
		return;
	}
	for (int i = t; i < count / 4; i += step)
		((int4 *)to)[i] = from ? ((const int4 *)from)[i] : make_int4(fill, fill, fill, fill);
}

/* Up to N <= 32 places, one a lane of this warp: e is its expert, or any id that takes no place. */
template <int N>
__device__ __forceinline__ void align_warp(const kk_align_args &a, int e, int lane)
{
	bool valid = lane < a.tokens * a.top_k && e >= 0 && e < a.experts;
	int other[N], length, rank, at = 0, total;
	unsigned same = 0;

#pragma unroll
	for (int j = 0; j < N; j++) {
		other[j] = __shfl_sync(0xffffffffu, valid ? e : -1, j);
		same |= other[j] == e ? 1u << j : 0;
	}
	rank = __popc(same & ((1u << lane) - 1));
	length = valid && rank == 0 ? align_padded(__popc(same), a.block) : 0;
#pragma unroll
	for (int j = 0; j < N; j++) {
		int n = __shfl_sync(0xffffffffu, length, j);

		at += other[j] < e ? n : 0;
	}
	total = __reduce_add_sync(0xffffffffu, length);
	align_store(a.sorted, NULL, a.tokens * a.top_k, total, lane, 32);
	__syncwarp(); /* the padding is written, and may be written over */
	if (valid)
		a.sorted[at + rank] = lane;
	if (length)
		align_put_run(a, e, at, length, true);
	if (lane == 0)
		*a.total = total;
}

/* Up to ALIGN_PAIRS places, WAYS neighbouring threads for each; `ids` is padded with -1. Returns the length
 * of the sorted list. */
template <int WAYS>
__device__ __forceinline__ int align_pairs(const kk_align_args &a, const int32_t *ids, align_scratch s,
                                           bool staged)
{
	int p = threadIdx.x / WAYS, way = threadIdx.x % WAYS * 4, count = 0, rank = 0, at = 0, total = 0;
	int e = p < ALIGN_PAIRS ? ids[p] : -1;
	bool mine = e >= 0 && e < a.experts && way == 0;

#pragma unroll
	for (int i = 0; i < ALIGN_PAIRS; i += 4 * WAYS) {
		int4 o = *(const int4 *)(ids + i + way);
		int j = i + way;

		count += (o.x == e) + (o.y == e) + (o.z == e) + (o.w == e);
		rank += (o.x == e && j < p) + (o.y == e && j + 1 < p) + (o.z == e && j + 2 < p) +
		        (o.w == e && j + 3 < p);
	}
#pragma unroll
	for (int d = 1; d < WAYS; d *= 2) {
		count += __shfl_xor_sync(0xffffffffu, count, d);
		rank += __shfl_xor_sync(0xffffffffu, rank, d);
	}
	if (p < ALIGN_PAIRS && way == 0)
		s.offset[p] = mine && rank == 0 ? align_padded(count, a.block) : 0;
	__syncthreads(); /* the runs' lengths are written, at their first places */
#pragma unroll
	for (int i = 0; i < ALIGN_PAIRS; i += 4 * WAYS) {
		int4 n = *(const int4 *)(s.offset + i + way), o = *(const int4 *)(ids + i + way);

		total += n.x + n.y + n.z + n.w;
		at += (o.x < e ? n.x : 0) + (o.y < e ? n.y : 0) + (o.z < e ? n.z : 0) +
		      (o.w < e ? n.w : 0);
	}
#pragma unroll
	for (int d = 1; d < WAYS; d *= 2) {
		total += __shfl_xor_sync(0xffffffffu, total, d);
		at += __shfl_xor_sync(0xffffffffu, at, d);
	}
	if (mine) {
		if (rank == 0)
			align_put_run(a, e, at, count, staged);
		(staged ? s.stage : a.sorted)[at + rank] = p;
	}
	return total;
}

/* The number of places of expert e: its counts become the sums of those before them. */
__device__ __forceinline__ int align_sum_counts(uint16_t *count, int row, int words)
{
	int sum = 0;

	for (int w = 0; w < words; w += 8) {
		int n[8];

#pragma unroll
		for (int i = 0; i < 8; i++)
			n[i] = w + i < words ? count[(w + i) * row] : 0;
#pragma unroll
		for (int i = 0; i < 8; i++) {
			if (w + i < words)
				count[(w + i) * row] = (uint16_t)sum;
			sum += n[i];
		}
	}
	return sum;
}

/* PER places a thread: e[k] is the expert of place THREADS k + t, or what takes no place. Returns the
 * length of the sorted list. */
template <int THREADS, int PER>
__device__ __forceinline__ int align_words(const kk_align_args &a, const int (&e)[PER], align_scratch s,
                                           bool staged)
{
	int t = threadIdx.x, places = a.tokens * a.top_k, row = align_row(a.experts), done = 0;
	int rank[PER];
	bool valid[PER];

#pragma unroll
	for (int k = 0; k < PER; k++) {
		unsigned same;

		valid[k] = false;
		if (THREADS * k + t / 32 * 32 >= places)
			continue;
		valid[k] = THREADS * k + t < places && e[k] >= 0 && e[k] < a.experts;
		same = __match_any_sync(0xffffffffu, valid[k] ? e[k] : -1);
		rank[k] = __popc(same & ((1u << t % 32) - 1));
		if (valid[k] && rank[k] == 0)
			s.count[(THREADS * k + t) / 32 * row + e[k]] = (uint16_t)__popc(same);
	}
	__syncthreads(); /* the counts are written */
	for (int first = 0; first < a.experts; first += THREADS) {
		int x = first + t, n = 0, total, at;

		if (x < a.experts)
			n = align_sum_counts(s.count + x, row, (places + 31) / 32);
		at = done + block_scan<THREADS>(align_padded(n, a.block), s.warp_total, &total);
		if (x < a.experts) {
			s.offset[x] = at;
			align_put_run(a, x, at, n, staged);
		}
		done += total;
		__syncthreads(); /* the offsets are written, the warps' totals have been read */
	}
#pragma unroll
	for (int k = 0; k < PER; k++)
		if (valid[k]) {
			int i = THREADS * k + t;

			(staged ? s.stage : a.sorted)[s.offset[e[k]] + s.count[i / 32 * row + e[k]] +
			                              rank[k]] = i;
		}
	return done;
}

/* The end of all forms but align_warp. */
template <int THREADS>
__device__ __forceinline__ void align_finish(const kk_align_args &a, align_scratch s, int total, bool staged)
{
	if (threadIdx.x == 0)
		*a.total = total;
	if (!staged)
		return;
	__syncthreads(); /* the stage is complete */
	align_store(a.sorted, s.stage, 0, total, threadIdx.x, THREADS);
}

/* Places whose ids lie in shared memory, complete and padded with -1 to a multiple of ALIGN_PAIRS: all
 * THREADS threads of the block, PER places each at most. */
template <int THREADS, int PER>
__device__ __forceinline__ void align_block_sort(const kk_align_args &a, const int32_t *ids, align_scratch s)
{
	int places = a.tokens * a.top_k;
	bool staged = align_stage(places, a.experts, a.block) > 0;

	if (places <= ALIGN_WARP) {
		if (threadIdx.x >= 32)
			return;
		if (places <= 8)
			align_warp<8>(a, ids[threadIdx.x], threadIdx.x);
		else
			align_warp<ALIGN_WARP>(a, ids[threadIdx.x], threadIdx.x);
		return;
	}
	if constexpr (THREADS >= ALIGN_PAIRS) {
		constexpr int WAYS = THREADS / ALIGN_PAIRS < 4 ? THREADS / ALIGN_PAIRS : 4;

		if (places <= ALIGN_PAIRS) {
			align_finish<THREADS>(a, s, align_pairs<WAYS>(a, ids, s, staged), staged);
		} else {
			int e[PER];

#pragma unroll
			for (int k = 0; k < PER; k++)
				e[k] = THREADS * k + threadIdx.x < places ? ids[THREADS * k + threadIdx.x] : -1;
			align_finish<THREADS>(a, s, align_words<THREADS, PER>(a, e, s, staged), staged);
		}
	}
}

#endif
