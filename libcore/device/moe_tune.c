#include "device/moe_tune.h"

#include <stdio.h>
#include <string.h>

/* Ranges keep nonsense out; what the kernels were built for is km_moe_plan_make's to say. */
static const km_tune_field fields[] = {
	{ "BLOCK_SIZE_M", 1, 1024 }, { "BLOCK_SIZE_N", 1, 4096 }, { "BLOCK_SIZE_K", 1, 8192 },
	{ "GROUP_SIZE_M", 1, 1024 }, { "num_warps", 1, 64 },      { "num_stages", 1, 64 },
};

km_moe_tile km_moe_tile_of(const int *v)
{
	return (km_moe_tile){ .block_m = v[0],
		              .block_n = v[1],
		              .block_k = v[2],
		              .group_m = v[3],
		              .warps = v[4],
		              .stages = v[5] };
}

void km_moe_tile_values(const km_moe_tile *t, int values[KM_TUNE_MAX_FIELDS])
{
	const int v[] = { t->block_m, t->block_n, t->block_k, t->group_m, t->warps, t->stages };

	memset(values, 0, sizeof(*values) * KM_TUNE_MAX_FIELDS);
	memcpy(values, v, sizeof(v));
}

static int check_values(const void *context, int tokens, const int *values, km_err *err)
{
	const km_moe_tune_context *c = context;
	km_moe_problem p = c->problem;
	km_moe_tile tile = km_moe_tile_of(values);
	km_moe_plan plan;

	p.tokens = tokens;
	return km_moe_plan_make(&plan, &p, &c->device, &tile, err);
}

km_tune_schema km_moe_tune_schema(const km_moe_tune_context *context)
{
	return (km_tune_schema){ .fields = fields,
		                 .count = sizeof(fields) / sizeof(*fields),
		                 .context = context,
		                 .check = check_values };
}

km_tune_problem km_moe_tune_problem(const km_moe_problem *p)
{
	return (km_tune_problem){ .hidden_size = p->hidden,
		                  .top_k = p->top_k,
		                  .group_size = p->group,
		                  .num_experts = p->global_experts };
}

km_tune_key km_moe_tune_key(const km_moe_problem *p, const char *device_name, int toolkit)
{
	km_tune_key key = { .experts = p->experts,
		            .n = p->packed ? p->intermediate / 2 : p->intermediate,
		            .dtype = p->packed ? "int4_w4a16" : NULL,
		            .toolkit = toolkit };

	snprintf(key.device_name, sizeof(key.device_name), "%s", device_name);
	return key;
}

int km_moe_tuning_open(km_moe_tuning *tuning, const char *root, const km_tune_key *key,
                       const km_moe_tune_context *context, bool required, km_err *err)
{
	km_tune_problem problem = km_moe_tune_problem(&context->problem);
	km_tune_schema schema = km_moe_tune_schema(context);
	int rc;

	*tuning = (km_moe_tuning){ .why = KM_BUF_INIT };
	if (!km_moe_candidates(&context->problem, &context->device, NULL, 0)) {
		tuning->general = true;
		km_buf_puts(&tuning->why, "only the general form takes these experts on this GPU, and it "
		                          "has no tiles");
		return required ? km_fail(err, KM_ENOTFOUND, "%s", tuning->why.data) : 0;
	}
	rc = km_tune_find(&tuning->table, root, key, &problem, &schema, required, &tuning->why,
	                  err);
	tuning->found = rc > 0;
	return rc < 0 ? rc : 0;
}

void km_moe_tuning_release(km_moe_tuning *tuning)
{
	km_tune_release(&tuning->table);
	km_buf_release(&tuning->why);
}

int km_moe_tuning_plan(km_moe_plan *plan, const km_moe_tuning *tuning, const km_moe_problem *p,
                       const km_moe_device *d, const km_tune_entry **taken, km_err *err)
{
	const km_tune_entry *entry =
		tuning->found ? km_tune_nearest(&tuning->table, p->tokens) : NULL;
	km_moe_tile tile = { 0 };

	if (taken)
		*taken = entry;
	if (entry)
		tile = km_moe_tile_of(entry->values);
	/* more tokens leave less shared memory for stages */
	for (; entry && tile.stages >= 2; tile.stages--)
		if (km_moe_plan_make(plan, p, d, &tile, NULL) >= 0)
			return 0;
	if (taken)
		*taken = NULL;
	return km_moe_plan_make(plan, p, d, NULL, err);
}

void km_moe_tuning_explain(const km_moe_tuning *tuning, const km_moe_problem *p,
                           const km_moe_device *d, km_buf *out)
{
	const km_tune_entry *nearest =
		tuning->found ? km_tune_nearest(&tuning->table, p->tokens) : NULL;
	const km_tune_entry *entry;
	km_moe_plan plan;
	km_err err;

	if (!tuning->found) {
		km_buf_printf(out, "tuning: none%s: %s\n",
		              tuning->general ? "" : ", the plan's own choice", tuning->why.data);
		return;
	}
	if (km_moe_tuning_plan(&plan, tuning, p, d, &entry, &err) < 0)
		km_buf_printf(out, "tuning: %s\n", err.msg);
	else if (!entry)
		km_buf_printf(
			out,
			"tuning: the plan's own choice: the tile of entry %d of %s does not fit %d "
			"tokens\n",
			nearest->tokens, tuning->table.path, p->tokens);
	else
		km_buf_printf(out, "tuning: entry %d of %s%s%s\n", entry->tokens,
		              tuning->table.path, entry->tokens == p->tokens ? "" : ", the nearest",
		              plan.tile.stages == entry->values[5] ? "" : ", with fewer stages");
}
