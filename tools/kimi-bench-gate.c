/* kimi-bench-gate: how fast the router and its gate are, against the roofline. See man/kimi-bench-gate.1. */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/err.h"
#include "base/mem.h"
#include "base/option.h"
#include "base/outfile.h"
#include "base/stdout.h"
#include "model/config.h"
#include "model/router.h"
#include "model/router_report.h"

#include "commit.h"

enum { MAX_COUNTS = 256, MAX_TOKENS = 100000 };

struct values {
	int64_t experts, top_k, hidden, groups, topk_group, block;
	const char *tokens, *model, *scoring, *weights, *plot, *baseline, *max_regression;
	bool json, csv, no_overlap, tune, explain, quiet;
};

#define AT(field) offsetof(struct values, field)

static const km_option options[] = {
	{ .kind = KM_OPT_HEADING, .help = "shape (default: Kimi K2's)" },
	{ KM_OPT_STRING, "model", "CONFIG", AT(model), "take the shape from a config.json, or the folder of one", 0, 0, NULL },
	{ KM_OPT_INT, "experts", "N", AT(experts), "routed experts (default 384)", 1, 1024, NULL },
	{ KM_OPT_INT, "top-k", "N", AT(top_k), "experts of a token (default 8)", 1, 32, NULL },
	{ KM_OPT_INT, "hidden", "N", AT(hidden), "hidden size (default 7168)", 8, 65536, NULL },
	{ KM_OPT_INT, "groups", "N", AT(groups), "expert groups (default 1)", 1, 32, NULL },
	{ KM_OPT_INT, "topk-group", "N", AT(topk_group), "groups of a token (default: all)", 1, 32, NULL },
	{ KM_OPT_CHOICE, "scoring", "NAME", AT(scoring), "how logits become scores (default sigmoid)", 0, 0, "sigmoid|softmax" },
	{ KM_OPT_CHOICE, "weights", "TYPE", AT(weights), "the router's weights (default bf16)", 0, 0, "bf16|f32" },
	{ KM_OPT_INT, "block", "N", AT(block), "the alignment's block (default 8)", 1, 1024, NULL },
	{ KM_OPT_STRING, "tokens", "LIST", AT(tokens), "token counts, with commas (default 1 to 40000; on a CPU 1 to 256)", 0, 0, NULL },
	{ .kind = KM_OPT_HEADING, .help = "measuring" },
	{ KM_OPT_FLAG, "no-overlap", NULL, AT(no_overlap), "launches wait for their predecessors to end", 0, 0, NULL },
	{ KM_OPT_FLAG, "explain", NULL, AT(explain), "say which kernels would run, and why; time nothing", 0, 0, NULL },
	{ KM_OPT_FLAG, "tune", NULL, AT(tune), "measure where forms overtake each other; print the plans' table", 0, 0, NULL },
	{ .kind = KM_OPT_HEADING, .help = "output" },
	{ KM_OPT_FLAG, "json", NULL, AT(json), "JSON instead of a table", 0, 0, NULL },
	{ KM_OPT_FLAG, "csv", NULL, AT(csv), "CSV instead of a table", 0, 0, NULL },
	{ KM_OPT_STRING, "plot", "FILE", AT(plot), "draw time over tokens into an SVG file", 0, 0, NULL },
	{ KM_OPT_STRING, "baseline", "FILE", AT(baseline), "compare with an earlier --json", 0, 0, NULL },
	{ KM_OPT_STRING, "max-regression", "PERCENT", AT(max_regression), "exit with 3 when slower than the baseline by more", 0, 0, NULL },
	{ KM_OPT_FLAG, "quiet", NULL, AT(quiet), "no progress", 0, 0, NULL },
};

static const km_usage usage = {
	.tool = "kimi-bench-gate",
	.synopsis = "[OPTION]...",
	.summary = "Times the router, the gate and the alignment at each token count, against the roofline.",
	.options = options,
	.count = sizeof(options) / sizeof(*options),
	.max_operands = 0,
};

static int usage_error(const char *sentence)
{
	fprintf(stderr, "kimi-bench-gate: %s\n", sentence);
	return 2;
}

