/* The int4 expert layout: each nibble and scale where the header's drawing says, and the way
 * back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "format/moe_layout.h"

static km_int4_matrix random_matrix(int rows, int cols, int group, uint64_t seed)
{
	size_t words = (size_t)rows * (size_t)cols / 8,
	       scales = (size_t)rows * (size_t)(cols / group);
	km_int4_matrix m = { km_xmalloc(words * 4), km_xmalloc(scales * 2) };

	for (size_t i = 0; i < words; i++)
		m.codes[i] = (uint32_t)km_rng_u64(seed, i);
	for (size_t i = 0; i < scales; i++)
		m.scales[i] = (uint16_t)km_rng_u64(seed + 1, i);
	return m;
}

static void release_matrix(km_int4_matrix *m)
{
	free(m->codes);
	free(m->scales);
}

static unsigned code_at(const km_int4_matrix *m, int cols, int row, int col)
{
	return m->codes[(size_t)row * (size_t)(cols / 8) + (size_t)(col / 8)] >> 4 * (col % 8) & 15;
}

static uint16_t scale_at(const km_int4_matrix *m, int cols, int group, int row, int col)
{
	return m->scales[(size_t)row * (size_t)(cols / group) + (size_t)(col / group)];
}

/* Where the header says that element (row, col) of a packed matrix is. */
static unsigned packed_code(const uint8_t *packed, int cols, int group, int row, int col)
{
	int c = col % 128, g = row % 8, t = c % 8 / 2, half = c / 64, step = c % 64 / 16;
	size_t word = (size_t)((half * 32 + g * 4 + t) * 4 + step);
	int bit = 4 * (row % 16 / 8) + 8 * (c % 16 / 8) + 16 * (c % 2);
	const uint8_t *record =
		packed + ((size_t)(row / 16) * (size_t)(cols / 128) + (size_t)(col / 128)) *
				 (size_t)KM_MOE_RECORD_BYTES(group);

	return record[4 * word + (size_t)(bit / 8)] >> bit % 8 & 15;
}

static uint16_t packed_scale(const uint8_t *packed, int cols, int group, int row, int col)
{
	const uint8_t *record =
		packed + ((size_t)(row / 16) * (size_t)(cols / 128) + (size_t)(col / 128)) *
				 (size_t)KM_MOE_RECORD_BYTES(group);
	const uint8_t *s = record + 1024 + row % 8 * (128 / group) * 4 + col % 128 / group * 4 +
	                   row % 16 / 8 * 2;

	return (uint16_t)(s[0] | s[1] << 8);
}

static void assert_same(const km_int4_matrix *a, const km_int4_matrix *b, int rows, int cols,
                        int group)
{
	assert_memory_equal(a->codes, b->codes, (size_t)rows * (size_t)cols / 2);
	assert_memory_equal(a->scales, b->scales, (size_t)rows * (size_t)(cols / group) * 2);
}

static const int shapes[][3] = {
	{ 128, 128, 32 }, { 384, 256, 64 }, { 256, 384, 128 }, { 512, 128, 32 }
};

static void test_gate_up(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
		int hidden = shapes[i][0], mid = shapes[i][1], group = shapes[i][2];
		km_int4_matrix gate = random_matrix(mid, hidden, group, 3),
			       up = random_matrix(mid, hidden, group, 5);
		km_int4_matrix gate2 = random_matrix(mid, hidden, group, 7),
			       up2 = random_matrix(mid, hidden, group, 9);
		size_t bytes = km_moe_gate_up_bytes(hidden, mid, group);
		uint8_t *packed = km_xmalloc(bytes);

		assert_int_equal(bytes, (size_t)mid * (size_t)hidden +
		                                (size_t)mid * (size_t)(hidden / group) * 4);
		km_moe_pack_gate_up(hidden, mid, group, &gate, &up, packed);
		for (int r = 0; r < 2 * mid; r++)
			for (int c = 0; c < hidden; c++) {
				const km_int4_matrix *m = r % 16 < 8 ? &gate : &up;
				int row = r / 16 * 8 + r % 8;

				assert_int_equal(packed_code(packed, hidden, group, r, c),
				                 code_at(m, hidden, row, c));
				assert_int_equal(packed_scale(packed, hidden, group, r, c),
				                 scale_at(m, hidden, group, row, c));
			}
		km_moe_unpack_gate_up(hidden, mid, group, packed, &gate2, &up2);
		assert_same(&gate, &gate2, mid, hidden, group);
		assert_same(&up, &up2, mid, hidden, group);
		free(packed);
		release_matrix(&gate);
		release_matrix(&up);
		release_matrix(&gate2);
		release_matrix(&up2);
	}
}

static void test_down(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
		int hidden = shapes[i][0], mid = shapes[i][1], group = shapes[i][2];
		km_int4_matrix down = random_matrix(hidden, mid, group, 3),
			       back = random_matrix(hidden, mid, group, 7);
		size_t bytes = km_moe_down_bytes(hidden, mid, group);
		uint8_t *packed = km_xmalloc(bytes);

		assert_int_equal(bytes, (size_t)mid * (size_t)hidden / 2 +
		                                (size_t)hidden * (size_t)(mid / group) * 2);
		km_moe_pack_down(hidden, mid, group, &down, packed);
		for (int r = 0; r < hidden; r++)
			for (int c = 0; c < mid; c++) {
				assert_int_equal(packed_code(packed, mid, group, r, c),
				                 code_at(&down, mid, r, c));
				assert_int_equal(packed_scale(packed, mid, group, r, c),
				                 scale_at(&down, mid, group, r, c));
			}
		km_moe_unpack_down(hidden, mid, group, packed, &back);
		assert_same(&down, &back, hidden, mid, group);
		free(packed);
		release_matrix(&down);
		release_matrix(&back);
	}
}

static void test_check(void **state)
{
	km_err err;

	(void)state;
	assert_int_equal(km_moe_layout_check(7168, 256, 32, &err), 0);
	assert_int_equal(km_moe_layout_check(7168, 128, 128, &err), 0);
	assert_int_equal(km_moe_layout_check(7168, 256, 16, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "got 16"));
	assert_int_equal(km_moe_layout_check(7100, 256, 32, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "7100"));
	assert_int_equal(km_moe_layout_check(7168, 64, 32, &err), KM_EUNSUPPORTED);
	assert_non_null(strstr(err.msg, "64"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_gate_up),
		cmocka_unit_test(test_down),
		cmocka_unit_test(test_check),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
