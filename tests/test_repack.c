/* model/repack: there and back is the same bytes, what was damaged is named, nothing is left
 * after a stop. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/outdir.h"
#include "base/outfile.h"
#include "format/checksum.h"
#include "format/json.h"
#include "format/moe_layout.h"
#include "format/shards.h"
#include "model/repack.h"
#include "model/repack_files.h"
#include "model/synthesize.h"
#include "model/verify.h"
#include "model/weights.h"
#include "support/fake_checkpoint.h"

/* Synthesizes configs/models/NAME.json with an intermediate size that the layout takes, and,
 * when `ignore` is given, one more module that is left unquantised. Returns a folder whose "in"
 * is the checkpoint. */
static char *make(const char *name, int64_t shard_bytes, const char *ignore)
{
	char *dir = temp_dir(), *from = km_xasprintf("configs/models/%s.json", name), *text;
	char *config = km_xasprintf("%s/c.json", dir), *in = km_xasprintf("%s/in", dir);
	km_synth_options o = { .config_path = config,
		               .out_dir = in,
		               .seed = 3,
		               .shard_bytes = shard_bytes,
		               .layers = 2,
		               .quiet = true };
	km_synth_result result;
	json_t *doc, *inner, *quant;
	size_t len;
	km_err err;

	assert_int_equal(km_read_file(from, 1 << 20, &text, &len, &err), 0);
	doc = km_json_parse_object(text, len, from, &err);
	inner = json_object_get(doc, "text_config");
	inner = inner ? inner : doc;
	json_object_set_new(inner, "moe_intermediate_size", json_integer(128));
	quant = json_object_get(doc, "quantization_config");
	quant = quant ? quant : json_object_get(inner, "quantization_config");
	if (ignore)
		json_array_append_new(json_object_get(quant, "ignore"), json_string(ignore));
	free(text);
	text = json_dumps(doc, JSON_INDENT(1));
	write_text(dir, "c.json", text);
	if (km_synthesize(&o, &result, &err) < 0)
		fail_msg("%s", err.msg);
	free(text);
	json_decref(doc);
	free(from);
	free(config);
	free(in);
	return dir;
}

static void remove_all(char *dir)
{
	DIR *d = opendir(dir);
	struct dirent *e;

	while ((e = readdir(d)))
		if (e->d_type == DT_DIR && e->d_name[0] != '.')
			remove_dir(km_xasprintf("%s/%s", dir, e->d_name));
	closedir(d);
	remove_dir(dir);
}

typedef int (*work)(const km_repack_options *, km_repack_result *, km_err *);

static int try_work(work f, const char *dir, const char *from, const char *to,
                    km_repack_result *result, km_err *err)
{
	char *in = km_xasprintf("%s/%s", dir, from), *out = km_xasprintf("%s/%s", dir, to);
	km_repack_options o = { .dir = in, .out_dir = out, .quiet = true };
	int rc = f(&o, result, err);

	free(in);
	free(out);
	return rc;
}

static void must(work f, const char *dir, const char *from, const char *to,
                 km_repack_result *result)
{
	km_err err;

	if (try_work(f, dir, from, to, result, &err) < 0)
		fail_msg("%s", err.msg);
}

static void refused(work f, const char *dir, const char *from, const char *sentence)
{
	char *out = km_xasprintf("%s/refused", dir);
	km_repack_result result;
	km_err err;
	struct stat st;

	assert_true(try_work(f, dir, from, "refused", &result, &err) < 0);
	if (!strstr(err.msg, sentence))
		fail_msg("'%s' is not in '%s'", sentence, err.msg);
	assert_int_equal(stat(out, &st), -1);
	free(out);
}

static void same_file(const char *dir, const char *a, const char *b, const char *name)
{
	char *x = km_xasprintf("%s/%s/%s", dir, a, name),
	     *y = km_xasprintf("%s/%s/%s", dir, b, name);
	char *p = NULL, *q = NULL;
	size_t n = 0, m = 0;
	km_err err;

	if (km_read_file(x, 1 << 26, &p, &n, &err) < 0 ||
	    km_read_file(y, 1 << 26, &q, &m, &err) < 0)
		fail_msg("%s", err.msg);
	assert_int_equal(n, m);
	if (memcmp(p, q, n) != 0)
		fail_msg("%s differs", name);
	free(p);
	free(q);
	free(x);
	free(y);
}

