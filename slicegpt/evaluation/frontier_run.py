"""A whole frontier: the model, the texts and the samples are loaded once, every method is measured at every size."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slicegpt.calibration import has_columns, load_documents
from slicegpt.calibration.mixture import split_names
from slicegpt.checkpoint.loading import load_dense
from slicegpt.conversion.multiples import multiple_of
from slicegpt.errors import SliceGPTError, renamed
from slicegpt.evaluation.frontier import Frontier, cut_text, run_frontier, table_rows
from slicegpt.evaluation.methods import METHODS, plan_point
from slicegpt.evaluation.plots import plot_frontier
from slicegpt.evaluation.sparsegpt import check_interpreter, sparsegpt_2_4
from slicegpt.families import canonical_fields
from slicegpt.hardware.devices import find_device, find_dtype
from slicegpt.progress import Progress
from slicegpt.recipe import Recipe
from slicegpt.slicing.pipeline import calibration_sources, draw_samples
from slicegpt.table import format_table

SPARSEGPT = "sparsegpt-2:4"
# Of all methods, in the order of the help.
KNOWN_METHODS = (*METHODS, SPARSEGPT)


@dataclass(frozen=True)
class FrontierOptions:
    """What is compared, on what.

    Attributes:
        data: texts to evaluate on, between commas, the calibration's domain first.
        output: folder for figures, table and plot; what it holds of the same settings is not measured again.
        sizes: fractions of the dense model to keep, each in (0, 1].
        methods: names among `KNOWN_METHODS`.
        basis: what sizes are fractions of, "total" or "decoder".
        split: of a named text to evaluate on.
        windows: of `recipe.seqlen` tokens, evaluated of each text; one number for all of them, or one for each.
        rerun: methods to measure again.
        overwrite: forget all earlier results in the folder.
        sparsegpt_python: interpreter of an environment with llmcompressor; None is this one.
    """

    data: str
    output: str | Path
    sizes: Sequence[float] = (0.95, 0.9, 0.85, 0.8, 0.7)
    methods: Sequence[str] = ("ours", "published")
    basis: str = "total"
    split: str = "test"
    windows: int | Sequence[int] = 32
    rerun: Sequence[str] = ()
    overwrite: bool = False
    sparsegpt_python: str | None = None

    def __post_init__(self):
        for size in self.sizes:
            if not 0 < size <= 1:
                raise SliceGPTError(f"a size must lie in (0, 1], got {size:g}", "sizes")
        for name, methods in (("methods", self.methods), ("rerun", self.rerun)):
            for method in methods:
                if method not in KNOWN_METHODS:
                    raise SliceGPTError(f"must be among {', '.join(KNOWN_METHODS)}, got {method!r}", name)
        if not self.methods:
            raise SliceGPTError("at least one is needed, got none", "methods")


def name_texts(specs: Sequence[str]) -> list[str]:
    """A short name for every text: its file's name without the ending, where that tells them apart."""
    stems = [Path(spec).stem for spec in specs]
    return [stem if stems.count(stem) == 1 else spec for stem, spec in zip(stems, specs, strict=True)]


def measure_frontier(
    options: FrontierOptions, recipe: Recipe, device: str | None = None, progress: Progress | None = None
) -> str:
    """Slice and evaluate by every method at every size; write `frontier.json`, a table and a plot.

    Args:
        options: what is compared.
        recipe: the model, the calibration and whatever all methods share; the size is not asked for.
        device: where slicing and evaluation run; None and "auto" take the first GPU where there is one.
        progress: None is silent.

    Returns:
        The table, as wide as the terminal.

    Raises:
        SliceGPTError: a method, size, text or model that cannot be had (found before anything is computed), or a
            folder with results of other settings.
    """
    sizes, methods = sorted(set(options.sizes), reverse=True), list(dict.fromkeys(options.methods))
    device, progress = find_device(device), progress or Progress(quiet=True)
    python = options.sparsegpt_python or sys.executable
    if SPARSEGPT in methods:
        check_interpreter(python)
    specs = split_names(options.data, "data")
    windows = [options.windows] if isinstance(options.windows, int) else list(options.windows)
    windows = windows * len(specs) if len(windows) == 1 else windows
    if len(windows) != len(specs):
        raise SliceGPTError(
            f"must be one number, or one for each of {len(specs)} texts, got {windows}", "windows"
        )
    with renamed(spec="data"):
        documents = {
            name: load_documents(spec, options.split, recipe.text_column if has_columns(spec) else None)
            for name, spec in zip(name_texts(specs), specs, strict=True)
        }
    sources = calibration_sources(recipe)
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SliceGPTError(f"cannot make {folder}: {error.strerror}", "output") from error
    file = folder / "frontier.json"
    if options.overwrite:
        file.unlink(missing_ok=True)

    with progress.step(f"loading {recipe.model}"):
        model, tokenizer = load_dense(recipe.model, find_dtype(recipe.dtype), sliceable=True)
    multiple = multiple_of(recipe.round_to, canonical_fields(model)["dense_hidden_size"], device)
    recipe = recipe.override(round_to=multiple)
    with progress.step(f"tokenising {', '.join(documents)}"):
        texts = [
            cut_text(name, text, tokenizer, recipe.seqlen, count)
            for (name, text), count in zip(documents.items(), windows, strict=True)
        ]
    for method in methods:  # a size that cannot be reached is told before anything is computed
        for size in sizes if method in METHODS else ():
            plan_point(METHODS[method], canonical_fields(model), size, options.basis, recipe.round_to)
    calibration = draw_samples(recipe, sources, model, tokenizer, device, progress)
    settings = {"model": recipe.model, "calibration": recipe.calibration}
    frontier = Frontier(
        model, tokenizer, calibration, texts, recipe.seqlen, recipe, device, settings, file, progress
    )
    frontier.forget(options.rerun)
    sparse = None
    if SPARSEGPT in methods:
        methods.remove(SPARSEGPT)

        def sparse():
            return sparsegpt_2_4(model, tokenizer, calibration.batches, python, progress)

    points = run_frontier(frontier, methods, sizes, options.basis, recipe.round_to, sparse)
    rows = table_rows(points, options.basis)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file_text = format_table(rows, columns, width=None)  # whole, whatever the terminal has room for
    (folder / f"frontier-{options.basis}.txt").write_text(file_text + "\n", encoding="utf-8")
    try:
        plot_frontier(points, options.basis, folder / f"frontier-{options.basis}.png")
    except SliceGPTError as error:  # the figures are there; only matplotlib is not
        progress.warn(f"no plot: {error}")
    return format_table(rows, columns, secondary=("parameters", "size", "width"))
