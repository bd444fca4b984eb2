"""Options, argument types and checks that benchmarks share."""

import argparse

from slicegpt.checkpoint.names import check_name
from slicegpt.errors import SliceGPTError
from slicegpt.table import check_writable

from .options import DTYPES, check_device, positive
from .parser import add_option

SHORTCUTS = ("compact", "dense")
# The names that slicegpt.bench knows, where torch is needed to know more than the name.
ENGINES = (
    "hf",
    "hf-eager",
    "hf-static",
    "hf-compile",
    "hf-generate",
    "hf-generate-static",
    "plain",
    "plain-compile",
    "fused",
    "fused-int8",
    "fused-int4",
    "llama-cpp",
)
SHAPES = (
    "smollm2-135m",
    "llama-1b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "opt-125m",
    "opt-1.3b",
    "opt-2.7b",
    "opt-6.7b",
    "opt-13b",
    "opt-30b",
    "opt-66b",
    "phi-2",
    "phi-3-mini",
    "phi-4",
    "gemma-2b",
)
# With mixtures of experts, which the benchmarks of speed do not take.
MEMORY_SHAPES = (*SHAPES, "mixtral-8x7b")
PAPER_DEVICES = ("b200", "h200", "h100", "a100-80", "a100-40", "rtx-4090", "rtx-6000")


def add_sequences(parser: argparse.ArgumentParser, meaning: str = "sequences") -> None:
    """`--batch-size` of a benchmark that runs sequences side by side; `batch` in the namespace."""
    add_option(
        parser,
        "--batch-size",
        former=["--batch"],
        dest="batch",
        type=positive,
        default=1,
        metavar="N",
        help=meaning,
    )


def check_networks(options: argparse.Namespace) -> None:
    """What can be told of a benchmark's options before torch is imported."""
    models = [options.model] if isinstance(options.model, str) else options.model or []
    if bool(models) == bool(options.shape):
        raise SliceGPTError("--model, --shape: one of them is needed, and not both")
    for name in models:
        check_name(name, "model")
    check_shape(options.shape)
    for name in getattr(options, "engines", None) or ():
        if name not in ENGINES:
            raise SliceGPTError(f"--engines: must be among {', '.join(ENGINES)}, got {name!r}")
    check_device(options.device)
    check_files(options)


def check_shape(name: str | None, known: tuple[str, ...] = SHAPES) -> None:
    if name is not None and name not in known:
        raise SliceGPTError(f"--shape: must be one of {', '.join(known)}, got {name!r}")


def check_files(options: argparse.Namespace) -> None:
    """Every file that a benchmark shall write can be written, and is of a kind that it can write."""
    from slicegpt.bench.report.charts import check_plot

    for name in ("json", "csv", "plot", "trace", "output"):
        check_writable(f"--{name}", getattr(options, name, None))
    if getattr(options, "plot", None):
        check_plot("--plot", options.plot)


def fractions(text: str) -> list[float]:
    """An argparse type: slicing fractions, `0,0.25,0.5`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected fractions such as 0,0.25, got {text!r}") from error
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"fractions must lie in [0, 1), got {text!r}")
    return values


def fraction(text: str) -> float:
    """An argparse type: a number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {value:g}")
    return value


def dtypes(text: str) -> list[str]:
    """An argparse type: dtypes of the weights between commas."""
    values = list(dict.fromkeys(names(text)))
    if not values or not set(values) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"must be among {', '.join(DTYPES)}, got {text!r}")
    return values


def names(text: str) -> list[str]:
    """An argparse type: names between commas."""
    return [part for part in text.split(",") if part]


def settings_of(options: argparse.Namespace) -> dict:
    """The options, as the results record them."""
    unsaid = ("run", "verbose", "command", "benchmark", "json", "csv", "plot")
    return {name: value for name, value in vars(options).items() if name not in unsaid}
