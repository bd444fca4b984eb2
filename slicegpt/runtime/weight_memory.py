"""Memory for packed weights on a CPU: one after another as a token reads them, on huge pages where Linux has them.

A token reads every weight once. What a processor fetches ahead by itself ends with a page, and small pages cost more
look-ups of addresses. One thread of an AMD EPYC 7003, best of four passes over 96 MiB on a shared machine: reading
alone reached 14.5 GB/s on pages of 4 KiB and 18.7 on huge ones; bfloat16 weights 9 to 13 and 12 to 14, 8-bit ones 12 to
13 and 15 to 17.
"""

import contextlib
import mmap
from dataclasses import replace

import torch
from torch import Tensor

from slicegpt.ops.panels import PanelWeight

CHUNK = 64 << 20  # bytes that are asked for at a time; what is not written takes no memory
LINE = 64

HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone


class WeightMemory:
    """Copies weights into memory of its own; a copy lives as long as any tensor of its chunk."""

    def __init__(self):
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def copy(self, weight: Tensor | PanelWeight) -> Tensor | PanelWeight:
        """The same numbers, contiguous, behind those that were copied before; off Linux the weight itself."""
        if isinstance(weight, PanelWeight):
            parts = ("codes", "scales", "zeros", "rest")
            found = {name: getattr(weight, name) for name in parts}
            return replace(weight, **{name: self.copy(one) for name, one in found.items() if one is not None})
        if HUGE_PAGES is None or weight.numel() == 0:
            return weight
        size = -(-weight.nbytes // LINE) * LINE
        if self._chunk is None or self._used + size > len(self._chunk):
            self._chunk, self._used = _huge_pages(max(CHUNK, size)), 0
        place = torch.frombuffer(self._chunk, dtype=weight.dtype, count=weight.numel(), offset=self._used)
        self._used += size
        return place.view(weight.shape).copy_(weight)


def _huge_pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(HUGE_PAGES)
    return memory
