/*
 * A checkpoint folder held against its config: every tensor that the inventory calls for is looked
 * up and its dtype and shape compared, what is left over is accounted for or reported. Problems are
 * findings. Notes are what a text model can be loaded without minding, and a check reports all the
 * same: files that are not read, a vision tower that is wholly absent. Only headers are read.
 * Loading, describing and verifying share this.
 */
#ifndef KM_MODEL_CHECKPOINT_H
#define KM_MODEL_CHECKPOINT_H

#include "format/findings.h"
#include "format/name_map.h"
#include "format/shards.h"
#include "model/inventory.h"

typedef struct km_checkpoint {
	km_shards shards;
	km_name_map keys;     /* key of a tensor (model/names.h) to its number in shards.tensors */
	unsigned char *class; /* [shards.count]: enum km_tensor_class, or KM_CLASS_COUNT: belongs
	                         nowhere */
	int64_t bytes[KM_CLASS_COUNT], params[KM_CLASS_COUNT];
	int64_t tensors[KM_CLASS_COUNT], missing;
	bool no_vision;       /* the config has a tower and the files nothing of it */
	km_findings *notes;   /* borrowed */
} km_checkpoint;

/* Called for each module whose tensors are all there and right: [3], NULL where the form has fewer.
 */
typedef int (*km_module_bind)(void *context, const km_module *module,
                              const km_tensor *const tensors[KM_MAX_MODULE_TENSORS], km_err *err);

/* `bind` may be NULL. Returns negative when the folder cannot be read or `bind` failed. */
int km_checkpoint_open(km_checkpoint *checkpoint, const char *dir, km_findings *findings,
                       km_findings *notes, km_err *err); /* `notes` may be `findings` */
int km_checkpoint_match(km_checkpoint *checkpoint, const km_config *config, km_module_bind bind,
                        void *context, km_findings *findings, km_err *err);
void km_checkpoint_close(km_checkpoint *checkpoint); /* also after a failure */

#endif
