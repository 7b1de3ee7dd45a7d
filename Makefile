# make demo        the main job on the bundled checkpoint: figure, table and numbers
# make test        the default tests (no GPU, no network, minutes on two cores)
# make test-slow   the tests that `make test` leaves out
# make bench       timings side by side with other implementations, as a table
# make matrix      the default tests on every Python and at both ends of the version bounds; tests/matrix.md is its table
# make check       formatter, linter, type checker, default tests
# make format      let the formatter and the linter mend what they can
# make figure      redraw the figures of the README
# make clean       remove .venv, caches and build products; results in out/ stay
#
# Needs Python >= 3.11 and make. The first target that runs installs into .venv what it needs, in the exact versions
# of constraints.txt; later ones start at once, until pyproject.toml or constraints.txt changes.
#
# PYTHON=python3.12      the interpreter to build .venv from
# TORCH_FLAGS='...'      further arguments for `pip install torch`, such as the index of a CPU or CUDA build
# PYTEST_ARGS='-n 0 -x'  further arguments for pytest
# CELLS='3.12-lowest'    some of the cells of `make matrix`; its environments (5 GB each, or 2) stay in MATRIX=.matrix

PYTHON ?= python3
VENV := .venv
TORCH_FLAGS ?=
PYTEST_ARGS ?=
CELLS ?=
MATRIX ?= .matrix

PY := $(VENV)/bin/python
# Compiled on first import: most of the thousands of modules that come along are never imported.
PIP_INSTALL := $(PY) -m pip --disable-pip-version-check --no-input install --no-compile -c constraints.txt
PYTEST := $(PY) -m pytest

# What is imported is compiled once and kept, whatever the caller has set: without that every start takes 8 s more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow bench matrix check format figure clean

demo: $(VENV)/.installed
	$(PY) -m analyses.ablate_delta --task linreg
	@figure=$$(ls -t out/ablate_delta/*/figure.png 2>/dev/null | head -n 1); \
	test -n "$$figure" || { echo "error: the command left no out/ablate_delta/*/figure.png" >&2; exit 1; }; \
	echo "figure: $$figure"

test: $(VENV)/.installed-test
	$(PYTEST) -n 2 --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-slow
	$(PYTEST) -m "slow and not benchmark" $(PYTEST_ARGS)

bench: $(VENV)/.installed-test
	GOMP_SPINCOUNT=10000 $(PYTEST) tests/benchmarks -m benchmark -s --no-shape-checks $(PYTEST_ARGS)

matrix:
	$(PYTHON) tests/matrix.py $(CELLS) --folder $(MATRIX)

check: $(VENV)/.installed-test
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PYTEST) -n 2 --dist loadfile $(PYTEST_ARGS)

format: $(VENV)/.installed-test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

figure: demo
	cp "$$(ls -t out/ablate_delta/*/figure.png | head -n 1)" analyses/ablate_delta.png
	$(PY) -m analyses.zoo
	cp "$$(ls -t out/zoo/*/figure.png | head -n 1)" analyses/zoo.png
	@echo "README figures: analyses/ablate_delta.png analyses/zoo.png"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find hooks models interp analyses tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The set-up. Each step leaves its mark last, so an interrupted one starts over.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys' >/dev/null 2>&1 || { \
	    echo "error: no Python called $(PYTHON); name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: Python 3.11 or newer is needed and $(PYTHON) is" \
	    "$$($(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])'); name another:" \
	    "make PYTHON=python3.12" >&2; exit 1; }
	@echo "== set-up 1/3: virtual environment in $(VENV)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "error: $(PYTHON) cannot make a virtual environment (its venv or ensurepip module is missing;" \
	    "some systems keep them in a package of their own, such as python3-venv)" >&2; exit 1; }
	@touch $@

# torch goes first and alone, in the tested version: another package's open-ended `torch` could bring a newer build
# with gigabytes of GPU libraries. setuptools is pinned with it, to build this project without fetching a second one.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "== set-up 2/3: torch, the largest download"
	@$(PIP_INSTALL) $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	@echo "== set-up 3/3: what mambascope needs to run"
	@$(PIP_INSTALL) "$$(grep '^setuptools==' constraints.txt)"
	@$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "== set-up, tests: what the tests need on top"
	@$(PIP_INSTALL) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.installed-slow: $(VENV)/.installed-test
	@echo "== set-up, slow tests: Ray and xgboost, which only they use"
	@$(PIP_INSTALL) --no-build-isolation -e '.[test,cluster]' xgboost-cpu
	@touch $@
