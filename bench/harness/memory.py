"""Memory in use and its peak: of PyTorch's allocator on a GPU, of the process's resident set on a CPU."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

from slicegpt.progress import resident_bytes


def bytes_in_use(device: torch.device) -> int:
    """Bytes allocated by tensors on a GPU; resident in this process on a CPU (Linux only; 0 elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_bytes()[0]


def start_peak(device: torch.device) -> None:
    """Reset the peak that `peak_bytes` returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Where the kernel forbids the reset, the peak is that of the process since its start.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use at once since `start_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes()[1]


def release_unused_memory(device: torch.device, collect: bool = True) -> None:
    """Return cached, unused memory to the system, so that the next measurement can have it.

    Args:
        collect: run the garbage collector first, which takes about a tenth of a second.
    """
    if collect:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError):  # glibc keeps freed blocks; other C libraries may lack the call
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a failed allocation, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    known = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, RuntimeError) and any(part in text for part in known)
