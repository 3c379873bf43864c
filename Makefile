# `make demo` and `make test` are all a fresh machine needs; `make help` lists the rest.

PYTHON ?= python3
# -qq: errors only.
PIP := .venv/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
RUN := .venv/bin/python -m

.PHONY: help install demo test lint docs fuzz faults soak bench-data bench-scaling bench-checkpoint test-slurm format clean

help: ## List what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## Make .venv and install the toolkit in it, with the versions it was tested with

demo: .venv/.installed ## Train a small model on made-up data, on the CPU if need be, and evaluate it
	@echo "== 1/3 Writing the demo corpus to data/demo"
	@$(RUN) data_pipelines demo data/demo
	@echo "== 2/3 Training runs/demo"
	@$(RUN) launch local configs/demo.yaml
	@echo "== 3/3 Evaluating runs/demo on held-out data"
	@$(RUN) pretrain evaluate runs/demo --split heldout
	@echo "== To see the curves: .venv/bin/tensorboard --logdir runs"

test: lint ## Lint, check types and run all tests
	@echo "== Tests"
	@$(RUN) pytest tests/unit -n 2 --dist loadfile
	@$(RUN) pytest tests/e2e tests/distributed tests/faults -m 'not long' -n 2 --dist loadfile

test-slurm: .venv/.installed ## Run jobs on a cluster of Slurm's own daemons on this machine, which needs root and Debian's packages
	@$(RUN) pytest tests/slurm

lint: .venv/.installed ## Lint, check the format and the types
	@echo "== Lint and format"
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@echo "== Types"
	@.venv/bin/basedpyright

docs: .venv/.installed ## Write docs/settings.md from the config's models
	@PYTHONPATH=. .venv/bin/python docs/settings.py

fuzz: .venv/.installed ## Spoil shards, tables, folders and configs in MUTANTS=100000 ways drawn by SEED=1, and check what is read
	@PYTHONPATH=tests OMP_NUM_THREADS=1 nice $(RUN) fuzz.campaign $(or $(MUTANTS),100000) $(or $(SEED),1)

faults: .venv/.installed ## Strike runs at every moment of a step, a save, a start and an end: also the long tests
	@$(RUN) pytest tests/faults
	@$(RUN) pytest tests/e2e -m long

soak: .venv/.installed ## Kill toy runs KILLS=200 times at moments drawn by SEED=1, and check what they consumed and computed
	@OMP_NUM_THREADS=1 nice .venv/bin/python tests/soak.py $(or $(KILLS),200) $(or $(SEED),1)
	@PYTHONPATH=tests:. OMP_NUM_THREADS=1 nice .venv/bin/python tests/soak_training.py $(or $(KILLS),200) $(or $(SEED),1)

bench-data: .venv/.installed ## Measure the data pipelines on one core, in about ten minutes
	@$(RUN) benchmarks.data

bench-scaling: .venv/.installed ## Measure what ZeRO-3 holds and gathers, and throughput, on 1, 2 and 4 CPU ranks
	@OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(RUN) benchmarks.scaling

bench-checkpoint: .venv/.installed ## Measure what saving costs the training loop, and the index of 4,096 pretended ranks
	@OMP_NUM_THREADS=1 $(RUN) benchmarks.checkpoint

format: .venv/.installed ## Format the code and mend what can be mended
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

clean: ## Remove .venv, caches, and the demo's data and run
	@echo "== Removing .venv, caches, data/demo and runs/demo"
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info data/demo runs/demo
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by itself, so that a build which is already there, for this CPU or GPU, is kept.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than Python 3.11: name a newer one, as in make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@echo "== Making .venv with $$($(PYTHON) --version)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "== Installing torch (the first time it is a large download)"
	@$(PIP) torch
	@echo "== Installing the toolkit"
	@$(PIP) --editable '.[dev]'
	@touch $@
