/*
 * Graphs of steps on a GPU (model/gpu_graphs.h has the contract).
 *
 * WHOLE   A step that only generates is one graph for each form: its rows and its longest sequence,
 *         both rounded up. Rows of padding have no cached tokens, write no KV and select no expert.
 *
 * PIECES  What attention enqueues of a step with prompts follows from its sequences: waves, runs and
 *         tiles, and where the decoding rows end. So that is launched, with rope and the write of the
 *         KV, over the step's own rows; what lies between two layers' attention follows from the number
 *         of rows alone, and is a graph for each bucket of rows:
 *
 *           piece 0      embedding; of layer 0: norm, q and kv_a
 *           piece i      of layer i - 1: o, MLP or experts; of layer i: norm, q and kv_a
 *           last piece   of the last layer but one: o, MLP or experts
 *
 *         The last layer, head and sampler are launched: they see the rows that are kept, whose number
 *         varies. Rows of padding have id 0 and select no expert; attention never sees them, so their
 *         input of o is whatever was left there. No row reads another's, so that does not matter.
 *
 * WHEN    Usual forms and all buckets are captured at open. Otherwise the first step of a form or bucket
 *         is launched kernel by kernel, so that all that a first launch looks up is there; the second is
 *         captured as it goes; later ones replay. Graphs hold addresses of device memory only, where a
 *         step's ids and its number of valid rows have the same place for the same number of rows: which
 *         of the two staging buffers they came from does not show.
 *
 * WORTH   A MoE layer of more than 8 prompt rows is 18 to 20 launches, 14 to 16 of them in a piece. H200
 *         (kimi-serve --bench-one-batch '1,8,2;1,32,2;1,128,2;1,512,2', ms of prefill with graphs and without):
 *         eight layers of K2.5's slice of eight 0.99 / 1.86 / 2.65 / 3.86 for 1.03 / 1.92 / 2.72 / 3.95; kimi-nano 0.29 /
 *         0.41 / 0.87 / 2.89 for 0.29 / 0.47 / 0.89 / 2.94, one run of each. So they win 2 to 4 %, and 13 % once, though at either end of a piece no launch begins in its
 *         predecessor's tail. Beyond MOST_BUCKET_ROWS padding would cost more.
 *
 * BOUNDS  At most KM_GPU_FORMS graphs of whole steps, and KM_GPU_BUCKETS times the layers of pieces.
 */
#include "model/gpu.h"

#if KM_CUDA

#include <stdlib.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/progress.h"

enum { LEAST_LONGEST = 1024, LONGEST_AT_OPEN = 4096, MOST_FORM_ROWS = 256 };

/* Powers of two while a linear layer's time is its weights', which padding adds nothing to; from there
 * one more between two of them. */
enum { MOST_DOUBLED = 128, MOST_BUCKET_ROWS = 512 };

enum { WHOLE = -1 };

/* ---- padding ---- */

int km_gpu_form_rows(int rows)
{
	return rows > 4 ? km_linear_rounded(rows) : rows > 2 ? 4 : rows;
}

int km_gpu_form_length(const km_model *m, int longest)
{
	int length = LEAST_LONGEST;

	while (length < longest)
		length *= 2;
	return length < m->options.max_context ? length : m->options.max_context;
}

int km_gpu_bucket_rows(const km_model *m, int rows)
{
	int bucket = 1, room = m->gpu->b.rows;

	if (rows > MOST_BUCKET_ROWS || rows > room)
		return 0;
	while (bucket < rows) {
		int power = 1;

		while (2 * power <= bucket)
			power *= 2;
		bucket += bucket < MOST_DOUBLED ? bucket : power / 2;
	}
	return bucket < room ? bucket : room;
}

/* ---- capture ---- */

static int capture(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run, int at,
                   km_cuda_graph **graph, km_err *err)
{
	km_gpu *g = m->gpu;
	int rc;

	KM_TRY(km_cuda_capture_begin(g->cuda, err));
	rc = at == WHOLE ? run(m, &g->step, err) : blocks->piece(m, at, err);
	if (rc < 0) {
		km_cuda_graph *broken = NULL;

		if (km_cuda_capture_end(g->cuda, &broken, NULL) >= 0)
			km_cuda_graph_free(broken);
		return rc;
	}
	return km_cuda_capture_end(g->cuda, graph, err);
}

