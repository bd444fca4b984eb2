"""Tensors in files without a name: their values, their memory, and a disk that is full."""

import errno
import os

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.hardware import scratch
from slicegpt.hardware.scratch import copy_into, free_space, release, scratch_tensor, spilled


def resident() -> int:
    """Bytes of this process that are in memory, files included."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_values_stay_through_release(shape, dtype, tmp_path):
    tensor = scratch_tensor(shape, dtype, tmp_path)
    assert tensor.shape == shape
    assert not tensor.any()
    values = torch.arange(tensor.numel()).view(shape).to(dtype)
    tensor.copy_(values)
    release(tensor)
    assert torch.equal(tensor, values)
    release(tensor[1:])
    assert torch.equal(tensor, values)
    assert list(tmp_path.iterdir()) == []


def test_release_leaves_other_tensors_alone():
    """Their memory is in no file: giving it back would lose it."""
    tensor = torch.ones(100_000)
    release(tensor)
    assert tensor.eq(1).all()


def test_files_vanish_with_their_tensors(tmp_path):
    before = free_space(tmp_path)
    tensors = [scratch_tensor((1 << 20,), torch.float64, tmp_path) for _ in range(4)]
    files = len(scratch._FILES)
    view = tensors[0][5:]
    del tensors
    assert len(scratch._FILES) == files - 3  # the view keeps its file
    view.fill_(1)
    del view
    assert len(scratch._FILES) == files - 4
    assert abs(free_space(tmp_path) - before) < 1 << 40  # a figure of bytes; other processes write, too


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_copies_take_little_memory(tmp_path, monkeypatch):
    """64 MB into a file and back out, through pieces of 1 MB: no more than some of them are in memory at a time."""
    monkeypatch.setattr(scratch, "PIECE_BYTES", 1 << 20)
    tensor = scratch_tensor((64, 1 << 17), torch.float64, tmp_path)
    source = torch.randn(1, 1 << 17).double().expand(64, -1)
    before = resident()
    copy_into(tensor, source)
    assert resident() - before < 8 << 20
    total = sum(float(row.sum()) for row in tensor[:2])
    assert total == pytest.approx(2 * float(source[0].sum()))


@pytest.mark.parametrize("turned", [False, True])
def test_spilled_keeps_values_and_layout(turned, tmp_path):
    matrix = torch.randn(30, 20)
    matrix = matrix.mT if turned else matrix
    copy = spilled(matrix, tmp_path)
    assert torch.equal(copy, matrix)
    assert copy.stride() == matrix.stride()
    assert copy.data_ptr() != matrix.data_ptr()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SliceGPTError, match=r"scratch: a temporary file needs 0\.8 GB in .*, .* GB are free"):
        scratch_tensor((10**8,), torch.float64, tmp_path)
    with pytest.raises(SliceGPTError, match=r"scratch: a temporary file cannot write in .*: No such file"):
        scratch_tensor((4,), torch.float64, tmp_path / "nowhere")
