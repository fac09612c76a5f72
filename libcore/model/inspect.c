#include "model/inspect.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "model/checkpoint.h"

struct inspection {
	const char *path;
	bool on_disk; /* false: a config file alone, the numbers are what a checkpoint would have */
	km_config config;
	km_findings findings;
	int files;
	int64_t missing, forms[KM_FORM_COUNT]; /* modules by enum km_form */
	int64_t bytes[KM_CLASS_COUNT], params[KM_CLASS_COUNT], tensors[KM_CLASS_COUNT];
};

static int add_planned(void *context, const km_module *m, km_err *err)
{
	struct inspection *in = context;
	km_wanted wanted[KM_MAX_MODULE_TENSORS];
	int count = km_module_tensors(m, &in->config, wanted);

	(void)err;
	in->forms[m->form]++;
	if (in->on_disk)
		return 0;
	in->params[m->class] += km_module_params(m);
	in->tensors[m->class] += count;
	for (int i = 0; i < count; i++) {
		int64_t bytes = (int64_t)km_dtype_bytes(wanted[i].usual);

		for (int d = 0; d < wanted[i].ndim; d++)
			bytes *= wanted[i].shape[d];
		in->bytes[m->class] += bytes;
	}
	return 0;
}

static int look_at_files(struct inspection *in, km_err *err)
{
	km_checkpoint cp;
	int rc = km_checkpoint_open(&cp, in->path, &in->findings, &in->findings, err);

	if (rc >= 0)
		rc = km_checkpoint_match(&cp, &in->config, NULL, NULL, &in->findings, err);
	if (rc >= 0) {
		in->files = cp.shards.file_count;
		in->missing = cp.missing;
		for (int k = 0; k < KM_CLASS_COUNT; k++) {
			in->bytes[k] = cp.bytes[k];
			in->params[k] = cp.params[k];
			in->tensors[k] = cp.tensors[k];
		}
	}
	km_checkpoint_close(&cp);
	return rc;
}

static int64_t total(const int64_t by_class[KM_CLASS_COUNT])
{
	int64_t sum = 0;

	for (int k = 0; k < KM_CLASS_COUNT; k++)
		sum += by_class[k];
	return sum;
}

/* What one token's forward pass uses: top_k of the routed experts, not the tower. */
static int64_t active_params(const struct inspection *in)
{
	const km_config *c = &in->config;
	int64_t sum = total(in->params) - in->params[KM_CLASS_VISION] -
	              in->params[KM_CLASS_PROJECTOR] - in->params[KM_CLASS_EXPERTS];

	if (c->n_routed_experts)
		sum += in->params[KM_CLASS_EXPERTS] / c->n_routed_experts * c->num_experts_per_tok;
	return sum;
}

static int64_t kv_bytes_per_token(const km_config *c)
{
	return (int64_t)c->num_hidden_layers * (c->kv_lora_rank + c->qk_rope_head_dim) * 2;
}

static int64_t quantized_modules(const struct inspection *in)
{
	return in->forms[KM_FORM_FP8] + in->forms[KM_FORM_INT4] + in->forms[KM_FORM_REPACKED];
}

static void describe_quant(const km_config *c, char *out, size_t cap)
{
	const km_quant_config *q = &c->quant;

	if (q->method == KM_QUANT_FP8_BLOCK)
		snprintf(out, cap, "fp8 e4m3, blocks of %dx%d", q->block_rows, q->block_cols);
	else if (q->method == KM_QUANT_INT4_PACKED && q->group_size)
		snprintf(out, cap, "int4 packed, symmetric, groups of %d", q->group_size);
	else if (q->method == KM_QUANT_INT4_PACKED)
		snprintf(out, cap, "int4 packed, symmetric, per channel");
	else
		snprintf(out, cap, "none");
}

/* ---- for people ----------------------------------------------------------------------------- */

static void print_size(km_buf *out, double bytes)
{
	if (bytes >= 1e9)
		km_buf_printf(out, "%10.2f GB", bytes / 1e9);
	else if (bytes >= 1e6)
		km_buf_printf(out, "%10.2f MB", bytes / 1e6);
	else
		km_buf_printf(out, "%10.2f kB", bytes / 1e3);
}

