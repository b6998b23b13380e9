# Needs make, bash and Python 3.11 (or 3.12, 3.13); everything else goes into .venv, which each target sets up itself.
# PYTHON=/path/to/python chooses the interpreter. Nothing but pip uses the network.

PY := .venv/bin/python
SOURCES := s2d_deploy export runtimes
DEMO_OUTPUT := runs/digits-vit
export PYTHON

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types format setup clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: ## train, condition, quantize, build, verify and measure a small ViT; write a report
	@.ci/environment demo
	@mkdir -p $(dir $(DEMO_OUTPUT))
	@.venv/bin/s2d-deploy run digits-vit --output $(DEMO_OUTPUT); status=$$?; \
	if [ -f $(DEMO_OUTPUT)/report.html ]; then echo "report: $(CURDIR)/$(DEMO_OUTPUT)/report.html"; fi; exit $$status

# Whole files go to each worker, so that what a file's tests share is made once. One thread each: two would wait for each other.
test: setup ## run every test, on two cores
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q -n 2 --dist loadfile

lint: setup ## ruff: rules and formatting, changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup ## mypy, strict
	$(PY) -m mypy

format: setup ## let ruff fix and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

setup: ## make or repair .venv with everything (the other targets do it themselves)
	@.ci/environment test

clean: ## remove .venv, runs/ and every cache
	rm -rf .venv runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis s2d_deploy.egg-info
	find $(SOURCES) tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
