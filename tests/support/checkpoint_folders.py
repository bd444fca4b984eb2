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


def save_deep(folder: Path, tokenizer, layers: int) -> int:
    """A Llama of zeros in bfloat16, by its `config.json` in float32; returns the bytes of a layer in that, 29 MB."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(shape.numel() for name, shape in shapes.items() if name.startswith("model.layers.0.")) * 4
