"""`slice_model` and `slice_checkpoint`: the whole of slicing, into memory or into any other sink."""

import logging
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.conversion.quantization import with_quantization, without_quantization
from slicegpt.families import Checkpoint, checkpoint_of
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
from slicegpt.modeling.wide_products import products_in_float32
from slicegpt.progress import Progress
from slicegpt.recipe import PRICES, UNIFORM
from slicegpt.slicing.allocation import deletes_neurons
from slicegpt.slicing.keeping import Keeper
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.options import SlicingOptions, SlicingReport
from slicegpt.slicing.plans import find_plan
from slicegpt.slicing.reuse import Reuse
from slicegpt.slicing.ridge import choose_ridge
from slicegpt.slicing.shared_basis import shared_covariance, shares_basis
from slicegpt.slicing.sink import MemorySink, Sink
from slicegpt.slicing.slicer import Slicer

logger = logging.getLogger("slicegpt")

# What one plan has and another one of the same size may not.
PLANNED = (
    "boundary_widths",
    "shortcuts",
    "embed_projection",
    "final_norm_weight",
    "intermediate_size",
    "moe_intermediate_size",
    "layer_neurons",
    "layer_key_value_heads",
)


def slice_model(
    model: PreTrainedModel,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch] = (),
    options: SlicingOptions | None = None,
    progress: Progress | None = None,
    held_out: torch.Tensor | None = None,
    objective: Objective | None = None,
    reuse: Reuse | None = None,
    alternatives: Sequence[SlicedConfig] = (),
) -> tuple[SlicedForCausalLM | None, SlicingReport]:
    """Slice, or only rotate, a dense Hugging Face model that is loaded; what comes out is in memory, too.

    Args:
        model: of a supported family (`slicegpt.families.FAMILIES`), on the CPU; it is not changed.

    The other arguments and the errors are those of `slice_checkpoint`.

    Returns:
        The sliced model, on the CPU in `options.dtype`, and the report. Of several ranks (`options.ranks`) the first
        alone has them: on the others the model is None.
    """
    sink = MemorySink()
    if reuse is not None:
        reuse.begin(model, batches)
    config, report = slice_checkpoint(
        checkpoint_of(model),
        config,
        sink,
        batches,
        options,
        progress,
        held_out,
        objective,
        reuse=reuse,
        alternatives=alternatives,
    )
    return sink.finished(None).shell if (options or SlicingOptions()).ranks.first else None, report


def slice_checkpoint(
    checkpoint: Checkpoint,
    config: SlicedConfig,
    sink: Sink,
    batches: Sequence[CalibrationBatch] = (),
    options: SlicingOptions | None = None,
    progress: Progress | None = None,
    held_out: torch.Tensor | None = None,
    objective: Objective | None = None,
    keeper: Keeper | None = None,
    reuse: Reuse | None = None,
    alternatives: Sequence[SlicedConfig] = (),
) -> tuple[SlicedConfig, SlicingReport]:
    """Slice, or only rotate, a dense model, of which one layer at a time need be in memory.

    Args:
        checkpoint: its tensors, in memory or read at access.
        config: planned by `slicegpt.conversion.plan.plan`. The neurons it keeps are shared out among the layers, see
            `options.allocate`.
        sink: takes the sliced model's tensors.
        batches: calibration tokens; needed wherever a boundary is sliced or takes its basis from PCA.
        options: see `SlicingOptions`.
        progress: counts passes of one batch through one block.
        held_out: windows [n, s] of calibration tokens outside `batches`, by which the refit's ridge is chosen where
            `options.ridge` is None, see `slicegpt.slicing.ridge.choose_ridge`.
        objective: what the refit minimises; None: `slicegpt.slicing.objective.Objective()`.
        keeper: keeps what an interrupted run needs to go on after its last block; with what was kept of one, the run
            begins there.
        reuse: what runs at other sizes of the same model, tokens and objective share, see `slicegpt.slicing.reuse`;
            the caller has said which they are (`Reuse.begin`).
        alternatives: configs of the same size and other widths, one of which is sliced in the place of `config` where
            `options.allocate` is "prices" and the network that comes of it loses less.

    Returns:
        The config of the model that the sink holds, and the report. Of several ranks (`options.ranks`) the first alone
        fills its sink and has all of the report.

    Errors:
        `SliceGPTError` for an unsupported model, missing calibration tokens, and NaN or infinity in the
        activations (the layer is named).
    """
    options, progress = options or SlicingOptions(), progress or Progress(quiet=True)
    objective, keeper = objective or Objective(), keeper or Keeper()
    with products_in_float32(options.device):
        return _slice(
            checkpoint,
            without_quantization(config),  # it follows from the shape, which is not final yet
            sink,
            batches,
            options,
            progress,
            held_out,
            objective,
            keeper,
            reuse,
            alternatives,
        )


