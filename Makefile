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

# The documentation: strict, so a dead link or a docstring that the reference cannot read is an error. The tools are those
# of the extra `docs`; the package itself is not installed, because the reference is read from the source text.
# Without --quiet, because mkdocs does not count warnings that it does not print.
DOCS := .venv-docs

.PHONY: docs clean-docs
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(DOCS)/requirements.txt
	touch $@

clean: clean-docs
clean-docs:
	rm -rf $(DOCS) site
