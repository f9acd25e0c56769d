# `make help` lists the targets.

PYTHON ?= python3.11
# These seven are read from the command line only, as in `make run IMAGES=…`: the environment, of a CI above all, may use
# such common names for something else.
RECIPE :=
SET :=
IMAGES :=
SEEDS :=
EXTRAS :=
MODEL :=
PORT :=
# pytest's own options, as in: make test PYTEST="-k train"
PYTEST ?=
# `make test` uses one process more than there are cores (2), since the slow tests often wait for servers
WORKERS := --dist loadfile --no-loadscope-reorder -n

.DEFAULT_GOAL := help
SHELL := /bin/sh
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
ALL_EXTRAS := s3 gs azure ssh postgresql
ifneq ($(filter-out $(ALL_EXTRAS),$(EXTRAS)),)
$(error EXTRAS: found $(filter-out $(ALL_EXTRAS),$(EXTRAS)); allowed: $(ALL_EXTRAS); correct EXTRAS)
endif
# .venv/.with-NAME records a lock that `make install EXTRAS=…` or `make test` has chosen; later installations include it
LOCKS := requirements/base.lock $(wildcard $(patsubst .venv/.with-%,requirements/%.lock,$(wildcard .venv/.with-*)))
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# without compiled modules on the disk, each of the many processes would compile the packages again
unexport PYTHONDONTWRITEBYTECODE
# no tool sends usage statistics
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help run test test-quick coverage faults check-bits results bench gpu check lint format types experiments ui \
    serve worker prefect-env stop install lock audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# make would accept `make run train.epochs=3` and ignore the value; `run` refuses it
MISPLACED := $(filter download.% normalize.% train.% evaluate.%,$(.VARIABLES))

# the paths as the user wrote them: neither make nor the shell expands characters in them
export IMAGES_FOLDER := $(value IMAGES)
export SERVED_MODEL := $(value MODEL)

run: $(INSTALLED) ## run the flow: make run RECIPE=cifar10_lenet SET="train.epochs=3" SEEDS=5; make run IMAGES="/my photos"
	@if [ -n "$(MISPLACED)" ]; then \
	    echo 'error: found $(MISPLACED) as a variable of make; allowed: in SET; run `make run SET="train.epochs=3"`' >&2; exit 2; fi
	@$(BIN)/python -m flows.train_classifier $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(IMAGES_FOLDER),--images "$$IMAGES_FOLDER") \
	    $(if $(SEEDS),--seeds "$(SEEDS)") $(foreach value,$(SET),--set "$(value)")

test: $(INSTALLED_DEV) ## run all tests (19 minutes on 2 cores)
	$(BIN)/python -m pytest $(or $(PYTEST),$(WORKERS) 3)

test-quick: $(INSTALLED_DEV) ## run the tests that start neither servers nor trainings in separate processes (3 minutes)
	$(BIN)/python -m pytest -m "not slow" $(or $(PYTEST),$(WORKERS) 2)

coverage: $(INSTALLED_DEV) ## measure which lines the quick tests run, and fail below the floor (2 minutes)
	@rm -rf .cache/coverage && mkdir -p .cache/coverage
	$(BIN)/python -m coverage run -m pytest -m "not slow" $(or $(PYTEST),$(WORKERS) 2)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

faults: $(INSTALLED_DEV) ## kill trainings 200 times at different moments, resume them, compare the results (10 minutes)
	@$(BIN)/python -m tests.faults.harness --kills 200

check-bits: $(INSTALLED_DEV) ## compare short trainings bit for bit with emulated CPUs; needs qemu-user (20 minutes)
	@$(BIN)/python -m tests.bits.check

results: $(INSTALLED) ## train the README's recipes with five seeds and compare with its figures: make results RECIPE=digits
	@$(BIN)/python -m benchmarks.results $(RECIPE) $(if $(IMAGES_FOLDER),--images "$$IMAGES_FOLDER") \
	    $(foreach value,$(SET),--set "$(value)")

bench: $(INSTALLED_DEV) ## measure the pipeline and its alternatives on the CPU (an hour)
	@$(BIN)/python -m benchmarks $(if $(IMAGES_FOLDER),--images "$$IMAGES_FOLDER")

gpu: $(INSTALLED) ## check and measure on a GPU (8 minutes): make gpu IMAGES=<folder or packed file>
	@$(BIN)/python -m benchmarks.gpu $(if $(IMAGES_FOLDER),--images "$$IMAGES_FOLDER")

check: lint types test ## run all checks of CI: lint, format, types, tests

lint: $(INSTALLED_DEV) ## report mistakes, misspellings and unformatted code; changes no file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z | xargs -0 $(BIN)/codespell

format: $(INSTALLED_DEV) ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED_DEV) ## check the types with mypy in strict mode
	$(BIN)/mypy

