/*
 * Counters and histograms, and their Prometheus text (format 0.0.4).
 *
 * Names are vLLM's with the prefix `kimi:`, so that its dashboards work after one replacement. All
 * updates are atomic additions: any thread, no lock.
 */
#ifndef KM_WIRE_METRICS_H
#define KM_WIRE_METRICS_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/buf.h"
#include "engine/engine.h"

enum { KM_MAX_BUCKETS = 24, KM_MAX_STATUSES = 16 };

typedef struct km_histogram {
	const double *bounds; /* static, ascending; the last bucket, +Inf, is implied */
	int count;
	_Atomic int64_t bucket[KM_MAX_BUCKETS + 1]; /* not cumulative */
	_Atomic int64_t sum_us;
} km_histogram;

typedef struct km_metrics {
	km_histogram time_to_first_token, inter_token_latency, e2e_request_latency,
		request_queue_time;
	_Atomic int64_t
		success[KM_FINISH_ERROR + 2]; /* choices by km_finish; the last: tool_calls */
	_Atomic int64_t disconnected; /* clients gone before their answer was whole */
	_Atomic int64_t responses[KM_MAX_STATUSES];   /* HTTP replies by status, see metrics.c */
} km_metrics;

void km_metrics_init(km_metrics *metrics);
void km_histogram_add(km_histogram *histogram, double seconds);
void km_metrics_count_finish(km_metrics *metrics, enum km_finish finish, bool tool_calls);
void km_metrics_count_response(km_metrics *metrics, int status);

void km_metrics_write(const km_metrics *metrics, const km_engine_stats *stats, const char *model,
                      km_buf *out);

#endif
