/* What profile.c and profile_gpu.c share, and nobody else. */
#ifndef KM_MODEL_PROFILE_STATE_H
#define KM_MODEL_PROFILE_STATE_H

#include "model/profile.h"

/* Layers [from, to) that are alike and compute every row. */
typedef struct km_profile_layers {
	int from, to;
	bool moe;
} km_profile_layers;

void km_profile_choose_layers(const km_model *m, const km_batch *batch, km_profile_layers *layers);
/* Sets the costs of one layer that computes every row. */
void km_profile_layer_costs(const km_model *m, const km_batch *batch, const km_profile_layers *layers,
                            const int *experts, km_profile *p);
/* experts: [layers], how many different ones were chosen. */
void km_profile_costs(const km_model *m, const km_batch *batch, const km_batch *kept,
                      const int *experts, km_step_cost costs[KM_STEP_COUNT]);
void km_profile_mean_experts(const km_model *m, const km_batch *batch, const int *experts,
                             km_profile *p);

#if KM_CUDA
int km_profile_gpu(km_model *m, const km_batch *batch, km_profile *p, km_err *err);
int km_profile_fill_gpu(km_model *m, size_t at, const void *from, size_t bytes, km_err *err);
#endif

#endif
