# Everything runs on a fresh machine with Python 3.11+ and pip.
#
#   make demo    train two small networks, prune them, print what it cost and what it gained
#   make test    run the tests
#   make test-ray  install Ray (80 MB) beside the rest, and run the tests that need it: some minutes
#   make test-s3   install an S3 server and client beside the rest, and run the tests that need them
#   make frameworks  train, export, prune the same networks in PyTorch, Keras, TensorFlow, JAX, Paddle, scikit-learn (5 GB)
#   make check   lint, formatting, types
#   make proto   write the Python code of the protos again
#   make clean   remove .venv, caches and the demo's models
#
# The first call makes .venv and installs into it; later ones only do so when pyproject.toml or constraints.txt change.
# On Linux, pip may choose torch's CUDA build (some gigabytes); constraints.txt tells how to get the CPU build instead.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
# Two workers by default: each test already uses the threads of ONNX Runtime.
PYTEST_ARGS ?= -n 2 --dist worksteal

BIN := $(VENV)/bin

.PHONY: demo frameworks test test-ray test-s3 proto check fix clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

frameworks: $(VENV)/.demo
	$(BIN)/python examples/frameworks/run.py

test: $(VENV)/.test $(VENV)/triton $(VENV)/proto
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-ray: $(VENV)/.test $(VENV)/ray
	$(BIN)/python -m pytest tests/server/test_cluster.py

test-s3: $(VENV)/.test $(VENV)/s3
	$(BIN)/python -m pytest tests/server/test_object_store.py

check: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The Python code of the protos.
proto: $(VENV)/.test $(VENV)/proto
	$(BIN)/python proto/generate.py

fix: $(VENV)/.dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist examples/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of packages, named as the extra that pip installs.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[$*]"
	@touch $@

# The client of the inference protocol, in a folder of its own: what it says of protobuf does not agree with the packages above.
$(VENV)/triton: constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --no-deps --upgrade --target $@ tritonclient python-rapidjson
	@touch $@

# Ray, in a folder of its own: not everybody who runs the tests shall wait for it.
$(VENV)/ray: constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --upgrade --target $@ ray
	@touch $@

# A client of S3, and a server of it that is only for tests.
$(VENV)/s3: constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --upgrade --target $@ \
	s3fs moto flask flask-cors py-partiql-parser
	@touch $@

# The compiler of the protos, in a folder of its own: see proto/generate.py.
$(VENV)/proto: | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --upgrade --target $@ grpcio-tools==1.81.1
	@touch $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " \
	+ sys.version.split()[0] + ": call make with PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
