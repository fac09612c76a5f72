/*
 * The rotary table: cos and sin of every position, for plain RoPE and for YaRN as DeepSeek-V3 has
 * it.
 *
 * Row p of `table` [positions, dim] is cos of the dim/2 angles, then their sin, both multiplied by
 * YaRN's attention factor mscale(mscale) / mscale(mscale_all_dim) (1 for every Kimi model).
 * Source: Peng et al., "YaRN", arXiv 2309.00071, with the correction range of DeepSeek-V3's own
 * code.
 */
#ifndef KM_MODEL_ROPE_H
#define KM_MODEL_ROPE_H

#include "model/config.h"

void km_rope_table(const km_rope_config *rope, int dim, int positions, float *table);

/* The dim/2 frequencies (radians a position) and the factor on cos and sin, as the table uses
 * them. */
float km_rope_frequencies(const km_rope_config *rope, int dim, float *frequency);

#endif
