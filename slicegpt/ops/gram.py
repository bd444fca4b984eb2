"""`gram_`: the streamed covariance `C += Xᵀ diag(weight) X` in float64, without a float64 copy of X."""

import torch
from torch import Tensor

from slicegpt.hardware.devices import FP64_TENSOR_CORES, Rates, rates_of
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
from slicegpt.ops.cuda import extension as cuda_extension
from slicegpt.ops.cuda import gram as cuda_gram
from slicegpt.ops.dispatch import (
    Dispatcher,
    Implementation,
    capability_of,
    requested_backend,
    triton_is_available,
)
from slicegpt.ops.registration import register

OP = "gram_"
DTYPES_OF = {"auto": DTYPES, "fp64": DTYPES, "exact": DTYPES[:3], "fast": DTYPES[:3]}


def gram_(
    C: Tensor,
    X: Tensor,
    weight: Tensor | None = None,
    precision: str = "auto",
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

    Raises:
        SliceGPTError: an argument has the wrong shape, dtype, device or layout, or the requested backend
            (environment variable SLICEGPT_BACKEND) cannot do it.
    """
    _operator(C, X, weight, precision)


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
    return any(DISPATCHER.is_supported(backend, capability, dtype, name) for name in names)


# --- choosing -----------------------------------------------------------------------------------------------

# Residue planes that "exact" multiplies for Gaussian activations: those of the median tile, which are those of its
# widest column, in a block of 16384 tokens. Triton bounds a product by the columns' largest magnitudes, CUDA by their
# norms.
EXPECTED_PLANES = {
    "cuda": {torch.float16: 8, torch.bfloat16: 9, torch.float32: 14},
    "triton": {torch.float16: 9, torch.bfloat16: 10, torch.float32: 14},
}

# A wider exponent span than expected costs "exact" more planes, while "fp64" always costs the same.
MARGIN = 1.25


def seconds_per_token(rates: Rates, dtype: torch.dtype, columns: int, planes: int | None) -> float:
    """Arithmetic and memory time of `gram_` per token at the peak rates: an estimate for comparisons.

    planes: of "exact"; None: "fp64". The triangle is D²/2 multiply-adds a token for each plane. "exact" also reads X
    twice (for the spans, for the planes) and writes and reads one byte for every element and plane, which dominates at
    small D.
    """
    operations = columns * (columns + 128)  # half a tile of 128 more along the diagonal
    if planes is None:
        return operations / (rates.fp64_tflops * 1e12)
    moved = columns * (2 * dtype.itemsize + 2 * planes)
    return planes * operations / (rates.int8_tops * 1e12) + moved / (rates.bandwidth_tbs * 1e12)


def choose_precision(
    capability: tuple[int, int],
    dtype: torch.dtype,
    columns: int,
    float_weight: bool = False,
    implementation: str = "cuda",
) -> str:
    """What "auto" means for CUDA tensors: "fp64", unless "exact" is estimated to be clearly faster.

    Devices with float64 tensor cores stay with "fp64" at small D, where cutting X into planes costs more than
    multiplying, and for floating-point weights, which "exact" would most likely hand over to float64 anyway.
    implementation: "cuda" or "triton", which multiply different numbers of planes.
    """
    if dtype == torch.float64 or (float_weight and capability in FP64_TENSOR_CORES):
        return "fp64"
    rates, planes = rates_of(capability), EXPECTED_PLANES[implementation][dtype]
    fp64, exact = (seconds_per_token(rates, dtype, columns, count) for count in (None, planes))
    return "exact" if MARGIN * exact < fp64 else "fp64"


def choose(
    backend: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    columns: int,
    precision: str,
    float_weight: bool = False,
) -> tuple[str, str]:
    """(implementation, precision) that will run.

    capability: None for CPU tensors. A precision that "auto" prefers gives way to "fp64" where no implementation has
    it; one that the caller named does not.
    """
    if precision == "auto":
        precision = _auto_precision(backend, capability, dtype, columns, float_weight)
    return DISPATCHER.choose(backend, capability, dtype, precision), precision


def _auto_precision(
    backend: str, capability: tuple[int, int] | None, dtype: torch.dtype, columns: int, float_weight: bool
) -> str:
    exact = None if capability is None else DISPATCHER.find(backend, capability, dtype, "exact")
    if exact is None:
        return "fp64"
    implementation = exact if exact in EXPECTED_PLANES else "cuda"
    return choose_precision(capability, dtype, columns, float_weight, implementation)


def _cuda_takes(capability: tuple[int, int], dtype: torch.dtype, precision: str) -> bool:
    return cuda_extension.is_available(capability) and cuda_gram.is_supported(capability, dtype, precision)


def _triton_takes(capability: tuple[int, int], dtype: torch.dtype, precision: str) -> bool:
    if not triton_is_available() or dtype not in DTYPES_OF[precision]:
        return False
    from slicegpt.kernels import gram_exact, gram_fp64

    if precision == "exact":
        return gram_exact.is_supported(capability, dtype)
    return gram_fp64.is_supported(capability, dtype, fast=precision == "fast")


def _cpu_takes(capability: None, dtype: torch.dtype, precision: str) -> bool:
    return dtype in DTYPES_OF[precision] and cpu_gram.is_supported(dtype, fast=precision == "fast")


DISPATCHER = Dispatcher(
    OP,
    (
        Implementation("cuda", _cuda_takes, "cuda"),
        Implementation("triton", _triton_takes, "cuda"),
        Implementation("cpu", _cpu_takes, "cpu"),
        Implementation("reference", lambda _, dtype, precision: dtype in DTYPES_OF[precision]),
    ),
    describe=lambda capability, dtype, precision: f"precision {precision!r}",
)


# --- the operator -------------------------------------------------------------------------------------------


def _check(C: Tensor, X: Tensor, weight: Tensor | None, precision: str) -> None:
    """What can be known from the arguments' metadata: also run while tracing."""
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise bad(OP, "C", "be square [D, D]", list(C.shape))
    check_sum(OP, C)
    if X.dim() != 2:
        raise bad(OP, "X", "be [N, D]", list(X.shape))
    if X.shape[1] != C.shape[0]:
        raise bad(OP, "X", f"have C's {C.shape[0]} columns", X.shape[1])
    check_alike(OP, "C", C, {"X": X}, dtype=False)
    check_precision(OP, precision, DTYPES_OF, "X", X)
    check_token_weight(OP, weight, "X", X)


def _run(C: Tensor, X: Tensor, weight: Tensor | None, precision: str) -> None:
    _check(C, X, weight, precision)
    check_no_overlap(OP, C, {"X": X, "weight": weight})
    if X.numel() == 0:
        return
    float_weight = weight is not None and weight.is_floating_point()
    name, precision = choose(
        requested_backend(), capability_of(X), X.dtype, X.shape[1], precision, float_weight
    )
    if name in ("cpu", "reference"):
        run = cpu_gram.gram_ if name == "cpu" else reference.gram_
        run(C, X, weight, fast=precision == "fast")
        return
    if weight is not None:
        weight = weight.to(torch.float64).contiguous()
    run = _run_cuda if name == "cuda" else _run_triton
    run(C, X, weight, precision)


def _run_cuda(C: Tensor, X: Tensor, weight: Tensor | None, precision: str) -> None:
    # The CUDA kernels read rows of consecutive items; a copy, in X's own dtype, is the exception.
    X = X if X.stride(1) == 1 else X.contiguous()
    launchers = {"exact": cuda_gram.gram_exact, "fast": cuda_gram.gram_fast, "fp64": cuda_gram.gram_fp64}
    launchers[precision](C, X, weight)


def _run_triton(C: Tensor, X: Tensor, weight: Tensor | None, precision: str) -> None:
    from slicegpt.kernels.gram_exact import gram_exact
    from slicegpt.kernels.gram_fp64 import gram_fp64

    with torch.cuda.device(X.device):
        if precision == "exact":
            gram_exact(C, X, weight)
        else:
            gram_fp64(C, X, weight, fast=precision == "fast")


_operator = register(
    "gram_(Tensor(a!) C, Tensor X, Tensor? weight, str precision) -> ()",
    implementation=_run,
    fake=_check,
)
