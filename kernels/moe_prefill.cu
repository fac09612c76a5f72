/*
 * The int4 experts for many tokens: warp-group matrix instructions, weights widened in registers.
 *
 * ROOFLINE
 *   6 M top_k H I flops: at E = 384, top 8, H = 7168, I = 256 (TP8), M = 4,096: 361 GFLOP, 463 us at
 *   H100's 780 TFLOP/s; the weights' 1.19 GB take 384 us at 3.10 TB/s, 264 at H200's 4.50: memory binds
 *   up to some 3,400 tokens (H200: 2,300) at a perfect matrix rate, arithmetic above. What it costs
 *   besides: for two weights 1.25 instructions of integer and as many of bf16 arithmetic, once for each
 *   tile of places; x read again for every 256 rows (M = 4,096, TP8: 0.94 GB through L2); each place's
 *   output, out and in as bf16 (M = 4,096: 0.94 GB, 300 us of H100's memory if all of it goes there and
 *   nothing else does meanwhile).
 *
 * LADDER: kernels/moe_int4.cu.
 *
 * HOW
 *   A tile holds nearly every expert's places, so that a weight is read and widened once. Four warp
 *   groups hold 64 rows each of 256 rows by up to 112 places (the products are as wide as the tile has
 *   places, in steps of 16). Weights are operand A, from registers: a record's words are what a lane
 *   needs, so they go from shared memory to registers, are widened and scaled there by one multiply-add
 *   for two, and never written back. One lane fetches them, a record of all 256 rows by one box of a
 *   tensor map. Activations are operand B, in shared memory, rows of 128 bytes with their pieces
 *   exchanged, gathered by two warps. A warp group's products run while it widens the next 32 columns,
 *   and while the three others do; the last of a record run while the next is loaded.
 *   One warp writes down what each item is, several items ahead, for all the others. Blocks take
 *   gate-and-up items in turns, so that those that run at once share their activations in L2, and down
 *   items as they have room for them. Results are turned in shared memory, and leave as rows of 128
 *   bytes; when all places' outputs are there, all blocks sum them.
 *   Besides products and widening, a record costs what finds its words, barriers and matrices. All that
 *   is alike for every record is held in registers, the group is known when compiling, and a matrix's
 *   address is known to be the same in all lanes: 170 instructions a record, which were 220.
 *
 * RULES
 *   Those of moe_int4.cuh, and: a weight is rounded to bf16 once (code - 8) * scale is taken, which
 *   costs 0.0017 of the error bound; the other forms scale sums instead. Scales are below 2^11. A tile's
 *   unused places are whatever shared memory held, or another's row: a place's output depends on its own
 *   column alone.
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
	GATHER_HALVES = 2 * GATHER_WARPS,
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
	int kind, expert, tile, row_tile;
	int rows;                  /* places of the tile; of ITEM_END: down items that this block has had */
	int place[MOST_PLACES];
	/* Where each place's row begins, in 16 bytes; and room for what is read ahead. */
	__align__(16) uint32_t from[MOST_PLACES + 4 * GATHER_HALVES];
};
enum { ITEM_UP, ITEM_DOWN, ITEM_END };

using prefill_tile = tile<MOST_PLACES, 1, 16, 16, 1>;
static_assert(prefill_tile::ROWS == ROWS && prefill_tile::DOWN_ROWS == ROWS, "one tile of rows for both");

struct prefill_work {
	int tiles, up_rows, down_rows, up_items, items; /* rows: tiles of rows */
	int up_records, down_records;
	int places;
	uint32_t turns, x0, stage0; /* shared addresses */
	uint32_t x_stage_bytes;
	int32_t *claimed, *parts_done, *tile_done; /* down items that are somebody's; that are complete; up items */
};

struct prefill_smem {
	uint64_t full[MAX_STAGES], empty[MAX_STAGES], x_full[MAX_X_STAGES], x_empty[MAX_X_STAGES];
	uint64_t item_full[SLOTS], item_empty[SLOTS];
	prefill_work work;
	__align__(16) prefill_item items[SLOTS];
};
static_assert(sizeof(prefill_smem) <= 12 * 1024, "the plan's allowance");

/* From a stage's barrier of `full` to its one of `empty`. */
enum {
	EMPTY_AFTER = offsetof(prefill_smem, empty) - offsetof(prefill_smem, full),
	X_EMPTY_AFTER = offsetof(prefill_smem, x_empty) - offsetof(prefill_smem, x_full),
};