static int same_folder(const char *dir, const char *a, const char *b)
{
	const char *sides[] = { a, b };
	int counts[2] = { 0, 0 };

	for (int i = 0; i < 2; i++) {
		char *path = km_xasprintf("%s/%s", dir, sides[i]);
		DIR *d = opendir(path);
		struct dirent *e;

		assert_non_null(d);
		while ((e = readdir(d)))
			if (e->d_name[0] != '.') {
				counts[i]++;
				if (!i)
					same_file(dir, a, b, e->d_name);
			}
		closedir(d);
		free(path);
	}
	assert_int_equal(counts[0], counts[1]);
	return counts[0];
}

static void expect_problem(const char *dir, const char *folder, const char *sentence)
{
	char *path = km_xasprintf("%s/%s", dir, folder);
	km_verify_options o = { .dir = path, .quiet = true };
	km_verify_result result;
	km_findings f;
	km_err err;

	km_findings_init(&f, 4);
	if (km_verify(&o, &f, &result, &err) < 0)
		fail_msg("%s", err.msg);
	if (!sentence && f.count)
		fail_msg("%s", f.items[0].sentence);
	if (sentence) {
		assert_int_equal(f.count, 1);
		if (!strstr(f.items[0].sentence, sentence))
			fail_msg("'%s' is not in '%s'", sentence, f.items[0].sentence);
	}
	km_findings_release(&f);
	free(path);
}

/* The file of the folder that has this tensor, and where its data is. */
static char *find_tensor(const char *dir, const char *folder, const char *end, uint64_t *at,
                         km_tensor *found)
{
	char *path = km_xasprintf("%s/%s", dir, folder), *file = NULL;
	km_findings findings;
	km_shards shards;
	km_err err;

	km_findings_init(&findings, 1);
	assert_int_equal(km_shards_open(&shards, path, &findings, &err), 0);
	for (int64_t i = 0; i < shards.count && !file; i++) {
		const km_tensor *t = shards.tensors[i];
		size_t n = strlen(t->name), m = strlen(end);

		if (n < m || strcmp(t->name + n - m, end) != 0)
			continue;
		file = km_xstrdup(km_shards_path(&shards, t));
		*at = shards.files[t->file].data_at + t->offset;
		*found = *t;
	}
	assert_non_null(file);
	km_findings_release(&findings);
	km_shards_close(&shards);
	free(path);
	return file;
}

static void poke(const char *file, uint64_t at, const void *bytes, size_t count)
{
	int fd = open(file, O_WRONLY);

	assert_int_equal(pwrite(fd, bytes, count, (off_t)at), count);
	close(fd);
}

/* Changes the first occurrence of `old` in a file to `new`, of the same length. */
static void edit(const char *dir, const char *name, const char *old, const char *new)
{
	char *path = km_xasprintf("%s/%s", dir, name), *text, *at;
	size_t len;

	assert_int_equal(km_read_file(path, 1 << 26, &text, &len, NULL), 0);
	at = memmem(text, len, old, strlen(old));
	assert_non_null(at);
	poke(path, (uint64_t)(at - text), new, strlen(new));
	free(text);
	free(path);
}

/* ---- tests ---------------------------------------------------------------------------------- */

static void there_and_back_is_the_same_bytes(void **state)
{
	static const struct {
		const char *name;
		int64_t shard_bytes;
		int files; /* of the checkpoint, but weights and index */
	} cases[] = { { "tiny-k25", 0, 4 },
		      { "tiny-k25", 300000, 4 },
		      /* files of up_proj alone: no tensor is left in them */
		      { "tiny-k25", 30000, 4 },
		      { "tiny-k2-thinking", 500000, 4 } };

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		char *dir = make(cases[i].name, cases[i].shard_bytes, NULL);
		km_repack_result there, back;

		must(km_repack, dir, "in", "repacked", &there);
		assert_int_equal(there.experts, 16 * 2);
		expect_problem(dir, "repacked", NULL);
		must(km_unpack, dir, "repacked", "out", &back);
		assert_int_equal(back.experts, 16 * 2);
		assert_int_equal(back.files, there.files);
		assert_true(back.files == 1 || cases[i].shard_bytes);
		assert_int_equal(same_folder(dir, "in", "out"),
		                 cases[i].files + back.files + (back.files > 1));
		remove_all(dir);
	}
}

