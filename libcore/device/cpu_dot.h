/*
 * Dot products of rows of a weight with rows of activations: what linear, moe and mla are made of.
 *
 * ROOFLINE  One row (decode) reads each weight once and does 2 flops with it: memory's speed is the
 * bound as long as a core turns weights into f32 faster than that. Many rows are bound by the FMA
 * units: a 512-bit FMA a cycle on Zen 4, which vdpbf16ps and vpdpwssd do not beat for f32-like
 * activations (two halves a product), so everything is f32 FMA and weights are exact.
 *
 * LADDER  (one row on one Zen 4 core, int4 4096x1024 with groups of 32 from memory, 25 GB/s)
 *   588 us  a nibble's byte widened, shifted, looked up, multiplied; scales read one by one
 *   310 us  scales made f32 a row at a time and put into the table of 16; the next block of weight
 *           rows prefetched, which also took bf16 from 15 to 23 GB/s: 16 short rows are too many
 *           streams for the hardware's prefetcher
 *   212 us  no widening: 16 nibbles broadcast, one shift, one table look-up, the activations
 *           shuffled to match (v_load_int4_shuffled)
 * Not kept: VBMI's multishift for the first rung's unpacking, 6% on data in L2, nothing from
 * memory.
 *
 * ORDER  Lane l of LANES sums columns l, l + LANES, ... in rising order, then v_sums adds the lanes.
 * Both paths below do just that with every VL, so a row's result is the same bits alone or among
 * others, on whichever machine. Where a vector holds but a part of the lanes, the loops run over their
 * columns once for each part, the second time from L1, with all registers for different sums each time.
 * That costs AVX2 10 to 15% where there are many rows, and nothing where memory is the bound.
 *
 *   few rows:  weights go from their own layout through registers into up to VL accumulators
 *   many rows: WEIGHT_ROWS rows of a weight become f32 in a buffer that stays in L1, CHUNK columns
 *              at a time, and tiles of 4 activation rows run over it; a tile's accumulators wait in
 *              memory between chunks
 *
 * Weights whose columns or blocks are no multiples of STEP become f32 through km_cpu_weight_row and
 * take the second path.
 */
#ifndef KM_DEVICE_CPU_DOT_H
#define KM_DEVICE_CPU_DOT_H

#include <stdbool.h>

#include "device/cpu.h"
#include "device/simd.h"

enum {
	/* columns that the inner loops take at once; a scale covers whole steps */
	STEP = 32,
	CHUNK = 1024,        /* columns of f32 weights in L1: 4 rows are 16 KiB of 32 */
	WEIGHT_ROWS = 4,
	DOT_ROWS = 16,       /* weight rows of one call of dot_rows at most */
	DOT_TOKENS = 64,     /* activation rows of one call at most */
	TILE_COLS = VL / 4,  /* weight rows of a 4-row tile: VL accumulators in all */
};

/* A weight as the loops want it. */
typedef struct weight_view {
	const km_weight *w;
	size_t row_bytes;
	bool direct;      /* STEP divides columns and scale blocks: the vector loads apply */
	int scale_cols;   /* columns of one scale; all where the type has none */
	size_t scale_row; /* scales of a row (int4) or of a row of blocks (fp8) */
} weight_view;

static weight_view view_weight(const km_weight *w)
{
	weight_view v = { .w = w, .direct = w->cols % STEP == 0, .scale_cols = w->cols };
	size_t cols = (size_t)w->cols;

	switch (w->type) {
	case KM_W_F32:
		v.row_bytes = cols * 4;
		break;
	case KM_W_F16:
	case KM_W_BF16:
		v.row_bytes = cols * 2;
		break;
	case KM_W_FP8:
		v.row_bytes = cols;
		v.scale_cols = w->block_cols;
		v.scale_row = (cols + (size_t)w->block_cols - 1) / (size_t)w->block_cols;
		break;
	case KM_W_INT4:
		v.row_bytes = cols / 2;
		v.scale_cols = w->group;
		v.scale_row = cols / (size_t)w->group;
		break;
	}
	v.direct = v.direct && v.scale_cols % STEP == 0;
	return v;
}

KM_INLINE bool has_scale(enum km_weight_type type)
{
	return type == KM_W_FP8 || type == KM_W_INT4;
}

/* VL scales, or the first n where there are fewer. */
KM_INLINE vf load_scales(enum km_dtype dtype, const char *from, int n)
{
	if (dtype == KM_F32)
		return v_load_up_to((const float *)from, n);
	if (dtype == KM_BF16)
		return n >= VL ? v_load_bf16(from) : v_load_bf16_n(from, n);
	return n >= VL ? v_load_f16(from) : v_load_f16_n(from, n);
}

