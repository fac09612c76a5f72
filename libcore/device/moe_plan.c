/*
 * The tiles that the streaming kernel (kernels/moe_int4.cuh) was built for, and the choice among them.
 *
 * A tile must hold most experts' tokens (an expert with more has its weights read again), and there
 * must be enough tiles to give each multiprocessor nearly the same number of bytes; below that, larger
 * tiles read the activations less often. The thresholds are of that model, set where an H100 or an H200
 * agrees with it, where no tuning entry is given.
 */
#include "device/moe_plan.h"

#include <math.h>
#include <string.h>

#include "format/moe_layout.h"

enum {
	PREFILL_TOKENS = 256,      /* from which the warp-group form is taken: kernels/moe_prefill.cu */
	PREFILL_SUMS = 16 * 1024,  /* of shared memory, through which it turns its results */
	PREFILL_TILES = 3968,      /* that it counts */
	MAX_STAGES = 16,
	MAX_X_STAGES = 4,
	SMEM_BYTES = 227 * 1024,   /* that a block of capability 9.0 can have */
	MISC_BYTES = 12 * 1024,    /* barriers, lists of places: kernels/moe_work.cuh holds it to this */
	DIRECT_PLACES = 64,        /* whose activations and outputs stay on chip in the decode form */
	DIRECT_VALUES = 16384,
	INSIDE_PLACES = 256,       /* that each block can sort for itself */
	FRONT_EXPERTS = 384,
	FRONT_PLACES = 32,
	FRONT_TOP_K = 8,
	FRONT_ROWS = 64,           /* that a block of the grid sums */
	FRONT_BYTES = 11 * 1024,   /* of shared memory, in the sums' place */
	PART_F32_TOKENS = 32,      /* above, the traffic of f32 shows, and bf16 costs 0.0007 of error */
	PREFILL_LEAST = 129,       /* tokens that the warp-group form is offered for */
	MAX_TOP_K = 32,
	MAX_EXPERTS = 1024,
	MAX_BLOCKS = 255,
	ALIGN_CHUNK = 1024,        /* places, at least, of one of up to ALIGN_CHUNKS: kernels/align.cu */
	ALIGN_CHUNKS = 512,
	PAD = 16,                  /* bytes between rows of activations, against bank conflicts */
};

/* kernels/moe_int4.cuh has a kernel for each. */
static const struct shape {
	int block_m, block_n, rows_per_warp, warps, records; /* records: of a row block, a warp's in a stage */
} shapes[] = {
	{ 8, 32, 32, 16, 1 },  { 8, 64, 32, 16, 1 },   { 8, 128, 32, 16, 1 },  { 8, 256, 32, 16, 1 }, { 8, 512, 32, 16, 1 },
	{ 16, 64, 16, 16, 1 }, { 16, 128, 16, 16, 1 }, { 16, 256, 16, 16, 1 }, { 32, 128, 16, 16, 1 },
	{ 32, 256, 32, 8, 2 }, { 64, 256, 32, 8, 2 }, { 48, 256, 16, 16, 1 }, { 80, 256, 16, 16, 1 },
	{ 112, 256, 16, 16, 1 },
};
enum { SHAPES = sizeof(shapes) / sizeof(*shapes) };

/* The warp-group form's tiles. */
static bool is_prefill(const struct shape *s)
{
	return s->block_m == 48 || s->block_m == 80 || s->block_m == 112;
}

static int split_of(const struct shape *s)
{
	return s->warps * s->rows_per_warp / s->block_n;
}

static int block_k_of(const struct shape *s)
{
	return s->records * KM_MOE_RECORD_COLS * split_of(s);
}

static size_t stage_bytes(const struct shape *s, int group)
{
	return (size_t)(s->warps * s->records * s->rows_per_warp / 16) * (size_t)KM_MOE_RECORD_BYTES(group);
}

/* Sorted inside, a tile has no more places than there are tokens. */
static bool sorts_inside(const struct shape *s, const km_moe_problem *p)
{
	return s->block_m == 8 && p->tokens * p->top_k <= INSIDE_PLACES;
}

static size_t x_stage_bytes(const struct shape *s, const km_moe_problem *p)
{
	int most = sorts_inside(s, p) ? p->tokens : p->tokens * p->top_k;
	int pad = is_prefill(s) ? 0 : PAD;
	int rows = s->block_m <= 16 && most < s->block_m ? most : s->block_m;

	return (size_t)rows * (size_t)(2 * block_k_of(s) + pad);
}

