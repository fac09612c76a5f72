/* kimi-serve: answers OpenAI requests from a checkpoint. See man/kimi-serve.1. */
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/option.h"
#include "base/outfile.h"
#include "base/stdout.h"
#include "commit.h"
#include "device/cuda.h"
#include "engine/bench_one_batch.h"
#include "device/tune.h"
#include "wire/batch_lines.h"
#include "wire/serve.h"

enum { EXIT_OK, EXIT_FAILED, EXIT_USAGE };

struct options {
	const char *model, *name, *host, *api_key, *kv_dtype, *template, *tool_parser,
		*reasoning_parser;
	const char *sampling, *log_level, *isa, *device, *load_format, *expert_stats, *moe_configs;
	const char *bench;
	int64_t port, max_body, max_connections, context, running, queued, total_tokens, chunk,
		page, threads;
	int64_t stream_buffer, tp, pp, dp, ep, dcp, nodes;
	double memory, request_timeout, stream_timeout, keepalive, drain;
	bool batch, plan, explain, log_requests, no_prefix_cache, no_graphs, deterministic, quiet;
	bool rewrite_ids, require_tuned, json, skip_prefill;
	int64_t layers, shard_of;
};

#define AT(field) offsetof(struct options, field)
#define HEADING(text) { .kind = KM_OPT_HEADING, .help = text }
#define FLAG(name, field, text)                                                                    \
	{                                                                                          \
		.kind = KM_OPT_FLAG, .names = name, .offset = AT(field), .help = text              \
	}
#define STRING(name, what, field, text) \
	{ .kind = KM_OPT_STRING, .names = name, .arg = what, .offset = AT(field), .help = text }
#define CHOICE(name, what, field, these, text)                                                     \
	{                                                                                          \
		.kind = KM_OPT_CHOICE, .names = name, .arg = what, .offset = AT(field),            \
		.choices = these, .help = text                                                     \
	}
#define INT(name, field, low, high, text)                                                          \
	{                                                                                          \
		.kind = KM_OPT_INT, .names = name, .arg = "N", .offset = AT(field), .min = low,    \
		.max = high, .help = text                                                          \
	}
#define BYTES(name, field, low, high, text) \
	{ .kind = KM_OPT_BYTES, .names = name, .arg = "BYTES", .offset = AT(field), .min = low, \
	  .max = high, .help = text }
#define NUMBER(name, what, field, low, high, text) \
	{ .kind = KM_OPT_NUMBER, .names = name, .arg = what, .offset = AT(field), .min = low, \
	  .max = high, .help = text }
#define ACCEPTED(name, what, text)                                                                 \
	{                                                                                          \
		.kind = KM_OPT_ACCEPTED, .names = name, .arg = what, .help = text                  \
	}
#define REFUSED(name, what, text)                                                                  \
	{                                                                                          \
		.kind = KM_OPT_REFUSED, .names = name, .arg = what, .help = text                   \
	}

