"""`gram_` by the CUDA kernels: float64 products, exact integer products, half-precision products.

The launchers take validated tensors (`slicegpt.ops` checks them): C float64 [D, D] and X [N, D] on one CUDA device,
unit column stride, weight [N] of a float dtype or None. A token of weight 0 is absent: what its row of X holds, NaNs
included, does not reach C. A result that is not finite is stored as NaN.
"""

import logging
import os
from functools import lru_cache

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.ops.contracts import DTYPES, HALF, dtype_code, dtype_names
from slicegpt.ops.cuda import extension

_logger = logging.getLogger("slicegpt")

DTYPES_OF = {"fp64": DTYPES, "exact": DTYPES[:3], "fast": HALF}
# csrc/gram.h's `ExactKernel`, by the values of SLICEGPT_GRAM_EXACT. auto is mma.sync until wgmma is measured.
_EXACT_KERNELS = {"auto": 0, "mma": 1, "wgmma": 2, "wgmma-pairs": 3}
# The fastest kernel by estimate that gives mma's bits on this device: found out once a process.
CHECKED = "checked"
# Tokens and columns of its block: several tiles, an odd number of groups of columns, stages that are used again.
CHECK_SHAPE = (1100, 300)


def is_supported(capability: tuple[int, int], dtype: torch.dtype, precision: str) -> bool:
    """Whether `gram_` with this precision ("fp64", "exact", "fast") takes X of `dtype` on this compute capability."""
    if precision not in DTYPES_OF:
        raise SliceGPTError(f"gram_: precision must be one of {', '.join(DTYPES_OF)}, got {precision!r}")
    if dtype not in DTYPES_OF[precision] or capability < (7, 5):
        return False
    # Turing's tensor cores know no bfloat16.
    return not (precision == "fast" and dtype is torch.bfloat16 and capability < (8, 0))


def exact_has_wgmma() -> bool:
    """Whether SLICEGPT_GRAM_EXACT=wgmma and wgmma-pairs work on the current device: 9.0, with code built for 9.0a."""
    return extension.is_available() and extension.module.gram_exact_has_wgmma(torch.cuda.current_device())


def gram_fp64(C: Tensor, X: Tensor, weight: Tensor | None) -> None:
    """`C += Xᵀ diag(weight) X` with float64 products and sums; X float16, bfloat16, float32 or float64."""
    _check_dtype("fp64", X)
    _launch("gram_fp64", C, X, weight)


def gram_exact(C: Tensor, X: Tensor, weight: Tensor | None) -> None:
    """`C += Xᵀ diag(weight) X` from exact integer products on int8 tensor cores; X float16, bfloat16 or float32.

    Exact per block of tokens, rounded to float64 once per block and added. What integers of 53 bits per column and
    block cannot hold goes through `gram_fp64`'s arithmetic: tokens with an infinity, a NaN, a value more than 53 bits
    below its column's largest, or a weight other than 0 and 1.

    The environment variable SLICEGPT_GRAM_EXACT chooses the kernel, all of which give the same bits.
    """
    _check_dtype("exact", X)
    _launch_exact(C, X, weight, _requested_exact_kernel(X))


def gram_fast(C: Tensor, X: Tensor, weight: Tensor | None) -> None:
    """`C += Xᵀ diag(weight) X` from half-precision products, summed in float32 for 128 tokens, then beyond it.

    X float16 or bfloat16. Tokens with a weight other than 0 and 1 go through `gram_fp64`'s arithmetic.
    """
    _check_dtype("fast", X)
    _launch("gram_fast", C, X, weight)


def _launch_exact(C: Tensor, X: Tensor, weight: Tensor | None, kernel: int) -> None:
    _launch("gram_exact", C, X, weight, (dtype_code(X.dtype),), (kernel,))


def _requested_exact_kernel(X: Tensor) -> int:
    kernel = os.environ.get("SLICEGPT_GRAM_EXACT", "auto")
    if kernel == CHECKED:
        # What the check waits for cannot be waited for during a capture.
        if extension.capturing(X):
            return _EXACT_KERNELS["mma"]
        return _EXACT_KERNELS[checked_exact_kernel(X.device)]
    if kernel not in _EXACT_KERNELS:
        names = ", ".join([*_EXACT_KERNELS, CHECKED])
        raise SliceGPTError(f"SLICEGPT_GRAM_EXACT must be one of {names}, got {kernel!r}")
    return _EXACT_KERNELS[kernel]


@lru_cache
def checked_exact_kernel(device: torch.device) -> str:
    """ "wgmma-pairs", else "wgmma", where it gives the bits of "mma" on a small block; else "mma", with a warning.

    It synchronises.
    """
    if not extension.call("gram_exact_has_wgmma", torch.empty(0, device=device)):
        return "mma"
    expected = _small_gram(device, "mma")
    for kernel in ("wgmma-pairs", "wgmma"):
        try:
            if torch.equal(_small_gram(device, kernel), expected):
                return kernel
            reason = "gives other bits than mma"
        except SliceGPTError as error:
            reason = str(error)
        _logger.warning("gram_: the exact kernel %s is not used on %s: it %s", kernel, device, reason)
    return "mma"


def _small_gram(device: torch.device, kernel: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(CHECK_SHAPE, generator=generator).to(device, torch.float16)
    C = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=device)
    _launch_exact(C, X, None, _EXACT_KERNELS[kernel])
    return C


def _check_dtype(precision: str, X: Tensor) -> None:
    extension.require("gram_")
    if X.dtype not in DTYPES_OF[precision]:
        names = dtype_names(DTYPES_OF[precision])
        raise SliceGPTError(f"gram_: precision {precision!r} takes X of {names}, got {X.dtype}")


def _launch(
    name: str, C: Tensor, X: Tensor, weight: Tensor | None, sizing: tuple = (), options: tuple = ()
) -> None:
    """The module's function `name`; sizing, options: what its workspace's size depends on, and it does, besides."""
    if weight is not None:
        weight = weight.to(torch.float64).contiguous()
    with extension.on_device(C):
        workspace_bytes = extension.call(f"{name}_workspace", C, *X.shape, *sizing)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=C.device)
        arguments = extension.module.gram_arguments(
            C=C.data_ptr(),
            C_stride=C.stride(0),
            X=X.data_ptr(),
            X_stride=X.stride(0),
            dtype=dtype_code(X.dtype),
            weight=extension.address(weight),
            tokens=X.shape[0],
            columns=X.shape[1],
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace_bytes,
            stream=extension.current_stream(C),
        )
        extension.check_status("gram_", extension.call(name, C, arguments, *options))
