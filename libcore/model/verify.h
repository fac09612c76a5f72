/*
 * Reads every byte of a checkpoint and lists what is wrong with it: everything that opening checks
 * (model/checkpoint.h), and in the data NaN and infinities in all float types, negative scales,
 * weight_shape against the config, int4 data that was never written, repacked experts against their
 * checksums, what would keep a repacked checkpoint from being unpacked (model/originals.h), and a
 * tokenizer that does not open. Data is read, not mapped, so that a failing disk is a sentence and
 * not a signal.
 */
#ifndef KM_MODEL_VERIFY_H
#define KM_MODEL_VERIFY_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "format/findings.h"

typedef struct km_verify_options {
	const char *dir;
	bool quiet;
	const volatile sig_atomic_t *cancel; /* NULL, or becomes nonzero to stop */
} km_verify_options;

typedef struct km_verify_result {
	int files;
	int64_t tensors, bytes;   /* of tensor data, all of it read */
	int64_t index_total_size; /* what the index says, -1: nothing; not a finding: published ones
	                             differ */
} km_verify_result;

/* Adds to `findings`, whose limit the caller sets. Negative when the folder is not there or holds
 * no weights at all, or KM_ECANCELED. */
int km_verify(const km_verify_options *options, km_findings *findings, km_verify_result *result,
              km_err *err);

#endif
