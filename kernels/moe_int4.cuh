/*
 * The streaming kernel of the int4 experts: from routed ids to the summed output in one launch.
 * moe_int4.cu has the essay; moe_int4_large.cu the tiles of many tokens.
 */
#ifndef KK_MOE_INT4_CUH
#define KK_MOE_INT4_CUH

#include "launch.cuh"
#include "moe_fetch.cuh"
#include "moe_front.cuh"

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

/*
 * One record of each of the warp's row blocks, `block_pitch` apart, times 128 columns of `rows` places. READY: the
 * activations are 2^64 times themselves, and `bias` is where those of this lane's two places are, a word for 32 columns.
 */
template <typename L, bool READY = false>
__device__ __forceinline__ void multiply_record(tile_sums<L> &sum, const lane_parts &p, uint32_t record,
                                                uint32_t block_pitch, uint32_t x, const x_rows<L> &own, int rows,
                                                const uint2 &bias_at = {})
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
					if (READY) {
						uint32_t at = (half * 2 + k) * 4;

						bias[0] = __uint_as_float(ptx_load_shared_word(bias_at.x + at));
						bias[1] = __uint_as_float(ptx_load_shared_word(bias_at.y + at));
						bias[2] = 16.0f * bias[0], bias[3] = 16.0f * bias[1];
					} else if (L::BIASED) {
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

/*
 * The decode form's activations say of themselves that they are there: what is stored is a value's bits inverted, which
 * are never zero, since the bf16 of all ones is a NaN that no conversion gives. There are two sets; a launch uses one
 * and clears the other. So that no block waits for a counter and then for what was counted.
 */
__device__ __forceinline__ char *direct_acts(const kk_moe_args &a, int launch, int further)
{
	return (char *)a.act + ((launch >> 8) + further) % 2 * (DIRECT_VALUES * 2);
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

/* act = silu(gate) * up of one item; a lane's first two sums are gate's, the others up's. INVERTED: direct_acts. */
template <typename L, bool INVERTED>
__device__ __forceinline__ void store_act(const kk_moe_args &a, char *to, const tile_sums<L> &sum, const int *places,
                                          int rows, int first)
{
	int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	unsigned short *act = (unsigned short *)to + first + g;

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
					__bfloat16_as_ushort(__float2bfloat16(silu(L::UNIT * sum[r][n][i]) *
					                                      (L::UNIT_8 * sum[r][n][2 + i]))) ^
					(INVERTED ? 0xffff : 0);
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

template <typename L, bool DIRECT>
__device__ __forceinline__ void multiply_up(const kk_moe_args &a, const stream_work &w, stream_smem *s,
                                            const lane_parts &p, int warp, float *sums, rings &q, char *act)
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
					store_act<L, DIRECT>(a, act, sum, s->places[q.x.at], s->rows[q.x.at],
					             (s->item[q.x.at].y * L::WR + warp_row) * L::RB * 8);
				tile = s->item[q.x.at].x;
			}
			give_stage(s->x_empty, q.x.at);
			q.x.next();
		}
		if (!DIRECT && warp_column == 0)
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
			add_y(a, (size_t)token * a.hidden + column + i, all[i]);
	}
}

