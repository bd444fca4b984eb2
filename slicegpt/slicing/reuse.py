"""What slicing one model at several sizes needs of the dense model each time, found once.

Three things do not depend on the size: what deleting neurons costs in each layer, the dense model's stream after every
block, and its losses on the held-out windows. On a CPU they are a third of a run. The slices are the same, bit for bit.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from slicegpt.calibration.batches import CalibrationBatch, calibration_hash
from slicegpt.hardware.memory import free_memory

T = TypeVar("T")

# Streams are kept as long as they leave so much of the memory that is free; what was not kept is computed again.
LEFT = 0.5


class Reuse:
    """Values of one dense model and one set of calibration tokens; another model or other tokens begin anew."""

    def __init__(self):
        self._model: PreTrainedModel | None = None
        self._tokens = ""
        self._kept: dict[Hashable, object] = {}

    def begin(self, model: PreTrainedModel, batches: Sequence[CalibrationBatch]) -> None:
        """Say what is sliced next."""
        tokens = calibration_hash(batches)
        if model is not self._model or tokens != self._tokens:
            self._kept.clear()
        self._model, self._tokens = model, tokens

    def value(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, or returned before under this key of all that it depends on."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def stream(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """As `value`, of a tensor that is kept only where memory allows."""
        if key in self._kept:
            return self._kept[key]
        made = make()
        # Twice what is kept once all of it is: the free memory falls as it grows.
        if made.nbytes + self._stream_bytes() < LEFT * (free_memory(made.device) + self._stream_bytes()):
            self._kept[key] = made
        return made

    def _stream_bytes(self) -> int:
        return sum(value.nbytes for value in self._kept.values() if isinstance(value, torch.Tensor))
