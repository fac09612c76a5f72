/*
 * What kimi-tune tunes and how it says so: the experts' shape on one rank of a model, the device it
 * is for, and the sentences, rows and JSON about a search. Choosing and timing are
 * device/tuner.h's.
 */
#ifndef KM_MODEL_MOE_TUNING_H
#define KM_MODEL_MOE_TUNING_H

#include "device/cuda.h"
#include "device/moe_tune.h"
#include "device/roofline.h"
#include "device/tuner.h"
#include "model/config.h"

/* The shape that rank 0 of tp_size ranks has: experts go over ep_size of them, each expert's
 * columns over tp_size / ep_size. Refuses what does not divide, and experts that are not int4. */
int km_moe_tuning_shape(km_moe_problem *problem, const km_config *config, int tp_size, int ep_size,
                        km_err *err);

typedef struct km_moe_target {
	km_moe_tune_context context;
	km_tune_key key;
	char toolkit[64];
	km_roofline roofline;
	bool present;  /* this machine has it; else it is only named */
	char why[256]; /* not present: why */
} km_moe_target;

/* This machine's GPU 0; where there is none, the device called `name` with an H100's numbers. A
 * name that is given and is not GPU 0's also makes the target not present. */
int km_moe_target_make(km_moe_target *target, const km_moe_problem *problem, const char *name,
                       km_err *err);

/* Which file, from which shape: one line each. */
void km_moe_target_describe(const km_moe_target *target, const char *path, km_buf *out);

/* --dry-run: at each token count the candidates, the plan's own first. */
int km_moe_target_list(const km_moe_target *target, const int *tokens, int count, bool json,
                       km_buf *out, km_err *err);

/* A table for people, while it grows. `bytes` that a call touches at least are of uniform
 * routing. */
void km_moe_rows_head(km_buf *out);
void km_moe_rows_add(const km_moe_target *target, const km_tune_entry *entry, int candidates,
                     int wrong, km_buf *out);
double km_moe_floor_bytes(const km_moe_problem *problem, int tokens);

/* One JSON object about a table. */
void km_moe_table_json(const km_moe_target *target, const km_tune_table *table, const char *path,
                       bool complete, km_buf *out);
void km_moe_checked_report(const km_tuner_checked *checked, int count, double allowed, bool json,
                           km_buf *out, int *off);

#endif