/* Other writers space and order a header otherwise, and put their own words into it. */
static void a_foreign_header_comes_back(void **state)
{
	char *dir = make("tiny-k25", 0, NULL), *path = km_xasprintf("%s/in/model.safetensors", dir),
	     *file;
	const char *front = "{ \"__metadata__\" : {\"format\":\"pt\", \"by\": \"caf\xc3\xa9 "
	                    "\\\"x\\\" \\u00e9\\n\"},\n\t";
	const char *old = "{\"__metadata__\":{\"format\":\"pt\"},";
	km_repack_result result;
	uint64_t len = 0, grown;
	size_t size;
	char *out;

	(void)state;
	assert_int_equal(km_read_file(path, 1 << 26, &file, &size, NULL), 0);
	memcpy(&len, file, 8);
	assert_memory_equal(file + 8, old, strlen(old));
	grown = len - strlen(old) + strlen(front) + 3;
	out = km_xcalloc(1, size + 200);
	memcpy(out, &grown, 8);
	memcpy(out + 8, front, strlen(front));
	memcpy(out + 8 + strlen(front), file + 8 + strlen(old), len - strlen(old));
	memcpy(out + 8 + grown - 3, " \n ", 3);
	memcpy(out + 8 + grown, file + 8 + len, size - 8 - len);
	assert_int_equal(km_outfile_save(path, out, size - len + grown, NULL), 0);
	must(km_repack, dir, "in", "repacked", &result);
	must(km_unpack, dir, "repacked", "out", &result);
	same_folder(dir, "in", "out");
	free(file);
	free(out);
	free(path);
	remove_all(dir);
}

/* The CPU's weights are the same whether the checkpoint was repacked or not; a device gets the
 * packed ones. */
static void both_open_to_the_same_weights(void **state)
{
	char *dir = make("tiny-k25", 300000, NULL), *paths[2];
	uint8_t *packed = km_xmalloc(km_moe_gate_up_bytes(256, 128, 32));
	km_repack_result result;
	km_weights w[2], device;
	km_config c[2];
	km_err err;

	(void)state;
	must(km_repack, dir, "in", "repacked", &result);
	for (int i = 0; i < 2; i++) {
		paths[i] = km_xasprintf("%s/%s", dir, i ? "repacked" : "in");
		if (km_config_load(&c[i], paths[i], &err) < 0 ||
		    km_weights_open(&w[i], &c[i], paths[i], &err) < 0)
			fail_msg("%s", err.msg);
		assert_int_equal(c[i].expert_layout, i);
	}
	if (km_weights_open_packed(&device, &c[1], paths[1], &err) < 0)
		fail_msg("%s", err.msg);
	assert_null(w[0].layer[1].packed_gate_up);
	for (int e = 0; e < 16; e++) {
		const km_layer_weights *a = &w[0].layer[1], *b = &w[1].layer[1];
		const km_weight *x[] = { &a->expert_gate[e], &a->expert_up[e], &a->expert_down[e] };
		const km_weight *y[] = { &b->expert_gate[e], &b->expert_up[e], &b->expert_down[e] };
		km_int4_matrix m[3];

		for (int i = 0; i < 3; i++) {
			size_t count = (size_t)x[i]->rows * (size_t)x[i]->cols;

			assert_int_equal(x[i]->rows, y[i]->rows);
			assert_int_equal(x[i]->cols, y[i]->cols);
			assert_int_equal(x[i]->group, y[i]->group);
			assert_int_equal(x[i]->type, y[i]->type);
			assert_memory_equal(x[i]->data, y[i]->data, count / 2);
			assert_memory_equal(x[i]->scale, y[i]->scale, count / 32 * 2);
			m[i] = (km_int4_matrix){ (uint32_t *)(uintptr_t)x[i]->data,
				                 (uint16_t *)(uintptr_t)x[i]->scale };
		}
		assert_null(device.layer[1].expert_up[e].data);
		km_moe_pack_gate_up(256, 128, 32, &m[0], &m[1], packed);
		assert_memory_equal(packed, device.layer[1].packed_gate_up[e],
		                    km_moe_gate_up_bytes(256, 128, 32));
		km_moe_pack_down(256, 128, 32, &m[2], packed);
		assert_memory_equal(packed, device.layer[1].packed_down[e],
		                    km_moe_down_bytes(256, 128, 32));
		assert_int_equal((uintptr_t)device.layer[1].packed_down[e] % 64, 0);
	}
	km_weights_close(&device);
	for (int i = 0; i < 2; i++) {
		km_weights_close(&w[i]);
		km_config_release(&c[i]);
		free(paths[i]);
	}
	free(packed);
	remove_all(dir);
}

