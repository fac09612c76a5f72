/* kimi-tune: searches the experts' kernel's tiles on this GPU, writes tuning files. See
 * man/kimi-tune.1. */
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/interrupt.h"
#include "base/mem.h"
#include "base/option.h"
#include "base/stdout.h"
#include "base/utf8.h"
#include "model/moe_search.h"

enum { MAX_COUNTS = 256, MAX_NAME = 100, EXIT_OK = 0, EXIT_FAILED, EXIT_USAGE, EXIT_CHECK };

struct values {
	int64_t experts, top_k, hidden, intermediate, group, tp, ep;
	double budget, allowed;
	const char *model, *tokens, *configs, *output, *check, *device, *dtype;
	bool resume, dry_run, explain, require, json, quiet;
};

#define AT(field) offsetof(struct values, field)

static const km_option options[] = {
	{ .kind = KM_OPT_HEADING, .help = "shape (default: Kimi K2.5's experts)" },
	{ KM_OPT_STRING, "model", "CONFIG", AT(model),
	  "take the shape from a config.json, or the folder of one", 0, 0, NULL },
	{ KM_OPT_INT, "tp-size,tp,tensor-parallel-size", "N", AT(tp),
	  "ranks of tensor parallelism (default 1)", 1, 1024, NULL },
	{ KM_OPT_INT, "ep-size,ep", "N", AT(ep),
	  "ranks among which experts are dealt out (default 1)", 1, 1024, NULL },
	{ KM_OPT_INT, "experts", "N", AT(experts), "routed experts of all ranks (default 384)", 1,
	  1024, NULL },
	{ KM_OPT_INT, "top-k", "N", AT(top_k), "experts of a token (default 8)", 1, 32, NULL },
	{ KM_OPT_INT, "hidden", "N", AT(hidden), "hidden size (default 7168)", 128, 65536, NULL },
	{ KM_OPT_INT, "intermediate", "N", AT(intermediate),
	  "an expert's intermediate size, of all ranks (default 2048)", 128, 65536, NULL },
	{ KM_OPT_INT, "group", "N", AT(group), "columns of one int4 scale (default 32)", 1, 4096,
	  NULL },
	{ KM_OPT_STRING, "tokens,batch-sizes,batch-size", "LIST", AT(tokens),
	  "token counts, with commas (default 18 from 1 to 4096)", 0, 0, NULL },
	{ .kind = KM_OPT_HEADING, .help = "what to do (default: tune)" },
	{ KM_OPT_FLAG, "dry-run", NULL, AT(dry_run),
	  "list the file and the candidates; needs no GPU", 0, 0, NULL },
	{ KM_OPT_FLAG, "explain", NULL, AT(explain),
	  "say which table and entry each token count gets; needs no GPU", 0, 0, NULL },
	{ KM_OPT_STRING, "check", "FILE", AT(check),
	  "time a table's entries again; exit with 3 when one is off", 0, 0, NULL },
	{ KM_OPT_NUMBER, "allow", "PERCENT", AT(allowed),
	  "how far --check lets an entry be off (default 10)", 0, 1000, NULL },
	{ KM_OPT_FLAG, "require-tuned", NULL, AT(require),
	  "--explain: exit with 3 where there is no table", 0, 0, NULL },
	{ .kind = KM_OPT_HEADING, .help = "tuning" },
	{ KM_OPT_NUMBER, "budget", "SECONDS", AT(budget),
	  "time for one token count, checks included (default 1)", 0.01, 86400, NULL },
	{ KM_OPT_FLAG, "resume", NULL, AT(resume), "keep the token counts that the file has", 0, 0,
	  NULL },
	{ KM_OPT_STRING, "configs,moe-config-dir", "DIR", AT(configs),
	  "the folder of tables (default: the one that kimi-serve reads)", 0, 0, NULL },
	{ KM_OPT_STRING, "output", "FILE", AT(output),
	  "write to FILE, not to its place under --configs", 0, 0, NULL },
	{ KM_OPT_STRING, "device", "NAME", AT(device),
	  "the device that --dry-run and --explain are about (default: this one, or an H100)", 0, 0,
	  NULL },
	{ .kind = KM_OPT_HEADING, .help = "output" },
	{ KM_OPT_FLAG, "json", NULL, AT(json), "JSON instead of a table", 0, 0, NULL },
	{ KM_OPT_FLAG, "quiet,q", NULL, AT(quiet), "no progress on stderr", 0, 0, NULL },
	{ .kind = KM_OPT_HEADING, .help = "accepted for other tuners' command lines" },
	{ .kind = KM_OPT_ACCEPTED, .names = "tune", .help = "tuning is what is done" },
	{ .kind = KM_OPT_ACCEPTED, .names = "disable-shared-experts-fusion",
	  .help = "the shared expert is never one of the routed" },
	{ KM_OPT_CHOICE, "dtype", "NAME", AT(dtype), "int4_w4a16 is all there is", 0, 0,
	  "auto|int4_w4a16" },
	{ .kind = KM_OPT_REFUSED, .names = "per-channel-quant",
	  .help = "int4 with one scale a channel runs in the general form, which has no tiles" },
	{ .kind = KM_OPT_REFUSED, .names = "search-space-file", .arg = "FILE",
	  .help = "what the kernel was built in is searched, all of it; see --dry-run" },
	{ .kind = KM_OPT_REFUSED, .names = "seed", .arg = "N",
	  .help = "the inputs are the same every time" },
};

