"""The steps of a slicing run as a recipe has them: `slicegpt.api.slice` takes all of them, others the ones they need.

sources = calibration_sources(recipe)                                  text; nothing is loaded yet
config, *others = plan_choices(recipe, canonical_fields(model), model.dtype)     slicegpt.conversion.size_plan
drawn = draw_samples(recipe, sources, model, tokenizer, device)        tokens
options = SlicingOptions.of(recipe, model.dtype, device)
sliced, report = slice_drawn(model, config, drawn, options, alternatives=others)

or, of a model that is read from its files a layer at a time, and with tensors that go where the sink puts them,

config, report = slice_source(source, config, drawn, options, sink, alternatives=others)
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.calibration import Calibration, Source, load_sources, sample_sources
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource, checkpoint_of
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
from slicegpt.progress import Progress
from slicegpt.recipe import IN_MEMORY, Recipe
from slicegpt.slicing.driver import slice_checkpoint, slice_model
from slicegpt.slicing.keeping import Keeper
from slicegpt.slicing.options import SlicingOptions, SlicingReport
from slicegpt.slicing.reuse import Reuse
from slicegpt.slicing.sink import Sink


def calibration_sources(recipe: Recipe, documents: Sequence[str] | None = None) -> list[Source]:
    """The text that a recipe calibrates on, read.

    Args:
        documents: in place of what the recipe names.

    Raises:
        SliceGPTError: a source that is not there, or a recipe whose documents only its own run had.
    """
    if documents is not None:
        return [Source(IN_MEMORY, documents=documents)]
    if recipe.calibration == IN_MEMORY:
        raise SliceGPTError(
            "the recipe's run had documents that no file holds; give them, or name a text", "calibration"
        )
    return load_sources(recipe.calibration, recipe.text_column)


def draw_samples(
    recipe: Recipe,
    sources: Sequence[Source],
    model: PreTrainedModel | DenseSource,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    progress: Progress | None = None,
) -> Calibration:
    """Calibration samples, as many and as long as a recipe says; see `slicegpt.calibration.sample_sources`."""
    return sample_sources(
        sources,
        tokenizer,
        recipe.nsamples,
        recipe.seqlen,
        recipe.batch_size,
        recipe.seed,
        recipe.varied_seqlen,
        model,
        progress,
        device,
    )


def slice_drawn(
    model: PreTrainedModel,
    config: SlicedConfig,
    drawn: Calibration,
    options: SlicingOptions,
    progress: Progress | None = None,
    reuse: Reuse | None = None,
    alternatives: Sequence[SlicedConfig] = (),
) -> tuple[SlicedForCausalLM | None, SlicingReport]:
    """Slice by drawn samples; the held-out windows among them choose the refit's λ. See `slice_model`.

    The sliced model generates as the dense one does: it gets the same generation config.
    """
    sliced, report = slice_model(
        model,
        config,
        drawn.batches,
        options,
        progress,
        drawn.held_out,
        reuse=reuse,
        alternatives=alternatives,
    )
    if sliced is not None and model.generation_config is not None:
        sliced.generation_config = model.generation_config
    return sliced, report


def slice_source(
    source: DenseSource,
    config: SlicedConfig,
    drawn: Calibration,
    options: SlicingOptions,
    sink: Sink,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
    reuse: Reuse | None = None,
    alternatives: Sequence[SlicedConfig] = (),
) -> tuple[SlicedConfig, SlicingReport]:
    """As `slice_drawn`, of a model that need not be in memory; see `slice_checkpoint`."""
    if reuse is not None:
        reuse.begin(source.shell if source.in_memory else source, drawn.batches)
    checkpoint = checkpoint_of(source)
    return slice_checkpoint(
        checkpoint,
        config,
        sink,
        drawn.batches,
        options,
        progress,
        drawn.held_out,
        keeper=keeper,
        reuse=reuse,
        alternatives=alternatives,
    )
