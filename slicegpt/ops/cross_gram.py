"""`cross_gram_`: the streamed product `C += Aᵀ diag(weight) B` in float64, the right-hand side of a linear fit."""

import torch
from torch import Tensor

from slicegpt.ops import reference
from slicegpt.ops.contracts import (
    DTYPES,
    bad,
    check_alike,
    check_no_overlap,
    check_precision,
    check_sum,
    check_token_weight,
)
from slicegpt.ops.cpu import gram as cpu_gram
from slicegpt.ops.dispatch import (
    Dispatcher,
    Implementation,
    capability_of,
    requested_backend,
    triton_is_available,
)
from slicegpt.ops.registration import register

OP = "cross_gram_"
PRECISIONS = {"fp64": DTYPES, "fast": DTYPES[:3]}


def cross_gram_(
    C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None = None, precision: str = "fp64"
) -> None:
    """Add `Aᵀ diag(weight) B` to `C` in place; beside `gram_` of A it makes the normal equations of `A W ≈ B`.

    The same call gives the same bits on every run. An infinity or NaN in a column of A (B) makes that row
    (column) of C NaN.

    Args:
        C: float64 [K, D], contiguous; must not share memory with A, B or weight.
        A, B: [N, K] and [N, D] of one dtype, float16, bfloat16, float32 or float64, any strides, N may be 0.
        weight: [N], bool, integer or floating, or None for ones. A token of weight 0 is absent, whatever A and
            B hold there.
        precision: "fp64": float64 products and sums. "fast", not for float64: as in `gram_`.

    Raises:
        SliceGPTError: an argument has the wrong shape, dtype, device or layout, or the requested backend
            (environment variable SLICEGPT_BACKEND) cannot do it. There is no CUDA C++ form of this operator: the
            Triton kernel serves CUDA devices, and chunked BLAS where Triton is missing.
    """
    _operator(C, A, B, weight, precision)


def is_supported(
    capability: tuple[int, int] | None, dtype: torch.dtype, precision: str = "fp64", backend: str = "auto"
) -> bool:
    """Whether `cross_gram_` takes this dtype on a device (None: a CPU) with a backend that is present here."""
    return DISPATCHER.is_supported(backend, capability, dtype, precision)


def _triton_takes(capability: tuple[int, int], dtype: torch.dtype, precision: str) -> bool:
    if not triton_is_available():
        return False
    from slicegpt.kernels import cross_gram

    return cross_gram.is_supported(capability, dtype, fast=precision == "fast")


DISPATCHER = Dispatcher(
    OP,
    (
        Implementation("triton", _triton_takes, "cuda"),
        Implementation(
            "cpu", lambda _, dtype, precision: cpu_gram.is_supported(dtype, precision == "fast"), "cpu"
        ),
        Implementation("reference", lambda _, dtype, precision: dtype in PRECISIONS[precision]),
    ),
    describe=lambda capability, dtype, precision: f"precision {precision!r}",
)


def _check(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, precision: str) -> None:
    """What can be known from the arguments' metadata: also run while tracing."""
    if C.dim() != 2:
        raise bad(OP, "C", "be [K, D]", list(C.shape))
    check_sum(OP, C)
    for name, X, columns, of in (("A", A, C.shape[0], "rows"), ("B", B, C.shape[1], "columns")):
        if X.dim() != 2:
            raise bad(OP, name, "be two-dimensional", list(X.shape))
        if X.shape[1] != columns:
            raise bad(OP, name, f"have as many columns as C has {of} ({columns})", X.shape[1])
        check_alike(OP, "C", C, {name: X}, dtype=False)
    if B.shape[0] != A.shape[0]:
        raise bad(OP, "B", f"have A's {A.shape[0]} tokens", B.shape[0])
    check_alike(OP, "A", A, {"B": B})
    check_precision(OP, precision, PRECISIONS, "A", A)
    check_token_weight(OP, weight, "A", A)


def _run(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, precision: str) -> None:
    _check(C, A, B, weight, precision)
    check_no_overlap(OP, C, {"A": A, "B": B, "weight": weight})
    if C.numel() == 0 or A.shape[0] == 0:
        return
    fast = precision == "fast"
    name = DISPATCHER.choose(requested_backend(), capability_of(A), A.dtype, precision)
    if name in ("cpu", "reference"):
        run = cpu_gram.cross_gram_ if name == "cpu" else reference.cross_gram_
        run(C, A, B, weight, fast)
        return
    from slicegpt.kernels.cross_gram import cross_gram

    if weight is not None:
        weight = weight.to(torch.float64).contiguous()
    with torch.cuda.device(A.device):
        cross_gram(C, A, B, weight, fast)


_operator = register(
    "cross_gram_(Tensor(a!) C, Tensor A, Tensor B, Tensor? weight, str precision) -> ()",
    implementation=_run,
    fake=_check,
)
