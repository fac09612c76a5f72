/*
 * A checkpoint with random weights: the tensors of a config under their names, in the config's own
 * quantisation, in shards with an index, with config.json, generation_config.json and a tokenizer.
 *
 * Weights are normal with a deviation of 1/sqrt(inputs), the branches that write to the residual
 * stream scaled by depth, so that activations keep their size through 61 layers; the router's
 * logits spread enough that tokens go to different experts; the head's make peaked distributions.
 * Same config, seed and layers: the same bytes, on any machine with any number of threads.
 *
 * The folder is made if it is not there, and must be empty. On failure or cancellation everything
 * that was written is removed. MTP layers are not made (they are skipped on reading).
 */
#ifndef KM_MODEL_SYNTHESIZE_H
#define KM_MODEL_SYNTHESIZE_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

typedef struct km_synth_options {
	const char *config_path, *out_dir; /* config_path: a config.json, or the folder of one */
	uint64_t seed;
	int layers;          /* 0: the config's; fewer: the first ones, and config.json says so */
	int64_t shard_bytes; /* 0: 5 GB, or more where that makes over 64 shards */
	bool quiet;
	const volatile sig_atomic_t *cancel; /* NULL, or becomes nonzero to stop */
} km_synth_options;

typedef struct km_synth_result {
	int64_t tensors, bytes; /* of weights */
	int shards;
} km_synth_result;

/* KM_ENOMEM when the disk has no room, before anything is written. */
int km_synthesize(const km_synth_options *options, km_synth_result *result, km_err *err);

#endif
