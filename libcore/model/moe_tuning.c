#include "model/moe_tuning.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "format/json.h"
#include "format/moe_layout.h"

/* ---- the shape ------------------------------------------------------------------------------ */

static int check_parallel(const km_config *c, int tp, int ep, km_err *err)
{
	if (tp % ep)
		return km_fail(err, KM_EINVAL, "--ep-size %d does not divide --tp-size %d", ep, tp);
	if (c->n_routed_experts % ep)
		return km_fail(err, KM_EINVAL, "--ep-size %d does not divide the %d experts", ep,
		               c->n_routed_experts);
	if (c->moe_intermediate_size % (tp / ep))
		return km_fail(err, KM_EINVAL,
		               "%d ranks to an expert do not divide its intermediate size %d",
		               tp / ep, c->moe_intermediate_size);
	return 0;
}

int km_moe_tuning_shape(km_moe_problem *p, const km_config *c, int tp, int ep, km_err *err)
{
	if (!c->n_routed_experts)
		return km_fail(err, KM_EUNSUPPORTED,
		               "the model has no routed experts: there is nothing to tune");
	if (c->quant.method != KM_QUANT_INT4_PACKED)
		return km_fail(err, KM_EUNSUPPORTED,
		               "the model's experts are %s: they run in the general form, which "
		               "has nothing to "
		               "tune; int4 ones have tiles",
		               c->quant.method == KM_QUANT_FP8_BLOCK ? "fp8"
		                                                     : km_dtype_name(c->dtype));
	KM_TRY(check_parallel(c, tp, ep, err));
	*p = (km_moe_problem){
		.tokens = 1,
		.experts = c->n_routed_experts / ep,
		.global_experts = c->n_routed_experts,
		.top_k = c->num_experts_per_tok,
		.hidden = c->hidden_size,
		.intermediate = c->moe_intermediate_size / (tp / ep),
		.group = c->quant.group_size,
		.packed = true,
		.expert_map = ep > 1,
		.pdl = true,
	};
	return km_moe_layout_check(p->hidden, p->intermediate, p->group, err);
}

/* ---- the device ----------------------------------------------------------------------------- */

static const char *const h100 = "NVIDIA H100 80GB HBM3";

int km_moe_target_make(km_moe_target *t, const km_moe_problem *p, const char *name, km_err *err)
{
	km_cuda_info info = {
		.runtime = 13000, .capability = 90, .multiprocessors = 132, .memory_gbps = 3352
	};
	km_err none = { 0 };

	*t = (km_moe_target){ .present = km_cuda_count(&none) > 0 };
	snprintf(info.name, sizeof(info.name), "%s", h100);
	snprintf(t->why, sizeof(t->why), "%.250s", none.msg);
	if (t->present)
		KM_TRY(km_cuda_describe(0, &info, err));
	if (name && strcmp(name, info.name) != 0) {
		if (t->present)
			snprintf(t->why, sizeof(t->why), "GPU 0 is not %.100s but %.100s", name,
			         info.name);
		t->present = false;
		snprintf(info.name, sizeof(info.name), "%s", name);
	}
	t->context.problem = *p;
	t->context.device = (km_moe_device){ info.capability, info.multiprocessors };
	t->context.problem.pdl = info.capability >= 90;
	t->key = km_moe_tune_key(p, info.name, info.runtime);
	km_roofline_of_gpu(&info, &t->roofline);
	memcpy(t->toolkit, info.toolkit, sizeof(t->toolkit));
	return 0;
}

void km_moe_target_describe(const km_moe_target *t, const char *path, km_buf *out)
{
	const km_moe_problem *p = &t->context.problem;

	km_buf_printf(out,
	              "shape   %d of %d experts, top %d, hidden %d, intermediate %d on this rank, "
	              "int4 in "
	              "groups of %d\n",
	              p->experts, p->global_experts, p->top_k, p->hidden, p->intermediate,
	              p->group);
	if (t->present) {
		km_buf_printf(out, "device  %s, %s; roofline ", t->key.device_name, t->toolkit);
		km_roofline_describe(&t->roofline, out);
		km_buf_putc(out, '\n');
	} else {
		km_buf_printf(out, "device  %s, which is not here (%s)\n", t->key.device_name,
		              t->why);
	}
	km_buf_printf(out, "file    %s\n", path);
}

