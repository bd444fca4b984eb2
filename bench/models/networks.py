"""The networks to measure: a dense model and its sliced sizes, from a folder, a model name, or a shape alone.

Speed depends on shapes, not on the values of the weights. So the sliced sizes of a dense model get random weights,
without calibration, and a shape needs no checkpoint at all. Folders keep their own weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from slicegpt.bench.harness.memory import release_unused_memory
from slicegpt.bench.models.architectures import MODELS, fields_of, fields_of_config, random_dense
from slicegpt.checkpoint.loading import check_folder, load_dense
from slicegpt.checkpoint.record import slicing_fraction
from slicegpt.conversion.multiples import multiple_of
from slicegpt.conversion.plan import Shape, constant_widths, plan, width_for_slice
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
from slicegpt.modeling.random_weights import random_model
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.runtime import Runtime, to_canonical


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class MeasuredNetwork:
    """One size of one model; its weights are made on first use and kept until `release`.

    Attributes:
        label: "dense", "sliced 25 %", or a folder's name.
        source: folder or shape.
        config: of the canonical form; a dense network has identity shortcuts.
        folder: with the weights at this size; None where they are random.
        huggingface_config: of the dense model in Hugging Face's own class; None where sliced.
        keeps_plain, keeps_huggingface: whether this form is measured, and not only a step towards another one.
        forms: of the runtime's that are measured.
    """

    label: str
    source: str
    config: SlicedConfig
    dtype: torch.dtype
    device: torch.device
    folder: str | None = None
    huggingface_config: PreTrainedConfig | None = None
    keeps_plain: bool = True
    keeps_huggingface: bool = True
    forms: int = 1
    _models: dict[str, PreTrainedModel | Runtime] = field(default_factory=dict, repr=False)

    @property
    def is_dense(self) -> bool:
        return self.huggingface_config is not None

    @property
    def slice(self) -> float:
        """Fraction of columns deleted, `1 - d / D`, the mean over the boundaries."""
        return slicing_fraction(self.config)

    @property
    def parameters(self) -> int:
        """Stored elements: the checkpoint's of a dense network, those of the sliced form otherwise."""
        return self.config.source_parameters if self.is_dense else stored_parameters(self.config)

    @property
    def bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    def canonical(self) -> SlicedForCausalLM:
        """The plain form, `SlicedForCausalLM`; of a dense folder, its weights with the norms folded in."""
        if "canonical" not in self._models:
            if self.folder is None:
                model = random_model(self.config, self.dtype, self.device)
            elif self.is_dense:
                model = to_canonical(self.huggingface())
                if not self.keeps_huggingface:
                    del self._models["huggingface"]
            else:
                model, _ = load_dense(self.folder, self.dtype, self.device)
            self._models["canonical"] = model
        return self._models["canonical"]

    def runtime(self, weights: str | None = None) -> Runtime:
        """The fused form; unless it is needed, the plain form's layers are released as they are packed.

        weights: what `Runtime` rounds them to.
        """
        name = "runtime" if weights is None else f"runtime {weights}"
        if name not in self._models:
            made = sum(one.startswith("runtime") for one in self._models)
            last = not self.keeps_plain and made + 1 >= self.forms
            self._models[name] = Runtime(self.canonical(), release=last, weights=weights)
            if last:
                del self._models["canonical"]
        return self._models[name]

    def huggingface(self) -> PreTrainedModel:
        """The dense model in Hugging Face's own class."""
        if "huggingface" not in self._models:
            if self.folder is not None:
                model, _ = load_dense(self.folder, self.dtype, self.device)
            else:
                model = random_dense(self.huggingface_config, self.dtype, self.device)
            self._models["huggingface"] = model
        return self._models["huggingface"]

    def release(self) -> None:
        """Drop the weights and return their memory."""
        self._models.clear()
        release_unused_memory(self.device)

    def facts(self) -> dict:
        """The columns of a result row that describe the network."""
        return {
            "network": self.label,
            "slice": round(self.slice, 4),
            "width": self.config.boundary_widths[0],
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dense_parameters": self.config.source_parameters,
            "dtype": dtype_name(self.dtype),
        }


