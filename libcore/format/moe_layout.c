#include "format/moe_layout.h"

#include <string.h>

enum { ROWS = KM_MOE_RECORD_ROWS, COLS = KM_MOE_RECORD_COLS, HALF = 8, WORDS = COLS / 8 };

int km_moe_layout_check(int hidden, int intermediate, int group, km_err *err)
{
	if (group != 32 && group != 64 && group != 128)
		return km_fail(err, KM_EUNSUPPORTED,
		               "the int4 expert layout has groups of 32, 64 or 128 columns, "
		               "got %d",
		               group);
	if (hidden < COLS || hidden % COLS)
		return km_fail(err, KM_EUNSUPPORTED,
		               "the int4 expert layout needs a hidden size that is a "
		               "multiple of %d, got %d",
		               COLS, hidden);
	if (intermediate < COLS || intermediate % COLS)
		return km_fail(err, KM_EUNSUPPORTED,
		               "the int4 expert layout needs an intermediate size that is "
		               "a multiple of %d, got %d",
		               COLS, intermediate);
	return 0;
}

static size_t matrix_bytes(int rows, int cols, int group)
{
	return (size_t)(rows / ROWS) * (size_t)(cols / COLS) * (size_t)KM_MOE_RECORD_BYTES(group);
}

size_t km_moe_gate_up_bytes(int hidden, int intermediate, int group)
{
	return matrix_bytes(2 * intermediate, hidden, group);
}

size_t km_moe_down_bytes(int hidden, int intermediate, int group)
{
	return matrix_bytes(hidden, intermediate, group);
}

/* Rows g and g + 8 of a record: where they are in the checkpoint's packing. */
typedef struct record_rows {
	km_int4_matrix low, high; /* of row 0 and of row 8, at the record's first column */
	size_t words, groups;     /* of a whole row */
} record_rows;

static uint32_t nibble(const uint32_t *codes, int col)
{
	return codes[col / 8] >> 4 * (col % 8) & 15;
}

static void put_word(uint8_t *to, uint32_t v)
{
	for (int i = 0; i < 4; i++)
		to[i] = (uint8_t)(v >> 8 * i);
}

