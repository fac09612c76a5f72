/*
 * Every instruction of PTX in the tree, one wrapper each (more in wgmma.cuh, inbox.cuh). Where an
 * architecture lacks one, the wrapper compiles to nothing or to a trap, and says so: the plans choose by
 * compute capability.
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

#endif
