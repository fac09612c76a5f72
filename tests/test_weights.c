/* model/weights: what a checkpoint must hold, and the sentence for everything that it must not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/mem.h"
#include "model/inventory.h"
#include "model/weights.h"
#include "support/fake_checkpoint.h"

static void load(km_config *config, const char *name)
{
	char *path = km_xasprintf("configs/models/%s.json", name);
	km_err err;

	if (km_config_load(config, path, &err) < 0)
		fail_msg("%s", err.msg);
	free(path);
}

static void same_shape(const km_weight *a, const km_weight *b)
{
	km_weight bare = *b;

	bare.data = bare.scale = NULL;
	assert_null(a->data);
	assert_int_equal(a->type, bare.type);
	assert_int_equal(a->rows, bare.rows);
	assert_int_equal(a->cols, bare.cols);
	assert_int_equal(a->group, bare.group);
	assert_int_equal(a->block_rows, bare.block_rows);
	assert_int_equal(a->block_cols, bare.block_cols);
	if (bare.type == KM_W_FP8 || bare.type == KM_W_INT4)
		assert_int_equal(km_dtype_bytes(a->scale_dtype), km_dtype_bytes(bare.scale_dtype));
}

/* What a plan takes for the matrices' shapes is what the files then have. */
static void check_shapes(const km_config *c, const km_weights *opened)
{
	km_weights shapes;
	km_err err;

	if (km_weights_shapes(&shapes, c, &err) < 0)
		fail_msg("%s", err.msg);
	assert_int_equal(shapes.layers, opened->layers);
	same_shape(&shapes.embed, &opened->embed);
	same_shape(&shapes.head, &opened->head);
	for (int i = 0; i < shapes.layers; i++) {
		const km_layer_weights *a = &shapes.layer[i], *b = &opened->layer[i];
		const km_weight *pairs[][2] = {
			{ &a->q_proj, &b->q_proj }, { &a->q_a, &b->q_a }, { &a->q_b, &b->q_b },
			{ &a->kv_a, &b->kv_a }, { &a->kv_b, &b->kv_b }, { &a->o, &b->o },
			{ &a->gate, &b->gate }, { &a->up, &b->up }, { &a->down, &b->down },
			{ &a->router, &b->router }, { &a->shared_gate, &b->shared_gate },
			{ &a->shared_up, &b->shared_up }, { &a->shared_down, &b->shared_down },
		};

		for (size_t k = 0; k < sizeof(pairs) / sizeof(*pairs); k++)
			same_shape(pairs[k][0], pairs[k][1]);
		for (int e = 0; km_config_is_moe_layer(c, i) && e < c->n_routed_experts; e++) {
			same_shape(&a->expert_gate[e], &b->expert_gate[e]);
			same_shape(&a->expert_up[e], &b->expert_up[e]);
			same_shape(&a->expert_down[e], &b->expert_down[e]);
		}
	}
	km_weights_close(&shapes);
}

