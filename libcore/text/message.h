/*
 * A whole message from the parser's events: what a reply that does not stream needs.
 *
 * km_message_add is an on_event callback with the message as its context. Content, reasoning and
 * arguments are made valid UTF-8 (U+FFFD for what is not). Buffers are kept by km_message_clear for
 * the next message. One thread.
 */
#ifndef KM_TEXT_MESSAGE_H
#define KM_TEXT_MESSAGE_H

#include "base/buf.h"
#include "text/parser.h"

typedef struct km_message_call {
	km_buf id, name, arguments;
} km_message_call;

typedef struct km_message {
	km_buf content, reasoning;
	km_message_call *calls; /* [count] used of [cap] initialised; owned */
	int count, cap;
} km_message;

void km_message_init(km_message *message);
void km_message_release(km_message *message);
void km_message_clear(km_message *message);

void km_message_add(void *message, const km_parser_event *event);

/* "tool_calls" when there are calls and the engine stopped by itself, else the engine's own
 * word. */
const char *km_finish_reason(int calls, const char *engine_finish);

#endif
