/*
 * The streaming kernel of the int4 experts: from routed ids to the summed output in one launch.
 * moe_int4.cu has the essay; moe_int4_large.cu the tiles of many tokens.
 */
#ifndef KK_MOE_INT4_CUH
#define KK_MOE_INT4_CUH

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
	WARP_PLACES = 32,
	RECORD_COLS = 128,
	RECORD_CODES = 1024,
	MAX_BLOCKS = 255,          /* of a grid: the counters' rounds are of 256 */
	PAD = 16,
	BAR_SUMS = 1, BAR_ALL = 2, /* numbers of the multiplying warps' barriers */
	SYNC_STRIDE = 16,          /* words between two counters */
};

/* Fixed part of shared memory: libcore/device/moe_plan.c allows it 12 kB. */
struct stream_smem {
	uint64_t full[MAX_STAGES], empty[MAX_STAGES], x_full[MAX_X_STAGES], x_empty[MAX_X_STAGES];
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

/* Up to 32 places: one warp sorts them, for a barrier that the caller has. */
__device__ inline void sort_by_warp(const kk_moe_args &a, stream_smem *s, int most, float per_most)
{
	int lane = threadIdx.x % 32, places = a.tokens * a.top_k, e = -1, packed, sum;
	unsigned same, below = (1u << lane) - 1;
	int count, before, lead, tile, at, row;

	if (lane < places) {
		float weight = __ldcg(a.weights + lane);

		e = __ldcg(a.ids + lane);
		if (e < 0 || e >= a.experts || weight == 0.0f)
			e = -1;
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
template <typename L>
__device__ __forceinline__ void begin_division(const kk_moe_args &a, stream_work &w)
{
	w.per_most = ptx_rcp((float)min(a.tokens, L::T));
	if (!a.direct)
		return;
	w.down_items = a.hidden / 16;
	w.down_lo = part_of(w.down_items, blockIdx.x);
	w.down_hi = part_of(w.down_items, blockIdx.x + 1);
	w.down_few = w.down_items / gridDim.x;
	w.down_odd = w.down_items - w.down_few * gridDim.x;
	w.per_block = ptx_rcp((float)gridDim.x);
	w.per_odd = ptx_rcp((float)w.down_odd);
}

template <typename L>
__device__ __forceinline__ void divide(const kk_moe_args &a, stream_work &w)
{
	int block = blockIdx.x;

	w.up_items = w.tiles * (2 * a.intermediate / L::ROWS);
	if (a.direct) {
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

/* ---- The warp that fetches weights. ---- */

struct weight_fetch {
	ring r;
	uint64_t policy;
	int tile, expert; /* the last asked for: items of one tile follow each other, and L2 is far */
};

__device__ __forceinline__ int cached_expert(const kk_moe_args &a, const stream_smem *s, weight_fetch &f, int tile)
{
	if (tile != f.tile) {
		f.expert = expert_of(a, s, tile);
		f.tile = tile;
	}
	return f.expert;
}

/* One stage: `pieces` copies of `bytes`, lane i's from `from` (NULL: none) to piece i. */
__device__ __forceinline__ void fetch_stage(const stream_work &w, stream_smem *s, weight_fetch &f, int pieces,
                                            uint32_t pitch, uint32_t bytes, const uint8_t *from)
{
	int lane = threadIdx.x % 32;
	uint32_t full = barrier_of(s->full, f.r.at);

	ptx_mbarrier_wait(barrier_of(s->empty, f.r.at), f.r.parity ^ 1);
	if (lane == 0)
		ptx_mbarrier_expect(full, pieces * bytes);
	__syncwarp();
	if (from)
		ptx_copy_bulk_policy(w.stage0 + f.r.at * w.stage_bytes + lane * pitch, from, bytes, full,
		                     f.policy);
	f.r.next();
}

/* One stage as one box, of `records` records in all, which begins at that record of that row block. */
__device__ __forceinline__ void fetch_box(const stream_work &w, stream_smem *s, weight_fetch &f,
                                          const CUtensorMap *map, int records, int record, int block, int expert)
{
	uint32_t full = barrier_of(s->full, f.r.at);

	if (threadIdx.x % 32 == 0) {
		ptx_mbarrier_wait(barrier_of(s->empty, f.r.at), f.r.parity ^ 1);
		ptx_mbarrier_expect(full, records * w.record_bytes);
		ptx_copy_box(w.stage0 + f.r.at * w.stage_bytes, map, make_int4(0, record, block, expert), full,
		             f.policy);
	}
	f.r.next();
}

template <typename L>
__device__ __forceinline__ void fetch_weights(const kk_moe_args &a, const stream_maps &maps, const stream_work &w,
                                              stream_smem *s)
{
	int lane = threadIdx.x % 32;
	weight_fetch f = {{0, 0, w.stages}, ptx_policy_drop(), -1, 0};
	constexpr int UP_PIECES = L::ROWS / 16, DOWN_PIECES = L::DOWN_ROWS / 16;
	uint32_t rec = w.record_bytes;
	int row_tiles = 2 * a.intermediate / L::ROWS;
	item it = find_item(w.up_lo, w.tiles, row_tiles, a.group_m);

	for (int i = w.up_lo; i < w.up_hi; i++, next_item(it, w.tiles, row_tiles, a.group_m)) {
		int expert = cached_expert(a, s, f, it.tile);

		for (int c = 0; c < w.up_records; c += L::PER)
			fetch_box(w, s, f, &maps.gate_up, UP_PIECES * L::PER, c, it.rows * UP_PIECES, expert);
	}
	if (!a.direct) {
		row_tiles = a.hidden / L::DOWN_ROWS;
		it = find_item(w.down_lo, w.tiles, row_tiles, a.group_m);
		for (int i = w.down_lo; i < w.down_hi; i++, next_item(it, w.tiles, row_tiles, a.group_m)) {
			int expert = cached_expert(a, s, f, it.tile);

			for (int c = 0; c < w.down_records; c += L::REC)
				fetch_box(w, s, f, &maps.down, DOWN_PIECES * L::REC, c, it.rows * DOWN_PIECES,
				          expert);
		}
		return;
	}
	__syncwarp(); /* the other lanes have waited for nothing yet */
	/* A warp's unit is a row block of a tile's expert, with all of the warp's room in a stage. */
	constexpr int REC = L::RB * L::REC;
	int units = (w.down_hi - w.down_lo) * w.tiles;

	for (int u = 0; u < units; u += L::W) {
		int pieces = min(L::W, units - u);
		const uint8_t *from = NULL;

		if (lane < pieces)
			from = a.down + (size_t)expert_of(a, s, (u + lane) % w.tiles) * a.down_stride +
			       (size_t)(w.down_lo + (u + lane) / w.tiles) * w.down_records * rec;
		for (int c = 0; c < w.down_records; c += REC)
			fetch_stage(w, s, f, pieces, REC * rec, min(REC, w.down_records - c) * rec,
			            from ? from + (size_t)c * rec : NULL);
	}
}

/* ---- The warp that fetches activations. ---- */

/* This lane's rows of a tile: rows lane, lane + 32, ... */
template <typename L>
struct own_places {
	static constexpr int N = (L::T + 31) / 32;
	int place[N], row[N], count; /* row: of x, its token's */
};

template <typename L>
__device__ __forceinline__ own_places<L> find_places(const kk_moe_args &a, const stream_smem *s, int tile)
{
	int lane = threadIdx.x % 32, all = a.tokens * a.top_k;
	own_places<L> own;

	own.count = 0;
#pragma unroll
	for (int i = 0; i < own_places<L>::N; i++) {
		int row = lane + 32 * i;

		if (a.inside)
			own.place[i] = row < s->tile_rows[tile] ? s->order[s->tile_first[tile] + row] : all;
		else
			own.place[i] = row < L::T ? __ldcg(a.sorted + (size_t)tile * L::T + row) : all;
		own.row[i] = own.place[i] / a.top_k;
		own.count += __popc(__ballot_sync(0xffffffffu, own.place[i] < all));
	}
	return own;
}

/* One stage: `bytes` of each row, from `from` + index * row_bytes + at. */
template <typename L, bool TOKENS>
__device__ __forceinline__ void fetch_rows(const kk_moe_args &a, const stream_work &w, stream_smem *s, ring &r,
                                           const own_places<L> &own, const item &it, const char *from, size_t row_bytes,
                                           uint32_t bytes, uint32_t pitch)
{
	int lane = threadIdx.x % 32, all = a.tokens * a.top_k;
	uint32_t full = barrier_of(s->x_full, r.at);

	ptx_mbarrier_wait(barrier_of(s->x_empty, r.at), r.parity ^ 1);
#pragma unroll
	for (int i = 0; i < own_places<L>::N; i++)
		if (lane + 32 * i < L::T)
			s->places[r.at][lane + 32 * i] = own.place[i];
	if (lane == 0)
		s->rows[r.at] = own.count, s->item[r.at] = make_int2(it.tile, it.rows);
	__syncwarp(); /* lane 0's arrival publishes what the warp wrote */
	if (lane == 0)
		ptx_mbarrier_expect(full, own.count * bytes);
	__syncwarp();
#pragma unroll
	for (int i = 0; i < own_places<L>::N; i++)
		if (own.place[i] < all)
			ptx_copy_bulk(w.x0 + r.at * w.x_stage_bytes + (lane + 32 * i) * pitch,
			              from + (size_t)(TOKENS ? own.row[i] : own.place[i]) * row_bytes,
			              bytes, full);
	r.next();
}

/*
 * A counter of arrivals: every launch adds 256, one for each block but the first, which adds the rest;
 * the round a block is in is what it read before it arrived, without the last eight bits.
 */
__device__ __forceinline__ int round_of(const int32_t *counter)
{
	return __ldcg(counter) & ~255;
}

__device__ __forceinline__ void arrive_round(int32_t *counter)
{
	ptx_add_release(counter, blockIdx.x ? 1 : 257 - (int)gridDim.x);
}

__device__ __forceinline__ void wait_round(const int32_t *counter, int round)
{
	while ((ptx_load_acquire(counter) & ~255) == round)
		;
}

/*
 * A tile of places whose silu(gate) * up is complete: each warp that stores a part of it counts one. The
 * down items of a block are mostly of tiles that it has worked on itself, so the grid need not gather.
 */
__device__ __forceinline__ void finish_part(const kk_moe_args &a, int tile)
{
	__syncwarp(); /* the warp's stores, before lane 0 counts them */
	if (a.ready && threadIdx.x % 32 == 0)
		ptx_add_release(a.ready + tile, 1);
}

/* One warp; `parts`: of a tile. Too many tiles to count: all blocks' arrivals instead. */
__device__ __forceinline__ void wait_tile(const kk_moe_args &a, int tile, int parts, int round)
{
	if (threadIdx.x % 32 == 0) {
		if (a.ready)
			while (ptx_load_acquire(a.ready + tile) < parts)
				;
		else
			wait_round(a.sync, round);
	}
	__syncwarp(); /* what lane 0 has seen */
}

/* For the next launch, after every block has passed its last wait_tile. */
__device__ __forceinline__ void clear_ready(const kk_moe_args &a, int tiles, int threads)
{
	for (int i = blockIdx.x * threads + threadIdx.x; a.ready && i < tiles; i += gridDim.x * threads)
		a.ready[i] = 0;
}

template <typename L>
__device__ __forceinline__ void fetch_activations(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                                  int round)
{
	ring r = {0, 0, w.x_stages};
	own_places<L> own;
	int tile = -1, row_tiles = 2 * a.intermediate / L::ROWS;
	item it = find_item(w.up_lo, w.tiles, row_tiles, a.group_m);

	for (int i = w.up_lo; i < w.up_hi; i++, next_item(it, w.tiles, row_tiles, a.group_m)) {
		if (it.tile != tile)
			own = find_places<L>(a, s, it.tile);
		tile = it.tile;
		for (int c = 0; c < w.up_records; c += L::PER)
			fetch_rows<L, true>(a, w, s, r, own, it, (const char *)a.x + (size_t)c * RECORD_COLS * 2,
			                    (size_t)a.hidden * 2, min(L::PER, w.up_records - c) * RECORD_COLS * 2,
			                    L::UP_PITCH);
	}
	if (a.direct)
		return;
	tile = -1;
	row_tiles = a.hidden / L::DOWN_ROWS;
	it = find_item(w.down_lo, w.tiles, row_tiles, a.group_m);
	for (int i = w.down_lo; i < w.down_hi; i++, next_item(it, w.tiles, row_tiles, a.group_m)) {
		if (it.tile != tile) {
			own = find_places<L>(a, s, it.tile);
			wait_tile(a, it.tile, 2 * a.intermediate / L::ROWS * L::WR, round);
			ptx_fence_copies(); /* others' ordinary stores, before this warp's copies of them */
		}
		tile = it.tile;
		for (int c = 0; c < w.down_records; c += L::REC)
			fetch_rows<L, false>(a, w, s, r, own, it, (const char *)a.act + (size_t)c * RECORD_COLS * 2,
			                     (size_t)a.intermediate * 2,
			                     min(L::REC, w.down_records - c) * RECORD_COLS * 2,
			                     L::DOWN_PITCH);
	}
}

/* ---- The warps that multiply. ---- */

__device__ __forceinline__ uint32_t bf16x2_mul(uint32_t v, uint32_t factor)
{
	__nv_bfloat162 b = __hmul2(*(__nv_bfloat162 *)&v, *(__nv_bfloat162 *)&factor);

	return *(uint32_t *)&b;
}

__device__ __forceinline__ uint32_t bf16x2_fma(uint32_t v, uint32_t factor, uint32_t more)
{
	__nv_bfloat162 b = __hfma2(*(__nv_bfloat162 *)&v, *(__nv_bfloat162 *)&factor, *(__nv_bfloat162 *)&more);

	return *(uint32_t *)&b;
}

/*
 * A step's A operand from its word, exactly. A code's four bits, alone in the lowest eight of a bf16, are a
 * subnormal number: code * 2^-133 in row g, and, four bits higher, code * 2^-129 in row g + 8 (bit 7, of the
 * exponent, still counts 128 times the lowest). Biased, that is the operand: the activations are 2^64 times
 * themselves, so that no product is subnormal, and 8 is taken away from all codes at once (sum_bias).
 * Else a multiply-add makes both (code - 8) / 64. Masks and shifts run at half the rate of all else: what
 * they are spared is what counts.
 */
template <bool BIASED>
__device__ __forceinline__ void widen(uint32_t (&d)[4], uint32_t codes)
{
	constexpr uint32_t P127 = 0x7f007f00u, P123 = 0x7d007d00u, EIGHTH = 0xbe00be00u;

#pragma unroll
	for (int i = 0; i < 2; i++) {
		uint32_t c = codes >> 8 * i, low = c & 0x000f000fu, high = c & 0x00f000f0u;

		d[2 * i] = BIASED ? low : bf16x2_fma(low, P127, EIGHTH);
		d[2 * i + 1] = BIASED ? high : bf16x2_fma(high, P123, EIGHTH);
	}
}

/* 32 columns of a row block: two steps, and the two rows' scales. */
struct steps {
	uint32_t a[2][4];
	float low, high;
};

template <bool BIASED>
__device__ __forceinline__ void load_steps(steps &d, uint32_t first, uint32_t second, uint32_t scales)
{
	widen<BIASED>(d.a[0], first);
	widen<BIASED>(d.a[1], second);
	d.low = __uint_as_float(scales << 16);
	d.high = __uint_as_float(scales & 0xffff0000u);
}

/* The scales multiply sums of 32 columns, in f32: the weights are never rounded. */
template <bool BIASED>
__device__ __forceinline__ void add_steps(float (&sum)[4], const steps &s, const uint32_t (&b)[4],
                                          const float (&bias)[4])
{
	float d[4];

	if (BIASED)
		ptx_mma_bf16_from(d, s.a[0][0], s.a[0][1], s.a[0][2], s.a[0][3], b[0], b[1], bias);
	else
		ptx_mma_bf16_first(d, s.a[0][0], s.a[0][1], s.a[0][2], s.a[0][3], b[0], b[1]);
	ptx_mma_bf16(d, s.a[1][0], s.a[1][1], s.a[1][2], s.a[1][3], b[2], b[3]);
	sum[0] = fmaf(s.low, d[0], sum[0]), sum[1] = fmaf(s.low, d[1], sum[1]);
	sum[2] = fmaf(s.high, d[2], sum[2]), sum[3] = fmaf(s.high, d[3], sum[3]);
}

constexpr uint32_t TWICE_2_64 = 0x5f805f80u; /* in bf16, as MINUS_LOW and MINUS_HIGH: -8 * 2^-133, -8 * 2^-129 */
constexpr uint32_t MINUS_LOW = 0x80088008u, MINUS_HIGH = 0x80808080u;

/* -8 times the sum of 32 columns of the activations, in every row, in the row's unit. */
__device__ __forceinline__ void sum_bias(float (&d)[4], const uint32_t (&minus)[4], const uint32_t (&b)[4])
{
	ptx_mma_bf16_first(d, minus[0], minus[1], minus[2], minus[3], b[0], b[1]);
	ptx_mma_bf16(d, minus[0], minus[1], minus[2], minus[3], b[2], b[3]);
}

/* Shared addresses of this lane's rows of activations, as ptx_load_matrices wants them. */
template <typename L>
struct x_rows {
	static constexpr int N = L::T <= 16 ? L::NT : 1;
	uint32_t offset[N];
	uint32_t pitch8; /* eight rows further */
};

/* Rows beyond the tile's, whose results nobody reads, are the last again. */
template <typename L>
__device__ __forceinline__ x_rows<L> lane_rows(int rows, uint32_t pitch)
{
	int lane = threadIdx.x % 32;
	x_rows<L> x;

	x.pitch8 = 8 * pitch;
#pragma unroll
	for (int n = 0; n < x_rows<L>::N; n++)
		x.offset[n] = min(n * 8 + lane % 8, rows - 1) * pitch + lane / 8 * 16;
	ptx_hold(x.offset[0]);
	return x;
}

template <typename L>
__device__ __forceinline__ uint32_t x_offset(const x_rows<L> &x, int n)
{
	return L::T <= 16 ? x.offset[n < x_rows<L>::N ? n : 0] : x.offset[0] + n * x.pitch8;
}

template <typename L>
using tile_sums = float[L::RB][L::NT][4];

/*
 * What every record needs of a lane, held in registers: left to itself, the compiler makes it anew for
 * each, in chains that wait for themselves.
 */
struct lane_parts {
	uint32_t codes;               /* where its words of a record's first half are; the second's: 512 further */
	uint32_t scale[2], next_half; /* its rows' scales of the first and second 32 columns of a half */
	uint32_t minus[4];            /* -8 in each row's unit, as an A operand */
};

__device__ __forceinline__ lane_parts lane_records(int lane, int group_shift, uint32_t at_minus)
{
	lane_parts p;
	uint4 minus;

	p.codes = lane * 16;
	p.next_half = 8 >> group_shift & 12;
	p.scale[0] = RECORD_CODES + (lane / 4 << (4 - group_shift));
	p.scale[1] = p.scale[0] + (group_shift ? 0 : 4);
	ptx_hold(p.codes);
	ptx_hold(p.next_half);
#pragma unroll
	for (int k = 0; k < 2; k++)
		ptx_hold(p.scale[k]);
	minus = ptx_load_shared(at_minus);
	p.minus[0] = minus.x, p.minus[1] = minus.y, p.minus[2] = minus.z, p.minus[3] = minus.w;
	return p;
}

/* One record of each of the warp's row blocks, `block_pitch` apart, times 128 columns of `rows` places. */
template <typename L>
__device__ __forceinline__ void multiply_record(tile_sums<L> &sum, const lane_parts &p, uint32_t record,
                                                uint32_t block_pitch, uint32_t x, const x_rows<L> &own, int rows)
{
	uint32_t codes = record + p.codes;

#pragma unroll(L::T * L::RB > 8 ? 1 : 2) /* more would spill */
	for (int half = 0; half < 2; half++) {
		uint4 q[L::RB];
		uint32_t scale[L::RB][2];

#pragma unroll
		for (int r = 0; r < L::RB; r++) {
			q[r] = ptx_load_shared(codes + r * block_pitch);
#pragma unroll
			for (int k = 0; k < 2; k++)
				scale[r][k] = ptx_load_shared_word(record + r * block_pitch + p.scale[k]);
		}
#pragma unroll
		for (int k = 0; k < 2; k++) {
			steps s[L::RB];

#pragma unroll
			for (int r = 0; r < L::RB; r++)
				load_steps<L::BIASED>(s[r], k ? q[r].z : q[r].x, k ? q[r].w : q[r].y, scale[r][k]);
#pragma unroll
			for (int n0 = 0; n0 < L::NT; n0 += 2) {
				if (n0 > 0 && n0 * 8 >= rows)
					break;
#pragma unroll
				for (int n = n0; n < n0 + 2 && n < L::NT; n++) {
					uint32_t b[4];
					float bias[4];

					ptx_load_matrices(b, x + x_offset<L>(own, n) + k * 64);
					if (L::BIASED) {
#pragma unroll
						for (int i = 0; i < 4; i++)
							b[i] = bf16x2_mul(b[i], TWICE_2_64);
						sum_bias(bias, p.minus, b);
					}
#pragma unroll
					for (int r = 0; r < L::RB; r++)
						add_steps<L::BIASED>(sum[r][n], s[r], b, bias);
				}
			}
		}
		codes += 512;
		record += p.next_half;
		x += 128;
	}
}

template <typename L>
__device__ __forceinline__ void clear(tile_sums<L> &sum)
{
#pragma unroll
	for (int r = 0; r < L::RB; r++)
#pragma unroll
		for (int n = 0; n < L::NT; n++)
#pragma unroll
			for (int i = 0; i < 4; i++)
				sum[r][n][i] = 0.0f;
}

/* The warps that share rows hand their sums to the first of them, which adds them in order. */
template <typename L>
__device__ __forceinline__ void join(tile_sums<L> &sum, float *sums, int warp_row, int warp_column)
{
	constexpr int VALUES = L::RB * L::NT * 4;
	int lane = threadIdx.x % 32;

	if (L::WK == 1)
		return;
	ptx_barrier_some(BAR_SUMS, 32 * L::W); /* the item before has been read */
	if (warp_column > 0) {
		float *to = sums + ((warp_column - 1) * L::WR + warp_row) * VALUES * 32 + lane;

#pragma unroll
		for (int v = 0; v < VALUES; v++)
			to[v * 32] = sum[v / (L::NT * 4)][v / 4 % L::NT][v % 4];
	}
	ptx_barrier_some(BAR_SUMS, 32 * L::W); /* this item is written */
	if (warp_column == 0)
#pragma unroll
		for (int k = 1; k < L::WK; k++) {
			const float *from = sums + ((k - 1) * L::WR + warp_row) * VALUES * 32 + lane;

#pragma unroll
			for (int v = 0; v < VALUES; v++)
				sum[v / (L::NT * 4)][v / 4 % L::NT][v % 4] += from[v * 32];
		}
}

/* act = silu(gate) * up of one item; a lane's first two sums are gate's, the others up's. */
template <typename L>
__device__ __forceinline__ void store_act(const kk_moe_args &a, const tile_sums<L> &sum, const int *places,
                                          int rows, int first)
{
	int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	__nv_bfloat16 *act = (__nv_bfloat16 *)a.act + first + g;

#pragma unroll
	for (int n = 0; n < L::NT; n++)
#pragma unroll
		for (int i = 0; i < 2; i++) {
			int row = n * 8 + 2 * t + i;

			if (row >= rows)
				continue;
#pragma unroll
			for (int r = 0; r < L::RB; r++)
				act[(size_t)places[row] * a.intermediate + r * 8] =
					__float2bfloat16(silu(L::UNIT * sum[r][n][i]) *
					                 (L::UNIT_8 * sum[r][n][2 + i]));
		}
}

template <typename L>
__device__ __forceinline__ void store_part(const kk_moe_args &a, const tile_sums<L> &sum, const int *places,
                                           int rows, int first)
{
	int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

#pragma unroll
	for (int n = 0; n < L::NT; n++) {
		if (n * 8 >= rows)
			break;
		if (a.part_bf16) {
			/* A pair of lanes swaps, so that each has two rows of one place. */
			int row = n * 8 + 2 * t + (g & 1);

#pragma unroll
			for (int r = 0; r < L::RB; r++)
#pragma unroll
				for (int h = 0; h < 2; h++) {
					float u = h ? L::UNIT_8 : L::UNIT, even = u * sum[r][n][2 * h], odd = u * sum[r][n][2 * h + 1];
					float keep = g & 1 ? odd : even;
					float got = __shfl_xor_sync(0xffffffffu, g & 1 ? even : odd, 4);
					__nv_bfloat162 v = g & 1 ? __floats2bfloat162_rn(got, keep)
					                         : __floats2bfloat162_rn(keep, got);

					if (row < rows)
						*(__nv_bfloat162 *)((__nv_bfloat16 *)a.part +
						                    (size_t)places[row] * a.hidden + first +
						                    r * 16 + h * 8 + (g & ~1)) = v;
				}
		} else {
#pragma unroll
			for (int i = 0; i < 2; i++) {
				int row = n * 8 + 2 * t + i;

				if (row >= rows)
					continue;
#pragma unroll
				for (int r = 0; r < L::RB; r++) {
					float *to = (float *)a.part + (size_t)places[row] * a.hidden + first + r * 16 + g;

					to[0] = L::UNIT * sum[r][n][i];
					to[8] = L::UNIT_8 * sum[r][n][2 + i];
				}
			}
		}
	}
}

struct rings {
	ring w, x;
};

__device__ __forceinline__ void give_stage(const uint64_t *empty, int at)
{
	__syncwarp();
	if (threadIdx.x % 32 == 0)
		ptx_mbarrier_arrive(barrier_of(empty, at));
}

template <typename L>
__device__ __forceinline__ void multiply_up(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                            const lane_parts &p, int warp, float *sums, rings &q)
{
	int warp_row = warp % L::WR, warp_column = warp / L::WR;
	uint32_t rec = w.record_bytes, first = w.stage0 + warp_row * L::RB * L::PER * rec;
	x_rows<L> own = lane_rows<L>(w.x_rows, L::UP_PITCH);

	ptx_hold(first);
	for (int i = w.up_lo; i < w.up_hi; i++) {
		tile_sums<L> sum;
		int tile = 0;

		clear<L>(sum);
		for (int c = 0; c < w.up_records; c += L::PER) {
			int n = min(L::PER, w.up_records - c);
			bool last = c + L::PER >= w.up_records;
			uint32_t stage = first + q.w.at * w.stage_bytes, x = w.x0 + q.x.at * w.x_stage_bytes;

			ptx_mbarrier_wait(barrier_of(s->full, q.w.at), q.w.parity);
			ptx_mbarrier_wait(barrier_of(s->x_full, q.x.at), q.x.parity);
			for (int k = warp_column; k < n; k += L::WK)
				multiply_record<L>(sum, p, stage + k * rec, L::PER * rec, x + k * RECORD_COLS * 2, own,
				                   L::NT > 2 ? s->rows[q.x.at] : 0);
			give_stage(s->empty, q.w.at);
			q.w.next();
			if (last) {
				join<L>(sum, sums, warp_row, warp_column);
				if (warp_column == 0)
					store_act<L>(a, sum, s->places[q.x.at], s->rows[q.x.at],
					             (s->item[q.x.at].y * L::WR + warp_row) * L::RB * 8);
				tile = s->item[q.x.at].x;
			}
			give_stage(s->x_empty, q.x.at);
			q.x.next();
		}
		if (warp_column == 0)
			finish_part(a, tile);
	}
}

template <typename L>
__device__ __forceinline__ void multiply_down(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                              const lane_parts &p, int warp, rings &q)
{
	uint32_t rec = w.record_bytes, first = w.stage0 + warp * L::RB * L::REC * rec;
	x_rows<L> own = lane_rows<L>(w.x_rows, L::DOWN_PITCH);

	ptx_hold(first);
	for (int i = w.down_lo; i < w.down_hi; i++) {
		tile_sums<L> sum;

		clear<L>(sum);
		for (int c = 0; c < w.down_records; c += L::REC) {
			int n = min(L::REC, w.down_records - c);
			uint32_t stage = first + q.w.at * w.stage_bytes, x = w.x0 + q.x.at * w.x_stage_bytes;

			ptx_mbarrier_wait(barrier_of(s->full, q.w.at), q.w.parity);
			ptx_mbarrier_wait(barrier_of(s->x_full, q.x.at), q.x.parity);
			for (int k = 0; k < n; k++)
				multiply_record<L>(sum, p, stage + k * rec, L::REC * rec, x + k * RECORD_COLS * 2, own,
				                   L::NT > 2 ? s->rows[q.x.at] : 0);
			give_stage(s->empty, q.w.at);
			q.w.next();
			if (c + L::REC >= w.down_records)
				store_part<L>(a, sum, s->places[q.x.at], s->rows[q.x.at],
				              s->item[q.x.at].y * L::DOWN_ROWS + warp * L::RB * 16);
			give_stage(s->x_empty, q.x.at);
			q.x.next();
		}
	}
}

__device__ __forceinline__ void store_y(const kk_moe_args &a, size_t at, float sum)
{
	float v = a.scale * sum;

	if (a.y_bf16) {
		__nv_bfloat16 *y = (__nv_bfloat16 *)a.y + at;

		*y = __float2bfloat16(a.accumulate ? __bfloat162float(*y) + v : v);
	} else {
		float *y = (float *)a.y + at;

		*y = a.accumulate ? *y + v : v;
	}
}

/* All places' activations, in the tiles' order, past the copy engine: they are few, and it is slower. */
template <typename L>
__device__ __forceinline__ void load_act(const kk_moe_args &a, const stream_smem *s, char *to)
{
	int row_pieces = a.intermediate / 8;

	for (int i = threadIdx.x; i < s->places_here * row_pieces; i += 32 * L::W) {
		int p = i / row_pieces, piece = i - p * row_pieces;

		*(uint4 *)(to + p * (a.intermediate * 2 + PAD) + piece * 16) =
			ptx_load_fresh((const char *)a.act + ((size_t)s->order[p] * row_pieces + piece) * 16);
	}
	ptx_barrier_some(BAR_ALL, 32 * L::W); /* they are in shared memory */
}

/*
 * Row blocks of all experts at once: a warp's unit is a row block of one tile's expert. All of this
 * block's places' rows meet in shared memory, and are summed in the order of k.
 */
template <typename L>
__device__ __forceinline__ void multiply_direct(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                                const lane_parts &p, char *base, float *sums, rings &q)
{
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
	int places = a.tokens * a.top_k, blocks = w.down_hi - w.down_lo, units = blocks * w.tiles;
	int tile = w.tiles ? warp % w.tiles : 0, block = w.tiles ? warp / w.tiles : 0;
	uint32_t rec = w.record_bytes, pitch = a.intermediate * 2 + PAD;

	load_act<L>(a, s, base + w.stages * w.stage_bytes);
	for (int u = 0; u < units; u += L::W) {
		bool mine = u + warp < units;
		int at = mine ? s->tile_first[tile] : 0, rows = mine ? s->tile_rows[tile] : 1;
		x_rows<L> own = lane_rows<L>(rows, pitch);
		tile_sums<L> sum;

		clear<L>(sum);
		for (int c = 0; c < w.down_records; c += L::REC) {
			int n = mine ? min(L::REC, w.down_records - c) : 0;
			uint32_t stage = w.stage0 + q.w.at * w.stage_bytes + warp * L::REC * rec;
			uint32_t x = w.x0 + at * pitch + c * RECORD_COLS * 2;

			ptx_mbarrier_wait(barrier_of(s->full, q.w.at), q.w.parity);
			for (int k = 0; k < n; k++)
				multiply_record<L>(sum, p, stage + k * rec, 0, x + k * RECORD_COLS * 2, own, rows);
			give_stage(s->empty, q.w.at);
			q.w.next();
		}
		if (mine)
#pragma unroll
			for (int v = 0; v < 4; v++)
				if (2 * t + v % 2 < rows)
					sums[(block * places + at + 2 * t + v % 2) * 17 + g + v / 2 * 8] =
						(v < 2 ? L::UNIT : L::UNIT_8) * sum[0][0][v];
		for (tile += L::W; tile >= w.tiles && w.tiles; tile -= w.tiles)
			block++;
	}
	ptx_barrier_some(BAR_ALL, 32 * L::W); /* every place's rows are here */
	for (int o = threadIdx.x; o < blocks * a.tokens * 16; o += 32 * L::W) {
		int row = o % 16, block = o / 16 % blocks, token = o / 16 / blocks;
		float all = 0.0f;

		for (int k = 0; k < a.top_k; k++) {
			int at = s->position[token * a.top_k + k];

			if (at >= 0)
				all = fmaf(s->weights[token * a.top_k + k], sums[(block * places + at) * 17 + row], all);
		}
		store_y(a, (size_t)token * a.hidden + (w.down_lo + block) * 16 + row, all);
	}
}

/* ---- The sum over each token's places. ---- */

/* Eight columns of a place. */
__device__ __forceinline__ void add_place(const kk_moe_args &a, size_t place, int column, float weight,
                                          float (&all)[8])
{
	uint4 u = ptx_load_fresh((const char *)a.part + (place * a.hidden + column) * (a.part_bf16 ? 2 : 4));
	uint4 v = {};

	if (!a.part_bf16)
		v = ptx_load_fresh((const char *)a.part + (place * a.hidden + column + 4) * 4);
	if (a.part_bf16) {
		uint32_t h[4] = {u.x, u.y, u.z, u.w};

#pragma unroll
		for (int i = 0; i < 4; i++) {
			all[2 * i] = fmaf(weight, __uint_as_float(h[i] << 16), all[2 * i]);
			all[2 * i + 1] = fmaf(weight, __uint_as_float(h[i] & 0xffff0000u), all[2 * i + 1]);
		}
	} else {
		uint32_t h[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};

#pragma unroll
		for (int i = 0; i < 8; i++)
			all[i] = fmaf(weight, __uint_as_float(h[i]), all[i]);
	}
}

__device__ __forceinline__ void sum_places(const kk_moe_args &a, int threads)
{
	int per = a.hidden / 8, stride = gridDim.x * threads;

	for (int o = blockIdx.x * threads + threadIdx.x; o < a.tokens * per; o += stride) {
		int token = o / per, column = o % per * 8;
		float all[8] = {};

#pragma unroll 8
		for (int k = 0; k < a.top_k; k++) {
			size_t place = (size_t)token * a.top_k + k;
			int e = __ldg(a.ids + place);
			float weight = __ldg(a.weights + place);

			if (e >= 0 && e < a.experts && weight != 0.0f)
				add_place(a, place, column, weight, all);
		}
#pragma unroll
		for (int i = 0; i < 8; i++)
			store_y(a, (size_t)token * a.hidden + column + i, all[i]);
	}
}

template <typename L>
__global__ void __launch_bounds__(L::THREADS, 1) moe_stream(const __grid_constant__ kk_moe_args a,
                                                                const __grid_constant__ stream_maps maps)
{
	extern __shared__ __align__(1024) char smem[];
	stream_smem *s = (stream_smem *)smem;
	float *sums = (float *)(smem + 12 * 1024);
	char *base = smem + 12 * 1024 + a.sums_bytes;
	int warp = threadIdx.x / 32, most = min(a.tokens, L::T), round_up;
	stream_work w;

	w.group_shift = a.group == 32 ? 0 : a.group == 64 ? 1 : 2;
	w.record_bytes = RECORD_CODES + 4096 / a.group;
	w.up_records = a.hidden / RECORD_COLS;
	w.down_records = a.intermediate / RECORD_COLS;
	w.stages = a.stages;
	w.x_stages = a.x_stages;
	w.stage_bytes = L::W * L::REC * L::RB * w.record_bytes;
	w.x_rows = L::T <= 16 ? min(a.inside ? a.tokens : a.tokens * a.top_k, L::T) : L::T;
	w.x_stage_bytes = w.x_rows * L::UP_PITCH;
	w.stage0 = ptx_shared_address(base);
	w.x0 = w.stage0 + w.stages * w.stage_bytes;
	if (threadIdx.x < 4)
		s->minus[threadIdx.x] = threadIdx.x % 2 ? MINUS_HIGH : MINUS_LOW;
	if (threadIdx.x == 0) {
		prefetch_maps(maps);
		for (int i = 0; i < w.stages; i++) {
			ptx_mbarrier_init(barrier_of(s->full, i), 1);
			ptx_mbarrier_init(barrier_of(s->empty, i), L::W);
		}
		for (int i = 0; i < w.x_stages; i++) {
			ptx_mbarrier_init(barrier_of(s->x_full, i), 1);
			ptx_mbarrier_init(barrier_of(s->x_empty, i), L::W);
		}
		ptx_mbarrier_init_done();
	}
	begin_division<L>(a, w);
	ptx_release_successor();
	ptx_wait_predecessor();
	round_up = round_of(a.sync);
	if (a.inside) {
		if (a.tokens * a.top_k > WARP_PLACES) {
			sort_inside(a, s, most);
		} else {
			if (warp == 0)
				sort_by_warp(a, s, most, w.per_most);
			__syncthreads(); /* the tiles are known to all; the block's barriers are ready */
		}
		w.tiles = s->tiles;
	} else {
		w.tiles = __ldcg(a.total) / L::T;
		__syncthreads(); /* the block's barriers are ready; the round was read before anybody arrives */
	}
	divide<L>(a, w);
	if (warp == L::W) {
		fetch_weights<L>(a, maps, w, s);
	} else if (warp == L::W + 1) {
		fetch_activations<L>(a, w, s, round_up);
	} else {
		rings q = {{0, 0, w.stages}, {0, 0, w.x_stages}};
		lane_parts p = lane_records(threadIdx.x % 32, w.group_shift, ptx_shared_address(s->minus));

		if (threadIdx.x == 0 && !a.direct)
			s->round_down = round_of(a.sync + SYNC_STRIDE); /* which cannot end without this block */
		multiply_up<L>(a, w, s, p, warp, sums, q);
		if (a.direct || !a.ready) {
			ptx_barrier_some(BAR_ALL, 32 * L::W); /* this block's activations are stored */
			if (threadIdx.x == 0)
				arrive_round(a.sync);
		}
		if constexpr (L::T == 8)
			if (a.direct) {
				if (threadIdx.x == 0)
					wait_round(a.sync, round_up);
				ptx_barrier_some(BAR_ALL, 32 * L::W); /* every block's are */
				multiply_direct<tile<8, 1, 1, L::W, L::RB * L::REC>>(a, w, s, p, base, sums, q);
				return;
			}
		multiply_down<L>(a, w, s, p, warp, q);
		ptx_barrier_some(BAR_ALL, 32 * L::W); /* this block's parts are stored */
		if (threadIdx.x == 0) {
			arrive_round(a.sync + SYNC_STRIDE);
			wait_round(a.sync + SYNC_STRIDE, s->round_down);
		}
		ptx_barrier_some(BAR_ALL, 32 * L::W); /* every block's are */
		clear_ready(a, w.tiles, 32 * L::W);
		sum_places(a, 32 * L::W);
	}
}

/* A matrix of all experts, in boxes of `blocks` row blocks by `records` records. */
static inline cudaError_t map_weights(CUtensorMap *map, const kk_moe_args *a, const void *data, int64_t stride, int rows,
                                      int cols, int blocks, int records)
{
	cuuint64_t record = RECORD_CODES + 4096 / a->group, across = cols / RECORD_COLS;
	tensor_shape t = {CU_TENSOR_MAP_DATA_TYPE_UINT64, CU_TENSOR_MAP_SWIZZLE_NONE, 4, data,
	                  {record / 8, across, (cuuint64_t)rows / 16, (cuuint64_t)a->experts},
	                  {record, across * record, (cuuint64_t)stride},
	                  {(cuuint32_t)record / 8, (cuuint32_t)records, (cuuint32_t)blocks, 1}};

	return make_tensor_map(map, t);
}

/* A box is a stage of the tile's. */
template <typename L>
static cudaError_t make_stream_maps(stream_maps *maps, const kk_moe_args *a)
{
	cudaError_t rc = map_weights(&maps->gate_up, a, a->gate_up, a->gate_up_stride, 2 * a->intermediate, a->hidden,
	                             L::ROWS / 16, L::PER);

	return rc != cudaSuccess ? rc
	                         : map_weights(&maps->down, a, a->down, a->down_stride, a->hidden, a->intermediate,
	                                       L::DOWN_ROWS / 16, L::REC);
}

/* `more`: the kernel's arguments after the first. */
template <typename L, typename Kernel, typename... More>
static cudaError_t launch_stream(const kk_moe_args *a, Kernel kernel, int threads, cudaStream_t stream,
                                 const More &...more)
{
	cudaLaunchAttribute attr[2] = {};
	cudaLaunchConfig_t config = {};
	cudaError_t rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
	                                      (int)a->smem_bytes);

	if (rc != cudaSuccess)
		return rc;
	if (a->warps != L::W || a->hidden % L::DOWN_ROWS || 2 * a->intermediate % L::ROWS)
		return cudaErrorInvalidValue;
	config.gridDim = dim3(a->blocks);
	config.blockDim = dim3(threads);
	config.dynamicSmemBytes = a->smem_bytes;
	config.stream = stream;
	config.attrs = attr;
	/* All blocks run at once, or none: they wait for each other. */
	attr[config.numAttrs].id = cudaLaunchAttributeCooperative;
	attr[config.numAttrs++].val.cooperative = 1;
	if (a->pdl) {
		attr[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
		attr[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
	}
	return cudaLaunchKernelEx(&config, kernel, *a, more...);
}

template <typename L>
static cudaError_t launch_tile(const kk_moe_args *a, cudaStream_t stream)
{
	stream_maps maps;
	cudaError_t rc = make_stream_maps<L>(&maps, a);

	return rc != cudaSuccess ? rc : launch_stream<L>(a, moe_stream<L>, L::THREADS, stream, maps);
}

cudaError_t moe_stream_large(const kk_moe_args *a, cudaStream_t stream);
cudaError_t moe_prefill_launch(const kk_moe_args *a, cudaStream_t stream);

#endif
