/*
 * Two passes over each function's schema, as in the reference, because what the first collects
 * decides what the second prints: `check` walks it in the reference's order, collects $defs as it
 * meets them, resolves each $ref among those met so far and refuses what the reference raises on;
 * `print_type` and its kin then write. Order matters: a $ref to a definition that comes later is an
 * error there, so it is one here.
 *
 * Where the reference's Python would accept nonsense by accident (a string for `required`, an
 * object for `enum`), this refuses, which makes the tools JSON in the prompt.
 */
#include "text/tools_ts.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "text/pyjson.h"

#define INDENT 2

struct registry {
	json_t *definitions; /* owned: name -> schema, in the order they were first met */
	bool self_ref;
};

static void put_indent(km_buf *out, int indent)
{
	km_buf_printf(out, "%*s", indent, "");
}

static bool is_named(const json_t *value, const char *name)
{
	return json_is_string(value) && !strcmp(json_string_value(value), name);
}

/* Python's truth of a value. */
static bool truthy(const json_t *value)
{
	switch (value ? json_typeof(value) : JSON_NULL) {
	case JSON_OBJECT:
		return json_object_size(value) > 0;
	case JSON_ARRAY:
		return json_array_size(value) > 0;
	case JSON_STRING:
		return json_string_length(value) > 0;
	case JSON_INTEGER:
	case JSON_REAL:
		return json_number_value(value) != 0;
	case JSON_TRUE:
		return true;
	default:
		return false;
	}
}

/* First pass */

static bool check_type(struct registry *reg, const json_t *schema);

static bool check_properties(struct registry *reg, const json_t *schema)
{
	const json_t *properties = json_object_get(schema, "properties");
	const json_t *required = json_object_get(schema, "required");
	const char **keys;
	bool good = true;

	if (!properties)
		return true;
	if (!json_is_object(properties) || (required && !json_is_array(required)))
		return false;
	for (size_t i = 0; i < json_array_size(required); i++)
		if (json_is_object(json_array_get(required, i)) ||
		    json_is_array(json_array_get(required, i)))
			return false;
	keys = km_pyjson_sorted_keys(properties);
	for (size_t i = 0; good && keys[i]; i++)
		good = check_type(reg, json_object_get(properties, keys[i]));
	free(keys);
	return good;
}

static bool register_definitions(struct registry *reg, const json_t *defs)
{
	const char **keys;

	if (!truthy(defs))
		return true;
	if (!json_is_object(defs))
		return false;
	keys = km_pyjson_sorted_keys(defs);
	for (size_t i = 0; keys[i]; i++)
		json_object_set(reg->definitions, keys[i], json_object_get(defs, keys[i]));
	free(keys);
	return true;
}

static bool check_object(struct registry *reg, const json_t *schema)
{
	const json_t *additional = json_object_get(schema, "additionalProperties");

	if (!register_definitions(reg, json_object_get(schema, "$defs")))
		return false;
	if (json_is_object(additional) && !check_type(reg, additional))
		return false;
	return check_properties(reg, schema);
}

static const char *ref_name(const json_t *ref)
{
	const char *name = strrchr(json_string_value(ref), '/');

	return name ? name + 1 : json_string_value(ref);
}

static bool check_ref(struct registry *reg, const json_t *ref)
{
	if (!json_is_string(ref))
		return false;
	if (is_named(ref, "#")) {
		reg->self_ref = true;
		return true;
	}
	return !strncmp(json_string_value(ref), "#/$defs/", 8) &&
	       json_is_object(json_object_get(reg->definitions, ref_name(ref)));
}

static bool enum_value_fits(const json_t *value, const json_t *type)
{
	if (json_is_null(value))
		return true;
	if (is_named(type, "string"))
		return json_is_string(value);
	if (is_named(type, "number"))
		return json_is_number(value) ||
		       json_is_boolean(value); /* Python's bool is an int */
	if (is_named(type, "integer"))
		return json_is_integer(value) || json_is_boolean(value);
	if (is_named(type, "boolean"))
		return json_is_boolean(value);
	return true;
}

static bool check_enum(const json_t *schema)
{
	const json_t *values = json_object_get(schema, "enum"),
		     *type = json_object_get(schema, "type");

	if (!json_is_array(values))
		return false;
	if (json_is_array(type)) {
		const json_t *first = json_array_get(type, 0), *second = json_array_get(type, 1);

		if (!first || json_array_size(type) > 2)
			return false;
		if (second && !is_named(first, "null") && !is_named(second, "null"))
			return false;
		type = second && is_named(first, "null") ? second : first;
	}
	for (size_t i = 0; type && i < json_array_size(values); i++)
		if (!enum_value_fits(json_array_get(values, i), type))
			return false;
	return true;
}

