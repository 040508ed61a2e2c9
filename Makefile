# `make demo`, `make test` and `make docs` do everything on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
PIP := $(BIN)/python -m pip
WORKERS ?= 2

.PHONY: demo test test-studies test-faults fast lint format type check docs benchmark clean

demo: $(STAMP)
	$(BIN)/mpd-gym demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-studies: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal studies/tests

test-faults: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m fault

fast: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP)
	$(BIN)/mypy

check: lint type docs test test-studies

docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	@echo 'Open build/docs/index.html'

benchmark: $(STAMP)
	$(BIN)/python benchmarks/environments.py
	$(BIN)/python benchmarks/windows.py

# Torch goes first and pinned: what depends on it would otherwise pull its newest build.
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt $(wildcard mpd_gym/models/backends/c/*)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $(DOCS_STAMP)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis outputs