template <int GROUP>
constexpr uint32_t record_bytes = RECORD_CODES + 4096 / GROUP;
template <int GROUP>
constexpr uint32_t stage_bytes = ROWS / 16 * record_bytes<GROUP>;

/* ---- The warp that writes down the items. ---- */

/* Where there is no place, the row of the tile's first is gathered, so that all come by fours. */
__device__ __forceinline__ void write_places(const kk_moe_args &a, const prefill_work &w, prefill_item &to,
                                             bool up)
{
	const int32_t *sorted = a.sorted + (size_t)to.tile * a.block_m;
	int lane = threadIdx.x % 32, rows = 0, lead = __ldcg(sorted);

	for (int first = 0; first < a.block_m; first += 32) {
		int r = first + lane, place = r < a.block_m ? __ldcg(sorted + r) : w.places;
		bool here = place < w.places;

		rows += __popc(__ballot_sync(0xffffffffu, here));
		if (r >= a.block_m)
			break;
		to.place[r] = place;
		to.from[r] = up ? (uint32_t)((here ? place : lead) / a.top_k) * (uint32_t)(a.hidden / 8)
		                : (uint32_t)(here ? place : lead) * (uint32_t)(a.intermediate / 8);
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
	int lane = threadIdx.x % 32, i = blockIdx.x, next = 0, downs = 0;
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
			to.kind = ITEM_END, to.rows = downs;
		if (!end) {
			if (lane == 0) {
				int j = up ? i : i - w.up_items, per = up ? w.up_rows : w.down_rows;

				to.kind = up ? ITEM_UP : ITEM_DOWN;
				to.tile = j / per;
				to.row_tile = j - to.tile * per;
				to.expert = __ldcg(a.block_expert + to.tile);
			}
			__syncwarp(); /* the tile's number */
			write_places(a, w, to, up);
			downs += !up;
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

/* ---- The lane that fetches weights. ---- */

template <int GROUP>
__device__ __forceinline__ void fetch_items(const kk_moe_args &a, const stream_maps &maps, const prefill_work &w,
                                            prefill_smem *s)
{
	ring items = {0, 0, SLOTS}, r = {0, 0, a.stages};
	uint64_t policy = ptx_policy_drop();

	for (;;) {
		const prefill_item &it = next_item(s, items);
		bool up = it.kind == ITEM_UP;
		const CUtensorMap *map = up ? &maps.gate_up : &maps.down;
		int records = up ? w.up_records : w.down_records, block = it.row_tile * (ROWS / 16);
		int expert = it.expert;

		if (it.kind == ITEM_END)
			break;
		ptx_mbarrier_arrive(barrier_of(s->item_empty, items.at));
		items.next();
		for (int c = 0; c < records; c++) {
			uint32_t full = barrier_of(s->full, r.at);

			ptx_mbarrier_wait(barrier_of(s->empty, r.at), r.parity ^ 1);
			ptx_mbarrier_expect(full, stage_bytes<GROUP>);
			ptx_copy_box(w.stage0 + r.at * stage_bytes<GROUP>, map, make_int4(0, c, block, expert),
			             full, policy);
			r.next();
		}
	}
	/* One more stage, whose contents nobody uses: no record's end need ask whether another comes. */
	ptx_mbarrier_wait(barrier_of(s->empty, r.at), r.parity ^ 1);
	ptx_mbarrier_arrive(barrier_of(s->full, r.at));
}

/* ---- The warps that gather activations. ---- */

__device__ __forceinline__ void wait_count(const int32_t *counter, int count)
{
	while (ptx_load_acquire(counter) < count)
		;
}

/*
 * 128 columns of each row, half a warp a row, four rows at a time: their numbers are one load, a turn ahead.
 * `to` is where this lane's piece of its half's first row goes; the next three rows' are exchanged by 1 to 3 more.
 */
__device__ __forceinline__ void gather_stage(uint32_t to, uint32_t numbers, uint32_t end, const char *from)
{
	uint4 f = ptx_load_shared(numbers);

#pragma unroll 1
	for (; numbers < end; to += GATHER_HALVES * 4 * 128) {
		const char *f0 = from + (uint64_t)f.x * 16, *f1 = from + (uint64_t)f.y * 16;
		const char *f2 = from + (uint64_t)f.z * 16, *f3 = from + (uint64_t)f.w * 16;

		f = ptx_load_shared(numbers += GATHER_HALVES * 16);
		ptx_copy_async(to, f0);
		ptx_copy_async((to ^ 16) + 128, f1);
		ptx_copy_async((to ^ 32) + 256, f2);
		ptx_copy_async((to ^ 48) + 384, f3);
	}
}

__device__ __forceinline__ void gather_items(const kk_moe_args &a, const prefill_work &w, prefill_smem *s)
{
	ring items = {0, 0, SLOTS}, r = {0, 0, a.x_stages};
	int half = threadIdx.x / 16 - 2 * FIRST_GATHER, piece = threadIdx.x % 16;
	uint32_t to = w.x0 + piece / 8 * (a.block_m * 128) + half * 512 + ((piece % 8 ^ half % 2 * 4) << 4);
	uint32_t x_full = barrier_of(s->x_full, 0);

	ptx_hold(x_full);
	for (;;) {
		const prefill_item &it = next_item(s, items);
		bool up = it.kind == ITEM_UP;
		const char *from = (const char *)(up ? a.x : a.act) + piece * 16;
		int left = up ? w.up_records : w.down_records;
		uint32_t numbers = ptx_shared_address(it.from), end = numbers + (it.rows + 3) / 4 * 16;

		if (it.kind == ITEM_END)
			return;
		if (!up) {
			if (threadIdx.x % 32 == 0)
				wait_count(w.tile_done + it.tile, GROUPS * w.up_rows);
			__syncwarp(); /* what lane 0 has seen */
		}
		for (; left > 0; left--, from += RECORD_COLS * 2) {
			ptx_mbarrier_wait(x_full + X_EMPTY_AFTER + r.at * 8, r.parity ^ 1);
			gather_stage(to + r.at * w.x_stage_bytes, numbers + half * 16, end, from);
			ptx_mbarrier_arrive_copied(ptx_uniform(x_full + r.at * 8));
			r.next();
		}
		give_stage(s->item_empty, items.at);
		items.next();
	}
}

/* ---- The warp groups that multiply. ---- */

constexpr float WIDENED = 65536.0f; /* by which widened weights are too small */

/*
 * A step's operand: (code - 8) * scale / 65536, rounded once. A code's four bits, alone in the lowest
 * eight of a bf16, are a subnormal number, code * 2^-133 or code * 2^-129 (bit 7, of the exponent, still
 * counts 128 times the lowest). Times scale * 2^117 or 2^113, less 8 * scale * 2^-16: one multiply-add,
 * and no bias to take away.
 */
struct row_scales {
	__nv_bfloat162 factor, less_8; /* row g's, row g + 8's */
};

__device__ __forceinline__ row_scales prepare_scales(uint32_t scale)
{
	uint32_t factor = bf16x2_mul(scale, 0x78007a00u), less_8 = bf16x2_mul(scale, 0xb900b900u);

	return {*(__nv_bfloat162 *)&factor, *(__nv_bfloat162 *)&less_8};
}

/* One half of an operand twice costs nothing: the multiply-add can take it so. */
__device__ __forceinline__ uint32_t widen_low(uint32_t code, const row_scales &r)
{
	__nv_bfloat162 b = __hfma2(*(__nv_bfloat162 *)&code, __low2bfloat162(r.factor), __low2bfloat162(r.less_8));

	return *(uint32_t *)&b;
}

__device__ __forceinline__ uint32_t widen_high(uint32_t code, const row_scales &r)
{
	__nv_bfloat162 b = __hfma2(*(__nv_bfloat162 *)&code, __high2bfloat162(r.factor), __high2bfloat162(r.less_8));

	return *(uint32_t *)&b;
}

__device__ __forceinline__ void widen_scaled(uint32_t (&d)[4], uint32_t codes, const row_scales &r)
{
	d[0] = widen_low(codes & 0x000f000fu, r);
	d[1] = widen_high(codes & 0x00f000f0u, r);
	d[2] = widen_low(codes >> 8 & 0x000f000fu, r);
	d[3] = widen_high(codes >> 8 & 0x00f000f0u, r);
}

template <int N>
using wide_sums = float[N / 8][4];

struct multiply_state {
	ring items, w, x;
	uint32_t codes, scales; /* where this lane's are, in the first stage */
	uint32_t full, x_full;  /* the first barriers of either ring */
	uint32_t matrix;        /* the first stage of activations, as ptx_wgmma_matrix's low word */
	uint4 q[2];             /* a record's codes */
	uint32_t scale[4], d[2][4]; /* its scales; its first 32 columns, widened */
};

template <int GROUP>
__device__ __forceinline__ multiply_state start_multiplying(const kk_moe_args &a, const prefill_work &w,
                                                            prefill_smem *s)
{
	multiply_state m = {{0, 0, SLOTS}, {0, 0, a.stages}, {0, 0, a.x_stages}};
	uint32_t lane = threadIdx.x % 32, record = w.stage0 + threadIdx.x / 32 * record_bytes<GROUP>;

	m.codes = record + lane * 16;
	m.scales = record + RECORD_CODES + lane / 4 * (512 / GROUP);
	m.full = barrier_of(s->full, 0);
	m.x_full = barrier_of(s->x_full, 0);
	m.matrix = (uint32_t)ptx_wgmma_matrix(w.x0, 16);
	ptx_hold(m.codes);
	ptx_hold(m.scales);
	ptx_hold(m.full);
	ptx_hold(m.x_full);
	ptx_hold(m.matrix);
	return m;
}

/* Row g's and row g + 8's scales, for each 32 columns of a record. */
template <int GROUP>
__device__ __forceinline__ void load_row_scales(uint32_t (&d)[4], uint32_t from)
{
	if (GROUP == 32) {
		uint4 v = ptx_load_shared(from);

		d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
	} else {
		d[0] = d[1] = ptx_load_shared_word(from);
		d[2] = d[3] = GROUP == 64 ? ptx_load_shared_word(from + 4) : d[0];
	}
}

/* 32 columns of the record at hand. */
__device__ __forceinline__ void widen_columns(uint32_t (&d)[2][4], const multiply_state &m, int g)
{
	row_scales r = prepare_scales(m.scale[g]);

	widen_scaled(d[0], g % 2 ? m.q[g / 2].z : m.q[g / 2].x, r);
	widen_scaled(d[1], g % 2 ? m.q[g / 2].w : m.q[g / 2].y, r);
}

/* The next record is the one at hand, its first columns are widened, and its stage is given back. */
template <int GROUP>
__device__ __forceinline__ void load_record(multiply_state &m)
{
	uint32_t stage = m.w.at * stage_bytes<GROUP>, full = m.full + m.w.at * 8;

	ptx_mbarrier_wait(full, m.w.parity);
	m.q[0] = ptx_load_shared(m.codes + stage);
	load_row_scales<GROUP>(m.scale, m.scales + stage);
	m.q[1] = ptx_load_shared(m.codes + stage + 512);
	widen_columns(m.d, m, 0);
	__syncwarp(); /* every lane has its words */
	if (ptx_elect())
		ptx_mbarrier_arrive(full + EMPTY_AFTER);
	m.w.next();
}

template <int N>
__device__ __forceinline__ void multiply_columns(wide_sums<N> &sum, const uint32_t (&d)[2][4], uint32_t at)
{
	uint64_t high = ptx_wgmma_matrix(0, 16) >> 32 << 32; /* the low word alone varies */

	ptx_wgmma_fence();
	ptx_wgmma_bf16<N>(sum, d[0], high | at);
	ptx_wgmma_bf16<N>(sum, d[1], high | (at + 2));
	ptx_wgmma_commit();
}

/*
 * The record at hand, 32 columns being widened while the products of the 32 before run; those of the last run
 * while the next record is loaded. All are done at the end: products under way in the next turn of a loop would
 * take more registers than there are.
 */
template <int N, int GROUP>
__device__ __forceinline__ void multiply_stage(wide_sums<N> &sum, multiply_state &m, uint32_t half_bytes)
{
	uint32_t b = m.matrix + m.x.at * (half_bytes / 8), d[2][4];

	ptx_mbarrier_wait(m.x_full + m.x.at * 8, m.x.parity);
	ptx_fence_async(); /* the gathered rows, before the matrix instructions read them */
	b = ptx_uniform(b);
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
	load_record<GROUP>(m);
	ptx_wgmma_wait<0>();
	if (ptx_elect())
		ptx_mbarrier_arrive(m.x_full + X_EMPTY_AFTER + m.x.at * 8);
	m.x.next();
}

/* All of an item's columns. */
template <int N, int GROUP>
__device__ __forceinline__ void multiply_item(wide_sums<N> &sum, const kk_moe_args &a, multiply_state &m, int count)
{
#pragma unroll
	for (int n = 0; n < N / 8; n++)
#pragma unroll
		for (int i = 0; i < 4; i++)
			sum[n][i] = 0.0f;
#pragma unroll 1
	for (; count > 0; count--)
		multiply_stage<N, GROUP>(sum, m, a.block_m * 128);
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
	int t = ptx_thread_again() % GROUP_THREADS, lane = t % 32, warp = t / 32, place = t / 4, piece = t % 4;
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
				ptx_load_shared(turn_at(turn, place, piece));
	}
}

/* The places' outputs, still WIDENED too small: 64 rows of a warp group, sixteen a warp. */
template <int N>
__device__ __forceinline__ void store_part(const kk_moe_args &a, const prefill_item &it,
                                           const wide_sums<N> &sum, uint32_t turns, int group)
{
	int t = ptx_thread_again() % GROUP_THREADS, lane = t % 32, warp = t / 32, place = t / 8, piece = t % 8;
	char *part = (char *)a.part + it.row_tile * (ROWS * 2) + group * 128 + piece * 16;
	uint32_t pitch = a.hidden * 2, to = turn_at(turns, lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
	uint32_t from = turn_at(turns, place, piece), number = ptx_shared_address(it.place + place);
	int left = it.rows;

#pragma unroll
	for (int c = 0; c < N / 16; c++, left -= 16) {
		uint32_t row = ptx_load_shared_word(number + c * 64), v[4];

		if (left <= 0)
			break;
#pragma unroll
		for (int j = 0; j < 4; j++)
			v[j] = pack(sum[2 * c + j / 2][j % 2 * 2], sum[2 * c + j / 2][j % 2 * 2 + 1]);
		ptx_store_turned(to + c % 2 * TURN_BYTES, v);
		ptx_barrier_some(BAR_GROUP + group, GROUP_THREADS); /* sixteen places are there */
		if (place < left)
			*(uint4 *)(part + (uint64_t)row * pitch) = ptx_load_shared(from + c % 2 * TURN_BYTES);
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
			add_y(a, at + i, v[i]);
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
			weight[k] = WIDENED * __ldg(a.weights + place);
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

template <int N, int GROUP>
__device__ __forceinline__ void run_item(const kk_moe_args &a, const prefill_work &w, multiply_state &m,
                                         const prefill_item &it)
{
	int group = threadIdx.x / GROUP_THREADS, kind = it.kind;
	uint32_t turns = w.turns + group * 2 * TURN_BYTES;
	wide_sums<N> sum;

	multiply_item<N, GROUP>(sum, a, m, kind == ITEM_UP ? w.up_records : w.down_records);
	if (kind == ITEM_UP)
		store_act<N>(a, it, sum, turns, group);
	else
		store_part<N>(a, it, sum, turns, group);
}

template <int GROUP>
__device__ __forceinline__ void multiply_items(const kk_moe_args &a, const prefill_work &w, prefill_smem *s)
{
	int group = threadIdx.x / GROUP_THREADS, downs;
	multiply_state m = start_multiplying<GROUP>(a, w, s);

	load_record<GROUP>(m);
	for (;;) {
		const prefill_item &it = next_item(s, m.items);

		if (it.kind == ITEM_END) {
			downs = it.rows;
			break;
		}
		switch ((it.rows + 15) / 16) {
		case 1:
			run_item<16, GROUP>(a, w, m, it);
			break;
		case 2:
			run_item<32, GROUP>(a, w, m, it);
			break;
		case 3:
			run_item<48, GROUP>(a, w, m, it);
			break;
		case 4:
			run_item<64, GROUP>(a, w, m, it);
			break;
		case 5:
			run_item<80, GROUP>(a, w, m, it);
			break;
		case 6:
			run_item<96, GROUP>(a, w, m, it);
			break;
		default:
			run_item<112, GROUP>(a, w, m, it);
		}
		ptx_barrier_some(BAR_GROUP + group, GROUP_THREADS); /* the group's stores, before they are counted */
		if (it.kind == ITEM_UP && threadIdx.x % GROUP_THREADS == 0)
			ptx_add_release(w.tile_done + it.tile, 1);
		give_stage(s->item_empty, m.items.at);
		m.items.next();
	}
	/* Counted once: a release waits for all that this multiprocessor has stored. */
	if (threadIdx.x % GROUP_THREADS == 0)
		ptx_add_release(w.parts_done, downs);
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
	w.x_stage_bytes = a.block_m * RECORD_COLS * 2;
	w.turns = ptx_shared_address(smem + 12 * 1024);
	w.x0 = w.turns + TURNS_BYTES;
	w.stage0 = w.x0 + a.x_stages * w.x_stage_bytes;
	return w;
}

/* What the launch before has counted with, and what this one will. */
__device__ __forceinline__ void take_counters(const kk_moe_args &a, prefill_work &w)
{
	int odd = read_round(a.sync + LAUNCHES) >> 8 & 1;
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

__device__ __forceinline__ void init_barriers(const kk_moe_args &a, prefill_smem *s)
{
	for (int i = 0; i < a.stages; i++) {
		ptx_mbarrier_init(barrier_of(s->full, i), 1);
		ptx_mbarrier_init(barrier_of(s->empty, i), 4 * GROUPS);
	}
	for (int i = 0; i < a.x_stages; i++) {
		ptx_mbarrier_init(barrier_of(s->x_full, i), 32 * GATHER_WARPS);
		ptx_mbarrier_init(barrier_of(s->x_empty, i), 4 * GROUPS);
	}
	for (int i = 0; i < SLOTS; i++) {
		ptx_mbarrier_init(barrier_of(s->item_full, i), 1);
		ptx_mbarrier_init(barrier_of(s->item_empty, i), SLOT_USERS);
	}
	ptx_mbarrier_init_done();
}

template <int GROUP>
__global__ void __launch_bounds__(THREADS, 1) moe_prefill(const __grid_constant__ kk_moe_args a,
                                                          const __grid_constant__ stream_maps maps)
{
	extern __shared__ __align__(1024) char smem[];
	prefill_smem *s = (prefill_smem *)smem;
	const prefill_work &w = s->work;
	int warp = threadIdx.x / 32;

	if (threadIdx.x == 0) {
		prefetch_maps(maps);
		s->work = divide_work(a, smem);
		init_barriers(a, s);
	}
	ptx_release_successor();
	ptx_wait_predecessor();
	take_counters(a, s->work);
	__syncthreads(); /* the block's barriers are ready; the rounds were read before anybody arrives */
	if (warp >= 4 * GROUPS) {
		ptx_fewer_registers<32>();
		if (warp == 4 * GROUPS) {
			if (threadIdx.x % 32 == 0)
				fetch_items<GROUP>(a, maps, w, s);
		} else if (warp < FIRST_GATHER) {
			write_items(a, w, s);
		} else {
			gather_items(a, w, s);
		}
	} else {
		ptx_more_registers<112>();
		multiply_items<GROUP>(a, w, s);
	}
	__syncthreads(); /* nobody needs the counters any more */
	if (threadIdx.x == 0)
		arrive_round(a.sync + LAUNCHES);
}

cudaError_t moe_prefill_launch(const kk_moe_args *a, cudaStream_t stream)
{
	stream_maps maps;
	cudaError_t rc;

	if (!a->part_bf16 || a->inside || a->direct || a->sums_bytes != TURNS_BYTES || a->group_m != 1 ||
	    a->block_n != ROWS || a->block_m > MOST_PLACES || a->block_m % 16 ||
	    a->tokens * a->top_k / a->block_m + a->experts > COUNTER_SET - FIRST_TILE)
		return cudaErrorInvalidValue;
	rc = make_stream_maps<prefill_tile>(&maps, a);
	if (rc != cudaSuccess)
		return rc;
	switch (a->group) {
	case 32:
		return launch_stream<prefill_tile>(a, moe_prefill<32>, THREADS, stream, maps);
	case 64:
		return launch_stream<prefill_tile>(a, moe_prefill<64>, THREADS, stream, maps);
	case 128:
		return launch_stream<prefill_tile>(a, moe_prefill<128>, THREADS, stream, maps);
	}
	return cudaErrorInvalidValue;
}
