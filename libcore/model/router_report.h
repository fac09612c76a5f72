/* The router benchmark's results as a table, JSON, CSV and a drawing, and compared with earlier JSON. */
#ifndef KM_MODEL_ROUTER_REPORT_H
#define KM_MODEL_ROUTER_REPORT_H

#include "model/router_bench.h"

/* Each appends to `out`. `commit` names the build. */
void km_router_report_table(const km_router_bench_report *report, km_buf *out);
void km_router_report_json(const km_router_bench_report *report, const char *commit, km_buf *out);
void km_router_report_csv(const km_router_bench_report *report, km_buf *out);
void km_router_report_svg(const km_router_bench_report *report, km_buf *out);

/* Fills baseline_us of the rows that the baseline (a file that km_router_report_json's output was saved
 * in) has too, of a report that is opened; the others are named in `missing`, a line each. It must be of the same
 * device and shape: otherwise KM_EINVAL names what differs. */
int km_router_report_compare(km_router_bench_report *report, const char *path, km_buf *missing, km_err *err);

/* Rows slower than their baseline by more than `allowed` (0.03: three percent), a line each. */
int km_router_report_regressions(const km_router_bench_report *report, double allowed, km_buf *out);

#endif
