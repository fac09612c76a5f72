#include "base/stdout.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

bool km_stdout_write(const char *tool, const km_buf *text)
{
	errno = 0;
	if (text && text->len)
		fwrite(text->data, 1, text->len, stdout);
	if (fflush(stdout) == 0 && !ferror(stdout))
		return true;
	/* Of what failed before this call the reason is gone. */
	fprintf(stderr, "%s: stdout cannot be written%s%s\n", tool, errno ? ": " : "",
	        errno ? strerror(errno) : "");
	return false;
}
