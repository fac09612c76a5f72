/*
 * Which kernel the mixture of experts runs on a GPU, and with which tile numbers: choosing, not doing.
 *
 * km_moe_plan_make is a pure function of its arguments. Without a tuning entry it takes its own choice; with
 * one, the entry's tile, or it refuses with a sentence saying which number no kernel was built for.
 * km_moe_candidates lists every tile that km_moe_plan_make takes for a problem: what a tuner searches. The
 * numbers carry the names of the tuning files' keys; a file's entry for M tokens is one km_moe_tile.
 *
 *   block_m  BLOCK_SIZE_M: routed places (tokens of one expert) that a tile takes; 8 to 112
 *   block_n  BLOCK_SIZE_N: rows of the gate-and-up matrix (2 * intermediate) in a tile; 32 to 512
 *   block_k  BLOCK_SIZE_K: columns of it in one stage of shared memory; follows from the other two
 *   group_m  GROUP_SIZE_M: tiles of places that share a pass over the rows; 1 or 4; 1 with 48, 80 and 112 places
 *   warps    num_warps: that multiply; follows from the first two too: 8 or 16
 *   stages   num_stages: of weights in shared memory; 2 up to what fits
 * The down projection runs in the same launch: its tile has the same places, 128 to 512 rows
 * and up to 256 columns a stage, so there is no table of its own.
 *
 * km_moe_plan_explain says the choice and its reason. Any thread.
 */
#ifndef KM_DEVICE_MOE_PLAN_H
#define KM_DEVICE_MOE_PLAN_H

#include <stdbool.h>
#include <stddef.h>

#include "base/buf.h"
#include "base/err.h"

typedef struct km_moe_problem {
	int tokens;       /* M */
	int experts;      /* whose weights this device holds */
	int global_experts; /* that ids name; `experts` unless there is an expert map */
	int top_k, hidden;
	int intermediate; /* this device's slice */
	int group;        /* columns of one int4 scale */
	bool packed;      /* int4 in the layout of format/moe_layout.h; else only the general form fits */
	bool expert_map;
	bool pdl;         /* launches may begin before their predecessor has ended */
} km_moe_problem;

typedef struct km_moe_device {
	int capability; /* 90 */
	int multiprocessors;
} km_moe_device;

typedef struct km_moe_tile {
	int block_m, block_n, block_k, group_m, warps, stages;
} km_moe_tile;

enum km_moe_form {
	KM_MOE_DECODE,  /* one launch; the down projection sums over the experts on chip */
	KM_MOE_PREFILL, /* as grouped, by warp-group matrix instructions */
	KM_MOE_GROUPED, /* one launch after the alignment's; each place's output passes through memory */
	KM_MOE_GENERAL, /* three launches, CUDA cores: any weight type and shape */
};

typedef struct km_moe_plan {
	enum km_moe_form form;
	km_moe_tile tile;
	int rows_per_warp;  /* 16 or 32: of a tile, that one warp multiplies */
	int split;          /* warps that share a row of gate-and-up, each with a part of the columns */
	int x_stages;       /* of activations in shared memory */
	int blocks;         /* of the grid */
	size_t smem_bytes, sums_bytes; /* of a block; of it, for sums that pass between warps */
	bool align_inside;  /* each block sorts the ids for itself; else kk_align runs before */
	bool part_bf16;     /* the places' outputs, before they are summed, are bf16; else f32 */
	bool tuned;         /* the tile is a tuning entry's */
	bool pdl;
} km_moe_plan;

int km_moe_plan_make(km_moe_plan *plan, const km_moe_problem *problem, const km_moe_device *device,
                     const km_moe_tile *entry, km_err *err);

/* Fills up to `max` tiles and returns how many there are; 0 when only the general form fits. */
int km_moe_candidates(const km_moe_problem *problem, const km_moe_device *device, km_moe_tile *tiles,
                      int max);

/* Device memory that calls of up to problem->tokens tokens need besides arguments and results, whatever
 * their plan; the general form, on weights that the streaming kernel takes, has room for
 * KM_MOE_GENERAL_PLACES places, tokens by top_k. Its first KM_MOE_SYNC_BYTES must be zero before the first
 * call, and are nobody else's to write. */
enum { KM_MOE_SYNC_BYTES = 128 * 1024, KM_MOE_GENERAL_PLACES = 2048 };
size_t km_moe_scratch_size(const km_moe_problem *problem, const km_moe_device *device);

/*
 * What a layer has before its experts. The decode form's launch can take it along (kernels/moe_front.cuh), which it was
 * built to do for up to KM_MOE_FRONT_TOKENS tokens of Kimi K2's 384 experts: the gate of its router's logits, and the
 * shared experts' down projection, of bf16, of KM_MOE_FRONT_COLS columns: one of eight GPUs' part.
 */
enum { KM_MOE_FRONT_TOKENS = 4, KM_MOE_FRONT_COLS = 256 };

typedef struct km_moe_before {
	int groups;       /* of experts, that the gate chooses among; up to 1: none */
	bool softmax, bias;
	int shared_cols;  /* of the shared experts' down projection */
	bool shared_bf16;
} km_moe_before;

bool km_moe_plan_takes(const km_moe_plan *plan, const km_moe_problem *problem, const km_moe_before *before);

const char *km_moe_form_name(enum km_moe_form form);
void km_moe_plan_explain(const km_moe_plan *plan, const km_moe_problem *problem,
                         const km_moe_device *device, km_buf *out);

#endif
