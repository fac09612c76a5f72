# make            builds everything; with CUDA when nvcc 12 or later is there (CUDA=0 leaves it out)
# make demo       installs what is missing, builds for the CPU, serves a small model, shows real answers
# make check      installs what is missing, builds, runs every test that needs no GPU
# make install    PREFIX=/usr/local, DESTDIR=
#
# Variants, each in a build folder of its own: CUDA=0|1, ASAN=1 (address and undefined-behaviour
# sanitizers), CC=clang. V=1 shows the commands. DEPS=0 skips the installation of packages. ARCH=all
# builds for every GPU that the kernels support; the default is this machine's GPU, or sm_90a where
# there is none.

MAKEFLAGS += --no-builtin-rules
Q := $(if $(V),,@)
say = $(if $(V),,@printf '  %-5s %s\n' $1 $@)
.DELETE_ON_ERROR:
.SUFFIXES:

CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
NVCC ?= $(firstword $(wildcard /usr/local/cuda/bin/nvcc) $(shell command -v nvcc 2>/dev/null))
# Older than 12 (Debian's is 11.8), nvcc cannot build for sm_90a.
nvcc_release := $(if $(NVCC),$(shell $(NVCC) --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p'))
nvcc_builds := $(shell [ 0$(nvcc_release) -ge 12 ] && echo 1)
CUDA ?= $(if $(nvcc_builds),1,0)
ifneq ($(NVCC),)
ifneq ($(nvcc_builds),1)
nvcc_says := $(NVCC) is of CUDA $(or $(nvcc_release),unknown), 12 or later is needed
$(if $(filter 1,$(CUDA)),$(error $(nvcc_says)))
$(if $(filter file,$(origin CUDA)),$(warning $(nvcc_says): building without CUDA))
endif
endif
ASAN ?= 0
DEPS ?= 1
ARCH ?=
PREFIX ?= /usr/local
DESTDIR ?=
# The real Kimi vocabulary, for the tests that want it; they say so and skip when it is not there.
TOKENIZER_DIR ?= ../shared/data/tokenizer

variant := $(notdir $(CC))$(if $(filter 1,$(CUDA)),-cuda)$(if $(filter 1,$(ASAN)),-asan)
BUILD ?= build/$(variant)

WARN := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith -Wvla \
        -Wwrite-strings -Wundef -Werror
CFLAGS ?= -O3 -g
ALL_CFLAGS := -std=c17 -D_GNU_SOURCE -Ilibcore -fopenmp -ffp-contract=off -fno-strict-aliasing \
              -MMD -MP $(WARN) $(CFLAGS)
LDLIBS := -ljansson -lmicrohttpd -lpcre2-8 -lm -lpthread
ALL_LDFLAGS := -fopenmp $(LDFLAGS)

ifeq ($(ASAN),1)
ALL_CFLAGS += -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
ALL_LDFLAGS += -fsanitize=address,undefined
endif

# Files named *_avx2.c and *_avx512.c hold code for those machines; they are entered at run time only
# where the processor has the instructions.
ISA_avx2 := -mavx2 -mfma -mf16c -mbmi2
ISA_avx512 := $(ISA_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq
isa = $(ISA_$(lastword $(subst _, ,$(basename $(notdir $1)))))

core_src := $(filter-out libcore/device/cuda%,$(sort $(wildcard libcore/*/*.c)))
core_obj := $(core_src:%.c=$(BUILD)/%.o)

ifeq ($(CUDA),1)
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
gpu_arch := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
arch_list := $(if $(filter all,$(ARCH)),80 89 90a 100,$(if $(ARCH),$(ARCH),$(if $(gpu_arch),$(if $(filter 90,$(gpu_arch)),90a,$(gpu_arch)),90a)))
gencode := $(foreach a,$(arch_list),-gencode arch=compute_$(a),code=sm_$(a))
NVCCFLAGS := -std=c++17 -O3 -lineinfo $(gencode) -Ikernels -Ilibcore -Xptxas=-v,--warn-on-spills \
             -Xcompiler -Wall,-Wextra,-fno-exceptions,-fno-threadsafe-statics
ALL_CFLAGS += -DKM_CUDA=1 -isystem $(CUDA_HOME)/include -Ikernels
cuda_src := $(sort $(wildcard libcore/device/cuda*.c))
kernel_src := $(sort $(wildcard kernels/*.cu))
core_obj += $(cuda_src:%.c=$(BUILD)/%.o) $(kernel_src:%.cu=$(BUILD)/%.o)
ifneq ($(kernel_src),)
LDLIBS += -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt
endif
else
ALL_CFLAGS += -DKM_CUDA=0
endif

tools := $(patsubst tools/%.c,%,$(sort $(wildcard tools/*.c)))
tool_bin := $(tools:%=$(BUILD)/bin/%)
tests := $(patsubst tests/%.c,%,$(sort $(wildcard tests/test_*.c)))
test_bin := $(tests:%=$(BUILD)/tests/%)
support_obj := $(patsubst %.c,$(BUILD)/%.o,$(sort $(wildcard tests/support/*.c)))
benches := $(patsubst tests/%.c,$(BUILD)/tests/%,$(sort $(wildcard tests/bench_*.c)))
gpu_tests := $(if $(filter 1,$(CUDA)),$(patsubst tests/%.c,$(BUILD)/tests/%,$(sort $(wildcard tests/gpu/test_*.c tests/gpu/bench_*.c))))
fuzzers := $(patsubst tests/fuzz/%.c,%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))

.PHONY: all tests bench gpu-tests demo check install deps clean lint fuzz list-tests list-fuzzers
all: $(tool_bin)
tests: $(test_bin)
bench: $(benches)
gpu-tests: $(gpu_tests)

deps:
	@DEPS=$(DEPS) scripts/install-deps

# The tools are built by a second make, which sees the packages that were installed.
demo:
	@DEPS=$(DEPS) scripts/install-deps demo
	@$(MAKE) --no-print-directory -j$(shell nproc) CUDA=0 all
	@scripts/demo build/$(notdir $(CC))$(if $(filter 1,$(ASAN)),-asan)/bin

check: deps
	@TOKENIZER_DIR=$(abspath $(TOKENIZER_DIR)) scripts/check

install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 755 $(tool_bin) $(DESTDIR)$(PREFIX)/bin
	install -m 644 $(wildcard man/*.1) $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/kimi
	cp -R configs $(DESTDIR)$(PREFIX)/share/kimi/

# For the scripts: what there is to run.
list-tests:
	@echo $(test_bin) $(wildcard tests/*.bats)
list-fuzzers:
	@echo $(fuzz_bin)

lint:
	scripts/check-layers
	mandoc -T lint -W warning $(wildcard man/*.1)

clean:
	rm -rf build

$(BUILD)/libcore.a: $(core_obj)
	@rm -f $@
	$(call say,AR)
	$(Q)ar rcs $@ $^

$(BUILD)/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC)
	$(Q)$(CC) $(ALL_CFLAGS) $(call isa,$<) $(if $(filter tests/%,$<),-Itests) -c $< -o $@

$(BUILD)/kernels/%.o: kernels/%.cu $(wildcard kernels/*.cuh kernels/*.h) Makefile
	@mkdir -p $(@D)
	$(call say,NVCC)
	$(Q)scripts/nvcc-no-spills $(NVCC) $(NVCCFLAGS) -c $< -o $@

# The commit that a benchmark's results name; rewritten only when it changes.
commit := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
.PHONY: force
$(BUILD)/commit.h: force
	@mkdir -p $(@D)
	@echo '#define KM_COMMIT "$(commit)"' | cmp -s - $@ || echo '#define KM_COMMIT "$(commit)"' >$@
$(BUILD)/tools/kimi-bench-gate.o $(BUILD)/tools/kimi-serve.o: $(BUILD)/commit.h
$(BUILD)/tools/kimi-bench-gate.o $(BUILD)/tools/kimi-serve.o: ALL_CFLAGS += -I$(BUILD)

$(BUILD)/bin/%: $(BUILD)/tools/%.o $(BUILD)/libcore.a
	@mkdir -p $(@D)
	$(call say,LINK)
	$(Q)$(CC) $(ALL_LDFLAGS) $^ $(LDLIBS) -o $@

# An archive, so that a test takes what it uses: one that brings an engine of its own must not be given
# another by a helper that it has no use for.
$(BUILD)/libsupport.a: $(support_obj)
	@rm -f $@
	$(call say,AR)
	$(Q)ar rcs $@ $^

$(BUILD)/tests/test_%: $(BUILD)/tests/test_%.o $(BUILD)/libsupport.a $(BUILD)/libcore.a
	$(call say,LINK)
	$(Q)$(CC) $(ALL_LDFLAGS) $^ -lcmocka $(LDLIBS) -o $@

$(BUILD)/tests/gpu/%: $(BUILD)/tests/gpu/%.o $(BUILD)/libsupport.a $(BUILD)/libcore.a
	$(call say,LINK)
	$(Q)$(CC) $(ALL_LDFLAGS) $^ -lcmocka $(LDLIBS) -o $@

$(BUILD)/tests/bench_%: $(BUILD)/tests/bench_%.o $(BUILD)/libsupport.a $(BUILD)/libcore.a
	$(call say,LINK)
	$(Q)$(CC) $(ALL_LDFLAGS) $^ -lcmocka $(LDLIBS) -o $@

# Fuzzers: clang's libFuzzer over the whole library, instrumented. `make fuzz` builds them all.
fuzz_build := build/fuzz
fuzz_flags := -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -O1 -g
fuzz_bin := $(fuzzers:%=$(fuzz_build)/%)
fuzz:
	@$(MAKE) --no-print-directory CC=clang CUDA=0 BUILD=$(fuzz_build) CFLAGS="$(fuzz_flags)" $(fuzz_bin)

$(fuzz_build)/fuzz_%: $(fuzz_build)/tests/fuzz/fuzz_%.o $(fuzz_build)/libcore.a
	$(call say,LINK)
	$(Q)clang -fsanitize=fuzzer,address,undefined -fopenmp $^ $(LDLIBS) -o $@

-include $(shell find build -name '*.d' 2>/dev/null)

.SECONDARY:
