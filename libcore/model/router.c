#include "model/router.h"

#include <stdlib.h>

/* What the kernels were built for (kernels/router.h; a GPU test holds the two together). */
enum {
	MAX_EXPERTS = 1024,
	MAX_TOP_K = 32,
	MAX_GROUPS = 32,
	ONEPASS_TOP_K = 8,
	RESIDENT_HIDDEN = 7168,
	RESIDENT_EXPERTS = 512,
	ONE_LAUNCH_TOKENS = 64,
	PARTS_TOKENS = 256,
	PARTS_EXPERTS = 384,
};

static const km_router_tuning tuning[] = {
#include "model/router_tuning.inc"
};

const km_router_tuning *km_router_tuning_find(const km_router_device *device, int experts)
{
	const km_router_tuning *best = NULL;

	for (size_t i = 0; i < sizeof(tuning) / sizeof(*tuning); i++) {
		const km_router_tuning *t = &tuning[i];

		if (t->pdl != device->pdl || t->capability > device->capability)
			continue;
		if (!best || t->capability > best->capability ||
		    (t->capability == best->capability &&
		     abs(t->experts - experts) < abs(best->experts - experts)))
			best = t;
	}
	return best;
}

static int check_shape(const km_router_shape *s, const km_router_device *d, km_err *err)
{
	if (d->capability < 80)
		return km_fail(err, KM_EUNSUPPORTED, "the router's kernels need a GPU of capability 8.0, "
		               "this one has %d.%d", d->capability / 10, d->capability % 10);
	if (d->pdl && d->capability < 90)
		return km_fail(err, KM_EUNSUPPORTED, "overlapping launches need a GPU of capability 9.0, "
		               "this one has %d.%d", d->capability / 10, d->capability % 10);
	if (s->tokens < 1)
		return km_fail(err, KM_EINVAL, "the router needs at least one token, got %d", s->tokens);
	if (s->experts < 1 || s->experts > MAX_EXPERTS)
		return km_fail(err, KM_EUNSUPPORTED, "experts: 1 to %d are built, got %d", MAX_EXPERTS,
		               s->experts);
	if (s->top_k < 1 || s->top_k > MAX_TOP_K || s->top_k > s->experts)
		return km_fail(err, KM_EUNSUPPORTED, "top_k: 1 to %d of %d experts are built, got %d",
		               MAX_TOP_K < s->experts ? MAX_TOP_K : s->experts, s->experts, s->top_k);
	if (s->hidden < 8 || s->hidden % 8)
		return km_fail(err, KM_EUNSUPPORTED, "hidden: multiples of 8 are built, got %d", s->hidden);
	if (s->groups > MAX_GROUPS || (s->groups > 1 && s->experts % s->groups))
		return km_fail(err, KM_EUNSUPPORTED, "groups: up to %d that divide the %d experts are "
		               "built, got %d", MAX_GROUPS, s->experts, s->groups);
	if (s->groups > 1 && (s->topk_group < 1 || s->topk_group > s->groups))
		return km_fail(err, KM_EINVAL, "topk_group: 1 to %d, got %d", s->groups, s->topk_group);
	if (s->block < 1)
		return km_fail(err, KM_EINVAL, "the alignment's block must be at least 1, got %d", s->block);
	return 0;
}

/* Why the specialised form cannot be taken; NULL: it can. */
static const char *resident_misses(const km_router_shape *s, const km_router_device *d)
{
	if (s->weights_f32)
		return "its weights are f32";
	if (s->hidden != RESIDENT_HIDDEN)
		return "hidden is not 7168";
	if (s->experts < 8 || s->experts > RESIDENT_EXPERTS)
		return "experts are not 8 to 512";
	return d->capability < 90 ? "it needs capability 9.0" : NULL;
}

static const char *onepass_misses(const km_router_shape *s)
{
	if (s->experts != 128 && s->experts != 256 && s->experts != 384 && s->experts != 512)
		return "experts are not 128, 256, 384 or 512";
	if (s->experts == 512 && s->top_k > 2 * ONEPASS_TOP_K)
		return "top_k is above 16";
	if (s->experts < 512 && s->top_k > ONEPASS_TOP_K)
		return "top_k is above 8";
	return s->groups > 1 && (s->experts != 256 || s->groups != 8)
	               ? "there are expert groups, but not 8 of 256 experts" : NULL;
}

/* The forms in one launch with an alignment. */
static bool fuses(const km_router_shape *s)
{
	return (s->experts == 256 || s->experts == 384) && s->top_k <= ONEPASS_TOP_K && s->groups <= 1 &&
	       s->tokens <= ONE_LAUNCH_TOKENS;
}

/* The split form's instructions are capability 9.0's alone, and it writes logits in pairs. */
static bool splits(const km_router_shape *s, const km_router_device *d)
{
	return !resident_misses(s, d) && d->capability == 90 && s->experts % 2 == 0;
}

