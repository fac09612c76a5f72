/*
 * Every instruction of PTX in the tree, one wrapper each. Where an architecture lacks one, the wrapper
 * compiles to nothing or to a trap, and says so: the plans choose by compute capability.
 */
#ifndef KK_PTX_CUH
#define KK_PTX_CUH

#include <cstdint>

/* 2^x, relative error up to 2^-22; subnormal results are flushed. */
__device__ __forceinline__ float ptx_ex2(float x)
{
	float y;
	asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* 1/x, within 1 ulp. */
__device__ __forceinline__ float ptx_rcp(float x)
{
	float y;
	asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* 16 bytes that no kernel writes while this one runs, read once: not kept in L1. Volatile, so that it
 * stays on its side of ptx_wait_predecessor. */
__device__ __forceinline__ uint4 ptx_load_stream(const void *p)
{
	uint4 v;
	asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
	             : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
	             : "l"(p));
	return v;
}

/* 16 bytes that the previous launch may have written: from L2, whatever L1 holds. */
__device__ __forceinline__ uint4 ptx_load_fresh(const void *p)
{
	uint4 v;
	asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
	             : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
	             : "l"(p)
	             : "memory");
	return v;
}

/* The next launch of the stream may begin. Nothing before sm_90. */
__device__ __forceinline__ void ptx_release_successor()
{
#if __CUDA_ARCH__ >= 900
	asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* What the previous launch of the stream wrote is visible. Nothing before sm_90. */
__device__ __forceinline__ void ptx_wait_predecessor()
{
#if __CUDA_ARCH__ >= 900
	asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* d[16, 8] += a[16, 16] b[16, 8], bf16 into f32; lane 4g + t holds, of a: (g, 2t), (g + 8, 2t),
 * (g, 2t + 8), (g + 8, 2t + 8), two columns each; of b: (2t, g), (2t + 8, g), two rows each; of d:
 * (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). */
__device__ __forceinline__ void ptx_mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1)
{
	asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
	    "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
	    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
	    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Two e4m3 as two bf16, exactly; nearest through f16, which holds every e4m3. sm_89 and later. */
__device__ __forceinline__ uint32_t ptx_e4m3x2_to_bf16x2(uint16_t v)
{
	uint32_t halves, result = 0;
#if __CUDA_ARCH__ >= 890
	asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(v));
	asm("{ .reg .b16 a, b; .reg .f32 x, y; mov.b32 {a, b}, %1; cvt.f32.f16 x, a; cvt.f32.f16 y, b; "
	    "cvt.rn.bf16x2.f32 %0, y, x; }"
	    : "=r"(result)
	    : "r"(halves));
#else
	(void)v, (void)halves;
	__trap();
#endif
	return result;
}

/* Clusters: sm_90 and later; a trap before. */
__device__ __forceinline__ uint32_t ptx_cluster_rank()
{
	uint32_t r = 0;
#if __CUDA_ARCH__ >= 900
	asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
	return r;
}

__device__ __forceinline__ void ptx_cluster_arrive()
{
#if __CUDA_ARCH__ >= 900
	asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
	__trap();
#endif
}

__device__ __forceinline__ void ptx_cluster_wait()
{
#if __CUDA_ARCH__ >= 900
	asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/* The address, in the shared window of the cluster, of block `rank`'s copy of `p`. */
__device__ __forceinline__ uint32_t ptx_cluster_address(const void *p, uint32_t rank)
{
	uint32_t a = (uint32_t)__cvta_generic_to_shared(p);
#if __CUDA_ARCH__ >= 900
	asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(a) : "r"(rank));
#endif
	return a;
}

__device__ __forceinline__ void ptx_cluster_store(uint32_t address, float v)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
#endif
}

/* 16 bytes to shared memory, completed there on a barrier; both addresses are ptx_cluster_address's, of one
 * block. sm_90 and later; nothing before. */
__device__ __forceinline__ void ptx_cluster_send(uint32_t to, uint32_t barrier, float4 v)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];"
	             ::"r"(to), "r"(barrier), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
	             : "memory");
#endif
}

/* One arrival at a counter; what this thread has seen written is visible to whoever arrives later. */
__device__ __forceinline__ int ptx_arrive_acq_rel(int32_t *counter)
{
	int old;
	asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
	             : "=r"(old)
	             : "l"(counter)
	             : "memory");
	return old;
}

