# Two commands: `make quickstart` and `make test`. Each sets up everything it needs in .venv.
.PHONY: quickstart test clean
SHELL := /bin/bash
PYTHON ?= python3

quickstart: .venv/.ready
	. launch/env.sh && .venv/bin/python -m rung.launch quickstart

test: .venv/.ready-test
	bash tests/check.sh

# torch first and pinned: an unpinned request from a dependency would bring in the newest CUDA build.
.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Rung needs Python >= 3.11; found $$($(PYTHON) --version). Run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "cannot create .venv; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	.venv/bin/python -m pip install --quiet torch==2.13.0
	@touch $@

.venv/.ready: .venv/.torch pyproject.toml
	DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.ready-test: .venv/.ready
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[generate,test]"
	@touch $@

clean:
	rm -rf .venv build runs
