/* JSON Schema validation, and the choice of a tool by its arguments. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "base/buf.h"
#include "text/schema.h"
#include "text/tool_name.h"

/* Each row: a schema, values that it accepts, values that it does not (JSON arrays of them). */
static const char *const rows[][3] = {
	{ "true", "[1,null]", "[]" },
	{ "false", "[]", "[1,null]" },
	{ "{}", "[1,\"a\",{}]", "[]" },
	{ "{'type':'integer'}", "[1,1.0,-3]", "[1.5,'1',true,null]" },
	{ "{'type':'number'}", "[1,1.5]", "['1',true]" },
	{ "{'type':['string','null']}", "['',null]", "[0,false,[]]" },
	{ "{'type':'boolean'}", "[true,false]", "[0,null]" },
	{ "{'type':'object'}", "[{}]", "[[]]" },
	{ "{'enum':[1,'a',{'x':[1]}]}", "[1,1.0,'a',{'x':[1.0]}]", "[2,'b',{'x':[2]},true]" },
	{ "{'const':{'a':1,'b':2}}", "[{'b':2,'a':1}]", "[{'a':1},null]" },
	{ "{'const':false}", "[false]", "[0,null]" },
	{ "{'minimum':2,'maximum':5}", "[2,5,3.5,'x']", "[1.9,6]" },
	{ "{'exclusiveMinimum':2,'exclusiveMaximum':5}", "[2.1,4]", "[2,5]" },
	{ "{'minimum':9007199254740993}", "[9007199254740993]", "[9007199254740992]" },
	{ "{'multipleOf':3}", "[9,-3,0,'x']", "[10]" },
	{ "{'multipleOf':0.5}", "[1.5,2]", "[1.3]" },
	{ "{'minLength':2,'maxLength':3}", "['ab','\\u4f60\\u597d','abc',5]",
	  "['a','\\ud83d\\ude00','abcd']" },
	{ "{'pattern':'^a+$'}", "['aa',5]", "['ab','aa\\n','']" },
	{ "{'pattern':'b'}", "['abc']", "['ac']" },
	{ "{'pattern':'^\\\\d$'}", "['7']", "['\\u0967']" },
	{ "{'pattern':'^\\\\u0041$'}", "['A']", "['B']" },
	{ "{'pattern':'^.$'}", "['\\ud83d\\ude00']", "['ab']" },
	{ "{'minItems':1,'maxItems':2}", "[[1],[1,2],{}]", "[[],[1,2,3]]" },
	{ "{'uniqueItems':true}", "[[1,2],[],[1,true],[0,false]]", "[[1,1.0],[{'a':1},{'a':1}]]" },
	{ "{'minProperties':1,'maxProperties':1}", "[{'a':1},[]]", "[{},{'a':1,'b':2}]" },
	{ "{'required':['a','b']}", "[{'a':1,'b':null},5]", "[{'a':1}]" },
	{ "{'dependentRequired':{'a':['b']}}", "[{'b':1},{'a':1,'b':1}]", "[{'a':1}]" },
	{ "{'dependentSchemas':{'a':{'required':['b']}}}", "[{},{'a':1,'b':1}]", "[{'a':1}]" },
	{ "{'properties':{'a':{'type':'string'}}}", "[{'a':'x'},{'b':1},7]", "[{'a':1}]" },
	{ "{'patternProperties':{'^x':{'type':'string'}}}", "[{'x1':'a','y':1}]", "[{'x1':1}]" },
	{ "{'properties':{'a':{}},'patternProperties':{'^x':{}},'additionalProperties':false}",
	  "[{'a':1,'x':2},{}]", "[{'b':1}]" },
	{ "{'additionalProperties':{'type':'integer'}}", "[{'a':1}]", "[{'a':'1'}]" },
	{ "{'propertyNames':{'maxLength':2}}", "[{'ab':1}]", "[{'abc':1}]" },
	{ "{'items':{'type':'integer'}}", "[[1,2],[],{}]", "[[1,'2']]" },
	{ "{'prefixItems':[{'type':'string'}],'items':{'type':'integer'}}", "[['a',1],['a'],[]]",
	  "[[1],['a','b']]" },
	{ "{'contains':{'const':1}}", "[[2,1]]", "[[2],[]]" },
	{ "{'contains':{'const':1},'minContains':2,'maxContains':3}", "[[1,1],[1,2,1,1]]",
	  "[[1],[1,1,1,1]]" },
	{ "{'contains':{'const':1},'minContains':0}", "[[]]", "[]" },
	{ "{'allOf':[{'minimum':1},{'maximum':2}]}", "[1]", "[0,3]" },
	{ "{'anyOf':[{'type':'string'},{'minimum':5}]}", "['a',5]", "[4]" },
	{ "{'oneOf':[{'minimum':1},{'maximum':5}]}", "[0,6]", "[3]" },
	{ "{'not':{'type':'string'}}", "[1]", "['a']" },
	{ "{'if':{'properties':{'k':{'const':1}},'required':['k']},'then':{'required':['a']},'else'"
	  ":{'required':['b']}}",
	  "[{'k':1,'a':0},{'k':2,'b':0}]", "[{'k':1,'b':0},{'k':2,'a':0}]" },
	{ "{'then':{'required':['a']}}", "[{}]", "[]" },
	{ "{'$defs':{'p':{'type':'integer'}},'$ref':'#/$defs/p','minimum':3}", "[3]", "[2,'a']" },
	{ "{'properties':{'c':{'$ref':'#'}},'additionalProperties':false}", "[{'c':{'c':{}}}]",
	  "[{'c':{'d':1}}]" },
	{ "{'$defs':{'a~b/c%':{'const':1}},'$ref':'#/$defs/a~0b~1c%25'}", "[1]", "[2]" },
	{ "{'$defs':{'x':{'$anchor':'here','const':1}},'$ref':'#here'}", "[1]", "[2]" },
	{ "{'$defs':{'x':{'$id':'http://e/x','$defs':{'y':{'const':1}},'$ref':'#/$defs/"
	  "y'}},'$ref':'http://e/x'}",
	  "[1]", "[2]" },
	{ "{'allOf':[{'const':1}],'$defs':{'z':{'$ref':'#/allOf/0'}},'$ref':'#/$defs/z'}", "[1]",
	  "[2]" },
	{ "{'$id':'http://e/strict','$dynamicAnchor':'n','$ref':'http://e/"
	  "tree','required':['s'],'$defs':{'t':"
	  "{'$id':'http://e/"
	  "tree','$dynamicAnchor':'n','properties':{'kids':{'items':{'$dynamicRef':'#n'}}}}}}",
	  "[{'s':1,'kids':[{'s':1}]}]", "[{'s':1,'kids':[{}]}]" },
	{ "{'properties':{'a':{}},'unevaluatedProperties':false}", "[{'a':1}]", "[{'b':1}]" },
	{ "{'allOf':[{'properties':{'a':{}}},{'patternProperties':{'^x':{}}}],'"
	  "unevaluatedProperties':false}",
	  "[{'a':1,'xx':1}]", "[{'b':1}]" },
	{ "{'anyOf':[{'properties':{'a':{'const':1}},'required':['a']},{'properties':{'b':{}}}],'"
	  "unevaluatedProperties':false}",
	  "[{'a':1},{'b':1},{'a':1,'b':2}]", "[{'a':2},{'c':1}]" },
	{ "{'if':{'properties':{'k':{'const':1}}},'then':{'properties':{'a':{}}},'else':{'"
	  "properties':{'b':{}}},'unevaluatedProperties':false}",
	  "[{'k':1,'a':1},{'a':1}]", "[{'k':1,'b':1},{'k':2,'b':1}]" },
	{ "{'not':{'properties':{'a':{'const':2}},'required':['a']},'unevaluatedProperties':false}",
	  "[{}]", "[{'a':1}]" },
	{ "{'$ref':'#/$defs/"
	  "p','$defs':{'p':{'properties':{'a':{}}}},'unevaluatedProperties':{'type':'integer'}}",
	  "[{'a':'x','b':1}]", "[{'b':'x'}]" },
	{ "{'additionalProperties':true,'unevaluatedProperties':false}", "[{'a':1}]", "[]" },
	{ "{'prefixItems':[{}],'unevaluatedItems':false}", "[[1],[]]", "[[1,2]]" },
	{ "{'contains':{'const':1},'unevaluatedItems':false}", "[[1,1]]", "[[1,2]]" },
	{ "{'format':'date','x-unknown':7,'title':'t'}", "['not a date']", "[]" },
};

