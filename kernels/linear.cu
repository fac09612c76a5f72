/*
 * Dense linear layers, y = x Wᵀ: bf16 activations, weights of any type, f32 sums.
 *
 * ROOFLINE
 *   Up to some 200 rows the weights' bytes are the bound: 2 bytes a bf16 weight, 1 an fp8 one. K2.5's
 *   projections at one row, bf16: q_a and kv_a 30 MB, q_b 38, o 117, head 2,349: 9.8, 12.2, 38, 758 us at
 *   H100's 3.10 TB/s, 6.7, 8.4, 26, 522 at H200's 4.50. Beyond, 2 flops a weight and row.
 *
 * LADDER
 *   general   a warp an output, any type of weight and any shape; CUDA cores.
 *   stream    below: bf16 and fp8; up to STREAM_TILES x 8 rows for one pass over the weights.
 *   cuBLASLt  many rows (device/cuda_blas.c), over weights that are bf16 or were made so.
 *
 *   us a call on H100, 1 / 8 / 16 / 32 rows of bf16, launches overlapping, weights cold; cuBLASLt at 64:
 *     q_a, kv_a  15.7 / 18.7 / 20.8 / 23.1   22.0      share of 3.03 TB/s at 1 row: 0.64
 *     q_b        18.0 / 20.3 / 24.1 / 36.3   16.6                                   0.69
 *     o          44.0 / 50.1 / 60.1 / 92.3   43.1                                   0.88
 *     gate, up   22.7 / 27.1 / 32.1 / 44.1   31.0      (shared expert)              0.85
 *     down       14.2 / 15.2 / 17.2 / 27.0   12.7      (shared expert)              0.68
 *     head        779 /  975 / 1169 / 1726                                          1.00
 *   fp8 at 1 row: 13.4, 13.5, 34.6, 19.6, 12.2: half the bytes, not half the time. What is missing: x is
 *   fetched only when a step's weights are there, and a slice of TP8 has too few blocks (gate and up: 32).
 *
 * RULES
 *   Order of a sum: told at each form; it depends on the shape of the weight alone, never on the rows, so
 *   that both forms give a row the same bits in any batch. No atomics.
 */
#include "dense.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "weight.cuh"

/* ---- the general form ---- */

enum { GENERAL_WARPS = 8, GENERAL_TOKENS = 4 };

__device__ __forceinline__ void store(const kk_linear_args &a, int weight, int t, int row, float v)
{
	size_t at = (size_t)t * a.y_stride[weight] + row;

	if (a.y_bf16)
		((__nv_bfloat16 *)a.y[weight])[at] = __float2bfloat16(v);
	else
		((float *)a.y[weight])[at] = a.accumulate ? ((float *)a.y[weight])[at] + v : v;
}

/* A warp an output row. Order: a lane's columns by rising index, then a butterfly of the lanes. */
__global__ void __launch_bounds__(32 * GENERAL_WARPS) linear_general(kk_linear_args a)
{
	int row = blockIdx.x * GENERAL_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
	int weight = row >= a.w[0].rows, first = blockIdx.y * GENERAL_TOKENS;
	float sum[GENERAL_TOKENS] = {};

	ptx_release_successor();
	ptx_wait_predecessor();
	row -= weight ? a.w[0].rows : 0;
	if (weight >= a.weights || row >= a.w[weight].rows)
		return;
	for (int col = lane; col < a.w[0].cols; col += 32) {
		float v = read_weight(weight ? a.w[1] : a.w[0], row, col);

#pragma unroll
		for (int t = 0; t < GENERAL_TOKENS; t++)
			if (first + t < a.tokens)
				sum[t] +=
					v * read_bf16(a.x, (size_t)(first + t) * a.x_stride + col);
	}
#pragma unroll
	for (int t = 0; t < GENERAL_TOKENS; t++) {
		float v = sum_lanes(sum[t]);

		if (lane == 0 && first + t < a.tokens)
			store(a, weight, first + t, row, v);
	}
}

cudaError_t kk_linear_general(const kk_linear_args *a, cudaStream_t stream)
{
	int rows = a->w[0].rows + (a->weights > 1 ? a->w[1].rows : 0);
	dim3 grid((rows + GENERAL_WARPS - 1) / GENERAL_WARPS,
	          (a->tokens + GENERAL_TOKENS - 1) / GENERAL_TOKENS);

	if (a->weights < 1 || a->weights > 2 || (a->y_bf16 && a->accumulate) || grid.y > 65535)
		return cudaErrorInvalidValue;
	return launch(linear_general, grid, 32 * GENERAL_WARPS, a->pdl, stream, *a);
}

