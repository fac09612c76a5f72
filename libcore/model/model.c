/*
 * Opening a model: plan, refuse, map.
 *
 * The weights are a read-only map of the checkpoint's files: they cost page cache, which the kernel may
 * drop and read again, and which processes share. Still a plan counts them against the memory
 * that is available: a model that does not fit reads its weights from disk at every step, a hundred
 * times slower, and nobody should find that out from the speed. KV cache, step buffers and the rotary
 * table are anonymous maps; step buffers and table are touched at open, the KV cache's pages come when
 * they are first written, so an idle server does not hold them.
 */
#include "model/gpu.h"
#include "model/rope.h"
#include "model/shard.h"
#include "model/weights_random.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/mem.h"

static int map_block(void **block, size_t bytes, bool touch, const char *what, km_err *err)
{
	void *p = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
	               MAP_PRIVATE | MAP_ANONYMOUS | (touch ? MAP_POPULATE : MAP_NORESERVE), -1, 0);

	if (p == MAP_FAILED)
		return km_fail(err, KM_ENOMEM, "%zu bytes for the %s could not be mapped", bytes, what);
	madvise(p, bytes, MADV_HUGEPAGE); /* a wish: where there are none it changes nothing */
	*block = p;
	return 0;
}

static void unmap_block(void *block, size_t bytes)
{
	if (block)
		munmap(block, bytes ? bytes : 1);
}

int km_model_plan_fits(const km_model_plan *plan, const char *dir, km_err *err)
{
	const double gib = 1024.0 * 1024 * 1024;
	int64_t buffers = plan->scratch_bytes + plan->logits_bytes + plan->rope_bytes + plan->fixed_bytes;
	int64_t total = plan->weight_bytes + plan->kv_bytes + buffers;

	if (plan->available_bytes < 0 || total <= plan->available_bytes)
		return 0;
	return km_fail(err, KM_ENOMEM,
	               "%s does not fit: weights %.2f GiB, KV cache %.2f GiB and buffers %.2f GiB make "
	               "%.2f GiB, %.2f GiB are available",
	               dir, (double)plan->weight_bytes / gib, (double)plan->kv_bytes / gib,
	               (double)buffers / gib, (double)total / gib, (double)plan->available_bytes / gib);
}

static int choose_ops(km_model *model, km_err *err)
{
	const char *isa = model->options.isa;

	model->steps = &km_cpu_steps;
	model->ops = km_cpu_ops(isa);
	if (!model->ops)
		return km_fail(err, KM_EUNSUPPORTED,
		               "this machine cannot run the '%s' kernels, or there are none of that name", isa);
	return 0;
}

static int map_memory(km_model *model, km_err *err)
{
	const km_config *config = &model->config;
	const km_model_options *options = &model->options;
	size_t slots = (size_t)options->kv_slots, rope = (size_t)config->qk_rope_head_dim;

	km_step_lay_out(&model->step, config, options, NULL);
	KM_TRY(map_block(&model->block, model->step.bytes, true, "step buffers", err));
	km_step_lay_out(&model->step, config, options, model->block);
	model->kv_layer_bytes = slots * (size_t)km_config_kv_width(config) *
	                        km_kv_dtype_bytes(options->kv_dtype);
	KM_TRY(map_block(&model->kv, model->kv_layer_bytes * (size_t)config->num_hidden_layers, false,
	                 "KV cache", err));
	model->cos_sin_bytes = (size_t)options->max_context * rope * 4;
	KM_TRY(map_block((void **)&model->cos_sin, model->cos_sin_bytes, true, "rotary table", err));
	km_rope_table(&config->rope, config->qk_rope_head_dim, options->max_context, model->cos_sin);
	return 0;
}

