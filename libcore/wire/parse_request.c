#include "wire/parse_request.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/utf8.h"
#include "wire/json_fast.h"

enum { MAX_HISTORY = 1000000000, LONGEST_WORD = 64 };

void km_parse_request_init(km_parse_request *r)
{
	memset(r, 0, sizeof(*r));
}

void km_parse_request_release(km_parse_request *r)
{
	json_decref(r->root);
	json_decref(r->tools);
	json_decref(r->tools_read);
	km_buf_release(&r->tools_text);
	free(r->literal);
	km_ids_release(&r->ids);
	km_buf_release(&r->text);
	km_parse_request_init(r);
}

static void start(km_parse_request *r, const km_parse_defaults *defaults)
{
	json_decref(r->root);
	json_decref(r->tools);
	r->root = r->tools = NULL;
	km_buf_clear(&r->text);
	r->literal_count = r->bad_count = r->bad_at = r->nan_count = 0;
	r->ids.len = r->control_count = r->control_at = 0;
	r->has_ids = false;
	r->parser = defaults->parser;
	r->engine_finish = defaults->engine_finish;
	r->tokenizer = defaults->tokenizer;
}

int km_parse_set_parsers(km_parser_options *options, const char *which, km_err *err)
{
	bool tool = !strcmp(which, "tool"), reasoning = !strcmp(which, "reasoning"),
	     both = !strcmp(which, "both");

	if (!tool && !reasoning && !both)
		return km_fail(err, KM_EINVAL,
		               "\"parsers\" is \"tool\", \"reasoning\" or \"both\", not \"%.40s\"",
		               which);
	options->tools = tool || both;
	options->reasoning = reasoning || both;
	return 0;
}

static int set_finish(km_parse_request *r, const char *finish, km_err *err)
{
	if (strcmp(finish, "stop") && strcmp(finish, "length"))
		return km_fail(err, KM_EINVAL,
		               "\"engine_finish\" is \"stop\" or \"length\", not \"%.40s\"",
		               finish);
	r->engine_finish = strcmp(finish, "stop") ? "length" : "stop";
	return 0;
}

/* ---- the scanner for common lines ---- */

struct scan {
	const char *s, *end;
	km_buf word; /* short strings */
	bool no_tools; /* tool_choice says none */
};

static void skip_space(struct scan *sc)
{
	while (sc->s < sc->end &&
	       (*sc->s == ' ' || *sc->s == '\t' || *sc->s == '\r' || *sc->s == '\n'))
		sc->s++;
}

static bool take(struct scan *sc, char c)
{
	skip_space(sc);
	if (sc->s == sc->end || *sc->s != c)
		return false;
	sc->s++;
	return true;
}

static bool take_word(struct scan *sc, const char *word)
{
	size_t n = strlen(word);

	if ((size_t)(sc->end - sc->s) < n || memcmp(sc->s, word, n))
		return false;
	sc->s += n;
	return true;
}

static bool scan_string(struct scan *sc, km_buf *out)
{
	size_t took;

	skip_space(sc);
	took = km_json_fast_read(sc->s, (size_t)(sc->end - sc->s), out);
	sc->s += took;
	return took > 0;
}

/* A short string without NULs, in sc->word. */
static bool scan_word(struct scan *sc)
{
	size_t left, took;

	skip_space(sc);
	left = (size_t)(sc->end - sc->s);
	km_buf_clear(&sc->word);
	took = km_json_fast_read(sc->s, left < LONGEST_WORD ? left : LONGEST_WORD, &sc->word);
	sc->s += took;
	return took && sc->word.len && strlen(sc->word.data) == sc->word.len;
}

static bool scan_chunks(struct scan *sc, km_buf *out)
{
	if (!take(sc, '['))
		return false;
	if (take(sc, ']'))
		return true;
	do {
		if (!scan_string(sc, out))
			return false;
	} while (take(sc, ','));
	return take(sc, ']');
}

static bool scan_count(struct scan *sc, int *value)
{
	const char *from;

	skip_space(sc);
	from = sc->s;
	*value = 0;
	while (sc->s < sc->end && *sc->s >= '0' && *sc->s <= '9' && sc->s - from < 9)
		*value = *value * 10 + (*sc->s++ - '0');
	return sc->s > from && (*from != '0' || sc->s - from == 1) && sc->s < sc->end &&
	       (*sc->s == ',' || *sc->s == '}' || *sc->s == ' ');
}

/* The end of the array at s, or NULL: no more than bracket counting, jansson judges what is
 * inside. */