static json_t *json(const char *single_quoted)
{
	char text[1024];
	json_error_t error;
	json_t *value;
	size_t i = 0;

	for (; single_quoted[i]; i++)
		text[i] = single_quoted[i] == '\'' ? '"' : single_quoted[i];
	text[i] = '\0';
	value = json_loads(text, JSON_DECODE_ANY, &error);
	if (!value)
		fail_msg("%s: %s", text, error.text);
	return value;
}

static void check_values(const char *row, const json_t *schema, const char *values, int expected)
{
	json_t *list = json(values), *value;
	size_t i;

	json_array_foreach(list, i, value) {
		km_err err = { 0, "" };
		int rc = km_schema_validate(schema, value, &err);

		if (rc != expected)
			fail_msg("%s: value %zu of %s: %d %s", row, i, values, rc, err.msg);
	}
	json_decref(list);
}

static void keywords_hold(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
		json_t *schema = json(rows[i][0]);

		check_values(rows[i][0], schema, rows[i][1], 1);
		check_values(rows[i][0], schema, rows[i][2], 0);
		json_decref(schema);
	}
}

/* A schema, a value that reaches the part that is wrong, and what the sentence says. */
static const char *const broken[][3] = {
	{ "7", "1", "must be an object" },
	{ "{'type':'nonsense'}", "1", "no type \"nonsense\"" },
	{ "{'type':7}", "1", "\"type\"" },
	{ "{'pattern':'('}", "'a'", "does not compile" },
	{ "{'pattern':'^(a+)+$'}", "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab'",
	  "too long to match" },
	{ "{'$ref':'#/nowhere'}", "1", "leads nowhere" },
	{ "{'$ref':'http://example.com/s.json'}", "1", "leads nowhere" },
	{ "{'$ref':'#'}", "1", "go round" },
	{ "{'allOf':[{'$ref':'#'}]}", "1", "go round" },
	{ "{'anyOf':[{'$ref':'#/$defs/x'},{'$ref':'#/$defs/"
	  "x'}],'$defs':{'x':{'anyOf':[{'$ref':'#'},{'$ref':'#'}]}}}",
	  "1", "" },
	{ "{'required':true}", "{}", "\"required\"" },
	{ "{'required':[1]}", "{}", "\"required\"" },
	{ "{'enum':1}", "1", "\"enum\"" },
	{ "{'items':[{}]}", "[1]", "must be an object" },
	{ "{'minLength':-1}", "'a'", "\"minLength\"" },
	{ "{'multipleOf':0}", "1", "\"multipleOf\"" },
	{ "{'minimum':'1'}", "1", "\"minimum\"" },
	{ "{'properties':[]}", "{'a':1}", "\"properties\"" },
	{ "{'anyOf':{}}", "1", "\"anyOf\"" },
	{ "{'uniqueItems':1}", "[]", "\"uniqueItems\"" },
};

