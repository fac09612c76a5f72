#include "engine/bench_one_batch.h"

#include <errno.h>
#include <limits.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "model/shard.h"

enum { CHUNK = 8192, WARM_STEPS = 3 };

/* ---- cases ---- */

static int parse_case(const char *text, const char **rest, km_bench_case *c, km_err *err)
{
	int *const field[] = { &c->batch, &c->input, &c->output };
	int length = (int)strcspn(text, ";");
	const char *at = text;

	for (int i = 0; i < 3; i++) {
		char *end;
		long value;

		errno = 0;
		value = strtol(at, &end, 10);
		if (end == at || *at < '0' || *at > '9' || errno || value < 1 || value > 1 << 24 ||
		    (i < 2 ? *end != ',' : *end && *end != ';'))
			return km_fail(err, KM_EINVAL,
			               "--bench-one-batch: '%.*s' is not BATCH,INPUT,OUTPUT, three "
			               "numbers from 1 to %d",
			               length, text, 1 << 24);
		*field[i] = (int)value;
		at = end + (i < 2);
	}
	*rest = *at ? at + 1 : at;
	return 0;
}

int km_bench_parse(const char *cases, km_bench_case **list, int *count, km_err *err)
{
	km_bench_case *all = NULL;

	*list = NULL;
	*count = 0;
	do {
		km_bench_case c;

		if (parse_case(cases, &cases, &c, err) < 0) {
			free(all);
			*count = 0;
			return err->code;
		}
		all = km_xreallocarray(all, (size_t)*count + 1, sizeof(*all));
		all[(*count)++] = c;
	} while (*cases);
	*list = all;
	return 0;
}

/* ---- one batch ---- */

/* A sequence's pages lie one after the other; a step's arrays are refilled for each step. */
struct run {
	km_model *model;
	km_bench_case shape;
	int chunk, page_size, pages_per_seq, vocab;
	int32_t *pages;                           /* [batch, pages_per_seq] */
	int32_t *ids, *positions, *slots;         /* [rows] */
	int32_t *seq_start, *kv_len, *logit_row;  /* [batch + 1], [batch], [batch] */
	km_draw *draw; /* [batch], greedy; NULL: the model does not draw */
	int32_t *drawn; /* [batch] */
	km_batch step;
	const float *logits;
};

static int larger(int a, int b)
{
	return a > b ? a : b;
}

static void run_init(struct run *r, const km_bench_case *shape)
{
	int rows = larger(r->chunk, shape->batch), batch = shape->batch;

	r->shape = *shape;
	r->pages_per_seq = (shape->input + shape->output + r->page_size - 1) / r->page_size;
	r->pages = km_xcalloc((size_t)batch * (size_t)r->pages_per_seq, sizeof(int32_t));
	for (int i = 0; i < batch * r->pages_per_seq; i++)
		r->pages[i] = i;
	r->ids = km_xcalloc((size_t)rows, sizeof(int32_t));
	r->positions = km_xcalloc((size_t)rows, sizeof(int32_t));
	r->slots = km_xcalloc((size_t)rows, sizeof(int32_t));
	r->seq_start = km_xcalloc((size_t)batch + 1, sizeof(int32_t));
	r->kv_len = km_xcalloc((size_t)batch, sizeof(int32_t));
	r->logit_row = km_xcalloc((size_t)batch, sizeof(int32_t));
	r->drawn = km_xcalloc((size_t)batch, sizeof(int32_t));
	if (!km_model_draws(r->model))
		return;
	r->draw = km_xcalloc((size_t)batch, sizeof(*r->draw));
	for (int i = 0; i < batch; i++)
		r->draw[i] = (km_draw){ .top_p = 1, .repetition = 1, .by_device = 1 };
}

static void run_release(struct run *r)
{
	free(r->pages);
	free(r->ids);
	free(r->positions);
	free(r->slots);
	free(r->seq_start);
	free(r->kv_len);
	free(r->logit_row);
	free(r->draw);
	free(r->drawn);
}

