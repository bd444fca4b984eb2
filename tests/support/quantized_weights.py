"""Weights of 8 and 4 bits for tests: random codes, and layers rounded to nearest."""

import torch
import torch.nn.functional as F
from support.gemm_bounds import U, sum_error
from torch import Tensor, nn

from slicegpt.ops.panels import COLUMNS, PanelWeight
from slicegpt.runtime.linear_weights import Codes


def random_codes(
    rows: int, columns: int, bits: int, groups: int = 1, zeros: bool = False, seed: int = 0
) -> Codes:
    """Every code there is, scales of the size that makes numbers of up to about 1."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    scales = (0.5 + torch.rand(rows, groups, generator=generator)).div(half).bfloat16()
    points = torch.randint(-8, 8, (rows, groups), generator=generator).to(torch.int8) if zeros else None
    return Codes(codes, scales, points, bits)


def panels(codes: Codes, gated: bool = False) -> PanelWeight:
    return PanelWeight.pack(codes.codes, codes.scales, codes.zeros, codes.bits, gated)


def dense(codes: Codes) -> Tensor:
    """`(codes - zeros) * scales`, float64 [rows, columns]."""
    width = codes.codes.shape[1] // codes.scales.shape[1]
    values = codes.codes.double()
    if codes.zeros is not None:
        values -= codes.zeros.double().repeat_interleave(width, dim=1)
    return values * codes.scales.double().repeat_interleave(width, dim=1)


def rounded(module: nn.Module, bits: int = 8, group: int | None = None) -> Codes:
    """The weight of a layer, rounded to nearest."""
    weight = module.weight.detach().double()
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    half = 1 << (bits - 1)
    scales = (groups.abs().amax(dim=2) / (half - 1)).clamp(min=1e-8).to(module.weight.dtype)
    codes = (groups / scales.double()[..., None]).round().clamp(-half, half - 1).to(torch.int8)
    return Codes(codes.flatten(1), scales, None, bits)


def row_error(x: Tensor, weight: PanelWeight) -> Tensor:
    """What rows x [T, columns] may add to the error of their products with the quantized part of a weight.

    32 neighbours become multiples of 1 / 32767 of the largest of them: half of one is lost, and a hundredth of one to
    the rounding of the factors. With zero points the codes (0 to 15) and the points (the same) are multiplied
    separately, and the difference is smaller than either.
    """
    x = F.pad(x.double().abs(), (0, -x.shape[1] % COLUMNS))
    whole = F.pad(weight.with_rest(None, 0).double().abs(), (0, x.shape[1] - weight.columns))
    largest, sizes = x.unflatten(1, (-1, COLUMNS)).amax(2), whole.unflatten(1, (-1, COLUMNS)).sum(2)
    error = 0.51 / 32767 * largest @ sizes.mT
    if weight.zeros is not None:
        scales = (
            weight.scales.double().mT.repeat_interleave(COLUMNS * weight.group_blocks, dim=2).flatten(0, 1)
        )
        if weight.gated:
            scales = torch.cat([half[: weight.rows // 2] for half in scales.chunk(2)])
        error += sum_error(x @ (30 * scales[: weight.rows]).mT, x.shape[1] // COLUMNS) + 2 * U * error
    return error
