/* format/: safetensors headers, shards and their index, the scanner and the name map under them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/outfile.h"
#include "format/json.h"
#include "format/name_map.h"
#include "format/scan.h"
#include "format/shards.h"
#include "support/fake_checkpoint.h"

/* A file with this header (its length put in front) and `data` bytes of zeros. */
static int parse(km_safetensors *file, char **bytes, const char *header, size_t data, km_err *err)
{
	size_t len = strlen(header);

	*bytes = km_xcalloc(8 + len + data, 1);
	for (int i = 0; i < 8; i++)
		(*bytes)[i] = (char)((uint64_t)len >> 8 * i & 0xff);
	memcpy(*bytes + 8, header, len);
	return km_safetensors_parse(file, *bytes, 8 + len + data, "x.safetensors", err);
}

static void a_header_is_read(void **state)
{
	km_safetensors f;
	km_err err;
	char *bytes;

	(void)state;
	assert_int_equal(
		parse(&f, &bytes,
	              "{\"b\\u00e9\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[12,16]},"
	              "\"__metadata__\":{\"format\":\"pt\"},"
	              "\"empty\":{\"shape\":[0,4],\"dtype\":\"I64\",\"data_offsets\":[12,12]},"
	              "\"a\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[0,12]}}   ",
	              16, &err),
		0);
	assert_int_equal(f.count, 3);
	assert_string_equal(f.tensors[0].name, "a");
	assert_int_equal(f.tensors[0].ndim, 2);
	assert_int_equal(f.tensors[0].shape[1], 3);
	assert_int_equal(f.tensors[0].dtype, KM_BF16);
	assert_ptr_equal(f.tensors[0].data, bytes + f.data_at);
	assert_string_equal(f.tensors[1].name, "empty");
	assert_string_equal(f.tensors[2].name, "b\u00e9");
	assert_int_equal(f.tensors[2].bytes, 4);
	km_safetensors_close(&f);
	free(bytes);
	assert_int_equal(parse(&f, &bytes, "{}", 0, &err), 0);
	km_safetensors_close(&f);
	free(bytes);
}

