"""The weights of linear layers, one below or beside another: as tensors, or with 8 or 4 bits as `PanelWeight`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicegpt.modeling.quantized import QuantizedWeight
from slicegpt.ops.panels import COLUMNS, PanelWeight


@dataclass(frozen=True)
class Codes:
    """A weight `(codes - zeros) * scales` of `bits` bits.

    Attributes:
        codes: int8 [rows, columns].
        scales: [rows, groups], the columns of a group being neighbours.
        zeros: int8 [rows, groups], or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    def in_groups(self, columns: int) -> "Codes":
        """The same with scales of so many columns, which divide its groups."""
        times = self.codes.shape[1] // self.scales.shape[1] // columns
        scales, zeros = (
            None if one is None else one.repeat_interleave(times, dim=1) for one in (self.scales, self.zeros)
        )
        return Codes(self.codes, scales, zeros, self.bits)


def stored_codes(module: nn.Module, table: bool = False) -> Codes | None:
    """What a layer or table stores with 8 or 4 bits; None where it stores plain numbers."""
    if not isinstance(module, QuantizedWeight):
        return None
    return Codes(module.codes(), module.weight_scale.detach(), module.zero_points(), module.bits)


@dataclass(frozen=True)
class WeightReader:
    """Reads the weights of layers.

    Attributes:
        codes_of: of a layer, or of a table (the embedding, the head); None where its numbers are plain.
        panels: there are kernels for `PanelWeight`; else what has fewer bits is made dense.
    """

    codes_of: Callable[[nn.Module, bool], Codes | None] = stored_codes
    panels: bool = True

    def table(self, module: nn.Module) -> Tensor | PanelWeight:
        """An embedding table or a head [rows, columns]."""
        return self.below([module], table=True)

    def below(
        self, modules: Sequence[nn.Module], gated: bool = False, table: bool = False
    ) -> Tensor | PanelWeight:
        """The rows of several layers [rows, columns]; gated: of a gate and its values."""
        found = self._found(modules, table)
        if found is None or len({_grid(one) for one in found}) > 1:
            weights = [module.weight.detach() for module in modules]
            return weights[0] if len(weights) == 1 else torch.cat(weights)
        zeros = None if found[0].zeros is None else torch.cat([one.zeros for one in found])
        codes, scales = (torch.cat([getattr(one, name) for one in found]) for name in ("codes", "scales"))
        return PanelWeight.pack(codes, scales, zeros, found[0].bits, gated)

    def beside(self, modules: Sequence[nn.Module]) -> Tensor | PanelWeight:
        """The columns of several layers [rows, columns]."""
        if len(modules) == 1:
            return self.below(modules)
        found = self._found(modules)
        if (
            found is None
            or len({(one.bits, one.zeros is None) for one in found}) > 1
            or any(one.codes.shape[1] % COLUMNS for one in found)
        ):
            return torch.cat([module.weight.detach() for module in modules], dim=1)
        # Their groups may differ, a row of each being one among them: 32 columns are in all.
        found = [one.in_groups(COLUMNS) for one in found]
        zeros = None if found[0].zeros is None else torch.cat([one.zeros for one in found], dim=1)
        codes, scales = (
            torch.cat([getattr(one, name) for one in found], dim=1) for name in ("codes", "scales")
        )
        return PanelWeight.pack(codes, scales, zeros, found[0].bits)

    def _found(self, modules: Sequence[nn.Module], table: bool = False) -> list[Codes] | None:
        """The codes of all, or None."""
        found = [self.codes_of(module, table) for module in modules] if self.panels else [None]
        return None if any(one is None for one in found) else found


def _grid(codes: Codes) -> tuple:
    return codes.bits, codes.zeros is None, codes.scales.shape[1]


def with_factor(weight: Tensor | PanelWeight, factor: Tensor) -> Tensor | PanelWeight:
    """The rows of a compact shortcut's Fᵀ below an input's."""
    if isinstance(weight, PanelWeight):
        return weight.with_rest(factor, 0)
    return torch.cat((weight, factor))


def with_negative_factor(weight: Tensor | PanelWeight, factor: Tensor, padding: int) -> Tensor | PanelWeight:
    """The columns -F beside an output's, with `padding` rows of zeros."""
    columns = -F.pad(factor, (0, padding)).mT
    if isinstance(weight, PanelWeight):
        return weight.with_rest(columns, 1)
    return torch.cat((weight, columns), dim=1)
