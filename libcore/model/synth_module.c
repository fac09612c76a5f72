#include "model/synth_module.h"

#include <math.h>
#include <stdbool.h>

static float gain_of(const km_module *m, int depth)
{
	double inputs = 1, branch = 1 / sqrt(2.0 * depth);

	for (int i = 1; i < m->ndim; i++)
		inputs *= (double)m->shape[i];
	switch (m->role) {
	case KM_ROLE_EMBED:
		return 1;
	case KM_ROLE_HEAD: /* logits of deviation 4: the likeliest token has a fair share */
		return (float)(4 / sqrt(inputs));
	case KM_ROLE_O:
	case KM_ROLE_DOWN:
	case KM_ROLE_SHARED_DOWN:
	case KM_ROLE_EXPERT_DOWN:
		return (float)(branch / sqrt(inputs));
	case KM_ROLE_ROUTER:
		return (float)(1.5 / sqrt(inputs));
	case KM_ROLE_ROUTER_BIAS:
	case KM_ROLE_VISION_POSITION:
		return 0.05f;
	case KM_ROLE_VISION_BIAS:
		return 0.02f;
	default:
		return m->ndim == 1 ? 0.05f : (float)(1 / sqrt(inputs));
	}
}

static bool is_norm(enum km_role role)
{
	return role == KM_ROLE_NORM || role == KM_ROLE_INPUT_NORM ||
	       role == KM_ROLE_POST_ATTENTION_NORM || role == KM_ROLE_Q_A_NORM ||
	       role == KM_ROLE_KV_A_NORM || role == KM_ROLE_VISION_NORM;
}

km_synth_tensor km_synth_module(const km_module *m, int part, int depth,
                                const km_synth_tables *tables)
{
	km_synth_tensor v = { .kind = KM_SYNTH_NORMAL,
		              .gain = gain_of(m, depth),
		              .offset = is_norm(m->role) };

	if (m->form == KM_FORM_FP8) {
		v.kind = part ? KM_SYNTH_SCALE : KM_SYNTH_FP8;
		v.gain /= tables->fp8_rms;
	} else if (m->form == KM_FORM_INT4) {
		v.kind = part == 0 ? KM_SYNTH_INT4 : part == 1 ? KM_SYNTH_SCALE : KM_SYNTH_SHAPE;
		v.gain /= tables->int4_rms;
		v.shape[0] = (int32_t)m->shape[0];
		v.shape[1] = (int32_t)m->shape[1];
	}
	return v;
}