static const km_option table[] = {
	HEADING("What to do"),
	STRING("model-path,model", "DIR", model, "the checkpoint folder (needed)"),
	FLAG("batch", batch,
	     "answer OpenAI batch lines from stdin on stdout, as they finish, and exit"),
	FLAG("plan", plan, "print the memory plan and exit; 1 when it does not fit"),
	FLAG("explain", explain, "print every kernel choice and its reason, and exit"),
	STRING("bench-one-batch", "B,I,O[;...]", bench,
	       "time batches of B prompts of I random tokens, O generated each, by op, and exit"),

	HEADING("With --bench-one-batch"),
	INT("layers", layers, 1, 100000, "the first N layers, with random weights"),
	INT("shard-of", shard_of, 1, 1024,
	    "one of N tensor-parallel ranks' slice, with random weights; nothing is exchanged"),
	FLAG("skip-prefill", skip_prefill, "decode over a cache of random numbers"),
	FLAG("json", json, "for machines"),

	HEADING("Serving"),
	STRING("host", "HOST", host, "address to listen on (default 127.0.0.1)"),
	INT("port", port, 0, 65535, "port (default 30000; 0: any free one, see stdout)"),
	STRING("api-key", "KEY", api_key,
	       "ask for Authorization: Bearer KEY, but for /health and /metrics"),
	STRING("served-model-name", "NAME", name,
	       "the model's name in requests and answers (default DIR)"),
	STRING("expert-stats", "FILE", expert_stats,
	       "at the end, write how often each expert was chosen, as JSON"),
	FLAG("log-requests,enable-log-requests", log_requests, "a line on stderr for each request"),
	CHOICE("log-level", "LEVEL", log_level, "error|warning|info|debug",
	       "what is worth a line on stderr (default info)"),
	BYTES("max-body-size", max_body, 1024, 1e10, "largest request body (default 32M)"),
	INT("max-connections", max_connections, 1, 100000, "connections at a time (default 1000)"),
	NUMBER("request-timeout", "S", request_timeout, 0.1, 86400,
	       "seconds a client may take to send a request, or stay idle (default 30)"),
	NUMBER("stream-timeout", "S", stream_timeout, 0.1, 86400,
	       "seconds a client may leave its answer unread before it is cut off (default 60)"),
	BYTES("stream-buffer", stream_buffer, 65536, 1e10,
	      "unread events of a stream before it is cut off (default 16M)"),
	NUMBER("keepalive-interval,sse-ping-interval", "S", keepalive, 0.1, 86400,
	       "seconds of silence, from its first token on, before a stream gets a comment (default 15)"),
	NUMBER("drain-timeout,timeout-graceful-shutdown", "S", drain, 0, 86400,
	       "seconds to finish running requests after SIGTERM (default 30)"),

	HEADING("Chat"),
	CHOICE("chat-template", "NAME", template, "auto|k2|k2-compact|k2-thinking|k2.5",
	       "built-in template (default auto: the checkpoint's)"),
	CHOICE("tool-call-parser", "NAME", tool_parser, "auto|kimi_k2|none",
	       "tool calls from the answer's markers (default auto: with every Kimi template)"),
	CHOICE("reasoning-parser", "NAME", reasoning_parser, "auto|kimi_k2|none",
	       "reasoning apart from content (default auto: with templates that think)"),
	FLAG("rewrite-tool-call-ids", rewrite_ids,
	     "ids of earlier tool calls become functions.NAME:N, as the model wrote them"),
	CHOICE("sampling-defaults", "WHOSE", sampling, "model|openai",
	       "for what a request leaves out: generation_config.json's (default), or OpenAI's"),

	HEADING("Engine"),
	INT("context-length,max-model-len", context, 1, 1 << 30,
	    "tokens of a conversation (default: the model's)"),
	INT("max-running-requests,max-num-seqs", running, 1, 4096,
	    "sequences in a batch (default 32)"),
	INT("max-queued-requests", queued, 1, 1000000,
	    "waiting requests before 429 (default 1024)"),
	INT("max-total-tokens", total_tokens, 1, 1 << 30,
	    "tokens in the KV cache (default: from memory)"),
	NUMBER("mem-fraction-static,gpu-memory-utilization", "F", memory, 0.01, 1,
	       "share of available memory for weights and KV cache (default 0.8)"),
	INT("chunked-prefill-size", chunk, 1, 1 << 20,
	    "prompt tokens in a step at most (default 512)"),
	INT("page-size,block-size", page, 1, 4096, "tokens of a KV page (default 16)"),
	CHOICE("kv-cache-dtype", "TYPE", kv_dtype, "auto|bf16|bfloat16|fp8_e4m3|fp8|float32",
	       "KV cache's type (default auto: bf16)"),
	FLAG("disable-radix-cache,no-enable-prefix-caching", no_prefix_cache,
	     "reuse no prompt prefixes"),
	FLAG("enable-deterministic-inference,deterministic", deterministic,
	     "a request's tokens depend on nothing else: not on load, threads or processor"),
	CHOICE("device", "NAME", device, "auto|cuda|cpu",
	       "where to compute (default auto: a GPU when there is one, else the CPU)"),
	FLAG("disable-cuda-graph,enforce-eager", no_graphs,
	     "on a GPU, launch every step kernel by kernel; the tokens are the same"),
	STRING("moe-config-dir", "DIR", moe_configs,
	       "on a GPU, kimi-tune's tables (default: the installed ones)"),
	FLAG("require-tuned", require_tuned,
	     "on a GPU, refuse int4 experts that no table is for"),
	INT("threads", threads, 1, 4096, "threads to compute with (default: all processors)"),
	CHOICE("isa", "NAME", isa, "avx512|avx2|plain|portable",
	       "CPU kernels to use (default: the best that the processor has)"),
	FLAG("quiet,q", quiet, "no progress on stderr"),

	HEADING("Accepted for other engines' command lines"),
	INT("tp-size,tp,tensor-parallel-size", tp, 0, 100000, "1 is all there is"),
	INT("pp-size,pp,pipeline-parallel-size", pp, 0, 100000, "1 is all there is"),
	INT("dp-size,dp,data-parallel-size", dp, 0, 100000, "1 is all there is"),
	INT("ep-size,ep", ep, 0, 100000, "1 is all there is"),
	INT("dcp-size,decode-context-parallel-size", dcp, 0, 100000, "1 is all there is"),
	INT("nnodes", nodes, 0, 100000, "1 is all there is"),
	CHOICE("load-format", "NAME", load_format, "auto|safetensors|dummy",
	       "safetensors, or for --bench-one-batch dummy: random weights"),
	ACCEPTED("trust-remote-code", NULL, "no code is ever taken from a checkpoint"),
	ACCEPTED("enable-auto-tool-choice", NULL, "tool_choice auto always works"),
	ACCEPTED("enable-metrics", NULL, "/metrics is always there"),
	ACCEPTED("enable-cache-report", NULL, "cached tokens are always in usage"),
	ACCEPTED("enable-prefix-caching", NULL, "on unless --disable-radix-cache"),
	ACCEPTED("enable-chunked-prefill", NULL, "always on"),
	ACCEPTED("skip-server-warmup", NULL, "there is no warm-up"),
	ACCEPTED("disable-log-requests", NULL, "requests are logged only with --log-requests"),
	ACCEPTED("model-loader-extra-config", "JSON", "weights are mapped, or loaded by all threads"),

	REFUSED("quantization", "NAME",
	        "weights are used as the checkpoint has them; its config says how"),
	REFUSED("dtype", "NAME", "weights are used as the checkpoint has them"),
	REFUSED("max-prefill-tokens", "N",
	        "a step's prompt tokens are bounded by --chunked-prefill-size"),
	REFUSED("max-num-batched-tokens", "N",
	        "a step's prompt tokens are bounded by --chunked-prefill-size"),
	REFUSED("generation-config", "NAME", "use --sampling-defaults"),
	REFUSED("enable-dp-attention", NULL, "data-parallel attention is not built"),
	REFUSED("enable-expert-parallel", NULL, "expert parallelism is not built"),
	REFUSED("node-rank", "N", "serving over several machines is not built"),
	REFUSED("dist-init-addr", "ADDR", "serving over several machines is not built"),
	REFUSED("moe-a2a-backend", "NAME", "expert parallelism is not built"),
	REFUSED("moe-runner-backend", "NAME", "kernels are chosen by shape; see --explain"),
	REFUSED("attention-backend", "NAME", "kernels are chosen by shape; see --explain"),
	REFUSED("deepep-mode", "NAME", "expert parallelism is not built"),
	REFUSED("enable-eplb", NULL, "expert parallelism is not built"),
	REFUSED("cuda-graph-max-bs", "N", "graphs of up to 256 rows are captured"),
	REFUSED("speculative-algorithm", "NAME", "speculative decoding is not built"),
	REFUSED("speculative-num-steps", "N", "speculative decoding is not built"),
	REFUSED("speculative-eagle-topk", "N", "speculative decoding is not built"),
	REFUSED("speculative-num-draft-tokens", "N", "speculative decoding is not built"),
	REFUSED("speculative-draft-model-path", "DIR", "speculative decoding is not built"),
	REFUSED("speculative-config", "JSON", "speculative decoding is not built"),
	REFUSED("enable-lora", NULL, "LoRA adapters are not built"),
	REFUSED("lora-paths", "PATHS", "LoRA adapters are not built"),
	REFUSED("grammar-backend", "NAME", "constrained output is not built"),
	REFUSED("watchdog-timeout", "S", "there is no watchdog"),
	REFUSED("config", "FILE", "options come from the command line only"),
};

