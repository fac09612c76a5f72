/*
 * UTF-8: one decoder for the tokenizer, the parser and every byte that becomes JSON.
 *
 * Ill-formed input follows the Unicode standard's "maximal subpart" practice: each maximal prefix
 * of a well-formed sequence, or each byte that starts none, counts as one U+FFFD.
 */
#ifndef KM_BASE_UTF8_H
#define KM_BASE_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/buf.h"

#define KM_UTF8_BAD UINT32_MAX  /* ill-formed; `*len` bytes make one U+FFFD */
#define KM_UTF8_MORE (UINT32_MAX - 1) /* a well-formed prefix that the input's end cuts */

/* Decodes the first code point of s[0..n), n >= 1; `*len` is how many bytes it covers. */
uint32_t km_utf8_decode(const char *s, size_t n, size_t *len);

/* Length of the well-formed character at s[0..n), n >= 1; 0: ill-formed, or cut by the end. The
 * checks are those of table 3-7 of the Unicode standard. */
static inline size_t km_utf8_width(const char *s, size_t n)
{
	const unsigned char *p = (const unsigned char *)s;

	if (p[0] < 0x80)
		return 1;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	/* Three bytes, as most wide text has, in two comparisons. */
	if (n >= 4) {
		uint32_t w, tight;

		memcpy(&w, s, 4);
		if ((w & 0x00c0c0f0) == 0x008080e0) {
			tight = w & 0x200f; /* e0 wants a0 or more after it, ed less */
			return tight && tight != 0x200d ? 3 : 0;
		}
	}
#endif
	if (n >= 3 && (p[0] & 0xf0) == 0xe0 && (p[1] & 0xc0) == 0x80 && (p[2] & 0xc0) == 0x80)
		return (p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ? 0 : 3;
	if (n >= 2 && p[0] >= 0xc2 && p[0] < 0xe0 && (p[1] & 0xc0) == 0x80)
		return 2;
	if (n < 4 || p[0] < 0xf0 || p[0] > 0xf4 || (p[1] & 0xc0) != 0x80 || (p[2] & 0xc0) != 0x80 ||
	    (p[3] & 0xc0) != 0x80)
		return 0;
	return (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f) ? 0 : 4;
}

/* Writes 1 to 4 bytes, returns how many. `cp` is a scalar value. */
size_t km_utf8_encode(uint32_t cp, char out[4]);

/* Is all of s[0..n) well formed? If not, `*bad_at` (may be NULL) is the first bad byte's offset. */
bool km_utf8_valid(const char *s, size_t n, size_t *bad_at);

/* How many bytes at the end of s[0..n) are a well-formed but unfinished sequence: 0 to 3. */
size_t km_utf8_tail(const char *s, size_t n);

/* Appends s[0..n) with U+FFFD for what is ill-formed (an unfinished tail too); returns how many
 * replacements were made. */
size_t km_utf8_append_valid(km_buf *out, const char *s, size_t n);

#endif
