/*
 * The decode form of the int4 experts: activations that say that they are there, and the down projection of all experts
 * at once, summed on chip. moe_int4.cu has the essay; moe_fetch.cuh fetches its weights.
 */
#ifndef KK_MOE_DIRECT_CUH
#define KK_MOE_DIRECT_CUH

#include "moe_fetch.cuh"
#include "moe_record.cuh"

/*
 * The decode form's activations say of themselves that they are there: what is stored is a value's bits inverted, which
 * are never zero, since the bf16 of all ones is a NaN that no conversion gives. There are two sets; a launch uses one
 * and clears the other. So that no block waits for a counter and then for what was counted.
 */
__device__ __forceinline__ char *direct_acts(const kk_moe_args &a, int launch, int further)
{
	return (char *)a.act + ((launch >> 8 ^ further) & 1) * (DIRECT_VALUES * 2); /* launches go round below zero too */
}

__device__ __forceinline__ void clear_acts(const kk_moe_args &a, int launch)
{
	int i = threadIdx.x * gridDim.x + blockIdx.x;

	if (i < DIRECT_VALUES / 8)
		((uint4 *)direct_acts(a, launch, 1))[i] = make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ bool has_zero(uint32_t v)
{
	return (v - 0x00010001u) & ~v & 0x80008000u;
}

__device__ __forceinline__ bool is_there(const uint4 &v)
{
	return !(has_zero(v.x) || has_zero(v.y) || has_zero(v.z) || has_zero(v.w));
}

/* What this thread's first element is added to, on its way while the experts work. */
__device__ __forceinline__ float load_first(const kk_moe_args &a, const stream_work &w)
{
	return threadIdx.x < direct_values(a, w) ? load_y(a, place_of(a, w, threadIdx.x).at) : 0.0f;
}

/* Of a place's row of activations in shared memory: -8 times the sums of each 32, in row g's unit, behind them. */
__device__ __forceinline__ uint32_t act_pitch(const kk_moe_args &a)
{
	return a.intermediate * 2 + a.intermediate / 8 + PAD;
}

/* Eight of a row's: 2^64 times themselves, and their sum. */
__device__ __forceinline__ float take_eight(uint4 &v)
{
	uint32_t *word = &v.x;
	float sum = 0.0f;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		word[i] = ~word[i];
		sum += __uint_as_float(word[i] << 16) + __uint_as_float(word[i] & 0xffff0000u);
		word[i] = bf16x2_mul(word[i], TWICE_2_64);
	}
	return sum;
}

/* All places' activations, in the tiles' order, as they come: past the copy engine, since they are few and it is
 * slower. A warp has 32 pieces of eight at a time, AHEAD times on their way at once. */
template <typename L>
__device__ __forceinline__ void load_act(const kk_moe_args &a, const stream_smem *s, const char *act, char *to)
{
	constexpr int AHEAD = 4, HOP = 32 * L::W;
	int row_pieces = a.intermediate / 8, all = s->places_here * row_pieces;

	for (int first = threadIdx.x; first - (int)threadIdx.x % 32 < all; first += AHEAD * HOP) {
		uint4 v[AHEAD] = {};

#pragma unroll
		for (int k = 0; k < AHEAD; k++) {
			int i = first + k * HOP, p = i / row_pieces;

			if (i < all)
				v[k] = ptx_load_fresh(act + ((size_t)s->order[p] * row_pieces + (i - p * row_pieces)) * 16);
		}
#pragma unroll
		for (int k = 0; k < AHEAD; k++) {
			int i = first + k * HOP, p = i / row_pieces, piece = i - p * row_pieces;
			char *row = to + p * act_pitch(a);
			float sum;

			while (i < all && !is_there(v[k]))
				v[k] = ptx_load_fresh(act + ((size_t)s->order[p] * row_pieces + piece) * 16);
			sum = take_eight(v[k]);
			sum += __shfl_xor_sync(0xffffffffu, sum, 1);
			sum += __shfl_xor_sync(0xffffffffu, sum, 2);
			if (i < all)
				*(uint4 *)(row + piece * 16) = v[k];
			if (i < all && piece % 4 == 0)
				*(float *)(row + a.intermediate * 2 + piece) = -0x1p-66f * sum;
		}
	}
	ptx_barrier_some(BAR_ALL, 32 * L::W); /* they are in shared memory */
}

