/*
 * The int4 experts for many tokens: warp-group matrix instructions, weights widened in registers.
 *
 * ROOFLINE
 *   6 M top_k H I flops: at E = 384, top 8, H = 7168, I = 256 (TP8), M = 4,096: 361 GFLOP, 463 us at
 *   H100's 780 TFLOP/s; the weights' 1.19 GB take 384 us at 3.10 TB/s: memory binds up to some 3,400
 *   tokens at a perfect matrix rate, arithmetic above. What it costs besides: for two weights 1.25
 *   instructions of integer and 1.5 of bf16 arithmetic, once for each tile of places; x read again for
 *   every 256 rows (M = 4,096, TP8: 0.94 GB through L2); each place's output, out and in as bf16
 *   (M = 4,096: 0.94 GB, 300 us if all of it goes to memory and nothing else does meanwhile).
 *
 * LADDER: kernels/moe_int4.cu.
 *
 * HOW
 *   A tile holds nearly every expert's places, so that a weight is read and widened once. Four warp
 *   groups hold 64 rows each of 256 rows by up to 112 places (the products are as wide as the tile has
 *   places, in steps of 16). Weights are operand A, from registers: a record's words are what a lane
 *   needs, so they go from shared memory to registers, are widened and scaled there by one multiply-add
 *   for two, and never written back. Activations are operand B, in shared memory, rows of 128 bytes with
 *   their pieces exchanged, gathered by two warps. A warp group's products run while it widens the next
 *   32 columns, and while the three others do; the last of a record run while the next is fetched.
 *   One warp writes down what each item is, several items ahead, for all the others. Blocks take
 *   gate-and-up items in turns, so that those that run at once share their activations in L2, and down
 *   items as they have room for them. Results are turned in shared memory, and leave as rows of 128
 *   bytes; when all places' outputs are there, all blocks sum them.
 *
 * RULES
 *   Those of moe_int4.cuh, and: a weight is rounded to bf16 once (code - 8) * scale is taken, which
 *   costs 0.0017 of the error bound; the other forms scale sums instead. Scales are below 2^11. A tile's
 *   unused places are whatever shared memory held: a place's output depends on its own column alone.
 *   Blocks wait for each other's items by counters; down items wait for gate-and-up items, which wait
 *   for none. Which block has which item does not show in the result. There are two sets of counters: a
 *   launch uses one and clears the other.
 */
#include "moe_int4.cuh"

enum {
	MOST_PLACES = 112,
	GROUPS = 4,                /* warp groups that multiply */
	GROUP_THREADS = 128,
	ROWS = 256,                /* rows of a tile */
	GATHER_WARPS = 2,
	FIRST_GATHER = 18,         /* warp 16 fetches weights, warp 17 writes items, then those that gather */
	THREADS = 640,
	SLOTS = 7,
	SLOT_USERS = 16 + GATHER_WARPS + 1,
	TURN_BYTES = 16 * 128,     /* of a warp group: sixteen places' results on their way out, twice */
	TURNS_BYTES = GROUPS * 2 * TURN_BYTES,
	BAR_GROUP = 3,             /* and three more: a warp group's */
	COUNTERS = 8192,           /* in words of `sync`: where the two sets begin */
	COUNTER_SET = 4096,
	PARTS_DONE = SYNC_STRIDE,  /* in a set, whose first word counts claims */
	FIRST_TILE = 2 * SYNC_STRIDE,
	LAUNCHES = 2 * SYNC_STRIDE, /* in words of `sync`: counts launches of this form */
};


/* A tile of places by a tile of rows. */
struct prefill_item {
	int kind, expert, tile, row_tile, rows;
	int more;                  /* another follows */
	int place[MOST_PLACES];
	__align__(16) uint32_t from[MOST_PLACES]; /* where each place's row begins, in 16 bytes */
};
enum { ITEM_UP, ITEM_DOWN, ITEM_END };

using prefill_tile = tile<MOST_PLACES, 1, 16, 16, 1>;
static_assert(prefill_tile::ROWS == ROWS && prefill_tile::DOWN_ROWS == ROWS, "one tile of rows for both");

