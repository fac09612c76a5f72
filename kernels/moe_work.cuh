/*
 * The int4 experts' launch, divided: what its roles share, the places sorted by expert, and which block has
 * which items. moe_int4.cu has the essay.
 */
#ifndef KK_MOE_WORK_CUH
#define KK_MOE_WORK_CUH

#include <cuda_bf16.h>

#include "moe.h"
#include "ptx.cuh"
#include "tensor_map.cuh"

enum {
	MAX_STAGES = 16,
	MAX_X_STAGES = 4,
	MAX_TILE = 64,
	INSIDE_PLACES = 256,
	DIRECT_PLACES = 64,
	DIRECT_VALUES = 16384,     /* of all places' activations, in the decode form */
	WARP_PLACES = 32,
	RECORD_COLS = 128,
	RECORD_CODES = 1024,
	MAX_BLOCKS = 255,          /* of a grid: the counters' rounds are of 256 */
	PAD = 16,
	BAR_SUMS = 1, BAR_ALL = 2, /* numbers of the multiplying warps' barriers */
	SYNC_STRIDE = 16,          /* words between two counters */
	DIRECT_LAUNCHES = 3 * SYNC_STRIDE, /* in words of `sync`: counts launches of the decode form */
	DOWN_AHEAD = 2,            /* stages on their way, from the decode form's down projection on */
};

/* Fixed part of shared memory: libcore/device/moe_plan.c allows it 12 kB. */
struct stream_smem {
	uint64_t full[MAX_STAGES], empty[MAX_STAGES], x_full[MAX_X_STAGES], x_empty[MAX_X_STAGES];
	uint64_t bias; /* moe_front.cuh's */
	int rows[MAX_X_STAGES];                /* places of the tile in this stage */
	int2 item[MAX_X_STAGES];               /* tile of places, tile of rows */
	int places[MAX_X_STAGES][MAX_TILE];    /* which */
	__align__(16) int ids[INSIDE_PLACES];  /* -1: adds nothing; this and what follows is read by fours */
	int order[INSIDE_PLACES];              /* places by tile */
	int position[INSIDE_PLACES];           /* of a place in `order`, or -1 */
	int tile_expert[INSIDE_PLACES], tile_first[INSIDE_PLACES], tile_rows[INSIDE_PLACES];
	int lead_tiles[INSIDE_PLACES], lead_places[INSIDE_PLACES];
	float weights[DIRECT_PLACES];
	__align__(16) uint32_t minus[4];       /* -8 in rows g and g + 8's units (widen), as an A operand */
	int tiles, places_here;
	int round_down;                        /* thread 0's own: not worth a register from start to end */
};
static_assert(sizeof(stream_smem) <= 12 * 1024, "the plan's allowance");

/* Numbers of a launch that all roles share. */
struct stream_work {
	int tiles;                 /* tiles of places, all experts */
	int up_records, down_records; /* of a row block: hidden / 128, intermediate / 128 */
	uint32_t record_bytes;
	int up_items, up_lo, up_hi;     /* a tile of places by a tile of rows, this block's range */
	int down_items, down_lo, down_hi;
	uint32_t stage0, x0, sums;      /* shared addresses */
	uint32_t stage_bytes, x_stage_bytes;
	int stages, x_stages, x_rows;
	int group_shift;                /* log2(group / 32) */
	int down_few, down_odd;         /* decode form: down items of a block; blocks that have one more */
	float per_block, per_odd, per_most; /* inverses: of the blocks, of down_odd, of a tile's most places */
};

/* n / by, from 1 / by, for n up to 2^20: some 100 cycles sooner. */
__device__ __forceinline__ int small_quotient(int n, float inverse)
{
	return (int)(((float)n + 0.5f) * inverse);
}

/* The weights, [expert][row block][record][8 bytes]; a box is a stage. */
struct stream_maps {
	CUtensorMap gate_up, down;
};

/* One thread, before it waits for anything: what the first boxes need is not of the predecessor's. */
__device__ __forceinline__ void prefetch_maps(const stream_maps &maps)
{
	ptx_prefetch_map(&maps.gate_up);
	ptx_prefetch_map(&maps.down);
}

