#include "device/mla_plan.h"

#include "base/err.h"

static int ceil_div(int a, int b)
{
	return (a + b - 1) / b;
}

bool km_mla_tensor_fits(const km_mla_shape *s, const km_mla_device *d)
{
	return d->capability == 90 && s->kv_lora_rank == 512 && s->rope_dim == 64 &&
	       s->nope_dim == 128 && s->v_dim == 128;
}

/*
 * Splits. A block takes FIXED tiles' time before and after its run (the query comes in, 128 KB of
 * sums go out) and one for each tile; blocks run in waves of one a multiprocessor. The best count
 * of splits is the one whose waves end first; among equals the smallest, since each split is 2 KB a
 * head for the last launch to read. More than MAX_SPLITS would cost that launch more than they
 * save.
 */
enum { MAX_SPLITS = 160, HEADS_OF_BLOCK = 64 };

static const double FIXED = 1.5, PUT_TOGETHER = 0.02; /* tiles; a split's, in the last launch */

static double decode_cost(int blocks, int tiles, int splits, int multiprocessors)
{
	int waves = ceil_div(blocks * splits, multiprocessors);

	return waves * (ceil_div(tiles, splits) + FIXED) + PUT_TOGETHER * splits;
}

static int choose_splits(int blocks, int tiles, int multiprocessors)
{
	int best = 1;

	for (int s = 2; s <= MAX_SPLITS && s <= tiles; s++)
		if (decode_cost(blocks, tiles, s, multiprocessors) <
		    decode_cost(blocks, tiles, best, multiprocessors))
			best = s;
	return best;
}

/* A head's rows of kv_b are shared by as many blocks as run at once: a second wave of them costs as
 * much as the first (on an H100 at 64 heads and one row 7 us with 2, 14 with 4). */
static int choose_v_blocks(int heads, int seqs, int multiprocessors)
{
	int v_blocks = 4;

	while (v_blocks > 1 && heads * ceil_div(seqs, 16) * v_blocks > multiprocessors)
		v_blocks /= 2;
	return v_blocks;
}

/*
 * One launch, a cluster of 16 blocks a row, for the 8 heads of a slice: it wins where a chain of
 * latencies is all there is. The GPU holds seven such clusters at a time or so. Up to
 * CLUSTER_CONTEXT a block has at most two tiles of its row, by the row's length and not by the
 * longest that the plan is for (us on H100: mla_cluster.cu).
 */
enum { CLUSTER_HEADS = 8, CLUSTER_SEQS = 6, CLUSTER_CONTEXT = 2048 };

km_mla_decode_plan km_mla_plan_decode(const km_mla_shape *shape, int seqs, int max_context,
                                      const km_mla_device *device)
{
	km_mla_decode_plan p = { .tensor = km_mla_tensor_fits(shape, device),
		                 .splits = 1,
		                 .v_blocks = 1 };

	if (!p.tensor)
		return p;
	p.splits = choose_splits(seqs * ceil_div(shape->heads, HEADS_OF_BLOCK),
	                         ceil_div(max_context, KM_MLA_TILE), device->multiprocessors);
	p.v_blocks = choose_v_blocks(shape->heads, seqs, device->multiprocessors);
	p.cluster = shape->heads == CLUSTER_HEADS && seqs <= CLUSTER_SEQS &&
	            max_context <= CLUSTER_CONTEXT;
	return p;
}

static size_t round_up(size_t n)
{
	return (n + 255) / 256 * 256;
}

void km_mla_decode_layout(const km_mla_shape *s, const km_mla_decode_plan *p, int seqs,
                          km_mla_decode_scratch *at)
{
	size_t rows = (size_t)seqs * (size_t)s->heads, runs = rows * (size_t)p->splits;

	at->query = 0;
	at->partial = round_up(rows * (size_t)(s->kv_lora_rank + s->rope_dim) * 2);
	at->stats = at->partial + round_up(runs * (size_t)s->kv_lora_rank * 4);
	at->bytes = at->stats + round_up(runs * 2 * 4);
}

