#include "model/router_check.h"

#include <math.h>
#include <stdlib.h>

#include "base/mem.h"
#include "format/dtype.h"

/* Scores are within 4 ulp of the real ones, a bias adds a rounding at its own size. */
static double near_tie(double c)
{
	return 6e-7 + 2.4e-7 * fabs(c);
}

static const double WEIGHT_BOUND = 1e-6;

double km_router_logit_bound(const km_router_shape *s)
{
	return (s->hidden / 8 + 32) * 0x1p-24;
}

static int check_logit(km_router_check *check, const km_router_shape *s, const uint16_t *x,
                       const void *w, int e, float got, km_err *err)
{
	double sum = 0, sizes = 0, bound = km_router_logit_bound(s), off;

	for (int h = 0; h < s->hidden; h++) {
		size_t at = (size_t)e * (size_t)s->hidden + (size_t)h;
		double b = s->weights_f32 ? (double)((const float *)w)[at]
		                          : (double)km_bf16_to_f32(((const uint16_t *)w)[at]);
		double p = (double)km_bf16_to_f32(x[h]) * b;

		sum += p;
		sizes += fabs(p);
	}
	off = fabs((double)got - sum);
	if (!(off <= bound * sizes))
		return km_fail(err, KM_EFORMAT, "logit of expert %d: got %.9g, want %.9g, bound %.3g", e,
		               (double)got, sum, bound * sizes);
	if (sizes > 0 && off / sizes > check->worst_logit)
		check->worst_logit = off / sizes;
	return 0;
}

int km_router_check_logits(km_router_check *check, const km_router_shape *s, const uint16_t *x,
                           const void *w, const float *logits, int first, int step, km_err *err)
{
	for (int t = first; t < s->tokens; t += step)
		for (int e = 0; e < s->experts; e++) {
			int rc = check_logit(check, s, x + (size_t)t * (size_t)s->hidden, w, e,
			                     logits[(size_t)t * (size_t)s->experts + (size_t)e], err);

			if (rc < 0) {
				km_fail_within(err, "token %d", t);
				return rc;
			}
		}
	return 0;
}

/* A row in double: choice is NaN for experts that can never be selected. */
typedef struct reference_row {
	double *score, *choice; /* [experts] */
	bool unsure;            /* which groups are in is closer than f32 can tell */
} reference_row;

static void score_row(reference_row *r, const km_router_shape *s, const float *x, const float *bias)
{
	double largest = -INFINITY, sum = 0;

	for (int e = 0; e < s->experts; e++)
		if (isnan(x[e]) || (double)x[e] > largest)
			largest = (double)x[e];
	for (int e = 0; e < s->experts && s->softmax; e++)
		sum += exp((double)x[e] - largest);
	for (int e = 0; e < s->experts; e++) {
		double v = (double)x[e];

		r->score[e] = s->softmax ? exp(v - largest) / sum : 1 / (1 + exp(-v));
		r->choice[e] = r->score[e] + (bias ? (double)bias[e] : 0);
		if (!(v > -INFINITY) || !(r->choice[e] > -INFINITY))
			r->choice[e] = NAN;
	}
}

static double group_score(const reference_row *r, int group, int size)
{
	double best = -INFINITY, second = -INFINITY;

	for (int e = group * size; e < (group + 1) * size; e++) {
		double c = r->choice[e];

		if (c > best) {
			second = best;
			best = c;
		} else if (c > second) {
			second = c;
		}
	}
	return second > -INFINITY ? best + second : best;
}

static void mask_groups(reference_row *r, const km_router_shape *s)
{
	int size = s->experts / s->groups;
	double score[64];

	KM_ASSERT(s->groups <= 64);
	for (int g = 0; g < s->groups; g++)
		score[g] = group_score(r, g, size);
	for (int g = 0; g < s->groups; g++) {
		int better = 0;

		for (int o = 0; o < s->groups; o++) {
			better += score[o] > score[g] || (score[o] == score[g] && o < g);
			if (o != g && score[o] != score[g] &&
			    fabs(score[o] - score[g]) < 2 * near_tie(score[g]))
				r->unsure = true;
		}
		for (int e = g * size; e < (g + 1) * size && better >= s->topk_group; e++)
			r->choice[e] = NAN;
	}
}

static int best_of(const reference_row *r, int experts)
{
	int best = -1;

	for (int e = 0; e < experts; e++)
		if (!isnan(r->choice[e]) && (best < 0 || r->choice[e] > r->choice[best]))
			best = e;
	return best;
}

/* The expert that was taken where the reference has `want`: itself, or one that f32 cannot tell from
 * it. -1: neither. */
static int taken_expert(const reference_row *r, const km_router_shape *s, const int32_t *map, int want,
                        int32_t id)
{
	if ((map ? map[want] : want) == id)
		return want;
	for (int e = 0; e < s->experts; e++) {
		double apart = fabs(r->choice[e] - r->choice[want]);

		if ((map ? map[e] : e) == id && apart > 0 && apart <= near_tie(r->choice[want]))
			return e;
	}
	return -1;
}

