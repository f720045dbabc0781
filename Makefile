# Set-up, tests and the demo; every target brings what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo .venv-uv/bin/uv)
EXTRAS := dali,deepspeed,demo,dev

export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-all test-oldest lint

setup: $(VENV)/.stamp

.venv-uv/bin/uv:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv

$(VENV)/.stamp: pyproject.toml $(filter .venv-uv/%,$(UV))
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python torch "setuptools>=77"
	$(UV) pip install --quiet --python $(BIN)/python --no-build-isolation-package deepspeed -e ".[$(EXTRAS)]"
	touch $@

demo: setup
	OMP_NUM_THREADS= $(BIN)/python launchers/demo.py

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-all: setup
	$(BIN)/python -m pytest

test-oldest:
	$(MAKE) VENV=.venv-oldest .venv-oldest/.oldest
	.venv-oldest/bin/python -m pytest -m "not slow"

.venv-oldest/.oldest: pyproject.toml $(filter .venv-uv/%,$(UV))
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv-oldest
	$(UV) pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct -e ".[demo,dev]"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
