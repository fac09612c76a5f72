#include "support/tiny_checkpoint.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "format/dtype.h"

/* One tensor of the recipe; "%L" and "%E" in its name are replaced. */
struct recipe {
	const char *name, *dtype, *kind;
	json_t *shape, *amount;
	size_t count;
};

static void store(enum km_dtype dtype, float value, size_t i, void *out)
{
	if (dtype == KM_F32)
		((float *)out)[i] = value;
	else if (dtype == KM_BF16)
		((uint16_t *)out)[i] = km_f32_to_bf16(value);
	else if (dtype == KM_F16)
		((uint16_t *)out)[i] = km_f32_to_f16(value);
	else if (dtype == KM_F8_E4M3)
		((uint8_t *)out)[i] = km_f32_to_f8_e4m3(value);
	else
		KM_ASSERT(!"a float type");
}

/* The same arithmetic as fill() in scripts/make-forward-golden, in f32. */
static void fill(const struct recipe *r, const char *name, enum km_dtype dtype, void *out)
{
	uint64_t seed = km_rng_hash(0, name, strlen(name));
	float amount = (float)json_number_value(r->amount);

	for (size_t i = 0; i < r->count; i++) {
		if (!strcmp(r->kind, "values"))
			((int32_t *)out)[i] =
				(int32_t)json_integer_value(json_array_get(r->amount, i));
		else if (!strcmp(r->kind, "bits"))
			((uint32_t *)out)[i] = (uint32_t)km_rng_u64(seed, i);
		else if (!strcmp(r->kind, "scale"))
			store(dtype,
			      ((float)(km_rng_u64(seed, i) >> 40) * 0x1p-24f + 0.5f) * amount, i,
			      out);
		else if (!strcmp(r->kind, "norm"))
			store(dtype, km_rng_normal(seed, i) * amount + 1, i, out);
		else
			store(dtype, km_rng_normal(seed, i) * amount, i, out);
	}
}

static void append_name(km_buf *out, const char *pattern, int layer, int expert)
{
	for (const char *p = pattern; *p; p++) {
		if (*p != '%')
			km_buf_putc(out, *p);
		else
			km_buf_printf(out, "%d", *++p == 'L' ? layer : expert);
	}
}

static void add_tensor(const struct recipe *r, const char *name, km_buf *header, km_buf *data)
{
	enum km_dtype dtype = (enum km_dtype)km_dtype_parse(r->dtype, strlen(r->dtype));
	size_t bytes = r->count * km_dtype_bytes(dtype), from = data->len;
	char *shape = json_dumps(r->shape, JSON_COMPACT);
	void *values = km_xmalloc(bytes);

	fill(r, name, dtype, values);
	km_buf_append(data, values, bytes);
	km_buf_printf(header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
	              header->len > 1 ? "," : "", name, r->dtype, shape, from, from + bytes);
	free(values);
	free(shape);
}

static void add_entry(json_t *entry, km_buf *header, km_buf *data)
{
	struct recipe r = {
		json_string_value(json_object_get(entry, "name")),
		json_string_value(json_object_get(entry, "dtype")),
		json_string_value(json_object_get(entry, "kind")),
		json_object_get(entry, "shape"), json_object_get(entry, "amount"), 1,
	};
	json_t *layers = json_object_get(entry, "layers"),
	       *experts = json_object_get(entry, "experts");
	int from = layers ? (int)json_integer_value(json_array_get(layers, 0)) : 0;
	int to = layers ? (int)json_integer_value(json_array_get(layers, 1)) : 1;
	int count = experts ? (int)json_integer_value(experts) : 1;

	for (size_t i = 0; i < json_array_size(r.shape); i++)
		r.count *= (size_t)json_integer_value(json_array_get(r.shape, i));
	for (int layer = from; layer < to; layer++)
		for (int expert = 0; expert < count; expert++) {
			km_buf name = KM_BUF_INIT;

			append_name(&name, r.name, layer, expert);
			add_tensor(&r, name.data, header, data);
			km_buf_release(&name);
		}
}

static void write_safetensors(json_t *golden, const char *path)
{
	km_buf header = KM_BUF_INIT, data = KM_BUF_INIT;
	json_t *tensors = json_object_get(golden, "tensors");
	FILE *file = fopen(path, "wb");
	uint64_t len;

	KM_ASSERT(file);
	km_buf_putc(&header, '{');
	for (size_t i = 0; i < json_array_size(tensors); i++)
		add_entry(json_array_get(tensors, i), &header, &data);
	km_buf_putc(&header, '}');
	while (header.len % 8)
		km_buf_putc(&header, ' ');
	len = header.len;
	KM_ASSERT(fwrite(&len, 8, 1, file) == 1);
	KM_ASSERT(fwrite(header.data, header.len, 1, file) == 1);
	KM_ASSERT(fwrite(data.data, data.len, 1, file) == 1);
	KM_ASSERT(fclose(file) == 0);
	km_buf_release(&header);
	km_buf_release(&data);
}

char *tiny_write(json_t *golden)
{
	char *dir = km_xstrdup("/tmp/km-tiny-XXXXXX");
	char *path;

	KM_ASSERT(mkdtemp(dir));
	path = km_xasprintf("%s/config.json", dir);
	KM_ASSERT(json_dump_file(json_object_get(golden, "config"), path, JSON_INDENT(1)) == 0);
	free(path);
	path = km_xasprintf("%s/model.safetensors", dir);
	write_safetensors(golden, path);
	free(path);
	return dir;
}

void tiny_remove(char *dir)
{
	static const char *const files[] = { "config.json", "model.safetensors" };

	for (int i = 0; i < 2; i++) {
		char *path = km_xasprintf("%s/%s", dir, files[i]);

		unlink(path);
		free(path);
	}
	rmdir(dir);
	free(dir);
}

json_t *tiny_load(const char *name)
{
	char *path = km_xasprintf("tests/data/forward/%s.json", name);
	json_error_t error;
	json_t *golden = json_load_file(path, 0, &error);

	if (!golden)
		fprintf(stderr, "%s:%d: %s\n", path, error.line, error.text);
	KM_ASSERT(golden);
	free(path);
	return golden;
}
