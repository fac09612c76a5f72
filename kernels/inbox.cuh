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

#include "ptx.cuh"

/* One thread; the others learn of it from the barriers. */
__device__ __forceinline__ void inbox_open(uint64_t *inbox)
{
	ptx_mbarrier_init(ptx_shared_address(inbox), 1);
	ptx_mbarrier_init_done();
}

/* The same thread, after a barrier: before it, racecheck takes the two for a race. */
__device__ __forceinline__ void inbox_expect(uint64_t *inbox, uint32_t bytes)
{
	ptx_mbarrier_expect(ptx_shared_address(inbox), bytes);
}

/* Both addresses are ptx_cluster_address's, of one block. */
__device__ __forceinline__ void inbox_send(uint32_t to, uint32_t inbox, float4 v)
{
	ptx_cluster_send(to, inbox, v);
}

/* All bytes have arrived. */
__device__ __forceinline__ void inbox_wait(uint64_t *inbox)
{
	ptx_mbarrier_wait_cluster(ptx_shared_address(inbox), 0);
}

#endif
