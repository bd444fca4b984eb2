"""The calibration tokens' residual stream, kept between blocks on the device where it fits, else on the host."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.memory import free_memory

PLACES = ("auto", "device", "host")


@dataclass(frozen=True)
class TokenBatch:
    """Ids and mask [batch, tokens] on the device; `attention_mask` is None where nothing is padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None


def choose_place(place: str, stream_bytes: int, device: torch.device) -> torch.device:
    """Where the streams are kept. "auto": on the device where they take at most half of the free memory."""
    if place not in PLACES:
        raise SliceGPTError(f"--signals: must be one of {', '.join(PLACES)}, got {place!r}")
    if device.type != "cuda" or place == "device":
        return device
    if place == "host":
        return torch.device("cpu")
    return device if stream_bytes <= free_memory(device) // 2 else torch.device("cpu")


class Signals:
    """One tensor [batch, tokens, width] a calibration batch, read and replaced one at a time.

    Args:
        batches: the calibration tokens.
        device: where blocks run.
        place: where the stream is kept, see `choose_place`.
    """

    def __init__(
        self,
        batches: Sequence[CalibrationBatch],
        device: torch.device,
        place: torch.device,
    ):
        self.device, self.place = device, place
        self.batches = [
            TokenBatch(
                batch.input_ids.to(device),
                None if bool(batch.attention_mask.all()) else batch.attention_mask.to(device),
            )
            for batch in batches
        ]
        self.streams: list[torch.Tensor | None] = [None] * len(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __setitem__(self, index: int, stream: torch.Tensor) -> None:
        if self.place == self.device:
            self.streams[index] = stream
            return
        if self.streams[index] is None:  # pinned, so that copies overlap with the computation
            self.streams[index] = torch.empty(stream.shape, dtype=stream.dtype, pin_memory=True)
        self.streams[index].copy_(stream, non_blocking=True)

    def __iter__(self) -> Iterator[tuple[int, TokenBatch, torch.Tensor]]:
        """Index, tokens and stream of every batch, the stream on the device."""
        for index, batch in enumerate(self.batches):
            yield index, batch, self.streams[index].to(self.device, non_blocking=True)
