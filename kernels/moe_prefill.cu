/*
 * The int4 experts for many tokens: warp-group matrix instructions, weights widened in registers.
 *
 * ROOFLINE
 *   6 M top_k H I flops: at E = 384, top 8, H = 7168, I = 256 (TP8), M = 4,096: 361 GFLOP, 463 us at
 *   H100's 780 TFLOP/s; the weights' 1.19 GB take 384 us at 3.10 TB/s: memory binds up to some 3,400
 *   tokens at a perfect matrix rate, arithmetic above. What it costs besides: four instructions of
 *   integer and two of bf16 arithmetic for two weights, once for each tile of 128 places; x read again
 *   for every 256 rows (M = 4,096, TP8: 0.94 GB through L2); each place's output, out and in as bf16.
 *
 * LADDER: kernels/moe_int4.cu.
 *
 * HOW
 *   Two warp groups hold 256 rows of weights by 128 places in their accumulators. Weights are operand A,
 *   from registers: a record's words are what a lane needs, so they go from shared memory to registers,
 *   are widened and scaled there, and never written back. Activations are operand B, in shared memory,
 *   rows of 128 bytes with their pieces exchanged; three warps of the third group gather them by token,
 *   its first warp fetches the weights. While one warp group widens, the other's products run.
 *
 * RULES
 *   Those of moe_int4.cuh, and: a weight is rounded to bf16 once (code - 8) * scale is taken, which
 *   costs 0.0017 of the error bound; the other forms scale sums instead. A tile's unused places are
 *   whatever shared memory held: a place's output depends on its own column alone.
 */
#include "moe_int4.cuh"

enum {
	PREFILL_TILE = 128,
	PREFILL_THREADS = 384,
	GATHER_WARPS = 3,
	PREFILL_X_BYTES = PREFILL_TILE * RECORD_COLS * 2,
};
static_assert(GATHER_WARPS * PREFILL_TILE <= 2 * INSIDE_PLACES, "the tables are where small calls sort ids");

/* The same division of work for each number of places; N: columns of the products. */
template <int N>
using prefill_tile = tile<N, 2, 8, 8, 1>;
using prefill_full = prefill_tile<PREFILL_TILE>;

/* This lane's places of the tile: lane, lane + 32, ... */
struct lane_places {
	int place[PREFILL_TILE / 32], rows;
};

__device__ __forceinline__ lane_places find_lane_places(const kk_moe_args &a, int tile)
{
	int lane = threadIdx.x % 32, all = a.tokens * a.top_k;
	lane_places p;

	p.rows = 0;
#pragma unroll
	for (int i = 0; i < PREFILL_TILE / 32; i++) {
		p.place[i] = __ldcg(a.sorted + (size_t)tile * PREFILL_TILE + 32 * i + lane);
		p.rows += __popc(__ballot_sync(0xffffffffu, p.place[i] < all));
	}
	return p;
}

/* ---- The warps that gather activations. ---- */

/* Where each place's row begins, in 16 bytes; each gathering warp has a table of its own. */
__device__ __forceinline__ void write_table(int *table, const lane_places &p, int divisor, int row_pieces)
{
	__syncwarp(); /* the table before has been read */
#pragma unroll
	for (int i = 0; i < PREFILL_TILE / 32; i++)
		table[threadIdx.x % 32 + 32 * i] = p.place[i] / divisor * row_pieces;
	__syncwarp(); /* this one is written */
}

/* 128 columns of each row, half a warp a row. */
__device__ __forceinline__ void gather_stage(const stream_work &w, stream_smem *s, ring &r, const int *table,
                                             int rows, const uint4 *from)
{
	int half = threadIdx.x / 16 - 2 * (prefill_full::W + 1), piece = threadIdx.x % 16;
	uint32_t to = w.x0 + r.at * PREFILL_X_BYTES + piece / 8 * (PREFILL_TILE * 128);

	ptx_mbarrier_wait(barrier_of(s->x_empty, r.at), r.parity ^ 1);
#pragma unroll 4
	for (int row = half; row < rows; row += 2 * GATHER_WARPS)
		ptx_copy_async(to + row * 128 + ((piece % 8 ^ row % 8) << 4), from + (table[row] + piece));
	ptx_mbarrier_arrive_copied(barrier_of(s->x_full, r.at));
	r.next();
}