/* An expert that the quantiser left alone stays as it is; its neighbours are repacked. */
static void ignored_modules_stay(void **state)
{
	char *dir = make("tiny-k25", 0, "re:.*layers\\.1\\.mlp\\.experts\\.3\\.up_proj.*");
	km_repack_result result;
	km_tensor t;
	uint64_t at;

	(void)state;
	must(km_repack, dir, "in", "repacked", &result);
	assert_int_equal(result.experts, 16 * 2 - 1);
	expect_problem(dir, "repacked", NULL);
	free(find_tensor(dir, "repacked", "experts.3.up_proj.weight", &at, &t));
	free(find_tensor(dir, "repacked", "experts.3.gate_proj.weight_packed", &at, &t));
	free(find_tensor(dir, "repacked", "experts.3.down_proj.weight_repacked", &at, &t));
	must(km_unpack, dir, "repacked", "out", &result);
	same_folder(dir, "in", "out");
	remove_all(dir);
}

static void damage_is_named(void **state)
{
	char *dir = make("tiny-k25", 300000, NULL), *file, *repacked;
	uint16_t nan = 0x7fc0;
	km_repack_result result;
	unsigned char byte;
	km_tensor t;
	uint64_t at;
	int fd;

	(void)state;
	must(km_repack, dir, "in", "repacked", &result);
	repacked = km_xasprintf("%s/repacked", dir);
	file = find_tensor(dir, "repacked", "experts.5.gate_up_proj.weight_repacked", &at, &t);
	fd = open(file, O_RDONLY);
	assert_int_equal(pread(fd, &byte, 1, (off_t)(at + 12345)), 1);
	close(fd);
	byte ^= 4;
	poke(file, at + 12345, &byte, 1);
	expect_problem(dir, "repacked",
	               "experts.5.gate_up_proj.weight_repacked: is damaged: its checksum is ");
	refused(km_unpack, dir, "repacked", "experts.5.gate_up_proj.weight_repacked: is damaged");
	byte ^= 4;
	poke(file, at + 12345, &byte, 1);
	expect_problem(dir, "repacked", NULL);

	/* a scale of a record's end: opening for the CPU sees it too */
	poke(file, at + 1152 * 3 + 1024 + 6, &nan, 2);
	{
		km_weights w;
		km_config c;
		km_err err;

		assert_int_equal(km_config_load(&c, repacked, &err), 0);
		assert_int_equal(km_weights_open(&w, &c, repacked, &err), KM_EFORMAT);
		assert_non_null(
			strstr(err.msg, "experts.5.gate_up_proj.weight_repacked: has a scale"));
		km_config_release(&c);
	}
	free(file);
	free(repacked);
	remove_all(dir);
}

static void wrong_versions_are_named(void **state)
{
	char *dir = make("tiny-k25", 0, NULL), *sub = km_xasprintf("%s/repacked", dir);
	km_repack_result result;

	(void)state;
	must(km_repack, dir, "in", "repacked", &result);
	edit(sub, "model.safetensors", "\"kimi.expert_layout_version\":\"1\"",
	     "\"kimi.expert_layout_version\":\"7\"");
	refused(km_unpack, dir, "repacked",
	        "gate_up_proj.weight_repacked: its file says layout kimi-int4-moe "
	        "version 7, config.json says kimi-int4-moe version 1");
	edit(sub, "model.safetensors", "\"kimi.expert_layout_version\":\"7\"",
	     "\"kimi.expert_layout_version\":\"1\"");
	edit(sub, "config.json", "\"version\": 1}", "\"version\": 2}");
	refused(km_unpack, dir, "repacked",
	        "config.json: kimi_repacked.version: this program reads version 1");
	edit(sub, "config.json", "\"version\": 2}", "\"version\": 1}");
	edit(sub, "config.json", "\"kimi-int4-moe\"", "\"kimi-int5-moe\"");
	refused(km_unpack, dir, "repacked",
	        "kimi_repacked.layout: only \"kimi-int4-moe\" is supported");
	edit(sub, "config.json", "\"kimi-int5-moe\"", "\"kimi-int4-moe\"");
	edit(sub, "config.json", "\"kimi_repacked\"", "\"kimi_repackex\"");
	refused(km_repack, dir, "repacked", "is repacked, but config.json has no kimi_repacked");
	edit(sub, "config.json", "\"kimi_repackex\"", "\"kimi_repacked\"");
	edit(sub, "model.safetensors", "\"kimi.original_header\"", "\"kimi.originel_header\"");
	refused(km_unpack, dir, "repacked", "model.safetensors: has no kimi.original_header");
	edit(sub, "model.safetensors", "\"kimi.originel_header\"", "\"kimi.original_header\"");
	edit(sub, "model.safetensors", "\"kimi.checksums\"", "\"kimi.checksumx\"");
	refused(km_unpack, dir, "repacked",
	        "weight_repacked: kimi.checksums has no checksum of it");
	free(sub);
	remove_all(dir);
}

