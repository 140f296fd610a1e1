# Each target makes what it needs: a .venv of this folder, with the versions of constraints.txt. Once it is there and
# neither pyproject.toml nor constraints.txt has changed, nothing is fetched: all targets work without a network.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test check bench clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

help:
	@echo "make demo    train, generate, assemble, check and pack on real cells, into demo/ (minutes on two cores)"
	@echo "make test    all tests"
	@echo "make check   format, lint, types, the floors of imports"
	@echo "make bench   time and memory of the whole path at the real gene list"
	@echo "make clean   remove what the others wrote, but for .venv"

demo: $(BIN)/.run
	$(BIN)/pertcast demo --out demo

# TESTS=tests/train/test_stage.py runs some of them
test: $(BIN)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q $(TESTS)

check: $(BIN)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BIN)/.run
	$(BIN)/python benchmarks/season2025.py --out out/bench

clean:
	rm -rf demo out build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# the package and what it needs to run
$(BIN)/.run: pyproject.toml constraints.txt
	@python=""; \
	for name in python3.13 python3.12 python3.11 python3; do \
	  if command -v $$name > /dev/null && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	    python=$$name; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "pertcast needs Python 3.11 or newer, and found none as python3.13, python3.12, python3.11 or python3;" \
	    "install one and run make again" >&2; \
	  exit 1; \
	fi; \
	if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	  rm -rf .venv; \
	  $$python -m venv .venv || { echo "$$python has no working venv module; on Debian: apt install python3-venv" >&2; exit 1; }; \
	fi
	@echo "installing pertcast and what it needs into .venv (the first time only)"
	@$(PIP) install -qq --upgrade 'pip>=25.1'
	@$(PIP) install -qq --constraint constraints.txt --editable .
	@touch $@

# and what it takes to test it
$(BIN)/.dev: $(BIN)/.run
	@echo "installing what tests need into .venv (the first time only)"
	@$(PIP) install -qq --constraint constraints.txt --editable '.[score]' --group dev
	@touch $@
