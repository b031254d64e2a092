# make demo | test | check | benchmark: each makes its own environment in .venv the first time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a process: two test processes with two threads each run three times slower on two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test slow check format benchmark wheel clean

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

benchmark: install
	$(BIN)/rlprune benchmark digits --seeds 3 --out runs/benchmark

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
