/*
 * The OpenAI API over HTTP: routes, authorisation, and jobs as replies.
 *
 * The service and its engine are kept and outlive the server. Closing order: km_serve_close, then
 * km_service_release, then the engine.
 */
#ifndef KM_WIRE_SERVE_H
#define KM_WIRE_SERVE_H

#include "wire/http.h"
#include "wire/job.h"

typedef struct km_serve_options {
	const char *host;
	int port;                /* 0: any free one */
	const char *api_key;     /* NULL: none is asked for */
	int64_t max_body_bytes;
	int max_connections;
	double request_timeout_s, stream_timeout_s, keepalive_s;
	bool log_requests;
} km_serve_options;

typedef struct km_serve km_serve;

int km_serve_open(km_serve **serve, km_service *service, const km_serve_options *options,
                  km_err *err);
int km_serve_port(const km_serve *serve);
void km_serve_drain(km_serve *serve); /* new requests get 503 or no connection */
bool km_serve_wait_idle(km_serve *serve, double seconds); /* true: all requests are answered */

typedef struct km_serve_until {
	int (*stop)(void *ctx); /* asked some 20 times a second; 0: go on; 1: drain; 2: at once */
	void *ctx;
	double drain_s;         /* for running requests to finish in */
} km_serve_until;

/* Serves until told to stop, then drains. KM_EDEVICE when the engine has failed for good: its
 * requests have been told so, and further ones are until the server drains. */
int km_serve_run(km_serve *serve, const km_serve_until *until, km_err *err);

void km_serve_close(km_serve *serve);                     /* cuts off what still runs */

#endif
