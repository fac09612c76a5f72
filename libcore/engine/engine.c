/*
 * The engine's thread and queue.
 *
 * Callers put requests into a bounded queue and go; the thread takes all that came, drops what was
 * cancelled, and makes steps until nothing is left, then sleeps. Every change to pages, scheduler
 * and samples happens on that thread between steps, which is why cancelling is a flag and flushing
 * a question that the thread answers.
 */
#include "engine/engine_state.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"

/* ---- what other threads see ---- */

void km_engine_publish(km_engine *e)
{
	km_engine_stats stats = {
		.running = e->scheduler.running.count,
		.waiting = e->scheduler.waiting.count,
		.pages_total = e->pages.total,
		.pages_used = km_pages_used(&e->pages),
		.pages_cached = e->pages.cached_count,
		.prompt_tokens = e->prompt_tokens,
		.generation_tokens = e->generation_tokens,
		.prefix_queries = e->scheduler.prefix_queries,
		.prefix_hits = e->scheduler.prefix_hits,
		.preemptions = e->scheduler.preemptions,
		.steps = e->steps,
		.forward_ns = e->forward_ns,
		.launch_ns = e->launch_ns,
	};

	pthread_mutex_lock(&e->lock);
	e->stats = stats;
	pthread_mutex_unlock(&e->lock);
}

void km_engine_unqueue(km_engine *e, km_request *r)
{
	if (r->admitted)
		return;
	r->admitted = true;
	pthread_mutex_lock(&e->lock);
	e->queued--;
	pthread_mutex_unlock(&e->lock);
}

void km_engine_stats_get(const km_engine *engine, km_engine_stats *stats)
{
	km_engine *e = (km_engine *)engine; /* only the lock changes */

	pthread_mutex_lock(&e->lock);
	*stats = e->stats;
	for (const km_request *r = e->submitted; r; r = r->next)
		stats->waiting += r->n;
	pthread_mutex_unlock(&e->lock);
}

bool km_engine_has_failed(const km_engine *engine, km_err *err)
{
	km_engine *e = (km_engine *)engine; /* only the lock changes */
	bool failed;

	pthread_mutex_lock(&e->lock);
	failed = e->broken.code != 0;
	if (failed && err)
		*err = e->broken;
	pthread_mutex_unlock(&e->lock);
	return failed;
}

int km_engine_context_length(const km_engine *engine)
{
	return engine->shape.context_length;
}

/* ---- callers ---- */

static void seed_samples(km_engine *e, km_request *r)
{
	const km_seq *seq = &r->samples[0].seq;
	uint64_t seed = r->sampling.seed;

	if (!r->sampling.has_seed && e->shape.deterministic)
		seed = km_rng_hash(0, seq->ids, (size_t)seq->prompt_len * sizeof(int32_t));
	else if (!r->sampling.has_seed)
		seed = km_rng_u64(e->random, atomic_fetch_add(&e->submissions, 1));
	for (int i = 0; i < r->n; i++)
		r->samples[i].seed = seed + (uint64_t)i;
}

static int enqueue(km_engine *e, km_request *r, km_err *err)
{
	if (e->broken.code)
		return km_fail(err, e->broken.code, "%s", e->broken.msg);
	if (e->closing)
		return km_fail(err, KM_ECANCELED,
		               "the engine is closing and takes no more requests");
	if (e->queued >= e->shape.max_queued)
		return km_fail(err, KM_ELIMIT,
		               "%d requests are waiting, as many as the queue holds", e->queued);
	*(e->submitted ? &e->submitted_last->next : &e->submitted) = r;
	e->submitted_last = r;
	e->queued++;
	pthread_cond_signal(&e->wake);
	return 0;
}

