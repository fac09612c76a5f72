#include "model/profile.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "model/forward.h"
#include "model/gpu.h"
#include "model/profile_state.h"

enum { RUNS = 3 };

static const double enough_s = 10;

void km_profile_choose_layers(const km_model *m, const km_batch *batch, km_profile_layers *l)
{
	int layers = m->config.num_hidden_layers;

	*l = (km_profile_layers){ .to = m->kept.batch.tokens == batch->tokens ? layers : layers - 1 };
	for (int i = 0; i < layers && !l->moe; i++)
		if (km_config_is_moe_layer(&m->config, i)) {
			l->from = i;
			l->moe = true;
		}
	if (l->to < l->from)
		l->to = l->from;
}

void km_profile_costs(const km_model *m, const km_batch *batch, const km_batch *kept,
                      const int *experts, km_step_cost costs[KM_STEP_COUNT])
{
	km_step_shape shape = {
		.config = &m->config,
		.weights = &m->weights,
		.batch = batch,
		.kept = kept,
		.kv_dtype = m->options.kv_dtype,
		.experts = experts,
		.sums_where_made = m->options.backend == KM_BACKEND_CUDA,
		.router_joined_rows = m->gpu ? m->gpu->joined_rows : 0,
		.x_bytes = m->options.backend == KM_BACKEND_CUDA ? 2 : 4,
	};

	km_step_costs(&shape, costs);
}

static bool is_in_layers(enum km_step_op op, bool moe)
{
	if (op == KM_STEP_EMBED || op >= KM_STEP_KEEP)
		return false;
	return !moe || op < KM_STEP_MLP_GATE_UP || op > KM_STEP_MLP_DOWN;
}

void km_profile_layer_costs(const km_model *m, const km_batch *batch, const km_profile_layers *l,
                            const int *experts, km_profile *p)
{
	km_profile_costs(m, batch, batch, experts, p->layer);
	for (int i = 0; i < KM_STEP_COUNT; i++) {
		km_step_cost *c = &p->layer[i];
		double calls = (double)c->calls;

		if (!c->calls || !is_in_layers((enum km_step_op)i, l->moe)) {
			*c = (km_step_cost){ 0 };
			continue;
		}
		*c = (km_step_cost){ 1, c->bytes / calls, c->flops / calls, c->weight_bytes / calls };
	}
}

void km_profile_mean_experts(const km_model *m, const km_batch *batch, const int *experts,
                             km_profile *p)
{
	const km_config *c = &m->config;
	int layers = 0, last = c->num_hidden_layers - 1;

	p->distinct_experts = p->expected_experts = 0;
	for (int i = 0; i <= last; i++) {
		int rows = i < last ? batch->tokens : m->kept.batch.tokens;
		double missed = pow(1 - (double)c->num_experts_per_tok / c->n_routed_experts,
		                    rows < batch->tokens ? rows : batch->tokens);

		if (!km_config_is_moe_layer(c, i) || !experts[i])
			continue;
		p->distinct_experts += experts[i];
		p->expected_experts += c->n_routed_experts * (1 - missed);
		layers++;
	}
	if (!layers)
		return;
	p->distinct_experts /= layers;
	p->expected_experts /= layers;
}

/* ---- the CPU ---- */

struct times {
	double step_us, layers_us;
};

static int run_once(km_model *m, const km_batch *batch, const km_profile_layers *l,
                    struct times *t, km_err *err)
{
	int64_t start = km_now_ns(), from, to;
	const float *logits;
	int rc = m->steps->begin(m, batch, err);

	if (rc >= 0)
		rc = m->steps->embed(m, batch, err);
	if (rc >= 0)
		rc = km_steps_run_layers(m, batch, 0, l->from, err);
	from = km_now_ns();
	if (rc >= 0)
		rc = km_steps_run_layers(m, batch, l->from, l->to, err);
	to = km_now_ns();
	if (rc >= 0)
		rc = km_steps_run_layers(m, batch, l->to, m->config.num_hidden_layers, err);
	if (rc >= 0)
		rc = km_steps_run_head(m, err);
	rc = m->steps->end(m, batch, rc, &logits, err);
	*t = (struct times){ (double)(km_now_ns() - start) * 1e-3, (double)(to - from) * 1e-3 };
	return rc;
}

