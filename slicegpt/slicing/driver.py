"""`slice_model`: the whole of slicing."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from slicegpt.calibration.sampling import CalibrationBatch
from slicegpt.families import checkpoint_of
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
from slicegpt.progress import Progress
from slicegpt.slicing.options import SlicingOptions, SlicingReport
from slicegpt.slicing.ridge import search_ridge
from slicegpt.slicing.slicer import Slicer


def slice_model(
    model: PreTrainedModel,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch] = (),
    options: SlicingOptions | None = None,
    progress: Progress | None = None,
    held_out: torch.Tensor | None = None,
) -> tuple[SlicedForCausalLM, SlicingReport]:
    """Slice, or only rotate, a dense Hugging Face model.

    Args:
        model: of a supported family (`slicegpt.families.FAMILIES`), on the CPU; it is not changed.
        config: planned by `slicegpt.schedule.plan`.
        batches: calibration tokens; needed wherever a boundary is sliced or takes its basis from PCA.
        options: see `SlicingOptions`.
        progress: counts passes of one batch through one block.
        held_out: windows [n, s] of calibration tokens outside `batches`, which the refit's ridge is chosen by where
            `options.ridge` is None; without them it is `slicegpt.refit.RIDGE`.

    Returns:
        The sliced model, on the CPU in `options.dtype`, and the report.

    Errors:
        `SliceGPTError` for an unsupported model, missing calibration tokens, and NaN or infinity in the
        activations (the layer is named).
    """
    options, progress = options or SlicingOptions(), progress or Progress(quiet=True)
    slicer = Slicer(checkpoint_of(model), config, batches, options, progress)
    if slicer.refits and options.ridge is None and held_out is not None:
        with slicer.stage("ridge"):
            losses = search_ridge(model, config, batches, options, held_out, progress)
        slicer.report.ridge_search = losses
        if losses:
            slicer.ridge = min(losses, key=losses.get)
    return slicer.run(), slicer.report