int km_engine_submit(km_engine *e, const km_request_options *options, km_request **request,
                     km_err *err)
{
	km_request *r = NULL;
	int rc = km_request_new(&r, e, options, err);

	*request = r; /* set before the first event can come */
	if (rc < 0)
		return rc;
	seed_samples(e, r);
	pthread_mutex_lock(&e->lock);
	rc = enqueue(e, r, err);
	pthread_mutex_unlock(&e->lock);
	if (rc < 0) {
		*request = NULL;
		km_request_free(r);
	}
	return rc;
}

void km_engine_cancel(km_engine *e, km_request *request)
{
	atomic_store(&request->cancelled, true);
	pthread_mutex_lock(&e->lock);
	atomic_store(&e->cancel_wanted, true);
	pthread_cond_signal(&e->wake);
	pthread_mutex_unlock(&e->lock);
}

int km_engine_flush_cache(km_engine *e)
{
	int rc = KM_EINVAL;

	if (pthread_equal(pthread_self(), e->thread))
		return rc; /* from a callback: a request runs */
	pthread_mutex_lock(&e->lock);
	if (!e->closing) {
		e->flush_wanted = true;
		pthread_cond_signal(&e->wake);
		while (e->flush_wanted)
			pthread_cond_wait(&e->flushed, &e->lock);
		rc = e->flush_rc;
	}
	pthread_mutex_unlock(&e->lock);
	return rc;
}

/* ---- the thread ---- */

static bool has_work(const km_engine *e)
{
	return e->scheduler.running.count || e->scheduler.waiting.count;
}

static void answer_flush(km_engine *e) /* under the lock */
{
	if (!e->flush_wanted)
		return;
	e->flush_rc = has_work(e) || e->submitted ? KM_EINVAL : 0;
	if (!e->flush_rc)
		km_pages_flush(&e->pages);
	e->stats.pages_cached = e->pages.cached_count;
	e->flush_wanted = false;
	pthread_cond_broadcast(&e->flushed);
}

bool km_engine_has_news(km_engine *e)
{
	bool news;

	pthread_mutex_lock(&e->lock);
	news = e->submitted || e->closing || e->flush_wanted || atomic_load(&e->cancel_wanted);
	pthread_mutex_unlock(&e->lock);
	return news;
}

/* Waits for something to do and takes what was submitted; false: it is time to end. */
static bool wait_for_work(km_engine *e, km_request **taken)
{
	bool go_on;

	pthread_mutex_lock(&e->lock);
	answer_flush(e);
	while (!e->closing && !e->submitted && !has_work(e)) {
		pthread_cond_wait(&e->wake, &e->lock);
		answer_flush(e);
	}
	*taken = e->submitted;
	e->submitted = e->submitted_last = NULL;
	go_on = !e->closing;
	pthread_mutex_unlock(&e->lock);
	return go_on;
}

static void finish_empty(km_engine *e, km_sample *sample, enum km_finish finish,
                         const char *sentence)
{
	km_event event = { .id = -1, .matched_id = -1, .finish = finish, .error = sentence };

	km_sample_finish(e, sample, &event);
}

static void accept(km_engine *e, km_request *r)
{
	bool scores_only = r->samples[0].seq.max_len == r->samples[0].seq.prompt_len;
	int n = r->n;
	km_sample *samples = r->samples;

	for (int i = 0; i < n; i++)
		if (!scores_only || (i == 0 && samples[0].seq.prompt_len > 1))
			km_scheduler_add(&e->scheduler, &samples[i].seq);
	/* Samples that have nothing to compute: the last of these may end the request. */
	for (int i = n - 1; scores_only && i >= (samples[0].seq.prompt_len > 1 ? 1 : 0); i--) {
		bool end = i == 0;

		finish_empty(e, &samples[i], KM_FINISH_LENGTH, NULL);
		if (end)
			return;
	}
}

static void accept_all(km_engine *e, km_request *taken)
{
	while (taken) {
		km_request *next = taken->next;

		taken->next = NULL;
		accept(e, taken);
		taken = next;
	}
}

