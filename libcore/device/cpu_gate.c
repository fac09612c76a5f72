/*
 * The gate: one form for all, since a row costs microseconds.
 *
 * A row's work is exact selection, so nothing is approximated: scores through one exp in a
 * fixed order, and a sorted list of at most top_k entries that a later expert enters only when it
 * is strictly better, which gives ties to the lower id. Experts come in rising order of id.
 */
#include <math.h>

#include "base/fixed_math.h"
#include "device/cpu.h"

typedef struct gate_row {
	const km_gate_args *args;
	const float *logits;
	float largest, sum; /* of softmax */
} gate_row;

enum { SCORES = 64 };

/* Scores of up to SCORES experts from `e` on: a loop that becomes vectors. */
static void score_block(const gate_row *row, int e, float *scores)
{
	int left = row->args->experts - e, count = left < SCORES ? left : SCORES;
	const float *logits = row->logits + e;

	if (row->args->softmax)
		for (int i = 0; i < count; i++)
			scores[i] = km_fixed_exp(logits[i] - row->largest) / row->sum;
	else
		for (int i = 0; i < count; i++)
			scores[i] = 1.0f / (1.0f + km_fixed_exp(-logits[i]));
}

/* What experts are selected by; -inf: never. */
static float choice_of(const gate_row *row, int e, float score)
{
	float choice = row->args->bias ? score + row->args->bias[e] : score;

	return row->logits[e] > -INFINITY && choice > -INFINITY ? choice : -INFINITY;
}

static void softmax_sums(gate_row *row)
{
	row->largest = -INFINITY;
	for (int e = 0; e < row->args->experts; e++)
		row->largest = row->logits[e] > row->largest ? row->logits[e] : row->largest;
	row->sum = 0;
	for (int e = 0; e < row->args->experts; e++)
		row->sum += km_fixed_exp(row->logits[e] - row->largest);
}

/* The sum of the group's two best; -inf when it has no expert to select. */
static float group_score(const gate_row *row, int group, int size)
{
	float best = -INFINITY, second = -INFINITY, scores[SCORES];

	for (int e = group * size; e < (group + 1) * size; e++) {
		int i = (e - group * size) % SCORES;
		float choice;

		if (i == 0)
			score_block(row, e, scores);
		choice = choice_of(row, e, scores[i]);

		if (choice > best) {
			second = best;
			best = choice;
		} else if (choice > second) {
			second = choice;
		}
	}
	return second > -INFINITY ? best + second : best;
}

/* A group is in when fewer than topk_group others are better: higher, or as high with a lower
 * id. */
static bool group_is_in(const float *scores, const km_gate_args *a, int group)
{
	int better = 0;

	for (int g = 0; g < a->groups; g++)
		better += scores[g] > scores[group] || (scores[g] == scores[group] && g < group);
	return better < a->topk_group && scores[group] > -INFINITY;
}

/* The best so far, by falling choice. */
typedef struct gate_list {
	int32_t *ids;
	float *scores;
	float choices[KM_GATE_MAX_TOP_K];
	int count, max;
} gate_list;

static void list_add(gate_list *list, int32_t id, float score, float choice)
{
	int at = list->count < list->max ? list->count++ : list->max - 1;

	for (; at > 0 && choice > list->choices[at - 1]; at--) {
		list->choices[at] = list->choices[at - 1];
		list->ids[at] = list->ids[at - 1];
		list->scores[at] = list->scores[at - 1];
	}
	list->choices[at] = choice;
	list->ids[at] = id;
	list->scores[at] = score;
}

static void select_experts(const gate_row *row, gate_list *list)
{
	const km_gate_args *a = row->args;
	int groups = a->groups > 1 ? a->groups : 1, size = a->experts / groups;
	float group_scores[KM_GATE_MAX_GROUPS], scores[SCORES];

	for (int g = 0; g < groups && groups > 1; g++)
		group_scores[g] = group_score(row, g, size);
	for (int g = 0; g < groups; g++) {
		if (groups > 1 && !group_is_in(group_scores, a, g))
			continue;
		for (int i = 0; i < size; i++) {
			int e = g * size + i;
			float choice;

			if (i % SCORES == 0)
				score_block(row, e, scores);
			choice = choice_of(row, e, scores[i % SCORES]);
			if (choice > (list->count < list->max ? -INFINITY
			                                      : list->choices[list->max - 1]))
				list_add(list, e, scores[i % SCORES], choice);
		}
	}
}

static void gate_token(const km_gate_args *a, int t)
{
	gate_row row = { .args = a, .logits = a->logits + (size_t)t * (size_t)a->experts };
	gate_list list = {
		.ids = a->ids + (size_t)t * (size_t)a->top_k,
		.scores = a->weights + (size_t)t * (size_t)a->top_k,
		.max = a->top_k,
	};
	float sum = 0;

	if (a->softmax)
		softmax_sums(&row);
	select_experts(&row, &list);
	for (int k = list.count; k < a->top_k; k++) {
		list.ids[k] = 0;
		list.scores[k] = 0;
	}
	if (!a->renormalize)
		return;
	for (int k = 0; k < list.count; k++)
		sum += list.scores[k];
	for (int k = 0; k < list.count; k++)
		list.scores[k] /= sum + 1e-20f;
}

void km_cpu_gate(const km_gate_args *a)
{
	KM_CPU_FOR(20.0 * a->tokens * a->experts, t, a->tokens, gate_token(a, t));
}
