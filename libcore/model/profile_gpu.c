/*
 * A step on a GPU, timed by replaying graphs of it: whole, its middle layers, each op alone, and all
 * but one op. model/profile.h says what the numbers mean.
 *
 * A graph is replayed so often that a timing takes some milliseconds, and the median of a few timings
 * counts; the first replay, which uploads the graph, does not.
 */
#include "model/profile_state.h"

#if KM_CUDA

#include <math.h>
#include <stdlib.h>

#include "base/mem.h"
#include "model/gpu.h"

enum { ROUNDS = 5, MOST_REPLAYS = 200 };

static const double round_us = 2500, slow_us = 20000;

/* What a graph is made of. */
struct part {
	const km_batch *batch;
	int from, to; /* layers; from -1: the whole step */
	uint32_t left_out;
};

static int enqueue(km_model *m, const struct part *part, km_err *err)
{
	int rc;

	m->gpu->stream = m->gpu->b.stream;
	m->gpu->normed = m->gpu->b.normed;
	m->gpu->left_out = part->left_out;
	rc = part->from < 0
	             ? km_steps_run(m, part->batch, err)
	             : km_steps_run_layers(m, part->batch, part->from, part->to, err);
	m->gpu->left_out = 0;
	return rc;
}

static int capture(km_model *m, const struct part *part, km_cuda_graph **graph, km_err *err)
{
	km_cuda *cuda = m->gpu->cuda;
	int rc;

	KM_TRY(km_cuda_capture_begin(cuda, err));
	rc = enqueue(m, part, err);
	if (rc < 0) {
		if (km_cuda_capture_end(cuda, graph, NULL) >= 0)
			km_cuda_graph_free(*graph);
		return rc;
	}
	return km_cuda_capture_end(cuda, graph, err);
}