/* Scales [first, first + count) of a row as f32, times what the type's loads leave to them. `to`
 * has room up to a multiple of VL. */
KM_INLINE void read_scales(const weight_view *v, int row, int first, int count, float *to)
{
	const km_weight *w = v->w;
	size_t size = w->scale_dtype == KM_F32 ? 4 : 2;
	size_t at = v->scale_row * (size_t)(w->type == KM_W_FP8 ? row / w->block_rows : row) +
	            (size_t)first;
	const char *from = (const char *)w->scale + at * size;
	vf factor = v_set1(w->type == KM_W_FP8 ? 256.0f : 1.0f);

	for (int i = 0; i < count; i += VL)
		v_store(to + i,
		        v_mul(load_scales(w->scale_dtype, from + (size_t)i * size, count - i),
		              factor));
}

/* A step's scale in the form that its loads take. */
KM_INLINE vf step_scale(enum km_weight_type type, float scale)
{
	return type == KM_W_INT4 ? v_int4_scale(scale) : v_set1(scale);
}

/* VL weights from column `col` on, int4 shuffled; `scale` is step_scale's. */
KM_INLINE vf load_weights(enum km_weight_type type, const char *row, size_t col, vf scale)
{
	switch (type) {
	case KM_W_F32:
		return v_load((const float *)(row + col * 4));
	case KM_W_F16:
		return v_load_f16(row + col * 2);
	case KM_W_BF16:
		return v_load_bf16(row + col * 2);
	case KM_W_FP8:
		return v_mul(v_load_fp8_256th(row + col), scale);
	case KM_W_INT4:
		return v_load_int4_shuffled(row + col / 2, scale);
	}
	return v_zero();
}

KM_INLINE const char *weight_at(const weight_view *v, int row)
{
	return (const char *)v->w->data + (size_t)row * v->row_bytes;
}

/* Asks for what lies `ahead` bytes after the step's weights: a line for each 64 bytes. */
KM_INLINE void prefetch_step(enum km_weight_type type, const char *row, int col, size_t ahead)
{
	static const size_t half_bytes[] = {
		[KM_W_F32] = 8, [KM_W_F16] = 4, [KM_W_BF16] = 4, [KM_W_FP8] = 2, [KM_W_INT4] = 1,
	};
	size_t at = (size_t)col * half_bytes[type] / 2;

	if (at % 64 == 0)
		v_prefetch(row + at + ahead);
	if (type == KM_W_F32)
		v_prefetch(row + at + ahead + 64);
}

/* One CHUNK of dot_direct, one part of the lanes. */
KM_INLINE void dot_chunk(enum km_weight_type type, int tokens, int rows, const weight_view *v,
                         const char *const *at, const float *const *x, int col, int count,
                         const float (*scales)[CHUNK / STEP], int part, vf *acc)
{
	int left = v->scale_cols - col % v->scale_cols, s = 0;

	for (int step = col; step < col + count; step += STEP) {
		vf values[4][STEP / LANES];

#pragma GCC unroll 4
		for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
			for (int c = 0; c < STEP / LANES; c++) {
				values[t][c] = v_load(x[t] + step + c * LANES + part * VL);
				if (type == KM_W_INT4)
					values[t][c] = v_shuffle(values[t][c]);
			}
#pragma GCC unroll 16
		for (int r = 0; r < rows; r++) {
			vf scale = has_scale(type) ? step_scale(type, scales[r][s]) : v_zero();

			if (part == 0)
				prefetch_step(type, at[r], step, (size_t)rows * v->row_bytes);
#pragma GCC unroll 4
			for (int c = 0; c < STEP / LANES; c++) {
				size_t at_col = (size_t)(step + c * LANES + part * VL);
				vf weights = load_weights(type, at[r], at_col, scale);

#pragma GCC unroll 4
				for (int t = 0; t < tokens; t++)
					acc[t * rows + r] =
						v_fma(values[t][c], weights, acc[t * rows + r]);
			}
		}
		left -= STEP;
		if (left == 0) {
			left = v->scale_cols;
			s++;
		}
	}
}

/* Few rows: `tokens` of x against `rows` weight rows from `row` on, tokens * rows <= VL, to
 * sums[t * DOT_ROWS + r]. Rows past the last are the last again. */
