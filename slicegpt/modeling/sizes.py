"""True sizes: what is counted is what is stored, shortcuts, projections and untied heads included."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what describes sizes in words needs none of them
    import torch
    from torch import nn

    from slicegpt.modeling import SlicedConfig, SlicedForCausalLM


def skeleton(config: SlicedConfig) -> SlicedForCausalLM:
    """The model on the meta device: all shapes, no memory."""
    import torch

    from slicegpt.modeling import SlicedForCausalLM

    with torch.device("meta"):
        return SlicedForCausalLM(config)


def stored_parameters(config: SlicedConfig) -> int:
    """Elements that a model of this config stores (a tied head counts once), whatever their bits."""
    return parameters_of(skeleton(config))


def decoder_parameters(config: SlicedConfig) -> int:
    """Elements of the layers alone, shortcuts included: no embedding, projection or head."""
    return parameters_of(skeleton(config).model.layers)


def parameters_of(module: nn.Module) -> int:
    """Elements of a module's parameters; a packed weight counts as the matrix that it stands for."""
    from slicegpt.modeling.quantized import QuantizedWeight

    packed = [part for part in module.modules() if isinstance(part, QuantizedWeight)]
    # Tied ones share their tensors: a dictionary counts them once.
    own = {id(part.weight_packed): part.rows * part.columns for part in packed}
    inside = {id(tensor) for part in packed for name, tensor in part.named_parameters() if name != "bias"}
    plain = sum(tensor.numel() for tensor in module.parameters() if id(tensor) not in inside)
    return plain + sum(own.values())


def stored_bytes(config: SlicedConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights of a model of this config and dtype, as they are stored: scales and all."""
    return sum(parameter.nbytes for parameter in skeleton(config).to(dtype).parameters())


def boundary_report(config: SlicedConfig) -> list[dict]:
    """`[{width, rank, shortcut}]`, one entry a boundary; rank and shortcut are those of the block behind it.

    `rank` is the number of columns of F (0 for an identity), None for a dense shortcut; behind the last boundary
    there is no block: rank 0, shortcut "none".
    """
    behind = [(config.shortcut_rank(block), kind) for block, kind in enumerate(config.shortcuts)] + [
        (0, "none")
    ]
    return [
        {"width": width, "rank": rank, "shortcut": kind}
        for width, (rank, kind) in zip(config.boundary_widths, behind, strict=True)
    ]


def describe_neurons(neurons: int | list[int]) -> str:
    """The neurons of an MLP, or of each layer's where they differ: "1368", "888 to 1536, 1368 on average"."""
    neurons = [neurons] if isinstance(neurons, int) else neurons
    if min(neurons) == max(neurons):
        return str(neurons[0])
    mean = round(sum(neurons) / len(neurons))
    return f"{min(neurons)} to {max(neurons)}, {mean} on average"


def describe_heads(kept: int | list[int]) -> str:
    """The key/value heads of a layer, or of all where layers differ: "3", "78 in all, 0 to 3 a layer"."""
    kept = [kept] if isinstance(kept, int) else kept
    if min(kept) == max(kept):
        return str(kept[0])
    return f"{sum(kept)} in all, {min(kept)} to {max(kept)} a layer"


def format_bytes(count: float) -> str:
    """Bytes in powers of 1000, as disks and memory bandwidths are quoted."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