#define T(name, dtype, shape, offsets)                                                             \
	"\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void wrong_headers_are_one_sentence(void **state)
{
	static const struct {
		const char *header;
		size_t data;
		const char *says;
	} cases[] = {
		{ "", 0, "is not valid JSON at byte 0" },
		{ "[]", 0, "'{' is expected" },
		{ "{} x", 0, "there is more after the end" },
		{ "{" T("a", "F32", "[1]", "[0,4]") ",}", 4, "'\"' is expected" },
		{ "{" T("a", "F32", "[1]", "[0,4]"), 4, "is expected" },
		{ "{" T("a", "F4", "[1]", "[0,4]") "}", 4, "tensor a: dtype \"F4\" is not known" },
		{ "{" T("a", "F32", "[-1]", "[0,4]") "}", 4, "a whole number is expected" },
		{ "{" T("a", "F32", "[1.0]", "[0,4]") "}", 4, "a whole number is expected" },
		{ "{" T("a", "F32", "[01]", "[0,4]") "}", 4, "a whole number is expected" },
		{ "{" T("a", "F32", "[2]", "[0,4]") "}", 4,
		  "tensor a: F32 [2] needs 8 bytes, its data_offsets span 4" },
		{ "{" T("a", "F32", "[4294967296,4294967296,4]", "[0,0]") "}", 0,
		  "tensor a: its shape is too large" },
		{ "{" T("a", "F32", "[18446744073709551615]", "[0,4]") "}", 0,
		  "tensor a: its shape is too large" },
		{ "{" T("a", "F32", "[18446744073709551616]", "[0,4]") "}", 0,
		  "does not fit in 64 bits" },
		{ "{" T("a", "F32", "[1,1,1,1,1,1,1]", "[0,4]") "}", 4, "more than 6 dimensions" },
		{ "{" T("a", "F32", "[1]", "[4,0]") "}", 4, "its data ends before it begins" },
		{ "{" T("a", "F32", "[1]", "[0,4]") "," T("b", "F32", "[2]", "[2,10]") "}", 10,
		  "tensors a and b overlap" },
		{ "{" T("a", "F32", "[1]", "[0,4]") "," T("b", "F32", "[1]", "[6,10]") "}", 10,
		  "a hole of 2 bytes before tensor b" },
		{ "{" T("a", "F32", "[1]", "[0,4]") "}", 3,
		  "is truncated: tensor a ends at byte 4 of the data, the file has 3" },
		{ "{" T("a", "F32", "[1]", "[0,4]") "}", 5,
		  "has 1 bytes after its last tensor's end" },
		{ "{" T("a", "U8", "[1]", "[0,1]") "," T("a", "U8", "[1]", "[1,2]") "}", 2,
		  "tensor a is there twice" },
		{ "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1,
		  "dtype, shape or data_offsets is missing" },
		{ "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\"}}", 1,
		  "field \"dtype\" is there twice" },
		{ "{\"a\":{\"strides\":[1]}}", 1, "field \"strides\" is unknown" },
		{ "{\"__metadata__\":{\"a\":1}}", 0, "'\"' is expected" },
		{ "{\"\\ud800\":1}", 0, "half of a surrogate pair" },
		{ "{\"\\u0000\":1}", 0, "a NUL character" },
		{ "{\"\n\":1}", 0, "a control character" },
		{ "{\"\xff\":1}", 0, "not UTF-8" },
		{ "{\"a", 0, "a string does not end" },
		{ "{\"a\\", 0, "a string does not end" },
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		km_err err = { 0 };
		km_safetensors f;
		char *bytes;
		int rc = parse(&f, &bytes, cases[i].header, cases[i].data, &err);

		if (rc >= 0 || !strstr(err.msg, cases[i].says) ||
		    strncmp(err.msg, "x.safetensors: ", 15))
			fail_msg("%s: code %d, '%s', not '%s'", cases[i].header, rc, err.msg,
			         cases[i].says);
		km_safetensors_close(&f);
		free(bytes);
	}
}

static void lengths_are_checked_before_they_are_used(void **state)
{
	static const struct {
		unsigned char bytes[16];
		size_t size;
		const char *says;
	} cases[] = {
		{ { 0 }, 0, "a safetensors file has at least 8 bytes, this 0" },
		{ { 2, 0, 0, 0, 0, 0, 0 }, 7, "at least 8 bytes, this 7" },
		{ { 2, 0, 0, 0, 0, 0, 0, 0, '{' }, 9, "its header has 2 bytes, the file has 1" },
		{ { 255, 255, 255, 255, 255, 255, 255, 255, '{', '}' },
		  10,
		  "is not a safetensors file" },
		{ { 'P', 'K', 3, 4, 0, 0, 8, 8, '{', '}' }, 10, "is not a safetensors file" },
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		km_safetensors f;
		km_err err;

		assert_int_equal(km_safetensors_parse(&f, cases[i].bytes, cases[i].size, "x", &err),
		                 KM_EFORMAT);
		if (!strstr(err.msg, cases[i].says))
			fail_msg("'%s', not '%s'", err.msg, cases[i].says);
		km_safetensors_close(&f);
	}
}

static void what_is_written_is_read_back(void **state)
{
	static const char name[] = "quote \" back \\ tab \t \u4e16";
	km_tensor t[2] = {
		{ .name = name, .dtype = KM_F16, .ndim = 2, .shape = { 3, 5 }, .bytes = 30 },
		{ .name = "scalar", .dtype = KM_BOOL, .offset = 30, .bytes = 1 }
	};
	km_buf out = KM_BUF_INIT;
	km_safetensors f;
	km_err err;

	(void)state;
	km_safetensors_put_header(&out, t, 2);
	assert_int_equal(out.len % 8, 0);
	km_buf_append(&out, "0123456789012345678901234567890", 31);
	assert_int_equal(km_safetensors_parse(&f, out.data, out.len, "x", &err), 0);
	assert_int_equal(f.count, 2);
	assert_string_equal(f.tensors[0].name, name);
	assert_int_equal(f.tensors[0].shape[1], 5);
	assert_int_equal(f.tensors[1].dtype, KM_BOOL);
	km_safetensors_close(&f);
	km_buf_release(&out);
}

