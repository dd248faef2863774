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
	threadpoolctl==3.8.0 tokenicer==0.0.14 optimum==2.3.0

# With these alone, vLLM's reader of adapters runs on the CPU; its kernels do not.
VLLM ?=
VLLM_PACKAGES := vllm==0.33.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 \
	apache-tvm-ffi==0.1.15.post2 blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0 cloudpickle==3.1.3 \
	distro==1.9.0 einops==0.8.2 fastapi==0.165.0 frozenlist==1.8.0 httpcore==1.0.9 httpx==0.28.1 \
	jiter==0.19.0 lark==1.3.1 llguidance==1.9.1 msgspec==0.22.0 multidict==7.2.1 openai==3.57.0 \
	opentelemetry-api==1.45.2 opentelemetry-sdk==1.45.2 \
	opentelemetry-semantic-conventions==0.66b2 oss-harmony==0.0.11 partial-json-parser==0.2.1.1.post7 prometheus-client==0.26.0 \
	propcache==0.5.4 py-cpuinfo==9.0.0 pybase64==1.5.1 pyzmq==27.3.0 setproctitle==1.3.8 \
	six==1.17.0 sniffio==1.3.1 starlette==1.10.0 tiktoken==0.14.0 uvloop==0.23.0 xgrammar==0.2.9 \
	yarl==1.25.1

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
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 18

demo: .venv/demo.stamp ## Check, convert, merge and verify a trained adapter
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
	HF_HUB_OFFLINE=1 REQUIRE_QUANTIZERS=1 PYTHONPATH=.venv/quantizers $(BIN)/python -m pytest tests/with_torch/test_quantizers.py tests/with_torch/test_comparing_quantized.py

# pyproject.toml excludes tests/ci and tests/engines, so that no other run of pytest collects them.
test-ci: .venv-ci/test.stamp ## Run the pre-commit hook, the action and the container file; installs packages
	$(BIN_CI)/python -m pytest --override-ini 'norecursedirs=.*' tests/ci

# `make test-engines VLLM=yes` tests vLLM's reader of adapters, too.
test-engines: .venv-engines/test.stamp $(if $(VLLM),.venv-engines/vllm.stamp) ## Run LoRAs in Diffusers, MLX-LM and llama.cpp on the CPU; installs these
	PYTHONPATH=.venv-engines/vllm $(BIN_ENGINES)/python -m pytest --override-ini 'norecursedirs=.*' tests/engines

bench: .venv/test.stamp ## Run the benchmarks
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

docs: .venv/demo.stamp ## Write docs/rules.md from the catalog of rules
	$(BIN)/python tests/support/rulespage.py > docs/rules.md

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

.venv-engines/vllm.stamp: .venv-engines/test.stamp
	$(BIN_ENGINES)/python $(PIP) install --no-deps --upgrade --target .venv-engines/vllm $(VLLM_PACKAGES)
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
