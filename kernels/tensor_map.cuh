/*
 * Tensors in memory as the copy engine takes boxes out of them (ptx_copy_tile, ptx_copy_box): maps are made
 * on the host, for a launch, and given to the kernel by value.
 */
#ifndef KK_TENSOR_MAP_CUH
#define KK_TENSOR_MAP_CUH

#include <cuda.h>
#include <cuda_runtime.h>

enum { MAP_RANK = 4 };

/* Dimension 0 is the densest. What a box has beyond the sizes is zeros, and counts as arrived. */
struct tensor_shape {
	CUtensorMapDataType type;
	CUtensorMapSwizzle swizzle;
	int rank;
	const void *data;               /* a multiple of 16 bytes, as are the strides */
	cuuint64_t sizes[MAP_RANK];     /* elements */
	cuuint64_t strides[MAP_RANK - 1]; /* bytes, of dimension 1 and on */
	cuuint32_t box[MAP_RANK];       /* elements, at most 256 */
};

typedef CUresult (*map_encoder)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill);

/* The driver's own: the library is not linked with it. */
static inline cudaError_t find_map_encoder(map_encoder *encode)
{
	enum cudaDriverEntryPointQueryResult found;
	cudaError_t rc;

#if CUDART_VERSION >= 12050
	rc = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)encode, 12000,
	                                      cudaEnableDefault, &found);
#else
	rc = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void **)encode, cudaEnableDefault, &found);
#endif
	return rc == cudaSuccess && found != cudaDriverEntryPointSuccess ? cudaErrorNotSupported : rc;
}

static inline cudaError_t make_tensor_map(CUtensorMap *map, const tensor_shape &t)
{
	static const cuuint32_t steps[MAP_RANK] = {1, 1, 1, 1};
	map_encoder encode;
	cudaError_t rc = find_map_encoder(&encode);

	if (rc != cudaSuccess)
		return rc;
	return encode(map, t.type, (cuuint32_t)t.rank, (void *)t.data, t.sizes, t.strides, t.box, steps,
	              CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
	              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS
	               ? cudaSuccess
	               : cudaErrorInvalidValue;
}

#endif
