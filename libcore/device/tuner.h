/*
 * The search behind kimi-tune: at each token count, which of a kernel's candidates is fastest.
 *
 * Every candidate's result is checked before it is timed; a wrong one is dropped and counted, and a
 * wrong plan ends the search; one that took twice as long as another there is left out. The others
 * run a knock-out: all are timed with a few samples, the faster half again with twice as many, and
 * so on until one is left, as long as the budget lasts.
 * The winner then meets the plan's own choice, sample by sample in turn, and must beat it by more
 * than KM_TUNER_MARGIN: what is within noise keeps the plan's numbers, so that tables say something
 * where they differ from it.
 *
 * The device is behind km_tuner_backend, so that the search runs in tests on a clock that is made
 * up. One thread.
 */
#ifndef KM_DEVICE_TUNER_H
#define KM_DEVICE_TUNER_H

#include <signal.h>
#include <stdbool.h>

#include "device/tune.h"

#define KM_TUNER_MARGIN 0.01

enum { KM_TUNER_MAX_CANDIDATES = 1024 };

typedef struct km_tuner_backend {
	void *context;
	/* Makes the inputs for this many tokens, and the result that candidates are held
	 * against. */
	int (*prepare)(void *context, int tokens, km_err *err);
	/* Fills out[0..max); the plan's own choice is the first. Returns how many there are, >=
	 * 1. */
	int (*candidates)(void *context, int tokens, km_tune_entry *out, int max, km_err *err);
	/* 1: the result is right, and took about *us. 0: wrong, and err says how. Negative: the
	 * device failed. */
	int (*check)(void *context, int tokens, const int *values, double *us, km_err *err);
	/* One sample: microseconds of a call, cold inputs. */
	int (*sample)(void *context, int tokens, const int *values, double *us, km_err *err);
	double (*now)(void *context); /* seconds */
} km_tuner_backend;

/* Where a search stands; what km_tuner_options.show is given. */
typedef struct km_tuner_state {
	int tokens, index, count;       /* index of count token counts */
	int candidates, checked, wrong; /* of this token count */
	int round, left;                /* candidates still in the knock-out */
	double best_us, plan_us;        /* 0: not known yet */
	const int *best;                /* its values, or NULL */
	bool done;                      /* this token count is over; best and plan are final */
	bool plan_won;
	double elapsed_s, left_s; /* of the whole search; left_s negative: not known */
} km_tuner_state;

typedef struct km_tuner_options {
	const int *tokens; /* [count], borrowed */
	int count;
	double budget_s; /* of one token count; the knock-out stops when it is spent */
	const volatile sig_atomic_t *cancel;
	void (*show)(void *context, const km_tuner_state *state); /* or NULL */
	void *show_context;
	void (*wrong)(void *context, int tokens, const int *values, const char *why); /* or NULL */
} km_tuner_options;

/* Adds an entry to `table` for each token count. KM_ECANCELED when stopped: what is finished is
 * in the table, and so it is after any other failure. */
int km_tuner_run(const km_tuner_backend *backend, const km_tuner_options *options,
                 km_tune_table *table, km_err *err);

typedef struct km_tuner_checked {
	int tokens;
	bool right;
	double table_us, us; /* us: 0 where the result was wrong */
	double off;          /* us / table_us - 1 */
	char why[256];       /* what was wrong */
} km_tuner_checked;

/* Times each entry of a table again: out[table->count]. Entries without a time are refused. */
int km_tuner_check(const km_tuner_backend *backend, const km_tune_table *table,
                   const volatile sig_atomic_t *cancel, km_tuner_checked *out, km_err *err);

#endif
