#!/usr/bin/env bats
# kimi-parse as its users run it: the man page's examples, exit codes, bad input, closed pipes.

setup() {
	PATH="$KIMI_BIN:$PATH"
	MAN="$BATS_TEST_DIRNAME/../man/kimi-parse.1"
	cd "$BATS_TEST_TMPDIR" || return 1
}

B='<|tool_call_begin|>'
A='<|tool_call_argument_begin|>'
C='<|tool_call_end|>'
SECTION='<|tool_calls_section_begin|>'
END='<|tool_calls_section_end|>'

# Each example's commands, from "$ " to the next or to the end of its display, with the output below
# them. "cat FILE" shows a file that the example needs: it is made, if a command has not made it.
run_examples() {
	local command= expected= count=0
	check() {
		[ -n "$command" ] || return 0
		local file=${command#cat }
		if [ "$file" != "$command" ] && [ ! -e "$file" ]; then
			printf '%s' "$expected" >"$file"
		else
			count=$((count + 1))
			local got
			got=$(bash -c "$command" 2>/dev/null; echo .)
			if [ "$got" != "$expected." ]; then
				printf 'command: %s\nexpected:\n%s\ngot:\n%s\n' "$command" "$expected" "$got"
				return 1
			fi
		fi
		command= expected=
	}
	while IFS= read -r line; do
		case $line in
		'$ '*) check || return 1; command=${line#\$ } ;;
		'.Bd -literal'*) command= expected= ;;
		.Ed*) check || return 1 ;;
		*) [ -z "$command" ] || expected="$expected$line
" ;;
		esac
	done < <(sed -n '/^\.Sh EXAMPLES/,/^\.Sh CAVEATS/p' "$MAN" | sed 's/\\e/\\/g')
	echo "$count commands"
	[ "$count" -ge 6 ]
}

@test "the man page's examples do what they say" {
	run_examples
}

@test "every option of --help is in the man page, and the other way round" {
	kimi-parse --help | grep -oE '^  --[a-z-]+' | sed 's/^  --//' | sort >help
	grep -oE '^\.It Fl -[a-z-]+' "$MAN" | sed 's/^\.It Fl -//' | sort >man
	[ "$(wc -l <help)" -ge 12 ]
	diff help man
}

@test "usage errors exit with 2 and a sentence" {
	for options in "--nonsense" "--stream --jsonl" "--jsonl --sse" "--tokenizer x" "--sse --engine-finish stop" \
		"--stream --max-bytes 5" "--thinking --reasoning-parser none" "--tool-call-parser hermes" \
		"--history-tool-calls -1" "a b"; do
		run kimi-parse $options </dev/null
		[ "$status" -eq 2 ] || { echo "$options: $status"; return 1; }
		[ -n "$output" ]
	done
}

@test "files that are not there or make no sense exit with 1 and name the file" {
	run kimi-parse no-such-file
	[ "$status" -eq 1 ]
	[[ "$output" == *no-such-file* ]]
	run kimi-parse --tools no-such-tools </dev/null
	[ "$status" -eq 1 ]
	[[ "$output" == *no-such-tools* ]]
	echo '{"x":1}' >tools.json
	run kimi-parse --tools tools.json </dev/null
	[ "$status" -eq 1 ]
	[[ "$output" == *"expected an array of tools"* ]]
	run kimi-parse --jsonl --tokenizer no-such-dir </dev/null
	[ "$status" -eq 1 ]
	run kimi-parse .
	[ "$status" -eq 1 ]
}

@test "nothing in gives an empty message" {
	[ "$(kimi-parse </dev/null)" = '{"content":"","reasoning_content":null,"tool_calls":[],"finish_reason":"stop"}' ]
	[ "$(kimi-parse --stream </dev/null)" = '{"finish_reason":"stop"}' ]
	[ -z "$(kimi-parse --jsonl </dev/null)" ]
}

