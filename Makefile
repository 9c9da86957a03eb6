# Each target sets up $(VENV) first: torch as TORCH says, then gradkit itself, editable, with the extras that it needs.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
GPU_PYTHON ?= python3

python := $(VENV)/bin/python
pytest := $(python) -m pytest
install := $(python) -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-triton test-triton36 test-gpu lint bench bench-gpu docs mutants evidence clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: $(VENV)/with-dev ## train one small model with each optimizer; prints a table, draws demo.png
	$(python) examples/demo.py

# Two processes take a file each. Those that take longest go first, or one of the two would end long before the other.
SLOWEST := tests/test_examples.py tests/test_reference.py tests/sharding

# Each of the two has as many threads as there are cores: those that have nothing to do shall sleep, not spin.
test test-triton test-triton36: export OMP_WAIT_POLICY := passive
test: $(VENV)/with-dev $(VENV)/with-docs $(VENV)/with-lightning $(VENV)/with-transformers ## all tests
	$(pytest) $(SLOWEST) tests --ignore=tests/triton -n 2 --dist loadfile --no-loadscope-reorder
	$(MAKE) test-triton

# Two runs, since Triton reads TRITON_INTERPRET when it is imported. One that collects nothing fails.
test-triton: $(VENV)/with-dev ## rules and steps through Triton, without a GPU: interpreted, then compiled
ifeq ($(shell uname),Linux)
	TRITON_INTERPRET=1 $(pytest) tests/triton -n 2 $(ONLY)
	env -u TRITON_INTERPRET $(pytest) tests/triton -n 2 $(ONLY)
else
	@echo "Triton has wheels for Linux only: nothing is tested here"
endif

# The Triton that comes with torch 2.11, in a folder of its own that stands before the newer one. The authors' runs, and
# each chain and storage beside eager, are left to the newer one: here each kind of kernel runs.
test-triton36: export PYTHONPATH := $(CURDIR)/$(VENV)/triton36
test-triton36: $(VENV)/with-dev $(VENV)/triton36 ## the same with triton 3.6
	$(python) -c 'import triton; assert triton.__version__ == "3.6.0", triton'
	$(MAKE) test-triton ONLY="-k 'not golden and not polynomials_stay and not every_bit'"

# On a machine with a GPU, in the checkout as it is: what these two need is torch, Triton and numpy.
test-gpu: ## what only a GPU can tell; fails where there is none
	$(GPU_PYTHON) -m tests.gpu

lint: $(VENV)/with-dev ## ruff and mypy
	$(python) -m ruff check .
	$(python) -m mypy

bench: $(VENV)/with-bench ## time each optimizer beside torch's and its peers'; writes bench/results
	$(python) -m bench

bench-gpu: ## the same on a GPU, with the peers that can be imported, and a sweep of the launch constants
	$(GPU_PYTHON) -m bench --on gpu $(if $(COMMIT),--commit $(COMMIT))

docs: $(VENV)/with-docs ## the site, to build/site
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet

mutants: $(VENV)/with-dev $(VENV)/with-transformers $(VENV)/with-lightning ## turn off one term after another; each time the tests must fail
	$(python) -m tests.mutants

evidence: $(VENV)/with-dev ## what the papers claim, at a size for two cores; writes bench/results/evidence.*
	$(python) -m bench.evidence

clean: ## remove what was built, and the environment
	rm -rf $(VENV) build dist gradkit.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# What TORCH was the last time: the file changes only when it does.
$(VENV)/torch.txt: always
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(VENV)/with-torch: $(VENV)/torch.txt
	$(PYTHON) -m venv $(VENV)
	$(install) $(TORCH)
	@touch $@

$(VENV)/with-%: $(VENV)/with-torch pyproject.toml
	$(install) --editable '.[$*]'
	@touch $@

$(VENV)/triton36: $(VENV)/with-torch
	$(install) --no-deps --target $@ triton==3.6.0
	@touch $@

.PHONY: always
.PRECIOUS: $(VENV)/with-%