static void the_name_map_grows(void **state)
{
	enum { N = 5000 };
	km_name_map map;
	char *names = km_xmalloc(N * 24);

	(void)state;
	km_name_map_init(&map, 0);
	for (int i = 0; i < N; i++) {
		snprintf(names + i * 24, 24, "name-%d", i);
		assert_int_equal(km_name_map_add(&map, names + i * 24, strlen(names + i * 24), i),
		                 -1);
	}
	for (int i = 0; i < N; i++)
		assert_int_equal(km_name_map_find(&map, names + i * 24, strlen(names + i * 24)), i);
	assert_int_equal(km_name_map_add(&map, "name-77", 7, 1), 77);
	assert_int_equal(km_name_map_find(&map, "name-5000", 9), -1);
	km_name_map_release(&map);
	free(names);
}

/* ---- shards --------------------------------------------------------------------------------- */

static fake_checkpoint three_tensors(void)
{
	fake_checkpoint f = { NULL, 0 };

	fake_add(&f, "a", KM_U8, 1, (int64_t[]){ 3 });
	fake_add(&f, "b", KM_BF16, 2, (int64_t[]){ 2, 2 });
	fake_add(&f, "c", KM_F32, 1, (int64_t[]){ 1 });
	return f;
}

static void expect_findings(const char *dir, int code, const char *const *says, int count)
{
	km_findings findings;
	km_shards shards;
	km_err err = { 0 };
	int rc;

	km_findings_init(&findings, 10);
	rc = km_shards_open(&shards, dir, &findings, &err);
	if (rc != code)
		fail_msg("code %d, '%s'", rc, err.msg);
	if (code < 0) {
		if (!strstr(err.msg, says[0]))
			fail_msg("'%s', not '%s'", err.msg, says[0]);
	} else {
		for (int i = 0; i < count; i++)
			if (i >= findings.kept || !strstr(findings.items[i].sentence, says[i]))
				fail_msg("finding %d is '%s', not '%s'", i,
				         i < findings.kept ? findings.items[i].sentence : "",
				         says[i]);
		assert_int_equal(findings.count, count);
	}
	km_findings_release(&findings);
	km_shards_close(&shards);
}

static void shards_agree_with_their_index(void **state)
{
	static const char index[] = "model.safetensors.index.json";
	fake_checkpoint fake = three_tensors();
	char *dir = temp_dir();

	(void)state;
	expect_findings(dir, KM_ENOTFOUND,
	                (const char *[]){
				"has neither model.safetensors.index.json nor model.safetensors" },
	                1);
	fake_write(&fake, dir, 3);
	expect_findings(dir, 0, NULL, 0);
	write_text(dir, index,
	           "{\"weight_map\":{\"a\":\"model-00001-of-00003.safetensors\","
	           "\"b\":\"model-00003-of-00003.safetensors\",\"d\":\"model-00003-of-00003."
	           "safetensors\"}}");
	expect_findings(
		dir, 0,
		(const char *[]){
			"lists tensor b in model-00003-of-00003.safetensors, which does not",
			"lists tensor d in model-00003-of-00003.safetensors, which does not",
			"00003.safetensors: tensor c is not listed in model.safetensors.index" },
		3);
	write_text(dir, index,
	           "{\"metadata\":{\"total_size\":15,\"x\":[{\"y\":null}]},\"weight_map\":{"
	           "\"b\":\"model-00002-of-00003.safetensors\",\"a\":\"model-00002-of-00003."
	           "safetensors\","
	           "\"c\":\"model-00003-of-00003.safetensors\",\"a\":\"model-00001-of-00003."
	           "safetensors\"}}");
	expect_findings(dir, 0,
	                (const char *[]){
				"lists tensor a in model-00002-of-00003.safetensors, but it is in",
				"lists tensor a twice" },
	                2);
	write_text(dir, index, "{\"weight_map\":{\"a\":\"model-9.safetensors\"}}");
	expect_findings(dir, 0, (const char *[]){ "model-9.safetensors: cannot be opened" }, 1);
	write_text(dir, index, "{\"weight_map\":{\"a\":\"../x.safetensors\"}}");
	expect_findings(dir, KM_EFORMAT,
	                (const char *[]){ "'../x.safetensors' is not a file name" }, 1);
	write_text(dir, index, "{\"weight_map\":{}}");
	expect_findings(dir, KM_EFORMAT, (const char *[]){ "weight_map is empty" }, 1);
	write_text(dir, index, "{\"metadata\":{\"total_size\":1}}");
	expect_findings(dir, KM_EFORMAT, (const char *[]){ "weight_map is missing" }, 1);
	fake_release(&fake);
	remove_dir(dir);
}

