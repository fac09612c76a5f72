/*
 * Dense linear layers for few rows: y = x Wᵀ, bf16 weights, f32 sums, at the latency of a launch.
 *
 * ROOFLINE
 *   2 bytes a weight. A K2.5 layer on one of eight GPUs (TP8) has 61 MB of dense weights: q_a and kv_a
 *   30.3 MB (9.8 us at H100's 3.10 TB/s, 6.7 at H200's 4.50), q_b 4.7 (1.5, 1.0), o 14.7 (4.7, 3.3),
 *   shared gate and up 7.3 (2.4, 1.6), with the router 12.8 (4.1, 2.9), down 3.7 (1.2, 0.8); its share of the
 *   head 294 MB (95, 65). Between them stand norms and an attention that move nothing and wait for each other.
 *
 * LADDER
 *   general, stream  linear.cu
 *   slab             here. us a call at one row on H100, launches overlapping, weights cold; in brackets
 *                    what the norm or SiLU and the stream form take one after the other:
 *                    norm, q_a and kv_a  11.4 (20.1)    share of 3.1 TB/s: 0.85
 *                    norm, q_b (TP8)      3.8 (7.0)                        0.40
 *                    o (TP8)              6.3 (8.9)                        0.75
 *                    norm, gate, up (TP8) 6.1 (14.9)                       0.39
 *                    silu, down (TP8)     3.2 (5.2)                        0.38
 *                    All of a layer but router and experts, 1,024 cached tokens: 79 to 41, of which
 *                    mla_cluster.cu 3. What is missing: from launch to launch 1 us, and in each the
 *                    chain of x, its norm, products and sums, 1 to 2.
 *                    H200 (75c62a5, bench_gpu_layer; in brackets 05824a9, with 1,056 cached tokens: all weights asked
 *                    for as fast as they can be, two 16-byte reads of shared memory for what ldmatrix reads now):
 *                    norm, q_a and kv_a   8.7 (9.2)     share of 4.5 TB/s: 0.78
 *                    norm, q_b (TP8)      3.0 (3.0)                        0.35
 *                    o (TP8)              5.9 (4.9), which alone keeps a pace in vain; 4.6 behind attention
 *                    norm, gate, up and router (TP8) 5.6 (7.4)             0.51
 *                    silu, down (TP8)     3.0 (3.0)                        0.28
 *                    head's share (TP8)  67.5 (67.2)                       0.97
 *                    All of a layer but the experts, 1,024 cached tokens, the router's product joined and
 *                    its gate beside down: 35.2 (b3cd804: 37.7); with 1,056, a commit before, 4 rows 44.6 (48.4), 8 rows
 *                    64.1 (62.6: of q_b's norm 3 rows at a time, not 8).
 *
 * A block has a slab of consecutive rows, which one lane asks the copy engine for as soon as the block
 * begins: it waits for no predecessor, so where launches overlap the weights arrive while earlier
 * kernels still work, as far as shared memory goes. Eight warps wait for the predecessor, put x into
 * shared memory, and multiply on tensor cores as the stages come in. A block has one slab or several in
 * turn; a slab is cut into stages of whole steps of 512 columns, a stage into boxes of a tensor map: asked
 * for row by row, at a hundred cycles a copy, 16 rows came no faster than memory delivers.
 *
 * What a launch waits for in the end are small loads, of x, of a context's length and pages, each for the one
 * before; and each takes three times as long while memory works off a queue of weights (TRIED 57). So weights
 * that fit come at a pace, some four fifths of memory's, until x is made; of those that do not fit only so
 * many are on their way as keep memory busy; and the successor begins, and asks for its own, when this launch
 * has asked for what it has room for. Registers are 72 a thread, so that neighbours fit a multiprocessor together.
 *
 * In a stage, line (block of 64 columns, row) has 128 bytes, eight pieces of 16, piece p at p ^ line % 8: the same
 * piece of eight rows is in eight places, whatever the number of rows, and ldmatrix reads each bank once.
 *
 * RULES
 *   Order of a sum: a step is 8 blocks of 64 columns, each 4 parts of 16; part i of a step's block b by rising
 *   step; then the parts as
 *   (0 + 1) + (2 + 3), then block b with b + 4, b + 2, b + 1. It does not depend on the cut into slabs and
 *   stages, nor on the rows. The norm's order is norm.cu's.
 */
#include <climits>

#include "dense.h"
#include "launch.cuh"
#include "tensor_map.cuh"
#include "turn.cuh"
#include "weight.cuh"

