"""Plans that were predicted to be good, measured: each is sliced on the tokens that the prices were taken from.

A trial is a run of slicing (`slicegpt.slicing.slicer`) on a part of the calibration text, with nothing stored. The
windows that are priced go along with it, unseen by the fits, and the divergence of their logits from the dense model's
is the plan's loss: with its own fits, and with all of its blocks cut at once, which no sum of prices knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.families import Checkpoint
from slicegpt.modeling import SlicedConfig
from slicegpt.progress import Progress
from slicegpt.slicing.divergence import DenseLogits
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.slicer import Slicer


class NullSink:
    """A sink that keeps nothing."""

    def open(self, *_) -> None: ...

    def store(self, *_) -> None: ...

    def store_fit(self, *_) -> None: ...


def trial(
    checkpoint: Checkpoint,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch],
    windows: CalibrationBatch,
    dense: DenseLogits | None,
    options: SlicingOptions,
    objective: Objective,
    ridge: float,
) -> float | None:
    """The divergence from the dense model, in nats a token, of the model that is sliced to `config`.

    Args:
        batches: to slice by.
        windows: to measure on.
        dense: the dense model's distributions there, on the first rank.
        ridge: λ of the refit.

    Returns:
        None on all ranks but the first.
    """
    count = len(batches) + 1
    # What few bits lose is all plans' alike.
    options = replace(options, fitted=len(batches) / count, weights=None)
    slicer = Slicer(
        checkpoint,
        config,
        [*batches, windows],
        options,
        objective,
        (ridge,),
        Progress(quiet=True),
        NullSink(),
    )
    slicer.run()
    place, owner = divmod(count - 1, options.ranks.size)
    if owner == options.ranks.rank and owner:
        options.ranks.send(slicer.propagation.streams[place], 0)
    if not options.ranks.first:
        return None
    if owner:
        shape = (*windows.input_ids.shape, config.dense_hidden_size)
        stream = options.ranks.receive(shape, options.dtype, owner)
    else:
        stream = slicer.propagation.streams[place]
    return dense.divergences(1, lambda _: stream)[0]
