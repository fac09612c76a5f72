#include "wire/parse_json.h"

#include <string.h>

#include "wire/json_fast.h"

static void write_buf(km_buf *out, const char *key, const km_buf *value)
{
	km_buf_puts(out, key);
	km_json_fast_write(out, value->data, value->len);
}

void km_parse_json_message(km_buf *out, const km_message *m, const char *finish_reason)
{
	write_buf(out, "{\"content\":", &m->content);
	if (m->reasoning.len)
		write_buf(out, ",\"reasoning_content\":", &m->reasoning);
	else
		km_buf_puts(out, ",\"reasoning_content\":null");
	km_buf_puts(out, ",\"tool_calls\":[");
	for (int i = 0; i < m->count; i++) {
		const km_message_call *call = &m->calls[i];

		km_buf_puts(out, i ? ",{" : "{");
		write_buf(out, "\"id\":", &call->id);
		write_buf(out, ",\"type\":\"function\",\"function\":{\"name\":", &call->name);
		write_buf(out, ",\"arguments\":", &call->arguments);
		km_buf_puts(out, "}}");
	}
	km_buf_puts(out, "],\"finish_reason\":");
	km_json_fast_write(out, finish_reason, strlen(finish_reason));
	km_buf_putc(out, '}');
}

void km_parse_json_delta(km_buf *out, const km_parser_event *e)
{
	switch (e->kind) {
	case KM_PARSED_CONTENT:
		km_buf_puts(out, "{\"content\":");
		break;
	case KM_PARSED_REASONING:
		km_buf_puts(out, "{\"reasoning_content\":");
		break;
	case KM_PARSED_CALL:
		km_buf_printf(out, "{\"tool_calls\":[{\"index\":%d,\"id\":", e->call_index);
		km_json_fast_write(out, e->id, strlen(e->id));
		km_buf_puts(out, ",\"type\":\"function\",\"function\":{\"name\":");
		km_json_fast_write(out, e->name, strlen(e->name));
		km_buf_puts(out, ",\"arguments\":");
		break;
	case KM_PARSED_ARGUMENTS:
		km_buf_printf(out, "{\"tool_calls\":[{\"index\":%d,\"function\":{\"arguments\":",
		              e->call_index);
		break;
	}
	km_json_fast_write(out, e->text, e->len);
	km_buf_puts(out, e->kind >= KM_PARSED_CALL ? "}}]}" : "}");
}

void km_parse_json_error(km_buf *out, const char *message, size_t line)
{
	km_buf_puts(out, "{\"error\":{\"message\":");
	km_json_fast_write(out, message, strlen(message));
	km_buf_printf(out, ",\"line\":%zu}}", line);
}