static void each_family_opens(void **state)
{
	static const struct {
		const char *name;
		enum km_weight_type expert, attention;
		int shards;
	} cases[] = {
		{ "tiny-k2", KM_W_FP8, KM_W_FP8, 1 },
		{ "tiny-k2-thinking", KM_W_INT4, KM_W_BF16, 3 },
		{ "tiny-k25", KM_W_INT4, KM_W_BF16, 2 },
		{ "tiny-deepseek-v3", KM_W_BF16, KM_W_BF16, 1 },
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		char *dir = temp_dir();
		fake_checkpoint fake;
		km_weights w;
		km_config c;
		km_err err;
		int moe;

		load(&c, cases[i].name);
		fake_init(&fake, &c);
		fake_write(&fake, dir, cases[i].shards);
		if (km_weights_open(&w, &c, dir, &err) < 0)
			fail_msg("%s: %s", cases[i].name, err.msg);
		moe = c.first_k_dense_replace;
		assert_int_equal(w.layers, c.num_hidden_layers);
		assert_int_equal(w.embed.rows, c.vocab_size);
		assert_int_equal(w.head.type, KM_W_BF16);
		assert_non_null(w.norm);
		assert_int_equal(w.layer[0].gate.rows, c.intermediate_size);
		assert_null(w.layer[0].router.data);
		assert_int_equal(w.layer[moe].router.rows, c.n_routed_experts);
		assert_non_null(w.layer[moe].router_bias);
		assert_int_equal(w.layer[moe].expert_down[3].type, cases[i].expert);
		assert_int_equal(w.layer[moe].expert_down[3].cols, c.moe_intermediate_size);
		assert_int_equal(w.layer[moe].kv_a.type, cases[i].attention);
		assert_int_equal(w.layer[moe].kv_a.rows, c.kv_lora_rank + c.qk_rope_head_dim);
		assert_true(w.expert_bytes > 0 && w.text_bytes > 0);
		assert_int_equal(w.vision_bytes > 0, c.vision.present);
		assert_int_equal(w.skipped_bytes, 0);
		check_shapes(&c, &w);
		km_weights_close(&w);
		fake_release(&fake);
		km_config_release(&c);
		remove_dir(dir);
	}
}

struct bend {
	const char *config;
	void (*bend)(fake_checkpoint *fake, km_config *config);
	int code;
	const char *says;
};

static void drop_one(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_remove(f, "language_model.model.layers.2.mlp.experts.5.up_proj.weight_scale");
}

static void drop_bias(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_remove(f, "model.layers.1.mlp.gate.e_score_correction_bias");
}

static void add_extra(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_add(f, "model.layers.1.mlp.gate.weight_g_idx", KM_I32, 1, (int64_t[]){ 4 });
}

static void add_layer(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_add(f, "model.layers.4.input_layernorm.weight", KM_BF16, 1, (int64_t[]){ 256 });
}

static void add_stranger(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_add(f, "transformer.wte.weight", KM_BF16, 1, (int64_t[]){ 1 });
}

static void bend_shape(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_reshape(fake_find(f, "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"), KM_BF16, 2,
	             (int64_t[]){ 81, 256 });
}

static void bend_dtype(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_reshape(fake_find(f, "model.layers.1.mlp.experts.0.gate_proj.weight_packed"), KM_U8, 2,
	             (int64_t[]){ 64, 32 });
}

