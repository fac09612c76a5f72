#include "model/synthesize.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/buf.h"
#include "base/mem.h"
#include "base/outfile.h"
#include "base/progress.h"
#include "base/rng.h"
#include "format/json.h"
#include "model/synth_module.h"
#include "text/tokenizer.h"
#include "text/vocab_synth.h"

enum {
	CHUNK = 1 << 18 /* elements of a job: 256 kB to 1 MB */,
	MAX_CONFIG = 16 << 20,
	MANY_SHARDS = 64
};

static const int64_t shard_default = INT64_C(5000000000);

struct synth {
	const km_synth_options *options;
	char *config_path; /* of the file itself */
	km_config config;
	int depth; /* layers of the whole model: what --layers leaves out still scales the rest */
	km_synth_tables tables;
	km_tensor *tensors;
	km_synth_tensor *values; /* beside tensors */
	int count, cap;
	int64_t bytes;
	int *shard_end; /* [shards]: one past the last tensor */
	int shards;
	km_arena arena;
	km_progress progress;
	bool made_dir;
};

/* ---- which tensors, with which numbers ------------------------------------------------------ */

static void add_tensor(struct synth *s, const km_module *m, const km_wanted *w, int part)
{
	km_tensor t = { .dtype = w->usual, .ndim = w->ndim, .bytes = km_dtype_bytes(w->usual) };
	km_synth_tensor v = km_synth_module(m, part, s->depth, &s->tables);
	char key[320], name[400];
	int len = snprintf(key, sizeof(key), "%s.%s", m->key, w->suffix);

	for (int i = 0; i < w->ndim; i++) {
		t.shape[i] = w->shape[i];
		t.bytes *= (uint64_t)w->shape[i];
	}
	km_name_on_disk(name, sizeof(name), s->config.kind, key);
	t.name = km_arena_strndup(&s->arena, name, strlen(name));
	v.dtype = w->usual;
	v.stream = km_rng_hash(s->options->seed, key, (size_t)len);
	if (s->count == s->cap) {
		s->cap = s->cap ? s->cap * 2 : 1024;
		s->tensors = km_xreallocarray(s->tensors, (size_t)s->cap, sizeof(*s->tensors));
		s->values = km_xreallocarray(s->values, (size_t)s->cap, sizeof(*s->values));
	}
	s->tensors[s->count] = t;
	s->values[s->count++] = v;
	s->bytes += (int64_t)t.bytes;
}

static int add_module(void *context, const km_module *m, km_err *err)
{
	struct synth *s = context;
	km_wanted wanted[KM_MAX_MODULE_TENSORS];
	int count = km_module_tensors(m, &s->config, wanted);

	(void)err;
	for (int i = 0; i < count; i++)
		add_tensor(s, m, &wanted[i], i);
	return 0;
}

/* ---- shards --------------------------------------------------------------------------------- */

static void plan_shards(struct synth *s)
{
	int64_t limit = s->options->shard_bytes, used = 0;
	uint64_t offset = 0;

	if (!limit)
		limit = s->bytes / MANY_SHARDS > shard_default ? s->bytes / MANY_SHARDS
		                                               : shard_default;
	for (int i = 0; i < s->count; i++) {
		int64_t bytes = (int64_t)s->tensors[i].bytes;

		if (used && used + bytes > limit) {
			s->shard_end = km_xreallocarray(s->shard_end, (size_t)s->shards + 1,
			                                sizeof(*s->shard_end));
			s->shard_end[s->shards++] = i;
			used = 0;
			offset = 0;
		}
		s->tensors[i].offset = offset;
		offset += (uint64_t)bytes;
		used += bytes;
	}
	s->shard_end = km_xreallocarray(s->shard_end, (size_t)s->shards + 1, sizeof(*s->shard_end));
	s->shard_end[s->shards++] = s->count;
}

static void shard_name(const struct synth *s, int shard, char out[64])
{
	if (s->shards == 1)
		snprintf(out, 64, "model.safetensors");
	else
		snprintf(out, 64, "model-%05d-of-%05d.safetensors", shard + 1, s->shards);
}

struct job {
	int tensor;
	uint64_t begin;
};

/* One file's data as jobs of at most CHUNK elements. */
static struct job *make_jobs(const struct synth *s, int first, int end, int *count)
{
	struct job *jobs = NULL;
	int cap = 0;

	*count = 0;
	for (int i = first; i < end; i++) {
		uint64_t elements = s->tensors[i].bytes / km_dtype_bytes(s->tensors[i].dtype);

		for (uint64_t at = 0; at < elements; at += CHUNK) {
			if (*count == cap) {
				cap = cap ? cap * 2 : 1024;
				jobs = km_xreallocarray(jobs, (size_t)cap, sizeof(*jobs));
			}
			jobs[(*count)++] = (struct job){ i, at };
		}
	}
	return jobs;
}

