# `make help` lists the targets.

PYTHON ?= python3.11
RECIPE ?= digits
SET ?=
# pytest's own options, as in: make test PYTEST="-k train"
PYTEST ?= -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
SHELL := /bin/sh
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
ALL_EXTRAS := s3 gs azure ssh postgresql
EXTRAS ?=
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# none of the tools phones home
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help run test test-quick faults bench check lint format types ui worker prefect-env stop install lock audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# `make run train.epochs=3` would run, without that value
STRAY := $(filter download.% normalize.% train.% evaluate.%,$(.VARIABLES))

run: $(INSTALLED) ## run the flow: make run RECIPE=cifar10_lenet SET="train.epochs=3 train.seed=1"
	@if [ -n "$(STRAY)" ]; then echo 'error: found $(STRAY); allowed: in SET, as in make run SET="train.epochs=3"' >&2; exit 2; fi
	@$(BIN)/python -m flows.train_classifier --recipe "$(RECIPE)" $(foreach value,$(SET),--set "$(value)")

test: $(INSTALLED_DEV) ## run all tests (less than 8 minutes on 2 cores)
	$(BIN)/python -m pytest $(PYTEST)

test-quick: $(INSTALLED_DEV) ## run the tests without servers and trainings in processes of their own (a minute)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST)

faults: $(INSTALLED_DEV) ## kill trainings 200 times, all over their lives, and compare what comes out (10 minutes)
	@$(BIN)/python -m tests.faults.harness --kills 200

bench: $(INSTALLED_DEV) ## measure against what people would use instead (CPU; an hour)
	@$(BIN)/python -m benchmarks $(if $(IMAGES),--images "$(IMAGES)")

check: lint types test ## all that CI checks: lint, format, types, tests

lint: $(INSTALLED_DEV) ## find mistakes and unformatted code; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_DEV) ## format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED_DEV) ## check the types, strictly
	$(BIN)/mypy

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
	@for extra in $(EXTRAS); do case " $(ALL_EXTRAS) " in *" $$extra "*) ;; *) \
	    echo "error: EXTRAS: found $$extra; allowed: $(ALL_EXTRAS)" >&2; exit 2;; esac; done
	@for extra in $(EXTRAS); do touch ".venv/.with-$$extra"; done
	@$(SYNC)
endif

# The stamp comes last: an interrupted installation is resumed.
$(INSTALLED): requirements/base.lock requirements/uv.lock pyproject.toml
	@command -v git >/dev/null || { echo "error: git: not found; install it" >&2; exit 2; }
	@python=; for candidate in "$(PYTHON)" python3 python; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11 or newer with venv found; install one, or name it: make run PYTHON=/path/to/python3.11" >&2; exit 2; fi; \
	"$$python" -m venv .venv
	@echo "Installing the locked packages into .venv (about 6 GB, once) …" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock
	@$(SYNC)
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements/dev.lock
	@echo "Installing the packages for tests and benchmarks into .venv …" >&2
	@touch .venv/.with-dev && $(SYNC)
	@touch $@

# Install exactly the packages of base.lock and of the locks that `.venv/.with-*` name. Like pip, uv is to trust the
# system's certificates, which a company's TLS inspection needs; where a system has none, uv's own must do.
SYNC = locks=; for chosen in .venv/.with-*; do \
	    [ -e "$$chosen" ] && locks="$$locks requirements/$${chosen\#\#*.with-}.lock"; done; \
	: "$${UV_SYSTEM_CERTS:=$$($(BIN)/python -c 'import ssl; print(bool(ssl.create_default_context().get_ca_certs()))')}"; \
	VIRTUAL_ENV="$(CURDIR)/.venv" UV_SYSTEM_CERTS="$$UV_SYSTEM_CERTS" \
	    $(BIN)/uv pip sync --quiet --require-hashes requirements/base.lock $$locks

COMPILE = $(BIN)/uv pip compile --universal --generate-hashes --no-header --no-emit-index-url --quiet

# One resolution of everything, from which each lock takes its part: base.lock, and what the others add to it.
lock: $(INSTALLED) ## resolve the locks in requirements/ anew from pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock
	@everything=$$(mktemp) && trap 'rm -f "$$everything"' EXIT && set -e; \
	cat requirements/base.lock requirements/dev.lock > "$$everything"; \
	$(COMPILE) pyproject.toml --all-extras --group dev --output-file "$$everything"; \
	$(COMPILE) pyproject.toml --constraint "$$everything" --output-file requirements/base.lock; \
	base=$$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements/base.lock); \
	for name in dev $(ALL_EXTRAS); do \
	    case $$name in dev) part="--group dev";; *) part="--extra $$name";; esac; \
	    $(COMPILE) pyproject.toml --constraint "$$everything" $$part $$base --output-file requirements/$$name.lock; \
	    sed -i.old '/^#/d' requirements/$$name.lock && rm requirements/$$name.lock.old; \
	done
	$(COMPILE) --group pyproject.toml:audit --output-file requirements/audit.lock

audit: $(INSTALLED) ## look the locked packages up among known vulnerabilities; needs internet
	@$(BIN)/python -m venv --without-pip .venv/audit
	@VIRTUAL_ENV="$(CURDIR)/.venv/audit" $(BIN)/uv pip sync --quiet --require-hashes requirements/audit.lock || \
	    { echo "error: the auditor cannot be installed; nothing is known of the packages: try again with internet" >&2; exit 75; }
	@.ci/audit

clean: stop ## remove .venv and caches; models, data, runs and experiments stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
	find pipeline flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