/* 16 bytes from global to shared memory, past L1; a group ends with ptx_copy_commit. */
__device__ __forceinline__ void ptx_copy_async(uint32_t to, const void *from)
{
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void ptx_copy_commit()
{
	asm volatile("cp.async.commit_group;" ::: "memory");
}

/* All of this thread's groups but the last N have arrived. */
template <int N>
__device__ __forceinline__ void ptx_copy_wait()
{
	asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* What this thread wrote to shared memory, and what it waited for with ptx_copy_wait, is visible to the
 * tensor cores' own reads. */
__device__ __forceinline__ void ptx_fence_async()
{
#if __CUDA_ARCH__ >= 900
	asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* The same as a pointer for ordinary loads and stores. */
__device__ __forceinline__ int32_t *ptx_cluster_pointer(int32_t *p, uint32_t rank)
{
#if __CUDA_ARCH__ >= 900
	asm("mapa.u64 %0, %0, %1;" : "+l"(p) : "r"(rank));
#endif
	return p;
}

/*
 * What follows is sm_90a's own (Hopper), or sm_90's; elsewhere a trap.
 */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX_SM90A 1
#else
#define PTX_SM90A 0
#endif

/* 16 bytes of global memory to shared memory, or as many zeros; not kept in L1. Not waited for. */
__device__ __forceinline__ void ptx_copy_async(uint32_t to, const void *from, bool valid)
{
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
	             "r"(valid ? 16 : 0)
	             : "memory");
}

/* All of this thread's copies have arrived. */
__device__ __forceinline__ void ptx_copy_wait_all()
{
	asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Barriers in shared memory that count arrivals; a wait names the phase's parity. */
__device__ __forceinline__ void ptx_mbarrier_init(uint32_t barrier, int arrivals)
{
	asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void ptx_mbarrier_arrive(uint32_t barrier)
{
	asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier)
	             : "memory");
}

/* An arrival that happens when this thread's copies so far have arrived. */
__device__ __forceinline__ void ptx_mbarrier_arrive_copied(uint32_t barrier)
{
	asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void ptx_mbarrier_wait(uint32_t barrier, uint32_t parity)
{
#if __CUDA_ARCH__ >= 900
	uint32_t done = 0;

	while (!done)
		asm volatile("{\n.reg .pred p;\n"
		             "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
		             "selp.u32 %0, 1, 0, p;\n}"
		             : "=r"(done)
		             : "r"(barrier), "r"(parity)
		             : "memory");
#else
	__trap();
#endif
}

/* The same where the arrivals, or what they complete, come from other blocks of the cluster. */
__device__ __forceinline__ void ptx_mbarrier_wait_cluster(uint32_t barrier, uint32_t parity)
{
#if __CUDA_ARCH__ >= 900
	uint32_t done = 0;

	while (!done)
		asm volatile("{\n.reg .pred p;\n"
		             "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
		             "selp.u32 %0, 1, 0, p;\n}"
		             : "=r"(done)
		             : "r"(barrier), "r"(parity)
		             : "memory");
#else
	__trap();
#endif
}

/* Whether the phase of that parity is over; does not wait. */
__device__ __forceinline__ bool ptx_mbarrier_is_over(uint32_t barrier, uint32_t parity)
{
	uint32_t over = 0;
#if __CUDA_ARCH__ >= 900
	asm volatile("{\n.reg .pred p;\n"
	             "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
	             "selp.u32 %0, 1, 0, p;\n}"
	             : "=r"(over)
	             : "r"(barrier), "r"(parity)
	             : "memory");
#else
	__trap();
#endif
	return over;
}

/* A barrier of `threads` of the block's, numbered 1 to 15. */
__device__ __forceinline__ void ptx_barrier_some(int barrier, int threads)
{
	asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* Registers of each thread of this warpgroup, from here on. */
template <int N>
__device__ __forceinline__ void ptx_more_registers()
{
#if PTX_SM90A
	asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N>
__device__ __forceinline__ void ptx_fewer_registers()
{
#if PTX_SM90A
	asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

/* Before a warpgroup's first wgmma, and after registers that one uses were written. */
__device__ __forceinline__ void ptx_wgmma_fence()
{
#if PTX_SM90A
	asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void ptx_wgmma_commit()
{
#if PTX_SM90A
	asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/* All of this warpgroup's groups but the last LEFT are done. */
template <int LEFT>
__device__ __forceinline__ void ptx_wgmma_wait()
{
#if PTX_SM90A
	asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}

/*
 * A matrix in shared memory for wgmma: rows of 128 bytes whose 16-byte pieces lie at (piece ^ row % 8),
 * eight rows 1,024 bytes, at a multiple of 1,024 bytes. `leading` is used where the products run down
 * the rows: bytes from one block of 64 columns to the next. Sixteen columns further are 32 bytes on,
 * sixteen rows 2,048.
 */
__device__ __forceinline__ uint64_t ptx_wgmma_matrix(uint32_t at, uint32_t leading)
{
	return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 |
	       (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

#define PTX_EIGHT(d, i)                                                                            \
	"+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), "+f"((d)[(i) + 4]), \
		"+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])

/*
 * d[64, N] (+)= a[64, 16] b[16, N], bf16 into f32, by a warpgroup. Warp w has rows 16 w .. 16 w + 15;
 * lane 4g + t holds d (g, 8j + 2t), (g, 8j + 2t + 1), (g + 8, the same two) in d[4j .. 4j + 3], and a as
 * ptx_mma_bf16's. In shared memory a is [64 rows, 16]; b is [N rows, 16], or for the "down" forms
 * [16 rows, N]. Without `add`, d is overwritten.
 */
template <int N>
__device__ __forceinline__ void ptx_wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add);

template <>
__device__ __forceinline__ void ptx_wgmma<32>(float (&d)[16], uint64_t a, uint64_t b, bool add)
{
#if PTX_SM90A
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}"
	             : PTX_EIGHT(d, 0), PTX_EIGHT(d, 8)
	             : "l"(a), "l"(b), "r"((int)add));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma<48>(float (&d)[24], uint64_t a, uint64_t b, bool add)
{
#if PTX_SM90A
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %26, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23}, %24, %25, p, 1, 1, 0, 0;\n}"
	             : PTX_EIGHT(d, 0), PTX_EIGHT(d, 8), PTX_EIGHT(d, 16)
	             : "l"(a), "l"(b), "r"((int)add));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma<64>(float (&d)[32], uint64_t a, uint64_t b, bool add)
{
#if PTX_SM90A
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}"
	             : PTX_EIGHT(d, 0), PTX_EIGHT(d, 8), PTX_EIGHT(d, 16), PTX_EIGHT(d, 24)
	             : "l"(a), "l"(b), "r"((int)add));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma<96>(float (&d)[48], uint64_t a, uint64_t b, bool add)
{
#if PTX_SM90A
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
	             "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, %48, %49, p, 1, 1, 0, 0;\n}"
	             : PTX_EIGHT(d, 0), PTX_EIGHT(d, 8), PTX_EIGHT(d, 16), PTX_EIGHT(d, 24),
	               PTX_EIGHT(d, 32), PTX_EIGHT(d, 40)
	             : "l"(a), "l"(b), "r"((int)add));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma<128>(float (&d)[64], uint64_t a, uint64_t b, bool add)
{
#if PTX_SM90A
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
	             "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
	             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}"
	             : PTX_EIGHT(d, 0), PTX_EIGHT(d, 8), PTX_EIGHT(d, 16), PTX_EIGHT(d, 24),
	               PTX_EIGHT(d, 32), PTX_EIGHT(d, 40), PTX_EIGHT(d, 48), PTX_EIGHT(d, 56)
	             : "l"(a), "l"(b), "r"((int)add));
#else
	__trap();
#endif
}

__device__ __forceinline__ void ptx_wgmma_128_down(float (&d)[64], const uint32_t (&a)[4],
                                                   uint64_t b, bool add)
{
#if PTX_SM90A
	asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
	             "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
	             "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "
	             "%58, %59, %60, %61, %62, %63}"
	             ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
	             : PTX_EIGHT(d, 0), PTX_EIGHT(d, 8), PTX_EIGHT(d, 16), PTX_EIGHT(d, 24),
	               PTX_EIGHT(d, 32), PTX_EIGHT(d, 40), PTX_EIGHT(d, 48), PTX_EIGHT(d, 56)
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
#else
	__trap();
#endif
}

/* d = a b, as ptx_mma_bf16 with d from zero. */
__device__ __forceinline__ void ptx_mma_bf16_first(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                   uint32_t a3, uint32_t b0, uint32_t b1)
{
	asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
	    "{%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
	    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
	    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
}

/* d = a b + c, as ptx_mma_bf16. */
__device__ __forceinline__ void ptx_mma_bf16_from(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                  uint32_t a3, uint32_t b0, uint32_t b1, const float (&c)[4])
{
	asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
	    "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
	    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
	    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
	      "f"(c[3]));
}

/* Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8. Volatile:
 * barriers that this file's other wrappers wait for order it. */
__device__ __forceinline__ void ptx_load_matrices(uint32_t (&d)[4], uint32_t address)
{
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
	             : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
	             : "r"(address)
	             : "memory");
}

/* The same, each matrix transposed. */
__device__ __forceinline__ void ptx_load_matrices_down(uint32_t (&d)[4], uint32_t address)
{
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
	             : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
	             : "r"(address)
	             : "memory");
}

/* The value stays in a register: the compiler cannot make it anew where it is used. */
__device__ __forceinline__ void ptx_hold(uint32_t &v)
{
	asm volatile("" : "+r"(v));
}

/* What all lanes of a warp, which are all here, have alike, and the compiler now knows to be alike. */
__device__ __forceinline__ uint32_t ptx_uniform(uint32_t v)
{
	asm volatile("redux.sync.or.b32 %0, %0, 0xffffffff;" : "+r"(v));
	return v;
}

/* threadIdx.x, read again: it is not always worth a register from one use to the next. */
__device__ __forceinline__ uint32_t ptx_thread_again()
{
	uint32_t t;
	asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
	return t;
}

/* True in one lane of a warp whose lanes are all here. */
__device__ __forceinline__ bool ptx_elect()
{
	uint32_t one = 0;
#if __CUDA_ARCH__ >= 900
	asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
#else
	__trap();
#endif
	return one;
}

