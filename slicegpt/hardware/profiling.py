"""Named ranges for profilers, and Chrome traces (ui.perfetto.dev, chrome://tracing)."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """A range in PyTorch's profiler, and on a GPU an NVTX range for Nsight Systems; a microsecond where none runs."""
    with record_function(name):
        if device.type != "cuda":
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


class Trace:
    """The operators, kernels and named ranges of some pieces of work, as one Chrome trace.

    A file and not a profiler that stays open: between the pieces other work runs that nobody wants to see.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._content: dict = {}

    def record(self, work: Callable[[], object]) -> None:
        """Run `work` under the profiler, without gradients."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        with torch.no_grad(), profile(activities=activities) as profiler:
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            content = json.loads(file.read_bytes())
        events = [*self._content.get("traceEvents", ()), *content["traceEvents"]]
        self._content = content | self._content | {"traceEvents": events}

    def write(self, file: str) -> None:
        """Write what was recorded, over an earlier file."""
        Path(file).write_text(json.dumps(self._content), encoding="utf-8")
