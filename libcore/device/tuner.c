#include "device/tuner.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

enum { FIRST_SAMPLES = 2, DUEL = 15, SHORT_DUEL = 5, MOST_SAMPLES = 32 };

/* A check is one call with its launch: below this many microseconds its time says little. */
static const double rough_us = 40;

struct runner {
	km_tune_entry entry;
	double samples[MOST_SAMPLES];
	int count;
	double rough_us; /* of its check */
};

struct search {
	const km_tuner_backend *b;
	const km_tuner_options *o;
	km_tuner_state state;
	double begun, begun_tokens;
	struct runner *runners; /* [state.left] still in; the plan's own is kept in `plan` too */
	struct runner plan;
};

static double now(const struct search *s)
{
	return s->b->now(s->b->context);
}

static bool stopped(const struct search *s)
{
	return s->o->cancel && *s->o->cancel;
}

static int canceled(km_err *err)
{
	return km_fail(err, KM_ECANCELED, "interrupted");
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(const struct runner *r)
{
	double sorted[MOST_SAMPLES];

	KM_ASSERT(r->count > 0);
	memcpy(sorted, r->samples, sizeof(*sorted) * (size_t)r->count);
	qsort(sorted, (size_t)r->count, sizeof(*sorted), by_value);
	return r->count % 2 ? sorted[r->count / 2]
	                    : (sorted[r->count / 2 - 1] + sorted[r->count / 2]) / 2;
}

static int by_median(const void *a, const void *b)
{
	double x = median(a), y = median(b);

	return (x > y) - (x < y);
}

static void show(struct search *s)
{
	km_tuner_state *t = &s->state;
	double t0 = now(s);

	int finished = t->index + t->done;

	t->elapsed_s = t0 - s->begun;
	t->left_s = -1;
	if (finished) { /* what the finished ones took, for each that is left */
		double took = (t->done ? t0 : s->begun_tokens) - s->begun;

		t->left_s = took / finished * (t->count - finished) - (t->elapsed_s - took);
		t->left_s = t->left_s > 0 ? t->left_s : 0;
	}
	if (s->o->show)
		s->o->show(s->o->show_context, t);
}

static int sample(struct search *s, struct runner *r, km_err *err)
{
	if (r->count == MOST_SAMPLES)
		return 0;
	KM_TRY(s->b->sample(s->b->context, s->state.tokens, r->entry.values, &r->samples[r->count],
	                    err));
	if (!(r->samples[r->count] > 0) || !isfinite(r->samples[r->count]))
		return km_fail(err, KM_EDEVICE, "a sample at %d tokens took %g us", s->state.tokens,
		               r->samples[r->count]);
	r->count++;
	return 0;
}

static void drop_slow(struct search *s)
{
	double fastest = s->runners[0].rough_us;
	int kept = 0;

	for (int i = 1; i < s->state.left; i++)
		if (s->runners[i].rough_us < fastest)
			fastest = s->runners[i].rough_us;
	for (int i = 0; i < s->state.left; i++)
		if (fastest < rough_us || s->runners[i].rough_us < 2 * fastest)
			s->runners[kept++] = s->runners[i];
	s->state.left = kept;
}

/* Drops what computes wrongly. */
static int check_all(struct search *s, km_err *err)
{
	km_tuner_state *t = &s->state;
	int kept = 0;

	for (int i = 0; i < t->candidates; i++) {
		km_err why = { 0 };
		int rc = s->b->check(s->b->context, t->tokens, s->runners[i].entry.values,
		                     &s->runners[i].rough_us, &why);

		if (stopped(s))
			return canceled(err);
		if (rc < 0 || (rc == 0 && i == 0))
			return km_fail(
				err, rc < 0 ? rc : KM_EDEVICE, "%s%s",
				rc < 0 ? "" : "the plan's own choice computes wrongly: ", why.msg);
		t->checked++;
		if (rc == 1) {
			s->runners[kept++] = s->runners[i];
		} else {
			t->wrong++;
			if (s->o->wrong)
				s->o->wrong(s->o->show_context, t->tokens,
				            s->runners[i].entry.values, why.msg);
		}
		show(s);
	}
	t->left = kept;
	drop_slow(s);
	return 0;
}

static bool spent(const struct search *s)
{
	return now(s) - s->begun_tokens > s->o->budget_s;
}

static void note_best(struct search *s, const struct runner *r)
{
	double us = median(r);

	if (s->state.best_us > 0 && us >= s->state.best_us && s->state.best != r->entry.values)
		return;
	s->state.best_us = us;
	s->state.best = r->entry.values;
}

/* One round: everybody in it has `samples` when it ends, or the budget is spent. Samples are
 * dealt out in turn, so that a device that warms up slows all alike. Returns 1 when it ended
 * early. */
static int play(struct search *s, int samples, km_err *err)
{
	for (int k = 0; k < samples; k++) {
		for (int i = 0; i < s->state.left; i++) {
			struct runner *r = &s->runners[i];

			if (stopped(s))
				return canceled(err);
			if (r->count >= samples)
				continue;
			/* everybody has one sample, whatever it costs: else there is no choice
			 * to make */
			if (r->count && spent(s))
				return 1;
			KM_TRY(sample(s, r, err));
			note_best(s, r);
			show(s);
		}
	}
	return 0;
}

static int knock_out(struct search *s, km_err *err)
{
	km_tuner_state *t = &s->state;
	int samples = FIRST_SAMPLES, ended = 0;

	while (t->left > 1 && !ended) {
		ended = play(s, samples, err);
		KM_TRY(ended);
		t->best = NULL; /* sorting moves it */
		qsort(s->runners, (size_t)t->left, sizeof(*s->runners), by_median);
		t->left = (t->left + 1) / 2;
		t->best = s->runners[0].entry.values;
		t->best_us = median(&s->runners[0]);
		t->round++;
		samples = samples * 2 < MOST_SAMPLES ? samples * 2 : MOST_SAMPLES;
	}
	return 0;
}

static bool same_values(const struct runner *a, const struct runner *b)
{
	return !memcmp(a->entry.values, b->entry.values, sizeof(a->entry.values));
}

/* The winner against the plan, in turn. */
static int duel(struct search *s, km_err *err)
{
	struct runner *winner = &s->runners[0];

	winner->count = s->plan.count = 0;
	for (int i = 0; i < DUEL; i++) {
		if (stopped(s))
			return canceled(err);
		if (i >= SHORT_DUEL && spent(s))
			break;
		KM_TRY(sample(s, &s->plan, err));
		if (!same_values(winner, &s->plan))
			KM_TRY(sample(s, winner, err));
	}
	return 0;
}

static void enter(struct search *s, km_tune_table *table)
{
	km_tuner_state *t = &s->state;
	struct runner *winner = &s->runners[0];
	km_tune_entry e;

	t->plan_us = median(&s->plan);
	t->plan_won = same_values(winner, &s->plan) ||
	              median(winner) > t->plan_us * (1 - KM_TUNER_MARGIN);
	e = t->plan_won ? s->plan.entry : winner->entry;
	e.tokens = t->tokens;
	e.us = t->plan_won ? t->plan_us : median(winner);
	e.plan_us = t->plan_us;
	km_tune_put(table, &e);
	t->best_us = e.us;
	t->best = t->plan_won ? s->plan.entry.values : winner->entry.values;
	t->done = true;
}

static int tune_tokens(struct search *s, km_tune_table *table, km_err *err)
{
	km_tuner_state *t = &s->state;
	km_tune_entry *list = km_xcalloc(KM_TUNER_MAX_CANDIDATES, sizeof(*list));
	int n = s->b->candidates(s->b->context, t->tokens, list, KM_TUNER_MAX_CANDIDATES, err),
	    rc = n;

	KM_ASSERT(n);
	s->runners = n > 0 ? km_xcalloc((size_t)n, sizeof(*s->runners)) : NULL;
	for (int i = 0; i < n; i++)
		s->runners[i].entry = list[i];
	free(list);
	if (n > 0) {
		s->plan = s->runners[0];
		t->candidates = t->left = n;
		show(s);
		rc = s->b->prepare(s->b->context, t->tokens, err);
	}
	if (rc >= 0)
		rc = check_all(s, err);
	if (rc >= 0)
		rc = knock_out(s, err);
	if (rc >= 0)
		rc = duel(s, err);
	if (rc >= 0) {
		enter(s, table);
		show(s);
	}
	free(s->runners);
	t->best = NULL;
	return rc;
}

int km_tuner_run(const km_tuner_backend *backend, const km_tuner_options *o, km_tune_table *table,
                 km_err *err)
{
	struct search s = { .b = backend, .o = o };

	s.begun = now(&s);
	for (int i = 0; i < o->count; i++) {
		int rc;

		s.begun_tokens = now(&s);
		s.state = (km_tuner_state){ .tokens = o->tokens[i], .index = i, .count = o->count };
		rc = stopped(&s) ? canceled(err) : tune_tokens(&s, table, err);
		if (rc < 0)
			return rc;
	}
	return 0;
}

static int check_entry(const km_tuner_backend *b, const km_tune_entry *e, km_tuner_checked *c,
                       km_err *err)
{
	struct runner r = { .entry = *e };
	km_err why = { 0 };
	double rough;
	int rc;

	KM_TRY(b->prepare(b->context, e->tokens, err));
	rc = b->check(b->context, e->tokens, e->values, &rough, &why);
	if (rc < 0)
		return km_fail(err, rc, "%s", why.msg);
	c->right = rc == 1;
	snprintf(c->why, sizeof(c->why), "%.255s", why.msg);
	for (; c->right && r.count < DUEL; r.count++)
		KM_TRY(b->sample(b->context, e->tokens, e->values, &r.samples[r.count], err));
	if (c->right) {
		c->us = median(&r);
		c->off = c->us / c->table_us - 1;
	}
	return 0;
}

int km_tuner_check(const km_tuner_backend *backend, const km_tune_table *table,
                   const volatile sig_atomic_t *cancel, km_tuner_checked *out, km_err *err)
{
	for (int i = 0; i < table->count; i++)
		if (!(table->entries[i].us > 0))
			return km_fail(err, KM_EINVAL, "%s: entry %d has no \"us\" to check",
			               table->path, table->entries[i].tokens);
	for (int i = 0; i < table->count; i++) {
		out[i] = (km_tuner_checked){ .tokens = table->entries[i].tokens,
			                     .table_us = table->entries[i].us };
		if (cancel && *cancel)
			return canceled(err);
		KM_TRY(check_entry(backend, &table->entries[i], &out[i], err));
	}
	return 0;
}
