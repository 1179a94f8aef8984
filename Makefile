# Every target sets up what it needs: a virtual environment in .venv, pinned packages, the build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h) setup.py pyproject.toml

.PHONY: help demo test lint format sanitize upstream clean

help:
	@echo "make demo      train a small GPT and generate from it through a paged KV cache (2 minutes)"
	@echo "make test      run the tests"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make format    let ruff and clang-format rewrite the files"
	@echo "make sanitize  run the kernels' tests under the address and undefined-behaviour sanitizers"
	@echo "make upstream  FLASH_ATTENTION=checkout: run a sample of flash-attention's own tests"

$(VENV)/packages: requirements-dev.txt
	@echo "==> Setting up $(VENV) with the packages of requirements-dev.txt"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/build: $(VENV)/packages $(SOURCES)
	@echo "==> Building fa3_ops (about half a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	@touch $@

demo: $(VENV)/build
	@$(BIN)/python examples/train_and_generate.py

test: $(VENV)/build
	@$(BIN)/python -m fa3_ops
	@$(BIN)/python -m pytest

lint: $(VENV)/packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h
	@echo "lint: clean"

format: $(VENV)/packages
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h

# A second copy of the package, built with the sanitizers, in build/sanitize.
sanitize: $(VENV)/packages
	@rm -rf build/sanitize
	@FA3NPU_SANITIZE="address undefined" $(BIN)/python -m pip install --quiet \
		--disable-pip-version-check --no-build-isolation --no-deps --target build/sanitize .
	@LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize \
		$(BIN)/pytest tests/test_golden.py tests/test_operators.py tests/test_errors.py

upstream: $(VENV)/build
	@FLASH_ATTENTION="$(FLASH_ATTENTION)" $(BIN)/python -m pytest tests/upstream --sample 200

clean:
	rm -rf $(VENV) build fa3_ops/*.so *.egg-info
