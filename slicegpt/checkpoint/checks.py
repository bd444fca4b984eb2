"""Whether a model that transformers has loaded is the one in the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slicegpt.errors import SliceGPTError, first_line

# Buffers that older releases of transformers saved; the config says what is in them.
_HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attention\.(masked_)?bias)")


def check_loaded(source: str | Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a model that differs from its file: transformers prints a report at most, and goes on.

    Args:
        source: the folder or file that messages name.
        info: what `from_pretrained(output_loading_info=True)` gives beside the model.
    """
    # What is missing or does not fit has been filled with random numbers.
    if info["missing_keys"]:
        names = some(sorted(info["missing_keys"]))
        raise SliceGPTError(f"{source} lacks weights of {type(model).__name__}: {names}")
    if info["mismatched_keys"]:
        weight, stored, expected = min(info["mismatched_keys"])
        raise SliceGPTError(f"{source}: {weight} must be {list(expected)} by its config, got {list(stored)}")
    # What the config has no place for has been dropped.
    surplus = sorted(name for name in info["unexpected_keys"] if not _HARMLESS.fullmatch(name))
    if surplus:
        raise SliceGPTError(
            f"{source} holds weights that {type(model).__name__} has no place for by its config:"
            f" {some(surplus)}"
        )
    if model.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise SliceGPTError(f"{source}: weights of {model.dtype} are not supported")
    # Only a caller may ask for other outputs, not the file.
    model.config.return_dict, model.config.output_hidden_states = True, False


def parameters_of(config: PreTrainedConfig, source: str | Path) -> dict[str, torch.Size]:
    """Shapes of the parameters that a causal language model of a config has, by their names; none is allocated.

    Raises:
        SliceGPTError: transformers cannot make such a model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's constructor validates nothing, and fails anywhere
        raise SliceGPTError(
            f"{source}: transformers cannot make a model of its config: {first_line(error)}"
        ) from error
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_shapes(
    source: str | Path, expected: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]
) -> None:
    """Refuse a weight whose stored shape is not the one that the config asks for, before it is read."""
    for name, shape in expected.items():
        if name in stored and list(stored[name]) != list(shape):
            raise SliceGPTError(
                f"{source}: {name} must be {list(shape)} by its config, got {list(stored[name])}"
            )


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
