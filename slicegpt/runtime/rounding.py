"""Weights rounded to nearest as the runtime is made: `Runtime(model, weights="int4")`, to measure speed or to try.

Slicing with `--quantize` chooses codes that lose less; here the largest number of a row or group sets its scale.
"""

from collections.abc import Callable

import torch
from torch import nn

from slicegpt.errors import SliceGPTError
from slicegpt.runtime.linear_weights import Codes, stored_codes

# name: bits and columns that share a scale (None: all of a row).
ROUNDINGS = {"int8": (8, None), "int4": (4, 32)}
ROWS_AT_ONCE = 8192


def rounding(name: str) -> Callable[[nn.Module, bool], Codes | None]:
    """A `WeightReader.codes_of` that rounds what is stored as plain numbers.

    Tables, heads, and layers whose columns are no whole groups, take 8 bits and a scale a row.

    Raises:
        SliceGPTError: another name than int8 or int4.
    """
    if name not in ROUNDINGS:
        raise SliceGPTError(f"must be one of {', '.join(ROUNDINGS)}, got {name!r}", "weights")
    bits, group = ROUNDINGS[name]

    def codes_of(module: nn.Module, table: bool) -> Codes | None:
        stored = stored_codes(module)
        if stored is not None:
            return stored
        if bits == 8 or table or module.weight.shape[1] % group:
            return round_to_nearest(module.weight, 8, None)
        return round_to_nearest(module.weight, bits, group)

    return codes_of


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, bits: int, group: int | None) -> Codes:
    """Symmetric codes of a weight [rows, columns], the scale being that of the largest number of a row or group."""
    half = 1 << (bits - 1)
    codes, scales = [], []
    for rows in weight.detach().split(ROWS_AT_ONCE):
        groups = rows.float().unflatten(1, (-1, group or rows.shape[1]))
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        # There is one code more below 0 than above it: the sign of the scale gives it to the longer side.
        scale = (torch.where(-low > high, -low, -high) / half).to(weight.dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        quotients = groups / scale.float()[..., None]
        codes.append(quotients.round_().clamp_(-half, half - 1).to(torch.int8).flatten(1))
        scales.append(scale)
    return Codes(torch.cat(codes), torch.cat(scales), None, bits)
