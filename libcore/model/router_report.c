#include "model/router_report.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

void km_router_report_table(const km_router_bench_report *r, km_buf *out)
{
	int last = 0;

	km_buf_printf(out, "%s, %s\n%d experts, top %d, hidden %d, %s weights, launches %s\n", r->device,
	              r->toolkit, r->shape.experts, r->shape.top_k, r->shape.hidden,
	              r->shape.weights_f32 ? "f32" : "bf16",
	              r->overlap ? "overlap" : r->gpu ? "do not overlap" : "are calls");
	km_buf_puts(out, "roofline: ");
	km_roofline_describe(&r->roofline, out);
	km_buf_puts(out, "\n\n");
	km_buf_printf(out, "%7s  %-11s %10s %10s %10s %9s %6s%s\n", "tokens", "form", "us", "p95",
	              r->gpu ? "plain us" : "", "GB/s", "roof", r->rows[0].baseline_us > 0 ? "  baseline" : "");
	for (int i = 0; i < r->count; i++) {
		const km_router_bench_row *row = &r->rows[i];

		if (row->tokens != last && i)
			km_buf_putc(out, '\n');
		last = row->tokens;
		km_buf_printf(out, "%7d  %-11s %10.2f %10.2f ", row->tokens, row->form, row->us_median,
		              row->us_p95);
		if (row->launch_us_median > 0)
			km_buf_printf(out, "%10.2f %9.1f ", row->launch_us_median, row->gbps);
		else
			km_buf_printf(out, "%10s %9.1f ", "", row->gbps);
		if (row->roofline > 0)
			km_buf_printf(out, "%5.1f%%", 100 * row->roofline);
		else
			km_buf_printf(out, "%6s", "-");
		if (row->baseline_us > 0)
			km_buf_printf(out, " %8.2f %5.2fx", row->baseline_us, row->baseline_us / row->us_median);
		km_buf_putc(out, '\n');
	}
}

static void put_or_null(km_buf *out, const char *name, double v, int digits)
{
	if (v > 0)
		km_buf_printf(out, ", \"%s\": %.*f", name, digits, v);
	else
		km_buf_printf(out, ", \"%s\": null", name);
}

static void put_shape(const km_router_bench_report *r, km_buf *out)
{
	const km_router_shape *s = &r->shape;

	km_buf_printf(out, "{\"experts\": %d, \"top_k\": %d, \"hidden\": %d, \"groups\": %d, \"topk_group\": %d, "
	              "\"block\": %d, \"scoring\": \"%s\", \"weights\": \"%s\", \"overlap\": %s}",
	              s->experts, s->top_k, s->hidden, s->groups > 1 ? s->groups : 1,
	              s->groups > 1 ? s->topk_group : 1, s->block, s->softmax ? "softmax" : "sigmoid",
	              s->weights_f32 ? "f32" : "bf16", r->overlap ? "true" : "false");
}

/* Device and toolkit names are the vendor's or ours: no character of theirs needs escaping but quotes. */
static void put_string(km_buf *out, const char *s)
{
	km_buf_putc(out, '"');
	for (; *s; s++)
		if (*s == '"' || *s == '\\')
			km_buf_printf(out, "\\%c", *s);
		else if ((unsigned char)*s >= ' ')
			km_buf_putc(out, *s);
	km_buf_putc(out, '"');
}

void km_router_report_json(const km_router_bench_report *r, const char *commit, km_buf *out)
{
	km_buf_puts(out, "{\"device\": ");
	put_string(out, r->device);
	km_buf_puts(out, ",\n \"toolkit\": ");
	put_string(out, r->toolkit);
	km_buf_puts(out, ",\n \"commit\": ");
	put_string(out, commit);
	km_buf_puts(out, ",\n \"roofline_source\": ");
	put_string(out, r->roofline.source);
	put_or_null(out, "roofline_gbps", r->roofline.gbps, 0);
	put_or_null(out, "roofline_tflops", r->roofline.tflops, 0);
	km_buf_puts(out, ",\n \"shape\": ");
	put_shape(r, out);
	km_buf_puts(out, ",\n \"rows\": [");
	for (int i = 0; i < r->count; i++) {
		const km_router_bench_row *row = &r->rows[i];

		km_buf_printf(out, "%s\n  {\"tokens\": %d, \"form\": \"%s\", \"us_median\": %.3f, \"us_p95\": %.3f",
		              i ? "," : "", row->tokens, row->form, row->us_median, row->us_p95);
		put_or_null(out, "launch_us_median", row->launch_us_median, 3);
		km_buf_printf(out, ", \"gbps\": %.2f", row->gbps);
		put_or_null(out, "roofline", row->roofline, 4);
		put_or_null(out, "baseline", row->baseline_us, 3);
		put_or_null(out, "baseline_ratio",
		            row->baseline_us > 0 ? row->baseline_us / row->us_median : 0, 4);
		km_buf_putc(out, '}');
	}
	km_buf_puts(out, "\n ]}\n");
}

