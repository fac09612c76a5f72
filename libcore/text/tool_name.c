#include "text/tool_name.h"

#include <string.h>

#include "text/schema.h"

static bool is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* Letters, digits, '_', '.', '-', and every byte of a character beyond ASCII. */
static bool is_name_byte(char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || is_digit(c) || c == '_' ||
	       c == '.' || c == '-' || (unsigned char)c >= 0x80;
}

/* [functions.]NAME:N, where only the prefix is not the name's: names may hold dots themselves. */
static bool parse_id(const char *s, size_t len, const char **name, size_t *name_len, bool *prefixed)
{
	static const char prefix[] = "functions.";
	size_t end = len, digits = 0, start = 0;

	while (end && is_digit(s[end - 1])) {
		end--;
		digits++;
	}
	if (!digits || !end || s[end - 1] != ':')
		return false;
	end--;
	/* "functions.:0" leaves no name after the prefix: the name is all of it then. */
	*prefixed = end > sizeof(prefix) - 1 && !memcmp(s, prefix, sizeof(prefix) - 1);
	if (*prefixed)
		start = sizeof(prefix) - 1;
	for (size_t i = start; i < end; i++) {
		if (!is_name_byte(s[i]))
			return false;
	}
	*name = s + start;
	*name_len = end - start;
	return end > start;
}

/* OpenAI's {"type":"function","function":{"name","parameters"}}, or the inner object alone. */
static const json_t *function_of(const json_t *tool)
{
	const json_t *function = json_object_get(tool, "function");

	return json_is_object(function) ? function : tool;
}

static const char *name_of(const json_t *tool)
{
	return json_string_value(json_object_get(function_of(tool), "name"));
}

enum km_tool_name_kind km_tool_name(const char *header, size_t len, const json_t *tools,
                                    const char **name, size_t *name_len, bool *prefixed)
{
	const char *only;

	if (parse_id(header, len, name, name_len, prefixed))
		return KM_TOOL_NAMED;
	*prefixed = false;
	if (json_array_size(tools) > 1)
		return KM_TOOL_BY_ARGUMENTS;
	only = name_of(json_array_get(tools, 0));
	if (!only)
		return KM_TOOL_UNKNOWN;
	*name = only;
	*name_len = strlen(only);
	return KM_TOOL_ONLY;
}

const char *km_tool_infer(const json_t *tools, const char *arguments, size_t len)
{
	json_t *value = json_loadb(arguments, len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
	const char *found = NULL;
	const json_t *tool;
	size_t i;

	if (!json_is_object(value)) {
		json_decref(value);
		return NULL;
	}
	json_array_foreach((json_t *)tools, i, tool) {
		int rc = km_schema_accepts_arguments(
			json_object_get(function_of(tool), "parameters"), value);

		/* A schema that cannot be evaluated cannot be ruled out as a second match. */
		if (rc < 0 || (rc && found)) {
			found = NULL;
			break;
		}
		if (rc)
			found = name_of(tool);
	}
	json_decref(value);
	return found;
}
