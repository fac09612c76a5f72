/*
 * Tuning files of the experts' kernel: which table (device/tune.h) a problem has, and the plan that
 * comes of it.
 *
 * The table of E experts and N columns is read once; then each plan takes the entry of its token
 * count, or else of the nearest, with no more stages than fit at this count. Where there is no
 * table, or its tile does not fit, the plan makes its own choice, and km_moe_tuning_explain says
 * which it was. A shape that only the general form takes has no tiles: no table is looked for.
 */
#ifndef KM_DEVICE_MOE_TUNE_H
#define KM_DEVICE_MOE_TUNE_H

#include "device/moe_plan.h"
#include "device/tune.h"

/* Borrows the problem and the device for as long as the schema is used. */
typedef struct km_moe_tune_context {
	km_moe_problem problem; /* tokens is not read */
	km_moe_device device;
} km_moe_tune_context;

km_tune_schema km_moe_tune_schema(const km_moe_tune_context *context);
km_tune_problem km_moe_tune_problem(const km_moe_problem *problem);
/* `packed` problems have dtype int4_w4a16 and N of half the intermediate size. */
km_tune_key km_moe_tune_key(const km_moe_problem *problem, const char *device_name, int toolkit);

km_moe_tile km_moe_tile_of(const int *values);
void km_moe_tile_values(const km_moe_tile *tile, int values[KM_TUNE_MAX_FIELDS]);

typedef struct km_moe_tuning {
	bool found;
	bool general; /* not found: there are no tiles to tune */
	km_tune_table table;
	km_buf why; /* not found: which file and which field missed */
} km_moe_tuning;

/* 0 with or without a table; KM_ENOTFOUND without one when it is required; other codes for a
 * file that is there and is no table. Release it in any case. */
int km_moe_tuning_open(km_moe_tuning *tuning, const char *root, const km_tune_key *key,
                       const km_moe_tune_context *context, bool required, km_err *err);
void km_moe_tuning_release(km_moe_tuning *tuning);

/* The plan for problem->tokens. `entry`, which may be NULL, is set to the table's entry that it
 * took, or NULL for the plan's own choice. */
int km_moe_tuning_plan(km_moe_plan *plan, const km_moe_tuning *tuning,
                       const km_moe_problem *problem, const km_moe_device *device,
                       const km_tune_entry **entry, km_err *err);

/* One line: where the numbers of this plan came from. */
void km_moe_tuning_explain(const km_moe_tuning *tuning, const km_moe_problem *problem,
                           const km_moe_device *device, km_buf *out);

#endif