void km_router_report_csv(const km_router_bench_report *r, km_buf *out)
{
	km_buf_puts(out, "tokens,form,us_median,us_p95,launch_us_median,gbps,roofline,baseline,baseline_ratio\n");
	for (int i = 0; i < r->count; i++) {
		const km_router_bench_row *row = &r->rows[i];

		km_buf_printf(out, "%d,%s,%.3f,%.3f,", row->tokens, row->form, row->us_median, row->us_p95);
		if (row->launch_us_median > 0)
			km_buf_printf(out, "%.3f", row->launch_us_median);
		km_buf_printf(out, ",%.2f,", row->gbps);
		if (row->roofline > 0)
			km_buf_printf(out, "%.4f", row->roofline);
		if (row->baseline_us > 0)
			km_buf_printf(out, ",%.3f,%.4f\n", row->baseline_us, row->baseline_us / row->us_median);
		else
			km_buf_puts(out, ",,\n");
	}
}

/* Both axes logarithmic: tokens across, microseconds up. */
enum { SVG_WIDTH = 900, SVG_HEIGHT = 560, SVG_LEFT = 70, SVG_RIGHT = 150, SVG_TOP = 50, SVG_BOTTOM = 50 };

typedef struct svg_axes {
	double x0, x1, y0, y1; /* logarithms */
} svg_axes;

static double svg_x(const svg_axes *a, double tokens)
{
	return SVG_LEFT + (log2(tokens) - a->x0) / (a->x1 - a->x0) * (SVG_WIDTH - SVG_LEFT - SVG_RIGHT);
}

static double svg_y(const svg_axes *a, double us)
{
	return SVG_HEIGHT - SVG_BOTTOM -
	       (log2(us) - a->y0) / (a->y1 - a->y0) * (SVG_HEIGHT - SVG_TOP - SVG_BOTTOM);
}

static svg_axes svg_range(const km_router_bench_report *r)
{
	svg_axes a = { INFINITY, -INFINITY, INFINITY, -INFINITY };

	for (int i = 0; i < r->count; i++) {
		a.x0 = fmin(a.x0, log2(r->rows[i].tokens));
		a.x1 = fmax(a.x1, log2(r->rows[i].tokens));
		a.y0 = fmin(a.y0, floor(log2(r->rows[i].us_median)));
		a.y1 = fmax(a.y1, ceil(log2(r->rows[i].us_median)));
	}
	a.x1 = fmax(a.x1, a.x0 + 1);
	a.y1 = fmax(a.y1, a.y0 + 1);
	return a;
}

static void svg_grid(const svg_axes *a, km_buf *out)
{
	for (int e = (int)ceil(a->x0); e <= (int)a->x1; e += a->x1 - a->x0 > 10 ? 2 : 1)
		km_buf_printf(out, "<line x1='%.1f' y1='%d' x2='%.1f' y2='%d' stroke='#ddd'/>"
		              "<text x='%.1f' y='%d' text-anchor='middle'>%.0f</text>\n",
		              svg_x(a, exp2(e)), SVG_TOP, svg_x(a, exp2(e)), SVG_HEIGHT - SVG_BOTTOM,
		              svg_x(a, exp2(e)), SVG_HEIGHT - SVG_BOTTOM + 18, exp2(e));
	for (int e = (int)a->y0; e <= (int)a->y1; e++)
		km_buf_printf(out, "<line x1='%d' y1='%.1f' x2='%d' y2='%.1f' stroke='#ddd'/>"
		              "<text x='%d' y='%.1f' text-anchor='end'>%g</text>\n",
		              SVG_LEFT, svg_y(a, exp2(e)), SVG_WIDTH - SVG_RIGHT, svg_y(a, exp2(e)),
		              SVG_LEFT - 8, svg_y(a, exp2(e)) + 4, exp2(e));
	km_buf_printf(out, "<text x='%d' y='%d' text-anchor='middle'>tokens</text>"
	              "<text x='16' y='%d' transform='rotate(-90 16 %d)' text-anchor='middle'>"
	              "microseconds</text>\n", (SVG_LEFT + SVG_WIDTH - SVG_RIGHT) / 2, SVG_HEIGHT - 10,
	              SVG_HEIGHT / 2, SVG_HEIGHT / 2);
}

