/*
 * What the parser gives, as OpenAI's JSON: whole messages, deltas, and errors in a line's place.
 *
 * Always valid JSON and UTF-8: what the model wrote wrongly is U+FFFD. Appended to a buffer, no
 * newline.
 */
#ifndef KM_WIRE_PARSE_JSON_H
#define KM_WIRE_PARSE_JSON_H

#include "base/buf.h"
#include "text/message.h"

/* {"content","reasoning_content" (null when empty),"tool_calls":[…],"finish_reason"} */
void km_parse_json_message(km_buf *out, const km_message *message, const char *finish_reason);

/* {"content":…} or {"reasoning_content":…} or {"tool_calls":[{…}]}: a delta of a chat stream. */
void km_parse_json_delta(km_buf *out, const km_parser_event *event);

/* {"error":{"message":…,"line":N}} */
void km_parse_json_error(km_buf *out, const char *message, size_t line);

#endif
