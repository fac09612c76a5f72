/* What engine/bench_one_batch.h measured, for people and for machines. */
#include "engine/bench_one_batch.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- shared ---- */

static double prefill_rate(const km_bench_result *r)
{
	return (double)r->shape.batch * r->shape.input / r->prefill_s;
}

static double total_rate(const km_bench_result *r)
{
	double tokens = (double)r->shape.batch *
	                ((r->prefill_steps ? r->shape.input : 0) + r->decode_steps);

	return tokens / r->total_s;
}

/* Share of the roofline; 0: it is not known, or the op moves nothing that counts. */
static double share(const km_bench_report *report, double us, double bytes, double flops)
{
	double least = km_roofline_us(&report->roofline, bytes, flops);

	return us > 0 ? least / us : 0;
}

static km_step_cost total_cost(const km_profile *p)
{
	km_step_cost sum = { 0 };

	for (int i = 0; i < KM_STEP_COUNT; i++) {
		sum.bytes += p->op[i].cost.bytes;
		sum.flops += p->op[i].cost.flops;
	}
	return sum;
}

/* The sum of what each op would take at the roofline: what the whole step could take, one op after the
 * other. */
static double floor_us(const km_bench_report *report, const km_profile *p)
{
	double us = 0;

	for (int i = 0; i < KM_STEP_COUNT; i++)
		us += km_roofline_us(&report->roofline, p->op[i].cost.bytes, p->op[i].cost.flops);
	return us;
}

static double layer_floor_us(const km_bench_report *report, const km_profile *p)
{
	double us = 0;

	for (int i = 0; i < KM_STEP_COUNT; i++)
		us += km_roofline_us(&report->roofline, p->layer[i].bytes, p->layer[i].flops);
	return us;
}

static double layer_bytes(const km_profile *p)
{
	double bytes = 0;

	for (int i = 0; i < KM_STEP_COUNT; i++)
		bytes += p->layer[i].bytes;
	return bytes;
}

/* So little is read that some of it stays in the cache: weights and cached tokens of all layers from one
 * replay to the next, activations, which lie in the same place in each layer, from one call to the next. */
static bool is_warm(const km_profile *p, const km_profile_op *op)
{
	double rest = (op->cost.bytes - op->cost.weight_bytes) / (double)op->cost.calls;

	return op->cost.weight_bytes < 2 * p->cache_bytes && rest < p->cache_bytes;
}

/* ---- text ---- */

static void put_head(const km_bench_report *report, km_buf *out)
{
	const km_bench_options *o = report->options;

	km_buf_printf(out, "model    %s: %d of %d layers, %d of them MoE, %.2f GB", o->model,
	              report->layers, report->depth, report->moe_layers, report->weight_bytes / 1e9);
	if (o->random)
		km_buf_puts(out, ", random weights");
	if (o->random && o->random->shard_of > 1)
		km_buf_printf(out, ", one rank's slice of %d\nleft out %s", o->random->shard_of,
		              report->left_out.data);
	km_buf_printf(out, "\ndevice   %s\nroofline ", report->device);
	km_roofline_describe(&report->roofline, out);
	km_buf_putc(out, '\n');
	if (o->engine->backend == KM_BACKEND_CUDA)
		km_buf_puts(out, "columns  us: the op alone, in all layers; saved us: what the whole step takes "
		                 "less without it\n");
	km_buf_putc(out, '\n');
}

static void put_results(const km_bench_report *report, km_buf *out)
{
	km_buf_printf(out, "%7s %7s %7s  %11s %11s  %11s %11s  %10s %11s\n", "batch", "input",
	              "output", "prefill s", "tokens/s", "decode ms", "tokens/s", "total s", "tokens/s");
	for (int i = 0; i < report->count; i++) {
		const km_bench_result *r = &report->results[i];

		km_buf_printf(out, "%7d %7d %7d  ", r->shape.batch, r->shape.input, r->shape.output);
		if (r->prefill_steps)
			km_buf_printf(out, "%11.4f %11.1f  ", r->prefill_s, prefill_rate(r));
		else
			km_buf_printf(out, "%11s %11s  ", "-", "-");
		if (r->decode_steps)
			km_buf_printf(out, "%11.3f %11.1f  ", r->decode_s * 1e3,
			              r->shape.batch / r->decode_s);
		else
			km_buf_printf(out, "%11s %11s  ", "-", "-");
		km_buf_printf(out, "%10.4f %11.1f\n", r->total_s, total_rate(r));
	}
}