static int do_job(struct synth *s, km_outfile *out, uint64_t data_at, const struct job *job,
                  void *buffer, km_err *err)
{
	const km_tensor *t = &s->tensors[job->tensor];
	uint64_t unit = km_dtype_bytes(t->dtype), left = t->bytes / unit - job->begin;
	size_t count = left < CHUNK ? (size_t)left : CHUNK;

	if (s->options->cancel && *s->options->cancel)
		return km_fail(err, KM_ECANCELED, "%s: interrupted; what was written is removed",
		               s->options->out_dir);
	km_synth_fill(&s->values[job->tensor], &s->tables, job->begin, count, buffer);
	KM_TRY(km_outfile_write_at(out, data_at + t->offset + job->begin * unit, buffer,
	                           count * unit, err));
	km_progress_add(&s->progress, (int64_t)(count * unit));
	return 0;
}

static int write_data(struct synth *s, km_outfile *out, uint64_t data_at, int first, int end,
                      km_err *err)
{
	int count;
	struct job *jobs = make_jobs(s, first, end, &count);
	atomic_int failed = 0;

#pragma omp parallel
	{
		void *buffer = km_xmalloc((size_t)CHUNK * 4);

#pragma omp for schedule(dynamic)
		for (int i = 0; i < count; i++) {
			km_err mine = { 0 };

			if (atomic_load(&failed) ||
			    do_job(s, out, data_at, &jobs[i], buffer, &mine) >= 0)
				continue;
#pragma omp critical
			if (!atomic_load(&failed)) {
				atomic_store(&failed, mine.code);
				km_fail(err, mine.code, "%s", mine.msg);
			}
		}
		free(buffer);
	}
	free(jobs);
	return atomic_load(&failed);
}

static int write_shard(struct synth *s, int shard, km_err *err)
{
	int first = shard ? s->shard_end[shard - 1] : 0, end = s->shard_end[shard];
	const km_tensor *last = &s->tensors[end - 1];
	char name[64], *path;
	km_buf header = KM_BUF_INIT;
	km_outfile out;
	int rc;

	shard_name(s, shard, name);
	path = km_xasprintf("%s/%s", s->options->out_dir, name);
	km_safetensors_put_header(&header, s->tensors + first, end - first);
	rc = km_outfile_open(&out, path, err);
	if (rc >= 0) {
		rc = km_outfile_reserve(&out, header.len + last->offset + last->bytes, err);
		if (rc >= 0)
			rc = km_outfile_write_at(&out, 0, header.data, header.len, err);
		if (rc >= 0)
			rc = write_data(s, &out, header.len, first, end, err);
		if (rc >= 0)
			rc = km_outfile_commit(&out, err);
		km_outfile_release(&out);
	}
	km_buf_release(&header);
	free(path);
	return rc;
}

static int save(const struct synth *s, const char *name, const char *text, size_t len, km_err *err)
{
	char *path = km_xasprintf("%s/%s", s->options->out_dir, name);
	int rc = km_outfile_save(path, text, len, err);

	free(path);
	return rc;
}

static int write_index(struct synth *s, km_err *err)
{
	km_buf out = KM_BUF_INIT;
	int shard = 0, rc;

	if (s->shards == 1)
		return 0;
	km_buf_printf(&out,
	              "{\n  \"metadata\": {\n    \"total_size\": %" PRId64
	              "\n  },\n  \"weight_map\": {",
	              s->bytes);
	for (int i = 0; i < s->count; i++) {
		char name[64];

		while (i >= s->shard_end[shard])
			shard++;
		shard_name(s, shard, name);
		km_buf_printf(&out, "%s\n    \"%s\": \"%s\"", i ? "," : "", s->tensors[i].name,
		              name);
	}
	km_buf_puts(&out, "\n  }\n}\n");
	rc = save(s, "model.safetensors.index.json", out.data, out.len, err);
	km_buf_release(&out);
	return rc;
}

/* ---- the other files ------------------------------------------------------------------------ */

static int write_tokenizer(struct synth *s, km_err *err)
{
	static const char *const ends[] = { "[EOS]", "<|im_end|>" };
	km_tokenizer *tokenizer;
	km_buf out = KM_BUF_INIT;
	int rc;

	KM_TRY(km_vocab_synthesize(s->options->out_dir, s->config.vocab_size, err));
	KM_TRY(km_tokenizer_open(&tokenizer, s->options->out_dir, err));
	km_buf_printf(&out, "{\n  \"max_length\": %d,\n  \"eos_token_id\": [",
	              s->config.max_position_embeddings);
	for (int i = 0; i < 2; i++)
		km_buf_printf(&out, "%s%d", i ? ", " : "",
		              (int)km_tokenizer_special(tokenizer, ends[i]));
	km_buf_puts(&out, "]\n}\n");
	km_tokenizer_close(tokenizer);
	rc = save(s, "generation_config.json", out.data, out.len, err);
	km_buf_release(&out);
	return rc;
}