__device__ __forceinline__ void gather_activations(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                                   int round)
{
	ring r = {0, 0, w.x_stages};
	int *table = s->ids + (threadIdx.x / 32 - prefill_full::W - 1) * PREFILL_TILE, tile = -1, rows = 0;

	for (int i = w.up_lo; i < w.up_hi; i++) {
		item it = find_item(i, w.tiles, 2 * a.intermediate / prefill_full::ROWS, a.group_m);

		if (it.tile != tile) {
			lane_places p = find_lane_places(a, it.tile);

			rows = p.rows;
			write_table(table, p, a.top_k, a.hidden / 8);
		}
		tile = it.tile;
		for (int c = 0; c < w.up_records; c++)
			gather_stage(w, s, r, table, rows, (const uint4 *)a.x + c * (RECORD_COLS / 8));
	}
	tile = -1;
	for (int i = w.down_lo; i < w.down_hi; i++) {
		item it = find_item(i, w.tiles, a.hidden / prefill_full::DOWN_ROWS, a.group_m);

		if (it.tile != tile) {
			lane_places p = find_lane_places(a, it.tile);

			rows = p.rows;
			wait_tile(a, it.tile, 2 * a.intermediate / prefill_full::ROWS * prefill_full::WR, round);
			write_table(table, p, 1, a.intermediate / 8);
		}
		tile = it.tile;
		for (int c = 0; c < w.down_records; c++)
			gather_stage(w, s, r, table, rows, (const uint4 *)a.act + c * (RECORD_COLS / 8));
	}
}

/* ---- The warp groups that multiply. ---- */

__device__ __forceinline__ uint32_t times(uint32_t v, uint32_t scale)
{
	__nv_bfloat162 b = __hmul2(*(__nv_bfloat162 *)&v, *(__nv_bfloat162 *)&scale);

	return *(uint32_t *)&b;
}

/* Two steps of both row blocks. */
struct wide {
	uint32_t a[2][2][4]; /* [step][row block] */
};

__device__ __forceinline__ void widen_pair(wide &d, const uint4 (&q)[2], int pair, const uint32_t (&scale)[2])
{
#pragma unroll
	for (int r = 0; r < 2; r++) {
		uint32_t low = __byte_perm(scale[r], 0, 0x1010), high = __byte_perm(scale[r], 0, 0x3232);

		widen<false>(d.a[0][r], pair ? q[r].z : q[r].x);
		widen<false>(d.a[1][r], pair ? q[r].w : q[r].y);
#pragma unroll
		for (int k = 0; k < 2; k++) {
			d.a[k][r][0] = times(d.a[k][r][0], low), d.a[k][r][2] = times(d.a[k][r][2], low);
			d.a[k][r][1] = times(d.a[k][r][1], high), d.a[k][r][3] = times(d.a[k][r][3], high);
		}
	}
}

template <int N>
using wide_sums = float[2][N / 8][4];

/* One stage: 128 columns of the warp's two row blocks. The products of 32 columns run while the next 32
 * are widened; all are done at the end. */
template <int N>
__device__ __forceinline__ void multiply_stage(wide_sums<N> &sum, const uint8_t *record, uint32_t rec, uint32_t x,
                                               int group_shift)
{
	int lane = threadIdx.x % 32;
	wide d[2];

#pragma unroll
	for (int g = 0; g < 4; g++) {
		uint4 q[2];
		uint32_t scale[2];

#pragma unroll
		for (int r = 0; r < 2; r++) {
			const uint8_t *at = record + r * rec;

			q[r] = *(const uint4 *)(at + g / 2 * 512 + lane * 16);
			scale[r] = ((const uint32_t *)(at + RECORD_CODES))[(lane / 4) * (4 >> group_shift) +
			                                                  (g >> group_shift)];
		}
		widen_pair(d[g % 2], q, g % 2, scale);
		ptx_wgmma_fence();
#pragma unroll
		for (int k = 0; k < 2; k++) {
			uint64_t b = ptx_wgmma_matrix(x + g / 2 * (PREFILL_TILE * 128) + (g % 2 * 2 + k) * 32, 16);

			ptx_wgmma_bf16<N>(sum[0], d[g % 2].a[k][0], b);
			ptx_wgmma_bf16<N>(sum[1], d[g % 2].a[k][1], b);
		}
		ptx_wgmma_commit();
		if (g < 3)
			ptx_wgmma_wait<1>(); /* the group before: its registers are widened into next */
	}
	ptx_wgmma_wait<0>();
}

