/*
 * Attention on a GPU, chosen and cut up on the host: pure functions, the same for a device and a
 * shape.
 *
 * Decode: a sequence's cached tokens are cut into `splits` runs of whole tiles of KM_MLA_TILE
 * tokens, one block of the GPU each; what they leave is put together in the order of the runs. A
 * row's result depends on its own length and on `splits`, on nothing else, so a plan made for a
 * graph holds for every length that the graph sees.
 *
 * Prefill: keys and values of cached tokens are rebuilt into scratch that holds `room` tokens, so a
 * step is done in waves: each gathers runs of cached tokens, multiplies them by kv_b, and lets
 * tiles of rows attend to them. A sequence too long for one wave goes on in the next, its rows'
 * softmax kept in between. Waves are cut at multiples of KM_MLA_PREFILL_TILE, so that no row's
 * result depends on the cut.
 */
#ifndef KM_DEVICE_MLA_PLAN_H
#define KM_DEVICE_MLA_PLAN_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"
#include "device/batch.h"
#include "device/mla_shape.h"

typedef struct km_mla_device {
	int capability, multiprocessors;
} km_mla_device;

/* Whether the tensor-core forms take this shape; what they do not, the general forms do. */
bool km_mla_tensor_fits(const km_mla_shape *shape, const km_mla_device *device);

typedef struct km_mla_decode_plan {
	bool tensor;
	int splits;   /* runs of a sequence, at least 1 */
	int v_blocks; /* blocks that share a head's rows of kv_b in the last launch: 1, 2 or 4 */
	bool cluster; /* one launch, which has no use for splits, v_blocks and scratch */
} km_mla_decode_plan;

/* For steps of `seqs` sequences of up to `max_context` cached tokens. */
km_mla_decode_plan km_mla_plan_decode(const km_mla_shape *shape, int seqs, int max_context,
                                      const km_mla_device *device);

/* Byte offsets into a decode step's scratch on the device, which is 256-byte aligned and needs no
 * clearing. */
typedef struct km_mla_decode_scratch {
	size_t query;   /* bf16 [seqs, heads, kv_lora_rank + rope_dim], absorbed */
	size_t partial; /* f32 [seqs, heads, splits, kv_lora_rank], each run's weighted sum */
	size_t stats;   /* f32 [seqs, heads, splits, 2], its largest score and sum of weights */
	size_t bytes;   /* all of it */
} km_mla_decode_scratch;

void km_mla_decode_layout(const km_mla_shape *shape, const km_mla_decode_plan *plan, int seqs,
                          km_mla_decode_scratch *scratch);

typedef struct km_mla_wave {
	int runs_from, runs, tiles_from, tiles, tokens; /* tokens: of the scratch */
} km_mla_wave;

/* What a step's prefill needs, for all layers alike. The arrays are the caller's, of the capacities
 * that km_mla_prefill_capacity gives; runs and tiles go to the device. */
typedef struct km_mla_prefill_plan {
	km_mla_run *runs;
	km_mla_tile *tiles;
	km_mla_wave *wave;
	int waves, max_runs, max_tiles, max_waves;
	bool state; /* some rows' softmax is kept between waves: f32 [rows, heads, v_dim + 2] */
} km_mla_prefill_plan;

/* Sets max_runs, max_tiles, max_waves: enough for any batch of up to max_rows rows and max_seqs
 * sequences that cache up to max_context tokens each. `room`, a multiple of KM_MLA_PREFILL_TILE. */
void km_mla_prefill_capacity(km_mla_prefill_plan *plan, int max_rows, int max_seqs, int max_context,
                             int room);
/* batch->seq_start and batch->positions are read, of the sequences from decode_seqs on. KM_ELIMIT
 * when the arrays are too small. */
int km_mla_plan_prefill(km_mla_prefill_plan *plan, const km_batch *batch, int room, km_err *err);

#endif