experiments: $(INSTALLED) ## list the experiments since the last commit: metrics, and parameters that differ
	@$(BIN)/python -m flows.experiments

ui: $(INSTALLED) ## serve MLflow's and Prefect's pages until Ctrl-C; ports: MLFLOW_PORT, PREFECT_PORT
	@$(BIN)/python -m flows.ui

serve: $(INSTALLED) ## answer photographs posted by curl until Ctrl-C, by the champion: make serve MODEL=runs:/ID/model PORT=8080
	@$(BIN)/python -m pipeline.serve $(if $(SERVED_MODEL),--model "$$SERVED_MODEL") $(if $(PORT),--port "$(PORT)")

worker: $(INSTALLED) ## register the deployments (prefect.yaml) and run them until Ctrl-C
	@$(BIN)/python -m flows.worker

prefect-env: $(INSTALLED) ## print the variables for the prefect command: eval "$(make prefect-env)"
	@$(BIN)/python -m flows.worker --env

stop: ## stop the project's Prefect server, which `make run` leaves running, and `make worker` and `make ui`
	@if [ -e $(INSTALLED) ]; then $(BIN)/python -m flows.server stop; fi

install: $(INSTALLED) ## install the locked packages into .venv; extras: make install EXTRAS="s3 postgresql"
ifneq ($(strip $(EXTRAS)),)
	@for extra in $(EXTRAS); do touch ".venv/.with-$$extra"; done
	@$(SYNC)
endif

# The stamp is written last, so that the next call resumes an interrupted installation.
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

# Print the certificates, a file or a folder, that pip and uv trust: those that the user names, else those of Linux, which
# a company's TLS inspection needs; nothing where there are none. pip does so by itself from version 24.2 on, but
# Python 3.11 has an older one. The downloads choose in the same way (pipeline/datasets/fetch.py).
CERTIFICATES = certificates=$$($(BIN)/python -c 'import os, pathlib, ssl, sys; \
    names = "SSL_CERT_FILE PIP_CERT REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_DIR".split(); \
    system = ssl.get_default_verify_paths(); folder = system.capath or ""; \
    found = system.cafile or (folder if folder and any(pathlib.Path(folder).glob("*.0")) else ""); \
    print(next(filter(None, map(os.environ.get, names)), found if sys.platform == "linux" else ""))')

PIP_INSTALL = $(CERTIFICATES); [ -z "$$certificates" ] || export PIP_CERT="$$certificates"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes

# Install exactly the packages of base.lock, uv.lock and the locks that `.venv/.with-*` name. If the home folder cannot be
# written, uv runs without a cache.
SYNC = locks=; for chosen in .venv/.with-*; do lock="requirements/$${chosen\#\#*.with-}.lock"; \
	    if [ -e "$$lock" ]; then locks="$$locks $$lock"; fi; done; \
	[ -w "$${HOME:-/nonexistent}" ] || export UV_NO_CACHE=true; \
	$(CERTIFICATES); if [ -d "$$certificates" ]; then export SSL_CERT_DIR="$$certificates"; \
	elif [ "$$certificates" ]; then export SSL_CERT_FILE="$$certificates"; fi; \
	: "$${UV_SYSTEM_CERTS:=$$($(BIN)/python -c 'import ssl; print(bool(ssl.create_default_context().get_ca_certs()))')}"; \
	VIRTUAL_ENV="$$PWD/.venv" UV_SYSTEM_CERTS="$$UV_SYSTEM_CERTS" \
	    $(BIN)/uv pip sync --quiet --require-hashes requirements/base.lock requirements/uv.lock $$locks

# Make .venv/bin/dvc, the other scripts and `activate` use the environment that contains them, also after the project was
# moved or copied. In an environment that was made without this, the scripts are written again.
MAKE_RELOCATABLE = reinstall=; if ! grep -qs '^relocatable = true' .venv/pyvenv.cfg; then reinstall=--reinstall; \
	    $(BIN)/uv --no-cache venv --quiet --relocatable --allow-existing --python "$$PWD/$(BIN)/python" .venv || exit; fi

COMPILE = $(BIN)/uv pip compile --universal --generate-hashes --no-header --no-emit-index-url --quiet

# All packages are resolved together; base.lock gets those of the project, and the other locks what they add to them.
lock: $(INSTALLED) ## resolve the locks in requirements/ again from pyproject.toml
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

audit: $(INSTALLED) ## check the locked packages for known vulnerabilities; needs internet
	@$(BIN)/python -m venv --without-pip .venv/audit
	@VIRTUAL_ENV="$$PWD/.venv/audit" $(BIN)/uv pip sync --quiet --require-hashes requirements/audit.lock || \
	    { echo "error: pip-audit cannot be installed, so the packages were not checked; try again with internet" >&2; exit 75; }
	@.ci/audit

clean: stop ## remove .venv and the caches of tools; models, data, runs and experiments stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .cache/coverage
	find pipeline flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