static const char *union_member(const json_t *type)
{
	static const char *const map[][2] = {
		{ "string", "string" },    { "number", "number" }, { "integer", "number" },
		{ "boolean", "boolean" },  { "null", "null" },     { "object", "{}" },
		{ "array", "Array<any>" },
	};

	for (size_t i = 0; i < sizeof(map) / sizeof(map[0]); i++)
		if (is_named(type, map[i][0]))
			return map[i][1];
	return NULL;
}

static bool check_named_type(struct registry *reg, const json_t *schema, const json_t *type)
{
	const json_t *items = json_object_get(schema, "items");

	if (json_is_array(type)) {
		for (size_t i = 0; i < json_array_size(type); i++)
			if (!union_member(json_array_get(type, i)))
				return false;
		return true;
	}
	if (is_named(type, "object"))
		return check_object(reg, schema);
	if (is_named(type, "array"))
		return !truthy(items) || check_type(reg, items);
	return json_is_string(type);
}

static bool check_type(struct registry *reg, const json_t *schema)
{
	const json_t *any_of = json_object_get(schema, "anyOf"), *type;

	if (json_is_boolean(schema))
		return true;
	if (!json_is_object(schema))
		return false;
	if (json_object_get(schema, "$ref"))
		return check_ref(reg, json_object_get(schema, "$ref"));
	if (any_of) {
		for (size_t i = 0; i < json_array_size(any_of); i++)
			if (!check_type(reg, json_array_get(any_of, i)))
				return false;
		return json_is_array(any_of);
	}
	if (json_object_get(schema, "enum"))
		return check_enum(schema);
	type = json_object_get(schema, "type");
	return type ? check_named_type(reg, schema, type) : json_object_size(schema) == 0;
}

/* Second pass. Everything has been checked but descriptions and additionalProperties, which the
 * reference looks at only where it prints them. */

static bool print_type(km_buf *out, const json_t *schema, int indent);

static bool print_description(km_buf *out, const json_t *text, int indent)
{
	const char *s, *end, *newline;

	if (!truthy(text))
		return true;
	if (!json_is_string(text))
		return false;
	s = json_string_value(text);
	end = s + json_string_length(text);
	do {
		newline = memchr(s, '\n', (size_t)(end - s));
		if (s < end && newline != s) {
			put_indent(out, indent);
			km_buf_puts(out, "// ");
			km_buf_append(out, s, (size_t)((newline ? newline : end) - s));
		}
		km_buf_putc(out, '\n');
		s = newline ? newline + 1 : end;
	} while (newline);
	return true;
}

static const char *const *constraints_of(const json_t *schema)
{
	static const char *const of_string[] = { "maxLength", "minLength", "pattern", NULL };
	static const char *const of_number[] = { "maximum", "minimum", NULL };
	static const char *const of_array[] = { "maxItems", "minItems", NULL };
	const json_t *type = json_object_get(schema, "type");

	if (json_object_get(schema, "$ref") || json_object_get(schema, "anyOf") ||
	    json_object_get(schema, "enum"))
		return NULL;
	if (is_named(type, "string"))
		return of_string;
	if (is_named(type, "number") || is_named(type, "integer"))
		return of_number;
	return is_named(type, "array") ? of_array : NULL;
}

static bool print_docs(km_buf *out, const json_t *schema, int indent)
{
	const char *const *names = constraints_of(schema);
	bool first = true;

	if (!print_description(out, json_object_get(schema, "description"), indent))
		return false;
	for (; names && *names; names++) {
		const json_t *value = json_object_get(schema, *names);

		if (!value)
			continue;
		if (first)
			put_indent(out, indent);
		km_buf_printf(out, "%s%s: ", first ? "// " : ", ", *names);
		km_pystr_append(out, value);
		first = false;
	}
	if (!first)
		km_buf_putc(out, '\n');
	return true;
}

