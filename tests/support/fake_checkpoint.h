/*
 * A checkpoint for tests: the tensors that a config calls for, in memory, to be bent (removed,
 * renamed, reshaped) and then written as one file or as shards with an index.
 */
#ifndef TESTS_SUPPORT_FAKE_CHECKPOINT_H
#define TESTS_SUPPORT_FAKE_CHECKPOINT_H

#include "format/safetensors.h"
#include "model/config.h"

typedef struct fake_checkpoint {
	km_tensor *tensors; /* names and data owned */
	int count;
} fake_checkpoint;

void fake_init(fake_checkpoint *fake, const km_config *config);
void fake_release(fake_checkpoint *fake);

km_tensor *fake_find(fake_checkpoint *fake, const char *name); /* fails the test when not there */
void fake_remove(fake_checkpoint *fake, const char *name);
void fake_remove_all(fake_checkpoint *fake, const char *prefix); /* of names; at least one */
void fake_rename(km_tensor *t, const char *name);
void fake_reshape(km_tensor *t, enum km_dtype dtype, int ndim, const int64_t *shape); /* zeros */
km_tensor *fake_add(fake_checkpoint *fake, const char *name, enum km_dtype dtype, int ndim,
                    const int64_t *shape);

/* shards 1: model.safetensors; more: the tensors dealt out in order, and an index. */
void fake_write(const fake_checkpoint *fake, const char *dir, int shards);

char *temp_dir(void);               /* owned */
void remove_dir(char *dir);         /* with its files; frees */
void write_text(const char *dir, const char *name, const char *text);
void copy_config(const char *dir, const char *config_name); /* configs/models/NAME.json */

#endif
