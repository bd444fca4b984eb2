"""Models of the stock form: made in memory, or written file by file, from a sliced model's tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from slicegpt.checkpoint.checks import check_loaded
from slicegpt.checkpoint.loading import quiet_transformers
from slicegpt.checkpoint.model_files import open_shards
from slicegpt.checkpoint.partial import PartialFolder
from slicegpt.checkpoint.shells import model_class_of
from slicegpt.conversion.stock import StockModel, stock_model_of
from slicegpt.families import Checkpoint, DenseSource, checkpoint_of, source_of


def stock_of(sliced: DenseSource, checkpoint: Checkpoint) -> StockModel:
    """A sliced model, in memory or in files, as one of the dense model's class.

    Args:
        sliced: of one width, without shortcuts.
        checkpoint: the dense model.

    Raises:
        SliceGPTError: see `slicegpt.conversion.stock`.
    """
    return stock_model_of(sliced.config, sliced.dtype, sliced.tensors, checkpoint)


def as_stock(
    sliced: DenseSource, dense: DenseSource, partial: PartialFolder | None, max_shard_size: str
) -> DenseSource:
    """A model that was sliced, in the stock form.

    Args:
        partial: the folder that it was written in; the stock form then takes its place there. None: it is in memory.
    """
    stock = stock_of(sliced, checkpoint_of(dense))
    if partial is None:
        return source_of(load_stock(stock, sliced.dtype, dense.generation_config), sliced.tokenizer)
    folder = partial.folder / "stock"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_stock(stock, sliced.dtype, folder, max_shard_size, dense.generation_config)
    partial.exchange(folder)
    return sliced


def load_stock(
    stock: StockModel, dtype: torch.dtype, generation_config: GenerationConfig | None
) -> PreTrainedModel:
    """The model in memory, on the CPU and in eval mode."""
    with quiet_transformers():
        model, info = model_class_of(stock.stock).from_pretrained(
            None,
            config=stock.stock,
            state_dict={name: tensor.clone() for name, tensor in stock.state()},
            dtype=dtype,
            output_loading_info=True,
        )
    check_loaded("the stock form", model, info)
    if generation_config is not None:
        model.generation_config = generation_config
    return model.eval()


def write_stock(
    stock: StockModel,
    dtype: torch.dtype,
    folder: Path,
    max_shard_size: str,
    generation_config: GenerationConfig | None,
) -> None:
    """Write the model's weights, config and generation config, a layer at a time, as `save_pretrained` would.

    Args:
        folder: there already.
    """
    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in stock.expected.items()}
    parameters = sum(tensor.numel() for tensor in shapes.values())
    files = open_shards(folder, shapes, parameters, max_shard_size)
    try:
        for name, tensor in stock.state():
            files.write(name, tensor)
        files.sync()
    finally:
        files.close()
    config = stock.stock
    config.architectures = [model_class_of(config).__name__]
    config.save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
