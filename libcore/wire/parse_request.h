/*
 * One completion to parse, as a JSONL line says it:
 *
 *   {"text":…} or {"chunks":[…]} or {"ids":[…]}, and optionally "tools", "thinking",
 *   "history_tool_calls", "engine_finish", "tool_choice", "literal_spans", "parsers"
 *
 * Two readers. The common line (a text or chunks, tools, and plain settings) goes through a scanner
 * of its own, which reads tools once for all the lines that repeat them; every other line, and
 * every line that is wrong, goes through jansson, which gives the verdict and the sentence. Where
 * both accept a line they read the same from it; a test holds them to that. A member that is null
 * counts as absent. Ill-formed UTF-8 and lone surrogates are read as U+FFFD and counted, NaN and
 * Infinity as null.
 *
 * The request's buffers are kept from line to line. One thread.
 */
#ifndef KM_WIRE_PARSE_REQUEST_H
#define KM_WIRE_PARSE_REQUEST_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/buf.h"
#include "base/err.h"
#include "text/parser.h"
#include "text/tokenizer.h"

typedef struct km_parse_span {
	size_t start, end; /* half open */
} km_parse_span;

/* What holds where the line does not say otherwise. */
typedef struct km_parse_defaults {
	km_parser_options parser; /* tools, reasoning, in_reasoning, history, declared tools */
	const char *engine_finish;
	const km_tokenizer *tokenizer; /* kept; for "ids", or NULL: they are refused */
} km_parse_defaults;

typedef struct km_parse_request {
	km_parser_options parser;  /* no callbacks; borrows declared tools from the request */
	const char *engine_finish; /* "stop" or "length" */
	km_buf text;               /* the text, or all chunks joined */
	km_parse_span *literal;    /* [literal_count] bytes of `text`, ascending, apart */
	size_t literal_count;
	km_ids ids;
	bool has_ids;
	/* control tokens before the last id, and the first's place */
	size_t control_count, control_at;
	const km_tokenizer *tokenizer;
	/* ill-formed places in the line, and the first one's byte offset */
	size_t bad_count, bad_at;
	size_t nan_count; /* of NaN and Infinity, which JSON does not have */
	/* owned: the line as jansson read it; the one tool of tool_choice */
	json_t *root, *tools;
	/* the last "tools" that the scanner met, as written: logs repeat them */
	km_buf tools_text;
	json_t *tools_read;       /* owned: what they say */
} km_parse_request;

void km_parse_request_init(km_parse_request *request);
void km_parse_request_release(km_parse_request *request);

int km_parse_request_read(km_parse_request *request, const km_parse_defaults *defaults,
                          const char *line, size_t len, km_err *err);
/* The same through jansson alone. */
int km_parse_request_read_slowly(km_parse_request *request, const km_parse_defaults *defaults,
                                 const char *line, size_t len, km_err *err);

/* Gives the parser the bytes [from, to) of the text, or the ids [from, to). */
void km_parse_request_feed(const km_parse_request *request, km_parser *parser, size_t from,
                           size_t to);

/* "parsers" of a line: "tool", "reasoning", "both". */
int km_parse_set_parsers(km_parser_options *options, const char *which, km_err *err);

#endif
