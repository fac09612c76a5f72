/* engine/stop: stop strings over cut streams. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "engine/stop.h"

/* What the matcher should show: all before the stop string that ends first, longest first. */
static int plain_search(const char *text, size_t len, const char *const *stops, int count,
                        size_t *visible)
{
	for (size_t end = 1; end <= len; end++) {
		int found = -1;

		for (int i = 0; i < count; i++) {
			size_t n = strlen(stops[i]);

			if (n <= end && memcmp(text + end - n, stops[i], n) == 0 &&
			    (found < 0 || n > strlen(stops[found])))
				found = i;
		}
		if (found >= 0) {
			*visible = end - strlen(stops[found]);
			return found;
		}
	}
	*visible = len;
	return -1;
}

static void stops_across_pieces(void **state)
{
	static const char *const stops[] = { "\n\nUser:", "END" };
	km_stop_set set;
	km_stop stop;
	km_buf out = KM_BUF_INIT;

	(void)state;
	km_stop_set_init(&set, stops, 2);
	km_stop_init(&stop, &set, 16);
	assert_int_equal(km_stop_push(&stop, "hello\n", 6, &out), -1);
	assert_string_equal(out.data, "hello");
	assert_int_equal(km_stop_push(&stop, "\n", 1, &out), -1);
	assert_int_equal(km_stop_push(&stop, "\n", 1, &out), -1);
	assert_string_equal(out.data,
	                    "hello\n"); /* two newlines may still begin it, three may not */
	assert_int_equal(km_stop_push(&stop, "Us", 2, &out), -1);
	assert_string_equal(out.data, "hello\n");
	assert_int_equal(km_stop_push(&stop, "er: more", 8, &out), 0);
	assert_string_equal(out.data, "hello\n");
	km_buf_clear(&out);
	assert_int_equal(km_stop_push(&stop, "xEN", 3, &out), -1);
	km_stop_flush(&stop, &out);
	assert_string_equal(out.data, "xEN");
	assert_int_equal(km_stop_push(&stop, "D", 1, &out), -1); /* a flush starts afresh */
	assert_string_equal(out.data, "xEND");
	km_stop_release(&stop);
	km_stop_set_release(&set);
	km_buf_release(&out);
}

static void no_cut_changes_what_is_seen(void **state)
{
	static const char *const stops[] = { "abab", "bb", "aabaa", "cabab", "c" };
	char text[40];
	km_buf out = KM_BUF_INIT;
	int stopped = 0;

	(void)state;
	for (uint64_t round = 0; round < 20000; round++) {
		int count = (int)(km_rng_u64(1, round) % 6);
		size_t len = km_rng_u64(2, round) % sizeof(text), visible;
		int expected, got = -1;
		km_stop_set set;
		km_stop stop;

		for (size_t i = 0; i < len; i++)
			text[i] = "aaabbbbbbc"[km_rng_u64(round, i) % (round % 2 ? 9 : 10)];
		expected = plain_search(text, len, stops, count, &visible);
		km_stop_set_init(&set, stops, count);
		km_stop_init(&stop, &set, sizeof(text));
		km_buf_clear(&out);
		for (size_t at = 0, n; at < len && got < 0; at += n) {
			n = 1 + km_rng_u64(round + 1, at) % 5;
			n = n < len - at ? n : len - at;
			got = km_stop_push(&stop, text + at, n, &out);
			assert_true(out.len <= visible);
		}
		if (got < 0)
			km_stop_flush(&stop, &out);
		assert_int_equal(got, expected);
		assert_int_equal(out.len, visible);
		assert_memory_equal(out.len ? out.data : "", text, visible);
		stopped += got >= 0;
		km_stop_release(&stop);
		km_stop_set_release(&set);
	}
	assert_true(stopped > 5000 && stopped < 19000);
	km_buf_release(&out);
}

/* After "aabaaa" a 'b' leaves "aab" matched: the end of the first is the beginning of the second,
 * by a border of a border. */
static void a_second_beginning_is_not_missed(void **state)
{
	static const char *const stops[] = { "aabaaac" };
	km_stop_set set;
	km_stop stop;
	km_buf out = KM_BUF_INIT;

	(void)state;
	km_stop_set_init(&set, stops, 1);
	km_stop_init(&stop, &set, 16);
	assert_int_equal(km_stop_push(&stop, "aabaaabaaac", 11, &out), 0);
	assert_string_equal(out.data, "aaba");
	km_stop_release(&stop);
	km_stop_set_release(&set);
	km_buf_release(&out);
}

/* Stop strings whose beginnings repeat in them, in every text of two letters. */
static void every_short_text_is_searched_right(void **state)
{
	static const char *const sets[][2] = {
		{ "aabaaab", "bbb" },
		{ "aab", "abaab" },
		{ "ababb", "aaaa" },
		{ "aabaaaab", "bab" },
	};
	enum { LETTERS = 11 };
	km_buf out = KM_BUF_INIT;
	char text[LETTERS];

	(void)state;
	for (int i = 0; i < 4 * (1 << LETTERS); i++) {
		size_t visible;
		int expected, got;
		km_stop_set set;
		km_stop stop;

		for (int k = 0; k < LETTERS; k++)
			text[k] = i / 4 >> k & 1 ? 'b' : 'a';
		expected = plain_search(text, LETTERS, sets[i % 4], 2, &visible);
		km_stop_set_init(&set, sets[i % 4], 2);
		km_stop_init(&stop, &set, sizeof(text));
		km_buf_clear(&out);
		got = km_stop_push(&stop, text, LETTERS, &out);
		if (got < 0)
			km_stop_flush(&stop, &out);
		assert_int_equal(got, expected);
		assert_int_equal(out.len, visible);
		km_stop_release(&stop);
		km_stop_set_release(&set);
	}
	km_buf_release(&out);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(stops_across_pieces),
		cmocka_unit_test(no_cut_changes_what_is_seen),
		cmocka_unit_test(a_second_beginning_is_not_missed),
		cmocka_unit_test(every_short_text_is_searched_right),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
