/*
 * The output parser: reasoning, content and tool calls from what the model wrote.
 *
 * One state machine, two front ends. Token ids: the caller knows which ids are markers and calls
 * km_parser_marker for those and km_parser_text for everything else, so look-alike text is text.
 * Bytes: km_parser_bytes finds the markers itself, however the input was cut, and also takes the
 * section markers in the singular ("<|tool_call_section_begin|>"), which no vocabulary has. Either
 * way the final message, and the concatenation of the events, depend on the input alone.
 *
 * Rules that go beyond, or decide between, what other engines do (parser.c has the state table):
 *   - `<think>` outside a call opens a block, wherever and however often it comes; `</think>`
 *     outside a block is dropped. A block also ends where a section or a call begins.
 *   - Arguments end at a call end, a section end, the next call or the next section. Think and
 *     argument markers inside arguments are the arguments' own text.
 *   - Arguments that end empty become "{}"; arguments that the end of input cuts stay what they
 *     are.
 *   - A header that an end marker or the end of input cuts is no call.
 *   - White space alone before the first section goes when a call follows it before other content;
 *     alone between or after sections it always goes. White space is ASCII's.
 *   - With `tools` off the tool markers are text (they still end a think block), with `reasoning`
 *     off the think markers are.
 *
 * Memory is bounded by KM_PARSER_HOLD_MAX for a header or a run of white space, and by
 * KM_PARSER_INFER_MAX for the arguments of a call whose name must be inferred from them; what
 * passes a limit is dropped (headers, such calls) or emitted (white space). One thread.
 */
#ifndef KM_TEXT_PARSER_H
#define KM_TEXT_PARSER_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

enum { KM_PARSER_HOLD_MAX = 1 << 20, KM_PARSER_INFER_MAX = 64 << 20 };

enum km_marker {
	KM_MARK_SECTION_BEGIN, KM_MARK_SECTION_END, KM_MARK_CALL_BEGIN, KM_MARK_ARGUMENT_BEGIN,
	KM_MARK_CALL_END, KM_MARK_THINK, KM_MARK_THINK_END,
	KM_MARK_COUNT,
};

extern const char *const km_marker_text[KM_MARK_COUNT]; /* "<|tool_calls_section_begin|>", ... */

enum km_parser_event_kind {
	KM_PARSED_REASONING, KM_PARSED_CONTENT, /* text */
	KM_PARSED_CALL,     /* call_index, id, name; text: the arguments so far, maybe empty */
	KM_PARSED_ARGUMENTS, /* call_index; text */
};

typedef struct km_parser_event {
	enum km_parser_event_kind kind;
	/* Borrowed for the call, as the model wrote it. Whole characters, and ill-formed bytes
	 * where the model wrote such: make each event valid by itself (km_utf8_append_valid) before
	 * joining it to others, for a dropped marker may have stood between. The result does not
	 * depend on the cuts. */
	const char *text;
	size_t len;
	int call_index;   /* 0-based among the calls of this message */
	const char *id, *name; /* KM_PARSED_CALL: "functions.NAME:N", NAME; borrowed for the call */
} km_parser_event;

typedef struct km_parser_options {
	bool tools, reasoning;   /* which parsers are on */
	bool in_reasoning;       /* the output starts inside a think block; only with `reasoning` */
	int history_tool_calls;  /* calls in the conversation so far: the first new id's number */
	/* kept; array of OpenAI tools, or NULL: for ids without a name */
	const json_t *declared_tools;
	void (*on_event)(void *ctx, const km_parser_event *event);
	/* What was dropped or mended, for --strict; or NULL. `bytes` are the input's bytes that are
	 * in no event; none when something was mended and nothing lost. */
	void (*on_repair)(void *ctx, const char *what, const char *bytes, size_t len);
	void *ctx;
} km_parser_options;

typedef struct km_parser km_parser;

km_parser *km_parser_new(const km_parser_options *options);
void km_parser_free(km_parser *parser);

void km_parser_bytes(km_parser *parser, const char *bytes, size_t len);
void km_parser_text(km_parser *parser, const char *bytes, size_t len);
void km_parser_marker(km_parser *parser, enum km_marker marker);
void km_parser_finish(km_parser *parser); /* end of input: flushes what was held */

/* tool calls so far: finish_reason is tool_calls if any */
int km_parser_calls(const km_parser *parser);

/* Reserves the next call's index for a call that did not come through this parser. */
int km_parser_take_call(km_parser *parser);

/* Input bytes so far that were the format's own: markers, headers of calls that were given, white
 * space between markers. These, the events' bytes and the dropped bytes are the whole input (but
 * for each "{}" given for empty arguments). */
size_t km_parser_format_bytes(const km_parser *parser);

#endif
