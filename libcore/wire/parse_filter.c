#include "wire/parse_filter.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/utf8.h"
#include "wire/parse_json.h"
#include "wire/sse_repair.h"

/* Measured on Zen 4: speed no longer grows above 64 kB, the most that a pipe gives at once. */
enum { BLOCK = 256 << 10, KEEP = 1 << 20, EXCERPT = 40 };

/* ---- notes on repairs: runs of the same kind become one line ---- */

struct notes {
	km_parse_filter *filter;
	size_t line; /* 0: none to name */
	const char *what;
	size_t bytes;
	km_buf excerpt;
};

static void notes_flush(struct notes *n)
{
	km_buf text = KM_BUF_INIT;

	if (!n->what)
		return;
	n->filter->repairs++;
	if (n->filter->notes) {
		if (n->line)
			km_buf_printf(&text, "line %zu: ", n->line);
		km_buf_puts(&text, n->what);
		if (n->bytes) {
			km_buf_printf(&text, ": %zu bytes dropped: ", n->bytes);
			km_buf_append(&text, n->excerpt.data, n->excerpt.len);
			km_buf_puts(&text, n->bytes > n->excerpt.len ? "..." : "");
		}
		for (size_t i = 0; i < text.len; i++) {
			if ((unsigned char)text.data[i] < 0x20 || text.data[i] == 0x7f)
				text.data[i] = ' ';
		}
		fprintf(n->filter->notes, "kimi-parse: %s\n", text.data);
		km_buf_release(&text);
	}
	n->what = NULL;
	n->bytes = 0;
	km_buf_clear(&n->excerpt);
}

static void on_repair(void *ctx, const char *what, const char *bytes, size_t len)
{
	struct notes *n = ctx;

	if (n->what && (!len || !n->bytes || strcmp(n->what, what)))
		notes_flush(n);
	n->what = what;
	n->bytes += len;
	if (len > EXCERPT - n->excerpt.len)
		len = EXCERPT - n->excerpt.len;
	km_buf_append(&n->excerpt, bytes, len);
}

static void note_bad_utf8(struct notes *n, size_t count, size_t at)
{
	char what[120];

	if (!count)
		return;
	notes_flush(n);
	snprintf(what, sizeof(what),
	         "%zu places that are not UTF-8, the first at byte %zu, are U+FFFD", count, at);
	n->what = what;
	notes_flush(n);
}

static void note_nan(struct notes *n, size_t count)
{
	if (!count)
		return;
	notes_flush(n);
	n->what = "NaN or Infinity is read as null";
	notes_flush(n);
}

static void note_control(struct notes *n, size_t count, size_t at)
{
	char what[120];

	if (!count)
		return;
	notes_flush(n);
	snprintf(what, sizeof(what), "%zu control tokens, the first \"ids\"[%zu], are no text",
	         count, at);
	n->what = what;
	notes_flush(n);
}

/* ---- input and output ---- */

static int write_all(km_parse_filter *f, km_buf *out, km_err *err)
{
	size_t at = 0;

	while (at < out->len) {
		ssize_t n = write(f->out, out->data + at, out->len - at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EPIPE || errno == EBADF))
			return km_fail(err, KM_ECANCELED, "the output is closed");
		if (n < 0)
			return km_fail(err, KM_EIO, "writing the output: %s", strerror(errno));
		at += (size_t)n;
	}
	km_buf_clear(out);
	if (out->cap > 64 * (size_t)KEEP) /* one giant must not stay for all that follow */
		km_buf_release(out);
	return 0;
}

