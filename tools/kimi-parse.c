/* kimi-parse: raw model output in; reasoning, content and tool calls as JSON out. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/err.h"
#include "base/option.h"
#include "base/stdout.h"
#include "text/tokenizer.h"
#include "wire/parse_filter.h"

enum { DEFAULT_MAX_MB = 128, MAX_MB = 1024 };

struct values {
	bool stream, jsonl, sse, thinking, strict;
	const char *tool_parser, *reasoning_parser, *tools, *tokenizer, *engine_finish;
	int64_t history, max_bytes;
};

#define AT(f) offsetof(struct values, f)
#define PARSERS "kimi_k2|none"

static const km_option options[] = {
	{ .kind = KM_OPT_HEADING, .help = "forms (default: one completion in, one object out)" },
	{ KM_OPT_FLAG, "stream", NULL, AT(stream),
	  "one completion in, a line for each delta out", 0, 0, NULL },
	{ KM_OPT_FLAG, "jsonl", NULL, AT(jsonl),
	  "a completion on each line in, a result on each line out", 0, 0, NULL },
	{ KM_OPT_FLAG, "sse", NULL, AT(sse),
	  "an engine's OpenAI stream in, a corrected chat stream out", 0, 0, NULL },
	{ .kind = KM_OPT_HEADING, .help = "parsing" },
	{ KM_OPT_CHOICE, "tool-call-parser", "NAME", AT(tool_parser),
	  "what finds tool calls", 0, 0, PARSERS },
	{ KM_OPT_CHOICE, "reasoning-parser", "NAME", AT(reasoning_parser),
	  "what finds reasoning", 0, 0, PARSERS },
	{ KM_OPT_STRING, "tools", "FILE", AT(tools),
	  "the declared tools, to name calls whose id has no name", 0, 0, NULL },
	{ KM_OPT_FLAG, "thinking", NULL, AT(thinking),
	  "the output starts inside a think block", 0, 0, NULL },
	{ KM_OPT_INT, "history-tool-calls", "N", AT(history),
	  "calls in the conversation so far", 0, 1e9, NULL },
	{ KM_OPT_CHOICE, "engine-finish", "REASON", AT(engine_finish),
	  "why the engine ended", 0, 0, "stop|length" },
	{ KM_OPT_STRING, "tokenizer", "DIR", AT(tokenizer),
	  "the checkpoint folder that \"ids\" are of (--jsonl)", 0, 0, NULL },
	{ .kind = KM_OPT_HEADING, .help = "checks" },
	{ KM_OPT_FLAG, "strict", NULL, AT(strict),
	  "say what was repaired or dropped, and exit with 3", 0, 0, NULL },
	{ KM_OPT_BYTES, "max-bytes", "SIZE", AT(max_bytes),
	  "longest line, event or completion (default 128M)", 1, (double)MAX_MB * (1 << 20), NULL },
};

static const km_usage usage = {
	.tool = "kimi-parse",
	.synopsis = "[OPTION]... [FILE]",
	.summary = "Separates the reasoning, the content and the tool calls of Kimi models' raw "
	           "output.",
	.options = options,
	.count = sizeof(options) / sizeof(*options),
	.max_operands = 1,
};

static int usage_error(const char *sentence)
{
	fprintf(stderr, "kimi-parse: %s\n", sentence);
	return 2;
}

static const char *conflict(const struct values *v)
{
	if (v->stream + v->jsonl + v->sse > 1)
		return "--stream, --jsonl and --sse exclude each other";
	if (v->tokenizer && !v->jsonl)
		return "--tokenizer is for the \"ids\" of --jsonl";
	if (v->engine_finish && v->sse)
		return "--engine-finish means nothing with --sse: the stream says how the engine "
		       "ended";
	if (v->max_bytes && v->stream)
		return "--max-bytes means nothing with --stream, which holds no completion";
	if (v->thinking && v->reasoning_parser && !strcmp(v->reasoning_parser, "none"))
		return "--thinking needs the reasoning parser";
	return NULL;
}

/* An array of tools, or an object (a request's body) that has one. */
static int read_tools(const char *path, json_t **root, const json_t **tools, km_err *err)
{
	json_error_t error;

	*root = json_load_file(path, JSON_DECODE_ANY, &error);
	if (!*root && error.line < 0)
		return km_fail(err, KM_EIO, "--tools: %s", error.text);
	if (!*root)
		return km_fail(err, KM_EFORMAT, "--tools %s: %s (line %d)", path, error.text,
		               error.line);
	*tools = json_is_array(*root) ? *root : json_object_get(*root, "tools");
	if (!json_is_array(*tools))
		return km_fail(
			err, KM_EFORMAT,
			"--tools %s: expected an array of tools, or an object with \"tools\"",
			path);
	return 0;
}