enum {
	STEP = 512,
	LINE = 64, /* columns: 128 bytes, the widest that a box swizzles */
	LINE_BYTES = LINE * 2,
	MOST_LINES = 256, /* of a box */
	WARPS = 8,
	CONSUMERS = 32 * WARPS,
	THREADS = CONSUMERS + 32,
	MOST_TOKENS = 8,
	MOST_GROUPS = 2, /* of 16 rows, in a slab */
	MOST_STAGES = 16,
	/* shared memory: barriers, two buffers of the warps' sums (slab_cut.parts_bytes each), x, stages */
	AT_FULL = 0,
	AT_EMPTY = AT_FULL + 8 * MOST_STAGES,
	AT_MADE = AT_EMPTY + 8 * MOST_STAGES, /* x is made */
	AT_PARTS = AT_MADE + 16,
	PART_PITCH = 20, /* 16 rows; tokens in other banks */
	MOST_BYTES = 226 << 10,
	PACED_BYTES = 140 << 10, /* weights of a block, up to which they come at a pace */
	PACE = 14,               /* bytes a cycle and multiprocessor: at 1.98 GHz four fifths of an H200's memory */
	BOX_BYTES = 8 << 10,     /* at a time, then */
	WINDOW_BYTES = 64 << 10, /* of more than there is room for: on their way to a multiprocessor at a time */
	NORM_THREADS = 512, /* norm.cu's */
	ATTENTION_BLOCKS = 16, /* which leave no room beside them: mla_cluster.cu's */
	NORM_SHORT = 4 * NORM_THREADS,
	NORM_LONG = 4 * NORM_SHORT,
};

static_assert(MOST_GROUPS * 16 <= 32 && MOST_TOKENS <= WARPS, "a lane a row, a warp a token");

/* A norm of one long row leaves registers to the next launch's blocks, which a norm of several needs. */
enum slab_form { FORM_GIVEN, FORM_NORM, FORM_NORM_LONG, FORM_NORM_ROWS, FORM_SILU };

/* How the work is cut; the same for every block. */
struct slab_cut {
	int rows, slabs, end[KK_LINEAR_WEIGHTS]; /* of a slab; of them, up to each weight's last */
	int columns;                             /* of a stage */
	int stages, stage_bytes, parts_bytes, at_x, x_pitch, at_stages;
	int window;    /* stages on their way at a time */
	int box, pace; /* lines of a box; cycles from one to the next until x is made, 0: no wait */
};

struct slab_run {
	kk_linear_slab_args a;
	slab_cut cut;
	CUtensorMap map[KK_LINEAR_WEIGHTS];
};

/* One slab: its weight, first row, rows. */
struct slab {
	int weight, first, rows;
};

__device__ __forceinline__ slab find_slab(const slab_run &r, int i)
{
	slab s;

	s.weight = (i >= r.cut.end[0]) + (i >= r.cut.end[1]);
	s.first = (i - (s.weight ? r.cut.end[s.weight - 1] : 0)) * r.cut.rows;
	s.rows = min(r.cut.rows, r.a.linear.w[s.weight].rows - s.first);
	return s;
}

/* Which stage comes next, and the parity that its barrier then waits for. */
struct slab_ring {
	int at, parity;

	__device__ __forceinline__ void next(int size)
	{
		if (++at == size)
			at = 0, parity ^= 1;
	}
};

struct slab_fetch {
	uint32_t smem, next; /* when the next box is asked for */
	uint64_t policy;
};

/* Until x is made, others still work: what they wait for is then quick to come. */
__device__ __forceinline__ void keep_pace(const slab_run &r, slab_fetch &f)
{
	if (!r.cut.pace)
		return;
	while ((int)(clock() - f.next) < 0 && !ptx_mbarrier_is_over(f.smem + AT_MADE, 0))
		;
	f.next += r.cut.pace;
}

/* A stage's boxes, from column c on. */
__device__ __forceinline__ void fetch_stage(const slab_run &r, slab_fetch &f, const slab &s, int c, int stage)
{
	uint32_t to = f.smem + r.cut.at_stages + stage * r.cut.stage_bytes, full = f.smem + AT_FULL + 8 * stage;

	ptx_mbarrier_expect(full, r.cut.rows * r.cut.columns * 2);
	for (int line = 0; line < r.cut.columns / LINE; line += r.cut.box) {
		keep_pace(r, f);
		ptx_copy_box(to + line * r.cut.rows * LINE_BYTES, &r.map[s.weight], make_int4(0, s.first, c / LINE + line, 0),
		             full, f.policy);
	}
}

