"""λ of the output refit, chosen on calibration windows that the fit does not see.

A block's own error on unseen tokens is a poor judge: it undervalues the fit, which also makes up for what earlier
blocks lost (docs/quality.md). So the judge is the language-modelling loss: the first layers are sliced with each
candidate, and the held-out windows go on from there through the dense model's other layers and its head.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from slicegpt.blocks import blocks_of
from slicegpt.calibration.sampling import CalibrationBatch
from slicegpt.evaluate import token_loss_function
from slicegpt.families import checkpoint_of
from slicegpt.memory import fits_on
from slicegpt.modeling import SlicedConfig
from slicegpt.progress import Progress
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.slicer import Slicer, fitted_batches

logger = logging.getLogger("slicegpt")

# Half decades: the loss is flat around its minimum.
CANDIDATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST = (0.03, 0.1)
# What a candidate is judged by: slicing this part of the layers, with this part of the calibration samples. A few
# layers lose so little that chance decides; all of everything would triple the time.
LAYERS, SAMPLES = 1 / 5, 1 / 8


def search_ridge(
    model: PreTrainedModel,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch],
    options: SlicingOptions,
    held_out: torch.Tensor,
    progress: Progress,
) -> dict[float, float] | None:
    """The held-out loss of each candidate that was tried, in nats a token.

    Two are tried, then the next one on the better side, until it is worse. The ridge is relative to the sum over
    all tokens, but what it has to hold down, the error of a fit to few tokens, is not: the best absolute ridge is about
    the same for any number of tokens. So the trials, which see fewer tokens, run at a ridge that is as much larger.

    Args:
        model: dense, on the CPU.
        batches: calibration tokens.
        options: `fitted` of `batches` is what the refit will fit to, at the ridge that is chosen.
        held_out: windows [n, s] of token ids that are not among `batches`.

    Returns:
        λ -> loss; None where there is nothing to judge by: no held-out window, a single layer, or a dense model that
        does not fit on the device.
    """
    layers = min(math.ceil(LAYERS * config.num_hidden_layers), config.num_hidden_layers - 1)
    if not layers or not held_out.numel() or held_out.shape[1] < 2 or not fits_on(model, options.device):
        return None
    fitted = batches[: fitted_batches(len(batches), options.fitted)]
    sample = batches[: math.ceil(SAMPLES * len(batches))]
    fewer = sum(batch.tokens for batch in fitted) / sum(batch.tokens for batch in sample)
    losses: dict[float, float] = {}

    def try_candidate(index: int) -> float:
        ridge = CANDIDATES[index]
        with progress.stage(f"trying ridge {ridge:g}", 1, "run") as advance:
            trial = replace(options, ridge=ridge * fewer, fitted=1.0)
            losses[ridge] = _loss(model, config, sample, trial, held_out, layers)
            advance(1)
        return losses[ridge]

    low, high = map(CANDIDATES.index, FIRST)
    try_candidate(low)
    try_candidate(high)
    step = -1 if losses[CANDIDATES[low]] < losses[CANDIDATES[high]] else 1
    best = low if step < 0 else high
    while 0 <= best + step < len(CANDIDATES):
        if try_candidate(best + step) >= losses[CANDIDATES[best]]:
            break
        best += step
    logger.info("refit: held-out loss by ridge %s", losses)
    return dict(sorted(losses.items()))


@torch.no_grad()
def _loss(
    model: PreTrainedModel,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch],
    options: SlicingOptions,
    held_out: torch.Tensor,
    layers: int,
) -> float:
    """Nats a token on `held_out` with the first layers sliced, the others dense."""
    windows = [CalibrationBatch(row, torch.ones_like(row)) for row in held_out.split(1)]
    slicer = Slicer(checkpoint_of(model), config, batches, options, Progress(quiet=True), windows)
    slicer.slice_blocks([block for block in blocks_of(config) if block.layer < layers])
    streams = slicer.passes.watched()
    origin = model.device
    model.to(options.device)
    try:
        return _tail_loss(model, slicer.checkpoint.family.layers.format(layers), streams, held_out)
    finally:
        model.to(origin)


def _tail_loss(
    model: PreTrainedModel, layer: str, streams: Sequence[torch.Tensor], windows: torch.Tensor
) -> float:
    """Nats a token where `streams` [1, s, D], one a window, take the place of what `layer` of the model reads.

    The streams of LayerNorm families are centred, which its norms, the only readers of a mean, subtract anyway.
    """
    device = model.get_input_embeddings().weight.device
    token_losses = token_loss_function(model, windows[:1, :16].to(device))
    stream = iter(streams)

    def replace_stream(module, args, kwargs):
        value = next(stream).to(device)
        if args:
            return (value, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": value}

    hook = model.get_submodule(layer).register_forward_pre_hook(replace_stream, with_kwargs=True)
    try:
        losses = [token_losses(row.to(device)).sum().item() for row in windows.split(1)]
    finally:
        hook.remove()
    return sum(losses) / (len(windows) * (windows.shape[1] - 1))