static void bend_scale(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_reshape(fake_find(f, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"),
	             KM_F32, 2, (int64_t[]){ 1, 1 });
}

static void bend_vision(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_reshape(fake_find(f, "vision_tower.encoder.blocks.1.wqkv.weight"), KM_BF16, 2,
	             (int64_t[]){ 3, 64 });
}

static void unpack_one(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_remove(f, "model.layers.1.mlp.experts.0.gate_proj.weight_packed");
	fake_remove(f, "model.layers.1.mlp.experts.0.gate_proj.weight_scale");
	fake_remove(f, "model.layers.1.mlp.experts.0.gate_proj.weight_shape");
	fake_add(f, "model.layers.1.mlp.experts.0.gate_proj.weight", KM_BF16, 2,
	         (int64_t[]){ 64, 256 });
}

static void pack_one(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_remove(f, "model.layers.1.self_attn.o_proj.weight");
	fake_add(f, "model.layers.1.self_attn.o_proj.weight_packed", KM_I32, 2,
	         (int64_t[]){ 256, 16 });
	fake_add(f, "model.layers.1.self_attn.o_proj.weight_scale", KM_BF16, 2,
	         (int64_t[]){ 256, 4 });
	fake_add(f, "model.layers.1.self_attn.o_proj.weight_shape", KM_I32, 1, (int64_t[]){ 2 });
}

static void fp8_one(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_reshape(fake_find(f, "model.layers.1.self_attn.o_proj.weight"), KM_F8_E4M3, 2,
	             (int64_t[]){ 256, 128 });
	fake_add(f, "model.layers.1.self_attn.o_proj.weight_scale_inv", KM_F32, 2,
	         (int64_t[]){ 2, 1 });
}

static void both_forms(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_add(f, "lm_head.weight", KM_BF16, 2, (int64_t[]){ 1280, 256 });
}

static void nan_norm(fake_checkpoint *f, km_config *c)
{
	(void)c;
	((uint16_t *)(uintptr_t)fake_find(f, "model.norm.weight")->data)[7] = 0x7fc0;
}

static void nan_scale(fake_checkpoint *f, km_config *c)
{
	(void)c;
	((uint16_t *)(uintptr_t)fake_find(f, "model.layers.3.mlp.experts.15.down_proj.weight_scale")
	         ->data)[9] = 0xffc1;
}

static void minus_scale(fake_checkpoint *f, km_config *c)
{
	(void)c;
	((float *)(uintptr_t)fake_find(f, "model.layers.1.self_attn.o_proj.weight_scale_inv")
	         ->data)[1] = -1;
}

static void odd_groups(fake_checkpoint *f, km_config *c)
{
	(void)f;
	c->moe_intermediate_size = 72;
}

static void too_many_rows(fake_checkpoint *f, km_config *c)
{
	(void)f;
	c->num_attention_heads = 1 << 16;
	c->qk_nope_head_dim = 1 << 16;
}

static void no_tower(fake_checkpoint *f, km_config *c)
{
	(void)f;
	c->vision.present = false;
}

static void part_of_a_tower(fake_checkpoint *f, km_config *c)
{
	(void)c;
	fake_remove_all(f, "mm_projector.");
}

static const struct bend bends[] = {
	{ "tiny-k25", drop_one, KM_ENOTFOUND,
	  ": tensor language_model.model.layers.2.mlp.experts.5.up_proj.weight_scale is missing" },
	{ "tiny-k2", drop_bias, KM_ENOTFOUND,
	  ": tensor model.layers.1.mlp.gate.e_score_correction_bias is missing" },
	{ "tiny-k2", add_extra, KM_EFORMAT,
	  "/model.safetensors: tensor model.layers.1.mlp.gate.weight_g_idx is extra" },
	{ "tiny-k2", add_layer, KM_EFORMAT,
	  "tensor model.layers.4.input_layernorm.weight is extra" },
	{ "tiny-k2", add_stranger, KM_EFORMAT, "tensor transformer.wte.weight is extra" },
	{ "tiny-k2-thinking", bend_shape, KM_EFORMAT,
	  "model.layers.1.self_attn.kv_a_proj_with_mqa.weight: BF16 [80, 256] is expected, this is "
	  "BF16 [81, 256]" },
	{ "tiny-k2-thinking", bend_dtype, KM_EFORMAT,
	  "gate_proj.weight_packed: I32 [64, 32] is expected, this is U8 [64, 32]" },
	{ "tiny-k2", bend_scale, KM_EFORMAT,
	  "weight_scale_inv: F32 [1, 2] is expected, this is F32 [1, 1]" },
	{ "tiny-k25", bend_vision, KM_EFORMAT,
	  "vision_tower.encoder.blocks.1.wqkv.weight: BF16 [192, 64] is expected, this is BF16 [3, "
	  "64]" },
	{ "tiny-k2-thinking", unpack_one, KM_EFORMAT,
	  "tensor model.layers.1.mlp.experts.0.gate_proj.weight is stored as BF16, but "
	  "quantization_config says that this module is packed int4" },
	{ "tiny-k2-thinking", pack_one, KM_EFORMAT,
	  "tensor model.layers.1.self_attn.o_proj.weight_packed is quantised, but "
	  "quantization_config leaves this "
	  "module out" },
	{ "tiny-k2-thinking", fp8_one, KM_EFORMAT,
	  "tensor model.layers.1.self_attn.o_proj.weight" },
	{ "tiny-k25", both_forms, KM_EFORMAT,
	  "tensors language_model.lm_head.weight and lm_head.weight are the same weight" },
	{ "tiny-k2", nan_norm, KM_EFORMAT,
	  "tensor model.norm.weight: element 7 is not a finite number" },
	{ "tiny-k2-thinking", nan_scale, KM_EFORMAT,
	  "experts.15.down_proj.weight_scale: scale 9 is not a finite number" },
	{ "tiny-k2", minus_scale, KM_EFORMAT, "o_proj.weight_scale_inv: scale 1 is negative" },
	{ "tiny-k2-thinking", odd_groups, KM_EFORMAT,
	  "layers.1.mlp.experts.0.down_proj: its 72 columns cannot be packed as int4 in groups of "
	  "32" },
	{ "tiny-k2", too_many_rows, KM_ELIMIT,
	  "layers.0.self_attn.q_b_proj: a size of 4296015872 is more than is supported" },
	{ "tiny-k25", part_of_a_tower, KM_ENOTFOUND,
	  "tensor mm_projector.pre_norm.weight is missing" },
	{ "tiny-k25", no_tower, KM_EFORMAT,
	  "tensor vision_tower.patch_embed.proj.weight is extra" },
};

static void each_wrong_tensor_is_named(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof(bends) / sizeof(*bends); i++) {
		char *dir = temp_dir();
		km_err err = { 0 };
		fake_checkpoint fake;
		km_weights w;
		km_config c;
		int rc;

		load(&c, bends[i].config);
		fake_init(&fake, &c);
		bends[i].bend(&fake, &c);
		fake_write(&fake, dir, 1);
		rc = km_weights_open(&w, &c, dir, &err);
		if (rc != bends[i].code || !strstr(err.msg, bends[i].says))
			fail_msg("case %zu: code %d, '%s', not '%s'", i, rc, err.msg,
			         bends[i].says);
		fake_release(&fake);
		km_config_release(&c);
		remove_dir(dir);
	}
}

