"""How much memory is free, and how much of it a run may take."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")

# Bytes that this process may take on a "cuda" device and on the "cpu"; see `memory_limits`.
_LIMITS: dict[str, int] = {}


@contextmanager
def memory_limits(device: int | None = None, host: int | None = None) -> Iterator[None]:
    """Meanwhile `free_memory` tells no more than what this process may still take.

    Args:
        device: bytes of a GPU that tensors may take; host: those that the process may take of the host's memory.
    """
    before = dict(_LIMITS)
    _LIMITS.update({name: limit for name, limit in (("cuda", device), ("cpu", host)) if limit is not None})
    try:
        yield
    finally:
        _LIMITS.clear()
        _LIMITS.update(before)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: on a CPU without swapping, within a container's limit, and on both
    within `memory_limits`.

    What PyTorch's allocator holds on a GPU without using it counts as free. A host that does not tell has none.
    """
    free = _free(device)
    if device.type not in _LIMITS:
        return free
    own = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory()
    return min(free, max(0, _LIMITS[device.type] - own))


def resident_memory() -> int:
    """Bytes of this process in the host's memory; 0 where the system does not tell."""
    return _fields(_STATUS).get("VmRSS:", 0) * 1024


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _fields(_MEMINFO).get("MemAvailable:", 0) * 1024
    if not free:
        with suppress(AttributeError, OSError, ValueError):
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # cgroup v2; "max" is no number
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, limit - used + _fields(_CGROUP / "memory.stat").get("inactive_file", 0)))
    return free


def tells(device: torch.device) -> bool:
    """Whether the system tells how much memory a device has free."""
    return bool(_free(device))


def has_room(needed: float, device: torch.device) -> bool:
    """Whether so many bytes can still be allocated on a device; true where the system does not tell."""
    free = free_memory(device)
    return not free or needed <= free


def _fields(file: Path) -> dict[str, int]:
    """The lines `name number ...` of a file; none where it cannot be read."""
    fields = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in map(str.split, file.read_text(encoding="ascii").splitlines()):
            with suppress(ValueError, IndexError):
                fields[line[0]] = int(line[1])
    return fields


def fits_on(model: nn.Module, device: torch.device) -> bool:
    """Whether a model's weights take at most half of what a GPU has free; a CPU has them already."""
    if device.type != "cuda":
        return True
    return 2 * sum(parameter.nbytes for parameter in model.parameters()) < free_memory(device)
