/*
 * int4 experts from a checkpoint's packing to format/moe_layout.h's, one block of threads a record.
 *
 * ROOFLINE
 *   Each byte is read once and written once: 2 x 24.8 MB for an expert of K2's shape, 15 us on
 *   H100; the same expert takes 0.5 ms over PCIe before, so this is not what a load waits for. On
 *   the host it was: nibble by nibble, a fraction of a GB/s for a thread.
 *
 * RULES
 *   Only moves bits: the result is km_moe_pack_gate_up's and km_moe_pack_down's.
 */
#include "launch.cuh"
#include "moe_pack.h"

enum { ROWS = 16, COLS = 128, CODES = 1024, WORDS = CODES / 4, HALF = 8 };

/* Two neighbouring columns' codes, the first in bits 0..3, the second in bits 16..19. */
__device__ __forceinline__ uint32_t two_codes(const uint32_t *row, int col)
{
	uint32_t both = row[col / 8] >> 4 * (col % 8);

	return (both & 15) | (both & 0xf0) << 12;
}

__global__ void __launch_bounds__(WORDS) pack(kk_moe_pack_args a)
{
	int word = threadIdx.x, step = word % 4, lane = word / 4 % 32, half = word / 128;
	int col = blockIdx.x * COLS + 64 * half + 16 * step + 2 * (lane % 4);
	int groups = COLS / a.group;
	size_t first = (size_t)blockIdx.y * a.step, row = first + lane / 4;
	const uint32_t *low = a.low_codes + row * (a.cols / 8);
	const uint32_t *high = a.high_codes + (row + a.high_first) * (a.cols / 8);
	size_t bytes = CODES + 4096 / a.group;
	uint32_t *to = (uint32_t *)(a.packed + ((size_t)blockIdx.y * (a.cols / COLS) + blockIdx.x) *
	                                               bytes);

	to[word] = two_codes(low, col) | two_codes(high, col) << 4 | two_codes(low, col + 8) << 8 |
	           two_codes(high, col + 8) << 12;
	if (word >= HALF * groups)
		return;
	row = first + word / groups;
	col = (blockIdx.x * COLS) / a.group + word % groups;
	to[WORDS + word] =
		a.low_scales[row * (a.cols / a.group) + col] |
		(uint32_t)a.high_scales[(row + a.high_first) * (a.cols / a.group) + col] << 16;
}

cudaError_t kk_moe_pack(const kk_moe_pack_args *a, cudaStream_t stream)
{
	if (a->rows % ROWS || a->cols % COLS || a->rows / ROWS > 65535 ||
	    (a->group != 32 && a->group != 64 && a->group != 128))
		return cudaErrorInvalidValue;
	return launch(pack, dim3(a->cols / COLS, a->rows / ROWS), WORDS, false, stream, *a);
}