static int parse_tokens(const char *list, int *tokens, int *count, km_err *err)
{
	for (*count = 0;; list++) {
		char *end;
		long n;

		errno = 0;
		n = strtol(list, &end, 10);
		if (end == list || errno || n < 1 || n > MAX_TOKENS || (*end && *end != ','))
			return km_fail(err, KM_EINVAL, "--tokens: \"%s\" does not start with a count from 1 to %d",
			               list, MAX_TOKENS);
		if (*count == MAX_COUNTS)
			return km_fail(err, KM_EINVAL, "--tokens: more than %d counts", MAX_COUNTS);
		tokens[(*count)++] = (int)n;
		list = end;
		if (!*end)
			return 0;
	}
}

static int parse_percent(const char *s, double *fraction, km_err *err)
{
	char *end;

	*fraction = strtod(s, &end) / 100;
	if (end == s || (*end && strcmp(end, "%")) || !(*fraction >= 0 && *fraction <= 10))
		return km_fail(err, KM_EINVAL, "--max-regression: expected a percentage such as 3%%, got \"%s\"", s);
	return 0;
}

static int shape_of_model(km_router_shape *s, const char *path, km_err *err)
{
	km_config config;

	KM_TRY(km_config_load(&config, path, err));
	s->experts = config.n_routed_experts;
	s->top_k = config.num_experts_per_tok;
	s->hidden = config.hidden_size;
	s->groups = config.n_group;
	s->topk_group = config.topk_group;
	s->softmax = config.scoring_softmax;
	s->renormalize = config.norm_topk_prob;
	s->scale = (float)config.routed_scaling_factor;
	km_config_release(&config);
	return 0;
}

static int make_shape(km_router_shape *s, const struct values *v, km_err *err)
{
	const km_router_device any = { .capability = 90, .multiprocessors = 132 };
	km_router_plan plan;

	*s = (km_router_shape){ .tokens = 1, .experts = 384, .hidden = 7168, .top_k = 8, .groups = 1,
		                .topk_group = 1, .block = 8, .renormalize = true, .scale = 2.827f };
	if (v->model)
		KM_TRY(shape_of_model(s, v->model, err));
	s->experts = v->experts ? (int)v->experts : s->experts;
	s->top_k = v->top_k ? (int)v->top_k : s->top_k;
	s->hidden = v->hidden ? (int)v->hidden : s->hidden;
	if (v->groups) {
		s->groups = (int)v->groups;
		s->topk_group = s->groups;
	}
	s->topk_group = v->topk_group ? (int)v->topk_group : s->topk_group;
	s->block = v->block ? (int)v->block : s->block;
	s->softmax = v->scoring ? !strcmp(v->scoring, "softmax") : s->softmax;
	s->weights_f32 = v->weights && !strcmp(v->weights, "f32");
	return km_router_plan_make(&plan, s, &any, err); /* refuses what nothing takes */
}

/* The plans of a GPU: this machine's, or an H100 where there is none. */
static int explain(const km_router_bench_options *o, km_buf *out, km_err *err)
{
	km_router_device device = { .capability = 90, .multiprocessors = 132, .blas = true, .pdl = o->overlap };
	km_cuda_info info;

	if (km_cuda_count(NULL)) {
		KM_TRY(km_cuda_describe(0, &info, err));
		device.capability = info.capability;
		device.multiprocessors = info.multiprocessors;
		device.pdl = o->overlap && info.capability >= 90;
		km_buf_printf(out, "for %s:\n\n", info.name);
	} else {
		km_buf_puts(out, "there is no GPU; for an H100 with cuBLASLt:\n\n");
	}
	for (int i = 0; i < o->token_count; i++) {
		km_router_shape s = o->shape;
		km_router_plan plan;

		s.tokens = o->tokens[i];
		KM_TRY(km_router_plan_make(&plan, &s, &device, err));
		km_router_plan_explain(&plan, &s, &device, out);
		km_buf_putc(out, '\n');
	}
	return 0;
}

static void say(const km_buf *lines)
{
	if (lines->len)
		fputs(lines->data, stderr);
}

static int draw(const km_router_bench_report *report, const char *path, km_err *err)
{
	km_buf svg = KM_BUF_INIT;
	int rc;

	km_router_report_svg(report, &svg);
	rc = km_outfile_save(path, svg.data, svg.len, err);
	km_buf_release(&svg);
	return rc;
}

