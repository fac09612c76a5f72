#!/usr/bin/env bats
# kimi-tune as its users run it, without a GPU: shapes, file names, what would be tried, lookups, refusals.

bats_require_minimum_version 1.5.0

setup() {
	PATH="$KIMI_BIN:$PATH"
	ROOT="$BATS_TEST_DIRNAME/.."
	MAN="$ROOT/man/kimi-tune.1"
	cd "$BATS_TEST_TMPDIR" || return 1
	H100="NVIDIA H100 80GB HBM3"
}

# The tables are those of the test, not the source tree's.
kimi-tune() {
	command kimi-tune --configs configs "$@"
}

# A table of one entry for TP 8, of a tile that exists.
make_table() {
	mkdir -p configs/cuda_13_0
	TABLE="configs/cuda_13_0/E=384,N=128,device_name=NVIDIA_H100_80GB_HBM3,dtype=int4_w4a16.json"
	kimi-tune --dry-run --tp-size 8 --tokens 8 --device "$H100" --json | jq '{"8": (.rows[0].plan +
		{hidden_size: 7168, top_k: 8, group_size: 32, num_experts: 384, us: 50})}' >"$TABLE"
}

file_of() {
	kimi-tune --dry-run --json --tokens 1 --device "$H100" "$@" | jq -r .file
}

@test "the man page's examples give what it shows" {
	awk '/^\$ /{ c = substr($0, 3); getline e; print c "\t" e }' "$MAN" >examples
	[ "$(wc -l <examples)" -eq 2 ]
	while IFS=$'\t' read -r command expected; do
		got=$(bash -c "$command") || true
		[ "$got" = "$expected" ] || { echo "$command: $got"; return 1; }
	done <examples
}

@test "every option of --help is in the man page, and the other way round" {
	kimi-tune --help | grep -oE -- '--[a-z0-9-]+' | grep -vE -- '^--(help|version)$' | sort -u >help
	grep -E '^\.It Fl' "$MAN" | grep -oE 'Fl -[a-z-]+' | sed 's/Fl /-/' | sort -u >man
	# sentences of --help name other options
	sort -u help man | diff - man
	while read -r option; do kimi-tune --help | grep -qE "(^|, | )$option( |,|$)"; done <man
}

@test "files are named by the contract: E and N of a rank, int4 in pairs, spaces as underscores" {
	[ "$(file_of)" = "E=384,N=1024,device_name=NVIDIA_H100_80GB_HBM3,dtype=int4_w4a16.json" ]
	[ "$(file_of --tp-size 8)" = "E=384,N=128,device_name=NVIDIA_H100_80GB_HBM3,dtype=int4_w4a16.json" ]
	[ "$(file_of --tp 8 --ep 8)" = "E=48,N=1024,device_name=NVIDIA_H100_80GB_HBM3,dtype=int4_w4a16.json" ]
	run kimi-tune --dry-run --device "$H100" --tokens 1
	[[ $output == *"file    configs/cuda_13_0/E=384,N=1024,device_name="* ]]
}

@test "shapes are read through text_config, the group from config_groups" {
	run kimi-tune --dry-run --model "$ROOT/configs/models/kimi-k2.5.json" --tp-size 4 --tokens 1,64
	[ "$status" -eq 0 ]
	[[ $output == *"384 of 384 experts, top 8, hidden 7168, intermediate 512 on this rank, int4 in groups of 32"* ]]
	[ "$(file_of --model "$ROOT/configs/models/kimi-k2-thinking.json" --tp-size 4)" = "$(file_of --tp-size 4)" ]
	jq '.text_config.quantization_config.config_groups.group_0.weights.group_size = 64' \
		"$ROOT/configs/models/kimi-k2.5.json" >c64.json
	run kimi-tune --dry-run --model c64.json --tokens 1
	[[ $output == *"int4 in groups of 64"* ]]
	mkdir model
	cp "$ROOT/configs/models/kimi-k2.5.json" model/config.json
	[ "$(file_of --model model)" = "$(file_of)" ]
}

@test "a dry run lists candidates, the plan's own among them, at each token count" {
	kimi-tune --dry-run --tp-size 8 --device "$H100" --json >dry.json
	jq -e '.rows | length == 18' dry.json
	jq -e 'all(.rows[]; (.candidates | length) > 5 and (.plan as $p | any(.candidates[]; . == $p)))' dry.json
	jq -e 'all(.rows[].candidates[]; has("BLOCK_SIZE_M") and has("BLOCK_SIZE_N") and has("BLOCK_SIZE_K") and
		has("GROUP_SIZE_M") and has("num_warps") and has("num_stages"))' dry.json
	[ ! -e configs ]
}

