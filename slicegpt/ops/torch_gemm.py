"""The fused GEMMs as library GEMMs and torch epilogues: on CPUs, and on GPUs without another implementation.

On a GPU the products stay in float32 until they are scaled and summed (cuBLAS writes float32 from 16-bit inputs).
A CPU's 16-bit GEMMs round what they write. So there `rotate` adds onto a base that is rounded once before (`h`,
`h + bias` or `h Sᵀ + bias`), and `norm_linear` scales a product that is rounded to bfloat16, or, because a float16 one
could overflow, normalises its float16 input first, as the unfused network does.

One row on a CPU is a matrix-vector product, bound by reading the weights: there the number of calls is what counts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt.ops.contracts import ACTIVATIONS, GATED, HALF, NormLinearInputs, sumsq_dtype


def norm_linear(inputs: NormLinearInputs) -> Tensor:
    """See `slicegpt.ops.norm_linear`; the result may have a larger row stride than it has columns."""
    h, weight, bias, n_scaled = inputs.h, inputs.weight, inputs.bias, inputs.n_scaled
    activation = inputs.activation
    scale = _row_scale(h, inputs.sumsq, inputs.divisor, inputs.eps)
    whole = n_scaled == weight.shape[0]
    if isinstance(scale, float) and h.dtype not in HALF:
        product = _scaled_row(h[0], weight, bias, n_scaled, scale).unsqueeze(0)
        pre = product if whole else product[:, :n_scaled]
    elif h.dtype == torch.float16 and not h.is_cuda:
        product = h.new_empty((h.shape[0], weight.shape[0]))
        pre = product[:, :n_scaled]
        _linear_into(pre, (h * scale).to(h.dtype), weight[:n_scaled])
        if not whole:
            _linear_into(product[:, n_scaled:], h, weight[n_scaled:])
        if bias is not None:
            pre += bias
    else:
        product = _product(h, weight)
        pre = product if whole else product[:, :n_scaled]
        if bias is None:
            pre *= scale
        elif isinstance(scale, float):
            torch.add(bias, pre, alpha=scale, out=pre)
        else:
            torch.addcmul(bias.to(pre.dtype), pre, scale, out=pre)
    if inputs.gated:
        # Into the place of the values, so that what follows stays beside it without a copy.
        gate, up = pre.chunk(2, dim=1)
        up *= GATED[activation](gate)
        product = product[:, n_scaled // 2 :]
    elif activation == "relu":
        pre.relu_()
    elif activation != "none":
        pre.copy_(ACTIVATIONS[activation](pre))
    return product.to(h.dtype)


def _scaled_row(row: Tensor, weight: Tensor, bias: Tensor | None, n_scaled: int, scale: float) -> Tensor:
    """The product of one row, scaled and shifted by the BLAS in passing; the few z columns are scaled back."""
    if n_scaled == weight.shape[0]:
        if bias is not None:
            return torch.addmv(bias, weight, row, alpha=scale)
        return torch.addmv(row[:1], weight, row, beta=0, alpha=scale)
    product = torch.addmv(row[:1], weight, row, beta=0, alpha=scale)
    product[n_scaled:] /= scale
    if bias is not None:
        product[:n_scaled] += bias
    return product


def rotate(a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None, bias: Tensor | None) -> Tensor:
    """`h_next` of `slicegpt.ops.rotate_add`."""
    if shortcut is not None:
        base = _product(h, shortcut)
    elif weight.shape[0] > h.shape[1]:
        base = F.pad(h, (0, weight.shape[0] - h.shape[1]))
    else:
        base = h
    if bias is not None:
        base = base + bias
    if h.is_cuda and h.dtype in HALF:
        return torch.addmm(base.float(), a, weight.mT, out_dtype=torch.float32).to(h.dtype)
    if h.shape[0] == 1:
        return torch.addmv(base[0], weight, a[0])[None]
    return torch.addmm(base, a, weight.mT)


def one_product(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`out = rows Wᵀ + bias`, one GEMM, rounded once: `rotate_add` of rows `[a | h]` and a weight `[W | S]`.

    `out` [T, d'] and `rows` [T, K + d] may be columns of wider matrices: nothing is copied. (For such an `out` PyTorch
    may write the bias before the product: a pass over it more.)
    """
    if bias is None:
        torch.mm(rows, weight.mT, out=out)
    else:
        torch.addmm(bias, rows, weight.mT, out=out)


def add_product_(h: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`h += a Wᵀ + bias` in place, one GEMM that accumulates onto h; with a bias a pass over h before it."""
    if bias is not None:
        h += bias
    return h.addmm_(a, weight.mT)


def _row_scale(h: Tensor, sumsq: Tensor | None, divisor: float, eps: float) -> Tensor | float:
    """`rsqrt(|h|² / divisor + eps)` of every row: [T, 1], float32 or wider; a number for one row on a CPU."""
    dtype = sumsq_dtype(h.dtype)
    if h.shape[0] == 1 and not h.is_cuda:
        if sumsq is not None:
            total = float(sumsq.sum())
        elif h.dtype == dtype:
            total = float(torch.dot(h[0], h[0]))
        else:
            total = float(torch.linalg.vector_norm(h, dtype=dtype)) ** 2
        mean = total / divisor + eps
        if 0 < mean < math.inf:
            return mean**-0.5
    if sumsq is None:
        sumsq = h.to(dtype).square()
    return (sumsq.sum(dim=1, keepdim=True) / divisor + eps).rsqrt()


def _product(h: Tensor, weight: Tensor) -> Tensor:
    """`h Wᵀ`, in float32 where a GPU has 16-bit inputs, else in h's dtype."""
    if h.is_cuda and h.dtype in HALF:
        return torch.mm(h, weight.mT, out_dtype=torch.float32)
    if h.shape[0] == 1:
        return torch.mv(weight, h[0])[None]
    return torch.mm(h, weight.mT)


def _linear_into(out: Tensor, h: Tensor, weight: Tensor) -> None:
    """`out = h Wᵀ` for a block of columns."""
    if h.shape[0] == 1:
        torch.mv(weight, h[0], out=out[0])
    else:
        out.copy_(F.linear(h, weight))
