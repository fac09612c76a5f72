/*
 * JSON strings at the speed of memory: the reading and writing that dominates kimi-parse --jsonl.
 *
 * Both look at eight bytes at a time for a byte that ends a plain run. The reader accepts exactly
 * what RFC 8259 and UTF-8 allow and gives up on everything else (a lone surrogate, ill-formed
 * UTF-8, a raw control character), leaving the verdict to the general parser.
 */
#ifndef KM_WIRE_JSON_FAST_H
#define KM_WIRE_JSON_FAST_H

#include <jansson.h>
#include <stddef.h>

#include "base/buf.h"

/* s[0] is the opening quote. Appends the decoded string to `out` and returns the bytes read, quotes
 * included; 0 when it gives up (`out` then holds a part). */
size_t km_json_fast_read(const char *s, size_t n, km_buf *out);

/* Appends a quoted string; ill-formed UTF-8 becomes U+FFFD, control characters are escaped. */
void km_json_fast_write(km_buf *out, const char *s, size_t n);

/* Any JSON value through jansson, which by itself refuses what is here read as U+FFFD: ill-formed
 * UTF-8 and lone surrogates. Counts those; `*bad_at` is the first one's byte offset. NULL fills
 * `error`. */
json_t *km_json_load(const char *s, size_t n, json_error_t *error, size_t *bad_count,
                     size_t *bad_at);

#endif
