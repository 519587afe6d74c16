# Set up, run, check and test. `make help` lists the targets.
PYTHON ?= python3.11
VENV := .venv
WORKERS ?= 2
PY := $(VENV)/bin/python
TORCH := $(shell sed -n 's/^\#   pip install \(torch==.*\)/\1/p' requirements/lock.txt)
# Processes that run tests side by side; make test WORKERS=0 runs one after the other.
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile

.PHONY: help setup run check test test-long bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## make .venv from the pinned requirements

$(VENV)/.ready: requirements/lock.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "1/3: torch"
	$(PY) -m pip install $(TORCH)
	@echo "2/3: $$(grep -c '^[a-z].*==' requirements/lock.txt) pinned packages"
	$(PY) -m pip install --no-deps -r requirements/lock.txt
	@echo "3/3: this package"
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

run: setup ## train the default cell: SmolLM2-135M learns two-digit addition
	$(PY) -m dash_exp

check: setup ## ruff, mypy, and the links and file names in the docs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_docs.py

test: setup ## the tests: about five minutes on two cores
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "not long and not gpu"

test-long: setup ## the longer tests: about twenty-five minutes on two cores
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "long and not gpu"

bench: setup ## measure every row beside its rival or limit, start-up, and memory (an hour and a half)
	$(PY) -m pip install --quiet --no-deps -r requirements/bench.txt
	$(PY) -m benchmarks --json outputs/bench/rows.json
	$(PY) -m benchmarks.default_cell --startup --beta --json outputs/bench/startup.json
	$(PY) -m benchmarks.memory --json outputs/bench/memory.json

clean: ## remove caches, never outputs
	rm -rf .pytest_cache .ruff_cache .mypy_cache build *.egg-info
