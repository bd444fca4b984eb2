"""A block's entries of the sliced model's state, once it is fitted: what is deleted is left out of its tensors."""

from collections.abc import Mapping

import torch

from slicegpt.conversion.folding import named, rotate_writer
from slicegpt.families import Linear
from slicegpt.modeling import SlicedConfig
from slicegpt.slicing.blocks import MODULE_NAMES, Block, writer_name
from slicegpt.slicing.refit import BlockFits


def reader_entries(
    config: SlicedConfig, block: Block, readers: Mapping[str, Mapping[str, torch.Tensor]], fits: BlockFits
) -> dict[str, torch.Tensor]:
    """Of the layers that read the stream, from their state of each part with all neurons and heads."""
    entries: dict[str, torch.Tensor] = {}
    for part, state in readers.items():
        root = f"{block.prefix}.{MODULE_NAMES[part]}"
        for name, tensor in state.items():
            rows = kept_rows(config, part, name, fits) if "_proj." in name else None
            entries[f"{root}.{name}"] = tensor if rows is None else tensor[rows]
    return entries


def writer_entries(
    config: SlicedConfig,
    block: Block,
    writers: Mapping[str, Linear],
    fits: BlockFits,
    basis: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Of what writes the stream, a dense shortcut included, from full width onto the basis after the block.

    Args:
        writers: those of `fits` at one λ.
    """
    entries: dict[str, torch.Tensor] = {}
    for part, full in writers.items():
        writer = rotate_writer(full, basis)
        if part == "shortcut":
            entries |= named(f"{block.prefix}.{block.shortcut}", writer, dtype)
        elif part not in block.parts:
            entries[f"{writer_name(block, part)}.bias"] = writer.bias.to(dtype)
        else:
            columns = kept_rows(config, part, WRITTEN_BY[part], fits)
            if columns is not None:
                writer = Linear(writer.weight[:, columns], writer.bias)
            entries |= named(writer_name(block, part), writer, dtype)
    return entries


# The layer whose rows are the columns of a part's output projection.
WRITTEN_BY = {"attention": "q_proj.", "mlp": "up_proj."}


def kept_rows(config: SlicedConfig, part: str, name: str, fits: BlockFits) -> torch.Tensor | None:
    """Which rows a layer of a part keeps, int64; None: all.

    Args:
        name: of the layer and its tensor, such as "q_proj.weight".
    """
    if part == "mlp":
        return fits.neurons
    kept, size = fits.heads if name.startswith("q_proj.") else fits.groups, config.head_dim
    return None if kept is None else (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