template <int T_, int RB_, int WR_, int W_, int REC_>
struct tile {
	static constexpr int T = T_;       /* places */
	static constexpr int RB = RB_;     /* 16-row blocks of a warp */
	static constexpr int W = W_;       /* warps that multiply; one more fetches weights, one activations */
	static constexpr int WR = WR_;     /* of them, along the rows of gate-and-up */
	static constexpr int WK = W_ / WR_; /* along its columns */
	static constexpr int REC = REC_;   /* records of a row block that a warp has in one stage */
	static constexpr int NT = T_ / 8;
	static constexpr int ROWS = 16 * RB_ * WR_, DOWN_ROWS = 16 * RB_ * W_;
	static constexpr int PER = REC_ * WK; /* records of a row block in one stage */
	static constexpr int THREADS = 32 * (W_ + 2);
	static constexpr bool BIASED = T_ == 8; /* weights stay 8 too large; a product makes up for it */
	/* What the sums of rows g and g + 8 must yet be multiplied by: `widen`. */
	static constexpr float UNIT = BIASED ? 0x1p69f : 64.0f, UNIT_8 = BIASED ? 0x1p65f : 64.0f;
	static constexpr int UP_PITCH = PER * RECORD_COLS * 2 + PAD;
	static constexpr int DOWN_PITCH = REC_ * RECORD_COLS * 2 + PAD;
};

/* Which stage comes next, and the parity of its barrier. */
struct ring {
	int at, parity, size;

	__device__ void next()
	{
		if (++at == size)
			at = 0, parity ^= 1;
	}

	/* The stage `back` before, up to `size`; a barrier that never was asked for is over. */
	__device__ ring before(int back) const
	{
		return at < back ? ring{at - back + size, parity ^ 1, size} : ring{at - back, parity, size};
	}
};

__device__ __forceinline__ uint32_t barrier_of(const uint64_t *first, int i)
{
	return ptx_shared_address(first + i);
}

__device__ __forceinline__ float silu(float v)
{
	return v * ptx_rcp(1.0f + ptx_ex2(-1.4426950408889634f * v));
}

/* ---- Sorting the places by expert, by the whole block, when there are few. ---- */

__device__ __forceinline__ int4 four(const int *p)
{
	return *(const int4 *)p;
}

/* How many of the first `quads` * 4 of `ids` are e; how many of them before t; the first of them. */
struct same_ids {
	int count, before, lead;
};

__device__ __forceinline__ same_ids find_same(const int *ids, int quads, int t, int e)
{
	same_ids s = {0, 0, INSIDE_PLACES};

	for (int q = 0; q < quads; q++) {
		int4 o = four(ids + 4 * q);
		int hit[4] = {o.x == e, o.y == e, o.z == e, o.w == e};

#pragma unroll
		for (int i = 0; i < 4; i++) {
			s.count += hit[i];
			s.before += hit[i] && 4 * q + i < t;
			s.lead = hit[i] ? min(s.lead, 4 * q + i) : s.lead;
		}
	}
	return s;
}

/* Tiles come in the order in which their experts are first named, `most` places each. */
__device__ inline void sort_inside(const kk_moe_args &a, stream_smem *s, int most)
{
	int t = threadIdx.x, places = a.tokens * a.top_k, quads = (places + 3) / 4, e = -1;
	same_ids same = {};
	int tiles_before = 0, places_before = 0, tiles = 0, here = 0;

	if (t < 4 * quads) {
		if (t < places) {
			float weight = __ldcg(a.weights + t);

			e = __ldcg(a.ids + t);
			if (e < 0 || e >= a.experts || weight == 0.0f)
				e = -1;
			if (t < DIRECT_PLACES)
				s->weights[t] = weight;
		}
		s->ids[t] = e;
	}
	__syncthreads(); /* the ids are here; the block's barriers are ready */
	if (t < 4 * quads) {
		bool lead;

		same = find_same(s->ids, quads, t, e);
		lead = e >= 0 && same.before == 0;
		s->lead_tiles[t] = lead ? (same.count + most - 1) / most : 0;
		s->lead_places[t] = lead ? same.count : 0;
		s->position[t] = -1;
	}
	__syncthreads(); /* each run's length is at its first place */
	if (t < 4 * quads) {
		for (int q = 0; q < quads; q++) {
			int4 n = four(s->lead_tiles + 4 * q), m = four(s->lead_places + 4 * q);
			int nn[4] = {n.x, n.y, n.z, n.w}, mm[4] = {m.x, m.y, m.z, m.w};

#pragma unroll
			for (int i = 0; i < 4; i++) {
				tiles += nn[i];
				here += mm[i];
				tiles_before += 4 * q + i < same.lead ? nn[i] : 0;
				places_before += 4 * q + i < same.lead ? mm[i] : 0;
			}
		}
		if (e >= 0) {
			int at = places_before + same.before;

			s->order[at] = t;
			s->position[t] = at;
			if (same.before % most == 0) {
				int tile = tiles_before + same.before / most;

				s->tile_expert[tile] = e;
				s->tile_first[tile] = at;
				s->tile_rows[tile] = min(most, same.count - same.before);
			}
		}
		if (t == 0)
			s->tiles = tiles, s->places_here = here;
	}
	__syncthreads(); /* the tiles are known to all */
}

