"""λ of the output refit, chosen by what the whole sliced model loses on calibration windows that are held out.

Nothing less is a good judge (docs/quality.md): a block's own error on unseen tokens undervalues the fit, which also
makes up for what earlier blocks lost, and so does the loss with only the first layers sliced. A run of slicing for
every candidate is not needed, though. The calibration tokens go on through the network with the lightest fit, which
keeps them closest to the dense model's stream; every block is fitted to the same moments at each candidate, and one of
these fits is stored. So a candidate costs its solutions and one evaluation. It is also better than slicing at that λ
all along (docs/quality.md). Until then the output weights are in memory once for each candidate.
"""

import logging
from collections.abc import Mapping

import torch

from slicegpt.hardware.offload import layer_by_layer
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.modeling.losses import window_losses
from slicegpt.progress import Progress

logger = logging.getLogger("slicegpt")

# Windows that are evaluated at a time: a layer that has to be copied to the device is copied for so many.
WINDOWS = 4


def choose_ridge(
    model: SlicedForCausalLM,
    fits: Mapping[float, Mapping[str, torch.Tensor]],
    unjudged: float,
    held_out: torch.Tensor | None,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[float, dict[float, float] | None]:
    """Give `model` the weights of the best ridge: from the lightest on, until the next one loses more.

    Args:
        model: on the CPU, where it stays.
        fits: of each λ, in ascending order, the entries of the model's state that depend on it.
        unjudged: the λ to take where there are no windows to judge by.
        held_out: windows [n, s] of token ids that the model is not fitted to; None or none of two tokens: nothing is
            evaluated.
        device: where the losses are computed, layer by layer if the model does not fit there.

    Returns:
        λ, and the loss of every candidate that was evaluated, in nats a token; None where nothing was.
    """
    if held_out is None or not len(held_out) or held_out.shape[1] < 2:
        model.load_state_dict(fits[unjudged], strict=False, assign=True)
        return unjudged, None
    losses: dict[float, float] = {}
    tokens, report = len(held_out) * (held_out.shape[1] - 1), progress or Progress(quiet=True)
    with report.stage("refit: λ by held-out windows", len(fits), "candidates at most") as advance:
        for ridge, state in fits.items():
            model.load_state_dict(state, strict=False, assign=True)
            with layer_by_layer(model, device):
                losses[ridge] = sum(window_losses(model, held_out, WINDOWS)) / tokens
            advance(1)
            if losses[ridge] > min(losses.values()):
                break
    best = min(losses, key=losses.__getitem__)
    model.load_state_dict(fits[best], strict=False, assign=True)
    logger.info("refit: held-out loss by ridge %s", losses)
    return best, losses
