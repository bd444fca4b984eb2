"""λ of the output refit, chosen by what the whole sliced model loses on calibration windows that are held out.

Nothing less is a good judge (docs/quality.md): a block's own error on unseen tokens undervalues the fit, which also
makes up for what earlier blocks lost, and so does the loss with only the first layers sliced. A run of slicing for
every candidate is not needed, though. The calibration tokens go on through the network with the lightest fit, which
keeps them closest to the dense model's stream; every block is fitted to the same moments at each candidate, and one of
these fits is stored. So a candidate costs its solutions and one evaluation. It is also better than slicing at that λ
all along (docs/quality.md). Until then the sink keeps the output weights once for each candidate.
"""

import logging
from collections.abc import Sequence

import torch

from slicegpt.hardware.layerwise import layerwise_losses
from slicegpt.progress import Progress
from slicegpt.slicing.keeping import Keeper
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.sink import Sink

logger = logging.getLogger("slicegpt")

# Windows that are evaluated at a time: a layer that has to be copied to the device is copied for so many.
WINDOWS = 4


def choose_ridge(
    sink: Sink,
    ridges: Sequence[float],
    unjudged: float,
    held_out: torch.Tensor | None,
    options: SlicingOptions,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
) -> tuple[float, dict[float, float] | None]:
    """The best ridge: from the lightest on, until the next one loses more.

    Args:
        sink: holds the model at each of `ridges`, which are in ascending order.
        unjudged: the λ to take where there are no windows to judge by.
        held_out: windows [n, s] of token ids that the model is not fitted to; None or none of two tokens: nothing is
            evaluated.
        options: on whose device the losses are computed, layer by layer.
        keeper: keeps the losses of an interrupted run.

    Returns:
        λ, and the loss of every candidate that was evaluated, in nats a token; None where nothing was.
    """
    if held_out is None or not len(held_out) or held_out.shape[1] < 2:
        return unjudged, None
    keeper = keeper or Keeper()
    known, losses = dict(keeper.journal.get("losses", [])), {}
    tokens, report = len(held_out) * (held_out.shape[1] - 1), progress or Progress(quiet=True)
    with report.stage("refit: λ by held-out windows", len(ridges), "candidates at most") as advance:
        for ridge in ridges:
            if ridge in known:
                losses[ridge] = known[ridge]
            else:
                of_windows = layerwise_losses(sink.candidate(ridge), held_out, WINDOWS, device=options.device)
                losses[ridge] = sum(of_windows) / tokens
                keeper.note(losses=list(losses.items()))
            advance(1)
            if losses[ridge] > min(losses.values()):
                break
    logger.info("refit: held-out loss by ridge %s", losses)
    return min(losses, key=losses.__getitem__), losses
