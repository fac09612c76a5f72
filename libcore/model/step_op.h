/*
 * The parts of a step as they are timed and shown: one name for what both backends do, however many
 * launches or ops of device/op.h it is made of there. The CPU adds up the ops that it runs under
 * these names (km_model_trace); on a GPU a step can be enqueued without some of them, which is how
 * model/profile.h times one of them alone.
 */
#ifndef KM_MODEL_STEP_OP_H
#define KM_MODEL_STEP_OP_H

enum km_step_op {
	KM_STEP_EMBED,
	KM_STEP_INPUT_NORM,  /* with the sum before it */
	KM_STEP_QKV_A,       /* q_a and kv_a */
	KM_STEP_Q_A_NORM,
	KM_STEP_Q_B,         /* q_b, or q of a model without q_lora */
	KM_STEP_ROPE_KV,     /* the latent's norm, rope, the write to the cache */
	KM_STEP_MLA_DECODE,  /* absorbed: with kv_b's two halves */
	KM_STEP_KV_B,        /* prompts: cached latents, and keys and values made of them */
	KM_STEP_MLA_PREFILL, /* on the CPU with kv_b */
	KM_STEP_O,
	KM_STEP_POST_NORM,   /* with the sum before it */
	KM_STEP_MLP_GATE_UP, /* of a dense layer */
	KM_STEP_MLP_ACT,
	KM_STEP_MLP_DOWN,
	KM_STEP_SHARED_GATE_UP, /* on a GPU, for few rows, with the router's product */
	KM_STEP_SHARED_ACT,
	KM_STEP_SHARED_DOWN,
	KM_STEP_ROUTER,      /* with the selection; where shared_gate_up has its product, that alone */
	KM_STEP_EXPERTS,     /* the routed ones */
	KM_STEP_KEEP,        /* rows that the last layer keeps, and rows of logits, moved together */
	KM_STEP_FINAL_NORM,
	KM_STEP_HEAD,
	KM_STEP_RESULT,      /* what goes to the host */
	KM_STEP_COUNT,
};

const char *km_step_op_name(enum km_step_op op); /* "shared_gate_up" */

#endif
