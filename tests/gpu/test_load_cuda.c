/*
 * Loading to a GPU: experts repacked there have the bytes that the host's repacking gives; the plan
 * says, to 1%, what an engine takes of the device's memory, graphs included; what does not fit is
 * refused in a sentence, before anything is loaded.
 *
 * `test_load_cuda short` takes small shapes, and compares no memory that other programs take from
 * as well, for runs under a sanitizer beside others.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"
#include "device/cuda_moe_pack.h"
#include "device/cuda_upload.h"
#include "engine/engine.h"

static bool short_run;
static km_err err;

static void must(int rc)
{
	if (rc < 0)
		fail_msg("%s", err.msg);
}

/* ---- repacking ---- */

static km_int4_matrix random_matrix(size_t count, int group, uint64_t seed)
{
	km_int4_matrix m = { km_xmalloc(count / 2), km_xmalloc(count / (size_t)group * 2) };

	for (size_t i = 0; i < count / 8; i++)
		m.codes[i] = (uint32_t)km_rng_u64(seed, i);
	for (size_t i = 0; i < count / (size_t)group; i++)
		m.scales[i] = (uint16_t)km_rng_u64(seed + 1, i);
	return m;
}

static void *take(km_cuda *gpu, size_t bytes)
{
	void *p = NULL;

	must(km_cuda_take(gpu, &p, bytes, "test", &err));
	must(km_cuda_fill(gpu, p, 0xa5, bytes, &err));
	return p;
}

static km_int4_matrix to_device(km_cuda *gpu, const km_int4_matrix *m, size_t count, int group)
{
	km_int4_matrix there = { take(gpu, count / 2), take(gpu, count / (size_t)group * 2) };

	must(km_cuda_upload(gpu, there.codes, m->codes, count / 2, &err));
	must(km_cuda_upload(gpu, there.scales, m->scales, count / (size_t)group * 2, &err));
	return there;
}

static void pack_both_ways(km_cuda *gpu, int hidden, int intermediate, int group)
{
	size_t count = (size_t)hidden * (size_t)intermediate, mark = km_cuda_mark(gpu);
	size_t first = km_moe_gate_up_bytes(hidden, intermediate, group);
	size_t second = km_moe_down_bytes(hidden, intermediate, group);
	km_int4_matrix m[3];
	uint8_t *want = km_xmalloc(first + second), *got = km_xmalloc(first + second);
	km_cuda_moe_pack args = { .hidden = hidden,
		                  .intermediate = intermediate,
		                  .group = group,
		                  .packed_gate_up = take(gpu, first),
		                  .packed_down = take(gpu, second) };
	double us = 0;

	for (int i = 0; i < 3; i++)
		m[i] = random_matrix(count, group, 7 + 10 * (uint64_t)i);
	args.gate = to_device(gpu, &m[0], count, group);
	args.up = to_device(gpu, &m[1], count, group);
	args.down = to_device(gpu, &m[2], count, group);
	must(km_cuda_moe_pack_expert(gpu, &args, &err));
	must(km_cuda_time_begin(gpu, &err));
	must(km_cuda_moe_pack_expert(gpu, &args, &err));
	must(km_cuda_time_end(gpu, &us, &err));
	must(km_cuda_download(gpu, got, args.packed_gate_up, first, &err));
	must(km_cuda_download(gpu, got + first, args.packed_down, second, &err));
	km_moe_pack_gate_up(hidden, intermediate, group, &m[0], &m[1], want);
	km_moe_pack_down(hidden, intermediate, group, &m[2], want + first);
	assert_memory_equal(got, want, first + second);
	print_message("figure: repacking an expert of %d x %d, groups of %d: %.1f us, %.0f GB/s\n",
	              hidden, intermediate, group, us, (double)(first + second) / us / 1e3);
	for (int i = 0; i < 3; i++) {
		free(m[i].codes);
		free(m[i].scales);
	}
	free(want);
	free(got);
	km_cuda_rewind(gpu, mark);
}

