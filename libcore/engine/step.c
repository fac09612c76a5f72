/*
 * One step: the scheduler's chunks become a batch; the model's logits become tokens; tokens become
 * events. No memory is taken and no lock is held, but for a moment to publish the counters.
 *
 * Looking ahead. A backend that draws tokens itself need not wait for the host between two steps
 * that only generate: while one is under way the next is launched, its ids still to be drawn, and
 * then the first one's tokens are read and delivered. Who ends with the first (a stop, a
 * cancellation) has a row in the second for nothing: its KV goes to a page that nobody reads, or
 * that is written again by steps that come after. Arrivals wait for one step more. Rows with
 * penalties, which want the token before, and log-probabilities, which the host makes, keep steps
 * one after the other.
 *
 * Rows are sampled side by side by several threads, each with a scratch of its own: a row's token
 * depends on that row alone. Events are then sent one after the other, in the order of the chunks.
 *
 * A request may be freed by its owner as soon as its last event is sent. Samples of a request never
 * share a chunk, so nothing of a step refers to a request once its last sample has finished.
 */
#include "engine/engine_state.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"

static void init_step(km_step *step, const km_engine *engine)
{
	const km_engine_shape *shape = &engine->shape;
	size_t seqs = (size_t)shape->max_running, rows = seqs + (size_t)shape->prefill_rows;
	size_t wanted = seqs + (size_t)shape->score_rows;
	size_t pages = (size_t)((shape->context_length + shape->page_size - 1) / shape->page_size);

	*step = (km_step){ 0 };
	step->chunks = km_xcalloc(seqs, sizeof(*step->chunks));
	step->jobs = km_xcalloc(wanted, sizeof(*step->jobs));
	step->ids = km_xcalloc(rows, sizeof(int32_t));
	step->positions = km_xcalloc(rows, sizeof(int32_t));
	step->slots = km_xcalloc(rows, sizeof(int32_t));
	step->seq_start = km_xcalloc(seqs + 1, sizeof(int32_t));
	step->kv_len = km_xcalloc(seqs + 1, sizeof(int32_t));
	step->pages = km_xreallocarray(NULL, seqs * pages, sizeof(int32_t));
	step->logit_row = km_xcalloc(wanted, sizeof(int32_t));
	step->drawn = km_xcalloc(wanted, sizeof(int32_t));
	if (!engine->backend.draws)
		return;
	step->from_drawn = km_xcalloc(rows, sizeof(int32_t));
	step->draws = km_xcalloc(wanted, sizeof(*step->draws));
	step->entries = km_xcalloc(KM_DRAW_ENTRIES, sizeof(*step->entries));
}

static void release_step(km_step *step)
{
	free(step->chunks);
	free(step->jobs);
	free(step->ids);
	free(step->positions);
	free(step->slots);
	free(step->seq_start);
	free(step->kv_len);
	free(step->pages);
	free(step->logit_row);
	free(step->drawn);
	free(step->from_drawn);
	free(step->draws);
	free(step->entries);
}

void km_steps_init(km_engine *engine)
{
	int threads = engine->shape.threads;

	init_step(&engine->step, engine);
	if (engine->backend.launch)
		init_step(&engine->ahead, engine);
	engine->samplers = km_xcalloc((size_t)threads, sizeof(km_sampler *));
	for (int i = 0; i < threads; i++)
		engine->samplers[i] = km_sampler_new(engine->backend.vocab_size);
	km_buf_init(&engine->text, 0);
}

void km_steps_release(km_engine *engine)
{
	release_step(&engine->step);
	release_step(&engine->ahead);
	for (int i = 0; i < engine->shape.threads; i++)
		km_sampler_free(engine->samplers[i]);
	free(engine->samplers);
	km_buf_release(&engine->text);
}

/* ---- chunks to a batch ---- */

