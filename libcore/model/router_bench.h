/*
 * The router's speed: each form by itself and the chain, at each token count, on GPU 0 or, where there
 * is no GPU, the CPU's forms.
 *
 * Every result is checked (model/router_check.h) before it is timed; a wrong one is an error. Inputs
 * rotate over buffers of more than twice the L2 in all, so that they come from memory as far as they
 * would in use. A GPU form is timed twice: as a CUDA graph of many calls, replayed, and as plain
 * launches, back to back, on the host's clock. Times are per call, of the median (and 95th percentile)
 * repetition.
 */
#ifndef KM_MODEL_ROUTER_BENCH_H
#define KM_MODEL_ROUTER_BENCH_H

#include "base/buf.h"
#include "base/progress.h"
#include "device/cuda_router.h"
#include "device/roofline.h"

typedef struct km_router_bench_options {
	km_router_shape shape; /* tokens is not read */
	const int *tokens;     /* [token_count], borrowed */
	int token_count;
	bool overlap;          /* launches may overlap their predecessors */
	bool quiet;
} km_router_bench_options;

typedef struct km_router_bench_row {
	int tokens;
	const char *form;      /* "router", "gate", "align", "gate+align", "one-launch", "chain" */
	double us_median, us_p95;
	double launch_us_median; /* plain launches; 0 on the CPU */
	double gbps;             /* bytes that must move, over us_median */
	double roofline;         /* least time at the device's rates, over us_median; 0: not known */
	double baseline_us;      /* 0: none */
} km_router_bench_row;

typedef struct km_router_bench_report {
	char device[256], toolkit[64];
	bool gpu;
	km_roofline roofline; /* of the GPU; of a CPU not known */
	km_router_shape shape;
	bool overlap;
	km_router_bench_row *rows; /* owned */
	int count;
} km_router_bench_report;

/* The device, the shape and the rows, without times; then the times. After a failure of either there is nothing to
 * release. */
int km_router_bench_open(km_router_bench_report *report, const km_router_bench_options *options, km_err *err);
int km_router_bench_run(km_router_bench_report *report, const km_router_bench_options *options,
                        km_err *err);
void km_router_bench_release(km_router_bench_report *report);

/* Measures the token counts at which forms overtake each other; appends rows of router_tuning.inc. */
int km_router_bench_tune(const km_router_bench_options *options, km_buf *out, km_err *err);

/*
 * Where forms overtake each other: us[point * forms + form] are their times at rising token counts, INFINITY
 * where a form cannot run; limit[form] becomes the last token count at which that form or an earlier one is
 * taken (0: none). Of all such limits those whose times, each over its point's best, add up to the
 * least, so that one noisy point moves no limit far. Up to KM_BENCH_FORMS forms.
 */
void km_router_bench_limits(const double *us, const int *tokens, int points, int forms, int *limit);

/* Forms that a shape has at a token count, on the GPU or on the CPU. */
int km_router_bench_forms(const km_router_shape *shape, bool gpu, const char **forms);

/* Bytes that a form must move at least, and the multiply-adds, times two, of its matrix product. */
double km_router_bench_bytes(const km_router_shape *shape, const char *form);
double km_router_bench_flops(const km_router_shape *shape, const char *form);

/* The two halves. */
int km_router_bench_time_gpu(km_router_bench_report *report, const km_router_bench_options *options,
                             km_progress *progress, km_err *err);
int km_router_bench_time_cpu(km_router_bench_report *report, const km_router_bench_options *options,
                             km_progress *progress, km_err *err);

/* The median and the 95th percentile of `count` values, which are sorted. */
void km_router_bench_quantiles(double *us, int count, double *median, double *p95);

/* Rows of random inputs that repeat: token t has row t % KM_BENCH_POOL. */
enum { KM_BENCH_POOL = 1021, KM_BENCH_FORMS = 8 };

#endif