/* DIRECT: the decode form. */
template <typename L, bool DIRECT>
__global__ void __launch_bounds__(L::THREADS, 1) moe_stream(const __grid_constant__ kk_moe_args a,
                                                                const __grid_constant__ stream_maps maps)
{
	extern __shared__ __align__(1024) char smem[];
	stream_smem *s = (stream_smem *)smem;
	float *sums = (float *)(smem + 12 * 1024);
	char *base = smem + 12 * 1024 + a.sums_bytes;
	int warp = threadIdx.x / 32, most = min(a.tokens, L::T), round; /* of the launches, or of what all wait for first */
	bool front = DIRECT && a.gate.logits;
	float before = 0.0f;
	front_ahead ahead;
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
#pragma unroll 1
		for (int i = 0; i < w.stages; i++) {
			ptx_mbarrier_init(barrier_of(s->full, i), 1);
			ptx_mbarrier_init(barrier_of(s->empty, i), L::W);
		}
#pragma unroll 1
		for (int i = 0; i < w.x_stages; i++) {
			ptx_mbarrier_init(barrier_of(s->x_full, i), 1);
			ptx_mbarrier_init(barrier_of(s->x_empty, i), L::W);
		}
		ptx_mbarrier_init(barrier_of(&s->bias, 0), 1);
		ptx_mbarrier_init_done();
	}
	begin_division<L, DIRECT>(a, w);
	ptx_release_successor();
	if (front)
		begin_front(ahead, s, (front_smem *)sums, a, w);
	ptx_wait_predecessor();
	round = round_of(a.sync + (DIRECT ? DIRECT_LAUNCHES : 0));
	if (DIRECT && warp < L::W)
		before = load_first(a, w);
	if (DIRECT || a.inside) {
		if (front) {
			run_front(a, s, (front_smem *)sums, most, w.per_most);
		} else if (a.tokens * a.top_k > WARP_PLACES) {
			sort_inside(a, s, most);
		} else {
			if (warp == 0)
				sort_by_warp(a, s, most, w.per_most, false);
			__syncthreads(); /* the tiles are known to all; the block's barriers are ready */
		}
		w.tiles = s->tiles;
	} else {
		w.tiles = __ldcg(a.total) / L::T;
		__syncthreads(); /* the block's barriers are ready; the round was read before anybody arrives */
	}
	divide<L, DIRECT>(a, w);
	if (warp == L::W) {
		fetch_weights<L, DIRECT>(a, maps, w, s);
	} else if (warp == L::W + 1) {
		fetch_activations<L, DIRECT>(a, w, s, round);
	} else {
		rings q = {{0, 0, w.stages}, {0, 0, w.x_stages}};
		if (front)
			before += multiply_shared(a, w, (front_smem *)sums, ahead, 32 * L::W);
		lane_parts p = lane_records(threadIdx.x % 32, w.group_shift, ptx_shared_address(s->minus));

		if (threadIdx.x == 0 && !DIRECT)
			s->round_down = round_of(a.sync + SYNC_STRIDE); /* which cannot end without this block */
		if constexpr (DIRECT) {
			char *act = direct_acts(a, round, 0);

			clear_acts(a, round);
			multiply_up<L, true>(a, w, s, p, warp, sums, q, act);
			if (L::WK == 1)
				ptx_barrier_some(BAR_ALL, 32 * L::W); /* the stages of x have been read; join waits too */
			multiply_direct<L>(a, w, s, p, base, sums, q, act, before);
			if (threadIdx.x == 0)
				arrive_round(a.sync + DIRECT_LAUNCHES);
		} else {
			multiply_up<L, false>(a, w, s, p, warp, sums, q, (char *)a.act);
			if (!a.ready) {
				ptx_barrier_some(BAR_ALL, 32 * L::W); /* this block's activations are stored */
				if (threadIdx.x == 0)
					arrive_round(a.sync);
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
	cudaLaunchAttribute attr = {};
	cudaLaunchConfig_t config = {};
	cudaError_t rc = allow_shared(kernel, a->smem_bytes);

	if (rc != cudaSuccess)
		return rc;
	if (a->warps != L::W || a->hidden % L::DOWN_ROWS || 2 * a->intermediate % L::ROWS)
		return cudaErrorInvalidValue;
	config.gridDim = dim3(a->blocks);
	config.blockDim = dim3(threads);
	config.dynamicSmemBytes = a->smem_bytes;
	config.stream = stream;
	config.attrs = &attr;
	/* Blocks wait for each other. Where launches overlap, all run at once without being told to (moe_int4.cu, RULES),
	 * and a cooperative launch begins 1 us later. */
	config.numAttrs = 1;
	if (a->pdl) {
		attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
		attr.val.programmaticStreamSerializationAllowed = 1;
	} else {
		attr.id = cudaLaunchAttributeCooperative;
		attr.val.cooperative = 1;
	}
	return cudaLaunchKernelEx(&config, kernel, *a, more...);
}

template <typename L, bool DIRECT>
static cudaError_t launch_tile(const kk_moe_args *a, cudaStream_t stream)
{
	stream_maps maps;
	cudaError_t rc = make_stream_maps<L>(&maps, a);

	return rc != cudaSuccess ? rc : launch_stream<L>(a, moe_stream<L, DIRECT>, L::THREADS, stream, maps);
}

cudaError_t moe_stream_large(const kk_moe_args *a, cudaStream_t stream);
cudaError_t moe_prefill_launch(const kk_moe_args *a, cudaStream_t stream);

#endif
