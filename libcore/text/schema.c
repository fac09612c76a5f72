/*
 * A direct interpreter: each keyword is a function from (schema, value) to valid, not valid or an
 * error, and a table lists them in the order in which they must run (the unevaluated ones last).
 *
 * What a schema has looked at (properties, items) is collected in a `struct seen` on its own level
 * and handed up only when it holds, which is all that `unevaluatedProperties` asks. Evaluation is
 * lazy: a part that is never reached is never judged. Work is bounded by a depth and by a number of
 * steps.
 *
 * One file, though a long one: the keywords call the evaluator and the evaluator the keywords.
 */
#include "text/schema.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/mem.h"

enum {
	MAX_DEPTH = 200,
	MAX_STEPS = 500000,    /* schemas entered: a fraction of a second of work */
	MATCH_LIMIT = 1000000, /* of PCRE2: a pattern that backtracks past it is not evaluated */
};

struct scope { /* the schema resources entered, innermost first */
	const json_t *resource;
	const struct scope *outer;
};

struct context {
	const json_t *root;
	bool aliases; /* read mistaken type names as what they mean */
	int depth, steps;
	km_err *err;
};

/* What has been evaluated of one object or array. */
struct seen {
	bool all;        /* every property, or every item */
	json_t *names;   /* set of properties */
	bool *items;     /* [count] */
	size_t count;
};

struct eval {
	struct context *ctx;
	const struct scope *scope;
	const json_t *schema, *value;
	struct seen *seen;
};

static int evaluate(struct context *ctx, const struct scope *scope, const json_t *schema,
                    const json_t *value, struct seen *seen);

/* ---- what was seen ---- */

static void seen_release(struct seen *seen)
{
	json_decref(seen->names);
	free(seen->items);
}

static void seen_name(struct seen *seen, const char *name)
{
	if (!seen->names)
		seen->names = json_object();
	json_object_set_new_nocheck(seen->names, name, json_true());
}

static void seen_item(struct seen *seen, size_t at, size_t count)
{
	if (!seen->items) {
		seen->items = km_xcalloc(count, sizeof(*seen->items));
		seen->count = count;
	}
	seen->items[at] = true;
}

static void seen_merge(struct seen *to, const struct seen *from)
{
	const char *name;
	json_t *unused;

	to->all |= from->all;
	json_object_foreach(from->names, name, unused)
		seen_name(to, name);
	for (size_t i = 0; i < from->count; i++) {
		if (from->items[i])
			seen_item(to, i, from->count);
	}
}

/* ---- values ---- */

static double number_of(const json_t *v)
{
	return json_is_integer(v) ? (double)json_integer_value(v) : json_real_value(v);
}

/* -1, 0, 1. Two integers are compared exactly. */
static int compare_numbers(const json_t *a, const json_t *b)
{
	double x, y;

	if (json_is_integer(a) && json_is_integer(b)) {
		json_int_t i = json_integer_value(a), j = json_integer_value(b);

		return (i > j) - (i < j);
	}
	x = number_of(a);
	y = number_of(b);
	return (x > y) - (x < y);
}

static bool equal(const json_t *a, const json_t *b)
{
	const char *name;
	const json_t *item;
	size_t i;

	if (json_is_number(a) && json_is_number(b))
		return compare_numbers(a, b) == 0;
	if (json_typeof(a) != json_typeof(b))
		return false;
	if (json_is_array(a)) {
		if (json_array_size(a) != json_array_size(b))
			return false;
		json_array_foreach((json_t *)a, i, item) {
			if (!equal(item, json_array_get(b, i)))
				return false;
		}
		return true;
	}
	if (!json_is_object(a))
		return json_equal(a, b);
	if (json_object_size(a) != json_object_size(b))
		return false;
	json_object_foreach((json_t *)a, name, item) {
		const json_t *other = json_object_get(b, name);

		if (!other || !equal(item, other))
			return false;
	}
	return true;
}

