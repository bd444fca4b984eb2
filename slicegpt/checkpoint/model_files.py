"""A sliced model's weights on the disk while it is being sliced, in the files that `save_pretrained` would write.

The names, order and sizes of a model's tensors follow from its config, and from them the shards: every one is there
from the beginning, and the tensors go to their places in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import GenerationConfig

from slicegpt.checkpoint.dense_source import DenseSource, source_of_state
from slicegpt.checkpoint.tensor_files import TensorFiles
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import skeleton
from slicegpt.slicing.blocks import fitted_names

_METADATA = {"format": "pt"}
_ONE_FILE, _INDEX, _PATTERN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model{suffix}.safetensors",
)


def bytes_while_sliced(config: SlicedConfig, dtype: torch.dtype, candidates: int) -> int:
    """What the files of a `ModelFiles` take: the weights, and what each of several candidates of λ needs besides."""
    tensors = {name: tensor.nbytes for name, tensor in skeleton(config).to(dtype).named_parameters()}
    fits = sum(tensors[name] for name in fitted_names(config, tensors)) * (
        candidates if candidates > 1 else 0
    )
    return sum(tensors.values()) + fits


def open_shards(
    folder: Path, shapes: Mapping[str, torch.Tensor], parameters: int, max_shard_size: str
) -> TensorFiles:
    """The files of a model's weights, split as `save_pretrained` splits them, with their index; nothing is in them yet.

    Args:
        shapes: the model's state on the meta device, a tied head left out.
        parameters: what the index says that they are.
    """
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in shapes.items()}
    split = split_torch_state_dict_into_shards(
        dict(shapes), filename_pattern=_PATTERN, max_shard_size=max_shard_size
    )
    files = TensorFiles(folder, split.filename_to_tensors, entries, _METADATA)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / _INDEX).write_text(text, encoding="utf-8")
    return files


class ModelFiles:
    """A `slicegpt.slicing.sink.Sink` in a folder.

    Args:
        folder: where the model's files are written; there already.
        fits: another one, for what each candidate of λ needs while there are several.
        max_shard_size: of a safetensors file, such as "5GB".
    """

    def __init__(self, folder: Path, fits: Path, max_shard_size: str):
        self.folder, self.fits_folder, self.max_shard_size = folder, fits, max_shard_size
        self.config: SlicedConfig | None = None
        self.dtype: torch.dtype | None = None
        self.tensors: TensorFiles | None = None
        self.fits: dict[float, TensorFiles] = {}

    def open(self, config: SlicedConfig, dtype: torch.dtype, ridges: Sequence[float]) -> None:
        """Make the files, with room for all that they will hold; what an earlier process wrote stays there."""
        self.config, self.dtype = config, dtype
        shell = skeleton(config).to(dtype)
        shapes = shell.state_dict()
        if config.tie_word_embeddings:
            for name in [name for name in shapes if name.startswith("lm_head.weight")]:
                del shapes[name]  # the embedding table under its other name
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in shapes.items()}
        parameters = sum(parameter.numel() for parameter in shell.parameters())  # as transformers counts
        self.tensors = open_shards(self.folder, shapes, parameters, self.max_shard_size)
        if len(ridges) > 1:
            fitted = {name: entries[name] for name in fitted_names(config, entries)}
            self.fits = {
                ridge: TensorFiles(self.fits_folder, {f"fit-{ridge}.safetensors": fitted}, fitted, _METADATA)
                for ridge in ridges
            }

    def store(self, entries: Mapping[str, torch.Tensor | Iterable[torch.Tensor]]) -> None:
        for name, value in entries.items():
            self.tensors.write(name, value)

    def store_fit(self, ridge: float, entries: Mapping[str, torch.Tensor]) -> None:
        files = self.fits.get(ridge, self.tensors)
        for name, tensor in entries.items():
            files.write(name, tensor)

    def candidate(self, ridge: float) -> DenseSource:
        """The model with the fits at one λ; a tensor is read when it is asked for."""
        places = self.tensors.places | (self.fits[ridge].places if self.fits else {})
        return source_of_state(f"{self.folder}", self.config, places, self.dtype)

    def choose(self, ridge: float) -> None:
        if self.fits:
            for name, tensor in self.fits[ridge].items():
                self.tensors.write(name, tensor)

    def sync(self) -> None:
        """Return when everything that was stored so far is on the disk."""
        for files in (self.tensors, *self.fits.values()):
            if files is not None:
                files.sync()

    def close(self) -> None:
        for files in (self.tensors, *self.fits.values()):
            if files is not None:
                files.close()

    def finished(self, generation_config: GenerationConfig | None) -> DenseSource:
        """The model; the config files stand beside its weights, as `save_pretrained` writes them."""
        shell = skeleton(self.config)
        config = shell.config
        config.dtype = str(self.dtype).removeprefix("torch.")
        config.architectures = [type(shell).__name__]
        config.save_pretrained(self.folder)
        (generation_config or shell.generation_config).save_pretrained(self.folder)
        return source_of_state(f"{self.folder}", config, self.tensors.places, self.dtype)
