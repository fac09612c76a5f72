#include "device/cuda_moe_pack.h"

#include "device/cuda_state.h"
#include "moe_pack.h"

int km_cuda_moe_pack_expert(km_cuda *cuda, const km_cuda_moe_pack *a, km_err *err)
{
	kk_moe_pack_args gate_up = {
		.low_codes = a->gate.codes,
		.high_codes = a->up.codes,
		.low_scales = a->gate.scales,
		.high_scales = a->up.scales,
		.high_first = 0,
		.step = 8,
		.rows = 2 * a->intermediate,
		.cols = a->hidden,
		.group = a->group,
		.packed = a->packed_gate_up,
	};
	kk_moe_pack_args down = {
		.low_codes = a->down.codes,
		.high_codes = a->down.codes,
		.low_scales = a->down.scales,
		.high_scales = a->down.scales,
		.high_first = 8,
		.step = 16,
		.rows = a->hidden,
		.cols = a->intermediate,
		.group = a->group,
		.packed = a->packed_down,
	};

	KM_CUDA_TRY(kk_moe_pack(&gate_up, cuda->stream), err);
	KM_CUDA_TRY(kk_moe_pack(&down, cuda->stream), err);
	return 0;
}
