/*
 * A checkpoint's weights, opened by memory map and checked: each tensor that the config calls for
 * is there with its dtype and shape, none is there twice or left over. Nothing is copied: a
 * km_weight borrows the map, which lives as long as the km_weights.
 *
 * Names with and without the `language_model.` wrapper are understood, the vision tower's are
 * counted and kept aside; where a tower's tensors are absent altogether, and where the folder has
 * files that the index does not name, a warning says so and the text model opens. Norms and biases are
 * small, come as f32 copies, and are checked for NaN here; so are the scales of a checkpoint up to 4 GB. The other numbers are not read (kimi-convert
 * --verify reads all). Any thread may read it after opening.
 */
#ifndef KM_MODEL_WEIGHTS_H
#define KM_MODEL_WEIGHTS_H

#include <stdint.h>

#include "device/weight.h"
#include "model/inventory.h"

typedef struct km_layer_weights {
	const float *input_norm, *post_attention_norm; /* [hidden] */
	km_weight q_proj;                              /* without q_lora */
	km_weight q_a, q_b;                            /* with q_lora */
	const float *q_a_norm;                         /* [q_lora_rank] */
	km_weight kv_a;                                /* [kv_lora_rank + rope, hidden] */
	const float *kv_a_norm;                        /* [kv_lora_rank] */
	km_weight kv_b, o;
	km_weight gate, up, down;                      /* a dense layer's MLP */
	km_weight router;                              /* [experts, hidden] */
	const float *router_bias;                      /* [experts] or NULL */
	km_weight shared_gate, shared_up, shared_down;
	km_weight *expert_gate, *expert_up, *expert_down; /* [experts] each */
	const uint8_t **packed_gate_up, **packed_down;    /* [experts], of a repacked checkpoint: in the
	                                                     map, as format/moe_layout.h says; NULL
	                                                     for an expert that is not repacked */
} km_layer_weights;

typedef struct km_weights {
	km_weight embed, head; /* [vocab, hidden] */
	const float *norm;     /* [hidden] */
	int layers;
	km_layer_weights *layer; /* [layers] */
	int64_t text_bytes, expert_bytes, vision_bytes, skipped_bytes; /* on disk, by class */
	struct km_weights_files *files; /* the maps */
} km_weights;

/* Opens and checks names, dtypes, shapes. Fails with the first problem's sentence and how many more
 * there are. `config` need not outlive the call. */
int km_weights_open(km_weights *weights, const km_config *config, const char *dir, km_err *err);
/* The same, but repacked experts have packed_gate_up and packed_down alone, and no expert_gate, _up and
 * _down: for a device that reads the layout. km_weights_open unpacks them into memory of their full size,
 * KM_ENOMEM where there is not enough. */
int km_weights_open_packed(km_weights *weights, const km_config *config, const char *dir, km_err *err);
/* Shapes and types of the matrices alone, as the config and its quantisation have them: no file is opened,
 * `data`, `scale` and the vectors are NULL. */
int km_weights_shapes(km_weights *weights, const km_config *config, km_err *err);
void km_weights_close(km_weights *weights);

/* Where a module's weight goes, once the layers are made; NULL: not a matrix (a vector), or not the text
 * model's. */
km_weight *km_weights_matrix(km_weights *weights, const km_module *module);
const float **km_weights_vector(km_weights *weights, const km_module *module);
/* 64-byte aligned, until km_weights_close; NULL when there is none. */
void *km_weights_memory(km_weights *weights, size_t bytes);

#endif
