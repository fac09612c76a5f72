#include "device/weight.h"

size_t km_weight_bytes(const km_weight *w)
{
	size_t rows = (size_t)w->rows, cols = (size_t)w->cols;

	if (!w->data)
		return 0;
	switch (w->type) {
	case KM_W_F32:
		return rows * cols * 4;
	case KM_W_F16:
	case KM_W_BF16:
		return rows * cols * 2;
	case KM_W_FP8:
		return rows * cols +
		       (rows + (size_t)w->block_rows - 1) / (size_t)w->block_rows *
		               ((cols + (size_t)w->block_cols - 1) / (size_t)w->block_cols) *
		               km_dtype_bytes(w->scale_dtype);
	case KM_W_INT4:
		return rows * cols / 2 +
		       rows * (cols / (size_t)w->group) * km_dtype_bytes(w->scale_dtype);
	}
	return 0;
}
