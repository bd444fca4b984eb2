"""λ of the output refit, chosen by what the whole sliced model loses on calibration windows that are held out.

Nothing less is a good judge (docs/quality.md): a block's own error on unseen tokens undervalues the fit, which also
makes up for what earlier blocks lost, and so does the loss with only the first layers sliced. So the model is sliced
once with each candidate.
"""

import logging
from collections.abc import Callable

import torch

from slicegpt.evaluate import window_losses
from slicegpt.memory import fits_on
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.slicing.options import SlicingReport

logger = logging.getLogger("slicegpt")

# Half decades: the loss is flat around its minimum.
CANDIDATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST = (0.03, 0.1)


def search_ridge(
    slice_with: Callable[[float], tuple[SlicedForCausalLM, SlicingReport]],
    held_out: torch.Tensor,
    device: torch.device,
) -> tuple[SlicedForCausalLM, SlicingReport]:
    """The model with the best ridge, and its report with the loss of every candidate that was tried.

    Two are tried, then the next one on the better side, until it is worse: three runs of slicing where it is at once.

    Args:
        slice_with: slices with a given λ.
        held_out: windows [n, s] of token ids that the model is not fitted to.
        device: where the losses are computed if the model fits there; it comes and goes back on the CPU.
    """
    losses: dict[float, float] = {}
    tokens = len(held_out) * (held_out.shape[1] - 1)

    def run(index: int) -> tuple[SlicedForCausalLM, SlicingReport]:
        model, report = slice_with(CANDIDATES[index])
        model.to(device if fits_on(model, device) else "cpu")
        losses[CANDIDATES[index]] = sum(window_losses(model, held_out)) / tokens
        return model.to("cpu"), report

    low, high = map(CANDIDATES.index, FIRST)
    best, other = run(low), run(high)
    place, step = low, -1
    if losses[CANDIDATES[high]] <= losses[CANDIDATES[low]]:
        best, place, step = other, high, 1
    del other
    while 0 <= place + step < len(CANDIDATES):
        following = run(place + step)
        if losses[CANDIDATES[place + step]] >= losses[CANDIDATES[place]]:
            break
        best, place = following, place + step
    logger.info("refit: held-out loss by ridge %s", losses)
    best[1].ridge_search = dict(sorted(losses.items()))
    return best
