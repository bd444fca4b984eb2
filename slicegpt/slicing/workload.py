"""What decides how much a run of slicing takes, besides the model's config: its options, and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workload:
    """What a run does, besides what its config says.

    Attributes:
        samples, seqlen, batch_size: of the calibration.
        share: of the samples that the refit fits to; 0 without a refit.
        dtype: of weights and streams; teacher_dtype: of the dense model's blocks.
        ridges: candidates of λ.
        windows: held-out windows that choose λ.
        allocate: whether the neurons are shared out by a pass through the dense model before.
        prices: whether that pass takes prices as well, and plans are measured after it.
        storage: "auto", "device", "host" or "disk", of the streams.
        ranks: processes that share the samples, one device each.
        on_gpu: whether there are devices beside the host.
        in_memory: whether the sliced model is kept there, for want of an output folder.
        own_text: whether the dense model writes some of the text, for which it is loaded whole.
        timing: whether both models' tokens/s are measured at the end, for which small ones are loaded.
        rounds: whether weights are stored with 8 or 4 bits, and rounded on the way.
    """

    samples: int
    seqlen: int
    batch_size: int
    share: float = 1.0
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32
    ridges: int = 3
    windows: int = 4
    allocate: bool = True
    prices: bool = False
    storage: str = "auto"
    ranks: int = 1
    on_gpu: bool = False
    in_memory: bool = False
    own_text: bool = False
    timing: bool = False
    rounds: bool = False

    @property
    def batches(self) -> int:
        """Of the rank that has most."""
        return math.ceil(math.ceil(self.samples / self.batch_size) / self.ranks)

    @property
    def batch_tokens(self) -> int:
        return min(self.samples, self.batch_size) * self.seqlen

    @property
    def tokens(self) -> int:
        return min(self.samples * self.seqlen, self.batches * self.batch_tokens)

    @property
    def fitted_tokens(self) -> int:
        fitted = math.ceil(round(self.share * math.ceil(self.samples / self.batch_size), 9))
        return min(math.ceil(fitted / self.ranks) * self.batch_tokens, self.tokens) if self.share else 0


@dataclass(frozen=True)
class Machine:
    """Bytes that a run may take: of a device's memory (of the host's where it is the device), the host's, the disk."""

    device: float
    host: float
    disk: float = math.inf