static uint32_t get_word(const uint8_t *from)
{
	return from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

/* Bit positions of a word's nibbles: by row half, by the step's column half, by parity. */
static int bit_of(int high_row, int col8, int odd)
{
	return 4 * high_row + 8 * col8 + 16 * odd;
}

static void pack_codes(const record_rows *r, uint8_t *record)
{
	for (int word = 0; word < KM_MOE_RECORD_CODES / 4; word++) {
		int step = word % 4, lane = word / 4 % 32, half = word / 128;
		size_t row = (size_t)(lane / 4) * r->words;
		int col = 64 * half + 16 * step + 2 * (lane % 4);
		uint32_t v = 0;

		for (int i = 0; i < 8; i++) {
			const uint32_t *from = (i & 1 ? r->high.codes : r->low.codes) + row;

			v |= nibble(from, col + 8 * (i >> 1 & 1) + (i >> 2))
			     << bit_of(i & 1, i >> 1 & 1, i >> 2);
		}
		put_word(record + 4 * word, v);
	}
}

static void unpack_codes(const record_rows *r, const uint8_t *record)
{
	for (int g = 0; g < HALF; g++) {
		memset(r->low.codes + (size_t)g * r->words, 0, WORDS * sizeof(uint32_t));
		memset(r->high.codes + (size_t)g * r->words, 0, WORDS * sizeof(uint32_t));
	}
	for (int word = 0; word < KM_MOE_RECORD_CODES / 4; word++) {
		int step = word % 4, lane = word / 4 % 32, half = word / 128;
		size_t row = (size_t)(lane / 4) * r->words;
		uint32_t v = get_word(record + 4 * word);

		for (int i = 0; i < 8; i++) {
			uint32_t *to = (i & 1 ? r->high.codes : r->low.codes) + row;
			int col = 64 * half + 16 * step + 2 * (lane % 4) + 8 * (i >> 1 & 1) +
			          (i >> 2);

			to[col / 8] |= (v >> bit_of(i & 1, i >> 1 & 1, i >> 2) & 15)
			               << 4 * (col % 8);
		}
	}
}

static void pack_scales(const record_rows *r, int group, uint8_t *to)
{
	for (int g = 0; g < HALF; g++)
		for (int i = 0; i < COLS / group; i++, to += 4)
			put_word(to,
			         r->low.scales[(size_t)g * r->groups + (size_t)i] |
			                 (uint32_t)r->high.scales[(size_t)g * r->groups + (size_t)i]
			                         << 16);
}

static void unpack_scales(const record_rows *r, int group, const uint8_t *from)
{
	for (int g = 0; g < HALF; g++)
		for (int i = 0; i < COLS / group; i++, from += 4) {
			uint32_t v = get_word(from);

			r->low.scales[(size_t)g * r->groups + (size_t)i] = (uint16_t)v;
			r->high.scales[(size_t)g * r->groups + (size_t)i] = (uint16_t)(v >> 16);
		}
}

/* A matrix whose record i has its low rows in low[step * i ..] and its high rows likewise in
 * high. */
typedef struct pairing {
	const km_int4_matrix *low, *high;
	/* row of `high` that record 0 begins with; rows from record to record */
	int high_first, step;
} pairing;

static km_int4_matrix rows_at(const km_int4_matrix *m, size_t row, int j, const record_rows *r,
                              int group)
{
	return (km_int4_matrix){ m->codes + row * r->words + (size_t)j * WORDS,
		                 m->scales + row * r->groups + (size_t)(j * COLS / group) };
}

static void walk(int rows, int cols, int group, const pairing *p, uint8_t *packed,
                 const uint8_t *from)
{
	size_t bytes = (size_t)KM_MOE_RECORD_BYTES(group);
	record_rows r = { .words = (size_t)cols / 8, .groups = (size_t)(cols / group) };

	for (int i = 0; i < rows / ROWS; i++)
		for (int j = 0; j < cols / COLS; j++) {
			size_t row = (size_t)i * (size_t)p->step,
			       at = ((size_t)i * (size_t)(cols / COLS) + (size_t)j) * bytes;

			r.low = rows_at(p->low, row, j, &r, group);
			r.high = rows_at(p->high, row + (size_t)p->high_first, j, &r, group);
			if (packed) {
				pack_codes(&r, packed + at);
				pack_scales(&r, group, packed + at + KM_MOE_RECORD_CODES);
			} else {
				unpack_codes(&r, from + at);
				unpack_scales(&r, group, from + at + KM_MOE_RECORD_CODES);
			}
		}
}

void km_moe_pack_gate_up(int hidden, int intermediate, int group, const km_int4_matrix *gate,
                         const km_int4_matrix *up, uint8_t *packed)
{
	pairing p = { gate, up, 0, HALF };

	walk(2 * intermediate, hidden, group, &p, packed, NULL);
}

void km_moe_unpack_gate_up(int hidden, int intermediate, int group, const uint8_t *packed,
                           const km_int4_matrix *gate, const km_int4_matrix *up)
{
	pairing p = { gate, up, 0, HALF };

	walk(2 * intermediate, hidden, group, &p, NULL, packed);
}

void km_moe_pack_down(int hidden, int intermediate, int group, const km_int4_matrix *down,
                      uint8_t *packed)
{
	pairing p = { down, down, HALF, ROWS };

	walk(hidden, intermediate, group, &p, packed, NULL);
}

void km_moe_unpack_down(int hidden, int intermediate, int group, const uint8_t *packed,
                        const km_int4_matrix *down)
{
	pairing p = { down, down, HALF, ROWS };

	walk(hidden, intermediate, group, &p, NULL, packed);
}
