"""Where finished tensors go: into memory here, or to the disk (`slicegpt.checkpoint.model_files.ModelFiles`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from transformers import GenerationConfig

from slicegpt.conversion.canonical import build_model
from slicegpt.families import DenseSource, source_of
from slicegpt.modeling import SlicedConfig

# A tensor, or one in pieces, its first rows first.
Pieces = torch.Tensor | Iterable[torch.Tensor]


class Sink(Protocol):
    """What a run of slicing hands its finished tensors to, block by block."""

    def open(self, config: SlicedConfig, dtype: torch.dtype, ridges: Sequence[float]) -> None:
        """Called once, before the first tensor: the model's final config and dtype, and the candidates of λ."""

    def store(self, entries: Mapping[str, Pieces]) -> None:
        """Take entries of the model's state, from any device."""

    def store_fit(self, ridge: float, entries: Mapping[str, torch.Tensor]) -> None:
        """Take entries that depend on λ."""

    def candidate(self, ridge: float) -> DenseSource:
        """The model with the fits at one λ."""

    def choose(self, ridge: float) -> None:
        """The model is the one with the fits at this λ."""

    def finished(self, generation_config: GenerationConfig | None) -> DenseSource:
        """The model, whose tensors are all there.

        Args:
            generation_config: the dense model's, which the sliced one shares; None: the default of its config.
        """


class MemorySink:
    """Keeps the state of the model on the CPU.

    Attributes:
        state: all entries that were stored, and those of the chosen λ.
        fits: of each λ the entries that depend on it.
    """

    def __init__(self):
        self.state: dict[str, torch.Tensor] = {}
        self.fits: dict[float, dict[str, torch.Tensor]] = {}

    def open(self, config: SlicedConfig, dtype: torch.dtype, ridges: Sequence[float]) -> None:
        self.config, self.fits = config, {ridge: {} for ridge in ridges}

    def store(self, entries: Mapping[str, Pieces]) -> None:
        for name, value in entries.items():
            tensor = value if isinstance(value, torch.Tensor) else torch.cat(list(value))
            self.state[name] = tensor.to("cpu")

    def store_fit(self, ridge: float, entries: Mapping[str, torch.Tensor]) -> None:
        self.fits[ridge] |= {name: tensor.to("cpu") for name, tensor in entries.items()}

    def candidate(self, ridge: float) -> DenseSource:
        return source_of(build_model(self.config, self.state | self.fits[ridge]))

    def choose(self, ridge: float) -> None:
        self.state |= self.fits[ridge]

    def finished(self, generation_config: GenerationConfig | None) -> DenseSource:
        model = build_model(self.config, self.state)
        if generation_config is not None:
            model.generation_config = generation_config
        return source_of(model)
