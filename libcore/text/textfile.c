#include "text/textfile.h"

#include <stdlib.h>

#include "format/json.h"

#define JSON_MAX ((size_t)64 << 20)

int km_textfile_read(km_buf *buf, const char *path, size_t max, km_err *err)
{
	char *data;
	size_t len;

	KM_TRY(km_read_file(path, max, &data, &len, err));
	km_buf_release(buf);
	*buf = (km_buf){ .data = data, .len = len, .cap = len + 1 };
	return 0;
}

int km_textfile_read_json(json_t **object, const char *path, km_err *err)
{
	km_buf buf = KM_BUF_INIT;
	json_error_t why;
	int rc = km_textfile_read(&buf, path, JSON_MAX, err);

	*object = NULL;
	if (!rc) {
		*object = json_loadb(buf.data, buf.len,
				     JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &why);
		if (!*object)
			rc = km_fail(err, KM_EFORMAT, "%s: line %d: not JSON: %s", path, why.line,
				     why.text);
		else if (!json_is_object(*object))
			rc = km_fail(err, KM_EFORMAT,
				     "%s: expected a JSON object, found another value", path);
	}
	if (rc) {
		json_decref(*object);
		*object = NULL;
	}
	km_buf_release(&buf);
	return rc;
}
