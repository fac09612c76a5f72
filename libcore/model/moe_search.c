#include "model/moe_search.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#if KM_CUDA
#include "device/cuda_moe_tune.h"
#endif

struct job {
	const km_moe_search *s;
	int *tokens, count; /* owned: still to do */
	km_tune_problem problem;
	km_tune_schema schema;
	km_tune_table table;
	bool terminal;
	double last_shown;
	km_buf line;
	int write_rc;
	km_err write_err;
};

static void flush_line(struct job *j)
{
	fwrite(j->line.data ? j->line.data : "", 1, j->line.len, j->s->out);
	fflush(j->s->out);
	km_buf_clear(&j->line);
}

static void clear_progress(const struct job *j)
{
	if (j->terminal && !j->s->quiet)
		fprintf(stderr, "\r\033[K");
}

/* A token count is over: its row is printed, and the file holds it from now on. */
static void finish_tokens(struct job *j, const km_tuner_state *s)
{
	const km_tune_entry *e = km_tune_nearest(&j->table, s->tokens);

	clear_progress(j);
	if (!j->s->json) {
		km_moe_rows_add(j->s->target, e, s->candidates, s->wrong, &j->line);
		flush_line(j);
	}
	if (j->write_rc >= 0)
		j->write_rc = km_tune_write(&j->table, j->s->path, &j->problem, &j->schema,
		                            &j->write_err);
}

static void show(void *context, const km_tuner_state *s)
{
	struct job *j = context;
	double now = km_now_s();
	char best[96] = "", left[32] = "";

	if (s->done) {
		finish_tokens(j, s);
		return;
	}
	if (j->s->quiet || now - j->last_shown < (j->terminal ? 0.1 : 3))
		return;
	j->last_shown = now;
	if (s->best_us > 0)
		snprintf(best, sizeof(best), ", best %.2f us (%dx%dx%d g%d s%d)", s->best_us,
		         s->best[0], s->best[1], s->best[2], s->best[3], s->best[5]);
	if (s->left_s >= 0)
		snprintf(left, sizeof(left), ", %.0f s left", s->left_s);
	fprintf(stderr, "%s%d tokens (%d of %d): %d of %d checked, %d still in%s; %.0f s%s%s",
	        j->terminal ? "\r" : "", s->tokens, s->index + 1, s->count, s->checked,
	        s->candidates, s->left, best, s->elapsed_s, left, j->terminal ? "\033[K" : "\n");
}

static void wrong(void *context, int tokens, const int *values, const char *why)
{
	struct job *j = context;

	clear_progress(j);
	km_log(KM_LOG_WARN,
	       "at %d tokens the tile %dx%dx%d, group %d, %d stages computes wrongly: %s", tokens,
	       values[0], values[1], values[2], values[3], values[5], why);
}

static int open_backend(struct job *j, km_tuner_backend *backend, void **opened, km_err *err)
{
	if (j->s->backend) {
		*backend = *j->s->backend;
		return 0;
	}
	if (!j->s->target->present)
		return km_fail(err, KM_ENOTFOUND,
		               "tuning needs the GPU: %s; --dry-run says what would be tried",
		               j->s->target->why);
#if KM_CUDA
	km_moe_problem p = j->s->target->context.problem;

	for (int i = 0; i < j->count; i++)
		p.tokens = j->tokens[i] > p.tokens ? j->tokens[i] : p.tokens;
	return km_cuda_moe_tuner_open((km_cuda_moe_tuner **)opened, backend, &p,
	                              &j->s->target->context.device, err);
#else
	(void)backend, (void)opened;
	return km_fail(err, KM_EUNSUPPORTED, "this build has no CUDA");
#endif
}

static void close_backend(void *opened)
{
#if KM_CUDA
	km_cuda_moe_tuner_close(opened);
#else
	(void)opened;
#endif
}

