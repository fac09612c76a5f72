#include "format/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "format/name_map.h"
#include "format/scan.h"

const char *km_tensor_describe(char out[160], enum km_dtype dtype, int ndim, const int64_t *shape)
{
	size_t at = (size_t)snprintf(out, 160, "%s [", km_dtype_name(dtype));

	for (int i = 0; i < ndim && at < 140; i++)
		at += (size_t)snprintf(out + at, 160 - at, "%s%" PRId64, i ? ", " : "", shape[i]);
	snprintf(out + at, 160 - at, "]");
	return out;
}

/* ---- the header ----------------------------------------------------------------------------- */

struct header {
	km_scan scan;
	km_safetensors *file;
	int cap;
	uint64_t data_bytes; /* what the file has after the header */
	bool alone;          /* there is no data to hold against it */
};

static int tensor_fail(const struct header *h, const km_tensor *t, const char *what)
{
	return km_fail(h->scan.err, KM_EFORMAT, "%s: tensor %s: %s", h->file->path, t->name, what);
}

static int read_dtype(struct header *h, km_tensor *t)
{
	const char *name;
	size_t len;
	int dtype;

	KM_TRY(km_scan_string(&h->scan, &name, &len));
	dtype = km_dtype_parse(name, len);
	if (dtype < 0)
		return km_fail(h->scan.err, KM_EUNSUPPORTED,
		               "%s: tensor %s: dtype \"%.32s\" is not known", h->file->path,
		               t->name, name);
	t->dtype = (enum km_dtype)dtype;
	return 0;
}

static int read_shape(struct header *h, km_tensor *t)
{
	bool first = true, more;
	uint64_t dim;

	KM_TRY(km_scan_expect(&h->scan, '['));
	for (;;) {
		KM_TRY(km_scan_next(&h->scan, ']', &first, &more));
		if (!more)
			return 0;
		KM_TRY(km_scan_uint(&h->scan, &dim));
		if (t->ndim == KM_MAX_DIMS)
			return tensor_fail(h, t, "it has more than 6 dimensions");
		if (dim > INT64_MAX)
			return tensor_fail(h, t, "its shape is too large");
		t->shape[t->ndim++] = (int64_t)dim;
	}
}

static int read_offsets(struct header *h, km_tensor *t)
{
	uint64_t end;

	KM_TRY(km_scan_expect(&h->scan, '['));
	KM_TRY(km_scan_uint(&h->scan, &t->offset));
	KM_TRY(km_scan_expect(&h->scan, ','));
	KM_TRY(km_scan_uint(&h->scan, &end));
	KM_TRY(km_scan_expect(&h->scan, ']'));
	if (end < t->offset)
		return tensor_fail(h, t, "its data ends before it begins");
	t->bytes = end - t->offset;
	return 0;
}

static int check_size(struct header *h, const km_tensor *t)
{
	uint64_t bytes = km_dtype_bytes(t->dtype);
	char what[160];

	for (int i = 0; i < t->ndim; i++)
		if (__builtin_mul_overflow(bytes, (uint64_t)t->shape[i], &bytes))
			return tensor_fail(h, t, "its shape is too large");
	if (bytes == t->bytes)
		return 0;
	return km_fail(h->scan.err, KM_EFORMAT,
	               "%s: tensor %s: %s needs %" PRIu64 " bytes, its data_offsets span %" PRIu64,
	               h->file->path, t->name,
	               km_tensor_describe(what, t->dtype, t->ndim, t->shape), bytes, t->bytes);
}

static int read_tensor(struct header *h, km_tensor *t)
{
	bool first = true, more;
	unsigned seen = 0;

	KM_TRY(km_scan_expect(&h->scan, '{'));
	for (;;) {
		const char *key;
		size_t len;
		unsigned bit;

		KM_TRY(km_scan_next(&h->scan, '}', &first, &more));
		if (!more)
			break;
		KM_TRY(km_scan_string(&h->scan, &key, &len));
		KM_TRY(km_scan_expect(&h->scan, ':'));
		bit = !strcmp(key, "dtype")          ? 1
		      : !strcmp(key, "shape")        ? 2
		      : !strcmp(key, "data_offsets") ? 4
		                                     : 0;
		if (!bit || seen & bit)
			return km_fail(h->scan.err, KM_EFORMAT,
			               "%s: tensor %s: field \"%.32s\" is %s", h->file->path,
			               t->name, key, bit ? "there twice" : "unknown");
		seen |= bit;
		KM_TRY(bit == 1   ? read_dtype(h, t)
		       : bit == 2 ? read_shape(h, t)
		                  : read_offsets(h, t));
	}
	if (seen != 7)
		return tensor_fail(h, t, "dtype, shape or data_offsets is missing");
	return check_size(h, t);
}