static bool decode_fits(const struct shape *s, const km_moe_problem *p)
{
	int places = p->tokens * p->top_k;

	return s->block_m == 8 && places <= DIRECT_PLACES && places * p->intermediate <= DIRECT_VALUES;
}

static int blocks_of(const km_moe_device *d)
{
	return d->multiprocessors < MAX_BLOCKS ? d->multiprocessors : MAX_BLOCKS;
}

/* Of the warps that share a row, all but one hand over their sums; the decode form keeps those of all
 * places, for the 16-row blocks that a block of the grid has, in rows of 17 against bank conflicts. */
static size_t sums_bytes(const struct shape *s, const km_moe_problem *p, const km_moe_device *d)
{
	size_t split = (size_t)(split_of(s) - 1) * (size_t)(s->block_n * s->block_m) * 4;
	size_t rows = (size_t)((p->hidden / 16 + blocks_of(d) - 1) / blocks_of(d));
	size_t direct = decode_fits(s, p) ? rows * (size_t)(p->tokens * p->top_k) * 17 * 4 : 0;

	if (is_prefill(s))
		return PREFILL_SUMS;
	split = split > direct ? split : direct;
	if (decode_fits(s, p) && p->tokens <= KM_MOE_FRONT_TOKENS && split < FRONT_BYTES)
		split = FRONT_BYTES;
	return (split + 127) / 128 * 128;
}

bool km_moe_plan_takes(const km_moe_plan *plan, const km_moe_problem *p, const km_moe_before *before)
{
	return plan->form == KM_MOE_DECODE && p->tokens <= KM_MOE_FRONT_TOKENS &&
	       p->tokens * p->top_k <= FRONT_PLACES && p->experts == FRONT_EXPERTS && !p->expert_map &&
	       p->top_k <= FRONT_TOP_K && before->groups <= 1 && !before->softmax && before->bias &&
	       before->shared_cols == KM_MOE_FRONT_COLS && before->shared_bf16 &&
	       p->hidden <= FRONT_ROWS * plan->blocks;
}

static size_t x_bytes(const struct shape *s, const km_moe_problem *p, int x_stages)
{
	size_t ring = x_stage_bytes(s, p) * (size_t)x_stages;
	size_t places = (size_t)(p->tokens * p->top_k);
	size_t direct = decode_fits(s, p) ? places * (size_t)(2 * p->intermediate + p->intermediate / 8 + PAD) : 0;

	return ring > direct ? ring : direct;
}

/* Stages of weights that fit beside `x_stages` of activations. */
static int stages_beside(const struct shape *s, const km_moe_problem *p, const km_moe_device *d,
                         int x_stages)
{
	size_t used = MISC_BYTES + sums_bytes(s, p, d) + x_bytes(s, p, x_stages);
	size_t fit = used < SMEM_BYTES ? (SMEM_BYTES - used) / stage_bytes(s, p->group) : 0;

	return fit > MAX_STAGES ? MAX_STAGES : (int)fit;
}

/* Three stages of activations hide their way from L2 where that leaves four of weights. */
static int choose_x_stages(const struct shape *s, const km_moe_problem *p, const km_moe_device *d)
{
	for (int n = MAX_X_STAGES; n > 2; n--)
		if (stages_beside(s, p, d, n) >= (n == 3 ? 4 : 6))
			return n;
	return 2;
}

static bool shape_fits(const struct shape *s, const km_moe_problem *p, const km_moe_device *d)
{
	if (is_prefill(s) &&
	    (p->tokens < PREFILL_LEAST || d->capability != 90 ||
	     (int64_t)p->tokens * p->top_k / s->block_m + p->experts > PREFILL_TILES))
		return false;
	return 2 * p->intermediate % s->block_n == 0 && p->hidden % (s->warps * s->rows_per_warp) == 0 &&
	       stages_beside(s, p, d, 2) >= 2;
}

/* Why only the general form can run; NULL: the streaming kernel can. */
static const char *stream_misses(const km_moe_problem *p, const km_moe_device *d)
{
	if (d->capability < 90)
		return "the streaming kernel needs capability 9.0";
	if (!p->packed)
		return "the weights are not int4 in the packed layout";
	for (int i = 0; i < SHAPES; i++)
		if (shape_fits(&shapes[i], p, d))
			return NULL;
	return "no tile fits the hidden size";
}

