/*
 * One rank's share of a tensor-parallel model, as a config of its own.
 *
 * With R ranks a rank has 1/R of the attention heads (rows of q_b, kv_b; columns of o), of each MLP's
 * and each expert's inner width (rows of gate and up, columns of down), and of the vocabulary (rows
 * of embedding and head). Whole on every rank are the norms, q_a and kv_a (a latent serves all
 * heads), the router and the KV cache. What ranks then have to exchange - sums after the embedding,
 * after attention and after each MLP, and the pieces of the logits - is not part of the slice.
 */
#ifndef KM_MODEL_SHARD_H
#define KM_MODEL_SHARD_H

#include "base/buf.h"
#include "model/config.h"

/* KM_EINVAL names what `ranks` does not divide; `config` is unchanged then. */
int km_config_shard(km_config *config, int ranks, km_err *err);
/* The exchanges of a step that a slice leaves out, in one sentence without its stop. */
void km_shard_describe_left_out(const km_config *config, int ranks, km_buf *out);

#endif