static int read_metadata(struct header *h)
{
	km_safetensors *file = h->file;
	bool first = true, more;
	size_t len;

	KM_TRY(km_scan_expect(&h->scan, '{'));
	for (;;) {
		km_metadata m;

		KM_TRY(km_scan_next(&h->scan, '}', &first, &more));
		if (!more)
			return 0;
		KM_TRY(km_scan_string(&h->scan, &m.key, &len));
		KM_TRY(km_scan_expect(&h->scan, ':'));
		KM_TRY(km_scan_string(&h->scan, &m.value, &len));
		file->metadata = km_xreallocarray(file->metadata, (size_t)file->metadata_count + 1,
		                                  sizeof(*file->metadata));
		file->metadata[file->metadata_count++] = m;
	}
}

static int read_entry(struct header *h)
{
	km_safetensors *file = h->file;
	km_tensor t = { .data = NULL };
	size_t len;

	KM_TRY(km_scan_string(&h->scan, &t.name, &len));
	KM_TRY(km_scan_expect(&h->scan, ':'));
	if (!strcmp(t.name, "__metadata__"))
		return read_metadata(h);
	KM_TRY(read_tensor(h, &t));
	if (file->count == h->cap) {
		h->cap = h->cap ? h->cap * 2 : 256;
		file->tensors =
			km_xreallocarray(file->tensors, (size_t)h->cap, sizeof(*file->tensors));
	}
	file->tensors[file->count++] = t;
	return 0;
}

static int read_header(struct header *h)
{
	bool first = true, more;

	KM_TRY(km_scan_expect(&h->scan, '{'));
	for (;;) {
		KM_TRY(km_scan_next(&h->scan, '}', &first, &more));
		if (!more)
			return km_scan_end(&h->scan);
		KM_TRY(read_entry(h));
	}
}

static int check_names(const km_safetensors *file, km_err *err)
{
	km_name_map names;
	int rc = 0;

	km_name_map_init(&names, (size_t)file->count);
	for (int i = 0; i < file->count && rc >= 0; i++) {
		const char *name = file->tensors[i].name;

		if (km_name_map_add(&names, name, strlen(name), i) >= 0)
			rc = km_fail(err, KM_EFORMAT, "%s: tensor %s is there twice", file->path,
			             name);
	}
	km_name_map_release(&names);
	return rc;
}

/* An empty tensor shares its offset with its successor and comes first. */
static int by_offset(const void *a, const void *b)
{
	const km_tensor *x = a, *y = b;

	if (x->offset != y->offset)
		return x->offset < y->offset ? -1 : 1;
	if (x->bytes != y->bytes)
		return x->bytes < y->bytes ? -1 : 1;
	return strcmp(x->name, y->name);
}

static int check_cover(struct header *h)
{
	const km_safetensors *file = h->file;
	uint64_t at = 0;

	for (int i = 0; i < file->count; i++) {
		const km_tensor *t = &file->tensors[i];

		if (t->offset < at)
			return km_fail(h->scan.err, KM_EFORMAT, "%s: tensors %s and %s overlap",
			               file->path, file->tensors[i - 1].name, t->name);
		if (t->offset > at)
			return km_fail(h->scan.err, KM_EFORMAT,
			               "%s: there is a hole of %" PRIu64 " bytes before tensor %s",
			               file->path, t->offset - at, t->name);
		at = t->offset +
		     t->bytes; /* check_size has bounded both by the end offset, a u64 */
		if (!h->alone && at > h->data_bytes)
			return km_fail(h->scan.err, KM_EFORMAT,
			               "%s: is truncated: tensor %s ends at byte %" PRIu64
			               " of the data, the file has %" PRIu64,
			               file->path, t->name, at, h->data_bytes);
	}
	if (!h->alone && at < h->data_bytes)
		return km_fail(h->scan.err, KM_EFORMAT,
		               "%s: has %" PRIu64 " bytes after its last tensor's end", file->path,
		               h->data_bytes - at);
	return 0;
}

static int find_header(const km_safetensors *file, uint64_t *len, km_err *err)
{
	const unsigned char *b = file->map;

	if (file->size < 8)
		return km_fail(
			err, KM_EFORMAT,
			"%s: is truncated: a safetensors file has at least 8 bytes, this %zu",
			file->path, file->size);
	*len = 0;
	for (int i = 7; i >= 0; i--)
		*len = *len << 8 | b[i];
	if (*len > KM_SAFETENSORS_MAX_HEADER)
		return km_fail(
			err, KM_EFORMAT,
			"%s: is not a safetensors file, or damaged: its header would have %" PRIu64
			" bytes, at most %d are allowed",
			file->path, *len, KM_SAFETENSORS_MAX_HEADER);
	if (*len > file->size - 8)
		return km_fail(err, KM_EFORMAT,
		               "%s: is truncated: its header has %" PRIu64
		               " bytes, the file has %zu after the first 8",
		               file->path, *len, file->size - 8);
	return 0;
}

static int parse_text(struct header *h, const char *json, size_t len, km_err *err)
{
	km_safetensors *file = h->file;
	bool sorted = true;

	km_scan_init(&h->scan, json, len, file->path, &file->arena, err);
	KM_TRY(read_header(h));
	KM_TRY(check_names(file, err));
	for (int i = 1; i < file->count && sorted; i++)
		sorted = by_offset(&file->tensors[i - 1], &file->tensors[i]) <= 0;
	if (!sorted)
		qsort(file->tensors, (size_t)file->count, sizeof(*file->tensors), by_offset);
	return check_cover(h);
}