/* The lane that fetches: every stage of every slab of this block, as room comes free. The next launch may begin
 * when all that there is room for is asked for. */
__device__ __forceinline__ void fetch_slabs(const slab_run &r, uint32_t smem)
{
	int cols = r.a.linear.w[0].cols, asked = 0;
	slab_fetch f = {smem, (uint32_t)clock(), ptx_policy_drop()};
	slab_ring ring = {0, 1}, come = {0, 0};

	for (int i = (int)blockIdx.x; i < r.cut.slabs; i += (int)gridDim.x) {
		slab s = find_slab(r, i);

		for (int c = 0; c < cols; c += r.cut.columns, ring.next(r.cut.stages)) {
			if (asked >= r.cut.window) {
				ptx_mbarrier_wait(smem + AT_FULL + 8 * come.at, come.parity);
				come.next(r.cut.stages);
			}
			ptx_mbarrier_wait(smem + AT_EMPTY + 8 * ring.at, ring.parity);
			fetch_stage(r, f, s, c, ring.at);
			if (++asked == r.cut.stages)
				turn_begin(r.a.turn);
		}
	}
	if (asked < r.cut.stages)
		turn_begin(r.a.turn);
}

__device__ __forceinline__ uint32_t pack(float lo, float hi)
{
	__nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);

	return *(uint32_t *)&v;
}

/* All pieces on their way at once. */
__device__ __forceinline__ void give_x(const slab_run &r, char *x, int thread)
{
	int pieces = r.a.linear.w[0].cols / 8;

	for (int t = 0; t < r.a.linear.tokens; t++) {
		const char *from = (const char *)r.a.linear.x + (size_t)t * r.a.linear.x_stride * 2;
		uint32_t to = ptx_shared_address(x + t * r.cut.x_pitch);

		for (int i = thread; i < pieces; i += CONSUMERS)
			ptx_copy_async(to + i * 16, from + i * 16);
	}
	ptx_copy_wait_all();
}

__device__ __forceinline__ float silu_times(float g, float up)
{
	return g / (1.0f + expf(-g)) * up;
}

/* A warp's token, when there are as many as warps; FOURS of a lane's on their way at once. */
__device__ __forceinline__ void silu_x(const slab_run &r, char *x, int thread)
{
	constexpr int FOURS = 4;
	int fours = r.a.linear.w[0].cols / 4, warps = WARPS / r.a.linear.tokens;
	int t = thread / 32 / warps, first = thread - t * warps * 32, hop = warps * 32;

	if (t >= r.a.linear.tokens)
		return;
	const float4 *gate = (const float4 *)(r.a.a + (size_t)t * r.a.a_stride);
	const float4 *up = (const float4 *)(r.a.b + (size_t)t * fours * 4);
	for (int i = first; i < fours; i += FOURS * hop) {
		float4 g[FOURS], u[FOURS];

#pragma unroll
		for (int k = 0; k < FOURS; k++)
			if (i + k * hop < fours)
				g[k] = __ldcg(gate + i + k * hop), u[k] = __ldcg(up + i + k * hop);
#pragma unroll
		for (int k = 0; k < FOURS; k++)
			if (i + k * hop < fours)
				*(uint2 *)(x + t * r.cut.x_pitch + (i + k * hop) * 8) = make_uint2(
					pack(silu_times(g[k].x, u[k].x), silu_times(g[k].y, u[k].y)),
					pack(silu_times(g[k].z, u[k].z), silu_times(g[k].w, u[k].w)));
	}
}

/*
 * norm.cu's order has up to 512 threads, a warp's sum each: a thread here is two of them, CONSUMERS
 * apart. KEPT fours each hold a row.
 */
template <int KEPT> struct norm_fours {
	float4 v[2][KEPT];
};

template <int KEPT>
__device__ __forceinline__ void load_fours(norm_fours<KEPT> &f, const float *from, int size,
                                           int threads, int thread)
{
#pragma unroll
	for (int h = 0; h < 2; h++)
#pragma unroll
		for (int k = 0; k < KEPT; k++) {
			int place = thread + h * CONSUMERS, i = (k * threads + place) * 4;

			f.v[h][k] = place < threads && i < size ? __ldcg((const float4 *)(from + i))
			                                        : make_float4(0, 0, 0, 0);
		}
}

