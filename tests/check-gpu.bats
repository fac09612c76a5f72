#!/usr/bin/env bats
# scripts/check-gpu, with a GPU, a sanitizer and programs that are not real: what is run, and what a failure does.

bats_require_minimum_version 1.5.0

setup() {
	cd "$BATS_TEST_TMPDIR" || return 1
	CHECK="$BATS_TEST_DIRNAME/../scripts/check-gpu"
	mkdir -p bin programs
	cat >bin/nvidia-smi <<-'E'
		#!/bin/sh
		case "$*" in
		*driver_version*) echo "NVIDIA H100 80GB HBM3, 580.1" ;;
		*) echo "NVIDIA H100 80GB HBM3" ;;
		esac
	E
	cat >bin/compute-sanitizer <<-'E'
		#!/bin/sh
		[ "$1" = --version ] && { echo "Version 2025.3"; exit; }
		tool=$2
		shift 4
		"$@" || exit
		echo "========= ERROR SUMMARY: 0 errors of $tool"
	E
	for name in test_gpu_router test_serve_cuda bench_gpu_{roofline,mla,layer} bench_load kimi-bench-gate kimi-serve; do
		printf '#!/bin/sh\necho "figure: %s $*"\n' "$name" >"programs/$name"
	done
	printf '#!/bin/sh\necho "device  NVIDIA H100 80GB HBM3, CUDA 13.0, driver 13.0"\n' >programs/kimi-tune
	cat >programs/bench_gpu_moe <<-'E'
		#!/bin/sh
		echo a table
		args=$*
		while [ "$1" != --json ]; do shift; done
		echo "moe $args" >"$2"
	E
	chmod +x bin/* programs/*
	export GPU_TESTS=$PWD/programs GPU_COMMIT=abc GPU_RESULTS=$PWD/results.md GPU_BENCH=$PWD/bench
}

check() { PATH=$PWD/bin:$PATH run "$CHECK" "$@"; }

@test "without a GPU it says so and succeeds" {
	nvidia-smi -L && skip "there is one"
	run "$CHECK"
	[ "$status" -eq 0 ]
	[ "$output" = "skip: there is no GPU" ]
}

@test "every test, its sanitizers, every benchmark" {
	check
	[ "$status" -eq 0 ]
	for tool in memcheck racecheck initcheck; do
		grep -q "^| test_gpu_router [a-z]* | $tool | ERROR SUMMARY: 0 errors of $tool" results.md
	done
	grep -q "^| test_serve_cuda short | memcheck" results.md
	[ "$(grep -c "^| test_serve_cuda" results.md)" -eq 3 ]
	grep -q "H100 80GB HBM3, 580.1, CUDA 13.0, compute-sanitizer 2025.3, commit abc, " results.md
	[ "$(cat bench/router-h100.json)" = "figure: kimi-bench-gate --quiet --json --plot $PWD/bench/router-h100.svg" ]
	[ "$(cat bench/mla-h100.txt)" = "figure: bench_gpu_mla " ]
	[[ $(cat bench/moe-tp8-h100.json) == "moe --tp 8 --seconds 0.02 --commit abc --json /"* ]]
	grep -q -- "--shard-of 8 --skip-prefill --bench-one-batch 1,1024,33;16,1024,17;64" bench/k2.5-tp8-decode-h100.json
	grep -q "^| kimi-tune --check" results.md
}

@test "what it writes is what configs/bench has of an H100, and README.md says how" {
	check benchmarks
	[ "$status" -eq 0 ]
	cd "$BATS_TEST_DIRNAME/../configs/bench"
	for file in *-h100.json; do
		[ -e "$GPU_BENCH/$file" ] || { echo "$file is not written"; return 1; }
	done
	for file in "$GPU_BENCH"/*; do
		grep -q "^| .*$(basename "$file" | sed 's/-h100.*//')-KIND" README.md || { echo "README.md: $file"; return 1; }
	done
}

