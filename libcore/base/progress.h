/*
 * Progress of long work, on stderr: a bar with rate and time left on a terminal, a plain line every
 * few seconds elsewhere. Quiet when told so. One thread draws; km_progress_add is safe from any.
 */
#ifndef KM_BASE_PROGRESS_H
#define KM_BASE_PROGRESS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct km_progress {
	const char *what; /* borrowed: "verifying" */
	const char *unit; /* borrowed: "B" is shown scaled (GB), others as they are ("requests") */
	int64_t total;    /* 0: unknown */
	_Atomic int64_t done;
	_Atomic int64_t last_drawn_ns;
	int64_t start_ns;
	bool terminal, quiet, drawn;
} km_progress;

void km_progress_init(km_progress *p, const char *what, const char *unit, int64_t total,
                      bool quiet);
void km_progress_add(km_progress *p, int64_t amount); /* draws at most ten times a second */
void km_progress_finish(km_progress *p);              /* the last line, with the mean rate */

#endif
