"""The CUDA kernels: whether they can run here, what was built, and launchers on torch tensors.

The launchers take validated tensors (`slicegpt.ops` checks them): C float64 [D, D] and X [N, D] on one CUDA device,
unit column stride, weight [N] of a float dtype or None. A token of weight 0 is absent: what its row of X holds, NaNs
included, does not reach C. A result that is not finite is stored as NaN. The launchers allocate workspace with torch,
run on the current stream, never synchronise, and can be captured into a CUDA graph.
"""

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError

_C: ModuleType | None = None
_import_error: str | None = None
if importlib.util.find_spec("slicegpt._C"):
    try:
        from slicegpt import _C
    except ImportError as error:
        _import_error = str(error)

# The order is csrc/gram.h's `Dtype`.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GRAM_DTYPES = {"fp64": _DTYPES, "exact": _DTYPES[:3], "fast": _DTYPES[:2]}
MAX_DIGITS = 7
# csrc/gram.h's `ExactKernel`, by the values of SLICEGPT_GRAM_EXACT. auto is mma.sync until wgmma is measured.
_EXACT_KERNELS = {"auto": 0, "mma": 1, "wgmma": 2, "wgmma-pairs": 3}


def why_not() -> str | None:
    """Why the CUDA kernels cannot run here, in one line; None if they can."""
    if _C is None:
        if _import_error:
            return f"slicegpt._C does not load: {_import_error}"
        return "slicegpt was installed without its CUDA part (nvcc was not found, or SLICEGPT_CUDA=0)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if not built_for((major, minor)):
        return (
            f"slicegpt._C was built for {', '.join(_C.architectures())}, but the device is sm_{major}{minor}"
        )
    return None


def is_available() -> bool:
    """Whether the CUDA part is built, loads, and has code for the current device."""
    return why_not() is None


def built_for(capability: tuple[int, int]) -> bool:
    """Whether `slicegpt._C` holds machine code or PTX that runs on this compute capability."""
    return _C is not None and any(_runs_on(code, capability) for code in _C.architectures())


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its generation from its minor version on; PTX on everything newer; "a" on one chip."""
    kind, number = code.split("_")
    built = int(number.rstrip("af"))
    target = capability[0] * 10 + capability[1]
    if number.endswith("a"):
        return built == target
    if kind == "compute":
        return built <= target
    return built // 10 == target // 10 and built <= target


def build_info() -> dict[str, str]:
    """What was built, for `slicegpt env`: version, nvcc, architectures; or why there is nothing."""
    if _C is None:
        return {"cuda part": why_not() or ""}
    return {
        "cuda part": f"slicegpt._C {_C.version()}",
        "nvcc": _C.nvcc_version(),
        "architectures": " ".join(_C.architectures()),
        "usable": why_not() or "yes",
    }


def gram_supports(capability: tuple[int, int], dtype: torch.dtype, precision: str) -> bool:
    """Whether `gram_` with this precision ("fp64", "exact", "fast") takes X of `dtype` on this compute capability."""
    if precision not in _GRAM_DTYPES:
        raise SliceGPTError(f"gram_: precision must be one of fp64, exact, fast, got {precision!r}")
    if dtype not in _GRAM_DTYPES[precision] or capability < (7, 5):
        return False
    # Turing's tensor cores know no bfloat16.
    return not (precision == "fast" and dtype is torch.bfloat16 and capability < (8, 0))


def gram_exact_has_wgmma() -> bool:
    """Whether SLICEGPT_GRAM_EXACT=wgmma and wgmma-pairs work on the current device: 9.0, with code built for 9.0a."""
    return is_available() and _C.gram_exact_has_wgmma()


def _requested_exact_kernel() -> int:
    kernel = os.environ.get("SLICEGPT_GRAM_EXACT", "auto")
    if kernel not in _EXACT_KERNELS:
        raise SliceGPTError(f"SLICEGPT_GRAM_EXACT must be one of {', '.join(_EXACT_KERNELS)}, got {kernel!r}")
    return _EXACT_KERNELS[kernel]


def gram_fp64(C: Tensor, X: Tensor, weight: Tensor | None) -> None:
    """`C += Xᵀ diag(weight) X` with float64 products and sums; X float16, bfloat16, float32 or float64."""
    _gram("fp64", C, X, weight)


def gram_exact(C: Tensor, X: Tensor, weight: Tensor | None, digits: int | None = None) -> None:
    """`C += Xᵀ diag(weight) X` from exact integer products on int8 tensor cores; X float16, bfloat16 or float32.

    Exact per block of tokens, rounded to float64 once per block and added. What integers of 53 bits per column and
    block cannot hold goes through `gram_fp64`'s arithmetic: tokens with an infinity, a NaN, a value more than 53 bits
    below its column's largest, or a weight other than 0 and 1.

    digits: None, or 1..7 for a stated error: X is first rounded per column and block, by at most
    `2^-(7 digits - 1)` times the column's largest magnitude there.

    The environment variable SLICEGPT_GRAM_EXACT chooses the kernel, all of which give the same bits.
    """
    if digits is not None and not 1 <= digits <= MAX_DIGITS:
        raise SliceGPTError(f"gram_: digits must be None or 1 to {MAX_DIGITS}, got {digits}")
    _gram("exact", C, X, weight, (digits or 0,), (_requested_exact_kernel(),))


def gram_fast(C: Tensor, X: Tensor, weight: Tensor | None) -> None:
    """`C += Xᵀ diag(weight) X` from half-precision products, summed in float32 for 128 tokens, then beyond it.

    X float16 or bfloat16. Tokens with a weight other than 0 and 1 go through `gram_fp64`'s arithmetic.
    """
    _gram("fast", C, X, weight)


def _gram(
    precision: str,
    C: Tensor,
    X: Tensor,
    weight: Tensor | None,
    digits: tuple[int, ...] = (),
    kernel: tuple[int, ...] = (),
) -> None:
    require("gram_")
    tokens, columns = X.shape
    if X.dtype not in _GRAM_DTYPES[precision]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _GRAM_DTYPES[precision])
        raise SliceGPTError(f"gram_: precision {precision!r} takes X of {names}, got {X.dtype}")
    dtype = _DTYPES.index(X.dtype)
    if weight is not None:
        weight = weight.to(torch.float64).contiguous()
    with _on_device(C):
        sizing = (dtype, *digits) if precision == "exact" else ()
        size = getattr(_C, f"gram_{precision}_workspace")(tokens, columns, *sizing)
        workspace = torch.empty(size, dtype=torch.uint8, device=C.device)
        arguments = _C.gram_arguments(
            C=C.data_ptr(),
            C_stride=C.stride(0),
            X=X.data_ptr(),
            X_stride=X.stride(0),
            dtype=dtype,
            weight=0 if weight is None else weight.data_ptr(),
            tokens=tokens,
            columns=columns,
            workspace=workspace.data_ptr(),
            workspace_bytes=size,
            stream=_stream(C),
        )
        _check("gram_", getattr(_C, f"gram_{precision}")(arguments, *digits, *kernel))


def require(op: str) -> None:
    """Raises where `slicegpt._C` is missing."""
    if _C is None:
        raise SliceGPTError(f"{op}: the CUDA backend is not available: {why_not()}")


def _on_device(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _check(op: str, status: int) -> None:
    if status:
        raise SliceGPTError(f"{op}: the CUDA kernel failed: {_C.error_string(status)}")
