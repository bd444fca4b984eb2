"""Weights of 8 and 4 bits, stored in compressed-tensors' format `pack-quantized`, dequantised as they are used.

A weight is `(q - z) s`: codes `q` of 8 or 4 bits, a scale `s` for each row or for each group of neighbouring columns of
a row, and with 4 bits on request a zero point `z` beside each scale. A layer X keeps

    X.weight_packed        int32 [rows, ⌈columns bits / 32⌉]: q + 2^(bits-1), the first column in the lowest bits
    X.weight_scale         the model's dtype [rows, groups]
    X.weight_zero_point    int32 [⌈rows bits / 32⌉, groups]: z + 2^(bits-1), packed along the rows
    X.weight_shape         int64 [2]: rows, columns

This is the reference: right wherever PyTorch runs, with no kernel for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# What an embedding table or a head keeps.
TABLE_TENSORS = ("weight_packed", "weight_scale", "weight_shape")

METHOD, FORMAT = "compressed-tensors", "pack-quantized"


@dataclass(frozen=True)
class WeightScheme:
    """How one layer's weight is stored.

    Attributes:
        bits: 8 or 4.
        group_size: columns that share a scale; None: a scale for each row.
        symmetric: without zero points.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return 1 if self.group_size is None else columns // self.group_size


def scheme_of(config: Any, name: str) -> WeightScheme | None:
    """How the layer `name` is stored by the `quantization_config` of a model's config; None: as plain numbers.

    Raises:
        ValueError: a method or a format other than compressed-tensors' `pack-quantized` with 8 or 4 bits.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):  # transformers' own class, where it has read it
        quantization = quantization.to_dict()
    found = (quantization.get("quant_method"), quantization.get("format"))
    if found != (METHOD, FORMAT):
        raise ValueError(f"quantization_config must be of {METHOD} in the format {FORMAT}, got {found}")
    for group in quantization["config_groups"].values():
        if any(re.match(target.removeprefix("re:"), name) for target in group["targets"]):
            weights = group["weights"]
            if weights["type"] != "int" or weights["num_bits"] not in (4, 8):
                raise ValueError(
                    f"quantization_config: {name} must have integers of 4 or 8 bits, got {weights['num_bits']} of "
                    f"type {weights['type']}"
                )
            grouped = weights["strategy"] == "group"
            return WeightScheme(
                weights["num_bits"], weights["group_size"] if grouped else None, weights["symmetric"]
            )
    return None


def pack(codes: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """Signed codes, int8 [rows, columns], in int32 words along `dim`; what a last word lacks is 0.

    On a machine that stores the lowest byte first, as all that are supported do.
    """
    if dim == 0:
        return pack(codes.mT, bits).mT.contiguous()
    shifted = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    shifted = F.pad(shifted, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        shifted = shifted[:, 0::2] | shifted[:, 1::2] << 4
    # Through one dimension: a tensor of one row or column may have strides that `view` does not take.
    return shifted.reshape(-1).view(torch.int32).view(len(shifted), -1)


def unpack(packed: torch.Tensor, bits: int, shape: tuple[int, int], dim: int = 1) -> torch.Tensor:
    """The opposite of `pack`: codes, int8, of `shape`."""
    if dim == 0:
        return unpack(packed.mT, bits, (shape[1], shape[0])).mT.contiguous()
    shifted = packed.reshape(-1).view(torch.uint8).view(len(packed), -1)
    if bits == 4:
        shifted = torch.stack((shifted & 15, shifted >> 4), dim=-1).flatten(1)
    # In 8 bits, the sum modulo 256 is the signed code.
    return (shifted[:, : shape[1]] - (1 << (bits - 1))).view(torch.int8)


def dequantised(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """`(q - z) s` [rows, columns], rounded once to the dtype of `scale` [rows, groups]."""
    rows, groups = scale.shape
    values = codes.view(rows, groups, -1).to(scale.dtype)
    if zero_point is not None:
        values = values - zero_point.to(scale.dtype)[..., None]
    return (values * scale[..., None]).view(rows, -1)


class QuantizedWeight(nn.Module):
    """A packed weight [rows, columns]; its parameters bear compressed-tensors' names and take no gradients."""

    def __init__(self, rows: int, columns: int, scheme: WeightScheme):
        super().__init__()
        self.rows, self.columns, self.scheme = rows, columns, scheme
        self.bits, self.group_size = scheme.bits, scheme.group_size or 0
        groups = scheme.groups(columns)

        def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

        self.weight_packed = parameter(rows, -(-columns * scheme.bits // 32), dtype=torch.int32)
        self.weight_scale = parameter(rows, groups)
        self.weight_zero_point = None
        if not scheme.symmetric:
            self.weight_zero_point = parameter(-(-rows * scheme.bits // 32), groups, dtype=torch.int32)
        self.weight_shape = nn.Parameter(torch.tensor([rows, columns]), requires_grad=False)

    def codes(self) -> torch.Tensor:
        """q, int8 [rows, columns]."""
        return unpack(self.weight_packed, self.bits, (self.rows, self.columns))

    def zero_points(self) -> torch.Tensor | None:
        """z, int8 [rows, groups]; None: all 0."""
        if self.weight_zero_point is None:
            return None
        return unpack(self.weight_zero_point, self.bits, tuple(self.weight_scale.shape), dim=0)

    def dequantize(self) -> torch.Tensor:
        """The weight [rows, columns] in the dtype of its scales."""
        return dequantised(self.codes(), self.weight_scale, self.zero_points())

    @property
    def weight(self) -> torch.Tensor:
        """`dequantize()`, anew at each access: for whatever looks at layers' weights."""
        return self.dequantize()

    def extra_repr(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "by row"
        zeros = "" if self.scheme.symmetric else ", zero points"
        return f"{self.columns} -> {self.rows}, int{self.bits} {groups}{zeros}"


class QuantizedLinear(QuantizedWeight):
    """`x Wᵀ + c` with a packed weight; no `nn.Linear`, whose weight could be trained."""

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: WeightScheme):
        super().__init__(out_features, in_features, scheme)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.dequantize(), self.bias)


class QuantizedEmbedding(QuantizedWeight):
    """A packed table [num_embeddings, embedding_dim]; only the rows that are asked for are dequantised."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: WeightScheme):
        super().__init__(num_embeddings, embedding_dim, scheme)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        ids = input_ids.flatten()
        codes = unpack(self.weight_packed[ids], self.bits, (len(ids), self.columns))
        return dequantised(codes, self.weight_scale[ids]).view(*input_ids.shape, self.columns)


def build_linear(
    config: Any, name: str, in_features: int, out_features: int, bias: bool
) -> nn.Linear | QuantizedLinear:
    """A linear layer as the config has it stored under `name`."""
    scheme = scheme_of(config, name)
    if scheme is None:
        return nn.Linear(in_features, out_features, bias=bias)
    return QuantizedLinear(in_features, out_features, bias, scheme)


def build_embedding(
    config: Any, name: str, rows: int, columns: int, padding: int | None
) -> nn.Embedding | QuantizedEmbedding:
    """An embedding table as the config has it stored under `name`."""
    scheme = scheme_of(config, name)
    if scheme is None:
        return nn.Embedding(rows, columns, padding)
    return QuantizedEmbedding(rows, columns, scheme)
