/* text/tools_ts and text/pyjson: the TypeScript declaration against the reference, Python's JSON.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "text/pyjson.h"
#include "text/tools_ts.h"

static void declarations_equal_the_reference(void **state)
{
	FILE *golden = fopen("tests/data/chat/tools.jsonl", "r");
	char *line = NULL;
	size_t cap = 0;
	int rows = 0, none = 0;

	(void)state;
	assert_non_null(golden);
	for (; getline(&line, &cap, golden) > 0; rows++) {
		json_t *row = json_loads(line, 0, NULL);
		const char *want = json_string_value(json_object_get(row, "text"));
		km_buf out = KM_BUF_INIT;
		bool declared;

		assert_non_null(row);
		km_buf_puts(&out, "before");
		declared = km_tools_ts_append(&out, json_object_get(row, "tools"));
		if (declared != (want != NULL) || strcmp(out.data + 6, want ? want : "")) {
			fprintf(stderr, "%s\nours:\n%s\nreference:\n%s\n", line, out.data,
				want ? want : "(none)");
			fail_msg("line %d differs", rows + 1);
		}
		none += !want;
		km_buf_release(&out);
		json_decref(row);
	}
	assert_true(rows > 100 && none > 5 && none < rows / 2);
	free(line);
	fclose(golden);
}

static void odd_tools_fall_back(void **state)
{
	static const char *const odd[] = {
		"[]",
		"[7]",
		"[{\"type\":\"_plugin\"}]",
		"[{\"type\":\"function\"}]",
		"[{\"type\":\"function\",\"function\":\"f\"}]",
		"[{\"type\":\"function\",\"function\":{\"name\":7}}]",
		"[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"description\":7}}]",
		"[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":[1]}}]",
		"[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{"
		"\"properties\":[]}}}]",
		"[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{"
		"\"properties\":{\"a\":null}}}}]",
		"[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{"
		"\"properties\":{\"a\":{\"$ref\":\"#/$defs/x\"}}}}}]",
		"[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{"
		"\"properties\":{},\"required\":null}}}]",
		"[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"$defs\":[1]"
		"}}}]",
		"[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"$defs\":{"
		"\"D\":true}}}}]",
	};

	(void)state;
	for (size_t i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
		json_t *tools = json_loads(odd[i], 0, NULL);
		km_buf out = KM_BUF_INIT;

		assert_non_null(tools);
		km_buf_puts(&out, "x");
		assert_false(km_tools_ts_append(&out, tools));
		assert_string_equal(out.data, "x");
		km_buf_release(&out);
		json_decref(tools);
	}
}

/* A search of the required names for each property takes many seconds. */
static void many_required_names_take_no_time(void **state)
{
	enum { NAMES = 30000, LIMIT_S = 3 };
	json_t *tools, *properties = json_object(), *required = json_array();
	clock_t start;

	(void)state;
	for (int i = 0; i < NAMES; i++) {
		char name[16];

		snprintf(name, sizeof(name), "p%d", i);
		json_object_set_new(properties, name, json_object());
		snprintf(name, sizeof(name), "q%d", i);
		json_array_append_new(required, json_string(name));
	}
	tools = json_pack("[{s:s,s:{s:s,s:{s:o,s:o}}}]", "type", "function", "function", "name", "f",
			  "parameters", "properties", properties, "required", required);
	assert_non_null(tools);
	for (int i = 0; i < 2; i++) { /* the second time by name, in an interface of its own */
		km_buf out = KM_BUF_INIT;

		start = clock();
		assert_true(km_tools_ts_append(&out, tools));
		assert_true(clock() - start < LIMIT_S * CLOCKS_PER_SEC);
		assert_int_equal(strstr(out.data, "interface parameters") != NULL, i);
		assert_non_null(strstr(out.data, "  p29999?: any"));
		km_buf_release(&out);
		json_object_set_new(properties, "self", json_pack("{s:s}", "$ref", "#"));
	}
	json_decref(tools);
}

static void assert_json(const char *in, bool compact, bool sorted, const char *out)
{
	json_t *value = json_loads(in, JSON_DECODE_ANY, NULL);
	km_buf buf = KM_BUF_INIT;

	assert_non_null(value);
	km_pyjson_append(&buf, value, (km_pyjson_style){ compact, sorted });
	assert_string_equal(buf.data, out);
	km_buf_release(&buf);
	json_decref(value);
}

static void json_is_written_as_python_writes_it(void **state)
{
	(void)state;
	assert_json(
		"{\"b\": [1, 2.0, true], \"a\": {\"z\": null, \"y\": \"\\u0007\\u007f\\b\\f/é\"}}",
		false, false,
		"{\"b\": [1, 2.0, true], \"a\": {\"z\": null, \"y\": \"\\u0007\x7f\\b\\f/é\"}}");
	assert_json("{\"b\": [1, []], \"a\": {\"z\": {}, \"y\": 1}}", true, true,
		    "{\"a\":{\"y\":1,\"z\":{}},\"b\":[1,[]]}");
	assert_json(
		"[1e-5, 0.0001, 1e16, 9999999999999998.0, 123456789012345680.0, -0.0, 5e-324, "
		"1.7976931348623157e308, 0.1, 100.0]",
		false, false,
		"[1e-05, 0.0001, 1e+16, 9999999999999998.0, 1.2345678901234568e+17, -0.0, 5e-324, "
		"1.7976931348623157e+308, 0.1, 100.0]");
	assert_json("[9223372036854775807, -9223372036854775808]", true, false,
		    "[9223372036854775807,-9223372036854775808]");
}

static void values_are_shown_as_python_shows_them(void **state)
{
	json_t *value = json_loads(
		"[\"it's\", \"a\\\"b'\", \"x\\n\\u0001\\\\\", true, null, 1.0, {\"k\": false}]", 0,
		NULL);
	km_buf buf = KM_BUF_INIT;

	(void)state;
	km_pystr_append(&buf, value);
	assert_string_equal(
		buf.data, "[\"it's\", 'a\"b\\'', 'x\\n\\x01\\\\', True, None, 1.0, {'k': False}]");
	km_buf_release(&buf);
	json_decref(value);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(declarations_equal_the_reference),
		cmocka_unit_test(odd_tools_fall_back),
		cmocka_unit_test(many_required_names_take_no_time),
		cmocka_unit_test(json_is_written_as_python_writes_it),
		cmocka_unit_test(values_are_shown_as_python_shows_them),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