struct prefill_work {
	int tiles, up_rows, down_rows, up_items, items; /* rows: tiles of rows */
	int up_records, down_records;
	int places;
	uint32_t record_bytes, group_shift;
	uint32_t x0, x_stage_bytes, turns, stage0, stage_bytes;
	int stages, x_stages;
	int32_t *claimed, *parts_done, *tile_done; /* down items that are somebody's; that are complete; up items */
};

struct prefill_smem {
	uint64_t full[MAX_STAGES], empty[MAX_STAGES], x_full[MAX_X_STAGES], x_empty[MAX_X_STAGES];
	uint64_t item_full[SLOTS], item_empty[SLOTS];
	prefill_work work;
	__align__(16) prefill_item items[SLOTS];
};
static_assert(sizeof(prefill_smem) <= 12 * 1024, "the plan's allowance");

/* ---- The warp that writes down the items. ---- */

__device__ __forceinline__ void write_places(const kk_moe_args &a, const prefill_work &w, prefill_item &to,
                                             bool up)
{
	int lane = threadIdx.x % 32, rows = 0;

	for (int first = 0; first < a.block_m; first += 32) {
		int r = first + lane;
		int place = r < a.block_m ? __ldcg(a.sorted + (size_t)to.tile * a.block_m + r) : w.places;

		rows += __popc(__ballot_sync(0xffffffffu, place < w.places));
		if (r >= a.block_m)
			break;
		to.place[r] = place;
		to.from[r] = up ? (uint32_t)(place / a.top_k) * (uint32_t)(a.hidden / 8)
		                : (uint32_t)place * (uint32_t)(a.intermediate / 8);
	}
	if (lane == 0)
		to.rows = rows;
}

/* Gate-and-up items in turns; down items to whoever has room. One lane. */
__device__ __forceinline__ int claim_item(const prefill_work &w, int before)
{
	int up = before + (int)gridDim.x;

	return before < w.up_items && up < w.up_items ? up : w.up_items + atomicAdd(w.claimed, 1);
}

__device__ __forceinline__ void write_items(const kk_moe_args &a, const prefill_work &w, prefill_smem *s)
{
	int lane = threadIdx.x % 32, i = blockIdx.x, next = 0;
	ring r = {0, 0, SLOTS};

	if (i >= w.up_items)
		i = __shfl_sync(0xffffffffu, lane == 0 ? claim_item(w, w.up_items) : 0, 0);
	for (;; i = __shfl_sync(0xffffffffu, next, 0)) {
		prefill_item &to = s->items[r.at];
		bool up = i < w.up_items, end = i >= w.items;

		if (lane == 0 && !end)
			next = claim_item(w, i);
		ptx_mbarrier_wait(barrier_of(s->item_empty, r.at), r.parity ^ 1);
		if (end && lane == 0)
			to.kind = ITEM_END;
		if (!end) {
			if (lane == 0) {
				int j = up ? i : i - w.up_items, per = up ? w.up_rows : w.down_rows;

				to.kind = up ? ITEM_UP : ITEM_DOWN;
				to.tile = j / per;
				to.row_tile = j - to.tile * per;
				to.expert = __ldcg(a.block_expert + to.tile);
				to.more = next < w.items;
			}
			__syncwarp(); /* the tile's number */
			write_places(a, w, to, up);
		}
		__syncwarp(); /* the item, before lane 0 says so */
		if (lane == 0)
			ptx_mbarrier_arrive(barrier_of(s->item_full, r.at));
		if (end)
			return;
		r.next();
	}
}

/* Each user of items: the next one, when it is there. */
__device__ __forceinline__ const prefill_item &next_item(prefill_smem *s, const ring &r)
{
	ptx_mbarrier_wait(barrier_of(s->item_full, r.at), r.parity);
	return s->items[r.at];
}

/* ---- The warp that fetches weights. ---- */

