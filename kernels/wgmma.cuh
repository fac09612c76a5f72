/*
 * Warpgroup products: sm_90a alone; a trap elsewhere, so the plans must know.
 *
 * Both operands lie in shared memory, rows of 64 bf16 columns (128 bytes) one after the other, from an
 * address divisible by 1,024; in row r the 16-byte piece c is at place c ^ (r % 8), which is the
 * hardware's 128-byte swizzle. wgmma_tile names such an array; 16 columns further on is 2 more.
 */
#ifndef KK_WGMMA_CUH
#define KK_WGMMA_CUH

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KK_WGMMA 1
#else
#define KK_WGMMA 0
#endif

__device__ __forceinline__ uint64_t wgmma_tile(uint32_t shared_address)
{
	return (uint64_t)((shared_address & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
	       (uint64_t)1 << 62;
}

/* Before the first step: registers written so far may be accumulated into. */
__device__ __forceinline__ void wgmma_begin()
{
#if KK_WGMMA
	asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit()
{
#if KK_WGMMA
	asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_wait()
{
#if KK_WGMMA
	asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

/*
 * d[64, N] (+)= a[64, 16] b[N, 16]^T, by the 128 threads of a warpgroup; without `add`, d is overwritten.
 * Lane 4 g + t of warp w holds rows 16 w + g (+ 8), columns 8 j + 2 t (+ 1), as
 * d[4 j] (g, 2t), d[4 j + 1] (g, 2t + 1), d[4 j + 2] (g + 8, 2t), d[4 j + 3] (g + 8, 2t + 1).
 */
template <int N>
__device__ __forceinline__ void wgmma_step(float (&d)[N / 2], uint64_t a, uint64_t b, int add);

template <>
__device__ __forceinline__ void wgmma_step<24>(float (&d)[12], uint64_t a, uint64_t b, int add)
{
#if KK_WGMMA
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %14, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11}, "
	             "%12, %13, p, 1, 1, 0, 0;\n}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
	               "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
	               "+f"(d[10]), "+f"(d[11])
	             : "l"(a), "l"(b), "r"(add));
#else
	(void)d, (void)a, (void)b, (void)add;
	__trap();
#endif
}

template <>
__device__ __forceinline__ void wgmma_step<32>(float (&d)[16], uint64_t a, uint64_t b, int add)
{
#if KK_WGMMA
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11, %12, %13, %14, %15}, "
	             "%16, %17, p, 1, 1, 0, 0;\n}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
	               "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
	               "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
	               "+f"(d[15])
	             : "l"(a), "l"(b), "r"(add));
#else
	(void)d, (void)a, (void)b, (void)add;
	__trap();
#endif
}

template <>
__device__ __forceinline__ void wgmma_step<48>(float (&d)[24], uint64_t a, uint64_t b, int add)
{
#if KK_WGMMA
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %26, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23}, "
	             "%24, %25, p, 1, 1, 0, 0;\n}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
	               "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
	               "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
	               "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
	               "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
	             : "l"(a), "l"(b), "r"(add));
#else
	(void)d, (void)a, (void)b, (void)add;
	__trap();
#endif
}

template <>
__device__ __forceinline__ void wgmma_step<64>(float (&d)[32], uint64_t a, uint64_t b, int add)
{
#if KK_WGMMA
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, "
	             "%24, %25, %26, %27, %28, %29, %30, %31}, "
	             "%32, %33, p, 1, 1, 0, 0;\n}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
	               "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
	               "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
	               "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
	               "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
	               "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
	               "+f"(d[30]), "+f"(d[31])
	             : "l"(a), "l"(b), "r"(add));
#else
	(void)d, (void)a, (void)b, (void)add;
	__trap();
#endif
}

template <>
__device__ __forceinline__ void wgmma_step<96>(float (&d)[48], uint64_t a, uint64_t b, int add)
{
#if KK_WGMMA
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, "
	             "%24, %25, %26, %27, %28, %29, %30, %31, "
	             "%32, %33, %34, %35, %36, %37, %38, %39, "
	             "%40, %41, %42, %43, %44, %45, %46, %47}, "
	             "%48, %49, p, 1, 1, 0, 0;\n}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
	               "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
	               "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
	               "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
	               "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
	               "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
	               "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
	               "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
	               "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]),
	               "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
	             : "l"(a), "l"(b), "r"(add));
#else
	(void)d, (void)a, (void)b, (void)add;
	__trap();
#endif
}

#endif
