/*
 * The int4 experts: from routed ids to the summed output in one launch.
 *
 * ROOFLINE
 *   Bytes: each expert that any token names is read once, 3 H I (1/2 + 2/G) = 0.5625 * 3 H I at groups
 *   of 32; Kimi K2.5 at TP8 (H = 7168, I = 256): 3.1 MB an expert, 24.8 MB and 8.0 us for one token at
 *   H100's 3.10 TB/s (5.5 at the 4.5 that an H200 reads); 60 experts and 60 us at 8 tokens, all 384 and 384 us from 256
 *   tokens on. Flops: 6 M top_k H I; bound by memory up to some 3,400 tokens (moe_prefill.cu).
 *   Between the bytes: the ids must be read before the first weight can be asked for, and all of an
 *   expert's silu(gate) * up must be there before its down projection begins: two trips through L2 and
 *   a barrier of the whole grid. The weights of the down projection do not wait for it.
 *
 * LADDER (us, TP8, 384 experts, top 8)
 *   general  moe_general.cu: a warp a row, CUDA cores; any weights, any shape
 *   grouped  below; a tile of places of one expert, 8 to 64. H200 at 16 / 32 / 64 / 128 tokens: 97 / 189 / 232 /
 *            310 (floor at 4.5 TB/s 76 / 131 / 196 / 247), TP1 from 2 to 128: 106 / 200 / 422 / 730 / 1,232 / 1,882 /
 *            2,547 (87 / 170 / 328 / 607 / 1,043 / 1,562 / 1,971). H100, before 40 and 41 of TRIED: 147 / 242 / 344 /
 *            437; TP1 159 / 300 / 545 / 992 / 1,670 / 2,478 / 3,128 (floor at 3.1 TB/s 126 to 2,862)
 *   decode   below; the down projection takes all experts at once and sums on chip; up to 64 places. H200 at 1 / 2 /
 *            4 / 8: 14.3 / 20.9 / 32.9 / 57.8 (floor 5.5 / 11 / 21 / 41; before 60 and 61 of TRIED 15.5 / 22.5 / 34.8 /
 *            59.8); TP1 58 at 1. H100, before 40 and 41: 19.4 / 27.7 / 44.3 / 79.6; TP1 76.4. TRIED 35, 36, 60, 61.
 *   front    moe_front.cuh: up to 4 tokens the gate and the shared experts' down are part of the launch, which in a
 *            layer is two launches less: 1.1 us at one token. TRIED 62.
 *   prefill  moe_prefill.cu: warp-group matrix instructions, from 256 tokens. H200 at 256 / 512 / 1,024 / 2,048 /
 *            4,096: 417 / 412 / 476 / 650 / 966 (floor by bytes 264), TP1 2,800 / 3,226 / 3,388 / 4,628 / 6,372
 *            (2,114). H100, before 43 of TRIED: 510 / 520 / 587 / 730 / 1,063; TP1 3,552 / 3,624 / 4,018 / 4,598 /
 *            6,603. TRIED 26, 29-34, 43-46.
 *   H200's, and H100's up to 128 tokens, are those of configs/bench/moe-tp*.json, the H100's beside the best rivals';
 *   how far the H200's repeat is in that folder's README. TRIED has what is not here.
 *
 * HOW
 *   One block a multiprocessor; a warp fetches weights, a warp fetches activations, 8 or 16 multiply.
 *   Weights come as whole records through a ring in shared memory, a stage as one box of a tensor map, in
 *   the order in which this block will need them, gate-and-up first, then down: the ring does not know of
 *   the barrier between them, so while the grid gathers there, memory works on. Weights are operand A of
 *   mma.m16n8k16 (a lane's words are its operands; no shuffle), the tile's tokens the eight columns of B. A
 *   code becomes bf16 exactly, by a mask and a multiply-add, or at eight tokens by a mask alone: a subnormal
 *   number, its bias taken away by a matrix product that the rows share, the activations times 2^64. The
 *   scales multiply f32 sums of 32 columns, so no weight is ever rounded.
 *   In the decode form what all wait for is the last block's gate-and-up. So the down projection's weights come behind
 *   it, and an activation says of itself that it is there (direct_acts): a block waits once, for what it needs, instead
 *   of for a counter and then for what was counted. A warp has two row blocks of an expert at a time, whose activations
 *   it reads once, with the sums that take the bias away.
 *
 * RULES
 *   Activations up to 2^62 in size: beyond, 2^64 times them is no longer a bf16, and the results are infinite.
 *   Ids are checked where they are sorted (sort_inside, kk_align). Order of sums: the columns of a warp,
 *   in order; then the warps that share the rows, in order; then a token's places, in the order of k.
 *   It depends on the tile, never on who runs when: which block has which item is arithmetic.
 *   All blocks run at once, because they wait for each other; the counters they wait by go round and need no
 *   clearing, and of the decode form's two sets of activations a launch uses one and clears the other.
 *   A launch by itself is cooperative. One that overlaps (pdl) is one of a stream's: what went before does not wait
 *   for it and ends, what comes after begins when all its blocks have begun, and no block is more than a
 *   multiprocessor holds. So on a device only one stream may have launches with pdl under way.
 */
#include "moe_int4.cuh"

/* Tiles of eight places, WR warps along the rows. */
template <int WR>
static cudaError_t launch_eight(const kk_moe_args *a, cudaStream_t stream)
{
	using shape = tile<8, 2, WR, 16, 1>;

	return a->direct ? launch_tile<shape, true>(a, stream) : launch_tile<shape, false>(a, stream);
}

/* What moe_front.cuh was built for. */
static bool front_fits(const kk_moe_args *a)
{
	return a->direct && a->gate.bias && a->tokens <= FRONT_TOKENS && a->tokens * a->top_k <= WARP_PLACES &&
	       a->experts == FRONT_EXPERTS && a->top_k <= KK_FAST_TOP_K && a->gate.groups <= 1 &&
	       !a->gate.softmax && !a->gate.expert_map && a->gate.tokens == a->tokens && a->gate.experts == a->experts && a->gate.top_k == a->top_k &&
	       a->accumulate && !a->y_bf16 && a->sums_bytes >= sizeof(front_smem) &&
	       (a->hidden / 16 + a->blocks - 1) / a->blocks <= FRONT_BLOCKS;
}

cudaError_t kk_moe_stream(const kk_moe_args *a, cudaStream_t stream)
{
	if (a->stages < 2 || a->stages > MAX_STAGES || a->x_stages < 2 || a->x_stages > MAX_X_STAGES ||
	    a->blocks < 1 || a->blocks > MAX_BLOCKS || a->hidden % RECORD_COLS ||
	    a->intermediate % RECORD_COLS || (a->direct && !a->inside) ||
	    (a->inside && a->tokens * a->top_k > INSIDE_PLACES) ||
	    (a->direct && (a->block_m != 8 || a->tokens * a->top_k > DIRECT_PLACES ||
	                   a->tokens * a->top_k * a->intermediate > DIRECT_VALUES)) ||
	    (a->gate.logits && !front_fits(a)))
		return cudaErrorInvalidValue;
	switch (a->block_m << 16 | a->block_n) {
	case 8 << 16 | 32:
		return launch_eight<1>(a, stream);
	case 8 << 16 | 64:
		return launch_eight<2>(a, stream);
	case 8 << 16 | 128:
		return launch_eight<4>(a, stream);
	case 8 << 16 | 256:
		return launch_eight<8>(a, stream);
	case 8 << 16 | 512:
		return launch_eight<16>(a, stream);
	}
	return moe_stream_large(a, stream);
}