__device__ __forceinline__ void fetch_items(const kk_moe_args &a, const prefill_work &w, prefill_smem *s)
{
	int lane = threadIdx.x % 32;
	ring items = {0, 0, SLOTS}, r = {0, 0, a.stages};
	uint64_t policy = ptx_policy_drop();
	uint32_t rec = w.record_bytes;

	for (;;) {
		const prefill_item &it = next_item(s, items);
		int kind = it.kind, records = kind == ITEM_UP ? w.up_records : w.down_records;
		const uint8_t *from = kind == ITEM_UP ? a.gate_up + (size_t)it.expert * a.gate_up_stride
		                                      : a.down + (size_t)it.expert * a.down_stride;

		if (kind == ITEM_END)
			return;
		from += ((size_t)it.row_tile * (ROWS / 16) + lane % 16) * records * rec;
		give_stage(s->item_empty, items.at);
		items.next();
		for (int c = 0; c < records; c++) {
			uint32_t full = barrier_of(s->full, r.at);

			ptx_mbarrier_wait(barrier_of(s->empty, r.at), r.parity ^ 1);
			if (lane == 0)
				ptx_mbarrier_expect(full, w.stage_bytes);
			__syncwarp(); /* expected before it comes */
			if (lane < 16)
				ptx_copy_bulk_policy(w.stage0 + r.at * w.stage_bytes + lane * rec, from, rec, full,
				                     policy);
			from += rec;
			r.next();
		}
	}
}

/* ---- The warps that gather activations. ---- */

/* 128 columns of each row, half a warp a row, four rows at a time: their numbers are one load. */
__device__ __forceinline__ void gather_stage(const kk_moe_args &a, const prefill_work &w, prefill_smem *s,
                                             const ring &r, const prefill_item &it, const uint4 *from)
{
	int half = threadIdx.x / 16 - 2 * FIRST_GATHER, piece = threadIdx.x % 16, rows = it.rows;
	uint32_t to = w.x0 + r.at * w.x_stage_bytes + piece / 8 * (a.block_m * 128) + half * 512;
	uint32_t exchanged = (piece % 8 ^ half % 2 * 4) << 4;

	from += piece;
	ptx_mbarrier_wait(barrier_of(s->x_empty, r.at), r.parity ^ 1);
#pragma unroll 1
	for (int row = 4 * half; row < rows; row += 8 * GATHER_WARPS, to += 1024 * GATHER_WARPS) {
		uint4 f = *(const uint4 *)&it.from[row];
		uint32_t at[4] = {f.x, f.y, f.z, f.w};

#pragma unroll
		for (int i = 0; i < 4; i++)
			if (row + i < rows)
				ptx_copy_async(to + i * 128 + (exchanged ^ (uint32_t)i << 4), from + at[i]);
	}
	ptx_mbarrier_arrive_copied(barrier_of(s->x_full, r.at));
}

__device__ __forceinline__ void wait_count(const int32_t *counter, int count)
{
	while (ptx_load_acquire(counter) < count)
		;
}

__device__ __forceinline__ void gather_items(const kk_moe_args &a, const prefill_work &w, prefill_smem *s)
{
	ring items = {0, 0, SLOTS}, r = {0, 0, a.x_stages};

	for (;;) {
		const prefill_item &it = next_item(s, items);
		bool up = it.kind == ITEM_UP;
		const uint4 *from = (const uint4 *)(up ? a.x : a.act);
		int records = up ? w.up_records : w.down_records;

		if (it.kind == ITEM_END)
			return;
		if (!up) {
			if (threadIdx.x % 32 == 0)
				wait_count(w.tile_done + it.tile, GROUPS * w.up_rows);
			__syncwarp(); /* what lane 0 has seen */
		}
		for (int c = 0; c < records; c++) {
			gather_stage(a, w, s, r, it, from + c * (RECORD_COLS / 8));
			r.next();
		}
		give_stage(s->item_empty, items.at);
		items.next();
	}
}

/* ---- The warp groups that multiply. ---- */

/* threadIdx.x, which is not worth a register from one use to the next. */
__device__ __forceinline__ uint32_t thread_again()
{
	uint32_t t;
	asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
	return t;
}

