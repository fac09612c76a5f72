#include "wire/json_fast.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/err.h"
#include "base/utf8.h"

#define EACH UINT64_C(0x0101010101010101)
#define TOPS UINT64_C(0x8080808080808080)

/* The high bit of each byte of `w` that is '"', '\\', below 0x20, or not ASCII. Bytes above the
 * first such may be marked wrongly (borrows), the first never is. */
static uint64_t special_bytes(uint64_t w)
{
	uint64_t quote = w ^ (EACH * '"'), slash = w ^ (EACH * '\\');

	return ((w - EACH * 0x20) | (quote - EACH) | (slash - EACH) | w) & TOPS;
}

/* A place in the input and one in the output, whose room the callers have made sure of. */
struct cursor {
	const char *s, *end;
	char *out;
};

/* Copies up to the first byte that needs care: a special of ASCII, or ill-formed UTF-8. Writes up
 * to 8 bytes past what it copies: a word is stored before it is known how much of it counts. */
static void copy_plain(struct cursor *c)
{
	const char *s = c->s, *end = c->end;
	char *out = c->out;

	while (s < end) {
		size_t width;

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
		while (end - s >= 8) {
			uint64_t w, hit;
			size_t plain;

			memcpy(&w, s, 8);
			memcpy(out, &w, 8);
			hit = special_bytes(w);
			plain = hit ? (size_t)__builtin_ctzll(hit) / 8 : 8;
			s += plain;
			out += plain;
			if (hit)
				break;
		}
		if (s == end)
			break;
#endif
		if ((unsigned char)*s < 0x80) {
			if ((unsigned char)*s < 0x20 || *s == '"' || *s == '\\')
				break;
			*out++ = *s++;
			continue;
		}
		while (s < end && (unsigned char)*s >= 0x80 &&
		       (width = km_utf8_width(s, (size_t)(end - s)))) {
			if (end - s >= 4)
				memcpy(out, s, 4);
			else
				memcpy(out, s, width);
			s += width;
			out += width;
		}
		if (s < end && (unsigned char)*s >= 0x80)
			break;
	}
	c->s = s;
	c->out = out;
}

static int hex4(const char *s, size_t n)
{
	int value = 0;

	if (n < 4)
		return -1;
	for (int i = 0; i < 4; i++) {
		char c = s[i], low = (char)(c | 0x20);

		if (c >= '0' && c <= '9')
			value = value << 4 | (c - '0');
		else if (low >= 'a' && low <= 'f')
			value = value << 4 | (low - 'a' + 10);
		else
			return -1;
	}
	return value;
}

/* c->s follows "\u". False: this is no character. */
static bool read_u_escape(struct cursor *c)
{
	int high = hex4(c->s, (size_t)(c->end - c->s)), low;
	uint32_t cp = (uint32_t)high;

	if (high < 0 || (high >= 0xdc00 && high < 0xe000))
		return false;
	c->s += 4;
	if (high >= 0xd800 && high < 0xdc00) {
		if (c->end - c->s < 6 || c->s[0] != '\\' || c->s[1] != 'u')
			return false;
		low = hex4(c->s + 2, 4);
		if (low < 0xdc00 || low >= 0xe000)
			return false;
		cp = 0x10000 + (((uint32_t)high - 0xd800) << 10) + ((uint32_t)low - 0xdc00);
		c->s += 6;
	}
	c->out += km_utf8_encode(cp, c->out);
	return true;
}

/* c->s follows '\\'. */
static bool read_escape(struct cursor *c)
{
	static const char meaning[128] = {
		['"'] = '"',  ['\\'] = '\\', ['/'] = '/',  ['b'] = '\b',
		['f'] = '\f', ['n'] = '\n',  ['r'] = '\r', ['t'] = '\t',
	};
	unsigned char letter;

	if (c->s == c->end)
		return false;
	letter = (unsigned char)*c->s++;
	if (letter == 'u')
		return read_u_escape(c);
	if (letter >= 128 || !meaning[letter])
		return false;
	*c->out++ = meaning[letter];
	return true;
}

size_t km_json_fast_read(const char *s, size_t n, km_buf *out)
{
	struct cursor c = { s + 1, s + n, NULL };

	/* Decoding never lengthens. */
	if (!n || s[0] != '"' || !km_buf_reserve(out, n + 8))
		return 0;
	c.out = out->data + out->len;
	for (;;) {
		copy_plain(&c);
		if (c.s == c.end || (*c.s != '"' && *c.s != '\\'))
			return 0;
		if (*c.s++ == '"')
			break;
		if (!read_escape(&c))
			return 0;
	}
	out->len = (size_t)(c.out - out->data);
	*c.out = '\0';
	return (size_t)(c.s - s);
}

