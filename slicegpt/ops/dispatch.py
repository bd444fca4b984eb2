"""Which implementation an operator runs: one rule for all operators.

An operator lists its implementations in order of preference (`Dispatcher`). A call takes the first that supports its
device, its dtype and the one other fact that decides (`detail`: rows, a precision, the size of a head).

`SLICEGPT_BACKEND` is a preference among what exists for an operator:

    auto       (default) all of its implementations, in order
    cuda       CUDA C++: `gram_`, `norm_linear` and `rotate_add` (up to 16 rows decode kernels, else cuBLAS)
    triton     Triton: every operator
    reference  plain PyTorch: every operator

An operator without any implementation of the requested backend (`cross_gram_` and `decode_attention_` have no CUDA C++
form) runs as with "auto", and the line that it logs says so. One that has such an implementation, but not for the
call's device, dtype or `detail`, raises: what was asked for is never replaced in silence.
"""

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.ops.contracts import DTYPES
from slicegpt.ops.cpu import epilogue as cpu_epilogue
from slicegpt.ops.cpu import extension as cpu_extension
from slicegpt.ops.cpu import gemm as cpu_gemm
from slicegpt.ops.cuda import decode as cuda_decode
from slicegpt.ops.cuda import epilogue as cuda_epilogue
from slicegpt.ops.cuda import extension as cuda_extension

BACKENDS = ("auto", "cuda", "triton", "reference")

# None: a CPU.
Capability = tuple[int, int] | None

logger = logging.getLogger("slicegpt")


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        name: what logs and errors call it.
        supports: whether it takes a call of (capability, dtype, detail) on its kind of device.
        device: "cpu", "cuda", or "any".
        backend: the value of SLICEGPT_BACKEND that asks for it; None: its name.
    """

    name: str
    supports: Callable[[Capability, torch.dtype, Any], bool]
    device: str = "any"
    backend: str | None = None

    def takes(self, capability: Capability, dtype: torch.dtype, detail: Any) -> bool:
        """Whether it takes a call on a device of this capability."""
        kind = "cpu" if capability is None else "cuda"
        return self.device in ("any", kind) and self.supports(capability, dtype, detail)


class Dispatcher:
    """The choice among an operator's implementations.

    Args:
        op: the operator's name, for messages.
        implementations: in order of preference.
        describe: (capability, dtype, detail) in words, for messages; None: `detail` as it is.
    """

    def __init__(
        self,
        op: str,
        implementations: Sequence[Implementation],
        describe: Callable[[Capability, torch.dtype, Any], str] | None = None,
    ):
        self.op = op
        self.implementations = tuple(implementations)
        self._describe = describe or (lambda capability, dtype, detail: str(detail))
        self._remembered = lru_cache(maxsize=None)(self._choose)

    def has(self, backend: str) -> bool:
        """Whether any implementation belongs to this backend (always for "auto")."""
        return backend == "auto" or any((one.backend or one.name) == backend for one in self.implementations)

    def candidates(self, backend: str) -> tuple[Implementation, ...]:
        """Those that may be taken: the backend's own, or all where the operator has none of it."""
        if backend == "auto" or not self.has(backend):
            return self.implementations
        return tuple(one for one in self.implementations if (one.backend or one.name) == backend)

    def find(self, backend: str, capability: Capability, dtype: torch.dtype, detail: Any) -> str | None:
        """The name of the implementation that would run; None: there is none."""
        for one in self.candidates(backend):
            if one.takes(capability, dtype, detail):
                return one.name
        return None

    def is_supported(self, backend: str, capability: Capability, dtype: torch.dtype, detail: Any) -> bool:
        """Whether such a call runs, and does not raise for want of an implementation."""
        return self.find(backend, capability, dtype, detail) is not None

    def choose(self, backend: str, capability: Capability, dtype: torch.dtype, detail: Any) -> str:
        """The name of the implementation that will run; remembered, so that each class of calls is logged once.

        Raises:
            SliceGPTError: no implementation of the backend takes the call.
        """
        return self._remembered(backend, capability, dtype, detail)

    def forget(self) -> None:
        """Choose, and log, anew: what is present has changed."""
        self._remembered.cache_clear()

    def _choose(self, backend: str, capability: Capability, dtype: torch.dtype, detail: Any) -> str:
        name = self.find(backend, capability, dtype, detail)
        call = f"{dtype}, {self._describe(capability, dtype, detail)} on {device_name(capability)}"
        if name is None:
            raise SliceGPTError(f"{self.op}: backend {backend!r} does not take {call}")
        if (
            capability is None
            and backend == "auto"
            and any(one.device == "cpu" for one in self.implementations)
        ):
            cpu_extension.warn_if_missing()
        instead = "" if self.has(backend) else f" (it has no {backend!r} implementation)"
        logger.info("%s: %s: %s%s", self.op, call, name, instead)
        return name