static const char *array_end(const char *s, const char *end)
{
	enum { MAX_DEPTH = 1000 };
	bool quoted = false;
	int depth = 0;

	for (; s < end; s++) {
		if (quoted) {
			if (*s == '\\')
				s++; /* whatever it escapes is inside */
			else
				quoted = *s != '"';
			continue;
		}
		quoted = *s == '"';
		depth += (*s == '[' || *s == '{') - (*s == ']' || *s == '}');
		if (depth > MAX_DEPTH)
			return NULL;
		if (!depth)
			return s + 1;
	}
	return NULL;
}

/* An array's text says where it ends, so a line that goes on as the last tools did repeats them. */
static bool scan_tools(struct scan *sc, km_parse_request *r)
{
	const km_buf *last = &r->tools_text;
	const char *end;
	json_t *tools;

	skip_space(sc);
	if (last->len && (size_t)(sc->end - sc->s) >= last->len &&
	    !memcmp(sc->s, last->data, last->len)) {
		sc->s += last->len;
		r->parser.declared_tools = r->tools_read;
		return true;
	}
	end = sc->s < sc->end && *sc->s == '[' ? array_end(sc->s, sc->end) : NULL;
	tools = end ? json_loadb(sc->s, (size_t)(end - sc->s), JSON_ALLOW_NUL, NULL) : NULL;
	if (!json_is_array(tools)) {
		json_decref(tools);
		return false;
	}
	json_decref(r->tools_read);
	r->tools_read = tools;
	r->parser.declared_tools = tools;
	km_buf_clear(&r->tools_text);
	km_buf_append(&r->tools_text, sc->s, (size_t)(end - sc->s));
	sc->s = end;
	return true;
}

static bool scan_choice(struct scan *sc)
{
	if (!scan_word(sc))
		return false;
	sc->no_tools = !strcmp(sc->word.data, "none");
	return sc->no_tools || !strcmp(sc->word.data, "auto") || !strcmp(sc->word.data, "required");
}

static bool scan_thinking(struct scan *sc, km_parse_request *r)
{
	skip_space(sc);
	r->parser.in_reasoning = take_word(sc, "true");
	return r->parser.in_reasoning || take_word(sc, "false");
}

enum key {
	KEY_TEXT = 1, /* or chunks */
	KEY_THINKING = 2,
	KEY_FINISH = 4,
	KEY_HISTORY = 8,
	KEY_PARSERS = 16,
	KEY_TOOLS = 32,
	KEY_CHOICE = 64,
};

/* Reads the value of the key in sc->word; 0 leaves the line to jansson, else the key's bit. */
static unsigned scan_value(struct scan *sc, km_parse_request *r)
{
	const char *key = sc->word.data;

	if (!strcmp(key, "text"))
		return scan_string(sc, &r->text) ? KEY_TEXT : 0;
	if (!strcmp(key, "chunks"))
		return scan_chunks(sc, &r->text) ? KEY_TEXT : 0;
	if (!strcmp(key, "tools"))
		return scan_tools(sc, r) ? KEY_TOOLS : 0;
	if (!strcmp(key, "thinking"))
		return scan_thinking(sc, r) ? KEY_THINKING : 0;
	if (!strcmp(key, "history_tool_calls"))
		return scan_count(sc, &r->parser.history_tool_calls) ? KEY_HISTORY : 0;
	if (!strcmp(key, "tool_choice"))
		return scan_choice(sc) ? KEY_CHOICE : 0;
	if (!strcmp(key, "engine_finish"))
		return scan_word(sc) && set_finish(r, sc->word.data, NULL) == 0 ? KEY_FINISH : 0;
	if (!strcmp(key, "parsers"))
		return scan_word(sc) && km_parse_set_parsers(&r->parser, sc->word.data, NULL) == 0
		               ? KEY_PARSERS : 0;
	return 0;
}

static bool scan_line(struct scan *sc, km_parse_request *r)
{
	unsigned seen = 0;

	if (!take(sc, '{'))
		return false;
	do {
		unsigned bit;

		if (!scan_word(sc) || !take(sc, ':'))
			return false;
		bit = scan_value(sc, r);
		if (!bit || (seen & bit))
			return false;
		seen |= bit;
	} while (take(sc, ','));
	if (!take(sc, '}'))
		return false;
	skip_space(sc);
	if (sc->no_tools)
		r->parser.tools = false;
	return sc->s == sc->end && (seen & KEY_TEXT);
}

static bool read_fast(km_parse_request *r, const char *line, size_t len)
{
	struct scan sc = { .s = line, .end = line + len };
	bool done;

	km_buf_init(&sc.word, 0);
	done = scan_line(&sc, r);
	km_buf_release(&sc.word);
	return done;
}

/* ---- everything else ---- */

