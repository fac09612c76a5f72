#include "format/findings.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>

#include "base/mem.h"

void km_findings_init(km_findings *f, int limit)
{
	*f = (km_findings){ .limit = limit };
}

void km_findings_release(km_findings *f)
{
	for (int i = 0; i < f->kept; i++)
		free(f->items[i].sentence);
	free(f->items);
	*f = (km_findings){ .limit = f->limit };
}

void km_findings_add(km_findings *f, int code, const char *fmt, ...)
{
	char sentence[1024];
	va_list ap;

	f->count++;
	if (f->kept == f->limit)
		return;
	va_start(ap, fmt);
	km_err_sentence(sentence, sizeof(sentence), fmt, ap);
	va_end(ap);
	f->items = km_xreallocarray(f->items, (size_t)f->kept + 1, sizeof(*f->items));
	f->items[f->kept++] = (km_finding){ code, km_xstrdup(sentence) };
}

void km_findings_add_err(km_findings *f, const km_err *err)
{
	km_findings_add(f, err->code, "%s", err->msg);
}

int km_findings_fail(const km_findings *f, km_err *err)
{
	if (!f->count)
		return 0;
	KM_ASSERT(f->kept > 0);
	if (f->count == 1)
		return km_fail(err, f->items[0].code, "%s", f->items[0].sentence);
	return km_fail(err, f->items[0].code, "%s (and %" PRId64 " more problems)",
	               f->items[0].sentence, f->count - 1);
}
