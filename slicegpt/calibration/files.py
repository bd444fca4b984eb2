"""Documents from a file: plain text, JSON, CSV or Parquet, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slicegpt.errors import SliceGPTError, first_line


def _decompress_zstandard(content: bytes) -> bytes:
    import zstandard

    pieces = []
    while (
        content
    ):  # a file may be several frames; a stream's reader would pass over the end of one that is cut off
        frame = zstandard.ZstdDecompressor().decompressobj()
        pieces.append(frame.decompress(content))
        if not frame.eof:
            raise EOFError("it ends within a frame")
        content = frame.unused_data
    return b"".join(pieces)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _decompress_zstandard,
}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
COLUMNS = (".jsonl", ".ndjson", ".json", *_SEPARATORS, ".parquet")
COLUMN_FILES = ".jsonl, .json, .csv, .tsv or .parquet file"


def kind_of(name: str | Path) -> str:
    """The suffix that tells a file's format, in lower case, without that of its compression."""
    path = Path(name)
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix.lower()


def has_columns(name: str | Path) -> bool:
    """Whether a file of that name holds rows of named columns, one of which is the text."""
    return kind_of(name) in COLUMNS


def read_file(file: Path, column: str) -> list[str]:
    """The documents in a file: one a row of a file with columns, else one.

    Args:
        column: the column that holds the text, where the file has columns.

    Raises:
        SliceGPTError: one line naming the file, and the line, row or column at fault.
    """
    kind = kind_of(file)
    if kind == ".parquet":
        return _read_parquet(file, column)
    text = read_text(file)
    if kind in (".jsonl", ".ndjson"):
        return _read_json_lines(file, text, column)
    if kind == ".json":
        return _read_json(file, text, column)
    if kind in _SEPARATORS:
        return _read_table(file, text, column, _SEPARATORS[kind])
    return [text]


def read_text(file: Path) -> str:
    """A file's text, decompressed; line ends are those of Unix."""
    content = _read_bytes(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start:,} is {error.object[error.start]:#04x}"
        raise SliceGPTError(f"{file} is not UTF-8 text ({byte})", "spec") from error
    if "\0" in text:
        raise SliceGPTError(f"{file} is not text (a zero byte at {text.index(chr(0)):,})", "spec")
    return text.replace("\r\n", "\n")


def need(package: str, install: str, purpose: str) -> None:
    """One clear line where an optional package is missing."""
    if importlib.util.find_spec(package) is None:
        raise SliceGPTError(f"{purpose} needs {package}: pip install {install}", "spec")


def missing_column(where: object, column: str, existing: Iterable[Any]) -> SliceGPTError:
    """The error of a file without the column that was asked for."""
    names = ", ".join(map(str, existing)) or "none"
    return SliceGPTError(f"{where} has no column {column!r}; it has: {names}", "text_column")


def _read_bytes(file: Path) -> bytes:
    suffix = file.suffix.lower()
    if suffix == ".zst":
        need("zstandard", "zstandard", f"reading {file}")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SliceGPTError(f"cannot read {file}: {error.strerror}", "spec") from error
    if suffix not in COMPRESSIONS:
        return content
    try:
        return COMPRESSIONS[suffix](content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise SliceGPTError(f"{file} is not a whole {suffix} file: {first_line(error)}", "spec") from error
    except Exception as error:  # zstandard has its own
        if type(error).__module__.split(".")[0] != "zstandard":
            raise
        raise SliceGPTError(f"{file} is not a whole {suffix} file: {first_line(error)}", "spec") from error


def _read_json_lines(file: Path, text: str, column: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            documents.append(
                _document(f"{file} line {number}", _parse(f"{file} line {number}", line), column)
            )
    return documents


def _read_json(file: Path, text: str, column: str) -> list[str]:
    """An array of objects; or, as `datasets` reads it as well, one object a line."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return _read_json_lines(file, text, column)
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise SliceGPTError(
            f"{file} must hold an array of JSON objects, or one object a line, got {type(rows).__name__}",
            "spec",
        )
    return [_document(f"{file} row {number}", row, column) for number, row in enumerate(rows, start=1)]


def _parse(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SliceGPTError(f"{where} is not JSON: {first_line(error)}", "spec") from error


def _document(where: str, row: Any, column: str) -> str:
    if not isinstance(row, dict):
        raise SliceGPTError(f"{where} must be a JSON object, got {type(row).__name__}", "spec")
    if column not in row:
        raise missing_column(where, column, row)
    text = row[column]
    if not isinstance(text, str):
        raise SliceGPTError(
            f"{where}: column {column!r} must be text, got {type(text).__name__}", "text_column"
        )
    check_unicode(text, f"{where}: column {column!r}", "spec")
    return text


def check_unicode(text: str, what: str, argument: str | None = None) -> None:
    """Refuse half of a surrogate pair (`\\ud800` in JSON), which stands for no character: tokenizers fail on it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise SliceGPTError(
            f"{what} is not Unicode text: half of a surrogate pair (\\u{code:04x}) at character {error.start:,}",
            argument,
        ) from error


def _read_table(file: Path, text: str, column: str, separator: str) -> list[str]:
    limit = csv.field_size_limit(2**31 - 1)  # documents are longer than the 131,072 characters that it allows
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header = rows.fieldnames or []
        if column not in header:
            raise missing_column(file, column, header)
        documents = []
        for number, row in enumerate(rows, start=1):
            if row[column] is None:
                raise SliceGPTError(f"{file} row {number}: column {column!r} is missing", "text_column")
            documents.append(row[column])
    except csv.Error as error:
        raise SliceGPTError(f"{file} is not readable: {first_line(error)}", "spec") from error
    finally:
        csv.field_size_limit(limit)
    return documents


def _read_parquet(file: Path, column: str) -> list[str]:
    need("pyarrow", "'slicegpt[parquet]'", f"reading {file}")
    import pyarrow
    from pyarrow import parquet

    source = io.BytesIO(_read_bytes(file)) if file.suffix.lower() in COMPRESSIONS else file
    try:
        schema = parquet.read_schema(source)
        if column not in schema.names:
            raise missing_column(file, column, schema.names)
        kind = schema.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise SliceGPTError(f"{file}: column {column!r} must be text, got {kind}", "text_column")
        documents = parquet.read_table(source, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SliceGPTError(f"cannot read {file}: {first_line(error)}", "spec") from error
    if None in documents:
        raise SliceGPTError(
            f"{file}: column {column!r} has no text in row {documents.index(None)}", "text_column"
        )
    return documents
