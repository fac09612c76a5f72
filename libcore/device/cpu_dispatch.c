/*
 * Which CPU form runs here. A form is there when the processor has every instruction set that the
 * Makefile compiles its file with, and the operating system saves the registers, both of which the
 * compiler's runtime asks (cpuid, xgetbv).
 */
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "device/cpu.h"

const char *const km_cpu_isas[] = {
#if defined(__x86_64__)
	"avx512", "avx2",
#endif
	"plain", "portable", NULL,
};

#if defined(__x86_64__)
/* Conversions to and from f16: leaf 1, ecx bit 29; not every compiler knows its name. */
static bool has_f16c(void)
{
	unsigned a, b, c, d;

	return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static const km_ops *vector_ops(const char *isa)
{
	if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
	    !__builtin_cpu_supports("bmi2") || !has_f16c())
		return NULL;
	if (!strcmp(isa, "avx2"))
		return &km_cpu_avx2_ops;
	if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
		return &km_cpu_avx512_ops;
	return NULL;
}
#else
static const km_ops *vector_ops(const char *isa)
{
	(void)isa;
	return NULL;
}
#endif

const km_ops *km_cpu_ops(const char *isa)
{
	for (int i = 0; km_cpu_isas[i]; i++) {
		const km_ops *ops = NULL;

		if (isa && strcmp(isa, km_cpu_isas[i]))
			continue;
		ops = !strcmp(km_cpu_isas[i], "plain")      ? &km_cpu_plain_ops
		      : !strcmp(km_cpu_isas[i], "portable") ? &km_cpu_portable_ops
		                                            : vector_ops(km_cpu_isas[i]);
		if (ops)
			return ops;
	}
	return NULL;
}

const char *km_cpu_fixed_isa(void)
{
	const char *best = km_cpu_ops(NULL)->name;

	return strcmp(best, "plain") ? best : "portable";
}
