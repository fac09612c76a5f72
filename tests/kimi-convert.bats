# kimi-convert from the command line: exit status, streams, and the man page held to the option table.

setup() {
	cd "$BATS_TEST_DIRNAME/.."
	convert=$KIMI_BIN/kimi-convert
	dir=$BATS_TEST_TMPDIR
}

make_tiny() {
	"$convert" --synthesize configs/models/tiny-k25.json "$dir/tiny" --seed 1 --quiet "$@"
}

@test "a synthesized checkpoint is good" {
	make_tiny
	run "$convert" --verify "$dir/tiny" --quiet
	[ "$status" -eq 0 ]
	[[ "$output" == *": good: 524 tensors, "*" in 1 file, all read" ]]
}

@test "checkpoints that other libraries made are good" {
	for d in int4 fp8; do
		run "$convert" --verify tests/data/checkpoint/$d --quiet
		[ "$status" -eq 0 ]
	done
}

@test "verify says no with status 3 and lists all problems on stdout" {
	make_tiny --shard-size 1M
	rm "$dir"/tiny/model-00002-of-*.safetensors
	run sh -c "'$convert' --verify '$dir/tiny' --quiet --max-problems 3 2>/dev/null"
	[ "$status" -eq 3 ]
	[[ "${lines[0]}" == *"model-00002-of-"*"cannot be opened"* ]]
	[[ "${lines[1]}" == *" is missing" ]]
	[ "${#lines[@]}" -eq 4 ]
	[[ "${lines[3]}" == "and "*" more problems" ]]
	run sh -c "'$convert' --verify '$dir/tiny' --quiet --json | jq -e '.ok == false and .problem_count > 3'"
	[ "$status" -eq 0 ]
}

@test "a file that is no file holds nothing up and is one problem" {
	make_tiny
	mv "$dir/tiny/model.safetensors" "$dir/weights"
	mkfifo "$dir/tiny/model.safetensors"
	run timeout 20 "$convert" --verify "$dir/tiny" --quiet --max-problems 1000
	[ "$status" -eq 3 ]
	[[ "${lines[0]}" == *"/model.safetensors: is not a regular file" ]]
	[ "$(printf '%s\n' "${lines[@]:1}" | grep -vc ' is missing$\|: this is the text model alone$')" -eq 0 ]
}

@test "verify of nothing fails with status 1" {
	run "$convert" --verify "$dir/nowhere"
	[ "$status" -eq 1 ]
	[[ "$output" == "kimi-convert: $dir/nowhere: has neither "* ]]
}

@test "the command line is checked" {
	for args in "" "--inspect a --verify b" "--synthesize x" "--inspect a b" "--verify a --seed 1" "--repack a" "--unpack a b c" "--repack a b --json" "--repack a b --unpack c" \
		"--synthesize x y --json" "--nope" "--synthesize x y --layers 0"; do
		run "$convert" $args
		[ "$status" -eq 2 ]
	done
}

@test "a config that is not supported is refused with a sentence" {
	echo '{"model_type": "llama"}' >"$dir/c.json"
	run "$convert" --synthesize "$dir/c.json" "$dir/out"
	[ "$status" -eq 1 ]
	[[ "$output" == *'model_type: "llama" is not supported'* ]]
	[ ! -e "$dir/out" ]
}

