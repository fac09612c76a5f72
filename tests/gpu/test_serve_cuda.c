/*
 * kimi-serve's whole way on a GPU, with kimi-nano (tests/data/nano): its evaluation, as
 * tests/nano.bats has it for the CPU, with bf16 and fp8 KV, with graphs and without; then the HTTP
 * server under 2,000 requests of mixed lengths and kinds, 64 at a time, of which a third hang up.
 *
 * What must hold after the load: no page in use, the same greedy tokens as before it, no more
 * memory on either side than after its first quarter, and a stream that runs when the server is
 * told to stop is answered to its end. Answers with graphs and without are compared one at a time:
 * many at once, the requests' timing says how many rows a step has, and that which kernels round
 * how.
 *
 * Runs in the repository's root, and grades with jq. `test_serve_cuda short` asks few questions,
 * for runs under a sanitizer; `soak` is the load alone, of 18,000 requests, an hour of five a
 * second; `cpu` as first argument takes the CPU, to test this test.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda.h"
#include "support/fake_checkpoint.h"
#include "support/http_client.h"
#include "wire/batch_lines.h"
#include "wire/serve.h"

enum { AT_ONCE = 64, ROUNDS = 4, LOAD = 2000, SHORT_LOAD = 40, SOAK = 18000, LONGEST = 1200 };

/* Bytes that the process, and the device, may have gained between the load's first quarter and its
 * end. The allocator's arenas, one a thread, grow to their peaks at their own pace. */
static const long HOST_GROWTH = 24 << 20, DEVICE_GROWTH = 4 << 20;

static bool short_run, on_cpu;
static int load = LOAD; /* requests */
static char *folder; /* for requests, answers, grades */
static const char *const model_name[] = { "nano" };

/* ---- a server ---- */

struct server {
	km_engine *engine;
	km_service service;
	km_service_options options;
	km_serve *serve; /* NULL: only batches */
	int port;
};

static void open_server(struct server *s, enum km_kv_dtype kv_dtype, bool graphs)
{
	km_engine_options engine;
	km_err err;

	km_engine_options_init(&engine);
	engine.model_dir = "tests/data/nano";
	engine.context_length = 4096;
	engine.max_total_tokens = 65536;
	engine.max_running_requests = AT_ONCE;
	engine.backend = on_cpu ? KM_BACKEND_CPU : KM_BACKEND_CUDA;
	engine.kv_dtype = kv_dtype;
	engine.disable_graphs = !graphs;
	engine.count_experts = true;
	engine.quiet = true;
	*s = (struct server){ .engine = NULL };
	s->options = (km_service_options){
		.model_dir = engine.model_dir, .names = model_name, .name_count = 1,
		.chat_template = "auto", .tool_parser = "auto", .reasoning_parser = "auto",
		.sampling_from_model = true, .stream_buffer_bytes = 16 << 20,
	};
	if (km_engine_open(&s->engine, &engine, &err) < 0 ||
	    km_service_init(&s->service, s->engine, &s->options, &err) < 0)
		fail_msg("%s", err.msg);
}

static void listen_on(struct server *s)
{
	km_serve_options options = { .host = "127.0.0.1",
		                     .max_body_bytes = 1 << 20,
		                     .max_connections = 256,
		                     .request_timeout_s = 20,
		                     .stream_timeout_s = 20,
		                     .keepalive_s = 5 };
	km_err err;

	if (km_serve_open(&s->serve, &s->service, &options, &err) < 0)
		fail_msg("%s", err.msg);
	s->port = km_serve_port(s->serve);
}

static void close_server(struct server *s)
{
	if (s->serve)
		km_serve_close(s->serve);
	km_service_release(&s->service);
	km_engine_close(s->engine);
}

static void nothing_is_left(const struct server *s)
{
	km_engine_stats stats;

	for (int i = 0; i < 500; i++) {
		km_engine_stats_get(s->engine, &stats);
		if (!stats.running && !stats.waiting)
			break;
		usleep(10000);
	}
	assert_int_equal(stats.running + stats.waiting, 0);
	assert_int_equal(stats.pages_used, 0);
}