static int load(km_parse_request *r, const char *line, size_t len, km_err *err)
{
	km_json_odd odd = { 0 };
	json_error_t error;

	r->root = km_json_load(line, len, &error, &odd);
	r->bad_count = odd.bad_count;
	r->bad_at = odd.bad_at;
	r->nan_count = odd.nan_count;
	km_buf_release(&odd.wide);
	if (!r->root)
		return km_fail(err, KM_EFORMAT, "not JSON: %s (at byte %d)", error.text,
		               error.position);
	if (!json_is_object(r->root))
		return km_fail(err, KM_EFORMAT, "a line must be a JSON object");
	return 0;
}

/* NULL for what is not there or null. */
static const json_t *member(const json_t *root, const char *key)
{
	const json_t *value = json_object_get(root, key);

	return json_is_null(value) ? NULL : value;
}

static int append_string(km_parse_request *r, const json_t *value, const char *what, km_err *err)
{
	if (!json_is_string(value))
		return km_fail(err, KM_EINVAL, "%s must be a string", what);
	km_buf_append(&r->text, json_string_value(value), json_string_length(value));
	return 0;
}

static int read_text(km_parse_request *r, const json_t *root, km_err *err)
{
	const json_t *text = member(root, "text"), *chunks = member(root, "chunks");
	const json_t *chunk;
	size_t i;

	if (!!text + !!chunks + !!member(root, "ids") != 1)
		return km_fail(err, KM_EINVAL,
		               "a line has exactly one of \"text\", \"chunks\" and \"ids\"");
	if (text)
		return append_string(r, text, "\"text\"", err);
	if (chunks && !json_is_array(chunks))
		return km_fail(err, KM_EINVAL, "\"chunks\" must be an array of strings");
	json_array_foreach((json_t *)chunks, i, chunk)
		KM_TRY(append_string(r, chunk, "each of \"chunks\"", err));
	return 0;
}

static int read_ids(km_parse_request *r, const json_t *ids, km_err *err)
{
	const json_t *id;
	size_t i, len;

	if (!ids)
		return 0;
	if (!json_is_array(ids))
		return km_fail(err, KM_EINVAL, "\"ids\" must be an array of token ids");
	if (!r->tokenizer)
		return km_fail(err, KM_EINVAL, "\"ids\" need --tokenizer");
	json_array_foreach((json_t *)ids, i, id) {
		json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
		int32_t narrow = (int32_t)value;

		if (value < 0 || value > INT32_MAX ||
		    !km_tokenizer_bytes(r->tokenizer, narrow, &len))
			return km_fail(err, KM_EINVAL,
			               "\"ids\"[%zu] is no token of this vocabulary", i);
		km_ids_append(&r->ids, &narrow, 1);
		/* One at the end is how a turn ends. */
		if (km_tokenizer_is_special(r->tokenizer, narrow) && i + 1 < json_array_size(ids) &&
		    !r->control_count++)
			r->control_at = i;
	}
	r->has_ids = true;
	return 0;
}

static int read_settings(km_parse_request *r, const json_t *root, km_err *err)
{
	const json_t *thinking = member(root, "thinking");
	const json_t *history = member(root, "history_tool_calls");
	const json_t *finish = member(root, "engine_finish");
	const json_t *parsers = member(root, "parsers");

	if (thinking) {
		if (!json_is_boolean(thinking))
			return km_fail(err, KM_EINVAL, "\"thinking\" must be true or false");
		r->parser.in_reasoning = json_is_true(thinking);
	}
	if (history) {
		if (!json_is_integer(history) || json_integer_value(history) < 0 ||
		    json_integer_value(history) > MAX_HISTORY)
			return km_fail(err, KM_EINVAL,
			               "\"history_tool_calls\" must be a whole number from 0 to %d",
			               MAX_HISTORY);
		r->parser.history_tool_calls = (int)json_integer_value(history);
	}
	if (finish) {
		if (!json_is_string(finish))
			return km_fail(err, KM_EINVAL, "\"engine_finish\" must be a string");
		KM_TRY(set_finish(r, json_string_value(finish), err));
	}
	if (parsers) {
		if (!json_is_string(parsers))
			return km_fail(err, KM_EINVAL, "\"parsers\" must be a string");
		KM_TRY(km_parse_set_parsers(&r->parser, json_string_value(parsers), err));
	}
	return 0;
}

/* A named choice leaves that tool alone, as only that one is in the prompt. */
static int choose_tool(km_parse_request *r, const char *name, km_err *err)
{
	const json_t *tool;
	size_t i;

	json_array_foreach((json_t *)r->parser.declared_tools, i, tool) {
		const char *its = json_string_value(
			json_object_get(json_object_get(tool, "function"), "name"));

		if (its && !strcmp(its, name)) {
			r->tools = json_array();
			json_array_append(r->tools, (json_t *)tool);
			r->parser.declared_tools = r->tools;
			return 0;
		}
	}
	return km_fail(err, KM_EINVAL,
	               "\"tool_choice\" names a tool \"%.60s\" that is not among \"tools\"", name);
}

