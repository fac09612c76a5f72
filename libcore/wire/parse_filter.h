/*
 * kimi-parse as a function: one file descriptor in, one out, in four forms.
 *
 * Output is written when a block of input has been worked through and before more is waited for, so
 * that a pipe sees each result as soon as it is certain. Memory is bounded by max_bytes: the
 * longest line, event or completion that is taken; longer ones are refused with a sentence.
 */
#ifndef KM_WIRE_PARSE_FILTER_H
#define KM_WIRE_PARSE_FILTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "base/err.h"
#include "wire/parse_request.h"

typedef struct km_parse_filter {
	int in, out;
	km_parse_defaults defaults;
	size_t max_bytes;
	FILE *notes; /* what was repaired or dropped, a line each; NULL: only counted */
	/* results */
	size_t repairs;
	size_t bad_lines; /* of --jsonl */
} km_parse_filter;

/*
 * 0, or the first failure: of input or output, of the limit, of a stream that is cut. KM_ECANCELED:
 * nobody reads the output any more.
 */
int km_parse_filter_text(km_parse_filter *filter, km_err *err);   /* one completion, one object */
int km_parse_filter_stream(km_parse_filter *filter, km_err *err); /* one completion, delta lines */
int km_parse_filter_lines(km_parse_filter *filter, km_err *err);  /* JSONL */
int km_parse_filter_sse(km_parse_filter *filter, km_err *err);

#endif
