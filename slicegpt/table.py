"""Results for people (an aligned table) and for programs (a JSON file)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slicegpt.errors import SliceGPTError

_NUMBER = re.compile(r"[-+−]?\d")


def format_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Return rows as aligned plain text under the given column names, which are also the rows' keys.

    Integers get thousands separators, floats four significant digits, None and missing values a dash; text is
    printed as it is. Columns that hold numbers only (also as text, such as "25 %") are aligned to the right.
    """
    cells = [[_format_cell(row.get(column)) for column in columns] for row in rows]
    right = [
        all(_NUMBER.match(cell) for cell in column if cell != "-") for column in zip(*cells, strict=True)
    ]
    right = right or [False] * len(columns)
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        aligned = zip(values, widths, right, strict=True)
        return "  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in aligned).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


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
