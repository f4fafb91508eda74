# SPDX-License-Identifier: Apache-2.0
# Every command of the project; `make help` lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ONLY   ?=
ROUNDS ?=
FULL   ?=
SEED   ?=

.DEFAULT_GOAL := help
.PHONY: help setup test demo bench bench-policies torture check lint types format lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with .venv/bin/optpoline in it

$(STAMP): requirements.lock pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash tools/setup.sh
	@touch $@

test: setup ## Run the unit tests and the live tests
	$(BIN)/python -m pytest -n 2 --dist worksteal src tests/unit tests/emulate
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/live

demo: setup ## Build Lua twice; show plain, retpoline and promoted live side by side
	$(BIN)/python -m bench.demo

bench: setup ## Measure every workload into build/bench.json (ONLY=lua,redis ROUNDS=7)
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY)) $(if $(ROUNDS),--rounds $(ROUNDS))

bench-policies: setup ## Compare the policies on traces of real programs, recorded now
	$(BIN)/python -m bench.policies

torture: setup ## Show that a target does not notice (FULL=1 ONLY=calls,kills SEED=7)
	$(BIN)/python -m torture $(if $(FULL),--full) $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

check: lint types ## Lint and type-check

lint: setup ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Check types
	$(BIN)/mypy

format: setup ## Format the code, fix what can be fixed
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lock: setup ## Write requirements.lock anew from pyproject.toml
	@bash tools/lock.sh "$(BIN)/python"

clean: ## Remove everything that was built, .venv too
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)
	find src bench tests torture -name __pycache__ -type d -prune -exec rm -rf {} +