@test "what has no tiles is refused with a sentence" {
	run kimi-tune --dry-run --model "$ROOT/configs/models/kimi-k2-instruct.json"
	[ "$status" -eq 1 ]
	[[ $output == *"kimi-k2-instruct.json: the model's experts are fp8: they run in the general form"* ]]
	run kimi-tune --dry-run --tp-size 8 --ep-size 3
	[ "$status" -eq 1 ]
	[[ $output == "kimi-tune: --ep-size 3 does not divide --tp-size 8" ]]
	run kimi-tune --dry-run --tp-size 32
	[ "$status" -eq 1 ]
	[[ $output == *"a multiple of 128, got 64"* ]]
	run kimi-tune --dry-run --model /nonexistent
	[ "$status" -eq 1 ]
	[[ $output == *"/nonexistent"* ]]
}

@test "explain: the exact entry, the nearest, or what missed" {
	make_table
	run kimi-tune --explain --tp-size 8 --device "$H100" --tokens 8,9,300
	[ "$status" -eq 0 ]
	[[ $output == *"tuning: entry 8 of $TABLE"$'\n'* ]]
	[[ $output == *"tuning: entry 8 of $TABLE, the nearest"* ]]
	[[ $output == *", by a tuning entry"* ]]
	run kimi-tune --explain --tp-size 8 --device "NVIDIA H200" --tokens 8
	[ "$status" -eq 0 ]
	[[ $output == *"the plan's own choice: there is no tuning file configs/cuda_13_0/"*"device_name=NVIDIA_H200"* ]]
	[[ $output == *"device_name is \"NVIDIA_H100_80GB_HBM3\" there, not \"NVIDIA_H200\""* ]]
	run kimi-tune --explain --tp-size 4 --device "$H100" --tokens 8 --require-tuned
	[ "$status" -eq 3 ]
	[[ $output == "kimi-tune: there is no tuning file "*": N is \"128\" there, not \"256\"" ]]
	run kimi-tune --explain --tp-size 8 --device "$H100" --tokens 8 --require-tuned
	[ "$status" -eq 0 ]
}

@test "a table of SGLang or vLLM in our place is refused with the reason" {
	make_table
	echo '{"8": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1,
		"num_warps": 4, "num_stages": 4}}' >"$TABLE"
	run kimi-tune --explain --tp-size 8 --device "$H100" --tokens 8
	[ "$status" -eq 1 ]
	[[ $output == *"is a table of SGLang or vLLM"*"mean nothing to these; kimi-tune makes one that does" ]]
	run kimi-tune --check "$TABLE" --tp-size 8
	[ "$status" -eq 1 ]
	[[ $output == *"is a table of SGLang or vLLM"* ]]
}

@test "broken tables are sentences" {
	make_table
	good=$(cat "$TABLE")
	refuse() {
		run kimi-tune --explain --tp-size 8 --device "$H100" --tokens 8
		[ "$status" -eq 1 ]
		[[ $output == *"$1"* ]] || { echo "$output"; return 1; }
	}
	echo "$good" | head -c 60 >"$TABLE"
	refuse "is not valid JSON"
	echo "$good" | jq '.["8"].num_stages = 1000' >"$TABLE"
	refuse "8.num_stages"
	echo "$good" | jq '.["8"].BLOCK_SIZE_N = "wide"' >"$TABLE"
	refuse "8.BLOCK_SIZE_N"
	echo "$good" | jq '.["8"].BLOCK_SIZE_N = 48' >"$TABLE"
	refuse "entry 8: tuning entry: no kernel has BLOCK_SIZE_M"
	echo "$good" | jq '{"many": .["8"]}' >"$TABLE"
	refuse '"many" is not a token count'
}

@test "the committed tables are good" {
	cd "$ROOT" || return 1
	for table in configs/cuda_*/E=*.json; do
		[ -e "$table" ] || skip "there are none"
		n=$(echo "$table" | sed 's/.*,N=\([0-9]*\),.*/\1/')
		name=$(echo "$table" | sed 's/.*device_name=\([^,]*\),.*/\1/; s/_/ /g')
		run kimi-tune --explain --require-tuned --tp-size $((1024 / n)) --device "$name" --tokens 1,100,8192
		[ "$status" -eq 0 ] || { echo "$table: $output"; return 1; }
		[[ $output == *"tuning: entry 1 of $table"* ]]
	done
}

