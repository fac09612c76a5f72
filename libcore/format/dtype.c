#include "format/dtype.h"

#include "base/err.h"

static const struct {
	const char *name;
	size_t bytes;
} dtypes[KM_DTYPE_COUNT] = {
	[KM_F32] = { "F32", 4 },         [KM_F16] = { "F16", 2 },
	[KM_BF16] = { "BF16", 2 },       [KM_F8_E4M3] = { "F8_E4M3", 1 },
	[KM_F8_E5M2] = { "F8_E5M2", 1 }, [KM_F64] = { "F64", 8 },
	[KM_I8] = { "I8", 1 },           [KM_U8] = { "U8", 1 },
	[KM_I16] = { "I16", 2 },         [KM_I32] = { "I32", 4 },
	[KM_I64] = { "I64", 8 },         [KM_BOOL] = { "BOOL", 1 },
};

size_t km_dtype_bytes(enum km_dtype dtype)
{
	return dtypes[dtype].bytes;
}

const char *km_dtype_name(enum km_dtype dtype)
{
	return dtypes[dtype].name;
}

int km_dtype_parse(const char *name, size_t len)
{
	for (int i = 0; i < KM_DTYPE_COUNT; i++)
		if (strlen(dtypes[i].name) == len && !memcmp(dtypes[i].name, name, len))
			return i;
	return KM_ENOTFOUND;
}

static float float_of_bits(uint32_t u)
{
	float f;

	memcpy(&f, &u, 4);
	return f;
}

static uint32_t bits_of_float(float f)
{
	uint32_t u;

	memcpy(&u, &f, 4);
	return u;
}

float km_f16_to_f32(uint16_t h)
{
	uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;

	if (exponent == 31)
		return float_of_bits(sign | 0x7f800000 | mantissa << 13);
	if (exponent)
		return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
	return (sign ? -0x1p-24f : 0x1p-24f) * (float)mantissa;
}

/* Rounds a small magnitude to nearest even at a multiple of 2^unit_exponent:
 * adding and subtracting 2^(23 + unit) makes the float unit do it. */
static float round_to_unit(float magnitude, int unit_exponent)
{
	volatile float shift = float_of_bits((uint32_t)(unit_exponent + 23 + 127) << 23);
	volatile float sum = magnitude + shift;

	return sum - shift;
}

uint16_t km_f32_to_f16(float f)
{
	uint32_t u = bits_of_float(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;

	if (magnitude > 0x7f800000)
		return (uint16_t)(sign | 0x7e00);
	if (magnitude >= 0x477ff000) /* rounds to 65536 or more */
		return (uint16_t)(sign | 0x7c00);
	if (magnitude < 0x38800000) /* below 2^-14: a subnormal, in units of 2^-24 */
		return (uint16_t)(sign | (uint32_t)(round_to_unit(float_of_bits(magnitude), -24) *
		                                    0x1p24f));
	magnitude += 0xfff + (magnitude >> 13 & 1);
	return (uint16_t)(sign | (magnitude - 0x38000000) >> 13);
}

float km_f8_e4m3_to_f32(uint8_t v)
{
	uint32_t sign = (uint32_t)(v & 0x80) << 24, exponent = v >> 3 & 15, mantissa = v & 7;

	if ((v & 0x7f) == 0x7f)
		return float_of_bits(sign | 0x7fc00000);
	if (exponent)
		return float_of_bits(sign | (exponent + 120) << 23 | mantissa << 20);
	return (sign ? -0x1p-9f : 0x1p-9f) * (float)mantissa;
}

uint8_t km_f32_to_f8_e4m3(float f)
{
	uint32_t u = bits_of_float(f), sign = u >> 24 & 0x80, magnitude = u & 0x7fffffff;

	if (magnitude > 0x7f800000)
		return (uint8_t)(sign | 0x7f);
	if (magnitude >= 0x43e00000) /* 448 and above saturate */
		return (uint8_t)(sign | 0x7e);
	if (magnitude < 0x3c800000) /* below 2^-6: a subnormal, in units of 2^-9 */
		return (uint8_t)(sign |
		                 (uint32_t)(round_to_unit(float_of_bits(magnitude), -9) * 0x1p9f));
	magnitude += 0x7ffff + (magnitude >> 20 & 1);
	return (uint8_t)(sign | (magnitude - 0x3c000000) >> 20);
}

void km_dtype_to_f32(enum km_dtype dtype, const void *from, float *to, size_t count)
{
	const uint16_t *half = from;
	const uint8_t *byte = from;

	switch (dtype) {
	case KM_F32:
		memcpy(to, from, count * 4);
		return;
	case KM_BF16:
		for (size_t i = 0; i < count; i++)
			to[i] = km_bf16_to_f32(half[i]);
		return;
	case KM_F16:
		for (size_t i = 0; i < count; i++)
			to[i] = km_f16_to_f32(half[i]);
		return;
	case KM_F8_E4M3:
		for (size_t i = 0; i < count; i++)
			to[i] = km_f8_e4m3_to_f32(byte[i]);
		return;
	default:
		KM_ASSERT(!"a float type that this program computes with");
	}
}