static bool print_property(km_buf *out, const char *name, const json_t *schema, bool required,
                           int indent)
{
	static const km_pyjson_style sorted = { false, true };
	const json_t *value = json_object_get(schema, "default");

	if (!print_docs(out, schema, indent))
		return false;
	if (value && !json_is_null(value)) {
		put_indent(out, indent);
		km_buf_puts(out, "// Default: ");
		if (json_is_boolean(value))
			km_pystr_append(out, value);
		else
			km_pyjson_append(out, value, sorted);
		km_buf_putc(out, '\n');
	}
	put_indent(out, indent);
	km_buf_printf(out, "%s%s: ", name, required ? "" : "?");
	return print_type(out, schema, indent);
}

/* Owned: a set, because a search of the list for each property is quadratic: 30000 of both took
 * 10 s. */
static json_t *required_names(const json_t *schema)
{
	const json_t *required = json_object_get(schema, "required");
	json_t *names = json_object();

	for (size_t i = 0; i < json_array_size(required); i++) {
		const char *name = json_string_value(json_array_get(required, i));

		if (name)
			json_object_set_new(names, name, json_true());
	}
	return names;
}

enum which { OPTIONAL, REQUIRED, ALL };

/* Properties in order of name, each behind what `*comma` says. */
static bool print_properties(km_buf *out, const json_t *schema, const json_t *required,
			     enum which which, const char **comma, int indent)
{
	const json_t *properties = json_object_get(schema, "properties");
	const char **keys = km_pyjson_sorted_keys(properties);
	bool good = true;

	for (size_t i = 0; good && keys[i]; i++) {
		bool is_required = json_object_get(required, keys[i]);

		if (which != ALL && is_required != (which == REQUIRED))
			continue;
		km_buf_puts(out, *comma);
		good = print_property(out, keys[i], json_object_get(properties, keys[i]),
				      is_required, indent);
		*comma = ",\n";
	}
	free(keys);
	return good;
}

static bool print_required_first(km_buf *out, const json_t *schema, const char **comma, int indent)
{
	json_t *required = required_names(schema);
	bool good = print_properties(out, schema, required, REQUIRED, comma, indent) &&
		    print_properties(out, schema, required, OPTIONAL, comma, indent);

	json_decref(required);
	return good;
}

static bool print_object(km_buf *out, const json_t *schema, int indent)
{
	const json_t *additional = json_object_get(schema, "additionalProperties");
	const char *comma = "{\n";

	if (!print_required_first(out, schema, &comma, indent + INDENT))
		return false;
	if (additional && !json_is_null(additional)) {
		km_buf_puts(out, comma);
		put_indent(out, indent + INDENT);
		km_buf_puts(out, "[k: string]: ");
		comma = ",\n";
		if (json_is_boolean(additional))
			km_buf_puts(out, json_is_true(additional) ? "any" : "never");
		else if (!json_is_object(additional) ||
			 !print_type(out, additional, indent + INDENT))
			return false;
	}
	if (comma[0] == '{') {
		km_buf_puts(out, "{}");
		return true;
	}
	km_buf_putc(out, '\n');
	put_indent(out, indent);
	km_buf_putc(out, '}');
	return true;
}

static bool print_array(km_buf *out, const json_t *schema, int indent)
{
	const json_t *items = json_object_get(schema, "items");
	size_t before;

	if (!truthy(items)) {
		km_buf_puts(out, "Array<any>");
		return true;
	}
	km_buf_puts(out, "Array<\n");
	before = out->len;
	if (!print_docs(out, items, indent + INDENT))
		return false;
	if (out->len == before) {
		out->len--; /* no docs: the item stays on this line */
		out->data[out->len] = '\0';
		if (!print_type(out, items, indent))
			return false;
	} else {
		put_indent(out, indent + INDENT);
		if (!print_type(out, items, indent + INDENT))
			return false;
		km_buf_putc(out, '\n');
		put_indent(out, indent);
	}
	km_buf_putc(out, '>');
	return true;
}

static bool print_choices(km_buf *out, const json_t *any_of, int indent)
{
	for (size_t i = 0; i < json_array_size(any_of); i++) {
		if (i)
			km_buf_puts(out, " | ");
		if (!print_type(out, json_array_get(any_of, i), indent))
			return false;
	}
	return true;
}

static void print_values(km_buf *out, const json_t *values)
{
	for (size_t i = 0; i < json_array_size(values); i++) {
		const json_t *value = json_array_get(values, i);
		const char *quote = json_is_string(value) ? "\"" : "";

		if (i)
			km_buf_puts(out, " | ");
		km_buf_puts(out, quote);
		km_pystr_append(out, value);
		km_buf_puts(out, quote);
	}
}