/* Every row of every layer but the last chose its experts, each layer as many, dense ones none. */
static void experts_are_counted(const struct server *s)
{
	const km_config *c = km_engine_config(s->engine);
	const int64_t *counts;
	int64_t first = 0;
	km_err err;

	assert_int_equal(km_engine_expert_counts(s->engine, &counts, &err), 0);
	assert_non_null(counts);
	for (int l = 0; l < c->num_hidden_layers; l++) {
		int64_t sum = 0;

		for (int e = 0; e < c->n_routed_experts; e++)
			sum += counts[l * c->n_routed_experts + e];
		assert_int_equal(sum % c->num_experts_per_tok, 0);
		assert_int_equal(sum > 0, km_config_is_moe_layer(c, l));
		first = first ? first : sum;
		if (sum && l < c->num_hidden_layers - 1)
			assert_int_equal(sum, first);
	}
}

/* ---- the evaluation ---- */

__attribute__((format(printf, 1, 2))) static int shell(const char *format, ...)
{
	va_list args;
	char command[4096];

	va_start(args, format);
	assert_in_range(vsnprintf(command, sizeof(command), format, args), 1, sizeof(command) - 1);
	va_end(args);
	return system(command);
}

static char *at(const char *name)
{
	return km_xasprintf("%s/%s", folder, name);
}

/* One line in `every`, from file to file, through the service. */
static int64_t ask(struct server *s, const char *requests, const char *answers, int at_once)
{
	char *from = at(requests), *to = at(answers);
	km_batch_options options = { .in = open(from, O_RDONLY | O_CLOEXEC),
		                     .out = fopen(to, "w"),
		                     .concurrency = at_once,
		                     .max_line_bytes = 1 << 20,
		                     .quiet = true };
	km_batch_result result;
	km_err err;

	assert_true(options.in >= 0 && options.out);
	if (km_batch_run(&s->service, &options, &result, &err) < 0)
		fail_msg("%s", err.msg);
	assert_int_equal(fclose(options.out), 0);
	close(options.in);
	free(from);
	free(to);
	assert_int_equal(result.failed, 0);
	return result.done;
}

static void choose_questions(const char *name, int every)
{
	assert_int_equal(shell("awk 'NR %% %d == 0' tests/eval/requests.jsonl >%s/%s", every,
	                       folder, name),
	                 0);
}

/* The bars of tests/nano.bats. */
static const char bars[] =
	"(.arithmetic | .right >= 0.95 * .asked) and (.tool | .called >= 0.97 * .asked and"
	" .right >= 0.95 * .asked) and (.[\"no-fit\"].called + .[\"no-need\"].called <="
	" 0.03 * (.[\"no-fit\"].asked + .[\"no-need\"].asked)) and"
	" (.result | .right >= 0.95 * .asked)";

static const char summary[] =
	"[to_entries[] | \"\\(.key) \\(.value.right) of \\(.value.asked) right\"] | join(\", \")";

static void grade(const char *what)
{
	assert_int_equal(shell("jq -n --slurpfile expected tests/eval/expected.jsonl --slurpfile "
	                       "requests tests/eval/requests.jsonl -f tests/eval/grade.jq "
	                       "%s/answers >%s/grades",
	                       folder, folder),
	                 0);
	assert_int_equal(shell("printf 'figure: kimi-nano, %s: '; jq -r '%s' %s/grades", what,
	                       summary, folder),
	                 0);
	if (shell("jq -e '%s' %s/grades >/dev/null", bars, folder)) {
		shell("cat %s/grades", folder);
		fail_msg("kimi-nano, %s: the evaluation does not pass", what);
	}
}

static void evaluate(enum km_kv_dtype kv_dtype, bool graphs, const char *what)
{
	struct server s;
	double start;
	int64_t asked;
	km_engine_stats stats;

	open_server(&s, kv_dtype, graphs);
	start = km_now_s();
	asked = ask(&s, "questions", "answers", 2 * AT_ONCE);
	start = km_now_s() - start;
	km_engine_stats_get(s.engine, &stats);
	print_message("figure: kimi-nano, %s: %lld questions in %.2f s, %.0f generated tokens/s, "
	              "%.0f steps/s; %.0f us a step in the model, %.0f of them launching, %.0f outside\n",
	              what, (long long)asked, start, (double)stats.generation_tokens / start,
	              (double)stats.steps / start,
	              (double)stats.forward_ns / 1e3 / (double)stats.steps,
	              (double)stats.launch_ns / 1e3 / (double)stats.steps,
	              (start * 1e6 - (double)stats.forward_ns / 1e3) / (double)stats.steps);
	nothing_is_left(&s);
	experts_are_counted(&s);
	close_server(&s);
	grade(what);
}