static void take(km_profile *p, const km_model_trace *trace, const struct times *t)
{
	p->step_us = t->step_us;
	p->layers_us = t->layers_us;
	p->sum_us = 0;
	p->launches = 0;
	for (int i = 0; i < KM_STEP_COUNT; i++) {
		const struct km_op_total *total = &trace->op[i];

		p->op[i].us = (double)total->ns * 1e-3;
		p->op[i].launches = (int)total->calls;
		p->op[i].saved_us = NAN;
		p->op[i].cost.calls = total->calls;
		p->launches += p->op[i].launches;
		p->op[i].cost.bytes = total->bytes;
		p->op[i].cost.flops = total->flops;
		p->sum_us += p->op[i].us;
	}
}

/* The trace has bytes, but does not tell weights from the rest. */
static void add_weight_bytes(const km_model *m, const km_batch *batch, const int *experts, km_profile *p)
{
	km_step_cost costs[KM_STEP_COUNT];

	km_profile_costs(m, batch, &m->kept.batch, experts, costs);
	for (int i = 0; i < KM_STEP_COUNT; i++)
		p->op[i].cost.weight_bytes = costs[i].weight_bytes;
}

static int profile_cpu(km_model *m, const km_batch *batch, km_profile *p, km_err *err)
{
	size_t experts = (size_t)m->config.n_routed_experts,
	       layers = (size_t)m->config.num_hidden_layers;
	int64_t *counts = km_xcalloc(layers * experts + 1, sizeof(*counts)), *old = m->expert_counts;
	km_model_trace trace, *old_trace = m->trace;
	int *distinct = km_xcalloc(layers, sizeof(*distinct));
	double start = km_now_s();
	km_profile_layers l;
	struct times t;
	int rc = 0;

	km_profile_choose_layers(m, batch, &l);
	m->expert_counts = counts;
	m->trace = &trace;
	for (int i = 0; rc >= 0 && i < RUNS && (!i || km_now_s() - start < enough_s); i++) {
		memset(&trace, 0, sizeof(trace));
		rc = run_once(m, batch, &l, &t, err);
		if (rc >= 0 && (!i || t.step_us < p->step_us))
			take(p, &trace, &t);
	}
	m->trace = old_trace;
	m->expert_counts = old;
	for (size_t i = 0; i < layers * experts; i++)
		distinct[i / experts] += counts[i] > 0;
	add_weight_bytes(m, batch, distinct, p);
	km_profile_layer_costs(m, batch, &l, distinct, p);
	p->cache_bytes = (double)sysconf(_SC_LEVEL3_CACHE_SIZE);
	km_profile_mean_experts(m, batch, distinct, p);
	p->layers = l.to - l.from;
	p->layers_are_moe = l.moe;
	free(distinct);
	free(counts);
	return rc;
}

int km_model_profile(km_model *m, const km_batch *batch, km_profile *p, km_err *err)
{
	const float *logits;

	*p = (km_profile){ 0 };
	/* Checks the batch, and does what only a first time has to. */
	KM_TRY(km_model_forward(m, batch, &logits, err));
	km_kept_choose(&m->kept, batch);
#if KM_CUDA
	if (m->gpu)
		return km_profile_gpu(m, batch, p, err);
#endif
	return profile_cpu(m, batch, p, err);
}

/* ---- the cache ---- */

enum { PATTERN = 1 << 22 };

static void random_latents(void *to, size_t count, enum km_kv_dtype dtype, uint64_t seed)
{
	for (size_t i = 0; i < count; i++) {
		float value = km_rng_normal(seed, i);

		if (dtype == KM_KV_F32)
			((float *)to)[i] = value;
		else if (dtype == KM_KV_BF16)
			((uint16_t *)to)[i] = km_f32_to_bf16(value);
		else
			((uint8_t *)to)[i] = km_f32_to_f8_e4m3(value);
	}
}

int km_model_fill_cache(km_model *m, uint64_t seed, km_err *err)
{
	size_t each = km_kv_dtype_bytes(m->options.kv_dtype), bytes = PATTERN * each;
	size_t total = (size_t)m->options.kv_slots * (size_t)km_config_kv_width(&m->config) * each *
	               (size_t)m->config.num_hidden_layers;
	void *pattern = km_xmalloc(bytes);
	int rc = 0;

	random_latents(pattern, PATTERN, m->options.kv_dtype, seed);
	for (size_t at = 0; rc >= 0 && at < total; at += bytes) {
		size_t some = total - at < bytes ? total - at : bytes;

#if KM_CUDA
		if (m->gpu) {
			rc = km_profile_fill_gpu(m, at, pattern, some, err);
			continue;
		}
#endif
		memcpy((char *)m->kv + at, pattern, some);
	}
	free(pattern);
	(void)err;
	return rc;
}
