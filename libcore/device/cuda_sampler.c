#include "device/cuda_sampler.h"

#include "device/cuda_state.h"
#include "sampler.h"

int km_cuda_sample(km_cuda *cuda, const km_cuda_sampling *a, km_err *err)
{
	kk_sample_args args = { .logits = a->logits,
		                .draw = a->draw,
		                .entries = a->entries,
		                .drawn = a->drawn,
		                .rows = a->rows,
		                .vocab = a->vocab,
		                .pdl = cuda->info.capability >= 90 };
	cudaError_t rc = kk_sample(&args, cuda->stream);

	return rc == cudaSuccess ? 0 : km_cuda_fail(err, rc, "sampler");
}
