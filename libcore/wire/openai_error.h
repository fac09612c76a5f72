/*
 * What goes wrong with a request, as OpenAI shapes it:
 * {"error":{"message","type","param","code"}} under an HTTP status.
 */
#ifndef KM_WIRE_OPENAI_ERROR_H
#define KM_WIRE_OPENAI_ERROR_H

#include "base/buf.h"
#include "base/err.h"

typedef struct km_openai_error {
	int status;        /* HTTP: 400, 401, 404, ... */
	const char *code;  /* static: "model_not_found", or NULL */
	const char *allow; /* static: the method that a 405 names in its Allow header, or NULL */
	char param[64];    /* the field, or "" */
	char message[1024];
} km_openai_error;

/* Fills `error` and returns KM_EINVAL. `param` and `code` may be NULL. */
int km_openai_fail(km_openai_error *error, int status, const char *param, const char *code,
                   const char *fmt, ...) __attribute__((format(printf, 5, 6)));

/* From the library's errors: what the caller did wrong is a 400, a limit 429, an end
 * 503, the rest 500. */
int km_openai_fail_err(km_openai_error *error, const char *param, const km_err *err);

void km_openai_error_json(const km_openai_error *error, km_buf *out);

#endif
