"""A stand-in for `torch.cuda`'s streams and events that tells whether copies could race.

Every stream has a clock of all streams: what it knows to be done. Waiting for an event joins the clock of that moment;
an access to memory is ordered after another one if its stream knows of it. On a GPU two accesses of which one writes,
and which are not ordered, may run at once.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from slicegpt.slicing.stores import HostStore


def join(clock: dict[int, int], other: dict[int, int]) -> None:
    """Know what the other one knows."""
    for number, time in other.items():
        clock[number] = max(clock.get(number, 0), time)


class Event:
    def __init__(self, cuda: "FakeCuda"):
        self.cuda, self.clock = cuda, {}

    def record(self, stream: "Stream") -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        join(self.cuda.host, self.clock)


class Stream:
    def __init__(self, cuda: "FakeCuda"):
        self.cuda, self.number, self.clock = cuda, len(cuda.streams), {}
        cuda.streams.append(self)

    def wait_event(self, event: Event) -> None:
        join(self.clock, event.clock)

    def record_event(self) -> Event:
        event = self.cuda.Event()
        event.record(self)
        return event

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


@dataclass
class FakeCuda:
    """Attributes: races, a line for each pair of accesses that are not ordered; host: the clock of what the host has
    waited for, and launches after.
    """

    streams: list[Stream] = field(default_factory=list)
    races: list[str] = field(default_factory=list)
    host: dict[int, int] = field(default_factory=dict)

    def __post_init__(self):
        self.accesses: dict[int, list[tuple[int, int, str, bool]]] = {}
        self.running = Stream(self)  # the computation's

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self)

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: torch.device) -> Stream:
        return self.running

    @contextmanager
    def stream(self, stream: Stream):
        before, self.running = self.running, stream
        yield
        self.running = before

    def access(self, tensor: torch.Tensor, what: str, writes: bool) -> None:
        """The running stream reads or writes a tensor."""
        stream = self.running
        join(stream.clock, self.host)
        seen = self.accesses.setdefault(tensor.data_ptr(), [])
        for number, time, other, wrote in seen:
            if (writes or wrote) and stream.clock.get(number, 0) < time:
                self.races.append(f"{what} beside {other}")
        stream.clock[stream.number] = time = stream.clock.get(stream.number, 0) + 1
        seen.append((stream.number, time, what, writes))


class RecordedStore(HostStore):
    """A `HostStore` on the CPU that enters its copies at a `FakeCuda`; no memory is used again: tensors are kept."""

    def __init__(self, count: int, cuda: FakeCuda):
        super().__init__(count, torch.device("cpu"), cuda)
        self.kept: list[torch.Tensor] = []

    def _host(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.kept += [target, source]
        self.cuda.access(source, "a copy's read", False)
        self.cuda.access(target, "a copy's write", True)
        target.copy_(source)

    def _used_by(self, tensor: torch.Tensor, stream: Stream) -> None:
        assert tensor is not None
