# kimi-serve from the command line: options, the plan, batches, a server from start to SIGTERM.

setup_file() {
	cd "$BATS_TEST_DIRNAME/.."
	"$KIMI_BIN/kimi-convert" --synthesize configs/models/tiny-k25.json "$BATS_FILE_TMPDIR/model" \
		--seed 1 --quiet
}

setup() {
	cd "$BATS_TEST_DIRNAME/.."
	serve=$KIMI_BIN/kimi-serve
	model=$BATS_FILE_TMPDIR/model
	dir=$BATS_TEST_TMPDIR
	small="--context-length 2048 --max-total-tokens 16384 --threads 1 --device cpu"
}

teardown() {
	if [ -n "${pid:-}" ]; then
		kill -KILL "$pid" 2>/dev/null || true
	fi
}

# Starts a server with the given options; sets pid and url.
start() {
	"$serve" --model-path "$model" --port 0 $small "$@" >"$dir/url" 2>"$dir/log" 3>&- &
	pid=$!
	for _ in $(seq 200); do
		[ -s "$dir/url" ] && break
		sleep 0.05
	done
	url=$(cat "$dir/url")
	[ -n "$url" ]
}

stop() {
	kill -TERM $pid
	status=0
	wait $pid || status=$?
	pid=
}

@test "the plan is printed, and refused when it does not fit" {
	run "$serve" --model-path "$model" --plan $small
	[ "$status" -eq 0 ]
	[[ "$output" == *"KV cache"*"context length"* ]]
	run "$serve" --model-path configs/models/no-such-model --plan
	[ "$status" -eq 1 ]
	mkdir "$dir/big"
	cp configs/models/kimi-k2.5.json "$dir/big/config.json"
	run "$serve" --model-path "$dir/big" --plan
	[ "$status" -eq 1 ]
	[[ "$output" == *"does not fit"* ]]
	run "$serve" --model-path "$model" --plan --device cpu --max-total-tokens 1000000000
	[ "$status" -eq 1 ]
	[[ "$output" == *"KV cache"*"does not fit"* ]]
}

@test "where to compute: the CPU when asked or when there is no GPU, which is said" {
	small="--context-length 2048 --max-total-tokens 16384 --threads 1"
	run "$serve" --model-path "$model" --explain $small --device cpu
	[ "$status" -eq 0 ]
	[[ "$output" == *"backend: CPU"* && "$output" != *"computing on the CPU"* ]]
	if nvidia-smi -L >/dev/null 2>&1; then
		skip "there is a GPU"
	fi
	run "$serve" --model-path "$model" --explain $small
	[ "$status" -eq 0 ]
	[[ "$output" == *"computing on the CPU: "*"backend: CPU"* ]]
	run "$serve" --model-path "$model" --plan $small --device cuda
	[ "$status" -eq 1 ]
	[[ "$output" == *"--device cuda: "* ]]
}

@test "a table that must be there: for a GPU only" {
	run "$serve" --model-path "$model" --explain --require-tuned --device cpu
	[ "$status" -eq 2 ]
	[[ "$output" == *"--require-tuned goes with a GPU"* ]]
	if nvidia-smi -L >/dev/null 2>&1; then
		skip "there is a GPU"
	fi
	run "$serve" --model-path "$model" --explain --require-tuned
	[ "$status" -eq 1 ]
	[[ "$output" == *"--require-tuned asks for a GPU's table: "* ]]
}

@test "kernel choices are explained" {
	run "$serve" --model-path "$model" --explain $small
	[ "$status" -eq 0 ]
	[[ "$output" == *"backend: CPU"* ]]
}

@test "the command line is checked" {
	for args in "" "--port 1" "--model-path m --port 70000" "--model-path m --batch --plan" \
		"--model-path m --plan --expert-stats x" \
		"--model-path m --batch --max-queued-requests 5" "--model-path m x" "--model-path m --kv-cache-dtype fp8_e5m2" "--model-path m --tp 8 --ep 1"; do
		run "$serve" $args
		[ "$status" -eq 2 ]
		[[ "$output" == kimi-serve:* ]]
	done
}