/* c->s is at a byte that cannot stand as it is: writes 2, 3 or 6 for it. */
static void write_escape(struct cursor *c)
{
	static const char hex[] = "0123456789abcdef";
	static const char letters[128] = {
		['\b'] = 'b', ['\t'] = 't', ['\n'] = 'n',  ['\f'] = 'f',
		['\r'] = 'r', ['"'] = '"',  ['\\'] = '\\',
	};
	unsigned char byte = (unsigned char)*c->s;
	size_t len;

	if (byte >= 0x80) {
		km_utf8_decode(c->s, (size_t)(c->end - c->s), &len);
		c->s += len;
		memcpy(c->out, "\xef\xbf\xbd", 3);
		c->out += 3;
		return;
	}
	c->s++;
	*c->out++ = '\\';
	if (letters[byte]) {
		*c->out++ = letters[byte];
		return;
	}
	memcpy(c->out, "u00", 3);
	c->out[3] = hex[byte >> 4];
	c->out[4] = hex[byte & 15];
	c->out += 5;
}

void km_json_fast_write(km_buf *out, const char *s, size_t n)
{
	enum { BLOCK = 4096, WORST = 6 };
	const char *end = n ? s + n : s; /* an empty buffer's data is NULL */

	km_buf_putc(out, '"');
	while (s < end) {
		/* A block's cut may lie inside a character: it goes back to the character's first
		 * byte. */
		size_t block = (size_t)(end - s) > BLOCK ? BLOCK : (size_t)(end - s);
		struct cursor c;

		if (s + block < end)
			block -= km_utf8_tail(s, block);
		if (!km_buf_reserve(out, block * WORST + 8))
			return;
		c = (struct cursor){ s, s + block, out->data + out->len };
		for (copy_plain(&c); c.s < c.end; copy_plain(&c))
			write_escape(&c);
		out->len = (size_t)(c.out - out->data);
		*c.out = '\0';
		s += block;
	}
	km_buf_putc(out, '"');
}

/* ---- through jansson ---- */

static bool is_hex(char c)
{
	char low = (char)(c | 0x20);

	return (c >= '0' && c <= '9') || (low >= 'a' && low <= 'f');
}

/* The end of an escape at s[0] == '\\'; `*lone` says that it is a surrogate without its other
 * half. */
static size_t escape_length(const char *s, size_t n, bool *lone)
{
	char first, second;

	*lone = false;
	if (n < 6 || s[1] != 'u' || (s[2] | 0x20) != 'd' || !is_hex(s[4]) || !is_hex(s[5]))
		return n < 2 ? n : 2;
	first = (char)(s[3] | 0x20);
	if (s[3] < '8' || !is_hex(s[3]))
		return 2;
	second = n >= 12 ? (char)(s[9] | 0x20) : 0;
	if ((s[3] == '8' || s[3] == '9' || first == 'a' || first == 'b') && n >= 12 &&
	    s[6] == '\\' && s[7] == 'u' && (s[8] | 0x20) == 'd' && second >= 'c' && second <= 'f')
		return 12;
	*lone = true;
	return 6;
}

/* A copy that jansson can read: U+FFFD for ill-formed UTF-8 and for lone surrogates. */
static void sanitize(const char *s, size_t n, km_buf *out, km_json_odd *odd)
{
	for (size_t i = 0, len; i < n; i += len) {
		uint32_t cp = km_utf8_decode(s + i, n - i, &len);
		bool bad = cp >= KM_UTF8_MORE;

		if (!bad && cp == '\\')
			len = escape_length(s + i, n - i, &bad);
		if (!bad) {
			km_buf_append(out, s + i, len);
			continue;
		}
		if (!odd->bad_count++)
			odd->bad_at = i;
		km_buf_puts(out, s[i] == '\\' ? "\\ufffd" : "\xef\xbf\xbd");
	}
}

/* The length of the string at s[0] == '"', quotes included. */
static size_t string_length(const char *s, const char *end)
{
	const char *at = s + 1;

	for (; at < end && *at != '"'; at++)
		at += *at == '\\' && at + 1 < end;
	return (size_t)((at < end ? at + 1 : end) - s);
}

static size_t digits_length(const char *s, const char *end)
{
	const char *at = s;

	while (at < end && *at >= '0' && *at <= '9')
		at++;
	return (size_t)(at - s);
}

