# make install | demo | test | test-all | lint | gpu | bench | base | clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install demo test test-all lint gpu bench base clean

install: $(VENV)/.installed     ## the package and its dependencies, into .venv

# torch comes first and pinned: without it another package would pull its newest build, with gigabytes beside it.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*) .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minitune needs Python 3.11 or newer; say make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c .ci/constraints.txt setuptools wheel
	$(PIP) -c .ci/constraints.txt --no-build-isolation -e .
	touch $@

# A torch for a GPU brings the triton that it was built for; one for CPUs brings none.
$(VENV)/.test: $(VENV)/.installed
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.6.0
	$(PIP) -c .ci/constraints.txt --no-build-isolation -e '.[test]'
	touch $@

demo: $(VENV)/.installed        ## fine-tune a small model on minitune's own facts: under 3 minutes on 2 cores
	$(BIN)/minitune demo

test: $(VENV)/.test             ## lint, types and the test suite
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow'

test-all: $(VENV)/.test         ## what is too long for CI as well
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu:                            ## on a GPU machine, with the python, torch and nvcc that it has: build in place, tests, timings
	$(PYTHON) -m benchmarks.gpu

bench: $(VENV)/.test            ## minitune beside transformers + PEFT on this CPU; over an hour, on a quiet machine
	$(BIN)/python -m benchmarks.bench_train
	$(BIN)/python -m benchmarks.bench_nf4
	$(BIN)/python -m benchmarks.bench_full
	$(BIN)/python -m benchmarks.tables

base: $(VENV)/.installed        ## rebuild the small base model and tokenizer of the demo
	$(BIN)/python examples/build_base.py

clean:
	rm -rf $(VENV) build *.egg-info minitune/*.so