/* Leaves the last tensor out of a file's old header, its place filled with spaces. */
static void forget_last_tensor(const char *path)
{
	char *text, *begin, *end, *last = NULL;
	size_t len;

	assert_int_equal(km_read_file(path, 1 << 26, &text, &len, NULL), 0);
	begin = memmem(text, len, "\"kimi.original_header\":\"", 24);
	assert_non_null(begin);
	for (end = begin + 24; *end != '"' || end[-1] == '\\'; end++)
		if (!strncmp(end, "},\\\"", 4))
			last = end + 1;
	while (*end != '}')
		end--;
	assert_non_null(last);
	memset(last, ' ', (size_t)(end - last));
	poke(path, (uint64_t)(last - text), last, (size_t)(end - last));
	free(text);
}

/* Verifying says no where unpacking would. */
static void old_headers_that_do_not_lead_back_are_refused(void **state)
{
	static const struct {
		const char *old, *new, *says;
	} edits[] = {
		{ "\"kimi.original_header\"", "\"kimi.originel_header\"",
		  "model.safetensors: has no kimi.original_header" },
		{ "\"kimi.original_header\":\"{", "\"kimi.original_header\":\"[",
		  "model.safetensors: kimi.original_header: is not valid JSON at byte 0" },
		{ "experts.9.up_proj.weight_shape", "experts.9.up_proj.weight_shapo",
		  "experts.9.up_proj.weight_shapo, which cannot be made from what is there" },
	};
	char *dir = make("tiny-k25", 0, NULL), *sub = km_xasprintf("%s/repacked", dir);
	char *path = km_xasprintf("%s/model.safetensors", sub);
	km_repack_result result;

	(void)state;
	must(km_repack, dir, "in", "repacked", &result);
	for (size_t i = 0; i < sizeof(edits) / sizeof(*edits); i++) {
		edit(sub, "model.safetensors", edits[i].old, edits[i].new);
		expect_problem(dir, "repacked", edits[i].says);
		refused(km_unpack, dir, "repacked", edits[i].says);
		edit(sub, "model.safetensors", edits[i].new, edits[i].old);
	}
	expect_problem(dir, "repacked", NULL);
	forget_last_tensor(path);
	expect_problem(dir, "repacked", ": no kimi.original_header lists ");
	refused(km_unpack, dir, "repacked", ": unpacking would lose it");
	free(path);
	free(sub);
	remove_all(dir);
}

/* A file that none of the new tensors is in has its old header all the same. */
static void a_bare_file_that_is_gone_is_named(void **state)
{
	char *dir = make("tiny-k25", 30000, NULL), *file, *gone;
	km_repack_result result;
	km_tensor t;
	uint64_t at;

	(void)state;
	must(km_repack, dir, "in", "repacked", &result);
	file = find_tensor(dir, "in", "experts.9.up_proj.weight_packed", &at, &t);
	gone = km_xasprintf("%s/repacked%s", dir, strrchr(file, '/'));
	assert_int_equal(unlink(gone), 0);
	expect_problem(dir, "repacked", "cannot be opened");
	refused(km_unpack, dir, "repacked", "cannot be opened");
	free(gone);
	free(file);
	remove_all(dir);
}