KM_INLINE void dot_direct(enum km_weight_type type, int tokens, int rows, const weight_view *v,
                          int row, const float *const *x, float *sums)
{
	int last = v->w->rows - 1, cols = v->w->cols;
	float scales[VL][CHUNK / STEP], lanes[VL];
	const char *at[VL];
	vf acc[PARTS][VL];

	for (int r = 0; r < rows; r++)
		at[r] = weight_at(v, row + r < last ? row + r : last);
#pragma GCC unroll 4
	for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 16
		for (int i = 0; i < VL; i++)
			acc[p][i] = v_zero();
	for (int col = 0; col < cols; col += CHUNK) {
		int count = cols - col < CHUNK ? cols - col : CHUNK, first = col / v->scale_cols;

		for (int r = 0; has_scale(type) && r < rows; r++)
			read_scales(v, row + r < last ? row + r : last, first,
			            (col + count - 1) / v->scale_cols - first + 1, scales[r]);
		/* The first outside of the loop: gcc else keeps AVX-512's sums in memory for longer, 9%. */
		dot_chunk(type, tokens, rows, v, at, x, col, count, scales, 0, acc[0]);
#pragma GCC unroll 4
		for (int p = 1; p < PARTS; p++)
			dot_chunk(type, tokens, rows, v, at, x, col, count, scales, p, acc[p]);
	}
#pragma GCC unroll 4
	for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 16
		for (int i = 0; i < VL; i++)
			acc[p][i] = type == KM_W_INT4 ? v_unshuffle(acc[p][i]) : acc[p][i];
	v_sums(acc, lanes);
	for (int t = 0; t < tokens; t++)
		memcpy(sums + t * DOT_ROWS, lanes + t * rows, (size_t)rows * sizeof(float));
}

KM_INLINE void dot_few_of(enum km_weight_type type, const weight_view *v, int row, int rows,
                          const float *const *x, int tokens, float *sums)
{
	const float *four[4] = { x[0], x[tokens > 1], x[tokens > 2 ? 2 : 0], x[tokens - 1] };
	int per_call = VL / (tokens > 2 ? 4 : tokens);

	for (int r = 0; r < rows; r += per_call) {
		if (tokens == 1)
			dot_direct(type, 1, VL, v, row + r, four, sums + r);
		else if (tokens == 2)
			dot_direct(type, 2, VL / 2, v, row + r, four, sums + r);
		else
			dot_direct(type, 4, VL / 4, v, row + r, four, sums + r);
	}
}

/* Each case has code of its own: the type is a constant in it. */
static void dot_few(const weight_view *v, int row, int rows, const float *const *x, int tokens,
                    float *sums)
{
	switch (v->w->type) {
	case KM_W_F32:
		dot_few_of(KM_W_F32, v, row, rows, x, tokens, sums);
		return;
	case KM_W_F16:
		dot_few_of(KM_W_F16, v, row, rows, x, tokens, sums);
		return;
	case KM_W_BF16:
		dot_few_of(KM_W_BF16, v, row, rows, x, tokens, sums);
		return;
	case KM_W_FP8:
		dot_few_of(KM_W_FP8, v, row, rows, x, tokens, sums);
		return;
	case KM_W_INT4:
		dot_few_of(KM_W_INT4, v, row, rows, x, tokens, sums);
		return;
	}
}

KM_INLINE vf in_order(enum km_weight_type type, vf weights)
{
	return type == KM_W_INT4 ? v_unshuffle(weights) : weights;
}

/* At most CHUNK columns. */
KM_INLINE void widen_row_of(enum km_weight_type type, const weight_view *v, int row, int col,
                            int count, float *to)
{
	int first = col / v->scale_cols, left = v->scale_cols - col % v->scale_cols, s = 0;
	const char *from = weight_at(v, row);
	float scales[CHUNK / STEP];

	if (has_scale(type))
		read_scales(v, row, first, (col + count - 1) / v->scale_cols - first + 1, scales);
	for (int c = 0; c < count; c += STEP) {
		vf scale = has_scale(type) ? step_scale(type, scales[s]) : v_zero();

		prefetch_step(type, from, col + c, WEIGHT_ROWS * v->row_bytes);
#pragma GCC unroll 4
		for (int i = c; i < c + STEP; i += VL)
			v_store(to + i,
			        in_order(type, load_weights(type, from, (size_t)(col + i), scale)));
		left -= STEP;
		if (left == 0) {
			left = v->scale_cols;
			s++;
		}
	}
}

/* Columns [col, col + count) of a row as f32, count <= CHUNK, zeros up to a multiple of LANES
 * after them. A row past the last is the last again. */
static void widen_row(const weight_view *v, int row, int col, int count, float *to)
{
	row = row < v->w->rows ? row : v->w->rows - 1;
	if (!v->direct) {
		km_cpu_weight_row(v->w, row, col, count, to);
		for (int i = count; i % LANES; i++)
			to[i] = 0;
		return;
	}
	switch (v->w->type) {
	case KM_W_F32:
		widen_row_of(KM_W_F32, v, row, col, count, to);
		return;
	case KM_W_F16:
		widen_row_of(KM_W_F16, v, row, col, count, to);
		return;
	case KM_W_BF16:
		widen_row_of(KM_W_BF16, v, row, col, count, to);
		return;
	case KM_W_FP8:
		widen_row_of(KM_W_FP8, v, row, col, count, to);
		return;
	case KM_W_INT4:
		widen_row_of(KM_W_INT4, v, row, col, count, to);
		return;
	}
}