static void add_job(km_step *step, const km_chunk *chunk, int position, int row)
{
	km_job *job = &step->jobs[step->job_count];

	step->logit_row[step->job_count++] = row;
	job->sample = (km_sample *)chunk->seq;
	job->position = position;
	job->next = chunk->last && position == chunk->start + chunk->count - 1;
}

static void lay_rows(const km_engine *engine, km_step *step, const km_chunk *chunk, int row)
{
	const km_seq *seq = chunk->seq;
	int size = engine->shape.page_size, end = chunk->start + chunk->count;

	for (int at = chunk->start; at < end; at++, row++) {
		step->ids[row] = at < seq->len ? seq->ids[at] : 0; /* else not drawn yet */
		step->positions[row] = at;
		step->slots[row] = seq->pages[at / size] * size + at % size;
		if ((at >= seq->score_from && at < seq->score_to) || (chunk->last && at == end - 1))
			add_job(step, chunk, at, row);
	}
}

/* The sequences' page tables, side by side; returns the width of a row. */
static int lay_pages(const km_engine *engine, km_step *step)
{
	int size = engine->shape.page_size, most = 1;

	for (int i = 0; i < step->chunk_count; i++) {
		int pages = (step->kv_len[i] + size - 1) / size;

		most = pages > most ? pages : most;
	}
	for (int i = 0; i < step->chunk_count; i++) {
		int pages = (step->kv_len[i] + size - 1) / size;
		int32_t *row = step->pages + (size_t)i * (size_t)most;

		memcpy(row, step->chunks[i].seq->pages, (size_t)pages * sizeof(int32_t));
		for (int p = pages; p < most; p++)
			row[p] = row[0]; /* never read, but a page that exists */
	}
	return most;
}

static void make_batch(const km_engine *engine, km_step *step)
{
	int rows = 0, decode = 0;

	step->job_count = 0;
	for (int i = 0; i < step->chunk_count; i++) {
		const km_chunk *chunk = &step->chunks[i];

		decode += chunk->decode;
		step->seq_start[i] = rows;
		step->kv_len[i] = chunk->start + chunk->count;
		lay_rows(engine, step, chunk, rows);
		rows += chunk->count;
	}
	step->seq_start[step->chunk_count] = rows;
	step->batch = (km_batch){
		.tokens = rows,
		.seqs = step->chunk_count,
		.decode_seqs = decode,
		.ids = step->ids,
		.positions = step->positions,
		.slots = step->slots,
		.seq_start = step->seq_start,
		.kv_len = step->kv_len,
		.pages = step->pages,
		.pages_per_seq = lay_pages(engine, step),
		.page_size = engine->shape.page_size,
		.logit_row = step->logit_row,
		.logit_rows = step->job_count,
	};
}

/* ---- what the backend is to draw ---- */

static km_sample_args sample_args(const km_job *job, const float *logits)
{
	const km_sample *sample = job->sample;

	return (km_sample_args){
		.logits = logits,
		.sampling = &sample->request->sampling,
		.counts = sample->has_counts ? &sample->counts : NULL,
		.seed = sample->seed,
		.index = sample->draws,
		.logprobs = sample->request->logprobs,
	};
}

/* Biases, then counts, from `at` on; what follows them. */
static int lay_entries(km_draw *draw, const km_sample_args *args, km_draw_entry *entries, int at)
{
	const km_sampling *p = args->sampling;
	const km_counts *counts = args->counts;

	draw->bias_from = at;
	draw->biases = p->bias_count;
	for (int i = 0; i < p->bias_count; i++)
		entries[at++] = (km_draw_entry){ .id = p->bias[i].id, .bias = p->bias[i].bias };
	draw->counts_from = at;
	draw->counts = counts ? counts->count : 0;
	for (int i = 0; i < draw->counts; i++)
		entries[at++] =
			(km_draw_entry){ .id = counts->id[i], .output = counts->output[i] };
	return at;
}

/* Log-probabilities are the host's, and rows with more to be told than fits. `later`: the number of
 * draws that a sample makes before this one. */