__device__ __forceinline__ uint32_t times(uint32_t v, uint32_t factor)
{
	__nv_bfloat162 b = __hmul2(*(__nv_bfloat162 *)&v, *(__nv_bfloat162 *)&factor);

	return *(uint32_t *)&b;
}

__device__ __forceinline__ uint32_t times_plus(uint32_t v, uint32_t factor, uint32_t more)
{
	__nv_bfloat162 b = __hfma2(*(__nv_bfloat162 *)&v, *(__nv_bfloat162 *)&factor, *(__nv_bfloat162 *)&more);

	return *(uint32_t *)&b;
}

/*
 * A step's operand: (code - 8) * scale / 65536, rounded once. A code's four bits, alone in the lowest
 * eight of a bf16, are a subnormal number, code * 2^-133 or code * 2^-129 (bit 7, of the exponent, still
 * counts 128 times the lowest). Times scale * 2^117 or 2^113, less 8 * scale * 2^-16: one multiply-add,
 * and no bias to take away.
 */
struct row_scales {
	uint32_t low, high, low_8, high_8; /* twice the same */
};

__device__ __forceinline__ row_scales prepare_scales(uint32_t scale)
{
	__nv_bfloat162 low = __low2bfloat162(*(__nv_bfloat162 *)&scale), high = __high2bfloat162(*(__nv_bfloat162 *)&scale);
	uint32_t l = *(uint32_t *)&low, h = *(uint32_t *)&high;

	return {times(l, 0x7a007a00u), times(h, 0x78007800u), times(l, 0xb900b900u), times(h, 0xb900b900u)};
}

__device__ __forceinline__ void widen_scaled(uint32_t (&d)[4], uint32_t codes, const row_scales &r)
{
	d[0] = times_plus(codes & 0x000f000fu, r.low, r.low_8);
	d[1] = times_plus(codes & 0x00f000f0u, r.high, r.high_8);
	d[2] = times_plus(codes >> 8 & 0x000f000fu, r.low, r.low_8);
	d[3] = times_plus(codes >> 8 & 0x00f000f0u, r.high, r.high_8);
}

__device__ __forceinline__ uint4 load_shared(uint32_t at)
{
	uint4 v;
	asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
	             : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
	             : "r"(at)
	             : "memory");
	return v;
}

__device__ __forceinline__ uint32_t load_shared_word(uint32_t at)
{
	uint32_t v;
	asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
	return v;
}

/* Row g's and row g + 8's scales, for each 32 columns of a record. */
__device__ __forceinline__ void load_row_scales(uint32_t (&d)[4], uint32_t from, int g, int group_shift)
{
	if (group_shift == 0) {
		uint4 v = load_shared(from + g * 16);

		d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
	} else {
		d[0] = load_shared_word(from + g * (16 >> group_shift));
		d[2] = load_shared_word(from + g * (16 >> group_shift) + (8 >> group_shift & 4));
		d[1] = d[0], d[3] = d[2];
	}
}

#define WIDENED 65536.0f /* by which weights are too small */

template <int N>
using wide_sums = float[N / 8][4];

struct multiply_state {
	ring items, w, x;
	uint4 q[2];           /* the next record's codes */
	uint32_t scale[4], d[2][4]; /* its scales; its first 32 columns, widened */
};

/* 32 columns of the record at hand. */
__device__ __forceinline__ void widen_columns(uint32_t (&d)[2][4], const multiply_state &m, int g)
{
	row_scales r = prepare_scales(m.scale[g]);

	widen_scaled(d[0], g % 2 ? m.q[g / 2].z : m.q[g / 2].x, r);
	widen_scaled(d[1], g % 2 ? m.q[g / 2].w : m.q[g / 2].y, r);
}

__device__ __forceinline__ void load_record(const prefill_work &w, prefill_smem *s, multiply_state &m)
{
	uint32_t t = thread_again(), lane = t % 32;
	uint32_t record = w.stage0 + t / 32 * w.record_bytes + m.w.at * w.stage_bytes;

	ptx_mbarrier_wait(barrier_of(s->full, m.w.at), m.w.parity);
	m.q[0] = load_shared(record + lane * 16);
	m.q[1] = load_shared(record + 512 + lane * 16);
	load_row_scales(m.scale, record + RECORD_CODES, lane / 4, w.group_shift);
	widen_columns(m.d, m, 0);
	give_stage(s->empty, m.w.at);
	m.w.next();
}

