#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "support/forward_case.h"

km_model_options fwd_options(const char *isa, enum km_kv_dtype kv_dtype)
{
	return (km_model_options){
		.max_batch_tokens = FWD_MAX_ROWS,
		.max_seqs = FWD_MAX_SEQS,
		.max_logit_rows = FWD_MAX_ROWS,
		.max_context = FWD_PAGE * FWD_PAGES_PER_SEQ,
		.kv_slots = FWD_KV_SLOTS,
		.kv_dtype = kv_dtype,
		.threads = 1,
		.isa = isa, /* what depends on threads says so */
	};
}

fwd_opened fwd_open(const char *name, km_model_options options)
{
	fwd_opened o = { .golden = tiny_load(name) };
	km_err err = { 0 };

	o.dir = tiny_write(o.golden);
	options.hf_lora_norm_eps = json_is_true(json_object_get(o.golden, "hf_lora_norm_eps"));
	if (km_model_open(&o.model, o.dir, &options, &err) < 0)
		fail_msg("%s: %s", name, err.msg);
	o.vocab = km_model_config(o.model)->vocab_size;
	return o;
}

void fwd_close(fwd_opened *o)
{
	km_model_close(o->model);
	tiny_remove(o->dir);
	json_decref(o->golden);
}

/* Prompt `index` of the golden file, in the pages of place `place`, handed out in no special order.
 * */
fwd_sequence *fwd_prompt(const fwd_opened *o, int index, int place)
{
	json_t *prompts = json_object_get(o->golden, "prompts");
	json_t *ids = json_object_get(json_array_get(prompts, (size_t)index), "ids");
	fwd_sequence *q = km_xcalloc(1, sizeof(*q));

	q->len = (int)json_array_size(ids);
	for (int i = 0; i < q->len; i++)
		q->ids[i] = (int32_t)json_integer_value(json_array_get(ids, (size_t)i));
	assert_true(q->len <= FWD_LONG_CONTEXT);
	q->page_count = q->len > FWD_MAX_ROWS ? FWD_LONG_PAGES : FWD_PAGES_PER_SEQ;
	for (int i = 0; i < q->page_count; i++) /* 7 divides neither count */
		q->pages[i] = q->len > FWD_MAX_ROWS
		                      ? i * 7 % FWD_LONG_PAGES
		                      : i * 7 % FWD_PAGES_PER_SEQ * FWD_MAX_SEQS + place;
	q->logits = km_xcalloc((size_t)q->len * (size_t)o->vocab, sizeof(float));
	return q;
}

void fwd_drop(fwd_sequence *q)
{
	free(q->logits);
	free(q);
}

void fwd_add(fwd_step *s, fwd_sequence *q, int rows, bool decode)
{
	km_batch *b = &s->batch;

	b->pages_per_seq = q->page_count;
	memcpy(s->pages + b->seqs * q->page_count, q->pages,
	       (size_t)q->page_count * sizeof(int32_t));
	for (int i = 0; i < rows; i++, b->tokens++) {
		int at = q->done + i;

		s->ids[b->tokens] = q->ids[at];
		s->positions[b->tokens] = at;
		s->slots[b->tokens] = q->pages[at / FWD_PAGE] * FWD_PAGE + at % FWD_PAGE;
		s->logit_row[b->tokens] = b->tokens;
	}
	s->owner[b->seqs] = q;
	s->kv_len[b->seqs] = q->done + rows;
	s->seq_start[++b->seqs] = b->tokens;
	b->decode_seqs += decode;
}

void fwd_point(fwd_step *s)
{
	km_batch *b = &s->batch;

	b->ids = s->ids;
	b->positions = s->positions;
	b->slots = s->slots;
	b->seq_start = s->seq_start;
	b->kv_len = s->kv_len;
	b->pages = s->pages;
	b->page_size = FWD_PAGE;
	b->logit_row = s->logit_row;
	b->logit_rows = b->tokens;
}

