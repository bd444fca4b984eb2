"""The parser of every command: help that tells each default, options with former names, examples at the end."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from slicegpt.recipe import Recipe

# What an option stands for that is not given, where the parser leaves it out of the namespace: the recipe's choice.
_RECIPE = {field.name: field.default for field in fields(Recipe)}
_EXAMPLES = "examples:\n"


class HelpFormatter(argparse.HelpFormatter):
    """Every option ends with its default, unless its text speaks of it; the lines of examples, and of a text that has
    lines, stay as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or text == argparse.SUPPRESS or "default" in text:
            return text
        on_off = isinstance(action, argparse.BooleanOptionalAction)
        if not action.option_strings or action.required or (action.nargs == 0 and not on_off):
            return text  # positionals; what has none; flags
        return f"{text} (default: {default_text(action)})".replace("%%", "%").replace("%", "%%")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        prose, found, examples = text.partition(_EXAMPLES)
        prose = prose.strip()
        filled = super()._fill_text(prose, width, indent) if prose and "\n" not in prose else prose
        if not found:
            return filled
        return f"{filled}\n\n{_EXAMPLES}{examples}" if filled else _EXAMPLES + examples


def default_text(action: argparse.Action) -> str:
    """An option's default as it would be typed; "none" where not giving it is a choice of its own."""
    value = action.default
    if value == argparse.SUPPRESS:
        value = _RECIPE.get(action.dest)
    if value is None or value == "":
        return "none"
    if isinstance(value, list | tuple):
        return (" " if action.nargs in ("+", "*") else ",").join(map(_plain, value)) or "none"
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose subcommands are of its kind.

    Args:
        examples: whole command lines, shown below the options; tests parse them.
    """

    def __init__(self, *positional: Any, examples: Sequence[str] = (), **settings: Any):
        self.examples = tuple(examples)
        if examples:
            lines = "".join(f"  {line}\n" for line in examples)
            settings["epilog"] = f"{settings.get('epilog') or ''}{_EXAMPLES}{lines}"
        super().__init__(*positional, **{"formatter_class": HelpFormatter} | settings)


def add_option(group: Any, name: str, *, former: Sequence[str] = (), **settings: Any) -> argparse.Action:
    """Add an option that is taken under its former names as well, which the help does not show.

    Args:
        group: a parser or a group of options.
        former: names that scripts may still use.
        settings: what `add_argument` takes.
    """
    action = group.add_argument(name, **settings)
    hidden = {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for old in former:
        group.add_argument(old, **settings | hidden)
    return action