@test "tables are looked for where the program was built, or installed beside it" {
	run command kimi-tune --dry-run --device "$H100" --tokens 1
	[[ $output == *"file    $(realpath "$ROOT")/configs/cuda_13_0/E=384"* ]]
	mkdir -p usr/bin usr/share/kimi
	cp "$KIMI_BIN/kimi-tune" usr/bin/
	make_table
	cp -R configs usr/share/kimi/
	for root in "$PWD" /; do
		run sh -c "cd $root && '$PWD/usr/bin/kimi-tune' --explain --require-tuned --tp-size 8 --device '$H100' --tokens 8"
		[ "$status" -eq 0 ]
		[[ $output == *"tuning: entry 8 of $PWD/usr/share/kimi/$TABLE" ]]
	done
}

@test "what is installed finds the committed tables" {
	make -s -C "$ROOT" -o all BUILD="$(realpath "$KIMI_BIN/..")" install DESTDIR="$PWD/root" PREFIX=/usr >/dev/null
	cd "$ROOT" || return 1
	for table in configs/cuda_*/E=*.json; do
		[ -e "$table" ] || skip "there are none"
		cmp "$table" "$BATS_TEST_TMPDIR/root/usr/share/kimi/$table"
		n=$(echo "$table" | sed 's/.*,N=\([0-9]*\),.*/\1/')
		name=$(echo "$table" | sed 's/.*device_name=\([^,]*\),.*/\1/; s/_/ /g')
		run "$BATS_TEST_TMPDIR/root/usr/bin/kimi-tune" --explain --require-tuned --tp-size $((1024 / n)) \
			--device "$name" --tokens 1
		[ "$status" -eq 0 ] || { echo "$table: $output"; return 1; }
		[[ $output == *"tuning: entry 1 of $BATS_TEST_TMPDIR/root/usr/share/kimi/$table"* ]]
	done
}

@test "tuning and checking need a GPU and say so" {
	nvidia-smi -L && skip "there is one"
	make_table
	run --separate-stderr kimi-tune --tp-size 8 --output out.json
	[ "$status" -eq 1 ]
	[[ $stderr == "kimi-tune: tuning needs the GPU: "*"; --dry-run says what would be tried" ]]
	[ -z "$output" ]
	[ ! -e out.json ]
	run --separate-stderr kimi-tune --check "$TABLE" --tp-size 8
	[ "$status" -eq 1 ]
	[[ $stderr == *"needs the GPU"* ]]
	run kimi-tune --device "NVIDIA H200"
	[ "$status" -eq 1 ]
}

@test "what is complete is resumed without a GPU" {
	make_table
	run --separate-stderr kimi-tune --resume --tp-size 8 --output "$TABLE" --tokens 8 --device "$H100"
	[ "$status" -eq 0 ]
	[[ $stderr == *"has 1 of the 1 token counts"* ]]
}

@test "wrong usage: exit 2" {
	for bad in "--tokens 0" "--tokens 1,x" "--experts 1025" "--budget 0" "--dry-run --explain" "--allow 3" \
		"--check x --tokens 1" "--check x --resume" "--require-tuned" "--explain --json" \
		"--model x --experts 3" "--dry-run --resume" "extra" "--nope" "--tp-size 0"; do
		run kimi-tune $bad
		[ "$status" -eq 2 ] || { echo "$bad: $status"; return 1; }
	done
	run kimi-tune extra
	[ "$output" = "kimi-tune: unexpected operand 'extra'; see 'kimi-tune --help'" ]
	for name in $'caf\xe9' "$(printf 'é%.0s' {1..140})"; do
		run kimi-tune --dry-run --json --tokens 1 --device "$name"
		[ "$status" -eq 2 ]
	done
}

@test "hidden sizes that no small tile takes have candidates" {
	for hidden in 256 768 1280 6400; do
		run kimi-tune --dry-run --hidden $hidden --tokens 1,16,256
		[ "$status" -eq 0 ] || { echo "$hidden: $status"; return 1; }
	done
}

@test "the command line of SGLang's tuner" {
	run command kimi-tune --dry-run --tokens 1 --model "$ROOT/configs/models/kimi-k2.5.json" --tp-size 8 --dtype int4_w4a16 \
		--tune --disable-shared-experts-fusion --device "$H100"
	[ "$status" -eq 0 ]
	[[ $output == *"E=384,N=128,"* ]]
	for refused in "--seed 1" "--search-space-file x" --per-channel-quant "--dtype fp8_w8a8"; do
		run kimi-tune --dry-run $refused
		[ "$status" -eq 2 ]
		[[ $output == "kimi-tune: "*"${refused%% *}"* ]]
	done
}

@test "stdout that cannot be written is a failure" {
	[ -e /dev/full ] || skip "no /dev/full"
	run sh -c "kimi-tune --dry-run >/dev/full"
	[ "$status" -eq 1 ]
	[[ $output == "kimi-tune: stdout cannot be written"* ]]
}
