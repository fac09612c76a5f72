/* kimi-convert: describes, verifies, makes and repacks checkpoints. See man/kimi-convert.1. */
#include <inttypes.h>
#include <jansson.h>
#include <omp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/interrupt.h"
#include "base/option.h"
#include "base/stdout.h"
#include "model/inspect.h"
#include "model/repack.h"
#include "model/synthesize.h"
#include "model/verify.h"

enum { EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CHECK };

struct options {
	const char *inspect, *verify, *synthesize, *repack, *unpack;
	int64_t seed, layers, shard_size, threads, max_problems;
	bool quiet, json;
};

#define AT(field) offsetof(struct options, field)

static const km_option table[] = {
	{ .kind = KM_OPT_HEADING, .help = "What to do (one of)" },
	{ .kind = KM_OPT_STRING, .names = "inspect", .arg = "DIR", .offset = AT(inspect),
	  .help = "say what a checkpoint (or a config.json alone) is" },
	{ .kind = KM_OPT_STRING, .names = "verify", .arg = "DIR", .offset = AT(verify),
	  .help = "read all of a checkpoint and list what is wrong; exit status 3 if anything is" },
	{ .kind = KM_OPT_STRING, .names = "synthesize", .arg = "CONFIG.json",
	  .offset = AT(synthesize),
	  .help = "make a checkpoint with random weights in the folder OUT" },
	{ .kind = KM_OPT_STRING, .names = "repack", .arg = "DIR", .offset = AT(repack),
	  .help = "write DIR to the folder OUT with its int4 experts in the GPU's layout" },
	{ .kind = KM_OPT_STRING, .names = "unpack", .arg = "DIR", .offset = AT(unpack),
	  .help = "undo --repack: write the files that there were before to the folder OUT" },
	{ .kind = KM_OPT_HEADING, .help = "For --inspect and --verify" },
	{ .kind = KM_OPT_FLAG, .names = "json", .offset = AT(json), .help = "print JSON" },
	{ .kind = KM_OPT_INT, .names = "max-problems", .arg = "N", .offset = AT(max_problems),
	  .help = "list at most N problems (default 50); all are counted", .min = 1,
	  .max = 1000000 },
	{ .kind = KM_OPT_HEADING, .help = "For --synthesize" },
	{ .kind = KM_OPT_INT, .names = "seed", .arg = "S", .offset = AT(seed),
	  .help = "the same seed makes the same bytes (default 0)", .min = 0,
	  .max = 9007199254740992.0 },
	{ .kind = KM_OPT_INT, .names = "layers", .arg = "N", .offset = AT(layers),
	  .help = "only the first N layers", .min = 1, .max = 4096 },
	{ .kind = KM_OPT_BYTES, .names = "shard-size", .arg = "BYTES", .offset = AT(shard_size),
	  .help = "largest shard (default 5 GB, more where that makes over 64 shards)", .min = 1,
	  .max = 1e15 },
	{ .kind = KM_OPT_HEADING, .help = "Always" },
	{ .kind = KM_OPT_INT, .names = "threads", .arg = "N", .offset = AT(threads),
	  .help = "threads to use (default: all processors)", .min = 1, .max = 4096 },
	{ .kind = KM_OPT_FLAG, .names = "quiet,q", .offset = AT(quiet),
	  .help = "no progress on stderr" },
};

static const km_usage usage = {
	.tool = "kimi-convert",
	.synopsis = "--inspect DIR [--json]\n"
	            "--verify DIR [--json]\n"
	            "--synthesize CONFIG.json OUT [--seed S] [--layers N]\n"
	            "--repack DIR OUT\n"
	            "--unpack DIR OUT",
	.summary = "Describes, verifies, makes and repacks checkpoints.",
	.options = table,
	.count = sizeof(table) / sizeof(*table),
	.max_operands = 1,
};

static volatile sig_atomic_t interrupted;

static void on_signal(int signal)
{
	(void)signal;
	interrupted = 1;
}

static int complain(const km_err *err)
{
	fprintf(stderr, "kimi-convert: %s\n", err->msg);
	return EXIT_FAILED;
}

static int inspect(const struct options *o)
{
	km_buf out = KM_BUF_INIT;
	km_err err;
	bool ok;

	if (km_inspect(o->inspect, o->json, (int)o->max_problems, &out, &err) < 0)
		return complain(&err);
	ok = km_stdout_write(usage.tool, &out);
	km_buf_release(&out);
	return ok ? EXIT_OK : EXIT_FAILED;
}

static void print_verdict_json(const km_findings *f, const km_verify_result *r)
{
	json_t *problems = json_array(), *doc;
	char *text;

	for (int i = 0; i < f->kept; i++)
		json_array_append_new(problems, json_string(f->items[i].sentence));
	doc = json_pack("{s:b,s:i,s:I,s:I,s:I,s:I,s:o}", "ok", f->count == 0, "files", r->files,
	                "tensors", (json_int_t)r->tensors, "bytes", (json_int_t)r->bytes,
	                "index_total_size", (json_int_t)r->index_total_size, "problem_count",
	                (json_int_t)f->count, "problems", problems);
	text = json_dumps(doc, JSON_INDENT(2));
	puts(text);
	free(text);
	json_decref(doc);
}

