# kimi-serve --bench-one-batch: its columns, its JSON, what it refuses.

setup_file() {
	cd "$BATS_TEST_DIRNAME/.."
	"$KIMI_BIN/kimi-convert" --synthesize configs/models/tiny-k2.json "$BATS_FILE_TMPDIR/model" \
		--seed 1 --quiet
}

setup() {
	cd "$BATS_TEST_DIRNAME/.."
	config=configs/models/tiny-k25.json
}

bench() {
	"$KIMI_BIN/kimi-serve" --device cpu --threads 1 --quiet "$@"
}

@test "a table with SGLang's columns, and one of ops for each step" {
	run bench --model-path "$config" --bench-one-batch '1,16,4;3,8,2' --layers 2 --shard-of 2
	[ "$status" -eq 0 ]
	[[ "$output" == *"2 of 4 layers, 1 of them MoE"*"random weights, one rank's slice of 2"* ]]
	[[ "$output" == *"left out 5 all-reduces of [rows, 256] over 2 ranks"* ]]
	grep -qE '^ +batch +input +output +prefill s +tokens/s +decode ms +tokens/s +total s +tokens/s$' \
		<<<"$output"
	grep -qE '^ +3 +8 +2 +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+$' <<<"$output"
	[ "$(grep -cE '^(Prefill|Decode), batch [13]: ' <<<"$output")" -eq 4 ]
	[ "$(grep -cE '^op +launches +us +share +MB +GB/s +TFLOP/s +roofline +saved us$' <<<"$output")" -eq 4 ]
	[ "$(grep -cE '^experts +1 +[0-9.]+ +[0-9.]+%' <<<"$output")" -eq 4 ]
}

@test "JSON: every op's share is its own time, and times add up" {
	bench --model-path "$config" --bench-one-batch 2,20,3 --load-format dummy --json >"$BATS_TEST_TMPDIR/o"
	jq -e '.random_weights and .shard_of == 1 and .left_out == null and .layers == 4 and .moe_layers == 3 and
		(.commit | type) == "string" and .roofline_gbps > 0' "$BATS_TEST_TMPDIR/o"
	jq -e '.results | length == 1 and (.[0] | .batch == 2 and .decode_steps == 2 and .decode_context == 22 and
		(.total_latency_s * 1.0001 >= .prefill_latency_s + .median_decode_latency_s))' "$BATS_TEST_TMPDIR/o"
	jq -e '.results[0] | .prefill_step, .decode_step | (.ops | map(.us) | add) as $sum |
		($sum - .sum_us | fabs) < 0.01 and .sum_us <= .step_us and .layer_us * .layers < .step_us and
		(.ops | all(.launches > 0 and .bytes > 0))' "$BATS_TEST_TMPDIR/o"
	run scripts/bench-table "$BATS_TEST_TMPDIR/o"
	[ "$status" -eq 0 ]
	grep -qE '^### o: decode, batch 2, input 20$' <<<"$output"
	[ "$(grep -cE '^\| experts \| 3 \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ %\*? \|$' <<<"$output")" -eq 2 ]
	jq -e '.results[0].decode_step | .distinct_experts >= 4 and .distinct_experts <= 8 and .expected_experts > 4 and .expected_experts < 8 and ([.ops[].op] | index("mla_decode") and
		index("experts") and (index("mla_prefill") | not))' "$BATS_TEST_TMPDIR/o"
}

@test "a checkpoint's own weights, a prefill in steps, a decode without one" {
	run bench --model-path "$BATS_FILE_TMPDIR/model" --bench-one-batch 2,20,1 --chunked-prefill-size 12
	[ "$status" -eq 0 ]
	[[ "$output" != *"random weights"* && "$output" == *"the last of 4 steps, 4 rows, context 20"* ]]
	run bench --model-path "$BATS_FILE_TMPDIR/model" --bench-one-batch 2,20,3 --skip-prefill
	[ "$status" -eq 0 ]
	[[ "$output" != *"Prefill, "* && "$output" == *"a step at context 22"* ]]
}

@test "what makes no sense is refused with a sentence" {
	for args in "--bench-one-batch 1,2" "--bench-one-batch 1,2,x" "--bench-one-batch 1,2,3 --plan" \
		"--layers 2" "--shard-of 2" "--json" "--skip-prefill" "--load-format dummy"; do
		run bench --model-path "$config" $args
		[ "$status" -eq 2 ]
		[[ "$output" == kimi-serve:* ]]
	done
	run bench --model-path "$config" --bench-one-batch 1,8,2 --layers 7
	[ "$status" -eq 1 ]
	[[ "$output" == *"has 4 layers, 7 cannot be taken"* ]]
	run bench --model-path "$config" --bench-one-batch 1,8,2 --shard-of 3
	[ "$status" -eq 1 ]
	[[ "$output" == *"num_attention_heads "*" cannot be cut for 3 ranks"* ]]
	run bench --model-path "$config" --bench-one-batch 1,99999999,2 --layers 2
	[ "$status" -eq 2 ]
	run bench --model-path "$config" --bench-one-batch 1,9999999,2 --layers 2
	[ "$status" -eq 1 ]
	[[ "$output" == *"a context of 10000001 tokens is outside this model's"* ]]
	run bench --model-path configs/models/none.json --bench-one-batch 1,8,2 --layers 2
	[ "$status" -eq 1 ]
	[[ "$output" == *"none.json"* ]]
}
