# Each target works alone on a fresh machine: it first makes its own environment in .venv.
#
#   make demo         a tiny hybrid reads facts and answers questions about them
#   make test         the test suite            make test-slow   the tests that take minutes
#   make test-gpu     the tests that need a GPU, with the Python that PYTHON names
#   make lint         ruff, imports, types      make notebooks   run the notebooks
#   make docs         the site, in build/site   make bench       tiny operator benchmark
#   make clean        remove everything made here
#
#   make test JAX=0.11.2           the same with that jax, in an environment of its own
#   make test PYTHON=/path/python  with that Python (3.12 or newer)
#   make test ARGS="-k gka"        with these arguments added

JAX ?=
PYTHON ?=
ARGS ?=
VENV := .venv$(addprefix -jax,$(JAX))
PY := $(VENV)/bin/python
LIBRARY := $(VENV)/.installed
TOOLS := $(VENV)/.installed-dev
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check $(addprefix jax==,$(JAX))

# On a CPU XLA's triangular solves run in OpenBLAS, whose waiting threads starve the other workers.
export OPENBLAS_NUM_THREADS := 1

.PHONY: demo test test-slow test-gpu lint docs notebooks bench clean

demo: $(LIBRARY)
	$(VENV)/bin/hmf-jax demo $(ARGS)

# One worker per core (more than 8 only cost memory, each has eight fake devices); the tests of a
# file stay together, since they share compiled programs; the longest files first (tests/conftest.py).
test: $(TOOLS)
	$(PY) -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# In one process: these measure time and memory.
test-slow: $(TOOLS)
	$(PY) -m pytest -v -s -m slow $(ARGS)

# Machines with GPUs bring their own jax: no environment is made. Several workers, since compiling
# takes longer than running; memory is taken as needed. What XLA's products are compared with needs
# no tuning, which would take minutes.
test-gpu:
	XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_autotune_level=0 $(or $(PYTHON),python3) -m pytest -q -m gpu -p no:cacheprovider $(ARGS)

lint: $(TOOLS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/basedpyright --level error --pythonpath $(PY)

# Strict: a broken link or an unknown name in a docstring's cross reference is an error.
docs: $(TOOLS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict --site-dir build/site

# Two at a time, the longest first: they mostly compile, which one core does, and as quickly here as
# in the tests.
notebooks: export XLA_FLAGS := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
notebooks: $(TOOLS)
	@mkdir -p build/notebooks; ls -r notebooks/*.py | xargs -P 2 -I{} sh -c 'echo "running {}"; \
	  $(PY) -m jupytext --quiet --to ipynb --execute --run-path notebooks \
	    --output "build/notebooks/$$(basename {} .py).ipynb" "{}"'

bench: $(LIBRARY)
	$(PY) -m benchmarks.run --out build/bench.jsonl $(ARGS)

clean:
	rm -rf .venv .venv-jax* build dist .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A demo needs the library alone; everything else needs the development tools too.
$(LIBRARY): pyproject.toml | $(PY)
	$(INSTALL) -e .
	@touch $@

$(TOOLS): $(LIBRARY)
	$(INSTALL) -e '.[dev]'
	@touch $@

# Candidates are run, not only found: version managers leave shims for Pythons they do not have.
$(PY):
	@for python in $(PYTHON) python3.12 python3.13 python3.14 python3 python \
	    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' \
	      >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$("$$python" -c 'import sys; print(sys.executable)')"; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	if uv --version >/dev/null 2>&1; then exec uv venv --quiet --seed --python 3.12 $(VENV); fi; \
	echo "Found no Python 3.12 or newer that runs and has venv. Install one, for example with" >&2; \
	echo "  apt-get install python3.12-venv  |  brew install python@3.12  |  pyenv install 3.12" >&2; \
	echo "or install uv (it brings its own Python), or name one: make PYTHON=/path/to/python" >&2; \
	exit 1