static const km_usage usage = {
	.tool = "kimi-serve",
	.synopsis = "--model-path DIR [OPTION]...\n--model-path DIR --batch [OPTION]... < IN.jsonl "
	            "> OUT.jsonl\n"
		    "--model-path DIR --plan | --explain\n"
		    "--model-path DIR|CONFIG --bench-one-batch B,I,O[;B,I,O]... [OPTION]...",
	.summary = "Answers OpenAI requests from a checkpoint, over HTTP or from a file.",
	.options = table,
	.count = sizeof(table) / sizeof(*table),
};

/* While the model opens, a signal ends the process; later the loops below see its count. */
static volatile sig_atomic_t signals, opening = 1;

static void on_signal(int signal)
{
	(void)signal;
	if (opening)
		_exit(EXIT_FAILED);
	signals++;
}

static void catch_signals(void)
{
	struct sigaction action = { .sa_handler = on_signal }, ignore = { .sa_handler = SIG_IGN };

	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGPIPE, &ignore, NULL);
}

static int count_signals(void *ctx)
{
	(void)ctx;
	return signals;
}

static bool was_signalled(void *ctx)
{
	return count_signals(ctx) > 0;
}

static int complain(const km_err *err)
{
	fprintf(stderr, "kimi-serve: %s\n", err->msg);
	return EXIT_FAILED;
}

