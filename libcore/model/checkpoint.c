#include "model/checkpoint.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "format/moe_layout.h"

struct matcher {
	km_checkpoint *cp;
	const km_config *config;
	km_module_bind bind;
	void *context;
	km_findings *findings;
};

static int64_t find(const km_checkpoint *cp, const char *module_key, const char *suffix)
{
	char key[320];
	int len = snprintf(key, sizeof(key), "%s.%s", module_key, suffix);

	KM_ASSERT(len > 0 && (size_t)len < sizeof(key));
	return km_name_map_find(&cp->keys, key, (size_t)len);
}

static void on_disk(const struct matcher *k, const km_module *m, const char *suffix, char out[400])
{
	char key[320];

	snprintf(key, sizeof(key), "%s.%s", m->key, suffix);
	km_name_on_disk(out, 400, k->config->kind, key);
}

static void take(km_checkpoint *cp, int64_t at, enum km_tensor_class class)
{
	if (cp->class[at] != KM_CLASS_COUNT)
		return;
	cp->class[at] = (unsigned char)class;
	cp->bytes[class] += (int64_t)cp->shards.tensors[at]->bytes;
	cp->tensors[class]++;
}

/* A repacked expert under a config.json that does not say so: said once for gate and up. */
static bool is_repacked(struct matcher *k, const km_module *m)
{
	bool half = m->role == KM_ROLE_EXPERT_GATE || m->role == KM_ROLE_EXPERT_UP;
	const char *last = strrchr(m->key, '.');
	const km_tensor *t;
	char key[320];
	int64_t at;

	if (!half && m->role != KM_ROLE_EXPERT_DOWN)
		return false;
	snprintf(key, sizeof(key), "%.*s%s", (int)(last - m->key), m->key,
	         half ? ".gate_up_proj" : last);
	at = find(k->cp, key, "weight_repacked");
	if (at < 0)
		return false;
	t = k->cp->shards.tensors[at];
	if (k->cp->class[at] == KM_CLASS_COUNT)
		km_findings_add(k->findings, KM_EFORMAT,
		                "%s: tensor %s is repacked, but config.json has no kimi_repacked: "
		                "it is not the one that kimi-convert wrote",
		                km_shards_path(&k->cp->shards, t), t->name);
	take(k->cp, at, m->class);
	return true;
}

/* A linear that is stored in another form than the config says: the commonest mistake of a
 * quantiser, worth a sentence of its own. Takes the tensors of the other form so that they are not
 * "extra". */
static bool other_form(struct matcher *k, const km_module *m)
{
	static const char *const suffixes[] = { "weight",        "weight_scale_inv",
		                                "weight_packed", "weight_scale",
		                                "weight_shape",  "weight_scale_2",
		                                "input_scale" };
	int64_t packed = find(k->cp, m->key, "weight_packed"),
		plain = find(k->cp, m->key, "weight");
	int64_t at = m->form == KM_FORM_INT4 ? plain : packed;
	const km_tensor *t;

	if (m->form == KM_FORM_REPACKED)
		return false;
	if (is_repacked(k, m))
		return true;
	if (at < 0)
		return false;
	t = k->cp->shards.tensors[at];
	if (m->form == KM_FORM_PLAIN)
		km_findings_add(k->findings, KM_EFORMAT, "%s: tensor %s is quantised, but %s",
		                km_shards_path(&k->cp->shards, t), t->name,
		                k->config->quant.method == KM_QUANT_NONE
		                        ? "the config has no quantization_config"
		                        : "quantization_config leaves this module out");
	else
		km_findings_add(k->findings, KM_EFORMAT,
		                "%s: tensor %s is stored as %s, but quantization_config says that "
		                "this module is %s",
		                km_shards_path(&k->cp->shards, t), t->name, km_dtype_name(t->dtype),
		                m->form == KM_FORM_INT4 ? "packed int4" : "fp8");
	for (size_t i = 0; i < sizeof(suffixes) / sizeof(*suffixes); i++) {
		at = find(k->cp, m->key, suffixes[i]);
		if (at >= 0)
			take(k->cp, at, m->class);
	}
	return true;
}

