/*
 * Rows of logits to tokens, one block of threads a row or, of few rows, a cluster of 8:
 * engine/sampler.c in parallel, with its bits.
 *
 * ROOFLINE
 *   A row of 163,840 floats lies in the L2 cache, where the head left it. One multiprocessor reads
 *   some 100 GB/s from there, 6.5 us, and computes as many weights in 22 us (30 instructions each):
 *   that is the floor of a pass without and with weights; a cluster shares it. Measured on H100
 *   (test_gpu_sampler), one row and 64: greedy 16 and 31 us, a temperature 33 and 87, with top_p
 *   101 and 245 (half of it over 4,000 candidates), top_k and top_p 45 and 63. Rows run side by
 *   side. On the host, 0.65 MB a row comes over PCIe first, 13 us one after the other, and a row
 *   then takes 34 to 207 us of a thread.
 *
 * RULES
 *   Sums of weights: within 512 logits in 16 lanes, the lanes in order, the blocks of 512 in order
 *   in double; products and sums are never contracted. These are the CPU's rules (engine/vocab.h),
 *   so the token at a point of the summed weights is the CPU's too. Sums over candidates that only
 *   decide where top_p cuts run in another order: a cut that falls between two doubles may differ.
 *   The order of equal logits is that of ids. All threads of a block take the same branches around
 *   barriers: what decides is read from shared memory after one.
 *
 * A row refused (KM_DRAWN_BY_HOST): NaN or +infinity in it, nothing but -infinity, or more than
 * KM_DRAW_CANDIDATES candidates where they must be sorted.
 */
#include "launch.cuh"
#include "ptx.cuh"
#include "sampler.h"

#include <limits.h>

enum { THREADS = 1024, WARPS = THREADS / 32, BLOCK = 512, LANES = 16, MOST = KM_DRAW_CANDIDATES };
enum { MOST_BLOCKS = KM_DRAW_VOCAB / BLOCK, RANKS = 8 };
enum { REACHES = 12, FIRST_REACH = 5, TRIES = 64 };

/* engine/sampler.c's, and narrower ones: here candidates are few. FIRST_REACH is the CPU's first
 * attempt at top_p, which decides how it draws. */
__constant__ float reach[REACHES] = {0.5f, 1, 2, 3.5f, 5, 9, 13, 18, 24, 32, 44, 87};

/* A row on its way, in shared memory. */
struct shared {
	float *logits;
	int vocab, blocks;
	int rank, ranks; /* this block's place among those that share the row */
	float max, scale;
	union {
		unsigned long long key[MOST]; /* by rank: the logit's order turned round, then the id */
		double upto[MOST];            /* weights' sums in order, once the keys are done with */
	};
	float logit[MOST];            /* candidates by id */
	int id[MOST];
	float weight[MOST];
	float block_max[MOST_BLOCKS];
	double block_sum[MOST_BLOCKS], block_upto[MOST_BLOCKS]; /* upto: summed in order */
	int block_count[MOST_BLOCKS];
	float partial[WARPS];
	float part_max[RANKS]; /* of each rank's share */
	int part_bad[RANKS];
	double sums[WARPS];
	int numbers[WARPS];
	float line;
};

extern __shared__ __align__(16) char shared_memory[];

/* A constant address: no thread keeps what is in it. */
__device__ __forceinline__ shared *mem()
{
	return (shared *)shared_memory;
}

/* ---- numbers ---- */