/* Runs the step, gives each sequence its rows' logits, and empties the step. */
void fwd_run(fwd_opened *o, fwd_step *s)
{
	const float *logits;
	km_err err;

	fwd_point(s);
	if (km_model_forward(o->model, &s->batch, &logits, &err) < 0)
		fail_msg("%s", err.msg);
	for (int i = 0; i < s->batch.seqs; i++) {
		fwd_sequence *q = s->owner[i];
		int rows = s->seq_start[i + 1] - s->seq_start[i];

		memcpy(q->logits + (size_t)q->done * (size_t)o->vocab,
		       logits + (size_t)s->seq_start[i] * (size_t)o->vocab,
		       (size_t)rows * (size_t)o->vocab * sizeof(float));
		q->done += rows;
	}
	memset(s, 0, sizeof(*s));
}

/* The whole prompt: `first` rows, then chunks of `chunk`, or one token at a time by the decode
 * form. */
fwd_sequence *fwd_score(fwd_opened *o, int index, int first, int chunk, bool decode)
{
	fwd_sequence *q = fwd_prompt(o, index, 0);
	fwd_step s = { 0 };

	while (q->done < q->len) {
		int left = q->len - q->done, rows = q->done ? chunk : first;

		fwd_add(&s, q, rows < left ? rows : left, decode && q->done);
		fwd_run(o, &s);
	}
	return q;
}

fwd_sequence *fwd_score_whole(fwd_opened *o, int index)
{
	return fwd_score(o, index, FWD_MAX_ROWS, FWD_MAX_ROWS, false);
}

/* log softmax of one row at one token; and the row's first maximum */
double fwd_log_prob(const float *row, int vocab, int id, int *top)
{
	double max = -INFINITY, sum = 0;

	for (int i = 0; i < vocab; i++)
		if ((double)row[i] > max) {
			max = (double)row[i];
			*top = i;
		}
	for (int i = 0; i < vocab; i++)
		sum += exp((double)row[i] - max);
	return (double)row[id] - max - log(sum);
}

static void compare_one(fwd_difference *d, double difference)
{
	d->sum += fabs(difference);
	d->count++;
	if (!(fabs(difference) <= d->max)) /* NaN is kept */
		d->max = fabs(difference);
}

static double at(json_t *array, int i)
{
	return json_number_value(json_array_get(array, (size_t)i));
}

/* Each prompt token's log-probability, the top token and its log-probability, against the
 * reference. */
void fwd_compare(const fwd_opened *o, int index, const fwd_sequence *q, fwd_difference *d)
{
	json_t *g = json_array_get(json_object_get(o->golden, "prompts"), (size_t)index);
	json_t *logprob = json_object_get(g, "logprob"),
	       *top_logprob = json_object_get(g, "top_logprob");
	json_t *margin = json_object_get(g, "margin"), *top = json_object_get(g, "top");
	int first = (int)json_integer_value(
		json_object_get(g, "first")); /* position of the arrays' first */

	for (int i = 0; first + i < q->len; i++) {
		const float *row = q->logits + (size_t)(first + i) * (size_t)o->vocab;
		int best = -1, expected = (int)at(top, i);

		compare_one(d, fwd_log_prob(row, o->vocab, expected, &best) - at(top_logprob, i));
		if (first + i + 1 < q->len)
			compare_one(d, fwd_log_prob(row, o->vocab, q->ids[first + i + 1], &best) -
			                       at(logprob, i));
		d->wrong_top += best != expected && at(margin, i) > FWD_BOUND;
	}
}

/* The largest difference of any token's log-probability between two scored sequences. */
double fwd_largest_difference(const fwd_opened *o, const fwd_sequence *a, const fwd_sequence *b)
{
	fwd_difference d = { 0 };
	int top;

	for (int t = 0; t < a->len; t++)
		for (int i = 0; i < o->vocab; i++) {
			size_t row = (size_t)t * (size_t)o->vocab;

			compare_one(&d, fwd_log_prob(a->logits + row, o->vocab, i, &top) -
			                        fwd_log_prob(b->logits + row, o->vocab, i, &top));
		}
	return d.max;
}
