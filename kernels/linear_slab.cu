/*
 * Dense linear layers for few rows: y = x Wᵀ, bf16 weights, f32 sums, at the latency of a launch.
 *
 * ROOFLINE
 *   2 bytes a weight. A K2.5 layer on one of eight GPUs (TP8) has 61 MB of dense weights: q_a and kv_a
 *   30.3 MB (9.8 us at H100's 3.10 TB/s), q_b 4.7 (1.5), o 14.7 (4.7), shared gate and up 7.3 (2.4), down
 *   3.7 (1.2). Between them stand norms and an attention that move nothing and wait for each other.
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
 *
 * A block has a slab of consecutive rows, which one warp asks the copy engine for as soon as the block
 * begins: it waits for no predecessor, so where launches overlap the weights arrive while earlier
 * kernels still work, as far as shared memory goes. Eight warps wait for the predecessor, put x into
 * shared memory, and multiply on tensor cores as the stages come in. A block has one slab or several in
 * turn; a slab is cut into stages of whole steps of 512 columns, or is one stage and then one copy.
 *
 * RULES
 *   Order of a sum: a step is 32 parts of 16 columns; part i of every step by rising column; then the two
 *   halves of 32 columns, then i with i + 8, i + 4, i + 2, i + 1. It does not depend on the cut into
 *   slabs and stages, nor on the rows. The norm's order is norm.cu's.
 */
#include "dense.h"
#include "launch.cuh"
#include "turn.cuh"
#include "weight.cuh"

enum {
	STEP = 512,
	WARPS = 8,
	CONSUMERS = 32 * WARPS,
	THREADS = CONSUMERS + 32,
	MOST_TOKENS = 8,
	MOST_GROUPS = 2, /* of 16 rows, in a slab */
	MOST_STAGES = 16,
	/* shared memory: barriers, two buffers of the warps' sums, x, stages */
	AT_FULL = 0,
	AT_EMPTY = AT_FULL + 8 * MOST_STAGES,
	AT_PARTS = AT_EMPTY + 8 * MOST_STAGES,
	PARTS_BYTES = WARPS * 16 * MOST_TOKENS * 4,
	AT_X = AT_PARTS + 2 * PARTS_BYTES,
	MOST_BYTES = 226 << 10,
	NORM_THREADS = 512, /* norm.cu's */
	ATTENTION_BLOCKS = 16, /* which leave no room beside them: mla_cluster.cu's */
	NORM_SHORT = 4 * NORM_THREADS,
	NORM_LONG = 4 * NORM_SHORT,
};

static_assert(MOST_GROUPS * 16 <= 32, "a lane a row");

enum slab_form { FORM_GIVEN, FORM_NORM, FORM_NORM_LONG, FORM_SILU };

/* How the work is cut; the same for every block. */
struct slab_cut {
	int rows, slabs, end[KK_LINEAR_WEIGHTS]; /* of a slab; of them, up to each weight's last */
	int columns, pitch;                      /* of a stage; bytes from row to row */
	int stages, stage_bytes, x_pitch, at_stages;
};