static int run(const struct values *v, km_parse_filter *filter, km_err *err)
{
	if (v->jsonl)
		return km_parse_filter_lines(filter, err);
	if (v->sse)
		return km_parse_filter_sse(filter, err);
	return v->stream ? km_parse_filter_stream(filter, err) : km_parse_filter_text(filter, err);
}

static int open_input(const char *path, int *fd, km_err *err)
{
	*fd = STDIN_FILENO;
	if (!path || !strcmp(path, "-"))
		return 0;
	*fd = open(path, O_RDONLY | O_CLOEXEC);
	if (*fd < 0)
		return km_fail(err, KM_EIO, "%s: %s", path, strerror(errno));
	return 0;
}

static int status_of(int rc, const km_parse_filter *filter, bool strict, const km_err *err)
{
	if (rc < 0 && rc != KM_ECANCELED) /* a reader that has gone needs no sentence */
		fprintf(stderr, "kimi-parse: %s\n", err->msg);
	if (rc < 0)
		return 1;
	if (filter->bad_lines) {
		fprintf(stderr, "kimi-parse: %zu line%s could not be read\n", filter->bad_lines,
		        filter->bad_lines == 1 ? "" : "s");
		return 1;
	}
	return strict && filter->repairs ? 3 : 0;
}

static void set_filter(const struct values *v, km_parse_filter *filter)
{
	km_parser_options *parser = &filter->defaults.parser;

	filter->out = STDOUT_FILENO;
	filter->notes = v->strict ? stderr : NULL;
	filter->max_bytes = v->max_bytes ? (size_t)v->max_bytes : (size_t)DEFAULT_MAX_MB << 20;
	filter->defaults.engine_finish = v->engine_finish ? v->engine_finish : "stop";
	parser->tools = !v->tool_parser || strcmp(v->tool_parser, "none");
	parser->reasoning = !v->reasoning_parser || strcmp(v->reasoning_parser, "none");
	parser->in_reasoning = v->thinking;
	parser->history_tool_calls = (int)v->history;
}

int main(int argc, char **argv)
{
	struct values v = { 0 };
	km_parse_filter filter = { 0 };
	km_tokenizer *tokenizer = NULL;
	json_t *root = NULL;
	km_err err;
	int operands, status, rc = km_option_parse(&usage, &v, argc, argv, &operands, &err);

	if (rc == KM_OPTION_DONE)
		return km_stdout_write(usage.tool, NULL) ? 0 : 1;
	if (rc < 0)
		return usage_error(err.msg);
	if (conflict(&v))
		return usage_error(conflict(&v));
	set_filter(&v, &filter);
	rc = v.tools ? read_tools(v.tools, &root, &filter.defaults.parser.declared_tools, &err) : 0;
	if (!rc && v.tokenizer)
		rc = km_tokenizer_open(&tokenizer, v.tokenizer, &err);
	filter.defaults.tokenizer = tokenizer;
	if (!rc)
		rc = open_input(operands ? argv[1] : NULL, &filter.in, &err);
	if (!rc)
		rc = run(&v, &filter, &err);
	status = status_of(rc, &filter, v.strict, &err);
	if (filter.in > STDIN_FILENO)
		close(filter.in);
	km_tokenizer_close(tokenizer);
	json_decref(root);
	return status;
}
