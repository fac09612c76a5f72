#include "base/err.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"

/* Strangers name tensors and files. Their newlines would split a line of output, their escapes move
 * a terminal's cursor, and JSON has no place for bytes that are not UTF-8, to which cutting adds
 * some. */
static void tidy(char *s)
{
	size_t len = strlen(s), bad;

	for (size_t i = 0; i < len; i++)
		if ((unsigned char)s[i] < ' ' || s[i] == 0x7f)
			s[i] = '?';
	while (!km_utf8_valid(s, len, &bad))
		s[bad] = '?';
}

void km_err_sentence(char *to, size_t cap, const char *fmt, va_list ap)
{
	vsnprintf(to, cap, fmt, ap);
	tidy(to);
}

int km_fail(km_err *err, int code, const char *fmt, ...)
{
	va_list ap;

	if (!err)
		return code;
	err->code = code;
	va_start(ap, fmt);
	km_err_sentence(err->msg, sizeof(err->msg), fmt, ap);
	va_end(ap);
	return code;
}

int km_fail_within(km_err *err, const char *fmt, ...)
{
	char tail[sizeof(err->msg)];
	size_t at, len;
	va_list ap;

	if (!err)
		return KM_EINVAL;
	len = strlen(err->msg);
	memcpy(tail, err->msg, len);
	va_start(ap, fmt);
	vsnprintf(err->msg, sizeof(err->msg) - 2, fmt, ap);
	va_end(ap);
	at = strlen(err->msg);
	memcpy(err->msg + at, ": ", 2);
	at += 2;
	if (len > sizeof(err->msg) - 1 - at)
		len = sizeof(err->msg) - 1 - at;
	memcpy(err->msg + at, tail, len);
	err->msg[at + len] = '\0';
	tidy(err->msg);
	return err->code;
}

void km_assert_failed(const char *file, int line, const char *what)
{
	fprintf(stderr, "%s:%d: assertion failed: %s\n", file, line, what);
	abort();
}
