"""Tensors in temporary files, for what has no room in memory.

A file has no name from the moment that it is made, so that nothing is left behind however the process ends, and all of
its space is reserved at once: a full disk is an error then, and not a signal in the middle of a write. Pages that were
read or written are given back by `release`; without it they count as the process's own memory.
"""

import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch

from slicegpt.errors import SliceGPTError

# Bytes that are copied between two calls of `release`.
PIECE_BYTES = 1 << 26

# The mappings that live, by the address of their memory, and their files' descriptors.
_MAPPINGS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
_FILES: dict[int, int] = {}


def scratch_folder(folder: str | os.PathLike | None = None) -> Path:
    """Where scratch files go: `folder`, or the system's folder for temporary files."""
    return Path(tempfile.gettempdir() if folder is None else folder)


def free_space(folder: str | os.PathLike | None = None) -> int:
    """Bytes that can still be written below a folder, which need not be there yet."""
    path = scratch_folder(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def scratch_tensor(
    shape: Sequence[int], dtype: torch.dtype, folder: str | os.PathLike | None = None
) -> torch.Tensor:
    """A tensor on the CPU whose memory is a file in `folder`; its values are zeros.

    Raises:
        SliceGPTError: no space, or no permission to write there.
    """
    place, size = scratch_folder(folder), prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapping, descriptor = mmap.mmap(file.fileno(), size), os.dup(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"needs {size / 1e9:.1f} GB in {place}, {free_space(place) / 1e9:.1f} GB are free"
        else:
            reason = f"cannot write in {place}: {error.strerror}"
        raise SliceGPTError(f"a temporary file {reason}", "scratch") from error
    tensor = torch.frombuffer(mapping, dtype=dtype, count=prod(shape)).view(*shape)
    address = tensor.untyped_storage().data_ptr()
    _MAPPINGS[address], _FILES[address] = mapping, descriptor
    weakref.finalize(mapping, _close, address, descriptor)
    return tensor


def _close(address: int, descriptor: int) -> None:
    if _FILES.get(address) == descriptor:
        del _FILES[address]
    os.close(descriptor)


def release(tensor: torch.Tensor) -> None:
    """Give the memory of a contiguous part of a scratch tensor back; its values stay in the file. Others: nothing."""
    base = tensor.untyped_storage().data_ptr()
    mapping = _MAPPINGS.get(base)
    if mapping is None or not tensor.numel() or not hasattr(mapping, "madvise"):
        return
    first = (tensor.data_ptr() - base) // mmap.PAGESIZE * mmap.PAGESIZE
    last = min(tensor.data_ptr() - base + tensor.nbytes, len(mapping))
    mapping.madvise(mmap.MADV_DONTNEED, first, last - first)
    with suppress(OSError):  # what is not on the disk yet stays in the page cache until it is
        os.posix_fadvise(_FILES[base], first, last - first, os.POSIX_FADV_DONTNEED)


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)` for tensors of one shape, either of which may be a scratch tensor: by rows of the first
    dimension, so that little of it is in memory at a time."""
    rows = max(1, PIECE_BYTES // max(1, source[:1].nbytes)) if source.dim() else 1
    if not source.dim():
        target.copy_(source)
        return
    for into, piece in zip(target.split(rows), source.split(rows), strict=True):
        into.copy_(piece)
        release(into)
        release(piece)


def spilled(tensor: torch.Tensor, folder: str | os.PathLike | None = None) -> torch.Tensor:
    """A copy out of the device's memory: of a GPU's tensor on the host, of the host's in a file of `folder`.

    A matrix keeps the order of its elements in memory.
    """
    if tensor.device.type != "cpu":
        return tensor.cpu()
    turned = tensor.dim() == 2 and not tensor.is_contiguous() and tensor.mT.is_contiguous()
    source = tensor.mT if turned else tensor
    copy = scratch_tensor(source.shape, source.dtype, folder)
    copy_into(copy, source)
    return copy.mT if turned else copy
