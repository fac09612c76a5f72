#include "wire/sse.h"

#include <string.h>

void km_sse_reader_init(km_sse_reader *r, size_t max_bytes, km_sse_fn on_event, void *ctx)
{
	memset(r, 0, sizeof(*r));
	km_buf_init(&r->line, max_bytes);
	km_buf_init(&r->data, max_bytes);
	r->on_event = on_event;
	r->ctx = ctx;
}

void km_sse_reader_release(km_sse_reader *r)
{
	km_buf_release(&r->line);
	km_buf_release(&r->data);
}

bool km_sse_reader_cut(const km_sse_reader *r)
{
	return r->has_data || r->line.len;
}

static int too_long(const km_sse_reader *r, km_err *err)
{
	return km_fail(err, KM_ELIMIT, "an event of the stream is longer than %zu bytes",
	               r->line.max);
}

static int take_data(km_sse_reader *r, const char *s, size_t n, km_err *err)
{
	if (r->has_data)
		km_buf_putc(&r->data, '\n');
	km_buf_append(&r->data, s, n);
	r->has_data = true;
	return r->data.overflow ? too_long(r, err) : 0;
}

static int take_line(km_sse_reader *r, const char *s, size_t n, km_err *err)
{
	const char *colon, *value;
	int rc;

	if (!r->started && n >= 3 && !memcmp(s, "\xef\xbb\xbf", 3)) { /* a byte order mark */
		s += 3;
		n -= 3;
	}
	r->started = true;
	if (!n) {
		if (!r->has_data)
			return 0;
		rc = r->on_event(r->ctx, KM_SSE_DATA, r->data.len ? r->data.data : "", r->data.len,
		                 err);
		km_buf_clear(&r->data);
		r->has_data = false;
		return rc;
	}
	colon = memchr(s, ':', n);
	value = colon ? colon + 1 : s + n;
	value += value < s + n && *value == ' ';
	if (colon == s)
		return r->on_event(r->ctx, KM_SSE_COMMENT, value, (size_t)(s + n - value), err);
	if ((colon ? (size_t)(colon - s) : n) == 4 && !memcmp(s, "data", 4))
		return take_data(r, value, (size_t)(s + n - value), err);
	return 0;
}

int km_sse_reader_push(km_sse_reader *r, const char *bytes, size_t len, km_err *err)
{
	for (size_t i = 0; i < len;) {
		size_t start = i;
		int rc;

		if (r->after_cr) {
			r->after_cr = false;
			if (bytes[i] == '\n') {
				i++;
				continue;
			}
		}
		while (i < len && bytes[i] != '\n' && bytes[i] != '\r')
			i++;
		km_buf_append(&r->line, bytes + start, i - start);
		if (r->line.overflow)
			return too_long(r, err);
		if (i == len)
			break;
		r->after_cr = bytes[i++] == '\r';
		rc = take_line(r, r->line.len ? r->line.data : "", r->line.len, err);
		km_buf_clear(&r->line);
		KM_TRY(rc);
	}
	return 0;
}

void km_sse_comment(km_buf *out, const char *text, size_t len)
{
	const char *end = text + len;

	for (;;) {
		const char *newline = len ? memchr(text, '\n', (size_t)(end - text)) : NULL;

		km_buf_puts(out, ": ");
		km_buf_append(out, text, (size_t)((newline ? newline : end) - text));
		km_buf_putc(out, '\n');
		if (!newline)
			break;
		text = newline + 1;
	}
	km_buf_putc(out, '\n');
}

void km_sse_done(km_buf *out)
{
	km_buf_puts(out, "data: [DONE]\n\n");
}