static void a_text_model_opens_without_its_tower(void **state)
{
	char *dir = temp_dir();
	fake_checkpoint fake;
	km_weights w;
	km_config c;
	km_err err;

	(void)state;
	load(&c, "tiny-k25");
	fake_init(&fake, &c);
	fake_remove_all(&fake, "vision_tower.");
	fake_remove_all(&fake, "mm_projector.");
	fake_write(&fake, dir, 2);
	write_text(dir, "model-00001-of-00064.safetensors", "remains of another download");
	if (km_weights_open(&w, &c, dir, &err) < 0)
		fail_msg("%s", err.msg);
	assert_int_equal(w.vision_bytes, 0);
	assert_true(w.text_bytes > 0);
	km_weights_close(&w);
	fake_release(&fake);
	km_config_release(&c);
	remove_dir(dir);
}

/* Shapes that the tiny configs do not have: 576 rows of fp8, other groups of int4. */
static void scales_have_the_shape_of_their_blocks(void **state)
{
	static const int groups[] = { 32, 64, 128, 0 };
	char *dir = temp_dir();
	fake_checkpoint fake;
	km_weights w;
	km_config c;
	km_err err;

	(void)state;
	load(&c, "tiny-k2");
	c.kv_lora_rank = 512;
	c.qk_rope_head_dim = 64;
	fake_init(&fake, &c);
	assert_int_equal(
		fake_find(&fake, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv")
			->shape[0],
		5);
	fake_write(&fake, dir, 1);
	if (km_weights_open(&w, &c, dir, &err) < 0)
		fail_msg("%s", err.msg);
	assert_int_equal(w.layer[0].kv_a.rows, 576);
	assert_int_equal(km_weight_bytes(&w.layer[0].kv_a), 576 * 256 + 5 * 2 * 4);
	km_weights_close(&w);
	fake_release(&fake);
	km_config_release(&c);
	for (int i = 0; i < 4; i++) {
		load(&c, "tiny-k2-thinking");
		c.moe_intermediate_size = 128;
		c.quant.group_size = groups[i];
		fake_init(&fake, &c);
		fake_write(&fake, dir, 1);
		if (km_weights_open(&w, &c, dir, &err) < 0)
			fail_msg("%s", err.msg);
		assert_int_equal(w.layer[1].expert_up[0].group, groups[i] ? groups[i] : 256);
		assert_int_equal(km_weight_bytes(&w.layer[1].expert_up[0]),
		                 128 * 256 / 2 + 128 * (groups[i] ? 256 / groups[i] : 1) * 2);
		km_weights_close(&w);
		fake_release(&fake);
		km_config_release(&c);
	}
	remove_dir(dir);
}

static void names_have_three_spellings(void **state)
{
	char *dir = temp_dir();
	fake_checkpoint fake;
	km_weights w;
	km_config c;
	km_err err;

	(void)state;
	load(&c, "tiny-k25");
	fake_init(&fake, &c);
	for (int i = 0; i < fake.count; i++) {
		const char *name = fake.tensors[i].name;
		char *other = NULL;

		if (!strncmp(name, "language_model.model.layers.1.", 30))
			other = km_xasprintf("language_model.%s", name + 21);
		else if (!strncmp(name, "language_model.", 15) && i % 2)
			other = km_xstrdup(name + 15);
		if (other)
			fake_rename(&fake.tensors[i], other);
		free(other);
	}
	fake_add(&fake, "language_model.model.layers.0.self_attn.rotary_emb.inv_freq", KM_F32, 1,
	         (int64_t[]){ 8 });
	fake_write(&fake, dir, 1);
	if (km_weights_open(&w, &c, dir, &err) < 0)
		fail_msg("%s", err.msg);
	assert_int_equal(w.skipped_bytes, 32);
	km_weights_close(&w);
	fake_release(&fake);
	km_config_release(&c);
	remove_dir(dir);
}

static void mtp_layers_and_tied_heads_are_skipped(void **state)
{
	char *dir = temp_dir();
	fake_checkpoint fake;
	km_weights w;
	km_config c;
	km_err err;

	(void)state;
	load(&c, "tiny-deepseek-v3");
	fake_init(&fake, &c);
	c.num_nextn_predict_layers = 1;
	c.tie_word_embeddings = true;
	fake_add(&fake, "model.layers.4.eh_proj.weight", KM_BF16, 2, (int64_t[]){ 256, 512 });
	fake_add(&fake, "model.layers.4.shared_head.norm.weight", KM_BF16, 1, (int64_t[]){ 256 });
	fake_write(&fake, dir, 1);
	if (km_weights_open(&w, &c, dir, &err) < 0)
		fail_msg("%s", err.msg);
	assert_int_equal(w.skipped_bytes, 256 * 512 * 2 + 512 + 1280 * 256 * 2);
	assert_ptr_equal(w.head.data, w.embed.data);
	km_weights_close(&w);
	fake_release(&fake);
	km_config_release(&c);
	remove_dir(dir);
}

static void ignore_rules_decide_what_is_quantised(void **state)
{
	static const char *const lists[][2] = {
		{ "re:.*self_attn.*", "lm_head" },
		{ "model.layers.3.self_attn.o_proj", "re:language_model\\.lm_head" },
		{ "re:self_attn",
		  "re:.*layers\\.(1|2)\\.mlp.*" }, /* matched from the start: never */
	};
	static const char *const slow[] = { "re:.*layers\\.((a|aa)+)+[!?]", "x" };
	static const char *const bad[] = { "re:(", "x" }, *const parts[] = { "mlp.shared_experts",
		                                                             "o_pro" };
	static const bool attention[] = { true, true, false }, head[] = { true, true, false };
	km_ignore_rules *rules;
	km_config c;
	km_err err;

	(void)state;
	for (int i = 0; i < 3; i++) {
		c = (km_config){ .kind = KM_KIND_KIMI_K25,
			         .quant = { .method = KM_QUANT_INT4_PACKED,
			                    .ignore_count = 2,
			                    .ignore = (char **)(uintptr_t)lists[i] } };
		assert_int_equal(km_ignore_rules_open(&rules, &c, &err), 0);
		assert_int_equal(km_ignore_rules_match(rules, "layers.3.self_attn.o_proj", &err),
		                 attention[i]);
		assert_int_equal(km_ignore_rules_match(rules, "lm_head", &err), head[i]);
		assert_int_equal(
			0, km_ignore_rules_match(rules, "layers.3.mlp.experts.1.up_proj", &err));
		km_ignore_rules_close(rules);
	}
	c.quant.ignore = (char **)(uintptr_t)bad;
	assert_int_equal(km_ignore_rules_open(&rules, &c, &err), KM_EFORMAT);
	assert_non_null(strstr(err.msg, "\"re:(\" is not a regular expression"));
	c.quant.ignore = (char **)(uintptr_t)slow;
	assert_int_equal(km_ignore_rules_open(&rules, &c, &err), 0);
	assert_int_equal(
		km_ignore_rules_match(rules, "layers.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", &err),
		KM_ELIMIT);
	assert_non_null(strstr(err.msg, "pattern 0 takes too many steps"));
	km_ignore_rules_close(rules);
	c.quant.method = KM_QUANT_FP8_BLOCK;
	c.quant.ignore = (char **)(uintptr_t)parts;
	assert_int_equal(km_ignore_rules_open(&rules, &c, &err), 0);
	assert_int_equal(km_ignore_rules_match(rules, "layers.3.mlp.shared_experts.up_proj", &err),
	                 1);
	assert_int_equal(0, km_ignore_rules_match(rules, "layers.3.self_attn.o_proj", &err));
	km_ignore_rules_close(rules);
}

/* A misaligned tensor: one byte more in front of it. */
static void misaligned_data_is_copied(void **state)
{
	char *dir = temp_dir();
	fake_checkpoint fake;
	km_weights w;
	km_config c;
	km_err err;
	km_tensor last;

	(void)state;
	load(&c, "tiny-deepseek-v3");
	c.num_nextn_predict_layers = 1;
	fake_init(&fake, &c);
	((uint16_t *)(uintptr_t)fake_find(&fake, "model.norm.weight")->data)[5] = 0x3f80;
	last = *fake_add(&fake, "model.layers.4.byte", KM_U8, 1, (int64_t[]){ 1 });
	fake.tensors[fake.count - 1] = fake.tensors[0];
	fake.tensors[0] = last;
	fake_write(&fake, dir, 1);
	if (km_weights_open(&w, &c, dir, &err) < 0)
		fail_msg("%s", err.msg);
	assert_true(w.norm[5] == 1.0f);
	assert_int_equal((uintptr_t)w.head.data % 2, 0);
	km_weights_close(&w);
	fake_release(&fake);
	km_config_release(&c);
	remove_dir(dir);
}

/* ---- checkpoints made by others ------------------------------------------------------------- */

static float element(const km_weight *w, int row, int col)
{
	size_t at = (size_t)row * (size_t)w->cols + (size_t)col, scale;

	if (w->type == KM_W_INT4) {
		uint32_t word = ((const uint32_t *)w->data)[at / 8];

		scale = (size_t)row * (size_t)(w->cols / w->group) + (size_t)(col / w->group);
		return (float)((int)(word >> 4 * (col % 8) & 15) - 8) *
		       km_bf16_to_f32(((const uint16_t *)w->scale)[scale]);
	}
	assert_int_equal(w->type, KM_W_FP8);
	scale = (size_t)(row / w->block_rows) *
	                (size_t)((w->cols + w->block_cols - 1) / w->block_cols) +
	        (size_t)(col / w->block_cols);
	return km_f8_e4m3_to_f32(((const uint8_t *)w->data)[at]) * ((const float *)w->scale)[scale];
}

static void same_numbers(const km_weight *w, const char *dir, const char *module)
{
	char *path = km_xasprintf("%s-expected.safetensors", dir);
	km_safetensors file;
	const float *want = NULL;
	km_err err;

	assert_int_equal(km_safetensors_open(&file, path, &err), 0);
	for (int i = 0; i < file.count; i++) {
		if (strcmp(file.tensors[i].name, module) != 0)
			continue;
		want = file.tensors[i].data;
		assert_int_equal(file.tensors[i].shape[0], w->rows);
		assert_int_equal(file.tensors[i].shape[1], w->cols);
	}
	assert_non_null(want);
	for (int r = 0; r < w->rows; r++)
		for (int c = 0; c < w->cols; c++)
			if (element(w, r, c) != want[r * w->cols + c])
				fail_msg("%s[%d, %d] is %a, not %a", module, r, c,
				         (double)element(w, r, c), (double)want[r * w->cols + c]);
	km_safetensors_close(&file);
	free(path);
}

static void what_other_libraries_made_reads_the_same(void **state)
{
	static const char *const dirs[] = { "tests/data/checkpoint/int4",
		                            "tests/data/checkpoint/fp8" };

	(void)state;
	for (int i = 0; i < 2; i++) {
		km_weights w;
		km_config c;
		km_err err;

		if (km_config_load(&c, dirs[i], &err) < 0 ||
		    km_weights_open(&w, &c, dirs[i], &err) < 0)
			fail_msg("%s", err.msg);
		if (i == 0) {
			same_numbers(&w.layer[1].expert_down[1], dirs[i],
			             "model.layers.1.mlp.experts.1.down_proj");
		} else {
			assert_int_equal(w.layer[1].expert_gate[1].rows % 128, 16);
			same_numbers(&w.layer[1].expert_gate[1], dirs[i],
			             "model.layers.1.mlp.experts.1.gate_proj");
			same_numbers(&w.layer[1].kv_a, dirs[i],
			             "model.layers.1.self_attn.kv_a_proj_with_mqa");
		}
		km_weights_close(&w);
		km_config_release(&c);
	}
}

/* ---- the published size --------------------------------------------------------------------- */

struct big {
	const km_config *config;
	km_tensor *tensors;
	int count;
};

static int add_big(void *context, const km_module *m, km_err *err)
{
	struct big *b = context;
	km_wanted wanted[KM_MAX_MODULE_TENSORS];
	int count = km_module_tensors(m, b->config, wanted);

	(void)err;
	for (int i = 0; i < count; i++) {
		km_tensor *t = &b->tensors[b->count++];
		char key[320], name[400];

		*t = (km_tensor){ .dtype = wanted[i].usual, .ndim = wanted[i].ndim,
			          .bytes = km_dtype_bytes(wanted[i].usual) };
		for (int d = 0; d < t->ndim; d++) {
			t->shape[d] = wanted[i].shape[d];
			t->bytes *= (uint64_t)t->shape[d];
		}
		snprintf(key, sizeof(key), "%s.%s", m->key, wanted[i].suffix);
		km_name_on_disk(name, sizeof(name), b->config->kind, key);
		t->name = km_xstrdup(name);
	}
	return 0;
}

/* A shard with its header and a hole in place of its data. */
static bool write_hole(const char *dir, const char *name, km_tensor *t, int count)
{
	char *path = km_xasprintf("%s/%s", dir, name);
	km_buf header = KM_BUF_INIT;
	uint64_t at = 0;
	FILE *f = fopen(path, "w");
	bool ok;

	for (int i = 0; i < count; i++) {
		t[i].offset = at;
		at += t[i].bytes;
	}
	km_safetensors_put_header(&header, t, count);
	assert_non_null(f);
	assert_int_equal(fwrite(header.data, 1, header.len, f), header.len);
	assert_int_equal(fflush(f), 0);
	ok = ftruncate(fileno(f), (off_t)(header.len + at)) == 0;
	fclose(f);
	km_buf_release(&header);
	free(path);
	return ok;
}

static void the_largest_checkpoint_opens_fast(void **state)
{
	enum { SHARDS = 64, ROUNDS = 2 };
	struct big big = { NULL, NULL, 0 };
	char *dir = temp_dir(), name[64];
	km_buf index = KM_BUF_INIT;
	double best = 1e9, cpu = 1e9;
	bool ok = true;
	km_config c;
	km_err err;

	(void)state;
	load(&c, "kimi-k2.5");
	big.config = &c;
	big.tensors = km_xcalloc(210000, sizeof(*big.tensors));
	assert_int_equal(km_inventory_visit(&c, add_big, &big, &err), 0);
	km_buf_puts(&index, "{\"metadata\":{\"total_size\":595148192736},\"weight_map\":{");
	for (int s = 0; s < SHARDS && ok; s++) {
		int begin = big.count / SHARDS * s,
		    end = s + 1 == SHARDS ? big.count : begin + big.count / SHARDS;

		snprintf(name, sizeof(name), "model-%05d-of-%06d.safetensors", s + 1, SHARDS);
		ok = write_hole(dir, name, big.tensors + begin, end - begin);
		for (int i = begin; i < end; i++)
			km_buf_printf(&index, "%s\"%s\":\"%s\"", i ? "," : "", big.tensors[i].name,
			              name);
	}
	km_buf_puts(&index, "}}");
	write_text(dir, "model.safetensors.index.json", index.data);
	for (int round = 0; round < ROUNDS && ok; round++) {
		double start = km_now_s();
		clock_t cpu_start = clock();
		km_weights w;

		if (km_weights_open(&w, &c, dir, &err) < 0)
			fail_msg("%s", err.msg);
		if (km_now_s() - start < best)
			best = km_now_s() - start;
		if ((double)(clock() - cpu_start) / CLOCKS_PER_SEC < cpu)
			cpu = (double)(clock() - cpu_start) / CLOCKS_PER_SEC;
		assert_int_equal(w.expert_bytes, INT64_C(23040) * 24772632);
		assert_int_equal(w.text_bytes + w.expert_bytes + w.vision_bytes,
		                 INT64_C(595148192736));
		km_weights_close(&w);
	}
	if (ok)
		printf("figure: opening K2.5's %d tensors in %d files takes %.2f s, %.2f s of "
		       "processor (best of %d, "
		       "machine shared)\n",
		       big.count, SHARDS, best, cpu, ROUNDS);
	else
		printf("skip: this file system cannot hold a file with a hole of 9 GB\n");
	for (int i = 0; i < big.count; i++)
		free((void *)(uintptr_t)big.tensors[i].name);
	free(big.tensors);
	km_buf_release(&index);
	km_config_release(&c);
	remove_dir(dir);
}

int main(void)
{
	const struct CMUnitTest all[] = {
		cmocka_unit_test(each_family_opens),
		cmocka_unit_test(each_wrong_tensor_is_named),
		cmocka_unit_test(a_text_model_opens_without_its_tower),
		cmocka_unit_test(scales_have_the_shape_of_their_blocks),
		cmocka_unit_test(names_have_three_spellings),
		cmocka_unit_test(mtp_layers_and_tied_heads_are_skipped),
		cmocka_unit_test(ignore_rules_decide_what_is_quantised),
		cmocka_unit_test(misaligned_data_is_copied),
		cmocka_unit_test(what_other_libraries_made_reads_the_same),
		cmocka_unit_test(the_largest_checkpoint_opens_fast),
	};

	return cmocka_run_group_tests(all, NULL, NULL);
}
