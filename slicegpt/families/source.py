"""A dense model that need not be in memory: its config, its shape, and tensors that are read as they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.modeling.sizes import parameters_of


class StoredTensor(Protocol):
    """A tensor that is somewhere.

    Attributes:
        shape: of the tensor.
        dtype: in which `read` gives it.
    """

    shape: torch.Size
    dtype: torch.dtype

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """The rows from `begin` to `end` (None: the last one) of its first dimension, on the CPU."""


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor of a model that is loaded; reading copies nothing."""

    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        return self.tensor if begin == 0 and end is None else self.tensor[begin:end]


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by the names of a model's state; each one is read when it is asked for, and not kept.

    Args:
        stored: where each one is.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]):
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:  # the inherited one would read the tensor
        return name in self.stored

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, which is not read."""
        return self.stored[name].shape

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Some rows of a tensor's first dimension; no others are read."""
        return self.stored[name].read(begin, end)


@dataclass(frozen=True, eq=False)  # comparing two would read all of their tensors
class DenseSource:
    """A model as slicing and evaluation read it: from files, a tensor at a time, or from a model in memory.

    `slicegpt.checkpoint.dense_source` opens one; `source_of` makes one of a loaded model.

    Attributes:
        name: what the model is called.
        config: the model's.
        tokenizer: None where there is none.
        generation_config: the model's; None where it has none.
        tensors: by the names of the model's `state_dict()`, in the dtype of the model, on the CPU where they come from
            files. A tied head is there by both of its names.
        dtype: in which the model is loaded.
        shell: the model itself with parameters that take no memory and hold nothing, all buffers in place; of a
            loaded model the model.
    """

    name: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    generation_config: GenerationConfig | None
    tensors: Weights
    dtype: torch.dtype
    shell: PreTrainedModel

    @property
    def parameters(self) -> int:
        """Numbers that the model stores; a tied head counts once."""
        return parameters_of(self.shell)

    @property
    def total_bytes(self) -> int:
        """What they take in memory, loaded."""
        return sum(parameter.nbytes for parameter in self.shell.parameters())

    @property
    def in_memory(self) -> bool:
        """Whether the model is loaded."""
        return all(isinstance(each, MemoryTensor) for each in self.tensors.stored.values())

    def load(self) -> PreTrainedModel:
        """The whole model, in eval mode: a loaded one itself, else a new one for each call."""
        if self.in_memory:
            return self.shell
        # Copied with the very parameters of the shell: copies of them would take the memory of a whole model.
        model = copy.deepcopy(self.shell, {id(each): each for each in self.shell.parameters()})
        loaded: dict[int, nn.Parameter] = {}
        for root, module in model.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in loaded:
                    tensor = self.tensors[f"{root}.{own}" if root else own]
                    loaded[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                module._parameters[own] = loaded[id(parameter)]
        return model.eval()


def source_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None
) -> DenseSource:
    """A loaded model as a source; its tensors are the model's own."""
    stored = {key: MemoryTensor(tensor) for key, tensor in model.state_dict().items()}
    return DenseSource(
        name=name or model.config.name_or_path or type(model).__name__,
        config=model.config,
        tokenizer=tokenizer,
        generation_config=model.generation_config,
        tensors=Weights(stored),
        dtype=model.dtype,
        shell=model,
    )
