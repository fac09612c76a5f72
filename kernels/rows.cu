/*
 * What only moves, maps or counts rows: embedding, gathering rows, SiLU times, rounding to bf16,
 * experts' loads.
 *
 * ROOFLINE
 *   Nothing is read twice: a launch of a few rows is as long as a launch (2 us, less when launches
 *   overlap), one of thousands of rows runs at the memory's speed: 6 bytes an element of an embedded
 *   row, 10 of silu_mul, so 8,192 rows of 7,168 take 0.11 and, of 2,048, 0.05 ms on H100.
 *
 * RULES
 *   Elementwise: no sums. Ids have been checked (model/forward.c).
 */
#include "dense.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "weight.cuh"

enum { THREADS = 256 };
static const int MOST_BLOCKS = 65535;

static int blocks_for(size_t items)
{
	size_t blocks = (items + THREADS - 1) / THREADS;

	return blocks < (size_t)MOST_BLOCKS ? (int)blocks : MOST_BLOCKS;
}

__global__ void __launch_bounds__(THREADS) embed(kk_embed_args a)
{
	ptx_release_successor();
	ptx_wait_predecessor();
	for (int t = blockIdx.y; t < a.tokens; t += gridDim.y) {
		int id = a.ids[t];

		for (int c = blockIdx.x * THREADS + threadIdx.x; c < a.table.cols;
		     c += gridDim.x * THREADS)
			a.y[(size_t)t * a.table.cols + c] = read_weight(a.table, id, c);
	}
}

cudaError_t kk_embed(const kk_embed_args *a, cudaStream_t stream)
{
	dim3 grid(blocks_for((size_t)a->table.cols),
	          a->tokens < MOST_BLOCKS ? a->tokens : MOST_BLOCKS);

	return launch(embed, grid, THREADS, a->pdl, stream, *a);
}

__global__ void __launch_bounds__(THREADS) gather(kk_gather_args a)
{
	int words = a.bytes / 4;

	ptx_release_successor();
	ptx_wait_predecessor();
	for (int i = blockIdx.y; i < a.count; i += gridDim.y) {
		const uint32_t *from = (const uint32_t *)a.from + (size_t)a.rows[i] * words;
		uint32_t *to = (uint32_t *)a.to + (size_t)i * words;

		for (int c = blockIdx.x * THREADS + threadIdx.x; c < words;
		     c += gridDim.x * THREADS)
			to[c] = from[c];
	}
}

cudaError_t kk_gather(const kk_gather_args *a, cudaStream_t stream)
{
	dim3 grid(blocks_for((size_t)a->bytes / 4),
	          a->count < MOST_BLOCKS ? a->count : MOST_BLOCKS);

	if (a->bytes % 4)
		return cudaErrorInvalidValue;
	return launch(gather, grid, THREADS, a->pdl, stream, *a);
}

__global__ void __launch_bounds__(THREADS) silu_mul(kk_silu_mul_args a)
{
	size_t count = (size_t)a.tokens * a.size, step = (size_t)gridDim.x * THREADS;

	ptx_release_successor();
	ptx_wait_predecessor();
	for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += step) {
		float g = a.gate[i];

		((__nv_bfloat16 *)a.y)[i] = __float2bfloat16(g / (1.0f + expf(-g)) * a.up[i]);
	}
}

cudaError_t kk_silu_mul(const kk_silu_mul_args *a, cudaStream_t stream)
{
	return launch(silu_mul, dim3(blocks_for((size_t)a->tokens * a->size)), THREADS, a->pdl,
	              stream, *a);
}

__global__ void __launch_bounds__(THREADS) dequantize(km_weight w, __nv_bfloat16 *to)
{
	ptx_release_successor();
	ptx_wait_predecessor();
	for (int row = blockIdx.y; row < w.rows; row += gridDim.y)
		for (int c = blockIdx.x * THREADS + threadIdx.x; c < w.cols;
		     c += gridDim.x * THREADS)
			to[(size_t)row * w.cols + c] = __float2bfloat16(read_weight(w, row, c));
}

cudaError_t kk_dequantize(const km_weight *w, void *to, cudaStream_t stream)
{
	dim3 grid(blocks_for((size_t)w->cols), w->rows < MOST_BLOCKS ? w->rows : MOST_BLOCKS);

	return launch(dequantize, grid, THREADS, false, stream, *w, (__nv_bfloat16 *)to);
}

__global__ void __launch_bounds__(THREADS) count(kk_count_args a)
{
	int rows, step = gridDim.x * THREADS;

	ptx_release_successor();
	ptx_wait_predecessor();
	rows = a.valid ? min(*a.valid, a.rows) : a.rows;
	for (int i = blockIdx.x * THREADS + threadIdx.x; i < rows * a.each; i += step)
		atomicAdd(&a.counts[a.ids[i]], 1ull);
}

cudaError_t kk_count(const kk_count_args *a, cudaStream_t stream)
{
	return launch(count, dim3(blocks_for((size_t)a->rows * a->each)), THREADS, a->pdl, stream,
	              *a);
}
