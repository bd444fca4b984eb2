"""`norm_linear` and `rotate_add` as a library's GEMM with float32 output and a CUDA epilogue, for any number of rows.

For GPUs whose tensor cores Triton does not reach (Turing), and wherever else nothing better exists. cuBLAS writes
float32 products of 16-bit inputs, so that nothing is rounded, or overflows, before it is scaled; one kernel then does
what torch needs several passes for. Arguments and results are those of `slicegpt.ops`, validated as for
`slicegpt.ops.cuda.decode`.
"""

import torch
from torch import Tensor

from slicegpt.ops.contracts import NormLinearInputs, rotate_add_outputs
from slicegpt.ops.cuda import extension
from slicegpt.ops.cuda.decode import DTYPES, norm_linear_arguments, rotate_add_arguments


def is_supported(capability: tuple[int, int], dtype: torch.dtype, tokens: int = 1) -> bool:
    """Whether the epilogues take this dtype on this compute capability (any number of rows, any width)."""
    if capability < (7, 5) or dtype not in DTYPES:
        return False
    # cuBLAS has no bfloat16 GEMM for Turing.
    return dtype is not torch.bfloat16 or capability >= (8, 0)


def norm_linear(inputs: NormLinearInputs, out: Tensor | None = None) -> Tensor:
    """See `slicegpt.ops.norm_linear`. out: where the result goes, unit column stride; None allocates."""
    extension.require("norm_linear")
    y = inputs.output() if out is None else out
    if y.numel() == 0:
        return y
    with extension.on_device(inputs.h):
        product = _product(inputs.h, inputs.weight)
        arguments = norm_linear_arguments(inputs, y)
        stream = extension.current_stream(inputs.h)
        status = extension.call("norm_linear_epilogue", inputs.h, arguments, product.data_ptr(), stream)
        extension.check_status("norm_linear", status)
    return y


def rotate_add(
    a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `slicegpt.ops.rotate_add`."""
    extension.require("rotate_add")
    h_next, sumsq = rotate_add_outputs(a, weight)
    if h_next.numel() == 0:
        return h_next, sumsq
    with extension.on_device(a):
        product = _product(a, weight)
        second = None if shortcut is None else _product(h, shortcut)
        arguments = rotate_add_arguments(a, weight, h, shortcut, bias, None, h_next, sumsq)
        rotated = 0 if second is None else second.data_ptr()
        stream = extension.current_stream(a)
        status = extension.call("rotate_add_epilogue", a, arguments, product.data_ptr(), rotated, stream)
        extension.check_status("rotate_add", status)
    return h_next, sumsq


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows weightᵀ` in float32, contiguous."""
    if rows.dtype is torch.float32:
        return rows @ weight.mT
    if not rows.is_cuda:
        return rows.float() @ weight.float().mT  # a CPU's GEMMs write what they read
    return torch.mm(rows, weight.mT, out_dtype=torch.float32)