@test "parts are run apart, and their lines come together" {
	check sanitizers
	[ "$status" -eq 0 ]
	[ ! -e bench ]
	[ "$(grep -c '^| test_' results.md)" -eq 4 ]
	GPU_ONLY="test_gpu_router moe-tp8" check tests benchmarks
	[ "$status" -eq 0 ]
	[ "$(ls bench)" = moe-tp8-h100.json ]
	[ "$(grep -c '^| [a-z]' results.md)" -eq 7 ]
	[ "$(sed -n 's/^| \([a-z_ ]* | [a-z-]*\) |.*/\1/p' results.md | head -n 3)" = "$(printf '%s\n' \
		'test or benchmark | tool' 'test_gpu_router | -' 'test_gpu_router few | racecheck')" ]
	printf '#!/bin/sh\nexit 3\n' >programs/test_gpu_router
	GPU_ONLY=test_gpu_router check tests
	[ "$status" -eq 1 ]
	[ "$(grep -c '^| test_gpu_router | - ' results.md)" -eq 1 ]
	grep -q '^| test_gpu_router | - | FAILED, exit status 3' results.md
}

@test "lines of another commit, another device or a changed tree do not stay" {
	check sanitizers
	GPU_COMMIT=abcd GPU_ONLY=test_gpu_router check tests
	[ "$(grep -c '^| test_' results.md)" -eq 1 ]
	sed -i 's/H100 80GB HBM3/H200/' bin/nvidia-smi
	GPU_COMMIT=abcd GPU_ONLY=test_serve_cuda check tests
	[ "$(grep -c '^| test_' results.md)" -eq 2 ]
	for name in test_gpu_router test_serve_cuda; do
		GPU_COMMIT=abcd-dirty GPU_ONLY=$name check tests
		[ "$(grep -v soak results.md | grep -c '^| test_')" -eq 1 ]
	done
}

@test "a test that fails fails it all, and leaves a benchmark's old results" {
	mkdir -p bench
	echo old | tee bench/mla-h100.txt bench/moe-tp8-h100.json
	printf '#!/bin/sh\necho oh no\nexit 3\n' | tee programs/test_gpu_router programs/bench_gpu_moe >programs/bench_gpu_mla
	check tests benchmarks
	[ "$status" -eq 1 ]
	[[ $output == *"oh no"* ]]
	grep -q "^| test_gpu_router | - | FAILED, exit status 3" results.md
	[ "$(cat bench/mla-h100.txt bench/moe-tp8-h100.json)" = "$(printf 'old\nold')" ]
	GPU_ONLY=test_serve_cuda check
	[ "$status" -eq 0 ]
}

@test "what skips all of itself, what takes too long and what there is no time for fail it" {
	printf '#!/bin/sh\necho "skip: no jq"\n' | tee programs/test_serve_cuda >programs/bench_gpu_mla
	printf '#!/bin/sh\nsleep 9\n' >programs/test_gpu_router
	GPU_LIMIT=1 GPU_ONLY="test_gpu_router test_serve_cuda mla" check tests benchmarks
	[ "$status" -eq 1 ]
	grep -q "^| test_gpu_router | - | NOT COMPLETED in 1 s" results.md
	grep -q "^| test_serve_cuda | - | NOT RUN: no jq" results.md
	grep -q "^| mla-h100.txt: bench_gpu_mla | - | FAILED" results.md
	[ ! -e bench/mla-h100.txt ]
	printf '#!/bin/sh\necho "========= Error: Race reported"\nsleep 9\n' >programs/test_gpu_router
	GPU_LIMIT=1 GPU_ONLY=test_gpu_router check sanitizers
	grep -q "^| test_gpu_router few | racecheck | NOT COMPLETED in 1 s, errors until then: 1 |" results.md
	GPU_SECONDS=1 check tests
	[ "$status" -eq 1 ]
	grep -q "^| test_gpu_router | - | NOT COMPLETED in 1 s" results.md
	grep -q "^| test_serve_cuda | - | NOT RUN: the 1 s are over" results.md
}

@test "tests that were skipped are counted apart" {
	printf '#!/bin/sh\necho "[  PASSED  ] 7 test(s)."\necho "[  SKIPPED ] 2 test(s), listed below:"\n' >programs/test_gpu_router
	GPU_ONLY=test_gpu_router check tests
	[ "$status" -eq 0 ]
	grep -q "^| test_gpu_router | - | passed: 7 test(s), skipped: 2 |" results.md
}

@test "a part or a name that there is not" {
	check sanitisers
	[ "$status" -eq 2 ]
	GPU_ONLY=test_gpu_rooter check
	[ "$status" -eq 1 ]
	[[ $output == *"nothing called test_gpu_rooter"* ]]
}
