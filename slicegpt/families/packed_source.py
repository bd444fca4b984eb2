"""A model of packed weights seen as one of plain numbers: each weight is dequantised as it is read."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from slicegpt.families.source import DenseSource, StoredTensor, Weights
from slicegpt.modeling.quantized import (
    QuantizedEmbedding,
    QuantizedWeight,
    WeightScheme,
    dequantised,
    unpack,
)


@dataclass(frozen=True)
class PackedTensor:
    """The weight that packed codes and scales stand for.

    Attributes:
        packed, scale, zero_point: as `slicegpt.modeling.quantized` has them; zero_point None: symmetric.
        shape: rows and columns; scheme: how they are stored.
        dtype: of the weight.
    """

    packed: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor | None
    shape: torch.Size
    scheme: WeightScheme
    dtype: torch.dtype

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Some rows, all of them without arguments."""
        scale = self.scale.read(begin, end)
        codes = unpack(self.packed.read(begin, end), self.scheme.bits, (len(scale), self.shape[1]))
        zeros = None
        if self.zero_point is not None:
            whole = unpack(self.zero_point.read(), self.scheme.bits, (self.shape[0], scale.shape[1]), dim=0)
            zeros = whole[begin:end]
        return dequantised(codes, scale, zeros).to(self.dtype)


def plain_view(source: DenseSource) -> DenseSource:
    """The same model in plain numbers, whose tensors are dequantised as they are asked for; one that is, itself.

    It takes no memory: its parameters hold nothing, whether those of `source` are loaded or not.
    """
    packed = {
        name: module for name, module in source.shell.named_modules() if isinstance(module, QuantizedWeight)
    }
    if not packed:
        return source
    stored = source.tensors.stored
    tensors = {name: own for name, own in stored.items() if name.rpartition(".")[0] not in packed}
    for root, module in packed.items():
        zeros = stored.get(f"{root}.weight_zero_point")
        tensors[f"{root}.weight"] = PackedTensor(
            stored[f"{root}.weight_packed"],
            stored[f"{root}.weight_scale"],
            zeros,
            torch.Size((module.rows, module.columns)),
            module.scheme,
            source.dtype,
        )
        if f"{root}.bias" in stored:
            tensors[f"{root}.bias"] = stored[f"{root}.bias"]
    return replace(source, shell=_plain_shell(source.shell, packed, source.dtype), tensors=Weights(tensors))


def _plain_shell(
    shell: PreTrainedModel, packed: dict[str, QuantizedWeight], dtype: torch.dtype
) -> PreTrainedModel:
    """A copy of the model around the same parameters, but for layers whose weights take no memory and hold nothing."""
    shell = copy.deepcopy(shell, {id(parameter): parameter for parameter in shell.parameters()})
    weights: dict[int, nn.Parameter] = {}
    for name, module in packed.items():
        if id(module.weight_packed) not in weights:  # tied ones share it
            nothing = torch.zeros((), dtype=dtype).expand(module.rows, module.columns)
            weights[id(module.weight_packed)] = nn.Parameter(nothing, requires_grad=False)
        with torch.device("meta"):
            if isinstance(module, QuantizedEmbedding):
                plain = nn.Embedding(module.rows, module.columns)
            else:
                plain = nn.Linear(module.columns, module.rows, bias=module.bias is not None)
                plain.bias = module.bias
        plain.weight = weights[id(module.weight_packed)]
        parent, _, own = name.rpartition(".")
        setattr(shell.get_submodule(parent), own, plain)
    return shell
