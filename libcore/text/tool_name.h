/*
 * A call's name from its header, or from the declared tools and the arguments when the header has
 * none.
 *
 * Source: the id contract of Moonshot's tool_call_guidance.md ("functions.NAME:N"); the inference
 * is SGLang's rule: a single declared tool, or the one tool whose schema accepts the arguments.
 */
#ifndef KM_TEXT_TOOL_NAME_H
#define KM_TEXT_TOOL_NAME_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

enum km_tool_name_kind {
	KM_TOOL_NAMED,    /* the header carries it */
	KM_TOOL_ONLY,     /* it does not, and one tool is declared */
	KM_TOOL_BY_ARGUMENTS, /* it does not, and several are: km_tool_infer decides */
	KM_TOOL_UNKNOWN,  /* it does not, and none is */
};

/* `header` without white space around it. Fills name (borrowed from the header or from `tools`) for
 * the first two. `prefixed`: the header says "functions.". */
enum km_tool_name_kind km_tool_name(const char *header, size_t len, const json_t *tools,
                                    const char **name, size_t *name_len, bool *prefixed);

/* The one tool whose parameters accept the arguments (a JSON object), or NULL. */
const char *km_tool_infer(const json_t *tools, const char *arguments, size_t len);

#endif
