"""Which implementation a fused GEMM (`norm_linear`, `rotate_add`) takes.

"cuda": the decode kernels, up to 16 rows. "triton": from sm_80 on. "epilogue": cuBLAS and a CUDA epilogue. "cpu": the
CPU's kernels, up to `cpu_decode.most_rows`. "cpu-epilogue": its library's GEMM and a kernel behind it. "torch": library
GEMMs and torch epilogues, also on CPUs. "reference": float64.
"""

import importlib
from functools import lru_cache
from types import ModuleType

import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops import cpu_decode
from slicegpt.ops.cpu_decode import rows_text
from slicegpt.ops.registration import device_name, logger, triton_is_available

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Those of a CPU, in the order in which they are asked.
CPU_KERNELS = ("cpu", "cpu-epilogue")

# Up to so many rows a product on a GPU is bound by reading its weights, which the decode kernels do once.
DECODE_ROWS = 16


def is_supported(
    op: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    rows: int,
    backend: str = "auto",
) -> bool:
    """Whether `op` ("norm_linear", "rotate_add") runs for `rows` rows of this dtype on a device (None: a CPU).

    Every width and every activation is supported wherever the dtype is.
    """
    return any(
        _implements(name, op, capability, dtype, rows) for name in _candidates(backend, capability, rows)
    )


def choose(op: str, backend: str, capability: tuple[int, int] | None, dtype: torch.dtype, rows: int) -> str:
    """The implementation that will run, by its name above."""
    limit = _few_rows(capability, dtype)
    name = _choose(op, backend, capability, dtype, limit if rows <= limit else limit + 1)
    if name is None:
        raise SliceGPTError(
            f"{op}: backend {backend!r} does not take {dtype}, {rows} rows on {device_name(capability)}"
        )
    return name


def _few_rows(capability: tuple[int, int] | None, dtype: torch.dtype) -> int:
    """Up to how many rows the kernels for few rows are taken, where they are present."""
    return cpu_decode.most_rows(dtype) if capability is None else DECODE_ROWS


@lru_cache
def _choose(
    op: str, backend: str, capability: tuple[int, int] | None, dtype: torch.dtype, rows: int
) -> str | None:
    """Cached, so that each class of calls is logged once. `rows`: the limit for few rows, or one more."""
    for name in _candidates(backend, capability, rows):
        if _implements(name, op, capability, dtype, rows):
            limit = _few_rows(capability, dtype)
            size = rows_text(limit) if rows <= limit else f"more than {limit} rows"
            logger.info("%s: %s, %s on %s: %s", op, dtype, size, device_name(capability), name)
            return name
    return None


def _candidates(backend: str, capability: tuple[int, int] | None, rows: int) -> tuple[str, ...]:
    if backend == "cuda":
        return ("cuda", "epilogue")
    if backend != "auto":
        return (backend,)
    if capability is None:
        return (*CPU_KERNELS, "torch")
    prefill = ("triton", "epilogue", "torch")
    return ("cuda", *prefill) if rows <= DECODE_ROWS else prefill


def _implements(
    name: str, op: str, capability: tuple[int, int] | None, dtype: torch.dtype, rows: int
) -> bool:
    if dtype not in DTYPES:
        return False
    if name in ("torch", "reference"):
        return True
    if name in CPU_KERNELS:
        return launchers(name, op).is_supported(capability, dtype, rows)
    if capability is None:
        return False
    if name in ("cuda", "epilogue"):
        from slicegpt.ops import cuda

        return cuda.is_available() and launchers(name, op).is_supported(capability, dtype, rows)
    if not triton_is_available():
        return False
    return launchers(name, op).is_supported(capability, dtype)


def launchers(name: str, op: str) -> ModuleType:
    """The module whose function `op` launches the kernels of an implementation; imported when it is needed."""
    modules = {
        "cuda": "ops.cuda_decode",
        "epilogue": "ops.cuda_epilogue",
        "cpu": "ops.cpu_decode",
        "cpu-epilogue": "ops.cpu_epilogue",
        "triton": f"kernels.{op}",
    }
    return importlib.import_module(f"slicegpt.{modules[name]}")
