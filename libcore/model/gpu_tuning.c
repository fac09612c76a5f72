#include "model/gpu.h"

#if KM_CUDA

#include "base/log.h"

static void say(const km_moe_tuning *t)
{
	if (t->found)
		km_log(KM_LOG_INFO, "the experts' tiles are those of %s, of %d token counts",
		       t->table.path, t->table.count);
	else if (t->general)
		km_log(KM_LOG_INFO, "no tuning file is looked for: %s", t->why.data);
	else
		km_log(KM_LOG_WARN, "the experts' tiles are the plan's own choice: %s",
		       t->why.data);
}

int km_gpu_tuning_open(km_gpu *g, const km_model *m, int layer, km_err *err)
{
	const km_model_options *o = &m->options;
	km_moe_weights shape = km_gpu_experts_shape(&m->config, &m->weights.layer[layer]);
	km_moe_tune_context context = {
		.problem = km_gpu_moe_problem(&m->config, &shape, 1, g->pdl),
		.device = { g->info.capability, g->info.multiprocessors },
	};
	km_tune_key key = km_moe_tune_key(&context.problem, g->info.name, g->info.runtime);

	if (!o->moe_config_dir) {
		km_buf_puts(&g->tuning.why, "no folder of tuning files was given");
		return o->require_tuned ? km_fail(err, KM_ENOTFOUND, "%s", g->tuning.why.data) : 0;
	}
	KM_TRY(km_moe_tuning_open(&g->tuning, o->moe_config_dir, &key, &context, o->require_tuned,
	                          err));
	say(&g->tuning);
	return 0;
}

#endif