static size_t code_points(const json_t *string)
{
	const char *s = json_string_value(string);
	size_t n = json_string_length(string), count = 0;

	for (size_t i = 0; i < n; i++)
		count += ((unsigned char)s[i] & 0xc0) != 0x80;
	return count;
}

static int wrong_keyword(const struct eval *e, const char *keyword, const char *expected)
{
	return km_fail(e->ctx->err, KM_EINVAL, "schema: \"%s\" must be %s", keyword, expected);
}

/* ---- types ---- */

static const char *const standard_types[] = {
	"null", "boolean", "object", "array", "number", "string", "integer",
};

/* What exporters of database and programming-language types write; after it, what it means. */
static const char *const type_aliases[][2] = {
	{ "str", "string" },      { "text", "string" },     { "varchar", "string" },
	{ "char", "string" },     { "nvarchar", "string" }, { "longtext", "string" },
	{ "enum", "string" },     { "uuid", "string" },     { "date", "string" },
	{ "time", "string" },     { "datetime", "string" }, { "timestamp", "string" },
	{ "int", "integer" },     { "int32", "integer" },   { "int64", "integer" },
	{ "long", "integer" },    { "bigint", "integer" },  { "smallint", "integer" },
	{ "tinyint", "integer" }, { "float", "number" },    { "double", "number" },
	{ "decimal", "number" },  { "numeric", "number" },  { "real", "number" },
	{ "bool", "boolean" },    { "list", "array" },      { "tuple", "array" },
	{ "dict", "object" },     { "map", "object" },      { "none", "null" },
	{ "nil", "null" },
};

/* The standard name, or NULL. "VARCHAR(255)" is "varchar". */
static const char *standard_type(const char *type, bool aliases)
{
	char base[16];
	size_t n = strcspn(type, "(");

	for (size_t i = 0; i < sizeof(standard_types) / sizeof(*standard_types); i++) {
		if (!strcmp(type, standard_types[i]))
			return standard_types[i];
	}
	if (!aliases || n >= sizeof(base))
		return NULL;
	for (size_t i = 0; i <= n; i++)
		base[i] =
			i == n ? '\0'
			       : (char)(type[i] >= 'A' && type[i] <= 'Z' ? type[i] + 32 : type[i]);
	for (size_t i = 0; i < sizeof(type_aliases) / sizeof(*type_aliases); i++) {
		if (!strcmp(base, type_aliases[i][0]))
			return type_aliases[i][1];
	}
	return strcmp(base, type) ? standard_type(base, false) : NULL;
}

static bool has_type(const json_t *value, const char *type)
{
	switch (json_typeof(value)) {
	case JSON_NULL:
		return !strcmp(type, "null");
	case JSON_TRUE:
	case JSON_FALSE:
		return !strcmp(type, "boolean");
	case JSON_OBJECT:
		return !strcmp(type, "object");
	case JSON_ARRAY:
		return !strcmp(type, "array");
	case JSON_STRING:
		return !strcmp(type, "string");
	case JSON_INTEGER:
		return !strcmp(type, "integer") || !strcmp(type, "number");
	case JSON_REAL:
		return !strcmp(type, "number") ||
		       (!strcmp(type, "integer") && isfinite(number_of(value)) &&
		        floor(number_of(value)) == number_of(value));
	}
	return false;
}

static int check_one_type(struct eval *e, const json_t *name)
{
	const char *type;

	if (!json_is_string(name))
		return wrong_keyword(e, "type", "a type's name or an array of them");
	type = standard_type(json_string_value(name), e->ctx->aliases);
	if (!type)
		return km_fail(e->ctx->err, KM_EUNSUPPORTED, "schema: there is no type \"%s\"",
		               json_string_value(name));
	return has_type(e->value, type);
}

static int check_type(struct eval *e, const json_t *type)
{
	const json_t *name;
	size_t i;
	int valid = 0;

	if (!json_is_array(type))
		return check_one_type(e, type);
	json_array_foreach((json_t *)type, i, name) {
		int rc = check_one_type(e, name);

		KM_TRY(rc);
		valid |= rc;
	}
	return valid;
}

