/* A kernel's part in device/turn.h: begin, then wait before anything but weights is read, then end. */
#ifndef KK_TURN_CUH
#define KK_TURN_CUH

#include "device/turn.h"
#include "ptx.cuh"

__device__ __forceinline__ void turn_begin(enum km_turn turn)
{
	if (turn != KM_TURN_HOLDS)
		ptx_release_successor();
}

__device__ __forceinline__ void turn_wait(enum km_turn turn)
{
	if (turn != KM_TURN_BESIDE)
		ptx_wait_predecessor();
	if (turn == KM_TURN_HOLDS)
		ptx_release_successor();
}

__device__ __forceinline__ void turn_end(enum km_turn turn)
{
	if (turn == KM_TURN_BESIDE)
		ptx_wait_predecessor();
}

#endif