/* Of arguments alone, so that the compiler knows it to be the same in all lanes. */
__device__ __forceinline__ uint32_t x_stage_at(int stage, uint32_t half_bytes)
{
	extern __shared__ __align__(1024) char smem[];

	return ptx_shared_address(smem) + 12 * 1024 + TURNS_BYTES + stage * 2 * half_bytes;
}

template <int N>
__device__ __forceinline__ void multiply_columns(wide_sums<N> &sum, const uint32_t (&d)[2][4], uint32_t at)
{
	uint64_t b = (uint64_t)(ptx_wgmma_matrix(0, 16) >> 32) << 32 | at; /* whose low word alone varies */

	ptx_wgmma_fence();
	ptx_wgmma_bf16<N>(sum, d[0], b);
	ptx_wgmma_bf16<N>(sum, d[1], b & ~UINT64_C(0xffffffff) | (at + 2));
	ptx_wgmma_commit();
}

/* The record at hand, 32 columns being widened while the products of the 32 before run; those of the last run
 * while the next record is fetched and its first columns are widened. All are done at the end: products under
 * way in the next turn of a loop would take more registers than there are. */
template <int N>
__device__ __forceinline__ void multiply_stage(wide_sums<N> &sum, const prefill_work &w, prefill_smem *s,
                                               multiply_state &m, uint32_t half_bytes, bool more)
{
	uint32_t b = (uint32_t)ptx_wgmma_matrix(x_stage_at(m.x.at, half_bytes), 16);
	uint32_t d[2][4];

	ptx_mbarrier_wait(barrier_of(s->x_full, m.x.at), m.x.parity);
	ptx_fence_async(); /* the gathered rows, before the matrix instructions read them */
	multiply_columns<N>(sum, m.d, b);
	widen_columns(d, m, 1);
	multiply_columns<N>(sum, d, b + 4);
	ptx_wgmma_wait<1>(); /* the columns before: their registers are widened into next */
	widen_columns(m.d, m, 2);
	multiply_columns<N>(sum, m.d, b + half_bytes / 16);
	ptx_wgmma_wait<1>();
	widen_columns(d, m, 3);
	multiply_columns<N>(sum, d, b + half_bytes / 16 + 4);
	ptx_wgmma_wait<1>();
	if (more)
		load_record(w, s, m);
	ptx_wgmma_wait<0>();
	if (threadIdx.x % 32 == 0)
		ptx_mbarrier_arrive(barrier_of(s->x_empty, m.x.at));
	m.x.next();
}

/* All of an item's columns. */
template <int N>
__device__ __forceinline__ void multiply_item(wide_sums<N> &sum, const kk_moe_args &a, const prefill_work &w,
                                              prefill_smem *s, multiply_state &m, int records, bool more)
{
#pragma unroll
	for (int n = 0; n < N / 8; n++)
#pragma unroll
		for (int i = 0; i < 4; i++)
			sum[n][i] = 0.0f;
#pragma unroll 1
	for (int c = 0; c < records; c++)
		multiply_stage<N>(sum, w, s, m, a.block_m * 128, more || c + 1 < records);
}

__device__ __forceinline__ uint32_t pack(float low, float high)
{
	__nv_bfloat162 b = __floats2bfloat162_rn(low, high);

	return *(uint32_t *)&b;
}

/* The address of piece `piece` (16 bytes) of place `place` of the sixteen. */
__device__ __forceinline__ uint32_t turn_at(uint32_t turn, int place, int piece)
{
	return turn + place * 128 + ((piece ^ place % 8) << 4);
}

