/*
 * What a device can do at most, to hold a measured time against: memory read per second, and bf16
 * multiply-adds (times two) per second of large matrix products.
 */
#ifndef KM_DEVICE_ROOFLINE_H
#define KM_DEVICE_ROOFLINE_H

#include "base/buf.h"
#include "device/cuda.h"

typedef struct km_roofline {
	double gbps;        /* 0: not known */
	double tflops;      /* 0: not known */
	const char *source; /* a few words: measured how, or that it is not */
} km_roofline;

/* Of GPUs that were measured, what was measured; of others the memory's nominal rate alone. */
void km_roofline_of_gpu(const km_cuda_info *info, km_roofline *roofline);
/* The read bandwidth of this machine's memory with `threads` threads, measured now. */
void km_roofline_of_cpu(int threads, km_roofline *roofline);

/* The least time, in us, for so many bytes and flops; 0: not known. */
double km_roofline_us(const km_roofline *roofline, double bytes, double flops);
/* Appends both rates and where they are from: "4500 GB/s, 790 TFLOP/s (measured: ...)". */
void km_roofline_describe(const km_roofline *roofline, km_buf *out);

#endif