static void plan_draws(const km_engine *engine, km_step *step, uint64_t later)
{
	int at = 0;

	for (int i = 0; i < step->job_count; i++) {
		km_sample_args args = sample_args(&step->jobs[i], NULL);
		int biases = args.sampling->bias_count;
		int entries = biases + (args.counts ? args.counts->count : 0);

		step->drawn[i] = KM_DRAWN_BY_HOST;
		if (!step->draws)
			continue;
		step->draws[i] = (km_draw){ .by_device = 0 };
		if (!step->jobs[i].next || args.logprobs >= 0 || step->jobs[i].sample->redo ||
		    biases > KM_DRAW_BIASES || entries > KM_DRAW_ENTRIES - at)
			continue;
		args.index += later;
		step->draws[i] = km_sampler_draw(&args, engine->backend.vocab_size);
		at = lay_entries(&step->draws[i], &args, step->entries, at);
	}
	step->batch.draw = step->draws;
	step->batch.entries = step->entries;
	step->batch.entry_count = at;
	step->batch.drawn = step->drawn;
}

/* ---- the step after this one, before this one's tokens are here ---- */

/* Every row generates, and is drawn by the backend from what is known now; nobody waits or has
 * anything to say. */
static bool may_look_ahead(km_engine *engine)
{
	const km_step *step = &engine->step;
	int live = 0;

	if (!engine->backend.launch || step->batch.decode_seqs != step->chunk_count ||
	    engine->scheduler.waiting.count || km_engine_has_news(engine))
		return false;
	for (int i = 0; i < step->job_count; i++) {
		const km_sample *sample = step->jobs[i].sample;

		live += sample != NULL;
		if (sample && (!step->draws[i].by_device || sample->has_counts))
			return false;
	}
	return live == engine->scheduler.running.count; /* else others would be in it as well */
}

/* The step of those that go on after this one, unless there is no page for one of them. */
static bool plan_ahead(km_engine *engine)
{
	const km_step *step = &engine->step;
	km_step *ahead = &engine->ahead;

	ahead->chunk_count = 0;
	for (int i = 0; i < step->chunk_count; i++) {
		km_chunk chunk = step->chunks[i];

		if (!chunk.seq || chunk.seq->len + 1 >= chunk.seq->max_len)
			continue;
		chunk.start++;
		if (!km_scheduler_make_room(&engine->scheduler, &chunk))
			return false;
		ahead->from_drawn[ahead->chunk_count] = i;
		ahead->chunks[ahead->chunk_count++] = chunk;
	}
	if (!ahead->chunk_count)
		return false;
	make_batch(engine, ahead);
	ahead->batch.from_drawn = ahead->from_drawn;
	plan_draws(engine, ahead, 1);
	return true;
}

static int launch(km_engine *engine, km_step *step, km_err *err)
{
	int64_t start = km_now_ns();

	KM_TRY(engine->backend.launch(engine->backend.ctx, &step->batch, err));
	engine->launch_ns += km_now_ns() - start;
	step->under_way = true;
	return 0;
}

static int look_ahead(km_engine *engine, km_err *err)
{
	if (!may_look_ahead(engine) || !plan_ahead(engine))
		return 0;
	return launch(engine, &engine->ahead, err);
}

/* A sample is over: the step that was launched ahead has its row for nothing. */
static void forget_ahead(km_engine *engine, const km_sample *sample)
{
	km_step *ahead = &engine->ahead;

	for (int i = 0; ahead->under_way && i < ahead->job_count; i++)
		if (ahead->jobs[i].sample == sample) {
			ahead->jobs[i].sample = NULL;
			ahead->chunks[i].seq = NULL; /* one job a chunk */
		}
}

static void forget_step(km_engine *engine, const km_sample *sample)
{
	km_step *step = &engine->step;

	for (int i = 0; step->under_way && i < step->job_count; i++)
		if (step->jobs[i].sample == sample)
			step->jobs[i].sample = NULL;
	for (int i = 0; step->under_way && i < step->chunk_count; i++)
		if (step->chunks[i].seq == &sample->seq)
			step->chunks[i].seq = NULL;
}