static void repacked_as_on_the_host(void **state)
{
	static const int shapes[][3] = {
		{ 128, 128, 32 }, { 256, 384, 64 }, { 512, 256, 128 }, { 7168, 2048, 32 }
	};
	km_cuda *gpu;

	(void)state;
	must(km_cuda_open(&gpu, 0, 128 << 20, &err));
	for (int i = 0; i < 4 - short_run; i++)
		pack_both_ways(gpu, shapes[i][0], shapes[i][1], shapes[i][2]);
	km_cuda_close(gpu);
}

/* ---- the plan ---- */

static km_engine_options nano(int64_t tokens)
{
	km_engine_options o;

	km_engine_options_init(&o);
	o.model_dir = "tests/data/nano";
	o.context_length = 4096;
	o.max_total_tokens = tokens;
	o.max_running_requests = short_run ? 4 : 64;
	o.backend = KM_BACKEND_CUDA;
	o.quiet = true;
	return o;
}

static size_t free_bytes(void)
{
	size_t bytes;

	must(km_cuda_free_bytes(0, &bytes, &err));
	return bytes;
}

static long anonymous_kb(void)
{
	FILE *f = fopen("/proc/self/status", "r");
	char line[256];
	long kb = 0;

	assert_non_null(f);
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "RssAnon: %ld", &kb) == 1)
			break;
	fclose(f);
	return kb;
}

static void the_plan_is_what_is_taken(void **state)
{
	km_engine_options o = nano(short_run ? 4096 : 4 << 20);
	km_model_plan plan;
	km_engine *engine;
	size_t before;
	double planned, taken;
	long host;

	(void)state;
	must(km_engine_open(&engine, &o, &err)); /* what a process pays once: kernels' code */
	km_engine_close(engine);
	before = free_bytes();
	host = anonymous_kb();
	must(km_engine_plan(&o, &plan, &err));
	must(km_engine_open(&engine, &o, &err));
	planned = (double)(plan.weight_bytes + plan.kv_bytes + plan.scratch_bytes +
	                   plan.logits_bytes + plan.rope_bytes + plan.fixed_bytes);
	taken = (double)before - (double)free_bytes();
	print_message("figure: plan: %.1f MB of device memory planned, %.1f taken (%+.2f%%); the "
	              "host's own memory %+.1f MB\n",
	              planned / 1e6, taken / 1e6, 100 * (taken / planned - 1),
	              (double)(anonymous_kb() - host) / 1e3);
	km_engine_close(engine);
	if (short_run)
		return;
	assert_true(taken > 0.99 * planned && taken < 1.01 * planned);
	assert_true((double)before - (double)free_bytes() < 16e6);
}

static void too_much_is_refused(void **state)
{
	km_engine_options o = nano((int64_t)1 << 30);
	km_engine *engine;

	(void)state;
	o.context_length = 0;
	assert_int_equal(km_engine_open(&engine, &o, &err), KM_ENOMEM);
	assert_non_null(strstr(err.msg, "does not fit"));
	print_message("refused: %s\n", err.msg);
}

/* Of two that fit one by one, the second. */
static void memory_gone_meanwhile_is_refused(void **state)
{
	km_cuda *most, *more;
	size_t bytes = free_bytes() - ((size_t)256 << 20);

	(void)state;
	must(km_cuda_open(&most, 0, bytes, &err));
	assert_int_equal(km_cuda_open(&more, 0, bytes, &err), KM_ENOMEM);
	print_message("refused: %s\n", err.msg);
	km_cuda_close(most);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest all[] = {
		cmocka_unit_test(repacked_as_on_the_host),
		cmocka_unit_test(the_plan_is_what_is_taken),
		cmocka_unit_test(too_much_is_refused),
		cmocka_unit_test(memory_gone_meanwhile_is_refused),
	};

	short_run = argc > 1 && !strcmp(argv[1], "short");
	if (!km_cuda_count(&err)) {
		printf("skip: %s\n", err.msg);
		return 0;
	}
	return _cmocka_run_group_tests("loading", all, 4 - (size_t)short_run, NULL, NULL);
}
