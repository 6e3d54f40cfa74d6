# A fresh machine needs Python 3.11+, git and make; every word below sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The CPU build is pinned here only: it keeps a laptop or CI from fetching gigabytes of CUDA libraries.
# Where you have a GPU, install with plain pip instead (see README).
TORCH ?= torch==2.13.0

.PHONY: help setup test lint type bench demo clean
help:
	@echo "make setup | test | lint | type | bench | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --group dev --editable ".[onnx]"
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m examples.benchmark.small_pair

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
