/*
 * A chat or completions stream from an engine that leaks, made into a correct chat stream.
 *
 * Bytes of the stream go in as they come, corrected bytes are appended to `out` at once. Each
 * choice has a parser of its own. Text, wherever the engine put it (content, reasoning_content,
 * reasoning, or a completion's text), goes through it; tool calls that the engine did find keep
 * their place among the others and get the ids that the model's next turn needs. They are told
 * apart by `index` or, from engines that send none, by id and name; a call is given when its name
 * comes. Everything else of a chunk (id, model, usage, logprobs, keys of the delta that are not
 * known here) is handed on. The finish reason is corrected: tool_calls exactly when there is a call
 * and the engine stopped by itself.
 *
 * km_sse_repair_end says with KM_EFORMAT that the stream was cut (no [DONE]), or carried a chunk
 * that could not be read, a call without a name or an error of the server's; the output then holds
 * what was certain, and no more.
 */
#ifndef KM_WIRE_SSE_REPAIR_H
#define KM_WIRE_SSE_REPAIR_H

#include <jansson.h>

#include "base/buf.h"
#include "base/err.h"
#include "text/parser.h"
#include "wire/json_fast.h"
#include "wire/sse.h"

enum { KM_SSE_REPAIR_MAX_CHOICES = 128 };

typedef struct km_sse_call {
	char *id;    /* owned: the engine's, or NULL */
	km_buf held; /* arguments that came before the name */
	int index;   /* ours, or -1: not named yet, so not given */
} km_sse_call;

typedef struct km_sse_choice {
	km_parser *parser; /* NULL: not seen yet */
	struct km_sse_repair *repair;
	int index;
	bool native_reasoning; /* the engine's last delta was its reasoning field */
	bool any_text, role_sent, finished;
	km_sse_call *calls; /* [call_count]: those that the engine found */
	int call_count;
	km_buf id;          /* scratch */
} km_sse_choice;

typedef struct km_sse_repair {
	km_parser_options parser; /* for each choice; on_repair and its ctx are the caller's */
	void *repair_ctx;
	km_buf *out;              /* borrowed during a call */
	km_sse_reader reader;
	km_sse_choice choices[KM_SSE_REPAIR_MAX_CHOICES];
	json_t *envelope;         /* of the chunk at hand: all of it but the choices */
	km_json_odd odd;          /* of the chunk at hand */
	/* borrowed: of the choice at hand, until a chunk has carried them */
	json_t *logprobs;
	bool done;
	km_err first;             /* the first thing that was wrong with the stream */
} km_sse_repair;

/* `options`: as for km_parser_new, without on_event. */
void km_sse_repair_init(km_sse_repair *repair, const km_parser_options *options, size_t max_bytes);
void km_sse_repair_release(km_sse_repair *repair);

int km_sse_repair_push(km_sse_repair *repair, const char *bytes, size_t len, km_buf *out,
                       km_err *err);
/* End of input. A [DONE] that lost the newlines after it, as in a log, is taken all the same. */
int km_sse_repair_end(km_sse_repair *repair, km_buf *out, km_err *err);

#endif