void km_steps_drain(km_engine *engine)
{
	km_step *all[] = { &engine->step, &engine->ahead };
	const float *logits;

	for (int i = 0; i < 2; i++) {
		if (all[i]->under_way)
			engine->backend.finish(engine->backend.ctx, &all[i]->batch, &logits, NULL);
		all[i]->under_way = false;
	}
}

/* ---- logits to tokens ---- */

/* A row that the backend refused to draw from has its biases and penalties in it. */
static int do_job(const km_engine *engine, int at, km_sampler *sampler, const float *logits,
                  km_sampled *out, km_err *err)
{
	const km_step *step = &engine->step;
	const km_job *job = &step->jobs[at];
	const km_request *r = job->sample->request;
	km_sample_args args = sample_args(
		job, logits + (size_t)at * (size_t)engine->backend.vocab_size);
	km_sampling adjusted = r->sampling;

	if (step->drawn[at] != KM_DRAWN_BY_HOST) {
		KM_ASSERT(step->drawn[at] >= 0 && step->drawn[at] < engine->backend.vocab_size);
		*out = (km_sampled){ .id = step->drawn[at] };
		return 0;
	}
	if (step->draws && step->draws[at].by_device) {
		adjusted.bias_count = 0;
		args.sampling = &adjusted;
		args.counts = NULL;
	}
	if (job->next)
		return km_sampler_sample(sampler, &args, out, err);
	return km_sampler_score(sampler, args.logits, job->sample->seq.ids[job->position + 1],
	                        r->logprobs > 0 ? r->logprobs : 0, out, err);
}

static void draw_job(km_engine *engine, int at, const float *logits)
{
	km_job *job = &engine->step.jobs[at];

	job->rc = 0;
	if (job->sample && !job->sample->redo)
		job->rc = do_job(engine, at, engine->samplers[omp_get_thread_num()], logits,
		                 &job->out, NULL);
}

static int count_undrawn(const km_step *step)
{
	int count = 0;

	for (int i = 0; i < step->job_count; i++)
		count += step->drawn[i] == KM_DRAWN_BY_HOST;
	return count;
}

/* A region of one thread is a team to libgomp, which would be made with malloc in place of the
 * model's: one row enters none, and more take the same threads as the model. */
static void do_jobs(km_engine *engine, const float *logits)
{
	int count = engine->step.job_count, threads = engine->shape.threads;

	if (count_undrawn(&engine->step) <= 1 || threads == 1) {
		for (int i = 0; i < count; i++)
			draw_job(engine, i, logits);
		return;
	}
#pragma omp parallel for schedule(static, 1) num_threads(threads)
	for (int i = 0; i < count; i++)
		draw_job(engine, i, logits);
}

/* ---- tokens to events ---- */

void km_sample_finish(km_engine *engine, km_sample *sample, km_event *event)
{
	km_request *r = sample->request;
	void (*on_event)(void *, const km_event *) = r->on_event;
	void *ctx = r->ctx;

	forget_ahead(engine, sample);
	forget_step(engine, sample);
	km_scheduler_remove(&engine->scheduler, &sample->seq);
	if (--r->live == 0)
		km_engine_unqueue(engine, r);
	km_engine_publish(engine);
	event->sample = sample->index;
	on_event(ctx, event); /* the request may be gone after this */
}

static void fail_sample(km_engine *engine, km_sample *sample, const char *sentence)
{
	km_event event = {
		.id = -1, .matched_id = -1, .finish = KM_FINISH_ERROR, .error = sentence
	};

	km_sample_finish(engine, sample, &event);
}

static bool ends_text(const km_engine *engine, const km_request *r, int32_t id)
{
	for (int i = 0; !r->ignore_eos && i < engine->backend.eos_count; i++)
		if (engine->backend.eos[i] == id)
			return true;
	for (int i = 0; i < r->stop_id_count; i++)
		if (r->stop_ids[i] == id)
			return true;
	return false;
}

