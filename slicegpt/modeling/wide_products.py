"""Matrix products of 16-bit tensors on a CPU without instructions for them: in float32, rounded once.

On an x86 CPU that has neither AVX512-BF16 nor AMX, PyTorch's products in bfloat16 and float16 run at a seventh of the
rate of those in float32 (AMD EPYC with AVX2, one thread: 8.9 and 64 GFLOP/s), and most checkpoints are bfloat16. The
operands are widened a panel at a time, which is exact; products are summed in float32, as those of a GPU and of
instructions for bfloat16 are, and the result is rounded to the operands' dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Rows of one operand and elements of the other that are widened at a time: 16 MB of a matrix, and 18 MB of what an MLP
# of 8960 neurons writes from. The library's products are at full speed from some hundred rows on.
ROWS, PANEL = 1 << 9, 1 << 22

# With fewer rows, reading the matrix decides, which is half as long in 16 bits.
FEWEST_ROWS = 32


# What an x86 has for products in 16 bits, as PyTorch calls it.
INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}


def cpu_capabilities() -> dict:
    """What this machine's CPU has, as PyTorch knows it; nothing where the release does not tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def has_halves(dtype: torch.dtype) -> bool:
    """Whether the CPU is an x86 with instructions for products in `dtype`, bfloat16 or float16."""
    capabilities = cpu_capabilities()
    return any(capabilities.get(name, False) for name in INSTRUCTIONS[dtype])


@lru_cache
def lacks_halves(dtype: torch.dtype) -> bool:
    """Whether it is an x86 without them; of other processors it is not known."""
    return cpu_capabilities().get("architecture") == "x86_64" and not has_halves(dtype)


def products_in_float32(device: torch.device) -> contextlib.AbstractContextManager:
    """Within it, products without gradients of 16-bit tensors on a CPU are taken as above, where that is faster there.

    Args:
        device: where the work is done; nothing changes for any but a CPU.
    """
    return _Float32Products() if device.type == "cpu" else contextlib.nullcontext()


class _Float32Products(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        way = _WAYS.get(func)
        if way is not None and not torch.is_grad_enabled():
            out = way(*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


def _applies(*operands: torch.Tensor) -> bool:
    dtype = operands[0].dtype
    same = all(operand.dtype == dtype and operand.device.type == "cpu" for operand in operands)
    return same and dtype in (torch.bfloat16, torch.float16) and lacks_halves(dtype)


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`functional.linear`, or None where it is left to PyTorch."""
    rows = input.numel() // max(1, input.shape[-1])
    if rows < FEWEST_ROWS or weight.dim() != 2 or not _applies(input, weight):
        return None
    flat, out = input.reshape(rows, -1), input.new_empty(rows, len(weight))
    step = max(1, PANEL // weight.shape[1])
    for part, written in zip(flat.split(ROWS), out.split(ROWS), strict=True):
        wide = part.float()
        for begin in range(0, len(weight), step):
            columns = slice(begin, begin + step)
            shift = None if bias is None else bias[columns].float()
            written[:, columns] = functional.linear(wide, weight[columns].float(), shift)
    return out.view(*input.shape[:-1], len(weight))


def _matmul(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """`torch.matmul` and its kin."""
    if input.dim() < 2 or other.dim() < 2:
        return None
    if other.dim() == 2:
        return _linear(input, other.mT)
    if min(input.shape[-2:]) < FEWEST_ROWS or not _applies(input, other):
        return None
    return torch.matmul(input.float(), other.float()).to(input.dtype)


_WAYS: dict[Callable, Callable[..., torch.Tensor | None]] = {functional.linear: _linear} | dict.fromkeys(
    (
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.mm,
        torch.Tensor.bmm,
    ),
    _matmul,
)
