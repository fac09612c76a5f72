#include "device/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "device/cuda_state.h"

struct km_cuda_graph {
	cudaGraphExec_t exec;
	size_t launches;
};

struct km_cuda_fence {
	cudaEvent_t event;
};

int km_cuda_fail(km_err *err, cudaError_t rc, const char *what)
{
	return km_fail(err, rc == cudaErrorMemoryAllocation ? KM_ENOMEM : KM_EDEVICE, "%.*s: %s (%s)",
	               (int)strcspn(what, "("), what, cudaGetErrorString(rc), cudaGetErrorName(rc));
}

int km_cuda_count(km_err *err)
{
	int count = 0;
	cudaError_t rc = cudaGetDeviceCount(&count);

	if (rc != cudaSuccess) {
		cudaGetLastError();
		km_fail(err, KM_ENOTFOUND, "there is no GPU that CUDA can use: %s", cudaGetErrorString(rc));
		return 0;
	}
	if (!count)
		km_fail(err, KM_ENOTFOUND, "there is no GPU");
	return count;
}

int km_cuda_describe(int device, km_cuda_info *info, km_err *err)
{
	struct cudaDeviceProp p;
	int runtime = 0, driver = 0, clock_khz = 0, width = 0;

	KM_CUDA_TRY(cudaGetDeviceProperties(&p, device), err);
	KM_CUDA_TRY(cudaRuntimeGetVersion(&runtime), err);
	KM_CUDA_TRY(cudaDriverGetVersion(&driver), err);
	if (cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
	    cudaDeviceGetAttribute(&width, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess)
		clock_khz = 0;
	*info = (km_cuda_info){
		.runtime = runtime,
		.capability = p.major * 10 + p.minor,
		.multiprocessors = p.multiProcessorCount,
		.l2_bytes = (size_t)p.l2CacheSize,
		.memory_bytes = p.totalGlobalMem,
		.memory_gbps = 2e-6 * clock_khz * width / 8, /* two transfers a clock */
	};
	snprintf(info->name, sizeof(info->name), "%s", p.name);
	snprintf(info->toolkit, sizeof(info->toolkit), "CUDA %d.%d, driver %d.%d", runtime / 1000,
	         runtime % 1000 / 10, driver / 1000, driver % 1000 / 10);
	return 0;
}

int km_cuda_free_bytes(int device, size_t *bytes, km_err *err)
{
	size_t total;

	KM_CUDA_TRY(cudaSetDevice(device), err);
	KM_CUDA_TRY(cudaMemGetInfo(bytes, &total), err);
	return 0;
}

static int open_parts(km_cuda *c, km_err *err)
{
	KM_CUDA_TRY(cudaSetDevice(c->device), err);
	KM_TRY(km_cuda_describe(c->device, &c->info, err));
	KM_CUDA_TRY(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), err);
	KM_CUDA_TRY(cudaEventCreate(&c->begin), err);
	KM_CUDA_TRY(cudaEventCreate(&c->end), err);
	if (cudaMalloc((void **)&c->arena, c->arena_bytes) != cudaSuccess) {
		cudaGetLastError();
		return km_fail(err, KM_ENOMEM, "GPU %d (%s) has no %zu bytes free", c->device,
		               c->info.name, c->arena_bytes);
	}
	return 0;
}

int km_cuda_open(km_cuda **cuda, int device, size_t arena_bytes, km_err *err)
{
	int count = km_cuda_count(err), rc;
	km_cuda *c;

	if (!count)
		return KM_ENOTFOUND;
	if (device < 0 || device >= count)
		return km_fail(err, KM_EINVAL, "GPU %d: there are %d, counted from 0", device, count);
	c = km_xcalloc(1, sizeof(*c));
	c->device = device;
	c->arena_bytes = arena_bytes;
	rc = open_parts(c, err);
	if (rc < 0) {
		km_cuda_close(c);
		return rc;
	}
	*cuda = c;
	return 0;
}

void km_cuda_close(km_cuda *c)
{
	if (!c)
		return;
	km_cuda_blas_close(c);
	if (c->stream)
		cudaStreamSynchronize(c->stream);
	if (c->begin)
		cudaEventDestroy(c->begin);
	if (c->end)
		cudaEventDestroy(c->end);
	if (c->stream)
		cudaStreamDestroy(c->stream);
	cudaFree(c->arena);
	free(c);
}

const km_cuda_info *km_cuda_info_of(const km_cuda *c)
{
	return &c->info;
}

int km_cuda_take(km_cuda *c, void **piece, size_t bytes, const char *what, km_err *err)
{
	size_t rounded = (bytes + 255) / 256 * 256;

	if (rounded > c->arena_bytes - c->used)
		return km_fail(err, KM_ENOMEM, "%s: %zu bytes do not fit the GPU's arena of %zu (%zu used)",
		               what, bytes, c->arena_bytes, c->used);
	*piece = c->arena + c->used;
	c->used += rounded;
	return 0;
}

size_t km_cuda_mark(const km_cuda *c)
{
	return c->used;
}

