/*
 * What an engine takes and is made of: options to a model's shape, the KV cache's size, the
 * context.
 *
 * The KV cache's size is asked for (max_total_tokens) or comes from memory: memory_fraction of
 * what is available, less weights and buffers, in whole pages; and no more than all running
 * sequences could hold at once. Everything is decided from config.json alone, before a weight is
 * looked at, and a plan that does not fit is refused then.
 */
#include "engine/engine_state.h"

#include <inttypes.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "engine/vocab.h"

/* Logits of rows beyond one for each sequence, for log-probabilities of prompts: memory against the
 * number of steps that a long scored prompt takes. */
enum { SCORE_BYTES = 64 << 20, MIN_SCORE_ROWS = 16 };

void km_engine_options_init(km_engine_options *options)
{
	*options = (km_engine_options){
		.memory_fraction = 0.8,
		.max_running_requests = 32,
		.max_queued_requests = 1024,
		.chunked_prefill_size = 512,
		.page_size = 16,
		.kv_dtype = KM_KV_BF16,
	};
}

/* Everything that opening decides. */
typedef struct decided {
	km_engine_shape shape;
	km_model_options model;
	km_model_plan plan;
} decided;

static int check_options(const km_engine_options *o, km_err *err)
{
	if (!o->model_dir)
		return km_fail(err, KM_EINVAL, "no model folder was given");
	if (o->page_size < 1 || o->page_size > 4096)
		return km_fail(err, KM_EINVAL, "page size %d, expected 1 to 4096", o->page_size);
	if (o->max_running_requests < 1 || o->max_running_requests > 4096)
		return km_fail(err, KM_EINVAL, "max running requests %d, expected 1 to 4096",
		               o->max_running_requests);
	if (o->max_queued_requests < 1)
		return km_fail(err, KM_EINVAL, "max queued requests %d, expected at least 1",
		               o->max_queued_requests);
	if (o->chunked_prefill_size < 1 || o->chunked_prefill_size > 1 << 20)
		return km_fail(err, KM_EINVAL, "chunked prefill size %d, expected 1 to %d",
		               o->chunked_prefill_size, 1 << 20);
	if (o->deterministic && o->backend == KM_BACKEND_CUDA)
		return km_fail(err, KM_EUNSUPPORTED,
		               "deterministic serving is built for the CPU only: on a GPU the number of rows "
		               "in a step chooses kernels that round differently");
	if (o->deterministic && o->isa && !strcmp(o->isa, "plain"))
		return km_fail(err, KM_EUNSUPPORTED,
		               "deterministic serving gives the same tokens on every machine, which 'plain' "
		               "kernels do not: they round otherwise than 'avx512', 'avx2' and 'portable', of "
		               "which one is wanted");
	if (o->context_length < 0 || o->max_total_tokens < 0)
		return km_fail(err, KM_EINVAL,
		               "context length %d and max total tokens %" PRId64
		               ", expected 0 (chosen here) or more",
		               o->context_length, o->max_total_tokens);
	if (!o->max_total_tokens && !(o->memory_fraction > 0 && o->memory_fraction <= 1))
		return km_fail(err, KM_EINVAL, "memory fraction %g, expected above 0, at most 1",
		               o->memory_fraction);
	return 0;
}

static int64_t whole_pages(int64_t tokens, int page_size)
{
	return tokens / page_size * page_size;
}

static void decide_shape(const km_engine_options *o, const km_config *config, decided *d)
{
	int64_t rows = SCORE_BYTES / (4 * (int64_t)config->vocab_size);

	rows = rows < MIN_SCORE_ROWS ? MIN_SCORE_ROWS : rows;
	d->shape = (km_engine_shape){
		.context_length =
			o->context_length ? o->context_length : config->max_position_embeddings,
		.page_size = o->page_size,
		.max_running = o->max_running_requests,
		.max_queued = o->max_queued_requests,
		.prefill_rows = o->chunked_prefill_size,
		.score_rows =
			(int)(rows < o->chunked_prefill_size ? rows : o->chunked_prefill_size),
		.prefix_cache = !o->disable_prefix_cache,
		.deterministic = o->deterministic,
		.threads = o->threads > 0 ? o->threads : omp_get_num_procs(),
	};
	d->model = (km_model_options){
		.max_batch_tokens = d->shape.max_running + d->shape.prefill_rows,
		.max_seqs = d->shape.max_running,
		.max_logit_rows = d->shape.max_running + d->shape.score_rows,
		.max_context = d->shape.context_length,
		.kv_dtype = o->kv_dtype,
		.threads = o->threads,
		.isa = o->isa ? o->isa : o->deterministic ? km_cpu_fixed_isa() : NULL,
		.backend = o->backend,
		.gpu = o->gpu,
		.page_size = o->page_size,
		.disable_graphs = o->disable_graphs,
		.capture_at_open = true,
		.count_experts = o->count_experts,
		.moe_config_dir = o->moe_config_dir,
		.require_tuned = o->require_tuned,
		.quiet = o->quiet,
	};
}

