"""Whether a model is evaluated without being loaded: on request, or where it is larger than memory."""

from __future__ import annotations

import torch

from slicegpt.checkpoint.dense_source import open_dense, source_if_too_large
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource
from slicegpt.modeling.sizes import format_bytes
from slicegpt.progress import Progress


def unloaded(
    name: str,
    dtype: torch.dtype | None,
    device: torch.device,
    layerwise: bool | None,
    tasks: bool,
    progress: Progress,
) -> DenseSource | None:
    """The source of a model that is to be evaluated layer by layer; None for one that is to be loaded.

    Args:
        name, dtype: as `slicegpt.checkpoint.loading.load_dense` takes them.
        device: where it is to run.
        layerwise: whether it must not, or must, be loaded; None: where it does not fit. That is said in a line.
        tasks: whether it is to do tasks as well, which need it whole.

    Raises:
        SliceGPTError: `layerwise` and tasks, or a name that `load_dense` refuses.
    """
    if layerwise and tasks:
        raise SliceGPTError("tasks need the whole model in memory; leave one of the two out", "layerwise")
    if layerwise is False or tasks:
        return None
    if layerwise:
        return open_dense(name, dtype)
    source = source_if_too_large(name, dtype, device)
    if source is not None:
        progress.say(
            f"{name}: its weights take {format_bytes(source.total_bytes)} in"
            f" {str(source.dtype).removeprefix('torch.')}, more than is free: evaluated layer by layer"
        )
    return source
