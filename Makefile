# make quickstart   the whole recipe on the bundled sample, in runs/quickstart/
# make compare      trains each task alone on the same labels, for the table of results
# make test         lint and the tests, those marked slow left out
# make test-all     lint and every test
# make docs         docs/ as a site, in runs/site/; make reference writes its generated pages anew
# make smoke        imports everything and trains one step (used for other Python versions)

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Each process takes neighbouring tests, so that files share what they set up, and steals at the end.
PYTEST = $(RUN) -m pytest -n 2 --dist worksteal

# What tests start in processes of their own, most of it from a folder of its own.
INSTALLED = $(addprefix $(VENV)/,.docs .tpu_compiler .readers .transformers4 .onnx_exporter)

.PHONY: quickstart compare test test-all lint docs reference smoke format clean

quickstart: $(VENV)/.core
	$(RUN) -m quickstart

compare: $(VENV)/.core
	$(RUN) -m quickstart --compare

test: lint $(INSTALLED)
	$(PYTEST) -m "not slow"

# Without the flags that conftest.py sets, programs are compiled as users compile them.
test-all: lint $(INSTALLED)
	XLA_FLAGS= $(PYTEST)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(VENV)/.docs
	$(RUN) -m zensical build --strict

reference: $(VENV)/.test
	$(RUN) -m tests.reference

smoke: $(VENV)/.core
	$(RUN) -m pip install -q pytest beartype
	$(RUN) -m pytest tests/test_imports.py tests/test_train.py -k "import or one_step"

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf runs .cache .pytest_cache .ruff_cache .hypothesis

# A stamp a kind of install, so that a changed requirements file is installed again.
$(VENV)/.core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: run make with PYTHON=python3.11 or newer." >&2; exit 2; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.test: requirements.txt requirements-test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: run make with PYTHON=python3.11 or newer." >&2; exit 2; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements-test.txt
	touch $@ $(VENV)/.core

$(VENV)/.docs: $(VENV)/.test requirements-docs.txt
	$(RUN) -m pip install -q -r requirements-docs.txt
	touch $@

# The TPU compiler that this jax names, in a folder of its own: beside jax itself it would make every
# start look for a TPU.
$(VENV)/.tpu_compiler: $(VENV)/.test
	libtpu=$$($(RUN) -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))') && \
	  $(RUN) -m pip install -q --no-deps --upgrade --target $(VENV)/tpu_compiler "$$libtpu"
	touch $@

# Other people's readers of exports, in a folder that only the tests of them look into.
$(VENV)/.readers: $(VENV)/.test requirements-readers.txt
	$(RUN) -m pip install -q --no-deps --upgrade --target $(VENV)/readers -r requirements-readers.txt
	touch $@

$(VENV)/.transformers4: $(VENV)/.test requirements-transformers4.txt
	$(RUN) -m pip install -q --no-deps --upgrade --target $(VENV)/transformers4 -r requirements-transformers4.txt
	touch $@

# What the ONNX export starts in a process of its own.
$(VENV)/.onnx_exporter: $(VENV)/.test mofi_jax/interop/onnx/requirements.txt
	$(RUN) -m pip install -q --no-deps --upgrade --target $(VENV)/onnx_exporter -r mofi_jax/interop/onnx/requirements.txt
	touch $@