void km_router_report_svg(const km_router_bench_report *r, km_buf *out)
{
	static const char *const forms[] = { "router", "gate", "align", "gate+align", "one-launch", "chain" };
	static const char *const colors[] = { "#4269d0", "#efb118", "#6cc5b0", "#ff725c", "#a463f2", "#222" };
	svg_axes a = svg_range(r);

	km_buf_printf(out, "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' "
	              "font-family='sans-serif' font-size='12'>\n<rect width='100%%' height='100%%' "
	              "fill='white'/>\n<text x='%d' y='24' font-size='15'>%s: router of %d experts, top %d, "
	              "hidden %d</text>\n", SVG_WIDTH, SVG_HEIGHT, SVG_LEFT, r->device, r->shape.experts,
	              r->shape.top_k, r->shape.hidden);
	svg_grid(&a, out);
	for (size_t f = 0; f < sizeof(forms) / sizeof(*forms); f++) {
		double x = 0, y = 0;
		bool any = false;

		for (int i = 0; i < r->count; i++) {
			if (strcmp(r->rows[i].form, forms[f]))
				continue;
			x = svg_x(&a, r->rows[i].tokens);
			y = svg_y(&a, r->rows[i].us_median);
			km_buf_printf(out, "%s%.1f,%.1f", any ? " " : "<polyline points='", x, y);
			any = true;
		}
		if (any)
			km_buf_printf(out, "' fill='none' stroke='%s' stroke-width='2'/><text x='%.1f' "
			              "y='%.1f' fill='%s'>%s</text>\n", colors[f], x + 6, y + 4, colors[f],
			              forms[f]);
	}
	km_buf_puts(out, "</svg>\n");
}

static int compare_field(const json_t *was, const json_t *is, const char *name, const char *path, km_err *err)
{
	char *a, *b;
	int rc = 0;

	if (json_equal(json_object_get(was, name), json_object_get(is, name)))
		return 0;
	a = json_dumps(json_object_get(was, name), JSON_ENCODE_ANY | JSON_COMPACT);
	b = json_dumps(json_object_get(is, name), JSON_ENCODE_ANY | JSON_COMPACT);
	rc = km_fail(err, KM_EINVAL, "--baseline %s: its %s is %s, this run's is %s", path, name,
	             a ? a : "missing", b ? b : "missing");
	free(a);
	free(b);
	return rc;
}

static double baseline_of(const json_t *rows, const km_router_bench_row *row)
{
	size_t i;
	json_t *was;

	json_array_foreach(rows, i, was) {
		const char *form = json_string_value(json_object_get(was, "form"));

		if (form && !strcmp(form, row->form) &&
		    json_integer_value(json_object_get(was, "tokens")) == row->tokens)
			return json_number_value(json_object_get(was, "us_median"));
	}
	return 0;
}

int km_router_report_compare(km_router_bench_report *r, const char *path, km_buf *missing, km_err *err)
{
	km_buf now = KM_BUF_INIT;
	json_error_t error;
	json_t *was = json_load_file(path, 0, &error), *is;
	int rc, matched = 0;

	if (!was)
		return km_fail(err, KM_EFORMAT, "--baseline %s: %s", path, error.text);
	km_router_report_json(r, "", &now);
	is = json_loads(now.data, 0, &error);
	KM_ASSERT(is);
	rc = compare_field(was, is, "device", path, err);
	if (rc == 0)
		rc = compare_field(was, is, "shape", path, err);
	for (int i = 0; i < r->count && rc == 0; i++) {
		km_router_bench_row *row = &r->rows[i];

		row->baseline_us = baseline_of(json_object_get(was, "rows"), row);
		matched += row->baseline_us > 0;
		if (row->baseline_us <= 0)
			km_buf_printf(missing, "%s at %d tokens: the baseline does not have it\n", row->form,
			              row->tokens);
	}
	if (rc == 0 && !matched)
		rc = km_fail(err, KM_EINVAL, "--baseline %s has none of this run's tokens and forms", path);
	json_decref(was);
	json_decref(is);
	km_buf_release(&now);
	return rc;
}

int km_router_report_regressions(const km_router_bench_report *r, double allowed, km_buf *out)
{
	int count = 0;

	for (int i = 0; i < r->count; i++) {
		const km_router_bench_row *row = &r->rows[i];

		if (row->baseline_us <= 0 || row->us_median <= row->baseline_us * (1 + allowed))
			continue;
		km_buf_printf(out, "%s at %d tokens: %.2f us, the baseline has %.2f (%.1f%% slower)\n", row->form,
		              row->tokens, row->us_median, row->baseline_us,
		              100 * (row->us_median / row->baseline_us - 1));
		count++;
	}
	return count;
}
