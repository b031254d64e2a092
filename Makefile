# make demo | test | check | docs | benchmark: each makes its own environment in .venv the first time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a process: two test processes with two threads each run three times slower on two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test slow check format docs benchmark wheel clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@echo "setting up $(VENV) (once, some minutes: it downloads torch)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: install
	$(BIN)/rlprune demo --resume --out runs/demo

test: install
	$(BIN)/python -m pytest -q -n 2

slow: install
	$(BIN)/python -m pytest -q -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site in site/; a link that leads nowhere, or a name without a page, ends it.
docs: install
	@$(BIN)/python -c "import mkdocs, material, mkdocstrings" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

benchmark: install
	$(BIN)/rlprune benchmark digits --seeds 3 --out runs/benchmark

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