static void clear_step(struct run *r, int first_seq)
{
	r->step = (km_batch){
		.ids = r->ids,
		.positions = r->positions,
		.slots = r->slots,
		.seq_start = r->seq_start,
		.kv_len = r->kv_len,
		.pages = r->pages + (size_t)first_seq * (size_t)r->pages_per_seq,
		.pages_per_seq = r->pages_per_seq,
		.page_size = r->page_size,
		.logit_row = r->logit_row,
		.draw = r->draw,
		.drawn = r->draw ? r->drawn : NULL,
	};
	for (int i = 0; i < r->shape.batch; i++)
		r->drawn[i] = KM_DRAWN_BY_HOST;
	r->seq_start[0] = 0;
}

static void add_row(struct run *r, int seq, int position, int32_t id)
{
	int row = r->step.tokens++;

	r->ids[row] = id;
	r->positions[row] = position;
	r->slots[row] = seq * r->pages_per_seq * r->page_size + position;
}

/* The next rows of prompts, from token *done of *seq on. */
static void make_prefill(struct run *r, int *seq, int *done)
{
	clear_step(r, *seq);
	while (*seq < r->shape.batch && r->step.tokens < r->chunk) {
		int here = r->step.seqs++;

		while (*done < r->shape.input && r->step.tokens < r->chunk) {
			uint64_t at = (uint64_t)*seq * (uint64_t)r->shape.input + (uint64_t)*done;

			add_row(r, *seq, *done, (int32_t)(km_rng_u64(1, at) % (uint64_t)r->vocab));
			(*done)++;
		}
		r->seq_start[here + 1] = r->step.tokens;
		r->kv_len[here] = *done;
		if (*done < r->shape.input)
			return;
		r->logit_row[r->step.logit_rows++] = r->step.tokens - 1;
		*done = 0;
		(*seq)++;
	}
}

static int32_t best_token(const float *logits, int vocab)
{
	int best = 0;

	for (int i = 1; i < vocab; i++)
		if (logits[i] > logits[best])
			best = i;
	return best;
}

static int forward(struct run *r, km_err *err)
{
	return km_model_forward(r->model, &r->step, &r->logits, err);
}

/* Each sequence's next token at `position`: the best of its last logits, or a random one without any. */
static void make_decode(struct run *r, int position, const int32_t *tokens)
{
	clear_step(r, 0);
	for (int s = 0; s < r->shape.batch; s++) {
		add_row(r, s, position, tokens[s]);
		r->seq_start[s + 1] = s + 1;
		r->kv_len[s] = position + 1;
		r->logit_row[s] = s;
	}
	r->step.seqs = r->step.decode_seqs = r->step.logit_rows = r->shape.batch;
}

static void choose(const struct run *r, int32_t *tokens)
{
	for (int i = 0; i < r->step.logit_rows; i++)
		tokens[i] = r->drawn[i] != KM_DRAWN_BY_HOST
		                    ? r->drawn[i]
		                    : best_token(r->logits + (size_t)i * (size_t)r->vocab, r->vocab);
}