/* ---- what would be tried -------------------------------------------------------------------- */

static json_t *tile_json(const km_moe_tile *t)
{
	return json_pack("{s:i,s:i,s:i,s:i,s:i,s:i}", "BLOCK_SIZE_M", t->block_m, "BLOCK_SIZE_N",
	                 t->block_n, "BLOCK_SIZE_K", t->block_k, "GROUP_SIZE_M", t->group_m,
	                 "num_warps", t->warps, "num_stages", t->stages);
}

static void add_json(json_t *doc, km_buf *out)
{
	char *text = json_dumps(doc, JSON_INDENT(2) | JSON_REAL_PRECISION(6));

	KM_ASSERT(text);
	km_buf_puts(out, text);
	km_buf_putc(out, '\n');
	free(text);
	json_decref(doc);
}

static void print_tile(const km_moe_tile *t, km_buf *out)
{
	km_buf_printf(out, "%5dx%dx%d g%d s%d", t->block_m, t->block_n, t->block_k, t->group_m,
	              t->stages);
}

static int list_tokens(const km_moe_target *target, int tokens, json_t *json, km_buf *out,
                       km_err *err)
{
	km_moe_problem p = target->context.problem;
	km_moe_tile *tiles = km_xcalloc(KM_TUNER_MAX_CANDIDATES, sizeof(*tiles));
	km_moe_plan own;
	int n, rc;

	p.tokens = tokens;
	rc = km_moe_plan_make(&own, &p, &target->context.device, NULL, err);
	n = rc < 0 ? 0
	           : km_moe_candidates(&p, &target->context.device, tiles, KM_TUNER_MAX_CANDIDATES);
	if (rc >= 0 && json) {
		json_t *list = json_array();

		for (int i = 0; i < n; i++)
			json_array_append_new(list, tile_json(&tiles[i]));
		json_array_append_new(json, json_pack("{s:i,s:s,s:o,s:o}", "tokens", tokens, "form",
		                                      km_moe_form_name(own.form), "plan",
		                                      tile_json(&own.tile), "candidates", list));
	} else if (rc >= 0) {
		km_buf_printf(out, "%6d tokens: %3d candidates, the plan's own (%s)", tokens, n,
		              km_moe_form_name(own.form));
		print_tile(&own.tile, out);
		km_buf_putc(out, '\n');
	}
	free(tiles);
	return rc;
}

static json_t *shape_json(const km_moe_problem *p)
{
	return json_pack("{s:i,s:i,s:i,s:i,s:i,s:i}", "experts", p->experts, "num_experts",
	                 p->global_experts, "top_k", p->top_k, "hidden_size", p->hidden,
	                 "intermediate_size", p->intermediate, "group_size", p->group);
}

int km_moe_target_list(const km_moe_target *t, const int *tokens, int count, bool json, km_buf *out,
                       km_err *err)
{
	json_t *rows = json ? json_array() : NULL;
	int rc = 0;

	for (int i = 0; i < count && rc >= 0; i++)
		rc = list_tokens(t, tokens[i], rows, out, err);
	if (rc >= 0 && json) {
		char name[KM_TUNE_NAME];

		km_tune_file_name(&t->key, name);
		add_json(json_pack("{s:s,s:s,s:o,s:o}", "device", t->key.device_name, "file", name,
		                   "shape", shape_json(&t->context.problem), "rows", rows),
		         out);
	} else {
		json_decref(rows);
	}
	return rc;
}

/* ---- results -------------------------------------------------------------------------------- */

double km_moe_floor_bytes(const km_moe_problem *p, int tokens)
{
	double miss = 1.0 - (double)p->top_k / p->global_experts;
	double touched = p->experts * (1.0 - pow(miss, tokens));
	double expert = (double)(km_moe_gate_up_bytes(p->hidden, p->intermediate, p->group) +
	                         km_moe_down_bytes(p->hidden, p->intermediate, p->group));

	return touched * expert + 4.0 * tokens * p->hidden; /* bf16 in and out */
}

