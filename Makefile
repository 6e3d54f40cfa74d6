# A fresh machine needs Python 3.11 or newer, git and make. Every target below sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Pinned here only, for reproducible tests. On Linux PyPI's build brings gigabytes of CUDA libraries; for the CPU build use
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

.PHONY: help setup test lint type bench bench-proof demo mini-world clean
help:
	@echo "make setup | test | lint | type | demo | bench | bench-proof | mini-world | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --group dev --editable ".[onnx]"
	touch $@

# Two processes, each with whole files, so that fixtures of a module are built once. Files run in order of name: in
# xdist's own order, by number of tests, one process ended alone with a few slow files.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

# Time and memory of the embedded pair's training step.
bench: $(STAMP)
	$(BIN)/python -m examples.benchmark.step_time

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# The benchmark in small: four subjects, five methods; two processes of one thread each.
bench-proof: $(STAMP)
	$(BIN)/python -m pip install --quiet --group benchmark
	$(BIN)/python -m examples.benchmark.run --small --processes 2 --results runs/benchmark/proof.json
	$(BIN)/python -m examples.benchmark.report --results runs/benchmark/proof.json --figure runs/benchmark/proof.png

# Every weight of the embedded pair, from seeds: hours on a CPU. A stopped run resumes.
mini-world: $(STAMP)
	$(BIN)/python -m pip install --quiet --group mini-world
	PYTHON=$(BIN)/python bash examples/mini_world/train_all.sh

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
