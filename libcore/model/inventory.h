/*
 * Every tensor that a config calls for, in one walk: what loading, checking, describing and making
 * a checkpoint have in common. A module is a linear layer, a norm, a bias or another single weight;
 * its form says how it is stored, km_module_tensors which tensors that makes.
 */
#ifndef KM_MODEL_INVENTORY_H
#define KM_MODEL_INVENTORY_H

#include <stdint.h>

#include "format/safetensors.h"
#include "model/config.h"
#include "model/names.h"

enum km_role {
	KM_ROLE_EMBED, KM_ROLE_HEAD, KM_ROLE_NORM,
	KM_ROLE_INPUT_NORM, KM_ROLE_POST_ATTENTION_NORM,
	KM_ROLE_Q, KM_ROLE_Q_A, KM_ROLE_Q_A_NORM, KM_ROLE_Q_B,
	KM_ROLE_KV_A, KM_ROLE_KV_A_NORM, KM_ROLE_KV_B, KM_ROLE_O,
	KM_ROLE_GATE, KM_ROLE_UP, KM_ROLE_DOWN,
	KM_ROLE_ROUTER, KM_ROLE_ROUTER_BIAS,
	KM_ROLE_SHARED_GATE, KM_ROLE_SHARED_UP, KM_ROLE_SHARED_DOWN,
	KM_ROLE_EXPERT_GATE, KM_ROLE_EXPERT_UP, KM_ROLE_EXPERT_DOWN,
	KM_ROLE_EXPERT_GATE_UP, /* gate and up in one, repacked */
	KM_ROLE_VISION_WEIGHT, KM_ROLE_VISION_NORM, KM_ROLE_VISION_BIAS, KM_ROLE_VISION_POSITION,
};

enum km_tensor_class {
	KM_CLASS_EMBED,
	KM_CLASS_HEAD,
	KM_CLASS_ATTENTION,
	KM_CLASS_DENSE_MLP,
	KM_CLASS_ROUTER,
	KM_CLASS_SHARED_EXPERTS,
	KM_CLASS_EXPERTS,
	KM_CLASS_NORMS,
	KM_CLASS_VISION,
	KM_CLASS_PROJECTOR,
	KM_CLASS_SKIPPED, /* on disk, not used: MTP layers, rotary tables, a head that is tied */
	KM_CLASS_COUNT,
};

/* KM_FORM_REPACKED: int4 in the layout of format/moe_layout.h, one tensor of bytes
 * [rows / 16, columns / 128, bytes of a record]. */
enum km_form { KM_FORM_PLAIN, KM_FORM_FP8, KM_FORM_INT4, KM_FORM_REPACKED, KM_FORM_COUNT };

typedef struct km_module {
	const char *key;    /* "layers.3.self_attn.o_proj"; borrowed during the visit */
	const char *suffix; /* of a plain one: "weight", "bias", "e_score_correction_bias" */
	enum km_role role;
	enum km_tensor_class class;
	enum km_form form;
	int layer, expert; /* -1: none */
	int ndim;
	int64_t shape[KM_MAX_DIMS]; /* of the weight itself, unpacked: [out, in] */
} km_module;

typedef struct km_wanted {
	const char *suffix; /* "weight_packed" */
	unsigned
		dtypes; /* bits 1 << enum km_dtype that are fine; the lowest named first is usual */
	enum km_dtype usual;
	int ndim;
	int64_t shape[KM_MAX_DIMS];
} km_wanted;

enum { KM_MAX_MODULE_TENSORS = 3 };

/* Stops at the first negative code of `visit` and returns it. KM_EFORMAT when a quantised shape
 * does not divide into its groups; KM_ELIMIT when a sum of the parameters or of their bytes might
 * not fit in 63 bits, before the module is visited. */
typedef int (*km_module_visit)(void *context, const km_module *module, km_err *err);
int km_inventory_visit(const km_config *config, km_module_visit visit, void *context, km_err *err);

int km_module_tensors(const km_module *module, const km_config *config,
                      km_wanted wanted[KM_MAX_MODULE_TENSORS]);
int64_t km_module_params(const km_module *module);
const char *km_tensor_class_name(enum km_tensor_class class);

#endif