/* silu(gate) * up: 32 of a warp group, eight a warp. */
template <int N>
__device__ __forceinline__ void store_act(const kk_moe_args &a, const prefill_item &it, const wide_sums<N> &sum,
                                          uint32_t turns, int group)
{
	int t = thread_again() % GROUP_THREADS, lane = t % 32, warp = t / 32, place = t / 4, piece = t % 4;
	char *act = (char *)a.act + (it.row_tile * (ROWS / 2) + group * 32) * 2 + piece * 16;

#pragma unroll
	for (int c = 0; c < N / 16; c++) {
		uint32_t turn = turns + c % 2 * TURN_BYTES, v[2];

		if (c * 16 >= it.rows)
			break;
#pragma unroll
		for (int j = 0; j < 2; j++) {
			const float(&d)[4] = sum[2 * c + j];

			v[j] = pack(silu(WIDENED * d[0]) * (WIDENED * d[2]), silu(WIDENED * d[1]) * (WIDENED * d[3]));
		}
		ptx_store_turned(turn_at(turn, lane % 16, warp), v);
		ptx_barrier_some(BAR_GROUP + group, GROUP_THREADS); /* sixteen places are there */
		if (t < 64 && c * 16 + place < it.rows)
			*(uint4 *)(act + (size_t)it.place[c * 16 + place] * a.intermediate * 2) =
				load_shared(turn_at(turn, place, piece));
	}
}

/* The places' outputs: 64 rows of a warp group, sixteen a warp. */
template <int N>
__device__ __forceinline__ void store_part(const kk_moe_args &a, const prefill_item &it,
                                           const wide_sums<N> &sum, uint32_t turns, int group)
{
	int t = thread_again() % GROUP_THREADS, lane = t % 32, warp = t / 32, place = t / 8, piece = t % 8;
	char *part = (char *)a.part + it.row_tile * (ROWS * 2) + group * 128 + piece * 16;
	size_t pitch = (size_t)a.hidden * 2;

#pragma unroll
	for (int c = 0; c < N / 16; c++) {
		uint32_t turn = turns + c % 2 * TURN_BYTES, v[4];

		if (c * 16 >= it.rows)
			break;
#pragma unroll
		for (int j = 0; j < 4; j++)
			v[j] = pack(WIDENED * sum[2 * c + j / 2][j % 2 * 2], WIDENED * sum[2 * c + j / 2][j % 2 * 2 + 1]);
		ptx_store_turned(turn_at(turn, lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), v);
		ptx_barrier_some(BAR_GROUP + group, GROUP_THREADS); /* sixteen places are there */
		if (c * 16 + place < it.rows)
			*(uint4 *)(part + it.place[c * 16 + place] * pitch) = load_shared(turn_at(turn, place, piece));
	}
}

/* ---- The sum over each token's places. ---- */

__device__ __forceinline__ void add_eight(float (&all)[8], uint4 v, float weight)
{
	uint32_t h[4] = {v.x, v.y, v.z, v.w};

#pragma unroll
	for (int i = 0; i < 4; i++) {
		all[2 * i] = fmaf(weight, __uint_as_float(h[i] << 16), all[2 * i]);
		all[2 * i + 1] = fmaf(weight, __uint_as_float(h[i] & 0xffff0000u), all[2 * i + 1]);
	}
}

/* Eight columns of y. */
__device__ __forceinline__ void store_eight(const kk_moe_args &a, size_t at, float (&v)[8])
{
	if (a.y_bf16) {
		uint4 *y = (uint4 *)((__nv_bfloat16 *)a.y + at);
		float was[8] = {};

		if (a.accumulate)
			add_eight(was, *y, 1.0f);
#pragma unroll
		for (int i = 0; i < 8; i++)
			v[i] = was[i] + a.scale * v[i];
		*y = make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
	} else {
#pragma unroll
		for (int i = 0; i < 8; i++)
			store_y(a, at + i, v[i]);
	}
}

