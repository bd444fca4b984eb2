"""What every operator shares: the library, the choice of a back end, and argument checks that read well.

An operator is one file: a schema defined on `LIBRARY`, an implementation for CPU and CUDA tensors, a fake for
`torch.compile`, and a public function with the documentation. `Library.define/impl` costs about 4 µs a call
where `torch.library.custom_op` costs 18.
"""

import logging
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError

LIBRARY = torch.library.Library("slicegpt", "DEF")
BACKENDS = ("auto", "cuda", "triton", "reference")

logger = logging.getLogger("slicegpt")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define `slicegpt::<schema>`, register both functions, and return the callable operator."""
    name = LIBRARY.define(schema).split("::")[-1]
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"slicegpt::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.slicegpt, name).default


def requested_backend() -> str:
    """The back end that `SLICEGPT_BACKEND` asks for; `auto` when it is not set."""
    backend = os.environ.get("SLICEGPT_BACKEND", "auto")
    if backend not in BACKENDS:
        raise SliceGPTError(f"SLICEGPT_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


@lru_cache
def device_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def device_name(capability: tuple[int, int] | None) -> str:
    """What messages call a device of this compute capability (None: a CPU)."""
    return "a CPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"


@lru_cache
def triton_is_available() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def bad(op: str, argument: str, expected: str, actual: object) -> SliceGPTError:
    """The error to raise for an argument, in one line: `gram_: C must be float64, got torch.float32`."""
    return SliceGPTError(f"{op}: {argument} must {expected}, got {actual}")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory ranges that two tensors span intersect (conservative for interleaved views)."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    (a_start, a_end), (b_start, b_end) = _byte_range(a), _byte_range(b)
    return a_start < b_end and b_start < a_end


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