static void the_evaluation_passes(void **state)
{
	(void)state;
	choose_questions("questions", short_run ? 150 : 1);
	fflush(stdout);
	evaluate(KM_KV_BF16, true, "bf16 KV");
	if (short_run)
		return;
	evaluate(KM_KV_BF16, false, "bf16 KV, no graphs");
	evaluate(on_cpu ? KM_KV_BF16 : KM_KV_FP8, true, "fp8 KV");
}

static void answer_one_by_one(bool graphs, const char *name)
{
	struct server s;

	open_server(&s, KM_KV_BF16, graphs);
	ask(&s, "some", name, 1);
	close_server(&s);
	assert_int_equal(shell("jq -c '[.custom_id, .response.body.choices]' %s/%s | sort "
	                       ">%s/%s.sorted",
	                       folder, name, folder, name),
	                 0);
}

static void graphs_answer_the_same(void **state)
{
	(void)state;
	choose_questions("some", short_run ? 500 : 25);
	answer_one_by_one(true, "with");
	answer_one_by_one(false, "without");
	assert_int_equal(shell("cmp %s/with.sorted %s/without.sorted", folder, folder), 0);
	assert_int_equal(shell("test -s %s/with.sorted", folder), 0);
}

static const char score_filter[] =
	"{custom_id: \"\\(input_line_number)\", method: \"POST\", url: \"/v1/completions\","
	" body: {prompt: .ids, echo: true, logprobs: 0, max_tokens: 0}}";

static const char perplexity_filter[] =
	"[inputs | $docs[(.custom_id | tonumber) - 1] as $d |"
	" .response.body.choices[0].logprobs.token_logprobs as $lp |"
	" {n: ($d.predicted | length), bf16: $d.bf16, int4: -([$d.predicted[] | $lp[.]] | add)}] |"
	" (map(.n) | add) as $n |"
	" {n: $n, bf16: (map(.bf16) | add / $n | exp), int4: (map(.int4) | add / $n | exp)}";

static void perplexity_is_near_bf16s(void **state)
{
	struct server s;

	(void)state;
	assert_int_equal(shell("awk 'NR %% %d == 0' tests/eval/perplexity.jsonl >%s/documents && "
	                       "jq -c '%s' %s/documents >%s/scored",
	                       short_run ? 20 : 1, folder, score_filter, folder, folder),
	                 0);
	open_server(&s, KM_KV_BF16, true);
	ask(&s, "scored", "scores", AT_ONCE);
	nothing_is_left(&s);
	close_server(&s);
	assert_int_equal(shell("jq -n --slurpfile docs %s/documents '%s' %s/scores >%s/perplexity "
	                       "&& jq -r '\"figure: kimi-nano: perplexity of \\(.n) tokens: bf16 "
	                       "\\(.bf16), int4 here \\(.int4)\"' %s/perplexity",
	                       folder, perplexity_filter, folder, folder, folder),
	                 0);
	assert_int_equal(shell("jq -e '.n > 20 and .int4 / .bf16 < 1.02' %s/perplexity >/dev/null",
	                       folder),
	                 0);
}

/* ---- the load ---- */

struct load {
	struct server *s;
	atomic_int next;
	int end;
	atomic_int whole, hung_up, wrong;
	atomic_llong tokens;
};

static void add_prompt(km_buf *body, int i)
{
	static const int most[] = { 12, 100, 400, LONGEST };
	int length = 1 + (int)(km_rng_u64(31, (uint64_t)i) % (uint64_t)most[i % 4]);

	km_buf_puts(body, "{\"prompt\":[");
	for (int t = 0; t < length; t++) /* some share what they begin with */
		km_buf_printf(body, "%s%d", t ? "," : "",
		              (int)(km_rng_u64(32 + (uint64_t)(t < 64 ? i % 9 : i), (uint64_t)t) % 2000));
	km_buf_puts(body, "]");
}

/* Greedy and drawn, with selections, penalties, biases, log-probabilities, several samples. */
static void add_kind(km_buf *body, int i)
{
	static const char *const kinds[] = {
		"\"temperature\":0",
		"\"temperature\":0.9",
		"\"temperature\":0.8,\"top_p\":0.9,\"seed\":7",
		"\"temperature\":1,\"top_k\":20,\"min_p\":0.05",
		"\"temperature\":0,\"frequency_penalty\":0.5,\"presence_penalty\":0.25",
		"\"temperature\":0.7,\"logit_bias\":{\"65\":4,\"66\":-100}",
		"\"temperature\":0,\"logprobs\":3",
		"\"temperature\":1,\"n\":2,\"repetition_penalty\":1.1",
	};

	km_buf_printf(body, ",\"ignore_eos\":true,%s",
	              kinds[km_rng_u64(33, (uint64_t)i) % (sizeof(kinds) / sizeof(*kinds))]);
}