__device__ __forceinline__ float add_squares(float sum, float4 v)
{
	sum = __fmaf_rn(v.x, v.x, sum);
	sum = __fmaf_rn(v.y, v.y, sum);
	sum = __fmaf_rn(v.z, v.z, sum);
	return __fmaf_rn(v.w, v.w, sum);
}

/* A warp's share of a row's sum of squares: two of norm.cu's warps'. */
template <int KEPT>
__device__ __forceinline__ void sum_fours(const norm_fours<KEPT> &f, float *sums, int thread)
{
#pragma unroll
	for (int h = 0; h < 2; h++) {
		float sum = 0.0f;

#pragma unroll
		for (int k = 0; k < KEPT; k++)
			sum = add_squares(sum, f.v[h][k]);
		sum = sum_lanes(sum);
		if (thread % 32 == 0)
			sums[h * WARPS + thread / 32] = sum;
	}
}

/* sums: of all of norm.cu's warps, zeros for those that a short row has not */
template <int KEPT>
__device__ __forceinline__ void scale_fours(const norm_fours<KEPT> &f, const norm_fours<KEPT> &w,
                                            const float *sums, float eps, int size, int threads, char *x,
                                            int thread)
{
	float all = 0.0f;

#pragma unroll
	for (int i = 0; i < 2 * WARPS; i++)
		all += sums[i];
	float factor = 1.0f / sqrtf(all / (float)size + eps);
#pragma unroll
	for (int h = 0; h < 2; h++)
#pragma unroll
		for (int k = 0; k < KEPT; k++) {
			int place = thread + h * CONSUMERS, i = (k * threads + place) * 4;
			float4 v = f.v[h][k], n = w.v[h][k];

			if (place < threads && i < size)
				*(uint2 *)(x + i * 2) =
					make_uint2(pack(v.x * factor * n.x, v.y * factor * n.y),
				                   pack(v.z * factor * n.z, v.w * factor * n.w));
		}
}

/* ROWS rows from `first` on, all on their way at once. */
template <int KEPT, int ROWS>
__device__ __forceinline__ void norm_rows(const slab_run &r, const norm_fours<KEPT> &w, int first, int threads,
                                          char *smem, int thread)
{
	int size = r.a.linear.w[0].cols, rows = r.a.linear.tokens - first;
	float *sums = (float *)(smem + AT_PARTS) + first * 2 * WARPS;
	norm_fours<KEPT> kept[ROWS];

#pragma unroll
	for (int t = 0; t < ROWS; t++)
		if (t < rows)
			load_fours(kept[t], r.a.a + (size_t)(first + t) * r.a.a_stride, size, threads, thread);
#pragma unroll
	for (int t = 0; t < ROWS; t++)
		if (t < rows)
			sum_fours(kept[t], sums + t * 2 * WARPS, thread);
	ptx_barrier_some(1, CONSUMERS); /* the warps' sums are written */
#pragma unroll
	for (int t = 0; t < ROWS; t++)
		if (t < rows)
			scale_fours(kept[t], w, sums + t * 2 * WARPS, r.a.eps, size, threads,
			            smem + r.cut.at_x + (first + t) * r.cut.x_pitch, thread);
}

template <int KEPT, int ROWS>
__device__ __forceinline__ void norm_x(const slab_run &r, char *smem, int thread)
{
	int size = r.a.linear.w[0].cols;
	int threads = min((int)NORM_THREADS, ((size + 3) / 4 + 31) / 32 * 32);
	norm_fours<KEPT> w;

	load_fours(w, r.a.b, size, threads, thread);
	turn_wait(r.a.turn);
	if (r.a.linear.tokens == 1) {
		norm_rows<KEPT, 1>(r, w, 0, threads, smem, thread);
	} else if constexpr (ROWS > 1) {
#pragma unroll 1
		for (int t = 0; t < r.a.linear.tokens; t += ROWS)
			norm_rows<KEPT, ROWS>(r, w, t, threads, smem, thread);
	}
}

/* The x that was made, a share by each block. */
__device__ __forceinline__ void put_x(const slab_run &r, const char *x, int thread)
{
	int pieces = r.a.linear.w[0].cols / 8;

	for (int i = (int)blockIdx.x * CONSUMERS + thread; i < r.a.linear.tokens * pieces;
	     i += (int)gridDim.x * CONSUMERS) {
		int t = i / pieces, piece = i - t * pieces;

		((uint4 *)r.a.x_out)[i] = *(const uint4 *)(x + t * r.cut.x_pitch + piece * 16);
	}
}