/* Eight columns of a token, in the order of k. */
__device__ __forceinline__ void sum_eight(const kk_moe_args &a, int token, int column)
{
	float all[8] = {};

#pragma unroll 1
	for (int k0 = 0; k0 < a.top_k; k0 += 8) {
		float weight[8];
		uint4 v[8];

		/* Every place has room, if not an output: eight loads at once, none of them in question. */
#pragma unroll
		for (int k = 0; k < 8; k++) {
			size_t place = (size_t)token * a.top_k + min(k0 + k, a.top_k - 1);
			int e = __ldg(a.ids + place);

			v[k] = ptx_load_fresh((const char *)a.part + (place * a.hidden + column) * 2);
			weight[k] = __ldg(a.weights + place);
			if (e < 0 || e >= a.experts || k0 + k >= a.top_k)
				weight[k] = 0.0f;
		}
#pragma unroll
		for (int k = 0; k < 8; k++)
			if (weight[k] != 0.0f)
				add_eight(all, v[k], weight[k]);
	}
	store_eight(a, (size_t)token * a.hidden + column, all);
}

__device__ __forceinline__ void sum_tokens(const kk_moe_args &a)
{
	int pieces = a.hidden / 8;

#pragma unroll 1
	for (int o = blockIdx.x * (GROUPS * GROUP_THREADS) + threadIdx.x; o < a.tokens * pieces;
	     o += gridDim.x * (GROUPS * GROUP_THREADS)) {
		int token = o / pieces;

		sum_eight(a, token, (o - token * pieces) * 8);
	}
}

template <int N>
__device__ __forceinline__ void run_item(const kk_moe_args &a, const prefill_work &w, prefill_smem *s,
                                         multiply_state &m, const prefill_item &it)
{
	int group = threadIdx.x / GROUP_THREADS, kind = it.kind;
	uint32_t turns = w.turns + group * 2 * TURN_BYTES;
	wide_sums<N> sum;

	multiply_item<N>(sum, a, w, s, m, kind == ITEM_UP ? w.up_records : w.down_records, it.more);
	if (kind == ITEM_UP) {
		store_act<N>(a, it, sum, turns, group);
	} else {
		store_part<N>(a, it, sum, turns, group);
	}
}

__device__ __forceinline__ void multiply_items(const kk_moe_args &a, const prefill_work &w, prefill_smem *s,
                                               multiply_state &m)
{
	int group = threadIdx.x / GROUP_THREADS, done = 0;

	if (next_item(s, m.items).kind != ITEM_END)
		load_record(w, s, m);
	for (;;) {
		const prefill_item &it = next_item(s, m.items);

		if (it.kind == ITEM_END)
			break;
		switch ((it.rows + 15) / 16) {
		case 1:
			run_item<16>(a, w, s, m, it);
			break;
		case 2:
			run_item<32>(a, w, s, m, it);
			break;
		case 3:
			run_item<48>(a, w, s, m, it);
			break;
		case 4:
			run_item<64>(a, w, s, m, it);
			break;
		case 5:
			run_item<80>(a, w, s, m, it);
			break;
		case 6:
			run_item<96>(a, w, s, m, it);
			break;
		default:
			run_item<112>(a, w, s, m, it);
		}
		ptx_barrier_some(BAR_GROUP + group, GROUP_THREADS); /* the group's stores, before they are counted */
		if (it.kind == ITEM_DOWN)
			done++;
		else if (threadIdx.x % GROUP_THREADS == 0)
			ptx_add_release(w.tile_done + it.tile, 1);
		give_stage(s->item_empty, m.items.at);
		m.items.next();
	}
	/* Counted once: a release waits for all that this multiprocessor has stored. */
	if (threadIdx.x % GROUP_THREADS == 0)
		ptx_add_release(w.parts_done, done);
	if (threadIdx.x % 32 == 0)
		wait_count(w.parts_done, GROUPS * w.tiles * w.down_rows);
	__syncwarp(); /* what lane 0 has seen */
	sum_tokens(a);
}

/* ---- All together. ---- */

__device__ __forceinline__ prefill_work divide_work(const kk_moe_args &a, char *smem)
{
	prefill_work w;

	w.places = a.tokens * a.top_k;
	w.up_rows = 2 * a.intermediate / ROWS;
	w.down_rows = a.hidden / ROWS;
	w.up_records = a.hidden / RECORD_COLS;
	w.down_records = a.intermediate / RECORD_COLS;
	w.group_shift = a.group == 32 ? 0 : a.group == 64 ? 1 : 2;
	w.record_bytes = RECORD_CODES + 4096 / a.group;
	w.stages = a.stages;
	w.x_stages = a.x_stages;
	w.stage_bytes = 16 * w.record_bytes;
	w.x_stage_bytes = a.block_m * RECORD_COLS * 2;
	w.turns = ptx_shared_address(smem + 12 * 1024);
	w.x0 = w.turns + TURNS_BYTES;
	w.stage0 = w.x0 + w.x_stages * w.x_stage_bytes;
	return w;
}

