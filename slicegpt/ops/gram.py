"""`gram_`: the streamed covariance `C += Xᵀ diag(weight) X` in float64, without a float64 copy of X."""

from functools import lru_cache

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.hardware.devices import FP64_TENSOR_CORES, Rates, rates_of
from slicegpt.ops import cpu_gram, cuda, reference
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

_HALF = (torch.float16, torch.bfloat16)
DTYPES_OF = {
    "auto": (*_HALF, torch.float32, torch.float64),
    "fp64": (*_HALF, torch.float32, torch.float64),
    "exact": (*_HALF, torch.float32),
    "fast": (*_HALF, torch.float32),
}
MAX_DIGITS = 7


def gram_(
    C: Tensor,
    X: Tensor,
    weight: Tensor | None = None,
    precision: str = "auto",
    digits: int | None = None,
) -> None:
    """Add `Xᵀ diag(weight) X` to `C` in place (SliceGPT paper, section 3.4: the covariance of a signal).

    Only the upper triangle of C is read; both triangles are written, bitwise symmetric. The same call gives
    the same bits on every run. A column of X with an infinity or NaN makes its row and column of C NaN.

    Args:
        C: float64 [D, D], contiguous, symmetric; must not share memory with X or weight.
        X: [N, D], float16, bfloat16, float32 or float64, any strides, N may be 0.
        weight: [N], bool, integer or floating, or None for ones. A token of weight 0 is absent, whatever it
            holds: padding may be infinite. Pass masks as bool: "auto" then knows that they are 0 and 1.
        precision: how the products and sums are computed; on a CPU all but "fast" mean "fp64".
            "fp64": float64 products and sums.
            "exact": integers on int8 tensor cores, not for a float64 X. Exact within a block of tokens,
            rounded to float64 once a block: no less accurate than "fp64". What integers cannot hold (weights
            other than 0 and 1, extreme spans) takes float64 arithmetic instead.
            "fast": not for a float64 X. Half-precision tensor cores on float16 and bfloat16, relative error
            about 1e-7; elsewhere float32 products of at most 4096 tokens at a time, whose sums are added up in
            float64: |error of C_ij| <= 4097·2^-24 Σ |x_i x_j| at worst, some 1e-6 of it in practice. A CPU with
            AVX512-BF16 multiplies bfloat16 without weights at twice that rate, and takes numbers below 2^-126 for 0.
            "auto": "exact" where `choose_precision` expects it to be faster, else "fp64"; logged once.
        digits: None, or 1 to 7 with precision "exact": a stated error for fewer products. X is rounded, in
            each column and block of N tokens, by at most e = 2^(1 - 7·digits) times the column's largest
            magnitude m there, so that a block adds |ΔC_ij| <= e (m_i ‖x_j‖₁ + m_j ‖x_i‖₁) + N e² m_i m_j.

    Raises:
        SliceGPTError: an argument has the wrong shape, dtype, device or layout, or the requested backend
            (environment variable SLICEGPT_BACKEND) cannot do it.
    """
    _operator(C, X, weight, precision, digits)


def is_supported(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    precision: str = "auto",
    backend: str = "auto",
) -> bool:
    """Whether `gram_` takes X of this dtype on a device (None: a CPU) with a backend that is present here.

    Every shape is supported by every backend.
    """
    names = ("fp64", "exact") if precision == "auto" else (precision,)
    backends = _candidates(backend, capability)
    return any(_implements(candidate, capability, dtype, name) for candidate in backends for name in names)


# --- choosing -----------------------------------------------------------------------------------------------

# Residue planes that "exact" multiplies for ordinary activations, see kernels/gram_exact.py.
EXPECTED_PLANES = {torch.bfloat16: 8, torch.float16: 9, torch.float32: 14}

# A wider exponent span than expected costs "exact" more planes, while "fp64" always costs the same.
MARGIN = 1.25


def seconds_per_token(rates: Rates, dtype: torch.dtype, columns: int, precision: str) -> float:
    """Arithmetic and memory time of `gram_` per token at the peak rates: an estimate for comparisons.

    The triangle is D²/2 multiply-adds a token in each precision. "exact" also reads X twice (for the spans,
    for the planes) and writes and reads one byte for every element and plane, which dominates at small D.
    """
    operations = columns * (columns + 128)  # half a tile of 128 more along the diagonal
    if precision == "fp64":
        return operations / (rates.fp64_tflops * 1e12)
    planes = EXPECTED_PLANES[dtype]
    moved = columns * (2 * dtype.itemsize + 2 * planes)
    return planes * operations / (rates.int8_tops * 1e12) + moved / (rates.bandwidth_tbs * 1e12)


def choose_precision(
    capability: tuple[int, int], dtype: torch.dtype, columns: int, float_weight: bool = False
) -> str:
    """What "auto" means for CUDA tensors: "fp64", unless "exact" is estimated to be clearly faster.

    Devices with float64 tensor cores stay with "fp64" at small D, where cutting X into planes costs more than
    multiplying, and for floating-point weights, which "exact" would most likely hand over to float64 anyway.
    """
    if dtype == torch.float64 or (float_weight and capability in FP64_TENSOR_CORES):
        return "fp64"
    rates = rates_of(capability)
    fp64, exact = (seconds_per_token(rates, dtype, columns, name) for name in ("fp64", "exact"))
    return "exact" if MARGIN * exact < fp64 else "fp64"


