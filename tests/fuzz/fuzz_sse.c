/*
 * Streams of any bytes through the repair: what comes out is a well-formed stream of JSON objects,
 * and the same however the input was cut.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "wire/sse_repair.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(cond) ((cond) ? (void)0 : abort())

static void repair(const char *s, size_t n, size_t step, km_buf *out)
{
	km_parser_options options = { .tools = true, .reasoning = true };
	km_sse_repair *r = calloc(1, sizeof(*r));
	km_err err;

	km_sse_repair_init(r, &options, 4096);
	for (size_t at = 0; at < n; at += step) {
		if (km_sse_repair_push(r, s + at, n - at < step ? n - at : step, out, &err) < 0)
			break;
	}
	km_sse_repair_end(r, out, &err);
	km_sse_repair_release(r);
	free(r);
}

static int check_event(void *ctx, enum km_sse_kind kind, const char *text, size_t len, km_err *err)
{
	km_json_odd odd = { 0 };
	json_error_t error;
	json_t *value;

	(void)ctx;
	(void)err;
	if (kind == KM_SSE_COMMENT || (len == 6 && !memcmp(text, "[DONE]", 6)))
		return 0;
	value = km_json_load(text, len, &error, &odd);
	CHECK(json_is_object(value) && !odd.bad_count && !odd.nan_count);
	km_buf_release(&odd.wide);
	json_decref(value);
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	km_buf whole = KM_BUF_INIT, bytewise = KM_BUF_INIT;
	km_sse_reader reader;
	km_err err;

	repair((const char *)data, size, size ? size : 1, &whole);
	repair((const char *)data, size, 1, &bytewise);
	CHECK(whole.len == bytewise.len);
	CHECK(!whole.len || !memcmp(whole.data, bytewise.data, whole.len));
	km_sse_reader_init(&reader, 0, check_event, NULL);
	CHECK(km_sse_reader_push(&reader, whole.data, whole.len, &err) == 0);
	CHECK(!km_sse_reader_cut(&reader));
	km_sse_reader_release(&reader);
	km_buf_release(&whole);
	km_buf_release(&bytewise);
	return 0;
}
