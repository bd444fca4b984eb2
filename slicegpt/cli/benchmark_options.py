"""Argument types of the benchmarks."""

import argparse

from .options import DTYPES

SHORTCUTS = ("compact", "dense")


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


def memory(text: str) -> float:
    """An argparse type: bytes, `8e9` or `8GB`, in powers of 1000."""
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((unit for unit in units if text.endswith(unit)), None)
    value = float(text.removesuffix(unit)) * units[unit] if unit else float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
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
