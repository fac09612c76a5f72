/* Launcher of the int4 experts' repacking: a checkpoint's matrices to format/moe_layout.h's, on the
 * device. Pointers are device memory; the call may be captured. */
#ifndef KK_MOE_PACK_H
#define KK_MOE_PACK_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Rows g and g + 8 of record row i are row step * i + g of `low` and row step * i + high_first + g
 * of `high`: gate_up takes gate, up, 0, 8; down takes itself twice, 8, 16. */
typedef struct kk_moe_pack_args {
	const uint32_t *low_codes, *high_codes;   /* [.., cols / 8] */
	const uint16_t *low_scales, *high_scales; /* bf16 [.., cols / group] */
	int high_first, step;
	int rows, cols, group; /* of the packed matrix; as km_moe_layout_check takes them */
	uint8_t *packed;
} kk_moe_pack_args;

cudaError_t kk_moe_pack(const kk_moe_pack_args *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
