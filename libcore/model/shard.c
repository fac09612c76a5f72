#include "model/shard.h"

static int check(const char *what, int size, int unit, int ranks, km_err *err)
{
	if (size % ranks || size / ranks % unit)
		return km_fail(err, KM_EINVAL,
		               "%s %d cannot be cut for %d ranks: each needs a multiple of %d", what,
		               size, ranks, unit);
	return 0;
}

/* An expert's columns are cut between groups of columns that share a scale, or blocks of them. */
static int unit_of(const km_config *c)
{
	const km_quant_config *q = &c->quant;

	if (q->method == KM_QUANT_INT4_PACKED)
		return q->group_size ? q->group_size : 8;
	if (q->method == KM_QUANT_FP8_BLOCK)
		return q->block_cols > q->block_rows ? q->block_cols : q->block_rows;
	return 1;
}

int km_config_shard(km_config *c, int ranks, km_err *err)
{
	int unit = unit_of(c);

	KM_TRY(check("num_attention_heads", c->num_attention_heads, 1, ranks, err));
	KM_TRY(check("intermediate_size", c->intermediate_size, unit, ranks, err));
	if (c->n_routed_experts)
		KM_TRY(check("moe_intermediate_size", c->moe_intermediate_size, unit, ranks, err));
	KM_TRY(check("vocab_size", c->vocab_size, 1, ranks, err));
	c->num_attention_heads /= ranks;
	c->intermediate_size /= ranks;
	c->moe_intermediate_size /= ranks;
	c->vocab_size /= ranks;
	return 0;
}

void km_shard_describe_left_out(const km_config *c, int ranks, km_buf *out)
{
	km_buf_printf(out,
	              "%d all-reduces of [rows, %d] over %d ranks (one after the embedding, two in each "
	              "layer) and one all-gather of the logits",
	              1 + 2 * c->num_hidden_layers, c->hidden_size, ranks);
}
