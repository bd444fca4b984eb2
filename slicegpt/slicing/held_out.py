"""Was the calibration text enough? The sliced model's loss on windows it was calibrated on, and on others of the text.

Slicing fits the samples: on them it loses less than on other windows of the same text, and the less text there was,
the wider the gap. Both losses are taken above the dense model's on the same windows, which removes most of what makes
one window harder than another. The windows that chose the refit's λ are no judges, where the text has others.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from slicegpt.calibration import Calibration
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource
from slicegpt.hardware.layerwise import losses_of
from slicegpt.hardware.memory import fits_on
from slicegpt.hardware.offload import moved
from slicegpt.progress import Progress
from slicegpt.slicing.reuse import Reuse

logger = logging.getLogger("slicegpt")

# Unseen windows that cost a third more than seen ones; in other words, a quarter of what the model loses there is due
# to too little text.
EXCESS = 1.33
# In nats a token: below this neither a loss nor a gap matters, 1 % of perplexity.
SMALLEST_LOSS = 0.01
# A gap must be so many standard deviations of what chance makes of it.
DEVIATIONS = 2.0


def held_out_check(
    dense: PreTrainedModel | DenseSource,
    sliced: PreTrainedModel | DenseSource,
    calibration: Calibration,
    device: torch.device,
    progress: Progress | None = None,
    ridge_chosen: bool = True,
    reuse: Reuse | None = None,
) -> dict | None:
    """Losses above the dense model's, in nats a token, on `calibration.seen` and `calibration.unseen`.

    Both models are brought to `device` one after the other, and back; of one that is not loaded, a layer at a time.

    Args:
        dense, sliced: loaded models, or sources of models.
        ridge_chosen: whether the refit's λ was chosen by `calibration.held_out` (`SlicingReport.ridge_search`).
        reuse: where the dense model's losses are kept for other sizes of it.

    Returns:
        `windows` and `tokens` of each kind, the losses `seen` and `held_out`, their `difference`, their ratio `excess`
        (None where they are too small to be divided), and `chose_ridge`: whether these windows chose λ as well, so that
        `held_out` flatters; and both models' own losses on the unseen windows, `dense_nll` and `sliced_nll`. None in
        place of all of it where the text has no other windows, a model does not fit on the device, or a loss is not
        finite (which is logged).
    """
    windows = len(calibration.unseen)
    if not windows:
        return None
    pairs = torch.cat((calibration.seen, calibration.unseen))
    tokens = windows * (pairs.shape[1] - 1)
    models = [
        model.shell if isinstance(model, DenseSource) and model.in_memory else model
        for model in (dense, sliced)
    ]
    if not tokens or not all(isinstance(model, DenseSource) or fits_on(model, device) for model in models):
        return None
    losses = []
    for model in models:
        try:

            def evaluate(model: PreTrainedModel | DenseSource = model) -> torch.Tensor:
                with nullcontext() if isinstance(model, DenseSource) else moved(model, device):
                    of_windows = losses_of(model, pairs, 1, progress, device)
                return torch.tensor(of_windows, dtype=torch.float64)

            # Which windows they are follows from the calibration tokens, which `reuse` knows.
            shared = reuse is not None and model is models[0]
            losses.append(reuse.value(("losses", device, len(pairs)), evaluate) if shared else evaluate())
        except (SliceGPTError, torch.OutOfMemoryError) as error:
            # The sliced model is worth more than this figure.
            logger.warning("held-out windows were not compared: %s", str(error).splitlines()[0])
            return None
    # [dense, sliced][seen, unseen], in nats a token
    means = torch.stack(losses).view(2, 2, windows).sum(dim=2) / tokens
    seen, held_out = (means[1] - means[0]).tolist()
    dense_nll, sliced_nll = means[:, 1].tolist()
    return {
        "windows": windows,
        "tokens": tokens,
        "seen": round(seen, 5),
        "held_out": round(held_out, 5),
        "dense_nll": round(dense_nll, 5),
        "sliced_nll": round(sliced_nll, 5),
        "difference": round(held_out - seen, 5),
        "excess": round(held_out / seen, 3) if min(seen, held_out) > SMALLEST_LOSS else None,
        "chose_ridge": ridge_chosen and calibration.unseen_are_held_out,
    }


def follows_samples(seen: float, held_out: float, tokens: int) -> bool:
    """Whether a model has fitted its samples themselves and not the text that they are of.

    The gap between the two losses has to be a quarter of the loss on unseen windows: `held_out - seen` above
    `(1 - 1 / EXCESS) held_out`. Where both losses are above 0, that is a ratio above `EXCESS`; where a fit to few
    samples has pushed the loss on them below 0, the ratio says nothing, and the gap still does.

    And it has to be more than chance. A token's loss above the dense model's is the log of a ratio of probabilities;
    where these are close its variance is twice its mean `L` (to second order, the mean being the Kullback-Leibler
    divergence). The difference of two means over `tokens` tokens thus has a standard deviation of `2 √(L / tokens)`.

    Args:
        seen, held_out: losses above the dense model's, in nats a token, on windows that are samples and on others.
        tokens: of each kind.
    """
    loss = max(held_out, 0.0)
    chance = DEVIATIONS * 2 * math.sqrt(max(loss, SMALLEST_LOSS) / tokens)
    return held_out - seen > max((1 - 1 / EXCESS) * loss, chance, SMALLEST_LOSS)


def held_out_warning(check: dict) -> str | None:
    """One sentence where the held-out windows cost much more than those that were seen."""
    if not follows_samples(check["seen"], check["held_out"], check["tokens"]):
        return None
    if check["excess"] is None:
        compared = f"and {check['seen']:.3f} on those it saw, {check['difference']:.3f} less"
    else:
        compared = (
            f"{check['excess']:.2f} times what it loses on those it saw (above {EXCESS} more text would help)"
        )
    flattered = (
        "; λ was chosen by the same windows, so that others are likely to cost more"
        if check["chose_ridge"]
        else ""
    )
    return (
        f"the calibration text is small: on windows of it that were held out the model loses {check['held_out']:.3f} "
        f"nats a token, {compared}{flattered}; raise nsamples or seqlen"
    )