/*
 * ---- the streaming form ----
 *
 * A block has 16 output rows; its warps split the columns, STEP at a time and in turn, so that
 * together they read runs of a kilobyte. Lane 4g + t holds 16 columns, from 16 t on, of rows g and
 * g + 8, and the same columns of x's row g: the tensor cores take columns in any order as long as
 * both operands agree, so neither passes through shared memory. Two steps of weights are on their
 * way while two are multiplied, the first two already before the previous kernel has ended.
 *
 * Order of a sum: a warp's steps by rising column, inside a step the tensor cores' order over its
 * 64 columns; then the warps. An fp8 step is summed alone and joins times its scale.
 */
enum { STEP = 64, STREAM_WARPS = 8, AHEAD = 2, STREAM_TILES = 4 };

/* 16 columns of one row: bf16 as two vectors, fp8 as one. */
template <bool FP8> struct piece {
	uint4 v[FP8 ? 1 : 2];
};

template <bool FP8>
__device__ __forceinline__ piece<FP8> load_piece(const km_weight &w, int row, int col)
{
	constexpr int VECTORS = FP8 ? 1 : 2, COLS = 16 / VECTORS;
	piece<FP8> p;

#pragma unroll
	for (int i = 0; i < VECTORS; i++) {
		int c = col + i * COLS;

		p.v[i] = make_uint4(0, 0, 0, 0);
		if (c < w.cols)
			p.v[i] = ptx_load_stream((const char *)w.data +
			                         ((size_t)row * w.cols + c) * (FP8 ? 1 : 2));
	}
	return p;
}

/* Columns 2i and 2i + 1 of a piece, as two bf16. */
template <bool FP8> __device__ __forceinline__ uint32_t pair_of(const piece<FP8> &p, int i)
{
	if constexpr (FP8)
		return ptx_e4m3x2_to_bf16x2((uint16_t)(word_of(p.v[0], i / 2) >> i % 2 * 16));
	else
		return word_of(p.v[i / 4], i % 4);
}

/* Row `t` of x, 16 columns from `col` on; zeros beyond the rows and columns. */
__device__ __forceinline__ piece<false> load_x(const kk_linear_args &a, int t, int col)
{
	piece<false> p;

#pragma unroll
	for (int i = 0; i < 2; i++) {
		p.v[i] = make_uint4(0, 0, 0, 0);
		if (t < a.tokens && col + 8 * i < a.w[0].cols)
			p.v[i] = ptx_load_fresh((const __nv_bfloat16 *)a.x +
			                        (size_t)t * a.x_stride + col + 8 * i);
	}
	return p;
}

/* sum += the products of one step, times the scales of rows g and g + 8 for fp8. */
template <bool FP8>
__device__ __forceinline__ void multiply(float (&sum)[4], const piece<FP8> &upper,
                                         const piece<FP8> &lower, const piece<false> &x,
                                         float upper_scale, float lower_scale)
{
	float part[4] = {};

#pragma unroll
	for (int i = 0; i < 4; i++)
		ptx_mma_bf16(FP8 ? part : sum, pair_of(upper, 2 * i), pair_of(lower, 2 * i),
		             pair_of(upper, 2 * i + 1), pair_of(lower, 2 * i + 1),
		             pair_of(x, 2 * i), pair_of(x, 2 * i + 1));
	if (FP8) {
		sum[0] += upper_scale * part[0], sum[1] += upper_scale * part[1];
		sum[2] += lower_scale * part[2], sum[3] += lower_scale * part[3];
	}
}