static int print(km_buf *text)
{
	bool ok = km_stdout_write(usage.tool, text);

	km_buf_release(text);
	return ok ? EXIT_OK : EXIT_FAILED;
}

static enum km_kv_dtype kv_dtype(const char *name)
{
	if (!strncmp(name, "fp8", 3))
		return KM_KV_FP8;
	return strcmp(name, "float32") ? KM_KV_BF16 : KM_KV_F32;
}

static enum km_log_level log_level(const char *name)
{
	switch (*name) {
	case 'e': return KM_LOG_ERROR;
	case 'w': return KM_LOG_WARN;
	case 'd': return KM_LOG_DEBUG;
	}
	return KM_LOG_INFO;
}

static void engine_options(const struct options *o, km_engine_options *e)
{
	km_engine_options_init(e);
	e->model_dir = o->model;
	e->max_total_tokens = o->total_tokens;
	if (o->memory > 0)
		e->memory_fraction = o->memory;
	e->context_length = (int)o->context;
	if (o->running)
		e->max_running_requests = (int)o->running;
	if (o->batch) /* the lines wait in the input */
		e->max_queued_requests = INT_MAX;
	else if (o->queued)
		e->max_queued_requests = (int)o->queued;
	if (o->chunk)
		e->chunked_prefill_size = (int)o->chunk;
	if (o->page)
		e->page_size = (int)o->page;
	e->kv_dtype = kv_dtype(o->kv_dtype);
	e->disable_prefix_cache = o->no_prefix_cache;
	e->deterministic = o->deterministic;
	e->count_experts = o->expert_stats;
	e->threads = (int)o->threads;
	e->isa = o->isa;
	e->disable_graphs = o->no_graphs;
	e->require_tuned = o->require_tuned;
	e->quiet = o->quiet;
}