/* A score below f32's smallest normal number has few bits, or is flushed to zero: it, and a weight as
 * small, may be off by that number. */
static int check_weight(km_router_check *check, double got, double score, double want, km_err *err)
{
	const double smallest = 0x1p-126;
	double off = fabs(got - want), factor = score > 0 ? want / score : 0;

	if (score < smallest || want < smallest) {
		if (!(off <= smallest * fmax(factor, 1)))
			return km_fail(err, KM_EFORMAT, "weight %.9g, want %.9g (subnormal)", got, want);
		return 0;
	}
	if (!(off <= WEIGHT_BOUND * want))
		return km_fail(err, KM_EFORMAT, "weight %.9g, want %.9g", got, want);
	if (off / want > check->worst_weight)
		check->worst_weight = off / want;
	return 0;
}

static int check_row(km_router_check *check, reference_row *r, const km_router_shape *s,
                     const int32_t *map, const int32_t *ids, const float *weights, km_err *err)
{
	int taken[64], found;
	double sum = 0;

	for (found = 0; found < s->top_k; found++) {
		int want = best_of(r, s->experts), e;

		if (want < 0)
			break;
		e = taken_expert(r, s, map, want, ids[found]);
		if (e < 0)
			return km_fail(err, KM_EFORMAT, "place %d: id %d, want %d", found, ids[found],
			               map ? map[want] : want);
		check->near_ties += e != want;
		r->choice[e] = NAN;
		taken[found] = e;
		sum += r->score[e];
	}
	for (int k = 0; k < s->top_k; k++) {
		double want = 0;

		if (k >= found && (ids[k] != 0 || weights[k] != 0.0f))
			return km_fail(err, KM_EFORMAT, "place %d must be id 0 and weight 0: id %d, weight %g",
			               k, ids[k], (double)weights[k]);
		if (k >= found)
			continue;
		want = (s->renormalize ? r->score[taken[k]] / (sum + 1e-20) : r->score[taken[k]]) *
		       (double)s->scale;
		KM_TRY(check_weight(check, (double)weights[k], r->score[taken[k]], want, err));
	}
	return 0;
}

static int check_padding(const km_router_shape *s, const int32_t *ids, const float *weights, km_err *err)
{
	for (int k = 0; k < s->top_k; k++)
		if (ids[k] != -1 || weights[k] != 0.0f)
			return km_fail(err, KM_EFORMAT, "padding has id %d, weight %g; want -1, 0", ids[k],
			               (double)weights[k]);
	return 0;
}

int km_router_check_gate(km_router_check *check, const km_router_shape *s, const float *logits,
                         const float *bias, const int32_t *map, int valid, const int32_t *ids,
                         const float *weights, km_err *err)
{
	double *room = km_xmalloc(2 * (size_t)s->experts * sizeof(double));
	reference_row r = { .score = room, .choice = room + s->experts };
	int rc = 0;

	KM_ASSERT(s->top_k <= 64);
	for (int t = 0; t < s->tokens && rc == 0; t++) {
		size_t at = (size_t)t * (size_t)s->top_k;

		check->rows++;
		r.unsure = false;
		if (t >= valid) {
			rc = check_padding(s, ids + at, weights + at, err);
		} else {
			score_row(&r, s, logits + (size_t)t * (size_t)s->experts, bias);
			if (s->groups > 1)
				mask_groups(&r, s);
			if (r.unsure)
				check->near_ties++;
			else
				rc = check_row(check, &r, s, map, ids + at, weights + at, err);
		}
		if (rc < 0)
			km_fail_within(err, "token %d", t);
	}
	free(room);
	return rc;
}

int km_router_check_align(const km_router_shape *s, const int32_t *ids, const int32_t *sorted,
                          const int32_t *block_expert, int total, km_err *err)
{
	int places = s->tokens * s->top_k, *next = km_xcalloc((size_t)s->experts, sizeof(int)), at = 0, rc = 0;

	for (int i = 0; i < places; i++)
		if (ids[i] >= 0 && ids[i] < s->experts)
			next[ids[i]]++;
	for (int e = 0; e < s->experts; e++) {
		int start = at;

		at += (next[e] + s->block - 1) / s->block * s->block;
		for (int b = start / s->block; b < at / s->block && at <= total; b++)
			if (block_expert[b] != e)
				rc = km_fail(err, KM_EFORMAT, "block %d: expert %d, want %d", b,
				             block_expert[b], e);
		for (int i = start + next[e]; i < at && at <= total; i++)
			if (sorted[i] != places)
				rc = km_fail(err, KM_EFORMAT, "padding %d: %d, want %d", i, sorted[i], places);
		next[e] = start;
	}
	if (at != total)
		rc = km_fail(err, KM_EFORMAT, "the sorted list has %d places, want %d", total, at);
	for (int i = 0; i < places && rc == 0; i++) {
		int32_t e = ids[i];

		if (e < 0 || e >= s->experts)
			continue;
		if (sorted[next[e]] != i)
			rc = km_fail(err, KM_EFORMAT, "sorted place %d: %d, want %d", next[e],
			             sorted[next[e]], i);
		next[e]++;
	}
	free(next);
	return rc;
}
