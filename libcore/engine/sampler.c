#include "engine/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/fixed_math.h"
#include "base/mem.h"
#include "base/rng.h"
#include "engine/vocab.h"

/* Below this the distribution is greedy's to float precision, and 1 / temperature stays finite. */
#define GREEDY_BELOW 1e-5

typedef struct candidate {
	float logit, weight; /* weight: exp((logit - max) / temperature) */
	int32_t id;
} candidate;

struct km_sampler {
	int vocab;
	const km_vocab_ops *ops;
	float *adjusted;       /* [vocab], logits after bias and penalties */
	float *block_max;      /* [blocks], of the raw logits */
	float *adjusted_max;   /* [blocks] */
	double *block_sum;     /* [blocks] */
	float *max_copy;     /* [blocks], scratch of pick_top_k */
	candidate *candidates; /* [vocab] */
};

/* One row on its way: the logits to draw from and what the passes found. */
typedef struct row {
	const float *logits;
	const float *block_max;
	float max, scale; /* scale: 1 / temperature */
} row;

void km_sampling_init(km_sampling *sampling)
{
	*sampling = (km_sampling){ .temperature = 1, .top_p = 1, .repetition_penalty = 1 };
}

int km_sampling_check(const km_sampling *s, int vocab_size, km_err *err)
{
	if (!(s->temperature >= 0 && s->temperature <= 1000))
		return km_fail(err, KM_EINVAL,
		               "temperature is %g, expected a number from 0 to 1000",
		               s->temperature);
	if (!(s->top_p > 0 && s->top_p <= 1))
		return km_fail(err, KM_EINVAL, "top_p is %g, expected a number above 0, at most 1",
		               s->top_p);
	if (!(s->min_p >= 0 && s->min_p <= 1))
		return km_fail(err, KM_EINVAL, "min_p is %g, expected a number from 0 to 1",
		               s->min_p);
	if (!(s->repetition_penalty > 0 && s->repetition_penalty <= 1000))
		return km_fail(err, KM_EINVAL,
		               "repetition_penalty is %g, expected a number above 0, at most 1000",
		               s->repetition_penalty);
	if (!(fabs(s->frequency_penalty) <= 1000))
		return km_fail(err, KM_EINVAL,
		               "frequency_penalty is %g, expected a number from -1000 to 1000",
		               s->frequency_penalty);
	if (!(fabs(s->presence_penalty) <= 1000))
		return km_fail(err, KM_EINVAL,
		               "presence_penalty is %g, expected a number from -1000 to 1000",
		               s->presence_penalty);
	for (int i = 0; i < s->bias_count; i++) {
		if (s->bias[i].id < 0 || s->bias[i].id >= vocab_size)
			return km_fail(err, KM_EINVAL,
			               "logit_bias names token id %d, expected 0 to %d",
			               (int)s->bias[i].id, vocab_size - 1);
		if (!(fabsf(s->bias[i].bias) <= 1e6f))
			return km_fail(err, KM_EINVAL,
			               "logit_bias of token id %d is %g, expected a number from "
			               "-1e6 to 1e6",
			               (int)s->bias[i].id, (double)s->bias[i].bias);
	}
	return 0;
}

bool km_sampling_has_penalties(const km_sampling *s)
{
	return s->repetition_penalty != 1 || s->frequency_penalty != 0 || s->presence_penalty != 0;
}

void km_counts_init(km_counts *counts, int max_distinct)
{
	uint32_t slots = 16;

	while (slots < 2 * (uint32_t)max_distinct)
		slots *= 2;
	*counts = (km_counts){ .cap = max_distinct, .mask = slots - 1 };
	counts->slot = km_xreallocarray(NULL, slots, sizeof(int32_t));
	counts->id = km_xreallocarray(NULL, (size_t)max_distinct, sizeof(int32_t));
	counts->output = km_xreallocarray(NULL, (size_t)max_distinct, sizeof(int32_t));
	memset(counts->slot, 0xff, slots * sizeof(int32_t));
}

void km_counts_release(km_counts *counts)
{
	free(counts->slot);
	free(counts->id);
	free(counts->output);
	*counts = (km_counts){ 0 };
}

void km_counts_add(km_counts *counts, int32_t id, bool output)
{
	uint32_t at = (uint32_t)km_rng_mix((uint32_t)id) & counts->mask;
	int32_t entry;

	while ((entry = counts->slot[at]) >= 0 && counts->id[entry] != id)
		at = (at + 1) & counts->mask;
	if (entry < 0) {
		KM_ASSERT(counts->count < counts->cap);
		entry = counts->count++;
		counts->slot[at] = entry;
		counts->id[entry] = id;
		counts->output[entry] = 0;
	}
	counts->output[entry] += output;
}

