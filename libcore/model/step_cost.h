/*
 * What a step must move and compute at least, by op: each weight once, of the experts those that its
 * rows chose, the cached tokens that it attends to, and what goes in and out of each op; multiply-adds
 * times two. Of the last layer only what the wanted rows need.
 */
#ifndef KM_MODEL_STEP_COST_H
#define KM_MODEL_STEP_COST_H

#include <stdbool.h>
#include <stdint.h>

#include "device/batch.h"
#include "device/op.h"
#include "model/step_op.h"
#include "model/weights.h"

typedef struct km_step_shape {
	const km_config *config;
	const km_weights *weights; /* with their data; expert 0 stands for its layer's */
	const km_batch *batch;
	const km_batch *kept; /* what the last layer keeps of it */
	enum km_kv_dtype kv_dtype;
	const int *experts; /* [layers] how many different ones the layer's rows chose */
	/* The sums into the stream are part of what makes the summands (a GPU's linear layers and
	 * experts), not of the norm behind them. */
	bool sums_where_made;
	/* Up to so many rows the router's product is part of shared_gate_up, x read once for both, and
	 * router is the selection alone. */
	int router_joined_rows;
	int x_bytes;        /* of a number that a linear layer or attention reads: 2 or 4; the others: 4 */
} km_step_shape;

typedef struct km_step_cost {
	int64_t calls;
	double bytes, flops;
	double weight_bytes; /* of the bytes: weights and cached tokens, which no two calls share */
} km_step_cost;

void km_step_costs(const km_step_shape *shape, km_step_cost costs[KM_STEP_COUNT]);

#endif