static int read_tools(km_parse_request *r, const json_t *root, km_err *err)
{
	const json_t *tools = member(root, "tools"), *choice = member(root, "tool_choice");
	const char *word = json_string_value(choice);
	const char *name;

	if (tools) {
		if (!json_is_array(tools))
			return km_fail(err, KM_EINVAL, "\"tools\" must be an array");
		r->parser.declared_tools = tools;
	}
	if (!choice)
		return 0;
	if (word && !strcmp(word, "none")) {
		r->parser.tools = false;
		return 0;
	}
	if (word && (!strcmp(word, "auto") || !strcmp(word, "required")))
		return 0;
	name = json_string_value(json_object_get(json_object_get(choice, "function"), "name"));
	if (!name)
		return km_fail(
			err, KM_EINVAL,
			"\"tool_choice\" is \"none\", \"auto\", \"required\" or names a function");
	return choose_tool(r, name, err);
}

static int wrong_span(size_t i, km_err *err)
{
	return km_fail(err, KM_EINVAL,
	               "\"literal_spans\"[%zu] must be two code-point positions of the text, "
	               "ascending, after the span before", i);
}

static int read_spans(km_parse_request *r, const json_t *spans, km_err *err)
{
	size_t count = json_array_size(spans), at = 0, index = 0;

	if (!spans)
		return 0;
	if (!json_is_array(spans))
		return km_fail(err, KM_EINVAL,
		               "\"literal_spans\" must be an array of [start, end]");
	r->literal = km_xreallocarray(r->literal, count + 1, sizeof(*r->literal));
	for (size_t i = 0; i < 2 * count; i++) {
		const json_t *bound = json_array_get(json_array_get(spans, i / 2), i % 2);
		json_int_t want = json_is_integer(bound) ? json_integer_value(bound) : -1;

		if (want < (json_int_t)index || json_array_size(json_array_get(spans, i / 2)) != 2)
			return wrong_span(i / 2, err);
		for (; index < (size_t)want; index++) {
			if (at == r->text.len)
				return wrong_span(i / 2, err);
			for (at++;
			     at < r->text.len && ((unsigned char)r->text.data[at] & 0xc0) == 0x80;)
				at++;
		}
		*(i % 2 ? &r->literal[i / 2].end : &r->literal[i / 2].start) = at;
	}
	r->literal_count = count;
	return 0;
}

int km_parse_request_read_slowly(km_parse_request *r, const km_parse_defaults *defaults,
                                 const char *line, size_t len, km_err *err)
{
	start(r, defaults);
	KM_TRY(load(r, line, len, err));
	KM_TRY(read_text(r, r->root, err));
	KM_TRY(read_ids(r, member(r->root, "ids"), err));
	KM_TRY(read_settings(r, r->root, err));
	KM_TRY(read_tools(r, r->root, err));
	return read_spans(r, member(r->root, "literal_spans"), err);
}

int km_parse_request_read(km_parse_request *r, const km_parse_defaults *defaults, const char *line,
                          size_t len, km_err *err)
{
	start(r, defaults);
	if (read_fast(r, line, len))
		return 0;
	return km_parse_request_read_slowly(r, defaults, line, len, err);
}

/* ---- to the parser ---- */

static void feed_id(const km_parse_request *r, km_parser *parser, int32_t id)
{
	size_t len;
	const char *bytes = km_tokenizer_bytes(r->tokenizer, id, &len);

	for (int m = 0; m < KM_MARK_COUNT; m++) {
		if (strlen(km_marker_text[m]) == len && !memcmp(km_marker_text[m], bytes, len) &&
		    km_tokenizer_special(r->tokenizer, km_marker_text[m]) == id) {
			km_parser_marker(parser, (enum km_marker)m);
			return;
		}
	}
	if (!km_tokenizer_is_special(r->tokenizer, id)) /* control tokens are no part of the text */
		km_parser_text(parser, bytes, len);
}

void km_parse_request_feed(const km_parse_request *r, km_parser *parser, size_t from, size_t to)
{
	if (r->has_ids) {
		for (; from < to; from++)
			feed_id(r, parser, r->ids.data[from]);
		return;
	}
	for (size_t i = 0; i < r->literal_count && from < to; i++) {
		size_t start_at = r->literal[i].start, end = r->literal[i].end;

		if (end <= from)
			continue;
		if (start_at > to)
			break;
		if (start_at > from) {
			km_parser_bytes(parser, r->text.data + from, start_at - from);
			from = start_at;
		}
		if (end > to)
			end = to;
		km_parser_text(parser, r->text.data + from, end - from);
		from = end;
	}
	if (from < to)
		km_parser_bytes(parser, r->text.data + from, to - from);
}
