"""Timing: CUDA events on a GPU, the wall clock elsewhere; quantiles of samples; flushing the last-level cache."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished all work queued on it; returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DeviceTimer:
    """Timestamps on a device: call `mark()` between pieces of work, then `milliseconds()` for the times between marks.

    On a GPU a mark is a CUDA event on the current stream: it does not synchronise, only `milliseconds()` does.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """The time between each mark and the next."""
        synchronise(self.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [start.elapsed_time(stop) for start, stop in pairs]
        return [1000 * (stop - start) for start, stop in pairs]


def milliseconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call of `run`, including the work that it queues on the device."""
    synchronise(device)
    watch = DeviceTimer(device)
    watch.mark()
    run()
    watch.mark()
    return watch.milliseconds()[0]


@dataclass(frozen=True)
class Quantiles:
    """Median, 10th and 90th percentile of a sample."""

    median: float
    p10: float
    p90: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Interpolated linearly between the two nearest values, as NumPy does; `values` must not be empty."""
    if len(values) == 1:
        return Quantiles(values[0], values[0], values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Quantiles(statistics.median(values), tenths[0], tenths[-1])


def last_level_cache(device: torch.device) -> int:
    """Bytes of a GPU's L2 or a CPU's last-level cache; 0 where the operating system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [_size(file) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=0)


def _size(file: Path) -> int:
    text = file.read_text(encoding="ascii").strip()
    return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] if text[-1:].isalpha() else int(text)


class CacheFlush:
    """Call it before a measurement: it writes twice the size of the last-level cache, which evicts all weights."""

    def __init__(self, device: torch.device):
        self.buffer = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1)
