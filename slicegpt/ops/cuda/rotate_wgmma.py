"""`rotate_add` for many rows by the wgmma kernel of csrc/rotate_wgmma.cu: float16 and bfloat16 on Hopper.

Arguments and results are those of `slicegpt.ops`, validated as for `slicegpt.ops.cuda.decode`. It reads its operands
with TMA, so that rows must lie at multiples of 16 bytes: `takes` tells.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.ops.contracts import HALF, block_sums_of_squares, rotate_add_outputs
from slicegpt.ops.cuda import extension
from slicegpt.ops.cuda.decode import rotate_add_arguments

_logger = logging.getLogger("slicegpt")

# Thread blocks of a cluster, by name.
KERNELS = {"wgmma": 1, "wgmma-pairs": 2}
# Rows, columns, columns of a and h of the product that `checked_kernel` compares: more tiles than multiprocessors, an
# odd number of rows of tiles, tiles that end within, steps that end within, and stages that are used again.
CHECK_SHAPE = (5000, 1032, 200, 136)
PIECE_ITEMS = 8  # of 16 bytes


def is_supported(capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
    """Whether the kernel can exist for this dtype on this compute capability; `has_wgmma`: whether it does."""
    return capability == (9, 0) and dtype in HALF


def has_wgmma() -> bool:
    """Whether the kernel runs on the current device: 9.0, with code built for 9.0a."""
    return extension.is_available() and extension.module.has_rotate_wgmma(torch.cuda.current_device())


def takes(a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernel can read these tensors: half precision, pieces of 16 bytes."""
    matrices = [a, weight, h] if shortcut is None else [a, weight, h, shortcut]
    pieces = [weight.shape[0]] if shortcut is not None else [weight.shape[0], h.shape[1]]
    return (
        a.dtype in HALF
        and all(one.numel() > 0 and one.stride(1) == 1 for one in matrices)
        and all(one.data_ptr() % 16 == 0 and one.stride(0) % PIECE_ITEMS == 0 for one in matrices)
        and all(one.stride(0) >= one.shape[1] for one in matrices)
        and all(columns % PIECE_ITEMS == 0 for columns in pieces)
        and (bias is None or (bias.stride(0) == 1 and bias.data_ptr() % 4 == 0))
    )


def rotate_add(
    a: Tensor,
    weight: Tensor,
    h: Tensor,
    shortcut: Tensor | None = None,
    bias: Tensor | None = None,
    kernel: str = "wgmma-pairs",
) -> tuple[Tensor, Tensor]:
    """See `slicegpt.ops.rotate_add`, for tensors that it `takes`. kernel: of `KERNELS`, all with the same bits."""
    extension.require("rotate_add")
    h_next, sumsq = rotate_add_outputs(a, weight)
    with extension.on_device(a):
        arguments = rotate_add_arguments(a, weight, h, shortcut, bias, None, h_next, sumsq)
        stream = extension.current_stream(a)
        status = extension.call("rotate_add_wgmma", a, arguments, KERNELS[kernel], stream)
        extension.check_status("rotate_add", status)
    return h_next, sumsq


@lru_cache
def checked_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """ "wgmma-pairs", else "wgmma", where it computes a product of small integers exactly; else None, with a warning.

    Such a product has one right answer to the bit, in whatever order it is summed. Found out once a process; it
    synchronises.
    """
    with extension.on_device(torch.empty(0, device=device)):
        if not has_wgmma():
            return None
    for kernel in ("wgmma-pairs", "wgmma"):
        try:
            if all(_is_exact(device, dtype, kernel, dense) for dense in (True, False)):
                return kernel
            reason = "gives a wrong product"
        except SliceGPTError as error:
            reason = str(error)
        _logger.warning("rotate_add: the kernel %s is not used on %s: it %s", kernel, device, reason)
    return None


def _is_exact(device: torch.device, dtype: torch.dtype, kernel: str, dense: bool) -> bool:
    rows, columns, inner, width = CHECK_SHAPE
    width = width if dense else columns
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)

    a, weight, h = integers(rows, inner), integers(columns, inner), integers(rows, width)
    shortcut = integers(columns, width) if dense else None
    bias = integers(columns)
    # Sums stay below 2^24: float32 holds them all.
    exact = a.float() @ weight.float().mT + bias.float()
    exact += h.float() @ shortcut.float().mT if dense else h.float()
    expected = exact.to(dtype)
    h_next, sumsq = rotate_add(a, weight, h, shortcut, bias, kernel)
    squares = block_sums_of_squares(expected.float())
    return torch.equal(h_next, expected) and torch.allclose(sumsq, squares, rtol=1e-5, atol=0)
