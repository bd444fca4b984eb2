"""The calibration tokens' residual stream between blocks, kept on the device where it fits, else on the host."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.memory import free_memory

STORAGES = ("auto", "device", "host")


@dataclass(frozen=True)
class TokenBatch:
    """Ids and mask [batch, tokens] on the device; `attention_mask` is None where nothing is padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None


def choose_storage(activation_storage: str, stream_bytes: int, device: torch.device) -> torch.device:
    """Where streams of `stream_bytes` are kept while blocks run on `device`.

    Args:
        activation_storage: "device", "host", or "auto": on the device where they take at most half of its free memory.

    Raises:
        SliceGPTError: `activation_storage` is none of these.
    """
    if activation_storage not in STORAGES:
        allowed = ", ".join(STORAGES)
        raise SliceGPTError(f"must be one of {allowed}, got {activation_storage!r}", "activation_storage")
    if device.type != "cuda" or activation_storage == "device":
        return device
    if activation_storage == "host":
        return torch.device("cpu")
    return device if stream_bytes <= free_memory(device) // 2 else torch.device("cpu")


class Streams:
    """One tensor [batch, tokens, D] for each calibration batch, read and replaced one at a time.

    Args:
        batches: the calibration tokens.
        device: where blocks run.
        storage: where the tensors are kept, see `choose_storage`.
    """

    def __init__(
        self,
        batches: Sequence[CalibrationBatch],
        device: torch.device,
        storage: torch.device,
    ):
        self.device, self.storage = device, storage
        self.batches = [
            TokenBatch(
                batch.input_ids.to(device),
                None if bool(batch.attention_mask.all()) else batch.attention_mask.to(device),
            )
            for batch in batches
        ]
        self.tensors: list[torch.Tensor | None] = [None] * len(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __setitem__(self, index: int, stream: torch.Tensor) -> None:
        if self.storage == self.device:
            self.tensors[index] = stream
            return
        if self.tensors[index] is None:  # pinned, so that copies overlap with the computation
            self.tensors[index] = torch.empty(stream.shape, dtype=stream.dtype, pin_memory=True)
        self.tensors[index].copy_(stream, non_blocking=True)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One stream, on the device."""
        return self.tensors[index].to(self.device, non_blocking=True)

    def __iter__(self) -> Iterator[tuple[int, TokenBatch, torch.Tensor]]:
        """Index, tokens and stream of every batch, the stream on the device."""
        for index, batch in enumerate(self.batches):
            yield index, batch, self[index]