struct multiply_state {
	const uint8_t *base;
	rings q;
};

/* All of an item's columns. */
template <int N>
__device__ __forceinline__ void multiply_item(wide_sums<N> &sum, const stream_work &w, stream_smem *s,
                                              multiply_state &m, int records)
{
	int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

	clear<prefill_tile<N>>(sum);
	for (int c = 0; c < records; c++) {
		ptx_mbarrier_wait(barrier_of(s->full, m.q.w.at), m.q.w.parity);
		ptx_mbarrier_wait(barrier_of(s->x_full, m.q.x.at), m.q.x.parity);
		ptx_fence_copies(); /* the gathered rows, before the matrix instructions read them */
		multiply_stage<N>(sum, m.base + m.q.w.at * w.stage_bytes + 2 * warp * w.record_bytes, w.record_bytes,
		                  w.x0 + m.q.x.at * PREFILL_X_BYTES, w.group_shift);
		__syncwarp();
		if (lane == 0) {
			ptx_mbarrier_arrive(barrier_of(s->empty, m.q.w.at));
			ptx_mbarrier_arrive(barrier_of(s->x_empty, m.q.x.at));
		}
		m.q.w.next();
		m.q.x.next();
	}
}

template <int N>
__device__ __forceinline__ void up_item(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                        multiply_state &m, const lane_places &p, int rows_tile)
{
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
	__nv_bfloat16 *act = (__nv_bfloat16 *)a.act + (rows_tile * prefill_full::WR + warp) * 16 + g;
	wide_sums<N> sum;

	multiply_item<N>(sum, w, s, m, w.up_records);
#pragma unroll
	for (int n = 0; n < N / 8; n++)
#pragma unroll
		for (int i = 0; i < 2; i++) {
			int row = n * 8 + 2 * t + i, place = __shfl_sync(0xffffffffu, p.place[n / 4], row % 32);

			if (row < p.rows)
#pragma unroll
				for (int r = 0; r < 2; r++)
					act[(size_t)place * a.intermediate + r * 8] =
						__float2bfloat16(silu(sum[r][n][i]) * sum[r][n][2 + i]);
		}
}

template <int N>
__device__ __forceinline__ void down_item(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                          multiply_state &m, const lane_places &p, int rows_tile)
{
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
	__nv_bfloat16 *part = (__nv_bfloat16 *)a.part + rows_tile * prefill_full::DOWN_ROWS + warp * 32 + (g & ~1);
	wide_sums<N> sum;

	multiply_item<N>(sum, w, s, m, w.down_records);
#pragma unroll
	for (int n = 0; n < N / 8; n++) {
		/* A pair of lanes swaps, so that each has two rows of one place. */
		int row = n * 8 + 2 * t + (g & 1), place = __shfl_sync(0xffffffffu, p.place[n / 4], row % 32);

#pragma unroll
		for (int r = 0; r < 2; r++)
#pragma unroll
			for (int h = 0; h < 2; h++) {
				float even = sum[r][n][2 * h], odd = sum[r][n][2 * h + 1];
				float keep = g & 1 ? odd : even;
				float got = __shfl_xor_sync(0xffffffffu, g & 1 ? even : odd, 4);

				if (row < p.rows)
					*(__nv_bfloat162 *)(part + (size_t)place * a.hidden + r * 16 + h * 8) =
						g & 1 ? __floats2bfloat162_rn(got, keep) : __floats2bfloat162_rn(keep, got);
			}
	}
}

template <bool UP, int N>
__device__ __forceinline__ void one_item(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                         multiply_state &m, const lane_places &p, int rows_tile)
{
	if (UP)
		up_item<N>(a, w, s, m, p, rows_tile);
	else
		down_item<N>(a, w, s, m, p, rows_tile);
}

