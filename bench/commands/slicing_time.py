"""`slicegpt bench slicing`: the time of every stage of slicing, against a dense forward pass over the same tokens.

The dense pass is Hugging Face's own model, decoder layers only (no head), without a cache, at the batch size that
`dense_batch_size` chooses. It runs before and after slicing, because a machine's speed drifts.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from slicegpt.bench.harness.memory import bytes_in_use, peak_bytes, release_unused_memory, start_peak
from slicegpt.bench.harness.record import Record
from slicegpt.bench.harness.timing import synchronise
from slicegpt.bench.models.architectures import MODELS, random_dense
from slicegpt.calibration import CalibrationBatch, load_documents, sample_batches
from slicegpt.checkpoint.loading import load_dense
from slicegpt.conversion.size_plan import plan_recipe, settled
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.hardware.memory import free_memory
from slicegpt.hardware.profiling import Trace
from slicegpt.hardware.ranks import Ranks
from slicegpt.progress import Progress
from slicegpt.recipe import Recipe
from slicegpt.slicing import SlicingOptions, slice_model

# The largest batch of the dense pass, and the share of its samples that choosing the batch may take at most: slicing
# itself takes several passes over all of them.
MOST_BATCH = 8
TRIAL_SHARE = 1 / 8


@dataclass(frozen=True)
class SlicingTimeOptions:
    """What is sliced, and how.

    Attributes:
        recipe: of the run, with a size; `recipe.model` is the dense model.
        shape_name: random weights of a known shape in the place of a model.
    """

    recipe: Recipe
    shape_name: str | None = None


def load(
    options: SlicingTimeOptions, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, Callable[[int, int], list[CalibrationBatch]]]:
    """The dense model on the CPU, and a function (samples, batch size) -> batches of calibration tokens.

    A shape gets random weights and random tokens.
    """
    recipe = options.recipe
    if (recipe.model is None) == (options.shape_name is None):
        raise SliceGPTError("--model, --shape: one of them is needed, and not both")
    if options.shape_name is None:
        documents = load_documents(recipe.calibration, "train")
        model, tokenizer = load_dense(recipe.model, dtype)

        def batches(nsamples: int, size: int) -> list[CalibrationBatch]:
            return sample_batches(documents, tokenizer, nsamples, recipe.seqlen, size, recipe.seed)

        return model, batches
    if options.shape_name not in MODELS:
        raise SliceGPTError(f"--shape: must be one of {', '.join(MODELS)}, got {options.shape_name!r}")
    config = MODELS[options.shape_name]
    model = random_dense(config, dtype or torch.float32, torch.device("cpu"))

    def random_batches(nsamples: int, size: int) -> list[CalibrationBatch]:
        generator = torch.Generator().manual_seed(recipe.seed)
        ids = torch.randint(config.vocab_size, (nsamples, recipe.seqlen), generator=generator)
        return [CalibrationBatch(part, torch.ones_like(part)) for part in ids.split(size)]

    return model, random_batches


@torch.no_grad()
def dense_pass(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    device: torch.device,
    ranks: Ranks | None = None,
) -> float:
    """Seconds of one pass of all batches through the decoder layers; `model` is on `device`.

    Args:
        ranks: until all of these are through with their batches.
    """
    synchronise(device)
    start = time.perf_counter()
    for batch in batches:
        model.base_model(input_ids=batch.input_ids.to(device), use_cache=False)
    synchronise(device)
    (ranks or Ranks()).wait()
    return time.perf_counter() - start


def fitting_batch(model: PreTrainedModel, seqlen: int, free: int) -> int:
    """The largest power of two, at most `MOST_BATCH`, whose activations take at most a quarter of the free bytes.

    What a layer holds at once of a token: the stream and its norm, q, k, v and the attention's output (6 widths), gate,
    up and their product (3 MLP widths).
    """
    config = model.config.get_text_config()
    neurons = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    sample = seqlen * (6 * config.hidden_size + 3 * neurons) * model.dtype.itemsize
    size = MOST_BATCH
    while size > 1 and 4 * size * sample > free:
        size //= 2
    return size


def dense_batch_size(
    model: PreTrainedModel,
    batches_of: Callable[[int, int], list[CalibrationBatch]],
    recipe: Recipe,
    device: torch.device,
) -> int:
    """The batch size of the dense pass; `model` is on `device`.

    The largest that fits, or 1 where one trial over as many samples shows that it is faster. There is no trial where
    both of its passes would be more than `TRIAL_SHARE` of all samples.
    """
    size = min(fitting_batch(model, recipe.seqlen, free_memory(device)), recipe.nsamples)
    dense_pass(model, batches_of(1, 1), device)  # warms up
    if size == 1 or 2 * size > TRIAL_SHARE * recipe.nsamples:
        return size
    seconds = {tried: dense_pass(model, batches_of(size, tried), device) for tried in (size, 1)}
    return min(seconds, key=seconds.get)


def rows_of(seconds: dict[str, float], dense: float | None) -> list[dict]:
    """A row for every stage: its seconds, and their ratio to a dense forward pass."""
    return [
        {"stage": name, "seconds": value, "of_dense_pass": value / dense if dense else None}
        for name, value in seconds.items()
    ]


def measure_slicing(
    options: SlicingTimeOptions,
    dtype: torch.dtype | None,
    device: torch.device,
    record: Record,
    progress: Progress | None = None,
    trace: str | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Slice once, with a dense pass before and after; `record.rows` holds a row for each stage.

    Several ranks share the tokens, of the dense pass as well; the figures are the first one's, which alone writes its
    `record`.

    `record.content` also gets "tokens", "tokens_per_second", "ratio", "peak_bytes" and "added_bytes" (above what was
    in use before slicing), and "batch_choice_seconds".

    Args:
        trace: a file for a Chrome trace of a second run, of the first batch alone and after all that is timed; its
            ranges are named "slicing / stage".
    """
    progress, ranks = progress or Progress(quiet=True), ranks or Ranks()
    save = record.save if ranks.first else lambda **content: None
    began = time.perf_counter()
    with progress.stage("loading", 1, "model") as advance:
        model, batches_of = load(options, dtype)
        advance(1)
    loading = time.perf_counter() - began

    recipe = settled(options.recipe, canonical_fields(model), device)
    config = plan_recipe(recipe, canonical_fields(model), model.dtype)
    width, batches = config.boundary_widths[0], batches_of(recipe.nsamples, recipe.batch_size)

    def dense_seconds(stage: str, size: int) -> float:
        with progress.stage(stage, recipe.nsamples, "samples") as advance:
            model.to(device)
            ranks.wait()
            seconds = dense_pass(model, ranks.deal(batches_of(recipe.nsamples, size)), device, ranks)
            model.to("cpu")
            release_unused_memory(device)
            advance(recipe.nsamples)
        return seconds

    began = time.perf_counter()
    with progress.stage("choosing the dense pass's batch size", 1, "sizes") as advance:
        model.to(device)
        best = ranks.decide(lambda: dense_batch_size(model, batches_of, recipe, device))
        advance(1)
    record.content["batch_choice_seconds"] = time.perf_counter() - began
    dense = [dense_seconds("dense pass", best)]
    seconds = {"loading": loading, "one dense forward pass": dense[0]}
    save(
        ranks=ranks.size,
        width=width,
        dense_batch_size=best,
        dense_seconds=dense,
        rows=rows_of(seconds, dense[0]),
    )

    release_unused_memory(device)
    level = bytes_in_use(device)
    start_peak(device)
    began = time.perf_counter()
    settings = SlicingOptions.of(recipe, model.dtype, device, ranks=ranks)
    sliced, report = slice_model(model, config, batches, settings, progress)
    synchronise(device)
    total = time.perf_counter() - began
    peak = peak_bytes(device)
    logging.disable_progress_bar()  # of transformers' shards
    began = time.perf_counter()
    if ranks.first:
        with tempfile.TemporaryDirectory() as folder, progress.stage("saving", 1, "model") as advance:
            sliced.save_pretrained(folder)
            advance(1)
    saving = time.perf_counter() - began

    def save_all() -> None:
        mean = sum(dense) / len(dense)
        stages = {**report.seconds, "other": total - sum(report.seconds.values())}
        seconds = {"one dense forward pass": mean, **stages, "slicing in all": total}
        seconds |= {"loading": loading, "saving": saving}
        save(
            tokens=report.tokens,
            dense_seconds=dense,
            slicing_seconds=total,
            tokens_per_second=report.tokens / total,
            ratio=total / mean,
            peak_bytes=peak,
            added_bytes=max(0, peak - level),
            rows=rows_of(seconds, mean),
        )

    save_all()
    dense.append(dense_seconds("dense pass again", best))
    save_all()
    if trace is not None and ranks.first:
        with progress.stage(f"trace: {trace}", 1, "runs") as advance:
            traced, alone = Trace(device), replace(settings, ranks=Ranks())
            traced.record(lambda: slice_model(model, config, batches[:1], alone))
            traced.write(trace)
            advance(1)