void km_cuda_rewind(km_cuda *c, size_t mark)
{
	KM_ASSERT(mark <= c->used);
	c->used = mark;
}

int km_cuda_upload(km_cuda *c, void *to, const void *from, size_t bytes, km_err *err)
{
	KM_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, c->stream), err);
	return km_cuda_wait(c, err);
}

int km_cuda_download(km_cuda *c, void *to, const void *from, size_t bytes, km_err *err)
{
	KM_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, c->stream), err);
	return km_cuda_wait(c, err);
}

int km_cuda_copy(km_cuda *c, void *to, const void *from, size_t bytes, km_err *err)
{
	KM_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, c->stream), err);
	return 0;
}

int km_cuda_fill(km_cuda *c, void *to, unsigned char value, size_t bytes, km_err *err)
{
	KM_CUDA_TRY(cudaMemsetAsync(to, value, bytes, c->stream), err);
	return 0;
}

int km_cuda_wait(km_cuda *c, km_err *err)
{
	KM_CUDA_TRY(cudaStreamSynchronize(c->stream), err);
	KM_CUDA_TRY(cudaGetLastError(), err);
	return 0;
}

int km_cuda_pin(km_cuda *c, void **host, size_t bytes, km_err *err)
{
	(void)c;
	*host = NULL;
	if (cudaMallocHost(host, bytes ? bytes : 1) == cudaSuccess)
		return 0;
	cudaGetLastError();
	return km_fail(err, KM_ENOMEM, "%zu bytes of host memory could not be pinned", bytes);
}

void km_cuda_unpin(km_cuda *c, void *host)
{
	(void)c;
	if (host)
		cudaFreeHost(host);
}

int km_cuda_send(km_cuda *c, void *to, const void *from, size_t bytes, km_err *err)
{
	KM_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, c->stream), err);
	return 0;
}

int km_cuda_fetch(km_cuda *c, void *to, const void *from, size_t bytes, km_err *err)
{
	KM_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, c->stream), err);
	return 0;
}

int km_cuda_capture_begin(km_cuda *c, km_err *err)
{
	KM_CUDA_TRY(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), err);
	return 0;
}

int km_cuda_capture_end(km_cuda *c, km_cuda_graph **graph, km_err *err)
{
	cudaGraph_t recorded;
	cudaGraphExec_t exec;
	cudaError_t rc;
	size_t launches = 0;

	KM_CUDA_TRY(cudaStreamEndCapture(c->stream, &recorded), err);
	rc = cudaGraphGetNodes(recorded, NULL, &launches);
	if (rc == cudaSuccess)
		rc = cudaGraphInstantiate(&exec, recorded, 0);
	cudaGraphDestroy(recorded);
	if (rc != cudaSuccess)
		return km_cuda_fail(err, rc, "cudaGraphInstantiate");
	*graph = km_xcalloc(1, sizeof(**graph));
	(*graph)->exec = exec;
	(*graph)->launches = launches;
	return 0;
}

int km_cuda_graph_launch(km_cuda *c, km_cuda_graph *graph, km_err *err)
{
	KM_CUDA_TRY(cudaGraphLaunch(graph->exec, c->stream), err);
	return 0;
}

int km_cuda_graph_launches(const km_cuda_graph *graph)
{
	return (int)graph->launches;
}

void km_cuda_graph_free(km_cuda_graph *graph)
{
	if (!graph)
		return;
	cudaGraphExecDestroy(graph->exec);
	free(graph);
}

int km_cuda_fence_open(km_cuda *c, km_cuda_fence **fence, km_err *err)
{
	cudaEvent_t event;

	(void)c;
	KM_CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), err);
	*fence = km_xcalloc(1, sizeof(**fence));
	(*fence)->event = event;
	return 0;
}

int km_cuda_fence_set(km_cuda *c, km_cuda_fence *fence, km_err *err)
{
	KM_CUDA_TRY(cudaEventRecord(fence->event, c->stream), err);
	return 0;
}

int km_cuda_fence_wait(km_cuda_fence *fence, km_err *err)
{
	KM_CUDA_TRY(cudaEventSynchronize(fence->event), err);
	KM_CUDA_TRY(cudaGetLastError(), err);
	return 0;
}

void km_cuda_fence_close(km_cuda_fence *fence)
{
	if (!fence)
		return;
	cudaEventDestroy(fence->event);
	free(fence);
}

int km_cuda_time_begin(km_cuda *c, km_err *err)
{
	KM_CUDA_TRY(cudaEventRecord(c->begin, c->stream), err);
	return 0;
}

int km_cuda_time_end(km_cuda *c, double *us, km_err *err)
{
	float ms = 0;

	KM_CUDA_TRY(cudaEventRecord(c->end, c->stream), err);
	KM_CUDA_TRY(cudaEventSynchronize(c->end), err);
	KM_CUDA_TRY(cudaEventElapsedTime(&ms, c->begin, c->end), err);
	*us = 1e3 * (double)ms;
	return 0;
}
