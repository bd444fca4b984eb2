"""Dense models that are opened and not loaded: slicing and evaluation read them a layer at a time."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.checkpoint.gguf import GGUFTensor, open_gguf
from slicegpt.checkpoint.loading import (
    generation_config_of,
    load_dense,
    load_errors,
    locate,
    open_folder,
    quiet_transformers,
)
from slicegpt.checkpoint.names import check_name
from slicegpt.checkpoint.shells import empty_shell, model_class_of, packed_shell
from slicegpt.checkpoint.tensors import FileTensor, open_files, same_content
from slicegpt.conversion.quantization import is_quantized
from slicegpt.families import DenseSource, Weights, source_of
from slicegpt.hardware.memory import has_room

__all__ = ["DenseSource", "open_dense", "source_of"]

logger = logging.getLogger("slicegpt")

# What a loaded model takes, activations and logits included, in units of its weights.
_MARGIN = 1.2


def open_dense(
    name: str,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    sliceable: bool = False,
) -> DenseSource:
    """Open a causal language model without loading it; what `load_dense` refuses is refused, in the same words.

    Safetensors are read from their files and GGUF's tensors de-quantised when they are asked for. PyTorch's `.bin`
    files can only be read whole: such a model is loaded, and one note says so.

    Args:
        name: as `slicegpt.checkpoint.loading.load_dense` takes it; a folder that `slicegpt slice` wrote as well.
        dtype: floating dtype of the tensors; None keeps the stored one (float32 for a GGUF file).
        revision, trust_remote_code, sliceable: as `load_dense` takes them.

    Raises:
        SliceGPTError: one line naming the file or the name that is at fault.
    """
    check_name(name)
    with quiet_transformers():
        path = locate(name, revision, trust_remote_code, sliceable)
        if path.is_file():
            opened = open_gguf(path, dtype)
            config, tokenizer, stored = opened.config, opened.tokenizer, opened.tensors
            dtype, model_class = dtype or torch.float32, opened.model_class
        else:
            config, tokenizer, files = open_folder(path, trust_remote_code, sliceable)
            if files[0].suffix != ".safetensors":
                return _load_whole(name, dtype, revision, trust_remote_code, ".bin files")
            stored = open_files(files)
            dtype = dtype or _stored_dtype(config, files[0], stored)
            if is_quantized(config):
                with load_errors(path):
                    shell, names = packed_shell(path, config, stored, dtype)
                shell.generation_config = generation_config_of(path, shell)
                shell.config.name_or_path = name
                return _source(name, tokenizer, shell, names, stored)
            with load_errors(path):
                model_class = model_class_of(config, trust_remote_code)
        with load_errors(path):
            shell, names = empty_shell(path, model_class, config, stored, dtype)
        if names is None:
            return _load_whole(name, dtype, revision, trust_remote_code, f"tensors of {model_class.__name__}")
        _tie_equal(shell, names, stored)
        if path.is_dir():
            shell.generation_config = generation_config_of(path, shell)
    shell.config.name_or_path = name
    return _source(name, tokenizer, shell, names, stored)


def source_if_too_large(
    name: str,
    dtype: torch.dtype | None,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> DenseSource | None:
    """The source of a model that does not fit, whole, into what is free on a device and on the host; None for one that
    does.

    Its files are opened only where their sizes leave it open.
    """
    check_name(name)
    with quiet_transformers():
        path = locate(name, revision, trust_remote_code, False)
    # Weights of 16 bits may be loaded in 64; those of a GGUF file in 32, where they have two bits.
    most = 16 * path.stat().st_size if path.is_file() else 4 * _weights_size(path)
    if _fits(most, device):
        return None
    source = open_dense(name, dtype, revision, trust_remote_code)
    return None if source.in_memory or _fits(source.total_bytes, device) else source


def _weights_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


def _fits(size: int, device: torch.device) -> bool:
    return all(has_room(_MARGIN * size, place) for place in (device, torch.device("cpu")))


def source_of_state(
    name: str,
    config: PreTrainedConfig,
    stored: dict[str, FileTensor | GGUFTensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DenseSource:
    """A source of tensors that are stored anywhere, by the names of the model's state, such as shards being written."""
    if is_quantized(config):
        shell, names = packed_shell(name, config, stored, dtype)
    else:
        with quiet_transformers():
            shell, names = empty_shell(name, model_class_of(config), config, stored, dtype)
    return _source(name, tokenizer, shell, names, stored)


def _source(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    shell: PreTrainedModel,
    names: dict[str, str],
    stored: dict[str, FileTensor | GGUFTensor],
) -> DenseSource:
    own = {key: tensor.dtype for key, tensor in shell.state_dict().items()}
    tensors = {key: replace(stored[theirs], dtype=own[key]) for key, theirs in names.items()}
    return DenseSource(
        name=name,
        config=shell.config,
        tokenizer=tokenizer,
        generation_config=shell.generation_config,
        tensors=Weights(tensors),
        dtype=shell.dtype,
        shell=shell,
    )


def _load_whole(
    name: str, dtype: torch.dtype | None, revision: str | None, trust_remote_code: bool, what: str
) -> DenseSource:
    logger.warning("%s: %s cannot be read one at a time; the whole model is loaded into memory", name, what)
    model, tokenizer = load_dense(name, dtype, "cpu", revision, trust_remote_code)
    return source_of(model, tokenizer, name)


def _stored_dtype(config: PreTrainedConfig, file: Path, stored: dict[str, FileTensor]) -> torch.dtype:
    """The dtype that transformers loads a folder in: the config's, else that of the first weight of its first file."""
    if config.dtype is not None:
        return config.dtype
    with safe_open(file, framework="pt") as opened:  # in the order that transformers sees them
        dtypes = [stored[name].stored for name in opened.keys()]  # noqa: SIM118  (no mapping)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _tie_equal(shell: PreTrainedModel, names: dict[str, str], stored: dict[str, FileTensor]) -> None:
    """Make one of a tied head and its table where a file holds both, and they are equal, as transformers does."""
    head, table = shell.get_output_embeddings(), shell.get_input_embeddings()
    if not shell.config.tie_word_embeddings or head is None or head.weight is table.weight:
        return
    first, second = (
        next(key for key, value in shell.named_parameters() if value is module.weight)
        for module in (table, head)
    )
    if same_content(stored[names[first]], stored[names[second]]):
        head.weight = table.weight
        names[second] = names[first]
