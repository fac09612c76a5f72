#include "model/verify.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/progress.h"
#include "format/checksum.h"
#include "format/moe_layout.h"
#include "format/odd_values.h"
#include "model/checkpoint.h"
#include "model/repack_files.h"
#include "text/tokenizer.h"

enum { CHUNK = 4 << 20, PAGE = 4096 };

enum use { USE_VALUES, USE_SCALE, USE_PACKED, USE_SHAPE, USE_REPACKED };

/* What the data of one tensor turned out to hold. */
struct seen {
	enum use use;
	int32_t rows, cols; /* USE_SHAPE: what it should say */
	int64_t nan, inf, negative, empty_pages;
	int64_t first_bad;  /* element; -1: none */
	bool wrong_shape;
	int64_t shape[2];
	uint64_t sum;       /* USE_REPACKED: format/checksum.h */
};

struct verifier {
	const km_verify_options *options;
	km_findings *findings;
	km_config config;
	bool has_config;
	km_checkpoint cp;
	int64_t *first_of_file; /* number of a file's first tensor in `seen` */
	struct seen *seen;
	km_progress progress;
};

static struct seen *seen_of(struct verifier *v, const km_tensor *t)
{
	return &v->seen[v->first_of_file[t->file] + (t - v->cp.shards.files[t->file].tensors)];
}

static int note_module(void *context, const km_module *m,
                       const km_tensor *const tensors[KM_MAX_MODULE_TENSORS], km_err *err)
{
	struct verifier *v = context;
	struct seen *shape;

	(void)err;
	if (m->form == KM_FORM_PLAIN)
		return 0;
	if (m->form == KM_FORM_REPACKED) {
		seen_of(v, tensors[0])->use = USE_REPACKED;
		return 0;
	}
	seen_of(v, tensors[1])->use = USE_SCALE;
	if (m->form == KM_FORM_FP8)
		return 0;
	seen_of(v, tensors[0])->use = USE_PACKED;
	shape = seen_of(v, tensors[2]);
	shape->use = USE_SHAPE;
	shape->rows = (int32_t)m->shape[0];
	shape->cols = (int32_t)m->shape[1];
	return 0;
}

/* ---- looking at data ------------------------------------------------------------------------ */

/* A download that was cut short often leaves a file of full length with zeros at the end. In packed
 * int4 a page of zeros is 8,192 weights of -8: no quantiser makes that. */
static int64_t empty_pages(const unsigned char *data, size_t bytes, int64_t *first_weight)
{
	static const unsigned char zeros[PAGE];
	int64_t count = 0;

	*first_weight = -1;
	for (size_t at = 0; at + PAGE <= bytes; at += PAGE) {
		if (memcmp(data + at, zeros, PAGE) != 0)
			continue;
		if (!count++)
			*first_weight = (int64_t)at * 2;
	}
	return count;
}

/* Records: the scales of each are at its end; all codes 0 is a stretch that was never written. */
static int64_t look_records(const unsigned char *data, size_t bytes, size_t record,
                            km_odd_values *odd)
{
	static const unsigned char zeros[KM_MOE_RECORD_CODES];
	size_t scales = record - KM_MOE_RECORD_CODES;
	int64_t empty = 0;

	*odd = (km_odd_values){ .first = -1 };
	for (size_t at = 0; at + record <= bytes; at += record) {
		km_odd_values one = km_odd_values_count(KM_BF16, data + at + KM_MOE_RECORD_CODES,
		                                        scales / 2, true);
		bool blank = memcmp(data + at, zeros, sizeof(zeros)) == 0;

		odd->nan += one.nan;
		odd->inf += one.inf;
		odd->negative += one.negative;
		empty += blank;
		if (odd->first < 0 && (one.first >= 0 || blank))
			odd->first = (int64_t)(at / record);
	}
	return empty;
}