/* Integers in the order of floats: see engine/vocab_body.h. */
__device__ __forceinline__ int ordered(float x)
{
	int bits = __float_as_int(x);

	return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float exp_term(float x)
{
	float magic, k, r, p;

	if (!(fabsf(x) <= 87.0f))
		return 0.0f;
	magic = __fadd_rn(__fmul_rn(x, 1.44269504f), 12582912.0f);
	k = __fsub_rn(magic, 12582912.0f);
	r = __fsub_rn(x, __fmul_rn(k, 0.693359375f));
	r = __fsub_rn(r, __fmul_rn(k, -2.12194440e-4f));
	p = 1.9875691500e-4f;
	p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
	p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
	p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
	p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
	p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
	p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
	return __fmul_rn(p, __int_as_float((__float_as_int(magic) + 127) << 23));
}

__device__ __forceinline__ float weight_of(float logit)
{
	return exp_term(__fmul_rn(__fsub_rn(logit, mem()->max), mem()->scale));
}

__device__ __forceinline__ unsigned long long mix(unsigned long long z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

/* base/rng.h */
__device__ __forceinline__ unsigned long long random(unsigned long long seed,
                                                     unsigned long long index)
{
	return mix(mix(seed) + (index + 1) * 0x9e3779b97f4a7c15ull);
}

__device__ __forceinline__ double uniform(unsigned long long seed, unsigned long long index)
{
	return (double)(random(seed, index) >> 11) * 0x1p-53;
}

/* ---- over all threads of the block; each has a barrier before and after ---- */

__device__ __forceinline__ int sum_all(int x)
{
	int sum = 0;

	x = __reduce_add_sync(~0u, x);
	if (threadIdx.x % 32 == 0)
		mem()->numbers[threadIdx.x / 32] = x;
	__syncthreads();
	for (int w = 0; w < WARPS; w++)
		sum += mem()->numbers[w];
	__syncthreads();
	return sum;
}

__device__ __forceinline__ int min_all(int x)
{
	x = __reduce_min_sync(~0u, x);
	if (threadIdx.x % 32 == 0)
		mem()->numbers[threadIdx.x / 32] = x;
	__syncthreads();
	for (int w = 0; w < WARPS; w++)
		x = min(x, mem()->numbers[w]);
	__syncthreads();
	return x;
}

/* upto[i] = start + x[0] + ... + x[i], in that order: one thread, a chain of additions that the
 * loads do not wait for. */
template <typename T>
__device__ __noinline__ void sum_in_order(const T *x, int n, double start, double *upto)
{
	enum { AHEAD = 8 };
	double sum = start;
	int i = 0;

	for (; i + AHEAD <= n; i += AHEAD) {
		T ahead[AHEAD];

#pragma unroll
		for (int j = 0; j < AHEAD; j++)
			ahead[j] = x[i + j];
#pragma unroll
		for (int j = 0; j < AHEAD; j++)
			upto[i + j] = sum = __dadd_rn(sum, (double)ahead[j]);
	}
	for (; i < n; i++)
		upto[i] = sum = __dadd_rn(sum, (double)x[i]);
}

/* The warps' sums in order, each warp's in a butterfly. */
__device__ __forceinline__ double sum_all(double x)
{
	double sum = 0;

	for (int offset = 16; offset; offset /= 2)
		x += __shfl_xor_sync(~0u, x, offset);
	if (threadIdx.x % 32 == 0)
		mem()->sums[threadIdx.x / 32] = x;
	__syncthreads();
	for (int w = 0; w < WARPS; w++)
		sum += mem()->sums[w];
	__syncthreads();
	return sum;
}

/* ---- passes ---- */

/* Adds what the row is told about single tokens. A token that is biased twice gets both by the
 * thread of the first, in order. */
__device__ __noinline__ void adjust(float *logits, const km_draw &d,
                                    const km_draw_entry *entries)
{
	const km_draw_entry *bias = entries + d.bias_from, *count = entries + d.counts_from;

	for (int i = threadIdx.x; i < d.biases; i += THREADS) {
		float *logit = &logits[bias[i].id];
		bool first = true;

		for (int j = 0; j < i && first; j++)
			first = bias[j].id != bias[i].id;
		for (int j = i; j < d.biases && first; j++)
			if (bias[j].id == bias[i].id)
				*logit = __fadd_rn(*logit, bias[j].bias);
	}
	__syncthreads();
	for (int i = threadIdx.x; i < d.counts; i += THREADS) {
		float *logit = &logits[count[i].id], x = *logit;

		x = x > 0 ? __fdiv_rn(x, d.repetition) : __fmul_rn(x, d.repetition);
		if (count[i].output)
			x = __fsub_rn(x, (float)__dadd_rn(__dmul_rn(d.frequency,
			                                            (double)count[i].output),
			                                  d.presence));
		*logit = x;
	}
	__syncthreads();
}

/* What all ranks wrote is there for all; whoever is alone only waits for its own threads. */
__device__ __forceinline__ void meet()
{
	if (mem()->ranks == 1) {
		__syncthreads();
		return;
	}
	__syncwarp();
	ptx_cluster_arrive();
	ptx_cluster_wait();
}

/* `p` in the shared memory of a rank. */
template <typename T> __device__ __forceinline__ T *theirs(T *p, int rank)
{
	return mem()->ranks == 1 ? p : (T *)ptx_cluster_pointer((int32_t *)p, rank);
}

/* The row's maximum, in all ranks, and its blocks', in rank 0; false: not a row to draw from. */
__device__ bool find_max()
{
	shared *s = mem();
	int warp = threadIdx.x / 32, lane = threadIdx.x % 32, bad = 0;
	float best = -INFINITY, *tops = theirs(s->block_max, 0);

	for (int b = s->rank * WARPS + warp; b < s->blocks; b += s->ranks * WARPS) {
		float top = -INFINITY;

#pragma unroll
		for (int i = 0; i < BLOCK; i += 32) {
			int at = b * BLOCK + i + lane;
			float x = at < s->vocab ? s->logits[at] : -INFINITY;

			bad |= !(x < INFINITY);
			top = fmaxf(top, x);
		}
		for (int offset = 16; offset; offset /= 2)
			top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
		if (lane == 0)
			tops[b] = top;
		best = fmaxf(best, top);
	}
	if (lane == 0)
		s->partial[warp] = best;
	bad = sum_all(bad); /* its barriers order partial too */
	for (int w = 0; w < WARPS; w++)
		best = fmaxf(best, s->partial[w]);
	if ((int)threadIdx.x < s->ranks) {
		theirs(s->part_max, threadIdx.x)[s->rank] = best;
		theirs(s->part_bad, threadIdx.x)[s->rank] = bad;
	}
	meet();
	for (int r = 0; r < s->ranks; r++) {
		best = fmaxf(best, s->part_max[r]);
		bad |= s->part_bad[r];
	}
	if (threadIdx.x == 0)
		s->max = best;
	__syncthreads();
	return !bad && best > -INFINITY;
}

__device__ int first_of_max()
{
	int found = mem()->vocab - 1, lane = threadIdx.x % 32;

	for (int b = threadIdx.x / 32; b < mem()->blocks; b += WARPS) {
		if (mem()->block_max[b] < mem()->max)
			continue;
		for (int i = lane; i < BLOCK && b * BLOCK + i < mem()->vocab; i += 32)
			if (mem()->logits[b * BLOCK + i] >= mem()->max)
				found = min(found, b * BLOCK + i);
	}
	return min_all(found);
}

/* Weights' sums by block, of logits above `least` when `cut`, by this rank of some, to rank 0. Half
 * a warp takes a block, a thread of it a lane. */
template <bool cut> __device__ __noinline__ void sum_blocks(float least, int rank, int ranks)
{
	shared *s = mem();
	int half = rank * (THREADS / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
	double *sums = ranks == 1 ? s->block_sum : theirs(s->block_sum, 0);

	for (int b = half; b < (s->blocks + 1) / 2 * 2; b += ranks * (THREADS / LANES)) {
		const float *x = s->logits + (size_t)b * BLOCK;
		int n = b < s->blocks ? min(BLOCK, s->vocab - b * BLOCK) : 0;
		float sum = 0;
		double lanes = 0;

#pragma unroll 8
		for (int i = 0; i + LANES <= n; i += LANES) {
			float logit = x[i + lane], w = weight_of(logit);

			sum = __fadd_rn(sum, !cut || logit > least ? w : 0.0f);
		}
		for (int l = 0; l < LANES; l++)
			lanes = __dadd_rn(lanes, (double)__shfl_sync(~0u, sum, l, LANES));
		for (int i = n / LANES * LANES; i < n; i++)
			lanes = __dadd_rn(lanes,
			                  (double)(!cut || x[i] > least ? weight_of(x[i]) : 0.0f));
		if (lane == 0 && b < s->blocks)
			sums[b] = lanes;
	}
}

/* Their sum in order, in rank 0. */
__device__ double sum_of_blocks()
{
	shared *s = mem();

	if (threadIdx.x == 0)
		sum_in_order(s->block_sum, s->blocks, 0.0, s->block_upto);
	__syncthreads();
	return s->block_upto[s->blocks - 1];
}

/* Both, by rank 0 alone. */
template <bool cut> __device__ double sum_weights(float least)
{
	__syncthreads(); /* the sums of before have been read */
	sum_blocks<cut>(least, 0, 1);
	__syncthreads();
	return sum_of_blocks();
}

/* Of n weights with their sums in order: the first that is not 0 and has more than `target` up to
 * it, or, where rounding leaves none, the last that is not 0. */
__device__ int find_target(const float *weight, const double *upto, int n, double target)
{
	int found = INT_MAX, last = 0;

	for (int i = threadIdx.x; i < n; i += THREADS)
		if (weight[i] != 0) {
			last = max(last, i);
			if (upto[i] > target)
				found = min(found, i);
		}
	found = min_all(found);
	last = -min_all(-last);
	return found < INT_MAX ? found : last;
}

/* The token at `target` of the summed weights, whose blocks' sums are in block_sum and upto. */
__device__ __noinline__ int token_at(double target)
{
	shared *s = mem();
	int found = INT_MAX, last = 0, n, start;

	for (int b = threadIdx.x; b < mem()->blocks; b += THREADS) {
		if (mem()->block_sum[b] > 0)
			last = max(last, b);
		if (mem()->block_upto[b] > target)
			found = min(found, b);
	}
	found = min_all(found);
	last = -min_all(-last);
	found = found < INT_MAX ? found : last;
	start = found * BLOCK;
	n = min(BLOCK, mem()->vocab - start);
	if ((int)threadIdx.x < n)
		s->weight[threadIdx.x] = weight_of(mem()->logits[start + threadIdx.x]);
	__syncthreads();
	if (threadIdx.x == 0)
		sum_in_order(s->weight, n, found ? mem()->block_upto[found - 1] : 0.0, s->upto);
	__syncthreads();
	return start + find_target(s->weight, s->upto, n, target);
}

/* ---- candidates ---- */

__device__ __forceinline__ float least_logit(float distance)
{
	return __fsub_rn(mem()->max, __fdiv_rn(distance, mem()->scale));
}

/* The number of logits that are at least `least`; of each block in block_count. */
__device__ __noinline__ int count_candidates(float least)
{
	int lane = threadIdx.x % 32, all = 0;

	for (int b = threadIdx.x / 32; b < mem()->blocks; b += WARPS) {
		int count = 0;

		if (mem()->block_max[b] >= least)
#pragma unroll 8
			for (int i = 0; i < BLOCK; i += 32) {
				int at = b * BLOCK + i + lane;

				count += at < mem()->vocab && mem()->logits[at] >= least;
			}
		count = __reduce_add_sync(~0u, count);
		if (lane == 0)
			mem()->block_count[b] = count;
		all += lane == 0 ? count : 0;
	}
	return sum_all(all);
}

/* block_count becomes the number of candidates before each block. */
__device__ void number_candidates()
{
	int lane = threadIdx.x, before = 0;

	if (threadIdx.x < 32)
		for (int from = 0; from < mem()->blocks; from += 32) {
			int mine = from + lane < mem()->blocks ? mem()->block_count[from + lane] : 0,
			    upto = mine;

			for (int offset = 1; offset < 32; offset *= 2) {
				int other = __shfl_up_sync(~0u, upto, offset);

				upto += lane >= offset ? other : 0;
			}
			if (from + lane < mem()->blocks)
				mem()->block_count[from + lane] = before + upto - mine;
			before += __shfl_sync(~0u, upto, 31);
		}
	__syncthreads();
}

/* Those that count_candidates counted, at most MOST, by id, with their weights; returns the sum of
 * these. */
__device__ __noinline__ double gather(float least)
{
	int lane = threadIdx.x % 32;
	shared *s = mem();
	double mass = 0;

	number_candidates();
	for (int b = threadIdx.x / 32; b < mem()->blocks; b += WARPS) {
		int to = mem()->block_count[b];

		if (mem()->block_max[b] < least)
			continue;
		for (int i = 0; i < BLOCK; i += 32) {
			int at = b * BLOCK + i + lane;
			float x = at < mem()->vocab ? mem()->logits[at] : -INFINITY;
			bool is = at < mem()->vocab && x >= least;
			unsigned all = __ballot_sync(~0u, is);

			if (is) {
				int place = to + __popc(all & ((1u << lane) - 1));

				s->logit[place] = x;
				s->id[place] = at;
				s->weight[place] = weight_of(x);
				mass += (double)s->weight[place];
			}
			to += __popc(all);
		}
	}
	return sum_all(mass);
}

__device__ __forceinline__ unsigned long long rank_key(float logit, int id)
{
	unsigned up = (unsigned)ordered(logit + 0.0f) ^ 0x80000000u; /* + 0: one zero */

	return (unsigned long long)~up << 32 | (unsigned)id;
}

/* The n candidates' keys, best first. */
__device__ __noinline__ void sort_candidates(int n)
{
	shared *s = mem();
	int size = 1;

	while (size < n)
		size *= 2;
	for (int i = threadIdx.x; i < size; i += THREADS)
		s->key[i] = i < n ? rank_key(s->logit[i], s->id[i]) : ~0ull;
	__syncthreads();
	for (int run = 2; run <= size; run *= 2)
		for (int step = run / 2; step; step /= 2) {
			for (int i = threadIdx.x; i < size / 2; i += THREADS) {
				int a = i / step * 2 * step + i % step, b = a + step;
				bool up = !(a & run);
				unsigned long long x = s->key[a], y = s->key[b];

				if ((x > y) == up) {
					s->key[a] = y;
					s->key[b] = x;
				}
			}
			__syncthreads();
		}
}

__device__ __forceinline__ float key_weight(unsigned long long key)
{
	unsigned up = ~(unsigned)(key >> 32);
	int bits = (int)(up ^ 0x80000000u);

	return weight_of(__int_as_float(bits ^ ((bits >> 31) & 0x7fffffff)));
}

/* The worst of the n best; the keys are done with. */
__device__ __forceinline__ unsigned long long last_key(int n)
{
	unsigned long long key = mem()->key[n - 1];

	__syncthreads();
	return key;
}

/* Of the n best keys, how many the fewest are whose weights reach `need`; at least one. A thread
 * sums PIECE neighbours, then warps and their sums are scanned. */
__device__ __noinline__ int cut_mass(int n, double need)
{
	enum { PIECE = MOST / THREADS };
	shared *s = mem();
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, found = n;
	double weight[PIECE], mine = 0, before = 0, upto;

#pragma unroll
	for (int j = 0; j < PIECE; j++) {
		int i = threadIdx.x * PIECE + j;

		weight[j] = i < n ? (double)key_weight(s->key[i]) : 0;
		mine += weight[j];
	}
	upto = mine;
	for (int offset = 1; offset < 32; offset *= 2) {
		double other = __shfl_up_sync(~0u, upto, offset);

		upto += lane >= offset ? other : 0;
	}
	if (lane == 31)
		s->sums[warp] = upto;
	__syncthreads();
	for (int w = 0; w < warp; w++)
		before += s->sums[w];
	before += upto - mine;
#pragma unroll
	for (int j = 0; j < PIECE; j++) {
		before += weight[j];
		if (before >= need)
			found = min(found, (int)threadIdx.x * PIECE + j + 1);
	}
	return min_all(found);
}

/* Draws among the n candidates, by id, those whose key is at most `last` and weight at least
 * min_p. */
__device__ __noinline__ int draw_candidate(int n, unsigned long long last, double min_p, double u)
{
	shared *s = mem();

	for (int i = threadIdx.x; i < n; i += THREADS)
		if (rank_key(s->logit[i], s->id[i]) > last || (double)s->weight[i] < min_p)
			s->weight[i] = 0;
	__syncthreads();
	if (threadIdx.x == 0)
		sum_in_order(s->weight, n, 0.0, s->upto);
	__syncthreads();
	return s->id[find_target(s->weight, s->upto, n, __dmul_rn(s->upto[n - 1], u))];
}

/* ---- ways to draw ---- */

/* The k-th largest of the blocks' maxima: k blocks hold k logits that are at least that. */
__device__ float kth_block_max(int k)
{
	for (int b = threadIdx.x; b < mem()->blocks; b += THREADS) {
		float mine = mem()->block_max[b];
		int above = 0, equal = 0;

		for (int i = 0; i < mem()->blocks; i++) {
			above += mem()->block_max[i] > mine;
			equal += mem()->block_max[i] == mine;
		}
		if (above < k && k <= above + equal)
			mem()->line = mine; /* every writer has the same, but for a zero's sign */
	}
	__syncthreads();
	return mem()->line;
}

/* A line that the k best are above, or all that have weight. */
__device__ float line_of_top_k(int k)
{
	float lowest = least_logit(reach[REACHES - 1]), least = lowest;

	if (k <= mem()->blocks)
		return fmaxf(kth_block_max(k), lowest);
	for (int i = 0; i < REACHES; i++) {
		least = least_logit(reach[i]);
		if (count_candidates(least) >= k)
			break;
	}
	return least;
}

__device__ int draw_top_k(const km_draw &d, double u)
{
	shared *s = mem();
	float least = line_of_top_k(d.top_k);
	int n = count_candidates(least), keep = min(n, d.top_k);

	if (n > MOST)
		return KM_DRAWN_BY_HOST;
	gather(least);
	sort_candidates(n);
	if (d.top_p < 1) {
		double mass = 0;

		for (int i = threadIdx.x; i < keep; i += THREADS)
			mass += (double)key_weight(s->key[i]);
		keep = cut_mass(keep, d.top_p * sum_all(mass));
	}
	return draw_candidate(n, last_key(keep), d.min_p, u);
}

/* Is a token among the best that make up `need`? It is when those before it do not. */
__device__ bool in_top_p(int id, double need)
{
	float logit = mem()->logits[id];
	double before = sum_weights<true>(logit);
	int equal = 0;

	for (int i = threadIdx.x; i < id; i += THREADS)
		equal += mem()->logits[i] == logit;
	equal = sum_all(equal);
	return __dadd_rn(before, __dmul_rn((double)equal, (double)weight_of(logit))) < need;
}

/* Out of a flat distribution: see engine/sampler.c. */
__device__ int draw_until_in_top_p(const km_draw &d, double total)
{
	for (unsigned long long i = 0; i < TRIES; i++) {
		unsigned long long stream = i ? random(d.seed, ~0ull - i) : d.seed;
		int id;

		if (i)
			sum_weights<false>(0); /* in_top_p has overwritten the blocks' sums */
		id = token_at(__dmul_rn(total, uniform(stream, d.index)));
		if (in_top_p(id, __dmul_rn(d.top_p, total)))
			return id;
	}
	return KM_DRAWN_BY_HOST;
}

__device__ int draw_top_p(const km_draw &d, double u)
{
	double total = sum_of_blocks(), need = __dmul_rn(d.top_p, total), mass = 0;
	float least = least_logit(reach[FIRST_REACH]);
	int n = count_candidates(least);

	if (n <= MOST)
		mass = gather(least);
	if (d.min_p <= 0 && d.top_p >= 0.5 && (n > MOST || mass < need))
		return draw_until_in_top_p(d, total);
	/* Fewer candidates where they do. */
	for (int i = n > MOST || mass >= need ? 0 : FIRST_REACH + 1; i < REACHES; i++) {
		least = least_logit(reach[i]);
		n = count_candidates(least);
		if (n > MOST)
			return KM_DRAWN_BY_HOST;
		mass = gather(least);
		if (mass >= need)
			break;
	}
	sort_candidates(n);
	return draw_candidate(n, last_key(cut_mass(n, need)), d.min_p, u);
}

__device__ int draw_min_p(const km_draw &d, double u)
{
	double line = -log(d.min_p) * 1.0001 + 1e-4;
	float least = least_logit(line < 87 ? (float)line : 87.0f);
	int n = count_candidates(least);

	if (n > MOST)
		return KM_DRAWN_BY_HOST;
	gather(least);
	return draw_candidate(n, ~0ull, d.min_p, u);
}

/* Rank 0's, once the row's maxima and, where it takes them, the sums of its weights are there. */
__device__ int draw_row(const km_draw &d)
{
	double u;

	if (d.scale == 0)
		return first_of_max();
	u = uniform(d.seed, d.index);
	if (d.top_k)
		return draw_top_k(d, u);
	if (d.top_p < 1)
		return draw_top_p(d, u);
	if (d.min_p > 0)
		return draw_min_p(d, u);
	return token_at(__dmul_rn(u, sum_of_blocks()));
}

/* All ranks go through the passes over the whole row, and rank 0 draws. */
__device__ int pass_and_draw(const km_draw &d, const km_draw_entry *entries)
{
	bool sums = d.scale != 0 && !d.top_k && (d.top_p < 1 || d.min_p <= 0), good;

	if (d.biases + d.counts) {
		if (mem()->rank == 0)
			adjust(mem()->logits, d, entries);
		meet();
	}
	good = find_max();
	if (good && sums) {
		sum_blocks<false>(0, mem()->rank, mem()->ranks);
		meet();
	}
	return good && mem()->rank == 0 ? draw_row(d) : KM_DRAWN_BY_HOST;
}

__global__ void __launch_bounds__(THREADS, 1) sample(kk_sample_args a, int ranks)
{
	int rank = blockIdx.x % ranks, line = blockIdx.x / ranks, id;

	ptx_release_successor();
	ptx_wait_predecessor();
	if (!a.draw[line].by_device) { /* all ranks */
		if (threadIdx.x == 0 && rank == 0)
			a.drawn[line] = KM_DRAWN_BY_HOST;
		return;
	}
	if (threadIdx.x == 0) {
		mem()->logits = a.logits + (size_t)line * a.vocab;
		mem()->vocab = a.vocab;
		mem()->blocks = (a.vocab + BLOCK - 1) / BLOCK;
		mem()->scale = a.draw[line].scale;
		mem()->rank = rank;
		mem()->ranks = ranks;
	}
	__syncthreads();
	meet(); /* nobody writes to a rank that has not begun */
	id = pass_and_draw(a.draw[line], a.entries);
	if (threadIdx.x == 0 && rank == 0)
		a.drawn[line] = id;
}

/* Few rows, and long: two blocks on each multiprocessor at most. With more, blocks that share rows
 * take longer than whole rows do: 64 rows greedy 52 us against 31, a temperature 116 against 87. */
static int ranks_for(const kk_sample_args *a)
{
	return a->rows <= a->shared_rows && a->vocab >= RANKS * WARPS * BLOCK / 4 ? RANKS : 1;
}

cudaError_t kk_sample(const kk_sample_args *a, cudaStream_t stream)
{
	cudaLaunchAttribute attribute[2] = {};
	cudaLaunchConfig_t config = {};
	int ranks = ranks_for(a);
	cudaError_t rc;

	if (a->vocab < 1 || a->vocab > KM_DRAW_VOCAB)
		return cudaErrorInvalidValue;
	rc = cudaFuncSetAttribute(sample, cudaFuncAttributeMaxDynamicSharedMemorySize,
	                          (int)sizeof(shared));
	if (rc != cudaSuccess || !a->rows)
		return rc;
	config.gridDim = dim3(a->rows * ranks);
	config.blockDim = dim3(THREADS);
	config.dynamicSmemBytes = sizeof(shared);
	config.stream = stream;
	config.attrs = attribute;
	if (ranks > 1) {
		attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
		attribute[config.numAttrs].val.clusterDim.x = ranks;
		attribute[config.numAttrs].val.clusterDim.y = 1;
		attribute[config.numAttrs++].val.clusterDim.z = 1;
	}
	if (a->pdl) {
		attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
		attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
	}
	return cudaLaunchKernelEx(&config, sample, *a, ranks);
}

__global__ void __launch_bounds__(256)
	next_ids(const int32_t *from, const int32_t *drawn, int32_t *ids, int count)
{
	int i = blockIdx.x * 256 + threadIdx.x;

	ptx_release_successor();
	ptx_wait_predecessor();
	if (i < count)
		ids[i] = max(drawn[from[i]], 0);
}

cudaError_t kk_next_ids(const int32_t *from, const int32_t *drawn, int32_t *ids, int count,
                        cudaStream_t stream)
{
	return launch(next_ids, dim3((count + 255) / 256), 256, false, stream, from, drawn, ids, count);
}
