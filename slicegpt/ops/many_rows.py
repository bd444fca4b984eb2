"""How `rotate_add` multiplies more rows than the decode kernels take: `SLICEGPT_ROTATE_PREFILL`.

    auto         (default) the runtime's blocks with dense shortcuts: one GEMM of the library; everything else: fused
    fused        the kernel that `SLICEGPT_BACKEND` chooses: Triton's, or cuBLAS and an epilogue
    library      one GEMM of the library over `[a | h]` and `[W | S]`, or with h as what it accumulates onto; the next
                 norm reads the stream for its sums of squares. On any device
    wgmma        csrc/rotate_wgmma.cu, on Hopper; wgmma-pairs: two thread blocks share what they read of the weights
    checked      wgmma-pairs, else wgmma, if it multiplies integers exactly, once a process; else fused

No choice but `auto` is made by an estimate (docs/kernels.md has its arithmetic), and none has been measured on a GPU.
"""

import logging
import os
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.ops import torch_gemm
from slicegpt.ops.contracts import HALF, block_sums_of_squares, sumsq_dtype
from slicegpt.ops.cuda import extension, rotate_wgmma
from slicegpt.ops.dispatch import Capability, capability_of, few_rows, requested_backend

CHOICES = ("auto", "fused", "library", *rotate_wgmma.KERNELS, "checked")

# From so many rows on the kernels of `norm_linear` read a row's sums in a launch of their own (kernels/norm_linear.py):
# that this launch reads the stream instead costs bytes, but no launch.
ONE_PRODUCT_ROWS = 257

# Columns of 16-bit items at multiples of which a GEMM reads 16 bytes at a time.
PIECE_ITEMS = 8

_logger = logging.getLogger("slicegpt")


def requested() -> str:
    """The value of SLICEGPT_ROTATE_PREFILL; `auto` where it is not set."""
    wish = os.environ.get("SLICEGPT_ROTATE_PREFILL", "auto")
    if wish not in CHOICES:
        raise SliceGPTError(f"SLICEGPT_ROTATE_PREFILL must be one of {', '.join(CHOICES)}, got {wish!r}")
    return wish


def joins_weights(device: torch.device) -> bool:
    """Whether `[W | S]` of a block is worth storing as one matrix: on a GPU, and where `library` is asked for."""
    return device.type == "cuda" or requested() == "library"


def in_one_product(capability: Capability, dtype: torch.dtype, rows: int, dense: bool) -> bool:
    """Whether the runtime multiplies so many rows of a block in one GEMM of the library, without sums of squares.

    dense: the block has a dense shortcut; else h is what the GEMM accumulates onto, in place.
    """
    wish, backend = requested(), requested_backend()
    if wish not in ("auto", "library") or backend in ("triton", "reference"):
        return False
    if wish == "auto":
        # On a CPU this is all that is asked, so that `torch.compile` can trace it.
        known = capability is not None and capability >= (7, 5) and dtype in HALF
        if not (known and dense and rows >= ONE_PRODUCT_ROWS):
            return False
    return rows > few_rows(capability, dtype)


def kernel_for(
    a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None, bias: Tensor | None
) -> str | None:
    """What the operator takes instead of the fused kernel: "library", "wgmma", "wgmma-pairs"; None: nothing."""
    wish, capability = requested(), capability_of(a)
    if wish in ("auto", "fused") or a.shape[0] <= few_rows(capability, a.dtype):
        return None
    if requested_backend() in ("triton", "reference"):
        return None
    if wish == "library":
        return wish
    if capability is None or not rotate_wgmma.takes(a, weight, h, shortcut, bias):
        _say_fused(wish, capability, a.dtype)
        return None
    if wish != "checked":
        return wish
    # What the check waits for cannot be waited for during a capture.
    return None if extension.capturing(a) else rotate_wgmma.checked_kernel(a.device, a.dtype)


@lru_cache
def _say_fused(wish: str, capability: Capability, dtype: torch.dtype) -> None:
    """Once for each class of calls."""
    _logger.info(
        "rotate_add: %s takes float16 and bfloat16 on a GPU, in rows at multiples of 16 bytes: others are fused",
        wish,
    )


def rotate_add(
    kernel: str, a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`slicegpt.ops.rotate_add` by a kernel that `kernel_for` named."""
    if kernel != "library":
        return rotate_wgmma.rotate_add(a, weight, h, shortcut, bias, kernel)
    if shortcut is not None:
        h_next = a.new_empty((a.shape[0], weight.shape[0]))
        torch_gemm.one_product(h_next, torch.cat((a, h), dim=1), torch.cat((weight, shortcut), dim=1), bias)
    else:
        wider = weight.shape[0] - h.shape[1]
        base = F.pad(h, (0, wider)) if wider else h.clone()
        h_next = torch_gemm.add_product_(base, a, weight, bias)
    return h_next, block_sums_of_squares(h_next.to(sumsq_dtype(a.dtype)))
