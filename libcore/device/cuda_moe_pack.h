/*
 * int4 experts from a checkpoint's packing to format/moe_layout.h's, on the GPU: enqueued on its
 * stream. The matrices are on the device, and as km_moe_layout_check takes them; the result is that
 * of km_moe_pack_gate_up and km_moe_pack_down.
 */
#ifndef KM_DEVICE_CUDA_MOE_PACK_H
#define KM_DEVICE_CUDA_MOE_PACK_H

#include "device/cuda.h"
#include "format/moe_layout.h"

typedef struct km_cuda_moe_pack {
	km_int4_matrix gate, up, down; /* device */
	int hidden, intermediate, group;
	void *packed_gate_up, *packed_down;
} km_cuda_moe_pack;

int km_cuda_moe_pack_expert(km_cuda *cuda, const km_cuda_moe_pack *args, km_err *err);

#endif