/* At the device's rates; of the products this rank's part. 0: not known. */
static double floor_us(const km_moe_target *t, int tokens)
{
	const km_moe_problem *p = &t->context.problem;
	double places = (double)tokens * p->top_k * p->experts / p->global_experts;

	return km_roofline_us(&t->roofline, km_moe_floor_bytes(p, tokens),
	                      6.0 * places * p->hidden * p->intermediate);
}

void km_moe_rows_head(km_buf *out)
{
	km_buf_printf(out, "%7s %10s %10s %7s %7s %6s   %-22s %s\n", "tokens", "us", "plan us",
	              "won", "GB/s", "roof", "M x N x K, group, stages", "tried");
}

void km_moe_rows_add(const km_moe_target *t, const km_tune_entry *e, int candidates, int wrong,
                     km_buf *out)
{
	double gbps =
		e->us > 0 ? km_moe_floor_bytes(&t->context.problem, e->tokens) / e->us * 1e-3 : 0;
	km_moe_tile tile = km_moe_tile_of(e->values);
	char won[16] = "", roof[16] = "";
	km_buf text = KM_BUF_INIT;

	if (e->plan_us > 0 && e->us > 0 && e->us < e->plan_us)
		snprintf(won, sizeof(won), "%.1f%%", 100 * (e->plan_us / e->us - 1));
	if (e->us > 0 && floor_us(t, e->tokens) > 0)
		snprintf(roof, sizeof(roof), "%.0f%%", 100 * floor_us(t, e->tokens) / e->us);
	print_tile(&tile, &text);
	km_buf_printf(out, "%7d %10.2f %10.2f %7s %7.0f %6s %-26s", e->tokens, e->us, e->plan_us,
	              won, gbps, roof, text.data);
	if (candidates)
		km_buf_printf(out, " %d", candidates);
	if (wrong)
		km_buf_printf(out, ", %d wrong", wrong);
	km_buf_putc(out, '\n');
	km_buf_release(&text);
}

void km_moe_table_json(const km_moe_target *t, const km_tune_table *table, const char *path,
                       bool complete, km_buf *out)
{
	json_t *rows = json_array();

	for (int i = 0; i < table->count; i++) {
		const km_tune_entry *e = &table->entries[i];
		km_moe_tile tile = km_moe_tile_of(e->values);

		json_array_append_new(rows,
		                      json_pack("{s:i,s:f,s:f,s:f,s:o}", "tokens", e->tokens, "us",
		                                e->us, "plan_us", e->plan_us, "floor_bytes",
		                                km_moe_floor_bytes(&t->context.problem, e->tokens),
		                                "tile", tile_json(&tile)));
	}
	add_json(json_pack("{s:s,s:s,s:s,s:b,s:o,s:o}", "file", path, "device", t->key.device_name,
	                   "toolkit", t->toolkit, "complete", complete, "shape",
	                   shape_json(&t->context.problem), "rows", rows),
	         out);
}

void km_moe_checked_report(const km_tuner_checked *c, int count, double allowed, bool json,
                           km_buf *out, int *off)
{
	json_t *rows = json_array();

	*off = 0;
	if (!json)
		km_buf_printf(out, "%7s %10s %10s %8s\n", "tokens", "table us", "us", "off");
	for (int i = 0; i < count; i++) {
		bool bad = !c[i].right || fabs(c[i].off) > allowed;

		*off += bad;
		json_array_append_new(rows, json_pack("{s:i,s:f,s:f,s:f,s:b,s:b,s:s}", "tokens",
		                                      c[i].tokens, "table_us", c[i].table_us, "us",
		                                      c[i].us, "off", c[i].off, "right", c[i].right,
		                                      "within", !bad, "why", c[i].why));
		if (!json && c[i].right)
			km_buf_printf(out, "%7d %10.2f %10.2f %+7.1f%%%s\n", c[i].tokens,
			              c[i].table_us, c[i].us, 100 * c[i].off,
			              bad ? "  more than allowed" : "");
		else if (!json)
			km_buf_printf(out, "%7d %10.2f %10s %8s  wrong: %s\n", c[i].tokens,
			              c[i].table_us, "", "", c[i].why);
	}
	if (json)
		add_json(json_pack("{s:b,s:i,s:f,s:o}", "ok", !*off, "off", *off, "allowed",
		                   allowed, "rows", rows),
		         out);
	else
		json_decref(rows);
}