static int64_t fixed_bytes(const km_model_plan *plan)
{
	return plan->weight_bytes + plan->scratch_bytes + plan->logits_bytes + plan->rope_bytes +
	       plan->fixed_bytes;
}

static int slots_from_memory(const km_engine_options *o, const decided *d, int64_t *slots,
                             km_err *err)
{
	const km_model_plan *plan = &d->plan;
	const double gib = 1024.0 * 1024 * 1024;
	int64_t most = (int64_t)d->shape.max_running * d->shape.context_length, room;

	if (plan->available_bytes < 0)
		return km_fail(err, KM_EINVAL,
		               "the system does not say how much memory is available: "
		               "the KV cache's size must be given (max total tokens)");
	room = (int64_t)(o->memory_fraction * (double)plan->available_bytes) - fixed_bytes(plan);
	if (room < plan->kv_bytes_per_token * o->page_size)
		return km_fail(err, KM_ENOMEM,
		               "%s does not fit: weights and buffers take %.2f GiB, and %.2f GiB "
		               "(%g of the "
		               "%.2f available) leave no room for a KV cache",
		               o->model_dir, (double)fixed_bytes(plan) / gib,
		               o->memory_fraction * (double)plan->available_bytes / gib,
		               o->memory_fraction, (double)plan->available_bytes / gib);
	*slots = room / plan->kv_bytes_per_token;
	most = (most + o->page_size - 1) / o->page_size * o->page_size;
	*slots = *slots < most ? *slots : most;
	return 0;
}

static int decide_slots(const km_engine_options *o, decided *d, km_err *err)
{
	int64_t slots = o->max_total_tokens;

	if (!slots)
		KM_TRY(slots_from_memory(o, d, &slots, err));
	slots = whole_pages(slots < INT32_MAX ? slots : INT32_MAX, o->page_size);
	if (slots < o->page_size)
		return km_fail(err, KM_EINVAL,
		               "max total tokens %" PRId64 ", expected at least a page of %d",
		               o->max_total_tokens, o->page_size);
	if (o->context_length > slots)
		return km_fail(err, KM_EINVAL,
		               "context length %d is more than the %" PRId64
		               " tokens that the KV cache holds",
		               o->context_length, slots);
	if (d->shape.context_length > slots)
		d->shape.context_length = (int)slots;
	d->shape.total_pages = (int)(slots / o->page_size);
	d->model.max_context = d->shape.context_length;
	d->model.kv_slots = slots;
	return 0;
}

static int decide(const km_engine_options *o, const km_config *config, decided *d, km_err *err)
{
	*d = (decided){ 0 };
	KM_TRY(check_options(o, err));
	if (o->context_length > config->max_position_embeddings)
		return km_fail(err, KM_EINVAL, "context length %d is more than the model's %d",
		               o->context_length, config->max_position_embeddings);
	decide_shape(o, config, d);
	KM_TRY(km_model_plan_memory(config, &d->model, &d->plan, err));
	KM_TRY(decide_slots(o, d, err));
	/* Again: a shorter context takes smaller buffers. */
	return km_model_plan_memory(config, &d->model, &d->plan, err);
}

static int load_and_decide(const km_engine_options *o, decided *d, km_err *err)
{
	km_config config;
	int rc;

	KM_TRY(check_options(o, err));
	KM_TRY(km_config_load(&config, o->model_dir, err));
	rc = decide(o, &config, d, err);
	km_config_release(&config);
	return rc;
}

