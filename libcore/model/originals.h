/*
 * What a repacked checkpoint was: for each file that it had, the tensors that its old header lists
 * (kimi.original_header in the file's metadata), and what each is made from now. Unpacking works
 * from this, and verifying asks whether it could.
 *
 * A file whose tensors all went into repacked ones of other files holds none now, and no index can
 * name it: such bare files are those that the original index names and the checkpoint lacks. They
 * have their old header like the others.
 */
#ifndef KM_MODEL_ORIGINALS_H
#define KM_MODEL_ORIGINALS_H

#include "model/checkpoint.h"

/* The index that the folder had before, beside the new one. */
#define KM_ORIGINAL_INDEX "original.model.safetensors.index.json"

enum km_original_what { KM_ORIGINAL_CODES, KM_ORIGINAL_SCALES, KM_ORIGINAL_SHAPE };

/* A tensor of an old header, and where it comes from. */
typedef struct km_original {
	const km_tensor *t;    /* old */
	const km_tensor *from; /* now: itself, or the repacked tensor that it is part of */
	bool part, down;
	int matrix; /* gate 0, up 1 */
	enum km_original_what what;
} km_original;

typedef struct km_original_file {
	const km_safetensors *now;
	const char *header; /* the JSON text, borrowed from `now` */
	km_safetensors before;
	km_original *tensors; /* [before.count], parts by repacked tensor, then copies */
	int parts;
	uint64_t bytes;
} km_original_file;

typedef struct km_originals {
	km_original_file *files; /* [count]: the checkpoint's, then the bare ones */
	int count;
	km_safetensors *bare;    /* [bare_count] */
	int bare_count;
} km_originals;

/* A finding for each file whose old header is missing or wrong and for each old tensor that cannot
 * be made from what is there; where there is none of those, for each tensor of now that is not part
 * of any old one, or not as a whole: the way back would lose it. The checkpoint is kept. */
void km_originals_open(km_originals *originals, const km_checkpoint *checkpoint,
                       const km_config *config, km_findings *findings);
void km_originals_close(km_originals *originals);

#endif
