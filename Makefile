# The same commands for people and for CI. Everything happens in .venv, made from the pinned lock file.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo lab lab-down test quick check format proto figures dashboards lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 18

setup: $(STAMP)  ## .venv with the pinned packages and resbm-node itself

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 12); sys.exit(0 if ok else "resbm-node needs Python 3.11 or 3.12, this is %d.%d: run make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: setup  ## train a small ResBM on this machine: a coordinator and four peers
	$(BIN)/resbm-node demo

lab: setup  ## a coordinator and four peers in containers, on slow links, with dashboards; until Ctrl+C
	$(BIN)/python -m node.lab.up

lab-down: setup  ## remove what a lab has left
	$(BIN)/python -m node.lab.up --down

test: setup  ## format, lint, types and all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses=auto -m "not processes"
	$(BIN)/pytest --durations=30 --durations-min=5 -m processes

quick: setup  ## the tests that take less than ten seconds each: about five minutes
	$(BIN)/pytest -m "not slow"

check: test  ## the same as make test

format: setup  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: setup  ## regenerate proto/gen from proto/*.proto
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python proto/generate.py

figures: setup  ## redraw docs/images from docs/results
	$(BIN)/python docs/figures.py

dashboards: setup  ## rebuild docker/grafana/dashboards and the table of docs/metrics.md
	$(BIN)/python docker/grafana/build.py
	$(BIN)/python docs/metrics_table.py

lock: setup  ## rewrite requirements.lock from what .venv holds
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > requirements.lock

clean:  ## remove .venv and caches of the tools
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info build dist