/* The place of the step's form among those seen; NULL when there is no room for another. */
static km_gpu_form *find_form(km_gpu *g)
{
	km_gpu_graphs *s = &g->graphs;
	km_gpu_form form = { .rows = g->step.tokens,
		             .longest = g->longest,
		             .page_size = g->all.page_size };

	for (int i = 0; i < s->forms; i++)
		if (s->form[i].rows == form.rows && s->form[i].longest == form.longest &&
		    s->form[i].page_size == form.page_size)
			return &s->form[i];
	if (s->forms == KM_GPU_FORMS || form.rows > MOST_FORM_ROWS)
		return NULL;
	s->form[s->forms] = form;
	return &s->form[s->forms++];
}

static km_gpu_bucket *find_bucket(km_model *m)
{
	km_gpu_graphs *s = &m->gpu->graphs;
	int rows = m->gpu->step.tokens, pieces = m->config.num_hidden_layers;

	for (int i = 0; i < s->buckets; i++)
		if (s->bucket[i].rows == rows)
			return &s->bucket[i];
	KM_ASSERT(s->buckets < KM_GPU_BUCKETS); /* more than km_gpu_bucket_rows has values */
	s->bucket[s->buckets] = (km_gpu_bucket){
		.rows = rows,
		.pieces = pieces,
		.piece = km_xcalloc((size_t)pieces, sizeof(km_cuda_graph *)),
	};
	return &s->bucket[s->buckets++];
}

/* ---- a step ---- */

static bool is_first(bool *seen)
{
	bool before = *seen;

	*seen = true;
	return !before;
}

static int run_form(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run, km_err *err)
{
	km_gpu *g = m->gpu;
	km_gpu_form *form = find_form(g);

	if (!form || is_first(&form->seen))
		return run(m, &g->step, err);
	if (!form->graph)
		KM_TRY(capture(m, blocks, run, WHOLE, &form->graph, err));
	g->graphs.replays++;
	return km_cuda_graph_launch(g->cuda, form->graph, err);
}

static int run_bucket(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run, km_err *err)
{
	km_gpu *g = m->gpu;
	km_gpu_bucket *bucket = find_bucket(m);

	if (is_first(&bucket->seen))
		return run(m, &g->step, err);
	for (int at = 0; at < bucket->pieces; at++) {
		if (!bucket->piece[at])
			KM_TRY(capture(m, blocks, run, at, &bucket->piece[at], err));
		KM_TRY(km_cuda_graph_launch(g->cuda, bucket->piece[at], err));
		KM_TRY(blocks->between(m, at, err));
	}
	g->graphs.piecewise++;
	return 0;
}

int km_gpu_graphs_run(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run, km_err *err)
{
	km_gpu *g = m->gpu;

	if (m->options.disable_graphs || !g->valid)
		return run(m, &g->step, err);
	return g->generating ? run_form(m, blocks, run, err) : run_bucket(m, blocks, run, err);
}

/* ---- at open ---- */

/* A step of which every row is padding: run, so that all that a first launch looks up is there, then
 * captured. */
static int prepare_form(km_model *m, const km_gpu_blocks *blocks, int rows, km_run_steps *run,
                        km_err *err)
{
	km_gpu *g = m->gpu;
	km_gpu_form *form;

	KM_TRY(blocks->send_padding(m, rows, true, err));
	form = find_form(g);
	if (!form)
		return km_cuda_wait(g->cuda, err);
	form->seen = true;
	KM_TRY(run(m, &g->step, err));
	KM_TRY(km_cuda_wait(g->cuda, err));
	return capture(m, blocks, run, WHOLE, &form->graph, err);
}