@lru_cache
def choose(
    backend: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    columns: int,
    precision: str,
    float_weight: bool = False,
) -> tuple[str, str]:
    """(backend, precision) that will run; cached, so that each class of shapes is logged once.

    capability: None for CPU tensors. A precision that "auto" prefers gives way to "fp64" where no backend
    has it; one that the caller named does not.
    """
    precisions = [precision]
    if precision == "auto":
        precisions = ["fp64"]
        if capability and choose_precision(capability, dtype, columns, float_weight) == "exact":
            precisions = ["exact", "fp64"]
    device = device_name(capability)
    for name in precisions:
        for candidate in _candidates(backend, capability):
            if _implements(candidate, capability, dtype, name):
                logger.info(
                    "gram_: %s with %d columns on %s: %s, %s", dtype, columns, device, candidate, name
                )
                return candidate, name
    raise SliceGPTError(f"gram_: backend {backend!r} has no precision {precision!r} for {dtype} on {device}")


def _candidates(backend: str, capability: tuple[int, int] | None) -> tuple[str, ...]:
    if backend != "auto":
        return (backend,)
    return ("cpu", "reference") if capability is None else ("cuda", "triton", "reference")


def _implements(backend: str, capability: tuple[int, int] | None, dtype: torch.dtype, precision: str) -> bool:
    if dtype not in DTYPES_OF[precision]:
        return False
    if backend == "reference":
        return True
    if capability is None:
        return backend == "cpu" and cpu_gram.is_supported(dtype, fast=precision == "fast")
    if backend == "cuda":
        return cuda.is_available() and cuda.gram_supports(capability, dtype, precision)
    if not triton_is_available():
        return False
    from slicegpt.kernels import gram_exact, gram_fp64

    if precision == "exact":
        return gram_exact.is_supported(capability, dtype)
    return gram_fp64.is_supported(capability, dtype, fast=precision == "fast")


# --- the operator -------------------------------------------------------------------------------------------


def _check(C: Tensor, X: Tensor, weight: Tensor | None, precision: str, digits: int | None) -> None:
    """What can be known from the arguments' metadata: also run while tracing."""
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise bad("gram_", "C", "be square [D, D]", list(C.shape))
    if C.dtype != torch.float64:
        raise bad("gram_", "C", "be float64", C.dtype)
    if not C.is_contiguous():
        raise bad("gram_", "C", "be contiguous", f"strides {C.stride()}")
    if X.dim() != 2:
        raise bad("gram_", "X", "be [N, D]", list(X.shape))
    if X.shape[1] != C.shape[0]:
        raise bad("gram_", "X", f"have C's {C.shape[0]} columns", X.shape[1])
    if X.device != C.device:
        raise bad("gram_", "X", f"be on C's device {C.device}", X.device)
    if precision not in DTYPES_OF:
        raise bad("gram_", "precision", f"be one of {', '.join(DTYPES_OF)}", repr(precision))
    if X.dtype not in DTYPES_OF[precision]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES_OF[precision])
        raise bad("gram_", "X", f"be one of {names} for precision {precision!r}", X.dtype)
    if digits is not None and precision != "exact":
        raise bad("gram_", "precision", "be 'exact' when digits is given", repr(precision))
    if digits is not None and not 1 <= digits <= MAX_DIGITS:
        raise bad("gram_", "digits", f"be None or 1 to {MAX_DIGITS}", digits)
    if weight is None:
        return
    if weight.dim() != 1 or weight.shape[0] != X.shape[0]:
        raise bad("gram_", "weight", f"be [N] for X's {X.shape[0]} tokens", list(weight.shape))
    if weight.is_complex():
        raise bad("gram_", "weight", "be real", weight.dtype)
    if weight.device != C.device:
        raise bad("gram_", "weight", f"be on C's device {C.device}", weight.device)


def _run(C: Tensor, X: Tensor, weight: Tensor | None, precision: str, digits: int | None) -> None:
    _check(C, X, weight, precision, digits)
    for name, tensor in (("X", X), ("weight", weight)):
        if tensor is not None and overlap(C, tensor):
            raise bad("gram_", name, "not share memory with C", "overlapping memory")
    if X.numel() == 0:
        return
    capability = device_capability(X.get_device()) if X.is_cuda else None
    float_weight = weight is not None and weight.is_floating_point()
    backend, precision = choose(requested_backend(), capability, X.dtype, X.shape[1], precision, float_weight)
    if backend in ("cpu", "reference"):
        run = cpu_gram.gram_ if backend == "cpu" else reference.gram_
        run(C, X, weight, fast=precision == "fast")
        return
    if weight is not None:
        weight = weight.to(torch.float64).contiguous()
    if backend == "cuda":
        _run_cuda(C, X, weight, precision, digits)
    else:
        _run_triton(C, X, weight, precision, digits)


def _run_cuda(C: Tensor, X: Tensor, weight: Tensor | None, precision: str, digits: int | None) -> None:
    # The CUDA kernels read rows of consecutive items; a copy, in X's own dtype, is the exception.
    X = X if X.stride(1) == 1 else X.contiguous()
    if precision == "exact":
        cuda.gram_exact(C, X, weight, digits)
    elif precision == "fast":
        cuda.gram_fast(C, X, weight)
    else:
        cuda.gram_fp64(C, X, weight)


def _run_triton(C: Tensor, X: Tensor, weight: Tensor | None, precision: str, digits: int | None) -> None:
    from slicegpt.kernels.gram_exact import gram_exact
    from slicegpt.kernels.gram_fp64 import gram_fp64

    with torch.cuda.device(X.device):
        if precision == "exact":
            gram_exact(C, X, weight, digits)
        else:
            gram_fp64(C, X, weight, fast=precision == "fast")


_operator = register(
    "gram_(Tensor(a!) C, Tensor X, Tensor? weight, str precision, int? digits) -> ()",
    implementation=_run,
    fake=_check,
)