/*
 * Row blocks of all experts at once: a warp's unit is some row blocks of one tile's expert. All of this
 * block's places' rows meet in shared memory, and are summed in the order of k.
 */
template <typename L>
__device__ __forceinline__ void multiply_direct(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                                const lane_parts &p, char *base, float *sums, rings &q, const char *act,
                                                float before)
{
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
	int places = a.tokens * a.top_k, blocks = w.down_hi - w.down_lo;
	int units = (blocks + L::RB - 1) / L::RB * w.tiles;
	int tile = w.tiles ? warp % w.tiles : 0, block = w.tiles ? warp / w.tiles * L::RB : 0;
	uint32_t rec = w.record_bytes, pitch = act_pitch(a), first = w.stage0 + warp * L::RB * rec;

	static_assert(L::RB == 2, "two row blocks, a stage each");
	load_act<L>(a, s, act, base + w.stages * w.stage_bytes);
	for (int u = 0; u < units; u += L::W) {
		bool mine = u + warp < units;
		int at = mine ? s->tile_first[tile] : 0, rows = mine ? s->tile_rows[tile] : 1;
		uint32_t x = w.x0 + at * pitch;
		uint2 bias = {x + min(2 * t, rows - 1) * pitch + a.intermediate * 2,
		              x + min(2 * t + 1, rows - 1) * pitch + a.intermediate * 2};
		x_rows<L> own = lane_rows<L>(rows, pitch);
		tile_sums<L> sum;

		clear<L>(sum);
		for (int c = 0; c < w.down_records; c += L::RB) {
			int n = mine ? min(L::RB, w.down_records - c) : 0, one = q.w.at;
			uint32_t stage = first + one * w.stage_bytes, second;

			ptx_mbarrier_wait(barrier_of(s->full, one), q.w.parity);
			q.w.next();
			second = first + q.w.at * w.stage_bytes;
			ptx_mbarrier_wait(barrier_of(s->full, q.w.at), q.w.parity);
			for (int k = 0; k < n; k++) {
				multiply_record<L, true>(sum, p, stage + k * rec, second - stage, x, own, rows, bias);
				x += RECORD_COLS * 2;
				bias.x += RECORD_COLS / 8, bias.y += RECORD_COLS / 8;
			}
			give_stage(s->empty, one);
			give_stage(s->empty, q.w.at);
			q.w.next();
		}
#pragma unroll
		for (int r = 0; r < L::RB; r++)
#pragma unroll
			for (int v = 0; v < 4; v++)
				if (mine && block + r < blocks && 2 * t + v % 2 < rows)
					sums[((block + r) * places + at + 2 * t + v % 2) * 17 + g + v / 2 * 8] =
						(v < 2 ? L::UNIT : L::UNIT_8) * sum[r][0][v];
		for (tile += L::W; tile >= w.tiles && w.tiles; tile -= w.tiles)
			block += L::RB;
	}
	ptx_barrier_some(BAR_ALL, 32 * L::W); /* every place's rows are here */
	for (int o = threadIdx.x; o < direct_values(a, w); o += 32 * L::W) {
		direct_place y = place_of(a, w, o);
		float all = 0.0f;

		for (int k = 0; k < a.top_k; k++) {
			int at = s->position[y.token * a.top_k + k];

			if (at >= 0)
				all = fmaf(s->weights[y.token * a.top_k + k], sums[(y.block * places + at) * 17 + y.row], all);
		}
		store_y(a, y.at, o < 32 * L::W ? before : load_y(a, y.at), all);
	}
}

#endif
