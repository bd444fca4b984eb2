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
from pathlib import Path

import torch

from slicegpt.checkpoint.tensors import OTHER_DTYPES, PLAIN_DTYPES, FileTensor

# The order in which safetensors puts the tensors of a file, and then by name.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "U8")
_DTYPES = {dtype: name for name, dtype in (OTHER_DTYPES | PLAIN_DTYPES).items() if name in _ORDER}

# One call of pwrite takes 2 GiB at most.
_BYTES_AT_ONCE = 1 << 30


def header_of(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """A safetensors file's first bytes, the offset of every tensor in it, and its size; the library's own layout.

    Args:
        entries: dtype and shape by name.
    """
    names = sorted(entries, key=lambda name: (_ORDER.index(_DTYPES[entries[name][0]]), name))
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

    Attributes:
        places: where each tensor stands.

    Raises:
        OSError: the disk has no room for them.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Iterable[str]],
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ):
        self.places: dict[str, FileTensor] = {}
        self._open: dict[Path, int] = {}
        for name, tensors in files.items():
            file, own = folder / name, {tensor: entries[tensor] for tensor in tensors}
            first, starts, size = header_of(own, metadata)
            self.places |= {
                tensor: FileTensor(file, starts[tensor], torch.Size(shape), dtype, dtype)
                for tensor, (dtype, shape) in own.items()
            }
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
        pieces, at = [tensor] if isinstance(tensor, torch.Tensor) else tensor, place.offset
        end = at + place.shape.numel() * place.dtype.itemsize
        for piece in pieces:
            if piece.dtype != place.dtype or piece.shape[1:] != place.shape[1:]:
                raise ValueError(
                    f"{name}: {place.dtype} {tuple(place.shape)} expected, got {piece.dtype} {tuple(piece.shape)}"
                )
            data = _bytes_of(piece)
            if at + len(data) > end:
                raise ValueError(f"{name}: more rows than {place.shape[0]}")
            self._write(self._open[place.file], data, at)
            at += len(data)
        if at != end:
            raise ValueError(f"{name}: fewer rows than {place.shape[0]}")

    @staticmethod
    def _write(handle: int, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(handle, data[:_BYTES_AT_ONCE], at)
            data, at = data[written:], at + written

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy of a tensor, read from its file."""
        return self.places[name].read()

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
