#include "model/weights_random.h"

#include <string.h>

#include "base/rng.h"
#include "model/synth_module.h"

enum { CHUNK = 1 << 17, PERIOD = (1 << 23) + 8 };

/* Scores near 1 differ by little: a bias as large as in other random checkpoints would choose for all rows. */
static const float SMALL_BIAS = 0.01f;

struct maker {
	const km_config *config;
	const km_random_weights *how;
	km_weights *weights;
	km_synth_tables tables;
};

static size_t elements_of(const km_wanted *w)
{
	size_t count = 1;

	for (int i = 0; i < w->ndim; i++)
		count *= (size_t)w->shape[i];
	return count;
}

static size_t smaller(size_t a, size_t b)
{
	return a < b ? a : b;
}

static void fill(const struct maker *m, const km_synth_tensor *t, size_t count, char *to)
{
	size_t unit = km_dtype_bytes(t->dtype), drawn = smaller(count, PERIOD);

#pragma omp parallel for schedule(dynamic, 1)
	for (size_t at = 0; at < drawn; at += CHUNK)
		km_synth_fill(t, &m->tables, at, smaller(CHUNK, drawn - at), to + at * unit);
#pragma omp parallel for schedule(static)
	for (size_t at = PERIOD; at < count; at += PERIOD)
		memcpy(to + at * unit, to, smaller(PERIOD, count - at) * unit);
}

/* A tensor's numbers, or a copy of `twin`'s. */
static void *make(struct maker *m, const km_synth_tensor *t, size_t count, const void *twin,
                  km_err *err)
{
	size_t bytes = count * km_dtype_bytes(t->dtype);
	void *to = km_weights_memory(m->weights, bytes);

	if (!to)
		km_fail(err, KM_ENOMEM, "%zu bytes for random weights could not be had", bytes);
	else if (twin)
		memcpy(to, twin, bytes);
	else
		fill(m, t, count, to);
	return to;
}

static km_weight *twin_of(const struct maker *m, const km_module *module)
{
	km_module first = *module;

	if (module->expert < KM_RANDOM_EXPERTS)
		return NULL;
	first.expert = module->expert % KM_RANDOM_EXPERTS;
	return km_weights_matrix(m->weights, &first);
}

static int make_matrix(struct maker *m, const km_module *module, const km_wanted *wanted,
                       km_weight *w, km_err *err)
{
	const km_weight *twin = twin_of(m, module);
	int parts = w->type == KM_W_FP8 || w->type == KM_W_INT4 ? 2 : 1;
	const void *made[2] = { NULL, NULL };

	if (twin && m->how->shared) {
		w->data = twin->data;
		w->scale = twin->scale;
		return 0;
	}
	for (int i = 0; i < parts; i++) {
		km_synth_tensor t = km_synth_module(module, i, m->how->depth, &m->tables);

		t.dtype = wanted[i].usual;
		t.stream = km_rng_hash(m->how->seed + (uint64_t)i, module->key, strlen(module->key));
		made[i] = make(m, &t, elements_of(&wanted[i]),
		               !twin ? NULL : i ? twin->scale : twin->data, err);
		if (!made[i])
			return KM_ENOMEM;
	}
	w->data = made[0];
	w->scale = made[1];
	return 0;
}

static int make_vector(struct maker *m, const km_module *module, const km_wanted *wanted,
                       const float **to, km_err *err)
{
	km_synth_tensor t = km_synth_module(module, 0, m->how->depth, &m->tables);

	t.dtype = KM_F32;
	if (module->role == KM_ROLE_ROUTER_BIAS)
		t.gain *= SMALL_BIAS;
	t.stream = km_rng_hash(m->how->seed, module->key, strlen(module->key));
	*to = make(m, &t, elements_of(wanted), NULL, err);
	return *to ? 0 : KM_ENOMEM;
}

static int make_module(void *context, const km_module *module, km_err *err)
{
	struct maker *m = context;
	km_wanted wanted[KM_MAX_MODULE_TENSORS];
	km_weight *matrix = km_weights_matrix(m->weights, module);
	const float **vector = km_weights_vector(m->weights, module);

	km_module_tensors(module, m->config, wanted);
	if (vector)
		return make_vector(m, module, wanted, vector, err);
	return matrix ? make_matrix(m, module, wanted, matrix, err) : 0;
}

int km_weights_random(km_weights *weights, const km_config *config, const km_random_weights *how,
                      km_err *err)
{
	struct maker m = { .config = config, .how = how, .weights = weights };
	int rc;

	if (config->expert_layout)
		return km_fail(err, KM_EUNSUPPORTED,
		               "random weights are made in the checkpoint's own packing, not in the layout "
		               "of a repacked one");
	km_synth_tables_init(&m.tables);
	KM_TRY(km_weights_shapes(weights, config, err));
	rc = km_inventory_visit(config, make_module, &m, err);
	if (rc >= 0 && config->tie_word_embeddings)
		weights->head = weights->embed;
	if (rc < 0)
		km_weights_close(weights);
	return rc;
}