/* Up to 32 places: one warp sorts them, for a barrier that the caller has. `selected`: s has ids and weights. */
__device__ inline void sort_by_warp(const kk_moe_args &a, stream_smem *s, int most, float per_most, bool selected)
{
	int lane = threadIdx.x % 32, places = a.tokens * a.top_k, e = -1, packed, sum;
	unsigned same, below = (1u << lane) - 1;
	int count, before, lead, tile, at, row;

	if (lane < places) {
		float weight = selected ? s->weights[lane] : __ldcg(a.weights + lane);

		e = selected ? s->ids[lane] : __ldcg(a.ids + lane);
		if (e < 0 || e >= a.experts || weight == 0.0f)
			e = -1;
		if (!selected)
			s->weights[lane] = weight;
	}
	same = __match_any_sync(0xffffffffu, e);
	count = __popc(same), before = __popc(same & below), lead = __ffs(same) - 1;
	packed = e >= 0 && before == 0 ? small_quotient(count + most - 1, per_most) << 16 | count : 0;
	sum = packed;
#pragma unroll
	for (int i = 1; i < 32; i *= 2) {
		int v = __shfl_up_sync(0xffffffffu, sum, i);

		sum += lane >= i ? v : 0;
	}
	at = __shfl_sync(0xffffffffu, sum - packed, lead);
	sum = __shfl_sync(0xffffffffu, sum, 31);
	row = before - small_quotient(before, per_most) * most;
	tile = (at >> 16) + small_quotient(before, per_most);
	at = (at & 0xffff) + before;
	if (lane < places)
		s->position[lane] = e >= 0 ? at : -1;
	if (e >= 0) {
		s->order[at] = lane;
		if (row == 0) {
			s->tile_expert[tile] = e;
			s->tile_first[tile] = at;
			s->tile_rows[tile] = min(most, count - before);
		}
	}
	if (lane == 0)
		s->tiles = sum >> 16, s->places_here = sum & 0xffff;
}

/* ---- Items. ---- */

struct item {
	int tile, rows;   /* the tile of places, and of rows */
	int first, tiles; /* of the tiles of places that pass over the rows together */
};

/* group_m tiles of places pass over the rows together. */
__device__ __forceinline__ item find_item(int i, int tiles, int row_tiles, int group_m)
{
	int group = i / (group_m * row_tiles), first = group * group_m, r = i - group * group_m * row_tiles;
	int n = max(1, min(group_m, tiles - first)); /* no tiles, no item: nobody asks further */

	return {first + r % n, r / n, first, n};
}

/* The one after it, without its divisions. */
__device__ __forceinline__ void next_item(item &it, int tiles, int row_tiles, int group_m)
{
	if (++it.tile < it.first + it.tiles)
		return;
	it.tile = it.first;
	if (++it.rows < row_tiles)
		return;
	it.rows = 0;
	it.tile = it.first += it.tiles;
	it.tiles = min(group_m, tiles - it.first);
}

__device__ __forceinline__ int expert_of(const kk_moe_args &a, const stream_smem *s, int tile)
{
	return a.inside ? s->tile_expert[tile] : __ldcg(a.block_expert + tile);
}

/* Block `block`'s part of `items`, as equal as can be. */
__device__ __forceinline__ int part_of(int items, int block)
{
	return (int)((unsigned)block * (unsigned)items / gridDim.x);
}

/*
 * The decode form's down items are few and large: a block with one more of them (the odd ones) takes as
 * many fewer gate-and-up items as the others, who take no more than equal parts would, can hold.
 */
