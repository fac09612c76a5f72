# kimi-nano, the small model in tests/data/nano: what it was trained for, on questions that training never saw.
# Greedy, through kimi-serve --batch. A sanitizer build asks one question in ten.

setup_file() {
	cd "$BATS_TEST_DIRNAME/.."
	every=1
	case $KIMI_BIN in *-asan*) every=10 ;; esac
	export small="--device cpu --context-length 4096 --max-total-tokens 65536 --quiet"
	awk -v n=$every 'NR % n == 0' tests/eval/requests.jsonl >"$BATS_FILE_TMPDIR/requests"
	awk -v n=$every 'NR % n == 0' tests/eval/perplexity.jsonl >"$BATS_FILE_TMPDIR/documents"
	"$KIMI_BIN/kimi-serve" --model-path tests/data/nano --batch --deterministic $small \
		--expert-stats "$BATS_FILE_TMPDIR/experts" \
		<"$BATS_FILE_TMPDIR/requests" >"$BATS_FILE_TMPDIR/answers"
	jq -n --slurpfile expected tests/eval/expected.jsonl --slurpfile requests tests/eval/requests.jsonl \
		-f tests/eval/grade.jq "$BATS_FILE_TMPDIR/answers" >"$BATS_FILE_TMPDIR/grades"
}

setup() {
	cd "$BATS_TEST_DIRNAME/.."
	grades=$BATS_FILE_TMPDIR/grades
	dir=$BATS_TEST_TMPDIR
}

grade() { jq -r "$1" "$grades"; }
figure() { echo "# figure: kimi-nano: $*" >&3; }
holds() { jq -e "$1" "$grades" >/dev/null || { cat "$grades"; return 1; }; }

@test "every question is answered" {
	[ "$(wc -l <"$BATS_FILE_TMPDIR/answers")" -eq "$(wc -l <"$BATS_FILE_TMPDIR/requests")" ]
	jq -se 'all(.response.status_code == 200 and .response.body.choices[0].finish_reason != "length")' \
		"$BATS_FILE_TMPDIR/answers"
}

@test "sums: at least 95% right, with thinking" {
	figure "$(grade '.arithmetic | "sums right \(.right) of \(.asked)"')"
	holds '.arithmetic | .right >= 0.95 * .asked and .asked >= 15'
}

@test "tools: called when one fits, at least 97%; with the right arguments, at least 95%" {
	figure "$(grade '.tool | "tool called \(.called) of \(.asked), arguments valid \(.valid), right \(.right)"')"
	holds '.tool | .called >= 0.97 * .asked and .right >= 0.95 * .asked and .valid >= 0.95 * .asked'
}

@test "tools: not called when none fits or none is needed, at least 97%" {
	figure "$(grade '(.["no-fit"].asked + .["no-need"].asked) as $n | (.["no-fit"].called + .["no-need"].called) as $c |
		"no tool called \($n - $c) of \($n), the answer right \(.["no-fit"].right + .["no-need"].right)"')"
	holds '.["no-fit"].called + .["no-need"].called <= 0.03 * (.["no-fit"].asked + .["no-need"].asked)'
}

@test "a tool's result becomes a sentence, at least 95%" {
	figure "$(grade '.result | "results used \(.right) of \(.asked)"')"
	holds '.result | .right >= 0.95 * .asked'
}

@test "int4 is within 2% of bf16's perplexity" {
	jq -c '{custom_id: "\(input_line_number)", method: "POST", url: "/v1/completions",
		body: {prompt: .ids, echo: true, logprobs: 0, max_tokens: 0}}' "$BATS_FILE_TMPDIR/documents" |
		"$KIMI_BIN/kimi-serve" --model-path tests/data/nano --batch $small --disable-radix-cache >"$dir/scores"
	jq -n --slurpfile docs "$BATS_FILE_TMPDIR/documents" '[inputs | $docs[(.custom_id | tonumber) - 1] as $d |
		.response.body.choices[0].logprobs.token_logprobs as $lp |
		{n: ($d.predicted | length), bf16: $d.bf16, int4: -([$d.predicted[] | $lp[.]] | add)}] |
		(map(.n) | add) as $n | {n: $n, bf16: (map(.bf16) | add / $n | exp), int4: (map(.int4) | add / $n | exp)}' \
		"$dir/scores" >"$dir/perplexity"
	figure "$(jq -r '"perplexity of \(.n) tokens: bf16 \(.bf16), int4 \(.int4)"' "$dir/perplexity")"
	jq -e '.n > 300 and .int4 / .bf16 < 1.02' "$dir/perplexity"
}

# fixed_answers OPTION...: message and log-probabilities of the requests on standard input, by custom_id
fixed_answers() (
	set -o pipefail
	"$KIMI_BIN/kimi-serve" --model-path tests/data/nano --batch --deterministic $small "$@" |
		jq -cs 'sort_by(.custom_id)[] | {custom_id} + (.response.body.choices[0] |
			{message, logprobs: [.logprobs.content[].logprob]})'
)

# fixed.jsonl: made by `fixed_answers` here, on an EPYC Zen 4. All kernels but plain, any number of
# threads, any company and any cut of the prompts give it.
@test "the same tokens and log-probabilities on every machine" {
	jq -c '.body += {logprobs: true}' tests/eval/requests.jsonl | awk 'NR % 90 == 1' >"$dir/requests"
	runs="avx512:1:64:512 avx512:2:5:16 avx512:3:1:100 avx2:1:64:512 avx2:2:5:16 avx2:3:1:100"
	case $KIMI_BIN in *-asan*) runs="avx512:2:5:16" ;; esac
	for run in $runs; do
		IFS=: read -r isa threads running chunk <<<"$run"
		fixed_answers --isa "$isa" --threads "$threads" --max-running-requests "$running" \
			--chunked-prefill-size "$chunk" <"$dir/requests" >"$dir/answers" 2>"$dir/log" || {
			grep "this machine cannot run" "$dir/log"
			echo "# skip: this machine cannot run the $isa kernels" >&3
			continue
		}
		cmp "$dir/answers" tests/data/nano/fixed.jsonl
	done
	[ "$(wc -l <tests/data/nano/fixed.jsonl)" -eq 12 ]
	case $KIMI_BIN in *-asan*) return ;; esac
	head -n 1 "$dir/requests" | fixed_answers --isa portable --threads 2 >"$dir/answers"
	grep -qxF -f "$dir/answers" tests/data/nano/fixed.jsonl
	jq -e '.logprobs | length > 20' "$dir/answers"
}

@test "experts' loads over the evaluation" {
	jq -e '.n_routed_experts == 384 and .num_experts_per_tok == 8 and (.layers | map(.layer)) == [1, 2, 3, 4]
		and all(.layers[]; .counts | length == 384 and (add % 8) == 0)
		and ([.layers[:3][].counts | add] | unique | length) == 1' "$BATS_FILE_TMPDIR/experts"
	jq -r '.layers[] | (.counts | add / length) as $mean | (.counts | sort) as $c |
		"layer \(.layer): \(.counts | add / 8) tokens; load over the mean: largest \($c[-1] / $mean * 100 | round / 100), " +
		"90th of 100 \($c[345] / $mean * 100 | round / 100), 10th \($c[38] / $mean * 100 | round / 100); " +
		"unused \($c | map(select(. == 0)) | length)"' "$BATS_FILE_TMPDIR/experts" |
		while read -r line; do figure "$line"; done
}
