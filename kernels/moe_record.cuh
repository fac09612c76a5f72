/*
 * Records of int4 weights times activations: what a warp that multiplies does with a stage. moe_int4.cu has the essay.
 */
#ifndef KK_MOE_RECORD_CUH
#define KK_MOE_RECORD_CUH

#include "moe_work.cuh"

struct rings {
	ring w, x;
};

__device__ __forceinline__ void give_stage(const uint64_t *empty, int at)
{
	__syncwarp();
	if (threadIdx.x % 32 == 0)
		ptx_mbarrier_arrive(barrier_of(empty, at));
}

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

#endif