/* auto takes a GPU that can do it, and says so when there is one that cannot or none. */
static int choose_device(const struct options *o, km_engine_options *e, km_err *err)
{
	km_cuda_info info;
	km_err why;

	if (!strcmp(o->device, "cpu"))
		return 0;
	if (km_cuda_count(&why) > 0 && km_cuda_describe(0, &info, &why) >= 0) {
		if (info.capability >= 80) {
			e->backend = KM_BACKEND_CUDA;
			return 0;
		}
		km_fail(&why, KM_EUNSUPPORTED, "%s has compute capability %d.%d, 8.0 is needed", info.name,
		        info.capability / 10, info.capability % 10);
	}
	if (!strcmp(o->device, "cuda"))
		return km_fail(err, why.code, "--device cuda: %s", why.msg);
	if (o->require_tuned)
		return km_fail(err, KM_EUNSUPPORTED, "--require-tuned asks for a GPU's table: %s", why.msg);
	km_log(KM_LOG_INFO, "computing on the CPU: %s", why.msg);
	return 0;
}

/* Where tables are looked for; what is returned is the caller's, and kept by the options. A folder that
 * other engines' scripts name holds their tables, whose tiles are of other kernels. */
static char *find_tables(const struct options *o, km_engine_options *e)
{
	char *own = o->moe_configs ? NULL : km_tune_own_root();

	if (own && getenv("SGLANG_MOE_CONFIG_DIR"))
		km_log(KM_LOG_INFO, "SGLANG_MOE_CONFIG_DIR is not read: SGLang's tables are of Triton's "
		       "kernels; --moe-config-dir names a folder of kimi-tune's");
	e->moe_config_dir = own ? own : o->moe_configs;
	return own;
}

static int print_plan(const km_engine_options *options)
{
	km_buf text = KM_BUF_INIT;
	km_err err;
	int rc = km_engine_describe_plan(options, &text, &err);
	int status = print(&text);

	return rc < 0 ? complain(&err) : status;
}

static int print_explanation(const km_engine *engine)
{
	km_buf text = KM_BUF_INIT;

	km_engine_explain(engine, &text);
	return print(&text);
}

static int run_batch(const struct options *o, km_service *service)
{
	km_batch_options options = {
		.in = STDIN_FILENO, .out = stdout,
		.concurrency = o->running ? (int)o->running * 2 : 64,
		.max_line_bytes = (size_t)o->max_body, .quiet = o->quiet, .stop = was_signalled,
	};
	km_batch_result result;
	km_err err;

	if (km_batch_run(service, &options, &result, &err) < 0)
		return complain(&err);
	if (result.stopped)
		fprintf(stderr, "kimi-serve: stopped after %lld answers\n", (long long)result.done);
	else if (result.failed)
		fprintf(stderr, "kimi-serve: %lld of %lld requests failed\n",
		        (long long)result.failed, (long long)result.done);
	return result.stopped || result.failed ? EXIT_FAILED : EXIT_OK;
}

static int run_server(const struct options *o, km_service *service)
{
	km_serve_options options = {
		.host = o->host,
		.port = (int)o->port,
		.api_key = o->api_key,
		.max_body_bytes = o->max_body,
		.max_connections = (int)o->max_connections,
		.request_timeout_s = o->request_timeout,
		.stream_timeout_s = o->stream_timeout,
		.keepalive_s = o->keepalive,
		.log_requests = o->log_requests,
	};
	km_serve_until until = { .stop = count_signals, .drain_s = o->drain };
	km_buf line = KM_BUF_INIT;
	km_serve *serve;
	km_err err;
	int status;

	if (km_serve_open(&serve, service, &options, &err) < 0)
		return complain(&err);
	km_log(KM_LOG_INFO,
	       "%s: context %d, chat template %s, tool-call parser %s, reasoning parser %s",
	       service->options.names[0], km_engine_context_length(service->engine),
	       km_service_template_name(service), service->model.tool_parser ? "kimi_k2" : "none",
	       service->model.reasoning_parser ? "kimi_k2" : "none");
	if (!service->has_chat)
		km_log(KM_LOG_WARN, "chat requests are refused: %s", service->no_chat.msg);
	km_buf_printf(&line, strchr(o->host, ':') ? "http://[%s]:%d\n" : "http://%s:%d\n", o->host,
	              km_serve_port(serve));
	status = print(&line);
	if (status == EXIT_OK && km_serve_run(serve, &until, &err) < 0)
		status = complain(&err);
	km_serve_close(serve);
	return status;
}