static int tokens_of(int i)
{
	return 1 + (int)(km_rng_u64(34, (uint64_t)i) % 48);
}

static void hang_up(struct load *l, int i)
{
	km_buf body = KM_BUF_INIT;
	char some[512];
	int fd;

	add_prompt(&body, i);
	add_kind(&body, i);
	km_buf_printf(&body, ",\"max_tokens\":300%s}", i % 2 ? "" : ",\"stream\":true");
	fd = http_start(l->s->port, body.data);
	if (i % 2) /* leaves while it waits, or in the queue */
		usleep((useconds_t)(km_rng_u64(35, (uint64_t)i) % 20000));
	else
		for (int reads = 0; reads <= i % 7; reads++)
			if (recv(fd, some, sizeof(some), 0) <= 0)
				break;
	close(fd);
	km_buf_release(&body);
	l->hung_up++;
}

/* Whole answers say how many tokens they have, and streams end with [DONE]. */
static void stay(struct load *l, int i)
{
	km_buf body = KM_BUF_INIT, out = KM_BUF_INIT;
	bool stream = i % 3 == 1;
	char want[64];

	add_prompt(&body, i);
	add_kind(&body, i);
	km_buf_printf(&body, ",\"max_tokens\":%d%s}", tokens_of(i), stream ? ",\"stream\":true" : "");
	snprintf(want, sizeof(want), "\"completion_tokens\":%d",
	         tokens_of(i) * (strstr(body.data, "\"n\":2") ? 2 : 1));
	if (http_ask(l->s->port, "POST", "/v1/completions", body.data, &out) != 200 ||
	    !strstr(out.data, stream ? "data: [DONE]" : want)) {
		l->wrong++;
		fprintf(stderr, "request %d: %.200s: %.400s\n", i, body.data, out.data);
	}
	l->whole++;
	l->tokens += tokens_of(i);
	km_buf_release(&body);
	km_buf_release(&out);
}

static void *client_main(void *ctx)
{
	struct load *l = ctx;
	int i;

	while ((i = l->next++) < l->end) {
		if (i % 3 == 0)
			hang_up(l, i);
		else
			stay(l, i);
	}
	return NULL;
}

static void run_round(struct load *l, int requests)
{
	pthread_t threads[AT_ONCE];

	l->end += requests;
	atomic_store(&l->next, l->end - requests);
	for (int i = 0; i < AT_ONCE; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, client_main, l), 0);
	for (int i = 0; i < AT_ONCE; i++)
		pthread_join(threads[i], NULL);
	nothing_is_left(l->s);
}

static void greedy_answer(struct server *s, km_buf *out)
{
	json_t *json;

	assert_int_equal(http_ask(s->port, "POST", "/v1/completions",
	                          "{\"prompt\":\"A long day at the market\",\"temperature\":0,"
	                          "\"max_tokens\":64,\"ignore_eos\":true,\"logprobs\":0}",
	                          out),
	                 200);
	json = json_loadb(out->data, out->len, 0, NULL);
	km_buf_clear(out);
	km_buf_puts(out, json_string_value(json_object_get(
				 json_array_get(json_object_get(json, "choices"), 0), "text")));
	json_decref(json);
}

static long host_bytes(void)
{
	FILE *f = fopen("/proc/self/statm", "r");
	long all, resident = 0;

	assert_non_null(f);
	assert_int_equal(fscanf(f, "%ld %ld", &all, &resident), 2);
	fclose(f);
	return resident * sysconf(_SC_PAGESIZE);
}

static long device_bytes(void)
{
	size_t bytes = 0;

	if (!on_cpu)
		assert_int_equal(km_cuda_free_bytes(0, &bytes, NULL), 0);
	return -(long)bytes;
}

static void the_metrics_say_so(struct server *s)
{
	km_buf out = KM_BUF_INIT;

	assert_int_equal(http_ask(s->port, "GET", "/metrics", "", &out), 200);
	assert_non_null(strstr(out.data, "kimi:num_requests_running{model_name=\"nano\"} 0\n"));
	assert_non_null(strstr(out.data, "kimi:num_requests_waiting{model_name=\"nano\"} 0\n"));
	assert_non_null(strstr(out.data, "state=\"used\"} 0\n"));
	km_buf_release(&out);
}

/* ---- the end ---- */

struct stream {
	int port;
	atomic_bool begun;
	bool done;
};

