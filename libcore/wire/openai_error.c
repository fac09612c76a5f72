#include "wire/openai_error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "wire/json_text.h"

int km_openai_fail(km_openai_error *error, int status, const char *param, const char *code,
                   const char *fmt, ...)
{
	va_list ap;

	error->status = status;
	error->code = code;
	error->allow = NULL;
	snprintf(error->param, sizeof(error->param), "%s", param ? param : "");
	va_start(ap, fmt);
	vsnprintf(error->message, sizeof(error->message), fmt, ap);
	va_end(ap);
	return KM_EINVAL;
}

int km_openai_fail_err(km_openai_error *error, const char *param, const km_err *err)
{
	switch (err->code) {
	case KM_EINVAL:
	case KM_EFORMAT:
	case KM_ENOTFOUND:
		return km_openai_fail(error, 400, param, NULL, "%s", err->msg);
	case KM_EUNSUPPORTED:
		return km_openai_fail(error, 400, param, "unsupported", "%s", err->msg);
	case KM_ELIMIT:
		return km_openai_fail(error, 429, NULL, "queue_full", "%s", err->msg);
	case KM_ECANCELED:
		return km_openai_fail(error, 503, NULL, "shutting_down", "%s", err->msg);
	default:
		return km_openai_fail(error, 500, NULL, NULL, "%s", err->msg);
	}
}

static const char *type_of(int status)
{
	switch (status) {
	case 401: return "authentication_error";
	case 404: return "not_found_error";
	case 409: return "conflict_error";
	case 429: return "rate_limit_error";
	case 503: return "unavailable_error";
	}
	return status >= 500 ? "server_error" : "invalid_request_error";
}

void km_openai_error_json(const km_openai_error *error, km_buf *out)
{
	km_buf_puts(out, "{\"error\":{\"message\":");
	km_json_puts(out, error->message);
	km_buf_printf(out, ",\"type\":\"%s\",\"param\":", type_of(error->status));
	if (error->param[0])
		km_json_puts(out, error->param);
	else
		km_buf_puts(out, "null");
	km_buf_puts(out, ",\"code\":");
	if (error->code)
		km_json_puts(out, error->code);
	else
		km_buf_printf(out, "%d", error->status);
	km_buf_puts(out, "}}");
}
