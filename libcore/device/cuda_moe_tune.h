/*
 * The experts' kernel on GPU 0 behind device/tuner.h: random int4 experts in the packed layout,
 * uniform random routing, cold weights.
 *
 * A candidate's rows are held against the general form's on the same GPU, and those against the
 * CPU's op once; a sample is one replay of a CUDA graph of many calls, whose routings and inputs
 * rotate so that weights come from memory. Opening takes the memory for the largest of the token
 * counts. Builds without CUDA have no such file: device/cuda.h's km_cuda_count says 0 there.
 */
#ifndef KM_DEVICE_CUDA_MOE_TUNE_H
#define KM_DEVICE_CUDA_MOE_TUNE_H

#include "device/moe_tune.h"
#include "device/tuner.h"

typedef struct km_cuda_moe_tuner km_cuda_moe_tuner;

/* `problem` with the most tokens that will be asked for. Fills the backend, whose context is the
 * tuner. */
int km_cuda_moe_tuner_open(km_cuda_moe_tuner **tuner, km_tuner_backend *backend,
                           const km_moe_problem *problem, const km_moe_device *device, km_err *err);
void km_cuda_moe_tuner_close(km_cuda_moe_tuner *tuner);

#endif
