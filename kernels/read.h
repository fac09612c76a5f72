/* Launcher of a kernel that reads memory and does next to nothing else: what the device's roofline is. */
#ifndef KK_READ_H
#define KK_READ_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kk_read_args {
	const void *data; /* device, 16-byte aligned */
	size_t bytes;     /* a multiple of 16 */
	int blocks;
	uint32_t *sum;    /* device; the sum of data's 32-bit words is added, without carry */
} kk_read_args;

cudaError_t kk_read(const kk_read_args *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
