"""`slicegpt frontier`: perplexity over true size, several methods side by side."""

import argparse

from slicegpt.calibration import check_documents, check_sources
from slicegpt.calibration.mixture import split_names
from slicegpt.checkpoint.names import check_name
from slicegpt.errors import SliceGPTError
from slicegpt.recipe import AUTO, NAMES, Recipe

from .options import add_device, add_shared, check_device, counts

# Those of `slicegpt.evaluation.frontier_run`, which needs torch.
METHODS = (
    "ours",
    "neurons",
    "in-step",
    "equal",
    "stock",
    "per-layer",
    "stock-untied",
    "columns",
    "compact",
    "published",
    "sparsegpt-2:4",
)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "frontier",
        help="perplexity over true size, several methods side by side",
        description="Slice MODEL at several true sizes by several methods; write a table, JSON and a plot. What was "
        "measured is kept after every point: the same command goes on where it was interrupted.",
        examples=(
            "slicegpt frontier smollm2-135m --calibration in.txt --data in.txt,out.txt",
            "slicegpt frontier MODEL --sizes 0.9,0.8 --method ours,columns --data wikitext2",
        ),
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
        help="ours, neurons (no columns deleted, shared out by the refit's objective), in-step (columns and neurons "
        "in step, by the objective), equal (as many neurons in every layer), stock (the stock form), per-layer, "
        "stock-untied, columns (no neurons deleted), compact (no refit either), published (dense shortcuts, untied "
        "head), sparsegpt-2:4",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="IN[,OUT]",
        help="texts to evaluate on, the calibration's domain first",
    )
    add_shared(parser, "--split")
    add_shared(
        parser,
        "--windows",
        type=counts,
        default=(32,),
        metavar="N[,N]",
        help="windows of --seqlen tokens of each text: one number for all of them, or one for each",
    )
    add_shared(parser, "--round-to")
    parser.add_argument("--output", default="runs/frontier", metavar="DIR", help="folder to write")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--rerun", default="", metavar="NAME,NAME", help="measure these methods again")
    again.add_argument("--overwrite", action="store_true", help="forget earlier results in the folder")

    data = parser.add_argument_group("calibration")
    add_shared(data, "--calibration", "--text-column", "--nsamples", "--seqlen", "--batch-size", "--seed")

    machine = parser.add_argument_group("machine")
    add_device(machine)
    machine.add_argument(
        "--sparsegpt-python",
        metavar="PATH",
        help="interpreter of an environment with llmcompressor (default: this one's where it is installed)",
    )


def read_sizes(text: str) -> list[float]:
    """The fractions of `--sizes`."""
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        raise SliceGPTError(f"expected numbers between commas, got {text!r}", "sizes") from None
    for size in sizes:
        if not 0 < size <= 1:
            raise SliceGPTError(f"a size must lie in (0, 1], got {size:g}", "sizes")
    return sizes


def methods_in(text: str, argument: str) -> list[str]:
    """Names of methods between commas."""
    methods = [part for part in text.split(",") if part]
    for method in methods:
        if method not in METHODS:
            raise SliceGPTError(f"must be among {', '.join(METHODS)}, got {method!r}", argument)
    return methods


def run(options: argparse.Namespace) -> None:
    sizes = read_sizes(options.sizes)
    methods, again = methods_in(options.method, "methods"), methods_in(options.rerun, "rerun")
    if not methods:
        raise SliceGPTError("at least one is needed, got none", "methods")
    recipe = Recipe(**{name: value for name, value in vars(options).items() if name in NAMES})
    check_name(recipe.model, "model")
    check_device(options.device)
    for name in split_names(options.data, "data"):
        check_documents(name, argument="data")
    if recipe.calibration != AUTO:
        check_sources(recipe.calibration, recipe.text_column)

    from slicegpt.evaluation.frontier_run import FrontierOptions, measure_frontier
    from slicegpt.progress import Progress

    what = FrontierOptions(
        options.data,
        options.output,
        sizes,
        methods,
        options.basis,
        options.split,
        options.windows,
        again,
        options.overwrite,
        options.sparsegpt_python,
    )
    print(measure_frontier(what, recipe, options.device, Progress()))