int km_model_random_config(km_config *config, const char *path, const km_model_random *what, int *depth,
                           km_err *err)
{
	KM_TRY(km_config_load(config, path, err));
	*depth = config->num_hidden_layers;
	if (what->layers < 0 || what->layers > *depth)
		return km_fail(err, KM_EINVAL, "%s: has %d layers, %d cannot be taken", path, *depth,
		               what->layers);
	if (what->layers)
		config->num_hidden_layers = what->layers;
	if (what->shard_of > 1)
		KM_TRY(km_config_shard(config, what->shard_of, err));
	return 0;
}

static int open_weights(km_model *model, const char *dir, const km_model_random *random, int depth,
                        km_err *err)
{
	bool gpu = model->options.backend == KM_BACKEND_CUDA;

	if (random) {
		km_random_weights how = { .seed = random->seed, .depth = depth, .shared = gpu };

		return km_weights_random(&model->weights, &model->config, &how, err);
	}
	return (gpu ? km_weights_open_packed : km_weights_open)(&model->weights, &model->config,
	                                                        dir, err);
}

static int open_parts(km_model *model, const char *dir, const km_model_random *random, km_err *err)
{
	km_model_plan plan;
	int depth = 0;

	KM_TRY(random ? km_model_random_config(&model->config, dir, random, &depth, err)
	              : km_config_load(&model->config, dir, err));
	if (model->options.backend == KM_BACKEND_CPU)
		KM_TRY(choose_ops(model, err));
	if (!model->options.threads)
		model->options.threads = omp_get_num_procs();
	KM_TRY(km_model_plan_memory(&model->config, &model->options, &plan, err));
	if (model->options.kv_slots < 1)
		return km_fail(err, KM_EINVAL, "%s: a KV cache of no tokens makes no sense", dir);
	KM_TRY(km_model_plan_fits(&plan, dir, err));
	KM_TRY(open_weights(model, dir, random, depth, err));
	km_kept_init(&model->kept, &model->options);
#if KM_CUDA
	if (model->options.backend == KM_BACKEND_CUDA) {
		KM_TRY(km_gpu_open(model, &plan, err));
		return km_forward_prepare(model, err);
	}
#endif
	return map_memory(model, err);
}

static int open_model(km_model **model, const char *dir, const km_model_random *random,
                      const km_model_options *options, km_err *err)
{
	km_model *m = km_xcalloc(1, sizeof(*m));
	int rc;

	m->options = *options;
	rc = open_parts(m, dir, random, err);
	if (rc < 0) {
		km_model_close(m);
		m = NULL;
	}
	*model = m;
	return rc;
}

int km_model_open(km_model **model, const char *dir, const km_model_options *options, km_err *err)
{
	return open_model(model, dir, NULL, options, err);
}

int km_model_open_random(km_model **model, const char *path, const km_model_random *what,
                         const km_model_options *options, km_err *err)
{
	return open_model(model, path, what, options, err);
}

void km_model_close(km_model *model)
{
	if (!model)
		return;
#if KM_CUDA
	km_gpu_close(model->gpu);
#endif
	unmap_block(model->cos_sin, model->cos_sin_bytes);
	unmap_block(model->kv, model->kv_layer_bytes * (size_t)model->config.num_hidden_layers);
	unmap_block(model->block, model->step.bytes);
	km_weights_close(&model->weights);
	km_kept_release(&model->kept);
	km_config_release(&model->config);
	free(model);
}

const km_config *km_model_config(const km_model *model)
{
	return &model->config;
}

bool km_model_draws(const km_model *model)
{
	return model->gpu && model->config.vocab_size <= KM_DRAW_VOCAB;
}

void km_model_set_trace(km_model *model, km_model_trace *trace)
{
	model->trace = trace;
}

int km_model_fetch_expert_counts(km_model *model, km_err *err)
{
#if KM_CUDA
	if (model->gpu && model->expert_counts)
		return km_gpu_fetch_expert_counts(model, err);
#endif
	(void)model, (void)err;
	return 0;
}

void km_model_set_expert_counts(km_model *model, int64_t *counts)
{
	KM_ASSERT(!model->gpu || model->options.count_experts);
	model->expert_counts = counts;
}
