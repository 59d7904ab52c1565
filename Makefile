# `make` alone lists what there is. Every command first creates .venv, if there is none, and brings it up to date.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(PYTHON) tools/install.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu docs export lab install
.NOTPARALLEL:

help:
	@echo 'make demo     train a small KDA language model on the source of the Python standard library'
	@echo 'make test     check everything: exports, notebooks, tests, site'
	@echo 'make test-gpu tests and notebooks on a machine with an NVIDIA GPU, with whatever Python and packages it has'
	@echo 'make docs     export the notebooks, then write docs/ and README.md'
	@echo 'make export   write kda_lit/ from the notebooks, and clean them'
	@echo 'make lab      open the notebooks in JupyterLab'
	@echo 'make install  only set up .venv, with everything that the above need'
	@echo 'Which Python: make PYTHON=python3.12 …'

demo:
	@echo '[1/2] Install'
	@$(INSTALL)
	@echo '[2/2] Train, generate, compare'
	@$(BIN)/kda-lit demo

test:
	@echo '[1/5] Install'
	@$(INSTALL) dev docs
	@echo '[2/5] The package is what the notebooks export'
	@$(BIN)/python tools/check_export.py
	@echo '[3/5] Every notebook runs'
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --do_print --timing
	@echo '[4/5] Tests'
	@$(BIN)/python -m pytest
	@echo '[5/5] The site builds'
	@$(BIN)/python tools/build_docs.py --check

test-gpu:
	@echo '[1/2] Tests, on both backends'
	@PYTHONPATH=. $(PYTHON) -m pytest tests
	@echo '[2/2] Notebooks, with their GPU cells'
	@PYTHONPATH=. OMP_NUM_THREADS=1 $(PYTHON) -c 'from nbdev.test import nbdev_test; nbdev_test(flags="cuda", do_print=True)'

docs: export
	@echo 'Build the site'
	@$(BIN)/python tools/build_docs.py

export:
	@echo 'Install'
	@$(INSTALL) dev docs
	@echo 'Export and clean the notebooks'
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

lab:
	@$(INSTALL) lab
	@$(BIN)/jupyter lab nbs

install:
	@$(INSTALL) dev docs lab