static int replay(km_cuda *cuda, km_cuda_graph *graph, int times, double *us, km_err *err)
{
	KM_TRY(km_cuda_time_begin(cuda, err));
	for (int i = 0; i < times; i++)
		KM_TRY(km_cuda_graph_launch(cuda, graph, err));
	KM_TRY(km_cuda_time_end(cuda, us, err));
	*us /= times;
	return 0;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static int time_graph(km_cuda *cuda, km_cuda_graph *graph, double *us, km_err *err)
{
	double round[ROUNDS], once;
	int times, rounds;

	KM_TRY(replay(cuda, graph, 1, &once, err));
	KM_TRY(replay(cuda, graph, 1, &once, err));
	times = once * MOST_REPLAYS < round_us ? MOST_REPLAYS : (int)(round_us / once) + 1;
	rounds = once > slow_us ? 3 : ROUNDS;
	for (int i = 0; i < rounds; i++)
		KM_TRY(replay(cuda, graph, times, &round[i], err));
	qsort(round, (size_t)rounds, sizeof(*round), ascending);
	*us = round[rounds / 2];
	return 0;
}

static int time_part(km_model *m, const struct part *part, double *us, int *launches, km_err *err)
{
	km_cuda_graph *graph = NULL;
	int rc = 0;

	*us = 0;
	KM_TRY(capture(m, part, &graph, err));
	*launches = km_cuda_graph_launches(graph);
	if (*launches)
		rc = time_graph(m->gpu->cuda, graph, us, err);
	km_cuda_graph_free(graph);
	return rc;
}

/* ---- which experts ---- */

static int count_layer(km_model *m, int rows, int32_t *ids, bool *chosen, int *distinct, km_err *err)
{
	const km_config *c = &m->config;
	size_t places = (size_t)rows * (size_t)c->num_experts_per_tok;

	KM_TRY(km_cuda_download(m->gpu->cuda, ids, m->gpu->b.expert_ids, places * sizeof(*ids), err));
	for (int e = 0; e < c->n_routed_experts; e++)
		chosen[e] = false;
	for (size_t i = 0; i < places; i++)
		if (ids[i] >= 0 && ids[i] < c->n_routed_experts)
			chosen[ids[i]] = true;
	*distinct = 0;
	for (int e = 0; e < c->n_routed_experts; e++)
		*distinct += chosen[e];
	return 0;
}

/* Of every MoE layer, how many different experts the rows that are no padding choose. */
static int count_experts(km_model *m, const km_batch *batch, const km_batch *run, int *distinct,
                         km_err *err)
{
	const km_config *c = &m->config;
	int32_t *ids = km_xcalloc((size_t)batch->tokens * (size_t)c->num_experts_per_tok + 1,
	                          sizeof(*ids));
	bool *chosen = km_xcalloc((size_t)c->n_routed_experts + 1, sizeof(*chosen));
	int last = c->num_hidden_layers - 1, rc = m->steps->embed(m, run, err);

	for (int i = 0; rc >= 0 && i <= last; i++) {
		int rows = i == last && !m->gpu->whole ? m->kept.batch.tokens : batch->tokens;

		rc = km_steps_run_layers(m, run, i, i + 1, err);
		if (rc >= 0 && rows && km_config_is_moe_layer(c, i))
			rc = count_layer(m, rows, ids, chosen, &distinct[i], err);
	}
	free(ids);
	free(chosen);
	return rc;
}

/* ---- the step ---- */

static int time_ops(km_model *m, const km_batch *run, km_profile *p, km_err *err)
{
	const uint32_t all = (UINT32_C(1) << KM_STEP_COUNT) - 1;
	struct part whole = { run, -1, 0, 0 };

	for (int i = 0; i < KM_STEP_COUNT; i++) {
		struct part alone = { run, -1, 0, all & ~(UINT32_C(1) << i) };
		struct part without = { run, -1, 0, UINT32_C(1) << i };
		double us, now;
		int launches;

		p->op[i].saved_us = NAN;
		if (!p->op[i].cost.calls)
			continue;
		KM_TRY(enqueue(m, &whole, err)); /* what the op reads is a step's again */
		KM_TRY(time_part(m, &alone, &p->op[i].us, &p->op[i].launches, err));
		p->sum_us += p->op[i].us;
		if (p->step_us > slow_us || !p->op[i].launches)
			continue;
		KM_TRY(time_part(m, &whole, &now, &launches, err)); /* at the clock of now */
		KM_TRY(time_part(m, &without, &us, &launches, err));
		p->op[i].saved_us = now - us;
	}
	return enqueue(m, &whole, err); /* and so is the cache */
}

static int time_all(km_model *m, const km_batch *batch, const km_batch *run, int *distinct,
                    km_profile *p, km_err *err)
{
	km_step_cost costs[KM_STEP_COUNT];
	km_profile_layers l;
	int launches;
	struct part whole = { run, -1, 0, 0 }, layers = { run, 0, 0, 0 };

	KM_TRY(count_experts(m, batch, run, distinct, err));
	km_profile_choose_layers(m, run, &l);
	KM_TRY(time_part(m, &whole, &p->step_us, &p->launches, err));
	layers.from = l.from;
	layers.to = l.to;
	if (l.to > l.from)
		KM_TRY(time_part(m, &layers, &p->layers_us, &launches, err));
	p->layers = l.to - l.from;
	p->layers_are_moe = l.moe;
	p->cache_bytes = (double)m->gpu->info.l2_bytes;
	km_profile_mean_experts(m, batch, distinct, p);
	km_profile_costs(m, batch, m->gpu->generating ? batch : &m->kept.batch, distinct, costs);
	for (int i = 0; i < KM_STEP_COUNT; i++)
		p->op[i].cost = costs[i];
	km_profile_layer_costs(m, batch, &l, distinct, p);
	p->op[KM_STEP_RESULT].cost.calls = batch->logit_rows > 0 && km_model_draws(m);
	p->op[KM_STEP_RESULT].cost.bytes = 4.0 * batch->logit_rows * m->config.vocab_size;
	return time_ops(m, run, p, err);
}

int km_profile_gpu(km_model *m, const km_batch *batch, km_profile *p, km_err *err)
{
	int *distinct = km_xcalloc((size_t)m->config.num_hidden_layers, sizeof(*distinct));
	const float *logits;
	int rc = m->steps->begin(m, batch, err);

	if (rc >= 0)
		rc = time_all(m, batch, &m->gpu->step, distinct, p, err);
	rc = m->steps->end(m, batch, rc, &logits, err);
	free(distinct);
	return rc;
}

int km_profile_fill_gpu(km_model *m, size_t at, const void *from, size_t bytes, km_err *err)
{
	return km_cuda_upload(m->gpu->cuda, m->gpu->kv + at, from, bytes, err);
}

#endif
