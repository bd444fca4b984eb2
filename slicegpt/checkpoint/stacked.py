"""Experts that a folder stores one by one, read as the tensors [experts, out, in] that transformers makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from slicegpt.checkpoint.tensors import FileTensor

# Gate, up and down, by the names of either style.
_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_EXPERT = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(_PARTS)})\.weight")


@dataclass(frozen=True)
class StackedTensor:
    """Tensors of files as one of a dimension more.

    Attributes:
        experts: of each expert, the tensors that lie one below the other.
        dtype: the one that `read` converts to.
    """

    experts: tuple[tuple[FileTensor, ...], ...]
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        first = self.experts[0]
        return torch.Size((len(self.experts), sum(part.shape[0] for part in first), *first[0].shape[1:]))

    @property
    def stored(self) -> torch.dtype:
        return self.experts[0][0].stored

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Some experts, all of them without arguments; no others are read."""
        own = self.experts[begin:end]
        out = torch.empty((len(own), *self.shape[1:]), dtype=self.dtype)
        for one, parts in zip(out, own, strict=True):
            sizes = [part.shape[0] for part in parts]
            for rows, part in zip(one.split(sizes), parts, strict=True):
                rows.copy_(replace(part, dtype=self.dtype).read())
        return out


def stack_experts(stored: Mapping[str, FileTensor]) -> dict[str, FileTensor | StackedTensor]:
    """`stored`, with experts of equal shapes under one name: `....experts.gate_up_proj` and `....experts.down_proj`."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in stored:
        if match := _EXPERT.fullmatch(name):
            root, number, part = match.groups()
            found.setdefault(root, {}).setdefault(int(number), {})[_PARTS[part]] = name
    result: dict[str, FileTensor | StackedTensor] = dict(stored)
    for root, experts in found.items():
        whole = sorted(experts) == list(range(len(experts)))
        shapes = {
            tuple(sorted((part, stored[name].shape) for part, name in one.items()))
            for one in experts.values()
        }
        if not whole or len(shapes) > 1 or set(experts[0]) != {"gate", "up", "down"}:
            continue  # what is missing is told by name when the model is made
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            own = tuple(
                tuple(result.pop(experts[number][part]) for part in parts) for number in range(len(experts))
            )
            result[f"{root}.{name}"] = StackedTensor(own, own[0][0].dtype)
    return result
