"""Seconds of each stage of a run of slicing."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slicegpt.hardware.profiling import named_range


class StageTimer:
    """Seconds spent in each of several stages, device work included.

    Attributes:
        seconds: of each stage so far.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with named_range(f"slicing / {name}", self.device):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start
