# Five commands do everything on a fresh machine with Python 3.11 or later:
#   make demo         sets up, then runs the main job on the embedded faces; leaves demo/preview.png and a table of mIoUs
#   make test         sets up, then runs the tests in two processes
#   make lint         ruff, mypy and a user's script under strict type checkers; the versions are those of requirements/lint.txt
#   make test-oldest  the same tests with the oldest versions that pyproject.toml allows; needs Python 3.11
#   make docs         builds the documentation into site/
# Each environment is a folder of its own, so no command depends on what another one installed.

PYTHON ?= python3
OLDEST_PYTHON ?= python3.11
DEMO_ARGS ?=
TEST_PROCESSES ?= 2

VENV := .venv
LINT := .venv-lint
OLDEST := .venv-oldest
DOCS := .venv-docs
UV_VERSION := 0.13.9
OLDEST_DATE := 2026-11-25
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest --numprocesses $(TEST_PROCESSES)

.PHONY: demo test lint test-oldest docs setup clean

demo: $(VENV)/.installed
	$(VENV)/bin/handsoff-stream demo --out demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/python $(PYTEST)

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(PYTEST)

lint: $(LINT)/.installed
	$(LINT)/bin/ruff check --quiet .
	$(LINT)/bin/ruff format --check --quiet .
	$(LINT)/bin/mypy
	$(LINT)/bin/python -m pytest --quiet --confcutdir tests/typing tests/typing

# Strict: a dead link or a docstring that the reference cannot read is an error. Without --quiet, because mkdocs does not
# count warnings that it does not print.
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) --editable ".[test]"
	touch $@

# Nothing but what the file lists, so torch comes without the CUDA libraries: its type stubs are read, it is never imported.
$(LINT)/.installed: requirements/lint.txt pyproject.toml
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/python $(PIP_INSTALL) --no-deps --requirement requirements/lint.txt
	$(LINT)/bin/python $(PIP_INSTALL) --no-deps --editable .
	touch $@

# Without the package itself: the reference is read from the source text.
$(DOCS)/.installed: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP_INSTALL) --requirement requirements/docs.txt
	touch $@

# pip cannot choose the lowest version that a bound allows; uv can. What those versions need in their turn is as new as on
# OLDEST_DATE, so the result does not change with the day.
$(OLDEST)/.installed: pyproject.toml
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) uv==$(UV_VERSION)
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
	    --exclude-newer $(OLDEST_DATE) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(LINT) $(OLDEST) $(DOCS) demo site .mypy_cache .pytest_cache .ruff_cache .hypothesis
