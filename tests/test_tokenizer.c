/* text/tokenizer: the pattern against PCRE2, merging, special names, hostile files, and, where the
 * real vocabulary is at hand ($TOKENIZER_DIR), tiktoken's own encodings. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <jansson.h>
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/outfile.h"
#include "base/rng.h"
#include "base/utf8.h"
#include "text/bpe.h"
#include "text/pretokenize.h"
#include "text/tokenizer.h"
#include "text/unicode_class.h"

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The pattern */

static const char *const alphabet[] = {
	"a",
	"b",
	"z",
	"A",
	"B",
	"Z",
	"s",
	"S",
	"t",
	"l",
	"L",
	"r",
	"e",
	"E",
	"v",
	"m",
	"d",
	"'",
	"'",
	"'",
	" ",
	" ",
	" ",
	"\n",
	"\r",
	"\t",
	"\v",
	"0",
	"7",
	"9",
	"!",
	"(",
	"_",
	"-",
	".",
	"中",
	"的",
	"〇",
	"⺀",
	"々",
	"〡",
	"é",
	"É",
	"ǅ",
	"ſ",
	"K",
	"ʰ",
	"ˀ",
	"ª",
	"한",
	"カ",
	"अ",
	"ा",
	"\xcc\x81",
	"\xe2\x80\x8d",
	"😀",
	"½",
	"²",
	"Ⅷ",
	"٣",
	"\xc2\xa0",
	"\xe3\x80\x80",
	"\xe2\x80\xa8",
	"\xc2\x85",
	"\x1c",
	"ß",
	"я",
	"Я",
	"\xe3\x80\xaa",
};

static size_t random_text(uint64_t seed, char *out, size_t max)
{
	size_t n = 0, count = 1 + km_rng_u64(seed, 0) % 24;

	for (size_t i = 1; i <= count; i++) {
		/* Runs of one kind bring out the greedy cases. */
		uint64_t r = km_rng_u64(seed, i);
		const char *s = alphabet[r % (sizeof(alphabet) / sizeof(alphabet[0]))];
		size_t times = (r >> 32) % 4 == 0 ? 1 + (r >> 40) % 4 : 1;

		for (; times && n + strlen(s) < max; times--) {
			memcpy(out + n, s, strlen(s));
			n += strlen(s);
		}
	}
	return n;
}

static void matcher_equals_the_pattern(void **state)
{
	int code;
	PCRE2_SIZE at;
	pcre2_code *re = pcre2_compile((PCRE2_SPTR)km_pretokenize_pattern, PCRE2_ZERO_TERMINATED,
	                               PCRE2_UTF | PCRE2_UCP, &code, &at, NULL);
	pcre2_match_data *match;
	uint8_t *classes = km_xmalloc(KM_UC_COUNT);
	char text[512];
	long pieces = 0;

	(void)state;
	assert_non_null(re);
	pcre2_jit_compile(re, PCRE2_JIT_COMPLETE);
	match = pcre2_match_data_create_from_pattern(re, NULL);
	km_unicode_class_fill(classes);
	for (uint64_t seed = 0; seed < 300000; seed++) {
		size_t n = random_text(seed, text, sizeof(text));

		for (size_t i = 0; i < n;) {
			size_t mine = km_pretokenize_next(classes, text + i, n - i);
			const PCRE2_SIZE *where = pcre2_get_ovector_pointer(match);
			int rc = pcre2_match(re, (PCRE2_SPTR)text, n, i, PCRE2_NO_UTF_CHECK, match,
					     NULL);

			if (rc < 1 || where[0] != i || where[1] != i + mine) {
				text[n] = '\0';
				fail_msg("seed %lu \"%s\" at %zu: %zu bytes, the pattern takes %zu",
					 (unsigned long)seed, text, i, mine,
					 rc < 1 ? 0 : where[1] - i);
			}
			i += mine;
			pieces++;
		}
	}
	assert_true(pieces > 1000000);
	pcre2_match_data_free(match);
	pcre2_code_free(re);
	free(classes);
}

/* A small vocabulary: the 256 bytes, then `words` in order of rank. */

static char *scratch_dir(void)
{
	char *dir = km_xstrdup("/tmp/kimi-test-XXXXXX");

	assert_non_null(mkdtemp(dir));
	return dir;
}

