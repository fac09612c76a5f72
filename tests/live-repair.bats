# curl -N | kimi-parse --sse on a running server whose own parsers are off, as the README has it. The
# prompt comes back first (echo), with markers in it; what the model adds keeps the stream open.

setup() {
	cd "$BATS_TEST_DIRNAME/.."
	dir=$BATS_TEST_TMPDIR
	"$KIMI_BIN/kimi-convert" --synthesize configs/models/tiny-k25.json "$dir/model" --seed 1 --quiet
	"$KIMI_BIN/kimi-serve" --model-path "$dir/model" --port 0 --tool-call-parser none \
		--reasoning-parser none --context-length 40000 --max-total-tokens 65536 --threads 1 \
		>"$dir/url" 2>"$dir/log" 3>&- &
	server=$!
	wait_for "$dir/url" http
	url=$(cat "$dir/url")
	call='<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>'
	call="$call{\\\"at\\\":1}<|tool_call_end|><|tool_calls_section_end|>"
	prompt="<think>hidden</think>Shown.$call"
}

teardown() {
	kill "$server" 2>/dev/null || true
	wait "$server" || true
}

# Until file $1 holds $2, at most 10 s.
wait_for() {
	for _ in $(seq 200); do
		grep -q "$2" "$1" 2>/dev/null && return
		sleep 0.05
	done
	return 1
}

# $1: tokens to generate after the echo, of the letter H alone.
ask() {
	echo "{\"prompt\":\"$prompt\",\"echo\":true,\"stream\":true,\"ignore_eos\":true,
		\"max_tokens\":$1,\"logit_bias\":{\"72\":100}}"
}

repair() {
	status=0
	"$KIMI_BIN/kimi-parse" --sse >"$1" 2>"$1.err" || status=$?
	echo "status $status" >"$1.status"
}

lacks() {
	if grep -E "$2" "$1"; then
		return 1
	fi
}

deltas() {
	sed -n 's/^data: {/{/p' "$1" | jq -s '[.[].choices[0].delta]'
}

@test "a leaking server is repaired" {
	curl -sSN "$url/v1/completions" -d "$(ask 3)" >"$dir/leaks"
	grep -q '<|tool_call_begin|>' "$dir/leaks"
	curl -sSN "$url/v1/completions" -d "$(ask 3)" | "$KIMI_BIN/kimi-parse" --sse >"$dir/out"
	lacks "$dir/out" 'think>|<\|'
	deltas "$dir/out" | jq -e '(map(.reasoning_content // "") | add) == "hidden" and
		(map(.content // "") | add) == "Shown.HHH" and
		([.[].tool_calls[0].function.arguments // ""] | add) == "{\"at\":1}" and
		([.[].tool_calls[0].id // empty]) == ["functions.look:0"]'
	[ "$(tail -n 2 "$dir/out" | head -n 1)" = "data: [DONE]" ]
}

@test "it is repaired while it still speaks, and what was certain survives a cut" {
	curl -sSN "$url/v1/completions" -d "$(ask 30000)" 2>/dev/null 3>&- \
		> >(repair "$dir/out") &
	client=$!
	wait_for "$dir/out" '"content":"H"'
	kill -0 $client
	lacks "$dir/out" DONE
	grep -q 'functions.look:0' "$dir/out"
	kill $client
	wait_for "$dir/out.status" status
	[ "$(cat "$dir/out.status")" = "status 1" ]
	[ -s "$dir/out.err" ]
	deltas "$dir/out" | jq -e '([.[].tool_calls[0].function.arguments // ""] | add) == "{\"at\":1}"'
}