static int check_enum(struct eval *e, const json_t *choices)
{
	const json_t *choice;
	size_t i;

	if (!json_is_array(choices))
		return wrong_keyword(e, "enum", "an array");
	json_array_foreach((json_t *)choices, i, choice) {
		if (equal(choice, e->value))
			return 1;
	}
	return 0;
}

static int check_const(struct eval *e, const json_t *expected)
{
	return equal(expected, e->value);
}

/* ---- numbers ---- */

static int check_multiple_of(struct eval *e, const json_t *of)
{
	double quotient;

	if (!json_is_number(of) || number_of(of) <= 0)
		return wrong_keyword(e, "multipleOf", "a number above 0");
	if (!json_is_number(e->value))
		return 1;
	if (json_is_integer(of) && json_is_integer(e->value))
		return json_integer_value(e->value) % json_integer_value(of) == 0;
	quotient = number_of(e->value) / number_of(of);
	return isfinite(quotient) && floor(quotient) == quotient;
}

/* `side` 1: the value is at least the bound, -1: at most; `strict`: and not the bound itself. */
static int check_bound(struct eval *e, const json_t *bound, const char *keyword, int side,
                       bool strict)
{
	int order;

	if (!json_is_number(bound))
		return wrong_keyword(e, keyword, "a number");
	if (!json_is_number(e->value))
		return 1;
	order = compare_numbers(e->value, bound) * side;
	return strict ? order > 0 : order >= 0;
}

static int check_minimum(struct eval *e, const json_t *v)
{
	return check_bound(e, v, "minimum", 1, false);
}

static int check_maximum(struct eval *e, const json_t *v)
{
	return check_bound(e, v, "maximum", -1, false);
}

static int check_exclusive_minimum(struct eval *e, const json_t *v)
{
	return check_bound(e, v, "exclusiveMinimum", 1, true);
}

static int check_exclusive_maximum(struct eval *e, const json_t *v)
{
	return check_bound(e, v, "exclusiveMaximum", -1, true);
}

/* ---- sizes ---- */

static int check_size(struct eval *e, const json_t *limit, const char *keyword, size_t size)
{
	bool is_min = !strncmp(keyword, "min", 3);

	if (!json_is_number(limit) || !has_type(limit, "integer") || number_of(limit) < 0)
		return wrong_keyword(e, keyword, "a whole number from 0");
	return is_min ? (double)size >= number_of(limit) : (double)size <= number_of(limit);
}

static int check_min_length(struct eval *e, const json_t *v)
{
	return check_size(e, v, "minLength",
	                  json_is_string(e->value) ? code_points(e->value) : SIZE_MAX);
}

static int check_max_length(struct eval *e, const json_t *v)
{
	return check_size(e, v, "maxLength", json_is_string(e->value) ? code_points(e->value) : 0);
}

static int check_min_items(struct eval *e, const json_t *v)
{
	return check_size(e, v, "minItems",
	                  json_is_array(e->value) ? json_array_size(e->value) : SIZE_MAX);
}

static int check_max_items(struct eval *e, const json_t *v)
{
	return check_size(e, v, "maxItems", json_array_size(e->value)); /* 0 for what is no array */
}

static int check_min_properties(struct eval *e, const json_t *v)
{
	return check_size(e, v, "minProperties",
	                  json_is_object(e->value) ? json_object_size(e->value) : SIZE_MAX);
}

static int check_max_properties(struct eval *e, const json_t *v)
{
	return check_size(e, v, "maxProperties", json_object_size(e->value));
}

