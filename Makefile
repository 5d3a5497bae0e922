# make demo    sets up .venv and trains the default recipe on real data, several balancers side by side
# make test    the same environment, then the whole test suite, in two processes
# make lint | types | docs | bench | clean
# make compat TORCH=2.8.0 LIGHTNING=2.5.0 [METRICS=1.5.2]    the test suite with these versions, in an environment of its own
#
# PYTHON=...   the Python (3.11 or newer) that makes .venv; ARGS=... is handed to the command.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
PINS   := constraints.txt
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq install --progress-bar off --no-compile
# Nothing is compiled at install time (it takes longer than all the downloads): Python writes the byte code of
# what it imports, on first use, even where the caller's environment forbids it.
RUN    := PYTHONDONTWRITEBYTECODE= MPLBACKEND=Agg OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs bench compat clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

demo: $(VENV)/.recipes
	@$(RUN) $(BIN)/lightning-mtl compare multidigits $(ARGS)

test: $(VENV)/.dev
	@$(RUN) $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev
	@$(BIN)/mypy

docs: $(VENV)/.dev
	@$(RUN) $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.bench
	@for script in benchmarks/*.py; do echo "== $$script"; $(RUN) $(BIN)/python $$script $(ARGS) || exit 1; done

# The pinned versions with four of them exchanged, and without two for which each Lightning sets bounds of its own.
METRICS ?= $(patsubst torchmetrics==%,%,$(shell grep '^torchmetrics==' constraints.txt))
COMPAT   = .venv-compat/$(notdir $(PYTHON))-$(TORCH)-$(LIGHTNING)-$(METRICS)

compat: $(COMPAT)/pins.txt
	@$(MAKE) --no-print-directory test VENV=$(COMPAT) PINS=$<

$(COMPAT)/pins.txt: constraints.txt
	@test -n "$(TORCH)" -a -n "$(LIGHTNING)" || { echo "Say which: make compat TORCH=2.8.0 LIGHTNING=2.5.0"; exit 1; }
	@mkdir -p $(@D)
	@grep -vE '^(torch|torchmetrics|(pytorch-)?lightning|fsspec|packaging)==' $< > $@
	@printf '%s\n' torch==$(TORCH) torchmetrics==$(METRICS) lightning==$(LIGHTNING) pytorch-lightning==$(LIGHTNING) >> $@

clean:
	rm -rf $(VENV) .venv-compat build dist docs/_build docs/reference/generated .pytest_cache .mypy_cache .ruff_cache

# The environment. Each file below stands for one finished install; it is made again only when a file to the
# right of its colon is newer. torch goes first and alone: asked for by its exact version it comes as the build
# that pip is set up to find, and the later installs then leave it as it is. A current pip is worth its five
# seconds: the one that comes with Python 3.11 takes half a minute longer.

$(VENV)/.torch: $(PINS)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; run make with PYTHON=/path/to/it."; exit 1; }
	@echo "[1/3] $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade -c $(PINS) pip
	@echo "[2/3] $$(grep '^torch==' $(PINS)) (the largest download)"
	@$(PIP) $$(grep '^torch==' $(PINS))
	@touch $@

$(VENV)/.recipes: $(VENV)/.torch pyproject.toml
	@echo "[3/3] lightning-mtl and what its recipes need"
	@$(PIP) -c $(PINS) -e '.[recipes,gp]'
	@touch $@

$(VENV)/.dev: $(VENV)/.recipes
	@echo "[+] what the tests, the linters and the documentation need"
	@$(PIP) -c $(PINS) -e '.[recipes,gp,docs,dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.recipes
	@echo "[+] what the benchmarks compare with"
	@$(PIP) -c $(PINS) -e '.[recipes,gp,bench]'
	@touch $@
