# nexhb: `make run` needs python3 (3.11 or newer) and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOCK   := requirements.lock
# By hash, all of it: nothing is resolved, and what builds nexhb itself is of the lock too.
PIP    := $(BIN)/pip install -q --disable-pip-version-check --require-hashes -r packaging/build.lock
SELF   := $(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
COMPILE := $(VENV)-lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links
SWIFT  := .venv-swift
PREFIX  ?= /opt/nexhb
DESTDIR ?=

.PHONY: help run demo test lint audit fuzz faults timelapse bench bench-compare bench-curve bench-status bench-daemons install uninstall lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nexhb needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "This Python cannot make a virtual environment. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml packaging/build.lock $(LOCK)
	$(PIP) -r $(LOCK)
	$(SELF)
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml packaging/build.lock tests/requirements.lock
	$(PIP) -r tests/requirements.lock
	$(SELF)
	@touch $@ $(VENV)/.run

$(VENV)/.compare: $(BIN)/python pyproject.toml packaging/build.lock bench/requirements.lock
	$(PIP) -r bench/requirements.lock
	$(SELF)
	@touch $@ $(VENV)/.test $(VENV)/.run

# The S3 server of the tests, in an environment of its own.
$(SWIFT)/.made: $(VENV)/.test tests/swift-requirements.txt
	$(BIN)/python -m tests.swift
	@touch $@

run: $(VENV)/.run ## run the daemon in the foreground on the embedded PostgreSQL
	@$(BIN)/nexhb serve --welcome

demo: $(VENV)/.test ## run the daemon with a simulated fleet of 2,000 devices for a minute, and check every row
	@$(BIN)/python -m bench demo

test: $(VENV)/.test $(SWIFT)/.made ## run every test
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test ## ruff, mypy strict, import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

audit: $(VENV)/.test ## known vulnerabilities of the locked dependencies; needs the Internet, and fails without it
	@$(BIN)/python -m tests.audit

fuzz: $(VENV)/.test ## a million malformed bodies against a real daemon (BODIES=, SEED=)
	@$(BIN)/python -m tests.fuzz --bodies $(or $(BODIES),1000000) --seed $(or $(SEED),1)

faults: $(VENV)/.test ## break everything under simulated devices and compare (SEED= the first, SEEDS= how many)
	@$(BIN)/python -m tests.faults --seeds $(or $(SEED),1)-$$(($(or $(SEED),1) + $(or $(SEEDS),1) - 1))

timelapse: $(VENV)/.test ## 200 days of a fleet in minutes, with every fault, and every heartbeat found again (SEED=)
	@$(BIN)/python -m tests.timelapse --days 200 --seed $(or $(SEED),1)

bench: $(VENV)/.test ## run every scenario; results in bench/results/
	@$(BIN)/python -m bench all

bench-compare: $(VENV)/.compare ## nexhb beside floors and peers in one run, eight minutes; writes docs/performance.md (QUICK=1: two minutes)
	@$(BIN)/python -m bench compare $(if $(QUICK),--quick)

bench-curve: $(VENV)/.test ## 2,000 to 500,000 devices and the ceiling, five minutes; writes docs/performance.md (QUICK=1: two minutes)
	@$(BIN)/python -m bench curve $(if $(QUICK),--quick)

bench-status: $(VENV)/.test ## a last status of a million devices over HTTP, and its growth, four minutes; writes docs/performance.md (QUICK=1)
	@$(BIN)/python -m bench status $(if $(QUICK),--quick)

bench-daemons: $(VENV)/.test ## 1, 2 and 3 daemons on one PostgreSQL, on one host and on two, two minutes; writes docs/performance.md (QUICK=1)
	@$(BIN)/python -m bench daemons $(if $(QUICK),--quick)

install: ## into PREFIX=/opt/nexhb, with systemd units and /etc/nexhb (DESTDIR= for packagers)
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PYTHON='$(PYTHON)' LOCK='$(LOCK)' PIP_ARGS='$(PIP_ARGS)' packaging/install install

uninstall: ## what install made; never the configuration or the data
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' packaging/install uninstall

lock: ## write the lock files anew from pyproject.toml: of the daemon, the tests, the comparison, the build, the tests' S3 server
	@$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip install -q uv
	@printf 'hatchling>=1.27\neditables>=0.5\n' >$(VENV)-lock/build.in
	@printf 'swift==2.38.3\npyeclib==1.8.0\n' >$(VENV)-lock/swift.in
	@$(COMPILE) --extra embedded --extra test --extra compare -o bench/requirements.lock pyproject.toml $(VENV)-lock/build.in
	@$(COMPILE) -c bench/requirements.lock --extra embedded --extra test -o tests/requirements.lock pyproject.toml
	@$(COMPILE) -c bench/requirements.lock --extra embedded -o $(LOCK) pyproject.toml
	@$(COMPILE) -c bench/requirements.lock -o packaging/build.lock $(VENV)-lock/build.in
	@$(COMPILE) -o tests/swift-requirements.txt $(VENV)-lock/swift.in
	@rm -rf $(VENV)-lock

clean: ## remove the virtual environment and caches (never the data)
	rm -rf $(VENV) $(SWIFT) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