static int check_unique(struct eval *e, const json_t *unique)
{
	size_t n = json_array_size(e->value);

	if (!json_is_boolean(unique))
		return wrong_keyword(e, "uniqueItems", "true or false");
	if (json_is_false(unique))
		return 1;
	for (size_t i = 0; i < n; i++) {
		for (size_t j = 0; j < i; j++) {
			if (++e->ctx->steps > MAX_STEPS)
				return km_fail(e->ctx->err, KM_ELIMIT,
				               "schema: evaluation takes too long");
			if (equal(json_array_get(e->value, i), json_array_get(e->value, j)))
				return 0;
		}
	}
	return 1;
}

/* ---- patterns ---- */

static int match_pattern(struct context *ctx, const char *pattern, size_t pattern_len,
                         const char *s, size_t len)
{
	pcre2_compile_context *cc = pcre2_compile_context_create(NULL);
	pcre2_code *code = NULL;
	pcre2_match_data *data = NULL;
	pcre2_match_context *mc = NULL;
	PCRE2_SIZE at;
	int number, rc = KM_EUNSUPPORTED;

	pcre2_set_compile_extra_options(cc, PCRE2_EXTRA_ALT_BSUX);
	code = pcre2_compile((PCRE2_SPTR)pattern, pattern_len, PCRE2_UTF | PCRE2_DOLLAR_ENDONLY,
	                     &number, &at, cc);
	if (!code) {
		km_fail(ctx->err, rc, "schema: the pattern \"%.*s\" does not compile (at byte %zu)",
		        (int)pattern_len, pattern, at);
	} else {
		data = pcre2_match_data_create(1, NULL);
		mc = pcre2_match_context_create(NULL);
		pcre2_set_match_limit(mc, MATCH_LIMIT);
		pcre2_set_heap_limit(mc, 64 << 10); /* kB */
		number = pcre2_match(code, (PCRE2_SPTR)s, len, 0, 0, data, mc);
		if (number >= 0 || number == PCRE2_ERROR_NOMATCH)
			rc = number >= 0;
		else
			km_fail(ctx->err, rc,
			        "schema: the pattern \"%.*s\" takes too long to match",
			        (int)pattern_len, pattern);
	}
	pcre2_match_context_free(mc);
	pcre2_match_data_free(data);
	pcre2_code_free(code);
	pcre2_compile_context_free(cc);
	return rc;
}

static int check_pattern(struct eval *e, const json_t *pattern)
{
	if (!json_is_string(pattern))
		return wrong_keyword(e, "pattern", "a string");
	if (!json_is_string(e->value))
		return 1;
	return match_pattern(e->ctx, json_string_value(pattern), json_string_length(pattern),
	                     json_string_value(e->value), json_string_length(e->value));
}

/* ---- objects ---- */

static int check_required(struct eval *e, const json_t *names)
{
	const json_t *name;
	size_t i;

	if (!json_is_array(names))
		return wrong_keyword(e, "required", "an array of names");
	json_array_foreach((json_t *)names, i, name) {
		if (!json_is_string(name))
			return wrong_keyword(e, "required", "an array of names");
		if (json_is_object(e->value) && !json_object_get(e->value, json_string_value(name)))
			return 0;
	}
	return 1;
}

static int check_dependent_required(struct eval *e, const json_t *map)
{
	const char *name;
	const json_t *names;

	if (!json_is_object(map))
		return wrong_keyword(e, "dependentRequired", "an object");
	json_object_foreach((json_t *)map, name, names) {
		int rc;

		if (!json_object_get(e->value, name))
			continue;
		rc = check_required(e, names);
		if (rc <= 0)
			return rc;
	}
	return 1;
}

static int check_properties(struct eval *e, const json_t *properties)
{
	const char *name;
	const json_t *value;

	if (!json_is_object(properties))
		return wrong_keyword(e, "properties", "an object of schemas");
	json_object_foreach((json_t *)e->value, name, value) {
		const json_t *schema = json_object_get(properties, name);
		int rc;

		if (!schema)
			continue;
		rc = evaluate(e->ctx, e->scope, schema, value, NULL);
		if (rc <= 0)
			return rc;
		seen_name(e->seen, name);
	}
	return 1;
}