static void put_op(const km_bench_report *report, const km_profile *p, int i, km_buf *out)
{
	const km_profile_op *op = &p->op[i];
	double part = share(report, op->us, op->cost.bytes, op->cost.flops);

	km_buf_printf(out, "%-16s %8d ", km_step_op_name((enum km_step_op)i), op->launches);
	if (!op->launches) {
		km_buf_printf(out, "%11s %7s %10.3f\n", "-", "-", op->cost.bytes / 1e6);
		return;
	}
	km_buf_printf(out, "%11.2f %6.1f%% %10.3f %8.1f %9.3f ", op->us, 100 * op->us / p->sum_us,
	              op->cost.bytes / 1e6, op->cost.bytes / op->us * 1e-3,
	              op->cost.flops / op->us * 1e-6);
	if (part > 0)
		km_buf_printf(out, "%6.1f%%%c", 100 * part, is_warm(p, op) ? '*' : ' ');
	else
		km_buf_printf(out, "%7s ", "-");
	if (isnan(op->saved_us))
		km_buf_printf(out, "%10s\n", "-");
	else
		km_buf_printf(out, "%10.2f\n", op->saved_us);
}

static void put_profile(const km_bench_report *report, const char *what, const km_profile *p,
                        km_buf *out)
{
	km_step_cost all = total_cost(p);
	bool warm = false;

	km_buf_printf(out, "\n%s\n", what);
	km_buf_printf(out,
	              "whole step %.2f us, %.1f MB, %.1f GB/s, %.2f TFLOP/s, %.1f%% of the roofline "
	              "(%.2f us), %d launches; sum of ops %.2f us\n",
	              p->step_us, all.bytes / 1e6, all.bytes / p->step_us * 1e-3,
	              all.flops / p->step_us * 1e-6, 100 * floor_us(report, p) / p->step_us,
	              floor_us(report, p), p->launches, p->sum_us);
	if (p->layers)
		km_buf_printf(out, "a%s layer %.2f us (%d of them together), %.1f MB, %.1f%% of the roofline",
		              p->layers_are_moe ? " MoE" : "", p->layers_us / p->layers, p->layers,
		              layer_bytes(p) / 1e6,
		              100 * layer_floor_us(report, p) * p->layers / p->layers_us);
	else
		km_buf_puts(out, "no layer of its own: the last computes only the rows that are wanted");
	if (p->distinct_experts > 0)
		km_buf_printf(out, "; %.1f different experts a layer, %.1f by even chance",
		              p->distinct_experts, p->expected_experts);
	km_buf_printf(out, "\n%-16s %8s %11s %7s %10s %8s %9s %8s %9s\n", "op", "launches", "us", "share",
	              "MB", "GB/s", "TFLOP/s", "roofline", "saved us");
	for (int i = 0; i < KM_STEP_COUNT; i++) {
		if (!p->op[i].cost.calls)
			continue;
		put_op(report, p, i, out);
		warm = warm || is_warm(p, &p->op[i]);
	}
	if (p->op[KM_STEP_ROUTER].cost.calls && p->op[KM_STEP_ROUTER].cost.flops <= 0)
		km_buf_puts(out, "router is the selection alone: its product is part of shared_gate_up's launch "
		                 "and counted there\n");
	if (warm)
		km_buf_puts(out, "* in part from the cache: the weights of all layers are less than twice its "
		                 "size, activations less than it\n");
}

void km_bench_report_text(const km_bench_report *report, km_buf *out)
{
	put_head(report, out);
	put_results(report, out);
	for (int i = 0; i < report->count; i++) {
		const km_bench_result *r = &report->results[i];
		char what[200];

		snprintf(what, sizeof(what), "Prefill, batch %d: the last of %d steps, %d rows, context %d",
		         r->shape.batch, r->prefill_steps, r->prefill_rows, r->prefill_context);
		if (r->prefill_steps)
			put_profile(report, what, &r->prefill, out);
		snprintf(what, sizeof(what), "Decode, batch %d: a step at context %d", r->shape.batch,
		         r->decode_context);
		if (r->decode_steps)
			put_profile(report, what, &r->decode, out);
	}
}

/* ---- JSON ---- */

static void put_string(km_buf *out, const char *name, const char *value)
{
	json_t *string = value ? json_string(value) : NULL;
	char *text = string ? json_dumps(string, JSON_ENCODE_ANY) : NULL;

	km_buf_printf(out, "\"%s\": %s", name, text ? text : "null");
	free(text);
	json_decref(string);
}

static void put_number(km_buf *out, const char *name, double value)
{
	if (isfinite(value))
		km_buf_printf(out, ", \"%s\": %.10g", name, value);
	else
		km_buf_printf(out, ", \"%s\": null", name);
}

/* Null where nothing was measured or is known. */
static void put_positive(km_buf *out, const char *name, double value)
{
	put_number(out, name, value > 0 ? value : NAN);
}

