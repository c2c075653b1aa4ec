# Needs only python3 (3.11 to 3.13) with venv and pip. `make test` and `make demo` make the virtual
# environment if there is none and install what they need; a second call installs nothing.
#
#   make test      format, lint, types, unit tests      (ARGS='tests/prepare_test.py -k kill')
#   make test-all  these, and what takes minutes: before a release; an hour
#   make mutants   do the tests see deliberate faults? tests/mutants/    (ARGS='--only decoding/')
#   make parity    the same numbers as torch / transformers, live
#   make bench     ours beside torch, transformers and others: docs/benchmarks.md    (ARGS='--only beam')
#   make demo      MovieLens-100K, both phases, a report     (LM=gemma3_270m DEMO=runs/gemma)
#   make smoke     the demo with tiny models and a few steps: does everything work?
#   make lint | format | clean

PYTHON ?= python3
VENV ?= .venv
# From the general index a plain `torch` brings gigabytes of CUDA on some Python versions; this
# release has a small CPU wheel. Another build: make parity TORCH='torch --index-url=...'
TORCH ?= torch==2.13.0
DEMO ?= runs/demo
LM ?= smollm2_135m
SMOKE ?= runs/smoke
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
# A file's tests share what is made and compiled for them.
WORKERS := -n $(JOBS) --dist=loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: test test-all mutants parity bench demo smoke lint format clean
.DEFAULT_GOAL := test

test: lint
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-all: lint parity
	$(BIN)/python -m pytest $(WORKERS) -m 'not parity' $(ARGS)

mutants: $(VENV)/.installed-dev
	$(BIN)/python tests/mutants/run.py --jobs=$(JOBS) $(ARGS)

parity: $(VENV)/.installed-torch
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest $(WORKERS) -m parity $(ARGS)

bench: $(VENV)/.installed-torch
	$(BIN)/python tests/benchmarks/bench.py $(ARGS)

# Each stage that is done is not done again: call it as often as you like.
demo: $(VENV)/.installed
	$(BIN)/ilm demo --output=$(DEMO) --lm=$(LM)

smoke: $(VENV)/.installed-dev
	$(BIN)/python tests/smoke.py $(SMOKE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) $(SMOKE) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(BIN)/pip
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: setup.py | $(BIN)/pip
	$(PIP) --editable '.[dev]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-torch: setup.py | $(VENV)/.installed-dev
	$(PIP) $(TORCH)
	$(PIP) --editable '.[torch]'
	touch $@