static int check_pattern_properties(struct eval *e, const json_t *patterns)
{
	const char *name, *pattern;
	const json_t *value, *schema;

	if (!json_is_object(patterns))
		return wrong_keyword(e, "patternProperties", "an object of schemas");
	json_object_foreach((json_t *)e->value, name, value) {
		json_object_foreach((json_t *)patterns, pattern, schema) {
			int rc =
				match_pattern(e->ctx, pattern, strlen(pattern), name, strlen(name));

			KM_TRY(rc);
			if (!rc)
				continue;
			rc = evaluate(e->ctx, e->scope, schema, value, NULL);
			if (rc <= 0)
				return rc;
			seen_name(e->seen, name);
		}
	}
	return 1;
}

/* Is the name one that `properties` or `patternProperties` beside this keyword speaks of? */
static int is_declared(struct eval *e, const char *name)
{
	const json_t *patterns = json_object_get(e->schema, "patternProperties"), *unused;
	const char *pattern;

	if (json_object_get(json_object_get(e->schema, "properties"), name))
		return 1;
	json_object_foreach((json_t *)patterns, pattern, unused) {
		int rc = match_pattern(e->ctx, pattern, strlen(pattern), name, strlen(name));

		if (rc)
			return rc;
	}
	return 0;
}

static int check_additional_properties(struct eval *e, const json_t *schema)
{
	const char *name;
	const json_t *value;

	json_object_foreach((json_t *)e->value, name, value) {
		int rc = is_declared(e, name);

		KM_TRY(rc);
		if (rc)
			continue;
		rc = evaluate(e->ctx, e->scope, schema, value, NULL);
		if (rc <= 0)
			return rc;
		seen_name(e->seen, name);
	}
	return 1;
}

static int check_property_names(struct eval *e, const json_t *schema)
{
	const char *name;
	json_t *unused;

	json_object_foreach((json_t *)e->value, name, unused) {
		json_t *string = json_string_nocheck(name);
		int rc = evaluate(e->ctx, e->scope, schema, string, NULL);

		json_decref(string);
		if (rc <= 0)
			return rc;
	}
	return 1;
}

static int check_unevaluated_properties(struct eval *e, const json_t *schema)
{
	const char *name;
	const json_t *value;

	if (!json_is_object(e->value) || e->seen->all)
		return 1;
	json_object_foreach((json_t *)e->value, name, value) {
		int rc;

		if (json_object_get(e->seen->names, name))
			continue;
		rc = evaluate(e->ctx, e->scope, schema, value, NULL);
		if (rc <= 0)
			return rc;
	}
	e->seen->all = true;
	return 1;
}

/* ---- arrays ---- */

static int check_prefix_items(struct eval *e, const json_t *schemas)
{
	size_t n = json_array_size(e->value);

	if (!json_is_array(schemas))
		return wrong_keyword(e, "prefixItems", "an array of schemas");
	for (size_t i = 0; i < n && i < json_array_size(schemas); i++) {
		int rc = evaluate(e->ctx, e->scope, json_array_get(schemas, i),
		                  json_array_get(e->value, i), NULL);

		if (rc <= 0)
			return rc;
		seen_item(e->seen, i, n);
	}
	return 1;
}

static int check_items(struct eval *e, const json_t *schema)
{
	size_t n = json_array_size(e->value);

	for (size_t i = json_array_size(json_object_get(e->schema, "prefixItems")); i < n; i++) {
		int rc = evaluate(e->ctx, e->scope, schema, json_array_get(e->value, i), NULL);

		if (rc <= 0)
			return rc;
		seen_item(e->seen, i, n);
	}
	return 1;
}

