# `make moons` and `make test` are all that a newcomer needs; both install what they use.
# Another interpreter: `make test PYTHON=python3.13`.

PYTHON ?= python3
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(MINOR))
BIN := $(VENV)/bin
# The versions that were tested on this minor version of Python, where there is such a list.
CONSTRAINTS := $(wildcard constraints/python$(MINOR).txt)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: help moons study test test-all lint format docs build notebooks constraints clean

help:
	@echo "make moons        reproduce the paper's experiment; writes results/moons/"
	@echo "make study        does LAMA help? hours; goes on where it was interrupted"
	@echo "make test         tests and doctests, in minutes"
	@echo "make test-all     besides: fuzz, benchmarks, notebooks, peers, processes"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff format the code"
	@echo "make docs         the site, in docs/_build/html/"
	@echo "make build        wheel and sdist in dist/"
	@echo "make notebooks    execute the notebooks and keep their pictures"
	@echo "make constraints  record the tested versions for this Python"
	@echo "PYTHON=python3.13 chooses the interpreter, ARGS=... goes to moons, study and tests"

moons: $(VENV)/benchmarks.stamp
	$(BIN)/python -m benchmarks.moons $(ARGS)

study: $(VENV)/benchmarks.stamp
	$(BIN)/python -m benchmarks.study $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/docs.stamp
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html $(ARGS)

build: $(VENV)/dev.stamp
	$(BIN)/python -m build

notebooks: $(VENV)/dev.stamp
	$(BIN)/jupytext --sync --execute docs/notebooks/0*.py
	$(BIN)/python docs/notebooks/readme_picture.py

# Unpinned on purpose: this is how a new set of versions is chosen and then tested.
constraints:
	rm -rf $(VENV)-unpinned
	$(PYTHON) -m venv $(VENV)-unpinned
	$(VENV)-unpinned/bin/python -m pip install --quiet --editable '.[dev]'
	$(VENV)-unpinned/bin/python -m pip freeze --exclude-editable > constraints/python$(MINOR).txt
	rm -rf $(VENV)-unpinned

clean:
	rm -rf .venv .venv-* build dist results docs/_build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[$*]'
	touch $@