/* Counts of the MoE layers; km_engine_expert_counts says what is counted. */
static int save_expert_stats(const char *path, const km_engine *engine)
{
	const km_config *c = km_engine_config(engine);
	const int64_t *counts;
	km_buf text = KM_BUF_INIT;
	km_err err;
	int rc;

	if (km_engine_expert_counts(engine, &counts, &err) < 0)
		return complain(&err);
	km_buf_printf(&text, "{\"n_routed_experts\":%d,\"num_experts_per_tok\":%d,\"layers\":[",
	              c->n_routed_experts, c->num_experts_per_tok);
	for (int l = 0; l < c->num_hidden_layers; l++, counts += c->n_routed_experts) {
		if (!km_config_is_moe_layer(c, l))
			continue;
		km_buf_printf(&text, "%s\n{\"layer\":%d,\"counts\":[",
		              text.data[text.len - 1] == '[' ? "" : ",", l);
		for (int e = 0; e < c->n_routed_experts; e++)
			km_buf_printf(&text, "%s%" PRId64, e ? "," : "", counts[e]);
		km_buf_puts(&text, "]}");
	}
	km_buf_puts(&text, "\n]}\n");
	rc = km_outfile_save(path, text.data, text.len, &err);
	km_buf_release(&text);
	return rc < 0 ? complain(&err) : EXIT_OK;
}

static bool has_random_weights(const struct options *o)
{
	return o->layers || o->shard_of || !strcmp(o->load_format, "dummy");
}

static int run_bench(const struct options *o, const km_engine_options *engine_opts)
{
	km_model_random random = { (int)o->layers, o->shard_of ? (int)o->shard_of : 1, 1 };
	km_bench_options options = {
		.model = o->model,
		.cases = o->bench,
		.random = has_random_weights(o) ? &random : NULL,
		.engine = engine_opts,
		.chunk = (int)o->chunk,
		.skip_prefill = o->skip_prefill,
		.commit = KM_COMMIT,
	};
	km_bench_report report;
	km_buf text = KM_BUF_INIT;
	km_err err;
	int status;

	if (km_bench_one_batch(&options, &report, &err) < 0) {
		status = complain(&err);
	} else {
		(o->json ? km_bench_report_json : km_bench_report_text)(&report, &text);
		status = print(&text);
	}
	km_bench_report_release(&report);
	return status;
}

static int run(const struct options *o, const km_engine_options *engine_opts)
{
	km_service_options options = {
		.model_dir = o->model,
		.names = &o->name,
		.name_count = 1,
		.chat_template = o->template,
		.rewrite_call_ids = o->rewrite_ids,
		.tool_parser = o->tool_parser,
		.reasoning_parser = o->reasoning_parser,
		.sampling_from_model = !strcmp(o->sampling, "model"),
		.stream_buffer_bytes = o->stream_buffer,
	};
	km_service service;
	km_engine *engine;
	km_err err;
	int status;

	if (o->expert_stats && km_outfile_check(o->expert_stats, &err) < 0)
		return complain(&err);
	if (km_engine_open(&engine, engine_opts, &err) < 0)
		return complain(&err);
	opening = 0;
	if (o->explain) {
		status = print_explanation(engine);
	} else if (km_service_init(&service, engine, &options, &err) < 0) {
		status = complain(&err);
	} else {
		status = o->batch ? run_batch(o, &service) : run_server(o, &service);
		km_service_release(&service);
		if (o->expert_stats && save_expert_stats(o->expert_stats, engine) != EXIT_OK)
			status = EXIT_FAILED;
	}
	km_engine_close(engine);
	return status;
}