static bool compare(struct matcher *k, const km_tensor *t, const km_wanted *w)
{
	char want[160], have[160];
	bool dtype = w->dtypes >> t->dtype & 1;
	bool shape = t->ndim == w->ndim &&
	             !memcmp(t->shape, w->shape, sizeof(*w->shape) * (size_t)w->ndim);

	if (dtype && shape)
		return true;
	km_tensor_describe(want, dtype ? t->dtype : w->usual, w->ndim, w->shape);
	km_tensor_describe(have, t->dtype, t->ndim, t->shape);
	km_findings_add(k->findings, KM_EFORMAT, "%s: tensor %s: %s is expected, this is %s",
	                km_shards_path(&k->cp->shards, t), t->name, want, have);
	return false;
}

static bool fp8_in_place_of_plain(struct matcher *k, const km_module *m)
{
	return m->form == KM_FORM_PLAIN && m->ndim == 2 && !strcmp(m->suffix, "weight") &&
	       find(k->cp, m->key, "weight_scale_inv") >= 0;
}

static bool is_vision(enum km_tensor_class class)
{
	return class == KM_CLASS_VISION || class == KM_CLASS_PROJECTOR;
}

/* Each file says which version of the layout its tensors are in, beside what config.json says. */
static void check_layout(struct matcher *k, const km_tensor *t)
{
	const km_safetensors *file = &k->cp->shards.files[t->file];
	const char *layout = km_safetensors_metadata(file, KM_META_LAYOUT);
	const char *version = km_safetensors_metadata(file, KM_META_VERSION);
	char want[16];

	snprintf(want, sizeof(want), "%d", k->config->expert_layout);
	if (layout && version && !strcmp(layout, KM_EXPERT_LAYOUT) && !strcmp(version, want))
		return;
	km_findings_add(
		k->findings, KM_EFORMAT,
		"%s: tensor %s: its file says layout %s version %s, config.json says %s version %s",
		file->path, t->name, layout ? layout : "(none)", version ? version : "(none)",
		KM_EXPERT_LAYOUT, want);
}

static int match_module(void *context, const km_module *m, km_err *err)
{
	struct matcher *k = context;
	const km_tensor *tensors[KM_MAX_MODULE_TENSORS] = { NULL };
	km_wanted wanted[KM_MAX_MODULE_TENSORS];
	int count = km_module_tensors(m, k->config, wanted), right = 0;
	char name[400];

	k->cp->params[m->class] += km_module_params(m);
	for (int i = 0; i < count; i++) {
		int64_t at = find(k->cp, m->key, wanted[i].suffix);

		if (at >= 0) {
			tensors[i] = k->cp->shards.tensors[at];
			take(k->cp, at, m->class);
			right += compare(k, tensors[i], &wanted[i]);
			if (m->form == KM_FORM_REPACKED)
				check_layout(k, tensors[i]);
			continue;
		}
		k->cp->missing++;
		if (i == 0 && m->ndim == 2 && other_form(k, m))
			return 0;
		if (k->cp->no_vision && is_vision(m->class))
			continue;
		on_disk(k, m, wanted[i].suffix, name);
		km_findings_add(k->findings, KM_ENOTFOUND, "%s: tensor %s is missing",
		                k->cp->shards.dir, name);
	}
	if (fp8_in_place_of_plain(k, m)) {
		km_findings_add(k->findings, KM_EFORMAT,
		                "%s: tensor %s has weight_scale_inv, but %s",
		                km_shards_path(&k->cp->shards, tensors[0]), tensors[0]->name,
		                k->config->quant.method == KM_QUANT_NONE
		                        ? "the config has no quantization_config"
		                        : "quantization_config leaves this module out");
		take(k->cp, find(k->cp, m->key, "weight_scale_inv"), m->class);
		return 0;
	}
	return right == count && k->bind ? k->bind(k->context, m, tensors, err) : 0;
}

