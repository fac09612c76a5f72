/*
 * A small file read whole: vocabularies, templates, configurations.
 */
#ifndef KM_TEXT_TEXTFILE_H
#define KM_TEXT_TEXTFILE_H

#include <jansson.h>
#include <stddef.h>

#include "base/buf.h"
#include "base/err.h"

/* km_read_file into `buf` (initialised by the caller, released by him in any case). */
int km_textfile_read(km_buf *buf, const char *path, size_t max, km_err *err);

/* Reads and parses a JSON object of at most 64 MiB; the caller owns `*object`. Whole numbers come
 * as reals: tokenizer_config.json has a model_max_length of 1e30 written out, which jansson refuses
 * else. */
int km_textfile_read_json(json_t **object, const char *path, km_err *err);

#endif