def requested_backend() -> str:
    """The back end that `SLICEGPT_BACKEND` asks for; `auto` when it is not set."""
    backend = os.environ.get("SLICEGPT_BACKEND", "auto")
    if backend not in BACKENDS:
        raise SliceGPTError(f"SLICEGPT_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def capability_of(tensor: Tensor) -> Capability:
    """The compute capability of the tensor's device, None on a CPU."""
    return _capability_of_device(tensor.get_device()) if tensor.is_cuda else None


@lru_cache
def _capability_of_device(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def device_name(capability: Capability) -> str:
    """What messages call a device of this compute capability (None: a CPU)."""
    return "a CPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"


@lru_cache
def triton_is_available() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


# --- the fused GEMMs ----------------------------------------------------------------------------------------

# Up to so many rows a product on a GPU is bound by reading its weights, which the decode kernels do once.
DECODE_ROWS = 16

# Implementations whose launchers run on CPU tensors.
CPU_KERNELS = ("cpu", "cpu-epilogue")


class GemmDispatcher(Dispatcher):
    """Of `norm_linear` and `rotate_add`, where the number of rows decides.

    "cuda": the decode kernels, up to 16 rows. "triton": from sm_80 on. "epilogue": cuBLAS and a CUDA epilogue. "cpu":
    the CPU's kernels, up to `cpu.gemm.most_rows`. "cpu-epilogue": its library's GEMM and a kernel after it. "torch":
    library GEMMs and torch epilogues, also on CPUs. "reference": float64. Every width and every activation is supported
    wherever the dtype is.
    """

    def __init__(self, op: str):
        known = DTYPES.__contains__
        super().__init__(
            op,
            (
                Implementation("cuda", self._cuda(cuda_decode), "cuda"),
                Implementation("triton", self._triton, "cuda"),
                Implementation("epilogue", self._cuda(cuda_epilogue), "cuda", backend="cuda"),
                Implementation("cpu", cpu_gemm.is_supported, "cpu"),
                Implementation("cpu-epilogue", cpu_epilogue.is_supported, "cpu"),
                Implementation("torch", lambda capability, dtype, rows: known(dtype)),
                Implementation("reference", lambda capability, dtype, rows: known(dtype)),
            ),
            describe=lambda capability, dtype, rows: rows_text(few_rows(capability, dtype), rows),
        )

    def choose(self, backend: str, capability: Capability, dtype: torch.dtype, rows: int) -> str:
        # All calls of few rows are one class, and all others another.
        limit = few_rows(capability, dtype)
        return super().choose(backend, capability, dtype, limit if rows <= limit else limit + 1)

    def launcher(self, name: str) -> Callable:
        """The function that launches the kernels of an implementation; its module is imported when it is needed."""
        modules = {
            "cuda": "ops.cuda.decode",
            "epilogue": "ops.cuda.epilogue",
            "cpu": "ops.cpu.gemm",
            "cpu-epilogue": "ops.cpu.epilogue",
            "triton": f"kernels.{self.op}",
        }
        return _function(f"slicegpt.{modules[name]}", self.op)

    @staticmethod
    def _cuda(kernels) -> Callable[[Capability, torch.dtype, int], bool]:
        def supports(capability: Capability, dtype: torch.dtype, rows: int) -> bool:
            return cuda_extension.is_available(capability) and kernels.is_supported(capability, dtype, rows)

        return supports

    def _triton(self, capability: Capability, dtype: torch.dtype, rows: int) -> bool:
        if not triton_is_available():
            return False
        module = importlib.import_module(f"slicegpt.kernels.{self.op}")
        return module.is_supported(capability, dtype)


@lru_cache
def _function(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)


def few_rows(capability: Capability, dtype: torch.dtype) -> int:
    """Up to how many rows the kernels for few rows are taken, where they are present."""
    return cpu_gemm.most_rows(dtype) if capability is None else DECODE_ROWS


def rows_text(limit: int, rows: int) -> str:
    """On which side of the limit for few rows a call is: at most 32 rows."""
    return cpu_gemm.rows_text(limit) if rows <= limit else f"more than {limit} rows"