static int check_contains(struct eval *e, const json_t *schema)
{
	const json_t *min = json_object_get(e->schema, "minContains");
	const json_t *max = json_object_get(e->schema, "maxContains");
	size_t n = json_array_size(e->value), found = 0;
	int rc;

	if (!json_is_array(e->value))
		return 1;
	for (size_t i = 0; i < n; i++) {
		rc = evaluate(e->ctx, e->scope, schema, json_array_get(e->value, i), NULL);
		KM_TRY(rc);
		if (!rc)
			continue;
		found++;
		seen_item(e->seen, i, n);
	}
	rc = min ? check_size(e, min, "minContains", found) : found > 0;
	if (rc > 0 && max)
		rc = check_size(e, max, "maxContains", found);
	return rc;
}

static int check_unevaluated_items(struct eval *e, const json_t *schema)
{
	size_t n = json_array_size(e->value);

	if (!json_is_array(e->value) || e->seen->all)
		return 1;
	for (size_t i = 0; i < n; i++) {
		int rc;

		if (e->seen->items && e->seen->items[i])
			continue;
		rc = evaluate(e->ctx, e->scope, schema, json_array_get(e->value, i), NULL);
		if (rc <= 0)
			return rc;
	}
	e->seen->all = true;
	return 1;
}

/* ---- references ---- */

/* The subschema of the document that has `key` (an $id or an anchor) with this value. */
static const json_t *find_named(const json_t *in, const char *key, const char *value, int depth)
{
	const json_t *child, *found = NULL;
	const char *name, *here;
	size_t i;

	if (depth > MAX_DEPTH)
		return NULL;
	if (json_is_object(in)) {
		here = json_string_value(json_object_get(in, key));
		if (here && !strcmp(here, value))
			return in;
		json_object_foreach((json_t *)in, name, child) {
			if ((found = find_named(child, key, value, depth + 1)))
				return found;
		}
	}
	json_array_foreach((json_t *)in, i, child) {
		if ((found = find_named(child, key, value, depth + 1)))
			return found;
	}
	return NULL;
}

