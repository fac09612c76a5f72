/*
 * The experts. Pairs (token, k) are put in order of expert, so that each selected expert's weights
 * are met once, by all its pairs; rows of `act` and `down` are pairs in that order. Then each token
 * adds its own pairs in the order of k. Work is handed out as blocks of DOT_ROWS weight rows of one
 * expert, to whichever thread is free: no sum is split, so who does what leaves no trace.
 */
#ifndef KM_DEVICE_CPU_MOE_H
#define KM_DEVICE_CPU_MOE_H

#include "device/cpu_dot.h"

typedef struct moe_round {
	const km_moe_args *a;
	km_cpu_moe_scratch s;
	int from, tokens; /* rows of the call that this round takes */
	int active;       /* experts that have pairs */
} moe_round;

/* A counting sort by expert; pairs of weight 0 are left out. */
static void sort_pairs(moe_round *m)
{
	const int32_t *ids = m->a->ids + (size_t)m->from * (size_t)m->a->top_k;
	const float *weights = m->a->weights + (size_t)m->from * (size_t)m->a->top_k;
	int pairs = m->tokens * m->a->top_k, experts = m->a->experts;
	int32_t *first = m->s.first;

	memset(first, 0, ((size_t)experts + 2) * sizeof(*first));
	for (int i = 0; i < pairs; i++)
		if (weights[i] != 0)
			first[ids[i] + 2]++;
	m->active = 0;
	for (int e = 0; e < experts; e++) {
		if (first[e + 2])
			m->s.active[m->active++] = e;
		first[e + 2] += first[e + 1];
	}
	for (int i = 0; i < pairs; i++)
		if (weights[i] != 0) {
			m->s.place[i] = first[ids[i] + 1]++;
			m->s.pair[m->s.place[i]] = i;
		}
}

/* act = silu(W_gate x) * W_up x, rows [row, row + DOT_ROWS) of it. */
static void expert_up(const moe_round *m, int expert, int row)
{
	const km_moe_args *a = m->a;
	weight_view gate = view_weight(&a->gate[expert]), up = view_weight(&a->up[expert]);
	int rows = a->intermediate - row < DOT_ROWS ? a->intermediate - row : DOT_ROWS;
	float gates[DOT_TOKENS * DOT_ROWS], ups[DOT_TOKENS * DOT_ROWS];
	const float *x[DOT_TOKENS] = { NULL };

	for (int at = m->s.first[expert]; at < m->s.first[expert + 1]; at += DOT_TOKENS) {
		int left = m->s.first[expert + 1] - at,
		    tokens = left < DOT_TOKENS ? left : DOT_TOKENS;

		for (int i = 0; i < tokens; i++)
			x[i] = a->x +
			       (size_t)(m->from + m->s.pair[at + i] / a->top_k) * (size_t)a->hidden;
		dot_rows(&gate, row, rows, x, tokens, gates);
		dot_rows(&up, row, rows, x, tokens, ups);
		for (int i = 0; i < tokens; i++) {
			float *act =
				m->s.act + (size_t)(at + i) * (size_t)a->intermediate + (size_t)row;

			for (int r = 0; r < rows; r += VL)
				v_store_up_to(act + r,
				              v_mul(v_silu(v_load(gates + i * DOT_ROWS + r)),
				                    v_load(ups + i * DOT_ROWS + r)),
				              rows - r);
		}
	}
}

static void expert_down(const moe_round *m, int expert, int row)
{
	const km_moe_args *a = m->a;
	weight_view v = view_weight(&a->down[expert]);
	int rows = a->hidden - row < DOT_ROWS ? a->hidden - row : DOT_ROWS;
	float sums[DOT_TOKENS * DOT_ROWS];
	const float *x[DOT_TOKENS] = { NULL };

	for (int at = m->s.first[expert]; at < m->s.first[expert + 1]; at += DOT_TOKENS) {
		int left = m->s.first[expert + 1] - at,
		    tokens = left < DOT_TOKENS ? left : DOT_TOKENS;

		for (int i = 0; i < tokens; i++)
			x[i] = m->s.act + (size_t)(at + i) * (size_t)a->intermediate;
		dot_rows(&v, row, rows, x, tokens, sums);
		for (int i = 0; i < tokens; i++)
			memcpy(m->s.down + (size_t)(at + i) * (size_t)a->hidden + (size_t)row,
			       sums + i * DOT_ROWS, (size_t)rows * sizeof(float));
	}
}