static void put_json_op(const km_bench_report *report, const km_profile *p, int i, km_buf *out)
{
	const km_profile_op *op = &p->op[i];

	km_buf_puts(out, "    {");
	put_string(out, "op", km_step_op_name((enum km_step_op)i));
	put_number(out, "launches", op->launches);
	put_positive(out, "us", op->launches ? op->us : 0);
	put_number(out, "bytes", op->cost.bytes);
	put_number(out, "flops", op->cost.flops);
	put_positive(out, "roofline", share(report, op->us, op->cost.bytes, op->cost.flops));
	put_number(out, "saved_us", op->saved_us);
	km_buf_printf(out, ", \"from_cache\": %s}", is_warm(p, op) ? "true" : "false");
}

static void put_json_profile(const km_bench_report *report, const char *name, const km_profile *p,
                             km_buf *out)
{
	km_step_cost all = total_cost(p);
	const char *separator = "\n";

	km_buf_printf(out, ",\n   \"%s\": {\"step_us\": %.10g", name, p->step_us);
	put_number(out, "sum_us", p->sum_us);
	put_number(out, "launches", p->launches);
	put_positive(out, "roofline_us", floor_us(report, p));
	put_number(out, "bytes", all.bytes);
	put_number(out, "flops", all.flops);
	put_number(out, "layers", p->layers);
	km_buf_printf(out, ", \"layers_are_moe\": %s", p->layers_are_moe ? "true" : "false");
	put_positive(out, "layer_us", p->layers ? p->layers_us / p->layers : 0);
	put_positive(out, "layer_bytes", layer_bytes(p));
	put_positive(out, "layer_roofline_us", layer_floor_us(report, p));
	put_positive(out, "distinct_experts", p->distinct_experts);
	put_positive(out, "expected_experts", p->expected_experts);
	km_buf_puts(out, ", \"ops\": [");
	for (int i = 0; i < KM_STEP_COUNT; i++) {
		if (!p->op[i].cost.calls)
			continue;
		km_buf_puts(out, separator);
		put_json_op(report, p, i, out);
		separator = ",\n";
	}
	km_buf_puts(out, "]}");
}

static void put_json_result(const km_bench_report *report, const km_bench_result *r, km_buf *out)
{
	bool prefill = r->prefill_steps, decode = r->decode_steps;

	km_buf_printf(out, "  {\"batch\": %d, \"input\": %d, \"output\": %d", r->shape.batch,
	              r->shape.input, r->shape.output);
	put_number(out, "prefill_latency_s", prefill ? r->prefill_s : NAN);
	put_number(out, "prefill_tokens_per_s", prefill ? prefill_rate(r) : NAN);
	put_number(out, "prefill_steps", r->prefill_steps);
	put_number(out, "median_decode_latency_s", decode ? r->decode_s : NAN);
	put_number(out, "median_decode_tokens_per_s", decode ? r->shape.batch / r->decode_s : NAN);
	put_number(out, "decode_steps", r->decode_steps);
	put_number(out, "total_latency_s", r->total_s);
	put_number(out, "total_tokens_per_s", total_rate(r));
	put_positive(out, "decode_context", r->decode_context);
	if (prefill)
		put_json_profile(report, "prefill_step", &r->prefill, out);
	else
		km_buf_puts(out, ", \"prefill_step\": null");
	if (decode)
		put_json_profile(report, "decode_step", &r->decode, out);
	else
		km_buf_puts(out, ", \"decode_step\": null");
	km_buf_puts(out, "}");
}

void km_bench_report_json(const km_bench_report *report, km_buf *out)
{
	const km_bench_options *o = report->options;
	enum km_kv_dtype type = o->engine->kv_dtype;
	const char *kv = type == KM_KV_F32 ? "float32" : type == KM_KV_BF16 ? "bf16" : "fp8_e4m3";

	km_buf_puts(out, "{");
	put_string(out, "model", o->model);
	km_buf_puts(out, ", ");
	put_string(out, "commit", o->commit);
	km_buf_puts(out, ", ");
	put_string(out, "device", report->device);
	km_buf_puts(out, ", ");
	put_string(out, "roofline_source", report->roofline.source);
	put_positive(out, "roofline_gbps", report->roofline.gbps);
	put_positive(out, "roofline_tflops", report->roofline.tflops);
	km_buf_printf(out, ",\n \"layers\": %d, \"model_layers\": %d, \"moe_layers\": %d, ", report->layers,
	              report->depth, report->moe_layers);
	km_buf_printf(out, "\"random_weights\": %s, \"shard_of\": %d, ", o->random ? "true" : "false",
	              o->random ? o->random->shard_of : 1);
	put_string(out, "left_out", report->left_out.len ? report->left_out.data : NULL);
	put_number(out, "weight_bytes", report->weight_bytes);
	km_buf_printf(out, ", \"kv_cache\": \"%s\",\n \"results\": [\n", kv);
	for (int i = 0; i < report->count; i++) {
		km_buf_puts(out, i ? ",\n" : "");
		put_json_result(report, &report->results[i], out);
	}
	km_buf_puts(out, "]}\n");
}