void km_mla_prefill_capacity(km_mla_prefill_plan *p, int max_rows, int max_seqs, int max_context,
                             int room)
{
	int64_t padded = ((int64_t)max_context + KM_MLA_PREFILL_TILE - 1) / KM_MLA_PREFILL_TILE *
	                 KM_MLA_PREFILL_TILE;
	int64_t waves = (max_seqs * padded + room - 1) / room + 1;
	int64_t pieces = padded / room + 2; /* of one sequence */

	KM_ASSERT(room > 0 && room % KM_MLA_PREFILL_TILE == 0);
	KM_ASSERT(max_seqs * padded < INT32_MAX);
	p->max_waves = (int)waves;
	p->max_runs = (int)(max_seqs * (padded / KM_MLA_RUN + pieces));
	p->max_tiles = (int)(pieces * (max_rows / KM_MLA_PREFILL_TILE + max_seqs));
}

typedef struct filling {
	km_mla_prefill_plan *plan;
	km_mla_wave *wave; /* NULL: the next piece begins one */
	int runs, tiles, room;
} filling;

static int open_wave(filling *f, km_err *err)
{
	km_mla_prefill_plan *p = f->plan;

	if (f->wave && f->wave->tokens < f->room)
		return 0;
	if (p->waves == p->max_waves)
		return km_fail(err, KM_ELIMIT, "prefill needs more than the planned %d waves",
		               p->max_waves);
	f->wave = &p->wave[p->waves++];
	*f->wave = (km_mla_wave){ .runs_from = f->runs, .tiles_from = f->tiles };
	return 0;
}

static int add_runs(filling *f, int seq, int first, int count, km_err *err)
{
	for (int at = 0; at < count; at += KM_MLA_RUN) {
		int n = count - at < KM_MLA_RUN ? count - at : KM_MLA_RUN;

		if (f->runs == f->plan->max_runs)
			return km_fail(err, KM_ELIMIT,
			               "prefill needs more than the planned %d runs",
			               f->plan->max_runs);
		f->plan->runs[f->runs++] =
			(km_mla_run){ seq, first + at, n, f->wave->tokens + at };
		f->wave->runs++;
	}
	return 0;
}

/* The sequence's rows against one piece of its context, those that see most of it first. Rows that
 * end before the piece have had their result. */
static int add_tiles(filling *f, const km_batch *b, int seq, int first, int count, km_err *err)
{
	int start = b->seq_start[seq], rows = b->seq_start[seq + 1] - start;
	int row = (rows - 1) / KM_MLA_PREFILL_TILE * KM_MLA_PREFILL_TILE;

	for (; row >= 0; row -= KM_MLA_PREFILL_TILE) {
		int n = rows - row < KM_MLA_PREFILL_TILE ? rows - row : KM_MLA_PREFILL_TILE;
		int last = b->positions[start + row + n - 1];
		km_mla_tile tile = { start + row, n, first, count, f->wave->tokens, first > 0,
			             last >= first + count, 0 };

		if (last < first)
			break;
		if (f->tiles == f->plan->max_tiles)
			return km_fail(err, KM_ELIMIT,
			               "prefill needs more than the planned %d tiles",
			               f->plan->max_tiles);
		f->plan->tiles[f->tiles++] = tile;
		f->plan->state |= tile.goes_on != 0;
		f->wave->tiles++;
	}
	return 0;
}

/* Pieces are padded to whole tiles, so what is left of a wave is whole tiles too. */
static int add_sequence(filling *f, const km_batch *b, int seq, km_err *err)
{
	int rows = b->seq_start[seq + 1] - b->seq_start[seq];
	int context = rows ? b->positions[b->seq_start[seq + 1] - 1] + 1 : 0;

	for (int first = 0, count; first < context; first += count) {
		KM_TRY(open_wave(f, err));
		count = f->room - f->wave->tokens;
		if (count > context - first)
			count = context - first;
		KM_TRY(add_runs(f, seq, first, count, err));
		KM_TRY(add_tiles(f, b, seq, first, count, err));
		f->wave->tokens += ceil_div(count, KM_MLA_PREFILL_TILE) * KM_MLA_PREFILL_TILE;
	}
	return 0;
}

int km_mla_plan_prefill(km_mla_prefill_plan *plan, const km_batch *batch, int room, km_err *err)
{
	filling f = { .plan = plan, .room = room };

	KM_ASSERT(room > 0 && room % KM_MLA_PREFILL_TILE == 0);
	plan->waves = 0;
	plan->state = false;
	for (int s = batch->decode_seqs; s < batch->seqs; s++)
		KM_TRY(add_sequence(&f, batch, s, err));
	return 0;
}