static void describe(const decided *d, km_buf *out)
{
	const double mib = 1024.0 * 1024;
	const km_engine_shape *s = &d->shape;
	const km_model_plan *p = &d->plan;

	km_buf_printf(out, "weights            %10.1f MiB, of which routed experts %.1f MiB\n",
	              (double)p->weight_bytes / mib, (double)p->expert_bytes / mib);
	km_buf_printf(
		out,
		"KV cache           %10.1f MiB: %d pages of %d tokens, %" PRId64 " bytes a token\n",
		(double)p->kv_bytes / mib, s->total_pages, s->page_size, p->kv_bytes_per_token);
	km_buf_printf(out,
	              "step buffers       %10.1f MiB: %d prompt rows and %d sequences a step\n",
	              (double)p->scratch_bytes / mib, s->prefill_rows, s->max_running);
	km_buf_printf(out, "logits             %10.1f MiB: %d rows\n",
	              (double)p->logits_bytes / mib, d->model.max_logit_rows);
	km_buf_printf(out, "rotary table       %10.1f MiB\n", (double)p->rope_bytes / mib);
	if (p->fixed_bytes)
		km_buf_printf(out, "matrix library     %10.1f MiB\n", (double)p->fixed_bytes / mib);
	km_buf_printf(out, "total              %10.1f MiB",
	              (double)(fixed_bytes(p) + p->kv_bytes) / mib);
	if (p->available_bytes >= 0)
		km_buf_printf(out, " of %.1f MiB available%s", (double)p->available_bytes / mib,
		              d->model.backend == KM_BACKEND_CUDA ? " on the GPU" : "");
	km_buf_printf(out, "\ncontext length     %10d tokens\n", s->context_length);
}

int km_engine_plan(const km_engine_options *options, km_model_plan *plan, km_err *err)
{
	decided d;

	KM_TRY(load_and_decide(options, &d, err));
	*plan = d.plan;
	return 0;
}

int km_engine_describe_plan(const km_engine_options *options, km_buf *out, km_err *err)
{
	decided d;

	KM_TRY(load_and_decide(options, &d, err));
	describe(&d, out);
	return km_model_plan_fits(&d.plan, options->model_dir, err);
}

/* ---- the model and the vocabulary behind the engine ---- */

typedef struct real_backend {
	km_model *model;
	km_tokenizer *tokenizer;
	int64_t *expert_counts; /* [layers, experts] or NULL */
} real_backend;

static int forward(void *ctx, const km_batch *batch, const float **logits, km_err *err)
{
	return km_model_forward(((real_backend *)ctx)->model, batch, logits, err);
}

static int launch(void *ctx, const km_batch *batch, km_err *err)
{
	return km_model_launch(((real_backend *)ctx)->model, batch, err);
}

static int finish(void *ctx, const km_batch *batch, const float **logits, km_err *err)
{
	return km_model_finish(((real_backend *)ctx)->model, batch, logits, err);
}

static const char *token_bytes(void *ctx, int32_t id, size_t *len)
{
	return km_tokenizer_bytes(((real_backend *)ctx)->tokenizer, id, len);
}

static void add_eos(km_backend *backend, int32_t id)
{
	for (int i = 0; i < backend->eos_count; i++)
		if (backend->eos[i] == id)
			return;
	if (id >= 0)
		backend->eos[backend->eos_count++] = id;
}

static void fill_backend(km_backend *backend, real_backend *real)
{
	static const char *const ends[] = { "[EOS]", "<|im_end|>", "[EOT]" };
	const km_config *config = km_model_config(real->model);
	int32_t vocab = km_tokenizer_vocab_size(real->tokenizer);
	size_t len;

	*backend = (km_backend){ .vocab_size = config->vocab_size, .ctx = real, .forward = forward,
	                         .token_bytes = token_bytes };
	backend->draws = km_model_draws(real->model);
	if (backend->draws) {
		backend->launch = launch;
		backend->finish = finish;
	}
	backend->added_from = km_tokenizer_base_size(real->tokenizer);
	for (int32_t id = 0; id < vocab; id++)
		if (km_tokenizer_bytes(real->tokenizer, id, &len) && len > backend->max_token_bytes)
			backend->max_token_bytes = len;
	for (int i = 0; i < config->eos_count; i++)
		add_eos(backend, config->eos[i]);
	for (int i = 0; i < 3; i++)
		add_eos(backend, km_tokenizer_special(real->tokenizer, ends[i]));
}

