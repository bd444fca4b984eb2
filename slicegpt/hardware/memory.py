"""How much memory is free."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: on a CPU without swapping, within a container's limit.

    What PyTorch's allocator holds on a GPU without using it counts as free. A host that does not tell has none.
    """
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


def has_room(needed: float, device: torch.device) -> bool:
    """Whether so many bytes can still be allocated on a device; true where the system does not tell."""
    free = free_memory(device)
    return not free or needed <= free


def _fields(file: Path) -> dict[str, int]:
    """The lines `name number ...` of a file; none where it cannot be read."""
    with suppress(OSError, ValueError, IndexError):
        lines = map(str.split, file.read_text(encoding="ascii").splitlines())
        return {line[0]: int(line[1]) for line in lines}
    return {}


def fits_on(model: nn.Module, device: torch.device) -> bool:
    """Whether a model's weights take at most half of what a GPU has free; a CPU has them already."""
    if device.type != "cuda":
        return True
    return 2 * sum(parameter.nbytes for parameter in model.parameters()) < free_memory(device)