/* The length of the number at s, by RFC 8259's grammar; 0: there is none. */
static size_t number_length(const char *s, const char *end)
{
	const char *at = s + (*s == '-');
	size_t n = digits_length(at, end);

	if (!n || (*at == '0' && n > 1))
		return 0;
	at += n;
	if (at < end && *at == '.') {
		n = digits_length(++at, end);
		if (!n)
			return 0;
		at += n;
	}
	if (at < end && (*at == 'e' || *at == 'E')) {
		at++;
		at += at < end && (*at == '+' || *at == '-');
		n = digits_length(at, end);
		if (!n)
			return 0;
		at += n;
	}
	return (size_t)(at - s);
}

/* Of a number: is it more than 64 bits or a double hold? It may be less, but all from 1e200 on are
 * wide, so that no other is taken for a stand-in. */
static bool is_wide(const char *s, size_t n)
{
	const char *e = memchr(s, 'e', n);

	if (!e)
		e = memchr(s, 'E', n);
	if (!e && !memchr(s, '.', n))
		return n >= 19;
	return n >= 100 || (e && s + n - e > 3 && e[1] != '-');
}

static size_t nan_length(const char *s, const char *end)
{
	static const char *const words[] = { "NaN", "Infinity", "-Infinity" };

	for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++) {
		size_t n = strlen(words[i]);

		if ((size_t)(end - s) >= n && !memcmp(s, words[i], n))
			return n;
	}
	return 0;
}

/* A wide number's stand-in is (STAND_IN + its text's place in odd->wide) * 1e290, with its sign: no
 * other number that large is left beside it, and 17 digits carry the place through jansson. */
#define STAND_IN 10000000000LL

/* A copy that jansson can read: stand-ins for wide numbers, null for NaN and Infinity. */
static void replace_numbers(const char *s, size_t n, km_buf *out, km_json_odd *odd)
{
	const char *end = s + n;

	for (size_t len; s < end; s += len) {
		if (*s == '"') {
			len = string_length(s, end);
			km_buf_append(out, s, len);
		} else if ((len = nan_length(s, end))) {
			km_buf_puts(out, "null");
			odd->nan_count++;
		} else if ((len = number_length(s, end)) && is_wide(s, len)) {
			km_buf_printf(out, "%s%llde290", *s == '-' ? "-" : "",
			              STAND_IN + (long long)odd->wide.len);
			km_buf_append(&odd->wide, s, len);
			km_buf_putc(&odd->wide, '\0');
		} else {
			len = len ? len : 1;
			km_buf_append(out, s, len);
		}
	}
}

static json_t *load_replaced(const char *s, size_t n, json_error_t *error, km_json_odd *odd)
{
	km_buf copy = KM_BUF_INIT;
	json_t *value;

	replace_numbers(s, n, &copy, odd);
	value = json_loadb(copy.data, copy.len, JSON_DECODE_ANY | JSON_ALLOW_NUL, error);
	km_buf_release(&copy);
	return value;
}

json_t *km_json_load(const char *s, size_t n, json_error_t *error, km_json_odd *odd)
{
	km_buf clean = KM_BUF_INIT;
	json_t *value;

	odd->bad_count = odd->nan_count = 0;
	km_buf_clear(&odd->wide);
	if (!km_utf8_valid(s, n, NULL) || memmem(s, n, "\\uD", 3) || memmem(s, n, "\\ud", 3)) {
		sanitize(s, n, &clean, odd);
		s = clean.data;
		n = clean.len;
	}
	value = json_loadb(s, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, error);
	if (!value && (json_error_code(error) == json_error_numeric_overflow ||
	               memmem(s, n, "NaN", 3) || memmem(s, n, "Infinity", 8)))
		value = load_replaced(s, n, error, odd);
	km_buf_release(&clean);
	return value;
}

/* The text of the number that the one at s, written by jansson, stands for; NULL: for none. */
static const char *wide_text(const char *s, const km_json_odd *odd)
{
	double value = fabs(strtod(s, NULL));
	long long place;

	if (value < 9e299)
		return NULL;
	place = llround(value / 1e290) - STAND_IN;
	KM_ASSERT(place >= 0 && (size_t)place < odd->wide.len);
	return odd->wide.data + place;
}

void km_json_write(km_buf *out, const json_t *value, const km_json_odd *odd)
{
	char *text = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
	const char *s = text ? text : "null", *end = s + strlen(s), *wide;

	for (size_t len; s < end && odd->wide.len; s += len) {
		len = *s == '"' ? string_length(s, end) : number_length(s, end);
		wide = len && *s != '"' ? wide_text(s, odd) : NULL;
		len = len ? len : 1;
		km_buf_append(out, wide ? wide : s, wide ? strlen(wide) : len);
	}
	km_buf_puts(out, s);
	free(text);
}
