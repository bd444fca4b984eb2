"""Results for people (aligned tables that fit the terminal) and for programs (a JSON file)."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from slicegpt.errors import SliceGPTError

# As a width: that of the terminal, where standard output is one.
TERMINAL = "terminal"
# Of a terminal that does not say, as one inside another program may not.
DEFAULT_WIDTH = 80
GAP = "  "
# Words of titles that are longer, and cells of text down to this width, are broken where a table is too wide.
TITLE_WORD, TEXT = 12, 14

_NUMBER = re.compile(r"[-+−]?\d")


def output_width(stream: TextIO | None = None) -> int | None:
    """Columns that a stream has (standard output where none is given): those of COLUMNS, or of the terminal.

    None where it is no terminal: a file or a pipe takes lines of any length.
    """
    given = os.environ.get("COLUMNS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    stream = stream or sys.stdout
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
    except (OSError, ValueError):  # no terminal after all
        return DEFAULT_WIDTH


def format_table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str],
    width: int | str | None = TERMINAL,
    secondary: Sequence[str] = (),
) -> str:
    """Return rows as aligned plain text under the given column names, which are also the rows' keys.

    Integers get thousands separators, floats four significant digits, None and missing values a dash; text is
    printed as it is. Columns that hold numbers only (also as text, such as "25 %") are aligned to the right.

    A table that is wider than `width` breaks its titles, then leaves out secondary columns, which a last line names,
    then breaks text in cells; where that is not enough, every row becomes a block of lines, with all its columns.

    Args:
        width: columns of the output; that of the terminal unless it is given. None is any width: for files.
        secondary: the columns that may be left out, the least important first.
    """
    width = output_width() if width == TERMINAL else width
    table = [_Column.of(name, [row.get(name) for row in rows]) for name in columns]
    widths = [column.natural for column in table]
    if width is None or _total(widths) <= width:
        return _drawn(table, widths)
    left_out: list[str] = []
    for name in (None, *secondary):
        left_out += [name] if name in columns else []
        shown = [column for column in table if column.title not in left_out]
        widths = _fitted([column.natural for column in shown], [column.narrow for column in shown], width)
        if widths is not None:
            break
    else:
        widths = _fitted([column.narrow for column in shown], [column.least for column in shown], width)
    if widths is None:
        return _stacked(table, len(rows), width)
    note = f"Left out at this width: {', '.join(reversed(left_out))}."
    return _drawn(shown, widths) + ("\n" + fit_text(note, width) if left_out else "")


def format_facts(facts: Sequence[tuple[str, object]], width: int | str | None = TERMINAL) -> str:
    """Names and their values, one below the other; long values are broken, and go on below themselves."""
    width = output_width() if width == TERMINAL else width
    return "\n".join(_block([(name, _format_cell(value)) for name, value in facts], width))


def fit_text(text: str, width: int | str | None = TERMINAL) -> str:
    """A paragraph, broken between words to the width of the output; as it is where that has none."""
    width = output_width() if width == TERMINAL else width
    if width is None:
        return text
    return "\n".join(_broken(line, width) for line in text.split("\n"))


@dataclass(frozen=True)
class _Column:
    """A column as text. Widths: `natural` breaks nothing, `narrow` the title alone, `least` cells of text as well."""

    title: str
    cells: list[str]
    right: bool

    @staticmethod
    def of(title: str, values: Sequence[object]) -> _Column:
        cells = [_format_cell(value) for value in values]
        return _Column(title, cells, all(_NUMBER.match(cell) for cell in cells if cell != "-"))

    @property
    def natural(self) -> int:
        return max(map(len, (self.title, *self.cells)))

    @property
    def narrow(self) -> int:
        word = max(map(len, self.title.split()), default=0)
        return max(min(word, TITLE_WORD), *map(len, self.cells), 1)

    @property
    def least(self) -> int:
        return self.narrow if self.right else min(self.narrow, TEXT)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * max(0, len(widths) - 1)


def _fitted(widths: Sequence[int], floors: Sequence[int], total: int) -> list[int] | None:
    """Widths made smaller, those furthest above their floors first, until they fit; None where they cannot."""
    widths = list(widths)
    if _total(floors) > total:
        return None
    while _total(widths) > total:
        index = max(range(len(widths)), key=lambda i: widths[i] - floors[i])
        widths[index] -= 1
    return widths


def _drawn(table: Sequence[_Column], widths: Sequence[int]) -> str:
    """The titles, a rule, and the rows; a cell that is longer than its column goes on in the next line."""
    # No wider than the longest line of what was broken.
    texts = [(column.title, *column.cells) for column in table]
    broken = [
        [_broken(text, width).split("\n") for text in own] for own, width in zip(texts, widths, strict=True)
    ]
    widths = [max(len(line) for lines in own for line in lines) for own in broken]

    def line(values: Sequence[str]) -> str:
        aligned = zip(values, widths, table, strict=True)
        return GAP.join(v.rjust(w) if column.right else v.ljust(w) for v, w, column in aligned).rstrip()

    def lines(parts: Sequence[list[str]], at_bottom: bool = False) -> list[str]:
        height = max(map(len, parts), default=1)
        blank = [[""] * (height - len(part)) for part in parts]
        whole = [b + part if at_bottom else part + b for part, b in zip(parts, blank, strict=True)]
        return [line(each) for each in zip(*whole, strict=True)]

    titles, *rows = zip(*broken, strict=True)
    drawn = [*lines(titles, at_bottom=True), line(["-" * width for width in widths])]
    return "\n".join(drawn + [text for row in rows for text in lines(row)])


def _stacked(table: Sequence[_Column], count: int, width: int) -> str:
    """Every row as lines of a title and its value."""
    blocks = [_block([(column.title, column.cells[row]) for column in table], width) for row in range(count)]
    return "\n\n".join("\n".join(block) for block in blocks)


def _block(facts: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    label = max((len(name) for name, _ in facts), default=0)
    label = label if width is None else min(label, width // 2)
    lines = []
    for name, value in facts:
        names = _broken(name, label).split("\n")
        values = fit_text(value, None if width is None else max(1, width - label - len(GAP))).split("\n")
        for left, right in zip_longest(names, values, fillvalue=""):
            lines.append(f"{left.ljust(label)}{GAP}{right}".rstrip())
    return lines


def _broken(text: str, width: int) -> str:
    """Text broken between words, and inside of words that are longer than a line."""
    return (
        "\n".join(textwrap.wrap(text, max(1, width), break_on_hyphens=False)) if len(text) > width else text
    )


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON; a killed or failed write leaves the old file, or none, never half of one.

    Raises:
        SliceGPTError: the file cannot be written.
        ValueError: `content` has NaN or infinity, which JSON has not.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise SliceGPTError(f"cannot write {path}: {error.strerror}", "path") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(option: str, file: str | Path | None) -> None:
    """Raise `SliceGPTError`, before any work is done, where a result file could not be written; None is no file."""
    if file is None:
        return
    parent = Path(file).absolute().parent
    if Path(file).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SliceGPTError(f"{option}: cannot write {file}: expected a file in a folder that exists")


def _format_cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