@test "options reach the parser" {
	printf 'a</think>b' >in
	[ "$(kimi-parse --thinking in | jq -r .reasoning_content)" = a ]
	[ "$(kimi-parse --reasoning-parser none in | jq -r .content)" = 'a</think>b' ]
	printf '%s' "${B}functions.f:0${A}{}${C}" >in
	[ "$(kimi-parse --tool-call-parser none in | jq -r .content)" = "$(cat in)" ]
	[ "$(kimi-parse --history-tool-calls 41 in | jq -r '.tool_calls[0].id')" = functions.f:41 ]
	[ "$(kimi-parse --engine-finish length in | jq -r .finish_reason)" = length ]
	printf '%s' "${B}7${A}{\"q\":1}${C}" >in
	echo '{"tools":[{"type":"function","function":{"name":"find"}}]}' >tools.json
	[ "$(kimi-parse --tools tools.json - <in | jq -r '.tool_calls[0].function.name')" = find ]
	[ "$(jq -Rc '{text:.}' in | kimi-parse --jsonl --tools tools.json | jq -r '.tool_calls[0].id')" = functions.find:0 ]
}

@test "bad lines give errors in their place, the rest is done, status 1" {
	printf '{"text":"a"}\n\nnot json\n{"text":"b"}\n[1]\n{"text":"c"}' >in
	kimi-parse --jsonl in >out 2>err || status=$?
	[ "$status" -eq 1 ]
	[ "$(jq -c '.content // .error.line' out | tr '\n' ' ')" = '"a" 2 3 "b" 5 "c" ' ]
	grep -q '3 lines could not be read' err
}

@test "a byte order mark and CRLF line ends are no text" {
	printf '\357\273\277{"text":"a"}\r\n{"text":"b"}\r\n' | kimi-parse --jsonl >out
	[ "$(jq -r .content out | tr '\n' ' ')" = 'a b ' ]
}

@test "a line past the limit is refused and the next is read" {
	{ printf '{"text":"a"}\n{"text":"'; head -c 3000000 /dev/zero | tr '\0' x; printf '"}\n{"text":"b"}\n'; } >in
	kimi-parse --jsonl --max-bytes 1M in >out 2>err || status=$?
	[ "$status" -eq 1 ]
	[ "$(jq -c '.content // .error.message' out | tr '\n' ' ')" = '"a" "the line is longer than --max-bytes 1048576" "b" ' ]
	kimi-parse --jsonl in >out
	[ "$(wc -l <out)" -eq 3 ]
}

# peak_kb PID: the most memory that it has held so far.
peak_kb() {
	awk '/^VmHWM/ { print $2 }' "/proc/$1/status"
}

# wait_lines FILE N: until the file has so many lines.
wait_lines() {
	for _ in $(seq 600); do
		[ "$(wc -l <"$1")" -ge "$2" ] && return 0
		sleep 0.1
	done
	return 1
}

@test "a gigabyte without a newline is refused in little memory" {
	mkfifo in
	ASAN_OPTIONS=quarantine_size_mb=8:${ASAN_OPTIONS-} kimi-parse --jsonl --max-bytes 16M <in >out 2>err &
	pid=$!
	exec 5>in
	{ head -c 1G /dev/zero | tr '\0' x; printf '\n{"text":"b"}\n'; } >&5
	wait_lines out 2
	peak=$(peak_kb $pid)
	exec 5>&-
	wait $pid || status=$?
	[ "$status" -eq 1 ]
	[ "$(jq -c '.content // .error.message' out | tr '\n' ' ')" = '"the line is longer than --max-bytes 16777216" "b" ' ]
	echo "# figure: a 1 GB line refused with a peak of $peak kB" >&3
	[ "$peak" -lt 300000 ]
}

@test "memory does not grow with the file" {
	mkfifo in
	# A sanitizer keeps what is freed for a while: not 256 MB of it.
	ASAN_OPTIONS=quarantine_size_mb=8:${ASAN_OPTIONS-} kimi-parse --jsonl <in >/dev/null 2>err &
	pid=$!
	exec 5>in
	yes '{"text":"a line of a log, of no great length, with <|tool_call_end|> in it, \u00e9 and all that belongs to it"}' |
		head -n 1000000 >&5
	peak=$(peak_kb "$pid")
	exec 5>&-
	wait
	echo "# figure: 110 MB of lines with a peak of $peak kB" >&3
	[ "$peak" -lt 100000 ]
}

