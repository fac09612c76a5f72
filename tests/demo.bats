# scripts/demo, as `make demo` runs it after the build.

setup() {
	cd "$BATS_TEST_DIRNAME/.."
	export TMPDIR=$BATS_TEST_TMPDIR
}

@test "the demo's answers are right, and it leaves nothing behind" {
	run scripts/demo "$KIMI_BIN"
	echo "$output"
	[ "$status" -eq 0 ]
	[ "$(grep -c 'checked: ' <<<"$output")" -eq 3 ]
	grep -q 'answers  17 + 26 = 43\.$' <<<"$output"
	grep -q 'calls    get_weather {"city": "Lisbon"}$' <<<"$output"
	grep -q 'answers  It is windy in Lisbon, 21 degrees\.$' <<<"$output"
	[ -z "$(ls "$TMPDIR")" ]
}

@test "a wrong answer fails the demo" {
	mkdir "$TMPDIR/scripts" "$TMPDIR/left"
	sed 's/What is 17 + 26/What is 17 + 27/' scripts/demo >"$TMPDIR/scripts/demo"
	chmod +x "$TMPDIR/scripts/demo"
	ln -s "$PWD/tests" "$TMPDIR/tests"
	TMPDIR=$TMPDIR/left run "$TMPDIR/scripts/demo" "$KIMI_BIN"
	echo "$output"
	[ "$status" -eq 1 ]
	grep -q 'the answer is wrong' <<<"$output"
	[ -z "$(ls "$TMPDIR/left")" ]
}
