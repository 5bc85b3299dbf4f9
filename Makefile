# Every target sets itself up: a fresh machine needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= results/latest
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-all lint type format ablate screen train regimes bench aa report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Options are passed on: make ablate ARGS="model=tiny measure=quick"; PYTHON=python3.12 picks the interpreter.'

setup: $(VENV)/.dev ## install everything into .venv, tests and checks too

ablate: $(VENV)/.run ## measure all 2^5 combinations on the best device here and write the report
	$(BIN)/python -m qwen3bench design=full $(ARGS)

screen: $(VENV)/.run ## which of all switches pay for inference here, in 64 cells, the best then confirmed
	$(BIN)/python -m qwen3bench design=screen opt=all $(ARGS)

train: $(VENV)/.run ## the same question for a training step
	$(BIN)/python -m qwen3bench design=screen opt=all workload=train $(ARGS)

# Where does a switch's worth change sign or vanish? One run a point, then one page over all of them. `tie` is left out:
# it cannot change a latency, and without it a point takes half as long.
REGIMES ?= results/regimes
RUNTIMES ?= [eager,graph]
SINGLE ?= prompt_tokens=128,2048,8192
BATCHED ?= prompt_tokens=128,512,2048
SWEEP = $(BIN)/python -m qwen3bench -m design=full opt=[flash,mlp,mask,norm] measure=quick measure.max_seconds=30 runtime=$(RUNTIMES)
regimes: $(VENV)/.run ## the same over prompt lengths, batch sizes and runtimes (RUNTIMES=[eager] without a GPU; SINGLE=, BATCHED= for other sizes), on one page
	$(SWEEP) workload=[prefill,decode] $(SINGLE) hydra.sweep.dir=$(REGIMES)/single $(ARGS)
	$(SWEEP) workload=[prefill] batch_size=8 $(BATCHED) hydra.sweep.dir=$(REGIMES)/batched $(ARGS)
	$(BIN)/python -m qwen3bench.report $(REGIMES)/single $(REGIMES)/batched --out $(REGIMES)

report: $(VENV)/.run ## rebuild the report of a run from its record (RUN=DIR; default: results/latest)
	$(BIN)/python -m qwen3bench.report $(RUN) $(ARGS)

test: $(VENV)/.dev ## run the tests that take under two seconds each
	$(BIN)/python -m pytest -n auto -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev ## run the others
	$(BIN)/python -m pytest -n auto -m slow $(ARGS)

test-all: $(VENV)/.dev ## run all tests
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/.dev ## check format, style and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache --no-logo

type: $(VENV)/.dev ## check the types
	$(BIN)/mypy

format: $(VENV)/.dev ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## micro-benchmarks of the operations, on against off
	$(BIN)/python -m pytest -n0 -q -rN tests/kernels --benchmark-enable --benchmark-only --benchmark-columns=median,iqr,rounds \
	  --benchmark-sort=name $(ARGS)

aa: $(VENV)/.run ## twenty campaigns on 32 copies of one model: how often is noise called an effect?
	$(BIN)/python -m qwen3bench.aa $(ARGS)

clean: ## remove what was built here; results stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Not --quiet: a first download takes a minute or two, in which nothing else would be seen.
INSTALL = @echo 'setting up $(VENV) (a minute or two)'; \
  $(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -c constraints.txt -e
# The versions that the suite is tested with. Measuring does without the extras, so that it starts sooner.
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.run

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'qwen3bench needs Python 3.11 or newer: make PYTHON=python3.12 …' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half a .venv would stop the next try
