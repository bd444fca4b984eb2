"""Weights on a grid of 8 or 4 bits: the grid's scales and zero points, and rounding to the nearest of its points."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from slicegpt.modeling.quantized import WeightScheme, dequantised, pack

# Scales that are tried, in units of the one at which a group's longest number is its last code: a little clipping makes
# all others finer, and a coarser grid lets the shorter of the two sides reach its end. Weighing the columns by their
# moments was no better under GPTQ, which moves the weights that it has not come to. A row of 8 bits has steps to spare.
_SHRINK = {4: [0.82, 0.88, 0.94, 1.0, 1.06, 8 / 7], 8: [1.0]}


@dataclass(frozen=True)
class Grid:
    """What codes of a weight [rows, columns] mean: `(q - z) s`, in groups of neighbouring columns.

    Attributes:
        scale: s [rows, groups], in the dtype that is stored; never 0.
        zero_point: z, int8 [rows, groups]; None: all 0.
        bits: of a code.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes, int8, of a float64 weight [rows, groups, columns of a group]."""
        codes = torch.round(weight / self.scale.double()[..., None])
        if self.zero_point is not None:
            codes += self.zero_point[..., None]
        half = 1 << (self.bits - 1)
        return codes.clamp_(-half, half - 1).to(torch.int8)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight as it is stored.

    Attributes:
        codes: int8 [rows, columns].
        grid: what they mean.
    """

    codes: torch.Tensor
    grid: Grid

    def dequantise(self) -> torch.Tensor:
        """[rows, columns], in the dtype of the scales: the bits that the network computes with."""
        return dequantised(self.codes, self.grid.scale, self.grid.zero_point)

    def rows(self, rows: slice | torch.Tensor) -> QuantizedMatrix:
        """Some of the rows; each has codes and scales of its own."""
        grid, zeros = self.grid, self.grid.zero_point
        grid = replace(grid, scale=grid.scale[rows], zero_point=None if zeros is None else zeros[rows])
        return QuantizedMatrix(self.codes[rows], grid)

    def entries(self, name: str) -> dict[str, torch.Tensor]:
        """Entries of the state of a layer that is called `name`, see `slicegpt.modeling.quantized`."""
        grid = self.grid
        entries = {
            f"{name}.weight_packed": pack(self.codes, grid.bits),
            f"{name}.weight_scale": grid.scale.contiguous(),
            f"{name}.weight_shape": torch.tensor(self.codes.shape),
        }
        if grid.zero_point is not None:
            entries[f"{name}.weight_zero_point"] = pack(grid.zero_point, grid.bits, dim=0)
        return entries


def fit_grid(weight: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Grid:
    """The grid that a weight loses least on by rounding to nearest, of a few scales for each group.

    Args:
        weight: float64 [rows, columns].
        dtype: of the scales, to which they are rounded before anything is compared.
    """
    rows, columns = weight.shape
    groups = weight.view(rows, scheme.groups(columns), -1)
    best, least = None, None
    for shrink in _SHRINK[scheme.bits]:
        grid = _grid(groups, scheme, dtype, shrink)
        values = grid.round(groups).double()
        if grid.zero_point is not None:
            values -= grid.zero_point.double()[..., None]
        errors = (values * grid.scale.double()[..., None] - groups).square().sum(dim=-1)
        if least is None:
            best, least = grid, errors
            continue
        better = errors < least
        zeros = None
        if grid.zero_point is not None:
            zeros = torch.where(better, grid.zero_point, best.zero_point)
        best = replace(best, scale=torch.where(better, grid.scale, best.scale), zero_point=zeros)
        least = torch.where(better, errors, least)
    return best


def _grid(groups: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype, shrink: float) -> Grid:
    """A grid for each group [rows, groups, columns of a group], `shrink` times as wide as its numbers."""
    half = 1 << (scheme.bits - 1)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    if scheme.symmetric:
        # There is one code more below 0 than above: the sign of the scale gives it to the longer side.
        longest = torch.where(-low > high, low, high)
        scale = _stored(-longest * shrink / half, dtype)
        return Grid(scale, None, scheme.bits)
    low, high = low.clamp(max=0.0) * shrink, high.clamp(min=0.0) * shrink
    scale = _stored((high - low) / (2 * half - 1), dtype)
    zeros = torch.round(-half - low / scale.double()).clamp(-half, half - 1).to(torch.int8)
    return Grid(scale, zeros, scheme.bits)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in the dtype that is stored; 1 in place of one that is 0 there."""
    stored = scale.to(dtype)
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def round_to_nearest(weight: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype) -> QuantizedMatrix:
    """Every number of a weight [rows, columns] by itself.

    Args:
        dtype: of the scales, and of the weight when it is used.
    """
    wide = weight.double()
    grid = fit_grid(wide, scheme, dtype)
    return QuantizedMatrix(grid.round(wide.view(*grid.scale.shape, -1)).view(wide.shape), grid)
