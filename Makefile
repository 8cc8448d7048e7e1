# make demo · make test · make lint · make bench · make soak: each creates .venv first, with the pinned versions it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench soak docs clean

# What the demo needs: moewh without any extra.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moewh needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[accelerate,peft,datasets,remote,spark,bench,test,lint]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/moewh demo

# In one process per core; PYTEST_ARGUMENTS="-n 0 tests/queries -k co_routing" runs a few tests in this one.
test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto --dist loadfile $(PYTEST_ARGUMENTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About half an hour; each prints both sides of its ratios. benchmarks/results/ keeps what was seen.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.costs
	$(BIN)/python -m benchmarks.queries
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.record
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.start

# The fault tests at length, and ten minutes of fuzzing: about forty minutes.
soak: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[soak]'
	$(BIN)/python -m tools.soak --results benchmarks/results/soak.md

# Writes the README's outputs and the generated pages anew.
docs: $(VENV)/.installed
	$(BIN)/python -m tools.documents

clean:
	rm -rf $(VENV) wh
