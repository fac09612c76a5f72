/* The ops in vectors of 4 floats, for any processor. */
#include "device/cpu_simd.h"

const km_ops km_cpu_portable_ops = {
	.name = "portable",
	.embed = km_cpu_embed,
	.rmsnorm = simd_rmsnorm,
	.linear = simd_linear,
	.rope = km_cpu_rope,
	.kv_write = km_cpu_kv_write,
	.mla_decode = simd_mla_decode,
	.mla_prefill = simd_mla_prefill,
	.silu_mul = simd_silu_mul,
	.gate = km_cpu_gate,
	.moe = simd_moe,
};