/* The config's own text, but for the number of layers. */
static int write_config(struct synth *s, km_err *err)
{
	const char *path = s->config_path;
	json_t *doc, *inner;
	char *text, *edited;
	size_t len;
	int rc;

	KM_TRY(km_read_file(path, MAX_CONFIG, &text, &len, err));
	if (!s->options->layers) {
		rc = save(s, "config.json", text, len, err);
		free(text);
		return rc;
	}
	doc = km_json_parse_object(text, len, path, err);
	free(text);
	if (!doc)
		return KM_EFORMAT;
	inner = json_object_get(doc, "text_config");
	json_object_set_new(json_is_object(inner) ? inner : doc, "num_hidden_layers",
	                    json_integer(s->config.num_hidden_layers));
	edited = json_dumps(doc, JSON_INDENT(2));
	json_decref(doc);
	rc = save(s, "config.json", edited, strlen(edited), err);
	free(edited);
	return rc;
}

static int count_entries(const char *dir, bool remove)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	int count = 0;

	if (!d)
		return -1;
	while ((e = readdir(d))) {
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		count++;
		if (remove)
			unlinkat(dirfd(d), e->d_name, 0);
	}
	closedir(d);
	return count;
}

static int prepare_dir(struct synth *s, km_err *err)
{
	const char *dir = s->options->out_dir;
	struct statvfs fs;
	double room, need = (double)s->bytes +
	                    64e6; /* headers, index and tokenizer beside the weights */

	if (mkdir(dir, 0777) == 0)
		s->made_dir = true;
	else if (errno != EEXIST)
		return km_fail(err, KM_EIO, "%s: cannot be made: %s", dir, strerror(errno));
	if (count_entries(dir, false) != 0)
		return km_fail(err, KM_EINVAL,
		               "%s: is not an empty folder; nothing is written there", dir);
	if (statvfs(dir, &fs) < 0)
		return km_fail(err, KM_EIO, "%s: %s", dir, strerror(errno));
	room = (double)fs.f_bavail * (double)fs.f_frsize;
	if (room < need)
		return km_fail(err, KM_ENOMEM, "%s: %.1f GB are needed, the disk has %.1f GB free",
		               dir, need / 1e9, room / 1e9);
	return 0;
}

static int write_all(struct synth *s, km_err *err)
{
	int rc = write_tokenizer(s, err);

	km_progress_init(&s->progress, "synthesizing", "B", s->bytes, s->options->quiet);
	for (int i = 0; i < s->shards && rc >= 0; i++)
		rc = write_shard(s, i, err);
	if (rc >= 0) {
		km_progress_finish(&s->progress);
		rc = write_index(s, err);
	}
	return rc < 0 ? rc
	              : write_config(s, err); /* last: without it the folder is no checkpoint */
}

static int run(struct synth *s, km_err *err)
{
	int layers = s->options->layers, rc;

	KM_TRY(km_config_load(&s->config, s->config_path, err));
	if (s->config.expert_layout)
		return km_fail(err, KM_EUNSUPPORTED,
		               "%s: is of a repacked checkpoint (kimi_repacked); synthesize from "
		               "the original config and repack that",
		               s->config_path);
	s->depth = s->config.num_hidden_layers;
	if (layers > s->depth)
		return km_fail(err, KM_EINVAL, "%s: has %d layers, %d cannot be taken",
		               s->config_path, s->depth, layers);
	if (layers)
		s->config.num_hidden_layers = layers;
	KM_TRY(km_inventory_visit(&s->config, add_module, s, err));
	plan_shards(s);
	rc = prepare_dir(s, err);
	if (rc >= 0) {
		rc = write_all(s, err);
		if (rc < 0)
			count_entries(s->options->out_dir, true);
	}
	if (rc < 0 && s->made_dir)
		rmdir(s->options->out_dir);
	return rc;
}

/* The config's file, also where its folder is given. */
static char *config_file(const char *path)
{
	struct stat st;

	return stat(path, &st) == 0 && S_ISDIR(st.st_mode) ? km_xasprintf("%s/config.json", path)
	                                                   : km_xstrdup(path);
}

int km_synthesize(const km_synth_options *options, km_synth_result *result, km_err *err)
{
	struct synth s = { .options = options, .config_path = config_file(options->config_path) };
	int rc;

	km_arena_init(&s.arena, 1 << 16);
	km_synth_tables_init(&s.tables);
	rc = run(&s, err);
	*result = (km_synth_result){ s.count, s.bytes, s.shards };
	km_config_release(&s.config);
	km_arena_release(&s.arena);
	free(s.tensors);
	free(s.values);
	free(s.shard_end);
	free(s.config_path);
	return rc;
}
