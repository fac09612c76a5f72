#include "model/router_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rng.h"
#include "device/op.h"
#include "model/router_check.h"

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

void km_router_bench_quantiles(double *us, int count, double *median, double *p95)
{
	KM_ASSERT(count > 0);
	qsort(us, (size_t)count, sizeof(*us), by_value);
	*median = us[count / 2];
	*p95 = us[(count - 1) * 95 / 100];
}

/* What form f costs at a point: its time over the best. */
static double cost_at(const double *us, int forms, int f)
{
	double best = us[0];

	for (int i = 1; i < forms; i++)
		best = us[i] < best ? us[i] : best;
	return us[f] / best;
}

void km_router_bench_limits(const double *us, const int *tokens, int points, int forms, int *limit)
{
	double least[KM_BENCH_FORMS]; /* of the points so far, the last of which form f takes */
	int ends[KM_BENCH_FORMS][KM_BENCH_FORMS] = { 0 }; /* the limits of each such way */

	KM_ASSERT(forms >= 1 && forms <= KM_BENCH_FORMS);
	for (int f = 0; f < forms; f++)
		least[f] = 0;
	for (int i = 0; i < points; i++)
		for (int f = forms - 1; f >= 0; f--) {
			int from = f;

			for (int g = f - 1; g >= 0; g--)
				if (least[g] < least[from])
					from = g;
			memmove(ends[f], ends[from], sizeof(ends[f]));
			least[f] = least[from] + cost_at(us + i * forms, forms, f);
			for (int g = f; g < forms; g++)
				ends[f][g] = tokens[i];
		}
	for (int f = 0, best = 0; f < forms; f++) {
		best = least[f] < least[best] ? f : best;
		if (f == forms - 1)
			memcpy(limit, ends[best], (size_t)forms * sizeof(*limit));
	}
}

int km_router_bench_forms(const km_router_shape *s, bool gpu, const char **forms)
{
	bool fused = (s->experts == 256 || s->experts == 384) && s->top_k <= 8 && s->groups <= 1;
	int n = 0;

	forms[n++] = "gate";
	if (gpu) {
		forms[n++] = "align";
		if (fused && s->tokens <= 64)
			forms[n++] = "gate+align";
	}
	forms[n++] = "router";
	if (gpu && fused && s->tokens <= 64 && s->hidden == 7168 && !s->weights_f32)
		forms[n++] = "one-launch";
	forms[n++] = "chain";
	return n;
}

double km_router_bench_bytes(const km_router_shape *s, const char *form)
{
	double tokens = s->tokens, places = tokens * s->top_k;
	double weights = (double)s->experts * s->hidden * (s->weights_f32 ? 4 : 2);
	double x = tokens * s->hidden * 2, logits = tokens * s->experts * 4, selected = places * 8;

	if (!strcmp(form, "router"))
		return weights + x + logits;
	if (!strcmp(form, "gate"))
		return logits + s->experts * 4.0 + selected;
	if (!strcmp(form, "align"))
		return places * 8;
	if (!strcmp(form, "gate+align"))
		return logits + s->experts * 4.0 + selected + places * 4;
	return weights + x + selected + places * 4; /* the chain: logits need not reach memory */
}

double km_router_bench_flops(const km_router_shape *s, const char *form)
{
	bool product = !strcmp(form, "router") || !strcmp(form, "one-launch") || !strcmp(form, "chain");

	return product ? 2.0 * s->tokens * s->experts * s->hidden : 0;
}

/* The CPU's forms: ops of the best instruction set, f32 activations. */
typedef struct cpu_bench {
	const km_ops *ops;
	km_router_shape shape;
	float *x, *logits, *bias, *weights; /* x, logits: [pool rows of tokens] */
	uint16_t *w;
	int32_t *ids;
	int w_copies;
} cpu_bench;

static void cpu_linear(const cpu_bench *b, int call)
{
	size_t size = (size_t)b->shape.experts * (size_t)b->shape.hidden;
	km_weight w = { .type = KM_W_BF16, .rows = b->shape.experts, .cols = b->shape.hidden,
		        .data = b->w + size * (size_t)(call % b->w_copies) };
	km_linear_args a = { .tokens = b->shape.tokens, .x = b->x, .x_stride = b->shape.hidden, .w = &w,
		             .y = b->logits, .y_stride = b->shape.experts };

	b->ops->linear(&a);
}