/* Of shared memory; volatile, as ptx_load_matrices. */
__device__ __forceinline__ uint4 ptx_load_shared(uint32_t address)
{
	uint4 v;
	asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
	             : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
	             : "r"(address)
	             : "memory");
	return v;
}

__device__ __forceinline__ uint32_t ptx_load_shared_word(uint32_t address)
{
	uint32_t v;
	asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
	return v;
}

/* One of a vector's words; i is known when compiling. */
__device__ __forceinline__ uint32_t word_of(const uint4 &v, int i)
{
	return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ uint32_t ptx_shared_address(const void *p)
{
	return (uint32_t)__cvta_generic_to_shared(p);
}

/* Initialised barriers are visible to the copy engine; before the block's own barrier. */
__device__ __forceinline__ void ptx_mbarrier_init_done()
{
#if __CUDA_ARCH__ >= 900
	asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/* One arrival, and so many bytes more to wait for. */
__device__ __forceinline__ void ptx_mbarrier_expect(uint32_t barrier, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
	             : "memory");
#endif
}

/* How long L2 should keep what a copy reads: dropped first, kept longest. */
__device__ __forceinline__ uint64_t ptx_policy_drop()
{
	uint64_t p = 0;
#if __CUDA_ARCH__ >= 800
	asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
#endif
	return p;
}

/* Copies bytes (a multiple of 16) to shared memory and completes them on a barrier. */
__device__ __forceinline__ void ptx_copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
	             ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
	             : "memory");
#endif
}

__device__ __forceinline__ void ptx_copy_bulk_policy(uint32_t to, const void *from, uint32_t bytes,
                                                     uint32_t barrier, uint64_t policy)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
	             "[%0], [%1], %2, [%3], %4;" ::"r"(to),
	             "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
	             : "memory");
#endif
}

/* A tile of a matrix, from column x and row y, to the same place in each block of the cluster in `blocks`,
 * completed on the barrier at `barrier` there; `map` is a CUtensorMap that the launch was given. */
__device__ __forceinline__ void ptx_copy_tile(uint32_t to, const void *map, int x, int y, uint32_t barrier,
                                              unsigned blocks)
{
#if PTX_SM90A
	asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
	             ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
	             "l"(map), "r"(x), "r"(y), "r"(barrier), "h"((uint16_t)blocks)
	             : "memory");
#else
	__trap();
#endif
}

/* A box of a tensor of four dimensions, `at` its first element's place; to a multiple of 128 bytes. */
__device__ __forceinline__ void ptx_copy_box(uint32_t to, const void *map, int4 at, uint32_t barrier,
                                             uint64_t policy)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
	             "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
	             "l"(map), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w), "r"(barrier), "l"(policy)
	             : "memory");
