"""A block's entries of the sliced model's state, once it is fitted: what is deleted is left out of its tensors."""

from collections.abc import Mapping

import torch

from slicegpt.conversion.folding import named, rotate_writer
from slicegpt.conversion.rounding import QuantizedMatrix
from slicegpt.families import Linear
from slicegpt.modeling import SlicedConfig
from slicegpt.slicing.blocks import MODULE_NAMES, Block, writer_name
from slicegpt.slicing.quantizing import WRITTEN_BY, QuantizedWriters, kept_rows
from slicegpt.slicing.refit import BlockFits


def reader_entries(
    config: SlicedConfig,
    block: Block,
    readers: Mapping[str, Mapping[str, torch.Tensor]],
    fits: BlockFits,
    packed: Mapping[str, Mapping[str, QuantizedMatrix]],
) -> dict[str, torch.Tensor]:
    """Of the layers that read the stream, from their state of each part with all neurons and heads.

    Args:
        packed: of each part, those that are stored in few bits, by name.
    """
    entries: dict[str, torch.Tensor] = {}
    for part, state in readers.items():
        root = f"{block.prefix}.{MODULE_NAMES[part]}"
        for name, tensor in state.items():
            rows = kept_rows(config, part, name, fits) if "_proj." in name else None
            if matrix := packed.get(part, {}).get(name.removesuffix(".weight")):
                entries |= (matrix if rows is None else matrix.rows(rows)).entries(
                    f"{root}.{name.removesuffix('.weight')}"
                )
            else:
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


def rounded_entries(block: Block, writers: QuantizedWriters, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As `writer_entries`, of output weights that are stored in few bits."""
    entries: dict[str, torch.Tensor] = {}
    for part, matrix in writers.matrices.items():
        entries |= matrix.entries(writer_name(block, part))
    if writers.shortcut is not None:
        entries |= named(f"{block.prefix}.{block.shortcut}", Linear(writers.shortcut), dtype)
    for part, bias in writers.biases.items():
        if bias is not None:
            entries[f"{writer_name(block, part)}.bias"] = bias.to(dtype)
    return entries