static bool print_named_type(km_buf *out, const json_t *schema, const json_t *type, int indent)
{
	if (json_is_array(type)) {
		for (size_t i = 0; i < json_array_size(type); i++)
			km_buf_printf(out, "%s%s", i ? " | " : "",
				      union_member(json_array_get(type, i)));
		return true;
	}
	if (is_named(type, "object"))
		return print_object(out, schema, indent);
	if (is_named(type, "array"))
		return print_array(out, schema, indent);
	if (is_named(type, "integer"))
		km_buf_puts(out, "number");
	else
		km_pystr_append(out, type);
	return true;
}

static bool print_type(km_buf *out, const json_t *schema, int indent)
{
	const json_t *ref = json_object_get(schema, "$ref"),
		     *type = json_object_get(schema, "type");

	if (json_is_boolean(schema))
		km_buf_puts(out, json_is_true(schema) ? "any" : "null");
	else if (ref)
		km_buf_puts(out, is_named(ref, "#") ? "parameters" : ref_name(ref));
	else if (json_object_get(schema, "anyOf"))
		return print_choices(out, json_object_get(schema, "anyOf"), indent);
	else if (json_object_get(schema, "enum"))
		print_values(out, json_object_get(schema, "enum"));
	else if (type)
		return print_named_type(out, schema, type, indent);
	else
		km_buf_puts(out, "any");
	return true;
}

/* Functions */

/* The root's properties as an interface that the schema can name: in plain order of name. */
static bool print_root_interface(km_buf *out, const json_t *parameters)
{
	const char *comma = "\n";
	json_t *required = required_names(parameters);
	bool good;

	km_buf_puts(out, "interface parameters {");
	good = print_properties(out, parameters, required, ALL, &comma, INDENT);
	json_decref(required);
	if (!good)
		return false;
	km_buf_puts(out, comma[0] == ',' ? "\n}\n" : "}\n");
	return true;
}

static bool print_definitions(km_buf *out, struct registry *reg)
{
	json_t *definitions = json_copy(reg->definitions), *schema;
	const char *name;
	bool good = true;

	json_object_foreach(definitions, name, schema) {
		/* It may bring further $defs: they resolve, but are not declared. */
		good = json_is_object(schema) && check_type(reg, schema) &&
		       print_description(out, json_object_get(schema, "description"), 0);
		if (!good)
			break;
		km_buf_printf(out, "interface %s ", name);
		good = print_type(out, schema, 0);
		if (!good)
			break;
		km_buf_putc(out, '\n');
	}
	json_decref(definitions);
	return good;
}

static bool print_signature(km_buf *out, const json_t *function, const json_t *parameters,
                            bool self_ref)
{
	const json_t *name = json_object_get(function, "name");

	if (name && !json_is_string(name))
		return false;
	if (!print_description(out, json_object_get(function, "description"), 0))
		return false;
	km_buf_printf(out, "type %s = (_: ", name ? json_string_value(name) : "function");
	if (self_ref)
		km_buf_puts(out, "parameters");
	else if (!print_object(out, parameters, 0))
		return false;
	km_buf_puts(out, ") => any;\n");
	return true;
}

static bool print_function(km_buf *out, const json_t *function)
{
	json_t *none = json_object();
	const json_t *parameters = json_object_get(function, "parameters");
	struct registry reg = { .definitions = json_object() };
	bool self_ref, good;

	if (!truthy(parameters))
		parameters = none;
	good = json_is_object(function) && json_is_object(parameters) &&
	       check_object(&reg, parameters);
	self_ref = reg.self_ref;
	good = good && (!self_ref || print_root_interface(out, parameters)) &&
	       print_definitions(out, &reg) && print_signature(out, function, parameters, self_ref);
	json_decref(reg.definitions);
	json_decref(none);
	return good;
}

bool km_tools_ts_append(km_buf *out, const json_t *tools)
{
	size_t start = out->len;
	bool any = false, good = true;

	km_buf_puts(out, "# Tools\n\n## functions\nnamespace functions {\n");
	for (size_t i = 0; good && i < json_array_size(tools); i++) {
		const json_t *tool = json_array_get(tools, i),
			     *function = json_object_get(tool, "function");

		if (!json_is_object(tool))
			good = false;
		else if (is_named(json_object_get(tool, "type"), "function") && truthy(function))
			good = any = print_function(out, function);
	}
	if (good && any) {
		km_buf_puts(out, "}\n");
		return true;
	}
	out->len = start;
	if (out->data)
		out->data[start] = '\0';
	return false;
}
