/*
 * Random weights in memory, for measuring a shape without a checkpoint: the tensors of a config in its
 * own quantisation, with the numbers' sizes that model/synthesize.h describes.
 *
 * Made for speed: of a large tensor the first 8 million numbers are drawn and then repeat (by a period
 * that no row length divides), and of a layer's experts the first KM_RANDOM_EXPERTS are drawn and the others
 * are equal to them: with `shared` they are the same memory, for a GPU to which each is copied anyway;
 * else copies, so that a CPU reads as many bytes as it would of a checkpoint. The router's rows are all
 * different, and what it chooses is spread as chance would.
 */
#ifndef KM_MODEL_WEIGHTS_RANDOM_H
#define KM_MODEL_WEIGHTS_RANDOM_H

#include <stdint.h>

#include "model/weights.h"

enum { KM_RANDOM_EXPERTS = 8 };

typedef struct km_random_weights {
	uint64_t seed;
	int depth;   /* layers of the whole model: they scale what a layer adds to the stream */
	bool shared;
} km_random_weights;

/* As km_weights_open; km_weights_close frees it. KM_ENOMEM when memory runs out. */
int km_weights_random(km_weights *weights, const km_config *config, const km_random_weights *how,
                      km_err *err);

#endif
