/*
 * The ops in vectors: one text for AVX-512, AVX2 and neither, included by cpu_avx512.c, cpu_avx2.c and
 * cpu_portable.c, each of which puts the functions into its table. Dot products are in cpu_dot.h, attention in
 * cpu_mla.h, the experts in cpu_moe.h.
 */
#ifndef KM_DEVICE_CPU_SIMD_H
#define KM_DEVICE_CPU_SIMD_H

#include <math.h>
#include <omp.h>

#include "device/cpu_dot.h"
#include "device/cpu_mla.h"
#include "device/cpu_moe.h"

static void simd_rmsnorm_row(const km_rmsnorm_args *a, int t)
{
	float *residual = a->residual + (size_t)t * (size_t)a->residual_stride;
	float *y = a->y + (size_t)t * (size_t)a->y_stride;
	const float *x = a->x ? a->x + (size_t)t * (size_t)a->size : NULL;
	vf squares[PARTS], factor;

	for (int p = 0; p < PARTS; p++)
		squares[p] = v_zero();
	for (int i = 0; i < a->size; i += LANES)
#pragma GCC unroll 4
		for (int p = 0; p < PARTS; p++) {
			int at = i + p * VL, n = a->size - at;
			vf r = v_load_up_to(residual + at, n);

			if (x) {
				r = v_add(r, v_load_up_to(x + at, n));
				v_store_up_to(residual + at, r, n);
			}
			squares[p] = v_fma(r, r, squares[p]);
		}
	factor = v_set1(1.0f / sqrtf(v_sum(squares) / (float)a->size + a->eps));
	for (int i = 0; i < a->size; i += VL) {
		vf r = v_mul(v_load_up_to(residual + i, a->size - i), factor);

		v_store_up_to(y + i, v_mul(r, v_load_up_to(a->weight + i, a->size - i)),
		              a->size - i);
	}
}

static void simd_rmsnorm(const km_rmsnorm_args *a)
{
	KM_CPU_FOR((double)a->tokens * a->size, t, a->tokens, simd_rmsnorm_row(a, t));
}

static void simd_silu_mul_row(const km_silu_mul_args *a, int t)
{
	const float *gate = a->gate + (size_t)t * (size_t)a->stride;
	const float *up = a->up + (size_t)t * (size_t)a->stride;
	float *y = a->y + (size_t)t * (size_t)a->size;

	for (int i = 0; i < a->size; i += VL) {
		int n = a->size - i;

		v_store_up_to(y + i,
		              v_mul(v_silu(v_load_up_to(gate + i, n)), v_load_up_to(up + i, n)), n);
	}
}

static void simd_silu_mul(const km_silu_mul_args *a)
{
	KM_CPU_FOR(2.0 * a->tokens * a->size, t, a->tokens, simd_silu_mul_row(a, t));
}

/* How many activation rows go together: their f32 columns fill half of a 1 MiB L2. */
static int linear_block(int cols)
{
	int block = (512 << 10) / 4 / cols / 4 * 4;

	return block < 8 ? 8 : block > DOT_TOKENS ? DOT_TOKENS : block;
}

static void linear_tile(const km_linear_args *a, const weight_view *v, int row, int t, int tokens)
{
	int rows = v->w->rows - row < DOT_ROWS ? v->w->rows - row : DOT_ROWS;
	float sums[DOT_TOKENS * DOT_ROWS];
	const float *x[DOT_TOKENS] = { NULL };

	for (int i = 0; i < tokens; i++)
		x[i] = a->x + (size_t)(t + i) * (size_t)a->x_stride;
	dot_rows(v, row, rows, x, tokens, sums);
	for (int i = 0; i < tokens; i++) {
		float *y = a->y + (size_t)(t + i) * (size_t)a->y_stride + (size_t)row;

		for (int r = 0; r < rows; r++)
			y[r] = a->accumulate ? y[r] + sums[i * DOT_ROWS + r]
			                     : sums[i * DOT_ROWS + r];
	}
}

/* Each thread has a range of weight rows, which it meets once for each block of tokens. */
static void linear_share(const km_linear_args *a)
{
	weight_view v = view_weight(a->w);
	int block = linear_block(a->w->cols);

	for (int t = 0; t < a->tokens; t += block) {
		int tokens = a->tokens - t < block ? a->tokens - t : block;

#pragma omp for schedule(static) nowait
		for (int row = 0; row < a->w->rows; row += DOT_ROWS)
			linear_tile(a, &v, row, t, tokens);
	}
}

static void simd_linear(const km_linear_args *a)
{
	if (km_cpu_threads((double)a->tokens * a->w->rows * a->w->cols) == 1) {
		linear_share(a);
		return;
	}
#pragma omp parallel
	linear_share(a);
}

#endif
