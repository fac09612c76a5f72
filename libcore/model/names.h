/*
 * Tensor names of the family, with and without K2.5's wrapper.
 *
 * On disk the text model's tensors begin with "model." or "lm_head.", or with "language_model."
 * before that, or with "language_model.layers." (some quantisers drop the "model."). All of them
 * have one key, which is the end of the name: "layers.3.self_attn.o_proj.weight", "lm_head.weight".
 * Vision tensors begin with "vision_tower." or "mm_projector." and are their own key.
 */
#ifndef KM_MODEL_NAMES_H
#define KM_MODEL_NAMES_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"
#include "model/config.h"

enum km_name_scope { KM_NAME_TEXT, KM_NAME_VISION, KM_NAME_UNKNOWN };

/* `*key` points into `name`. */
enum km_name_scope km_name_key(const char *name, const char **key);

/* The layer of a text key "layers.N.", or -1. */
int km_name_layer(const char *key);

bool km_name_ends(const char *name, const char *end);

/* The name that this kind of model has on disk: key "norm.weight" is
 * "language_model.model.norm.weight" in K2.5. Cuts what does not fit. */
void km_name_on_disk(char *out, size_t cap, enum km_model_kind kind, const char *key);

/*
 * Which linears the config leaves unquantised. compressed-tensors: an entry is a module's name, or
 * "re:" and a Python regular expression matched from the name's start; fp8: an entry also matches
 * as a run of whole components ("lm_head", "layers.0.mlp"). A module counts under its name with the
 * wrapper, without, and with the wrapper but without "model.".
 */
typedef struct km_ignore_rules km_ignore_rules;

int km_ignore_rules_open(km_ignore_rules **rules, const km_config *config, km_err *err);
void km_ignore_rules_close(km_ignore_rules *rules);

/* `key` without ".weight": "layers.3.self_attn.o_proj". 1 or 0; KM_ELIMIT for a pattern that takes
 * too many steps. One thread at a time. */
int km_ignore_rules_match(km_ignore_rules *rules, const char *key, km_err *err);

#endif