static void what_cannot_be_repacked_is_refused(void **state)
{
	char *dir = make("tiny-k25", 0, NULL), *fp8 = make("tiny-k2", 0, NULL), *file, *index;
	km_repack_result result;
	int32_t five = 5;
	km_tensor t;
	uint64_t at;

	(void)state;
	refused(km_repack, fp8, "in", "has no int4 experts; those alone have a layout for GPUs");
	refused(km_unpack, dir, "in", "is not repacked");
	refused(km_repack, dir, "nowhere", "nowhere: cannot be opened");
	must(km_repack, dir, "in", "repacked", &result);
	refused(km_repack, dir, "repacked", "is repacked already");
	index = km_xasprintf("%s/in/" KM_ORIGINAL_INDEX, dir);
	assert_int_equal(km_outfile_save(index, "mine", 4, NULL), 0);
	refused(km_repack, dir, "in", "has a file original.model.safetensors.index.json");
	assert_int_equal(unlink(index), 0);
	file = find_tensor(dir, "in", "experts.9.up_proj.weight_shape", &at, &t);
	poke(file, at, &five, 4);
	refused(km_repack, dir, "in",
	        "experts.9.up_proj.weight_shape: says [5, 256], the config [128, 256]");
	free(index);
	free(file);
	remove_all(dir);
	remove_all(fp8);
}

static void an_output_that_is_there_is_left_alone(void **state)
{
	char *dir = make("tiny-k25", 0, NULL), *out = km_xasprintf("%s/out", dir);
	km_repack_result result;
	km_err err;

	(void)state;
	assert_int_equal(mkdir(out, 0777), 0);
	write_text(out, "mine", "x");
	assert_int_equal(try_work(km_repack, dir, "in", "out", &result, &err), KM_EINVAL);
	assert_non_null(strstr(err.msg, "out: is not an empty folder"));
	assert_int_equal(try_work(km_repack, dir, "in", "in", &result, &err), KM_EINVAL);
	remove_dir(km_xasprintf("%s", out));
	assert_int_equal(mkdir(out, 0777), 0);
	must(km_repack, dir, "in", "out/", &result); /* an empty one may be taken */
	expect_problem(dir, "out", NULL);
	free(out);
	remove_all(dir);
}

/* What nothing can be renamed to is refused before any work; a link stays. */
static void an_output_must_have_a_name(void **state)
{
	static const char *const refused[] = { "", ".", "..", "/", "/tmp/.", "/tmp/../", "./" };
	char *dir = temp_dir(), *link = km_xasprintf("%s/link", dir);
	char *real = km_xasprintf("%s/real", dir);
	struct stat st;
	km_outdir o;
	km_err err;

	(void)state;
	for (size_t i = 0; i < sizeof(refused) / sizeof(*refused); i++) {
		assert_int_equal(km_outdir_open(&o, refused[i], 0, &err), KM_EINVAL);
		assert_non_null(strstr(err.msg, " is not the name of a folder that can be made"));
		km_outdir_release(&o);
	}
	assert_int_equal(symlink("real", link), 0);
	assert_int_equal(km_outdir_open(&o, link, 0, &err), KM_EINVAL);
	assert_non_null(strstr(err.msg, "link: is a symbolic link to what is not there"));
	km_outdir_release(&o);
	assert_int_equal(mkdir(real, 0777), 0);
	assert_int_equal(km_outdir_open(&o, link, 0, &err), 0);
	write_text(o.temp, "new", "x");
	assert_int_equal(km_outdir_commit(&o, &err), 0);
	km_outdir_release(&o);
	assert_true(lstat(link, &st) == 0 && S_ISLNK(st.st_mode));
	assert_int_equal(unlink(link), 0);
	free(link);
	link = km_xasprintf("%s/new", real);
	assert_int_equal(access(link, F_OK), 0);
	free(link);
	free(real);
	remove_all(dir);
}

static int count_names(const char *dir)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	int n = 0;

	while ((e = readdir(d)))
		n += e->d_name[0] != '.';
	closedir(d);
	return n;
}

static void a_stop_leaves_nothing(void **state)
{
	char *dir = make("tiny-k25", 0, NULL), *in = km_xasprintf("%s/in", dir),
	     *out = km_xasprintf("%s/out", dir);
	volatile sig_atomic_t cancel = 1;
	km_repack_options o = { .dir = in, .out_dir = out, .quiet = true, .cancel = &cancel };
	int before = count_names(dir);
	km_repack_result result;
	km_err err;

	(void)state;
	assert_int_equal(km_repack(&o, &result, &err), KM_ECANCELED);
	assert_non_null(strstr(err.msg, "interrupted; what was written is removed"));
	assert_int_equal(count_names(dir), before);
	free(in);
	free(out);
	remove_all(dir);
}