/* What earlier tokens left withheld comes out before a marker, in an event of its own: a marker's
 * event has the marker's text alone. */
static void send_withheld(km_engine *engine, km_sample *sample)
{
	km_buf *text = &engine->text;
	km_event event = { .sample = sample->index, .id = -1, .matched_id = -1 };

	km_stop_flush(&sample->stop, text);
	if (!text->len)
		return;
	event.text = text->data;
	event.text_len = text->len;
	sample->request->on_event(sample->request->ctx, &event);
	km_buf_clear(text);
}

/* The visible text of a token, and whether a stop string ended with it. */
static void make_text(km_engine *engine, km_sample *sample, km_event *event)
{
	const km_request *r = sample->request;
	km_buf *text = &engine->text;
	bool marker = event->id >= engine->backend.added_from;
	const char *bytes = NULL;
	size_t len = 0;
	int found;

	if (event->matched_id < 0)
		bytes = engine->backend.token_bytes(engine->backend.ctx, event->id, &len);
	if (!bytes)
		len = 0;
	if (!r->stops.count) {
		event->text = bytes;
		event->text_len = len;
		return;
	}
	km_buf_clear(text);
	if (marker && bytes)
		send_withheld(engine, sample);
	found = km_stop_push(&sample->stop, bytes, len, text);
	if (found >= 0) {
		event->finish = KM_FINISH_STOP;
		event->matched_stop = r->stops.text[found];
	} else if (marker || event->finish != KM_FINISH_NONE) {
		km_stop_flush(&sample->stop, text);
	}
	event->text = text->data;
	event->text_len = text->len;
}

static void deliver_token(km_engine *engine, km_sample *sample, const km_sampled *drawn)
{
	km_request *r = sample->request;
	km_seq *seq = &sample->seq;
	km_event event = { .sample = sample->index, .id = drawn->id, .matched_id = -1 };

	seq->ids[seq->len++] = drawn->id;
	sample->draws++;
	engine->generation_tokens++;
	if (sample->has_counts)
		km_counts_add(&sample->counts, drawn->id, true);
	if (r->logprobs >= 0) {
		event.logprob = drawn->logprob;
		event.top = drawn->top;
		event.top_count = drawn->top_count;
	}
	if (ends_text(engine, r, drawn->id)) {
		event.matched_id = drawn->id;
		event.finish = KM_FINISH_STOP;
	} else if (seq->len == seq->max_len) {
		event.finish = KM_FINISH_LENGTH;
	}
	make_text(engine, sample, &event);
	if (event.finish != KM_FINISH_NONE)
		km_sample_finish(engine, sample, &event);
	else
		r->on_event(r->ctx, &event);
}

static void deliver_score(const km_job *job)
{
	km_request *r = job->sample->request;
	km_prompt_logprob logprob = {
		.position = job->position + 1, .id = job->out.id, .logprob = job->out.logprob,
		.top = job->out.top, .top_count = job->out.top_count,
	};

	job->sample->seq.score_from = job->position + 1;
	r->on_prompt_logprob(r->ctx, &logprob);
}

/* One chunk's jobs, from `at` on; returns the first of the next chunk. */
static int deliver_chunk(km_engine *engine, const km_chunk *chunk, const float *logits, int at)
{
	km_step *step = &engine->step;
	km_sample *sample = (km_sample *)chunk->seq;
	bool over = false;

	if (!sample) { /* it was over before this step was */
		while (at < step->job_count && !step->jobs[at].sample)
			at++;
		return at;
	}
	if (sample->redo)
		return at + 1;
	for (; at < step->job_count && step->jobs[at].sample == sample; at++) {
		km_job *job = &step->jobs[at];
		km_err err;

		if (over)
			continue; /* sample may be gone: its address is only compared */
		if (job->rc < 0) {
			do_job(engine, at, engine->samplers[0], logits, &job->out, &err);
			fail_sample(engine, sample, err.msg);
			over = true;
		} else if (job->next) {
			deliver_token(engine, sample, &job->out);
			over = true; /* it is a chunk's last */
		} else {
			deliver_score(job);
		}
	}
	if (!over && chunk->seq->max_len == chunk->seq->prompt_len &&
	    chunk->seq->computed == chunk->seq->prefill_end) {
		km_event event = { .id = -1, .matched_id = -1, .finish = KM_FINISH_LENGTH };

		km_sample_finish(engine, sample, &event);
	}
	return at;
}