/* In parts: four tiles of experts and two of tokens at most, all blocks at once. */
static bool parts(const km_router_shape *s, const km_router_device *d)
{
	return splits(s, d) && s->tokens <= PARTS_TOKENS && s->experts <= PARTS_EXPERTS;
}

static enum km_router_gemm choose_gemm(const km_router_shape *s, const km_router_device *d)
{
	const km_router_tuning *t = km_router_tuning_find(d, s->experts);
	bool resident = !resident_misses(s, d), blas = d->blas && !s->weights_f32;

	if (resident && (!t || s->tokens <= t->resident_tokens))
		return KM_GEMM_RESIDENT;
	if (splits(s, d) && t && s->tokens <= t->split_tokens)
		return KM_GEMM_SPLIT;
	if (parts(s, d) && t && s->tokens <= t->parts_tokens)
		return KM_GEMM_PARTS;
	if (splits(s, d) && !blas)
		return KM_GEMM_SPLIT;
	if (resident && !blas)
		return KM_GEMM_RESIDENT;
	/* The general form beats cuBLASLt at no token count above a few (TRIED 6). */
	return blas && s->tokens > 4 ? KM_GEMM_BLAS : KM_GEMM_GENERAL;
}

/*
 * The split form's tile. Two blocks fit a multiprocessor with 64 x 32 and 64 x 48, so that where launches
 * overlap the next one's weights arrive while this one works; on H100 (E 384, us) 64 x 48, 64 x 64 and
 * 128 x 64 take 4.3, 4.8, 5.5 at 32 tokens, 5.8, 5.4, 6.1 at 64, 9.8, 10.0, 7.4 at 128. Without overlap
 * 128 x 64 is best from 32 on, at 256 experts as well. Above 384 experts seven clusters are too few.
 */
static void choose_split(km_router_plan *p, const km_router_shape *s)
{
	bool large = s->tokens > 64 || (!p->pdl && s->tokens > 24);

	p->split = p->gemm == KM_GEMM_PARTS ? 14 : 16;
	if (p->gemm == KM_GEMM_PARTS) {
		p->split_tokens = 128;
		p->split_experts = s->experts <= 256 ? 64 : 96;
		return;
	}
	p->split_tokens = large ? 128 : 64;
	p->split_experts = large ? 64 : s->experts <= 256 ? 32 : s->experts <= 384 && s->tokens > 40 ? 64 : 48;
}

/* Rows to a block of the gate that aligns: one block up to 16 rows (H100, us at 16: 3.4; in two, 3.9), then
 * eight warps a block. */
static int fused_warps(const km_router_shape *s)
{
	return s->tokens > 8 && s->tokens <= 16 ? 16 : 8;
}

/*
 * How many rows a block takes at a time, how many blocks, and whether the gate's launch overlaps.
 * Measured on H100 (E 384, cold buffers): overlap saves 0.2 to 0.4 us where a launch leaves room on the
 * GPU, costs 0.2 to 0.6 from 512 to 8,192 rows, where the next launch's blocks take room from the last
 * rows', and saves again from 16,384 on. Without it, one row a block is best, in 24 warps a
 * multiprocessor from 4,096 rows on; from 16,384 on, 24 warps in three blocks are best for both.
 */
static void choose_gate_launch(km_router_plan *p, const km_router_shape *s, const km_router_device *d)
{
	bool many = s->tokens >= 12288;

	p->gate_pdl = p->pdl && (s->tokens <= 384 || many);
	p->gate_warps = many ? 8 : 1;
	p->gate_blocks = many ? 3 * d->multiprocessors
	                      : s->tokens > 3072 ? 24 * d->multiprocessors : 1 << 20;
}

int km_router_plan_make(km_router_plan *plan, const km_router_shape *s, const km_router_device *d,
                        km_err *err)
{
	const km_router_tuning *t;

	KM_TRY(check_shape(s, d, err));
	t = km_router_tuning_find(d, s->experts);
	*plan = (km_router_plan){ .pdl = d->pdl, .gemm = choose_gemm(s, d), .chain = KM_CHAIN_SEPARATE };
	plan->gate = onepass_misses(s) ? KM_GATE_ROUNDS : KM_GATE_ONEPASS;
	choose_split(plan, s);
	plan->fused_warps = fused_warps(s);
	choose_gate_launch(plan, s, d);
	if (!t || !fuses(s))
		return 0;
	if (!resident_misses(s, d) && s->tokens <= t->one_launch_tokens)
		plan->chain = KM_CHAIN_ONE_LAUNCH;
	else if (s->tokens <= t->gate_align_tokens)
		plan->chain = KM_CHAIN_GATE_ALIGN;
	return 0;
}

void km_router_plan_force(km_router_plan *plan, const km_router_shape *s, enum km_router_gemm gemm)
{
	plan->gemm = gemm;
	choose_split(plan, s);
}

