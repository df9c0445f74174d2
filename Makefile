# Other places: make test VENV=/tmp/fedsim-env PYTHON=python3.12
VENV ?= .venv
PYTHON ?= python3

# pip runs when pyproject.toml is newer than these; they lie in the environment and go with it.
DEMO := $(VENV)/.fedsim-demo
DEV := $(VENV)/.fedsim-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips in one environment spoil each other, and so do a formatter and a linter: -j changes nothing here.
.NOTPARALLEL:
.PHONY: help demo install test test-slow lint format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO) ## install, then train the quickstart federation
	$(VENV)/bin/fedsim run configs/quickstart.yaml

install: $(DEV) ## install fedsim, editable, with all it takes to develop it

test: lint ## everything a change must pass: lint, types, tests
	$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(DEV) ## the tests that take minutes
	$(VENV)/bin/pytest -m slow

lint: $(DEV) ## ruff and mypy, changing nothing
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(DEV) ## rewrite the code as ruff wants it
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: $(DEV) ## write docs/options.md from the catalogues
	$(VENV)/bin/python -m fedsim.listing docs

clean: ## remove builds and caches; the environment, data/ and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find fedsim strategies tests -name __pycache__ -prune -exec rm -rf {} +

# Editable here too: a copy would displace a developer's editable install.
$(DEMO): pyproject.toml
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fedsim needs Python 3.11 or later: make PYTHON=...")' \
	    && $(PYTHON) -m venv $(VENV); }
	@echo "Installing into $(VENV). The first time takes minutes: PyTorch and its CUDA libraries fill 6 GB."
	$(VENV)/bin/python -m pip install -e '.[digits]'
	@touch $@

$(DEV): pyproject.toml $(DEMO)
	$(VENV)/bin/python -m pip install -e '.[dev]'
	@touch $@