static void what_cannot_be_evaluated_is_an_error(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof(broken) / sizeof(*broken); i++) {
		json_t *schema = json(broken[i][0]), *value = json(broken[i][1]);
		km_err err = { 0, "" };
		int rc = km_schema_validate(schema, value, &err);

		if (rc >= 0 || !strstr(err.msg, broken[i][2]))
			fail_msg("%s: %d %s", broken[i][0], rc, err.msg);
		json_decref(schema);
		json_decref(value);
	}
}

static int accepts(const char *schema, const char *arguments)
{
	json_t *s = schema ? json(schema) : NULL, *a = json(arguments);
	int rc = km_schema_accepts_arguments(s, a);

	json_decref(s);
	json_decref(a);
	return rc;
}

static void arguments_are_judged_more_strictly(void **state)
{
	(void)state;
	assert_int_equal(accepts(NULL, "{}"), 1);
	assert_int_equal(accepts(NULL, "{'a':1}"), 0);
	assert_int_equal(accepts("true", "{'a':1}"), 0);
	assert_int_equal(accepts("null", "{}"), 1);
	assert_int_equal(accepts("false", "{}"), 0);
	assert_int_equal(accepts("'text'", "{}"), 0);
	assert_int_equal(accepts("{}", "{'a':1}"), 0);
	assert_int_equal(accepts("{'properties':{'a':{}}}", "{'a':1}"), 1);
	assert_int_equal(accepts("{'properties':{'a':{}}}", "{'b':1}"), 0);
	assert_int_equal(accepts("{'properties':{'a':{}},'unevaluatedProperties':true}", "{'b':1}"),
	                 1);
	assert_int_equal(accepts("{'properties':{'a':{'type':'VARCHAR(20)'}}}", "{'a':'x'}"), 1);
	assert_int_equal(accepts("{'properties':{'a':{'type':'INTEGER'}}}", "{'a':'x'}"), 0);
	assert_int_equal(accepts("{'properties':{'a':{'type':['dict','int']}}}", "{'a':{}}"), 1);
	assert_true(accepts("{'properties':{'a':{'type':'wibble'}}}", "{'a':1}") < 0);
	/* The default reaches through a reference to the root: it is the root that was changed. */
	assert_int_equal(accepts("{'properties':{'a':{'$ref':'#'}}}", "{'a':{'b':1}}"), 0);
}

