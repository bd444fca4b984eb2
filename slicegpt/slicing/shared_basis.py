"""One basis for all boundaries: what a model without shortcuts is sliced in (`slicegpt.conversion.stock`).

The boundaries' covariances are those of the dense model's streams, from one pass through it. Streams grow with depth,
by orders of magnitude: each covariance is divided by its trace, so that all boundaries count alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.errors import SliceGPTError
from slicegpt.families import Checkpoint
from slicegpt.modeling import SlicedConfig
from slicegpt.progress import Progress
from slicegpt.slicing.blocks import blocks_of, dense_block, dense_writers
from slicegpt.slicing.covariance import Covariance
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.propagation import Propagation, check_finite


def shares_basis(config: SlicedConfig) -> bool:
    """Whether all boundaries of a sliced model have the same basis: its shortcuts are identities."""
    sliced = max(config.boundary_widths) < config.dense_hidden_size
    return sliced and set(config.shortcuts) == {"identity"}


@torch.no_grad()
def shared_covariance(
    checkpoint: Checkpoint,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch],
    options: SlicingOptions,
    objective: Objective,
    progress: Progress,
) -> torch.Tensor:
    """The sum over all boundaries of their covariances [D, D], each with a trace of 1; float64.

    Of several ranks the first alone has it.

    Raises:
        SliceGPTError: no calibration tokens, or NaN or infinity in the streams.
    """
    if not batches:
        raise SliceGPTError("a basis for all boundaries needs calibration tokens, got none", "batches")
    dtype = objective.teacher_dtype(options.dtype, options.device)
    propagation = Propagation(config, batches, options)
    pooled = torch.zeros(
        config.dense_hidden_size, config.dense_hidden_size, dtype=torch.float64, device=options.device
    )

    def add(covariance: Covariance, block) -> None:
        if options.ranks.first:
            check_finite(covariance, block)
            pooled.add_(covariance.matrix / covariance.matrix.trace())

    blocks, covariance = blocks_of(config), propagation.new_covariance()
    propagation.start(checkpoint, covariance)
    add(covariance, None)
    with progress.stage("basis: the streams at all boundaries", len(blocks), "blocks") as advance:
        for block in blocks:
            layer = checkpoint.layer(block.layer)
            writers = dense_writers(config, block, layer, options.device)
            dense = dense_block(config, block, layer, writers, dtype, options.device)
            del layer, writers
            covariance = propagation.new_covariance()
            propagation.collect_dense(block, dense, objective, None, covariance)
            add(covariance, block)
            advance(1)
    return pooled
