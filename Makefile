# Commands of the checkout. Each sets up .venv first, which takes minutes once and under a second from then on.
# PYTHON=...      Python 3.11 to 3.13 that .venv is made with
# PIP_EXTRA=...   extra arguments for pip, such as an extra index (README, "Installing")
# JOBS=...        processes that `make test` runs side by side (default: 2)
# PROFILE=...     profile that `make refresh` brings up to date (default: tiny)

PYTHON ?= $(shell test -x .venv/bin/python && echo .venv/bin/python || command -v python3.11 || command -v python3)
PROFILE ?= tiny
JOBS ?= 2
BIN := .venv/bin
export PIP_EXTRA

.PHONY: setup demo quality refresh ui test lint types check clean

setup:  ## create .venv and install, or do nothing where that is done
	@$(PYTHON) install.py

demo: setup  ## the whole DAG on the bundled parent, then the table of results
	@$(BIN)/python -m assets demo --profile tiny

quality: setup  ## the long run: larger search space and budgets, then the ablation; resumable
	@$(BIN)/python -m assets demo --profile quality
	@$(BIN)/python benchmarks/ablation.py

refresh: setup  ## bring everything that is stale up to date
	@$(BIN)/python -m assets refresh --profile $(PROFILE)

ui: setup  ## Dagster's webserver and daemon on 127.0.0.1:3000, over what was materialized
	@$(BIN)/python -m assets ui

test: setup  ## all tests; a file's tests stay in one process, so that what they share is made once
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: setup
	@$(BIN)/ruff check .

types: setup
	@$(BIN)/mypy

check: test lint types  ## what CI runs

clean:  ## remove the virtual environment and caches; results under var/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
