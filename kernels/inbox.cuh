/*
 * Sums sent from block to block of a cluster. The receiver opens its inbox before it first arrives at the
 * cluster's barrier; senders write once they have waited there; the receiver says, after a barrier of its
 * own block, how many bytes it expects, some of which may be there already, and waits for them. Nobody
 * waits for the senders' stores to be acknowledged and for a second barrier, which took 1,500 cycles; a
 * block that receives nothing may end while its own are on their way (TRIED 16).
 *
 * sm_90 and later; a trap before.
 */
#ifndef KK_INBOX_CUH
#define KK_INBOX_CUH

#include <cstdint>

/* One thread; the others learn of it from the barriers. */
__device__ __forceinline__ void inbox_open(uint64_t *inbox)
{
	uint32_t at = (uint32_t)__cvta_generic_to_shared(inbox);

#if __CUDA_ARCH__ >= 900
	asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
	asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
	(void)at;
	__trap();
#endif
}

/* The same thread, after a barrier: before it, racecheck cannot tell the two apart from a race. */
__device__ __forceinline__ void inbox_expect(uint64_t *inbox, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
	uint32_t at = (uint32_t)__cvta_generic_to_shared(inbox);

	asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
	             : "memory");
#endif
}

/* Both addresses are ptx_cluster_address's, of one block. */
__device__ __forceinline__ void inbox_send(uint32_t to, uint32_t inbox, float4 v)
{
#if __CUDA_ARCH__ >= 900
	asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];"
	             ::"r"(to), "r"(inbox), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
	             : "memory");
#endif
}

/* All bytes have arrived. */
__device__ __forceinline__ void inbox_wait(uint64_t *inbox)
{
#if __CUDA_ARCH__ >= 900
	uint32_t at = (uint32_t)__cvta_generic_to_shared(inbox), done = 0;

	while (!done)
		asm volatile("{\n.reg .pred p;\n"
		             "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
		             "selp.u32 %0, 1, 0, p;\n}"
		             : "=r"(done)
		             : "r"(at)
		             : "memory");
#endif
}

#endif
