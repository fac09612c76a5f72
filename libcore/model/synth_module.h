/*
 * Which random numbers a tensor of a module has, by its role: what model/synthesize.h says of them.
 * For checkpoints that are written, and for random weights that never are (model/weights_random.h).
 */
#ifndef KM_MODEL_SYNTH_MODULE_H
#define KM_MODEL_SYNTH_MODULE_H

#include "model/inventory.h"
#include "model/synth_values.h"

/* Tensor `part` of those that km_module_tensors lists, without its stream and dtype. `depth`: layers
 * of the whole model, fewer of which may be made. */
km_synth_tensor km_synth_module(const km_module *module, int part, int depth,
                                const km_synth_tables *tables);

#endif