static void look_shape(const km_tensor *t, struct seen *seen, const void *data)
{
	for (int i = 0; i < 2; i++) {
		int32_t narrow;

		if (t->dtype == KM_I64) {
			memcpy(&seen->shape[i], (const char *)data + i * 8, 8);
		} else {
			memcpy(&narrow, (const char *)data + i * 4, 4);
			seen->shape[i] = narrow;
		}
	}
	seen->wrong_shape = seen->shape[0] != seen->rows || seen->shape[1] != seen->cols;
}

/* ---- reading -------------------------------------------------------------------------------- */

struct job {
	const km_tensor *tensor;
	uint64_t begin; /* byte in the tensor */
};

/* Bytes of a tensor that are looked at together: whole records of a repacked one. */
static uint64_t chunk_of(struct verifier *v, const km_tensor *t)
{
	uint64_t record = t->ndim == 3 ? (uint64_t)t->shape[2] : 0;

	return seen_of(v, t)->use == USE_REPACKED ? CHUNK / record * record : CHUNK;
}

static struct job *make_jobs(struct verifier *v, const km_safetensors *file, int *count)
{
	struct job *jobs = NULL;
	int cap = 0;

	*count = 0;
	for (int i = 0; i < file->count; i++) {
		uint64_t step = chunk_of(v, &file->tensors[i]);

		for (uint64_t at = 0; at < file->tensors[i].bytes; at += step) {
			if (*count == cap) {
				cap = cap ? cap * 2 : 1024;
				jobs = km_xreallocarray(jobs, (size_t)cap, sizeof(*jobs));
			}
			jobs[(*count)++] = (struct job){ &file->tensors[i], at };
		}
	}
	return jobs;
}

