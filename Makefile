# `make help` lists the targets.

PYTHON ?= python3.11
# These four are taken from the command line alone, as in `make run IMAGES=…`: an environment, of a CI above all, may have
# variables of such common names for something else.
RECIPE :=
SET :=
IMAGES :=
EXTRAS :=
# pytest's own options, as in: make test PYTEST="-k train"
PYTEST ?=
# the slow tests often wait for servers: one worker more than two cores
WORKERS := --dist loadfile --no-loadscope-reorder -n

.DEFAULT_GOAL := help
SHELL := /bin/sh
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
ALL_EXTRAS := s3 gs azure ssh postgresql
ifneq ($(filter-out $(ALL_EXTRAS),$(EXTRAS)),)
$(error EXTRAS: found $(filter-out $(ALL_EXTRAS),$(EXTRAS)); allowed: $(ALL_EXTRAS))
endif
# what `make install EXTRAS=…` and `make test` chose stays chosen
LOCKS := requirements/base.lock $(wildcard $(patsubst .venv/.with-%,requirements/%.lock,$(wildcard .venv/.with-*)))
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# each of the many processes would compile the packages anew
unexport PYTHONDONTWRITEBYTECODE
# none of the tools phones home
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help run test test-quick coverage faults check-bits results bench gpu check lint format types experiments ui \
    worker prefect-env stop install lock audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# `make run train.epochs=3` would run, without that value
STRAY := $(filter download.% normalize.% train.% evaluate.%,$(.VARIABLES))

# a path as it was given, whatever make and the shell would make of its characters
export IMAGES_FOLDER := $(value IMAGES)

run: $(INSTALLED) ## run the flow: make run RECIPE=cifar10_lenet SET="train.epochs=3"; make run IMAGES="/my photos"
	@if [ -n "$(STRAY)" ]; then echo 'error: found $(STRAY); allowed: in SET, as in make run SET="train.epochs=3"' >&2; exit 2; fi
	@$(BIN)/python -m flows.train_classifier $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(IMAGES_FOLDER),--images "$$IMAGES_FOLDER") \
	    $(foreach value,$(SET),--set "$(value)")

test: $(INSTALLED_DEV) ## run all tests (10 minutes on 2 cores)
	$(BIN)/python -m pytest $(or $(PYTEST),$(WORKERS) 3)

test-quick: $(INSTALLED_DEV) ## run the tests without servers and trainings in processes of their own (75 seconds)
	$(BIN)/python -m pytest -m "not slow" $(or $(PYTEST),$(WORKERS) 2)

coverage: $(INSTALLED_DEV) ## measure which lines the quick tests run; fails below the floor (2 minutes)
	@rm -rf .cache/coverage && mkdir -p .cache/coverage
	$(BIN)/python -m coverage run -m pytest -m "not slow" $(or $(PYTEST),$(WORKERS) 2)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

faults: $(INSTALLED_DEV) ## kill trainings 200 times, all over their lives, and compare what comes out (10 minutes)
	@$(BIN)/python -m tests.faults.harness --kills 200

check-bits: $(INSTALLED_DEV) ## compare the bits of short trainings with those on emulated CPUs; needs qemu-user (20 minutes)
	@$(BIN)/python -m tests.bits.check

results: $(INSTALLED) ## train the README's recipes with five seeds, compare with its figures: make results RECIPE=digits
	@$(BIN)/python -m benchmarks.results $(RECIPE) $(if $(IMAGES_FOLDER),--images "$$IMAGES_FOLDER") \
	    $(foreach value,$(SET),--set "$(value)")

bench: $(INSTALLED_DEV) ## measure against what people would use instead (CPU; an hour)
	@$(BIN)/python -m benchmarks $(if $(IMAGES_FOLDER),--images "$$IMAGES_FOLDER")

gpu: $(INSTALLED) ## check and measure on a GPU, in 8 minutes: make gpu IMAGES=<tree or packed file>
	@$(BIN)/python -m benchmarks.gpu $(if $(IMAGES_FOLDER),--images "$$IMAGES_FOLDER")

check: lint types test ## all that CI checks: lint, format, types, tests

lint: $(INSTALLED_DEV) ## find mistakes, misspellings and unformatted code; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z | xargs -0 $(BIN)/codespell

format: $(INSTALLED_DEV) ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED_DEV) ## check the types, strictly
	$(BIN)/mypy

experiments: $(INSTALLED) ## list the experiments since the last commit: metrics, and parameters that differ
	@$(BIN)/python -m flows.experiments

ui: $(INSTALLED) ## serve MLflow's and Prefect's pages until Ctrl-C; ports: MLFLOW_PORT, PREFECT_PORT
	@$(BIN)/python -m flows.ui

worker: $(INSTALLED) ## register the deployments (prefect.yaml) and run them until Ctrl-C
	@$(BIN)/python -m flows.worker

prefect-env: $(INSTALLED) ## what a shell needs for the prefect command: eval "$(make prefect-env)"
	@$(BIN)/python -m flows.worker --env

stop: ## stop the Prefect server that `make run` left running, and the worker and pages that use it
	@if [ -e $(INSTALLED) ]; then $(BIN)/python -m flows.server stop; fi

install: $(INSTALLED) ## make .venv with the locked packages; extras: make install EXTRAS="s3 postgresql"
ifneq ($(strip $(EXTRAS)),)
	@for extra in $(EXTRAS); do touch ".venv/.with-$$extra"; done
	@$(SYNC)
endif

