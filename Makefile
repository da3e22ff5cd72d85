# Everything a clone needs: `make test`, `make demo`. The first target that runs makes .venv and installs into it.
# Needs Python >= 3.11 with venv, and a package index.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
SMOKE := runs/smoke
DEMO := runs/demo
# Small enough for two cores; leave them out for the full recipe.
DEMO_SETTINGS := profile.tokens=16384 calibrate.tokens=8192 calibrate.score_tokens=10240

.DEFAULT_GOAL := help
.PHONY: help install test lint format types smoke demo bench clean

help:  ## Say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(STAMP)  ## Make .venv and install dynaconv with its development tools

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "dynaconv needs Python 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

test: $(STAMP)  ## Run the test suite
	$(BIN)/python -m pytest

lint: $(STAMP)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Put style and format right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## Check types
	$(BIN)/mypy

smoke: $(STAMP)  ## The whole pipeline on the embedded default, tiny budgets; then both ways to resize
	rm -rf $(SMOKE) $(SMOKE)-larger $(SMOKE)-smaller
	$(BIN)/dynaconv convert --recipe smoke --out $(SMOKE)
	$(BIN)/dynaconv dial-k $(SMOKE) --budget 0.5
	$(BIN)/dynaconv hyperclone $(SMOKE)/05-export --factor 2 --out $(SMOKE)-larger
	$(BIN)/dynaconv subclone $(SMOKE)/05-export ratio=0.5 importance.tokens=4096 --out $(SMOKE)-smaller

demo: $(STAMP)  ## A tiny model with a dial, from nothing, in a few minutes
	@echo "1. Convert the embedded default, a tiny Llama:"
	$(BIN)/dynaconv convert --out $(DEMO) $(DEMO_SETTINGS)
	@echo "2. Choose a point of its dial, a tenth of the bytes of the FFNs:"
	$(BIN)/dynaconv dial-k $(DEMO) --bytes 0.1 --write
	@echo "3. Let it write there, and with a fifteenth:"
	$(BIN)/dynaconv generate $(DEMO) --prompt "def " --max-new-tokens 48
	$(BIN)/dynaconv generate $(DEMO) --prompt "def " --max-new-tokens 48 --dial 0.065

bench: $(STAMP)  ## Measure the CPU kernels; writes JSON
	$(BIN)/python scripts/bench_cpu.py

clean:  ## Remove .venv, caches and what smoke and demo made
	rm -rf $(VENV) $(SMOKE) $(SMOKE)-larger $(SMOKE)-smaller $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dynaconv tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
