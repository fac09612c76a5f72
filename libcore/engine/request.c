/*
 * A request's memory and checks. All that a request will ever need is taken here, on the caller's
 * thread, for the length that it may reach: the steps that serve it allocate nothing. Large arrays
 * are not touched before they are used, so a waiting request costs address space rather than
 * memory.
 */
#include "engine/engine_state.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"

enum { MAX_SAMPLES = 128, MAX_STOPS = 64 };

static int check_length(const km_engine *engine, const km_request_options *o, km_err *err)
{
	int context = engine->shape.context_length;

	if (o->prompt_len < 1)
		return km_fail(err, KM_EINVAL, "the prompt has no tokens, expected at least one");
	if (o->max_tokens < 0 || (o->max_tokens == 0 && !o->prompt_logprobs))
		return km_fail(err, KM_EINVAL, "max_tokens is %d, expected at least %d",
		               o->max_tokens, o->prompt_logprobs ? 0 : 1);
	if (o->prompt_len > context || (o->prompt_len == context && o->max_tokens > 0))
		return km_fail(err, KM_EINVAL,
		               "the prompt has %d tokens, too many for the context length of %d%s",
		               o->prompt_len, context,
		               o->prompt_len == context ? " with an answer" : "");
	if (o->max_tokens > context - o->prompt_len)
		return km_fail(err, KM_EINVAL,
		               "the prompt's %d tokens and max_tokens %d make %lld, more than the "
		               "context length of %d",
		               o->prompt_len, o->max_tokens,
		               (long long)o->prompt_len + o->max_tokens, context);
	return 0;
}

static int check_ids(const km_engine *engine, const km_request_options *o, km_err *err)
{
	int vocab = engine->backend.vocab_size;

	for (int i = 0; i < o->prompt_len; i++)
		if (o->prompt[i] < 0 || o->prompt[i] >= vocab)
			return km_fail(err, KM_EINVAL,
			               "token %d of the prompt has id %d, expected 0 to %d", i,
			               (int)o->prompt[i], vocab - 1);
	for (int i = 0; i < o->stop_id_count; i++)
		if (o->stop_ids[i] < 0 || o->stop_ids[i] >= vocab)
			return km_fail(err, KM_EINVAL, "stop id %d, expected 0 to %d",
			               (int)o->stop_ids[i], vocab - 1);
	return 0;
}

static int check(const km_engine *engine, const km_request_options *o, km_err *err)
{
	if (o->n < 1 || o->n > MAX_SAMPLES)
		return km_fail(err, KM_EINVAL, "n is %d, expected 1 to %d", o->n, MAX_SAMPLES);
	if (!o->on_event || (o->prompt_logprobs && !o->on_prompt_logprob))
		return km_fail(err, KM_EINVAL, "a request needs somewhere to send its events");
	if (o->logprobs > KM_MAX_LOGPROBS)
		return km_fail(
			err, KM_EINVAL,
			"%d alternatives of log-probabilities were asked for, at most %d are given",
			o->logprobs, KM_MAX_LOGPROBS);
	if (o->stop_count < 0 || o->stop_count > MAX_STOPS)
		return km_fail(err, KM_EINVAL, "%d stop strings, expected at most %d",
		               o->stop_count, MAX_STOPS);
	for (int i = 0; i < o->stop_count; i++)
		if (!o->stop[i][0])
			return km_fail(err, KM_EINVAL, "stop string %d is empty", i);
	KM_TRY(check_length(engine, o, err));
	KM_TRY(check_ids(engine, o, err));
	return km_sampling_check(&o->sampling, engine->backend.vocab_size, err);
}

static void *copy(const void *from, int count, size_t size)
{
	void *to = km_xcalloc((size_t)count, size);

	if (count)
		memcpy(to, from, (size_t)count * size);
	return to;
}

static void init_counts(const km_engine *engine, km_sample *sample)
{
	int max = sample->seq.max_len, vocab = engine->backend.vocab_size;

	sample->has_counts = true;
	km_counts_init(&sample->counts, max < vocab ? max : vocab);
	for (int i = 0; i < sample->seq.prompt_len; i++)
		km_counts_add(&sample->counts, sample->seq.ids[i], false);
}

static void init_sample(const km_engine *engine, km_request *r, int index,
                        const km_request_options *o)
{
	km_sample *sample = &r->samples[index];
	km_seq *seq = &sample->seq;
	int size = engine->shape.page_size;

	sample->request = r;
	sample->index = index;
	seq->max_len = o->prompt_len + o->max_tokens;
	seq->len = seq->prompt_len = o->prompt_len;
	seq->ids = km_xreallocarray(NULL, (size_t)seq->max_len, sizeof(int32_t));
	memcpy(seq->ids, o->prompt, (size_t)o->prompt_len * sizeof(int32_t));
	seq->pages =
		km_xreallocarray(NULL, (size_t)((seq->max_len + size - 1) / size), sizeof(int32_t));
	seq->leader = index ? &r->samples[0].seq : NULL;
	seq->score_to = r->scores_prompt && !index ? o->prompt_len - 1 : 0;
	if (km_sampling_has_penalties(&o->sampling))
		init_counts(engine, sample);
	if (r->stops.count)
		km_stop_init(&sample->stop, &r->stops, engine->backend.max_token_bytes);
}

int km_request_new(km_request **request, const km_engine *engine, const km_request_options *o,
                   km_err *err)
{
	km_request *r;

	KM_TRY(check(engine, o, err));
	r = km_xcalloc(1, sizeof(*r));
	r->n = r->live = o->n;
	r->submitted_ns = km_now_ns();
	r->queue_ns = -1;
	r->sampling = o->sampling;
	r->sampling.bias = copy(o->sampling.bias, o->sampling.bias_count, sizeof(km_logit_bias));
	r->stop_ids = copy(o->stop_ids, o->stop_id_count, sizeof(int32_t));
	r->stop_id_count = o->stop_id_count;
	r->ignore_eos = o->ignore_eos;
	r->scores_prompt = o->prompt_logprobs;
	r->logprobs = o->logprobs;
	r->on_event = o->on_event;
	r->on_prompt_logprob = o->on_prompt_logprob;
	r->ctx = o->ctx;
	km_stop_set_init(&r->stops, o->stop, o->stop_count);
	r->samples = km_xcalloc((size_t)o->n, sizeof(*r->samples));
	for (int i = 0; i < o->n; i++)
		init_sample(engine, r, i, o);
	*request = r;
	return 0;
}

void km_request_free(km_request *r)
{
	if (!r)
		return;
	for (int i = 0; i < r->n; i++) {
		km_sample *sample = &r->samples[i];

		free(sample->seq.ids);
		free(sample->seq.pages);
		if (sample->has_counts)
			km_counts_release(&sample->counts);
		if (r->stops.count)
			km_stop_release(&sample->stop);
	}
	free(r->samples);
	free((void *)r->sampling.bias);
	free(r->stop_ids);
	km_stop_set_release(&r->stops);
	free(r);
}

int km_request_cached_tokens(const km_request *r)
{
	return atomic_load(&r->cached_tokens);
}

double km_request_queue_seconds(const km_request *r)
{
	return (double)atomic_load(&r->queue_ns) * 1e-9;
}