static int check_bench(const struct options *o, km_err *err)
{
	km_bench_case *cases;
	int count, rc;

	if (!o->bench) {
		if (has_random_weights(o) || o->skip_prefill || o->json)
			return km_fail(err, KM_EINVAL,
			               "--layers, --shard-of, --skip-prefill, --json and --load-format dummy "
			               "go with --bench-one-batch");
		return 0;
	}
	rc = km_bench_parse(o->bench, &cases, &count, err);
	free(cases);
	return rc;
}

static int check(const struct options *o, km_err *err)
{
	if (!o->model)
		return km_fail(err, KM_EINVAL, "--model-path is needed; see 'kimi-serve --help'");
	if (o->tp != 1 || o->pp != 1 || o->dp != 1 || o->ep != 1 || o->dcp != 1 || o->nodes != 1)
		return km_fail(err, KM_EUNSUPPORTED,
		               "parallel sizes (--tp-size, --pp-size, --dp-size, --ep-size, "
		               "--dcp-size, --nnodes) other than 1 are not built");
	if (o->batch + o->plan + o->explain + (o->bench != NULL) > 1)
		return km_fail(err, KM_EINVAL,
		               "--batch, --plan, --explain and --bench-one-batch exclude each other");
	KM_TRY(check_bench(o, err));
	if (o->require_tuned && !strcmp(o->device, "cpu"))
		return km_fail(err, KM_EINVAL, "--require-tuned goes with a GPU: the CPU's experts have no table");
	if (o->api_key && !*o->api_key)
		return km_fail(err, KM_EINVAL, "--api-key is empty, which would be no key");
	if (o->expert_stats && (o->plan || o->explain || o->bench))
		return km_fail(err, KM_EINVAL, "--expert-stats counts what is served: it does not go with --plan, --explain "
		               "and --bench-one-batch");
	if (o->batch && o->queued)
		return km_fail(err, KM_EINVAL,
		               "--max-queued-requests is for serving; the lines of --batch wait in "
		               "the input");
	return 0;
}

int main(int argc, char **argv)
{
	struct options o = {
		.host = "127.0.0.1",
		.port = 30000,
		.kv_dtype = "auto",
		.device = "auto",
		.template = "auto",
		.tool_parser = "auto",
		.reasoning_parser = "auto",
		.sampling = "model",
		.load_format = "auto",
		.log_level = "info",
		.max_body = 32 << 20,
		.max_connections = 1000,
		.request_timeout = 30,
		.stream_timeout = 60,
		.stream_buffer = 16 << 20,
		.keepalive = 15,
		.drain = 30,
		.tp = 1,
		.pp = 1,
		.dp = 1,
		.ep = 1,
		.dcp = 1,
		.nodes = 1,
	};
	km_engine_options engine;
	char *tables;
	int operands, rc;
	km_err err;

	rc = km_option_parse(&usage, &o, argc, argv, &operands, &err);
	if (rc == KM_OPTION_DONE)
		return km_stdout_write(usage.tool, NULL) ? EXIT_OK : EXIT_FAILED;
	if (rc < 0 || check(&o, &err) < 0) {
		complain(&err);
		return EXIT_USAGE;
	}
	if (!o.name)
		o.name = o.model;
	catch_signals();
	km_log_set_level(log_level(o.log_level));
	engine_options(&o, &engine);
	if (choose_device(&o, &engine, &err) < 0)
		return complain(&err);
	tables = engine.backend == KM_BACKEND_CUDA ? find_tables(&o, &engine) : NULL;
	rc = o.plan ? print_plan(&engine) : o.bench ? run_bench(&o, &engine) : run(&o, &engine);
	free(tables);
	return rc;
}