/* The index's size is a note: what it says otherwise is not a reason to read no weights. */
static void an_odd_total_size_is_none(void **state)
{
	static const struct {
		const char *metadata;
		int64_t total;
	} cases[] = {
		{ "{\"total_size\": 12}", 12 },     { "{\"total_size\": 12.0}", -1 },
		{ "{\"total_size\":\"12\"}", -1 },  { "{\"total_size\":-12}", -1 },
		{ "{\"total_size\":null}", -1 },    { "{\"total_size\":{\"a\":[1]}}", -1 },
		{ "{\"total_size\":1e3}", -1 },     { "{\"total_size\":9223372036854775808}", -1 },
		{ "{\"total_size\":99999999999999999999}", -1 },
		{ "null", -1 },                     { "[12]", -1 },
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		char *text = km_xasprintf("{\"metadata\":%s,\"weight_map\":{\"a\":\"f\"}}",
		                          cases[i].metadata);
		km_shard_index index;
		km_arena arena;
		km_err err;

		km_arena_init(&arena, 1024);
		if (km_shard_index_parse(&index, text, strlen(text), "index", &arena, &err) < 0)
			fail_msg("%s", err.msg);
		assert_int_equal(index.total_size, cases[i].total);
		assert_int_equal(index.count, 1);
		km_shard_index_release(&index);
		km_arena_release(&arena);
		free(text);
	}
}

/* Opening a FIFO for reading would wait for somebody who writes. */
static void only_regular_files_are_opened(void **state)
{
	char dir[] = "/tmp/km-fifo-XXXXXX", path[64];
	km_safetensors file;
	char *data;
	size_t len;
	km_err err;

	(void)state;
	assert_non_null(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/pipe", dir);
	assert_int_equal(mkfifo(path, 0600), 0);
	alarm(20);
	assert_int_equal(km_safetensors_open(&file, path, &err), KM_EIO);
	assert_non_null(strstr(err.msg, "is not a regular file"));
	km_safetensors_close(&file);
	assert_int_equal(km_read_file(path, 100, &data, &len, &err), KM_EIO);
	alarm(0);
	unlink(path);
	rmdir(dir);
}

int main(void)
{
	const struct CMUnitTest all[] = {
		cmocka_unit_test(a_header_is_read),
		cmocka_unit_test(wrong_headers_are_one_sentence),
		cmocka_unit_test(lengths_are_checked_before_they_are_used),
		cmocka_unit_test(what_is_written_is_read_back),
		cmocka_unit_test(the_name_map_grows),
		cmocka_unit_test(shards_agree_with_their_index),
		cmocka_unit_test(an_odd_total_size_is_none),
		cmocka_unit_test(only_regular_files_are_opened),
	};

	return cmocka_run_group_tests(all, NULL, NULL);
}