__device__ __forceinline__ void divide_direct(stream_work &w, int block)
{
	int grid = gridDim.x, even = grid - w.down_odd;
	int most = small_quotient(w.up_items + grid - 1, w.per_block), left = w.up_items - even * most;
	int least = w.down_odd && left > 0 ? small_quotient(left + w.down_odd - 1, w.per_odd) : 0;
	int odd_before = w.down_lo - block * w.down_few, odd_after = w.down_hi - (block + 1) * w.down_few;

	w.up_lo = min(odd_before * least + (block - odd_before) * most, w.up_items);
	w.up_hi = min(odd_after * least + (block + 1 - odd_after) * most, w.up_items);
}

/* Where a block's down items begin, when those before it have had `ups` records of gate-and-up. Two
 * blocks compute one border: no contraction, so that they agree. */
__device__ __forceinline__ int down_border(double share, int block, double ups, double down)
{
	return (int)__ddiv_rn(__dsub_rn(__dmul_rn(share, block), ups), down);
}

/* Down items make up for what gate-and-up items, `up` records each, leave uneven. */
__device__ __forceinline__ void divide_down(stream_work &w, int block, int up, int down)
{
	double ups = (double)up * w.up_items, downs = (double)down * w.down_items;
	double share = (ups + downs) / gridDim.x;

	if ((double)up * gridDim.x > downs)
		return;
	w.down_lo = down_border(share, block, (double)up * w.up_lo, down);
	w.down_hi = block == (int)gridDim.x - 1
	                    ? w.down_items
	                    : down_border(share, block + 1, (double)up * w.up_hi, down);
}

/* What of the division needs no routing, so that it does not wait for it. */
template <typename L, bool DIRECT>
__device__ __forceinline__ void begin_division(const kk_moe_args &a, stream_work &w)
{
	w.per_most = ptx_rcp((float)min(a.tokens, L::T));
	if (!DIRECT)
		return;
	w.down_items = a.hidden / 16;
	w.down_lo = part_of(w.down_items, blockIdx.x);
	w.down_hi = part_of(w.down_items, blockIdx.x + 1);
	w.down_few = w.down_items / gridDim.x;
	w.down_odd = w.down_items - w.down_few * gridDim.x;
	w.per_block = ptx_rcp((float)gridDim.x);
	w.per_odd = ptx_rcp((float)w.down_odd);
}

/* How many elements of y the decode form sums in this block, and number o of them. */
__device__ __forceinline__ int direct_values(const kk_moe_args &a, const stream_work &w)
{
	return (w.down_hi - w.down_lo) * a.tokens * 16;
}

struct direct_place {
	int row, block, token;
	size_t at; /* of y */
};

__device__ __forceinline__ direct_place place_of(const kk_moe_args &a, const stream_work &w, int o)
{
	int blocks = w.down_hi - w.down_lo;
	direct_place p = {o % 16, o / 16 % blocks, o / 16 / blocks, 0};

	p.at = (size_t)p.token * a.hidden + (w.down_lo + p.block) * 16 + p.row;
	return p;
}

template <typename L, bool DIRECT>
__device__ __forceinline__ void divide(const kk_moe_args &a, stream_work &w)
{
	int block = blockIdx.x;

	w.up_items = w.tiles * (2 * a.intermediate / L::ROWS);
	if (DIRECT) {
		divide_direct(w, block);
		return;
	}
	w.down_items = w.tiles * (a.hidden / L::DOWN_ROWS);
	w.down_lo = part_of(w.down_items, block);
	w.down_hi = part_of(w.down_items, block + 1);
	w.up_lo = part_of(w.up_items, block);
	w.up_hi = part_of(w.up_items, block + 1);
	divide_down(w, block, L::ROWS / 16 * w.up_records, L::DOWN_ROWS / 16 * w.down_records);
}

/* ---- y. ---- */

/* What a sum is added to. */
__device__ __forceinline__ float load_y(const kk_moe_args &a, size_t at)
{
	if (!a.accumulate)
		return 0.0f;
	return a.y_bf16 ? __bfloat162float(((const __nv_bfloat16 *)a.y)[at]) : ((const float *)a.y)[at];
}

__device__ __forceinline__ void store_y(const kk_moe_args &a, size_t at, float before, float sum)
{
	float v = a.scale * sum;

	v = a.accumulate ? before + v : v;
	if (a.y_bf16)
		((__nv_bfloat16 *)a.y)[at] = __float2bfloat16(v);
	else
		((float *)a.y)[at] = v;
}

__device__ __forceinline__ void add_y(const kk_moe_args &a, size_t at, float sum)
{
	store_y(a, at, load_y(a, at), sum);
}

#endif
