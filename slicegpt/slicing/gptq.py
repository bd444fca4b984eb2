"""GPTQ: a weight's columns are rounded one after the other, and what each one loses is made up for by those after it.

Of a weight `W` [rows, K] and the second moments `H` [K, K] of what it is multiplied with, the codes are to make
`tr(δ H δᵀ)` small, `δ = W - Q` (Frantar et al., 2022, arXiv 2210.17323). With `H = R Rᵀ`, `R` upper triangular, that is
`‖δ R‖²`, whose column k is

    Σ_{i<k} δ_i R_ik + δ_k R_kk,

so that, going from the first column to the last, the best that column k can do is to round
`w_k + Σ_{i<k} δ_i R_ik / R_kk`: the update of the optimal brain surgeon (Hassibi and Stork, 1993), without the inverse
of `H`. Columns that are not rounded come last and make their part of the sum 0. The columns with the largest moments
come first ("activation order"), while there are many left to make up for them; scales and groups stay with the
columns' places, so that nothing of the order has to be stored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slicegpt.conversion.rounding import Grid, QuantizedMatrix, fit_grid
from slicegpt.errors import SliceGPTError
from slicegpt.modeling.quantized import WeightScheme
from slicegpt.slicing.matrices import column_major, factorise_, panels

logger = logging.getLogger("slicegpt")

# Columns that are rounded before their errors are brought into the rest by one product of matrices.
BLOCK = 128

# Of the mean diagonal, what is added to the diagonal where Cholesky fails, and ten times as much as often as it does.
DAMPING = 1e-6


@dataclass(frozen=True)
class Segment:
    """Neighbouring columns of a weight.

    Attributes:
        columns: how many.
        scheme: what they are rounded to; None: they stay plain numbers. Only the last segment may.
    """

    columns: int
    scheme: WeightScheme | None


def gptq(
    weight: torch.Tensor, moments: torch.Tensor, segments: Sequence[Segment], dtype: torch.dtype
) -> tuple[list[QuantizedMatrix], torch.Tensor]:
    """Round a weight, segment by segment, with errors made up for across all of them.

    Args:
        weight: float64 [rows, K].
        moments: H, float64 [K, K], symmetric, positive semidefinite; it is not changed.
        segments: of K columns in all.
        dtype: of the scales, and of the weight when it is used.

    Returns:
        The matrix of each segment that is rounded, and the columns that are not, float64 [rows, the rest].
    """
    rounded = [segment for segment in segments if segment.scheme is not None]
    count = sum(segment.columns for segment in rounded)
    importance = moments.diagonal()[:count]
    grids, start = [], 0
    for segment in rounded:
        part = slice(start, start + segment.columns)
        grids.append(fit_grid(weight[:, part], segment.scheme, dtype))
        start = part.stop
    # A column that is always 0 has nothing to say; the order of equal ones must not depend on the library.
    order = torch.argsort(importance, descending=True, stable=True)
    tail = torch.arange(count, weight.shape[1], device=order.device)
    order = torch.cat((order, tail))
    factor = _factor(moments, order)
    codes, rest = _round_in_order(weight, factor, order, count, _Grids(rounded, grids, dtype))
    matrices = [
        QuantizedMatrix(part, grid)
        for part, grid in zip(codes.split([own.columns for own in rounded], dim=1), grids, strict=True)
    ]
    return matrices, rest


def _factor(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """R, upper triangular, of `H = R Rᵀ` with rows and columns of H in this order; its own are from last to first.

    So it is the lower triangular factor of H from last to first, which stays where it was made: see `_columns`.
    """
    backwards = order.flip(0)
    damping = 0.0
    size = len(moments)
    while True:
        system = column_major(size, size, moments.device)
        for rows in panels(size, size):  # its columns, which are in one piece; it is symmetric
            system.mT[rows] = moments[backwards[rows]][:, backwards]
        system.diagonal().add_(damping * moments.diagonal().mean())
        if factorise_(system):
            return system
        damping = 10 * damping or DAMPING
        if damping > 1:
            raise SliceGPTError(f"no Cholesky factor of moments of {len(moments)} columns", "quantize")
        logger.warning("quantize: Cholesky failed on a system of %d; damped by %g", len(moments), damping)


def _columns(factor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """The columns from `begin` to `end` of R, down to its diagonal, [end, end - begin]."""
    size = len(factor)
    return factor[size - end :, size - end : size - begin].flip(0, 1)


class _Grids:
    """The grids of all columns, by their places in the weight."""

    def __init__(self, segments: Sequence[Segment], grids: Sequence[Grid], dtype: torch.dtype):
        self.dtype, self.half = dtype, 1 << (grids[0].bits - 1)
        self.scale = torch.cat([grid.scale for grid in grids], dim=1).mT.double().contiguous()
        zeros = [grid.zero_point for grid in grids]
        self.zeros = None if zeros[0] is None else torch.cat(zeros, dim=1).mT.double().contiguous()
        groups, first = [], 0
        for segment, grid in zip(segments, grids, strict=True):
            count = grid.scale.shape[1]
            own = torch.arange(first, first + count, device=self.scale.device)
            groups.append(own.repeat_interleave(segment.columns // count))
            first += count
        self.group_of = torch.cat(groups)

    def block(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points [n, rows] of some columns."""
        groups = self.group_of[columns]
        return self.scale[groups], None if self.zeros is None else self.zeros[groups]


def _round_in_order(
    weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, count: int, grid: _Grids
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, count] in the weight's own order, and the columns behind them with the errors made up for."""
    wide = weight.mT[order]  # columns are rows here, so that each one lies in one piece
    size, rows = wide.shape
    errors = torch.zeros_like(wide)
    codes = torch.zeros(count, rows, dtype=torch.int8, device=weight.device)
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        scales, zeros = grid.block(order[begin:end])
        own_columns = _columns(factor, begin, end)
        carried = own_columns[:begin].mT @ errors[:begin]
        for index in range(begin, end):
            own = index - begin
            sums = torch.addmv(carried[own], errors[begin:index].mT, own_columns[begin:index, own])
            target = wide[index] + sums / own_columns[index, own]
            code = torch.round(target / scales[own])
            if zeros is not None:
                code += zeros[own]
            code.clamp_(-grid.half, grid.half - 1)
            codes[order[index]] = code.to(torch.int8)
            value = (code if zeros is None else code - zeros[own]) * scales[own]
            # As the network has it, see `slicegpt.modeling.quantized.dequantised`.
            errors[index] = wide[index] - value.to(grid.dtype).double()
    rest = wide[count:]
    if count < size:
        # δ_t R_tt = -δ_q R_qt
        last = _columns(factor, count, size)
        missing, corner = last[:count].mT @ errors[:count], last[count:].mT
        rest = rest + torch.linalg.solve_triangular(corner, missing, upper=False)
    return codes.mT.contiguous(), rest.mT.contiguous()
