"""Options that several commands share: one table of names, defaults and words, and the types of their values."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from slicegpt.cli.parser import add_option
from slicegpt.errors import SliceGPTError
from slicegpt.recipe import AUTO, Recipe
from slicegpt.units import parse_bytes

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

DTYPES = ("auto", "float32", "float16", "bfloat16")


# --- types ----------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An argparse type: a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def counts(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers above zero between commas."""
    return tuple(positive(part) for part in text.split(","))


def positive_or_auto(text: str) -> int | str:
    """An argparse type: a whole number above zero, or auto."""
    if text == AUTO:
        return text
    try:
        return positive(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, got {text!r}") from None


def number_or_auto(text: str) -> float | str:
    """An argparse type: a number, or auto."""
    try:
        return text if text == AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}") from None


def seed(text: str) -> int:
    """An argparse type: a whole number that torch's generators take."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must lie in [-2^63, 2^63), got {value}")
    return value


def byte_size(text: str) -> float:
    """An argparse type: bytes, `8e9`, `400MB` (1e6) or `400MiB` (2**20); see `slicegpt.units`."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shard_size(text: str) -> str:
    """An argparse type: bytes of a weight file at most, in the words that `save_pretrained` takes."""
    kilobytes = math.floor(byte_size(text) / 1000)
    if not kilobytes:
        raise argparse.ArgumentTypeError(f"must be 1 kB at least, got {text!r}")
    return f"{kilobytes}KB"


# --- the table ------------------------------------------------------------------------------------------------------

_SAMPLES = Recipe()
SHARED: dict[str, dict[str, Any]] = {
    "--calibration": {
        "metavar": "DATA[:W],...",
        "default": _SAMPLES.calibration,
        "help": "text file, folder, .jsonl, .json, .csv, .parquet, python-reference; wikitext2, ptb, c4, alpaca (from "
        "the hub); self (the model writes it), random-tokens; or several of them with weights, a.txt:2,self:1. auto is "
        "wikitext2 where the hub gives it, else self",
    },
    "--text-column": {
        "metavar": "NAME",
        "help": "column that holds the text of .jsonl, .json, .csv, .tsv and .parquet files (default: text)",
    },
    "--nsamples": {
        "type": positive,
        "metavar": "N",
        "default": _SAMPLES.nsamples,
        "help": "calibration samples",
    },
    "--seqlen": {
        "type": positive,
        "metavar": "N",
        "default": _SAMPLES.seqlen,
        "help": "tokens of a sample or window",
    },
    "--batch-size": {
        "type": positive,
        "metavar": "N",
        "default": _SAMPLES.batch_size,
        "help": "samples at a time",
    },
    "--seed": {
        "type": seed,
        "metavar": "N",
        "default": _SAMPLES.seed,
        "help": "of everything that is drawn",
    },
    "--windows": {
        "type": positive,
        "metavar": "N",
        "help": "only the first N windows of --seqlen tokens (default: all)",
    },
    "--split": {
        "choices": ("train", "test"),
        "default": "test",
        "help": "part of a named data set",
    },
    "--round-to": {
        "type": positive_or_auto,
        "metavar": "N",
        "default": _SAMPLES.round_to,
        "help": "widths and numbers of neurons are multiples of N; auto: 8, or 64 on a GPU for models 2048 wide and "
        "wider",
    },
    "--device": {
        "metavar": "D",
        "default": AUTO,
        "help": "cpu, cuda, cuda:1, ...; auto takes the first GPU where there is one",
    },
    "--dtype": {
        "choices": DTYPES,
        "default": AUTO,
        "help": "of the weights; auto keeps the stored one",
    },
    "--json": {"metavar": "FILE", "help": "also write the results to FILE as JSON"},
}


def add_shared(group: Any, *names: str, **own: Any) -> None:
    """Add options of the table; `own` takes the place of what the table says of them (`former`: hidden old names)."""
    for name in names:
        add_option(group, name, **SHARED[name] | own)


def add_json(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "--json")


def add_self_contained(parser: argparse.ArgumentParser) -> None:
    """`--no-self-contained`, of the commands that write a sliced folder."""
    parser.add_argument(
        "--self-contained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the modelling code beside the weights, for machines without slicegpt (default)",
    )


def add_device(parser: argparse.ArgumentParser, dtypes: Callable[[str], list[str]] | None = None) -> None:
    """`--device` and `--dtype`; of several dtypes, `dtypes` reads the list."""
    add_shared(parser, "--device")
    if dtypes is None:
        add_shared(parser, "--dtype")
        return
    about = f"{', '.join(DTYPES)}: {SHARED['--dtype']['help']}"
    parser.add_argument("--dtype", type=dtypes, default=[AUTO], metavar="T,...", help=about)


# --- checks and values ----------------------------------------------------------------------------------------------


def check_device(name: str) -> None:
    """An error where `--device` is none that there could be; whether it is there, torch knows."""
    if not _DEVICE.fullmatch(name):
        raise SliceGPTError(f"expected cpu or cuda[:N], got {name!r}", "device")


def resolve_device(name: str):
    """`--device` as a torch device; an error where it cannot be had."""
    check_device(name)
    from slicegpt.hardware.devices import find_device

    return find_device(name)


def resolve_dtype(name: str):
    """`--dtype` as a torch dtype, None for auto."""
    from slicegpt.hardware.devices import find_dtype

    return find_dtype(name)
