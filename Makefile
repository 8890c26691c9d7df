# `make demo` and `make test` are all a fresh machine needs: Python 3.11 or newer, and pip's usual package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE ?= demo-store

.PHONY: demo test types tests clean

demo: $(VENV)/installed
	$(BIN)/opgrpo quickstart --store $(STORE) $(OPTIONS)

test: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs=2 types tests

types:
	$(BIN)/mypy

tests:
	$(BIN)/pytest -n 3 --dist worksteal

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(STORE)