# Starts one thread on a model that takes a while, sends it a signal when it writes; "$status" is how it ended.
signal_synthesize() {
	"${@:2}" "$convert" --synthesize configs/models/mini.json "$dir/mini" --threads 1 --quiet 2>"$dir/err" &
	pid=$!
	for _ in $(seq 100); do
		ls "$dir"/mini/*.tmp-* >/dev/null 2>&1 && break
		sleep 0.05
	done
	kill -"$1" $pid
	status=0
	wait $pid || status=$?
}

@test "an interruption leaves nothing" {
	for signal in INT TERM HUP; do
		signal_synthesize $signal
		[ "$status" -eq 1 ]
		grep -q "interrupted; what was written is removed" "$dir/err"
		[ ! -e "$dir/mini" ]
	done
}

@test "under nohup a terminal that is closed interrupts nothing" {
	signal_synthesize HUP nohup
	[ "$status" -eq 0 ]
	[ -e "$dir/mini/config.json" ]
}

@test "progress that nobody reads ends nothing" {
	mkfifo "$dir/pipe"
	exec 8<>"$dir/pipe" 9>"$dir/pipe" 8<&-
	run sh -c "'$convert' --synthesize configs/models/tiny-k25.json '$dir/tiny' 2>&9"
	[ "$status" -eq 0 ]
	"$convert" --verify "$dir/tiny" --quiet
}

@test "layers are cut and the config says so" {
	make_tiny --layers 2
	[ "$(jq .text_config.num_hidden_layers "$dir/tiny/config.json")" = 2 ]
	"$convert" --inspect "$dir/tiny" | grep -q "0 tensors missing, 0 problems"
}

@test "stdout that cannot be written is a failure" {
	[ -e /dev/full ] || skip "no /dev/full"
	run sh -c "'$convert' --inspect configs/models/kimi-k2.5.json >/dev/full"
	[ "$status" -eq 1 ]
	[[ $output == *"kimi-convert: stdout cannot be written: "* ]]
}

make_wide() {
	jq '.text_config.moe_intermediate_size = 128' configs/models/tiny-k25.json >"$dir/wide.json"
	"$convert" --synthesize "$dir/wide.json" "$dir/wide" --seed 1 --quiet "$@"
}

@test "repacking and unpacking give the same files; each step verifies" {
	make_wide --shard-size 1M
	echo "a note" >"$dir/wide/README.md"
	run "$convert" --repack "$dir/wide" "$dir/repacked"
	[ "$status" -eq 0 ]
	[[ "${lines[-1]}" == *"/repacked: 96 expert tensors repacked, 0.01 GB in "*" files, "*" GB/s" ]]
	run "$convert" --verify "$dir/repacked" --quiet
	[ "$status" -eq 0 ]
	run "$convert" --unpack "$dir/repacked" "$dir/back" --quiet
	[ "$status" -eq 0 ]
	[ -z "$output" ]
	diff -r "$dir/wide" "$dir/back"
}

@test "inspect says that a checkpoint is repacked" {
	make_wide
	"$convert" --repack "$dir/wide" "$dir/repacked" --quiet
	"$convert" --inspect "$dir/repacked" | grep -q "^layout .* kimi-int4-moe, version 1"
	"$convert" --inspect "$dir/repacked" --json |
		jq -e '.quantization.expert_layout == {"name": "kimi-int4-moe", "version": 1} and .problem_count == 0'
	"$convert" --inspect "$dir/wide" --json | jq -e '.quantization.expert_layout == null'
	[ "$("$convert" --inspect "$dir/repacked" --json | jq .parameters)" = \
		"$("$convert" --inspect "$dir/wide" --json | jq .parameters)" ]
}

@test "a repacked checkpoint is served, with the same answers" {
	make_wide
	"$convert" --repack "$dir/wide" "$dir/repacked" --quiet
	for i in 1 2 3; do
		echo "{\"custom_id\":\"$i\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{\"prompt\":\"n $i\",\"max_tokens\":6,\"temperature\":0,\"logprobs\":1}}"
	done >"$dir/in"
	for d in wide repacked; do
		"$KIMI_BIN/kimi-serve" --model-path "$dir/$d" --batch --quiet --context-length 512 \
			--max-total-tokens 4096 --threads 1 <"$dir/in" |
			jq -S '[.custom_id, .response.body.choices]' >"$dir/$d.out"
	done
	[ -s "$dir/wide.out" ]
	diff "$dir/wide.out" "$dir/repacked.out"
}

@test "a damaged repacked checkpoint: verify names the tensor, unpack leaves nothing" {
	make_wide
	"$convert" --repack "$dir/wide" "$dir/repacked" --quiet
	printf 'xxxxxxxx' | dd of="$dir/repacked/model.safetensors" bs=1 seek=300000 conv=notrunc 2>/dev/null
	run "$convert" --verify "$dir/repacked" --quiet
	[ "$status" -eq 3 ]
	[[ "${lines[0]}" == *"weight_repacked: is damaged: its checksum is "* ]]
	run "$convert" --unpack "$dir/repacked" "$dir/back" --quiet
	[ "$status" -eq 1 ]
	[[ "$output" == *"weight_repacked: is damaged: "* ]]
	[ "$(ls -d "$dir"/back* | wc -l)" -eq 0 ]
}

@test "a mount point is refused as an output before anything is written" {
	make_wide
	mkdir "$dir/mount"
	unshare -rm mount -t tmpfs none "$dir/mount" 2>/dev/null || skip "nothing can be mounted here"
	for kind in "-t tmpfs none" "--bind $dir/mount"; do
		run unshare -rm sh -c "mount $kind '$dir/mount' && '$convert' --repack '$dir/wide' '$dir/mount'"
		[ "$status" -eq 1 ]
		[[ "$output" == "kimi-convert: $dir/mount: is a mount point, which "* ]]
	done
	[ "$(ls -d "$dir"/mount* | wc -l)" -eq 1 ]
}

@test "an interrupted repack leaves nothing but the source" {
	jq '.text_config.moe_intermediate_size = 1024 | .text_config.n_routed_experts = 64' \
		configs/models/tiny-k25.json >"$dir/big.json"
	"$convert" --synthesize "$dir/big.json" "$dir/big" --quiet
	"$convert" --repack "$dir/big" "$dir/out" --threads 1 --quiet 2>"$dir/err" &
	pid=$!
	for _ in $(seq 200); do
		ls "$dir"/out.tmp-*/model.safetensors.tmp-* >/dev/null 2>&1 && break
		sleep 0.01
	done
	kill -INT $pid
	status=0
	wait $pid || status=$?
	if [ "$status" -eq 0 ]; then skip "it was done before the signal came"; fi
	[ "$status" -eq 1 ]
	grep -q "out: interrupted; what was written is removed" "$dir/err"
	[ "$(ls -d "$dir"/out* | wc -l)" -eq 0 ]
	"$convert" --verify "$dir/big" --quiet
}