static int check(const km_moe_problem *p, const km_moe_device *d, km_err *err)
{
	if (d->capability < 80)
		return km_fail(err, KM_EUNSUPPORTED, "the experts' kernels need a GPU of capability 8.0, this one "
		               "has %d.%d", d->capability / 10, d->capability % 10);
	if (p->tokens < 1 || p->tokens > 1 << 20)
		return km_fail(err, KM_EINVAL, "the experts take 1 to %d tokens, got %d", 1 << 20, p->tokens);
	if (p->experts < 1 || p->experts > MAX_EXPERTS)
		return km_fail(err, KM_EUNSUPPORTED, "experts: 1 to %d are built, got %d", MAX_EXPERTS, p->experts);
	if (p->global_experts < p->experts || (!p->expert_map && p->global_experts != p->experts))
		return km_fail(err, KM_EINVAL, "%d experts here of %d in all: %s", p->experts, p->global_experts,
		               p->expert_map ? "a device cannot hold more than all" : "there is no expert map");
	if (p->top_k < 1 || p->top_k > MAX_TOP_K)
		return km_fail(err, KM_EUNSUPPORTED, "top_k: 1 to %d are built, got %d", MAX_TOP_K, p->top_k);
	if (p->hidden < 8 || p->hidden % 8 || p->intermediate < 8 || p->intermediate % 8)
		return km_fail(err, KM_EUNSUPPORTED, "hidden and intermediate sizes: multiples of 8 are built, got "
		               "%d and %d", p->hidden, p->intermediate);
	if (p->packed)
		return km_moe_layout_check(p->hidden, p->intermediate, p->group, err);
	return 0;
}

/* Experts that at least one of the tokens names, with uniform routing, of those that are here. */
static double expected_experts(const km_moe_problem *p)
{
	double miss = p->top_k < p->global_experts ? 1.0 - (double)p->top_k / p->global_experts : 0.0;

	return p->experts * (1.0 - pow(miss, p->tokens));
}

/* Expert e's tokens are near Poisson: the tile holds the mean and 2.5 deviations. */
static int choose_block_m(const km_moe_problem *p, bool prefill)
{
	double mean = (double)p->tokens * p->top_k / p->global_experts, most = mean + 2.5 * sqrt(mean);

	if (prefill)
		return most <= 48 ? 48 : most <= 80 ? 80 : 112;
	if (p->tokens <= 8)
		return 8;
	return most <= 9 ? 8 : most <= 17 ? 16 : most <= 34 ? 32 : 64;
}

/* Whether `tiles` of gate-and-up, of this size, leave the multiprocessors with nearly the same number of bytes.
 * A box of weights costs the same to ask for whatever its rows are, and down items, half as many bytes, make up
 * for whole tiles that are up to half more than the mean (H200). With more than eight places it is what an H100
 * measured when a stage was pieces. */
static bool is_even(const struct shape *s, double tiles, int multiprocessors)
{
	double each = tiles / multiprocessors;

	return s->block_m == 8 ? ceil(each) <= 1.5 * each : each >= 11.0;
}

static const struct shape *choose_among(const km_moe_problem *p, const km_moe_device *d, bool prefill)
{
	int block_m = choose_block_m(p, prefill);
	const struct shape *best = NULL;

	for (int i = 0; i < SHAPES; i++) {
		const struct shape *s = &shapes[i];
		double tiles = expected_experts(p) * 2 * p->intermediate / s->block_n;

		if (!shape_fits(s, p, d) || s->block_m > block_m || is_prefill(s) != prefill)
			continue;
		if (!best || s->block_m > best->block_m || is_even(s, tiles, d->multiprocessors))
			best = s;
	}
	return best;
}

/* The first that fits: the smaller come first. */
static const struct shape *smallest_shape(const km_moe_problem *p, const km_moe_device *d)
{
	const struct shape *s = shapes;

	while (s < shapes + SHAPES - 1 && !shape_fits(s, p, d))
		s++;
	return s;
}

/* There is one: stream_misses has looked. Where no tile is small enough for so few places, those of the hidden size
 * that fit have room for more. */
static const struct shape *choose_shape(const km_moe_problem *p, const km_moe_device *d)
{
	bool prefill = p->tokens >= PREFILL_TOKENS;
	const struct shape *s = choose_among(p, d, prefill);

	s = s ? s : choose_among(p, d, !prefill);
	return s ? s : smallest_shape(p, d);
}

