#include "support/fake_checkpoint.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/mem.h"
#include "base/outfile.h"
#include "format/json.h"
#include "model/inventory.h"

struct maker {
	fake_checkpoint *fake;
	const km_config *config;
};

void fake_reshape(km_tensor *t, enum km_dtype dtype, int ndim, const int64_t *shape)
{
	t->dtype = dtype;
	t->ndim = ndim;
	t->bytes = km_dtype_bytes(dtype);
	for (int i = 0; i < ndim; i++) {
		t->shape[i] = shape[i];
		t->bytes *= (uint64_t)shape[i];
	}
	free((void *)(uintptr_t)t->data);
	t->data = km_xcalloc(t->bytes, 1);
}

km_tensor *fake_add(fake_checkpoint *fake, const char *name, enum km_dtype dtype, int ndim,
                    const int64_t *shape)
{
	km_tensor *t;

	fake->tensors =
		km_xreallocarray(fake->tensors, (size_t)fake->count + 1, sizeof(*fake->tensors));
	t = &fake->tensors[fake->count++];
	*t = (km_tensor){ .name = km_xstrdup(name) };
	fake_reshape(t, dtype, ndim, shape);
	return t;
}

static int add_module(void *context, const km_module *m, km_err *err)
{
	struct maker *k = context;
	km_wanted wanted[KM_MAX_MODULE_TENSORS];
	int count = km_module_tensors(m, k->config, wanted);

	(void)err;
	for (int i = 0; i < count; i++) {
		char key[320], name[400];
		km_tensor *t;

		snprintf(key, sizeof(key), "%s.%s", m->key, wanted[i].suffix);
		km_name_on_disk(name, sizeof(name), k->config->kind, key);
		t = fake_add(k->fake, name, wanted[i].usual, wanted[i].ndim, wanted[i].shape);
		if (m->form == KM_FORM_INT4 && i == 2) {
			int32_t *shape = (int32_t *)(uintptr_t)t->data;

			shape[0] = (int32_t)m->shape[0];
			shape[1] = (int32_t)m->shape[1];
		}
	}
	return 0;
}

void fake_init(fake_checkpoint *fake, const km_config *config)
{
	struct maker k = { fake, config };
	km_err err;

	*fake = (fake_checkpoint){ NULL, 0 };
	assert_int_equal(km_inventory_visit(config, add_module, &k, &err), 0);
}

static void drop(km_tensor *t)
{
	free((void *)(uintptr_t)t->name);
	free((void *)(uintptr_t)t->data);
}

void fake_release(fake_checkpoint *fake)
{
	for (int i = 0; i < fake->count; i++)
		drop(&fake->tensors[i]);
	free(fake->tensors);
}

km_tensor *fake_find(fake_checkpoint *fake, const char *name)
{
	for (int i = 0; i < fake->count; i++)
		if (!strcmp(fake->tensors[i].name, name))
			return &fake->tensors[i];
	fail_msg("the test's own tensor %s is not there", name);
	return NULL;
}

void fake_remove(fake_checkpoint *fake, const char *name)
{
	km_tensor *t = fake_find(fake, name);

	drop(t);
	*t = fake->tensors[--fake->count];
}

void fake_remove_all(fake_checkpoint *fake, const char *prefix)
{
	int before = fake->count;

	for (int i = fake->count - 1; i >= 0; i--) {
		if (strncmp(fake->tensors[i].name, prefix, strlen(prefix)) != 0)
			continue;
		drop(&fake->tensors[i]);
		fake->tensors[i] = fake->tensors[--fake->count];
	}
	assert_true(fake->count < before);
}

void fake_rename(km_tensor *t, const char *name)
{
	free((void *)(uintptr_t)t->name);
	t->name = km_xstrdup(name);
}

void write_text(const char *dir, const char *name, const char *text)
{
	char *path = km_xasprintf("%s/%s", dir, name);

	assert_int_equal(km_outfile_save(path, text, strlen(text), NULL), 0);
	free(path);
}

static void write_file(const char *dir, const char *name, const km_tensor *from, int count)
{
	km_tensor *tensors = km_xcalloc((size_t)count, sizeof(*tensors));
	char *path = km_xasprintf("%s/%s", dir, name);
	km_buf out = KM_BUF_INIT;
	uint64_t at = 0;

	for (int i = 0; i < count; i++) {
		tensors[i] = from[i];
		tensors[i].offset = at;
		at += from[i].bytes;
	}
	km_safetensors_put_header(&out, tensors, count);
	for (int i = 0; i < count; i++)
		km_buf_append(&out, from[i].data, from[i].bytes);
	assert_int_equal(km_outfile_save(path, out.data, out.len, NULL), 0);
	km_buf_release(&out);
	free(tensors);
	free(path);
}

void fake_write(const fake_checkpoint *fake, const char *dir, int shards)
{
	km_buf index = KM_BUF_INIT;

	if (shards == 1) {
		write_file(dir, "model.safetensors", fake->tensors, fake->count);
		return;
	}
	km_buf_puts(&index, "{\"metadata\":{},\"weight_map\":{");
	for (int s = 0; s < shards; s++) {
		int begin = fake->count * s / shards, end = fake->count * (s + 1) / shards;
		char name[64];

		snprintf(name, sizeof(name), "model-%05d-of-%05d.safetensors", s + 1, shards);
		write_file(dir, name, fake->tensors + begin, end - begin);
		for (int i = begin; i < end; i++)
			km_buf_printf(&index, "%s\"%s\":\"%s\"", i ? "," : "",
			              fake->tensors[i].name, name);
	}
	km_buf_puts(&index, "}}");
	write_text(dir, "model.safetensors.index.json", index.data);
	km_buf_release(&index);
}

char *temp_dir(void)
{
	char *dir = km_xstrdup("/tmp/km-test-XXXXXX");

	assert_non_null(mkdtemp(dir));
	return dir;
}

void remove_dir(char *dir)
{
	DIR *d = opendir(dir);
	struct dirent *e;

	while (d && (e = readdir(d)))
		if (e->d_name[0] != '.')
			unlinkat(dirfd(d), e->d_name, 0);
	if (d)
		closedir(d);
	assert_int_equal(rmdir(dir), 0);
	free(dir);
}

void copy_config(const char *dir, const char *config_name)
{
	char *path = km_xasprintf("configs/models/%s.json", config_name), *text;
	size_t len;
	km_err err;

	if (km_read_file(path, 1 << 20, &text, &len, &err) < 0)
		fail_msg("%s", err.msg);
	write_text(dir, "config.json", text);
	free(text);
	free(path);
}