@test "what has no int4 experts, or of another size, is not repacked" {
	make_tiny
	run "$convert" --repack "$dir/tiny" "$dir/out" --quiet
	[ "$status" -eq 1 ]
	[[ "$output" == *"needs an intermediate size that is a multiple of 128, got 64" ]]
	run "$convert" --repack tests/data/checkpoint/fp8 "$dir/out" --quiet
	[ "$status" -eq 1 ]
	[[ "$output" == *"has no int4 experts"* ]]
	[ ! -e "$dir/out" ]
}

@test "the man page has each option of --help" {
	for option in $("$convert" --help | grep -oE -- '--[a-z-]+' | sort -u); do
		grep -qE "^\.(It|Op|Nm|Fl).*Fl ${option#--}( |$)" <(sed 's/Fl Fl /Fl /g' man/kimi-convert.1) ||
			{ echo "$option is not in the man page"; false; }
	done
}

@test "the man page's examples run" {
	examples=$(sed -n '/^\.Sh EXAMPLES/,/^\.Sh SEE/p' man/kimi-convert.1 |
		sed -n '/^\.Bd/,/^\.Ed/p' | grep -v '^\.')
	[ -n "$examples" ]
	mkdir "$dir/work"
	cp -R configs "$dir/work"
	cd "$dir/work"
	PATH="$KIMI_BIN:$PATH" sh -e -c "$examples" >"$dir/out" 2>/dev/null
	grep -qx 32861500928 "$dir/out"
	grep -q ": good: " "$dir/out"
}
