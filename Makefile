# `make serve` and `make test` are all a fresh clone needs. The first call builds .venv; a changed pyproject.toml or C++ file rebuilds it.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
CODE := src tests benchmarks scripts
TEXT := $(CODE) docs README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md Makefile pyproject.toml .ci .github
KERNEL_TESTS := tests/ops/test_compiled.py tests/compiled tests/quant tests/engine tests/model tests/adapters/test_named.py tests/test_api.py
# Text in five languages: codespell knows English only.
FOREIGN := src/mixtral/desk,tests/desk,tests/tokenizer,src/mixtral/embedded
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install dev serve chat test test-slow test-long soak test-all test-peers test-levels test-amx sanitize lint format bench reproduce-nano map

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

# Torch comes first and alone, so that nothing that follows chooses another build of it.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mixtral needs Python 3.11 or newer, this is %d.%d; name another with: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0
	@touch $@

NATIVE := $(shell find native -type f)

$(VENV)/.run: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(BIN)/pip install -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(BIN)/pip install -e '.[dev]'
	@touch $@ $(VENV)/.run

install: $(VENV)/.run  ## build .venv with the command `mixtral`

dev: $(VENV)/.dev  ## build .venv with the tools for tests and lint

serve: $(VENV)/.run  ## HTTP server and chat page; HOST=127.0.0.1 PORT=8000
	$(BIN)/mixtral serve --host $(HOST) --port $(PORT) $(ARGS)

chat: $(VENV)/.run  ## chat in the terminal
	$(BIN)/mixtral chat $(ARGS)

test: $(VENV)/.dev  ## the default tests
	$(BIN)/python -m pytest -n 2 -m "not slow and not peers" $(ARGS)

test-slow: $(VENV)/.dev  ## only the tests marked slow
	$(BIN)/python -m pytest -n 2 -m "slow and not long and not peers" $(ARGS)

test-long: $(VENV)/.dev  ## only the tests marked long: random requests for minutes, measured time; on a quiet machine
	$(BIN)/python -m pytest -m long $(ARGS)

soak: $(VENV)/.dev  ## a real server under mixed load for 20 minutes, its engine killed now and then; ARGS='--minutes 60'
	$(BIN)/python scripts/soak.py $(ARGS)

test-all: $(VENV)/.dev  ## the default and the slow tests
	$(BIN)/python -m pytest -n 2 -m "not peers and not long" $(ARGS)

test-peers: $(VENV)/.dev  ## tests against llama.cpp, which is compiled first (10 minutes), and compressed-tensors
	$(BIN)/pip install llama-cpp-python --no-binary llama-cpp-python
	$(BIN)/pip install --no-deps compressed-tensors loguru
	$(BIN)/python -m pytest -m peers $(ARGS)

test-levels: $(VENV)/.dev  ## the tests that run kernels, with each lower instruction set that this processor has
	@set -e; for level in $$($(BIN)/python -c 'from mixtral.ops.native import kernel_levels; print(*kernel_levels()[:-1])'); do \
		echo "== MIXTRAL_ISA=$$level"; \
		MIXTRAL_ISA=$$level $(BIN)/python -m pytest -n 2 -m "not slow and not peers" $(KERNEL_TESTS) $(ARGS); \
	done

test-amx: $(VENV)/.dev  ## kernel tests on emulated AMX, for which everything is compiled once more
	PYTHON=$(BIN)/python ARGS="$(ARGS)" scripts/amx.sh

sanitize: $(VENV)/.dev  ## default kernel tests with the address, undefined and thread sanitizers of GCC; compiles twice
	PYTHON=$(BIN)/python ARGS="$(ARGS)" scripts/sanitize.sh

lint: $(VENV)/.dev  ## style, format, types, spelling
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/codespell --skip '$(FOREIGN)' $(TEXT)

format: $(VENV)/.dev  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(VENV)/.dev  ## run every script in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

reproduce-nano: $(VENV)/.run  ## train examples/nano.toml anew (minutes) and compare its loss with the published one
	$(BIN)/python benchmarks/training/reproduce_nano.py --anew $(ARGS)

map: $(VENV)/.dev  ## write the file map of README.md anew
	$(BIN)/python scripts/filemap.py
