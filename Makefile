# Every target sets up what it needs; run again, it finds it there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(if $(wildcard $(VENV)/Scripts),$(VENV)/Scripts,$(VENV)/bin)
READY := $(VENV)/.ready

.PHONY: help setup demo test check slow gpu bench table clean
help:  ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{printf "make %-8s %s\n", $$1, $$2}'

setup: $(READY)  ## make the environment in .venv (done by every other target)
	@echo "environment: $(VENV), ready"

$(READY): pyproject.toml constraints.txt
	@echo "setting up the environment in $(VENV): a minute or two, once"
	@$(PYTHON) -c 'import sys; sys.exit("phyla needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@test -x $(VENV)/bin/python || test -x $(VENV)/Scripts/python.exe || $(PYTHON) -m venv $(VENV)
	@if [ -x $(VENV)/Scripts/python.exe ]; then B=$(VENV)/Scripts; else B=$(VENV)/bin; fi; $$B/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## find the ten classes in 1,797 handwritten digits, and write a report
	$(BIN)/phyla run

test: $(READY)  ## run the quick tests
	$(BIN)/python -m pytest

check: $(READY)  ## lint and type-check
	$(BIN)/ruff check
	$(BIN)/mypy

slow: $(READY)  ## run the end-to-end tests on real data too
	$(BIN)/python -m pytest -m "slow or not slow"

gpu: $(READY)  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(READY)  ## measure speed against other libraries, side by side, into docs/concepts/speed.md
	$(BIN)/python bench/cards.py measure

table: $(READY)  ## write README's table anew and those of docs/ from results/
	$(BIN)/phyla reproduce --table

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache src/*.egg-info
