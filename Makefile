# Everything lives in one virtual environment. `make demo` and `make test` set it up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard src/deformnet/ops/cpu/*.cpp src/deformnet/ops/cpu/*.h)

.PHONY: setup demo test bench lint clean

setup: $(READY)

# Remade when the dependencies or the C++ sources change, and only then.
$(READY): pyproject.toml $(NATIVE)
	@echo "Setting up $(VENV): PyTorch is some gigabytes, which takes a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/deformnet demo --out demo

# The tests' tensors are small: a process for each core, each with one thread. Without a GPU its
# kernels run in Triton's interpreter, which has to be chosen before they are loaded.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -k "not compile" tests/ops/test_triton_*.py

bench: $(READY)
	$(BIN)/python -m benchmarks.deform_conv
	$(BIN)/python -m benchmarks.roi_pool
	$(BIN)/python -m benchmarks.detectors

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean:
	rm -rf build dist demo
