/* Launches: grid, block, stream, and whether one may begin in its predecessor's tail. */
#ifndef KK_LAUNCH_CUH
#define KK_LAUNCH_CUH

#include <cuda_runtime.h>

/*
 * What a kernel may have of dynamic shared memory, and that a multiprocessor is to have all it can: one that
 * keeps more for L1 must be empty before a launch begins that needs the room, and then nothing overlaps.
 */
template <typename Kernel>
static cudaError_t allow_shared(Kernel kernel, size_t bytes)
{
	cudaError_t rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);

	return rc != cudaSuccess ? rc
	                         : cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
	                                                cudaSharedmemCarveoutMaxShared);
}

template <typename Kernel, typename... Args>
static cudaError_t launch(Kernel kernel, dim3 grid, int threads, bool pdl, cudaStream_t stream,
                          const Args &...args)
{
	cudaLaunchAttribute attribute = {};
	cudaLaunchConfig_t config = {};

	if (!grid.x || !grid.y || !grid.z)
		return cudaSuccess;
	config.gridDim = grid;
	config.blockDim = dim3(threads);
	config.stream = stream;
	attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
	attribute.val.programmaticStreamSerializationAllowed = 1;
	config.attrs = &attribute;
	config.numAttrs = pdl;
	return cudaLaunchKernelEx(&config, kernel, args...);
}

#endif