static const struct shape *find_shape(const km_moe_tile *t)
{
	for (int i = 0; i < SHAPES; i++)
		if (shapes[i].block_m == t->block_m && shapes[i].block_n == t->block_n)
			return &shapes[i];
	return NULL;
}

static int check_entry(const km_moe_tile *t, const km_moe_problem *p, const km_moe_device *d, km_err *err)
{
	const struct shape *s = find_shape(t);

	if (!s)
		return km_fail(err, KM_EUNSUPPORTED, "tuning entry: no kernel has BLOCK_SIZE_M %d with BLOCK_SIZE_N %d",
		               t->block_m, t->block_n);
	if (!shape_fits(s, p, d))
		return km_fail(err, KM_EUNSUPPORTED, "tuning entry: BLOCK_SIZE_N %d does not fit hidden %d and "
		               "intermediate %d", t->block_n, p->hidden, p->intermediate);
	if (t->block_k != block_k_of(s))
		return km_fail(err, KM_EUNSUPPORTED, "tuning entry: BLOCK_SIZE_M %d and BLOCK_SIZE_N %d have "
		               "BLOCK_SIZE_K %d, got %d", t->block_m, t->block_n, block_k_of(s), t->block_k);
	if (is_prefill(s) && t->group_m != 1)
		return km_fail(err, KM_EUNSUPPORTED, "tuning entry: with BLOCK_SIZE_M %d GROUP_SIZE_M is 1, got %d",
		               t->block_m, t->group_m);
	if (t->group_m != 1 && t->group_m != 4)
		return km_fail(err, KM_EUNSUPPORTED, "tuning entry: GROUP_SIZE_M is 1 or 4, got %d", t->group_m);
	if (t->warps != s->warps)
		return km_fail(err, KM_EUNSUPPORTED, "tuning entry: num_warps is %d, got %d", s->warps, t->warps);
	if (t->stages < 2 || t->stages > stages_beside(s, p, d, 2))
		return km_fail(err, KM_EUNSUPPORTED, "tuning entry: num_stages is 2 to %d here, got %d",
		               stages_beside(s, p, d, 2), t->stages);
	return 0;
}

static void fill_stream(km_moe_plan *plan, const struct shape *s, const km_moe_problem *p,
                        const km_moe_device *d)
{
	plan->form = decode_fits(s, p)          ? KM_MOE_DECODE
	             : is_prefill(s)  ? KM_MOE_PREFILL
	                              : KM_MOE_GROUPED;
	plan->rows_per_warp = s->rows_per_warp;
	plan->split = split_of(s);
	plan->x_stages = MAX_X_STAGES;
	while (plan->x_stages > 2 && stages_beside(s, p, d, plan->x_stages) < plan->tile.stages)
		plan->x_stages--;
	plan->blocks = blocks_of(d);
	plan->sums_bytes = sums_bytes(s, p, d);
	plan->align_inside = sorts_inside(s, p);
	plan->part_bf16 = p->tokens > PART_F32_TOKENS;
	plan->smem_bytes = MISC_BYTES + sums_bytes(s, p, d) + x_bytes(s, p, plan->x_stages) +
	                   (size_t)plan->tile.stages * stage_bytes(s, p->group);
}

int km_moe_plan_make(km_moe_plan *plan, const km_moe_problem *p, const km_moe_device *d,
                     const km_moe_tile *entry, km_err *err)
{
	const struct shape *s;

	KM_TRY(check(p, d, err));
	*plan = (km_moe_plan){ .form = KM_MOE_GENERAL, .pdl = p->pdl && d->capability >= 90 };
	if (stream_misses(p, d)) {
		if (entry)
			return km_fail(err, KM_EUNSUPPORTED, "tuning entry: only the general form fits, which has "
			               "no tile: %s", stream_misses(p, d));
		return 0;
	}
	if (entry) {
		KM_TRY(check_entry(entry, p, d, err));
		s = find_shape(entry);
		plan->tile = *entry;
		plan->tuned = true;
	} else {
		s = choose_shape(p, d);
		plan->tile = (km_moe_tile){ s->block_m, s->block_n, block_k_of(s), 1, s->warps,
			                    stages_beside(s, p, d, choose_x_stages(s, p, d)) };
	}
	fill_stream(plan, s, p, d);
	return 0;
}

