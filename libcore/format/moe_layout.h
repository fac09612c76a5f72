/*
 * The int4 layout that the GPU's mixture-of-experts kernels read, version 1, byte by byte.
 *
 * A matrix [rows, cols], rows % 16 == 0, cols % 128 == 0, has one scale for `group` columns of a
 * row (32, 64 or 128); its value is (code - 8) * scale, codes 0..15, scales bf16. It is stored as
 * records of 16 rows x 128 columns, all records of rows 0..15 first, from the left, then those of
 * rows 16..31:
 *
 *   record (i, j) at (i * cols / 128 + j) * KM_MOE_RECORD_BYTES(group); rows r = 16 i ..,
 *   columns c = 128 j ..
 *     0     1024 bytes of codes: 32-bit little-endian words; word
 *           ((half * 32 + lane) * 4 + step) holds
 *           for g = lane / 4, t = lane % 4 and column c0 = c + 64 half + 16 step + 2 t:
 *             bits  0..3   (r + g,     c0)       bits 16..19  (r + g,     c0 + 1)
 *             bits  4..7   (r + g + 8, c0)       bits 20..23  (r + g + 8, c0 + 1)
 *             bits  8..11  (r + g,     c0 + 8)   bits 24..27  (r + g,     c0 + 9)
 *             bits 12..15  (r + g + 8, c0 + 8)   bits 28..31  (r + g + 8, c0 + 9)
 *     1024  4096 / group bytes of scales: for g = 0..7, for each group of columns from the left,
 *           two bf16, rows r + g and r + g + 8
 *
 * Why: a word is one lane's A operand of a 16 x 16 tensor-core step (mma.m16n8k16, and wgmma with A
 * in registers), nibbles in the order in which one shift and one mask give two bf16; a lane's 16
 * bytes are four steps; a record is one contiguous copy. Rows are cut by whole records, columns
 * too: a tensor-parallel slice of either matrix is some of its records, unchanged.
 *
 * An expert is two matrices. `gate_up` [2 * intermediate, hidden]: rows 16 i + g are gate's rows 8
 * i + g and rows 16 i + 8 + g are up's, g = 0..7, so that one lane has both halves of silu(gate) *
 * up. `down` [hidden, intermediate], rows in order. From the checkpoint's packing
 * (compressed-tensors, pack-quantized): int32 [rows, cols / 8], column 8 j + k in bits 4k..4k+3 of
 * word j, value - 8; scales bf16 [rows, cols / group]. The way back gives the same bytes.
 *
 * Nothing here allocates; the buffers must not overlap; any thread.
 */
#ifndef KM_FORMAT_MOE_LAYOUT_H
#define KM_FORMAT_MOE_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

enum {
	KM_MOE_LAYOUT_VERSION = 1,
	KM_MOE_RECORD_ROWS = 16,
	KM_MOE_RECORD_COLS = 128,
	KM_MOE_RECORD_CODES = 1024,
};

#define KM_MOE_RECORD_BYTES(group) (KM_MOE_RECORD_CODES + 4096 / (group))

/* Metadata of a repacked file. Checksums are 16 hexadecimal digits for each repacked tensor, in the
 * order of the data; the original header is the JSON that the file had before. */
#define KM_META_LAYOUT "kimi.expert_layout"
#define KM_META_VERSION "kimi.expert_layout_version"
#define KM_META_CHECKSUMS "kimi.checksums"
#define KM_META_HEADER "kimi.original_header"

/* The checkpoint's packing of one matrix. */
typedef struct km_int4_matrix {
	uint32_t *codes;  /* [rows, cols / 8] */
	uint16_t *scales; /* bf16 [rows, cols / group] */
} km_int4_matrix;

/* KM_EUNSUPPORTED with a sentence when the layout cannot hold experts of this shape: hidden and
 * intermediate are multiples of 128, group is 32, 64 or 128. */
int km_moe_layout_check(int hidden, int intermediate, int group, km_err *err);

size_t km_moe_gate_up_bytes(int hidden, int intermediate, int group);
size_t km_moe_down_bytes(int hidden, int intermediate, int group);

/* For shapes that km_moe_layout_check takes. The packed bytes are of the sizes above. */
void km_moe_pack_gate_up(int hidden, int intermediate, int group, const km_int4_matrix *gate,
                         const km_int4_matrix *up, uint8_t *packed);
void km_moe_unpack_gate_up(int hidden, int intermediate, int group, const uint8_t *packed,
                           const km_int4_matrix *gate, const km_int4_matrix *up);
void km_moe_pack_down(int hidden, int intermediate, int group, const km_int4_matrix *down,
                      uint8_t *packed);
void km_moe_unpack_down(int hidden, int intermediate, int group, const uint8_t *packed,
                        const km_int4_matrix *down);

#endif
