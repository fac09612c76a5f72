#include "device/roofline.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"

static const struct {
	const char *name;
	km_roofline roofline;
} measured[] = {
	/* What tests/gpu/bench_gpu_roofline.c measures: here a kernel that reads 2 GiB; cuBLAS, bf16 8192 x 8192 x
	 * 8192 in bursts of ten, both before that program was. */
	{ "NVIDIA H100 80GB HBM3", { 3100, 780, "measured: reading 2 GiB, cuBLAS bf16 8192^3" } },
	/* A kernel that reads 6 GiB, by loads 4510, by bulk copies 4550; cuBLAS as above, by PyTorch, 789 to 802,
	 * by bench_gpu_roofline 783. */
	{ "NVIDIA H200", { 4500, 790, "measured: reading 6 GiB, cuBLAS bf16 8192^3" } },
};

void km_roofline_of_gpu(const km_cuda_info *info, km_roofline *roofline)
{
	for (size_t i = 0; i < sizeof(measured) / sizeof(*measured); i++)
		if (!strcmp(measured[i].name, info->name)) {
			*roofline = measured[i].roofline;
			return;
		}
	*roofline = (km_roofline){ info->memory_gbps, 0,
		                   info->memory_gbps > 0 ? "nominal memory bandwidth, not measured"
		                                         : "neither measured nor told by the driver" };
}

void km_roofline_of_cpu(int threads, km_roofline *roofline)
{
	enum { WORDS = 1 << 26, PASSES = 3 };
	uint64_t *data = km_xmalloc((size_t)WORDS * 8), sink = 0;

	*roofline = (km_roofline){ 0, 0, "memory bandwidth measured now: reading 512 MiB" };
#pragma omp parallel for num_threads(threads) schedule(static)
	for (int i = 0; i < WORDS; i++)
		data[i] = (uint64_t)i * UINT64_C(0x9e3779b97f4a7c15);
	for (int pass = 0; pass < PASSES; pass++) {
		double start = km_now_s(), rate;
		uint64_t sum = 0;

#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : sum)
		for (int i = 0; i < WORDS; i++)
			sum ^= data[i];
		sink ^= sum;
		rate = (double)WORDS * 8e-9 / (km_now_s() - start);
		roofline->gbps = rate > roofline->gbps ? rate : roofline->gbps;
	}
	if (sink == 1) /* the sums are used */
		roofline->gbps += 1e-9;
	free(data);
}

double km_roofline_us(const km_roofline *r, double bytes, double flops)
{
	double memory = r->gbps > 0 ? bytes / r->gbps * 1e-3 : 0;
	double compute = r->tflops > 0 ? flops / r->tflops * 1e-6 : 0;

	return memory > compute ? memory : compute;
}

void km_roofline_describe(const km_roofline *r, km_buf *out)
{
	if (r->gbps > 0)
		km_buf_printf(out, "%.0f GB/s%s", r->gbps, r->tflops > 0 ? ", " : " ");
	if (r->tflops > 0)
		km_buf_printf(out, "%.0f TFLOP/s ", r->tflops);
	km_buf_printf(out, r->gbps > 0 || r->tflops > 0 ? "(%s)" : "not known: %s", r->source);
}