int km_moe_candidates(const km_moe_problem *p, const km_moe_device *d, km_moe_tile *tiles, int max)
{
	static const int groups[] = { 1, 4 };
	int count = 0;

	if (check(p, d, NULL) < 0 || stream_misses(p, d))
		return 0;
	for (int i = 0; i < SHAPES; i++) {
		const struct shape *s = &shapes[i];
		int most, last = 0;

		if (!shape_fits(s, p, d))
			continue;
		most = stages_beside(s, p, d, 2);
		for (int x = 2; x <= MAX_X_STAGES; x++)
			for (int g = 0; g < 2; g++) {
				int stages = x == 2 ? most : stages_beside(s, p, d, x);

				if (stages < 2 || (stages == last && g == 0))
					break;
				last = stages;
				if (g && (is_prefill(s) || p->tokens * p->top_k <= s->block_m))
					continue; /* its order is its own; one tile of places an expert at most */
				if (count < max)
					tiles[count] = (km_moe_tile){ s->block_m, s->block_n, block_k_of(s),
						                      groups[g], s->warps, stages };
				count++;
			}
	}
	return count;
}

static size_t rounded(size_t bytes)
{
	return (bytes + 255) / 256 * 256;
}

static size_t larger(size_t a, size_t b)
{
	return a > b ? a : b;
}

/* Every form's pieces are counted as if they were alive together: kernels/moe.h lays them out. */
size_t km_moe_scratch_size(const km_moe_problem *p, const km_moe_device *d)
{
	size_t places = (size_t)p->tokens * (size_t)p->top_k, hidden = (size_t)p->hidden;
	size_t runs = places < (size_t)p->experts ? places : (size_t)p->experts;
	size_t chunks = places / ALIGN_CHUNK < ALIGN_CHUNKS ? places / ALIGN_CHUNK + 1 : ALIGN_CHUNKS;
	size_t few = (size_t)(p->tokens < PART_F32_TOKENS ? p->tokens : PART_F32_TOKENS) * (size_t)p->top_k;
	bool stream = !stream_misses(p, d);
	size_t general = stream && places > KM_MOE_GENERAL_PLACES ? KM_MOE_GENERAL_PLACES : places;
	size_t part = larger(stream ? places * hidden * 2 : 0, larger(few, general) * hidden * 4);
	size_t act = larger(stream ? places * 2 : 0, general * 4) * (size_t)p->intermediate;

	return KM_MOE_SYNC_BYTES + rounded(places * 4)                     /* ids through the map */
	       + rounded((places + (runs + 1) * 128) * 4)                  /* sorted places */
	       + rounded((places / 8 + runs + 1) * 4) + 256                /* each tile's expert; the total */
	       + rounded((chunks + 1) * (size_t)p->experts * 4)            /* the alignment's counts */
	       + rounded(act)                                              /* silu(gate) * up */
	       + rounded(part);                                            /* each place's output */
}

const char *km_moe_form_name(enum km_moe_form form)
{
	static const char *const names[] = { "decode", "prefill", "grouped", "general" };

	return names[form];
}

void km_moe_plan_explain(const km_moe_plan *plan, const km_moe_problem *p, const km_moe_device *d,
                         km_buf *out)
{
	km_buf_printf(out, "experts: %d tokens, %d of %d experts, top_k %d, hidden %d, intermediate %d%s\n",
	              p->tokens, p->experts, p->global_experts, p->top_k, p->hidden, p->intermediate,
	              p->expert_map ? ", by an expert map" : "");
	if (plan->form == KM_MOE_GENERAL) {
		km_buf_printf(out, "kernel: the general form; the streaming one does not fit: %s\n",
		              stream_misses(p, d));
		return;
	}
	km_buf_printf(out, "kernel: %s, tile %d places x %d rows x %d columns, %d + %d stages, %d-way split, "
	              "%d blocks, %s\n", km_moe_form_name(plan->form), plan->tile.block_m, plan->tile.block_n,
	              plan->tile.block_k, plan->tile.stages, plan->x_stages, plan->split, plan->blocks,
	              plan->tuned ? "by a tuning entry" : "the plan's own choice: no tuning entry");
	km_buf_printf(out, "ids: sorted %s; sums of each place: %s\n",
	              plan->align_inside ? "by every block for itself" : "by a launch before",
	              plan->form == KM_MOE_DECODE ? "on chip" : plan->part_bf16 ? "bf16" : "f32");
}
