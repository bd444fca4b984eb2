"""Safetensors files whose shape is known before their contents: every tensor goes to its place as it is done.

The file has its header and its full size from the first moment on, so that writing needs no more memory than the
tensor at hand, a disk that is too small says so before the work begins, and what a killed process had written can be
written over.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from slicegpt.errors import SliceGPTError

# safetensors' names of the dtypes, in the order in which it puts the tensors of a file, and then by name.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}

# One call of pwrite takes 2 GiB at most.
_BYTES_AT_ONCE = 1 << 30


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its file, the first byte of it there, its dtype and shape."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def header_of(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """A safetensors file's first bytes, the offset of every tensor in it, and its size; the library's own layout.

    Args:
        entries: dtype and shape by name.
    """
    order = list(_DTYPES)
    names = sorted(entries, key=lambda name: (order.index(entries[name][0]), name))
    table, end, starts = {"__metadata__": dict(metadata)}, 0, {}
    for name in names:
        dtype, shape = entries[name]
        starts[name], end = end, end + dtype.itemsize * torch.Size(shape).numel()
        table[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + start for name, start in starts.items()}, len(first) + end


class TensorFiles(Mapping[str, torch.Tensor]):
    """Tensors in safetensors files of one folder, written one by one in any order, and read from there.

    Args:
        folder: there already.
        files: of each file's name, its tensors.
        entries: dtype and shape of every tensor.
        metadata: of every file.

    Raises:
        SliceGPTError: the disk has no room for them.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Iterable[str]],
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ):
        self.places: dict[str, Place] = {}
        self._open: dict[Path, int] = {}
        for name, tensors in files.items():
            file, own = folder / name, {tensor: entries[tensor] for tensor in tensors}
            first, starts, size = header_of(own, metadata)
            self.places |= {tensor: Place(file, starts[tensor], *own[tensor]) for tensor in own}
            self._reserve(file, first, size)

    def _reserve(self, file: Path, first: bytes, size: int) -> None:
        """Make the file; one that is there already with this header is kept with what it holds."""
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        self._open[file] = handle
        if os.fstat(handle).st_size == size and os.pread(handle, len(first), 0) == first:
            return
        os.ftruncate(handle, 0)
        os.ftruncate(handle, size)
        # A file that is only told its length takes its room when it is written, hours later.
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError as error:  # not every file system can
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        self._write(handle, memoryview(first), 0)

    def write(self, name: str, tensor: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """Put a tensor in its place, from any device; or one whose first rows come first, piece by piece."""
        place = self.places[name]
        pieces, at = [tensor] if isinstance(tensor, torch.Tensor) else tensor, place.start
        for piece in pieces:
            if piece.dtype != place.dtype or piece.shape[1:] != torch.Size(place.shape[1:]):
                raise ValueError(f"{name}: {place.dtype} {place.shape} expected, got {piece.dtype} {piece.shape}")
            data = _bytes_of(piece)
            if at + len(data) > place.start + place.bytes:
                raise ValueError(f"{name}: more rows than {place.shape}")
            self._write(self._open[place.file], data, at)
            at += len(data)
        if at != place.start + place.bytes:
            raise ValueError(f"{name}: fewer rows than {place.shape}")

    @staticmethod
    def _write(handle: int, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(handle, data[:_BYTES_AT_ONCE], at)
            data, at = data[written:], at + written

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy of a tensor, read from its file."""
        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        data, at = _bytes_of(tensor), place.start
        while data:
            read = os.preadv(self._open[place.file], [data[:_BYTES_AT_ONCE]], at)
            if not read:
                raise SliceGPTError(f"{place.file}: truncated at {at} bytes")
            data, at = data[read:], at + read
        return tensor

    def __contains__(self, name: object) -> bool:  # the inherited one would read the tensor
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        for handle in self._open.values():
            os.fsync(handle)

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor; of one on the CPU in one piece they are the tensor's own."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
