"""Several processes that work together, one on each device: who does what, and what they exchange.

Rank 0 decides and writes. Every rank takes its share of the calibration batches; sums over them are added up on rank 0
in float64, and what rank 0 makes of them is sent to all. Nothing but these messages is shared: no memory, no file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from slicegpt.errors import SliceGPTError
from slicegpt.hardware.devices import find_device
from slicegpt.hardware.launcher import Launch, launched
from slicegpt.hardware.scratch import release
from slicegpt.hardware.watch import Watch

Item = TypeVar("Item")

# Bytes of a message: large enough for a network's full rate, small beside a matrix, of which no second one is held.
PIECE = 1 << 26
# For how long a rank waits for the others. Decisions about a large model take minutes, and self-sampling hours; who is
# gone is noticed by `slicegpt.hardware.watch`.
PATIENCE = timedelta(days=7)
START = timedelta(minutes=5)


class RankLost(SliceGPTError):
    """Another rank of the job is gone."""


class Ranks:
    """The processes of a job, seen from one of them; this class is a process that is alone, for which all is a no-op.

    Attributes:
        rank: of this process, 0 to `size - 1`.
        size: processes.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    def deal(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's share of `items`: one in turn. The first n items are dealt as n items alone would be."""
        return items if self.size == 1 else items[self.rank :: self.size]

    def stands_for(self, position: int, count: int) -> int:
        """Items of `count` that are done, on all ranks together, with the `position`-th one dealt to rank 0."""
        return min(self.size, count - position * self.size)

    def reduce_(self, tensor: torch.Tensor) -> None:
        """Add up a tensor [n, ...] over all ranks, onto rank 0; on the others its content is lost."""

    def reduce_symmetric_(self, matrix: torch.Tensor) -> None:
        """`reduce_` for a symmetric matrix [n, n], of which the upper triangle is sent."""

    def sum_(self, tensor: torch.Tensor) -> None:
        """Add up a small tensor over all ranks, on each of them."""

    def decide(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank; the others do not call it.

        Args:
            make: returns tensors, values that can be pickled, or tuples, lists, dicts and dataclasses of them. A tensor
                of rank 0's device arrives on the receiver's own, with the same strides.
        """
        return make()

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """Give a tensor of this rank's device to another one, which has to `receive` it."""

    def receive(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> torch.Tensor:
        """A tensor that another rank sends, on this one's device."""
        raise NotImplementedError("a process that is alone receives nothing")

    def wait(self) -> None:
        """Wait until every rank is here."""


class ProcessRanks(Ranks):
    """One of several processes, in `torch.distributed`'s default group; `joined` makes it.

    Args:
        device: where this rank's tensors are; those of rank 0's device arrive there.
    """

    def __init__(self, launch: Launch, device: torch.device):
        from torch import distributed

        self.rank, self.size, self.device = launch.rank, launch.size, device
        self._distributed = distributed

    def reduce_(self, tensor: torch.Tensor) -> None:
        if tensor.dim() == 0:
            tensor = tensor[None]
        for piece in _pieces(tensor):
            with _whole(piece) as message:
                self._distributed.reduce(message, 0)
            release(piece)

    def reduce_symmetric_(self, matrix: torch.Tensor) -> None:
        size = len(matrix)
        step = max(1, PIECE // (size * matrix.element_size()))
        for start in range(0, size, step):
            end = min(start + step, size)
            panel = matrix[start:end, start:]
            with _whole(panel) as message:
                self._distributed.reduce(message, 0)
            if self.first:
                # The ranks may be added in another order above the diagonal than below it: one half decides.
                square = panel[:, : end - start]
                square.copy_(square.triu() + square.triu(1).mT)
                matrix[end:, start:end] = panel[:, end - start :].mT
            release(matrix)

    def sum_(self, tensor: torch.Tensor) -> None:
        self._distributed.all_reduce(tensor)

    def decide(self, make: Callable[[], Any]) -> Any:
        tensors: list[torch.Tensor] = []
        value = make() if self.first else None
        outline = [_outline(value, tensors) if self.first else None]
        self._distributed.broadcast_object_list(outline, 0, device=torch.device("cpu"))
        if self.first:
            for tensor in tensors:
                self._send(tensor)
            return value
        return _filled(outline[0], self._receive)

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        for piece in _pieces(tensor):
            self._distributed.send(piece.contiguous(), rank)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        for piece in _pieces(tensor):
            self._distributed.recv(piece, rank)
        return tensor

    def wait(self) -> None:
        self.sum_(torch.zeros(1))

    def _send(self, tensor: torch.Tensor) -> None:
        for piece in _pieces(tensor if tensor.dim() else tensor[None]):
            self._distributed.broadcast(piece.contiguous(), 0)

    def _receive(self, place: _Place) -> torch.Tensor:
        device = self.device if place.device == self.device.type else torch.device(place.device)
        # With the strides of the original, so that matrix products take the same path and round alike.
        tensor = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device=device)
        for piece in _pieces(tensor if tensor.dim() else tensor[None]):
            with _whole(piece) as message:
                self._distributed.broadcast(message, 0)
        return tensor


@contextmanager
def joined(
    device: str | torch.device | None, say: Callable[[str], object] = lambda line: print(line, flush=True)
) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that a launcher started together; without one, a process is alone.

    Where one of them fails, only the first to fail says so: the others leave without a word.

    Args:
        device: of this process, as `find_device` takes it, except that several ranks of a node take one GPU each, that
            of their `LOCAL_RANK`.
        say: prints the one line that tells of a rank which is gone.

    Yields:
        The ranks, and this one's device.

    Raises:
        SliceGPTError: a device that is not there for every rank, or ranks that do not come together.
        RankLost: the connection to another rank broke.
        SystemExit: another rank has failed, and said so.
    """
    launch = launched()
    if launch.size == 1:
        yield Ranks(), find_device(device)
        return
    place = device_of(launch, device)
    ranks, watch = _join(launch, place, say)
    try:
        yield ranks, place
        ranks.wait()
    except BaseException as error:
        if isinstance(error, SystemExit) or not watch.speaks():
            raise SystemExit(error.code if isinstance(error, SystemExit) else 2) from None
        if _is_lost(error):
            raise RankLost("a rank has died") from error
        raise
    else:
        watch.stop()
        ranks._distributed.destroy_process_group()


def device_of(launch: Launch, device: str | torch.device | None) -> torch.device:
    """The device of one of several ranks: its node's GPU number `LOCAL_RANK`, or the CPU."""
    name = "auto" if device is None else str(device)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise SliceGPTError(
            f"must be auto, cuda or cpu where {launch.size} processes take a GPU each, got {name!r}", "device"
        )
    devices = torch.cuda.device_count()
    if launch.local_rank >= devices:
        raise SliceGPTError(
            f"rank {launch.rank} is number {launch.local_rank + 1} on a machine with {devices} CUDA devices: start as "
            f"many processes a node",
            "device",
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def _join(launch: Launch, device: torch.device, say: Callable[[str], object]) -> tuple[ProcessRanks, Watch]:
    from torch import distributed

    on_gpu = device.type == "cuda"
    if on_gpu and not distributed.is_nccl_available():
        raise SliceGPTError("several GPUs need a PyTorch with NCCL, which this one has not", "device")
    try:
        store, _, _ = next(distributed.rendezvous("env://", launch.rank, launch.size, timeout=START))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        beats = distributed.TCPStore(address, port, is_master=False, timeout=START)
        # Restarts by the launcher count in a store that stays the same.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        watch = Watch(distributed.PrefixStore(f"slicegpt/{attempt}", beats), launch.rank, launch.size, say)
        watch.start()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.size,
            timeout=PATIENCE,
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise SliceGPTError(
            f"the {launch.size} processes of this job do not come together: {str(error).splitlines()[0]}"
        ) from error
    return ProcessRanks(launch, device), watch


def _is_lost(error: BaseException) -> bool:
    """Whether an error is a connection to another rank that broke."""
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("onnection" in text or "gloo" in text or "NCCL" in text)


# --- tensors as messages --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a tensor belongs in a value that is sent; its content follows."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str


def _outline(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` with a `_Place` in the place of every tensor; these are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Place(tuple(value.shape), value.stride(), value.dtype, value.device.type)
    return _rebuilt(value, lambda part: _outline(part, tensors))


def _filled(value: Any, tensor_of: Callable[[_Place], torch.Tensor]) -> Any:
    """The reverse of `_outline`, in the same order."""
    if isinstance(value, _Place):
        return tensor_of(value)
    return _rebuilt(value, lambda part: _filled(part, tensor_of))


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) in (tuple, list):
        return type(value)(map(change, value))
    if type(value) is dict:
        return {name: change(part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, (type, _Place)):
        return type(value)(**{part.name: change(getattr(value, part.name)) for part in fields(value)})
    return value


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor [n, ...] in views of some rows, at most `PIECE` bytes each where a row is not larger."""
    if not tensor.numel():
        return
    row = tensor[0].numel() * tensor.element_size()
    yield from tensor.split(max(1, PIECE // row))


@contextmanager
def _whole(piece: torch.Tensor) -> Iterator[torch.Tensor]:
    """A piece as contiguous memory, which messages need; what is written there ends up in the piece."""
    if piece.is_contiguous():
        yield piece
        return
    message = piece.contiguous()
    yield message
    piece.copy_(message)
