"""`norm_linear`: the weightless RMS norm as the epilogue of the linear layers that read it."""

import torch
from torch import Tensor

from slicegpt.ops import choice, library_gemm, reference
from slicegpt.ops.reference import ACTIVATIONS, GATED
from slicegpt.ops.registration import bad, device_capability, register, requested_backend

OP = "norm_linear"


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
    """`y = [act(s (h W₁ᵀ) + bias) | h W₂ᵀ]` with the row scale `s = rsqrt(|h|² / divisor + eps)`.

    The norm of the canonical network is a row scale only, so it commutes with the product: one GEMM reads the stream
    as it is, and its epilogue scales, shifts and activates the first columns. The rest, the z columns of a compact
    shortcut (`z = h F`, with W₂ = Fᵀ), pass as they are. Products are summed in float32 and not rounded before they
    are scaled, because a float16 stream may hold values whose products overflow. (A CPU library's 16-bit GEMMs, for
    many rows or without the compiled kernels, do round: there the z columns and bfloat16 products are rounded
    once more, and a float16 stream is normalised first.) The same call gives the same bits.

    Args:
        h: [T, d] float16, bfloat16, float32 or float64, the stream; unit column stride, any row stride, T may be 0.
        weight: [N, d], h's dtype, as `nn.Linear` stores it: the rows of W₁, then those of W₂.
        bias: [n_scaled], h's dtype, or None.
        sumsq: [T, P] float32 (float64 for a float64 stream), whose rows sum to `|h|²`, as `rotate_add` returns them;
            None computes the sums from h.
        n_scaled: rows of W₁, 0 to N.
        activation: "none", "relu", "gelu" (erf), "gelu_tanh", "silu"; or "silu_gated", "gelu_gated",
            "gelu_tanh_gated": the first half of W₁ is the gate, the second the values, `act(gate) * up`.
        divisor: the number of columns that the norm averages over.
        eps: added to the mean square.

    Returns:
        [T, N] of h's dtype, [T, n_scaled / 2 + N - n_scaled] where gated; shares no memory with an argument.

    Raises:
        SliceGPTError: an argument has the wrong shape, dtype, device or layout, or the requested backend
            (environment variable SLICEGPT_BACKEND) cannot do it.
    """
    return _operator(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)


def is_supported(
    capability: tuple[int, int] | None, dtype: torch.dtype, rows: int = 1, backend: str = "auto"
) -> bool:
    """Whether `norm_linear` takes `rows` rows of this dtype on a device (None: a CPU) with a backend present here."""
    return choice.is_supported(OP, capability, dtype, rows, backend)


def _check(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sumsq: Tensor | None,
    n_scaled: int,
    activation: str,
    divisor: float,
    eps: float,
) -> None:
    """What can be known from the arguments' metadata: also run while tracing."""
    if h.dim() != 2:
        raise bad(OP, "h", "be [T, d]", list(h.shape))
    if h.dtype not in choice.DTYPES:
        raise bad(OP, "h", "be float16, bfloat16, float32 or float64", h.dtype)
    if weight.dim() != 2 or weight.shape[1] != h.shape[1]:
        raise bad(OP, "weight", f"be [N, d] for h's {h.shape[1]} columns", list(weight.shape))
    if not 0 <= n_scaled <= weight.shape[0]:
        raise bad(OP, "n_scaled", f"be 0 to weight's {weight.shape[0]} rows", n_scaled)
    if activation not in ACTIVATIONS and activation not in GATED:
        raise bad(OP, "activation", f"be one of {', '.join((*ACTIVATIONS, *GATED))}", repr(activation))
    if activation in GATED and n_scaled % 2:
        raise bad(OP, "n_scaled", f"be even for {activation!r}", n_scaled)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n_scaled):
        raise bad(OP, "bias", f"be [n_scaled] = [{n_scaled}]", list(bias.shape))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != h.dtype:
            raise bad(OP, name, f"have h's dtype {h.dtype}", tensor.dtype)
    if sumsq is not None and (sumsq.dim() != 2 or sumsq.shape[0] != h.shape[0]):
        raise bad(OP, "sumsq", f"be [T, P] for h's {h.shape[0]} rows", list(sumsq.shape))
    if sumsq is not None and sumsq.dtype != reference.sumsq_dtype(h.dtype):
        raise bad(OP, "sumsq", f"be {reference.sumsq_dtype(h.dtype)} for a stream of {h.dtype}", sumsq.dtype)
    if not divisor > 0:
        raise bad(OP, "divisor", "be above 0", divisor)
    if not eps >= 0:
        raise bad(OP, "eps", "be at least 0", eps)
    for name, tensor in (("weight", weight), ("bias", bias), ("sumsq", sumsq)):
        if tensor is not None and tensor.device != h.device:
            raise bad(OP, name, f"be on h's device {h.device}", tensor.device)


def _fake(h, weight, bias, sumsq, n_scaled, activation, divisor, eps) -> Tensor:
    _check(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)
    return reference.norm_linear_output(h, weight, n_scaled, activation)


def _run(h, weight, bias, sumsq, n_scaled, activation, divisor, eps) -> Tensor:
    _check(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)
    if h.shape[0] == 0 or weight.shape[0] == 0:
        return reference.norm_linear_output(h, weight, n_scaled, activation)
    capability = device_capability(h.get_device()) if h.is_cuda else None
    backend = choice.choose(OP, requested_backend(), capability, h.dtype, h.shape[0])
    if backend == "torch":
        y = library_gemm.norm_linear(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)
        # Gated values lie behind their gates; a tensor of an operator begins where its memory does.
        return y.clone(memory_format=torch.contiguous_format) if activation in GATED else y
    if backend == "reference":
        return reference.norm_linear(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)
    h = h if h.stride(1) == 1 else h.contiguous()
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    sumsq = None if sumsq is None else sumsq.contiguous()
    launch = getattr(choice.launchers(backend, OP), OP)
    if backend in choice.CPU_KERNELS:
        return launch(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)
    with torch.cuda.device(h.device):
        return launch(h, weight, bias, sumsq, n_scaled, activation, divisor, eps)


_operator = register(
    "norm_linear(Tensor h, Tensor weight, Tensor? bias, Tensor? sumsq, int n_scaled, str activation, "
    "float divisor, float eps) -> Tensor",
    implementation=_run,
    fake=_fake,
)