template <bool FP8, int TILES>
__device__ __forceinline__ void stream_rows(const kk_linear_args &a, const km_weight &w,
                                            int first_row, int first_token, float (&sum)[TILES][4])
{
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
	int upper = min(first_row + g, w.rows - 1), lower = min(first_row + g + 8, w.rows - 1);
	constexpr int HOP = STREAM_WARPS * STEP;
	piece<FP8> now[AHEAD][2], next[AHEAD][2];

#pragma unroll
	for (int k = 0; k < AHEAD; k++) {
		int col = warp * STEP + lane % 4 * 16 + k * HOP;

		next[k][0] = load_piece<FP8>(w, upper, col);
		next[k][1] = load_piece<FP8>(w, lower, col);
	}
	ptx_wait_predecessor();
	for (int base = warp * STEP; base < w.cols; base += AHEAD * HOP) {
#pragma unroll
		for (int k = 0; k < AHEAD; k++) {
			int ahead = base + lane % 4 * 16 + (AHEAD + k) * HOP;

			now[k][0] = next[k][0], now[k][1] = next[k][1];
			next[k][0] = load_piece<FP8>(w, upper, ahead);
			next[k][1] = load_piece<FP8>(w, lower, ahead);
		}
#pragma unroll
		for (int k = 0; k < AHEAD; k++) {
			int step = base + k * HOP;
			float s0 = 1.0f, s1 = 1.0f;

			if (step >= w.cols)
				break;
			if (FP8) {
				s0 = read_fp8_scale(w, upper, step);
				s1 = read_fp8_scale(w, lower, step);
			}
#pragma unroll
			for (int i = 0; i < TILES; i++)
				multiply<FP8>(
					sum[i], now[k][0], now[k][1],
					load_x(a, first_token + 8 * i + g, step + lane % 4 * 16),
					s0, s1);
		}
	}
}

template <bool FP8, int TILES>
__global__ void __launch_bounds__(32 * STREAM_WARPS, TILES == 4 ? 1 : 2)
	linear_stream(kk_linear_args a)
{
	__shared__ float parts[STREAM_WARPS][16][8 * TILES + 1];
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	int first_row = blockIdx.x * 16, first_token = blockIdx.y * 8 * TILES;
	int tiles = (a.w[0].rows + 15) / 16, weight = (int)blockIdx.x >= tiles;
	float sum[TILES][4] = {};

	ptx_release_successor();
	first_row -= weight ? tiles * 16 : 0;
	stream_rows<FP8, TILES>(a, weight ? a.w[1] : a.w[0], first_row, first_token, sum);
#pragma unroll
	for (int i = 0; i < TILES; i++)
#pragma unroll
		for (int j = 0; j < 4; j++)
			parts[warp][lane / 4 + j / 2 * 8][8 * i + lane % 4 * 2 + j % 2] = sum[i][j];
	__syncthreads(); /* the warps' sums are written */
	for (int i = threadIdx.x; i < 16 * 8 * TILES; i += 32 * STREAM_WARPS) {
		int row = i % 16, t = i / 16;
		float v = 0.0f;

#pragma unroll
		for (int k = 0; k < STREAM_WARPS; k++)
			v += parts[k][row][t];
		if (first_row + row < (weight ? a.w[1].rows : a.w[0].rows) &&
		    first_token + t < a.tokens)
			store(a, weight, first_token + t, first_row + row, v);
	}
}

bool kk_linear_stream_fits(const km_weight *w)
{
	if (w->type == KM_W_BF16)
		return w->cols % 8 == 0;
	return w->type == KM_W_FP8 && w->cols % 16 == 0 && w->block_cols % STEP == 0;
}

template <bool FP8, int TILES>
static cudaError_t launch_stream(const kk_linear_args *a, cudaStream_t stream)
{
	int tiles = (a->w[0].rows + 15) / 16 + (a->weights > 1 ? (a->w[1].rows + 15) / 16 : 0);
	dim3 grid(tiles, (a->tokens + 8 * TILES - 1) / (8 * TILES));

	if (grid.y > 65535)
		return cudaErrorInvalidValue;
	return launch(linear_stream<FP8, TILES>, grid, 32 * STREAM_WARPS, a->pdl, stream, *a);
}

cudaError_t kk_linear_stream(const kk_linear_args *a, cudaStream_t stream)
{
	bool fp8 = a->w[0].type == KM_W_FP8;

	if (a->weights < 1 || a->weights > 2 || (a->y_bf16 && a->accumulate) || a->x_stride % 8)
		return cudaErrorInvalidValue;
	for (int i = 0; i < a->weights; i++)
		if (!kk_linear_stream_fits(&a->w[i]) || a->w[i].type != a->w[0].type ||
		    a->w[i].cols != a->w[0].cols)
			return cudaErrorInvalidValue;
	if (a->tokens <= 8)
		return fp8 ? launch_stream<true, 1>(a, stream) : launch_stream<false, 1>(a, stream);
	if (a->tokens <= 16)
		return fp8 ? launch_stream<true, 2>(a, stream) : launch_stream<false, 2>(a, stream);
	return fp8 ? launch_stream<true, STREAM_TILES>(a, stream)
	           : launch_stream<false, STREAM_TILES>(a, stream);
}