static void close_real(real_backend *real)
{
	km_model_close(real->model);
	km_tokenizer_close(real->tokenizer);
	free(real->expert_counts);
	free(real);
}

static void start_counting(real_backend *real)
{
	const km_config *config = km_model_config(real->model);

	real->expert_counts = km_xcalloc((size_t)config->num_hidden_layers *
						 (size_t)config->n_routed_experts,
					 sizeof(*real->expert_counts));
	km_model_set_expert_counts(real->model, real->expert_counts);
}

/* The tokenizer first: it is small, and a folder without one should say so at once. */
static int open_real(real_backend *real, const char *dir, const km_model_options *options,
                     km_err *err)
{
	int32_t tokens, vocab;

	KM_TRY(km_tokenizer_open(&real->tokenizer, dir, err));
	KM_TRY(km_model_open(&real->model, dir, options, err));
	tokens = km_tokenizer_vocab_size(real->tokenizer);
	vocab = km_model_config(real->model)->vocab_size;
	if (tokens > vocab)
		return km_fail(
			err, KM_EFORMAT,
			"%s: the tokenizer has %d tokens, more than the model's vocab_size of %d",
			dir, (int)tokens, (int)vocab);
	return 0;
}

int km_engine_open(km_engine **engine, const km_engine_options *options, km_err *err)
{
	real_backend *real = km_xcalloc(1, sizeof(*real));
	km_backend backend;
	decided d;
	int rc = load_and_decide(options, &d, err);

	*engine = NULL;
	if (rc >= 0)
		rc = open_real(real, options->model_dir, &d.model, err);
	if (rc < 0) {
		close_real(real);
		return rc;
	}
	if (options->count_experts)
		start_counting(real);
	fill_backend(&backend, real);
	*engine = km_engine_start(&d.shape, &backend);
	if (!*engine) {
		close_real(real);
		return km_fail(err, KM_EIO, "the engine's thread could not be started");
	}
	(*engine)->model = real->model;
	(*engine)->tokenizer = real->tokenizer;
	(*engine)->expert_counts = real->expert_counts;
	(*engine)->model_options = d.model;
	(*engine)->plan = d.plan;
	return 0;
}

void km_engine_close(km_engine *engine)
{
	real_backend *real;

	if (!engine)
		return;
	real = engine->backend.ctx;
	km_engine_stop(engine);
	close_real(real);
}

const km_config *km_engine_config(const km_engine *engine)
{
	return km_model_config(engine->model);
}

int km_engine_expert_counts(const km_engine *engine, const int64_t **counts, km_err *err)
{
	*counts = engine->expert_counts;
	return km_model_fetch_expert_counts(engine->model, err);
}

const km_tokenizer *km_engine_tokenizer(const km_engine *engine)
{
	return engine->tokenizer;
}

void km_engine_explain(const km_engine *engine, km_buf *out)
{
	decided d = { .shape = engine->shape,
	              .model = engine->model_options,
	              .plan = engine->plan };

	describe(&d, out);
	km_buf_printf(out, "queue              %10d requests\n", engine->shape.max_queued);
	km_buf_printf(out, "prefix cache       %s\n",
	              !engine->shape.prefix_cache   ? "off: it was disabled"
	              : engine->shape.deterministic ? "pages of prompts only: deterministic, and "
	                                              "generated tokens' KV comes from "
	                                              "another form of attention"
	                                            : "pages of prompts and of generated tokens");
	km_buf_printf(out, "when pages run out %s\n",
	              engine->shape.deterministic
			      ? "requests wait: deterministic, all of a request's pages are taken "
			        "at its start"
			      : "the newest request gives way and is computed again later");
	km_buf_puts(out, "end of sequence   ");
	for (int i = 0; i < engine->backend.eos_count; i++)
		km_buf_printf(out, " %d", (int)engine->backend.eos[i]);
	km_buf_printf(out, "\nsampler            %s%s, %d threads over the rows of a step\n",
	              engine->backend.draws ? "on the GPU; for log-probabilities, and where more "
	                                      "than 4096 candidates or 32768 penalties meet, "
	                                    : "",
	              km_vocab_best()->name, engine->shape.threads);
	km_model_explain(engine->model, out);
}