static int read_some(km_parse_filter *f, char *to, size_t cap, size_t *got, km_err *err)
{
	ssize_t n;

	*got = 0;
	do {
		n = read(f->in, to, cap);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return km_fail(err, KM_EIO, "reading the input: %s", strerror(errno));
	*got = (size_t)n;
	return 0;
}

/* Text that comes in blocks: whole characters go to the parser, what is ill-formed is counted. */
struct source {
	char block[BLOCK];
	size_t carry;    /* bytes at the front that an unfinished character left */
	size_t offset;   /* of the block in the input */
	size_t bad_count, bad_at;
};

static void count_bad(struct source *src, size_t len)
{
	size_t at = 0, bad, took;

	while (at < len && !km_utf8_valid(src->block + at, len - at, &bad)) {
		at += bad;
		if (!src->bad_count++)
			src->bad_at = src->offset + at;
		km_utf8_decode(src->block + at, len - at, &took);
		at += took;
	}
}

/* Gives the next block to the parser; `*more` is false at the end of input. */
static int pump(km_parse_filter *f, struct source *src, km_parser *parser, bool *more, km_err *err)
{
	size_t got = 0, len;

	KM_TRY(read_some(f, src->block + src->carry, BLOCK - src->carry, &got, err));
	len = src->carry + got;
	src->carry = got ? km_utf8_tail(src->block, len) : 0;
	count_bad(src, len - src->carry);
	km_parser_bytes(parser, src->block, len - src->carry);
	memmove(src->block, src->block + len - src->carry, src->carry);
	src->offset += len - src->carry;
	*more = got > 0;
	return 0;
}

/* The parser has one context for both callbacks. */
struct sink {
	struct notes *notes;
	void (*on_event)(void *ctx, const km_parser_event *event);
	void *ctx;
};

static void sink_event(void *ctx, const km_parser_event *event)
{
	struct sink *sink = ctx;

	sink->on_event(sink->ctx, event);
}

static void sink_repair(void *ctx, const char *what, const char *bytes, size_t len)
{
	struct sink *sink = ctx;

	on_repair(sink->notes, what, bytes, len);
}

static km_parser *sink_parser(struct sink *sink, const km_parser_options *from)
{
	km_parser_options options = *from;

	options.on_event = sink_event;
	options.on_repair = sink_repair;
	options.ctx = sink;
	return km_parser_new(&options);
}

/* ---- one completion ---- */

static int run_completion(km_parse_filter *f, struct sink *sink, km_parser *parser, km_buf *stream,
                          km_err *err)
{
	struct source *src = km_xcalloc(1, sizeof(*src));
	bool more = true;
	int rc = 0;

	while (more && !rc) {
		rc = pump(f, src, parser, &more, err);
		if (!rc && stream)
			rc = write_all(f, stream, err);
		if (!rc && !stream && src->offset > f->max_bytes)
			rc = km_fail(err, KM_ELIMIT,
			             "the completion is longer than --max-bytes %zu", f->max_bytes);
	}
	if (!rc) {
		km_parser_finish(parser);
		notes_flush(sink->notes);
		note_bad_utf8(sink->notes, src->bad_count, src->bad_at);
	}
	free(src);
	return rc;
}

int km_parse_filter_text(km_parse_filter *f, km_err *err)
{
	struct notes notes = { .filter = f };
	km_message message;
	struct sink sink = { &notes, km_message_add, &message };
	km_parser *parser = sink_parser(&sink, &f->defaults.parser);
	km_buf out = KM_BUF_INIT;
	int rc;

	km_message_init(&message);
	rc = run_completion(f, &sink, parser, NULL, err);
	if (!rc) {
		km_parse_json_message(&out, &message,
		                      km_finish_reason(message.count, f->defaults.engine_finish));
		km_buf_putc(&out, '\n');
		rc = write_all(f, &out, err);
	}
	km_parser_free(parser);
	km_message_release(&message);
	km_buf_release(&out);
	km_buf_release(&notes.excerpt);
	return rc;
}

static void write_delta(void *ctx, const km_parser_event *event)
{
	km_parse_json_delta(ctx, event);
	km_buf_putc(ctx, '\n');
}

int km_parse_filter_stream(km_parse_filter *f, km_err *err)
{
	struct notes notes = { .filter = f };
	km_buf out = KM_BUF_INIT;
	struct sink sink = { &notes, write_delta, &out };
	km_parser *parser = sink_parser(&sink, &f->defaults.parser);
	int rc = run_completion(f, &sink, parser, &out, err);

	if (!rc) {
		km_buf_printf(&out, "{\"finish_reason\":\"%s\"}\n",
		              km_finish_reason(km_parser_calls(parser), f->defaults.engine_finish));
		rc = write_all(f, &out, err);
	}
	km_parser_free(parser);
	km_buf_release(&out);
	km_buf_release(&notes.excerpt);
	return rc;
}

/* ---- JSONL ---- */

struct lines {
	char *data;
	size_t at, end, cap; /* data[at..end) is unread */
	size_t scanned;      /* data[at..scanned) has no newline */
	size_t number;
	bool eof;
};

struct job {
	km_parse_filter *filter;
	struct lines lines;
	struct notes notes;
	struct sink sink;
	km_message message;
	km_parse_request request;
	km_buf out;
};

static void make_room(struct lines *l, size_t max)
{
	if (l->at) {
		memmove(l->data, l->data + l->at, l->end - l->at);
		l->end -= l->at;
		l->scanned -= l->at;
		l->at = 0;
	}
	if (l->cap - l->end < BLOCK / 2 && l->cap < max + BLOCK) {
		l->cap = l->cap * 2 < max + BLOCK ? l->cap * 2 : max + BLOCK;
		l->data = km_xrealloc(l->data, l->cap);
	}
}

/* Passes over the rest of a line that is too long. */
static int skip_line(struct job *j, km_err *err)
{
	struct lines *l = &j->lines;

	while (!l->eof) {
		size_t got = 0;
		char *newline;

		KM_TRY(read_some(j->filter, l->data, l->cap, &got, err));
		l->at = l->scanned = 0;
		l->end = got;
		l->eof = !got;
		newline = got ? memchr(l->data, '\n', got) : NULL;
		if (newline) {
			l->at = l->scanned = (size_t)(newline + 1 - l->data);
			break;
		}
	}
	if (l->eof)
		l->at = l->end;
	return 0;
}

/* 1: a line; 0: the end of input; KM_ELIMIT: a line that was too long, and has been passed over. */
static int next_line(struct job *j, const char **line, size_t *len, km_err *err)
{
	struct lines *l = &j->lines;
	size_t max = j->filter->max_bytes, got = 0;

	for (;;) {
		char *newline = l->scanned < l->end
		                        ? memchr(l->data + l->scanned, '\n', l->end - l->scanned)
		                        : NULL;

		if (newline || (l->eof && l->at < l->end)) {
			*line = l->data + l->at;
			*len = newline ? (size_t)(newline - *line) : l->end - l->at;
			l->at = l->scanned = newline ? (size_t)(newline + 1 - l->data) : l->end;
			l->number++;
			if (*len > max)
				return km_fail(err, KM_ELIMIT,
				               "the line is longer than --max-bytes %zu", max);
			return 1;
		}
		if (l->eof)
			return 0;
		l->scanned = l->end;
		if (l->end - l->at > max) {
			l->number++;
			KM_TRY(skip_line(j, err));
			return km_fail(err, KM_ELIMIT, "the line is longer than --max-bytes %zu",
			               max);
		}
		KM_TRY(write_all(j->filter, &j->out, err));
		make_room(l, max);
		KM_TRY(read_some(j->filter, l->data + l->end, l->cap - l->end, &got, err));
		l->end += got;
		l->eof = !got;
	}
}

static int parse_line(struct job *j, const char *line, size_t len, km_err *err)
{
	km_parse_request *r = &j->request;
	km_parser *parser;

	/* byte order mark */
	if (j->lines.number == 1 && len >= 3 && !memcmp(line, "\xef\xbb\xbf", 3)) {
		line += 3;
		len -= 3;
	}
	KM_TRY(km_parse_request_read(r, &j->filter->defaults, line, len, err));
	km_message_clear(&j->message);
	j->notes.line = j->lines.number;
	note_bad_utf8(&j->notes, r->bad_count, r->bad_at);
	note_nan(&j->notes, r->nan_count);
	note_control(&j->notes, r->control_count, r->control_at);
	parser = sink_parser(&j->sink, &r->parser);
	km_parse_request_feed(r, parser, 0, r->has_ids ? r->ids.len : r->text.len);
	km_parser_finish(parser);
	km_parser_free(parser);
	notes_flush(&j->notes);
	km_parse_json_message(&j->out, &j->message,
	                      km_finish_reason(j->message.count, r->engine_finish));
	return 0;
}

static int run_lines(struct job *j, km_err *err)
{
	const char *line = NULL;
	size_t len = 0;
	km_err bad;
	int rc;

	while ((rc = next_line(j, &line, &len, err)) != 0) {
		if (rc < 0 && rc != KM_ELIMIT)
			return rc;
		if (rc == KM_ELIMIT)
			bad = *err;
		else
			rc = parse_line(j, line, len, &bad);
		if (rc < 0) {
			km_parse_json_error(&j->out, bad.msg, j->lines.number);
			j->filter->bad_lines++;
		}
		km_buf_putc(&j->out, '\n');
		if (j->out.len > KEEP)
			KM_TRY(write_all(j->filter, &j->out, err));
	}
	return write_all(j->filter, &j->out, err);
}

int km_parse_filter_lines(km_parse_filter *f, km_err *err)
{
	struct job j = { .filter = f, .notes = { .filter = f } };
	int rc;

	j.sink = (struct sink){ &j.notes, km_message_add, &j.message };
	j.lines.cap = BLOCK;
	j.lines.data = km_xmalloc(j.lines.cap);
	km_parse_request_init(&j.request);
	rc = run_lines(&j, err);
	km_parse_request_release(&j.request);
	km_message_release(&j.message);
	km_buf_release(&j.out);
	km_buf_release(&j.notes.excerpt);
	free(j.lines.data);
	return rc;
}

/* ---- SSE ---- */

int km_parse_filter_sse(km_parse_filter *f, km_err *err)
{
	struct notes notes = { .filter = f };
	km_parser_options options = f->defaults.parser;
	km_sse_repair *repair = km_xcalloc(1, sizeof(*repair));
	char *block = km_xmalloc(BLOCK);
	km_buf out = KM_BUF_INIT;
	size_t got = 1;
	int rc = 0, written;
	km_err closed;

	options.on_repair = on_repair;
	options.ctx = &notes;
	km_sse_repair_init(repair, &options, f->max_bytes);
	while (!rc && got) {
		rc = read_some(f, block, BLOCK, &got, err);
		if (!rc && got)
			rc = km_sse_repair_push(repair, block, got, &out, err);
		else if (!rc)
			rc = km_sse_repair_end(repair, &out, err);
		/* what was certain goes out, whatever was wrong after it */
		written = write_all(f, &out, &closed);
		if (written) {
			*err = closed;
			rc = written;
		}
	}
	notes_flush(&notes);
	km_sse_repair_release(repair);
	free(repair);
	free(block);
	km_buf_release(&out);
	km_buf_release(&notes.excerpt);
	return rc;
}