static void *stream_main(void *ctx)
{
	struct stream *s = ctx;
	km_buf out = KM_BUF_INIT;
	char some[4096];
	ssize_t n;
	int fd = http_start(s->port, "{\"prompt\":\"I go on\",\"max_tokens\":300,\"stream\":true,"
	                             "\"ignore_eos\":true}");

	while ((n = recv(fd, some, sizeof(some), 0)) > 0) {
		km_buf_append(&out, some, (size_t)n);
		s->begun = strstr((km_buf_putc(&out, '\0'), out.data), "data: ") != NULL;
		out.len--;
		if (strstr(out.data, "data: [DONE]"))
			s->done = true;
		if (s->done)
			break;
	}
	close(fd);
	s->begun = true;
	km_buf_release(&out);
	return NULL;
}

static int stop_now(void *ctx)
{
	(void)ctx;
	return 1;
}

/* A stream that has begun is answered to its end; then nobody is let in. */
static void stops_gracefully(struct server *s)
{
	struct stream stream = { .port = s->port };
	km_serve_until until = { .stop = stop_now, .drain_s = 20 };
	pthread_t thread;
	km_err err;
	int fd;

	assert_int_equal(pthread_create(&thread, NULL, stream_main, &stream), 0);
	while (!stream.begun)
		usleep(1000);
	if (km_serve_run(s->serve, &until, &err) < 0)
		fail_msg("%s", err.msg);
	pthread_join(thread, NULL);
	assert_true(stream.done);
	fd = http_dial(s->port);
	if (fd >= 0)
		close(fd);
	assert_true(fd < 0);
}

static void a_load_leaves_nothing_behind(void **state)
{
	struct server s;
	struct load l = { .s = &s };
	km_buf before = KM_BUF_INIT, after = KM_BUF_INIT;
	km_engine_stats stats;
	long host = 0, device = 0;
	double start;

	(void)state;
	open_server(&s, KM_KV_BF16, true);
	listen_on(&s);
	greedy_answer(&s, &before);
	start = km_now_s();
	for (int i = 0; i < ROUNDS; i++) {
		run_round(&l, load / ROUNDS);
		if (i == 0) {
			host = host_bytes();
			device = device_bytes();
		}
	}
	start = km_now_s() - start;
	host = host_bytes() - host;
	device = device_bytes() - device;
	km_engine_stats_get(s.engine, &stats);
	print_message("figure: server: %d requests answered, %d hung up, %.1f s, %.0f requests/s, "
	              "%.0f generated tokens/s, %lld steps, %lld preempted; memory after the first "
	              "quarter: host %+.1f MB, device %+.1f MB\n",
	              l.whole, l.hung_up, start, (l.whole + l.hung_up) / start,
	              (double)stats.generation_tokens / start, (long long)stats.steps,
	              (long long)stats.preemptions, (double)host / 1e6, (double)device / 1e6);
	assert_int_equal(l.wrong, 0);
	assert_true(l.whole + l.hung_up == load && l.hung_up);
	greedy_answer(&s, &after);
	assert_true(before.len > 0);
	assert_string_equal(before.data, after.data);
	the_metrics_say_so(&s);
	if (!short_run)
		assert_true(host <= HOST_GROWTH && device <= DEVICE_GROWTH);
	stops_gracefully(&s);
	close_server(&s);
	km_buf_release(&before);
	km_buf_release(&after);
}

static int make_folder(void **state)
{
	(void)state;
	folder = temp_dir();
	return 0;
}

static int remove_folder(void **state)
{
	(void)state;
	remove_dir(folder);
	return 0;
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest all[] = {
		cmocka_unit_test(the_evaluation_passes),
		cmocka_unit_test(graphs_answer_the_same),
		cmocka_unit_test(perplexity_is_near_bf16s),
		cmocka_unit_test(a_load_leaves_nothing_behind),
	};
	km_err err;

	on_cpu = argc > 1 && !strcmp(argv[1], "cpu");
	short_run = argc > 1 && !strcmp(argv[argc - 1], "short");
	load = short_run ? SHORT_LOAD : LOAD;
	if (argc > 1 && !strcmp(argv[argc - 1], "soak")) {
		load = SOAK;
		cmocka_set_test_filter("a_load_leaves_nothing_behind");
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!on_cpu && !km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	if (system("command -v jq >/dev/null")) {
		printf("skip: there is no jq to grade answers with\n");
		return 0;
	}
	return cmocka_run_group_tests(all, make_folder, remove_folder);
}