static int parse_map(km_safetensors *file, km_err *err)
{
	struct header h = { .file = file };
	uint64_t len = 0;

	KM_TRY(find_header(file, &len, err));
	file->data_at = 8 + len;
	h.data_bytes = file->size - file->data_at;
	KM_TRY(parse_text(&h, (const char *)file->map + 8, (size_t)len, err));
	for (int i = 0; i < file->count; i++)
		file->tensors[i].data =
			(const char *)file->map + file->data_at + file->tensors[i].offset;
	return 0;
}

int km_safetensors_parse_header(km_safetensors *file, const char *json, size_t len,
                                const char *name, km_err *err)
{
	struct header h = { .file = file, .alone = true };

	*file = (km_safetensors){ .path = km_xstrdup(name) };
	km_arena_init(&file->arena, 1 << 16);
	return parse_text(&h, json, len, err);
}

int km_safetensors_parse(km_safetensors *file, const void *bytes, size_t size, const char *name,
                         km_err *err)
{
	*file = (km_safetensors){ .path = km_xstrdup(name), .map = bytes, .size = size };
	km_arena_init(&file->arena, 1 << 16);
	return parse_map(file, err);
}

int km_safetensors_open(km_safetensors *file, const char *path, km_err *err)
{
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hold us up */
	void *map = NULL;

	*file = (km_safetensors){ .path = km_xstrdup(path) };
	km_arena_init(&file->arena, 1 << 16);
	if (fd < 0)
		return km_fail(err, errno == ENOENT ? KM_ENOTFOUND : KM_EIO,
		               "%s: cannot be opened: %s", path, strerror(errno));
	if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
		close(fd);
		return km_fail(err, KM_EIO, "%s: is not a regular file", path);
	}
	if (st.st_size > 0)
		map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
	close(fd);
	if (map == MAP_FAILED)
		return km_fail(err, KM_EIO, "%s: cannot be mapped: %s", path, strerror(errno));
	file->map = map;
	file->size = (size_t)st.st_size;
	file->mapped = map != NULL;
	return parse_map(file, err);
}

void km_safetensors_close(km_safetensors *file)
{
	if (file->mapped)
		munmap((void *)(uintptr_t)file->map, file->size);
	km_arena_release(&file->arena);
	free(file->tensors);
	free(file->metadata);
	free(file->path);
	*file = (km_safetensors){ .path = NULL };
}

const char *km_safetensors_metadata(const km_safetensors *file, const char *key)
{
	for (int i = 0; i < file->metadata_count; i++)
		if (!strcmp(file->metadata[i].key, key))
			return file->metadata[i].value;
	return NULL;
}

/* ---- writing -------------------------------------------------------------------------------- */

static void put_string(km_buf *out, const char *s)
{
	km_buf_putc(out, '"');
	for (; *s; s++) {
		if (*s == '"' || *s == '\\')
			km_buf_putc(out, '\\');
		if ((unsigned char)*s < 0x20)
			km_buf_printf(out, "\\u%04x", (unsigned)(unsigned char)*s);
		else
			km_buf_putc(out, *s);
	}
	km_buf_putc(out, '"');
}

void km_safetensors_put_header_with(km_buf *out, const km_tensor *tensors, int count,
                                    const km_metadata *metadata, int metadata_count, size_t align)
{
	size_t start = out->len;
	uint64_t len;

	KM_ASSERT(align % 8 == 0);
	km_buf_append(out, "\0\0\0\0\0\0\0\0", 8);
	km_buf_puts(out, "{\"__metadata__\":{\"format\":\"pt\"");
	for (int i = 0; i < metadata_count; i++) {
		km_buf_putc(out, ',');
		put_string(out, metadata[i].key);
		km_buf_putc(out, ':');
		put_string(out, metadata[i].value);
	}
	km_buf_putc(out, '}');
	for (int i = 0; i < count; i++) {
		const km_tensor *t = &tensors[i];

		km_buf_putc(out, ',');
		put_string(out, t->name);
		km_buf_printf(out, ":{\"dtype\":\"%s\",\"shape\":[", km_dtype_name(t->dtype));
		for (int d = 0; d < t->ndim; d++)
			km_buf_printf(out, "%s%" PRId64, d ? "," : "", t->shape[d]);
		km_buf_printf(out, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", t->offset,
		              t->offset + t->bytes);
	}
	km_buf_putc(out, '}');
	while ((out->len - start) % align)
		km_buf_putc(out, ' ');
	len = out->len - start - 8;
	for (int i = 0; i < 8; i++)
		out->data[start + (size_t)i] = (char)(len >> 8 * i & 0xff);
}

void km_safetensors_put_header(km_buf *out, const km_tensor *tensors, int count)
{
	km_safetensors_put_header_with(out, tensors, count, NULL, 0, 8);
}
