"""A sliced model on a device that has no room for all of it: every layer comes there while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from slicegpt.hardware.memory import fits_on
from slicegpt.modeling import SlicedForCausalLM


class OffloadedLayer(nn.Module):
    """A layer that stays where it is, and whose weights are copied to `device` for as long as it runs."""

    def __init__(self, layer: nn.Module, device: torch.device):
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, *args, **kwargs):
        tensors = chain(self.layer.named_parameters(), self.layer.named_buffers())
        there = {name: tensor.to(self.device) for name, tensor in tensors}
        return torch.func.functional_call(self.layer, there, args, kwargs)


@contextmanager
def moved(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Meanwhile a model is on `device` where it fits there, else (and for None) where it was."""
    origin = next(model.parameters()).device
    try:
        if device is not None and fits_on(model, device):
            model.to(device)
        yield
    finally:
        model.to(origin)


@contextmanager
def layer_by_layer(model: SlicedForCausalLM, device: torch.device) -> Iterator[None]:
    """Meanwhile a model of the CPU runs on `device`: all of it at once where it fits, else layer by layer."""
    layers, parts = model.model.layers, [model]
    if not fits_on(model, device):
        parts = [*(part for part in model.model.children() if part is not layers), model.lm_head]
        model.model.layers = nn.ModuleList(OffloadedLayer(layer, device) for layer in layers)
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part in parts:
            part.to("cpu")
        model.model.layers = layers
