# A fresh machine needs Python 3.11 or newer, git and make. Every target below sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Pinned here only, for reproducible tests.
TORCH ?= torch==2.13.0
# On Linux, pip's default index has torch with CUDA: 2.7 GB to download (2026-11-30). Name PyTorch's CPU index for the
# small build, or set CUDA=1 to want the large one. Setup stops before it downloads CUDA for a machine without a GPU.
TORCH_INDEX ?=
CUDA ?= $(shell command -v nvidia-smi)
PIP := $(BIN)/python -m pip
INSTALL_TORCH := $(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)

.PHONY: help setup test test-browser test-extras-many campaign lint type bench bench-many gpu bench-proof demo mini-world docs release-check clean
help:
	@echo "make setup | test | test-browser | test-extras-many | campaign | lint | type | demo"
	@echo "make bench | bench-many | gpu | bench-proof | mini-world | docs | release-check | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"
ifeq ($(CUDA)$(TORCH_INDEX),)
	@if [ "$$(uname)" = Linux ] && $(INSTALL_TORCH) --dry-run --no-deps --report - | grep -q '"nvidia-'; then \
	  echo "This machine has no NVIDIA GPU, and pip would download 2.7 GB of CUDA libraries."; \
	  echo "Run: make $(or $(MAKECMDGOALS),setup) TORCH_INDEX=URL   with the CPU index of PyTorch, which pytorch.org names."; \
	  echo "Or download CUDA: make $(or $(MAKECMDGOALS),setup) CUDA=1"; exit 1; fi >&2
endif
	$(INSTALL_TORCH)
	$(PIP) install --quiet --group dev --editable ".[onnx]"
	touch $@

# Two processes, each with whole files, so that fixtures of a module are built once. Files run in order of name: in
# xdist's own order, by number of tests, one process ended alone with a few slow files.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Kills at random instants, wrong input and damaged files; another seed gives others.
campaign: $(STAMP)
	$(BIN)/python -m tests.campaign --seed $(or $(SEED),0)

# The page of `echodistill live`, and reports, in an installed Chromium. Gradio wants an older Pillow than the other tests run with.
test-browser: $(STAMP)
	$(PIP) install --quiet --group browser --editable ".[live]"
	$(BIN)/python -m pytest -q -m browser tests/live tests/evaluation

# train-many on Ray, on S3 as a server on this machine plays it, and through submitit. The packages only add to .venv.
# These tests wait for processes of several programs; the limits are for what hangs, and a busy machine is ten times slow.
test-extras-many: export TEST_PATIENCE := 600
test-extras-many: $(STAMP)
	$(PIP) install --quiet --group many --editable ".[ray,s3]"
	$(BIN)/python -m pytest -q -o faulthandler_timeout=900 -m "ray or s3" tests/many
	$(BIN)/python -m pytest -q -k submitit tests/many/test_recipes.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

# Time and memory of the embedded pair's training step.
bench: $(STAMP)
	$(BIN)/python -m examples.benchmark.step_time

# What train-many adds to train, for twelve toy subjects: ten minutes on two cores; with whole runs, hours.
bench-many: $(STAMP)
	$(PIP) install --quiet --editable ".[ray]"
	$(BIN)/python -m examples.benchmark.many --short-runs --results examples/benchmark/many.json

# What a machine with a GPU is wanted for: its tests, time and memory at true size, sampling. Ten minutes at most.
gpu: $(STAMP)
	$(BIN)/python -m examples.benchmark.gpu

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# The benchmark in small: four subjects, five methods; two processes of one thread each.
bench-proof: $(STAMP)
	$(PIP) install --quiet --group benchmark
	$(BIN)/python -m examples.benchmark.run --small --processes 2 --results runs/benchmark/proof.json
	$(BIN)/python -m examples.benchmark.report --results runs/benchmark/proof.json --figure runs/benchmark/proof.png

# Every weight of the embedded pair, from seeds: hours on a CPU. A stopped run resumes.
mini-world: $(STAMP)
	$(PIP) install --quiet --group mini-world
	PYTHON=$(BIN)/python bash examples/mini_world/train_all.sh

# The pages of docs/ as a site, in build/site.
docs: $(STAMP)
	$(PIP) install --quiet --group docs
	$(BIN)/mkdocs build --strict --site-dir build/site

# Wheel and sdist, installed by pip and by uv into fresh environments, and tried there. They use the libraries of .venv;
# with FULL=1 they download all of their own.
release-check: $(STAMP)
	$(PIP) install --quiet --group release
	FULL=$(FULL) bash .ci/release_check.sh $(BIN)/python

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
