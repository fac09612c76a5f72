#!/usr/bin/env bats
# kimi-bench-gate as its users run it, without a GPU: the CPU's forms, output forms, the regression gate.

bats_require_minimum_version 1.5.0

setup() {
	PATH="$KIMI_BIN:$PATH"
	MAN="$BATS_TEST_DIRNAME/../man/kimi-bench-gate.1"
	cd "$BATS_TEST_TMPDIR" || return 1
	SMALL="--experts 16 --top-k 2 --hidden 64 --tokens 1,3 --quiet"
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
	kimi-bench-gate --help | grep -oE '^ +--[a-z0-9-]+' | tr -d ' ' | grep -vE -- '--(help|version)$' |
		sort >help
	grep -oE '^\.It Fl -[a-z-]+' "$MAN" | sed 's/.It Fl /-/' | sort >man
	diff help man
}

@test "a table, with a sentence saying that the CPU is timed" {
	run --separate-stderr kimi-bench-gate $SMALL
	[ "$status" -eq 0 ]
	[[ $output == *"CPU ("* && $output == *"16 experts, top 2, hidden 64"* && $output == *"chain"* ]]
	[[ $stderr == *"timing the CPU's forms"* && $output == *"roofline: not known: a CPU's"* ]] || nvidia-smi -L
}

@test "JSON has the documented members, and times above zero" {
	kimi-bench-gate $SMALL --json >out.json 2>/dev/null
	jq -e 'has("device") and has("toolkit") and has("commit") and .shape.experts == 16 and
		has("roofline_gbps") and has("roofline_tflops") and (.roofline_source | length > 0)' out.json
	jq -e '[.rows[] | select(.us_median > 0 and .us_p95 >= .us_median)] | length == (6)' out.json ||
		nvidia-smi -L
	jq -e '.rows[0] | has("tokens") and has("form") and has("launch_us_median") and has("gbps") and
		has("roofline") and has("baseline") and has("baseline_ratio")' out.json
}

@test "CSV has a line for each row" {
	kimi-bench-gate $SMALL --csv 2>/dev/null >out.csv
	[ "$(head -n 1 out.csv)" = "tokens,form,us_median,us_p95,launch_us_median,gbps,roofline,baseline,baseline_ratio" ]
	[ "$(awk -F, 'NF != 9' out.csv | wc -l)" -eq 0 ]
	[ "$(wc -l <out.csv)" -ge 7 ]
}

@test "a drawing is a well-formed SVG" {
	kimi-bench-gate $SMALL --plot out.svg >/dev/null 2>&1
	[ "$(grep -c '<polyline' out.svg)" -ge 3 ]
	[ "$(grep -o '<text' out.svg | wc -l)" -eq "$(grep -o '</text>' out.svg | wc -l)" ]
	grep -q '^</svg>$' out.svg
}

@test "slower than the baseline by more than allowed: exit 3, with the rows named" {
	kimi-bench-gate $SMALL --json >base.json 2>/dev/null
	jq '.rows |= map(.us_median = 0.000001)' base.json >fast.json
	jq '.rows |= map(.us_median = 1000000)' base.json >slow.json
	run --separate-stderr kimi-bench-gate $SMALL --baseline fast.json --max-regression 3%
	[ "$status" -eq 3 ]
	[[ $stderr == *"gate at 1 tokens: "*" us, the baseline has 0.00"* ]]
	run kimi-bench-gate $SMALL --baseline slow.json --max-regression 3%
	[ "$status" -eq 0 ]
}

@test "what the baseline does not have is named, and passes" {
	kimi-bench-gate $SMALL --json >base.json 2>/dev/null
	jq '.rows |= map(select(.form == "chain") | .us_median = 1000000)' base.json >part.json
	run --separate-stderr kimi-bench-gate $SMALL --baseline part.json --max-regression 3%
	[ "$status" -eq 0 ]
	[[ $stderr == *"gate at 3 tokens: the baseline does not have it"* && $stderr != *"chain at"* ]]
}

@test "a bad baseline or plot is known before anything is timed" {
	for bad in "--plot /nonexistent/x.svg" "--plot /" "--baseline /nonexistent"; do
		run --separate-stderr timeout 5 kimi-bench-gate --tokens 20000,40000 $bad
		[ "$status" -eq 1 ] || { echo "$bad: $status"; return 1; }
		[[ $stderr == *"${bad#* }"* && -z $output ]]
	done
}

@test "a plot to a pipe is written to it" {
	mkfifo pipe
	cat pipe >got.svg &
	kimi-bench-gate $SMALL --plot pipe >/dev/null 2>&1
	wait
	[ -p pipe ]
	grep -q '^</svg>$' got.svg
}

@test "a baseline of another shape or device is refused" {
	kimi-bench-gate $SMALL --json >base.json 2>/dev/null
	run --separate-stderr kimi-bench-gate $SMALL --top-k 3 --baseline base.json
	[ "$status" -eq 1 ]
	[[ $stderr == *"its shape is"* ]]
	jq '.device = "abacus"' base.json >other.json
	run --separate-stderr kimi-bench-gate $SMALL --baseline other.json
	[ "$status" -eq 1 ]
	[[ $stderr == *'its device is "abacus"'* ]]
}

@test "the shape of a model's config" {
	run kimi-bench-gate --explain --model "$BATS_TEST_DIRNAME/fuzz/seeds/config/tiny-k2.json" --tokens 1
	[ "$status" -eq 0 ]
	[[ $output == *"router: 1 tokens, 16 experts, hidden 256, top_k 4, sigmoid"* ]]
	run --separate-stderr kimi-bench-gate --explain --model /nonexistent
	[ "$status" -eq 1 ]
	[[ $stderr == *"/nonexistent"* ]]
}

@test "a shape that cannot be is refused before anything is timed" {
	run --separate-stderr kimi-bench-gate $SMALL --groups 7
	[ "$status" -eq 1 ]
	[[ $stderr == *"groups: up to 32 that divide the 16 experts"* ]]
	nvidia-smi -L && return
	run --separate-stderr kimi-bench-gate $SMALL --weights f32
	[ "$status" -eq 1 ]
	[[ $stderr == *"bf16 weights alone"* ]]
}

@test "wrong usage: exit 2" {
	for bad in "--tokens 0" "--tokens 1,x" "--experts 1025" "--max-regression 3%" "--json --csv" \
		"--tune --json" "--tune --experts 256" "--tune --no-overlap" "--explain --csv" "--baseline x --max-regression fast"; do
		run kimi-bench-gate $bad
		[ "$status" -eq 2 ] || { echo "$bad: $status"; return 1; }
	done
}

@test "what cannot be written is an error: exit 1" {
	for what in "--help" "--version" "--explain --tokens 1" "$SMALL"; do
		run --separate-stderr bash -c "kimi-bench-gate $what >/dev/full"
		[ "$status" -eq 1 ] || { echo "$what: $status"; return 1; }
		[[ $stderr == *"kimi-bench-gate: stdout cannot be written: "* ]]
	done
	run --separate-stderr kimi-bench-gate $SMALL --plot /nonexistent/out.svg
	[ "$status" -eq 1 ]
	[[ $stderr == *"/nonexistent/out.svg"* ]]
}

@test "tuning needs a GPU" {
	nvidia-smi -L && skip "there is one"
	run --separate-stderr kimi-bench-gate --tune
	[ "$status" -eq 1 ]
	[[ $stderr == *"tuning needs a GPU"* ]]
}