static void save(const char *dir, const char *name, const char *data, size_t n)
{
	char *path = km_xasprintf("%s/%s", dir, name);

	assert_int_equal(km_outfile_save(path, data, n, NULL), 0);
	free(path);
}

static void drop_dir(char *dir)
{
	static const char *const names[] = { "tiktoken.model", "tokenizer_config.json" };

	for (size_t i = 0; i < 2; i++) {
		char *path = km_xasprintf("%s/%s", dir, names[i]);

		unlink(path);
		free(path);
	}
	assert_int_equal(rmdir(dir), 0);
	free(dir);
}

static void put_token(km_buf *out, const char *s, size_t n, int rank)
{
	static const char digits[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

	for (size_t i = 0; i < n; i += 3) {
		uint32_t v = (uint32_t)(unsigned char)s[i] << 16;

		v |= i + 1 < n ? (uint32_t)(unsigned char)s[i + 1] << 8 : 0;
		v |= i + 2 < n ? (unsigned char)s[i + 2] : 0;
		km_buf_putc(out, digits[v >> 18]);
		km_buf_putc(out, digits[v >> 12 & 63]);
		km_buf_putc(out, i + 1 < n ? digits[v >> 6 & 63] : '=');
		km_buf_putc(out, i + 2 < n ? digits[v & 63] : '=');
	}
	km_buf_printf(out, " %d\n", rank);
}

static const char small_config[] =
	"{\"num_reserved_special_tokens\": 8, \"added_tokens_decoder\": {"
	"\"%d\": {\"content\": \"<|a|>\", \"special\": true}, \"%d\": {\"content\": \"<|a|>b\"},"
	"\"%d\": {\"content\": \"[X]\", \"special\": true}}}";

/* words: NULL-terminated */
static char *small_dir(const char *const *words, int *count)
{
	km_buf out = KM_BUF_INIT;
	char *dir = scratch_dir(), byte, *config;
	int rank = 0;

	for (; rank < 256; rank++) {
		byte = (char)rank;
		put_token(&out, &byte, 1, rank);
	}
	for (; *words; words++, rank++)
		put_token(&out, *words, strlen(*words), rank);
	save(dir, "tiktoken.model", out.data, out.len);
	km_buf_release(&out);
	config = km_xasprintf(small_config, rank, rank + 1, rank + 4);
	save(dir, "tokenizer_config.json", config, strlen(config));
	free(config);
	*count = rank;
	return dir;
}

static void assert_ids(const km_tokenizer *t, const char *text, bool parse, const char *expected)
{
	km_ids ids = { 0 };
	km_buf got = KM_BUF_INIT;

	assert_int_equal(km_tokenizer_encode(t, text, strlen(text), parse, &ids, NULL), 0);
	km_buf_puts(&got, "");
	for (size_t i = 0; i < ids.len; i++)
		km_buf_printf(&got, i ? " %d" : "%d", ids.data[i]);
	assert_string_equal(got.data, expected);
	km_buf_release(&got);
	km_ids_release(&ids);
}

static void special_names_are_parsed_only_when_asked(void **state)
{
	static const char *const words[] = { "ab", "abc", "bc", NULL };
	km_tokenizer *t;
	km_err err;
	size_t len;
	int n;
	char *dir = small_dir(words, &n);

	(void)state;
	assert_int_equal(km_tokenizer_open(&t, dir, &err), 0);
	assert_int_equal(n, 259);
	assert_int_equal(km_tokenizer_vocab_size(t), 267);
	assert_int_equal(km_tokenizer_base_size(t), 259);
	assert_int_equal(km_tokenizer_special(t, "<|a|>"), 259);
	assert_int_equal(km_tokenizer_special(t, "<|a|>b"), 260);
	assert_int_equal(km_tokenizer_special(t, "<|a|"), -1);
	assert_int_equal(km_tokenizer_special(t, "<|reserved_token_261|>"), 261);
	assert_int_equal(km_tokenizer_special(t, ""), -1);
	assert_true(km_tokenizer_is_special(t, 259));
	assert_false(km_tokenizer_is_special(t, 260));
	assert_false(km_tokenizer_is_special(t, 5));
	assert_false(km_tokenizer_is_special(t, 267));
	assert_ids(t, "abc", false, "257");
	assert_ids(t, "xbc", false, "120 258");
	assert_ids(t, "ababc", false, "256 257");
	assert_ids(t, "x<|a|>abc", true, "120 259 257");
	assert_ids(t, "<|a|>b<|a|><|a|[X]", true, "260 259 60 124 97 124 263");
	assert_ids(t, "<|a|>", false, "60 124 97 124 62");
	assert_ids(t, "", true, "");
	assert_ids(t, "a\xff", false, "97 239 191 189");
	assert_memory_equal(km_tokenizer_bytes(t, 257, &len), "abc", 3);
	assert_int_equal(len, 3);
	assert_memory_equal(km_tokenizer_bytes(t, 263, &len), "[X]", 3);
	assert_null(km_tokenizer_bytes(t, 267, &len));
	assert_null(km_tokenizer_bytes(t, -1, &len));
	km_tokenizer_close(t);
	drop_dir(dir);
}

/* The two merge loops and the rule they stand for, written out plainly. */
static size_t merge_plainly(const km_bpe *bpe, const char *s, size_t n, int32_t *out)
{
	size_t *start = km_xcalloc(n + 1, sizeof(*start)), parts = n;

	for (size_t i = 0; i <= n; i++)
		start[i] = i;
	for (;;) {
		size_t at = 0;
		int32_t best = INT32_MAX;

		for (size_t i = 0; i + 1 < parts; i++) {
			int32_t r = km_bpe_rank(bpe, s + start[i], start[i + 2] - start[i]);

			if (r >= 0 && r < best) {
				best = r;
				at = i;
			}
		}
		if (best == INT32_MAX)
			break;
		memmove(start + at + 1, start + at + 2, (parts - at - 1) * sizeof(*start));
		parts--;
	}
	for (size_t i = 0; i < parts; i++)
		out[i] = km_bpe_rank(bpe, s + start[i], start[i + 1] - start[i]);
	free(start);
	return parts;
}

static void both_merge_loops_follow_the_rule(void **state)
{
	char *bytes = km_xmalloc(4096), text[700];
	uint32_t *offsets = km_xcalloc(700, sizeof(*offsets));
	int32_t count = 0, got[700], want[700];
	km_bpe bpe;

	(void)state;
	for (int b = 0; b < 256; b++) {
		bytes[count] = (char)b;
		offsets[count] = (uint32_t)count;
		count++;
	}
	offsets[count] = 256;
	/* Words over three letters in a scrambled order of ranks. */
	for (int i = 0; i < 200; i++) {
		char word[6];
		uint32_t len = 2 + (uint32_t)(km_rng_u64(1, (uint64_t)i) % 5), at = offsets[count];
		bool seen = false;

		for (uint32_t k = 0; k < len; k++)
			word[k] = (char)('a' + km_rng_u64(2, (uint64_t)i * 8 + k) % 3);
		for (int32_t j = 0; j < count; j++)
			seen |= offsets[j + 1] - offsets[j] == len &&
				!memcmp(bytes + offsets[j], word, len);
		if (seen)
			continue;
		memcpy(bytes + at, word, len);
		offsets[++count] = at + len;
	}
	assert_int_equal(km_bpe_init(&bpe, bytes, offsets, count), -1);
	for (uint64_t seed = 0; seed < 400; seed++) {
		size_t n = 7 + km_rng_u64(seed, 0) % 600, a, b;

		for (size_t i = 0; i < n; i++)
			text[i] = (char)('a' + km_rng_u64(seed, i + 1) % 3);
		a = km_bpe_encode(&bpe, text, n, got);
		b = merge_plainly(&bpe, text, n, want);
		assert_int_equal(a, b);
		assert_memory_equal(got, want, a * sizeof(*got));
	}
	km_bpe_release(&bpe);
}

static void long_runs_take_no_quadratic_time(void **state)
{
	static const char *const words[] = { "xx",       "xxxx",         "xxxxxxxx", "  ",
					     "\xe7\x9a", "\xe7\x9a\x84", NULL };
	static const char *const units[] = { "x", " ", "的", "<", "\n", "0" };
	km_tokenizer *t;
	char *text = km_xmalloc(1 << 20);
	km_ids ids = { 0 };
	int n;
	char *dir = small_dir(words, &n);
	double start = now();

	(void)state;
	assert_int_equal(km_tokenizer_open(&t, dir, NULL), 0);
	for (size_t u = 0; u < sizeof(units) / sizeof(units[0]); u++) {
		size_t unit = strlen(units[u]), len = ((size_t)1 << 20) / unit * unit, back = 0,
		       bytes;

		for (size_t i = 0; i < len; i += unit)
			memcpy(text + i, units[u], unit);
		ids.len = 0;
		km_tokenizer_encode(t, text, len, true, &ids, NULL);
		for (size_t i = 0; i < ids.len; i++, back += bytes)
			km_tokenizer_bytes(t, ids.data[i], &bytes);
		assert_int_equal(back, len);
	}
	/* A quadratic merge of 25,000 characters at a time would take minutes. */
	assert_true(now() - start < 30);
	km_ids_release(&ids);
	free(text);
	km_tokenizer_close(t);
	drop_dir(dir);
}

static void pieces_share_the_count_of_cuts(void **state)
{
	static const char *const words[] = { "xx", NULL };
	km_tokenizer_cuts cuts = { 0 };
	km_tokenizer *t;
	char *text = km_xmalloc(30001);
	km_ids ids = { 0 };
	int n;
	char *dir = small_dir(words, &n);

	(void)state;
	assert_int_equal(km_tokenizer_open(&t, dir, NULL), 0);
	memset(text, 'x', 30001);
	km_tokenizer_encode_piece(t, &cuts, text, 24999, false, &ids); /* 12499 pairs and one */
	assert_int_equal(ids.len, 12500);
	km_tokenizer_encode_piece(t, &cuts, "xxx", 3, false, &ids); /* cut behind the first */
	assert_int_equal(ids.len, 12502);
	assert_int_equal(ids.data[12500], 'x');
	assert_int_equal(ids.data[12501], 256);
	km_ids_release(&ids);
	free(text);
	km_tokenizer_close(t);
	drop_dir(dir);
}

/* Files that are wrong */

static void assert_refused(const char *dir, const char *says)
{
	km_tokenizer *t;
	km_err err;
	int rc = km_tokenizer_open(&t, dir, &err);

	assert_true(rc < 0);
	assert_null(t);
	if (!strstr(err.msg, says) || !strstr(err.msg, dir))
		fail_msg("expected \"%s\", got \"%s\"", says, err.msg);
}

static void refuse_vocabulary(const char *text, size_t n, const char *says)
{
	char *dir = scratch_dir();

	save(dir, "tiktoken.model", text, n);
	save(dir, "tokenizer_config.json", "{\"added_tokens_decoder\": {}}", 28);
	assert_refused(dir, says);
	drop_dir(dir);
}

static void refuse_config(const char *config, const char *says)
{
	static const char *const words[] = { "ab", NULL };
	int n;
	char *dir = small_dir(words, &n);

	save(dir, "tokenizer_config.json", config, strlen(config));
	assert_refused(dir, says);
	drop_dir(dir);
}

static void hostile_vocabularies_are_refused(void **state)
{
	km_buf out = KM_BUF_INIT;
	char *dir = scratch_dir();

	(void)state;
	assert_refused(dir, "tiktoken.model: cannot be opened");
	drop_dir(dir);
	refuse_vocabulary("", 0, "holds no token");
	refuse_vocabulary("\n\n", 2, "holds no token");
	refuse_vocabulary("IQ==", 4, "line 1 has no space");
	refuse_vocabulary("I!== 0\n", 7, "line 1: the token is not base64");
	refuse_vocabulary("IR== 0\n", 7, "line 1: the token is not base64");
	refuse_vocabulary("IQ= 0\n", 6, "line 1: the token is not base64");
	refuse_vocabulary(" 0\n", 3, "line 1: the token is not base64");
	refuse_vocabulary("IQ== \n", 6, "line 1: the rank is not a whole number");
	refuse_vocabulary("IQ== -1\n", 8, "line 1: the rank is not a whole number");
	refuse_vocabulary("IQ== 0x1\n", 9, "line 1: the rank is not a whole number");
	refuse_vocabulary("IQ== 99999999999999999999\n", 26,
			  "line 1: the rank is not a whole number");
	refuse_vocabulary("IQ== 0\nIg== 0\n", 14, "rank 0 is there twice");
	refuse_vocabulary("IQ== 0\nIg== 2\n", 14, "has rank 2 among 2 tokens");
	refuse_vocabulary("IQ== 0\nIQ== 1\n", 14,
			  "rank 1 has the bytes of an earlier rank (hex 21)");
	refuse_vocabulary("IQ== 0\nIg== 1", 13, "byte 0x00 is no token");
	refuse_vocabulary("\0\0\0\0 0\n", 7, "line 1: the token is not base64");
	for (int i = 0; i < 20000; i++)
		km_buf_puts(&out, "QUFB");
	km_buf_puts(&out, " 0\n");
	refuse_vocabulary(out.data, out.len, "line 1 has 80002 bytes");
	km_buf_release(&out);
}

static void hostile_configurations_are_refused(void **state)
{
	static const char *const words[] = { "ab", NULL };
	int n;
	char *dir = small_dir(words, &n), *path = km_xasprintf("%s/tokenizer_config.json", dir);

	(void)state;
	unlink(path);
	assert_refused(dir, "tokenizer_config.json: cannot be opened");
	free(path);
	drop_dir(dir);
	refuse_config("", "not JSON");
	refuse_config("[]", "expected a JSON object");
	refuse_config("{}", "has no object added_tokens_decoder");
	refuse_config("{\"added_tokens_decoder\": {\"256\": {\"content\": \"a\"}}}",
		      "names token 256; with 257 tokens in tiktoken.model the special ids are 257 "
		      "to 512");
	refuse_config("{\"added_tokens_decoder\": {\"513\": {\"content\": \"a\"}}}",
		      "names token 513");
	refuse_config("{\"added_tokens_decoder\": {\"x\": {\"content\": \"a\"}}}", "names token x");
	refuse_config("{\"added_tokens_decoder\": {\"300\": {\"content\": \"\"}}}",
		      "\"content\" must be");
	refuse_config("{\"added_tokens_decoder\": {\"300\": {\"content\": 7}}}",
		      "\"content\" must be");
	refuse_config("{\"added_tokens_decoder\": {\"300\": 7}}", "\"content\" must be");
	refuse_config("{\"added_tokens_decoder\": {\"300\": {\"content\": \"a\"}, \"0300\": "
		      "{\"content\": \"b\"}}}",
		      "token 300 is named twice");
	refuse_config("{\"added_tokens_decoder\": {\"300\": {\"content\": \"a\"}, \"301\": "
		      "{\"content\": \"a\"}}}",
		      "two special tokens have the name \"a\"");
	refuse_config("{\"added_tokens_decoder\": {}, \"num_reserved_special_tokens\": 0}",
	              "num_reserved_special_tokens must be");
}

/* Streaming decode */

static void characters_come_out_whole_however_bytes_come_in(void **state)
{
	static const char *const parts[] = {
		"a",
		"é",
		"中",
		"😀",
		"\xff",
		"\xe4\xb8",
		"\xf0\x9f\x98",
		"\xc0",
		"\xed\xa0\x80",
		"\xf4\x90",
		"\x80",
	};

	(void)state;
	for (uint64_t seed = 0; seed < 20000; seed++) {
		char text[128];
		size_t n = 0, count = 1 + km_rng_u64(seed, 0) % 12;
		km_buf whole = KM_BUF_INIT, streamed = KM_BUF_INIT;
		km_utf8_stream stream = { 0 };

		for (uint64_t i = 1; i <= count; i++) {
			const char *s =
				parts[km_rng_u64(seed, i) % (sizeof(parts) / sizeof(parts[0]))];

			memcpy(text + n, s, strlen(s));
			n += strlen(s);
		}
		km_utf8_append_valid(&whole, text, n);
		for (size_t i = 0, take; i < n; i += take) {
			take = 1 + km_rng_u64(seed, 100 + i) % 5;
			take = take < n - i ? take : n - i;
			km_utf8_stream_push(&stream, text + i, take, &streamed);
			assert_true(km_utf8_valid(streamed.data ? streamed.data : "", streamed.len,
						  NULL));
			assert_true(stream.held <= 3);
		}
		km_utf8_stream_flush(&stream, &streamed);
		assert_int_equal(streamed.len, whole.len);
		assert_memory_equal(streamed.data, whole.data, whole.len);
		km_buf_release(&whole);
		km_buf_release(&streamed);
	}
}

/* The real vocabulary */

static void compare_ids(const km_tokenizer *t, const char *text, size_t len, bool parse,
                        const json_t *want)
{
	km_ids ids = { 0 };
	bool same;

	km_tokenizer_encode(t, text, len, parse, &ids, NULL);
	same = ids.len == json_array_size(want);
	for (size_t i = 0; same && i < ids.len; i++)
		same = ids.data[i] == json_integer_value(json_array_get(want, i));
	if (!same) {
		for (size_t i = 0; i < ids.len; i++)
			fprintf(stderr, "%d ", ids.data[i]);
		fail_msg("\"%s\" is encoded otherwise by tiktoken", text);
	}
	km_ids_release(&ids);
}

static void compare_long(const km_tokenizer *t, const json_t *row)
{
	const char *unit = json_string_value(json_object_get(row, "repeat"));
	size_t unit_len = json_string_length(json_object_get(row, "repeat"));
	size_t times = (size_t)json_integer_value(json_object_get(row, "times"));
	km_buf text = KM_BUF_INIT;
	km_ids ids = { 0 };
	uint64_t h = UINT64_C(0xcbf29ce484222325);
	char hash[17];

	for (size_t i = 0; i < times; i++)
		km_buf_append(&text, unit, unit_len);
	km_tokenizer_encode(t, text.data, text.len, false, &ids, NULL);
	for (size_t i = 0; i < ids.len; i++)
		for (int shift = 0; shift < 32; shift += 8)
			h = (h ^ ((uint32_t)ids.data[i] >> shift & 255)) * UINT64_C(0x100000001b3);
	snprintf(hash, sizeof(hash), "%016llx", (unsigned long long)h);
	assert_int_equal(ids.len, json_integer_value(json_object_get(row, "count")));
	assert_string_equal(hash, json_string_value(json_object_get(row, "hash")));
	km_ids_release(&ids);
	km_buf_release(&text);
}

static void encodings_equal_tiktokens(void **state)
{
	const char *dir = getenv("TOKENIZER_DIR");
	char *line = NULL, *model = km_xasprintf("%s/tiktoken.model", dir ? dir : "");
	FILE *golden = fopen("tests/data/tokenizer/golden.jsonl", "r");
	km_tokenizer *t;
	km_err err;
	size_t cap = 0;
	int rows = 0;

	(void)state;
	assert_non_null(golden);
	if (!dir || access(model, R_OK)) {
		printf("skip: tiktoken's encodings: no tiktoken.model in TOKENIZER_DIR (%s)\n",
		       dir ? dir : "not set");
		fclose(golden);
		free(model);
		skip();
	}
	free(model);
	if (km_tokenizer_open(&t, dir, &err))
		fail_msg("%s", err.msg);
	assert_int_equal(km_tokenizer_vocab_size(t), 163840);
	assert_int_equal(km_tokenizer_special(t, "<|im_end|>"), 163586);
	assert_true(km_tokenizer_is_special(t, 163586));
	assert_false(km_tokenizer_is_special(t, 163595));
	assert_int_equal(km_tokenizer_special(t, "<|reserved_token_163600|>"), 163600);
	for (; getline(&line, &cap, golden) > 0; rows++) {
		json_t *row = json_loads(line, JSON_ALLOW_NUL, NULL),
		       *text = json_object_get(row, "text");
		const json_t *ids = json_object_get(row, "ids"),
			     *parsed = json_object_get(row, "special");

		assert_non_null(row);
		if (!text) {
			compare_long(t, row);
		} else {
			compare_ids(t, json_string_value(text), json_string_length(text), false,
				    ids);
			compare_ids(t, json_string_value(text), json_string_length(text), true,
			            parsed ? parsed : ids);
		}
		json_decref(row);
	}
	assert_true(rows > 500);
	free(line);
	fclose(golden);
	km_tokenizer_close(t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(matcher_equals_the_pattern),
		cmocka_unit_test(special_names_are_parsed_only_when_asked),
		cmocka_unit_test(both_merge_loops_follow_the_rule),
		cmocka_unit_test(long_runs_take_no_quadratic_time),
		cmocka_unit_test(pieces_share_the_count_of_cuts),
		cmocka_unit_test(hostile_vocabularies_are_refused),
		cmocka_unit_test(hostile_configurations_are_refused),
		cmocka_unit_test(characters_come_out_whole_however_bytes_come_in),
		cmocka_unit_test(encodings_equal_tiktokens),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
