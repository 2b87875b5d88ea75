# Spanloom. `make help` lists the targets.

ARCH      := $(shell uname -m)
BPF_ARCH  := $(if $(filter aarch64,$(ARCH)),arm64,x86)
BPF_OBJ   := agent/kernel/capture.$(ARCH).bpf.o
CHECK_OBJ := agent/kernel/check.$(ARCH).bpf.o
BENCH_OBJ := bench/generator.$(ARCH).bpf.o bench/hooks.$(ARCH).bpf.o
BPF_DEPS  := $(wildcard bpf/*.h)
CLANG     ?= clang
PYTHON    ?= /usr/bin/python3
BIN       := .venv/bin
# The multiarch directory has asm/types.h, which the BPF target does not search by itself.
BPF_FLAGS := -O2 -g -mcpu=v3 -target bpf -D__TARGET_ARCH_$(BPF_ARCH) -Ibpf -I/usr/include/$(ARCH)-linux-gnu \
             -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wpadded -Werror

.PHONY: help setup build demo run check test unit e2e lint format fuzz bench golden docs chart lock image vm kernels real clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready build ## install system packages, make .venv, compile: leaves .venv/bin/spanloom

build: $(BPF_OBJ) $(CHECK_OBJ) ## compile the BPF objects

demo: setup ## trace a small multi-service application and show its traces
	$(BIN)/spanloom demo

run: setup ## trace this host, traces on the console
	$(BIN)/spanloom run

check: setup ## what this kernel and these privileges allow
	$(BIN)/spanloom check

# What does not depend on how the bytes are seen, or tries every backend by itself, runs once.
BACKEND_FREE = $(wildcard tests/e2e/test_kubernetes*.py) $(addprefix tests/e2e/test_,backends.py demo.py drain.py grpc_web.py \
	open.py tls_churn.py tls_libraries.py uprobes.py)

test: setup .venv/.test-ready $(BENCH_OBJ) ## everything: lint, unit and end-to-end tests (root)
	$(MAKE) lint
	$(BIN)/python -m pytest -q
	SPANLOOM_TEST_BACKEND=syscalls $(BIN)/python -m pytest -q tests/e2e $(addprefix --ignore=,$(BACKEND_FREE))

unit: .venv/.test-ready ## the tests that need no root
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadscope tests/unit

e2e: setup .venv/.test-ready $(BENCH_OBJ) ## real programs under real probes (root), with the backend that is chosen by itself
	$(BIN)/python -m pytest -q tests/e2e

lint: .venv/.test-ready ## ruff and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: .venv/.test-ready ## let ruff format the Python files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: .venv/.fuzz-ready ## fuzz every parser and decoder: FUZZ_SECONDS=20 each
	tools/fuzz.sh $(BIN)/python $(or $(FUZZ_SECONDS),20)

bench: setup .venv/.test-ready $(BENCH_OBJ) ## cost on this machine, as a table and as JSON (root)
	$(BIN)/python -m bench

golden: .venv/.test-ready ## rewrite the expected outputs of the replay tests
	$(BIN)/python -m pytest -q tests/unit/test_replay.py tests/chart/test_render.py --golden

docs: .venv/.test-ready ## regenerate the reference pages
	$(BIN)/python -m agent.config_doc > docs/configuration.md
	$(BIN)/python -m agent.metrics > docs/metrics.md
	$(BIN)/python tools/chart.py
	$(BIN)/python tools/kernels.py > docs/kernels.md

chart: .venv/.test-ready ## render and check the Helm chart
	$(BIN)/python -m pytest -q tests/chart

lock: .venv/.ready ## pin the Python packages of the image anew
	$(BIN)/python tools/lock.py

image: ## build the container image with docker or buildah
	tools/image.sh

vm: setup ## load the probes in a stock kernel under QEMU (root): KERNEL=5.10, 6.1, 6.12 or sid, ARGS=--counted
	$(PYTHON) tools/vm.py $(or $(KERNEL),5.10) $(ARGS)

kernels: setup ## boot all kernels of docs/kernels.md in QEMU, and record what Spanloom uses there (root)
	mkdir -p build && $(PYTHON) tools/kernels.py --run > build/kernels.md && mv build/kernels.md docs/kernels.md

real: setup .venv/.test-ready ## the chart and the agent with a real API server and a real Jaeger (root, Go)
	$(PYTHON) tools/real.py $(ARGS)

clean: ## remove everything that was built
	rm -rf .venv build *.egg-info agent/kernel/*.bpf.o agent/kernel/*.so bench/*.bpf.o

.venv/.ready: pyproject.toml setup.py agent/kernel/build_binding.py tools/setup.sh
	tools/setup.sh base $(PYTHON)
	@touch $@

.venv/.test-ready: .venv/.ready pyproject.toml
	tools/setup.sh test $(PYTHON)
	@touch $@

.venv/.fuzz-ready: .venv/.test-ready
	tools/setup.sh fuzz $(PYTHON)
	@touch $@

agent/kernel/%.$(ARCH).bpf.o: bpf/%.bpf.c $(BPF_DEPS) | .venv/.ready
	$(CLANG) $(BPF_FLAGS) -c $< -o $@

bench/%.$(ARCH).bpf.o: bench/%.bpf.c $(BPF_DEPS) | .venv/.ready
	$(CLANG) $(BPF_FLAGS) -c $< -o $@
