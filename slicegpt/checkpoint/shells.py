"""A model without its weights, made by transformers itself, and which stored tensor each of its parameters is.

transformers renames tensors as it loads them (prefixes of base models, names of older releases), ties some and finds
some missing. What it does to real tensors it does to these as well: each has the shape of a stored one, but all of its
elements are the same two or four bytes, which also tell which one it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slicegpt.checkpoint.checks import check_loaded, check_shapes, some
from slicegpt.conversion.canonical import build_model
from slicegpt.errors import SliceGPTError
from slicegpt.families.source import StoredTensor
from slicegpt.modeling.sizes import skeleton

# One number a tensor, different from all others and finite in every dtype, is made of its index as an integer.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_class_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that a causal language model of a config has."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def packed_shell(
    source: str | Path, config: PreTrainedConfig, stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, str]]:
    """As `empty_shell`, of a sliced model with packed weights: transformers renames nothing of it.

    Raises:
        SliceGPTError: tensors that are missing, that have another shape, or that the model has no place for.
    """
    expected = skeleton(config).to(dtype).state_dict()
    names = {name: name for name in expected}
    if config.tie_word_embeddings:
        heads = [name for name in expected if name.startswith("lm_head.weight")]
        names |= {name: name.replace("lm_head.", "model.embed_tokens.", 1) for name in heads}
    missing = sorted(name for name in names.values() if name not in stored)
    surplus = sorted(name for name in stored if name not in names.values())
    if missing or surplus:
        raise SliceGPTError(
            f"{source}: {some(missing or surplus)} {'missing' if missing else 'not expected'}"
        )
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    check_shapes(source, shapes, {name: stored[own].shape for name, own in names.items()})
    state = {
        name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in expected.items()
        if names[name] == name
    }
    return build_model(config, state), names


def take_experts_one_by_one(model: PreTrainedModel) -> PreTrainedModel:
    """The model, without PyTorch's grouped GEMM in float64: transformers' experts take it, and it has no float64."""
    if model.dtype == torch.float64 and getattr(model.config, "_experts_implementation", "") == "grouped_mm":
        model.set_experts_implementation("eager")
    return model


def empty_shell(
    source: str | Path,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, dict[str, str] | None]:
    """A model whose parameters take no memory, in eval mode, with all of its buffers.

    Args:
        source: the folder or file that messages name.
        stored: the tensors by the names that they are stored under. Only their shapes are looked at.

    Returns:
        The model; and of every entry of its state the stored tensor's name, None in place of all of them where
        transformers makes parameters of several tensors.

    Raises:
        SliceGPTError: what `check_loaded` finds.
    """
    names = list(stored)
    numbers = torch.arange(1, len(names) + 1, dtype=_INTEGERS[dtype.itemsize]).view(dtype)
    state = {name: numbers[index].expand(stored[name].shape) for index, name in enumerate(names)}
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(source, take_experts_one_by_one(model), info)
    begin, found = numbers.data_ptr(), {}
    for name, tensor in model.state_dict().items():
        index, rest = divmod(tensor.data_ptr() - begin, dtype.itemsize)
        if rest == 0 and 0 <= index < len(names):
            found[name] = names[index]
        elif name in stored:  # copied on its way, as a tied head's bias is
            found[name] = name
        else:
            return model.eval(), None
    return model.eval(), found
