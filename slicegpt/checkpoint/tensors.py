"""Tensors in safetensors files, read one at a time, or some of their rows.

With plain reads at the offsets of the header: pages of a mapped file count as resident memory of the process until it
is closed, so that it would grow with every layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slicegpt.errors import SliceGPTError

# What is read at a time where it has to be converted: the tensor is there once, in the dtype asked for.
PIECE_BYTES = 1 << 25

# As safetensors' headers call them: of weights, and of what else a file may hold.
PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
OTHER_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return `{tensor name: {"dtype", "shape", "data_offsets"}}` without reading any weight.

    Raises:
        SliceGPTError: the file is not safetensors, or its size is not what its header promises.
    """
    return _read_header(file)[0]


def _read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header, and where the data begin."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise SliceGPTError(f"{file}: truncated, or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            sizes = [number for entry in header.values() for number in entry["shape"]]
            if not all(isinstance(number, int) and number >= 0 for number in [*sizes, end]):
                raise ValueError("sizes must be whole numbers")
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            raise SliceGPTError(f"{file}: corrupt, or not a safetensors file (unreadable header)") from error
    if size != end:
        raise SliceGPTError(f"{file}: truncated or corrupt: its header promises {end} bytes, it has {size}")
    return header, 8 + length


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file.

    Attributes:
        file, offset: where its bytes begin, in row-major order and little-endian.
        shape: of the tensor.
        stored: the dtype there.
        dtype: the one that `read` converts to.
    """

    file: Path
    offset: int
    shape: torch.Size
    stored: torch.dtype
    dtype: torch.dtype

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Some rows of the first dimension, all of them without arguments.

        Raises:
            SliceGPTError: the file is gone, or shorter than it was.
        """
        rows = self.shape[0] if self.shape else 1
        begin, end, _ = slice(begin, end).indices(rows)
        shape = (end - begin, *self.shape[1:]) if self.shape else ()
        row_elements = math.prod(self.shape[1:])
        count, first = math.prod(shape), self.offset + begin * row_elements * self.stored.itemsize
        out = torch.empty(count, dtype=self.dtype)
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(first)
                for piece in self._pieces(out):
                    self._fill(stream, piece)
        except OSError as error:
            raise SliceGPTError(f"{self.file} cannot be read any more: {error.strerror}") from error
        return out.view(shape)

    def _pieces(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (out,) if self.dtype == self.stored else out.split(PIECE_BYTES // self.stored.itemsize)

    def _fill(self, stream, piece: torch.Tensor) -> None:
        """Read the next elements into a flat tensor."""
        raw = piece if self.dtype == self.stored else torch.empty(len(piece), dtype=self.stored)
        view = memoryview(raw.view(torch.uint8).numpy())
        while view:  # a single read ends at 2 GB
            done = stream.readinto(view)
            if not done:
                raise SliceGPTError(f"{self.file} is shorter than it was when it was opened")
            view = view[done:]
        if raw is not piece:
            piece.copy_(raw)


def same_content(first: FileTensor, second: FileTensor) -> bool:
    """Whether two tensors hold the same numbers; they are read in pieces, and no further than the first difference."""
    if first.shape != second.shape:
        return False
    rows = max(1, PIECE_BYTES // max(1, math.prod(first.shape[1:]) * first.dtype.itemsize))
    return all(
        torch.equal(first.read(begin, begin + rows), second.read(begin, begin + rows))
        for begin in range(0, first.shape[0], rows)
    )


def open_files(files: Iterable[Path], dtype: torch.dtype | None = None) -> dict[str, FileTensor]:
    """The tensors of safetensors files, from their headers.

    Args:
        dtype: to read them in; None: each in its own.

    Raises:
        SliceGPTError: a file that is not whole, or a dtype that PyTorch does not have.
    """
    found = {}
    for file in files:
        header, begin = _read_header(file)
        for name, entry in header.items():
            stored = (PLAIN_DTYPES | OTHER_DTYPES).get(entry["dtype"])
            if stored is None:
                raise SliceGPTError(f"{file}: {name} is stored as {entry['dtype']}, which is not supported")
            shape, offset = torch.Size(entry["shape"]), begin + entry["data_offsets"][0]
            found[name] = FileTensor(file, offset, shape, stored, dtype or stored)
    return found