static enum km_tool_name_kind name_kind(const char *header, const json_t *tools, km_buf *out)
{
	const char *name = "";
	size_t len = 0;
	bool prefixed;
	enum km_tool_name_kind kind =
		km_tool_name(header, strlen(header), tools, &name, &len, &prefixed);

	km_buf_clear(out);
	km_buf_append(out, name, len);
	return kind;
}

static void names_come_from_ids(void **state)
{
	static const char *const named[][2] = {
		{ "functions.a:0", "a" },
		{ "a:12", "a" },
		{ "functions.a.b-c_d:1", "a.b-c_d" },
		{ "functions.functions.a:0", "functions.a" },
		{ "functions.:0", "functions." },
		{ "functions:0", "functions" },
		{ "functions.\xe5\x86\x99:3", "\xe5\x86\x99" },
		{ "..:1", ".." },
	};
	static const char *const nameless[] = {
		"",
		"0",
		"call_1",
		"functions.a",
		"functions.a:",
		":0",
		"a b:0",
		"a:b:0",
		"functions.a:0x",
		"a@b:0",
		"functions.a :0",
		"550e8400-e29b-41d4-a716-446655440000",
	};
	json_t *one = json("[{'type':'function','function':{'name':'only'}}]"), *none = json("[]");
	json_t *two = json("[{'function':{'name':'a'}},{'function':{'name':'b'}}]"),
	       *odd = json("[{'function':{}}]");
	km_buf out = KM_BUF_INIT;

	(void)state;
	for (size_t i = 0; i < sizeof(named) / sizeof(*named); i++) {
		assert_int_equal(name_kind(named[i][0], one, &out), KM_TOOL_NAMED);
		assert_string_equal(out.data, named[i][1]);
	}
	for (size_t i = 0; i < sizeof(nameless) / sizeof(*nameless); i++) {
		assert_int_equal(name_kind(nameless[i], one, &out), KM_TOOL_ONLY);
		assert_string_equal(out.data, "only");
		assert_int_equal(name_kind(nameless[i], two, &out), KM_TOOL_BY_ARGUMENTS);
		assert_int_equal(name_kind(nameless[i], none, &out), KM_TOOL_UNKNOWN);
		assert_int_equal(name_kind(nameless[i], NULL, &out), KM_TOOL_UNKNOWN);
		assert_int_equal(name_kind(nameless[i], odd, &out), KM_TOOL_UNKNOWN);
	}
	json_decref(one);
	json_decref(two);
	json_decref(none);
	json_decref(odd);
	km_buf_release(&out);
}

static void inference_needs_exactly_one(void **state)
{
	json_t *tools = json("[{'function':{'name':'a','parameters':{'properties':{'x':{'type':'"
	                     "integer'}},'required':['x']}}},"
	                     "{'function':{'name':'b','parameters':{'properties':{'x':{},'y':{}},'"
	                     "required':['x']}}},"
	                     "{'name':'c','parameters':{'properties':{'z':{}},'required':['z']}}]");
	static const char *const given[][2] = {
		{ "{\"x\":1}", NULL },
		{ "{\"x\":\"s\"}", "b" },
		{ "{\"x\":1,\"y\":2}", "b" },
		{ "{\"z\":1}", "c" },
		{ "{}", NULL },
		{ "[1]", NULL },
		{ "{\"z\":", NULL },
		{ "", NULL },
		{ "{\"q\":1}", NULL },
	};

	(void)state;
	for (size_t i = 0; i < sizeof(given) / sizeof(*given); i++) {
		const char *name = km_tool_infer(tools, given[i][0], strlen(given[i][0]));

		if (given[i][1])
			assert_string_equal(name, given[i][1]);
		else
			assert_null(name);
	}
	json_decref(tools);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(keywords_hold),
		cmocka_unit_test(what_cannot_be_evaluated_is_an_error),
		cmocka_unit_test(arguments_are_judged_more_strictly),
		cmocka_unit_test(names_come_from_ids),
		cmocka_unit_test(inference_needs_exactly_one),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