template <int FORM>
__device__ __forceinline__ void make_x(const slab_run &r, char *smem, int thread)
{
	char *x = smem + r.cut.at_x;

	if constexpr (FORM == FORM_NORM) {
		norm_x<1, 3>(r, smem, thread);
	} else if constexpr (FORM == FORM_NORM_LONG || FORM == FORM_NORM_ROWS) {
		norm_x<4, FORM == FORM_NORM_LONG ? 1 : 2>(r, smem, thread);
	} else {
		turn_wait(r.a.turn);
		if constexpr (FORM == FORM_SILU)
			silu_x(r, x, thread);
		else
			give_x(r, x, thread);
	}
	ptx_barrier_some(1, CONSUMERS); /* x is written */
	if (thread == 0)
		ptx_mbarrier_arrive(ptx_shared_address(smem + AT_MADE));
	if (FORM != FORM_GIVEN && r.a.x_out)
		put_x(r, x, thread);
}

/* A warp's sums of GROUPS times 16 rows and 8 tokens: of its line of a step, each in four parts. */
template <int GROUPS> struct slab_sums {
	float d[GROUPS][4][4];
};

/* Where a lane's row of the matrices lies in a stage, in bytes: lane 8 m + i has row i of matrix m, which are rows
 * 0 .. 7 and 8 .. 15 of columns 0 .. 7, then of 8 .. 15. */
template <int GROUPS> struct slab_rows {
	uint32_t at[GROUPS];
};

/* A group of fewer rows reads its last one again. */
template <int GROUPS>
__device__ __forceinline__ slab_rows<GROUPS> find_rows(int rows, int warp, int lane)
{
	slab_rows<GROUPS> r;

#pragma unroll
	for (int g = 0; g < GROUPS; g++) {
		int line = warp * rows + min(g * 16 + lane % 16, rows - 1);

		r.at[g] = line * LINE_BYTES + (lane / 16 ^ line % 8) * 16;
		ptx_hold(r.at[g]); /* here, and not when x is there */
	}
	return r;
}

/* `steps` of a stage. w: the stage. x: this lane's token and piece, of the warp's line. hop: bytes of a step in the
 * stage, a multiple of 1,024, so that a line's swizzle is the same in every step. */
template <int GROUPS>
__device__ __forceinline__ void multiply_stage(slab_sums<GROUPS> &sum, const slab_rows<GROUPS> &rows, uint32_t w,
                                               uint32_t hop, uint32_t x, int steps)
{
#pragma unroll(3 - GROUPS)
	for (; steps > 0; steps--, w += hop, x += STEP * 2) {
		uint32_t v[2][4];

#pragma unroll
		for (int h = 0; h < 2; h++)
			ptx_load_matrices(v[h], x + h * 64);
#pragma unroll
		for (int g = 0; g < GROUPS; g++) {
			uint32_t a[4][4];

#pragma unroll
			for (int i = 0; i < 4; i++)
				ptx_load_matrices(a[i], (w + rows.at[g]) ^ i * 32);
#pragma unroll
			for (int i = 0; i < 4; i++)
				ptx_mma_bf16(sum.d[g][i], a[i][0], a[i][1], a[i][2], a[i][3], v[i / 2][i % 2 * 2],
				             v[i / 2][i % 2 * 2 + 1]);
		}
	}
}