static void explain_resident(const km_router_shape *s, const km_router_tuning *t, km_buf *out)
{
	int experts = s->experts > 384 ? 32 : s->experts > 256 ? 24 : 16; /* of a cluster of 8 */

	km_buf_printf(out, "resident, %d blocks hold the weights in registers",
	              (s->experts + experts - 1) / experts * 8);
	if (t && s->tokens > t->resident_tokens)
		km_buf_puts(out, "; cuBLASLt was not found, so it is taken at every token count\n");
	else if (t)
		km_buf_printf(out, "; up to %d tokens (tuning row %d, %d experts)\n", t->resident_tokens,
		              t->capability, t->experts);
	else
		km_buf_puts(out, "\n");
}

static void explain_split(const km_router_plan *p, const km_router_shape *s, const km_router_tuning *t,
                          km_buf *out)
{
	bool in_parts = p->gemm == KM_GEMM_PARTS;

	km_buf_printf(out, in_parts ? "in %d parts, tiles of %d tokens x %d experts, their sums by a second launch"
	                            : "split over clusters of %d, tiles of %d tokens x %d experts",
	              p->split, p->split_tokens, p->split_experts);
	if (!in_parts && s->tokens > t->split_tokens)
		km_buf_puts(out, "; cuBLASLt was not found, so it is taken at every higher token count\n");
	else
		km_buf_printf(out, "; %d to %d tokens (tuning row %d, %d experts)\n",
		              (in_parts ? t->split_tokens : t->resident_tokens) + 1,
		              in_parts ? t->parts_tokens : t->split_tokens, t->capability, t->experts);
}

/* Why none of the forms for this shape. */
static void explain_rest(const km_router_plan *p, const km_router_shape *s, const km_router_device *d,
                         km_buf *out)
{
	const km_router_tuning *t = km_router_tuning_find(d, s->experts);
	const char *misses = resident_misses(s, d);

	km_buf_printf(out, "%s, ", p->gemm == KM_GEMM_BLAS ? "cuBLASLt" : "the general form");
	if (misses)
		km_buf_printf(out, "the resident form does not fit: %s\n", misses);
	else if (!splits(s, d))
		km_buf_printf(out, "%d tokens are above the resident form's %d; the split form does not fit: %s\n",
		              s->tokens, t->resident_tokens,
		              d->capability != 90 ? "it is for capability 9.0 alone" : "experts are odd");
	else if (s->experts > PARTS_EXPERTS)
		km_buf_printf(out, "%d tokens are above the split form's %d; the form in parts does not fit: "
		              "experts are above %d\n", s->tokens, t->split_tokens, PARTS_EXPERTS);
	else
		km_buf_printf(out, "%d tokens are above the resident form's %d, the split form's %d and the "
		              "parts' %d (tuning row %d, %d experts)\n", s->tokens, t->resident_tokens,
		              t->split_tokens, t->parts_tokens, t->capability, t->experts);
}

static void explain_gemm(const km_router_plan *p, const km_router_shape *s, const km_router_device *d,
                         km_buf *out)
{
	const km_router_tuning *t = km_router_tuning_find(d, s->experts);

	km_buf_puts(out, "router GEMM: ");
	if (p->chain == KM_CHAIN_ONE_LAUNCH)
		km_buf_printf(out, "resident, in its chain's launch; up to %d tokens (tuning row %d, %d experts)\n",
		              t->one_launch_tokens, t->capability, t->experts);
	else if (p->gemm == KM_GEMM_SPLIT || p->gemm == KM_GEMM_PARTS)
		explain_split(p, s, t, out);
	else if (p->gemm == KM_GEMM_RESIDENT)
		explain_resident(s, t, out);
	else
		explain_rest(p, s, d, out);
}

void km_router_plan_explain(const km_router_plan *p, const km_router_shape *s,
                            const km_router_device *d, km_buf *out)
{
	const char *misses = onepass_misses(s);

	km_buf_printf(out, "router: %d tokens, %d experts, hidden %d, top_k %d, %s, %s weights, launches %s\n",
	              s->tokens, s->experts, s->hidden, s->top_k, s->softmax ? "softmax" : "sigmoid",
	              s->weights_f32 ? "f32" : "bf16", p->pdl ? "overlap" : "do not overlap");
	explain_gemm(p, s, d, out);
	if (misses)
		km_buf_printf(out, "gate: by rounds, the one-pass form does not fit: %s\n", misses);
	else if (p->chain == KM_CHAIN_SEPARATE)
		km_buf_printf(out, "gate: one pass, %d row%s a block, at most %d blocks%s\n", p->gate_warps,
		              p->gate_warps == 1 ? "" : "s", p->gate_blocks,
		              p->pdl && !p->gate_pdl ? "; no overlap at this many rows" : "");
	else
		km_buf_puts(out, "gate: one pass, in its chain's launch\n");
	km_buf_printf(out, "chain: %s\n",
	              p->chain == KM_CHAIN_ONE_LAUNCH   ? "router, gate and alignment in one launch"
	              : p->chain == KM_CHAIN_GATE_ALIGN ? "router; then gate and alignment in one launch"
	                                                : "router; gate; alignment");
}
