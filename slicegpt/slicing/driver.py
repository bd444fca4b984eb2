"""`slice_model`: the whole of slicing."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from slicegpt.calibration.sampling import CalibrationBatch
from slicegpt.families import checkpoint_of
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
from slicegpt.progress import Progress
from slicegpt.refit import RIDGE
from slicegpt.slicing.allocation import allocate_neurons, deletes_neurons
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
        config: planned by `slicegpt.schedule.plan`. The neurons it leaves are shared out among the layers, see
            `options.allocate`.
        batches: calibration tokens; needed wherever a boundary is sliced or takes its basis from PCA.
        options: see `SlicingOptions`.
        progress: counts passes of one batch through one block.
        held_out: windows [n, s] of calibration tokens outside `batches`, by which the refit's ridge is chosen where
            `options.ridge` is None: the model is sliced some three times then. Without them it is `RIDGE`.

    Returns:
        The sliced model, on the CPU in `options.dtype`, and the report.

    Errors:
        `SliceGPTError` for an unsupported model, missing calibration tokens, and NaN or infinity in the
        activations (the layer is named).
    """
    options, progress = options or SlicingOptions(), progress or Progress(quiet=True)
    checkpoint = checkpoint_of(model)
    spent = {}
    equal = config.layer_neurons is None
    if equal and deletes_neurons(config) and options.allocate and options.refit and len(batches):
        began, ridge = time.perf_counter(), RIDGE if options.ridge is None else options.ridge
        config = allocate_neurons(checkpoint, config, batches, replace(options, ridge=ridge), progress)
        spent["allocation"] = time.perf_counter() - began

    def slice_with(ridge: float) -> tuple[SlicedForCausalLM, SlicingReport]:
        slicer = Slicer(checkpoint, config, batches, replace(options, ridge=ridge), progress)
        sliced = slicer.run()
        slicer.report.seconds |= spent
        return sliced, slicer.report

    if options.ridge is not None:
        return slice_with(options.ridge)
    if held_out is None or held_out.shape[1] < 2 or not len(held_out) or not options.refit:
        return slice_with(RIDGE)
    return search_ridge(slice_with, held_out, options.device)