__device__ __forceinline__ float join_parts(const float (&d)[4][4], int i)
{
	return (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
}

/* A result's place: a warp has a token, a lane a row of the slab. */
struct slab_place {
	bool mine;
	size_t at;
	float before; /* what the product is added to; on its way while the slab is multiplied */
};

__device__ __forceinline__ slab_place find_place(const kk_linear_args &a, const slab &s, int warp, int lane)
{
	slab_place p = {warp < a.tokens && lane < s.rows,
	                (size_t)warp * a.y_stride[s.weight] + s.first + lane, 0.0f};

	if (p.mine && a.accumulate)
		p.before = __ldcg((const float *)a.y[s.weight] + p.at);
	return p;
}

/* parts: [WARPS][GROUPS][tokens][16 rows and room] */
template <int GROUPS>
__device__ __forceinline__ void put_parts(const slab_sums<GROUPS> &sum, float *parts, int tokens, int warp, int lane)
{
#pragma unroll
	for (int g = 0; g < GROUPS; g++)
#pragma unroll
		for (int k = 0; k < 4; k++) {
			int t = lane % 4 * 2 + k % 2;

			if (t < tokens)
				parts[((warp * GROUPS + g) * tokens + t) * PART_PITCH + lane / 4 + k / 2 * 8] =
					join_parts(sum.d[g], k);
		}
}

template <int GROUPS>
__device__ __forceinline__ void store_slab(const kk_linear_args &a, const slab &s, const slab_place &to,
                                           const float *parts, int warp, int lane)
{
	const float *p = parts + (lane / 16 * a.tokens + warp) * PART_PITCH + lane % 16;
	int next = GROUPS * a.tokens * PART_PITCH;
	float q[4], v;

	if (!to.mine)
		return;
#pragma unroll
	for (int k = 0; k < 4; k++)
		q[k] = p[k * next] + p[(k + 4) * next];
	v = (q[0] + q[2]) + (q[1] + q[3]);
	if (a.y_bf16)
		((__nv_bfloat16 *)a.y[s.weight])[to.at] = __float2bfloat16(v);
	else
		((float *)a.y[s.weight])[to.at] = a.accumulate ? to.before + v : v;
}

template <int GROUPS>
__device__ __forceinline__ void multiply_slabs(const slab_run &r, const slab_rows<GROUPS> &rows, char *smem,
                                               uint32_t address, int thread)
{
	int warp = thread / 32, lane = thread % 32, cols = r.a.linear.w[0].cols, tokens = r.a.linear.tokens, turn = 0;
	int own = (cols / LINE - warp + WARPS - 1) / WARPS; /* steps of a row in which the warp has a line */
	int each = (r.cut.columns + STEP - 1) / STEP;
	slab_ring ring = {0, 0};
	uint32_t stages = address + r.cut.at_stages, stage_bytes = r.cut.stage_bytes, hop = r.cut.rows * STEP * 2;
	uint32_t x = address + r.cut.at_x + min(lane % 8, tokens - 1) * r.cut.x_pitch + warp * LINE_BYTES +
	             lane / 8 * 16;

	for (int i = (int)blockIdx.x; i < r.cut.slabs; i += (int)gridDim.x, turn ^= 1) {
		slab s = find_slab(r, i);
		slab_place to = find_place(r.a.linear, s, warp, lane);
		float *parts = (float *)(smem + AT_PARTS + turn * r.cut.parts_bytes);
		slab_sums<GROUPS> sum = {};

		for (int c = 0, left = own; c < cols; c += r.cut.columns, left -= each, ring.next(r.cut.stages)) {
			ptx_mbarrier_wait(address + AT_FULL + 8 * ring.at, ring.parity);
			multiply_stage<GROUPS>(sum, rows, stages + ring.at * stage_bytes, hop, x + c * 2, min(left, each));
			__syncwarp(); /* the warp has read the stage */
			if (lane == 0)
				ptx_mbarrier_arrive(address + AT_EMPTY + 8 * ring.at);
		}
		put_parts<GROUPS>(sum, parts, tokens, warp, lane);
		ptx_barrier_some(1, CONSUMERS); /* the parts are written; those of two slabs ago were read */
		store_slab<GROUPS>(r.a.linear, s, to, parts, warp, lane);
	}
}

/*
 * Registers for three blocks a multiprocessor, so that neighbours in a stream are there together; a long norm
 * takes those of one or two.
 */
template <int GROUPS, int FORM>
__global__ void __launch_bounds__(THREADS, FORM == FORM_NORM_ROWS                                      ? 1
                                           : FORM == FORM_NORM_LONG || (FORM == FORM_NORM && GROUPS == 2) ? 2
                                                                                                          : 3)
linear_slab(const __grid_constant__ slab_run r)
{
	extern __shared__ __align__(1024) char smem[];
	uint32_t address = ptx_shared_address(smem);
	int thread = (int)threadIdx.x;

	if (thread == CONSUMERS) {
		ptx_mbarrier_init(address + AT_MADE, 1);
		for (int i = 0; i < r.a.linear.weights; i++)
			ptx_prefetch_map(&r.map[i]);
		for (int i = 0; i < r.cut.stages; i++) {
			ptx_mbarrier_init(address + AT_FULL + 8 * i, 1);
			ptx_mbarrier_init(address + AT_EMPTY + 8 * i, WARPS);
		}
		ptx_mbarrier_init_done();
	}
	__syncthreads(); /* the barriers are begun */
	if (thread >= CONSUMERS) {
		if (thread == CONSUMERS)
			fetch_slabs(r, address);
		return;
	}
	slab_rows<GROUPS> rows = find_rows<GROUPS>(r.cut.rows, thread / 32, thread % 32);
	make_x<FORM>(r, smem, thread);
	multiply_slabs<GROUPS>(r, rows, smem, address, thread);
}

static int x_pitch_of(int cols)
{
	return cols * 2 + 16; /* neighbouring tokens in other banks */
}

bool kk_linear_slab_fits(const km_weight *w, int tokens, enum kk_x_from from)
{
	return w->type == KM_W_BF16 && w->cols % LINE == 0 && tokens <= MOST_TOKENS &&
	       tokens * x_pitch_of(w->cols) <= 136 << 10 &&
	       (from != KK_X_NORM || w->cols <= NORM_LONG);
}

static int ceil_div(int a, int b)
{
	return (a + b - 1) / b;
}

/* Each weight's rows in slabs of `rows`; how many slabs there are. */
static int count_slabs(const kk_linear_args *l, int rows, int (&end)[KK_LINEAR_WEIGHTS])
{
	int slabs = 0;

	for (int i = 0; i < KK_LINEAR_WEIGHTS; i++)
		end[i] = slabs += i < l->weights ? ceil_div(l->w[i].rows, rows) : 0;
	return slabs;
}

/* Slabs of up to `most` rows such that the block with the most turns has the fewest rows; a turn counts
 * as a row more. */
static void cut_rows(slab_cut *c, const kk_linear_args *l, int blocks, int most)
{
	int least = INT_MAX;

	for (int rows = most; rows > 0; rows--) {
		int cost = ceil_div(count_slabs(l, rows, c->end), blocks) * (rows + 1);

		if (cost < least)
			least = cost, c->rows = rows;
	}
	c->slabs = count_slabs(l, c->rows, c->end);
}

/* stage_bytes 0: two steps, or one of more than 16 rows: 32 kB at most. */
static void cut_columns(slab_cut *c, int cols, int stage_bytes)
{
	int steps = stage_bytes ? stage_bytes / (c->rows * STEP * 2) : c->rows > 16 ? 1 : 2;

	c->columns = (steps < 1 ? 1 : steps) * STEP;
	c->columns = c->columns > MOST_LINES * LINE ? MOST_LINES * LINE : c->columns;
	c->columns = c->columns > cols ? cols : c->columns;
	c->stage_bytes = (c->rows * c->columns * 2 + 1023) / 1024 * 1024;
}

/* As many stages as `room` holds, and are of use. */
static void cut_stages(slab_cut *c, const kk_linear_args *l, int useful, int each, int room)
{
	c->parts_bytes = WARPS * (c->rows > 16 ? 2 : 1) * l->tokens * PART_PITCH * 4;
	c->at_x = AT_PARTS + 2 * c->parts_bytes;
	c->x_pitch = x_pitch_of(l->w[0].cols);
	c->at_stages = (c->at_x + l->tokens * c->x_pitch + 1023) / 1024 * 1024;
	c->stages = (room - c->at_stages) / c->stage_bytes;
	c->stages = c->stages > useful ? useful : c->stages;
	c->stages = c->stages > MOST_STAGES ? (int)MOST_STAGES : c->stages < 1 ? 1 : c->stages;
	c->window = c->stages < useful ? WINDOW_BYTES / each / c->stage_bytes : c->stages;
	c->window = c->window < 1 ? 1 : c->window;
}

/* How weights come while others work. */
static void cut_boxes(slab_cut *c, int useful, int each)
{
	int line = c->rows * LINE_BYTES;

	c->box = c->columns / LINE;
	while (c->box % 2 == 0 && c->box * line > BOX_BYTES)
		c->box /= 2;
	c->pace = useful * c->stage_bytes < PACED_BYTES ? c->box * line * each / PACE : 0;
}

/* Of one block a multiprocessor: all of it where a block has several turns, else what leaves the next launch room
 * for a block, and yet holds several stages, whatever x takes. Room for two of q_b's would leave mla_cluster.cu's
 * none (TRIED 58). */
static int room_of_one(bool several, int x_bytes)
{
	int room = x_bytes + (108 << 10);

	room = room < 160 << 10 ? 160 << 10 : room;
	return several || room > MOST_BYTES ? (int)MOST_BYTES : room;
}

/* One block a multiprocessor where each makes a norm or x is long, since each makes all of x; else two. */
static void cut_slabs(slab_run *r, int *blocks)
{
	const kk_linear_slab_args *a = &r->a;
	const kk_linear_args *l = &a->linear;
	int cols = l->w[0].cols, each = a->from == KK_X_NORM || cols >= 4096 ? 1 : 2, room = a->smem_bytes, useful;

	each = a->blocks_per_sm ? a->blocks_per_sm : each;
	*blocks = each * (a->multiprocessors - (each > 1 ? ATTENTION_BLOCKS : 0));
	cut_rows(&r->cut, l, *blocks, a->rows ? a->rows : MOST_GROUPS * 16);
	cut_columns(&r->cut, cols, a->stage_bytes);
	if (!room)
		room = each > 1 ? 110 << 10 : room_of_one(r->cut.slabs > *blocks, l->tokens * x_pitch_of(cols));
	useful = ceil_div(r->cut.slabs, *blocks) * ceil_div(cols, r->cut.columns);
	cut_stages(&r->cut, l, useful, each, room);
	cut_boxes(&r->cut, useful, each);
}

/* [rows, cols] as [lines of a row, rows, columns of a line]: a stage is some boxes, one behind the other. */
static cudaError_t map_weight(CUtensorMap *map, const km_weight *w, const slab_cut *c)
{
	cuuint64_t row = (cuuint64_t)w->cols * 2, rows = (cuuint64_t)w->rows;
	tensor_shape t = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, 4, w->data,
	                  {LINE, rows, (cuuint64_t)w->cols / LINE, 1},
	                  {row, LINE_BYTES, row * rows},
	                  {LINE, (cuuint32_t)c->rows, (cuuint32_t)c->box, 1}};

	return make_tensor_map(map, t);
}

