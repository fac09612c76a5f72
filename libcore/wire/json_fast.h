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

/* What jansson by itself refuses. */
typedef struct km_json_odd {
	/* ill-formed UTF-8 and lone surrogates, read as U+FFFD; the first one's byte offset */
	size_t bad_count, bad_at;
	size_t nan_count; /* NaN, Infinity and -Infinity, which JSON does not have, read as null */
	/* Texts of numbers that 64 bits or a double do not hold, each with its NUL. Reals stand for
	 * them that only km_json_write knows. */
	km_buf wide;
} km_json_odd;

/* Any JSON value through jansson. NULL fills `error`. `odd`: zeros, or what was filled before; the
 * caller releases odd->wide. */
json_t *km_json_load(const char *s, size_t n, json_error_t *error, km_json_odd *odd);

/* Appends a value that was loaded with `odd`, or a part of one: its numbers lose nothing. */
void km_json_write(km_buf *out, const json_t *value, const km_json_odd *odd);

#endif