def _slice(
    checkpoint: Checkpoint,
    config: SlicedConfig,
    sink: Sink,
    batches: Sequence[CalibrationBatch],
    options: SlicingOptions,
    progress: Progress,
    held_out: torch.Tensor | None,
    objective: Objective,
    keeper: Keeper,
    reuse: Reuse | None,
    alternatives: Sequence[SlicedConfig],
) -> tuple[SlicedConfig, SlicingReport]:
    journal = keeper.journal
    ridges = objective.ridges if options.ridge is None else (options.ridge,)
    equal = config.layer_neurons is None
    if equal and deletes_neurons(config) and options.allocate != UNIFORM and options.refit and len(batches):
        shape = options.ranks.decide(lambda: journal.get("plan"))
        if shape is None:
            plans = find_plan(
                checkpoint,
                [config, *map(without_quantization, alternatives)],
                batches,
                options,
                objective,
                ridges[0],
                progress,
                keeper,
                reuse,
            )
            shape = {name: getattr(plans[0].config, name) for name in PLANNED}
            keeper.note(plan=shape, plans=[plan.record() for plan in plans])
        config = SlicedConfig.from_dict(config.to_dict() | shape)

    shared, seconds = None, 0.0
    if shares_basis(config) and options.ranks.decide(lambda: keeper.found("slicing") is None):
        began = time.perf_counter()
        shared = shared_covariance(checkpoint, config, batches, options, objective, progress)
        seconds = time.perf_counter() - began
    slicer = Slicer(
        checkpoint, config, batches, options, objective, ridges, progress, sink, keeper, reuse, shared
    )
    if seconds:
        slicer.report.seconds["shared basis"] = seconds
    slicer.run()
    config, report, ridge = with_quantization(config, options.weights), slicer.report, slicer.ridges[0]
    if not options.ranks.first:
        return config, report
    if len(slicer.ridges) > 1:
        began = time.perf_counter()
        ridge, report.ridge_search = choose_ridge(
            sink, slicer.ridges, objective.unjudged_ridge, held_out, options, progress, keeper
        )
        report.seconds["ridge"] = time.perf_counter() - began
    sink.choose(ridge)
    costs = "prices" if options.allocate == PRICES else "allocation"
    for stage, seconds in ((costs, "costs_seconds"), ("trials", "trials_seconds")):
        if seconds in journal:
            report.seconds[stage] = journal[seconds]
    report.plans = journal.get("plans", [])
    report.refit = [
        {"block": block, "ridge": ridge, "remaining": remaining[ridge]}
        | ({"few_tokens": slicer.few_tokens[block]} if block in slicer.few_tokens else {})
        for block, remaining in slicer.remaining
    ]
    if slicer.few_tokens:
        logger.warning(
            "%d of %d experts had fewer calibration tokens than neurons, in %d layers; their fits stay near their own "
            "weights (few_tokens in slicing.json tells which)",
            sum(map(len, slicer.few_tokens.values())),
            config.num_experts * config.mlp_layer_types.count("sparse"),
            len(slicer.few_tokens),
        )
    return config, report
