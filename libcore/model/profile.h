/*
 * Where the time of one step goes, op by op, beside what the step takes as a whole.
 *
 * On a GPU: the whole step, its MoE layers, each op alone and the step without each op are captured as
 * graphs and replayed back to back, timed by the device's clock. An op "alone" runs once for every layer
 * that has it, in one graph: its weights are other memory each time, so they come from memory when they
 * are more than the cache holds (weight_bytes says). Alone it has neither the neighbours' launches to
 * overlap with nor their results in the cache, so the sum of all ops is not the step: the difference is
 * reported, not hidden. Experts alone take the rows' choice of the last layer. On the CPU ops run one
 * after the other, and are timed where they are.
 *
 * A step can be repeated: it writes the same tokens to the same places.
 */
#ifndef KM_MODEL_PROFILE_H
#define KM_MODEL_PROFILE_H

#include "model/model.h"
#include "model/step_cost.h"

typedef struct km_profile_op {
	km_step_cost cost; /* calls 0: the step has no such op */
	int launches;      /* 0: another op's do its work too, and its time is theirs */
	double us;         /* all calls */
	double saved_us;   /* what the step is faster by without it; NAN: not measured */
} km_profile_op;

typedef struct km_profile {
	double step_us, sum_us;
	double layers_us; /* of `layers` layers: MoE ones, or all where there is none */
	int layers;       /* 0: the step has none that computes every row */
	int launches;     /* of the step: kernels, copies; on the CPU ops */
	bool layers_are_moe;
	double distinct_experts; /* of a MoE layer, on average; 0: there is none */
	double expected_experts; /* were every choice of top_k experts as likely as any */
	double cache_bytes;      /* the device's; 0: not known */
	km_step_cost layer[KM_STEP_COUNT]; /* of one of `layers`, by op */
	km_profile_op op[KM_STEP_COUNT];
} km_profile;

/* Runs the step several times. The batch as for km_model_forward. */
int km_model_profile(km_model *model, const km_batch *batch, km_profile *profile, km_err *err);

/* Random latents of deviation 1 in every slot of the KV cache, for a step without the prompts before it. */
int km_model_fill_cache(km_model *model, uint64_t seed, km_err *err);

#endif
