/*
 * Server-sent events: a reader for any stream, and what is written beside data.
 *
 * The reader takes bytes however they come and hands over each event's data (several data lines are
 * joined by a newline) and each comment. Lines end in LF, CR LF or CR. Fields other than data are
 * skipped: no OpenAI stream uses them. An event that the end of input cuts is not handed over.
 * Source: WHATWG HTML, section 9.2.6 (interpreting an event stream).
 */
#ifndef KM_WIRE_SSE_H
#define KM_WIRE_SSE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/buf.h"
#include "base/err.h"

enum km_sse_kind { KM_SSE_DATA, KM_SSE_COMMENT };

/* `text` is borrowed for the call. A negative result ends the push that made the call. */
typedef int (*km_sse_fn)(void *ctx, enum km_sse_kind kind, const char *text, size_t len,
                         km_err *err);

typedef struct km_sse_reader {
	km_sse_fn on_event;
	void *ctx;
	km_buf line, data;
	bool has_data, after_cr, started;
} km_sse_reader;

/* No line and no event's data may be longer than max_bytes: KM_ELIMIT. */
void km_sse_reader_init(km_sse_reader *reader, size_t max_bytes, km_sse_fn on_event, void *ctx);
void km_sse_reader_release(km_sse_reader *reader);
int km_sse_reader_push(km_sse_reader *reader, const char *bytes, size_t len, km_err *err);
bool km_sse_reader_cut(const km_sse_reader *reader); /* would the end of input here cut an event? */

/* ": TEXT\n\n"; a newline in TEXT begins another such line. */
void km_sse_comment(km_buf *out, const char *text, size_t len);
void km_sse_done(km_buf *out); /* "data: [DONE]\n\n" */

#endif
