/*
 * What goes before the int4 experts, in their launch, where rows are few: the gate, and the shared experts' down
 * projection. Each block selects for itself, and adds the shared experts' part of the rows that it sums anyway;
 * block 0 writes down what was selected. moe_int4.cu has the essay.
 */
#ifndef KK_MOE_FRONT_CUH
#define KK_MOE_FRONT_CUH

#include "gate.cuh"
#include "moe_work.cuh"

enum {
	FRONT_TOKENS = 4,
	FRONT_EXPERTS = 384,
	FRONT_COLS = 256,  /* of the shared experts' down projection */
	FRONT_BLOCKS = 4,  /* of 16 rows, that a block of the grid sums */
	FRONT_PITCH = FRONT_COLS * 2 + PAD,
};

/* In the place of the warps' sums, of which there are none yet: libcore/device/moe_plan.c sees to the room. */
struct front_smem {
	union { /* one after the other */
		struct {
			float x[FRONT_TOKENS][FRONT_EXPERTS], bias[FRONT_EXPERTS];
			gate_scratch scratch[FRONT_TOKENS];
		} gate;
		float part[4][FRONT_BLOCKS * 16][FRONT_TOKENS]; /* of each quarter of the columns */
	};
	__align__(16) char act[FRONT_TOKENS][FRONT_PITCH];  /* silu(gate) * up, bf16 */
};
static_assert(sizeof(front_smem) <= 11 * 1024, "the plan's allowance");

/* What is fetched before the predecessor has ended. The gate's bias, to shared memory; of the shared experts' weights,
 * lane 4 g + t has 16 columns, from 16 t on of its warp's 64, of rows g and g + 8 of its warp's row block, as two
 * vectors each. */
struct front_ahead {
	uint4 w[4];
};

__device__ __forceinline__ void begin_front(front_ahead &f, stream_smem *s, front_smem *m, const kk_moe_args &a,
                                            const stream_work &w)
{
	int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = w.down_lo + warp / 4;
	const uint4 *from = (const uint4 *)a.shared_down +
	                    ((size_t)block * 16 + lane / 4) * (FRONT_COLS / 8) + warp % 4 * 8 + lane % 4 * 2;

	__syncthreads(); /* the block's barriers are begun */
	if (threadIdx.x == 0) {
		ptx_mbarrier_expect(barrier_of(&s->bias, 0), sizeof(m->gate.bias));
		ptx_copy_bulk(ptx_shared_address(m->gate.bias), a.gate.bias, sizeof(m->gate.bias), barrier_of(&s->bias, 0));
	}
#pragma unroll
	for (int i = 0; i < 4; i++)
		f.w[i] = block < w.down_hi ? ptx_load_stream(from + i / 2 * FRONT_COLS + i % 2) : make_uint4(0, 0, 0, 0);
}

/* A warp's row, to the block's ids and weights. */
__device__ __forceinline__ void select_row(const kk_moe_args &a, stream_smem *s, front_smem *m, int row)
{
	int lane = threadIdx.x % 32;
	kk_gate_args gate = a.gate;
	float x[FRONT_EXPERTS / 32], bias[FRONT_EXPERTS / 32];
	int valid = gate.valid_tokens ? __ldcg(gate.valid_tokens) : a.tokens;

	gate_load<FRONT_EXPERTS / 32>(x, gate.logits + row * FRONT_EXPERTS, lane);
	gate.ids = s->ids;
	gate.weights = s->weights;
	ptx_mbarrier_wait(barrier_of(&s->bias, 0), 0);
	gate_recall<FRONT_EXPERTS / 32>(bias, m->gate.bias, lane);
	if (row < valid)
		gate_row_onepass<FRONT_EXPERTS / 32, false>(gate, row, lane, x, bias, m->gate.x[row], m->gate.bias,
		                                            &m->gate.scratch[row], NULL);
	else
		gate_store_padding(gate, row, lane, NULL);
	__syncwarp(); /* what the lanes have stored */
}

/* The shared experts' activations, by the threads that select nothing. */
__device__ __forceinline__ void activate_shared(const kk_moe_args &a, front_smem *m, int thread, int threads)
{
	constexpr int FOURS = FRONT_COLS / 4;

	for (int i = thread; i < a.tokens * FOURS; i += threads) {
		float4 g = __ldcg((const float4 *)a.shared_gate + i), u = __ldcg((const float4 *)a.shared_up + i);
		__nv_bfloat162 low = __floats2bfloat162_rn(silu(g.x) * u.x, silu(g.y) * u.y);
		__nv_bfloat162 high = __floats2bfloat162_rn(silu(g.z) * u.z, silu(g.w) * u.w);

		*(uint2 *)(m->act[i / FOURS] + i % FOURS * 8) = make_uint2(*(uint32_t *)&low, *(uint32_t *)&high);
	}
}

/* All threads: the selected places, sorted, and the shared experts' activations. */
__device__ __forceinline__ void run_front(const kk_moe_args &a, stream_smem *s, front_smem *m, int most, float per_most)
{
	int warp = threadIdx.x / 32, first = 32 * a.tokens;

	if (warp < a.tokens)
		select_row(a, s, m, warp);
	else
		activate_shared(a, m, (int)threadIdx.x - first, (int)blockDim.x - first);
	if (a.tokens > 1)
		__syncthreads(); /* every row's places are there */
	if (warp == 0)
		sort_by_warp(a, s, most, per_most, true);
	__syncthreads(); /* the tiles are known to all, and the activations; the block's barriers are ready */
	if (blockIdx.x == 0 && threadIdx.x < a.tokens * a.top_k) {
		a.gate.ids[threadIdx.x] = s->ids[threadIdx.x];
		a.gate.weights[threadIdx.x] = s->weights[threadIdx.x];
	}
}

/*
 * The shared experts' part of what this thread sums first. The warps that multiply, while the experts' weights are on
 * their way. Order: a quarter of the columns by rising step, quarters as (0 + 1) + (2 + 3).
 */
__device__ __forceinline__ float multiply_shared(const kk_moe_args &a, const stream_work &w, front_smem *m,
                                                 const front_ahead &f, int threads)
{
	int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row;
	const char *from = m->act[min(g, a.tokens - 1)] + (warp % 4 * 64 + t * 16) * 2;
	uint4 x[2] = {*(const uint4 *)from, *(const uint4 *)(from + 16)};
	float d[4] = {};
	direct_place y;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		int v = i / 2, word = i % 2 * 2;

		ptx_mma_bf16(d, word_of(f.w[v], word), word_of(f.w[2 + v], word), word_of(f.w[v], word + 1),
		             word_of(f.w[2 + v], word + 1), word_of(x[v], word), word_of(x[v], word + 1));
	}
#pragma unroll
	for (int i = 0; i < 4; i++)
		if (2 * t + i % 2 < a.tokens)
			m->part[warp % 4][warp / 4 * 16 + g + i / 2 * 8][2 * t + i % 2] = d[i];
	ptx_barrier_some(BAR_ALL, threads); /* every quarter's are there */
	if (threadIdx.x >= direct_values(a, w))
		return 0.0f;
	y = place_of(a, w, threadIdx.x);
	row = y.block * 16 + y.row;
	return (m->part[0][row][y.token] + m->part[1][row][y.token]) +
	       (m->part[2][row][y.token] + m->part[3][row][y.token]);
}

#endif
