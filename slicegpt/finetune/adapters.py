"""Low-rank adapters on a sliced model: where they go, and how they become part of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from slicegpt.errors import SliceGPTError
from slicegpt.finetune.options import TARGETS, AdapterOptions
from slicegpt.modeling import CompactShortcut, SlicedForCausalLM

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"


def attach(model: SlicedForCausalLM, options: AdapterOptions) -> PeftModel:
    """Wrap `model`: all is frozen but new adapters, and copies of its shortcuts where those are trained.

    What is trained is float32, whatever the model's dtype: steps of 1e-4 vanish in 16 bits.

    Raises:
        SliceGPTError: a target is no linear layer of the model, or there are no shortcuts to train.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    shortcuts = _trainable_shortcuts(model)
    if options.train_shortcuts and not shortcuts:
        raise SliceGPTError("all shortcuts of this model are identities", "train_shortcuts")
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=target_modules(model, options),
        modules_to_save=shortcuts if options.train_shortcuts else None,
        task_type=TaskType.CAUSAL_LM,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names of its last release
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def target_modules(model: SlicedForCausalLM, options: AdapterOptions) -> list[str]:
    """Last parts of the names of the linear layers that get an adapter, sorted.

    The head never gets one (where it is tied, it is the embedding). A shortcut that is trained itself does not
    either: it would be trained twice.
    """
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    if options.train_shortcuts:
        linear -= set(_trainable_shortcuts(model))
    if isinstance(options.targets, str):
        if options.targets not in TARGETS:
            raise SliceGPTError(
                f"must be one of {', '.join(TARGETS)} or names of linear layers, got {options.targets!r}",
                "targets",
            )
        chosen = TARGETS[options.targets]
        # Without a gate the MLP has no gate_proj.
        return sorted(linear if chosen is None else linear.intersection(chosen))
    unknown = sorted(set(options.targets) - linear)
    if unknown or not options.targets:
        raise SliceGPTError(
            f"{', '.join(unknown) or 'an empty list'}: this model's linear layers are"
            f" {', '.join(sorted(linear))}",
            "targets",
        )
    return sorted(set(options.targets))


def _trainable_shortcuts(model: SlicedForCausalLM) -> list[str]:
    """Last parts of the names of the shortcuts that hold numbers."""
    return sorted({name.rpartition(".")[2] for name, _ in _shortcuts(model)})


def _shortcuts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        named_so = name.endswith("shortcut") and isinstance(module, nn.Linear)
        if named_so or isinstance(module, CompactShortcut):
            yield name, module


@torch.no_grad()
def merge(model: SlicedForCausalLM, adapted: PeftModel) -> SlicedForCausalLM:
    """Write what `adapted` has learned into the weights of `model`, an unwrapped copy of the same network.

    `W + alpha / r * B A` is computed in float64 and rounded once, to W's dtype. Trained shortcuts replace those of
    `model`. No parameter is added.

    Returns:
        `model`.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            weight = model.get_submodule(name).weight
            down, up = (side[ADAPTER].weight.to(weight.device) for side in (module.lora_A, module.lora_B))
            change = module.scaling[ADAPTER] * (up.double() @ down.double())
            weight.copy_(weight.double() + change)
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[ADAPTER]
            for parameter, value in trained.named_parameters():
                target = model.get_submodule(name).get_parameter(parameter)
                target.copy_(value)
    return model