km_sampler *km_sampler_new(int vocab_size)
{
	km_sampler *s = km_xcalloc(1, sizeof(*s));
	size_t n = (size_t)vocab_size, blocks = (size_t)km_vocab_blocks(vocab_size);

	s->vocab = vocab_size;
	s->ops = km_vocab_best();
	s->adjusted = km_xreallocarray(NULL, n, sizeof(float));
	s->block_max = km_xreallocarray(NULL, blocks, sizeof(float));
	s->adjusted_max = km_xreallocarray(NULL, blocks, sizeof(float));
	s->block_sum = km_xreallocarray(NULL, blocks, sizeof(double));
	s->max_copy = km_xreallocarray(NULL, blocks, sizeof(float));
	s->candidates = km_xreallocarray(NULL, n, sizeof(candidate));
	return s;
}

void km_sampler_free(km_sampler *s)
{
	if (!s)
		return;
	free(s->adjusted);
	free(s->block_max);
	free(s->adjusted_max);
	free(s->block_sum);
	free(s->max_copy);
	free(s->candidates);
	free(s);
}

static int find_max(km_sampler *s, const float *logits, float *block_max, float *max, km_err *err)
{
	int bad = s->ops->max(logits, s->vocab, block_max, max);

	if (bad >= 0)
		return km_fail(err, KM_EFORMAT,
		               "the model's logit of token id %d is %g, expected a finite number",
		               bad, (double)logits[bad]);
	if (*max == -INFINITY)
		return km_fail(err, KM_EFORMAT,
		               "the model's logits are all -infinity: no token is possible");
	return 0;
}

static void adjust(km_sampler *s, const km_sample_args *args)
{
	const km_sampling *p = args->sampling;
	const km_counts *counts = args->counts;
	float repetition = (float)p->repetition_penalty;

	memcpy(s->adjusted, args->logits, (size_t)s->vocab * sizeof(float));
	for (int i = 0; i < p->bias_count; i++)
		s->adjusted[p->bias[i].id] += p->bias[i].bias;
	if (!counts)
		return;
	for (int i = 0; i < counts->count; i++) {
		float *logit = &s->adjusted[counts->id[i]];

		*logit = *logit > 0 ? *logit / repetition : *logit * repetition;
		if (counts->output[i])
			*logit -= (float)(p->frequency_penalty * counts->output[i] +
			                  p->presence_penalty);
	}
}

/* ---- selections ---- */

