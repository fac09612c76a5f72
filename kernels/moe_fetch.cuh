/*
 * The two warps of a block that fetch for those that multiply, and how blocks tell each other what is done.
 * moe_int4.cu has the essay.
 */
#ifndef KK_MOE_FETCH_CUH
#define KK_MOE_FETCH_CUH

#include "moe_work.cuh"

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

/* One stage: a copy of `bytes` a lane, from `from` (NULL: none) to its place, `pitch` apart. */
__device__ __forceinline__ void fetch_stage(const stream_work &w, stream_smem *s, weight_fetch &f, uint32_t pitch,
                                            uint32_t bytes, const uint8_t *from)
{
	int lane = threadIdx.x % 32, copies = __popc(__ballot_sync(0xffffffffu, from != NULL));
	uint32_t full = barrier_of(s->full, f.r.at);

	ptx_mbarrier_wait(barrier_of(s->empty, f.r.at), f.r.parity ^ 1);
	if (lane == 0)
		ptx_mbarrier_expect(full, copies * bytes);
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

/* The stage that is asked for DOWN_AHEAD before the next has arrived. */
__device__ __forceinline__ void wait_arrival(stream_smem *s, const weight_fetch &f)
{
	ring before = f.r.before(DOWN_AHEAD);

	ptx_mbarrier_wait(barrier_of(s->full, before.at), before.parity);
}

/*
 * The decode form's down projection. A warp's unit is RB row blocks of one tile's expert; a stage has RB records of one
 * of them for every warp, and RB stages in turn are all of them. They come behind gate-and-up's, which every block
 * waits for: a few on their way at a time (TRIED 60).
 */
template <typename L>
__device__ __forceinline__ void fetch_direct(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                             weight_fetch &f)
{
	static_assert(L::W <= 32 && L::REC == 1, "a lane a warp; room for RB records");
	int lane = threadIdx.x % 32, blocks = w.down_hi - w.down_lo, units = (blocks + L::RB - 1) / L::RB * w.tiles;
	uint32_t rec = w.record_bytes;

	for (int u = lane, left = units; left > 0; u += L::W, left -= L::W) {
		bool mine = lane < L::W && u < units;
		int block = mine ? u / w.tiles * L::RB : 0;
		const uint8_t *from = NULL;

		if (mine)
			from = a.down + (size_t)expert_of(a, s, u % w.tiles) * a.down_stride +
			       (size_t)(w.down_lo + block) * w.down_records * rec;
		for (int c = 0; c < w.down_records; c += L::RB)
#pragma unroll
			for (int r = 0; r < L::RB; r++) {
				wait_arrival(s, f);
				fetch_stage(w, s, f, L::RB * rec, min(L::RB, w.down_records - c) * rec,
				            mine && block + r < blocks
				                    ? from + (size_t)(r * w.down_records + c) * rec
				                    : NULL);
			}
	}
}

template <typename L, bool DIRECT>
__device__ __forceinline__ void fetch_weights(const kk_moe_args &a, const stream_maps &maps, const stream_work &w,
                                              stream_smem *s)
{
	weight_fetch f = {{0, 0, w.stages}, ptx_policy_drop(), -1, 0};
	constexpr int UP_PIECES = L::ROWS / 16, DOWN_PIECES = L::DOWN_ROWS / 16;
	int row_tiles = 2 * a.intermediate / L::ROWS;
	item it = find_item(w.up_lo, w.tiles, row_tiles, a.group_m);

	for (int i = w.up_lo; i < w.up_hi; i++, next_item(it, w.tiles, row_tiles, a.group_m)) {
		int expert = cached_expert(a, s, f, it.tile);

		for (int c = 0; c < w.up_records; c += L::PER)
			fetch_box(w, s, f, &maps.gate_up, UP_PIECES * L::PER, c, it.rows * UP_PIECES, expert);
	}
	if constexpr (DIRECT) {
		__syncwarp(); /* the other lanes have waited for nothing yet */
		fetch_direct<L>(a, w, s, f);
	} else {
		row_tiles = a.hidden / L::DOWN_ROWS;
		it = find_item(w.down_lo, w.tiles, row_tiles, a.group_m);
		for (int i = w.down_lo; i < w.down_hi; i++, next_item(it, w.tiles, row_tiles, a.group_m)) {
			int expert = cached_expert(a, s, f, it.tile);

			for (int c = 0; c < w.down_records; c += L::REC)
				fetch_box(w, s, f, &maps.down, DOWN_PIECES * L::REC, c, it.rows * DOWN_PIECES,
				          expert);
		}
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
 * the round a block is in is what it read (read_round) before it arrived, but for the last eight bits.
 */
__device__ __forceinline__ int read_round(const int32_t *counter)
{
	return __ldcg(counter);
}

__device__ __forceinline__ void arrive_round(int32_t *counter)
{
	ptx_add_release(counter, blockIdx.x ? 1 : 257 - (int)gridDim.x);
}

__device__ __forceinline__ void wait_round(const int32_t *counter, int round)
{
	while (((ptx_load_acquire(counter) ^ round) & ~255) == 0)
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

template <typename L, bool DIRECT>
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
	if (DIRECT)
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

#endif
