"""Options that several commands share."""

import argparse
import re
from collections.abc import Callable

from slicegpt.errors import SliceGPTError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE as JSON")


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
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes the first GPU where there is one"
    )
    about = "dtype of the weights; auto keeps the stored one"
    if dtypes is None:
        parser.add_argument("--dtype", choices=DTYPES, default="auto", help=about)
    else:
        parser.add_argument(
            "--dtype", type=dtypes, default=["auto"], metavar="T,...", help=f"{', '.join(DTYPES)}: {about}"
        )


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


def positive(text: str) -> int:
    """An argparse type: a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_or_auto(text: str) -> int | str:
    """An argparse type: a whole number above zero, or auto."""
    if text == "auto":
        return text
    try:
        return positive(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, got {text!r}") from None


def seed(text: str) -> int:
    """An argparse type: a whole number that torch's generators take."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must lie in [-2^63, 2^63), got {value}")
    return value


def shard_size(text: str) -> str:
    """An argparse type: bytes of a weight file at most, as `save_pretrained` takes them."""
    match = re.fullmatch(r"([0-9]+) ?([KMGT]B)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number and KB, MB, GB or TB, got {text!r}")
    return f"{match[1]}{match[2].upper()}"
