#include "format/odd_values.h"

#include <string.h>

/* A branch-free pass first: odd values are so rare that the second pass almost never runs.
 * `exponent` are the bits that are all ones in NaN and infinity. */
#define LOOK(name, type, exponent, mantissa, sign)                                                 \
	static void name(const void *data, size_t count, bool scale, km_odd_values *t)             \
	{                                                                                          \
		const char *p = data;                                                              \
		size_t odd = 0, below = 0;                                                         \
		type x;                                                                            \
                                                                                                   \
		for (size_t i = 0; i < count; i++) {                                               \
			memcpy(&x, p + i * sizeof(x), sizeof(x));                                  \
			odd += (x & (exponent)) == (exponent);                                     \
			below += (x & (sign)) != 0;                                                \
		}                                                                                  \
		for (size_t i = 0; i < count && (odd || (scale && below)); i++) {                  \
			bool is_odd, is_nan, is_below;                                             \
                                                                                                   \
			memcpy(&x, p + i * sizeof(x), sizeof(x));                                  \
			is_odd = (x & (exponent)) == (exponent);                                   \
			is_nan = is_odd && (x & (mantissa));                                       \
			is_below = scale && !is_odd && (x & (sign)) && (x & (type)~(sign));        \
			t->nan += is_nan;                                                          \
			t->inf += is_odd && !is_nan;                                               \
			t->negative += is_below;                                                   \
			if ((is_odd || is_below) && t->first < 0)                                  \
				t->first = (int64_t)i;                                             \
		}                                                                                  \
	}

LOOK(look_f64, uint64_t, UINT64_C(0x7ff0000000000000), UINT64_C(0x000fffffffffffff),
     UINT64_C(1) << 63)
LOOK(look_f32, uint32_t, 0x7f800000u, 0x007fffffu, 0x80000000u)
LOOK(look_f16, uint16_t, 0x7c00u, 0x03ffu, 0x8000u)
LOOK(look_bf16, uint16_t, 0x7f80u, 0x007fu, 0x8000u)
LOOK(look_e5m2, uint8_t, 0x7cu, 0x03u, 0x80u)
LOOK(look_e4m3, uint8_t, 0x7fu, 0x7fu, 0x80u) /* no infinities: all ones is NaN */

km_odd_values km_odd_values_count(enum km_dtype dtype, const void *data, size_t count, bool scale)
{
	km_odd_values odd = { .first = -1 };

	switch (dtype) {
	case KM_F64: look_f64(data, count, scale, &odd); break;
	case KM_F32: look_f32(data, count, scale, &odd); break;
	case KM_F16: look_f16(data, count, scale, &odd); break;
	case KM_BF16: look_bf16(data, count, scale, &odd); break;
	case KM_F8_E5M2: look_e5m2(data, count, scale, &odd); break;
	case KM_F8_E4M3: look_e4m3(data, count, scale, &odd); break;
	default: break;
	}
	return odd;
}
