# nexhb. `make run` needs only python3 (3.11 or newer).
PYTHON ?= python3
VENV   := .venv
ifneq ($(origin PYTHON),file)
# If .venv has another Python version, `make test PYTHON=python3.13` creates .venv-3.13.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(if $(wildcard $(VENV)/pyvenv.cfg),$(shell grep '^version = $(VERSION)\.' $(VENV)/pyvenv.cfg),new),)
VENV := .venv-$(VERSION)
endif
endif
BIN    := $(VENV)/bin
LOCK   := requirements.lock
# Every package is installed by hash, including the tools that build nexhb; pip resolves nothing.
PIP    := $(BIN)/pip install -q --disable-pip-version-check --require-hashes -r packaging/build.lock
SELF   := $(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
COMPILE := $(VENV)-lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links
SWIFT  := .venv-swift
PREFIX  ?= /opt/nexhb
DESTDIR ?=

.PHONY: help run demo test lint audit fuzz faults kills timelapse drama bench bench-compare bench-curve bench-status bench-watch bench-daemons install uninstall lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^##@/ {print "\n" substr($$0, 5)} /^[a-z-]+:.*## / {printf "  %-15s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nexhb needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "This Python cannot create a virtual environment. On Debian: apt-get install python3-venv"; exit 1; }
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

# The tests' S3 server has its own environment.
$(SWIFT)/.made: $(VENV)/.test tests/swift-requirements.txt
	$(BIN)/python -m tests.swift
	@touch $@

##@ Run
run: $(VENV)/.run ## run the daemon in the foreground on the embedded PostgreSQL
	@$(BIN)/nexhb serve --welcome

demo: $(VENV)/.test ## run the daemon with 2,000 simulated devices for a minute, and check every row
	@$(BIN)/python -m bench demo

##@ Change
# The processes write bytecode even if the environment forbids it: without bytecode, each of them compiles every test
# again at each run.
test: $(VENV)/.test $(SWIFT)/.made ## run every test (PYTHON=python3.13: with another Python version)
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test ## check with ruff, mypy (strict) and the import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

lock: ## resolve pyproject.toml again and write every lock file
	@$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip install -q uv
	@printf 'hatchling>=1.27\neditables>=0.5\n' >$(VENV)-lock/build.in
	@printf 'swift==2.38.3\npyeclib==1.8.0\n' >$(VENV)-lock/swift.in
	@$(COMPILE) --extra embedded --extra test --extra compare -o bench/requirements.lock pyproject.toml $(VENV)-lock/build.in
	@$(COMPILE) -c bench/requirements.lock --extra embedded --extra test -o tests/requirements.lock pyproject.toml
	@$(COMPILE) -c bench/requirements.lock --extra embedded -o $(LOCK) pyproject.toml
	@$(COMPILE) -c bench/requirements.lock -o packaging/build.lock $(VENV)-lock/build.in
	@$(COMPILE) -o tests/swift-requirements.txt $(VENV)-lock/swift.in
	@rm -rf $(VENV)-lock

clean: ## remove the virtual environments and caches (never the data)
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build

##@ Prove
fuzz: $(VENV)/.test ## send a million malformed bodies to a real daemon (BODIES=, SEED=)
	@$(BIN)/python -m tests.fuzz --bodies $(or $(BODIES),1000000) --seed $(or $(SEED),1)

faults: $(VENV)/.test ## inject faults under simulated devices, then compare every row (SEED= the first, SEEDS= how many)
	@$(BIN)/python -m tests.faults --seeds $(or $(SEED),1)-$$(($(or $(SEED),1) + $(or $(SEEDS),1) - 1))

kills: $(VENV)/.test ## kill daemon, database and receiver while messages are delivered, then compare what arrived (SEED=, KILLS=)
	@$(BIN)/python -m tests.faults.messages --seed $(or $(SEED),1) --kills $(or $(KILLS),200)

timelapse: $(VENV)/.test ## simulate 200 days of a fleet in minutes with every kind of fault, then find every heartbeat (SEED=)
	@$(BIN)/python -m tests.timelapse --days 200 --seed $(or $(SEED),1)

drama: $(VENV)/.test ## simulate 500 kiosks with faults for two weeks, and compare what nexhb records and sends with the script (SEED=, DAYS=)
	@$(BIN)/python -m bench.sim --seed $(or $(SEED),1) --days $(or $(DAYS),14)

audit: $(VENV)/.test ## list known vulnerabilities of the locked dependencies; needs the Internet, and fails without it
	@$(BIN)/python -m tests.audit

##@ Measure
bench: $(VENV)/.test ## run every scenario; writes bench/results/
	@$(BIN)/python -m bench all

bench-compare: $(VENV)/.compare ## measure nexhb beside a bare handler, COPY and other implementations, 7 minutes; writes docs/performance.md (QUICK=1: 2 minutes)
	@$(BIN)/python -m bench compare $(if $(QUICK),--quick)

bench-curve: $(VENV)/.test ## measure 2,000 to 500,000 devices and the highest rate, 5 minutes; writes docs/performance.md (QUICK=1: 2)
	@$(BIN)/python -m bench curve $(if $(QUICK),--quick)

bench-status: $(VENV)/.test ## measure the lists of a million devices over HTTP, 1 minute; writes docs/performance.md (QUICK=1: less)
	@$(BIN)/python -m bench status $(if $(QUICK),--quick)

bench-watch: $(VENV)/.test ## measure the watcher of a million devices, 8 minutes; writes docs/performance.md (QUICK=1: less)
	@$(BIN)/python -m bench watch $(if $(QUICK),--quick)

bench-daemons: $(VENV)/.test ## measure 1, 2 and 3 daemons on one PostgreSQL, 1 minute; writes docs/performance.md (QUICK=1: less)
	@$(BIN)/python -m bench daemons $(if $(QUICK),--quick)

##@ Install
install: ## install into PREFIX=/opt/nexhb, with systemd units and /etc/nexhb (DESTDIR= for packagers)
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PYTHON='$(PYTHON)' LOCK='$(LOCK)' PIP_ARGS='$(PIP_ARGS)' packaging/install install

uninstall: ## remove what install created; never the configuration or the data
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' packaging/install uninstall
