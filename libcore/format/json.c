#include "format/json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"

static int open_regular(const char *path, size_t max_bytes, size_t *size, km_err *err)
{
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hold us up */

	if (fd < 0)
		return km_fail(err, errno == ENOENT ? KM_ENOTFOUND : KM_EIO,
		               "%s: cannot be opened: %s", path, strerror(errno));
	if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
		close(fd);
		return km_fail(err, KM_EIO, "%s: is not a regular file", path);
	}
	if ((uint64_t)st.st_size > max_bytes) {
		close(fd);
		return km_fail(err, KM_ELIMIT, "%s: has %lld bytes, at most %zu are read", path,
		               (long long)st.st_size, max_bytes);
	}
	*size = (size_t)st.st_size;
	return fd;
}

int km_read_file(const char *path, size_t max_bytes, char **data, size_t *len, km_err *err)
{
	size_t size = 0, at = 0;
	int fd = open_regular(path, max_bytes, &size, err);
	char *p;

	if (fd < 0)
		return fd;
	p = km_xmalloc(size + 1);
	while (at < size) {
		ssize_t n = read(fd, p + at, size - at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			const char *why =
				n ? strerror(errno) : "it became shorter while it was read";

			close(fd);
			free(p);
			return km_fail(err, KM_EIO, "%s: cannot be read: %s", path, why);
		}
		at += (size_t)n;
	}
	close(fd);
	p[size] = '\0';
	*data = p;
	*len = size;
	return 0;
}

json_t *km_json_parse_object(const char *text, size_t len, const char *name, km_err *err)
{
	json_error_t at;
	json_t *doc = json_loadb(text, len, JSON_REJECT_DUPLICATES, &at);

	if (!doc) {
		km_fail(err, KM_EFORMAT, "%s: is not valid JSON at line %d, column %d: %s", name,
		        at.line, at.column, at.text);
		return NULL;
	}
	if (!json_is_object(doc)) {
		json_decref(doc);
		km_fail(err, KM_EFORMAT, "%s: a JSON object is expected", name);
		return NULL;
	}
	return doc;
}

static const char *type_name(const json_t *value)
{
	switch (json_typeof(value)) {
	case JSON_OBJECT: return "an object";
	case JSON_ARRAY: return "an array";
	case JSON_STRING: return "a string";
	case JSON_INTEGER: return "an integer";
	case JSON_REAL: return "a number with a fraction";
	case JSON_TRUE:
	case JSON_FALSE: return "a boolean";
	case JSON_NULL: return "null";
	}
	return "something else";
}

void km_field_fail(km_fields *f, int code, const char *key, const char *fmt, ...)
{
	char why[700];
	va_list ap;

	if (f->rc < 0)
		return;
	va_start(ap, fmt);
	vsnprintf(why, sizeof(why), fmt, ap);
	va_end(ap);
	f->rc = km_fail(f->err, code, "%s: %s%s: %s", f->name, f->prefix, key, why);
}

static json_t *present(const km_fields *f, const char *key)
{
	json_t *value = json_object_get(f->object, key);

	return value && !json_is_null(value) ? value : NULL;
}

bool km_field_has(const km_fields *f, const char *key)
{
	return present(f, key) != NULL;
}

static json_t *required(km_fields *f, const char *key)
{
	json_t *value = present(f, key);

	if (!value)
		km_field_fail(f, KM_EFORMAT, key, "this field is missing");
	return value;
}

static int64_t int_of(km_fields *f, const char *key, const json_t *value, int64_t min, int64_t max)
{
	int64_t n;

	if (!json_is_integer(value)) {
		km_field_fail(f, KM_EFORMAT, key, "an integer is expected, this is %s",
		              type_name(value));
		return min;
	}
	n = json_integer_value(value);
	if (n < min || n > max) {
		km_field_fail(f, KM_EFORMAT, key,
		              "a value from %" PRId64 " to %" PRId64
		              " is expected, this is %" PRId64,
		              min, max, n);
		return min;
	}
	return n;
}

int64_t km_field_int(km_fields *f, const char *key, int64_t min, int64_t max)
{
	json_t *value = required(f, key);

	return value ? int_of(f, key, value, min, max) : min;
}

int64_t km_field_int_or(km_fields *f, const char *key, int64_t absent, int64_t min, int64_t max)
{
	json_t *value = present(f, key);

	return value ? int_of(f, key, value, min, max) : absent;
}

static double number_of(km_fields *f, const char *key, const json_t *value, double min, double max)
{
	double x;

	if (!json_is_number(value)) {
		km_field_fail(f, KM_EFORMAT, key, "a number is expected, this is %s",
		              type_name(value));
		return min;
	}
	x = json_number_value(value);
	if (!(x >= min && x <= max)) {
		km_field_fail(f, KM_EFORMAT, key, "a value from %g to %g is expected, this is %g",
		              min, max, x);
		return min;
	}
	return x;
}

double km_field_number(km_fields *f, const char *key, double min, double max)
{
	json_t *value = required(f, key);

	return value ? number_of(f, key, value, min, max) : min;
}

double km_field_number_or(km_fields *f, const char *key, double absent, double min, double max)
{
	json_t *value = present(f, key);

	return value ? number_of(f, key, value, min, max) : absent;
}

bool km_field_bool_or(km_fields *f, const char *key, bool absent)
{
	json_t *value = present(f, key);

	if (!value)
		return absent;
	if (!json_is_boolean(value)) {
		km_field_fail(f, KM_EFORMAT, key, "true or false is expected, this is %s",
		              type_name(value));
		return absent;
	}
	return json_is_true(value);
}

static const char *string_of(km_fields *f, const char *key, const json_t *value)
{
	if (json_is_string(value))
		return json_string_value(value);
	km_field_fail(f, KM_EFORMAT, key, "a string is expected, this is %s", type_name(value));
	return NULL;
}

const char *km_field_string(km_fields *f, const char *key)
{
	json_t *value = required(f, key);

	return value ? string_of(f, key, value) : NULL;
}

const char *km_field_string_or(km_fields *f, const char *key, const char *absent)
{
	json_t *value = present(f, key);

	return value ? string_of(f, key, value) : absent;
}

json_t *km_field_object_or_null(km_fields *f, const char *key)
{
	json_t *value = present(f, key);

	if (!value || json_is_object(value))
		return value;
	km_field_fail(f, KM_EFORMAT, key, "an object is expected, this is %s", type_name(value));
	return NULL;
}

json_t *km_field_array_or_null(km_fields *f, const char *key)
{
	json_t *value = present(f, key);

	if (!value || json_is_array(value))
		return value;
	km_field_fail(f, KM_EFORMAT, key, "an array is expected, this is %s", type_name(value));
	return NULL;
}
