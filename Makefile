# make demo · make notebook · make test · make test-oldest-duckdb · make lint · make bench · make soak: each first creates
# .venv with the pinned versions it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

OLDEST_DUCKDB := 1.5.6
READS_WITH_DUCKDB := tests/queries/test_saved.py \
	$(addprefix tests/ingest/test_,prompt_files.py prompts.py arrow_types.py chats.py)

# Python compiles a module when it first imports it. pip would compile all 19,000, for more than half of the installation's time.
# Whatever the environment says, bytecode is kept: without it, each of the hundreds of processes of the tests compiles moewh again.
export PYTHONDONTWRITEBYTECODE =
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt

.PHONY: demo notebook browser test test-oldest-duckdb lint bench soak docs clean

# For the demo: moewh without extras.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moewh needs Python 3.11 or newer; set PYTHON=...")'
	@echo "Installing moewh and its dependencies into $(VENV): torch, transformers, DuckDB and others, about 1.2 GB."
	@began=$$(date +%s); set -e; \
	$(PYTHON) -m venv $(VENV); \
	$(INSTALL) -e .; \
	echo "Installed in $$(( $$(date +%s) - began )) s: $$(du -sh $(VENV) | cut -f1) in $(VENV)."
	@touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(INSTALL) -e '.[accelerate,peft,datasets,remote,spark,bench,test,lint,notebook,report]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/moewh demo

# Five questions about the demo's routing, in a browser.
notebook: $(VENV)/.notebook
	$(BIN)/moewh demo
	$(BIN)/marimo edit notebooks/demo.py

$(VENV)/.notebook: $(VENV)/.demo
	$(INSTALL) -e '.[notebook]'
	touch $@

# One process more than there are cores. PYTEST_ARGUMENTS="-n 0 tests/queries -k co_routing" runs a few tests in a single process.
test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto --dist loadfile $(PYTEST_ARGUMENTS)

# The tests of prompts and saved queries on the oldest DuckDB series that moewh supports; those of the shell always use it.
test-oldest-duckdb: $(VENV)/duckdb-$(OLDEST_DUCKDB)
	HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest -q -n auto --dist loadfile $(READS_WITH_DUCKDB)

$(VENV)/duckdb-$(OLDEST_DUCKDB): $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $@ duckdb==$(OLDEST_DUCKDB)

# Debian's chromium, for the tests of pages, which are skipped without it. Only root can install it.
browser:
	@command -v chromium > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium > /dev/null; } \
		|| echo "chromium is not installed and cannot be: the tests of pages will be skipped."

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About half an hour. Each benchmark prints both sides of its ratios; benchmarks/results/ keeps the figures.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.costs
	$(BIN)/python -m benchmarks.queries
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.record
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.start

# The long fault tests, ten minutes of fuzzing, and older releases of DuckDB: about fifty minutes.
soak: $(VENV)/.installed
	$(INSTALL) -e '.[soak]'
	$(BIN)/python -m tools.soak --results benchmarks/results/soak.md
	$(BIN)/python -m tools.old_shells

# Rewrites the README's outputs and the generated pages.
docs: $(VENV)/.installed
	$(BIN)/python -m tools.documents

clean:
	rm -rf $(VENV) wh