/* What the launch before has counted with, and what this one will. */
__device__ __forceinline__ void take_counters(const kk_moe_args &a, prefill_work &w)
{
	int odd = round_of(a.sync + LAUNCHES) >> 8 & 1;
	int32_t *mine = a.sync + COUNTERS + odd * COUNTER_SET, *other = a.sync + COUNTERS + (odd ^ 1) * COUNTER_SET;

	for (int i = blockIdx.x * THREADS + threadIdx.x; i < COUNTER_SET; i += gridDim.x * THREADS)
		other[i] = 0;
	if (threadIdx.x > 0)
		return;
	w.claimed = mine;
	w.parts_done = mine + PARTS_DONE;
	w.tile_done = mine + FIRST_TILE;
	w.tiles = __ldcg(a.total) / a.block_m;
	w.up_items = w.tiles * w.up_rows;
	w.items = w.up_items + w.tiles * w.down_rows;
}

__device__ __forceinline__ void init_barriers(const prefill_work &w, prefill_smem *s)
{
	for (int i = 0; i < w.stages; i++) {
		ptx_mbarrier_init(barrier_of(s->full, i), 1);
		ptx_mbarrier_init(barrier_of(s->empty, i), 4 * GROUPS);
	}
	for (int i = 0; i < w.x_stages; i++) {
		ptx_mbarrier_init(barrier_of(s->x_full, i), 32 * GATHER_WARPS);
		ptx_mbarrier_init(barrier_of(s->x_empty, i), 4 * GROUPS);
	}
	for (int i = 0; i < SLOTS; i++) {
		ptx_mbarrier_init(barrier_of(s->item_full, i), 1);
		ptx_mbarrier_init(barrier_of(s->item_empty, i), SLOT_USERS);
	}
	ptx_mbarrier_init_done();
}

__global__ void __launch_bounds__(THREADS, 1) moe_prefill(const __grid_constant__ kk_moe_args a)
{
	extern __shared__ __align__(1024) char smem[];
	prefill_smem *s = (prefill_smem *)smem;
	const prefill_work &w = s->work;
	int warp = threadIdx.x / 32;

	if (threadIdx.x == 0) {
		s->work = divide_work(a, smem);
		init_barriers(w, s);
	}
	ptx_release_successor();
	ptx_wait_predecessor();
	take_counters(a, s->work);
	__syncthreads(); /* the block's barriers are ready; the rounds were read before anybody arrives */
	if (warp >= 4 * GROUPS) {
		ptx_fewer_registers<32>();
		if (warp == 16)
			fetch_items(a, w, s);
		else if (warp == 17)
			write_items(a, w, s);
		else
			gather_items(a, w, s);
	} else {
		multiply_state m = {{0, 0, SLOTS}, {0, 0, a.stages}, {0, 0, a.x_stages}};

		ptx_more_registers<112>();
		multiply_items(a, w, s, m);
	}
	__syncthreads(); /* nobody needs the counters any more */
	if (threadIdx.x == 0)
		arrive_round(a.sync + LAUNCHES);
}

cudaError_t moe_prefill_launch(const kk_moe_args *a, cudaStream_t stream)
{
	if (!a->part_bf16 || a->inside || a->direct || a->sums_bytes != TURNS_BYTES || a->group_m != 1 || a->block_n != ROWS ||
	    a->block_m > MOST_PLACES || a->block_m % 16 ||
	    a->tokens * a->top_k / a->block_m + a->experts > COUNTER_SET - FIRST_TILE)
		return cudaErrorInvalidValue;
	return launch_stream<prefill_tile>(a, moe_prefill, THREADS, stream);
}