@test "the log has what --log-level says, the cache is dropped on demand" {
	start --log-level warning --log-requests
	for cached in "== 0" "> 0" "== 0"; do
		curl -sS --fail "$url/v1/completions" -d '{"prompt":"a prompt that is longer than two pages, so that two of them can be found",
			"max_tokens":1}' | jq -e ".usage.prompt_tokens_details.cached_tokens $cached"
		[ "$cached" = "== 0" ] || curl -sS --fail -X POST "$url/flush_cache" | jq -e .success
	done
	stop
	[ "$status" -eq 0 ]
	[ ! -s "$dir/log" ]
}

@test "an empty key is refused: it is an unset variable most often" {
	run timeout 20 "$serve" --model-path "$model" --port 0 --api-key "" $small
	[ "$status" -eq 2 ]
	[[ "$output" == "kimi-serve: --api-key is empty"* ]]
}

@test "what other engines know and this one has not is refused with a sentence" {
	for args in "--quantization fp8" "--speculative-algorithm EAGLE3" "--enable-dp-attention" \
		"--config x.yaml" "--lora-paths x"; do
		run "$serve" --model-path m $args
		[ "$status" -eq 2 ]
		[[ "$output" == "kimi-serve: ${args%% *}: "* ]]
	done
}

@test "a server answers, logs, and ends with status 0 on SIGTERM" {
	start --served-model-name tiny --log-requests
	curl -sS --fail "$url/health" | jq -e '.status == "ok"'
	curl -sS --fail "$url/v1/models" | jq -e '.data[0].id == "tiny"'
	curl -sS --fail "$url/v1/chat/completions" -d '{"model":"tiny","max_tokens":5,"ignore_eos":true,
		"messages":[{"role":"user","content":"Hi"}]}' | jq -e '.usage.completion_tokens == 5'
	curl -sS --fail "$url/v1/completions" -d '{"prompt":"Hi","max_tokens":5,"ignore_eos":true}' |
		jq -e '.choices[0].finish_reason == "length"'
	curl -sSN --fail "$url/v1/chat/completions" -d '{"max_tokens":5,"ignore_eos":true,"stream":true,
		"messages":[{"role":"user","content":"Hi"}]}' | tail -n 2 | grep -qx 'data: \[DONE\]'
	[ "$(curl -s -o /dev/null -w '%{http_code}' "$url/v1/chat/completions" -d '{')" = 400 ]
	curl -sSi -X DELETE "$url/v1/models" | tr -d "\r" | grep -x "Allow: GET"
	stop
	[ "$status" -eq 0 ]
	grep -q "POST /v1/chat/completions 200 .* output 5 .* finish length" "$dir/log"
}

@test "the same request twice says the same, streamed or not" {
	start --deterministic
	body='"max_tokens":30,"ignore_eos":true,"temperature":1,"chat_template_kwargs":{"thinking":false},
		"messages":[{"role":"user","content":"Tell me."}]'
	curl -sS --fail "$url/v1/chat/completions" -d "{$body}" | jq -j '.choices[0].message.content' >"$dir/a"
	curl -sSN --fail "$url/v1/chat/completions" -d "{$body,\"stream\":true}" | grep '^data: {' |
		sed 's/^data: //' | jq -j '.choices[0].delta.content // empty' >"$dir/b"
	[ -s "$dir/a" ]
	cmp "$dir/a" "$dir/b"
	stop
	[ "$status" -eq 0 ]
}

@test "a key is asked for" {
	start --api-key secret
	[ "$(curl -s -o /dev/null -w '%{http_code}' "$url/v1/models")" = 401 ]
	[ "$(curl -s -o /dev/null -w '%{http_code}' "$url/metrics")" = 200 ]
	curl -sS --fail -H "Authorization: Bearer secret" "$url/v1/models" >/dev/null
	stop
}

