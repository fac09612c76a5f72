/*
 * The tools' door to stdout: what is written is flushed and checked, and a failure is said.
 *
 * Between two calls a tool may print with stdio; the next call, or one at its end, tells whether
 * that arrived.
 */
#ifndef KM_BASE_STDOUT_H
#define KM_BASE_STDOUT_H

#include <stdbool.h>

#include "base/buf.h"

/* Writes `text` (NULL: no more than stdio holds) to stdout. False, after a sentence on stderr: this
 * or something before it could not be written; the tool exits with 1. */
bool km_stdout_write(const char *tool, const km_buf *text);

#endif