def networks_of_shape(
    name: str,
    fractions: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape | None = None,
) -> list[MeasuredNetwork]:
    """A named shape at every fraction of columns deleted (0: the dense model), with random weights."""
    fields = fields_of(name)
    return [
        sized_network(name, fields, fraction, dtype, device, MODELS[name], None, shape)
        for fraction in fractions
    ]


def networks_of_model(
    name: str,
    fractions: Sequence[float],
    dtype: torch.dtype | None,
    device: torch.device,
    shape: Shape | None = None,
) -> list[MeasuredNetwork]:
    """A sliced folder as it is; a dense model (anything `load_dense` takes) at every fraction (0: the model itself)."""
    model = None
    if Path(name).is_dir():
        check_folder(Path(name))
        config = AutoConfig.from_pretrained(name)
        if isinstance(config, SlicedConfig):
            label = Path(name).resolve().name
            return [
                MeasuredNetwork(
                    label, name, config, dtype or config.dtype or torch.float32, device, folder=name
                )
            ]
        fields = fields_of_config(config)
    else:
        model, _ = load_dense(name, dtype, device)
        config, fields = model.config, canonical_fields(model)
    dtype = dtype or config.dtype or torch.float32
    networks = [
        sized_network(name, fields, fraction, dtype, device, config, name, shape) for fraction in fractions
    ]
    for network in networks:
        if network.is_dense and model is not None:
            network._models["huggingface"] = model  # a download or a GGUF file is not read twice
    return networks


def sized_network(
    source: str,
    fields: dict,
    fraction: float,
    dtype: torch.dtype,
    device: torch.device,
    dense_config: PreTrainedConfig,
    folder: str | None,
    shape: Shape | None = None,
) -> MeasuredNetwork:
    """A dense model at a fraction of its columns deleted; `fields` are its canonical fields."""
    shape = shape or Shape()
    # "auto" where the command line did not say: the width is known here.
    shape = replace(shape, round_to=multiple_of(shape.round_to, fields["dense_hidden_size"], device))
    width = width_for_slice(fields["dense_hidden_size"], fraction, shape.round_to)
    config = plan(fields, constant_widths(fields, width), shape)
    if fraction == 0:
        return MeasuredNetwork("dense", source, config, dtype, device, folder, dense_config)
    return MeasuredNetwork(f"sliced {100 * fraction:g} %", source, config, dtype, device)


def choose_networks(
    models: Sequence[str],
    shape_name: str | None,
    fractions: Sequence[float],
    dtypes: Sequence[torch.dtype | None],
    device: torch.device,
    shape: Shape | None = None,
) -> list[MeasuredNetwork]:
    """The networks of one run, from the options `--model`, `--shape`, `--slice` and `--dtype`; labels are unique.

    Args:
        dtypes: of the weights; None is the stored dtype; for a shape, float32 on a CPU and float16 on a GPU.

    Raises:
        SliceGPTError: neither a model nor a shape is given, or both, or a shape's or folder's name is unknown.
    """
    if bool(models) == bool(shape_name):
        raise SliceGPTError("--model, --shape: one of them is needed, and not both")
    if shape_name:
        default = torch.float32 if device.type == "cpu" else torch.float16
        networks = [
            network
            for dtype in dtypes
            for network in networks_of_shape(shape_name, fractions, dtype or default, device, shape)
        ]
    else:
        networks = [
            network
            for dtype in dtypes
            for name in models
            for network in networks_of_model(name, fractions, dtype, device, shape)
        ]
    if len(dtypes) > 1:
        for network in networks:
            network.label += f", {dtype_name(network.dtype)}"
    labels = [network.label for network in networks]
    for network in networks:
        if labels.count(network.label) > 1:
            network.label = f"{Path(network.source).name} {network.label}"
    return networks
