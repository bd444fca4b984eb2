"""`norm_linear`: the weightless RMS norm as the epilogue of the linear layers that read it."""

from contextlib import nullcontext

import torch
from torch import Tensor

from slicegpt.ops import quantized, reference, torch_gemm
from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.dispatch import CPU_KERNELS, GemmDispatcher, capability_of, requested_backend
from slicegpt.ops.panels import PanelWeight
from slicegpt.ops.registration import register

DISPATCHER = GemmDispatcher("norm_linear")


def norm_linear(
    h: Tensor,
    weight: Tensor | PanelWeight,
    bias: Tensor | None,
    sumsq: Tensor | None,
    n_scaled: int,
    activation: str,
    divisor: float,
    eps: float,
) -> Tensor:
    """`y = [act(s (h W₁ᵀ) + bias) | h W₂ᵀ]` with the row scale `s = rsqrt(|h|² / divisor + eps)`.

    The norm of the canonical network is a row scale only, so it commutes with the product: one GEMM reads the stream
    as it is, and its epilogue scales, shifts and activates the first columns. The rest, the z columns of a compact
    shortcut (`z = h F`, with W₂ = Fᵀ), pass as they are. Products are summed in float32 and not rounded before they
    are scaled, because a float16 stream may hold values whose products overflow. (A CPU library's 16-bit GEMMs, for
    many rows or without the compiled kernels, do round: there the z columns and bfloat16 products are rounded
    once more, and a float16 stream is normalised first.) The same call gives the same bits.

    Args:
        h: [T, d] float16, bfloat16, float32 or float64, the stream; unit column stride, any row stride, T may be 0.
        weight: [N, d], h's dtype, as `nn.Linear` stores it: the rows of W₁, then those of W₂. Or a `PanelWeight`, whose
            quantized rows are W₁ and whose `rest` is W₂; see `slicegpt.ops.quantized`.
        bias: [n_scaled], h's dtype, or None.
        sumsq: [T, P] float32 (float64 for a float64 stream), whose rows sum to `|h|²`, as `rotate_add` returns them;
            None computes the sums from h.
        n_scaled: rows of W₁, 0 to N.
        activation: "none", "relu", "gelu" (erf), "gelu_tanh", "silu", "relu2"; or "silu_gated", "gelu_gated",
            "gelu_tanh_gated": the first half of W₁ is the gate, the second the values, `act(gate) * up`.
        divisor: the number of columns that the norm averages over.
        eps: added to the mean square.

    Returns:
        [T, N] of h's dtype, [T, n_scaled / 2 + N - n_scaled] where gated; shares no memory with an argument.

    Raises:
        SliceGPTError: an argument has the wrong shape, dtype, device or layout, or the requested backend
            (environment variable SLICEGPT_BACKEND) cannot do it.
    """
    if isinstance(weight, PanelWeight):
        return quantized.norm_linear(
            NormLinearInputs(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)
        )
    return _operator(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)


def norm_linear_into(out: Tensor, *arguments) -> None:
    """`norm_linear(*arguments)` into columns of a wider matrix: `out` [T, N] of unit column stride.

    For eager code alone: it is not an operator that `torch.compile` could trace. Kernels for many rows write there;
    what others compute is copied.
    """
    inputs = NormLinearInputs(*arguments)
    h = inputs.h
    if not isinstance(inputs.weight, PanelWeight) and out.numel():
        name = DISPATCHER.choose(requested_backend(), capability_of(h), h.dtype, h.shape[0])
        if name in ("triton", "epilogue"):
            inputs.check()
            with torch.cuda.device(h.device) if h.is_cuda else nullcontext():
                DISPATCHER.launcher(name)(inputs.contiguous(), out=out)
            return
    out.copy_(norm_linear(*arguments))


def is_supported(
    capability: tuple[int, int] | None, dtype: torch.dtype, rows: int = 1, backend: str = "auto"
) -> bool:
    """Whether `norm_linear` takes `rows` rows of this dtype on a device (None: a CPU) with a backend present here."""
    return DISPATCHER.is_supported(backend, capability, dtype, rows)


def _fake(*arguments) -> Tensor:
    inputs = NormLinearInputs(*arguments)
    inputs.check()
    return inputs.output()


def _run(*arguments) -> Tensor:
    inputs = NormLinearInputs(*arguments)
    inputs.check()
    h = inputs.h
    if h.shape[0] == 0 or inputs.weight.shape[0] == 0:
        return inputs.output()
    name = DISPATCHER.choose(requested_backend(), capability_of(h), h.dtype, h.shape[0])
    if name == "torch":
        y = torch_gemm.norm_linear(inputs)
        # Gated values lie after their gates; a tensor of an operator begins where its memory does.
        return y.clone(memory_format=torch.contiguous_format) if inputs.gated else y
    if name == "reference":
        return reference.norm_linear(inputs)
    launch, inputs = DISPATCHER.launcher(name), inputs.contiguous()
    if name in CPU_KERNELS:
        return launch(inputs)
    with torch.cuda.device(h.device):
        return launch(inputs)


_operator = register(
    "norm_linear(Tensor h, Tensor weight, Tensor? bias, Tensor? sumsq, int n_scaled, str activation, "
    "float divisor, float eps) -> Tensor",
    implementation=_run,
    fake=_fake,
)