/* Ends every sequence in the list, or those of cancelled requests. `next` is read first: finishing
 * a sample may free its request, though never another sample of a request that is in a list. */
static void end_list(km_engine *e, km_seq_list *list, bool all, enum km_finish finish,
                     const char *sentence)
{
	km_seq *next;

	for (km_seq *seq = list->first; seq; seq = next) {
		km_sample *sample = (km_sample *)seq;

		next = seq->next;
		if (all || atomic_load(&sample->request->cancelled))
			finish_empty(e, sample, finish, sentence);
	}
}

static void end_all(km_engine *e, enum km_finish finish, const char *sentence)
{
	end_list(e, &e->scheduler.running, true, finish, sentence);
	end_list(e, &e->scheduler.waiting, true, finish, sentence);
}

/* A failed step leaves KV that nobody may read: nothing of it is kept. A failed device stays so. */
static void fail_all(km_engine *e, const km_err *err)
{
	if (err->code == KM_EDEVICE && !e->broken.code) {
		pthread_mutex_lock(&e->lock);
		e->broken = *err;
		pthread_mutex_unlock(&e->lock);
	}
	end_all(e, KM_FINISH_ERROR, err->msg);
	km_steps_drain(e);
	km_pages_flush(&e->pages);
	km_engine_publish(e);
}

static void *engine_main(void *arg)
{
	km_engine *e = arg;
	km_request *taken;
	km_err err = { 0 };

	while (wait_for_work(e, &taken)) {
		accept_all(e, taken);
		if (atomic_exchange(&e->cancel_wanted, false)) {
			end_list(e, &e->scheduler.running, false, KM_FINISH_ABORT, NULL);
			end_list(e, &e->scheduler.waiting, false, KM_FINISH_ABORT, NULL);
		}
		if (e->broken.code) /* only this thread sets it */
			fail_all(e, &e->broken);
		else if (has_work(e) && km_step_run(e, &err) < 0)
			fail_all(e, &err);
		if (!has_work(e))
			km_steps_drain(e);
	}
	accept_all(e, taken);
	end_all(e, KM_FINISH_ABORT, NULL);
	km_steps_drain(e);
	return NULL;
}

/* ---- life ---- */

static uint64_t random_seed(void)
{
	uint64_t seed;

	if (getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
		seed = (uint64_t)km_now_ns();
	return seed;
}

static void release(km_engine *e)
{
	pthread_mutex_destroy(&e->lock);
	pthread_cond_destroy(&e->wake);
	pthread_cond_destroy(&e->flushed);
	km_steps_release(e);
	km_pages_release(&e->pages);
	free(e);
}

km_engine *km_engine_start(const km_engine_shape *shape, const km_backend *backend)
{
	km_engine *e = km_xcalloc(1, sizeof(*e));

	e->shape = *shape;
	e->backend = *backend;
	e->random = random_seed();
	km_pages_init(&e->pages, shape->total_pages, shape->page_size, shape->prefix_cache,
	              random_seed());
	e->scheduler = (km_scheduler){
		.pages = &e->pages,
		.max_running = shape->max_running,
		.prefill_rows = shape->prefill_rows,
		.score_rows = shape->score_rows,
		.reserve = shape->deterministic,
	};
	km_steps_init(e);
	pthread_mutex_init(&e->lock, NULL);
	pthread_cond_init(&e->wake, NULL);
	pthread_cond_init(&e->flushed, NULL);
	km_engine_publish(e);
	if (pthread_create(&e->thread, NULL, engine_main, e)) {
		release(e);
		return NULL;
	}
	return e;
}

void km_engine_stop(km_engine *e)
{
	pthread_mutex_lock(&e->lock);
	e->closing = true;
	pthread_cond_signal(&e->wake);
	pthread_mutex_unlock(&e->lock);
	pthread_join(e->thread, NULL);
	KM_ASSERT(km_pages_used(&e->pages) == 0);
	release(e);
}