static void cpu_gate(const cpu_bench *b)
{
	const km_router_shape *s = &b->shape;
	km_gate_args a = { .tokens = s->tokens, .experts = s->experts, .top_k = s->top_k,
		           .groups = s->groups, .topk_group = s->topk_group, .softmax = s->softmax,
		           .renormalize = s->renormalize, .logits = b->logits, .bias = b->bias,
		           .ids = b->ids, .weights = b->weights };

	b->ops->gate(&a);
}

static void cpu_call(const cpu_bench *b, const char *form, int call)
{
	if (strcmp(form, "gate"))
		cpu_linear(b, call);
	if (strcmp(form, "router"))
		cpu_gate(b);
}

static int cpu_check(cpu_bench *b, km_err *err)
{
	km_router_shape s = b->shape;
	km_router_check check = { 0 };
	uint16_t *x;
	int rc;

	s.tokens = s.tokens < 64 ? s.tokens : 64;
	s.scale = 1;
	x = km_xmalloc((size_t)s.tokens * (size_t)s.hidden * 2);
	for (size_t i = 0; i < (size_t)s.tokens * (size_t)s.hidden; i++)
		x[i] = km_f32_to_bf16(b->x[i]);
	cpu_linear(b, 0);
	cpu_gate(b);
	rc = km_router_check_logits(&check, &s, x, b->w, b->logits, 0, s.tokens > 4 ? s.tokens / 4 : 1, err);
	free(x);
	KM_TRY(rc);
	return km_router_check_gate(&check, &s, b->logits, b->bias, NULL, s.tokens, b->ids, b->weights, err);
}

static void cpu_time(const cpu_bench *b, km_router_bench_row *row)
{
	enum { MOST = 200, LEAST = 5 };
	double us[MOST], until = km_now_s() + 0.25;
	int n = 0;

	cpu_call(b, row->form, 0);
	while (n < MOST && (n < LEAST || km_now_s() < until)) {
		int64_t start = km_now_ns();

		cpu_call(b, row->form, n + 1);
		us[n++] = (double)(km_now_ns() - start) * 1e-3;
	}
	km_router_bench_quantiles(us, n, &row->us_median, &row->us_p95);
}

static void cpu_fill(cpu_bench *b, int tokens)
{
	const km_router_shape *s = &b->shape;
	size_t weights = (size_t)s->experts * (size_t)s->hidden, n = (size_t)tokens * (size_t)s->hidden;

	b->w_copies = (int)((size_t)(64 << 20) / (weights * 2)) + 1;
	b->w = km_xmalloc(weights * 2 * (size_t)b->w_copies);
	b->x = km_xmalloc(n * sizeof(float));
	b->bias = km_xmalloc((size_t)s->experts * sizeof(float));
	b->logits = km_xmalloc((size_t)tokens * (size_t)s->experts * sizeof(float));
	b->ids = km_xmalloc((size_t)tokens * (size_t)s->top_k * sizeof(int32_t));
	b->weights = km_xmalloc((size_t)tokens * (size_t)s->top_k * sizeof(float));
	for (size_t i = 0; i < weights; i++)
		b->w[i] = km_f32_to_bf16(km_rng_normal(1, i) * 0.03f);
	for (int c = 1; c < b->w_copies; c++)
		memcpy(b->w + weights * (size_t)c, b->w, weights * 2);
	for (size_t i = 0; i < n; i++)
		b->x[i] = km_bf16_to_f32(km_f32_to_bf16(km_rng_normal(2, i)));
	for (int e = 0; e < s->experts; e++)
		b->bias[e] = km_rng_normal(3, (uint64_t)e) * 0.5f;
}

