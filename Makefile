# `make test` on a fresh machine is enough: it creates the environment, installs and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/runtime
STAMP := $(VENV)/installed

# One thread a process: two OpenMP threads and a second process on two cores spin against each other.
export OMP_NUM_THREADS ?= 1

.PHONY: setup test lint bench demo proof format clean

setup: $(STAMP)

# What runs the project; the demo needs no more.
$(RUNTIME): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		torch==2.13.0 setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable .
	touch $@

$(STAMP): $(RUNTIME)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable ".[dev]"
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not proof"
	$(BIN)/python -m pytest -m "slow and not proof"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

proof: $(STAMP)
	$(BIN)/python -m pytest -m proof

demo: $(RUNTIME)
	$(BIN)/glm45 run demo --run runs/demo

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
