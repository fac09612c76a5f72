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
	for name in test_gpu_router test_serve_cuda bench_gpu_mla bench_gpu_moe kimi-bench-gate; do
		printf '#!/bin/sh\necho "figure: %s $*"\n' "$name" >"programs/$name"
	done
	chmod +x bin/* programs/*
	export GPU_TESTS=$PWD/programs GPU_COMMIT=abc GPU_RESULTS=$PWD/results.md GPU_BENCH=$PWD/bench
}

@test "without a GPU it says so and succeeds" {
	nvidia-smi -L && skip "there is one"
	run "$CHECK"
	[ "$status" -eq 0 ]
	[ "$output" = "skip: there is no GPU" ]
}

@test "every test, its sanitizers, every benchmark" {
	PATH=$PWD/bin:$PATH run "$CHECK"
	[ "$status" -eq 0 ]
	for tool in memcheck racecheck initcheck; do
		grep -q "^| test_gpu_router [a-z]* | $tool | ERROR SUMMARY: 0 errors of $tool" results.md
	done
	grep -q "^| test_serve_cuda short | memcheck" results.md
	[ "$(grep -c "^| test_serve_cuda" results.md)" -eq 2 ]
	grep -q "H100 80GB HBM3, 580.1.*commit abc" results.md
	[ "$(cat bench/router-h100.json)" = "figure: kimi-bench-gate --quiet --json --plot $PWD/bench/router-h100.svg" ]
	[ "$(cat bench/mla-h100.txt)" = "figure: bench_gpu_mla " ]
	[ -e bench/moe-h100-tp8.txt ] && [ -e bench/router-h100-no-overlap.json ]
}

@test "a test that fails fails it all, and leaves a benchmark's old results" {
	mkdir -p bench
	echo old >bench/mla-h100.txt
	printf '#!/bin/sh\necho oh no\nexit 3\n' | tee programs/test_gpu_router >programs/bench_gpu_mla
	PATH=$PWD/bin:$PATH run "$CHECK"
	[ "$status" -eq 1 ]
	[[ $output == *"oh no"* ]]
	grep -q "^| test_gpu_router | - | FAILED, exit status 3" results.md
	[ "$(cat bench/mla-h100.txt)" = old ]
	PATH=$PWD/bin:$PATH GPU_ONLY=test_serve_cuda GPU_BENCH=no run "$CHECK"
	[ "$status" -eq 0 ]
}
