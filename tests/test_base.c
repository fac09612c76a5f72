/* base/: errors, buffers, options, UTF-8, output files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/buf.h"
#include "base/copy.h"
#include "base/err.h"
#include "base/mem.h"
#include "base/option.h"
#include "base/outfile.h"
#include "base/rng.h"
#include "base/utf8.h"

static void error_context_is_put_in_front(void **state)
{
	km_err err;
	char big[3000];

	(void)state;
	assert_int_equal(km_fail(&err, KM_EFORMAT, "header has %d bytes", 7), KM_EFORMAT);
	assert_int_equal(km_fail_within(&err, "file %s", "x"), KM_EFORMAT);
	assert_string_equal(err.msg, "file x: header has 7 bytes");
	memset(big, 'a', sizeof(big));
	big[sizeof(big) - 1] = '\0';
	km_fail(&err, KM_EIO, "%s", big);
	km_fail_within(&err, "%s", big);
	assert_true(strlen(err.msg) < sizeof(err.msg));
	assert_int_equal(km_fail(NULL, KM_EIO, "nobody reads this"), KM_EIO);
}

static void sentences_are_one_line_of_utf8(void **state)
{
	char long_name[2000];
	km_err err;

	(void)state;
	km_fail(&err, KM_EFORMAT, "tensor %s is missing", "a\nb\033[31m\177\xff\xc3\xa9");
	assert_string_equal(err.msg, "tensor a?b?[31m??\xc3\xa9 is missing");
	for (size_t i = 0; i < sizeof(long_name) - 1; i++)
		long_name[i] = i % 2 ? '\xa9' : '\xc3';
	long_name[sizeof(long_name) - 1] = '\0';
	km_fail(&err, KM_EFORMAT, "%s", long_name); /* cut within a character */
	assert_int_equal(strlen(err.msg), sizeof(err.msg) - 1);
	assert_true(km_utf8_valid(err.msg, strlen(err.msg), NULL));
	km_fail_within(&err, "x");
	assert_true(km_utf8_valid(err.msg, strlen(err.msg), NULL));
}

static void buffer_keeps_its_maximum(void **state)
{
	km_buf buf;

	(void)state;
	km_buf_init(&buf, 10);
	km_buf_puts(&buf, "12345");
	km_buf_printf(&buf, "%d", 67890);
	assert_false(buf.overflow);
	assert_string_equal(buf.data, "1234567890");
	km_buf_putc(&buf, 'x');
	assert_true(buf.overflow);
	assert_int_equal(buf.len, 10);
	km_buf_clear(&buf);
	km_buf_puts(&buf, "abc");
	km_buf_drop(&buf, 2);
	assert_string_equal(buf.data, "c");
	km_buf_release(&buf);
}

static void arena_survives_a_reset(void **state)
{
	km_arena arena;
	char *p;

	(void)state;
	km_arena_init(&arena, 64);
	for (int round = 0; round < 3; round++) {
		for (size_t n = 1; n < 5000; n = n * 3 + 1) {
			p = km_arena_alloc(&arena, n);
			assert_int_equal((uintptr_t)p % 16, 0);
			memset(p, 0xee, n);
		}
		p = km_arena_strndup(&arena, "hello", 4);
		assert_string_equal(p, "hell");
		km_arena_reset(&arena);
	}
	km_arena_release(&arena);
}

static void utf8_replaces_maximal_subparts(void **state)
{
	/* The example of the Unicode standard, section 3.9. */
	static const char bad[] = "a\xF1\x80\x80\xE1\x80\xC2" "b\x80" "c\x80\xBF" "d";
	km_buf out = KM_BUF_INIT;
	size_t at;

	(void)state;
	assert_int_equal(km_utf8_append_valid(&out, bad, sizeof(bad) - 1), 6);
	assert_string_equal(out.data, "a\uFFFD\uFFFD\uFFFDb\uFFFDc\uFFFD\uFFFDd");
	assert_false(km_utf8_valid(bad, sizeof(bad) - 1, &at));
	assert_int_equal(at, 1);
	assert_true(km_utf8_valid("h\u00e9\u4e16\U0001F600", 10, NULL));
	assert_int_equal(km_utf8_tail("x\xF0\x9F\x98", 4), 3);
	assert_int_equal(km_utf8_tail("x\xF0\x9F\x98\x80", 5), 0);
	/* a surrogate is not a prefix of anything */
	assert_int_equal(km_utf8_tail("\xED\xA0", 2), 0);
	km_buf_release(&out);
}

static void utf8_round_trips_every_scalar(void **state)
{
	char bytes[4];
	size_t len;

	(void)state;
	for (uint32_t cp = 0; cp < 0x110000; cp++) {
		size_t n;

		if (cp >= 0xd800 && cp < 0xe000)
			continue;
		n = km_utf8_encode(cp, bytes);
		assert_int_equal(km_utf8_decode(bytes, n, &len), cp);
		assert_int_equal(len, n);
	}
}