@test "SIGTERM lets a running stream finish; a second one does not" {
	start
	curl -sSN "$url/v1/completions" -d '{"prompt":"a","max_tokens":1500,"ignore_eos":true,"stream":true}' \
		>"$dir/stream" 3>&- &
	client=$!
	for _ in $(seq 100); do
		[ -s "$dir/stream" ] && break
		sleep 0.02
	done
	stop
	[ "$status" -eq 0 ]
	wait $client
	tail -n 2 "$dir/stream" | grep -qx 'data: \[DONE\]'
	start
	curl -sSN "$url/v1/completions" -d '{"prompt":"a","max_tokens":2000,"ignore_eos":true,"n":8}' \
		>"$dir/whole" 2>/dev/null 3>&- &
	client=$!
	sleep 0.3
	kill -TERM $pid
	sleep 0.2
	stop
	[ "$status" -eq 0 ]
	wait $client || true
}

@test "a port that is taken is a failure" {
	start
	run "$serve" --model-path "$model" --port "${url##*:}" $small
	[ "$status" -eq 1 ]
	[[ "$output" == *"cannot listen on 127.0.0.1 port ${url##*:}"* ]]
	stop
}

line() {
	echo "{\"custom_id\":\"$1\",\"method\":\"POST\",\"url\":\"$2\",\"body\":$3}"
}

@test "a batch answers each line" {
	for i in 1 2 3 4 5; do
		line "c$i" /v1/completions "{\"prompt\":\"number $i\",\"max_tokens\":4,\"ignore_eos\":true}"
	done >"$dir/in"
	line chat /v1/chat/completions '{"messages":[{"role":"user","content":"Hi"}],"max_tokens":3}' >>"$dir/in"
	"$serve" --model-path "$model" --batch --quiet $small <"$dir/in" >"$dir/out"
	[ "$(wc -l <"$dir/out")" -eq 6 ]
	jq -se 'all(.response.status_code == 200 and .error == null)' "$dir/out"
	[ "$(jq -r .custom_id "$dir/out" | sort | tr '\n' ' ')" = "c1 c2 c3 c4 c5 chat " ]
	jq -se '[.[] | select(.custom_id == "c3")][0].response.body.usage.completion_tokens == 4' "$dir/out"
}

@test "a batch line may ask for more prompts than a server's queue holds" {
	prompts=$(seq 120 | jq -sc 'map(tostring)')
	for i in $(seq 12); do
		line "c$i" /v1/completions "{\"prompt\":$prompts,\"max_tokens\":1}"
	done >"$dir/in"
	"$serve" --model-path "$model" --batch --quiet $small <"$dir/in" >"$dir/out"
	jq -se 'length == 12 and all(.response.body.choices | length == 120)' "$dir/out"
}

@test "bad batch lines are answered with errors, the rest is done, the status is 1" {
	{
		line good /v1/completions '{"prompt":"a","max_tokens":2}'
		echo 'not json'
		echo
		line wrong /v1/nothing '{}'
		line refused /v1/completions '{"prompt":"a","best_of":4}'
		printf '%s' "$(line last /v1/completions '{"prompt":"b","max_tokens":2}')"
	} >"$dir/in"
	run sh -c "'$serve' --model-path '$model' --batch $small <'$dir/in' >'$dir/out' 2>'$dir/err'"
	[ "$status" -eq 1 ]
	[ "$(wc -l <"$dir/out")" -eq 5 ]
	jq -se '[.[] | select(.custom_id == null)][0].error.message | startswith("Line 2: ")' "$dir/out"
	jq -se '[.[] | select(.custom_id == "wrong")][0].error.code == "invalid_line"' "$dir/out"
	jq -se '[.[] | select(.custom_id == "refused")][0].response.status_code == 400' "$dir/out"
	jq -se '[.[] | select(.custom_id == "last")][0].response.status_code == 200' "$dir/out"
	grep -q "3 of 5 requests failed" "$dir/err"
	grep -q "answering" "$dir/err"
}

