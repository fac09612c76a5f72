/*
 * Speed of the output parser and of kimi-parse's filters, one thread:
 *
 *   bench_parser            the parser alone (text, calls, tokens) and the JSONL filter, in memory
 *
 * Each figure is the best of five rounds, in CPU time, over a synthetic log. The log's text has
 * newlines and quotes to escape about every 40 bytes, as prose with code has; "wide" is Chinese.
 * Delta cost is per event of a stream of 4-byte tokens, with the JSON of the delta written.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/rng.h"
#include "text/parser.h"
#include "wire/json_fast.h"
#include "wire/parse_filter.h"
#include "wire/parse_json.h"

enum { TOTAL = 64 << 20, ROUNDS = 5 };

static const char prose[] =
	"The quick brown fox jumps over the lazy dog. Here is \"quoted\" text, and code:\n"
	"\tif (a < b) return a->x;\n";
static const char wide[] =
	"\u6708\u4e4b\u6697\u9762\u662f\u4e00\u5bb6\u516c\u53f8\uff0c\u5b83\u7684\u6a21"
	"\u578b\u53eb\u505a Kimi\u3002\n";
static const char call[] =
	"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
	"<|tool_call_argument_begin|>{\"city\": \"Paris\", \"days\": 3, \"note\": \"a \\\"b\\\" "
        "c\"}"
	"<|tool_call_end|><|tool_call_begin|>functions.search:1<|tool_call_argument_begin|>"
	"{\"query\": \"weather in Paris this weekend\", \"limit\": 10}<|tool_call_end|>"
	"<|tool_calls_section_end|>";

/* Of this process: what other processes do to the clock on the wall is left out. */
static double cpu_seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void count_event(void *ctx, const km_parser_event *event)
{
	*(size_t *)ctx += event->len;
}

static void report(const char *what, size_t bytes, double seconds)
{
	printf("%-44s %8.0f MB/s\n", what, (double)bytes / seconds * 1e-6);
}

static void bench_parser(const char *what, const char *unit, size_t piece)
{
	km_buf text = KM_BUF_INIT;
	double best = 1e9;
	size_t out = 0;

	while (text.len < TOTAL)
		km_buf_puts(&text, unit);
	for (int round = 0; round < ROUNDS; round++) {
		km_parser_options options = {
			.tools = true, .reasoning = true, .on_event = count_event, .ctx = &out
		};
		km_parser *parser = km_parser_new(&options);
		double start = cpu_seconds();

		for (size_t at = 0; at < text.len; at += piece)
			km_parser_bytes(parser, text.data + at,
			                text.len - at < piece ? text.len - at : piece);
		km_parser_finish(parser);
		km_parser_free(parser);
		if (cpu_seconds() - start < best)
			best = cpu_seconds() - start;
	}
	report(what, text.len, best);
	km_buf_release(&text);
}

/* A file of lines, each `repeat` units long with every 50th line ended by a call. */
static int write_log(const char *unit, int repeat, const char *tail)
{
	char path[] = "/tmp/bench_parser.XXXXXX";
	int fd = mkstemp(path);
	km_message message;
	km_buf line = KM_BUF_INIT, text = KM_BUF_INIT;
	size_t written = 0;

	km_message_init(&message);
	unlink(path);
	for (uint64_t i = 0; fd >= 0 && written < TOTAL; i++) {
		km_buf_clear(&line);
		km_buf_clear(&text);
		for (uint64_t k = 0; k <= km_rng_u64(1, i) % (uint64_t)repeat; k++)
			km_buf_puts(&text, unit);
		if (tail && i % 50 == 0)
			km_buf_puts(&text, tail);
		km_buf_puts(&line, "{\"text\":");
		km_json_fast_write(&line, text.data, text.len);
		km_buf_puts(&line, "}\n");
		if (write(fd, line.data, line.len) != (ssize_t)line.len)
			break;
		written += line.len;
	}
	km_buf_release(&line);
	km_buf_release(&text);
	return fd;
}

static void bench_lines(const char *what, const char *unit, int repeat, const char *tail)
{
	int fd = write_log(unit, repeat, tail);
	off_t bytes = lseek(fd, 0, SEEK_END);
	double best = 1e9;

	for (int round = 0; round < ROUNDS && fd >= 0; round++) {
		km_parse_filter filter = {
			.in = fd,
			.out = open("/dev/null", O_WRONLY),
			.max_bytes = 128 << 20,
			.defaults = { { .tools = true, .reasoning = true }, "stop", NULL }
		};
		double start = cpu_seconds();
		km_err err;

		lseek(fd, 0, SEEK_SET);
		if (km_parse_filter_lines(&filter, &err) < 0)
			printf("%s\n", err.msg);
		close(filter.out);
		if (cpu_seconds() - start < best)
			best = cpu_seconds() - start;
	}
	close(fd);
	report(what, (size_t)bytes, best);
}

struct deltas {
	km_buf out;
	size_t count;
};

static void write_delta(void *ctx, const km_parser_event *event)
{
	struct deltas *d = ctx;

	km_buf_clear(&d->out);
	km_parse_json_delta(&d->out, event);
	d->count++;
}

static void bench_deltas(const char *what, const char *unit)
{
	struct deltas d = { KM_BUF_INIT, 0 };
	km_parser_options options = {
		.tools = true, .reasoning = true, .on_event = write_delta, .ctx = &d
	};
	double best = 1e9;

	for (int round = 0; round < ROUNDS; round++) {
		km_parser *parser = km_parser_new(&options);
		double start = cpu_seconds();
		int tokens = 1000000;

		for (int i = 0, at = 0; i < tokens; i++, at = (at + 4) % (int)(strlen(unit) - 4))
			km_parser_text(parser, unit + at, 4);
		km_parser_finish(parser);
		km_parser_free(parser);
		if ((cpu_seconds() - start) / tokens < best)
			best = (cpu_seconds() - start) / tokens;
	}
	printf("%-44s %8.0f ns\n", what, best * 1e9);
	km_buf_release(&d.out);
}

int main(void)
{
	bench_parser("parser, prose, one piece", prose, SIZE_MAX / 2);
	bench_parser("parser, prose, 4 bytes a push", prose, 4);
	bench_parser("parser, calls, one piece", call, SIZE_MAX / 2);
	bench_parser("parser, calls, 1 byte a push", call, 1);
	bench_lines("--jsonl, prose, rare calls", prose, 60, call);
	bench_lines("--jsonl, wide text, rare calls", wide, 60, call);
	bench_lines("--jsonl, calls", call, 4, NULL);
	bench_deltas("a token to its delta's JSON, text", prose);
	bench_deltas("a token to its delta's JSON, wide text", wide);
	return 0;
}
