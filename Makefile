# Everything lives in one virtual environment. `make demo` and `make test` set it up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard src/deformnet/ops/*/*.cpp src/deformnet/ops/*/*.h)

# Else every process of the tests would compile PyTorch anew, and all else that it imports: 16 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test tools fuzz sanitize bench docs lint clean

setup: $(READY)

# Remade when the dependencies or the C++ sources change, and only then. With --no-compile, Python compiles
# modules when they are first imported; compiling all packages would take a minute.
$(READY): pyproject.toml $(NATIVE)
	@echo "Setting up $(VENV): PyTorch takes several gigabytes; this takes a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/deformnet demo --out demo

# The tests' tensors are small: a process for each core, each with one thread. Without a GPU its
# kernels run in Triton's interpreter, which has to be chosen before they are loaded.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/ops/test_triton_*.py

# Tests with the packages of docs/tools.md, which stay in the environment and make `make test` slower.
tools: $(READY)
	$(BIN)/python -m pip install --quiet --no-compile --group tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/nn/test_tools.py

# Longer runs of the tests that inject faults and damage inputs: a fault in every system call, and FUZZ
# cases of each fuzzer. DEFORMNET_FUZZ_SEED=1 generates other cases, DEFORMNET_FUZZ_SECONDS=3600 runs each
# fuzzer of files and operators for an hour.
FUZZ ?= 1000
fuzz: $(READY)
	OMP_NUM_THREADS=1 DEFORMNET_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n auto --dist loadfile \
	$$(grep --files-with-matches --recursive --include="test_*.py" "DEFORMNET_FUZZ\|from damage" tests)

# The operators' tests over kernels that stop at the first read or write out of bounds, with AMX tiles emulated in
# C++ (tests/ops/tiles.h). Python and PyTorch leak on their own; the sanitizer's library has to be there before them.
SANITIZED := build/sanitize
sanitize: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(SANITIZED) \
		--config-settings=cmake.define.DEFORMNET_SANITIZE=ON .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 OMP_NUM_THREADS=1 DEFORMNET_TEST_LIBRARY=$(abspath $(SANITIZED))/deformnet/ops/cpu/libdeformnet_cpu.so \
	$(BIN)/python -m pytest -n auto tests/ops -k "not compiler and not triton"

# Output folder of `make bench`.
BENCH ?= bench
bench: $(READY)
	$(BIN)/python -m benchmarks.deform_conv --out $(BENCH)
	$(BIN)/python -m benchmarks.sweeps --out $(BENCH)
	$(BIN)/python -m benchmarks.roi_pool --out $(BENCH)
	set -e; for precision in 32-true bf16-mixed; do \
		$(BIN)/deformnet paper table4 --precision $$precision --out $(BENCH)/table4-$$precision.json; \
		for network in deeplab-voc class-aware-rpn faster-rcnn rfcn; do \
			$(BIN)/deformnet paper training-step --precision $$precision --network $$network \
				--out $(BENCH)/training-step-$$network-$$precision.json; \
		done; \
	done

# The gallery's scripts run as the pages are built, on one thread as their tensors are small; any
# warning is an error.
DOCS := docs/_build/html
docs: $(READY)
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m sphinx -W --keep-going -b html docs $(DOCS)
	@echo "The pages: $(abspath $(DOCS))/index.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean:
	rm -rf build dist demo $(BENCH) docs/_build docs/_generated docs/gallery
