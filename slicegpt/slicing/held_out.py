"""Was the calibration text enough? The sliced model's loss on windows it was calibrated on, and on others of the text.

Slicing fits the samples: on them it loses less than on other windows of the same text, and the less text there was,
the wider the gap. Both losses are taken above the dense model's on the same windows, which removes most of what makes
one window harder than another.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from slicegpt.calibration import Calibration
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.memory import fits_on
from slicegpt.hardware.offload import moved
from slicegpt.modeling.losses import window_losses
from slicegpt.progress import Progress

logger = logging.getLogger("slicegpt")

# Held-out windows that cost a third more than seen ones: four windows of 512 tokens differ by a tenth by chance.
EXCESS = 1.33
# Below this a loss is too small to be compared: rounding and chance are of its size.
SMALLEST_LOSS = 0.01


def held_out_check(
    dense: PreTrainedModel,
    sliced: PreTrainedModel,
    calibration: Calibration,
    device: torch.device,
    progress: Progress | None = None,
) -> dict | None:
    """Losses above the dense model's, in nats a token, on `calibration.seen` and `calibration.held_out`.

    Both models are brought to `device` one after the other, and back.

    Returns:
        `windows` of each kind, `seen`, `held_out` and `excess`, their ratio (None where they are too small to be
        compared); None in place of all of it where no windows were left over, a model does not fit on the device, or a
        loss is not finite (which is logged).
    """
    windows = min(len(calibration.seen), len(calibration.held_out))
    if not windows:
        return None
    pairs = torch.cat((calibration.seen[:windows], calibration.held_out[:windows]))
    tokens = windows * (pairs.shape[1] - 1)
    if not tokens or not all(fits_on(model, device) for model in (dense, sliced)):
        return None
    losses = []
    for model in (dense, sliced):
        try:
            with moved(model, device):
                losses.append(torch.tensor(window_losses(model, pairs, 1, progress), dtype=torch.float64))
        except (SliceGPTError, torch.OutOfMemoryError) as error:
            # The sliced model is worth more than this figure.
            logger.warning("held-out windows were not compared: %s", str(error).splitlines()[0])
            return None
    above = (losses[1] - losses[0]).view(2, windows).sum(dim=1) / tokens
    seen, held_out = above.tolist()
    excess = round(held_out / seen, 3) if min(seen, held_out) > SMALLEST_LOSS else None
    return {"windows": windows, "seen": round(seen, 5), "held_out": round(held_out, 5), "excess": excess}


def held_out_warning(check: dict) -> str | None:
    """One sentence where the held-out windows cost much more than those that were seen."""
    if check["excess"] is None or check["excess"] <= EXCESS:
        return None
    return (
        f"the calibration text is small: on windows of it that were held out the model loses {check['held_out']:.3f} "
        f"nats a token, {check['excess']:.2f} times what it loses on those it saw (above {EXCESS} more text would "
        "help); raise --nsamples or --seqlen"
    )
