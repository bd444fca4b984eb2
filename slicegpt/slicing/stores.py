"""Where the tensors of a stream stay between the blocks, and how they come and go while a block runs.

A pass over a stream reads one tensor after the other and replaces each by what the block makes of it. A store fetches
the next tensor while the one before is worked on, and takes the one before that away: two are on their way at a time,
whatever their number. All stores return the bits that they were given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from slicegpt.hardware.scratch import copy_into, scratch_tensor

# Fetches a tensor to the device where blocks run: called at once, it waits only for what is not there yet.
Fetched = Callable[[], torch.Tensor]


class Store(Protocol):
    def write(self, index: int, tensor: torch.Tensor) -> None:
        """Keep a tensor of the device; its values must not change any more."""

    def fetch(self, index: int) -> Fetched:
        """Begin to bring a tensor that was written back to the device; the result must not be written to."""

    def stored(self) -> list[torch.Tensor | None]:
        """All tensors where they are kept, once they have arrived; None where none was written."""


class DeviceStore:
    """On the device itself: nothing moves."""

    def __init__(self, count: int):
        self.tensors: list[torch.Tensor | None] = [None] * count

    def write(self, index: int, tensor: torch.Tensor) -> None:
        self.tensors[index] = tensor

    def fetch(self, index: int) -> Fetched:
        return lambda: self.tensors[index]

    def stored(self) -> list[torch.Tensor | None]:
        return list(self.tensors)


class HostStore:
    """In pinned memory of the host, for a GPU: a stream of copies in each direction beside that of the computation.

    Three orders have to hold, each by an event: a copy out begins when the tensor is complete, a copy in when the copy
    out before it is done, and the computation when the copy in is.

    Args:
        cuda: `torch.cuda`, or what stands for it in a test.
    """

    def __init__(self, count: int, device: torch.device, cuda=torch.cuda):
        self.device, self.cuda = device, cuda
        self.inwards, self.outwards = cuda.Stream(device), cuda.Stream(device)
        self.hosts: list[torch.Tensor | None] = [None] * count
        self.arrived = [None] * count

    def write(self, index: int, tensor: torch.Tensor) -> None:
        if self.hosts[index] is None:
            self.hosts[index] = self._host(tensor)
        self.outwards.wait_stream(self.cuda.current_stream(self.device))
        with self.cuda.stream(self.outwards):
            self._copy(self.hosts[index], tensor)
            self.arrived[index] = self.outwards.record_event()
        self._used_by(tensor, self.outwards)

    def fetch(self, index: int) -> Fetched:
        host = self.hosts[index]
        self.inwards.wait_event(self.arrived[index])
        with self.cuda.stream(self.inwards):
            # Allocated on this stream: its memory may be that of a tensor that this stream, too, is done with.
            tensor = torch.empty_like(host, device=self.device, pin_memory=False)
            self._copy(tensor, host)
            there = self.inwards.record_event()

        def wait() -> torch.Tensor:
            running = self.cuda.current_stream(self.device)
            running.wait_event(there)
            self._used_by(tensor, running)
            return tensor

        return wait

    def stored(self) -> list[torch.Tensor | None]:
        for event in self.arrived:
            if event is not None:
                event.synchronize()
        return list(self.hosts)

    def _host(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def _used_by(self, tensor: torch.Tensor, stream) -> None:
        """The allocator gives the tensor's memory to nobody before the stream is done with it."""
        tensor.record_stream(stream)


class FileStore:
    """In temporary files without names, read and written by a thread, and dropped from memory at once.

    One thread does one thing after the other, so a tensor is written before it is read. Before it takes another one,
    `write` waits until the last one is in its file: then at most one waits in memory, and a full disk is noticed.

    Args:
        folder: of the files; None: that of temporary files.
    """

    def __init__(self, count: int, device: torch.device, folder: str | os.PathLike | None = None):
        self.device, self.folder = device, folder
        self.files: list[torch.Tensor | None] = [None] * count
        self.thread = ThreadPoolExecutor(1, "streams")
        self.writing: Future | None = None

    def write(self, index: int, tensor: torch.Tensor) -> None:
        self._settle()
        if self.files[index] is None:
            self.files[index] = scratch_tensor(tensor.shape, tensor.dtype, self.folder)
        # From a GPU it comes at once, in a fraction of the time that the disk takes.
        self.writing = self.thread.submit(copy_into, self.files[index], tensor.to("cpu"))

    def fetch(self, index: int) -> Fetched:
        reading = self.thread.submit(self._read, self.files[index])
        return lambda: reading.result().to(self.device, non_blocking=True)

    def _read(self, file: torch.Tensor) -> torch.Tensor:
        tensor = torch.empty(file.shape, dtype=file.dtype, pin_memory=self.device.type == "cuda")
        copy_into(tensor, file)
        return tensor

    def stored(self) -> list[torch.Tensor | None]:
        self._settle()
        return list(self.files)

    def _settle(self) -> None:
        if self.writing is not None:
            self.writing.result()
            self.writing = None
