# SPDX-License-Identifier: Apache-2.0
# TORCH, TRITON and TRANSFORMERS choose versions; LIVEVLM_CUDA, LIVEVLM_CUDA_ARCHS and MAX_JOBS (setup.py) the build.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
TRANSFORMERS ?= transformers==5.17.0

PIP := $(VENV)/bin/pip --disable-pip-version-check
RUN := $(VENV)/bin/python
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(wildcard tests/emulation/*))

.PHONY: setup demo test test-kernels bench lint format clean

## make setup: a virtual environment with livevlm in it, compiled kernels included
setup: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "$(TORCH)"
	$(PIP) install -q "$(TRANSFORMERS)" 'setuptools>=77' cmake ninja
	touch $@

# An editable install: Python sources count at once, C++ and CUDA sources bring this rule back.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) install -q --no-build-isolation -e .
	$(RUN) -m livevlm_kernels.env
	touch $@

# torch for CUDA brings its own Triton. Triton 3.6's interpreter needs numpy < 2.4.
$(VENV)/.dev: $(VENV)/.installed
	$(RUN) -c 'import triton' 2>/dev/null || $(PIP) install -q "$(TRITON)"
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) install -q --no-build-isolation -e '.[dev]' 'numpy<2.4'
	touch $@

# Where there is no GPU, a demo does not wait for CUDA kernels to compile, which takes minutes; `make setup` adds them.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	if [ -e $(VENV)/.installed ]; then $(MAKE) setup; else \
	  export LIVEVLM_CUDA="$${LIVEVLM_CUDA:-$$(nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)}"; \
	  PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) install -q --no-build-isolation -e .; fi
	touch $@

## make demo: a small model watches the sample video with a quarter of its tokens and answers eight questions
demo: $(VENV)/.demo
	$(VENV)/bin/livevlm ask examples/sample.mp4 --budget 25% \
	  --at 00:20 "What colour was the circle?" \
	  "What colour was the ring?" "What shape was the green one?" "Where was the yellow bar?" \
	  "Did a purple triangle appear?" "What shape came before the diamond?" \
	  "What shape came after the circle?" "What shape is at c2 now?"

## make test: the tests, a process for each core, some minutes; those that need a GPU are skipped where there is none
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto

## make test-kernels: the kernels without a GPU: Triton's in its interpreter, CUDA's as CPU code (if there is nvcc)
test-kernels: $(VENV)/.dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto
	! command -v nvcc || PATH="$(abspath $(VENV))/bin:$$PATH" tests/emulation/run

## make bench: every op's benchmark, on the GPU if there is one
bench: setup
	$(VENV)/bin/livevlm bench kernels

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

## make format: what lint asks for
format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info $(VENV) livevlm_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
