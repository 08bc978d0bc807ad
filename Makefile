# Two commands do everything on a fresh machine with Python 3.11 or later:
#   make demo    sets up, then runs the main job on the embedded faces; leaves demo/preview.png and two mIoU tables
#   make test    sets up, then lints, type-checks and runs the tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=

.PHONY: demo test lint setup clean

demo: $(VENV)/.installed
	$(BIN)/handsoff-stream demo --out demo $(DEMO_ARGS)

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

setup: $(VENV)/.installed

# One environment for both, so that whichever command comes second starts at once.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