static int hex(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* One step of a JSON pointer into `token`: %XX (it is a URI's fragment), then ~1 and ~0. */
static size_t pointer_token(const char *s, char *token, size_t cap)
{
	size_t i = 0, n = 0;

	while (s[i] && s[i] != '/') {
		char c = s[i++];

		if (c == '%' && hex(s[i]) >= 0 && hex(s[i + 1]) >= 0) {
			c = (char)(hex(s[i]) << 4 | hex(s[i + 1]));
			i += 2;
		}
		if (c == '~' && (s[i] == '0' || s[i] == '1'))
			c = s[i++] == '0' ? '~' : '/';
		if (n + 1 < cap)
			token[n++] = c;
	}
	token[n] = '\0';
	return i;
}

static const json_t *follow_pointer(const json_t *at, const char *pointer)
{
	char token[512];

	while (at && *pointer == '/') {
		pointer += 1 + pointer_token(pointer + 1, token, sizeof(token));
		if (json_is_array(at)) {
			char *end;
			unsigned long long i = strtoull(token, &end, 10);

			at = *token && !*end ? json_array_get(at, i) : NULL;
		} else {
			at = json_object_get(at, token);
		}
	}
	return at;
}

/* Where a reference leads, and the resource it lies in; NULL: nowhere inside the document. */
static const json_t *resolve(const struct eval *e, const char *ref, const json_t **resource)
{
	const char *fragment = strchr(ref, '#');
	size_t len = fragment ? (size_t)(fragment - ref) : strlen(ref);
	const json_t *found;

	*resource = e->scope->resource;
	if (len) {
		char *id = km_xstrndup(ref, len);

		*resource = find_named(e->ctx->root, "$id", id, 0);
		free(id);
	}
	if (!*resource || !fragment || !fragment[1])
		return *resource;
	if (fragment[1] == '/')
		return follow_pointer(*resource, fragment + 1);
	found = find_named(*resource, "$anchor", fragment + 1, 0);
	return found ? found : find_named(*resource, "$dynamicAnchor", fragment + 1, 0);
}

static int check_reference(struct eval *e, const json_t *ref, bool dynamic)
{
	const json_t *resource, *target;
	const struct scope *scope = e->scope;
	struct scope inner;
	const char *anchor;

	if (!json_is_string(ref))
		return wrong_keyword(e, dynamic ? "$dynamicRef" : "$ref", "a string");
	target = resolve(e, json_string_value(ref), &resource);
	if (!target)
		return km_fail(e->ctx->err, KM_EUNSUPPORTED,
		               "schema: the reference \"%s\" leads nowhere in this document",
		               json_string_value(ref));
	anchor = json_string_value(json_object_get(target, "$dynamicAnchor"));
	/* A dynamic reference takes the outermost resource on the way here that has the anchor. */
	for (; dynamic && anchor && scope; scope = scope->outer) {
		const json_t *outer = find_named(scope->resource, "$dynamicAnchor", anchor, 0);

		if (outer) {
			target = outer;
			resource = scope->resource;
		}
	}
	inner = (struct scope){ resource, e->scope };
	return evaluate(e->ctx, &inner, target, e->value, e->seen);
}

static int check_ref(struct eval *e, const json_t *ref)
{
	return check_reference(e, ref, false);
}

static int check_dynamic_ref(struct eval *e, const json_t *ref)
{
	return check_reference(e, ref, true);
}

/* ---- applicators on the same value ---- */

static int check_all_of(struct eval *e, const json_t *schemas)
{
	const json_t *schema;
	size_t i;

	if (!json_is_array(schemas))
		return wrong_keyword(e, "allOf", "an array of schemas");
	json_array_foreach((json_t *)schemas, i, schema) {
		int rc = evaluate(e->ctx, e->scope, schema, e->value, e->seen);

		if (rc <= 0)
			return rc;
	}
	return 1;
}

static int count_valid(struct eval *e, const json_t *schemas, const char *keyword)
{
	const json_t *schema;
	size_t i;
	int valid = 0;

	if (!json_is_array(schemas))
		return wrong_keyword(e, keyword, "an array of schemas");
	json_array_foreach((json_t *)schemas, i, schema) {
		int rc = evaluate(e->ctx, e->scope, schema, e->value, e->seen);

		KM_TRY(rc);
		valid += rc;
	}
	return valid;
}

static int check_any_of(struct eval *e, const json_t *schemas)
{
	int valid = count_valid(e, schemas, "anyOf");

	return valid > 0 ? 1 : valid;
}

static int check_one_of(struct eval *e, const json_t *schemas)
{
	int valid = count_valid(e, schemas, "oneOf");

	return valid < 0 ? valid : valid == 1;
}

static int check_not(struct eval *e, const json_t *schema)
{
	int rc = evaluate(e->ctx, e->scope, schema, e->value, NULL);

	return rc < 0 ? rc : !rc;
}

static int check_if(struct eval *e, const json_t *condition)
{
	int rc = evaluate(e->ctx, e->scope, condition, e->value, e->seen);
	const json_t *branch;

	KM_TRY(rc);
	branch = json_object_get(e->schema, rc ? "then" : "else");
	return branch ? evaluate(e->ctx, e->scope, branch, e->value, e->seen) : 1;
}

static int check_dependent_schemas(struct eval *e, const json_t *schemas)
{
	const char *name;
	const json_t *schema;

	if (!json_is_object(schemas))
		return wrong_keyword(e, "dependentSchemas", "an object of schemas");
	json_object_foreach((json_t *)schemas, name, schema) {
		int rc;

		if (!json_object_get(e->value, name))
			continue;
		rc = evaluate(e->ctx, e->scope, schema, e->value, e->seen);
		if (rc <= 0)
			return rc;
	}
	return 1;
}

/* ---- the evaluator ---- */

static const struct keyword {
	const char *name;
	int (*check)(struct eval *e, const json_t *argument);
} keywords[] = {
	{ "type", check_type },
	{ "enum", check_enum },
	{ "const", check_const },
	{ "multipleOf", check_multiple_of },
	{ "minimum", check_minimum },
	{ "maximum", check_maximum },
	{ "exclusiveMinimum", check_exclusive_minimum },
	{ "exclusiveMaximum", check_exclusive_maximum },
	{ "minLength", check_min_length },
	{ "maxLength", check_max_length },
	{ "pattern", check_pattern },
	{ "minItems", check_min_items },
	{ "maxItems", check_max_items },
	{ "uniqueItems", check_unique },
	{ "minProperties", check_min_properties },
	{ "maxProperties", check_max_properties },
	{ "required", check_required },
	{ "dependentRequired", check_dependent_required },
	{ "$ref", check_ref },
	{ "$dynamicRef", check_dynamic_ref },
	{ "properties", check_properties },
	{ "patternProperties", check_pattern_properties },
	{ "additionalProperties", check_additional_properties },
	{ "propertyNames", check_property_names },
	{ "prefixItems", check_prefix_items },
	{ "items", check_items },
	{ "contains", check_contains },
	{ "allOf", check_all_of },
	{ "anyOf", check_any_of },
	{ "oneOf", check_one_of },
	{ "not", check_not },
	{ "if", check_if },
	{ "dependentSchemas", check_dependent_schemas },
	{ "unevaluatedItems", check_unevaluated_items },
	{ "unevaluatedProperties", check_unevaluated_properties },
};

static int check_keywords(struct eval *e)
{
	for (size_t i = 0; i < sizeof(keywords) / sizeof(*keywords); i++) {
		const json_t *argument = json_object_get(e->schema, keywords[i].name);
		int rc;

		if (!argument)
			continue;
		rc = keywords[i].check(e, argument);
		if (rc <= 0)
			return rc;
	}
	return 1;
}

/* `seen`: of the same value one level up, or NULL. It gets what this schema has looked at, if
 * valid. */
static int evaluate(struct context *ctx, const struct scope *scope, const json_t *schema,
                    const json_t *value, struct seen *seen)
{
	struct seen here = { 0 };
	struct scope inner = { schema, scope };
	struct eval e = { ctx, scope, schema, value, &here };
	int rc;

	if (json_is_boolean(schema))
		return json_is_true(schema);
	if (!json_is_object(schema))
		return km_fail(ctx->err, KM_EINVAL,
		               "schema: a schema must be an object, true or false");
	if (++ctx->steps > MAX_STEPS)
		return km_fail(ctx->err, KM_ELIMIT, "schema: evaluation takes too long");
	if (ctx->depth >= MAX_DEPTH)
		return km_fail(ctx->err, KM_ELIMIT,
		               "schema: references go round, or deeper than %d levels", MAX_DEPTH);
	if (json_is_string(json_object_get(schema, "$id")))
		e.scope = &inner;
	ctx->depth++;
	rc = check_keywords(&e);
	ctx->depth--;
	if (rc > 0 && seen)
		seen_merge(seen, &here);
	seen_release(&here);
	return rc;
}

static int validate(const json_t *schema, const json_t *value, bool aliases, km_err *err)
{
	struct context ctx = { .root = schema, .aliases = aliases, .err = err };
	struct scope scope = { schema, NULL };

	return evaluate(&ctx, &scope, schema, value, NULL);
}

int km_schema_validate(const json_t *schema, const json_t *value, km_err *err)
{
	return validate(schema, value, false, err);
}

int km_schema_accepts_arguments(const json_t *schema, const json_t *arguments)
{
	json_t *copy;
	int rc;

	if (!schema || json_is_null(schema) || json_is_true(schema))
		return json_object_size(arguments) == 0;
	if (!json_is_object(schema))
		return 0;
	copy = json_copy((json_t *)schema);
	if (!json_object_get(copy, "unevaluatedProperties"))
		json_object_set_new(copy, "unevaluatedProperties", json_false());
	rc = validate(copy, arguments, true, NULL);
	json_decref(copy);
	return rc;
}