static inline bool comes_first(const candidate *a, const candidate *b)
{
	return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static inline void swap(candidate *a, candidate *b)
{
	candidate c = *a;

	*a = *b;
	*b = c;
}

/* Partitions c[lo..hi) around the median of three; returns where the pivot stands. */
static int partition(candidate *c, int lo, int hi)
{
	int mid = lo + (hi - lo) / 2, last = hi - 1, at = lo;

	if (comes_first(&c[mid], &c[lo]))
		swap(&c[mid], &c[lo]);
	if (comes_first(&c[last], &c[lo]))
		swap(&c[last], &c[lo]);
	if (comes_first(&c[mid], &c[last]))
		swap(&c[mid], &c[last]);
	for (int i = lo; i < last; i++)
		if (comes_first(&c[i], &c[last]))
			swap(&c[i], &c[at++]);
	swap(&c[at], &c[last]);
	return at;
}

/* Moves the k best to the front. */
static void select_count(candidate *c, int n, int k)
{
	int lo = 0, hi = n;

	while (hi - lo > 1) {
		int at = partition(c, lo, hi);

		if (at == k || at == k - 1)
			return;
		if (at > k)
			hi = at;
		else
			lo = at + 1;
	}
}

/* Moves the fewest best whose weights reach `need` to the front; returns how many, at least one. */
static int select_mass(candidate *c, int n, double need)
{
	int lo = 0, hi = n;

	while (hi - lo > 1) {
		int at = partition(c, lo, hi);
		double before = 0;

		for (int i = lo; i < at; i++)
			before += (double)c[i].weight;
		if (before >= need) {
			hi = at;
			continue;
		}
		need -= before + (double)c[at].weight;
		lo = at + 1;
		if (need <= 0)
			return lo;
	}
	return lo < hi || lo == 0 ? lo + 1 : lo;
}

/* The tokens whose logit is at least `least`, in the order of ids; gives up after more than
 * `limit`. */
static int gather(km_sampler *s, const row *r, float least, int limit)
{
	int n = 0;

	for (int b = 0, i = 0; i < s->vocab && n <= limit; b++, i += KM_VOCAB_BLOCK) {
		int end = i + KM_VOCAB_BLOCK < s->vocab ? i + KM_VOCAB_BLOCK : s->vocab;

		if (r->block_max[b] < least)
			continue;
		for (int j = i; j < end; j++)
			if (r->logits[j] >= least)
				s->candidates[n++] = (candidate){ .logit = r->logits[j], .id = j };
	}
	return n;
}

static double weigh(candidate *c, int n, const row *r)
{
	double mass = 0;

	for (int i = 0; i < n; i++) {
		c[i].weight = km_vocab_exp(c[i].logit, r->max, r->scale);
		mass += (double)c[i].weight;
	}
	return mass;
}

/* The tokens that are no worse than the worst of the first n candidates, by id: every draw takes
 * its candidates in that order, which other ways to select can give as well. */
static int order_by_id(km_sampler *s, const row *r, int n)
{
	candidate *c = s->candidates, worst = c[0];
	int kept = 0;

	for (int i = 1; i < n; i++)
		if (comes_first(&worst, &c[i]))
			worst = c[i];
	n = gather(s, r, worst.logit, s->vocab);
	for (int i = 0; i < n; i++)
		if (!comes_first(&worst, &c[i]))
			c[kept++] = c[i];
	weigh(c, kept, r);
	return kept;
}

/* How far below the best logit the next attempt looks, in units of the temperature; the last takes
 * in every token whose weight is not 0. Typical distributions stop at the first or second. */
static const float reach[] = { 5, 9, 13, 18, 24, 32, 44, 87 };
enum { REACHES = sizeof(reach) / sizeof(reach[0]) };

static float least_logit(const row *r, float distance)
{
	return r->max - distance / r->scale;
}

/* The k-th largest of x[0..n), 1 <= k <= n; reorders x. (qsort of libc may allocate.) */
static float kth_largest(float *x, int n, int k)
{
	int lo = 0, hi = n - 1;

	while (lo < hi) {
		float pivot = x[lo + (hi - lo) / 2];
		int i = lo, j = hi;

		while (i <= j) {
			while (x[i] > pivot)
				i++;
			while (x[j] < pivot)
				j--;
			if (i <= j) {
				float t = x[i];

				x[i++] = x[j];
				x[j--] = t;
			}
		}
		if (k - 1 <= j)
			hi = j;
		else if (k - 1 >= i)
			lo = i;
		else
			break;
	}
	return x[k - 1];
}

/* The top_k best, or as many as have weight; to the front of candidates. k blocks whose maximum is
 * at least x hold k tokens that are: the k-th largest maximum is a tight first bound. */
static int pick_top_k(km_sampler *s, const row *r, int k)
{
	int blocks = km_vocab_blocks(s->vocab), n = 0;
	float lowest = least_logit(r, reach[REACHES - 1]);

	if (k <= blocks) {
		float bound;

		memcpy(s->max_copy, r->block_max, (size_t)blocks * sizeof(float));
		bound = kth_largest(s->max_copy, blocks, k);
		n = gather(s, r, bound > lowest ? bound : lowest, s->vocab);
	} else {
		for (int i = 0; i < REACHES && n < k; i++)
			n = gather(s, r, least_logit(r, reach[i]), s->vocab);
	}
	if (n <= k)
		return n;
	select_count(s->candidates, n, k);
	return k;
}

static int pick_top_p(km_sampler *s, const row *r, double need)
{
	int n = 0;

	for (int i = 0; i < REACHES; i++) {
		n = gather(s, r, least_logit(r, reach[i]), s->vocab);
		if (weigh(s->candidates, n, r) >= need)
			break;
	}
	return select_mass(s->candidates, n, need);
}

static int keep_min_p(candidate *c, int n, double min_p)
{
	int kept = 0;

	for (int i = 0; i < n; i++)
		if ((double)c[i].weight >= min_p) /* the best token's weight is 1 */
			c[kept++] = c[i];
	return kept;
}

/* ---- draws ---- */

static int32_t draw_candidate(const candidate *c, int n, double u)
{
	double target = 0, sum = 0;
	int32_t id = c[0].id;

	for (int i = 0; i < n; i++)
		target += (double)c[i].weight;
	target *= u;
	for (int i = 0; i < n; i++) {
		if (c[i].weight == 0)
			continue;
		id = c[i].id;
		sum += (double)c[i].weight;
		if (sum > target)
			break;
	}
	return id;
}

/* The token at `target` of the vocabulary's summed weights: the block by the blocks' sums, then
 * within it. */
static int32_t token_at(const km_sampler *s, const row *r, double target)
{
	int blocks = km_vocab_blocks(s->vocab), b = 0, last = 0, end;
	int32_t id = 0;
	double sum = 0;

	for (; b < blocks; b++) {
		if (s->block_sum[b] > 0)
			last = b;
		if (sum + s->block_sum[b] > target)
			break;
		sum += s->block_sum[b];
	}
	b = b < blocks ? b : last;
	end = (b + 1) * KM_VOCAB_BLOCK < s->vocab ? (b + 1) * KM_VOCAB_BLOCK : s->vocab;
	for (int i = b * KM_VOCAB_BLOCK; i < end; i++) {
		float weight = km_vocab_exp(r->logits[i], r->max, r->scale);

		if (weight == 0)
			continue;
		id = i;
		sum += (double)weight;
		if (sum > target)
			break;
	}
	return id;
}

/* How many of x[0..n) equal v. On the bits, of which -0 + 0 makes one zero: a vector comparison of
 * floats is a thing that compilers avoid. */
static int count_equal(const float *x, int n, float v)
{
	int32_t want, bits, equal = 0;
	float sum = v + 0.0f;

	memcpy(&want, &sum, 4);
	for (int i = 0; i < n; i++) {
		sum = x[i] + 0.0f;
		memcpy(&bits, &sum, 4);
		equal += bits == want;
	}
	return equal;
}

/* Is a token among the best that make up `need`? It is when those before it do not. */
static bool in_top_p(const km_sampler *s, const row *r, int32_t id, double need)
{
	float logit = r->logits[id];
	double before = s->ops->exp_sum_above(r->logits, s->vocab, r->max, r->scale, logit);
	int equal = count_equal(r->logits, id, logit);

	return before + equal * (double)km_vocab_exp(logit, r->max, r->scale) < need;
}

/* Selecting top_p out of a flat distribution touches most of the vocabulary several times. There
 * it is cheaper to draw from all and to draw again when the token is outside: the same
 * distribution, and as top_p is at least a half, the 64 tries end without a token once in 2^64
 * draws. */
enum { TRIES = 64, MANY = 4096 };

static int32_t draw_until_in_top_p(const km_sampler *s, const row *r, const km_sample_args *args,
                                   double total)
{
	for (uint64_t i = 0; i < TRIES; i++) {
		uint64_t stream = i ? km_rng_u64(args->seed, UINT64_MAX - i) : args->seed;
		int32_t id = token_at(s, r, total * km_rng_uniform(stream, args->index));

		if (in_top_p(s, r, id, args->sampling->top_p * total))
			return id;
	}
	return -1;
}

static int32_t draw_top_p(km_sampler *s, const row *r, const km_sample_args *args, double u)
{
	const km_sampling *p = args->sampling;
	double total = s->ops->exp_sum(r->logits, s->vocab, r->max, r->scale, s->block_sum);
	int n = gather(s, r, least_logit(r, reach[1]), MANY);
	int32_t id;

	if (p->min_p <= 0 && p->top_p >= 0.5 &&
	    (n > MANY || weigh(s->candidates, n, r) < p->top_p * total)) {
		id = draw_until_in_top_p(s, r, args, total);
		if (id >= 0)
			return id;
	}
	n = order_by_id(s, r, pick_top_p(s, r, p->top_p * total));
	if (p->min_p > 0)
		n = keep_min_p(s->candidates, n, p->min_p);
	return draw_candidate(s->candidates, n, u);
}

static int32_t draw(km_sampler *s, const row *r, const km_sample_args *args)
{
	const km_sampling *p = args->sampling;
	double u = km_rng_uniform(args->seed, args->index), mass;
	bool top_k = p->top_k > 0 && p->top_k < s->vocab, top_p = p->top_p < 1;
	int n;

	if (!top_k && top_p)
		return draw_top_p(s, r, args, u);
	if (!top_k && p->min_p <= 0) {
		mass = s->ops->exp_sum(r->logits, s->vocab, r->max, r->scale, s->block_sum);
		return token_at(s, r, u * mass);
	}
	if (top_k) {
		n = pick_top_k(s, r, p->top_k);
		mass = weigh(s->candidates, n, r);
		if (top_p)
			n = select_mass(s->candidates, n, p->top_p * mass);
		n = order_by_id(s, r, n);
	} else {
		/* A little further than min_p's own line, which keep_min_p draws on the weights. */
		double line = -km_fixed_log(p->min_p) * 1.0001 + 1e-4;

		n = gather(s, r, least_logit(r, line < 87 ? (float)line : 87.0f), s->vocab);
		weigh(s->candidates, n, r);
	}
	if (p->min_p > 0)
		n = keep_min_p(s->candidates, n, p->min_p);
	return draw_candidate(s->candidates, n, u);
}

static int32_t first_of_max(const km_sampler *s, const row *r)
{
	int i = 0;

	while (r->block_max[i / KM_VOCAB_BLOCK] < r->max)
		i += KM_VOCAB_BLOCK;
	while (i < s->vocab - 1 && r->logits[i] < r->max)
		i++;
	return i;
}

/* ---- log-probabilities ---- */

/* The `want` best by insertion: after the first blocks nearly all others are skipped whole. */
static int top_logits(const km_sampler *s, const row *r, int want, km_logprob *top)
{
	int n = 0;

	if (want > s->vocab)
		want = s->vocab;
	for (int b = 0, i = 0; want && i < s->vocab; b++, i += KM_VOCAB_BLOCK) {
		int end = i + KM_VOCAB_BLOCK < s->vocab ? i + KM_VOCAB_BLOCK : s->vocab;

		if (n == want && r->block_max[b] <= top[n - 1].logprob)
			continue;
		for (int j = i; j < end; j++) {
			int at = n;

			if (n == want && r->logits[j] <= top[n - 1].logprob)
				continue;
			if (n < want)
				n++;
			else
				at--;
			for (; at > 0 && top[at - 1].logprob < r->logits[j]; at--)
				top[at] = top[at - 1];
			top[at] = (km_logprob){ .id = j, .logprob = r->logits[j] };
		}
	}
	return n;
}

static void fill_logprobs(km_sampler *s, const row *r, int want, km_sampled *out)
{
	double log_sum = km_fixed_log(s->ops->exp_sum(r->logits, s->vocab, r->max, 1, NULL));

	out->logprob = (float)((double)r->logits[out->id] - (double)r->max - log_sum);
	out->top_count = top_logits(s, r, want, out->top);
	for (int i = 0; i < out->top_count; i++)
		out->top[i].logprob =
			(float)((double)out->top[i].logprob - (double)r->max - log_sum);
}

int km_sampler_sample(km_sampler *s, const km_sample_args *args, km_sampled *out, km_err *err)
{
	const km_sampling *p = args->sampling;
	row raw = { .logits = args->logits, .block_max = s->block_max, .scale = 1 }, r;

	out->top_count = 0;
	out->logprob = 0;
	KM_TRY(find_max(s, raw.logits, s->block_max, &raw.max, err));
	r = raw;
	if (p->bias_count || args->counts) {
		adjust(s, args);
		r.logits = s->adjusted;
		r.block_max = s->adjusted_max;
		KM_TRY(find_max(s, r.logits, s->adjusted_max, &r.max, err));
	}
	if (p->temperature < GREEDY_BELOW) {
		out->id = first_of_max(s, &r);
	} else {
		r.scale = (float)(1 / p->temperature);
		out->id = draw(s, &r, args);
	}
	if (args->logprobs >= 0)
		fill_logprobs(s, &raw, args->logprobs, out);
	return 0;
}

int km_sampler_score(km_sampler *s, const float *logits, int32_t id, int top, km_sampled *out,
                     km_err *err)
{
	row r = { .logits = logits, .block_max = s->block_max, .scale = 1 };

	KM_TRY(find_max(s, logits, s->block_max, &r.max, err));
	out->id = id;
	fill_logprobs(s, &r, top, out);
	return 0;
}

km_draw km_sampler_draw(const km_sample_args *args, int vocab_size)
{
	const km_sampling *p = args->sampling;

	return (km_draw){
		.seed = args->seed,
		.index = args->index,
		.top_p = p->top_p,
		.min_p = p->min_p,
		.frequency = p->frequency_penalty,
		.presence = p->presence_penalty,
		.scale = p->temperature < GREEDY_BELOW ? 0 : (float)(1 / p->temperature),
		.repetition = (float)p->repetition_penalty,
		.top_k = p->top_k > 0 && p->top_k < vocab_size ? p->top_k : 0,
		.by_device = 1,
	};
}