/* Without attention, which is not captured and has no rows. */
static int prepare_bucket(km_model *m, const km_gpu_blocks *blocks, int rows, km_run_steps *run,
                          km_progress *progress, km_err *err)
{
	km_gpu *g = m->gpu;
	km_gpu_bucket *bucket;

	KM_TRY(blocks->send_padding(m, rows, false, err));
	bucket = find_bucket(m);
	bucket->seen = true;
	for (int at = 0; at < bucket->pieces; at++)
		KM_TRY(blocks->piece(m, at, err));
	KM_TRY(km_cuda_wait(g->cuda, err));
	for (int at = 0; at < bucket->pieces; at++) {
		KM_TRY(capture(m, blocks, run, at, &bucket->piece[at], err));
		km_progress_add(progress, 1);
	}
	return 0;
}

static int most_form_rows(const km_model *m)
{
	const km_gpu *g = m->gpu;
	int rows = km_gpu_form_rows(m->options.max_seqs), most = MOST_FORM_ROWS;

	most = most < g->b.rows ? most : g->b.rows;
	most = most < g->b.logit_rows ? most : g->b.logit_rows;
	return rows < most ? rows : most;
}

/* Without blocks only counts. */
static int prepare_forms(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run,
                         km_progress *progress, km_err *err)
{
	km_gpu *g = m->gpu;
	int most = most_form_rows(m);

	for (int length = LEAST_LONGEST; length <= LONGEST_AT_OPEN; length *= 2) {
		g->longest = km_gpu_form_length(m, length);
		for (int rows = 1; rows <= most; rows = km_gpu_form_rows(rows + 1)) {
			if (blocks)
				KM_TRY(prepare_form(m, blocks, rows, run, err));
			km_progress_add(progress, 1);
		}
		if (g->longest == m->options.max_context)
			break;
	}
	return 0;
}

static int prepare_all(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run,
                       km_progress *progress, km_err *err)
{
	KM_TRY(prepare_forms(m, blocks, run, progress, err));
	for (int rows = 1; rows; rows = km_gpu_bucket_rows(m, rows + 1)) {
		if (blocks)
			KM_TRY(prepare_bucket(m, blocks, rows, run, progress, err));
		else
			km_progress_add(progress, m->config.num_hidden_layers);
	}
	return 0;
}

int km_gpu_graphs_prepare(km_model *m, const km_gpu_blocks *blocks, km_run_steps *run, km_err *err)
{
	km_gpu_graphs *s = &m->gpu->graphs;
	km_progress count = { .quiet = true }, progress;
	size_t before, after;
	int64_t start = km_now_ns();
	int rc;

	if (m->options.disable_graphs)
		return 0;
	prepare_all(m, NULL, run, &count, NULL);
	KM_TRY(km_cuda_free_bytes(m->options.gpu, &before, err));
	km_progress_init(&progress, "capturing", "graphs", count.done, m->options.quiet);
	rc = prepare_all(m, blocks, run, &progress, err);
	km_progress_finish(&progress);
	KM_TRY(rc);
	KM_TRY(km_cuda_free_bytes(m->options.gpu, &after, err));
	s->captured = (int)progress.done;
	s->bytes = before > after ? before - after : 0;
	s->seconds = (double)(km_now_ns() - start) / 1e9;
	return 0;
}

void km_gpu_graphs_release(km_gpu_graphs *s)
{
	for (int i = 0; i < s->forms; i++)
		km_cuda_graph_free(s->form[i].graph);
	for (int i = 0; i < s->buckets; i++) {
		for (int at = 0; at < s->bucket[i].pieces; at++)
			km_cuda_graph_free(s->bucket[i].piece[at]);
		free(s->bucket[i].piece);
	}
	s->forms = s->buckets = 0;
}

void km_gpu_graphs_explain(const km_model *m, km_buf *out)
{
	const km_gpu_graphs *s = &m->gpu->graphs;

	if (m->options.disable_graphs)
		km_buf_puts(out, "GPU graphs: off; steps are padded all the same\n");
	else
		km_buf_printf(out,
		              "GPU graphs: one for a step that only generates, one for each layer of a step "
		              "with prompts, up to %d rows, attention launched between them; %d captured at "
		              "open in %.2f s, %.1f MB of device memory; others (to generate with more rows, "
		              "or more cached tokens: powers of 2) at their second step\n",
		              MOST_BUCKET_ROWS, s->captured, s->seconds, (double)s->bytes / 1e6);
}

#endif