static const km_usage usage = {
	.tool = "kimi-tune",
	.synopsis = "[--model CONFIG] [--tp-size N] [--ep-size N] [OPTION]...\n"
		    "--dry-run | --explain [OPTION]...\n"
		    "--check FILE [--allow PERCENT] [OPTION]...",
	.summary = "Finds the fastest tiles of the int4 experts' kernel on this GPU; writes a "
	           "tuning file.",
	.options = options,
	.count = sizeof(options) / sizeof(*options),
	.max_operands = 0,
};

static volatile sig_atomic_t interrupted;

static void on_signal(int signal)
{
	(void)signal;
	interrupted = 1;
}

static int usage_error(const char *sentence)
{
	fprintf(stderr, "kimi-tune: %s\n", sentence);
	return EXIT_USAGE;
}

static int parse_tokens(const char *list, int *tokens, int *count, km_err *err)
{
	for (*count = 0;; list++) {
		char *end;
		long n;

		errno = 0;
		n = strtol(list, &end, 10);
		if (end == list || errno || n < 1 || n > 65536 || (*end && *end != ','))
			return km_fail(
				err, KM_EINVAL,
				"--tokens: \"%.64s\" does not start with a count from 1 to 65536",
				list);
		if (*count == MAX_COUNTS)
			return km_fail(err, KM_EINVAL, "--tokens: more than %d counts", MAX_COUNTS);
		tokens[(*count)++] = (int)n;
		list = end;
		if (!*end)
			return 0;
	}
}

static bool is_text(const char *s)
{
	return !s || km_utf8_valid(s, strlen(s), NULL);
}

static const char *conflict(const struct values *v)
{
	if (v->dry_run + v->explain + (v->check != NULL) > 1)
		return "--dry-run, --explain and --check exclude each other";
	if (v->model && (v->experts || v->top_k || v->hidden || v->intermediate || v->group))
		return "--model gives the shape: --experts, --top-k, --hidden, --intermediate and "
		       "--group do not go with it";
	if (v->check && (v->tokens || v->resume || v->output))
		return "--check takes its token counts from the table and writes nothing";
	if (v->require && !v->explain)
		return "--require-tuned goes with --explain";
	if (v->allowed >= 0 && !v->check)
		return "--allow goes with --check";
	if (v->explain && v->json)
		return "--explain prints sentences, not JSON";
	if ((v->dry_run || v->explain) && v->resume)
		return "--resume goes with tuning";
	if (!is_text(v->device) || (v->device && strlen(v->device) > MAX_NAME))
		return "--device is a name of up to 100 bytes of UTF-8";
	if (v->json && !(is_text(v->output) && is_text(v->configs)))
		return "--json names the file, so --output and --configs are UTF-8 with it";
	return NULL;
}

static int make_shape(const struct values *v, km_moe_problem *p, km_err *err)
{
	km_config c = { .n_routed_experts = v->experts ? (int)v->experts : 384,
		        .num_experts_per_tok = v->top_k ? (int)v->top_k : 8,
		        .hidden_size = v->hidden ? (int)v->hidden : 7168,
		        .moe_intermediate_size = v->intermediate ? (int)v->intermediate : 2048,
		        .quant = { .method = KM_QUANT_INT4_PACKED,
		                   .group_size = v->group ? (int)v->group : 32 } };
	int tp = v->tp ? (int)v->tp : 1, ep = v->ep ? (int)v->ep : 1, rc;

	if (!v->model) {
		if (c.num_experts_per_tok > c.n_routed_experts)
			return km_fail(err, KM_EINVAL, "--top-k %d: there are %d experts",
			               c.num_experts_per_tok, c.n_routed_experts);
		return km_moe_tuning_shape(p, &c, tp, ep, err);
	}
	KM_TRY(km_config_load(&c, v->model, err));
	rc = km_moe_tuning_shape(p, &c, tp, ep, err);
	km_config_release(&c);
	return rc < 0 ? km_fail_within(err, "%s", v->model) : 0;
}

struct job {
	const struct values *v;
	km_moe_target target;
	char *root, *path;
	int tokens[MAX_COUNTS], count;
};