template <bool UP>
__device__ __forceinline__ void multiply_items(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                               multiply_state &m)
{
	int lo = UP ? w.up_lo : w.down_lo, hi = UP ? w.up_hi : w.down_hi;
	int row_tiles = UP ? 2 * a.intermediate / prefill_full::ROWS : a.hidden / prefill_full::DOWN_ROWS;

	lane_places p = {};
	int tile = -1;

	for (int i = lo; i < hi; i++) {
		item it = find_item(i, w.tiles, row_tiles, a.group_m);

		if (it.tile != tile)
			p = find_lane_places(a, it.tile);
		tile = it.tile;
		if (p.rows <= 32)
			one_item<UP, 32>(a, w, s, m, p, it.rows);
		else if (p.rows <= 64)
			one_item<UP, 64>(a, w, s, m, p, it.rows);
		else if (p.rows <= 96)
			one_item<UP, 96>(a, w, s, m, p, it.rows);
		else
			one_item<UP, 128>(a, w, s, m, p, it.rows);
		if (UP)
			finish_part(a, it.tile);
	}
}

__global__ void __launch_bounds__(PREFILL_THREADS, 1) moe_prefill(const __grid_constant__ kk_moe_args a)
{
	extern __shared__ __align__(1024) char smem[];
	stream_smem *s = (stream_smem *)smem;
	int warp = threadIdx.x / 32, round_up, round_down;
	stream_work w;

	w.group_shift = a.group == 32 ? 0 : a.group == 64 ? 1 : 2;
	w.record_bytes = RECORD_CODES + 4096 / a.group;
	w.up_records = a.hidden / RECORD_COLS;
	w.down_records = a.intermediate / RECORD_COLS;
	w.stages = a.stages;
	w.x_stages = a.x_stages;
	w.stage_bytes = 16 * w.record_bytes;
	w.x0 = ptx_shared_address(smem + 12 * 1024);
	w.stage0 = w.x0 + w.x_stages * PREFILL_X_BYTES;
	if (threadIdx.x == 0) {
		for (int i = 0; i < w.stages; i++) {
			ptx_mbarrier_init(barrier_of(s->full, i), 1);
			ptx_mbarrier_init(barrier_of(s->empty, i), prefill_full::W);
		}
		for (int i = 0; i < w.x_stages; i++) {
			ptx_mbarrier_init(barrier_of(s->x_full, i), 32 * GATHER_WARPS);
			ptx_mbarrier_init(barrier_of(s->x_empty, i), prefill_full::W);
		}
		ptx_mbarrier_init_done();
	}
	ptx_release_successor();
	ptx_wait_predecessor();
	round_up = round_of(a.sync);
	round_down = round_of(a.sync + SYNC_STRIDE);
	w.tiles = __ldcg(a.total) / PREFILL_TILE;
	__syncthreads(); /* the block's barriers are ready; the rounds were read before anybody arrives */
	divide<prefill_full>(a, w);
	if (warp >= prefill_full::W) {
		ptx_fewer_registers<56>();
		if (warp == prefill_full::W)
			fetch_weights<prefill_full>(a, w, s);
		else
			gather_activations(a, w, s, round_up);
	} else {
		multiply_state m = {(const uint8_t *)smem + 12 * 1024 + w.x_stages * PREFILL_X_BYTES,
		                    {{0, 0, w.stages}, {0, 0, w.x_stages}}};

		ptx_more_registers<224>();
		multiply_items<true>(a, w, s, m);
		if (!a.ready) {
			ptx_barrier_some(BAR_ALL, 32 * prefill_full::W); /* this block's activations are stored */
			if (threadIdx.x == 0)
				arrive_round(a.sync);
		}
		multiply_items<false>(a, w, s, m);
		ptx_barrier_some(BAR_ALL, 32 * prefill_full::W); /* this block's parts are stored */
		if (threadIdx.x == 0) {
			arrive_round(a.sync + SYNC_STRIDE);
			wait_round(a.sync + SYNC_STRIDE, round_down);
		}
		ptx_barrier_some(BAR_ALL, 32 * prefill_full::W); /* every block's are */
		clear_ready(a, w.tiles, 32 * prefill_full::W);
		sum_places(a, 32 * prefill_full::W);
	}
}

cudaError_t moe_prefill_launch(const kk_moe_args *a, cudaStream_t stream)
{
	if (!a->part_bf16 || a->inside || a->direct || a->sums_bytes || a->block_n != prefill_full::ROWS)
		return cudaErrorInvalidValue;
	return launch_stream<prefill_full>(a, moe_prefill, PREFILL_THREADS, stream);
}
