# make demo · make notebook · make test · make lint · make bench · make soak: each creates .venv first, with the pinned versions it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo notebook browser test lint bench soak docs clean

# What the demo needs: moewh without any extra.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moewh needs Python 3.11 or newer; set PYTHON=...")'
	@echo "Installing moewh and what it needs into $(VENV): torch, transformers, DuckDB and others, about 1.4 GB."
	@began=$$(date +%s); set -e; \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .; \
	echo "Installed in $$(( $$(date +%s) - began )) s: $$(du -sh $(VENV) | cut -f1) in $(VENV)."
	@touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[accelerate,peft,datasets,remote,spark,bench,test,lint,notebook,report]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/moewh demo

# Five questions about the demo's routing, in a browser.
notebook: $(VENV)/.notebook
	$(BIN)/moewh demo
	$(BIN)/marimo edit notebooks/demo.py

$(VENV)/.notebook: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[notebook]'
	touch $@

# In one process per core; PYTEST_ARGUMENTS="-n 0 tests/queries -k co_routing" runs a few tests in this one.
test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto --dist loadfile $(PYTEST_ARGUMENTS)

# The browser of the tests of pages, which are skipped without it. Debian's; installed by root alone.
browser:
	@command -v chromium > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium > /dev/null; } \
		|| echo "There is no chromium, and it cannot be installed: the tests of pages will be skipped."

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
	$(BIN)/python -m benchmarks.report
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
