/*
 * A growable byte buffer with a stated maximum.
 *
 * `data` is always NUL-terminated one past `len` once anything was added. Appending past `max` adds
 * nothing and sets `overflow`, which sticks until km_buf_clear; callers that set a maximum check
 * it.
 */
#ifndef KM_BASE_BUF_H
#define KM_BASE_BUF_H

#include <stdbool.h>
#include <stddef.h>

typedef struct km_buf {
	char *data; /* owned */
	size_t len, cap;
	size_t max; /* 0: no maximum */
	bool overflow;
} km_buf;

#define KM_BUF_INIT { NULL, 0, 0, 0, false }

void km_buf_init(km_buf *buf, size_t max);
void km_buf_release(km_buf *buf); /* frees; the buffer may be used again */
void km_buf_clear(km_buf *buf);   /* empties, keeps the memory */

bool km_buf_reserve(km_buf *buf, size_t extra); /* false: it would pass the maximum */
void km_buf_append(km_buf *buf, const void *data, size_t len);
void km_buf_puts(km_buf *buf, const char *s);
void km_buf_putc(km_buf *buf, char c);
void km_buf_printf(km_buf *buf, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void km_buf_drop(km_buf *buf, size_t n); /* removes the first n bytes */

#endif
