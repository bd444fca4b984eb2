"""What the choices of a recipe may be: the rules that check and convert them, and choices that were renamed.

Nothing heavy is imported here, see `slicegpt.recipe`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from slicegpt.errors import SliceGPTError
from slicegpt.step_times import StepTimes
from slicegpt.units import parse_bytes

AUTO = "auto"
# Former name of a choice -> its name. Recipes on disk, scripts and habits keep them.
FORMER_NAMES = {"params": "keep"}


# --- what a choice may be -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a choice may be.

    Attributes:
        kind: of value, for the message.
        convert: to the plain type that is stored; TypeError where it is of another kind.
        bounds: what `holds` asks, for the message.
        optional: None may stand for a choice that is not made.
    """

    kind: str
    convert: Callable[[Any], Any]
    bounds: str = ""
    holds: Callable[[Any], bool] = lambda value: True
    optional: bool = False

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.optional:
            return None
        try:
            value = self.convert(value)
        except TypeError:
            raise SliceGPTError(f"must be {self.kind}, got {value!r}", name) from None
        if not self.holds(value):
            raise SliceGPTError(f"must {self.bounds}, got {value!r}", name)
        return value


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError
    return int(value)


def number_or_auto(value: Any) -> float | str:
    return AUTO if isinstance(value, str) and value == AUTO else number(value)


def whole_or_auto(value: Any) -> int | str:
    return AUTO if isinstance(value, str) and value == AUTO else whole(value)


def byte_count(value: Any) -> float:
    if not isinstance(value, str):
        return number(value)
    try:
        return parse_bytes(value)
    except ValueError:
        raise TypeError from None


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def allocation(value: Any) -> str:
    """A text; former recipes say whether the objective decides."""
    return {True: "objective", False: "uniform"}[value] if isinstance(value, bool) else text(value)


def step_times(value: Any) -> str:
    """The text of `StepTimes`."""
    try:
        return str(StepTimes.parse(text(value)))
    except ValueError:
        raise TypeError from None


def text(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError
    return os.fspath(value)


def whole_numbers(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError
    return tuple(map(whole, value))


def whole_or_list(value: Any) -> int | tuple[int, ...]:
    return whole(value) if isinstance(value, Integral) else whole_numbers(value)


def one_of(names: Sequence[str], optional: bool = False) -> Rule:
    allowed = f"one of {', '.join(names)}"
    return Rule(allowed, text, f"be {allowed}", lambda value: value in names, optional)


POSITIVE = Rule("a whole number", whole, "be at least 1", lambda value: value >= 1)
FLAG = Rule("true or false", flag)


def choice(group: str, default: Any, rule: Rule) -> Any:
    return field(default=default, metadata={"rule": rule, "group": group})


# --- renamed choices ----------------------------------------------------------------------------------------------


def present_names(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The choices under their present names.

    Raises:
        SliceGPTError: one is given under both names.
    """
    present = {name: value for name, value in choices.items() if name not in FORMER_NAMES}
    for former in choices.keys() & FORMER_NAMES.keys():
        name = FORMER_NAMES[former]
        if present.get(name) is not None and choices[former] is not None:
            raise SliceGPTError(
                f"is the former name of {name}; only one of them can be given, got "
                f"{former}={choices[former]!r} and {name}={choices[name]!r}",
                former,
            )
        if present.get(name) is None:
            present[name] = choices[former]
    return present


def takes_former_names(cls: type) -> type:
    """A dataclass whose renamed fields can be given, and read, under their former names."""
    made = cls.__init__

    @functools.wraps(made)
    def initialise(self, *values: Any, **choices: Any) -> None:
        made(self, *values, **present_names(choices))

    cls.__init__ = initialise
    for former, name in FORMER_NAMES.items():
        setattr(
            cls,
            former,
            property(lambda self, name=name: getattr(self, name), doc=f"Former name of `{name}`."),
        )
    return cls