static int read_exactly(int fd, void *buffer, size_t bytes, uint64_t offset)
{
	char *p = buffer;

	while (bytes) {
		ssize_t n = pread(fd, p, bytes, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? errno : ENODATA;
		p += n;
		offset += (uint64_t)n;
		bytes -= (size_t)n;
	}
	return 0;
}

/* Adds what one chunk holds; `first` counts elements (of packed data, weights) from its begin. */
static void add_seen(struct seen *seen, const km_odd_values *odd, int64_t pages, int64_t begin)
{
#pragma omp critical
	{
		seen->nan += odd->nan;
		seen->inf += odd->inf;
		seen->negative += odd->negative;
		seen->empty_pages += pages;
		if (seen->first_bad < 0 || begin + odd->first < seen->first_bad)
			seen->first_bad = begin + odd->first;
	}
}

static int do_job(struct verifier *v, int fd, const struct job *job, void *buffer)
{
	const km_tensor *t = job->tensor;
	const km_safetensors *file = &v->cp.shards.files[t->file];
	struct seen *seen = seen_of(v, t);
	size_t chunk = (size_t)chunk_of(v, t);
	size_t bytes = t->bytes - job->begin < chunk ? (size_t)(t->bytes - job->begin) : chunk;
	size_t unit = km_dtype_bytes(t->dtype);
	int64_t begin = (int64_t)(job->begin / unit), pages = 0;
	km_odd_values odd = { .first = -1 };
	int rc = read_exactly(fd, buffer, bytes, file->data_at + t->offset + job->begin);

	if (rc)
		return rc;
	if (seen->use == USE_SHAPE) {
		look_shape(t, seen, buffer);
	} else if (seen->use == USE_PACKED) {
		pages = empty_pages(buffer, bytes, &odd.first);
		begin *= 8;
	} else if (seen->use == USE_REPACKED) {
		uint64_t sum = km_checksum(buffer, bytes, job->begin);

		pages = look_records(buffer, bytes, (size_t)t->shape[2], &odd);
		begin /= t->shape[2];
#pragma omp atomic
		seen->sum += sum;
	} else {
		odd = km_odd_values_count(t->dtype, buffer, bytes / unit, seen->use == USE_SCALE);
	}
	if (odd.first >= 0)
		add_seen(seen, &odd, pages, begin);
	km_progress_add(&v->progress, (int64_t)bytes);
	return 0;
}

static bool stopped(const struct verifier *v)
{
	return v->options->cancel && *v->options->cancel;
}

static void read_file_data(struct verifier *v, const km_safetensors *file)
{
	int fd = open(file->path, O_RDONLY | O_CLOEXEC), count;
	struct job *jobs = make_jobs(v, file, &count);
	const km_tensor *broken = NULL;
	int why = fd < 0 ? errno : 0;

	if (fd >= 0)
		posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
#pragma omp parallel if (fd >= 0)
	{
		void *buffer = km_xmalloc(CHUNK);

#pragma omp for schedule(dynamic)
		for (int i = 0; i < count; i++) {
			int rc = fd < 0 || stopped(v) ? 0 : do_job(v, fd, &jobs[i], buffer);

			if (rc) {
#pragma omp critical
				if (!broken || jobs[i].tensor < broken) {
					broken = jobs[i].tensor;
					why = rc;
				}
			}
		}
		free(buffer);
	}
	if (why)
		km_findings_add(v->findings, KM_EIO, "%s: tensor %s: cannot be read: %s",
		                file->path, broken ? broken->name : "(all)", strerror(why));
	free(jobs);
	if (fd >= 0)
		close(fd);
}

/* ---- the sentences -------------------------------------------------------------------------- */

static void report_repacked(struct verifier *v, const km_tensor *t)
{
	const struct seen *s = seen_of(v, t);
	const char *path = km_shards_path(&v->cp.shards, t);
	uint64_t want;
	km_err err;

	if (km_repack_checksum(&v->cp.shards, t, &want, &err) < 0)
		km_findings_add_err(v->findings, &err);
	else if (want != s->sum)
		km_findings_add(v->findings, KM_EFORMAT,
		                "%s: tensor %s: is damaged: its checksum is %016" PRIx64
		                ", %016" PRIx64 " was written",
		                path, t->name, s->sum, want);
	if (s->nan || s->inf || s->negative)
		km_findings_add(v->findings, KM_EFORMAT,
		                "%s: tensor %s: has %" PRId64 " NaN, %" PRId64
		                " infinite and %" PRId64
		                " negative scales, the first in record %" PRId64,
		                path, t->name, s->nan, s->inf, s->negative, s->first_bad);
	if (s->empty_pages)
		km_findings_add(v->findings, KM_EFORMAT,
		                "%s: tensor %s: has %" PRId64
		                " records of 2048 weights of -8, the first is "
		                "record %" PRId64 ": this data was never written",
		                path, t->name, s->empty_pages, s->first_bad);
}

static void report(struct verifier *v, const km_tensor *t)
{
	const struct seen *s = seen_of(v, t);
	const char *path = km_shards_path(&v->cp.shards, t);

	if (s->use == USE_REPACKED) {
		report_repacked(v, t);
		return;
	}

	if (s->nan || s->inf)
		km_findings_add(v->findings, KM_EFORMAT,
		                "%s: tensor %s: has %" PRId64 " NaN and %" PRId64
		                " infinite elements, the first at %" PRId64,
		                path, t->name, s->nan, s->inf, s->first_bad);
	if (s->negative)
		km_findings_add(v->findings, KM_EFORMAT,
		                "%s: tensor %s: has %" PRId64
		                " negative scales, the first at %" PRId64,
		                path, t->name, s->negative, s->first_bad);
	if (s->empty_pages)
		km_findings_add(v->findings, KM_EFORMAT,
		                "%s: tensor %s: has %" PRId64
		                " stretches of 8192 weights of -8, the first at weight "
		                "%" PRId64 ": this data was never written",
		                path, t->name, s->empty_pages, s->first_bad);
	if (s->wrong_shape)
		km_findings_add(
			v->findings, KM_EFORMAT,
			"%s: tensor %s: says [%" PRId64 ", %" PRId64 "], the config [%d, %d]", path,
			t->name, s->shape[0], s->shape[1], (int)s->rows, (int)s->cols);
}

static void check_tokenizer(struct verifier *v)
{
	char *path = km_xasprintf("%s/tiktoken.model", v->options->dir);
	km_tokenizer *tokenizer;
	struct stat st;
	km_err err;

	if (stat(path, &st) == 0) {
		if (km_tokenizer_open(&tokenizer, v->options->dir, &err) < 0) {
			km_findings_add_err(v->findings, &err);
		} else {
			if (v->has_config &&
			    km_tokenizer_vocab_size(tokenizer) > v->config.vocab_size)
				km_findings_add(v->findings, KM_EFORMAT,
				                "%s: has %d tokens, the config's vocab_size is %d",
				                path, (int)km_tokenizer_vocab_size(tokenizer),
				                v->config.vocab_size);
			km_tokenizer_close(tokenizer);
		}
	}
	free(path);
}

/* Could it be unpacked? Where a tensor is missing that has been said, and would be said again. */
static void check_originals(struct verifier *v)
{
	km_originals originals;

	if (!v->config.expert_layout || v->cp.missing)
		return;
	km_originals_open(&originals, &v->cp, &v->config, v->findings);
	km_originals_close(&originals);
}

static int prepare(struct verifier *v, km_err *err)
{
	km_err config_err;
	int files;

	v->has_config = km_config_load(&v->config, v->options->dir, &config_err) >= 0;
	KM_TRY(km_checkpoint_open(&v->cp, v->options->dir, v->findings, v->findings, err));
	if (!v->has_config)
		km_findings_add_err(v->findings, &config_err);
	files = v->cp.shards.file_count;
	v->first_of_file = km_xcalloc((size_t)files + 1, sizeof(*v->first_of_file));
	for (int i = 0; i < files; i++)
		v->first_of_file[i + 1] = v->first_of_file[i] + v->cp.shards.files[i].count;
	v->seen = km_xcalloc((size_t)v->first_of_file[files], sizeof(*v->seen));
	for (int64_t i = 0; i < v->first_of_file[files]; i++)
		v->seen[i].first_bad = -1;
	if (!v->has_config)
		return 0;
	KM_TRY(km_checkpoint_match(&v->cp, &v->config, note_module, v, v->findings, err));
	check_originals(v);
	return 0;
}

static int verify_all(struct verifier *v, km_verify_result *result, km_err *err)
{
	km_shards *shards = &v->cp.shards;
	int rc = prepare(v, err);

	if (rc ==
	    KM_EFORMAT) { /* a config that contradicts itself: the data can be read all the same */
		km_findings_add_err(v->findings, err);
		rc = 0;
	}
	KM_TRY(rc);
	*result = (km_verify_result){ .files = shards->file_count,
		                      .index_total_size = shards->index_total_size };
	for (int i = 0; i < shards->file_count; i++)
		for (int k = 0; k < shards->files[i].count; k++)
			result->bytes += (int64_t)shards->files[i].tensors[k].bytes;
	km_progress_init(&v->progress, "verifying", "B", result->bytes, v->options->quiet);
	for (int i = 0; i < shards->file_count && !stopped(v); i++)
		/* none: it could not be opened, or there is nothing to read */
		if (shards->files[i].count)
			read_file_data(v, &shards->files[i]);
	if (stopped(v))
		return km_fail(err, KM_ECANCELED, "%s: interrupted before all was read",
		               v->options->dir);
	km_progress_finish(&v->progress);
	for (int i = 0; i < shards->file_count; i++) {
		result->tensors += shards->files[i].count;
		for (int k = 0; k < shards->files[i].count; k++)
			report(v, &shards->files[i].tensors[k]);
	}
	check_tokenizer(v);
	return 0;
}

int km_verify(const km_verify_options *options, km_findings *findings, km_verify_result *result,
              km_err *err)
{
	struct verifier v = { .options = options, .findings = findings };
	int rc = verify_all(&v, result, err);

	free(v.seen);
	free(v.first_of_file);
	km_checkpoint_close(&v.cp);
	if (v.has_config)
		km_config_release(&v.config);
	return rc;
}
