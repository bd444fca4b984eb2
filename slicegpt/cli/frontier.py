"""`slicegpt frontier`: perplexity over true size, several methods side by side."""

import argparse
from pathlib import Path

from .options import add_device, positive, resolve_device, resolve_dtype, step

SPARSEGPT = "sparsegpt-2:4"


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "frontier",
        help="perplexity over true size, several methods side by side",
        description="Slice MODEL at several true sizes by several methods; write a table, JSON and a plot. What was "
        "measured is kept after every point: the same command goes on where it was interrupted.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--sizes", default="0.95,0.9,0.85,0.8,0.7", metavar="F,F", help="fractions of the dense model to keep"
    )
    parser.add_argument(
        "--basis",
        choices=("total", "decoder"),
        default="total",
        help="what sizes are fractions of: all parameters, or the decoder layers'; shortcuts are counted",
    )
    parser.add_argument(
        "--method",
        default="ours,published",
        metavar="NAME,NAME",
        help="ours, equal (ours, as many neurons in every layer), columns (ours, no neurons deleted), compact (no "
        "refit either), published (dense shortcuts, untied "
        f"head), {SPARSEGPT}",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="IN[,OUT]",
        help="texts to evaluate on, the calibration's domain first",
    )
    parser.add_argument(
        "--split", choices=("train", "test"), default="test", help="of a named data set (test)"
    )
    parser.add_argument("--windows", type=positive, default=32, help="windows of --seqlen tokens per text")
    parser.add_argument(
        "--round-to", type=positive, default=8, metavar="N", help="widths are multiples of N (8)"
    )
    parser.add_argument(
        "--output", default="runs/frontier", metavar="DIR", help="folder to write (runs/frontier)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--rerun", default="", metavar="NAME,NAME", help="measure these methods again")
    again.add_argument("--overwrite", action="store_true", help="forget earlier results in the folder")

    data = parser.add_argument_group("calibration")
    data.add_argument("--calibration", default="wikitext2", metavar="DATA", help="as in slicegpt slice")
    data.add_argument("--text-column", metavar="NAME", help="column of .jsonl and .parquet files (text)")
    data.add_argument("--nsamples", type=positive, default=128)
    data.add_argument("--seqlen", type=positive, default=2048)
    data.add_argument("--batch-size", type=positive, default=8)
    data.add_argument("--seed", type=int, default=42)

    machine = parser.add_argument_group("machine")
    add_device(machine)
    machine.add_argument(
        "--sparsegpt-python",
        metavar="PATH",
        help="interpreter of an environment with llmcompressor (this one's where it is installed)",
    )


def read_sizes(text: str) -> list[float]:
    """The fractions of `--sizes`."""
    from slicegpt.errors import SliceGPTError

    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        raise SliceGPTError(f"--sizes: expected numbers between commas, got {text!r}") from None
    for size in sizes:
        if not 0 < size <= 1:
            raise SliceGPTError(f"--sizes: a size must lie in (0, 1], got {size:g}")
    return sorted(set(sizes), reverse=True)


def read_methods(option: str, text: str) -> list[str]:
    """The names of a list of methods."""
    from slicegpt.errors import SliceGPTError
    from slicegpt.evaluation.frontier import METHODS

    known = [*METHODS, SPARSEGPT]
    methods = [part for part in text.split(",") if part]
    for method in methods:
        if method not in known:
            raise SliceGPTError(f"{option}: must be among {', '.join(known)}, got {method!r}")
    return list(dict.fromkeys(methods))


def name_texts(specs: list[str]) -> list[str]:
    """A short name for every text: its file's name without the ending, where that tells them apart."""
    stems = [Path(spec).stem for spec in specs]
    return [stem if stems.count(stem) == 1 else spec for stem, spec in zip(stems, specs, strict=True)]


def run(options: argparse.Namespace) -> None:
    import sys

    from slicegpt.calibration import load_documents, load_sources, sample_sources
    from slicegpt.calibration.mixture import split_names
    from slicegpt.checkpoint.loading import load_dense
    from slicegpt.errors import SliceGPTError
    from slicegpt.evaluation.frontier import METHODS, Frontier, cut_text, plan_point, run_frontier, table_rows
    from slicegpt.evaluation.plots import plot_frontier
    from slicegpt.evaluation.sparsegpt import check_interpreter, sparsegpt_2_4
    from slicegpt.families import canonical_fields
    from slicegpt.progress import Progress
    from slicegpt.slicing import SlicingOptions
    from slicegpt.table import format_table

    sizes, methods = read_sizes(options.sizes), read_methods("--method", options.method)
    again, device, progress = (
        read_methods("--rerun", options.rerun),
        resolve_device(options.device),
        Progress(),
    )
    if not methods:
        raise SliceGPTError("--method: no method given")
    python = options.sparsegpt_python or sys.executable
    if SPARSEGPT in methods:
        check_interpreter(python)
    specs = split_names("--data", options.data)
    documents = {
        name: load_documents(
            spec, options.split, options.text_column if Path(spec).suffix in COLUMNS else None
        )
        for name, spec in zip(name_texts(specs), specs, strict=True)
    }
    sources = load_sources(options.calibration, options.text_column)
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SliceGPTError(f"--output: cannot make {folder}: {error.strerror}") from error
    file = folder / "frontier.json"
    if options.overwrite:
        file.unlink(missing_ok=True)

    with step(progress, f"loading {options.model}"):
        model, tokenizer = load_dense(options.model, resolve_dtype(options.dtype))
    with step(progress, f"tokenising {', '.join(documents)}"):
        texts = [
            cut_text(name, text, tokenizer, options.seqlen, options.windows)
            for name, text in documents.items()
        ]
    for method in methods:  # a size that cannot be reached is told before anything is computed
        for size in sizes if method in METHODS else ():
            plan_point(METHODS[method], canonical_fields(model), size, options.basis, options.round_to)
    calibration = sample_sources(
        sources,
        tokenizer,
        options.nsamples,
        options.seqlen,
        options.batch_size,
        options.seed,
        model=model,
        progress=progress,
        device=device,
    )
    settings = {"model": options.model, "calibration": options.calibration}
    shared = SlicingOptions(model.dtype, device, seed=options.seed, neuron_multiple=options.round_to)
    frontier = Frontier(
        model, tokenizer, calibration, texts, options.seqlen, shared, settings, file, progress
    )
    frontier.forget(again)
    sparse = None
    if SPARSEGPT in methods:
        methods.remove(SPARSEGPT)

        def sparse():
            return sparsegpt_2_4(model, tokenizer, calibration.batches, python, progress)

    points = run_frontier(frontier, methods, sizes, options.basis, options.round_to, sparse)
    rows = table_rows(points, options.basis)
    table = format_table(rows, list(dict.fromkeys(column for row in rows for column in row)))
    (folder / f"frontier-{options.basis}.txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    try:
        plot_frontier(points, options.basis, folder / f"frontier-{options.basis}.png")
    except SliceGPTError as error:  # the figures are there; only matplotlib is not
        print(f"no plot: {error}", file=sys.stderr)


COLUMNS = (".jsonl", ".parquet")
