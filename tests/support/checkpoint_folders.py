"""A small Llama as a folder, ways to break it, and the line that loading it then gives."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from slicegpt.checkpoint.loading import load_dense
from slicegpt.errors import SliceGPTError


def tiny_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **options,
    )
    return LlamaForCausalLM(config)


def error_of(name: object, **options) -> str:
    with pytest.raises(SliceGPTError) as error:
        load_dense(str(name), **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def without(monkeypatch, package: str) -> None:
    """As if `package` were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
