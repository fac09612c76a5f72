#include "device/cuda_sampler.h"

#include "device/cuda_state.h"
#include "sampler.h"

int km_cuda_sample(km_cuda *cuda, const km_cuda_sampling *a, km_err *err)
{
	bool hopper = cuda->info.capability >= 90;
	kk_sample_args args = { .logits = a->logits,
		                .draw = a->draw,
		                .entries = a->entries,
		                .drawn = a->drawn,
		                .rows = a->rows,
		                .vocab = a->vocab,
		                .pdl = hopper,
		                .shared_rows = hopper ? cuda->info.multiprocessors / 4 : 0 };
	cudaError_t rc = kk_sample(&args, cuda->stream);

	return rc == cudaSuccess ? 0 : km_cuda_fail(err, rc, "sampler");
}

int km_cuda_next_ids(km_cuda *cuda, const int32_t *from, const int32_t *drawn, int32_t *ids,
                     int count, km_err *err)
{
	cudaError_t rc = kk_next_ids(from, drawn, ids, count, cuda->stream);

	return rc == cudaSuccess ? 0 : km_cuda_fail(err, rc, "next ids");
}