static void print_shape(const struct inspection *in, km_buf *out)
{
	const km_config *c = &in->config;
	int moe = 0;

	for (int i = 0; i < c->num_hidden_layers; i++)
		moe += km_config_is_moe_layer(c, i);
	km_buf_printf(out, "model         %s (%s)\n", km_model_kind_name(c->kind), c->architecture);
	km_buf_printf(out,
	              "layers        %d: %d dense, %d with experts; hidden %d, vocabulary %d, "
	              "context %d\n",
	              c->num_hidden_layers, c->num_hidden_layers - moe, moe, c->hidden_size,
	              c->vocab_size, c->max_position_embeddings);
	km_buf_printf(
		out,
		"attention     MLA, %d heads, q_lora %d, kv_lora %d, head %d + %d rope, v %d\n",
		c->num_attention_heads, c->q_lora_rank, c->kv_lora_rank, c->qk_nope_head_dim,
		c->qk_rope_head_dim, c->v_head_dim);
	if (c->rope.yarn)
		km_buf_printf(out, "rope          theta %g, YaRN factor %g from %d, beta %g/%g\n",
		              c->rope.theta, c->rope.factor,
		              c->rope.original_max_position_embeddings, c->rope.beta_fast,
		              c->rope.beta_slow);
	else
		km_buf_printf(out, "rope          theta %g\n", c->rope.theta);
	if (moe)
		km_buf_printf(out,
		              "experts       %d, top %d%s, %d shared, intermediate %d; %d group%s, "
		              "scaling %g\n",
		              c->n_routed_experts, c->num_experts_per_tok,
		              c->scoring_softmax ? " by softmax" : "", c->n_shared_experts,
		              c->moe_intermediate_size, c->n_group, c->n_group == 1 ? "" : "s",
		              c->routed_scaling_factor);
	if (c->vision.present)
		km_buf_printf(out, "vision        %d layers, hidden %d, %d heads, patch %d\n",
		              c->vision.num_hidden_layers, c->vision.hidden_size,
		              c->vision.num_attention_heads, c->vision.patch_size);
}

static void print_classes(const struct inspection *in, km_buf *out)
{
	km_buf_printf(out, "\n%-16s%10s%16s%13s\n", "class", "tensors", "parameters", "bytes");
	for (int k = 0; k < KM_CLASS_COUNT; k++) {
		if (!in->tensors[k] && !in->params[k])
			continue;
		km_buf_printf(out, "%-16s%10" PRId64 "%16" PRId64,
		              km_tensor_class_name((enum km_tensor_class)k), in->tensors[k],
		              in->params[k]);
		print_size(out, (double)in->bytes[k]);
		km_buf_putc(out, '\n');
	}
	km_buf_printf(out, "%-16s%10" PRId64 "%16" PRId64, "total", total(in->tensors),
	              total(in->params));
	print_size(out, (double)total(in->bytes));
	km_buf_puts(out, "\n\n");
}

static void print_text(const struct inspection *in, km_buf *out)
{
	const km_config *c = &in->config;
	char quant[128];

	describe_quant(c, quant, sizeof(quant));
	print_shape(in, out);
	km_buf_printf(out, "quantisation  %s (%" PRId64 " of %" PRId64 " modules), the rest %s\n",
	              quant, quantized_modules(in),
	              quantized_modules(in) + in->forms[KM_FORM_PLAIN], km_dtype_name(c->dtype));
	if (c->expert_layout)
		km_buf_printf(out,
		              "layout        routed experts repacked for GPUs: %s, version %d "
		              "(kimi-convert --unpack undoes it)\n",
		              KM_EXPERT_LAYOUT, c->expert_layout);
	km_buf_printf(out, "parameters    %.3f B, %.3f B active for a token\n",
	              (double)total(in->params) / 1e9, (double)active_params(in) / 1e9);
	km_buf_printf(out, "KV cache      %" PRId64 " bytes a token in bf16\n",
	              kv_bytes_per_token(c));
	km_buf_puts(out, "end tokens   ");
	for (int i = 0; i < c->eos_count; i++)
		km_buf_printf(out, " %d", c->eos[i]);
	km_buf_putc(out, '\n');
	print_classes(in, out);
	if (!in->on_disk) {
		km_buf_puts(out, "a config alone: the table says what a checkpoint of it holds\n");
		return;
	}
	km_buf_printf(out, "%d file%s, %" PRId64 " tensors missing, %" PRId64 " problems\n",
	              in->files, in->files == 1 ? "" : "s", in->missing, in->findings.count);
	for (int i = 0; i < in->findings.kept; i++)
		km_buf_printf(out, "  %s\n", in->findings.items[i].sentence);
	if (in->findings.count > in->findings.kept)
		km_buf_printf(out, "  and %" PRId64 " more\n",
		              in->findings.count - in->findings.kept);
}

/* ---- for machines --------------------------------------------------------------------------- */

