# `make demo` and `make test` need only Python 3.11 or later: they create .venv and install everything.

PYTHON ?= python3
# The oldest supported Python; `make test-oldest` uses it.
PYTHON_OLDEST ?= python3.11
# Options of pip that select a build of PyTorch, such as an index with CPU builds.
TORCH_PIP_ARGS ?=
TORCH := 2.13.0
# The oldest PyTorch that the extra `torch` supports; `make test-floor` uses it.
TORCH_FLOOR := 2.4.0

# The libraries whose dequantized weights `make test-quantizers` compares with ours, and their imports.
QUANTIZERS := bitsandbytes==0.50.2 compressed-tensors==0.20.1 torchao==0.18.0 gptqmodel==7.7.0 autoawq==0.2.9 \
	loguru==0.7.3 defuser==0.0.28 device-smi==0.5.7 dill==0.4.1 logbar==0.4.15 pillow==13.0.0 pypcre==0.6.4 \
	threadpoolctl==3.8.0 tokenicer==0.0.14

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := .venv/$(SCRIPTS)
BIN_OLDEST := .venv-oldest/$(SCRIPTS)
BIN_FLOOR := .venv-floor/$(SCRIPTS)
BIN_CI := .venv-ci/$(SCRIPTS)
BIN_ENGINES := .venv-engines/$(SCRIPTS)
BIN_LOCK := .venv-lock/$(SCRIPTS)

# One process of pytest for each core. `pytest` alone runs the same tests in one process.
PYTEST := -m pytest --numprocesses auto --dist worksteal
PIP := -m pip --disable-pip-version-check -qq
PINNED := $(PIP) install --no-deps --require-hashes --requirement
THIS := $(PIP) install --no-deps --no-build-isolation --editable .

.PHONY: help demo test lint format test-oldest test-floor test-ci test-engines test-quantizers bench docs lock clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: .venv/demo.stamp ## Show all commands on a trained adapter
	@bash examples/demo.sh $(BIN)/python

test: lint ## Lint, check types and run the tests; needs no network after the set-up
	$(BIN)/python $(PYTEST)

lint: .venv/test.stamp ## Check style, formatting and types
	$(BIN)/python -m ruff check --quiet --output-format concise .
	$(BIN)/python -m ruff format --quiet --check .
	$(BIN)/python -m mypy --no-error-summary

format: .venv/test.stamp ## Format, and apply the linter's own fixes
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

test-oldest: .venv-oldest/test.stamp ## Run the tests on the oldest supported Python and core dependencies, without torch
	$(BIN_OLDEST)/python $(PYTEST)

test-floor: .venv-floor/test.stamp ## Run the tests with torch on the oldest supported torch and transformers
	$(BIN_FLOOR)/python $(PYTEST) tests/with_torch $(shell grep -l 'importorskip("torch")' tests/test_*.py)

test-quantizers: .venv/quantizers.stamp ## Compare dequantized weights with those of the quantizers' own libraries; downloads these
	HF_HUB_OFFLINE=1 REQUIRE_QUANTIZERS=1 PYTHONPATH=.venv/quantizers $(BIN)/python -m pytest tests/with_torch/test_quantizers.py

# pyproject.toml excludes tests/ci and tests/engines, so that no other run of pytest collects them.
test-ci: .venv-ci/test.stamp ## Run the pre-commit hook, the action and the container file; installs packages
	$(BIN_CI)/python -m pytest --override-ini 'norecursedirs=.*' tests/ci

test-engines: .venv-engines/test.stamp ## Run LoRAs in Diffusers, MLX-LM and llama.cpp on the CPU; installs these
	$(BIN_ENGINES)/python -m pytest --override-ini 'norecursedirs=.*' tests/engines

bench: .venv/test.stamp ## Run the benchmarks
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

docs: .venv/demo.stamp ## Write docs/rules.md from the catalog of rules
	$(BIN)/python -m vera_convert.formats.catalog > docs/rules.md

lock: .venv-lock/lock.stamp ## Update the pinned requirements
	$(BIN_LOCK)/python requirements/lock.py $(TORCH) $(TORCH_FLOOR)

clean: ## Remove everything that make created
	rm -rf .venv .venv-oldest .venv-floor .venv-ci .venv-engines .venv-lock build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find vera_convert tests benchmarks requirements -name __pycache__ -prune -exec rm -rf {} +

# torch is pinned by version only, because its builds differ. Its dependencies are among the pins.
.venv/test.stamp: .venv/demo.stamp requirements/test.txt
	$(BIN)/python $(PINNED) requirements/test.txt
	$(BIN)/python $(PIP) install $(TORCH_PIP_ARGS) torch==$(TORCH)
	@touch $@

# AutoAWQ's set-up imports torch, and so is built without isolation.
.venv/quantizers.stamp: .venv/test.stamp Makefile
	$(BIN)/python $(PIP) install --no-deps --no-build-isolation --upgrade --target .venv/quantizers \
		$(filter autoawq%,$(QUANTIZERS))
	$(BIN)/python $(PIP) install --no-deps --upgrade --target .venv/quantizers $(filter-out autoawq%,$(QUANTIZERS))
	@touch $@

.venv/demo.stamp: requirements/demo.txt pyproject.toml
	$(call create-venv,PYTHON,.venv,>=)
	$(BIN)/python $(PINNED) requirements/demo.txt
	$(BIN)/python $(THIS)
	@touch $@

.venv-oldest/test.stamp: requirements/oldest.txt pyproject.toml
	$(call create-venv,PYTHON_OLDEST,.venv-oldest,==)
	$(BIN_OLDEST)/python $(PINNED) requirements/oldest.txt
	$(BIN_OLDEST)/python $(THIS)
	@touch $@

.venv-floor/test.stamp: requirements/floor.txt pyproject.toml
	$(call create-venv,PYTHON_OLDEST,.venv-floor,==)
	$(BIN_FLOOR)/python $(PINNED) requirements/floor.txt
	$(BIN_FLOOR)/python $(THIS)
	$(BIN_FLOOR)/python $(PIP) install $(TORCH_PIP_ARGS) torch==$(TORCH_FLOOR)
	@touch $@

.venv-ci/test.stamp: requirements/ci.txt pyproject.toml
	$(call create-venv,PYTHON,.venv-ci,>=)
	$(BIN_CI)/python $(PINNED) requirements/ci.txt
	$(BIN_CI)/python $(THIS)
	@touch $@

.venv-engines/test.stamp: requirements/engines.txt pyproject.toml
	$(call create-venv,PYTHON,.venv-engines,>=)
	$(BIN_ENGINES)/python $(PINNED) requirements/engines.txt
	$(BIN_ENGINES)/python $(THIS)
	$(BIN_ENGINES)/python $(PIP) install $(TORCH_PIP_ARGS) torch==$(TORCH)
	@touch $@

.venv-lock/lock.stamp: requirements/lock.txt
	$(call create-venv,PYTHON,.venv-lock,>=)
	$(BIN_LOCK)/python $(PINNED) requirements/lock.txt
	@touch $@

# $(call create-venv,VARIABLE with the name of the interpreter,FOLDER,COMPARISON with Python 3.11)
define create-venv
@$($(1)) -c 'import sys; sys.exit(not sys.version_info[:2] $(3) (3, 11))' 2>/dev/null || { \
	echo "error: '$($(1))' is no Python $(3) 3.11; name one: make $(1)=/path/to/python ..." >&2; exit 1; }
$($(1)) -m venv $(2)
endef
