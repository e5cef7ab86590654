# `make demo` and `make test` are all a new machine needs: each makes .venv first where it is absent.
PYTHON ?= python3
BIN := .venv/bin
# what measurements read: Task04 (Hippocampus) of the Medical Segmentation Decathlon
DATA ?= ../shared/data/hippocampus
# measurements with a target or a line of their own, or that need a run, a peer, a card or long; and what they share
ASKED := averaged components ensemble errors export kill layouts nnunet_weights plans predict slide surface train
ASKED += loader prepare nnunet outside

.PHONY: setup demo test check bench bench-train bench-export bench-predict docs plans
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: setup  ## a small synthetic data set through the whole pipeline, under five minutes on 2 cores
	$(BIN)/autoseg demo

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## paired measurements; not part of the tests
	set -e; for script in $(filter-out $(ASKED:%=bench/%.py),$(wildcard bench/*.py)); do $(BIN)/python $$script; done
	$(BIN)/python bench/loader.py $(wildcard $(DATA))
	$(BIN)/python bench/prepare.py $(DATA)

bench-train: setup  ## a training step beside nnU-Net's: make bench-train PEER=/path/to/python/with/nnunetv2
	$(BIN)/python bench/train.py $(DATA) $(if $(PEER),--peer $(PEER))

bench-export: setup  ## logits to label maps on the image's grid: time, memory, agreement
	$(BIN)/python bench/export.py $(if $(PEER),--peer $(PEER))

bench-predict: setup  ## raw files to label maps with the same network; needs PEER
	$(BIN)/python bench/predict.py $(DATA) --peer $(or $(PEER),$(error bench-predict needs PEER=/path/to/python/with/nnunetv2))

docs: setup  ## docs/*.md to HTML in site/; fails at a link that leads nowhere
	$(BIN)/python docs/build.py

plans: setup  ## plans/*/plan-*.json anew from their fingerprints; the diff is the review
	$(BIN)/python bench/plans.py