static void note_admission(km_engine *engine, km_sample *sample)
{
	km_request *r = sample->request;

	if (sample->index || r->admitted)
		return;
	km_engine_unqueue(engine, r);
	atomic_store(&r->cached_tokens, sample->seq.cached);
	atomic_store(&r->queue_ns, km_now_ns() - r->submitted_ns);
	engine->prompt_tokens += sample->seq.prompt_len;
}

/* What was refused while the next step is under way has no logits to draw from: its row is
 * computed again, and the one that follows it in that step is for nothing. */
static void redo_refused(km_engine *engine)
{
	km_step *step = &engine->step;

	for (int i = 0; i < step->job_count; i++) {
		km_sample *sample = step->jobs[i].sample;

		if (!sample)
			continue;
		sample->redo = engine->ahead.under_way && step->drawn[i] == KM_DRAWN_BY_HOST;
		if (sample->redo)
			forget_ahead(engine, sample);
	}
}

/* A step that a scheduler's plan makes, on its way. */
static int begin_step(km_engine *engine, km_err *err)
{
	km_step *step = &engine->step;

	step->chunk_count = km_scheduler_plan(&engine->scheduler, step->chunks);
	KM_ASSERT(step->chunk_count > 0);
	for (int i = 0; i < step->chunk_count; i++) {
		km_sample *sample = (km_sample *)step->chunks[i].seq;

		note_admission(engine, sample);
		sample->redo = sample->redo && step->chunks[i].decode; /* what was preempted is computed again anyway */
	}
	make_batch(engine, step);
	plan_draws(engine, step, 0);
	km_engine_publish(engine);
	return engine->backend.launch ? launch(engine, step, err) : 0;
}

static int finish_step(km_engine *engine, const float **logits, km_err *err)
{
	km_step *step = &engine->step;

	if (!engine->backend.launch)
		return engine->backend.forward(engine->backend.ctx, &step->batch, logits, err);
	KM_TRY(look_ahead(engine, err));
	step->under_way = false;
	return engine->backend.finish(engine->backend.ctx, &step->batch, logits, err);
}

static int compute(km_engine *engine, const float **logits, km_err *err)
{
	int64_t start = km_now_ns();
	int rc = engine->step.under_way ? 0 : begin_step(engine, err);

	if (rc >= 0)
		rc = finish_step(engine, logits, err);
	engine->forward_ns += km_now_ns() - start;
	return rc;
}

static void swap_steps(km_engine *engine)
{
	km_step step = engine->step;

	engine->step = engine->ahead;
	engine->ahead = step;
}

int km_step_run(km_engine *engine, km_err *err)
{
	km_step *step = &engine->step;
	const float *logits = NULL;

	KM_TRY(compute(engine, &logits, err));
	engine->steps++;
	redo_refused(engine);
	do_jobs(engine, logits);
	for (int i = 0; i < step->chunk_count; i++)
		if (step->chunks[i].seq && !((km_sample *)step->chunks[i].seq)->redo)
			km_scheduler_advance(&engine->scheduler, &step->chunks[i]);
	for (int i = 0, at = 0; i < step->chunk_count; i++)
		at = deliver_chunk(engine, &step->chunks[i], logits, at);
	if (engine->ahead.under_way)
		swap_steps(engine);
	km_engine_publish(engine);
	return 0;
}
