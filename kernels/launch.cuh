/* One launch: grid, block, stream, and whether it may begin in its predecessor's tail. */
#ifndef KK_LAUNCH_CUH
#define KK_LAUNCH_CUH

#include <cuda_runtime.h>

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
