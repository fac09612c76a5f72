/*
 * A checkpoint whose routed int4 experts are in the layout that the GPU's kernels read
 * (format/moe_layout.h), and the way back.
 *
 * Repacking replaces, of each expert, gate_proj and up_proj by gate_up_proj.weight_repacked and
 * down_proj's tensors by down_proj.weight_repacked, bytes [rows / 16, columns / 128, record]. Files
 * keep their names; the repacked tensors come first in each, the data begins at a multiple of 4096,
 * so that it can be mapped or read straight to a device. A file that had up_proj's tensors alone is
 * left with none, and the new index does not name it. All other tensors and files are copied as
 * they are; folders inside the folder are not. config.json gets a member "kimi_repacked" in front.
 *
 *   __metadata__ of each file   kimi.expert_layout, kimi.expert_layout_version
 *                               kimi.checksums         format/checksum.h, of each repacked tensor
 *                               kimi.original_header   the JSON header that the file had before
 *   original.model.safetensors.index.json              the index that the folder had before
 *
 * With these the way back makes the same files, byte for byte. It checks each tensor's checksum
 * first.
 *
 * The output folder appears whole or not at all: everything is written and flushed in a folder
 * OUT.tmp-XXXXXX beside it, which is renamed at the end and removed on failure and cancellation.
 * Memory is one expert for each thread. The source is only read.
 */
#ifndef KM_MODEL_REPACK_H
#define KM_MODEL_REPACK_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

typedef struct km_repack_options {
	const char *dir, *out_dir;
	bool quiet;
	const volatile sig_atomic_t *cancel; /* NULL, or becomes nonzero to stop */
} km_repack_options;

typedef struct km_repack_result {
	int files;
	int64_t tensors, bytes; /* written */
	int64_t experts;        /* matrices that changed their form */
} km_repack_result;

/* KM_ENOMEM when the disk has no room, before anything is written; KM_EUNSUPPORTED when there is
 * nothing to repack, or the layout cannot hold it. */
int km_repack(const km_repack_options *options, km_repack_result *result, km_err *err);
int km_unpack(const km_repack_options *options, km_repack_result *result, km_err *err);

#endif
