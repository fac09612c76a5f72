/*
 * Is what a router computed right? Against double precision, row by row; for the GPU tests and for the
 * benchmark, which times nothing that it has not checked.
 *
 * Each check returns KM_EFORMAT with a sentence naming the first wrong element. An expert other than
 * the reference's is accepted only where the two differ by less than f32 can tell (NEAR_TIE, and not
 * by nothing: exact ties must go to the lower id); those are counted.
 */
#ifndef KM_MODEL_ROUTER_CHECK_H
#define KM_MODEL_ROUTER_CHECK_H

#include <stdint.h>

#include "device/cuda_router.h"

typedef struct km_router_check {
	int64_t rows, near_ties;
	double worst_weight; /* relative error */
	double worst_logit;  /* error over the sum of the products' sizes */
} km_router_check;

/* A logit may be off by so much of the sum of its products' sizes. */
double km_router_logit_bound(const km_router_shape *shape);

/* Rows first, first + step, ... of logits = x wᵀ, within the bound of f32 sums of hidden / 8 terms in
 * a lane. `w` is bf16, or f32 when the shape says so. */
int km_router_check_logits(km_router_check *check, const km_router_shape *shape, const uint16_t *x,
                           const void *w, const float *logits, int first, int step, km_err *err);

/* All rows. Rows from `valid` on are padding: id -1, weight 0. `bias` and `map` may be NULL. */
int km_router_check_gate(km_router_check *check, const km_router_shape *shape, const float *logits,
                         const float *bias, const int32_t *map, int valid, const int32_t *ids,
                         const float *weights, km_err *err);

/* `sorted` and `block_expert` up to `total`, from ids. */
int km_router_check_align(const km_router_shape *shape, const int32_t *ids, const int32_t *sorted,
                          const int32_t *block_expert, int total, km_err *err);

#endif
