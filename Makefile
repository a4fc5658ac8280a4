# Needs Python 3.11.4 or newer and make. Every target makes the environment that it needs.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# A stamp says what is installed; it is older than pyproject.toml when that changed. `make demo` is content with what
# `make test` installed, which is more.
TEST_STAMP := $(VENV)/.installed-test
DEMO_STAMP := $(if $(wildcard $(TEST_STAMP)),$(TEST_STAMP),$(VENV)/.installed-demo)

export PYTHONUNBUFFERED := 1
# Tests never ask the Hub for anything.
OFFLINE := HF_HUB_OFFLINE=1 PYRIGHT_PYTHON_IGNORE_WARNINGS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-browser test-ray check test-lowest wheel clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO_STAMP) ## Fine-tune and evaluate a small model on real data; figures and numbers go to runs/quickstart.
	$(BIN)/python recipes/quickstart.py --output runs/quickstart --overwrite

test: check ## Lint, types, and every test that is not marked slow.
	$(OFFLINE) $(BIN)/python -m pytest -m "not slow" --durations=15

test-all: check ## Lint, types, and every test.
	$(OFFLINE) $(BIN)/python -m pytest --durations=30

# CHROMIUM=/path/to/chromium names a browser; without one on the path, playwright fetches its own.
test-browser: $(VENV)/.installed-browser ## A study's report in headless Chromium, at the width of a phone and of a desk.
	@[ -n "$$CHROMIUM" ] || which chromium-headless-shell chromium chromium-browser google-chrome 2>/dev/null | grep -q . || \
	  $(BIN)/playwright install chromium-headless-shell || \
	  { echo "Expected Chromium: install it, e.g. apt-get install chromium, or say make test-browser CHROMIUM=PATH" >&2; \
	    exit 1; }
	$(OFFLINE) $(BIN)/python -m pytest tests/browser/report_page.py

test-ray: $(VENV)/.installed-ray ## Studies through Ray, on a cluster of this machine alone.
	$(OFFLINE) $(BIN)/python -m pytest tests/studies/test_engines.py -k ray -rs

check: $(TEST_STAMP) ## Lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(OFFLINE) $(BIN)/pyright

test-lowest: $(LOWEST)/.installed ## The tests with the oldest version of each dependency that pyproject.toml admits.
	$(OFFLINE) $(LOWEST)/bin/python -m pytest -m "not slow" --durations=15

wheel: $(TEST_STAMP) ## Build dist/*.tar.gz and dist/*.whl.
	$(BIN)/python -m build --no-isolation

clean: ## Remove environments, caches and built files; runs/ stays.
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter must be recent enough; a sentence says so where it is not.
define check-python
@command -v $(PYTHON) >/dev/null || \
  { echo "Expected Python 3.11.4 or newer. Found no $(PYTHON): say make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11, 4) or sys.exit("Expected Python 3.11.4 or newer. Found %s: \
  say make PYTHON=/path/to/python3.11 ..." % sys.version.split()[0])'
endef

$(VENV)/bin/python:
	$(check-python)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo $(TEST_STAMP): $(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	@echo "Installing the package with its extra '$*' into $(VENV) (about two minutes the first time) ..."
	@$(PIP) --editable '.[$*]'
	@touch $@

$(VENV)/.installed-browser $(VENV)/.installed-ray: $(VENV)/.installed-%: pyproject.toml $(TEST_STAMP)
	@$(PIP) --editable '.[$*]'
	@touch $@

# Made anew each time: two releases of torch leave parts of each other's CUDA libraries behind when they are exchanged.
$(LOWEST)/.installed: pyproject.toml
	$(check-python)
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[test]'
	@touch $@
