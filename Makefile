# `make demo` and `make test` work on a fresh clone: each makes its own .venv and installs into it.
#   make demo     answer a question about a picture with the demo model
#   make test     the whole test suite
#   make dev      only set up .venv with the tools for development
#   make check    what to run before a commit: format, lint, types, floors, the fast tests
#   make format   put the sources into shape
# Options: PYTHON=/path/to/python  VENV=folder  EXTRA=cuda12 (Linux: which MLX)  PYTEST_ARGS="-k name"

VENV ?= .venv
PYTEST_ARGS ?=
IMAGE ?= examples/images/three_crosses_and_a_star.png
QUESTION ?= How many crosses are there?

# On Linux the MLX backend is an extra; on macOS MLX brings Metal itself.
ifeq ($(shell uname -s),Linux)
EXTRA ?= cpu
RUN_EXTRAS := [$(EXTRA)]
DEV_EXTRAS := [$(EXTRA),dev]
else
RUN_EXTRAS :=
DEV_EXTRAS := [dev]
endif

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test dev check lint format clean

demo: $(VENV)/.installed
	$(BIN)/fastvlm generate $(IMAGE) -p "$(QUESTION)" --model demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

dev: $(VENV)/.installed-dev

check: lint
	$(BIN)/python -m pytest -m "not slow" -n auto $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

# The stamps make setup incremental: it runs again when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml .ci/venv
	@sh .ci/venv $(VENV)
	@echo "installing fastvlm-mlx$(RUN_EXTRAS) into $(VENV), a minute or two"
	@$(PIP_INSTALL) --editable '.$(RUN_EXTRAS)'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing fastvlm-mlx$(DEV_EXTRAS) into $(VENV)"
	@$(PIP_INSTALL) --editable '.$(DEV_EXTRAS)'
	@touch $@