static km_moe_search search_of(struct job *j)
{
	return (km_moe_search){ .target = &j->target,
		                .path = j->path,
		                .tokens = j->tokens,
		                .count = j->count,
		                .budget_s = j->v->budget ? j->v->budget : 1,
		                .resume = j->v->resume,
		                .json = j->v->json,
		                .quiet = j->v->quiet,
		                .out = stdout,
		                .cancel = &interrupted };
}

static int check(struct job *j, km_err *err)
{
	double percent = j->v->allowed < 0 ? 10 : j->v->allowed;
	km_moe_search s = search_of(j);
	int off = 0, entries = 0;

	KM_TRY(km_moe_search_check(&s, j->v->check, percent / 100, &off, &entries, err));
	if (off)
		fprintf(stderr, "kimi-tune: %d of %d entries of %s are off by more than %.3g%%\n",
		        off, entries, j->v->check, percent);
	return off ? EXIT_CHECK : 0;
}

static void print(km_buf *out)
{
	fwrite(out->data ? out->data : "", 1, out->len, stdout); /* main says whether it arrived */
	km_buf_release(out);
}

static int explain(struct job *j, km_err *err)
{
	km_buf out = KM_BUF_INIT;
	km_moe_problem p = j->target.context.problem;
	km_moe_tuning tuning;
	int rc = km_moe_tuning_open(&tuning, j->root, &j->target.key, &j->target.context,
	                            j->v->require, err);

	if (rc >= 0)
		km_moe_target_describe(&j->target, j->path, &out);
	for (int i = 0; i < j->count && rc >= 0; i++) {
		km_moe_plan plan;

		p.tokens = j->tokens[i];
		rc = km_moe_tuning_plan(&plan, &tuning, &p, &j->target.context.device, NULL, err);
		km_buf_putc(&out, '\n');
		if (rc >= 0)
			km_moe_plan_explain(&plan, &p, &j->target.context.device, &out);
		km_moe_tuning_explain(&tuning, &p, &j->target.context.device, &out);
	}
	km_moe_tuning_release(&tuning);
	if (rc < 0)
		km_buf_clear(&out);
	print(&out);
	if (rc == KM_ENOTFOUND && j->v->require)
		fprintf(stderr, "kimi-tune: %s\n", err->msg);
	return rc == KM_ENOTFOUND && j->v->require ? EXIT_CHECK : rc;
}

static int dry_run(struct job *j, km_err *err)
{
	km_buf out = KM_BUF_INIT;
	int rc;

	if (!j->v->json)
		km_moe_target_describe(&j->target, j->path, &out);
	rc = km_moe_target_list(&j->target, j->tokens, j->count, j->v->json, &out, err);
	if (rc < 0)
		km_buf_clear(&out);
	print(&out);
	return rc;
}

static int run(struct job *j, km_err *err)
{
	const struct values *v = j->v;
	km_moe_search search;
	km_moe_problem p;

	KM_TRY(make_shape(v, &p, err));
	KM_TRY(km_moe_target_make(&j->target, &p, v->device, err));
	j->root = v->configs ? km_xstrdup(v->configs) : km_tune_own_root();
	j->path = v->output ? km_xstrdup(v->output) : km_tune_path(j->root, &j->target.key);
	if (v->dry_run || v->explain)
		return v->dry_run ? dry_run(j, err) : explain(j, err);
	km_interrupt_catch(on_signal);
	if (v->check)
		return check(j, err);
	search = search_of(j);
	return km_moe_search_run(&search, err);
}

int main(int argc, char **argv)
{
	static const int usual[] = { 1,  2,   4,   8,   16,   24,   32,   48,   64,
		                     96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096 };
	struct values v = { .allowed = -1 };
	struct job j = { .v = &v, .count = sizeof(usual) / sizeof(*usual) };
	int operands, rc;
	km_err err;

	rc = km_option_parse(&usage, &v, argc, argv, &operands, &err);
	if (rc == KM_OPTION_DONE)
		return km_stdout_write(usage.tool, NULL) ? EXIT_OK : EXIT_FAILED;
	if (rc < 0 || (v.tokens && parse_tokens(v.tokens, j.tokens, &j.count, &err) < 0))
		return usage_error(err.msg);
	if (conflict(&v))
		return usage_error(conflict(&v));
	if (!v.tokens)
		memcpy(j.tokens, usual, sizeof(usual));
	rc = run(&j, &err);
	if (rc < 0)
		fprintf(stderr, "kimi-tune: %s\n", err.msg);
	if (!km_stdout_write(usage.tool, NULL))
		rc = EXIT_FAILED;
	free(j.path);
	free(j.root);
	return rc < 0 ? EXIT_FAILED : rc;
}
