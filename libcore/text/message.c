#include "text/message.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/utf8.h"

void km_message_init(km_message *m)
{
	memset(m, 0, sizeof(*m));
}

void km_message_release(km_message *m)
{
	for (int i = 0; i < m->cap; i++) {
		km_buf_release(&m->calls[i].id);
		km_buf_release(&m->calls[i].name);
		km_buf_release(&m->calls[i].arguments);
	}
	free(m->calls);
	km_buf_release(&m->content);
	km_buf_release(&m->reasoning);
	km_message_init(m);
}

void km_message_clear(km_message *m)
{
	for (int i = 0; i < m->count; i++) {
		km_buf_clear(&m->calls[i].id);
		km_buf_clear(&m->calls[i].name);
		km_buf_clear(&m->calls[i].arguments);
	}
	m->count = 0;
	km_buf_clear(&m->content);
	km_buf_clear(&m->reasoning);
}

/* Calls come in order of their index, but for those that km_parser_take_call gave to others. */
static km_message_call *call_at(km_message *m, int index)
{
	if (index >= m->cap) {
		int cap = index + 1 > 2 * m->cap ? index + 1 : 2 * m->cap;

		m->calls = km_xreallocarray(m->calls, (size_t)cap, sizeof(*m->calls));
		memset(m->calls + m->cap, 0, (size_t)(cap - m->cap) * sizeof(*m->calls));
		m->cap = cap;
	}
	if (index >= m->count)
		m->count = index + 1;
	return &m->calls[index];
}

void km_message_add(void *message, const km_parser_event *event)
{
	km_message *m = message;
	km_message_call *call;

	switch (event->kind) {
	case KM_PARSED_REASONING:
		km_utf8_append_valid(&m->reasoning, event->text, event->len);
		return;
	case KM_PARSED_CONTENT:
		km_utf8_append_valid(&m->content, event->text, event->len);
		return;
	case KM_PARSED_CALL:
		call = call_at(m, event->call_index);
		km_buf_puts(&call->id, event->id);
		km_buf_puts(&call->name, event->name);
		km_utf8_append_valid(&call->arguments, event->text, event->len);
		return;
	case KM_PARSED_ARGUMENTS:
		km_utf8_append_valid(&call_at(m, event->call_index)->arguments, event->text,
		                     event->len);
		return;
	}
}

const char *km_finish_reason(int calls, const char *engine_finish)
{
	return calls && !strcmp(engine_finish, "stop") ? "tool_calls" : engine_finish;
}
