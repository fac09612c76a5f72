/*
 * A linear layer's weight as the ops see it: y = W x, W [rows = out, cols = in], in the
 * checkpoint's own layout, borrowed from the memory map (or from a repacked copy).
 *
 *   KM_W_F32, KM_W_F16, KM_W_BF16   data [rows, cols]
 *   KM_W_FP8    data u8 e4m3 [rows, cols]; scale f32 [ceil(rows/block_rows),
 *               ceil(cols/block_cols)]; w = e4m3 * scale
 *   KM_W_INT4   data u32 [rows, cols/8], column 8j+k in bits 4k..4k+3 of word j (as bytes: the low
 *               nibble is the even column); scale bf16 [rows, cols/group]; w = (nibble - 8) * scale
 */
#ifndef KM_DEVICE_WEIGHT_H
#define KM_DEVICE_WEIGHT_H

#include <stddef.h>

#include "format/dtype.h"

enum km_weight_type { KM_W_F32, KM_W_F16, KM_W_BF16, KM_W_FP8, KM_W_INT4 };

typedef struct km_weight {
	enum km_weight_type type;
	int rows, cols;
	const void *data;          /* NULL: the model has no such weight */
	const void *scale;         /* KM_W_FP8, KM_W_INT4 */
	/* KM_W_INT4: KM_BF16, KM_F16 or KM_F32; KM_W_FP8: KM_F32 or KM_BF16 */
	enum km_dtype scale_dtype;
	int group;                 /* KM_W_INT4: columns per scale (per channel: cols) */
	int block_rows, block_cols; /* KM_W_FP8 */
} km_weight;

size_t km_weight_bytes(const km_weight *w); /* data and scale: what one pass over it reads */

#endif
