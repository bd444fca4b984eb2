"""The fused GEMMs as library GEMMs and torch epilogues: on CPUs, and on GPUs without another implementation.

On a GPU the products stay in float32 until they are scaled and summed (cuBLAS writes float32 from 16-bit inputs).
A CPU's 16-bit GEMMs round what they write. So there `norm_linear` normalises its input first, as the unfused network
does, and `rotate_add` adds onto a base that is rounded once before: `h` or `h + bias` or `h Sᵀ + bias`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt.reference import activate, block_sums_of_squares, sumsq_dtype

_HALF = (torch.float16, torch.bfloat16)


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
    scale = row_scale(h, sumsq, divisor, eps)
    if h.dtype in _HALF and not h.is_cuda:
        normed = (h * scale).to(h.dtype)
        output = activate(F.linear(normed, weight[:n_scaled], bias), activation)
        unscaled = F.linear(h, weight[n_scaled:])
    else:
        product = _product(h, weight)
        pre = product[:, :n_scaled]
        pre *= scale
        if bias is not None:
            pre += bias
        if activation == "none":
            return product.to(h.dtype)
        output, unscaled = activate(pre, activation).to(h.dtype), product[:, n_scaled:].to(h.dtype)
    return torch.cat((output, unscaled), dim=1) if len(weight) > n_scaled else output


def rotate_add(
    a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `slicegpt.ops.rotate_add`."""
    if shortcut is not None:
        base = _product(h, shortcut)
        base = base if bias is None else base + bias
    else:
        base = F.pad(h, (0, len(weight) - h.shape[1]))
        base = base if bias is None else base + bias
    if h.dtype in _HALF and h.is_cuda:
        h_next = torch.addmm(base.float(), a, weight.mT, out_dtype=torch.float32).to(h.dtype)
    else:
        h_next = torch.addmm(base.to(h.dtype), a, weight.mT)
    return h_next, block_sums_of_squares(h_next.to(sumsq_dtype(h.dtype)))


def row_scale(h: Tensor, sumsq: Tensor | None, divisor: float, eps: float) -> Tensor:
    """`rsqrt(|h|² / divisor + eps)` of every row, [T, 1], float32 or wider."""
    if sumsq is None:
        sumsq = h.to(sumsq_dtype(h.dtype)).square()
    return (sumsq.sum(dim=1, keepdim=True) / divisor + eps).rsqrt()


def _product(h: Tensor, weight: Tensor) -> Tensor:
    """`h Wᵀ` in float32 or wider on a GPU, in h's dtype on a CPU."""
    if h.dtype in _HALF and h.is_cuda:
        return torch.mm(h, weight.mT, out_dtype=torch.float32)
    return torch.mm(h, weight.mT)
