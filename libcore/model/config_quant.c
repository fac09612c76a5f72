#include "model/config_quant.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

static void read_ignore(km_quant_config *quant, km_fields *f, const char *key)
{
	json_t *list = km_field_array_or_null(f, key);

	for (size_t i = 0; list && i < json_array_size(list); i++) {
		json_t *entry = json_array_get(list, i);

		if (!json_is_string(entry)) {
			km_field_fail(f, KM_EFORMAT, key, "entry %zu is not a string", i);
			return;
		}
		quant->ignore = km_xreallocarray(quant->ignore, (size_t)quant->ignore_count + 1,
		                                 sizeof(*quant->ignore));
		quant->ignore[quant->ignore_count++] = km_xstrdup(json_string_value(entry));
	}
}

/* Only `want` is built; a missing field counts as `want` where Hugging Face's code has that
 * default. */
static void want_string(km_fields *f, const char *key, const char *want)
{
	const char *found = km_field_string_or(f, key, want);

	if (found && strcmp(found, want) != 0)
		km_field_fail(f, KM_EUNSUPPORTED, key, "only \"%s\" is supported, not \"%s\"", want,
		              found);
}

static void want_absent(km_fields *f, const char *key, const char *what)
{
	json_t *value = json_object_get(f->object, key);

	if (!value || json_is_null(value) || json_is_false(value) ||
	    (json_is_object(value) && !json_object_size(value)))
		return;
	km_field_fail(f, KM_EUNSUPPORTED, key, "%s is not supported", what);
}

static void read_fp8(km_quant_config *quant, km_fields *f)
{
	json_t *block = km_field_array_or_null(f, "weight_block_size");
	json_int_t rows, cols;

	quant->method = KM_QUANT_FP8_BLOCK;
	want_string(f, "fmt", "e4m3");
	want_string(f, "activation_scheme", "dynamic");
	read_ignore(quant, f, "modules_to_not_convert");
	read_ignore(quant, f, "ignored_layers");
	if (!block) {
		km_field_fail(f, KM_EUNSUPPORTED, "weight_block_size",
		              "fp8 with one scale per tensor is not supported, only with scales "
		              "per block");
		return;
	}
	if (json_array_size(block) != 2 || !json_is_integer(json_array_get(block, 0)) ||
	    !json_is_integer(json_array_get(block, 1))) {
		km_field_fail(f, KM_EFORMAT, "weight_block_size", "two integers are expected");
		return;
	}
	rows = json_integer_value(json_array_get(block, 0));
	cols = json_integer_value(json_array_get(block, 1));
	if (rows < 1 || cols < 1 || rows > 1 << 20 || cols > 1 << 20)
		km_field_fail(f, KM_EFORMAT, "weight_block_size", "[%lld, %lld] is no block",
		              (long long)rows, (long long)cols);
	quant->block_rows = (int)rows;
	quant->block_cols = (int)cols;
}

static void read_packed_weights(km_quant_config *quant, km_fields *w)
{
	int64_t bits = km_field_int(w, "num_bits", 1, 64);
	const char *strategy = km_field_string(w, "strategy");
	int64_t group = km_field_int_or(w, "group_size", -1, -1, 1 << 20);

	want_string(w, "type", "int");
	if (bits != 4)
		km_field_fail(w, KM_EUNSUPPORTED, "num_bits", "only 4 bits are supported, not %d",
		              (int)bits);
	if (!km_field_bool_or(w, "symmetric", true))
		km_field_fail(w, KM_EUNSUPPORTED, "symmetric",
		              "asymmetric int4 (with zero points) is not supported");
	want_absent(w, "dynamic", "dynamic weight quantisation");
	want_absent(w, "actorder", "activation reordering (actorder)");
	want_absent(w, "block_structure", "a block structure");
	if (w->rc < 0)
		return;
	if (!strcmp(strategy, "channel"))
		quant->group_size = 0;
	else if (strcmp(strategy, "group") != 0)
		km_field_fail(w, KM_EUNSUPPORTED, "strategy",
		              "only \"group\" and \"channel\" are supported, not \"%s\"", strategy);
	else if (group != 32 && group != 64 && group != 128)
		km_field_fail(w, KM_EUNSUPPORTED, "group_size",
		              "only 32, 64 and 128 are supported, not %d", (int)group);
	else
		quant->group_size = (int)group;
}