struct slab_run {
	kk_linear_slab_args a;
	slab_cut cut;
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

/*
 * A stage's pieces, a row's each. A copy takes its operands from uniform registers, so the lanes of a warp
 * take turns, ten instructions each that wait for one another: a piece should be long.
 */
__device__ __forceinline__ void fetch_stage(const slab_run &r, const slab &s, const char *from, int bytes,
                                            uint32_t to, uint32_t full, int thread, uint64_t policy)
{
	if (r.cut.columns == r.a.linear.w[0].cols) {
		if (thread == 0)
			ptx_copy_bulk_policy(to, from, s.rows * bytes, full, policy);
		return;
	}
	if (thread < s.rows)
		ptx_copy_bulk_policy(to + thread * r.cut.pitch,
		                     from + (size_t)thread * r.a.linear.w[0].cols * 2, bytes, full,
		                     policy);
}

/* The warp that fetches, a lane for each row of a slab: every stage of every slab of this block, as room
 * comes free. A stage is full only when thread 0 has told its bytes, whichever arrive before. */
__device__ __forceinline__ void fetch_slabs(const slab_run &r, uint32_t smem, int thread)
{
	int cols = r.a.linear.w[0].cols;
	uint64_t policy = ptx_policy_drop();
	slab_ring ring = {0, 1};

	for (int i = (int)blockIdx.x; i < r.cut.slabs; i += (int)gridDim.x) {
		slab s = find_slab(r, i);
		const char *from =
			(const char *)r.a.linear.w[s.weight].data + (size_t)s.first * cols * 2;

		for (int c = 0; c < cols; c += r.cut.columns, ring.next(r.cut.stages)) {
			int bytes = min(r.cut.columns, cols - c) * 2;
			uint32_t full = smem + AT_FULL + 8 * ring.at;

			ptx_mbarrier_wait(smem + AT_EMPTY + 8 * ring.at, ring.parity);
			if (thread == 0)
				ptx_mbarrier_expect(full, s.rows * bytes);
			__syncwarp();
			fetch_stage(r, s, from + (size_t)c * 2, bytes,
			            smem + r.cut.at_stages + ring.at * r.cut.stage_bytes, full, thread,
			            policy);
		}
	}
}

__device__ __forceinline__ void give_x(const slab_run &r, char *x, int thread)
{
	int pieces = r.a.linear.w[0].cols / 8;

	for (int i = thread; i < r.a.linear.tokens * pieces; i += CONSUMERS) {
		int t = i / pieces, piece = i - t * pieces;

		*(uint4 *)(x + t * r.cut.x_pitch + piece * 16) =
			ptx_load_fresh((const __nv_bfloat16 *)r.a.linear.x +
		                       (size_t)t * r.a.linear.x_stride + piece * 8);
	}
}

__device__ __forceinline__ void silu_x(const slab_run &r, char *x, int thread)
{
	int cols = r.a.linear.w[0].cols;

	for (int i = thread; i < r.a.linear.tokens * cols; i += CONSUMERS) {
		int t = i / cols, c = i - t * cols;
		float g = __ldcg(r.a.a + (size_t)t * r.a.a_stride + c);
		float up = __ldcg(r.a.b + i);

		((__nv_bfloat16 *)(x + t * r.cut.x_pitch))[c] =
			__float2bfloat16(g / (1.0f + expf(-g)) * up);
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

__device__ __forceinline__ uint32_t pack(float lo, float hi)
{
	__nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);

	return *(uint32_t *)&v;
}

template <int KEPT>
__device__ __forceinline__ void norm_row(const slab_run &r, const norm_fours<KEPT> &w, int t, char *x,
                                         float *sums, int thread)
{
	int size = r.a.linear.w[0].cols;
	int threads = min((int)NORM_THREADS, ((size + 3) / 4 + 31) / 32 * 32);
	norm_fours<KEPT> kept;
	float all = 0.0f;

	load_fours(kept, r.a.a + (size_t)t * r.a.a_stride, size, threads, thread);
#pragma unroll
	for (int h = 0; h < 2; h++) {
		float sum = 0.0f;

#pragma unroll
		for (int k = 0; k < KEPT; k++)
			sum = add_squares(sum, kept.v[h][k]);
		sum = sum_lanes(sum);
		if (thread % 32 == 0)
			sums[h * WARPS + thread / 32] = sum;
	}
	ptx_barrier_some(1, CONSUMERS); /* the warps' sums are written */
	for (int i = 0; i < threads / 32; i++)
		all += sums[i];
	float factor = 1.0f / sqrtf(all / (float)size + r.a.eps);
#pragma unroll
	for (int h = 0; h < 2; h++)
#pragma unroll
		for (int k = 0; k < KEPT; k++) {
			int place = thread + h * CONSUMERS, i = (k * threads + place) * 4;
			float4 v = kept.v[h][k], n = w.v[h][k];

			if (place < threads && i < size)
				*(uint2 *)(x + t * r.cut.x_pitch + i * 2) =
					make_uint2(pack(v.x * factor * n.x, v.y * factor * n.y),
				                   pack(v.z * factor * n.z, v.w * factor * n.w));
		}
}

template <int KEPT>
__device__ __forceinline__ void norm_x(const slab_run &r, char *smem, int thread)
{
	int size = r.a.linear.w[0].cols;
	int threads = min((int)NORM_THREADS, ((size + 3) / 4 + 31) / 32 * 32);
	norm_fours<KEPT> w;

	load_fours(w, r.a.b, size, threads, thread);
	turn_wait(r.a.turn);
#pragma unroll 1
	for (int t = 0; t < r.a.linear.tokens; t++)
		norm_row(r, w, t, smem + AT_X, (float *)(smem + AT_PARTS) + t * 2 * WARPS, thread);
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
	char *x = smem + AT_X;

	if constexpr (FORM == FORM_NORM || FORM == FORM_NORM_LONG) {
		norm_x<FORM == FORM_NORM ? 1 : 4>(r, smem, thread);
	} else {
		turn_wait(r.a.turn);
		if constexpr (FORM == FORM_SILU)
			silu_x(r, x, thread);
		else
			give_x(r, x, thread);
	}
	ptx_barrier_some(1, CONSUMERS); /* x is written */
	if (FORM != FORM_GIVEN && r.a.x_out)
		put_x(r, x, thread);
}

/* A warp's sums of 16 rows and 8 tokens: of its k-steps of 32 columns in a step, each in halves. */
template <int GROUPS> struct slab_sums {
	static constexpr int PARTS = WARPS / GROUPS, EACH = 16 / PARTS;
	float d[EACH][2][4];
};

template <int GROUPS>
__device__ __forceinline__ void multiply_stage(slab_sums<GROUPS> &sum, const char *upper,
                                               const char *lower, const char *x, int cols, int part)
{
	constexpr int PARTS = slab_sums<GROUPS>::PARTS, EACH = slab_sums<GROUPS>::EACH;

#pragma unroll 2
	for (int c = 0; c < cols; c += STEP) {
#pragma unroll
		for (int e = 0; e < EACH; e++) {
			int at = c + (part + e * PARTS) * 32;

			if (at < cols) {
				uint4 a = *(const uint4 *)(upper + at * 2);
				uint4 b = *(const uint4 *)(lower + at * 2);
				uint4 v = *(const uint4 *)(x + at * 2);

				ptx_mma_bf16(sum.d[e][0], a.x, b.x, a.y, b.y, v.x, v.y);
				ptx_mma_bf16(sum.d[e][1], a.z, b.z, a.w, b.w, v.z, v.w);
			}
		}
	}
}

/* What this warp's parts come to, in the order of the essay. */
template <int GROUPS>
__device__ __forceinline__ float join_parts(const slab_sums<GROUPS> &sum, int i)
{
	if constexpr (GROUPS == 1)
		return (sum.d[0][0][i] + sum.d[0][1][i]) + (sum.d[1][0][i] + sum.d[1][1][i]);
	else
		return ((sum.d[0][0][i] + sum.d[0][1][i]) + (sum.d[2][0][i] + sum.d[2][1][i])) +
		       ((sum.d[1][0][i] + sum.d[1][1][i]) + (sum.d[3][0][i] + sum.d[3][1][i]));
}

__device__ __forceinline__ void store(const kk_linear_args &a, int weight, int t, int row, float v)
{
	size_t at = (size_t)t * a.y_stride[weight] + row;

	if (a.y_bf16)
		((__nv_bfloat16 *)a.y[weight])[at] = __float2bfloat16(v);
	else
		((float *)a.y[weight])[at] =
			a.accumulate ? __ldcg((const float *)a.y[weight] + at) + v : v;
}

/* parts: [WARPS][16 rows][8 tokens] */
template <int GROUPS>
__device__ __forceinline__ void store_slab(const slab_run &r, const slab &s, const float *parts,
                                           int thread)
{
	for (int i = thread; i < s.rows * r.a.linear.tokens; i += CONSUMERS) {
		int t = i / s.rows, row = i - t * s.rows;
		const float *p = parts + row % 16 * MOST_TOKENS + t + row / 16 * (16 * MOST_TOKENS);
		constexpr int NEXT = GROUPS * 16 * MOST_TOKENS;
		float q[4];

#pragma unroll
		for (int k = 0; k < 4; k++)
			q[k] = GROUPS == 1 ? p[k * NEXT] + p[(k + 4) * NEXT] : p[k * NEXT];
		store(r.a.linear, s.weight, t, s.first + row, (q[0] + q[2]) + (q[1] + q[3]));
	}
}

template <int GROUPS>
__device__ __forceinline__ void multiply_slabs(const slab_run &r, char *smem, uint32_t address,
                                               int thread)
{
	int warp = thread / 32, lane = thread % 32, group = warp % GROUPS, g = lane / 4;
	int cols = r.a.linear.w[0].cols, turn = 0;
	slab_ring ring = {0, 0};
	const char *x = smem + AT_X + min(g, r.a.linear.tokens - 1) * r.cut.x_pitch + lane % 4 * 16;

	for (int i = (int)blockIdx.x; i < r.cut.slabs; i += (int)gridDim.x, turn ^= 1) {
		slab s = find_slab(r, i);
		int upper = min(group * 16 + g, s.rows - 1) * r.cut.pitch + lane % 4 * 16,
		    lower = min(group * 16 + g + 8, s.rows - 1) * r.cut.pitch + lane % 4 * 16;
		float *parts = (float *)(smem + AT_PARTS + turn * PARTS_BYTES);
		slab_sums<GROUPS> sum = {};

		for (int c = 0; c < cols; c += r.cut.columns, ring.next(r.cut.stages)) {
			const char *w = smem + r.cut.at_stages + ring.at * r.cut.stage_bytes;

			ptx_mbarrier_wait(address + AT_FULL + 8 * ring.at, ring.parity);
			multiply_stage<GROUPS>(sum, w + upper, w + lower, x + c * 2,
			                       min(r.cut.columns, cols - c), warp / GROUPS);
			__syncwarp(); /* the warp has read the stage */
			if (lane == 0)
				ptx_mbarrier_arrive(address + AT_EMPTY + 8 * ring.at);
		}
#pragma unroll
		for (int k = 0; k < 4; k += 2)
			*(float2 *)(parts + (warp * 16 + g + k / 2 * 8) * MOST_TOKENS + lane % 4 * 2) =
				make_float2(join_parts<GROUPS>(sum, k), join_parts<GROUPS>(sum, k + 1));
		ptx_barrier_some(1, CONSUMERS); /* the parts are written; those of two slabs ago were read */
		store_slab<GROUPS>(r, s, parts, thread);
	}
}

template <int GROUPS, int FORM>
__global__ void __launch_bounds__(THREADS, FORM == FORM_NORM_LONG ? 1 : 2) linear_slab(const __grid_constant__ slab_run r)
{
	extern __shared__ __align__(128) char smem[];
	uint32_t address = ptx_shared_address(smem);
	int thread = (int)threadIdx.x;

	turn_begin(r.a.turn);
	if (thread == 0) {
		for (int i = 0; i < r.cut.stages; i++) {
			ptx_mbarrier_init(address + AT_FULL + 8 * i, 1);
			ptx_mbarrier_init(address + AT_EMPTY + 8 * i, WARPS);
		}
		ptx_mbarrier_init_done();
	}
	__syncthreads(); /* the barriers are begun */
	if (thread >= CONSUMERS) {
		fetch_slabs(r, address, thread - CONSUMERS);
		return;
	}
	make_x<FORM>(r, smem, thread);
	multiply_slabs<GROUPS>(r, smem, address, thread);
}

static int x_pitch_of(int cols)
{
	return cols * 2 % 128 ? cols * 2 : cols * 2 + 64; /* neighbouring rows in other banks */
}

bool kk_linear_slab_fits(const km_weight *w, int tokens, enum kk_x_from from)
{
	return w->type == KM_W_BF16 && w->cols % 32 == 0 && tokens <= MOST_TOKENS &&
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

/* Slabs of up to `most` rows, as even as they can be, so that no block has a turn more than it need
 * have: of several weights each may leave a slab that is not full. */
static void cut_rows(slab_cut *c, const kk_linear_args *l, int blocks, int most)
{
	int all = 0, turns;

	for (int i = 0; i < l->weights; i++)
		all += l->w[i].rows;
	turns = ceil_div(all, blocks * most);
	c->rows = ceil_div(all, blocks * turns);
	while ((c->slabs = count_slabs(l, c->rows, c->end)) > blocks * turns && c->rows < most)
		c->rows++;
}

/* One block a multiprocessor where x is long, since each block makes all of it; else two. */
static void cut_slabs(slab_run *r, int blocks, int room, int stage_bytes)
{
	int most = r->a.rows ? r->a.rows : MOST_GROUPS * 16;
	const kk_linear_args *l = &r->a.linear;
	slab_cut *c = &r->cut;
	int cols = l->w[0].cols;

	cut_rows(c, l, blocks, most);
	c->columns = stage_bytes / (c->rows * STEP * 2) * STEP;
	if (c->columns < STEP)
		c->columns = STEP;
	if (c->columns >= cols)
		c->columns = cols;
	c->pitch = c->columns == cols ? cols * 2 : c->columns * 2 + 64;
	c->stage_bytes = (c->rows * c->pitch + 127) / 128 * 128;
	c->x_pitch = x_pitch_of(cols);
	c->at_stages = (AT_X + l->tokens * c->x_pitch + 127) / 128 * 128;
	c->stages = (room - c->at_stages) / c->stage_bytes;
	if (c->stages > ceil_div(c->slabs, blocks) * ceil_div(cols, c->columns))
		c->stages = ceil_div(c->slabs, blocks) * ceil_div(cols, c->columns);
	c->stages = c->stages > MOST_STAGES ? (int)MOST_STAGES : c->stages < 1 ? 1 : c->stages;
}

template <int GROUPS>
static cudaError_t launch_slab(const slab_run *r, int blocks, cudaStream_t stream)
{
	bool is_long = r->a.linear.w[0].cols > NORM_SHORT;
	void (*kernel)(slab_run) = r->a.from == KK_X_SILU    ? linear_slab<GROUPS, FORM_SILU>
	                           : r->a.from == KK_X_GIVEN ? linear_slab<GROUPS, FORM_GIVEN>
	                           : is_long ? linear_slab<GROUPS, FORM_NORM_LONG>
	                                     : linear_slab<GROUPS, FORM_NORM>;
	size_t bytes = (size_t)r->cut.at_stages + (size_t)r->cut.stages * r->cut.stage_bytes;
	cudaLaunchAttribute attribute = {};
	cudaLaunchConfig_t config = {};
	cudaError_t rc;

	if (bytes > MOST_BYTES)
		return cudaErrorInvalidValue;
	rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_BYTES);
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

/* Several stages, whatever x takes. */
static int room_of_one(int x_bytes)
{
	int room = AT_X + x_bytes + (96 << 10);

	return room < 160 << 10 ? 160 << 10 : room < MOST_BYTES ? room : (int)MOST_BYTES;
}

cudaError_t kk_linear_slab(const kk_linear_slab_args *a, cudaStream_t stream)
{
	const kk_linear_args *l = &a->linear;
	int each = a->blocks_per_sm ? a->blocks_per_sm : l->w[0].cols >= 4096 ? 1 : 2;
	int blocks = each * (a->multiprocessors - (each > 1 ? ATTENTION_BLOCKS : 0));
	int x_bytes = l->tokens * x_pitch_of(l->w[0].cols);
	int room = a->smem_bytes ? a->smem_bytes : each == 1 ? room_of_one(x_bytes) : 110 << 10;
	slab_run r = {*a, {}};

	if (a->rows < 0 || a->rows > MOST_GROUPS * 16 || a->turn == KM_TURN_BESIDE || l->weights < 1 ||
	    l->weights > KK_LINEAR_WEIGHTS || (l->y_bf16 && l->accumulate) || l->tokens < 1 ||
	    (a->from == KK_X_GIVEN && l->x_stride % 8) || a->multiprocessors < 1)
		return cudaErrorInvalidValue;
	for (int i = 0; i < l->weights; i++)
		if (!kk_linear_slab_fits(&l->w[i], l->tokens, a->from) ||
		    l->w[i].cols != l->w[0].cols)
			return cudaErrorInvalidValue;
	cut_slabs(&r, blocks, room, a->stage_bytes ? a->stage_bytes : 32 << 10);
	if (r.cut.at_stages + r.cut.stages * r.cut.stage_bytes > room && each == 2) {
		blocks = a->multiprocessors;
		room = MOST_BYTES;
		cut_slabs(&r, blocks, room, 32 << 10);
	}
	return r.cut.rows > 16 ? launch_slab<2>(&r, blocks, stream) : launch_slab<1>(&r, blocks, stream);
}
