# Two commands for a newcomer; each makes its own virtual environment first.
#   make demo   the whole pipeline on SmolLM2-135M-Instruct, ends with a table and the report's place
#   make test   lint, types, layers and all tests but those that `make test-slow` has
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export GRAPHPRUNE_CACHE ?= $(CURDIR)/.cache

.PHONY: demo test test-slow style types benchmark-types layers format clean

demo: $(STAMP)
	$(BIN)/graphprune run examples/recipes/demo.yaml -o $(RUN)

test: $(STAMP)
	$(MAKE) --jobs 2 --output-sync style types benchmark-types layers
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal -m slow

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The benchmarks call peers that have no types; a cache of their own, as the two run at once.
benchmark-types: $(STAMP)
	$(BIN)/mypy --cache-dir .mypy_cache/benchmarks --allow-untyped-calls --ignore-missing-imports --no-warn-return-any examples/benchmarks

layers: $(STAMP)
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and by exact version, so that nothing else asks for the newest build of it. What is imported is
# compiled then: compiling all of it takes a minute.
$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("graphprune needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