/* acc[i * TILE_COLS + j] += one part of the lanes of x[i] * w[j] over `count` columns; w is padded with
 * zeros. */
KM_INLINE void run_part(const float *const x[4], const float *w, size_t w_stride, int count, int part,
                        vf acc[VL])
{
	int c = part * VL, end = count / LANES * LANES;

	for (; c < end; c += LANES) {
		vf weights[TILE_COLS];

#pragma GCC unroll 4
		for (int j = 0; j < TILE_COLS; j++)
			weights[j] = v_load(w + (size_t)j * w_stride + c);
#pragma GCC unroll 4
		for (int i = 0; i < 4; i++) {
			vf values = v_load(x[i] + c);

#pragma GCC unroll 4
			for (int j = 0; j < TILE_COLS; j++)
				acc[i * TILE_COLS + j] =
					v_fma(values, weights[j], acc[i * TILE_COLS + j]);
		}
	}
	if (end < count)
		for (int i = 0; i < 4; i++)
			for (int j = 0; j < TILE_COLS; j++)
				acc[i * TILE_COLS + j] = v_fma(v_load_up_to(x[i] + c, count - c),
				                               v_load(w + (size_t)j * w_stride + c),
				                               acc[i * TILE_COLS + j]);
}

/* One tile over one chunk: from zero or from `held`, to `held` or, at the end, to `lanes`. What is not
 * held stays in registers. */
KM_INLINE void run_tile(const float *const x[4], const float *w, size_t w_stride, int count,
                        vf held[PARTS][VL], bool first, bool last, float lanes[VL])
{
	vf acc[PARTS][VL];

#pragma GCC unroll 4
	for (int p = 0; p < PARTS; p++) {
#pragma GCC unroll 16
		for (int i = 0; i < VL; i++)
			acc[p][i] = first ? v_zero() : held[p][i];
		run_part(x, w, w_stride, count, p, acc[p]);
	}
	if (last) {
		v_sums(acc, lanes);
		return;
	}
#pragma GCC unroll 4
	for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 16
		for (int i = 0; i < VL; i++)
			held[p][i] = acc[p][i];
}

static void chunk_tile(const float *const x[4], const float *w, size_t w_stride, int count,
                       vf held[PARTS][VL], bool first, bool last, float *sums)
{
	float lanes[VL];

	run_tile(x, w, w_stride, count, held, first, last, lanes);
	for (int i = 0; i < 4 && last; i++)
		memcpy(sums + i * DOT_ROWS, lanes + i * TILE_COLS, TILE_COLS * sizeof(float));
}

/* Many rows: WEIGHT_ROWS weight rows from `row` on against all of x. */
static void dot_many(const weight_view *v, int row, const float *const *x, int tokens, float *sums)
{
	float w[WEIGHT_ROWS * CHUNK] __attribute__((aligned(64)));
	vf held[DOT_TOKENS / 4 * WEIGHT_ROWS / TILE_COLS][PARTS][VL];
	int cols = v->w->cols;

	for (int col = 0; col < cols; col += CHUNK) {
		int count = cols - col < CHUNK ? cols - col : CHUNK, tile = 0;

		for (int r = 0; r < WEIGHT_ROWS; r++)
			widen_row(v, row + r, col, count, w + r * CHUNK);
		for (int t = 0; t < tokens; t += 4) {
			const float *four[4];

			for (int i = 0; i < 4; i++)
				four[i] = x[t + i < tokens ? t + i : tokens - 1] + col;
			for (int r = 0; r < WEIGHT_ROWS; r += TILE_COLS, tile++)
				chunk_tile(four, w + r * CHUNK, CHUNK, count, held[tile], col == 0,
				           col + count == cols, sums + t * DOT_ROWS + r);
		}
	}
}

/*
 * sums[t * DOT_ROWS + r] = x[t] . w[row + r], for `tokens` <= DOT_TOKENS and `rows` <= DOT_ROWS;
 * `sums` [DOT_TOKENS, DOT_ROWS] also takes values outside of that.
 */
static void dot_rows(const weight_view *v, int row, int rows, const float *const *x, int tokens,
                     float *sums)
{
	if (v->direct && tokens <= 4) {
		dot_few(v, row, rows, x, tokens, sums);
		return;
	}
	for (int r = 0; r < rows; r += WEIGHT_ROWS)
		dot_many(v, row + r, x, tokens, sums + r);
}

#endif
