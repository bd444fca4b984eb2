"""`norm_linear` and `rotate_add` on a CPU as its library's GEMM and a kernel for the rest, for many rows.

Arguments and results are those of `slicegpt.ops`; the tensors are validated. What torch takes several passes for (norm,
bias, activation, gates, sums of squares) is one here, in float32. A library's bfloat16 product is rounded before it is
scaled; float16 ones could overflow and are left to `slicegpt.ops.library_gemm`.
"""

import torch
from torch import Tensor

from slicegpt.ops import cpu_decode, library_gemm
from slicegpt.ops.reference import GATED, norm_linear_output, sumsq_output

DTYPES = (torch.bfloat16, torch.float32)


def is_supported(capability: tuple[int, int] | None, dtype: torch.dtype, tokens: int = 1) -> bool:
    """Whether the kernels are built, on a CPU (capability None), and take this dtype; any number of rows."""
    return capability is None and cpu_decode.why_not() is None and dtype in DTYPES


def norm_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sumsq: Tensor | None,
    n_scaled: int,
    activation: str,
    divisor: float,
    eps: float,
) -> Tensor:
    """See `slicegpt.ops.norm_linear`."""
    product = torch.mm(h, weight.mT)
    y = norm_linear_output(h, weight, n_scaled, activation) if activation in GATED else product
    if y.numel() == 0:
        return y
    arguments = cpu_decode.norm_linear_arguments(
        h, weight, bias, sumsq, y, n_scaled, activation, divisor, eps
    )
    cpu_decode.finish(h.dtype, arguments, product)
    return y


def rotate_add(
    a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `slicegpt.ops.rotate_add`."""
    h_next = library_gemm.rotate(a, weight, h, shortcut, bias)
    sumsq = sumsq_output(h_next)
    if h_next.numel() > 0:
        arguments = cpu_decode.rotate_add_arguments(a, weight, h, shortcut, bias, h_next, sumsq)
        cpu_decode.row_sums(a.dtype, arguments, h_next)
    return h_next, sumsq