# The stamp comes last: an interrupted installation is resumed.
$(INSTALLED): $(LOCKS) requirements/uv.lock pyproject.toml
	@command -v git >/dev/null || { echo "error: git: not found; install it" >&2; exit 2; }
	@if [ -L .venv ] && [ ! -d .venv/ ]; then \
	    echo "error: .venv is a link to $$(readlink .venv), which is no folder; make that folder, or remove .venv" >&2; exit 2; fi
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; exit; fi; \
	python=; for candidate in "$(PYTHON)" python3 python; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11 or newer with venv found; install one, or name it: make run PYTHON=/path/to/python3.11" >&2; exit 2; fi; \
	mkdir -p .venv && "$$python" -m venv "$$(cd .venv && pwd -P)"
	@echo "Installing the locked packages into .venv (about 6 GB, once) …" >&2
	@$(PIP_INSTALL) -r requirements/uv.lock
	@$(MAKE_RELOCATABLE); $(SYNC) $$reinstall
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements/dev.lock
	@echo "Installing the packages for tests and benchmarks into .venv …" >&2
	@touch .venv/.with-dev && $(SYNC)
	@touch $@

# pip, uv and the downloads (datasets/fetch.py) are to trust the certificates, a file or a folder, that the user names,
# else the system's, which a company's TLS inspection needs, where the system has any; pip does so by itself from 24.2 on,
# which Python 3.11 does not bring.
CERTIFICATES = certificates=$$($(BIN)/python -c 'import os, pathlib, ssl, sys; \
    names = "SSL_CERT_FILE PIP_CERT REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_DIR".split(); \
    system = ssl.get_default_verify_paths(); folder = system.capath or ""; \
    found = system.cafile or (folder if folder and any(pathlib.Path(folder).glob("*.0")) else ""); \
    print(next(filter(None, map(os.environ.get, names)), found if sys.platform == "linux" else ""))')

PIP_INSTALL = $(CERTIFICATES); [ -z "$$certificates" ] || export PIP_CERT="$$certificates"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes

# Install exactly the packages of base.lock, uv itself, and the locks that `.venv/.with-*` name. Where there is no home
# that can be written, uv does without a cache.
SYNC = locks=; for chosen in .venv/.with-*; do lock="requirements/$${chosen\#\#*.with-}.lock"; \
	    if [ -e "$$lock" ]; then locks="$$locks $$lock"; fi; done; \
	[ -w "$${HOME:-/nonexistent}" ] || export UV_NO_CACHE=true; \
	$(CERTIFICATES); if [ -d "$$certificates" ]; then export SSL_CERT_DIR="$$certificates"; \
	elif [ "$$certificates" ]; then export SSL_CERT_FILE="$$certificates"; fi; \
	: "$${UV_SYSTEM_CERTS:=$$($(BIN)/python -c 'import ssl; print(bool(ssl.create_default_context().get_ca_certs()))')}"; \
	VIRTUAL_ENV="$$PWD/.venv" UV_SYSTEM_CERTS="$$UV_SYSTEM_CERTS" \
	    $(BIN)/uv pip sync --quiet --require-hashes requirements/base.lock requirements/uv.lock $$locks

# Let .venv/bin/dvc and the other scripts, and activate, use the environment that they lie in, also after the project was
# moved or copied. Of an environment that was made before, the scripts are written anew.
MAKE_RELOCATABLE = reinstall=; if ! grep -qs '^relocatable = true' .venv/pyvenv.cfg; then reinstall=--reinstall; \
	    $(BIN)/uv --no-cache venv --quiet --relocatable --allow-existing --python "$$PWD/$(BIN)/python" .venv || exit; fi

COMPILE = $(BIN)/uv pip compile --universal --generate-hashes --no-header --no-emit-index-url --quiet

# One resolution of everything, from which each lock takes its part: base.lock, and what the others add to it.
lock: $(INSTALLED) ## resolve the locks in requirements/ anew from pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(PIP_INSTALL) -r requirements/uv.lock
	@set -e; everything=.venv/everything.lock; \
	cat requirements/base.lock $(ALL_EXTRAS:%=requirements/%.lock) requirements/dev.lock > $$everything; \
	$(COMPILE) pyproject.toml --all-extras --group dev --output-file $$everything; \
	$(COMPILE) pyproject.toml --constraint $$everything --output-file requirements/base.lock; \
	base=$$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements/base.lock); \
	for name in dev $(ALL_EXTRAS); do \
	    case $$name in dev) part="--group dev";; *) part="--extra $$name";; esac; \
	    $(COMPILE) pyproject.toml --constraint $$everything $$part $$base --output-file requirements/$$name.lock; \
	done; \
	for name in base dev $(ALL_EXTRAS); do \
	    sed -i.old -e '/^#/d' -e '/^    #\( via\|  \) -c /d' requirements/$$name.lock; rm requirements/$$name.lock.old; \
	done
	$(COMPILE) --group pyproject.toml:audit --output-file requirements/audit.lock

audit: $(INSTALLED) ## look the locked packages up among known vulnerabilities; needs internet
	@$(BIN)/python -m venv --without-pip .venv/audit
	@VIRTUAL_ENV="$$PWD/.venv/audit" $(BIN)/uv pip sync --quiet --require-hashes requirements/audit.lock || \
	    { echo "error: the auditor cannot be installed; nothing is known of the packages: try again with internet" >&2; exit 75; }
	@.ci/audit

clean: stop ## remove .venv and caches; models, data, runs and experiments stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
	find pipeline flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