@test "a batch line that is too long is an error wherever it stands, also as the last without an end" {
	long() { head -c 70000 /dev/zero | tr '\\0' x; }
	{
		long
		echo
		line good /v1/completions '{"prompt":"a","max_tokens":2}'
		long
	} >"$dir/in"
	run sh -c "'$serve' --model-path '$model' --batch --quiet --max-body-size 1K $small <'$dir/in' >'$dir/out'"
	[ "$status" -eq 1 ]
	jq -se 'length == 3 and ([.[] | select(.error.message // "" | test("longer than"))] | length == 2)
		and ([.[] | select(.custom_id == "good")][0].response.status_code == 200)' "$dir/out"
	{ # what follows the part that was dropped is of the same line
		head -c 70000 /dev/zero | tr '\0' ' '
		line tail /v1/completions '{"prompt":"a","max_tokens":2}' | tr -d '\n'
	} >"$dir/in"
	run sh -c "'$serve' --model-path '$model' --batch --quiet --max-body-size 1K $small <'$dir/in' >'$dir/out'"
	[ "$status" -eq 1 ]
	jq -se 'length == 1 and (.[0].error.message | test("Line 1: .*longer than"))' "$dir/out"
}

@test "statistics that cannot be written are known before anything is answered" {
	run sh -c "'$serve' --model-path '$model' --batch --quiet --expert-stats /nonexistent/x $small </dev/null"
	[ "$status" -eq 1 ]
	[[ "$output" == *"/nonexistent/x: cannot be created"* ]]
}

@test "a batch from a slow pipe is answered as it comes, and Ctrl-C leaves what is done" {
	mkfifo "$dir/pipe"
	"$serve" --model-path "$model" --batch --quiet $small <"$dir/pipe" >"$dir/out" 2>"$dir/err" 3>&- &
	pid=$!
	exec 9>"$dir/pipe"
	line one /v1/completions '{"prompt":"a","max_tokens":2}' >&9
	for _ in $(seq 200); do
		[ -s "$dir/out" ] && break
		sleep 0.05
	done
	[ "$(jq -r .custom_id "$dir/out")" = one ]
	kill -INT $pid
	status=0
	wait $pid || status=$?
	pid=
	exec 9>&-
	[ "$status" -eq 1 ]
	[ "$(wc -l <"$dir/out")" -eq 1 ]
	grep -q "stopped after 1 answers" "$dir/err"
}

@test "the man page has each option of --help" {
	for option in $("$serve" --help | grep -oE -- '--[a-z0-9-]+' | sort -u); do
		grep -qE "Fl -?${option#--}( |$)" <(sed 's/Fl -/Fl /g' man/kimi-serve.1) ||
			{ echo "$option is not in the man page"; false; }
	done
}

@test "the man page's examples run" {
	cd "$dir"
	ln -s "$model" Kimi-K2.5
	line a /v1/completions '{"prompt":"a","max_tokens":2}' >requests.jsonl
	PATH="$KIMI_BIN:$PATH"
	count=0
	while read -r example; do
		count=$((count + 1))
		case $example in
		*--port*)
			timeout -s TERM 5 sh -c "exec $example" >url 2>/dev/null || [ $? -eq 124 ]
			grep -q '^http://127.0.0.1:' url
			;;
		*) sh -e -c "$example" >printed 2>/dev/null ;;
		esac
	done < <(sed -n 's/^\.Dl //p' "$BATS_TEST_DIRNAME/../man/kimi-serve.1")
	[ "$count" -eq 4 ]
	grep -q '"custom_id":"a"' answers.jsonl
	grep -q '^experts ' printed
}
