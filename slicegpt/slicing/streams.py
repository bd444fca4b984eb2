"""The calibration tokens' residual stream between blocks: on the device, on the host, or on the disk."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.memory import free_memory
from slicegpt.hardware.scratch import free_space, scratch_folder
from slicegpt.slicing.stores import DeviceStore, FileStore, HostStore, Store

STORAGES = ("auto", "device", "host", "disk")


@dataclass(frozen=True)
class TokenBatch:
    """Ids and mask [batch, tokens] on the device; `attention_mask` is None where nothing is padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None


def check_storage(activation_storage: str) -> None:
    """One clear error for what names no storage."""
    if activation_storage not in STORAGES:
        allowed = ", ".join(STORAGES)
        raise SliceGPTError(f"must be one of {allowed}, got {activation_storage!r}", "activation_storage")


def choose_storage(
    activation_storage: str,
    stream_bytes: int,
    device: torch.device,
    folder: str | os.PathLike | None = None,
) -> str:
    """Where streams of `stream_bytes` are kept while blocks run on `device`: "device", "host" or "disk".

    Args:
        activation_storage: one of these; or "auto": on the device where they take at most half of its free memory, else
            on the host where they take at most half of its, else on the disk. A CPU is device and host.
        folder: of the files on the disk; None: that of temporary files.

    Raises:
        SliceGPTError: `activation_storage` is none of these, or the disk has no room for the streams.
    """
    check_storage(activation_storage)
    host = torch.device("cpu")
    if activation_storage == "auto":
        places = {"device": device, "host": host}
        fitting = (name for name, place in places.items() if 2 * stream_bytes <= free_memory(place))
        storage = next(fitting, "disk")
    else:
        storage = activation_storage
    if storage == "disk" and free_space(folder) < stream_bytes:
        raise SliceGPTError(
            f"the streams of the calibration tokens take {stream_bytes / 1e9:.1f} GB, and of the disk of "
            f"{scratch_folder(folder)} {free_space(folder) / 1e9:.1f} GB are free; take fewer samples, or put the "
            "output on another disk",
            "activation_storage",
        )
    return "device" if storage == "host" and device.type == "cpu" else storage


def make_store(
    storage: str, count: int, device: torch.device, folder: str | os.PathLike | None = None
) -> Store:
    """A store of `count` tensors, see `choose_storage`."""
    if storage == "disk":
        return FileStore(count, device, folder)
    return HostStore(count, device) if storage == "host" else DeviceStore(count)


class Streams:
    """One tensor [batch, tokens, D] for each calibration batch, read and replaced one at a time.

    Args:
        batches: the calibration tokens.
        device: where blocks run.
        storage: where the tensors are kept, see `choose_storage`.
        folder: of the files on the disk; None: that of temporary files.
    """

    def __init__(
        self,
        batches: Sequence[CalibrationBatch],
        device: torch.device,
        storage: str = "device",
        folder: str | os.PathLike | None = None,
    ):
        self.device = device
        self.batches = [
            TokenBatch(
                batch.input_ids.to(device),
                None if bool(batch.attention_mask.all()) else batch.attention_mask.to(device),
            )
            for batch in batches
        ]
        self.store = make_store(storage, len(self.batches), device, folder)

    def __len__(self) -> int:
        return len(self.batches)

    def __setitem__(self, index: int, stream: torch.Tensor) -> None:
        """The stream's values must not change afterwards."""
        self.store.write(index, stream)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One stream, on the device."""
        return self.store.fetch(index)()

    def __iter__(self) -> Iterator[tuple[int, TokenBatch, torch.Tensor]]:
        """Index, tokens and stream of every batch, the stream on the device; it must not be written to.

        The next one is on its way meanwhile: a batch's own stream may be replaced, those that follow may not.
        """
        following = self.store.fetch(0) if self.batches else None
        for index, batch in enumerate(self.batches):
            fetched = following
            following = self.store.fetch(index + 1) if index + 1 < len(self.batches) else None
            yield index, batch, fetched()

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """All streams where they are kept; None where there is none yet."""
        return self.store.stored()