static void check_width(const char *bytes, size_t n)
{
	size_t len;
	bool whole = km_utf8_decode(bytes, n, &len) < KM_UTF8_MORE;

	if (km_utf8_width(bytes, n) != (whole ? len : 0))
		fail_msg("width of %02x %02x %02x %02x", bytes[0] & 255, bytes[1] & 255,
		         bytes[2] & 255, bytes[3] & 255);
}

/* Every three bytes, and every four that a lead of four begins, in steps; cut everywhere. */
static void utf8_width_is_the_decoders(void **state)
{
	(void)state;
	for (uint32_t v = 0; v < 1u << 24; v += 1 + (v >> 16 < 0xc0) * 30) {
		char bytes[4] = { (char)(v >> 16), (char)(v >> 8), (char)v, (char)0x80 };

		check_width(bytes, 4);
		check_width(bytes, 3);
		if (v % 7 == 0) {
			check_width(bytes, 2);
			check_width(bytes, 1);
			bytes[3] = 'x';
			check_width(bytes, 4);
		}
	}
}

struct values {
	bool flag;
	int64_t number, bytes;
	double ratio;
	const char *name, *mode;
	char words[128]; /* the command line, which the strings point into */
};

static const km_option table[] = {
	{ .kind = KM_OPT_FLAG, .names = "flag,f", .offset = offsetof(struct values, flag) },
	{ .kind = KM_OPT_INT, .names = "number,num", .arg = "N",
	  .offset = offsetof(struct values, number), .min = 1, .max = 10 },
	{ .kind = KM_OPT_BYTES, .names = "bytes", .arg = "B",
	  .offset = offsetof(struct values, bytes) },
	{ .kind = KM_OPT_NUMBER, .names = "ratio", .arg = "R",
	  .offset = offsetof(struct values, ratio) },
	{ .kind = KM_OPT_STRING, .names = "name", .arg = "S",
	  .offset = offsetof(struct values, name) },
	{ .kind = KM_OPT_CHOICE, .names = "mode", .arg = "M",
	  .offset = offsetof(struct values, mode), .choices = "auto|fast" },
	{ .kind = KM_OPT_REFUSED, .names = "magic", .arg = "X", .help = "magic is not built" },
};
static const km_usage usage = { "kimi-test", "", "", table, sizeof(table) / sizeof(*table), 1 };

static int parse(struct values *values, km_err *err, const char *line)
{
	char *argv[16], *save = NULL;
	int argc = 0, operands, rc;

	memset(values, 0, sizeof(*values));
	assert_true(strlen(line) < sizeof(values->words));
	memcpy(values->words, line, strlen(line));
	for (char *w = strtok_r(values->words, " ", &save); w; w = strtok_r(NULL, " ", &save))
		argv[argc++] = w;
	argv[argc] = NULL;
	rc = km_option_parse(&usage, values, argc, argv, &operands, err);
	return rc < 0 ? rc : operands;
}

static void options_are_checked_as_they_are_read(void **state)
{
	struct values v;
	km_err err;

	(void)state;
	assert_int_equal(parse(&v, &err, "t -f --num 7 x --bytes=1.5K --ratio .25 --mode fast"), 1);
	assert_true(v.flag && v.number == 7 && v.bytes == 1536 && v.ratio == 0.25);
	assert_string_equal(v.mode, "fast");
	assert_int_equal(parse(&v, &err, "t --number 11"), KM_EINVAL);
	assert_string_equal(err.msg, "--number takes a value from 1 to 10, not '11'");
	assert_int_equal(parse(&v, &err, "t --number 1x"), KM_EINVAL);
	assert_int_equal(parse(&v, &err, "t --mode slow"), KM_EINVAL);
	assert_string_equal(err.msg, "--mode takes one of auto|fast, not 'slow'");
	assert_int_equal(parse(&v, &err, "t --magic 1"), KM_EUNSUPPORTED);
	assert_string_equal(err.msg, "--magic: magic is not built");
	assert_int_equal(parse(&v, &err, "t --nope"), KM_EINVAL);
	assert_int_equal(parse(&v, &err, "t --name"), KM_EINVAL);
	assert_int_equal(parse(&v, &err, "t --flag=1"), KM_EINVAL);
	assert_int_equal(parse(&v, &err, "t a b"), KM_EINVAL);
}