int km_router_bench_time_cpu(km_router_bench_report *report, const km_router_bench_options *o,
                             km_progress *progress, km_err *err)
{
	cpu_bench b = { .ops = km_cpu_ops(NULL), .shape = o->shape };
	int most = 0, rc = 0;

	if (o->shape.weights_f32)
		return km_fail(err, KM_EUNSUPPORTED, "the CPU's router is timed with bf16 weights alone");
	for (int i = 0; i < o->token_count; i++)
		most = o->tokens[i] > most ? o->tokens[i] : most;
	cpu_fill(&b, most);
	for (int i = 0; i < report->count && rc == 0; i++) {
		km_router_bench_row *row = &report->rows[i];

		if (b.shape.tokens != row->tokens || i == 0) {
			b.shape.tokens = row->tokens;
			rc = cpu_check(&b, err);
		}
		if (rc == 0)
			cpu_time(&b, row);
		km_progress_add(progress, 1);
	}
	free(b.w);
	free(b.x);
	free(b.bias);
	free(b.logits);
	free(b.ids);
	free(b.weights);
	return rc;
}

static void plan_rows(km_router_bench_report *r, const km_router_bench_options *o)
{
	const char *forms[KM_BENCH_FORMS];
	km_router_shape s = o->shape;

	r->rows = km_xcalloc((size_t)o->token_count * KM_BENCH_FORMS, sizeof(*r->rows));
	for (int i = 0; i < o->token_count; i++) {
		int n;

		s.tokens = o->tokens[i];
		n = km_router_bench_forms(&s, r->gpu, forms);
		for (int f = 0; f < n; f++)
			r->rows[r->count++] = (km_router_bench_row){ .tokens = s.tokens, .form = forms[f] };
	}
}

static int describe_device(km_router_bench_report *r, km_err *err)
{
	km_cuda_info info;

	if (!r->gpu) {
		r->roofline.source = "a CPU's is not measured here";
		snprintf(r->device, sizeof(r->device), "CPU (%s)", km_cpu_ops(NULL)->name);
		snprintf(r->toolkit, sizeof(r->toolkit), "gcc " __VERSION__);
		return 0;
	}
	KM_TRY(km_cuda_describe(0, &info, err));
	memcpy(r->device, info.name, sizeof(r->device));
	memcpy(r->toolkit, info.toolkit, sizeof(r->toolkit));
	km_roofline_of_gpu(&info, &r->roofline);
	return 0;
}

int km_router_bench_open(km_router_bench_report *r, const km_router_bench_options *o, km_err *err)
{
	*r = (km_router_bench_report){ .gpu = km_cuda_count(NULL) > 0, .shape = o->shape };
	r->overlap = r->gpu && o->overlap;
	KM_TRY(describe_device(r, err));
	plan_rows(r, o);
	return 0;
}

int km_router_bench_run(km_router_bench_report *r, const km_router_bench_options *o, km_err *err)
{
	km_progress progress;
	int rc;

	km_progress_init(&progress, "timing", "forms", r->count, o->quiet);
#if KM_CUDA
	rc = r->gpu ? km_router_bench_time_gpu(r, o, &progress, err)
	            : km_router_bench_time_cpu(r, o, &progress, err);
#else
	rc = km_router_bench_time_cpu(r, o, &progress, err);
#endif
	km_progress_finish(&progress);
	for (int i = 0; i < r->count && rc == 0; i++) {
		km_router_bench_row *row = &r->rows[i];
		km_router_shape s = o->shape;
		double bytes;

		s.tokens = row->tokens;
		bytes = km_router_bench_bytes(&s, row->form);
		row->gbps = bytes / row->us_median * 1e-3;
		row->roofline = km_roofline_us(&r->roofline, bytes, km_router_bench_flops(&s, row->form)) /
		                row->us_median;
	}
	if (rc < 0)
		km_router_bench_release(r);
	return rc;
}

void km_router_bench_release(km_router_bench_report *r)
{
	free(r->rows);
	r->rows = NULL;
	r->count = 0;
}

#if !KM_CUDA
int km_router_bench_tune(const km_router_bench_options *o, km_buf *out, km_err *err)
{
	(void)o, (void)out;
	return km_fail(err, KM_EUNSUPPORTED, "tuning needs a GPU, and this build has no CUDA");
}
#endif