#else
	__trap();
#endif
}

/* To L2: a multiple of 16 bytes, from a multiple of 16. */
__device__ __forceinline__ void ptx_prefetch_bulk(const void *from, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void ptx_prefetch_map(const void *map)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

/* What ordinary stores wrote, and this thread has seen, the copy engine sees too. */
__device__ __forceinline__ void ptx_fence_copies()
{
#if __CUDA_ARCH__ >= 900
	asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

__device__ __forceinline__ int ptx_load_acquire(const int32_t *p)
{
	int v;
	asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
	return v;
}

/* What this thread has seen written is visible to whoever acquires the sum. */
__device__ __forceinline__ void ptx_add_release(int32_t *p, int v)
{
	asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

/*
 * d[64, N] += a[64, 16] b[16, N], bf16 into f32, asynchronously. Warp w of the group has rows 16 w ..,
 * a and d as in ptx_mma_bf16 (d: for each eight columns). b describes N rows of 128 bytes in shared
 * memory, eight at a time, 16-byte pieces exchanged by row: piece p of row r is at p ^ (r % 8).
 */
template <int N>
__device__ __forceinline__ void ptx_wgmma_bf16(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b);

template <>
__device__ __forceinline__ void ptx_wgmma_bf16<32>(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b)
{
#if PTX_SM90A
	asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
	             "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
	             : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
	               "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
	               "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
	               "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma_bf16<64>(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b)
{
#if PTX_SM90A
	asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
	             "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
	             : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
	               "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
	               "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
	               "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
	               "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
	               "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
	               "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
	               "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma_bf16<96>(float (&d)[12][4], const uint32_t (&a)[4], uint64_t b)
{
#if PTX_SM90A
	asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
	             "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
	             "{%48, %49, %50, %51}, %52, 1, 1, 1, 0;"
	             : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
	               "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
	               "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
	               "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
	               "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
	               "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
	               "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
	               "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
	               "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),
	               "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
	               "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]),
	               "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma_bf16<16>(float (&d)[2][4], const uint32_t (&a)[4], uint64_t b)
{
#if PTX_SM90A
	asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7}, "
	             "{%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
	             : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
	               "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma_bf16<48>(float (&d)[6][4], const uint32_t (&a)[4], uint64_t b)
{
#if PTX_SM90A
	asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23}, "
	             "{%24, %25, %26, %27}, %28, 1, 1, 1, 0;"
	             : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
	               "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
	               "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
	               "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
	               "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
	               "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma_bf16<80>(float (&d)[10][4], const uint32_t (&a)[4], uint64_t b)
{
#if PTX_SM90A
	asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
	             "%32, %33, %34, %35, %36, %37, %38, %39}, "
	             "{%40, %41, %42, %43}, %44, 1, 1, 1, 0;"
	             : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
	               "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
	               "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
	               "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
	               "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
	               "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
	               "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
	               "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
	               "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),
	               "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
	__trap();
#endif
}

template <>
__device__ __forceinline__ void ptx_wgmma_bf16<112>(float (&d)[14][4], const uint32_t (&a)[4], uint64_t b)
{
#if PTX_SM90A
	asm volatile("wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {"
	             "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
	             "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
	             "%48, %49, %50, %51, %52, %53, %54, %55}, "
	             "{%56, %57, %58, %59}, %60, 1, 1, 1, 0;"
	             : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
	               "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
	               "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
	               "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
	               "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
	               "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
	               "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
	               "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
	               "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),
	               "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
	               "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]),
	               "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
	               "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]),
	               "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
	__trap();
#endif
}

/*
 * Matrices of 8 x 8 16-bit values, each lane's register two neighbours of a row, as the products' results are
 * held, to shared memory turned: lane l gives the address of what is column l % 8 of matrix l / 8.
 */
__device__ __forceinline__ void ptx_store_turned(uint32_t address, const uint32_t (&v)[4])
{
#if __CUDA_ARCH__ >= 900
	asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
	             "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
	             : "memory");
#else
	__trap();
#endif
}

__device__ __forceinline__ void ptx_store_turned(uint32_t address, const uint32_t (&v)[2])
{
#if __CUDA_ARCH__ >= 900
	asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(v[0]),
	             "r"(v[1])
	             : "memory");
#else
	__trap();
#endif
}

#endif
