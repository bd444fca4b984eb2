"""A sliced folder brought into the stock form, where it has one width, no shortcuts and as many neurons everywhere."""

from __future__ import annotations

import os
from pathlib import Path

from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.checkpoint.folders import atomic_folder, check_output
from slicegpt.checkpoint.saving import read_record, write_beside_weights
from slicegpt.checkpoint.stock_model import stock_of, write_stock
from slicegpt.conversion.quantization import check_plain
from slicegpt.conversion.stock import check_form, stock_parameters
from slicegpt.errors import SliceGPTError
from slicegpt.families import checkpoint_of
from slicegpt.modeling import SlicedConfig
from slicegpt.recipe import STOCK


def export_stock(
    model: str | os.PathLike,
    output: str | os.PathLike,
    source: str | os.PathLike | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a sliced folder in the stock form.

    Args:
        model: a folder that `slicegpt slice` wrote.
        output: folder to write; it appears only when it is whole.
        source: the dense model; None: the one that `slicing.json` names. Its config is read, and norms where they have
            shifts that the class holds nowhere else.
        overwrite: an existing folder is replaced once the new one is whole.

    Returns:
        The folder's absolute path.

    Raises:
        SliceGPTError: shortcuts, layers that differ, a dense model that is not there or is another one.
    """
    path = check_output(output, overwrite, os.fspath(model))
    sliced = open_dense(os.fspath(model))
    check_plain(sliced.config, os.fspath(model))
    if not isinstance(sliced.config, SlicedConfig):
        raise SliceGPTError(
            f"must be a folder that slice wrote, got a {sliced.config.model_type} model", "model"
        )
    check_form(sliced.config)
    record = read_record(model) or {}
    name = source or record.get("source")
    if name is None:
        raise SliceGPTError(f"{os.fspath(model)} does not name its dense model; give it", "source")
    dense = open_dense(os.fspath(name), sliced.dtype, sliceable=True)
    config = sliced.config
    for field, expected, got in (
        ("model_type", config.source_model_type, dense.config.model_type),
        ("parameters", config.source_parameters, dense.parameters),
        ("vocab_size", config.vocab_size, dense.config.vocab_size),
    ):
        if expected != got:
            raise SliceGPTError(
                f"{name} is not the dense model: {field} must be {expected}, got {got}", "source"
            )
    stock = stock_of(sliced, checkpoint_of(dense))
    with atomic_folder(path) as folder:
        write_stock(stock, sliced.dtype, folder, max_shard_size, dense.generation_config)
        if record:
            parameters = stock_parameters(config, dense.config)
            size = record["size"] | {
                "parameters": parameters,
                "bytes": parameters * sliced.dtype.itemsize,
                "removed": 1 - parameters / config.source_parameters,
            }
            record = record | {"form": STOCK, "size": size}
            write_beside_weights(folder, path.name, sliced.tokenizer, record, False, None)
        elif sliced.tokenizer is not None:
            sliced.tokenizer.save_pretrained(folder)
    return path