/* What an earlier run left, and what is still to do. */
static int resume(struct job *j, km_err *err)
{
	int rc = km_tune_read(&j->table, j->s->path, &j->problem, &j->schema, err);
	int count = 0;

	if (rc == KM_ENOTFOUND && access(j->s->path, F_OK) < 0)
		return 0;
	KM_TRY(rc);
	for (int i = 0; i < j->count; i++)
		if (km_tune_nearest(&j->table, j->tokens[i])->tokens != j->tokens[i])
			j->tokens[count++] = j->tokens[i];
	if (!j->s->quiet)
		km_log(KM_LOG_INFO, "%s has %d of the %d token counts", j->s->path,
		       j->count - count, j->count);
	j->count = count;
	return 0;
}

static int run(struct job *j, km_err *err)
{
	km_tuner_options o = { .tokens = j->tokens,
		               .budget_s = j->s->budget_s,
		               .cancel = j->s->cancel,
		               .show = show,
		               .show_context = j,
		               .wrong = wrong };
	km_tuner_backend backend;
	void *opened = NULL;
	int rc = 0;

	if (j->s->resume)
		KM_TRY(resume(j, err));
	o.count = j->count;
	if (o.count) {
		KM_TRY(open_backend(j, &backend, &opened, err));
		rc = km_tune_make_place(j->s->path, err);
	}
	if (rc < 0) {
		close_backend(opened);
		return rc;
	}
	if (!j->s->json) {
		km_moe_target_describe(j->s->target, j->s->path, &j->line);
		km_buf_putc(&j->line, '\n');
		km_moe_rows_head(&j->line);
		flush_line(j);
	}
	if (o.count)
		rc = km_tuner_run(&backend, &o, &j->table, err);
	close_backend(opened);
	clear_progress(j);
	if (j->write_rc < 0)
		rc = km_fail(err, j->write_rc, "%s", j->write_err.msg);
	else if (rc < 0)
		km_fail_within(err, "%s holds %d token counts, --resume goes on", j->s->path,
		               j->table.count);
	if (j->s->json) {
		km_moe_table_json(j->s->target, &j->table, j->s->path, rc >= 0, &j->line);
		flush_line(j);
	}
	return rc;
}

static struct job job_of(const km_moe_search *s, int count)
{
	return (struct job){ .s = s,
		             .count = count,
		             .tokens = km_xcalloc((size_t)count + 1, sizeof(int)),
		             .problem = km_moe_tune_problem(&s->target->context.problem),
		             .schema = km_moe_tune_schema(&s->target->context),
		             .terminal = isatty(STDERR_FILENO),
		             .line = KM_BUF_INIT };
}

static void release(struct job *j)
{
	km_tune_release(&j->table);
	km_buf_release(&j->line);
	free(j->tokens);
}

int km_moe_search_run(const km_moe_search *s, km_err *err)
{
	struct job j = job_of(s, s->count);
	int rc;

	memcpy(j.tokens, s->tokens, sizeof(int) * (size_t)s->count);
	rc = run(&j, err);
	release(&j);
	return rc;
}

static int check_table(struct job *j, double allowed, int *off, km_err *err)
{
	km_tuner_checked *checked;
	km_tuner_backend backend;
	void *opened = NULL;
	int rc;

	for (int i = 0; i < j->count; i++)
		j->tokens[i] = j->table.entries[i].tokens;
	KM_TRY(open_backend(j, &backend, &opened, err));
	checked = km_xcalloc((size_t)j->count, sizeof(*checked));
	rc = km_tuner_check(&backend, &j->table, j->s->cancel, checked, err);
	if (rc >= 0) {
		km_moe_checked_report(checked, j->count, allowed, j->s->json, &j->line, off);
		flush_line(j);
	}
	close_backend(opened);
	free(checked);
	return rc;
}

int km_moe_search_check(const km_moe_search *s, const char *file, double allowed, int *off,
                        int *entries, km_err *err)
{
	km_tune_table table;
	struct job j = job_of(s, 0);
	int rc = km_tune_read(&table, file, &j.problem, &j.schema, err);

	release(&j);
	KM_TRY(rc);
	j = job_of(s, table.count);
	j.table = table;
	*off = 0;
	*entries = table.count;
	rc = check_table(&j, allowed, off, err);
	release(&j);
	return rc;
}
