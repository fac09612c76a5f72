/*
 * OpenAI batch lines through the engine, without a socket.
 *
 * In, one JSON object on a line: {"custom_id","method":"POST","url":"/v1/chat/completions" or
 * "/v1/completions","body":{...}}. Out, one line for each as it finishes (not in input order;
 * custom_id says which): {"id","custom_id","response":{"status_code","request_id","body"},"error"}.
 * A line that is no request has "response":null and an "error"; a request that the API would refuse
 * has the refusal as its response. Either counts as failed, and the rest goes on.
 *
 * Requests run through the same jobs as over HTTP. When the engine fails for good, what ran is
 * answered with the failure and nothing more is read. One thread reads and writes; the caller's
 * `stop` ends the work early: what runs is cancelled, what is done has been written.
 */
#ifndef KM_WIRE_BATCH_LINES_H
#define KM_WIRE_BATCH_LINES_H

#include <stdio.h>

#include "wire/job.h"

typedef struct km_batch_options {
	int in;                /* a file descriptor; may be a slow pipe */
	FILE *out;
	int concurrency;       /* requests in the engine at a time */
	size_t max_line_bytes;
	bool quiet;            /* no progress on stderr */
	bool (*stop)(void *ctx);
	void *ctx;
} km_batch_options;

typedef struct km_batch_result {
	int64_t done, failed; /* lines answered; of these, with an error */
	bool stopped;
} km_batch_result;

/* KM_EIO when the output cannot be written, KM_EDEVICE when the engine has failed. */
int km_batch_run(km_service *service, const km_batch_options *options, km_batch_result *result,
                 km_err *err);

#endif