template <int GROUPS>
static cudaError_t launch_slab(const slab_run *r, int blocks, cudaStream_t stream)
{
	bool is_long = r->a.linear.w[0].cols > NORM_SHORT;
	void (*kernel)(slab_run) = r->a.from == KK_X_SILU    ? linear_slab<GROUPS, FORM_SILU>
	                           : r->a.from == KK_X_GIVEN ? linear_slab<GROUPS, FORM_GIVEN>
	                           : !is_long                ? linear_slab<GROUPS, FORM_NORM>
	                           : r->a.linear.tokens == 1 ? linear_slab<GROUPS, FORM_NORM_LONG>
	                                                     : linear_slab<GROUPS, FORM_NORM_ROWS>;
	size_t bytes = (size_t)r->cut.at_stages + (size_t)r->cut.stages * r->cut.stage_bytes;
	cudaLaunchAttribute attribute = {};
	cudaLaunchConfig_t config = {};
	cudaError_t rc;

	if (bytes > MOST_BYTES)
		return cudaErrorInvalidValue;
	rc = allow_shared(kernel, MOST_BYTES);
	if (rc != cudaSuccess)
		return rc;
	config.gridDim = dim3(r->cut.slabs < blocks ? r->cut.slabs : blocks);
	config.blockDim = dim3(THREADS);
	config.dynamicSmemBytes = bytes;
	config.stream = stream;
	attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
	attribute.val.programmaticStreamSerializationAllowed = 1;
	config.attrs = &attribute;
	config.numAttrs = r->a.linear.pdl;
	return cudaLaunchKernelEx(&config, kernel, *r);
}

cudaError_t kk_linear_slab(const kk_linear_slab_args *a, cudaStream_t stream)
{
	const kk_linear_args *l = &a->linear;
	slab_run r = {*a, {}, {}};
	int blocks;

	if (a->rows < 0 || a->rows > MOST_GROUPS * 16 || a->turn == KM_TURN_BESIDE || l->weights < 1 ||
	    l->weights > KK_LINEAR_WEIGHTS || (l->y_bf16 && l->accumulate) || l->tokens < 1 ||
	    (a->from == KK_X_GIVEN && l->x_stride % 8) || a->multiprocessors < 1)
		return cudaErrorInvalidValue;
	for (int i = 0; i < l->weights; i++)
		if (!kk_linear_slab_fits(&l->w[i], l->tokens, a->from) ||
		    l->w[i].cols != l->w[0].cols)
			return cudaErrorInvalidValue;
	cut_slabs(&r, &blocks);
	for (int i = 0; i < l->weights; i++) {
		cudaError_t rc = map_weight(&r.map[i], &l->w[i], &r.cut);

		if (rc != cudaSuccess)
			return rc;
	}
	return r.cut.rows > 16 ? launch_slab<2>(&r, blocks, stream) : launch_slab<1>(&r, blocks, stream);
}