/* A file of zeros that takes no room, and is larger than the room that there is. */
static void write_huge(const char *dir)
{
	char *path = km_xasprintf("%s/huge", dir);
	struct statvfs fs;

	write_text(dir, "huge", "");
	assert_int_equal(statvfs(dir, &fs), 0);
	if (truncate(path, (off_t)(fs.f_bavail * fs.f_frsize + (1u << 30))) < 0)
		skip();
	free(path);
}

/* The other files may be the larger part: all of them are counted before one is copied. */
static void other_files_count_as_room(void **state)
{
	static const char *const from[] = { "in", "repacked" };
	char *dir = make("tiny-k25", 0, NULL), *out = km_xasprintf("%s/out", dir);
	volatile sig_atomic_t cancel = 1;
	km_repack_result result;
	km_err err;

	(void)state;
	must(km_repack, dir, "in", "repacked", &result);
	for (int i = 0; i < 2; i++) {
		char *in = km_xasprintf("%s/%s", dir, from[i]);
		km_repack_options o = { in, out, true, &cancel };
		int before = count_names(dir);

		write_huge(in);
		assert_int_equal((i ? km_unpack : km_repack)(&o, &result, &err), KM_ENOMEM);
		assert_non_null(strstr(err.msg, "GB are needed, the disk has "));
		assert_int_equal(count_names(dir), before);
		free(in);
	}
	free(out);
	remove_all(dir);
}

static void a_stop_ends_the_copy_of_another_file(void **state)
{
	char *dir = temp_dir();
	volatile sig_atomic_t cancel = 1;
	km_repack_options o = { dir, "out", true, &cancel };
	km_repacker r = { .options = &o, .out = { .temp = dir } };
	km_err err;

	(void)state;
	write_text(dir, "note", "x");
	assert_int_equal(km_repack_copy_file(&r, "note", "copy", &err), KM_ECANCELED);
	assert_non_null(strstr(err.msg, "out: interrupted; what was written is removed"));
	assert_int_equal(count_names(dir), 1);
	remove_dir(dir);
}

static void a_disk_without_room_is_refused_first(void **state)
{
	char *dir = temp_dir(), *out = km_xasprintf("%s/out", dir);
	km_outdir o;
	km_err err;

	(void)state;
	assert_int_equal(km_outdir_open(&o, out, UINT64_MAX / 2, &err), KM_ENOMEM);
	assert_non_null(strstr(err.msg, "GB are needed, the disk has "));
	km_outdir_release(&o);
	assert_int_equal(count_names(dir), 0);
	free(out);
	remove_dir(dir);
}

static void checksums_add_up(void **state)
{
	unsigned char data[100];
	uint64_t whole;

	(void)state;
	for (int i = 0; i < 100; i++)
		data[i] = (unsigned char)(i * 37);
	whole = km_checksum(data, 100, 0);
	for (size_t cut = 0; cut <= 96; cut += 8)
		assert_true(km_checksum(data, cut, 0) + km_checksum(data + cut, 100 - cut, cut) ==
		            whole);
	for (int i = 0; i < 100; i++) {
		data[i] ^= 1;
		assert_true(km_checksum(data, 100, 0) != whole);
		data[i] ^= 1;
	}
	assert_true(km_checksum(data + 8, 16, 8) != km_checksum(data + 8, 16, 16));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(there_and_back_is_the_same_bytes),
		cmocka_unit_test(a_foreign_header_comes_back),
		cmocka_unit_test(both_open_to_the_same_weights),
		cmocka_unit_test(ignored_modules_stay),
		cmocka_unit_test(damage_is_named),
		cmocka_unit_test(wrong_versions_are_named),
		cmocka_unit_test(old_headers_that_do_not_lead_back_are_refused),
		cmocka_unit_test(a_bare_file_that_is_gone_is_named),
		cmocka_unit_test(what_cannot_be_repacked_is_refused),
		cmocka_unit_test(an_output_that_is_there_is_left_alone),
		cmocka_unit_test(an_output_must_have_a_name),
		cmocka_unit_test(a_stop_leaves_nothing),
		cmocka_unit_test(other_files_count_as_room),
		cmocka_unit_test(a_stop_ends_the_copy_of_another_file),
		cmocka_unit_test(a_disk_without_room_is_refused_first),
		cmocka_unit_test(checksums_add_up),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