static void output_files_appear_whole_or_not_at_all(void **state)
{
	char dir[] = "/tmp/km-base-XXXXXX";
	char *path;
	km_outfile out;
	km_err err;
	struct stat st;

	(void)state;
	assert_non_null(mkdtemp(dir));
	path = km_xasprintf("%s/file", dir);
	assert_int_equal(km_outfile_save(path, "old", 3, &err), 0);
	assert_int_equal(km_outfile_open(&out, path, &err), 0);
	assert_int_equal(km_outfile_write(&out, "new!", 4, &err), 0);
	km_outfile_release(&out);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_size, 3);
	assert_int_equal(km_outfile_save(path, "new!", 4, &err), 0);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_size, 4);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(rmdir(dir), 0); /* nothing temporary was left */
	assert_int_equal(km_outfile_save(path, "x", 1, &err), KM_EIO);
	assert_non_null(strstr(err.msg, path));
	free(path);
}

/* A link's target is replaced, the link stays; a pipe is written to. */
static void output_keeps_links_and_pipes(void **state)
{
	char dir[] = "/tmp/km-base-XXXXXX", got[8] = "";
	char *file, *link, *pipe;
	km_err err;
	struct stat st;
	int fd;

	(void)state;
	assert_non_null(mkdtemp(dir));
	file = km_xasprintf("%s/file", dir);
	link = km_xasprintf("%s/link", dir);
	pipe = km_xasprintf("%s/pipe", dir);
	assert_int_equal(km_outfile_save(file, "old", 3, &err), 0);
	assert_int_equal(symlink("file", link), 0);
	assert_int_equal(km_outfile_save(link, "newer", 5, &err), 0);
	assert_int_equal(lstat(link, &st), 0);
	assert_true(S_ISLNK(st.st_mode));
	assert_int_equal(stat(file, &st), 0);
	assert_int_equal(st.st_size, 5);
	assert_int_equal(mkfifo(pipe, 0600), 0);
	fd = open(pipe, O_RDONLY | O_NONBLOCK);
	assert_int_not_equal(fd, -1);
	assert_int_equal(km_outfile_save(pipe, "piped", 5, &err), 0);
	assert_int_equal(read(fd, got, sizeof(got)), 5);
	assert_string_equal(got, "piped");
	assert_int_equal(stat(pipe, &st), 0);
	assert_true(S_ISFIFO(st.st_mode));
	close(fd);
	assert_int_equal(km_outfile_save("/dev/full", "x", 1, &err), KM_EIO);
	assert_int_equal(stat("/dev/full", &st), 0);
	assert_true(S_ISCHR(st.st_mode));
	assert_int_equal(unlink(link) | unlink(file) | unlink(pipe) | rmdir(dir), 0);
	free(file);
	free(link);
	free(pipe);
}

/* Every byte, and none beyond, however the threads divide them. */
static void copies_are_whole(void **state)
{
	enum { LARGEST = 64 * 400 + 3 };
	static const size_t sizes[] = { 1, 63, 64, 65, 64 * 85 + 1, 64 * 191, 64 * 193 - 1, 64 * 400 - 64, LARGEST };
	char *from = km_xmalloc(LARGEST), *to = km_xmalloc(LARGEST + 1), *untouched = km_xcalloc(1, LARGEST + 1);

	(void)state;
	for (size_t i = 0; i < LARGEST; i++)
		from[i] = (char)(1 + i % 127);
	for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++)
		for (int threads = 1; threads <= 200; threads += threads < 4 ? 1 : 13) {
			size_t left = LARGEST + 1 - sizes[s];

			memset(to, 0, LARGEST + 1);
			km_copy(to, from, sizes[s], threads);
			assert_memory_equal(to, from, sizes[s]);
			assert_memory_equal(to + sizes[s], untouched, left);
		}
	free(from);
	free(to);
	free(untouched);
}

static void random_numbers_are_the_same_everywhere(void **state)
{
	double sum = 0, square = 0;

	(void)state;
	assert_int_equal(km_rng_u64(1, 0) == km_rng_u64(1, 1), 0);
	for (uint64_t i = 0; i < 100000; i++) {
		double x = km_rng_normal(7, i);

		sum += x;
		square += x * x;
	}
	assert_true(sum / 1e5 < 0.02 && sum / 1e5 > -0.02);
	assert_true(square / 1e5 > 0.98 && square / 1e5 < 1.02);
}

int main(void)
{
	const struct CMUnitTest all[] = {
		cmocka_unit_test(error_context_is_put_in_front),
		cmocka_unit_test(sentences_are_one_line_of_utf8),
		cmocka_unit_test(buffer_keeps_its_maximum),
		cmocka_unit_test(arena_survives_a_reset),
		cmocka_unit_test(utf8_replaces_maximal_subparts),
		cmocka_unit_test(utf8_width_is_the_decoders),
		cmocka_unit_test(utf8_round_trips_every_scalar),
		cmocka_unit_test(options_are_checked_as_they_are_read),
		cmocka_unit_test(output_files_appear_whole_or_not_at_all),
		cmocka_unit_test(output_keeps_links_and_pipes),
		cmocka_unit_test(copies_are_whole),
		cmocka_unit_test(random_numbers_are_the_same_everywhere),
	};

	return cmocka_run_group_tests(all, NULL, NULL);
}
