"""`cross_gram_`: the streamed product `C += Aᵀ diag(weight) B` in float64, the right-hand side of a linear fit."""

from functools import lru_cache

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.ops import cpu_gram, reference
from slicegpt.ops.registration import (
    bad,
    device_capability,
    device_name,
    logger,
    overlap,
    register,
    requested_backend,
    triton_is_available,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PRECISIONS = {"fp64": _DTYPES, "fast": _DTYPES[:3]}


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
    return any(_implements(name, capability, dtype, precision) for name in _candidates(backend, capability))


@lru_cache
def choose(backend: str, capability: tuple[int, int] | None, dtype: torch.dtype, precision: str) -> str:
    """The backend that will run; cached, so that each class of calls is logged once."""
    device = device_name(capability)
    for candidate in _candidates(backend, capability):
        if _implements(candidate, capability, dtype, precision):
            logger.info("cross_gram_: %s on %s: %s, %s", dtype, device, candidate, precision)
            return candidate
    raise SliceGPTError(
        f"cross_gram_: backend {backend!r} has no precision {precision!r} for {dtype} on {device}"
    )


def _candidates(backend: str, capability: tuple[int, int] | None) -> tuple[str, ...]:
    if backend != "auto":
        return (backend,)
    return ("cpu", "reference") if capability is None else ("triton", "reference")


def _implements(backend: str, capability: tuple[int, int] | None, dtype: torch.dtype, precision: str) -> bool:
    if dtype not in PRECISIONS[precision]:
        return False
    if backend == "reference":
        return True
    if capability is None:
        return backend == "cpu" and cpu_gram.is_supported(dtype, fast=precision == "fast")
    if backend != "triton" or not triton_is_available():
        return False
    from slicegpt.kernels import cross_gram

    return cross_gram.is_supported(capability, dtype, fast=precision == "fast")


def _check(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, precision: str) -> None:
    """What can be known from the arguments' metadata: also run while tracing."""
    op = "cross_gram_"
    if C.dim() != 2:
        raise bad(op, "C", "be [K, D]", list(C.shape))
    if C.dtype != torch.float64:
        raise bad(op, "C", "be float64", C.dtype)
    if not C.is_contiguous():
        raise bad(op, "C", "be contiguous", f"strides {C.stride()}")
    for name, X, columns, of in (("A", A, C.shape[0], "rows"), ("B", B, C.shape[1], "columns")):
        if X.dim() != 2:
            raise bad(op, name, "be two-dimensional", list(X.shape))
        if X.shape[1] != columns:
            raise bad(op, name, f"have as many columns as C has {of} ({columns})", X.shape[1])
        if X.device != C.device:
            raise bad(op, name, f"be on C's device {C.device}", X.device)
    if B.shape[0] != A.shape[0]:
        raise bad(op, "B", f"have A's {A.shape[0]} tokens", B.shape[0])
    if B.dtype != A.dtype:
        raise bad(op, "B", f"have A's dtype {A.dtype}", B.dtype)
    if precision not in PRECISIONS:
        raise bad(op, "precision", f"be one of {', '.join(PRECISIONS)}", repr(precision))
    if A.dtype not in PRECISIONS[precision]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in PRECISIONS[precision])
        raise bad(op, "A", f"be one of {names} for precision {precision!r}", A.dtype)
    if weight is None:
        return
    if weight.dim() != 1 or weight.shape[0] != A.shape[0]:
        raise bad(op, "weight", f"be [N] for A's {A.shape[0]} tokens", list(weight.shape))
    if weight.is_complex():
        raise bad(op, "weight", "be real", weight.dtype)
    if weight.device != C.device:
        raise bad(op, "weight", f"be on C's device {C.device}", weight.device)


def _run(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, precision: str) -> None:
    _check(C, A, B, weight, precision)
    for name, tensor in (("A", A), ("B", B), ("weight", weight)):
        if tensor is not None and overlap(C, tensor):
            raise bad("cross_gram_", name, "not share memory with C", "overlapping memory")
    if C.numel() == 0 or A.shape[0] == 0:
        return
    capability = device_capability(A.get_device()) if A.is_cuda else None
    fast = precision == "fast"
    backend = choose(requested_backend(), capability, A.dtype, precision)
    if backend in ("cpu", "reference"):
        run = cpu_gram.cross_gram_ if backend == "cpu" else reference.cross_gram_
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
