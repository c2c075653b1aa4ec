# Needs only python3 (3.11 to 3.13) with venv and pip. `make test` and `make demo` make the virtual
# environment if there is none and install what they need; a second call installs nothing.
#
#   make test      format, lint, types, unit tests      (ARGS='tests/prepare_test.py -k kill')
#   make parity    the same numbers as torch / transformers, live
#   make demo      real data: MovieLens-100K prepared, with statistics and a plot
#   make lint | format | clean

PYTHON ?= python3
VENV ?= .venv
# From the general index a plain `torch` brings gigabytes of CUDA on some Python versions; this
# release has a small CPU wheel. Another build: make parity TORCH='torch --index-url=...'
TORCH ?= torch==2.13.0
DEMO ?= runs/demo
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: test parity demo lint format clean
.DEFAULT_GOAL := test

test: lint
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

parity: $(VENV)/.installed-torch
	$(BIN)/python -m pytest -m parity $(ARGS)

demo: $(VENV)/.installed $(DEMO)/ml100k
	@cat $(DEMO)/ml100k/statistics.txt
	@echo
	@echo "plot: $(DEMO)/ml100k/statistics.png   rankers: $(DEMO)/ml100k/rankers.txt"

# The directory is complete or absent, so that it is its own stamp.
$(DEMO)/ml100k: | $(VENV)/.installed
	$(BIN)/ilm prepare --dataset=ml100k --output=$@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

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
