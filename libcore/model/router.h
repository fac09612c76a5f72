/*
 * Which kernels the router runs: by shape and device alone, in words.
 *
 * km_router_plan_make is a pure function: no GPU is asked, the same arguments give the same plan. What
 * no kernel can do is refused with a sentence; where a specialised kernel does not fit and a general
 * one is taken, the explanation says so and which number missed.
 *
 * The token counts at which one form overtakes another are in router_tuning.inc, one row for each GPU
 * and expert count that was measured; `kimi-bench-gate --tune` prints rows for the GPU it runs on.
 */
#ifndef KM_MODEL_ROUTER_H
#define KM_MODEL_ROUTER_H

#include "base/buf.h"
#include "device/cuda_router.h"

typedef struct km_router_device {
	int capability; /* 90 */
	int multiprocessors;
	bool blas;      /* cuBLASLt can be opened */
	bool pdl;       /* launches may overlap; nothing before capability 90 can */
} km_router_device;

typedef struct km_router_tuning {
	int capability, experts;
	bool pdl;
	int resident_tokens;   /* the resident GEMM up to this many */
	int split_tokens;      /* else the split GEMM up to this many */
	int parts_tokens;      /* else the GEMM in parts up to this many; cuBLASLt above */
	int one_launch_tokens; /* router, gate and alignment in one launch up to this many */
	int gate_align_tokens; /* else gate and alignment in one launch up to this many */
} km_router_tuning;

/* The row for a device and expert count: exact, or the nearest capability below and then the nearest
 * expert count. */
const km_router_tuning *km_router_tuning_find(const km_router_device *device, int experts);

int km_router_plan_make(km_router_plan *plan, const km_router_shape *shape,
                        const km_router_device *device, km_err *err);

/* The plan with another router GEMM, in the tile that it takes for this shape; for measuring. */
void km_router_plan_force(km_router_plan *plan, const km_router_shape *shape, enum km_router_gemm gemm);

/* Appends the plan's choices and their reasons, a line each. */
void km_router_plan_explain(const km_router_plan *plan, const km_router_shape *shape,
                            const km_router_device *device, km_buf *out);

#endif
