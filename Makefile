# `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadscope --no-loadscope-reorder --durations=25
# One cluster runs on a machine, hence one process.
SLURM_PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=25
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart install test test-fast test-s3 test-slurm smoke-slurm test-all lint clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed  ## install, train the three stages on the emoji that ship here, draw samples
	$(BIN)/megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero2.json

install: $(VENV)/.installed  ## make .venv with megadiff in it

lint: $(VENV)/.installed-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, and the tests that need neither a GPU nor many minutes
	$(PYTEST) -m "not gpu and not slow and not slurm"

test-fast: $(VENV)/.installed-test  ## for the inner loop: no processes, no servers, no distributions
	$(PYTEST) -m "not gpu and not slow and not slurm and not distributed and not s3 and not thorough"

test-s3: $(VENV)/.installed-test  ## the tests of S3, most of them against a real server (tests/s3/README.md); part of `make test`
	$(PYTEST) -m s3

test-slurm: $(VENV)/.installed-test  ## the tests on a real Slurm of two nodes (tests/slurm/README.md); needs root
	tests/slurm/mini_slurm.sh install
	$(SLURM_PYTEST) -m slurm

smoke-slurm: $(VENV)/.installed-test  ## the first of them: two nodes, a job that queues again
	tests/slurm/mini_slurm.sh install
	$(SLURM_PYTEST) tests/slurm/test_smoke.py

test-all: lint  ## every test; those that need a GPU or a Slurm are skipped where there can be none
	$(PYTEST) -m "not slurm"
	! tests/slurm/mini_slurm.sh check || $(MAKE) test-slurm

clean:  ## delete .venv, caches and build files (not runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Installs are repeated only when what they read has changed.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable '.[test]'
	@touch $@