static json_t *quant_json(const struct inspection *in)
{
	static const char *const methods[] = { "none", "fp8_block", "int4_packed" };
	const km_quant_config *q = &in->config.quant;
	json_t *o = json_pack("{s:s,s:I,s:I}", "method", methods[q->method], "quantized_modules",
	                      (json_int_t)quantized_modules(in),
	                      "plain_modules", (json_int_t)in->forms[KM_FORM_PLAIN]);

	if (q->method == KM_QUANT_FP8_BLOCK)
		json_object_set_new(o, "block_size",
		                    json_pack("[i,i]", q->block_rows, q->block_cols));
	if (q->method == KM_QUANT_INT4_PACKED)
		json_object_set_new(o, "group_size",
		                    q->group_size ? json_integer(q->group_size) : json_null());
	json_object_set_new(o, "expert_layout",
	                    in->config.expert_layout
	                            ? json_pack("{s:s,s:i}", "name", KM_EXPERT_LAYOUT, "version",
	                                        in->config.expert_layout)
	                            : json_null());
	return o;
}

static json_t *shape_json(const km_config *c)
{
	return json_pack("{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i}",
	                 "hidden_size", c->hidden_size, "num_hidden_layers", c->num_hidden_layers,
	                 "first_k_dense_replace", c->first_k_dense_replace, "intermediate_size",
	                 c->intermediate_size, "moe_intermediate_size", c->moe_intermediate_size,
	                 "n_routed_experts", c->n_routed_experts, "n_shared_experts",
	                 c->n_shared_experts, "num_experts_per_tok", c->num_experts_per_tok,
	                 "n_group", c->n_group, "num_attention_heads", c->num_attention_heads,
	                 "q_lora_rank", c->q_lora_rank, "kv_lora_rank", c->kv_lora_rank,
	                 "qk_nope_head_dim", c->qk_nope_head_dim, "qk_rope_head_dim",
	                 c->qk_rope_head_dim, "v_head_dim", c->v_head_dim, "vocab_size",
	                 c->vocab_size, "max_position_embeddings", c->max_position_embeddings);
}

static void print_json(const struct inspection *in, km_buf *out)
{
	const km_config *c = &in->config;
	json_t *classes = json_object(), *problems = json_array(), *eos = json_array(), *doc;
	char *text;

	for (int k = 0; k < KM_CLASS_COUNT; k++)
		if (in->tensors[k] || in->params[k])
			json_object_set_new(classes, km_tensor_class_name((enum km_tensor_class)k),
			                    json_pack("{s:I,s:I,s:I}", "tensors",
			                              (json_int_t)in->tensors[k], "parameters",
			                              (json_int_t)in->params[k], "bytes",
			                              (json_int_t)in->bytes[k]));
	for (int i = 0; i < in->findings.kept; i++)
		json_array_append_new(problems, json_string(in->findings.items[i].sentence));
	for (int i = 0; i < c->eos_count; i++)
		json_array_append_new(eos, json_integer(c->eos[i]));
	doc = json_pack("{s:s,s:s,s:b,s:o,s:o,s:I,s:I,s:I,s:o,s:I,s:o,s:i,s:I,s:I,s:o}", "kind",
	                km_model_kind_name(c->kind), "architecture", c->architecture, "vision",
	                (int)c->vision.present, "shape", shape_json(c), "quantization",
	                quant_json(in), "parameters", (json_int_t)total(in->params),
	                "active_parameters", (json_int_t)active_params(in), "kv_bytes_per_token",
	                (json_int_t)kv_bytes_per_token(c), "eos_token_ids", eos, "bytes",
	                (json_int_t)total(in->bytes), "classes", classes, "files", in->files,
	                "missing_tensors", (json_int_t)in->missing, "problem_count",
	                (json_int_t)in->findings.count, "problems", problems);
	KM_ASSERT(doc);
	text = json_dumps(doc, JSON_INDENT(2));
	km_buf_puts(out, text);
	km_buf_putc(out, '\n');
	free(text);
	json_decref(doc);
}

int km_inspect(const char *path, bool json, int max_problems, km_buf *out, km_err *err)
{
	struct inspection in = { .path = path };
	struct stat st;
	int rc;

	KM_TRY(km_config_load(&in.config, path, err));
	in.on_disk = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
	km_findings_init(&in.findings, max_problems);
	rc = km_inventory_visit(&in.config, add_planned, &in, err);
	if (rc >= 0 && in.on_disk)
		rc = look_at_files(&in, err);
	if (rc >= 0 && json)
		print_json(&in, out);
	else if (rc >= 0)
		print_text(&in, out);
	km_findings_release(&in.findings);
	km_config_release(&in.config);
	return rc;
}