static void read_targets(km_fields *g)
{
	json_t *targets = km_field_array_or_null(g, "targets");
	const char *only = json_string_value(json_array_get(targets, 0));

	if (!targets || json_array_size(targets) != 1 || !only || strcmp(only, "Linear") != 0)
		km_field_fail(g, KM_EUNSUPPORTED, "targets", "only [\"Linear\"] is supported");
}

static void read_group(km_quant_config *quant, km_fields *f, json_t *group)
{
	km_fields g = { f->name, "quantization_config.config_groups.", group, f->err, f->rc };
	km_fields w = { f->name, "quantization_config.config_groups.weights.", NULL, f->err,
		        f->rc };

	read_targets(&g);
	want_absent(&g, "input_activations", "quantisation of input activations");
	want_absent(&g, "output_activations", "quantisation of output activations");
	want_string(&g, "format", "pack-quantized");
	w.object = km_field_object_or_null(&g, "weights");
	if (!w.object)
		km_field_fail(&g, KM_EFORMAT, "weights", "this field is missing");
	w.rc = g.rc;
	if (w.rc >= 0)
		read_packed_weights(quant, &w);
	f->rc = w.rc;
}

static void read_compressed_tensors(km_quant_config *quant, km_fields *f)
{
	json_t *groups = km_field_object_or_null(f, "config_groups");
	const char *format = km_field_string(f, "format");

	quant->method = KM_QUANT_INT4_PACKED;
	if (format && strcmp(format, "pack-quantized") != 0)
		km_field_fail(f, KM_EUNSUPPORTED, "format",
		              "of compressed-tensors only \"pack-quantized\" int4 is supported, "
		              "not \"%s\"",
		              format);
	want_string(f, "quantization_status", "compressed");
	want_absent(f, "kv_cache_scheme", "a quantised KV cache scheme");
	want_absent(f, "transform_config", "a transform (rotation) of the weights");
	want_absent(f, "linear_fp8_config", "fp8 linears beside int4 experts (W4AFP8)");
	if (km_field_has(f, "sparsity_config")) {
		km_fields s = { f->name, "quantization_config.sparsity_config.",
			        km_field_object_or_null(f, "sparsity_config"), f->err, f->rc };

		want_string(&s, "format", "dense");
		f->rc = s.rc;
	}
	read_ignore(quant, f, "ignore");
	if (!groups || json_object_size(groups) != 1) {
		km_field_fail(f, KM_EUNSUPPORTED, "config_groups",
		              "exactly one group is supported, there are %zu",
		              groups ? json_object_size(groups) : 0);
		return;
	}
	read_group(quant, f, json_object_iter_value(json_object_iter(groups)));
}

void km_quant_refuse_modelopt(km_fields *f)
{
	json_t *inner = json_object_get(f->object, "quantization");
	const char *algo =
		json_string_value(json_object_get(inner ? inner : f->object, "quant_algo"));

	km_field_fail(f, KM_EUNSUPPORTED, "quant_algo",
	              "ModelOpt's %s quantisation is not supported", algo ? algo : "(unnamed)");
}

void km_quant_config_read(km_quant_config *quant, km_fields *f)
{
	const char *method = km_field_string_or(f, "quant_method", NULL);

	if (f->rc < 0)
		return;
	if (!method && json_object_get(f->object, "quant_algo"))
		km_quant_refuse_modelopt(f);
	else if (!method)
		km_field_fail(f, KM_EFORMAT, "quant_method", "this field is missing");
	else if (!strcmp(method, "fp8"))
		read_fp8(quant, f);
	else if (!strcmp(method, "compressed-tensors"))
		read_compressed_tensors(quant, f);
	else if (!strncmp(method, "modelopt", 8))
		km_quant_refuse_modelopt(f);
	else if (!strcmp(method, "quark"))
		km_field_fail(f, KM_EUNSUPPORTED, "quant_method",
		              "Quark's MXFP4 quantisation is not supported");
	else
		km_field_fail(f, KM_EUNSUPPORTED, "quant_method",
		              "\"%s\" is not supported, only \"fp8\" and \"compressed-tensors\"",
		              method);
}

void km_quant_config_release(km_quant_config *quant)
{
	for (int i = 0; i < quant->ignore_count; i++)
		free(quant->ignore[i]);
	free(quant->ignore);
	*quant = (km_quant_config){ .method = KM_QUANT_NONE };
}