/* Tensors that the forward pass has no use for, and that published checkpoints hold. */
static bool is_skipped(const km_config *config, enum km_name_scope scope, const char *key)
{
	int layer = scope == KM_NAME_TEXT ? km_name_layer(key) : -1;

	if (scope != KM_NAME_TEXT)
		return false;
	if (layer >= config->num_hidden_layers &&
	    layer < config->num_hidden_layers + config->num_nextn_predict_layers)
		return true;
	if (km_name_ends(key, ".self_attn.rotary_emb.inv_freq"))
		return layer >= 0 && layer < config->num_hidden_layers;
	return config->tie_word_embeddings && !strncmp(key, "lm_head.", 8);
}

static void account_rest(struct matcher *k)
{
	km_checkpoint *cp = k->cp;

	for (int64_t i = 0; i < cp->shards.count; i++) {
		const km_tensor *t = cp->shards.tensors[i];
		const char *key;
		enum km_name_scope scope;

		if (cp->class[i] != KM_CLASS_COUNT)
			continue;
		scope = km_name_key(t->name, &key);
		if (is_skipped(k->config, scope, key)) {
			take(cp, i, KM_CLASS_SKIPPED);
			continue;
		}
		km_findings_add(k->findings, KM_EFORMAT,
		                "%s: tensor %s is extra: no %s model of %d layers has it",
		                km_shards_path(&cp->shards, t), t->name,
		                km_model_kind_name(k->config->kind), k->config->num_hidden_layers);
	}
}

int km_checkpoint_open(km_checkpoint *cp, const char *dir, km_findings *findings,
                       km_findings *notes, km_err *err)
{
	*cp = (km_checkpoint){ .notes = notes };
	KM_TRY(km_shards_open(&cp->shards, dir, findings, err));
	km_shards_report_unread(&cp->shards, notes);
	cp->class = km_xmalloc((size_t)cp->shards.count);
	memset(cp->class, KM_CLASS_COUNT, (size_t)cp->shards.count);
	km_name_map_init(&cp->keys, (size_t)cp->shards.count);
	for (int64_t i = 0; i < cp->shards.count; i++) {
		const km_tensor *t = cp->shards.tensors[i];
		const char *key;
		int64_t old;

		if (km_name_key(t->name, &key) == KM_NAME_UNKNOWN)
			continue;
		old = km_name_map_add(&cp->keys, key, strlen(key), i);
		if (old >= 0)
			km_findings_add(findings, KM_EFORMAT,
			                "%s: tensors %s and %s are the same weight",
			                km_shards_path(&cp->shards, t),
			                cp->shards.tensors[old]->name, t->name);
	}
	return 0;
}

static bool has_vision(const km_checkpoint *cp)
{
	const char *key;

	for (int64_t i = 0; i < cp->shards.count; i++)
		if (km_name_key(cp->shards.tensors[i]->name, &key) == KM_NAME_VISION)
			return true;
	return false;
}

int km_checkpoint_match(km_checkpoint *cp, const km_config *config, km_module_bind bind,
                        void *context, km_findings *findings, km_err *err)
{
	struct matcher k = { cp, config, bind, context, findings };

	cp->no_vision = config->vision.present && !has_vision(cp);
	if (cp->no_vision)
		km_findings_add(cp->notes, KM_ENOTFOUND,
		                "%s: config.json has a vision_config, but no tensor of the vision "
		                "tower or the projector is there: this is the text model alone",
		                cp->shards.dir);
	KM_TRY(km_inventory_visit(config, match_module, &k, err));
	account_rest(&k);
	return 0;
}

void km_checkpoint_close(km_checkpoint *cp)
{
	km_name_map_release(&cp->keys);
	free(cp->class);
	cp->class = NULL;
	km_shards_close(&cp->shards);
}