/* What can be wrong with the baseline and the plot's file is known before anything is timed. */
static int check_files(const struct values *v, km_router_bench_report *report, km_err *err)
{
	km_buf missing = KM_BUF_INIT;
	int rc = v->baseline ? km_router_report_compare(report, v->baseline, &missing, err) : 0;

	if (rc == 0 && v->max_regression)
		say(&missing);
	km_buf_release(&missing);
	return rc == 0 && v->plot ? km_outfile_check(v->plot, err) : rc;
}

static int report_times(const struct values *v, const km_router_bench_report *report, double allowed, km_buf *out,
                        km_err *err)
{
	km_buf slower = KM_BUF_INIT;
	int rc = 0;

	if (v->json)
		km_router_report_json(report, KM_COMMIT, out);
	else if (v->csv)
		km_router_report_csv(report, out);
	else
		km_router_report_table(report, out);
	if (v->max_regression && km_router_report_regressions(report, allowed, &slower))
		rc = 3;
	say(&slower);
	km_buf_release(&slower);
	if (v->plot && draw(report, v->plot, err) < 0) { /* the times are printed all the same */
		fprintf(stderr, "kimi-bench-gate: %s\n", err->msg);
		rc = 1;
	}
	return rc;
}

static int bench(const struct values *v, const km_router_bench_options *o, double allowed, km_buf *out,
                 km_err *err)
{
	km_router_bench_report report;
	int rc;

	if (!km_cuda_count(err))
		fprintf(stderr, "kimi-bench-gate: %s; timing the CPU's forms\n", err->msg);
	KM_TRY(km_router_bench_open(&report, o, err));
	rc = check_files(v, &report, err);
	if (rc == 0)
		rc = km_router_bench_run(&report, o, err);
	if (rc == 0)
		rc = report_times(v, &report, allowed, out, err);
	km_router_bench_release(&report);
	return rc;
}

static bool has_shape(const struct values *v)
{
	return v->model || v->experts || v->top_k || v->hidden || v->groups || v->topk_group || v->scoring || v->weights ||
	       v->block;
}

static const char *conflict(const struct values *v)
{
	if (v->json && v->csv)
		return "--json and --csv exclude each other";
	if (v->max_regression && !v->baseline)
		return "--max-regression needs --baseline";
	if (v->tune && (v->explain || v->json || v->csv || v->plot || v->baseline || v->tokens || v->no_overlap ||
	                has_shape(v)))
		return "--tune takes its shapes and token counts by itself, and prints a table of its own";
	if (v->explain && (v->json || v->csv || v->plot || v->baseline))
		return "--explain times nothing: --json, --csv, --plot and --baseline mean nothing with it";
	return NULL;
}

int main(int argc, char **argv)
{
	static const int gpu_tokens[] = { 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 40000 };
	static const int cpu_tokens[] = { 1, 4, 16, 64, 256 };
	bool gpu = km_cuda_count(NULL) > 0;
	int tokens[MAX_COUNTS], operands, rc;
	km_router_bench_options o = { .tokens = gpu ? gpu_tokens : cpu_tokens, .token_count = gpu ? 16 : 5 };
	struct values v = { 0 };
	km_buf out = KM_BUF_INIT;
	double allowed = 0;
	km_err err;

	rc = km_option_parse(&usage, &v, argc, argv, &operands, &err);
	if (rc == KM_OPTION_DONE)
		return km_stdout_write(usage.tool, NULL) ? 0 : 1;
	if (rc < 0)
		return usage_error(err.msg);
	if (conflict(&v))
		return usage_error(conflict(&v));
	if (v.max_regression && parse_percent(v.max_regression, &allowed, &err) < 0)
		return usage_error(err.msg);
	if (v.tokens) {
		if (parse_tokens(v.tokens, tokens, &o.token_count, &err) < 0)
			return usage_error(err.msg);
		o.tokens = tokens;
	}
	o.overlap = !v.no_overlap;
	o.quiet = v.quiet;
	rc = make_shape(&o.shape, &v, &err);
	if (rc == 0)
		rc = v.tune      ? km_router_bench_tune(&o, &out, &err)
		     : v.explain ? explain(&o, &out, &err)
		                 : bench(&v, &o, allowed, &out, &err);
	if (rc < 0)
		fprintf(stderr, "kimi-bench-gate: %s\n", err.msg);
	if (rc >= 0 && !km_stdout_write(usage.tool, &out))
		rc = 1;
	km_buf_release(&out);
	return rc < 0 ? 1 : rc;
}
