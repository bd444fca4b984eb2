"""Tensors beside pages that nobody may touch: an access out of bounds ends the process.

An allocation ends where such a page begins, or begins where one ends; both are tried, because a tensor's bytes are
rarely whole pages. What lies between is a pattern that must still be there afterwards. Whatever runs beside these
tensors runs in a forked process, so that its end is a result like others.
"""

import ctypes
import math
import mmap
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

PAGE = mmap.PAGESIZE
PATTERN = 0xA5
_libc = ctypes.CDLL(None, use_errno=True)


class GuardedAllocator:
    """Makes tensors; `at_end` puts them before a forbidden page, else behind one.

    align: of their first byte. With 16, kernels take their paths for vectors, and up to 15 bytes behind a tensor whose
    bytes are no multiple of 16 are checked for writes only.
    """

    def __init__(self, at_end: bool, align: int = 16):
        self.at_end, self.align = at_end, align
        self.kept: list[tuple[mmap.mmap, int, int, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Contiguous, filled with the pattern."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.Tensor().to(dtype).new_zeros(shape)
        inner = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, inner + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ctypes.memset(first + PAGE, PATTERN, inner)
        for page in (first, first + PAGE + inner):
            if _libc.mprotect(ctypes.c_void_p(page), PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        align = max(self.align, dtype.itemsize)
        offset = PAGE + ((inner - size) // align * align if self.at_end else 0)
        self.kept.append((memory, first, offset, size))
        buffer = (ctypes.c_char * size).from_address(first + offset)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values and strides, and nothing behind the last item."""
        if not tensor.numel():
            return tensor
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((last + 1,), (1,), tensor.storage_offset())
        target = self.empty((last + 1,), tensor.dtype)
        target.copy_(flat)
        return target.as_strided(tensor.shape, tensor.stride())

    def check(self) -> None:
        """Raises where the pattern beside a tensor has changed."""
        for memory, first, offset, size in self.kept:
            inner = len(memory) - 2 * PAGE
            before = ctypes.string_at(first + PAGE, offset - PAGE)
            behind = ctypes.string_at(first + offset + size, PAGE + inner - offset - size)
            if before.strip(bytes([PATTERN])) or behind.strip(bytes([PATTERN])):
                raise AssertionError(f"bytes beside a tensor of {size} were written")


def allocate_all_with(allocator: GuardedAllocator) -> None:
    """From now on torch's own allocations on the CPU are guarded as well: outputs and workspaces of launchers.

    For a forked process: nothing is put back.
    """

    def shape_of(size: tuple) -> tuple[int, ...]:
        return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)

    def empty(*size, dtype=None, device=None, **_):
        return allocator.empty(shape_of(size), dtype or torch.get_default_dtype())

    def new_empty(self, *size, dtype=None, device=None, **_):
        return allocator.empty(shape_of(size), dtype or self.dtype)

    torch.empty, torch.Tensor.new_empty = empty, new_empty
    torch.zeros = lambda *size, **options: empty(*size, **options).zero_()


def fault_of(run: Callable[[], object]) -> str | None:
    """What went wrong when `run` ran in a forked process: None, a signal's name, or the error it printed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            with suppress(ValueError):
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.dup2(writing, 2)
            run()
            status = 0
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read().strip()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"{signal.Signals(os.WTERMSIG(status)).name}: {text}".rstrip(": ")
    return None if os.WEXITSTATUS(status) == 0 else text or "failed"