static int prefill(struct run *r, int most_steps, int32_t *tokens, int *steps, km_err *err)
{
	int seq = 0, done = 0, known = 0;

	for (*steps = 0; seq < r->shape.batch && *steps < most_steps; (*steps)++) {
		make_prefill(r, &seq, &done);
		KM_TRY(forward(r, err));
		choose(r, tokens + known);
		known += r->step.logit_rows;
	}
	return 0;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* OUTPUT - 1 steps; their median time. */
static int decode(struct run *r, int32_t *tokens, km_bench_result *result, km_err *err)
{
	int steps = r->shape.output - 1;
	double *seconds = km_xcalloc((size_t)steps + 1, sizeof(*seconds));
	int rc = 0;

	for (int i = 0; rc >= 0 && i < steps; i++) {
		double start = km_now_s();

		make_decode(r, r->shape.input + i, tokens);
		rc = forward(r, err);
		if (rc < 0)
			break;
		choose(r, tokens);
		seconds[i] = km_now_s() - start;
		result->total_s += seconds[i];
	}
	qsort(seconds, (size_t)steps, sizeof(*seconds), ascending);
	result->decode_steps = steps;
	result->decode_s = steps ? seconds[steps / 2] : 0;
	free(seconds);
	return rc;
}

static int warm_up(struct run *r, const km_bench_options *o, int32_t *tokens, km_err *err)
{
	int steps, prompts = o->engine->backend == KM_BACKEND_CUDA ? 2 : 1;

	/* On a GPU the second step of a number of rows captures its graphs. */
	for (int i = 0; i < prompts && !o->skip_prefill; i++)
		KM_TRY(prefill(r, 1, tokens, &steps, err));
	for (int i = 0; i < WARM_STEPS && r->shape.output > 1; i++) {
		make_decode(r, r->shape.input, tokens);
		KM_TRY(forward(r, err));
	}
	return 0;
}

static int measure_prefill(struct run *r, int32_t *tokens, km_bench_result *result, km_err *err)
{
	double start = km_now_s();

	KM_TRY(prefill(r, INT_MAX, tokens, &result->prefill_steps, err));
	result->prefill_s = result->total_s = km_now_s() - start;
	result->prefill_rows = r->step.tokens;
	result->prefill_context = r->kv_len[r->step.seqs - 1];
	return km_model_profile(r->model, &r->step, &result->prefill, err);
}

static int measure(struct run *r, const km_bench_options *o, km_bench_result *result, km_err *err)
{
	int32_t *tokens = km_xcalloc((size_t)r->shape.batch, sizeof(*tokens));
	int rc = o->skip_prefill ? km_model_fill_cache(r->model, 1, err) : 0;

	for (int s = 0; s < r->shape.batch; s++)
		tokens[s] = (int32_t)(km_rng_u64(2, (uint64_t)s) % (uint64_t)r->vocab);
	result->shape = r->shape;
	if (rc >= 0)
		rc = warm_up(r, o, tokens, err);
	if (rc >= 0 && !o->skip_prefill)
		rc = measure_prefill(r, tokens, result, err);
	if (rc >= 0)
		rc = decode(r, tokens, result, err);
	if (rc >= 0 && result->decode_steps) {
		result->decode_context = r->kv_len[0];
		rc = km_model_profile(r->model, &r->step, &result->decode, err);
	}
	free(tokens);
	return rc;
}

/* ---- all ---- */

static int64_t slots_of(const km_bench_case *c, int page)
{
	return (int64_t)c->batch * ((c->input + c->output + page - 1) / page) * page;
}

/* Room for the largest of all cases. */
static int model_options(const km_bench_options *o, const km_bench_case *cases, int count,
                         km_model_options *m, km_err *err)
{
	const km_engine_options *e = o->engine;
	int chunk = o->chunk ? o->chunk : CHUNK, most_prompt = 1;

	*m = (km_model_options){
		.kv_dtype = e->kv_dtype,
		.threads = e->threads,
		.isa = e->isa,
		.backend = e->backend,
		.gpu = e->gpu,
		.page_size = e->page_size,
		.disable_graphs = e->disable_graphs,
		.moe_config_dir = e->moe_config_dir,
		.require_tuned = e->require_tuned,
		.quiet = e->quiet,
	};
	for (int i = 0; i < count; i++) {
		const km_bench_case *c = &cases[i];
		int64_t slots = slots_of(c, e->page_size), prompts = (int64_t)c->batch * c->input;

		if (slots > INT32_MAX)
			return km_fail(err, KM_EINVAL,
			               "--bench-one-batch: %d,%d,%d are too many tokens for one cache",
			               c->batch, c->input, c->output);
		m->max_seqs = larger(m->max_seqs, c->batch);
		m->max_context = larger(m->max_context, c->input + c->output);
		m->kv_slots = slots > m->kv_slots ? slots : m->kv_slots;
		most_prompt = larger(most_prompt, prompts < chunk ? (int)prompts : chunk);
	}
	m->max_batch_tokens = larger(o->skip_prefill ? 1 : most_prompt, m->max_seqs);
	m->max_logit_rows = m->max_seqs;
	return 0;
}

static int open_model(const km_bench_options *o, const km_model_options *options, km_model **model,
                      km_err *err)
{
	if (o->random)
		return km_model_open_random(model, o->model, o->random, options, err);
	return km_model_open(model, o->model, options, err);
}

static int describe_device(const km_bench_options *o, km_bench_report *report, km_err *err)
{
	km_cuda_info info;
	int threads = o->engine->threads ? o->engine->threads : omp_get_num_procs();

	if (o->engine->backend == KM_BACKEND_CPU) {
		snprintf(report->device, sizeof(report->device), "CPU, %d threads, %s kernels",
		         threads, km_cpu_ops(o->engine->isa)->name);
		km_roofline_of_cpu(threads, &report->roofline);
		return 0;
	}
	KM_TRY(km_cuda_describe(o->engine->gpu, &info, err));
	snprintf(report->device, sizeof(report->device), "%s", info.name);
	km_roofline_of_gpu(&info, &report->roofline);
	return 0;
}

static void describe_model(const km_bench_options *o, const km_model *model,
                           const km_model_plan *plan, km_bench_report *report)
{
	const km_config *c = km_model_config(model);

	report->layers = c->num_hidden_layers;
	report->depth = report->depth ? report->depth : report->layers;
	for (int i = 0; i < report->layers; i++)
		report->moe_layers += km_config_is_moe_layer(c, i);
	report->weight_bytes = (double)plan->weight_bytes;
	if (o->random && o->random->shard_of > 1)
		km_shard_describe_left_out(c, o->random->shard_of, &report->left_out);
}

/* Of a model with this config, without opening it. */
static int plan_model(const km_bench_options *o, const km_model_options *options, int *depth,
                      km_model_plan *plan, km_err *err)
{
	km_config config = { 0 };
	int rc = o->random ? km_model_random_config(&config, o->model, o->random, depth, err)
	                   : km_config_load(&config, o->model, err);

	if (rc >= 0)
		rc = km_model_plan_memory(&config, options, plan, err);
	km_config_release(&config);
	return rc;
}

static int run_cases(const km_bench_options *o, km_model *model, const km_bench_case *cases,
                     int count, km_bench_report *report, km_err *err)
{
	int rc = 0;

	report->results = km_xcalloc((size_t)count, sizeof(*report->results));
	for (int i = 0; rc >= 0 && i < count; i++, report->count++) {
		struct run r = {
			.model = model,
			.chunk = o->chunk ? o->chunk : CHUNK,
			.page_size = o->engine->page_size,
			.vocab = km_model_config(model)->vocab_size,
		};

		run_init(&r, &cases[i]);
		rc = measure(&r, o, &report->results[i], err);
		run_release(&r);
	}
	return rc;
}

int km_bench_one_batch(const km_bench_options *o, km_bench_report *report, km_err *err)
{
	km_bench_case *cases;
	km_model_options options;
	km_model_plan plan;
	km_model *model = NULL;
	int count, rc;

	*report = (km_bench_report){ .options = o };
	km_buf_init(&report->left_out, 0);
	KM_TRY(km_bench_parse(o->cases, &cases, &count, err));
	rc = model_options(o, cases, count, &options, err);
	if (rc >= 0)
		rc = plan_model(o, &options, &report->depth, &plan, err);
	if (rc >= 0)
		rc = open_model(o, &options, &model, err);
	if (rc >= 0)
		rc = describe_device(o, report, err);
	if (rc >= 0) {
		describe_model(o, model, &plan, report);
		rc = run_cases(o, model, cases, count, report, err);
	}
	km_model_close(model);
	free(cases);
	return rc;
}

void km_bench_report_release(km_bench_report *report)
{
	free(report->results);
	km_buf_release(&report->left_out);
	*report = (km_bench_report){ .count = 0 };
}
