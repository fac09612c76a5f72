/*
 * Angles are computed in f32, step by step as the reference does: a position times a frequency,
 * both rounded to f32. At position 100,000 the rounding of the angle alone is 0.004 rad, so a table
 * from exact angles would differ from the one that the weights were trained and evaluated with.
 */
#include "model/rope.h"

#include <math.h>

#include "base/fixed_math.h"

static double mscale(double factor, double scale)
{
	return factor <= 1 ? 1 : 0.1 * scale * km_fixed_log(factor) + 1;
}

/* The dimension (not rounded) whose wave makes `rotations` turns over the original context. */
static double correction_dim(const km_rope_config *rope, int dim, double rotations)
{
	double turns = rope->original_max_position_embeddings / (rotations * 2 * M_PI);

	return dim * km_fixed_log(turns) / (2 * km_fixed_log(rope->theta));
}

static float attention_factor(const km_rope_config *rope)
{
	return (float)(mscale(rope->factor, rope->mscale) /
	               mscale(rope->factor, rope->mscale_all_dim));
}

/* Fast waves (below `low`) keep their frequency, slow ones (from `high` on) are stretched by
 * factor, a ramp leads from one to the other. */
static void stretch(const km_rope_config *rope, int dim, float *frequency)
{
	double low = fmax(floor(correction_dim(rope, dim, rope->beta_fast)), 0);
	double high = fmin(ceil(correction_dim(rope, dim, rope->beta_slow)), dim - 1);

	if (low == high)
		high += 0.001;
	for (int i = 0; i < dim / 2; i++) {
		float wave = (float)km_fixed_power(rope->theta, (float)(2 * i) / (float)dim);
		float ramp = fminf(fmaxf(((float)i - (float)low) / (float)(high - low), 0), 1);
		float keep = 1 - ramp;

		frequency[i] = 1 / ((float)rope->factor * wave) * (1 - keep) + 1 / wave * keep;
	}
}

float km_rope_frequencies(const km_rope_config *rope, int dim, float *frequency)
{
	if (rope->yarn) {
		stretch(rope, dim, frequency);
		return attention_factor(rope);
	}
	for (int i = 0; i < dim / 2; i++)
		frequency[i] = 1 / (float)km_fixed_power(rope->theta, (float)(2 * i) / (float)dim);
	return 1;
}

void km_rope_table(const km_rope_config *rope, int dim, int positions, float *table)
{
	enum { MAX_PAIRS = 512 };
	float frequency[MAX_PAIRS], factor;
	int pairs = dim / 2;

	KM_ASSERT(pairs <= MAX_PAIRS);
	factor = km_rope_frequencies(rope, dim, frequency);
#pragma omp parallel for schedule(static)
	for (int p = 0; p < positions; p++) {
		float *row = table + (size_t)p * (size_t)dim;

		for (int i = 0; i < pairs; i++) {
			double sine, cosine;

			km_fixed_sincos((float)p * frequency[i], &sine, &cosine);
			row[i] = (float)cosine * factor;
			row[pairs + i] = (float)sine * factor;
		}
	}
}
