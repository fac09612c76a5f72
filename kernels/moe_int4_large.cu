/* The tiles of many tokens of kernels/moe_int4.cu: a translation unit of their own, for make -j. */
#include "moe_int4.cuh"

cudaError_t moe_stream_large(const kk_moe_args *a, cudaStream_t stream)
{
	switch (a->block_m << 16 | a->block_n) {
	case 16 << 16 | 64:
		return launch_tile<tile<16, 1, 4, 16, 1>, false>(a, stream);
	case 16 << 16 | 128:
		return launch_tile<tile<16, 1, 8, 16, 1>, false>(a, stream);
	case 16 << 16 | 256:
		return launch_tile<tile<16, 1, 16, 16, 1>, false>(a, stream);
	case 32 << 16 | 128:
		return launch_tile<tile<32, 1, 8, 16, 1>, false>(a, stream);
	case 32 << 16 | 256:
		return launch_tile<tile<32, 2, 8, 8, 2>, false>(a, stream);
	case 64 << 16 | 256:
		return launch_tile<tile<64, 2, 8, 8, 2>, false>(a, stream);
	case 48 << 16 | 256:
	case 80 << 16 | 256:
	case 112 << 16 | 256:
		return moe_prefill_launch(a, stream);
	}
	return cudaErrorInvalidValue;
}
