/*
 * Tuning files: which tile numbers a kernel runs with at each token count, measured on one device.
 *
 *   ROOT/cuda_<major>_<minor>/
 *   E=<E>,N=<N>,device_name=<name>[,dtype=<dtype>][,block_shape=[n, k]][_down].json
 *
 * The name is the contract of SGLang's fused-MoE configs, with the CUDA toolkit's version in place
 * of Triton's: E experts and N columns of the down projection's weights on this rank (of int4 they
 * are packed in pairs, so N is half the intermediate size), the device's name with _ for spaces, no
 * dtype for bf16, block_shape (printed as Python prints a list) only when both its numbers are
 * above 0. The file is
 *
 *   { "<tokens>": { "<field>": <integer>, ..., "hidden_size": ..., "top_k": ..., "group_size": ...,
 *                   "num_experts": ..., "us": <number>, "plan_us": <number> }, ... }
 *
 * The fields are the kernel's (km_tune_schema). hidden_size, top_k, group_size and num_experts (of
 * all ranks) are not in the name and change what is best, so each entry carries them and they are
 * compared: by them, too, a table of ours is told from Triton's, whose keys are the same; us is
 * what the entry took, plan_us what the plan's own choice took (absent: not measured).
 *
 * Reading trusts nothing: each wrong type, absurd number, missing or unknown field and each entry
 * that the kernel does not take is a sentence. Plain data after reading; any thread may look up.
 */
#ifndef KM_DEVICE_TUNE_H
#define KM_DEVICE_TUNE_H

#include <stdbool.h>

#include "base/buf.h"
#include "base/err.h"

enum { KM_TUNE_MAX_FIELDS = 16, KM_TUNE_MAX_TOKENS = 1 << 20, KM_TUNE_NAME = 512 };

typedef struct km_tune_key {
	int experts, n;
	char device_name[256]; /* as the driver says it */
	const char *dtype;     /* "int4_w4a16"; NULL: bf16 */
	int block_n, block_k;  /* 0: none */
	int toolkit;           /* 13000 for CUDA 13.0 */
	bool down;
} km_tune_key;

/* What the name leaves out. */
typedef struct km_tune_problem {
	int hidden_size, top_k, group_size;
	int num_experts; /* of all ranks */
} km_tune_problem;

typedef struct km_tune_field {
	const char *name;
	int min, max;
} km_tune_field;

/* What an entry is made of. `check` says whether the kernel takes the values at this many
 * tokens. */
typedef struct km_tune_schema {
	const km_tune_field *fields;
	int count; /* <= KM_TUNE_MAX_FIELDS */
	const void *context;
	int (*check)(const void *context, int tokens, const int *values, km_err *err);
} km_tune_schema;

typedef struct km_tune_entry {
	int tokens;
	int values[KM_TUNE_MAX_FIELDS];
	double us, plan_us; /* 0: not known */
} km_tune_entry;

typedef struct km_tune_table {
	char *path;             /* owned */
	km_tune_entry *entries; /* owned, [count] by tokens */
	int count;
} km_tune_table;

/* "E=384,N=128,...json" and "cuda_13_0". */
void km_tune_file_name(const km_tune_key *key, char out[KM_TUNE_NAME]);
void km_tune_dir_name(const km_tune_key *key, char out[32]);
char *km_tune_path(const char *root, const km_tune_key *key); /* owned by the caller */

/* ROOT of the tables that belong to a program: ../share/kimi/configs beside an installed one's
 * folder, ../../../configs beside one that lies where it was built; the former when there is
 * neither. Owned by the caller. km_tune_own_root: of this program. */
char *km_tune_root_of(const char *program);
char *km_tune_own_root(void);

/* Reads a file. KM_ENOTFOUND when it is not there or is for another problem; KM_EUNSUPPORTED for
 * SGLang's and vLLM's, whose tiles are of other kernels; KM_EFORMAT for what is no table. */
int km_tune_read(km_tune_table *table, const char *path, const km_tune_problem *problem,
                 const km_tune_schema *schema, km_err *err);
/* The same from memory; `name` is for sentences. */
int km_tune_parse(km_tune_table *table, const char *text, size_t len, const char *name,
                  const km_tune_problem *problem, const km_tune_schema *schema, km_err *err);
void km_tune_release(km_tune_table *table); /* also after a failure */

/* Adds an entry, or replaces the one of the same tokens. */
void km_tune_put(km_tune_table *table, const km_tune_entry *entry);
void km_tune_format(const km_tune_table *table, const km_tune_problem *problem,
                    const km_tune_schema *schema, km_buf *out);
/* Makes the folders of `path` and says whether a file can be written there, before work is spent on one. */
int km_tune_make_place(const char *path, km_err *err);
/* Makes the folders, and the file whole or not at all. */
int km_tune_write(const km_tune_table *table, const char *path, const km_tune_problem *problem,
                  const km_tune_schema *schema, km_err *err);

/* The table for `key` under `root`: 1 and the table; or 0 and a sentence in `why` that names the
 * file and the field that missed. With `required` the latter is KM_ENOTFOUND. A file that is
 * there and is no table is an error in either case. `err` is not NULL. */
int km_tune_find(km_tune_table *table, const char *root, const km_tune_key *key,
                 const km_tune_problem *problem, const km_tune_schema *schema, bool required,
                 km_buf *why, km_err *err);

/* The entry with the least |tokens - M|, the smaller of two; NULL in an empty table. */
const km_tune_entry *km_tune_nearest(const km_tune_table *table, int tokens);

#endif
