/*
 * A search or a check from start to end, as kimi-tune runs it on GPU 0: rows on `out` as they come,
 * the file written after each, progress on stderr.
 */
#ifndef KM_MODEL_MOE_SEARCH_H
#define KM_MODEL_MOE_SEARCH_H

#include <stdio.h>

#include "model/moe_tuning.h"

typedef struct km_moe_search {
	const km_moe_target *target;
	const char *path;  /* the tuning file */
	const int *tokens; /* [count] */
	int count;
	double budget_s; /* of a token count */
	bool resume, json, quiet;
	FILE *out;
	const km_tuner_backend *backend; /* in place of GPU 0's, for tests; or NULL */
	const volatile sig_atomic_t *cancel;
} km_moe_search;

/* KM_ENOTFOUND when the target is not this machine's GPU and there is something to do. */
int km_moe_search_run(const km_moe_search *search, km_err *err);

/* Times the entries of `file` again; `tokens`, `count`, `path` and `resume` are not read. `*off`
 * is how many of `*entries` are off by more than the fraction `allowed`, or wrong. */
int km_moe_search_check(const km_moe_search *search, const char *file, double allowed, int *off,
                        int *entries, km_err *err);

#endif
