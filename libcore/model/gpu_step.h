/*
 * A step's way to the GPU and back: its arrays are packed, padded and sent; its tokens, and the rows of
 * logits that the host draws from, are fetched.
 *
 * Private to model/. Begin and end come in pairs, in order; two steps may be under way. A failure is the
 * device's, or a page table larger than planned (KM_EINVAL).
 */
#ifndef KM_MODEL_GPU_STEP_H
#define KM_MODEL_GPU_STEP_H

#include "model/forward.h"

/* As km_steps has them; begin leaves m->gpu->step to be enqueued. */
int km_gpu_step_begin(km_model *m, const km_batch *batch, km_err *err);
int km_gpu_step_end(km_model *m, const km_batch *batch, int rc, const float **logits, km_err *err);

/* A step that is nothing but padding, for what is captured at open; it has no end. */
int km_gpu_step_send_padding(km_model *m, int rows, bool generates, km_err *err);
/* Enqueues, behind the step, what of it comes to the host. */
int km_gpu_step_fetch(km_model *m, const km_batch *batch, km_err *err);

#endif
