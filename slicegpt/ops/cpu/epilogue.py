"""`norm_linear` and `rotate_add` on a CPU as its library's GEMM and a kernel for the rest, for many rows.

Arguments and results are those of `slicegpt.ops`; the tensors are validated. What torch takes several passes for (norm,
bias, activation, gates, sums of squares) is one here, in float32. A library's bfloat16 product is rounded before it is
scaled; float16 ones could overflow and are left to `slicegpt.ops.torch_gemm`.
"""

import torch
from torch import Tensor

from slicegpt.ops import torch_gemm
from slicegpt.ops.contracts import NormLinearInputs, sumsq_output
from slicegpt.ops.cpu import extension, gemm

DTYPES = (torch.bfloat16, torch.float32)


def is_supported(capability: tuple[int, int] | None, dtype: torch.dtype, tokens: int = 1) -> bool:
    """Whether the kernels are built, on a CPU (capability None), and take this dtype; any number of rows."""
    return capability is None and extension.is_available() and dtype in DTYPES


def norm_linear(inputs: NormLinearInputs) -> Tensor:
    """See `slicegpt.ops.norm_linear`."""
    product = torch.mm(inputs.h, inputs.weight.mT)
    y = inputs.output() if inputs.gated else product
    if y.numel() > 0:
        gemm.finish(inputs, y, product)
    return y


def rotate_add(
    a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `slicegpt.ops.rotate_add`."""
    h_next = torch_gemm.rotate(a, weight, h, shortcut, bias)
    sumsq = sumsq_output(h_next)
    if h_next.numel() > 0:
        arguments = gemm.rotate_add_arguments(a, weight, h, shortcut, bias, h_next, sumsq)
        gemm.row_sums(a.dtype, arguments, h_next)
    return h_next, sumsq