static void add_pairs(const moe_round *m, int t)
{
	const km_moe_args *a = m->a;
	float *y = a->y + (size_t)(m->from + t) * (size_t)a->hidden;
	const float *weights = a->weights + (size_t)(m->from + t) * (size_t)a->top_k;
	const int32_t *place = m->s.place + (size_t)t * (size_t)a->top_k;

	for (int i = 0; i < a->hidden; i += VL) {
		int n = a->hidden - i;
		vf sum = v_zero();

		for (int k = 0; k < a->top_k; k++)
			if (weights[k] != 0)
				sum = v_fma(
					v_set1(weights[k]),
					v_load_up_to(m->s.down +
				                             (size_t)place[k] * (size_t)a->hidden +
				                             i,
				                     n),
					sum);
		v_store_up_to(y + i, v_fma(v_set1(a->routed_scale), sum, v_load_up_to(y + i, n)),
		              n);
	}
}

/* Blocks that a thread takes at once: those of one expert, whose tokens' rows it then has at hand,
 * or fewer when threads would be left without. */
static int blocks_at_once(int blocks, int experts, int threads)
{
	int fair = blocks * experts / (4 * threads);

	return fair < 1 ? 1 : fair < blocks ? fair : blocks;
}

static void moe_alone(const moe_round *m, int up_blocks, int down_blocks)
{
	for (int i = 0; i < m->active * up_blocks; i++)
		expert_up(m, m->s.active[i / up_blocks], i % up_blocks * DOT_ROWS);
	for (int i = 0; i < m->active * down_blocks; i++)
		expert_down(m, m->s.active[i / down_blocks], i % down_blocks * DOT_ROWS);
	for (int t = 0; t < m->tokens; t++)
		add_pairs(m, t);
}

static void moe_one_round(moe_round *m, int threads)
{
	int up_blocks = (m->a->intermediate + DOT_ROWS - 1) / DOT_ROWS;
	int down_blocks = (m->a->hidden + DOT_ROWS - 1) / DOT_ROWS;

	if (threads == 1) {
		moe_alone(m, up_blocks, down_blocks);
		return;
	}
#pragma omp parallel
	{
#pragma omp for schedule(dynamic, blocks_at_once(up_blocks, m->active, threads))
		for (int i = 0; i < m->active * up_blocks; i++)
			expert_up(m, m->s.active[i / up_blocks], i % up_blocks * DOT_ROWS);
#pragma omp for schedule(dynamic, blocks_at_once(down_blocks, m->active, threads))
		for (int i = 0; i < m->active * down_blocks; i++)
			expert_down(m, m->s.active[i / down_blocks], i % down_blocks * DOT_ROWS);
#pragma omp for schedule(static)
		for (int t = 0; t < m->tokens; t++)
			add_pairs(m, t);
	}
}

static void simd_moe(const km_moe_args *a)
{
	moe_round m = { .a = a };

	km_cpu_moe_layout(&m.s, a, a->tokens, a->scratch);
	for (m.from = 0; m.from < a->tokens; m.from += KM_CPU_MOE_TOKENS) {
		m.tokens = a->tokens - m.from;
		if (m.tokens > KM_CPU_MOE_TOKENS)
			m.tokens = KM_CPU_MOE_TOKENS;
		sort_pairs(&m);
		moe_one_round(&m, km_cpu_threads(3.0 * m.tokens * a->top_k * a->hidden *
		                                 a->intermediate));
	}
}

#endif