static void print_verdict(const struct options *o, const km_findings *f, const km_verify_result *r)
{
	if (r->index_total_size >= 0 && r->index_total_size != r->bytes)
		fprintf(stderr,
		        "note: the index says %" PRId64 " bytes, the files hold %" PRId64 "\n",
		        r->index_total_size, r->bytes);
	for (int i = 0; i < f->kept; i++)
		printf("%s\n", f->items[i].sentence);
	if (f->count > f->kept)
		printf("and %" PRId64 " more problems\n", f->count - f->kept);
	if (!f->count)
		printf("%s: good: %" PRId64 " tensors, %" PRId64 " bytes in %d file%s, all read\n",
		       o->verify, r->tensors, r->bytes, r->files, r->files == 1 ? "" : "s");
}

static int verify(const struct options *o)
{
	km_verify_options options = { .dir = o->verify, .quiet = o->quiet, .cancel = &interrupted };
	km_verify_result result = { 0 };
	km_findings findings;
	km_err err;
	int status;

	km_interrupt_catch(on_signal);
	km_findings_init(&findings, (int)o->max_problems);
	if (km_verify(&options, &findings, &result, &err) < 0) {
		status = complain(&err);
	} else {
		status = findings.count ? EXIT_CHECK : EXIT_OK;
		if (o->json)
			print_verdict_json(&findings, &result);
		else
			print_verdict(o, &findings, &result);
		if (!km_stdout_write(usage.tool, NULL))
			status = EXIT_FAILED;
	}
	km_findings_release(&findings);
	return status;
}

static int synthesize(const struct options *o, const char *out)
{
	km_synth_options options = { .config_path = o->synthesize,
		                     .out_dir = out,
		                     .seed = (uint64_t)o->seed,
		                     .layers = (int)o->layers,
		                     .shard_bytes = o->shard_size,
		                     .quiet = o->quiet,
		                     .cancel = &interrupted };
	km_synth_result result;
	double start = km_now_s();
	km_err err;

	km_interrupt_catch(on_signal);
	if (km_synthesize(&options, &result, &err) < 0)
		return complain(&err);
	if (!o->quiet)
		fprintf(stderr, "%s: %" PRId64 " tensors, %.2f GB in %d file%s, %.1f s\n", out,
		        result.tensors, (double)result.bytes / 1e9, result.shards,
		        result.shards == 1 ? "" : "s", km_now_s() - start);
	return EXIT_OK;
}

static int repack(const struct options *o, const char *out)
{
	km_repack_options options = { .dir = o->repack ? o->repack : o->unpack, .out_dir = out,
		                      .quiet = o->quiet, .cancel = &interrupted };
	km_repack_result r;
	double start = km_now_s(), seconds;
	km_err err;

	km_interrupt_catch(on_signal);
	if ((o->repack ? km_repack : km_unpack)(&options, &r, &err) < 0)
		return complain(&err);
	seconds = km_now_s() - start;
	if (!o->quiet)
		fprintf(stderr,
		        "%s: %" PRId64
		        " expert tensors %s, %.2f GB in %d file%s, %.1f s, %.2f GB/s\n",
		        out, r.experts, o->repack ? "repacked" : "unpacked", (double)r.bytes / 1e9,
		        r.files, r.files == 1 ? "" : "s", seconds, (double)r.bytes / 1e9 / seconds);
	return EXIT_OK;
}

static int usage_error(const char *why)
{
	fprintf(stderr, "kimi-convert: %s; see 'kimi-convert --help'\n", why);
	return EXIT_USAGE;
}

int main(int argc, char **argv)
{
	struct options o = { 0 };
	int operands, jobs, outs, rc;
	km_err err;

	rc = km_option_parse(&usage, &o, argc, argv, &operands, &err);
	if (rc == KM_OPTION_DONE)
		return km_stdout_write(usage.tool, NULL) ? EXIT_OK : EXIT_FAILED;
	if (rc < 0) {
		complain(&err);
		return EXIT_USAGE;
	}
	outs = (o.synthesize != NULL) + (o.repack != NULL) + (o.unpack != NULL);
	jobs = (o.inspect != NULL) + (o.verify != NULL) + outs;
	if (jobs != 1)
		return usage_error("one of --inspect, --verify, --synthesize, --repack and "
		                   "--unpack is needed");
	if (operands != outs)
		return usage_error(outs ? "the folder OUT is needed" : "an operand too many");
	if (!o.synthesize && (o.seed || o.layers || o.shard_size))
		return usage_error("--seed, --layers and --shard-size go with --synthesize only");
	if (outs && (o.json || o.max_problems))
		return usage_error("--json and --max-problems go with --inspect and --verify only");
	if (!o.max_problems)
		o.max_problems = 50;
	if (o.threads)
		omp_set_num_threads((int)o.threads);
	if (o.inspect || o.verify)
		return o.inspect ? inspect(&o) : verify(&o);
	return o.synthesize ? synthesize(&o, argv[1]) : repack(&o, argv[1]);
}
