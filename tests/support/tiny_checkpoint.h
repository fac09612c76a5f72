/*
 * Tiny checkpoints for tests: a golden file of tests/data/forward says what config.json is and how
 * each tensor is filled; the folder is made from it, config.json and one model.safetensors, exactly
 * as scripts/make-forward-golden filled the reference's.
 */
#ifndef TESTS_TINY_CHECKPOINT_H
#define TESTS_TINY_CHECKPOINT_H

#include <jansson.h>

/* Writes the checkpoint of `golden` into a new folder; its path, to be freed by tiny_remove. */
char *tiny_write(json_t *golden);
void tiny_remove(char *dir); /* deletes the folder, frees the path */

json_t *tiny_load(const char *name); /* tests/data/forward/NAME.json */

#endif