@test "a completion past the limit is refused" {
	head -c 3000000 /dev/zero | tr '\0' x >in
	run kimi-parse --max-bytes 1M in
	[ "$status" -eq 1 ]
	[[ "$output" == *"longer than --max-bytes 1048576"* ]]
	[ "$(kimi-parse in | jq '.content | length')" -eq 3000000 ]
}

@test "ten megabytes of arguments" {
	{ printf '%s' "${SECTION}${B}functions.w:0${A}{\"t\":\""; head -c 10M /dev/zero | tr '\0' x; printf '%s' "\"}${C}${END}"; } >in
	[ "$(kimi-parse in | jq '.tool_calls[0].function.arguments | length')" -eq 10485768 ]
	[ "$(kimi-parse --stream in | jq -s '[.[].tool_calls[0]?.function.arguments // "" | length] | add')" -eq 10485768 ]
	jq -Rc '{text:.}' in >in.jsonl
	[ "$(kimi-parse --jsonl in.jsonl | jq '.tool_calls[0].function.arguments | length')" -eq 10485768 ]
}

@test "deltas joined are the message" {
	printf '%s' "<think>r é</think>c 😀${SECTION}${B}functions.f:0${A}{\"a\": \"ü\"}${C}${END} tail" >in
	kimi-parse in | jq -c '[.content, .reasoning_content, .tool_calls[0].function.arguments]' >whole
	(while IFS= read -r -n1 -d '' c; do printf '%s' "$c"; done <in) | kimi-parse --stream |
		jq -sc '[([.[].content // ""] | add), ([.[].reasoning_content // ""] | add),
			([.[].tool_calls[0]?.function.arguments // ""] | add)]' >joined
	diff whole joined
}

@test "--stream writes a delta while input still arrives" {
	mkfifo in
	kimi-parse --stream <in >out &
	exec 5>in
	printf 'first <|tool' >&5
	for _ in $(seq 50); do
		[ -s out ] && break
		sleep 0.1
	done
	[ "$(cat out)" = '{"content":"first "}' ]
	printf '_no' >&5
	exec 5>&-
	wait
	[ "$(jq -r '.content // empty' out | tr -d '\n')" = 'first <|tool_no' ]
}

@test "--jsonl answers a line before the next comes" {
	mkfifo in
	kimi-parse --jsonl <in >out &
	exec 5>in
	printf '{"text":"a"}\n' >&5
	for _ in $(seq 50); do
		[ -s out ] && break
		sleep 0.1
	done
	[ "$(jq -r .content out)" = a ]
	exec 5>&-
	wait
}

@test "bytes that are not UTF-8 become U+FFFD, and --strict says where" {
	printf 'ab\377cd\300' >in
	[ "$(kimi-parse in | jq -r .content)" = "ab�cd�" ]
	kimi-parse --strict in >out 2>err || status=$?
	[ "$status" -eq 3 ]
	grep -q '2 places that are not UTF-8, the first at byte 2' err
	printf '{"text":"ok"}\n{"text":"x\377"}\n' >in
	kimi-parse --jsonl --strict in >out 2>err || status=$?
	[ "$status" -eq 3 ]
	grep -q 'line 2: 1 places that are not UTF-8, the first at byte 10' err
	[ "$(jq -r .content out | tail -n 1)" = "x�" ]
}

@test "--jsonl takes numbers of any size, and --strict says where NaN was" {
	printf '{"text":"a","id":18446744073709551615}\n{"text":"b","x":NaN,"y":1e999}\n' >in
	kimi-parse --jsonl --strict in >out 2>err || status=$?
	[ "$status" -eq 3 ]
	[ "$(jq -r .content out | tr '\n' ' ')" = 'a b ' ]
	[ "$(cat err)" = 'kimi-parse: line 2: NaN or Infinity is read as null' ]
}

@test "--strict is silent about what is well formed" {
	printf '%s' "<think>a</think>b ${SECTION} ${B}functions.f:0${A}{}${C}
${B}functions.g:1${A}{}${C}${END}" >in
	run kimi-parse --strict in
	[ "$status" -eq 0 ]
	[ "${#lines[@]}" -eq 1 ]
}

@test "--strict names what was repaired or dropped" {
	while IFS='|' read -r sentence text; do
		text=${text//S/$SECTION} text=${text//E/$END} text=${text//B/$B} text=${text//A/$A} text=${text//C/$C}
		printf '%s' "$text" >in
		kimi-parse --strict in >out 2>err || status=$?
		[ "$status" -eq 3 ] || { echo "$text: $status"; return 1; }
		grep -qF "$sentence" err || { echo "$text:"; cat err; return 1; }
	done <<'CASES'
a call's end where none is open: 17 bytes dropped: <|tool_call_end|>|xC
text inside a section, outside its calls: 5 bytes dropped: noise|S noise E
a section has no end marker|SBfunctions.f:0A{}C
a call has no end marker|SBfunctions.f:0A{}E
the input ends in a call's header: 11 bytes dropped: functions.f|SBfunctions.f
the input ends in a call's arguments|SBfunctions.f:0A{
the input ends in a think block|<think>a
a think block has no end marker|<think>aSBfunctions.f:0A{}CE
a call outside of a section|Bfunctions.f:0A{}C
a call has no name|SB7A{}CE
a call's id has no "functions."|SBf:0A{}CE
empty arguments are given as {}|SBfunctions.f:0ACE
a section marker in the singular|<|tool_call_section_begin|>Bfunctions.f:0A{}CE
CASES
}

@test "a closed stdout ends it quietly" {
	for i in $(seq 20000); do echo '{"text":"some text that is long enough to fill a pipe, and more"}'; done >in
	kimi-parse --jsonl in 2>err | head -n 1 >out
	[ ! -s err ]
	[ "$(wc -l <out)" -eq 1 ]
	(trap '' PIPE; kimi-parse --jsonl in 2>>err | head -n 1 >out)
	[ ! -s err ]
	kimi-parse --jsonl in >&- 2>err && return 1
	[ ! -s err ]
}

@test "a full disk is an error" {
	[ -w /dev/full ] || skip "no /dev/full here"
	echo text >in
	run bash -c 'kimi-parse in >/dev/full'
	[ "$status" -eq 1 ]
	[[ "$output" == *"writing the output"* ]]
	for tool in parse serve convert tune bench-gate; do
		for option in --help --version; do
			run bash -c "kimi-$tool $option >/dev/full"
			[ "$status" -eq 1 ]
			[[ "$output" == "kimi-$tool: stdout cannot be written: "* ]] || { echo "$output"; return 1; }
		done
	done
}

chunk() {
	printf 'data: {"id":"1","object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":{"content":%s},"finish_reason":%s}]}\n\n' \
		"$(jq -Rs . <<<"$1" | sed 's/\\n"$/"/')" "${2:-null}"
}

@test "--sse repairs a stream that leaks" {
	{ chunk "<think>hm</think>One${SECTION}"; chunk "${B}functions.f:0${A}{\"x\""; chunk ":1}${C}${END}" '"stop"'
	  printf 'data: [DONE]\n\n'; } >in
	kimi-parse --sse in >out
	[ "$(tail -n 2 out | head -n 1)" = 'data: [DONE]' ]
	grep '^data: {' out | sed 's/^data: //' | jq -sc '[([.[].choices[0].delta.content // ""] | add),
		([.[].choices[0].delta.reasoning_content // ""] | add),
		([.[].choices[0].delta.tool_calls[0]?.function.arguments // ""] | add), .[-1].choices[0].finish_reason]' >got
	[ "$(cat got)" = '["One","hm","{\"x\":1}","tool_calls"]' ]
	[ "$(grep -c '<|' out)" -eq 0 ]
	run kimi-parse --sse --strict in
	[ "$status" -eq 0 ]
}

@test "--sse hands numbers on as they were written; what JSON does not have is null" {
	printf 'data: %s\n\ndata: [DONE]\n\n' '{"seed":18446744073709551615,"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"v":[-1e400,0]},"finish_reason":"stop"}]}' >in
	kimi-parse --sse --strict in >out
	[ "$(grep -c '"seed":18446744073709551615,' out)" -eq "$(grep -c '^data: {' out)" ]
	grep -qF '"logprobs":{"v":[-1e400,0]}' out
	grep -q '"content":"a"' out
	sed 's/-1e400/-Infinity/' in | kimi-parse --sse --strict >out 2>err || status=$?
	[ "$status" -eq 3 ]
	grep -qF '"logprobs":{"v":[null,0]}' out
	grep -q '"content":"a"' out
	grep -q 'NaN or Infinity is given as null' err
}

@test "a choice's index that no integer holds is out of range" {
	printf 'data: {"choices":[{"index":18446744073709551615,"delta":{"content":"a"}}]}\n\n' >in
	run kimi-parse --sse in
	[ "$status" -eq 1 ]
	[[ "$output" == *"index out of range"* ]]
}

@test "--sse writes each delta while the stream still runs" {
	mkfifo in
	kimi-parse --sse <in >out &
	exec 5>in
	chunk "now" >&5
	for _ in $(seq 50); do
		grep -q '"now"' out && break
		sleep 0.1
	done
	grep -q '"now"' out
	{ chunk "" '"stop"'; printf 'data: [DONE]\n\n'; } >&5
	exec 5>&-
	wait
	grep -q DONE out
}

@test "a truncated stream yields what was certain, a sentence and status 1" {
	{ chunk "Sure. ${B}functions.f:0${A}{\"x\": "; chunk "12<|tool_"; printf 'data: {"id":"1","cho'; } >in
	kimi-parse --sse in >out 2>err || status=$?
	[ "$status" -eq 1 ]
	grep -q 'ends without \[DONE\]' err
	grep -q 'Sure. ' out
	[ "$(grep '^data: {' out | sed 's/^data: //' | jq -sr '[.[].choices[0].delta.tool_calls[0]?.function.arguments // ""] | add')" = '{"x": 12' ]
	[ "$(grep -cE 'DONE|finish_reason":"' out)" -eq 0 ]
}

@test "a stream that lost the newlines at its end is whole" {
	{ chunk "whole" '"stop"'; printf 'data: [DONE]'; } >in
	kimi-parse --sse --strict in >out
	[ "$(tail -n 2 out | head -n 1)" = 'data: [DONE]' ]
	[ -z "$(tail -n 1 out)" ]
}

@test "errors in a stream are handed on, status 1" {
	printf 'data: {"error":{"message":"out of memory"}}\n\ndata: [DONE]\n\n' >in
	kimi-parse --sse in >out 2>err || status=$?
	[ "$status" -eq 1 ]
	grep -q 'out of memory' out
	grep -q 'an error of the server' err
}

@test "token ids: look-alikes are text" {
	[ -f "$TOKENIZER_DIR/tiktoken.model" ] || skip "no vocabulary (TOKENIZER_DIR)"
	# The ids are spec'd in the tokenizer's own tests: section, call, "functions.get_weather:0", ...
	echo '{"ids":[163595,163597,41937,1150,21055,2800,25,15,163598,8264,37666,1289,414,4396,39556,16934,163599,163596,163586]}
{"ids":[163606,19180,163607,27,91,20960,21568,11129,91,29]}
{"ids":[99999999]}' >in
	kimi-parse --jsonl --tokenizer "$TOKENIZER_DIR" in >out 2>err || status=$?
	[ "$status" -eq 1 ]
	[ "$(sed -n 1p out | jq -c '.tool_calls[0].function')" = '{"name":"get_weather","arguments":"{\"city\": \"Beijing\"}"}' ]
	[ "$(sed -n 2p out | jq -c '[.reasoning_content, .content]')" = '["Hello","<|tool_call_end|>"]' ]
	grep -q 'no token of this vocabulary' out
	echo '{"ids":[19180,163586,19180,163586]}' >in
	kimi-parse --jsonl --strict --tokenizer "$TOKENIZER_DIR" in >out 2>err || status=$?
	[ "$status" -eq 3 ]
	[ "$(jq -r .content out)" = HelloHello ]
	grep -qF '1 control tokens, the first "ids"[1]' err
}
