# RS-Prune: `make help` lists the commands.
.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-all lint format types docs-check bench bench-quality bench-scale bench-engines sweep quality ablation augmentation pair-cleaning cleaning-probe suggest page demo tables readme foundation autoencoder clean distclean
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PROFILE ?= local
EXPERIMENT ?= methods
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
UNFINISHED := .venv/.unfinished
# Test files side by side; each process computes in one thread, so that two do not wait for each other's.
TEST_PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

help:  ## list the commands
	@echo "make COMMAND [PROFILE=smoke|local|paper]"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## a virtual environment .venv with everything pinned

# A set-up that was interrupted left its mark, and the next one starts from nothing; a finished one is brought up to date.
# Without build isolation, because basicsr asks for torch at build time though it needs none: pip would install it twice.
# The second package of the same opencv is for machines without a display library (libGL), where the first cannot load.
$(READY): requirements.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	    { echo "error: Python 3.11 or 3.12 is needed, found $(or $(PYTHON),none): name one with make setup PYTHON=PATH" >&2; exit 2; }
	@if [ -e $(UNFINISHED) ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch $(UNFINISHED)
	@echo "setting up .venv: about 6 GB to fetch or unpack, several minutes" >&2
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^setuptools==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --use-pep517 --no-build-isolation -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	    $(BIN)/python -m pip uninstall --quiet --yes opencv-python; \
	    $(BIN)/python -m pip install --quiet --no-deps --force-reinstall \
	        "$$(sed -n 's/^opencv-python==/opencv-python-headless==/p' requirements.txt)"; }
	@rm $(UNFINISHED) && touch $(READY)
	@echo 'set up: export PATH="$(CURDIR)/.venv/bin:$$PATH" makes its python the one of this shell' >&2

reproduce: $(READY)  ## the whole experiment: results/PROFILE/report.html, tables, figures; DRY=1 prints its plan alone
	$(BIN)/python scripts/reproduce.py profile=$(PROFILE) $(if $(filter-out 0 false,$(DRY)),dry_run=true)

test: $(READY)  ## all tests but the slow ones
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## all tests
	$(PYTEST)

lint: $(READY)  ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## ruff: lay the code out, and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY)  ## mypy on the public API and what its names lead to
	$(BIN)/mypy

docs-check: $(READY)  ## links, code blocks, commands and generated tables of all documents
	$(BIN)/python scripts/docs_check.py

bench: $(READY)  ## speed of every stage on this machine
	$(BIN)/python scripts/bench.py profile=$(PROFILE)
	$(BIN)/python scripts/bench_selection.py profile=$(PROFILE)
	$(BIN)/python scripts/bench_training.py profile=$(PROFILE)
	$(BIN)/python scripts/bench_pairs.py profile=$(PROFILE)

bench-engines: $(READY)  ## pruning with engine=ray beside engine=local on this machine
	$(BIN)/python scripts/bench_engines.py profile=$(PROFILE)

sweep: $(READY)  ## an experiment of configs/experiment: make sweep EXPERIMENT=ratio_compute
	$(BIN)/python train/pretrain.py -m experiment=$(EXPERIMENT) profile=$(PROFILE)

quality: $(READY)  ## every pruning method at several ratios, judged without training; METHODS=random,mine RATIOS=0.85
	$(BIN)/python scripts/quality.py profile=$(PROFILE) $(if $(METHODS),'quality.methods=[$(METHODS)]') \
	    $(if $(RATIOS),'quality.ratios=[$(RATIOS)]')

ablation: $(READY)  ## RS-Prune with one choice changed at a time, judged without training
	$(BIN)/python scripts/ablation.py profile=$(PROFILE)

augmentation: $(READY)  ## how much generated images help as training data of a segmenter
	$(BIN)/python scripts/augmentation.py profile=$(PROFILE) $(if $(RUN),augmentation.run="$(RUN)")

pair-cleaning: $(READY)  ## whether wrong captions are found, and how much cleaning them helps a training
	$(BIN)/python scripts/pair_cleaning.py profile=$(PROFILE)

cleaning-probe: $(READY)  ## how many of each scene's pairs to remove, found by small trainings
	$(BIN)/python scripts/cleaning_probe.py profile=$(PROFILE)

suggest: $(READY)  ## the ratio to prune at: a curve and its knee
	$(BIN)/python scripts/suggest.py profile=$(PROFILE)

demo: $(READY)  ## a page in the browser that draws images, by the shipped model or by FOUNDATION=DIR, a pretraining run
	$(BIN)/python scripts/demo.py $(if $(FOUNDATION),foundation="$(FOUNDATION)") \
	    $(if $(SUPER_RESOLUTION),demo.super_resolution="$(SUPER_RESOLUTION)") \
	    $(if $(SEMANTIC_SYNTHESIS),demo.semantic_synthesis="$(SEMANTIC_SYNTHESIS)")

page: $(READY)  ## look at SELECTION=DIR and decide: a page on this machine; with STATIC=1 a file for others
	$(BIN)/python scripts/page.py selection="$(SELECTION)" $(if $(filter-out 0 false,$(STATIC)),page.static=true)

tables: $(READY)  ## tables from results/PROFILE/results.jsonl; docs/results.md from results/published
	$(BIN)/python scripts/tables.py profile=$(PROFILE)

readme: $(READY)  ## the table and pictures of results/local into README.md, and docs/
	$(BIN)/python scripts/readme.py profile=$(PROFILE) tracker=none

bench-quality: $(READY)  ## which options help the generator at equal seconds of training (hours)
	$(BIN)/python scripts/bench_quality.py profile=$(PROFILE)

bench-scale: $(READY)  ## every stage at 10,000 to 1,000,000 tiles: time, memory, cost model (hours)
	$(BIN)/python scripts/bench_scale.py profile=$(PROFILE)

foundation: $(READY)  ## train the shipped models again (an hour on two cores)
	$(BIN)/python scripts/foundation.py experiment=shipped profile=$(PROFILE)

autoencoder: $(READY)  ## train the shipped autoencoder again (hours)
	$(BIN)/python train/autoencoder.py

clean:  ## remove what tools left: caches, bytecode, logs
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info outputs multirun wandb
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv, runs and results
	rm -rf .venv runs results
