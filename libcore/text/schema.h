/*
 * JSON Schema, as far as telling tools apart needs it.
 *
 * Draft 2020-12's validation, applicator and unevaluated vocabularies over jansson values, local
 * references ("#", "#/$defs/x", "#anchor", an "$id" inside the document) included, nothing fetched.
 * `format` and the content vocabulary are annotations and assert nothing. `pattern` is PCRE2's
 * dialect with the letter classes of ECMA-262, unanchored, under a match limit. A schema that
 * cannot be evaluated (an unknown type, a pattern that does not compile, a reference that leads
 * nowhere or round in a circle, a keyword's value of the wrong type, nesting past a limit) is an
 * error and no answer. Stateless; any thread, but a json_t is used by one thread at a time.
 */
#ifndef KM_TEXT_SCHEMA_H
#define KM_TEXT_SCHEMA_H

#include <jansson.h>

#include "base/err.h"

/* 1: valid, 0: not, KM_EUNSUPPORTED or KM_EINVAL with a sentence: the schema cannot be
 * evaluated. */
int km_schema_validate(const json_t *schema, const json_t *value, km_err *err);

/*
 * Is `arguments` (an object) what a tool with these parameters would be called with? Validation
 * with `unevaluatedProperties: false` unless the schema says otherwise; no schema (NULL, null,
 * true) accepts only {}, false accepts nothing. Type names that are common mistakes for JSON
 * Schema's own ("varchar", "int", "dict", ...) are read as what they mean. Same results as above.
 */
int km_schema_accepts_arguments(const json_t *schema, const json_t *arguments);

#endif
