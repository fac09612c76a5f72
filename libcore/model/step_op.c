#include "model/step_op.h"

static const char *const names[KM_STEP_COUNT] = {
	[KM_STEP_EMBED] = "embed",
	[KM_STEP_INPUT_NORM] = "input_norm",
	[KM_STEP_QKV_A] = "q_a+kv_a",
	[KM_STEP_Q_A_NORM] = "q_a_norm",
	[KM_STEP_Q_B] = "q_b",
	[KM_STEP_ROPE_KV] = "rope_kv",
	[KM_STEP_MLA_DECODE] = "mla_decode",
	[KM_STEP_KV_B] = "kv_b",
	[KM_STEP_MLA_PREFILL] = "mla_prefill",
	[KM_STEP_O] = "o",
	[KM_STEP_POST_NORM] = "post_norm",
	[KM_STEP_MLP_GATE_UP] = "mlp_gate_up",
	[KM_STEP_MLP_ACT] = "mlp_act",
	[KM_STEP_MLP_DOWN] = "mlp_down",
	[KM_STEP_SHARED_GATE_UP] = "shared_gate_up",
	[KM_STEP_SHARED_ACT] = "shared_act",
	[KM_STEP_SHARED_DOWN] = "shared_down",
	[KM_STEP_ROUTER] = "router",
	[KM_STEP_EXPERTS] = "experts",
	[KM_STEP_KEEP] = "keep",
	[KM_STEP_FINAL_NORM] = "final_norm",
	[KM_STEP_HEAD] = "head",
	[KM_STEP_RESULT] = "result",
};

const char *km_step_op_name(enum km_step_op op)
{
	return names[op];
}
