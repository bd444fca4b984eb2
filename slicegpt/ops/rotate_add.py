"""`rotate_add`: a block's output projection, its shortcut and the residual sum in one GEMM."""

import torch
from torch import Tensor

from slicegpt.ops import many_rows, quantized, reference, torch_gemm
from slicegpt.ops.contracts import (
    bad,
    block_sums_of_squares,
    check_alike,
    check_any_dtype,
    rotate_add_outputs,
    sumsq_dtype,
)
from slicegpt.ops.cuda import decode as cuda_decode
from slicegpt.ops.dispatch import CPU_KERNELS, GemmDispatcher, capability_of, requested_backend
from slicegpt.ops.panels import PanelWeight
from slicegpt.ops.registration import register

OP = "rotate_add"
DISPATCHER = GemmDispatcher(OP)


def rotate_add(
    a: Tensor,
    weight: Tensor | PanelWeight,
    h: Tensor,
    shortcut: Tensor | None = None,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`h_next = a Wᵀ + h Sᵀ + bias`, and the sums of squares of its rows for the norm that follows.

    With a dense shortcut, two sources and one accumulator. Without one, h itself is added (padded with zero columns
    where the next boundary is wider). That is an identity shortcut, and a compact one `S = I - F Fᵀ` as well: pass
    `a = [a | z]`, `z = h F` from `norm_linear`, and `weight = [W_out | -F]`. Sums are kept in float32 and rounded
    once (by a CPU library's GEMMs, for many rows or without the compiled kernels, 16-bit ones a second time,
    after `h Sᵀ + bias`). The same call gives the same bits. For many rows SLICEGPT_ROTATE_PREFILL chooses among kernels
    (`slicegpt.ops.many_rows`).

    Args:
        a: [T, K] float16, bfloat16, float32 or float64, what the block computed; unit column stride, T may be 0.
        weight: [d', K], a's dtype, as `nn.Linear` stores it; or a `PanelWeight`, see `slicegpt.ops.quantized`.
        h: [T, d], a's dtype, the stream before the block; unit column stride.
        shortcut: [d', d], a's dtype (as `nn.Linear` stores it), or None, which needs d' >= d.
        bias: [d'], a's dtype, or None.
        factor: a hint for a compact shortcut, or None: Fᵀ [r, d], a's dtype, the same numbers as
            `-weight[:d, K - r:].T` (the rows of `weight` from d on end in zeros), being the last r rows of
            `norm_linear`'s weight. The backend "cuda" may read them there, where L2 still holds them, and not in
            `weight`; the others ignore it. The numbers are not compared.

    Returns:
        h_next: [T, d'] of a's dtype.
        sumsq: [T, ceil(d' / 32)] float32 (float64 for a float64 stream): the sums of squares of h_next as it is
            stored, over every 32 columns.

    Raises:
        SliceGPTError: an argument has the wrong shape, dtype, device or layout, or the requested backend
            (environment variable SLICEGPT_BACKEND) cannot do it.
    """
    if isinstance(weight, PanelWeight):
        return quantized.rotate_add(a, weight, h, shortcut, bias)
    return _operator(a, weight, h, shortcut, bias, factor)


def is_supported(
    capability: tuple[int, int] | None, dtype: torch.dtype, rows: int = 1, backend: str = "auto"
) -> bool:
    """Whether `rotate_add` takes `rows` rows of this dtype on a device (None: a CPU) with a backend present here."""
    return DISPATCHER.is_supported(backend, capability, dtype, rows)


def reads_factor(weight: Tensor, factor: Tensor, rows: int = 1) -> bool:
    """Whether a call with so many rows and this `factor` reads it, and not the last columns of `weight`."""
    if isinstance(weight, PanelWeight) or _implementation(weight, rows) != "cuda":
        return False
    return cuda_decode.takes_factor(weight, factor)


def _implementation(like: Tensor, rows: int) -> str:
    return DISPATCHER.choose(requested_backend(), capability_of(like), like.dtype, rows)


def _check(
    a: Tensor,
    weight: Tensor,
    h: Tensor,
    shortcut: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
) -> None:
    """What can be known from the arguments' metadata: also run while tracing."""
    if a.dim() != 2:
        raise bad(OP, "a", "be [T, K]", list(a.shape))
    check_any_dtype(OP, "a", a)
    if weight.dim() != 2 or weight.shape[1] != a.shape[1]:
        raise bad(OP, "weight", f"be [d', K] for a's {a.shape[1]} columns", list(weight.shape))
    if h.dim() != 2 or h.shape[0] != a.shape[0]:
        raise bad(OP, "h", f"be [T, d] for a's {a.shape[0]} rows", list(h.shape))
    if shortcut is not None and (
        shortcut.dim() != 2 or shortcut.shape[0] != weight.shape[0] or shortcut.shape[1] != h.shape[1]
    ):
        expected = f"be [d', d] = [{weight.shape[0]}, {h.shape[1]}]"
        raise bad(OP, "shortcut", expected, list(shortcut.shape))
    if shortcut is None and weight.shape[0] < h.shape[1]:
        expected = f"have at least h's {h.shape[1]} columns as rows where there is no shortcut"
        raise bad(OP, "weight", expected, weight.shape[0])
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise bad(OP, "bias", f"be [d'] = [{weight.shape[0]}]", list(bias.shape))
    if factor is not None and shortcut is not None:
        raise bad(OP, "factor", "be None beside a dense shortcut", list(factor.shape))
    if factor is not None and (
        factor.dim() != 2 or factor.shape[0] > a.shape[1] or factor.shape[1] != h.shape[1]
    ):
        expected = f"be [r, d] for at most a's {a.shape[1]} and exactly h's {h.shape[1]} columns"
        raise bad(OP, "factor", expected, list(factor.shape))
    others = {"weight": weight, "h": h, "shortcut": shortcut, "bias": bias, "factor": factor}
    check_alike(OP, "a", a, others)


def _fake(a, weight, h, shortcut, bias, factor=None) -> tuple[Tensor, Tensor]:
    _check(a, weight, h, shortcut, bias, factor)
    return rotate_add_outputs(a, weight)


def _run(a, weight, h, shortcut, bias, factor=None) -> tuple[Tensor, Tensor]:
    _check(a, weight, h, shortcut, bias, factor)
    if a.shape[0] == 0 or weight.shape[0] == 0:
        return rotate_add_outputs(a, weight)
    kernel = many_rows.kernel_for(a, weight, h, shortcut, bias)
    if kernel is not None:
        return many_rows.rotate_add(kernel, a, weight, h, shortcut, bias)
    name = _implementation(a, a.shape[0])
    if name == "torch":
        h_next = torch_gemm.rotate(a, weight, h, shortcut, bias)
        return h_next, block_sums_of_squares(h_next.to(sumsq_dtype(a.dtype)))
    if name == "reference":
        return reference.rotate_add(a, weight, h, shortcut, bias)
    a = a if a.stride(1) == 1 else a.contiguous()
    h = h if h.stride(1) == 1 else h.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    shortcut = shortcut if shortcut is None or shortcut.stride(1) == 1 else shortcut.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch = DISPATCHER.launcher(name)
    if name in CPU_KERNELS:
        return launch(a, weight, h, shortcut, bias)
    hint = (factor,) if name == "cuda" else ()
    with torch.cuda.device(a.device):
        return launch(a, weight, h, shortcut, bias, *hint)


_operator = register(
    "rotate_add(Tensor a, Tensor weight, Tensor h, Tensor? shortcut, Tensor? bias, "
    "Tensor? factor=None) -> (Tensor, Tensor)",
    implementation=_run,
    fake=_fake,
)
